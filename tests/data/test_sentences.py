"""Sentences of one's own: the three kinds of file, held-out sentences, batches, and bad input."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from petl.data import Sentences
from petl.errors import PetlError
from tests.conftest import private


def write(file: Path, text: str, encoding: str = "utf-8") -> str:
    file.write_bytes(text.encode(encoding))
    return str(file)


def lines(root: Path, *more: str, count: int = 8, name: str = "train.txt") -> str:
    """A file of ``label text`` with labels 0, 1, 0, 1, …"""
    return write(root / name, "\n".join([*(f"{i % 2} film number {i}" for i in range(count)), *more]) + "\n")


def entries(data: Sentences, split: str = "train") -> list[tuple[str, str]]:
    data._read_once()
    return [(data.labels[s.label], s.text) for s in data.splits[split].samples]


def refused(data: Sentences) -> str:
    with pytest.raises(PetlError) as error:
        data.setup("fit")
    return str(error.value)


# ---- files

SEEN = [("neg", "dull , dull"), ("pos", 'a "gem"')]
FILES = {
    "a.txt": 'neg  dull , dull \n\n pos a\t"gem"\r\n',
    "stsa.binary.train": 'neg dull , dull\npos a "gem"',
    "a.csv": '\ufefflabel, id,text\nneg,1,"dull , dull"\n\npos,2,"a\n""gem"""\n',
    "a.tsv": 'text\tlabel\ndull , dull\tneg\r\n"a ""gem"""\tpos\n',
    "a.JSONL": '{"text": "dull , dull", "label": "neg", "id": 3}\n\n{"label": "pos", "text": "a \\"gem\\""}\n',
}


@pytest.mark.parametrize("name", FILES)
def test_every_kind_of_file(tmp_path: Path, name: str) -> None:
    data = Sentences(write(tmp_path / name, FILES[name]), val_size=0)
    assert entries(data) == SEEN
    assert not data.problems
    assert (data.num_classes, data.labels) == (2, ["neg", "pos"])


@pytest.mark.parametrize(
    ("labels", "order"),
    [(["10", "9", "-1"], ["-1", "9", "10"]), (["b", "a", "10"], ["10", "a", "b"]), ([1, 0, 2], ["0", "1", "2"])],
)
def test_order_of_labels(tmp_path: Path, labels: list[Any], order: list[str]) -> None:
    text = "\n".join(json.dumps({"text": "it", "label": label}) for label in labels)
    data = Sentences(write(tmp_path / "a.jsonl", text), val_size=0)
    data._read_once()
    assert data.labels == order
    assert [order[s.label] for s in data.splits["train"].samples] == [str(v) for v in labels]


def test_names_are_given_in_the_order_of_the_labels(tmp_path: Path) -> None:
    data = Sentences(lines(tmp_path), names=["negative", "positive"], val_size=0)
    assert entries(data)[:2] == [("negative", "film number 0"), ("positive", "film number 1")]
    for names in (["one"], ["same", "same"]):
        problem = refused(Sentences(lines(tmp_path), names=names))
        assert "one name each, all different, for the 2 labels of" in problem
        assert problem.endswith("in this order: 0, 1.")


def test_encodings(tmp_path: Path) -> None:
    old = write(tmp_path / "old.txt", "1 caf\xe9 \x85 x\n0 na\xefve\n", "latin-1")
    data = Sentences(old, encoding="latin-1", val_size=0)
    assert entries(data) == [("1", "caf\xe9 x"), ("0", "na\xefve")]
    problem = refused(Sentences(old))
    assert f"{old} line 1 is not text in utf-8" in problem
    assert "encoding='latin-1'" in problem
    assert entries(Sentences(write(tmp_path / "wide.txt", "1 x\n0 y\n", "utf-16"), encoding="utf-16", val_size=0))
    assert data.protocol()["encoding"] == "latin-1"


# ---- batches and splits


def test_batches(tmp_path: Path) -> None:
    data = Sentences(lines(tmp_path), lines(tmp_path, count=3, name="val.txt"), batch_size=4)
    data.setup("fit")
    batches = list(data.train_dataloader())
    assert sorted(i for b in batches for i in b["index"].tolist()) == list(range(8))
    for batch in batches:
        assert set(batch) == {"text", "label", "index"}
        assert batch["text"] == [f"film number {i}" for i in batch["index"].tolist()]
        assert torch.equal(batch["label"], batch["index"] % 2)
    (batch,) = data.val_dataloader()
    assert batch["text"] == ["film number 0", "film number 1", "film number 2"]
    assert (batch["label"].tolist(), batch["index"].tolist()) == ([0, 1, 0], [0, 1, 2])
    assert data.preprocessing == {}
    assert data.texts("val") == batch["text"]
    with pytest.raises(PetlError, match=r"no split 'tset'; it has: train, val, test"):
        data.texts("tset")


