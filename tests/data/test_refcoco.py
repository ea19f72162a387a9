"""RefCOCO in its published forms, from synthetic files; a pickle that asks for a function runs nothing."""

from __future__ import annotations

import json
import os
import pickle
import sys
from pathlib import Path
from typing import Any

import pytest

from petl.data.plain_pickle import read_plain_pickle
from petl.data.refcoco import DATASETS, RefCOCO
from petl.data.refer_files import split_names
from petl.errors import PetlError
from tests.data.refer import PLAIN, file_name, hub, instances, pictures, refs, write_hub, write_refer


def refcoco(root: Path, images: Path | None = None, **options: Any) -> RefCOCO:
    given = {"dataset": "refcoco", "partial": True} | PLAIN | options
    return RefCOCO(root=str(root), image_root=str(images or root), **given)


def found(root: Path, **options: Any) -> str:
    """The one error of a list that is not usable."""
    with pytest.raises(PetlError) as error:
        refcoco(root, pictures(root / "pictures"), **options).setup("fit")
    return str(error.value)


# ---- reading


def test_the_published_files(tmp_path: Path) -> None:
    data = refcoco(write_refer(tmp_path), pictures(tmp_path / "train2014"), check_images=True)
    data.setup("test")
    assert {s: v.counts() for s, v in data.splits.items()} == {
        "train": {"images": 1, "refs": 2, "expressions": 3},
        "val": {"images": 1, "refs": 1, "expressions": 1},
        "testA": {"images": 1, "refs": 1, "expressions": 2},
        "testB": {"images": 1, "refs": 1, "expressions": 1},
    }
    first = data.splits["train"][0]
    assert first.image == tmp_path / "train2014" / file_name(1), "from instances.json, not from the refs"
    assert (first.box, first.width, first.height, first.ref_id) == ((5.5, 10.0, 30.25, 20.0), 80, 60, 0)
    assert data.expressions("train") == ["left dog", "dog on the left", "right dog"]
    batches = list(data.test_dataloader())
    assert [b["expression"] for b in batches] == [["the bright man", "man"]], "testA unless another is named"
    other = refcoco(tmp_path, tmp_path / "train2014", test_split="testB")
    other.setup("test")
    assert [b["expression"] for b in other.test_dataloader()] == [["the wall"]]
    assert (data.image_source, data.name) == ("coco", "refcoco/unc (partial)")


@pytest.mark.parametrize("corners", [True, False])
def test_rows_of_the_hub_give_the_same_lists(tmp_path: Path, corners: bool) -> None:
    published = refcoco(write_refer(tmp_path / "a")).protocol()["splits"]
    assert refcoco(write_hub(tmp_path / "b", corners)).protocol()["splits"] == published
    whole = tmp_path / "c" / "refcoco"
    whole.mkdir(parents=True)
    (whole / "rows.json").write_text(json.dumps([row for rows in hub(corners).values() for row in rows]))
    assert refcoco(tmp_path / "c").protocol()["splits"] == published


def test_parquet_rows(tmp_path: Path) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    for name, rows in hub().items():
        parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / f"{name}-00000-of-00001.parquet")
    assert len(refcoco(tmp_path).expressions("train")) == 3


def test_parquet_without_pyarrow_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "train-00000-of-00001.parquet").write_bytes(b"PAR1")
    assert "train-00000-of-00001.parquet is a parquet file: install pyarrow" in found(tmp_path)


