"""The wheel: built from the tracked files without network, complete, and enough to run the command."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.engine.conftest import petl_command
from tests.test_house import ROOT, run_python, tracked


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked wheel of the tracked files."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in {*tracked(), "petl/py.typed"}:
        target = folder / "source" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, target)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder / "dist")]
    built = subprocess.run([*command, str(folder / "source")], capture_output=True, text=True, timeout=300)
    assert built.returncode == 0, built.stdout + built.stderr
    (wheel,) = (folder / "dist").iterdir()
    assert wheel.name.startswith("petl_tuning-")
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "unpacked")
    return folder / "unpacked"


def test_the_wheel_is_complete(unpacked: Path) -> None:
    inside = {p.relative_to(unpacked).as_posix() for p in unpacked.rglob("*") if p.is_file()}
    names = tracked()
    expected = {name for name in names if name.startswith("petl/")} | {"petl/py.typed"}
    expected |= {f"petl/{name}" for name in names if name.startswith(("configs/", "recipes/"))}
    assert {"petl/configs/vtab/sparse_tuning.yaml", "petl/recipes/pretrain_tiny_clip.py"} <= expected
    bundled = {"vision.safetensors", "text.safetensors", "tokenizer.json", "MODEL.json"}
    assert {f"petl/backbones/bundled/{name}" for name in bundled} <= expected
    rest = {name for name in inside if ".dist-info/" not in name}
    assert rest == expected  # nothing is left out, and nothing else is shipped
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in inside)
    (metadata,) = unpacked.glob("*.dist-info/METADATA")
    assert "Name: petl-tuning\n" in metadata.read_text(encoding="utf-8")
    (scripts,) = unpacked.glob("*.dist-info/entry_points.txt")
    assert "petl = petl.cli:main" in scripts.read_text(encoding="utf-8")


def test_the_command_runs_from_the_wheel(unpacked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(unpacked))
    found = run_python("import petl; print(petl.__file__)", tmp_path).stdout.strip()
    assert Path(found).resolve().is_relative_to(unpacked.resolve())
    listed = petl_command("ls", cwd=tmp_path).stdout
    configs = {p.relative_to(ROOT / "configs").with_suffix("").as_posix() for p in (ROOT / "configs").glob("*/*.yaml")}
    assert "vtab/sparse_tuning" in configs
    tracked_configs = {n.removeprefix("configs/").removesuffix(".yaml") for n in tracked() if n.startswith("configs/")}
    assert not [name for name in configs & tracked_configs if name not in listed]
    assert not [name for name in ("SparseTuning", "bundled/tiny_clip_vision") if name not in listed]
    petl_command("cp", "vtab/sparse_tuning", cwd=tmp_path)
    copied = (tmp_path / "sparse_tuning.yaml").read_bytes()
    assert copied == (ROOT / "configs" / "vtab" / "sparse_tuning.yaml").read_bytes()