def test_a_loader_with_workers_continues_where_it_stopped(tmp_path: Path) -> None:
    def loader(workers: int) -> Any:
        data = Sentences(lines(tmp_path, count=12), val_size=0, batch_size=3, num_workers=workers)
        data.setup("fit")
        return data.train_dataloader()

    whole = [b["text"] for b in loader(1)]
    first = loader(0)
    passing = iter(first)
    assert [next(passing)["text"], next(passing)["text"]] == whole[:2]
    second = loader(0)
    second.load_state_dict(first.state_dict())
    assert [b["text"] for b in second] == whole[2:]


def test_held_out_sentences_are_stratified_seeded_and_disjoint(tmp_path: Path) -> None:
    file = lines(tmp_path, count=40)
    data = Sentences(file, val_size=0.25, test_size=6)
    data.setup("fit")
    data.check()
    data.setup("test")
    parts = [set(data.texts(s)) for s in ("train", "val", "test")]
    assert [len(p) for p in parts] == [24, 10, 6]
    assert len(set.union(*parts)) == 40
    assert Counter(s.label for s in data.splits["val"].samples) == {0: 5, 1: 5}
    assert (data.split_names["val"], data.split_names["test"]) == ("0.25 held out of train", "6 held out of train")
    assert Sentences(file, val_size=0.25, test_size=6).protocol() == data.protocol()
    assert Sentences(file, val_size=0.25, test_size=6, seed=1).protocol()["splits"] != data.protocol()["splits"]


def test_files_of_val_and_test_are_taken_as_they_are(tmp_path: Path) -> None:
    val, test = (lines(tmp_path, count=n, name=f"{n}.txt") for n in (2, 4))
    both = Sentences(lines(tmp_path), val, test, val_size=0.5, test_size=0.5)
    assert {s: len(both.texts(s)) for s in ("train", "val", "test")} == {"train": 8, "val": 2, "test": 4}
    only_test = Sentences(lines(tmp_path), test=test, val_size=2)
    assert {s: len(only_test.texts(s)) for s in ("train", "val", "test")} == {"train": 6, "val": 2, "test": 4}
    only_val = Sentences(lines(tmp_path), val)
    only_val.setup("test")
    splits = only_val.protocol()["splits"]
    assert splits["test"] == splits["val"] | {"name": "the val split (2.txt)"}
    none = Sentences(lines(tmp_path), val_size=0, batch_size=4)
    none.setup("fit")
    assert (none.val_dataloader(), none.test_dataloader()) == ([], [])
    with pytest.raises(PetlError, match=r"has no val split, which 'validate' uses; it has: train \(train.txt\)"):
        none.setup("validate")


def test_check_and_protocol(tmp_path: Path) -> None:
    data = Sentences(lines(tmp_path), lines(tmp_path, count=4, name="val.txt"), names=["negative", "positive"])
    report = data.check()
    assert not report.problems
    assert report.lines[:3] == [
        "sentences/train.txt", "classes  2: negative, positive", "overlap  4 of 4 sentences of val stand in train too",
    ]  # fmt: skip
    digest = data.splits["train"].digest()
    assert report.lines[3] == (
        "train    train.txt: 8 sentences, 2 classes seen, 4 to 4 per class, 3 to 3 words, list SHA-256 " + digest[:16]
    )
    record = data.protocol()
    assert record["splits"]["train"] == {"name": "train.txt", "sentences": 8, "sha256": digest}
    assert (record["num_classes"], record["labels"], record["preprocessing"]) == (2, ["negative", "positive"], {})
    json.dumps(record)
    changed = Sentences(lines(tmp_path, "0 one more"), names=["negative", "positive"], val_size=0)
    assert changed.protocol()["splits"]["train"]["sha256"] != digest


