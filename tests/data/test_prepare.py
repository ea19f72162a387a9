"""`petl data prepare`: whole or nothing, checksums, and archives that would write elsewhere."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from petl.cli import main
from petl.data.expressions import Expressions
from petl.data.prepare import new_folder
from petl.errors import PetlError
from tests.conftest import private
from tests.data.refer import PLAIN, pictures, write_refer
from tests.data.test_expressions import entry, write
from tests.data.test_refcoco import refcoco


def run(capsys: pytest.CaptureFixture[str], *args: object) -> tuple[int, str]:
    """Exit code, and what was printed."""
    code = main(["data", "prepare", *map(str, args)])
    printed = capsys.readouterr()
    return code, printed.out + printed.err


def names(folder: Path) -> set[str]:
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*")}


# ---- RefCOCO


def test_refcoco_is_converted_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    published = refcoco(write_refer(tmp_path)).protocol()["splits"]
    code, text = run(capsys, "refcoco", "--root", tmp_path, "--partial")
    assert code == 0, text
    assert "testA    1 images, 1 refs, 2 expressions" in text
    out = tmp_path / "refcoco_unc"
    assert names(out) == {"references.jsonl", "MANIFEST.json"}
    manifest = json.loads((out / "MANIFEST.json").read_text())
    for name, checksum in [*manifest["files"].items(), *manifest["sources"].items()]:
        file = next(tmp_path.rglob(name.replace("(", "[(]").replace(")", "[)]")))
        assert hashlib.sha256(file.read_bytes()).hexdigest() == checksum
    assert set(manifest["sources"]) == {"refs(unc).p", "instances.json"}
    assert manifest["splits"]["train"] == {k: v for k, v in published["train"].items() if k != "name"}
    first = json.loads((out / "references.jsonl").read_text().splitlines()[0])
    assert first == {
        "image": "COCO_train2014_000000000001.jpg", "expression": "Left dog", "bbox": [5.5, 10.0, 30.25, 20.0],
        "width": 80, "height": 60, "split": "train", "ref_id": 0,
    }  # fmt: skip
    (tmp_path / "refcoco").rename(tmp_path / "gone")
    for root in (tmp_path, out):
        data = refcoco(root, pictures(tmp_path / "images"))
        data.setup("fit")
        assert data.protocol()["splits"] == published
        assert data.sources == [out / "references.jsonl"]


def test_a_prepared_list_that_was_changed_or_is_another(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_refer(tmp_path)
    out = tmp_path / "out"
    assert run(capsys, "refcoco", "--root", tmp_path, "--partial", "--out", out)[0] == 0
    assert (
        "out was prepared from dataset 'refcoco', and not 'refcoco+'"
        in refcoco(out, dataset="refcoco+").check().problems[0]
    )
    with open(out / "references.jsonl", "a") as handle:
        handle.write("\n")
    assert "is not what 'petl data prepare' wrote: its SHA-256 differs" in refcoco(out).check().problems[0]


def test_bad_lists_write_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_refer(tmp_path)
    before = names(tmp_path)
    code, text = run(capsys, "refcoco", "--root", tmp_path, "--out", tmp_path / "a" / "b")
    assert code == 2
    assert "4 problems, nothing was written:\n  train has 2 referred objects" in text
    code, text = run(capsys, "refcoco", "--root", tmp_path / "refcoco", "--out", tmp_path)
    assert code == 2
    assert "exists already; name another --out" in text
    assert run(capsys, "refcoco", "--root", tmp_path, "--dataset", "refcocox")[0] == 2
    assert names(tmp_path) == before


def test_usage(capsys: pytest.CaptureFixture[str]) -> None:
    code, text = run(capsys, "refcocos")
    assert code == 2
    assert "usage: petl data prepare refcoco --root DIR" in text
    assert "did you mean 'refcoco'?" in text
    assert main(["data"]) == 2


def test_check_finds_what_a_training_would_stop_at(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write(tmp_path, entry(0), entry(1, split="val"))
    config = ["--config", "quickstart/classification", "--data", "petl.data.Expressions", "--data.file", str(file)]
    assert main(["data", "check", *config]) == 0
    printed = capsys.readouterr().out
    assert "boxes    0 of 2 boxes (0.0%) are impossible" in printed
    assert "val      list.jsonl, val: 1 images, 1 refs, 1 expressions, list SHA-256" in printed
    (tmp_path / "1.png").unlink()
    assert main(["data", "check", *config]) == 2
    assert "1 of 2 image files do not exist" in capsys.readouterr().err


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"

    def interrupted() -> None:
        with new_folder(out) as folder:
            (folder / "x").write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not names(tmp_path)
    (out.parent / ".out.part").mkdir(parents=True)
    (out.parent / ".out.part" / "left by a killed run").touch()
    with new_folder(out) as folder:
        (folder / "x").write_text("whole")
        assert not out.exists()
    assert names(tmp_path) == {"deep", "deep/out", "deep/out/x"}


# ---- lists of one's own


def archive(file: Path, members: dict[str, Any]) -> Path:
    """A tar of PNG pictures; a value can be a `tarfile.TarInfo` type with a link's target."""
    buffer = io.BytesIO()
    Image.new("RGB", (40, 30), "red").save(buffer, "PNG")
    with tarfile.open(file, "w:gz") as tar:
        for name, what in members.items():
            info = tarfile.TarInfo(name)
            if what is None:
                info.size = len(buffer.getvalue())
                tar.addfile(info, io.BytesIO(buffer.getvalue()))
            else:
                info.type, info.linkname = what
                tar.addfile(info)
    return file