def test_rows_whose_box_fits_neither_way(tmp_path: Path) -> None:
    write_hub(tmp_path)
    rows = hub()["train"]
    rows[0]["bbox"] = [1, 1, 2, 2]
    (tmp_path / "data" / "train-00000-of-00001.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    assert "bbox equals the box of raw_anns as (x, y, w, h) in 1 and as corners in 4 of 5 rows" in found(tmp_path)
    del rows[0]["raw_anns"]
    (tmp_path / "data" / "train-00000-of-00001.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    assert "cannot be compared with raw_anns" in found(tmp_path)


def test_whole_pixels_as_in_transvg(tmp_path: Path) -> None:
    data = refcoco(write_refer(tmp_path), int_boxes=True)
    data.check()
    assert data.splits["train"][0].box == (5, 10, 30, 20)


def test_referit_game(tmp_path: Path) -> None:
    listed = refs()
    for ref, split in zip(listed, ("train", "val", "testA", "testAB", "testC"), strict=True):
        ref["split"] = split
    data = refcoco(write_refer(tmp_path, listed, dataset="refclef"), dataset="refclef", partial=False)
    assert not data.check().problems[1:], "one: the pictures are missing"
    counts = {s: v.counts()["refs"] for s, v in data.splits.items()}
    assert counts == {"train": 1, "val": 1, "testA": 2, "testB": 1, "testC": 1}, (
        "no numbers are published to hold it to"
    )
    assert data.image_source is None
    assert split_names("testABC") == ["testA", "testB", "testC"]
    assert split_names("test") == ["test"]


def test_published_numbers_are_held(tmp_path: Path) -> None:
    text = found(write_refer(tmp_path), partial=False)
    assert "4 problems" in text
    assert "train has 2 referred objects, refcoco unc has 42,404; if this is a part of it on purpose" in text
    numbers = {(d, by): tuple(v.refs.values()) for d, ways in DATASETS.items() for by, v in ways.items()}
    assert numbers["refcoco", "unc"] == (42404, 3811, 1975, 1810)
    assert sum(numbers["refcoco", "unc"]) == 50_000
    assert sum(numbers["refcoco+", "unc"]) == 49_856
    assert sum(numbers["refcocog", "umd"]) == sum(numbers["refcocog", "google"]) == 49_822


# ---- bad input


class Attack:
    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.file}",)


@pytest.mark.parametrize("protocol", range(6))
def test_a_pickle_with_a_function_inside_is_refused_and_runs_nothing(tmp_path: Path, protocol: int) -> None:
    write_refer(tmp_path)
    traces = tmp_path / "traces"
    file = tmp_path / "refcoco" / "refs(unc).p"
    file.write_bytes(pickle.dumps([*refs(), Attack(traces)], protocol=protocol))
    text = found(tmp_path)
    assert f"{file}: the pickle asks for {os.name}.system: refused, nothing was run" in text
    assert not traces.exists()


@pytest.mark.parametrize("value", [Path("x"), complex(1, 2), {1, 2}, bytearray(b"x")], ids=lambda v: type(v).__name__)
def test_harmless_classes_are_refused_too(tmp_path: Path, value: Any) -> None:
    (tmp_path / "x.p").write_bytes(pickle.dumps([value], protocol=2))
    with pytest.raises(PetlError, match="refused"):
        read_plain_pickle(tmp_path / "x.p")


def test_pickles_of_python_2_and_damaged_ones(tmp_path: Path) -> None:
    file = tmp_path / "x.p"
    file.write_bytes(b"\x80\x02]U\x04caf\xe9a.")
    assert read_plain_pickle(file) == ["café"]
    whole = pickle.dumps(refs(), protocol=2)
    for content in (whole[:-40], b"", b"not a pickle", b"\x80\x02\xff."):
        file.write_bytes(content)
        with pytest.raises(PetlError, match=r"x\.p is cut short or no pickle"):
            read_plain_pickle(file)


def test_one_file_without_the_other(tmp_path: Path) -> None:
    folder = write_refer(tmp_path) / "refcoco"
    (folder / "instances.json").rename(tmp_path / "kept")
    assert r"holds refs(unc).p without instances.json" in found(tmp_path)
    (tmp_path / "kept").rename(folder / "instances.json")
    (folder / "refs(unc).p").rename(folder / "refs(google).p")
    assert "holds instances.json without refs(unc).p, where the expressions are; it has: refs(google).p" in found(
        tmp_path
    )
    (folder / "instances.json").unlink()
    assert "holds refs(google).p, but neither refs(unc).p nor instances.json" in found(tmp_path)
    (folder / "refs(google).p").unlink()
    assert "holds neither refcoco/refs(unc).p with instances.json, nor rows of the hub" in found(tmp_path)


def changed(**values: Any) -> list[dict[str, Any]]:
    """The refs with a change in the first."""
    listed = refs()
    listed[0] |= values
    return listed


@pytest.mark.parametrize(
    ("listed", "message"),
    [
        (changed(split="tset"), "refs(unc).p entry 0: split 'tset'; did you mean 'testB' or 'testA'?"),
        (changed(ann_id=999), "entry 0 (ref_id 0) names annotation 999, which"),
        (changed(image_id=999), "names image 999, which"),
        (changed(ann_id=[1]), "entry 0 is no referred object: TypeError"),
        (changed(sentences=[{"sent": "", "raw": " "}]), "entry 0: the expression is empty"),
        (changed(sentences="x"), "entry 0 is no referred object"),
        ([7], "entry 0 is no referred object"),
        ({"a": 1}, "refs(unc).p holds dict, not the list of referred objects"),
    ],
)
def test_bad_refs_are_named(tmp_path: Path, listed: Any, message: str) -> None:
    assert message in found(write_refer(tmp_path, listed))


def test_bad_instances_are_named(tmp_path: Path) -> None:
    coco = instances()
    coco["annotations"][1]["bbox"] = [40.0, 10.0, 79.5, 55.0]
    text = found(write_refer(tmp_path, coco=coco))
    assert "1 of 7 boxes (14.3%) are impossible." in text
    assert (
        "entry 1: box [40.0, 10.0, 79.5, 55.0] (x, y, w, h) has no area or does not lie in the picture of 80 x 60"
        in text
    )
    (tmp_path / "refcoco" / "instances.json").write_text(json.dumps(coco)[:-30])
    assert "instances.json is cut short or no list of COCO instances" in found(tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dataset": "refcoc"}, r"dataset='refcoc'\): did you mean 'refcoco'"),
        ({"split_by": "umd"}, r"'refcoco', split_by='umd'\): valid are: unc"),
        ({"test_split": "test"}, r"test_split='test'\): its splits are train, val, testA, testB"),
        ({"dataset": "refcocog", "test_split": "testA"}, "its splits are train, val, test"),
        ({"dataset": "refcocog", "split_by": "google", "test_split": "test"}, "its splits are train, val"),
        ({"flip_words": "letters"}, "flip_words='letters': valid are: reference, words"),
    ],
)
def test_bad_options(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(PetlError, match=message):
        refcoco(tmp_path, **options)


def test_missing_pictures_are_counted_before_training(tmp_path: Path) -> None:
    write_refer(tmp_path)
    with pytest.raises(PetlError, match=r"2 of 2 image files do not exist: .*COCO_train2014_000000000001.jpg"):
        refcoco(tmp_path).setup("fit")
    with pytest.raises(PetlError, match=r"root .*nowhere does not exist"):
        refcoco(tmp_path / "nowhere").setup("fit")