# ---- bad input


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.txt", "1 fine\n\nbad\n", "a.txt line 3: 'bad' is not 'label text'"),
        ("a.csv", "text,lable\nx,1\n", "the header must have the columns text and label; it has ['text', 'lable']"),
        ("a.csv", "", "columns text and label; it has []"),
        ("a.csv", "text,label\nfine,1\nwell, no,1\n", "a.csv line 3: more cells than the header has columns; put"),
        ("a.csv", "text,label\nfine,1\nempty\n", "a.csv line 3: text or label is empty."),
        ("a.tsv", 'text\tlabel\n"so" good\t1\n', "a.tsv line 2: "),
        ("a.tsv", 'text\tlabel\n"never closed\t1\n', "a.tsv line 2: unexpected end of data. A text with quotes"),
        ("a.jsonl", '{"text": "x", "label": 1}\n{"text": "x"', "a.jsonl line 2 is not JSON, or cut short"),
        ("a.jsonl", '["x", 1]\n', "a.jsonl line 1: needs an object with text and label; it has list"),
        ("a.jsonl", '{"sentence": "x", "label": 1}\n', "line 1: needs an object with text; it has sentence, label"),
        ("a.jsonl", '{"text": 3, "label": 1}\n', "a.jsonl line 1: text is 3, not a string"),
        ("a.jsonl", '{"text": "x", "label": 0.5}\n', "label is 0.5, not a string or an integer"),
        ("a.jsonl", '{"text": "x", "label": true}\n', "label is True, not a string or an integer"),
        ("a.jsonl", '{"text": " ", "label": 1}\n', "text or label is empty"),
        ("a.jsonl", '{"text": "\\ud800", "label": 1}\n', "half a surrogate pair"),
        ("a.txt", "\n\n", "a.txt holds no sentences"),
    ],
)  # fmt: skip
def test_bad_files(tmp_path: Path, name: str, text: str, message: str) -> None:
    assert message in refused(Sentences(write(tmp_path / name, text), val_size=0))


def test_bad_files_are_listed_by_check(tmp_path: Path) -> None:
    assert f"file {tmp_path / 'no.txt'} does not exist." in Sentences(str(tmp_path / "no.txt")).check().problems
    assert "cannot be read" in refused(Sentences(str(tmp_path)))
    report = Sentences(lines(tmp_path, "bad", "worse"), val_size=2).check()
    assert len(report.problems) == 2
    empty = write(tmp_path / "empty.txt", "\n")
    assert Sentences(lines(tmp_path), empty).check().problems == [f"{empty} holds no sentences."]


def test_labels_that_train_does_not_have(tmp_path: Path) -> None:
    train = write(tmp_path / "train.txt", "negative bad\npositive good\n")
    val = write(tmp_path / "val.txt", "negative poor\npositve fine\n")
    problem = refused(Sentences(train, val))
    assert f"{val} line 2: label 'positve' of val is not one of train; did you mean 'positive'?" in problem
    plain = write(tmp_path / "plain.txt", "\n".join(f"w{i} is how it begins" for i in range(12)))
    assert "12 labels in 12 lines, the first is 'w0': does each line begin with its label?" in refused(Sentences(plain))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"val_size": 1.5}, r"val_size=1.5\): it is a share of train below 1, or a whole number"),
        ({"test_size": -1}, r"test_size=-1\): it is a share"),
        ({"encoding": "utf8-"}, None),
        ({"encoding": "latin1x"}, r"encoding='latin1x'\): did you mean 'latin-1'\?"),
        ({"batch_size": 0}, r"Sentences\(batch_size=0\): it is at least 1"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str | None) -> None:
    if message is None:  # Python knows this spelling
        Sentences("train.txt", **options)
        return
    with pytest.raises(PetlError, match=message):
        Sentences("train.txt", **options)


@pytest.mark.parametrize("options", [{"val_size": 0.01}, {"val_size": 8}, {"val_size": 0.5, "test_size": 0.5}])
def test_sizes_that_leave_nothing(tmp_path: Path, options: dict[str, Any]) -> None:
    assert "of 8 sentences leaves nothing to train on or to evaluate" in refused(Sentences(lines(tmp_path), **options))


def test_a_class_that_is_held_out_whole(tmp_path: Path) -> None:
    file = write(tmp_path / "a.txt", "a one\nb two\n" + "c three\n" * 8)
    assert "holding out 9 of 10 sentences leaves none of class" in refused(Sentences(file, val_size=9))


# ---- sentences that people wrote


def test_real_sentences_are_read() -> None:
    files = [str(private("text", f"stsa.binary.{s}")) for s in ("train", "dev", "test")]
    data = Sentences(*files, names=["negative", "positive"])
    report = data.check()
    assert not report.problems
    assert [len(data.texts(s)) for s in ("train", "val", "test")] == [6920, 872, 1821]
    assert data.texts("train")[0].startswith("a stirring , funny and finally transporting re-imagining of beauty")
    assert entries(data)[0][0] == "positive"
    assert "overlap  2 of 1,821 sentences of test stand in train too" in report.lines
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    assert batch["text"] == [data.texts("train")[i] for i in batch["index"].tolist()]