def listed(tmp_path: Path, *names: str) -> Path:
    return write(tmp_path / "list", *[entry(image=name, expression="Red  thing") for name in names])


def test_pictures_come_out_of_an_archive(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tar = archive(tmp_path / "x.tgz", {"in": (tarfile.DIRTYPE, ""), "./in/a.png": None, "b.png": None, "c.png": None})
    out = tmp_path / "out"
    code, text = run(
        capsys, "expressions", "--file", listed(tmp_path, "in/a.png", "b.png"), "--images", tar, "--out", out
    )
    assert code == 0, text
    assert f"file: {out / 'references.jsonl'}" in text
    assert names(out) == {"MANIFEST.json", "references.jsonl", "in", "in/a.png", "b.png"}, "c.png is not named"
    data = Expressions(str(out / "references.jsonl"), **PLAIN)
    data.setup("fit")
    assert data.expressions("train") == ["red thing"] * 2
    assert json.loads((out / "references.jsonl").read_text().splitlines()[0])["width"] == 40


def test_pictures_of_a_folder_stay_where_they_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write(tmp_path / "list", entry(0), entry(1, split="val"))
    code, text = run(capsys, "expressions", "--file", file, "--images", file.parent, "--out", tmp_path / "out")
    assert code == 0, text
    assert f"image_root: {file.parent}" in text
    assert names(tmp_path / "out") == {"MANIFEST.json", "references.jsonl"}
    assert "test" not in json.loads((tmp_path / "out" / "MANIFEST.json").read_text())["splits"]


@pytest.mark.parametrize(
    ("name", "what", "message"),
    [
        ("../evil.png", None, "'../evil.png' leads out of the folder"),
        ("a/../../evil.png", None, "leads out of the folder"),
        ("/evil.png", None, "leads out of the folder"),
        ("link.png", (tarfile.SYMTYPE, "../secret"), "'link.png' is a link to '../secret'"),
        ("link.png", (tarfile.LNKTYPE, "a.png"), "is a link to 'a.png'"),
        ("pipe", (tarfile.FIFOTYPE, ""), "is neither a file nor a folder"),
    ],
)
def test_archives_that_are_not_plain_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, what: Any, message: str
) -> None:
    tar = archive(tmp_path / "x.tar", {"a.png": None, name: what})
    file = listed(tmp_path, "a.png")
    before = names(tmp_path)
    code, text = run(capsys, "expressions", "--file", file, "--images", tar, "--out", tmp_path / "out")
    assert code == 2
    assert message in text
    assert "refused, nothing was extracted" in text
    assert names(tmp_path) == before


def test_missing_pictures_bad_lines_and_bad_archives(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tar = archive(tmp_path / "x.tar", {"a.png": None})
    file = listed(tmp_path, "a.png", "b.png")
    before = names(tmp_path)
    out = ("--out", tmp_path / "out")
    assert (
        "1 of 2 image files do not exist: b.png" in run(capsys, "expressions", "--file", file, "--images", tar, *out)[1]
    )
    tar.write_bytes(tar.read_bytes()[:100])
    assert "is cut short or no tar archive" in run(capsys, "expressions", "--file", file, "--images", tar, *out)[1]
    code, text = run(capsys, "expressions", "--file", file, "--images", tmp_path / "none.tar", *out)
    assert (code, "none.tar does not exist" in text) == (2, True)
    file.write_text('{"image": "a.png", "expression": "x", "bbox": [1, 1, -2, 2]}\n{"ima')
    text = run(capsys, "expressions", "--file", file, "--images", file.parent, *out)[1]
    assert "3 problems, nothing was written" in text
    assert "list.jsonl line 2 is not JSON" in text
    assert names(tmp_path) == before


def test_real_expressions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, tar = private("grounding", "rec_human.jsonl"), private("grounding", "coco_val128.tar")
    out = tmp_path / "out"
    code, text = run(
        capsys, "expressions", "--file", file, "--images", tar, file.parent, "--split", "train", "--out", out
    )
    assert code == 0, text
    assert "train    21 images, 29 refs, 46 expressions" in text
    data = Expressions(str(out / "references.jsonl"), val_fraction=0.2, **PLAIN)
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    assert batch["image"].shape == (2, 3, 64, 64)
    assert batch["box"].min() >= 0
    with pytest.raises(PetlError, match="exists already"), new_folder(out):
        pass
