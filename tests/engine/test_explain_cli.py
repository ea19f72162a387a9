"""`petl explain` on the command line: numbers, pictures, sentences, and one clear error for bad input."""

from __future__ import annotations

import json
import os
import pty
import re
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import petl as package
from petl.cli import main
from petl.engine.explain_cli import class_index, player_words
from petl.pictures import unnormalise
from tests.adapters.explained import LABELS, classifier, explained, explained_text, picture, save, text_classifier
from tests.engine.conftest import petl_command
from tests.engine.grounding import Petl, commands
from tests.engine.test_grounding_errors import refused

SENTENCE = "A stirring film, and NOT dull!"
EFFICIENCY = re.compile(r"^efficiency: sum of values (\S+) = v\(1\) (\S+) - v\(0\) (\S+), gap (\S+)$", re.MULTILINE)
PLAYER = re.compile(r"^  row (\d), column (\d)  ([+-]\S+)$", re.MULTILINE)


@pytest.fixture(scope="module")
def petl() -> Iterator[Petl]:
    with commands() as run:
        yield run


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``image`` and ``text`` explain, ``plain`` is the classifier of ``image``; ``x.png``. Nobody writes into it."""
    where = tmp_path_factory.mktemp("explained")
    save(explained(), where / "image")
    save(classifier(), where / "plain")
    name = text_classifier(where / "bert")
    package.save(explained_text(name), where / "text", name, labels=["bad", "good"])
    picture(50, 40).save(where / "x.png")
    return where


def efficiency(printed: str) -> tuple[float, ...]:
    [found] = EFFICIENCY.findall(printed)
    return tuple(float(v) for v in found)


def check_efficiency(printed: str, found: Any, chosen: int) -> None:
    total, grand, null, gap = efficiency(printed)
    assert total == pytest.approx(grand - null, abs=2e-4)
    assert gap < 1e-6
    assert (grand, null) == pytest.approx((float(found.grand[0, chosen]), float(found.null[0, chosen])), abs=1e-4)
    assert total == pytest.approx(float(found.values[0, :, chosen].sum()), abs=1e-4)


def colours(file: Path) -> tuple[int, int]:
    """How many pixels are red and blue."""
    red, _, blue = np.asarray(Image.open(file).convert("RGB")).astype(int).transpose(2, 0, 1)
    return int((red - blue > 60).sum()), int((blue - red > 60).sum())


# ---- images


def test_an_image_in_a_process_of_its_own(folder: Path, tmp_path: Path) -> None:
    done = petl_command("explain", str(folder / "image"), str(folder / "x.png"), "--top", "8", cwd=tmp_path)
    predictor = package.load(folder / "image")
    found, prediction = predictor.explain(folder / "x.png"), predictor.classify(folder / "x.png")
    chosen = int(found.logits.argmax())
    first, second, *_, last = done.stdout.splitlines()
    assert first == f"prediction: {prediction.label} {prediction.probability:.1%}"
    assert second == f"explained: {LABELS[chosen]}; v is its probability by the surrogate"
    check_efficiency(done.stdout, found, chosen)
    players = PLAYER.findall(done.stdout)
    assert "strongest 8 of 8 players in 2 rows and 4 columns:" in done.stdout
    cells = found.maps()[0]
    assert [float(v) for *_, v in players] == pytest.approx(
        [float(cells[int(r) - 1, int(c) - 1]) for r, c, _ in players], abs=1e-4
    )
    sizes = [abs(float(v)) for *_, v in players]
    assert sizes == sorted(sizes, reverse=True)
    assert last == "drawn: explained.png"
    assert [p.name for p in tmp_path.iterdir()] == ["explained.png"]
    assert min(Image.open(tmp_path / "explained.png").size) > 250
    assert min(colours(tmp_path / "explained.png")) > 500, "for and against"


def test_what_is_drawn(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Any] = []
    monkeypatch.setattr("petl.heatmaps.heatmap_grid", lambda *args, **options: drawn.append((*args, options)))
    monkeypatch.chdir(tmp_path)
    assert main(["explain", str(folder / "image"), str(folder / "x.png"), "--class", "dog", "--out", "deep/y.png"]) == 0
    [(images, maps, [title], file, _)] = drawn
    predictor = package.load(folder / "image")
    found = predictor.explain(folder / "x.png")
    assert torch.equal(maps[0], found.values[0, :, 3].unflatten(0, (2, 4)))
    assert torch.equal(images[0], unnormalise(predictor.preprocess(folder / "x.png"), [0.5] * 3, [0.25] * 3))
    assert 0 <= float(images.min()) < float(images.max()) <= 1
    assert re.fullmatch(r"predicted: \w+ \(\d+%\); blue for dog, red against", title)
    assert file == Path("deep/y.png")


def test_a_class_by_name_or_by_index(petl: Petl, folder: Path, tmp_path: Path) -> None:
    found = package.load(folder / "image").explain(folder / "x.png")
    for number, label in enumerate(LABELS):
        args = [folder / "x.png", "--class", label, "--top", 1, "--out", f"{label}.png"]
        printed = petl("explain", folder / "image", *args, cwd=tmp_path).stdout
        assert f"\nexplained: {label};" in printed
        check_efficiency(printed, found, number)
        assert len(PLAYER.findall(printed)) == 1
    nameless = save(explained(grand="main", players=None), tmp_path / "nameless", labels=None)
    printed = petl("explain", nameless, folder / "x.png", "--class", 2, cwd=tmp_path).stdout
    assert "\nexplained: 2; v is its probability by the classifier" in printed
    assert "strongest 5 of 16 players in 4 rows and 4 columns:" in printed
    probability = package.load(nameless).classify(folder / "x.png").probabilities["2"]
    assert efficiency(printed)[1] == pytest.approx(probability, abs=1e-4)
    assert class_index("b", ["a", "b", "b"]) == 1


def test_classify_and_info_on_an_explanation(petl: Petl, folder: Path, tmp_path: Path) -> None:
    printed = [petl("classify", folder / n, folder / "x.png", cwd=tmp_path).stdout for n in ("plain", "image")]
    assert printed[0] == printed[1]
    assert "drawn: classified.png" in printed[1]
    record = json.loads((folder / "image" / "adapter_config.json").read_text())["classifier"]
    info = petl("info", folder / "image", cwd=tmp_path).stdout
    assert f"explains   a classifier of 4 classes with linear_probe, whole weights {record['weights'][:16]}\n" in info
    assert "task       explanation, 4 labels: ant, bee, cat, dog" in info
    assert "intact     yes" in info
    assert (
        "explains   a classifier of 2 classes with a head of its own"
        in petl("info", folder / "text", cwd=tmp_path).stdout
    )
    assert "explains" not in petl("info", folder / "plain", cwd=tmp_path).stdout


def test_the_hint_after_a_training(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name, verb in (("Explanation", "explain"), ("Grounding", "ground"), ("Classification", "classify")):
        parts = SimpleNamespace(trainer=SimpleNamespace(is_global_zero=True), options=SimpleNamespace(run_dir="runs/x"))
        parts.model = type(name, (), {})()
        monkeypatch.setattr("petl.engine.lightning_cli.run", lambda args, parts=parts: parts)
        assert main(["fit"]) == 0
        assert capsys.readouterr().out == f"adapter: runs/x/adapter   (petl info, petl {verb}, petl.load)\n"


# ---- sentences


def test_a_sentence(petl: Petl, folder: Path, tmp_path: Path) -> None:
    printed = petl("explain", folder / "text", SENTENCE, "--html", "deep/s.html", "--top", 3, cwd=tmp_path).stdout
    predictor = package.load(folder / "text")
    found = predictor.explain(SENTENCE)
    check_efficiency(printed, found, int(found.logits.argmax()))
    words = ["a", "stirring", "film", "[UNK]", "and", "not", "dull", "!"]
    assert "strongest 3 of 8 players:" in printed
    values = found.values[0, :, int(found.logits.argmax())]
    strongest = int(values.abs().argmax())
    assert re.search(
        rf"^  {strongest + 1} {re.escape(words[strongest])} +{re.escape(format(float(values[strongest]), '+.4f'))}$",
        printed,
        re.M,
    )
    line = printed.splitlines()[-2]
    assert re.sub(r" \([+-][\d.]+\)", "", line) == " ".join(words), "not a terminal: no colours"
    assert printed.endswith("written: deep/s.html\n")
    page = (tmp_path / "deep" / "s.html").read_text(encoding="utf-8")
    assert page.startswith("<!doctype html>")
    assert re.findall(r'title="[^"]*">([^<]+)</span>', page) == words
    assert [p.name for p in tmp_path.iterdir()] == ["deep"], "no picture"


def test_a_sentence_that_is_cut_and_one_without_words(petl: Petl, folder: Path, tmp_path: Path) -> None:
    printed = petl("explain", folder / "text", "a dull play " * 9, cwd=tmp_path).stdout
    assert "the sentence has 29 tokens and was cut to 16." in printed
    assert "strongest 5 of 14 players:" in printed
    printed = petl("explain", folder / "text", "[SEP]", "--html", "s.html", cwd=tmp_path).stdout
    assert efficiency(printed)[0] == 0
    assert "strongest 0 of 0 players:" in printed
    printed = petl("explain", folder / "text", "film", cwd=tmp_path).stdout
    assert "strongest 1 of 1 players:" in printed


def test_colours_are_for_terminals(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def shown(no_color: str) -> str:
        leader, follower = pty.openpty()
        monkeypatch.setenv("NO_COLOR", no_color)
        with os.fdopen(follower, "w") as terminal, monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", terminal)
            assert main(["explain", str(folder / "text"), SENTENCE]) == 0
        printed = b""
        with suppress(OSError):  # how the end is told
            while part := os.read(leader, 4096):
                printed += part
        os.close(leader)
        return printed.decode()

    assert "\x1b[48;2;" in shown(""), "an empty NO_COLOR is none"
    assert "\x1b" not in shown("1")


def test_words_of_a_batch(folder: Path) -> None:
    model = explained_text(f"hf/{folder / 'bert'}")
    texts = ["plays dull films", "stirring !", "[SEP]"]
    given = model.tokenizer(texts, padding=True, return_tensors="pt")
    batch = {k: given[k] for k in ("input_ids", "attention_mask")}
    words = [["plays", "dull", "films"], ["stirring", "!"], []]
    assert player_words(model.tokenizer, batch["input_ids"], model.players(batch)) == words
    pieces = package.ExplainedClassifier(
        model.release(), package.AutoGnothi(reduction=4, whole_words=False), model.tokenizer
    )
    words = [["play", "s", "dull", "film", "s"], ["stir", "ring", "!"], []]
    assert player_words(model.tokenizer, batch["input_ids"], pieces.players(batch)) == words


# ---- refused

REFUSED: dict[str, tuple[list[str], str]] = {
    "a classification adapter": (
        ["plain", "x.png"],
        "trained for 'classification', not to explain: train side networks",
    ),
    "an unknown class": (
        ["image", "x.png", "--class", "dgo"],
        "--class 'dgo': the classifier knows no such class; did you mean 'dog'?",
    ),
    "a class by index that has a name": (["image", "x.png", "--class", "2"], "valid are: ant, bee, cat, dog"),
    "a sentence to look at": (["image", "a stirring film"], "looks at images, and there is no file 'a stirring film'."),
    "a long sentence to look at": (["image", "a film " * 200], "looks at images, and there is no file 'a film a "),
    "an image to read": (["text", "x.png"], "reads text: pass a sentence, not the file 'x.png'."),
    "an empty sentence": (["text", "  "], "reads text: pass a sentence, not '  '."),
    "a page of an image": (["image", "x.png", "--html", "s.html"], "--html writes a sentence"),
    "a picture of a sentence": (["text", "a film", "--out", "x.png"], "--out draws an image"),
    "no number of players": (["image", "x.png", "--top", "0"], "--top 0: it is the number of players"),
    "a picture of no kind": (["image", "x.png", "--out", "x.txt"], "--out x.txt: a picture is a file that ends in"),
    "a page of no kind": (["text", "a film", "--html", "x.png"], "--html x.png: a page is a file that ends in .html"),
    "a page nowhere": (
        ["text", "a film", "--html", "x.png/s.html"],
        "the sentence could not be written to x.png/s.html",
    ),
    "a picture nowhere": (
        ["image", "x.png", "--out", "x.png/y.png"],
        "the picture could not be written to x.png/y.png",
    ),
    "no image": (["image", "vocab.txt"], "image vocab.txt is cut short or not an image"),
    "no adapter": (["bert", "x.png"], "is not an adapter: it has no adapter_config.json"),
    "sentences to classify": (["text", "x.png"], "reads text: pass a sentence, not the file"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_input(petl: Petl, folder: Path, tmp_path: Path, name: str) -> None:
    (adapter, *rest), message = REFUSED[name]
    (tmp_path / "x.png").write_bytes((folder / "x.png").read_bytes())
    (tmp_path / "vocab.txt").write_text("a")
    verb = "classify" if name.endswith("classify") else "explain"
    said = refused(petl, verb, folder / adapter, *rest, cwd=tmp_path)
    assert message in said
    assert said.count("\n") == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["vocab.txt", "x.png"], "nothing is written"


def test_report_counts_the_side_networks(capsys: pytest.CaptureFixture[str]) -> None:
    from petl.cli import main

    assert main(["report", "--config", "quickstart/explain", "--model.method.reduction", "8"]) == 0
    printed = capsys.readouterr().out
    e = 128 // 8
    ladder = 12 * (128 * e + e + 12 * e * e + 13 * e) + 2 * e
    assert f"{ladder + 10 * e + 10:,} in the surrogate" in printed
    assert "2,407,818" in printed  # the bundled ViT at 32 pixels, and its head
