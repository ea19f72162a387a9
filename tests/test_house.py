"""The rules of the house: which way imports point, sizes, forbidden calls, docstrings, the public names."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import pkgutil
import re
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

import petl
import petl.data.base
from petl.methods import entries, get_method

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "petl"
SOURCES = sorted(PACKAGE.rglob("*.py"))
LAYERS = ("nn", "backbones", "methods", "models", "tasks", "engine", "cli")
MAY_IMPORT = {layer: {"errors", *LAYERS[: i + 1]} for i, layer in enumerate(LAYERS)}
SIDE = {
    "data",
    "adapters",
    "costs",
    "pictures",
    "heatmaps",
}  # beside the layers: they never import tasks, engine or cli
MAY_IMPORT["tasks"].add("adapters")
MAY_IMPORT["engine"] |= SIDE
MAY_IMPORT |= {part: {"errors", "nn", "backbones", "methods", "models", *SIDE} for part in SIDE}
MAY_IMPORT["errors"] = {"errors"}
FREE = {"cli", "__init__", "__main__"}  # the doors of the package


def part_of(module: str) -> str:
    """``petl.methods.base`` -> ``methods``; the package itself is ``__init__``."""
    return module.split(".")[1] if "." in module else "__init__"


def imported(tree: ast.AST, package: str) -> Iterator[tuple[int, str]]:
    """(line, petl module) of every import in a file, inside functions too; lazy public names count as their module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, a.name) for a in node.names if a.name.partition(".")[0] == "petl")
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package.split(".")[: len(package.split(".")) + 1 - node.level]) if node.level else ""
            source = ".".join(p for p in (base, node.module) if p)
            if source.partition(".")[0] != "petl":
                continue
            for alias in node.names:
                if source != "petl":
                    yield node.lineno, source
                elif alias.name != "__version__":
                    yield node.lineno, petl._PUBLIC.get(alias.name, f"petl.{alias.name}")


@pytest.mark.parametrize("file", SOURCES, ids=lambda f: str(f.relative_to(PACKAGE)))
def test_imports_point_one_way(file: Path) -> None:
    parts = file.relative_to(ROOT).with_suffix("").parts
    part = parts[1]
    if part in FREE:
        return
    assert part in MAY_IMPORT, f"petl/{part} has no place in the order of imports: add it to this test and to DESIGN"
    found = [*imported(ast.parse(file.read_text(encoding="utf-8")), ".".join(parts[:-1]))]
    wrong = [f"line {line}: {module}" for line, module in found if part_of(module) not in MAY_IMPORT[part]]
    assert not wrong, f"{file.relative_to(ROOT)} imports what lies behind it: {wrong}"


def test_the_import_rule_sees_every_kind_of_import() -> None:
    code = """
        import torch, petl.tasks.base
        from petl import data, Classification, __version__
        def f():
            from ..engine import callbacks
            from .base import Method
            from petl.cli import main
    """
    found = [module for _, module in imported(ast.parse(textwrap.dedent(code)), "petl.methods")]
    assert sorted(found) == [
        "petl.cli",
        "petl.data",
        "petl.engine",
        "petl.methods.base",
        "petl.tasks.base",
        "petl.tasks.classification",
    ]


def test_no_file_is_long() -> None:
    files = [f for folder in ("petl", "recipes", "tests") for f in (ROOT / folder).rglob("*.py")]
    assert len(files) > 60
    lengths = {str(f.relative_to(ROOT)): len(f.read_text(encoding="utf-8").splitlines()) for f in files}
    assert not {name: n for name, n in lengths.items() if n > 400}


def tracked() -> list[str]:
    """Files that git knows, or skip where this is no checkout."""
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("not a git checkout")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [name for name in listed.split("\0") if (ROOT / name).is_file()]


def test_no_file_names_a_path_of_a_machine() -> None:
    fixed = re.compile(r"(?<![\w.~-])/(?:work|root|home/[a-z_][\w-]*)/")
    temporary = re.compile(r"(?<![\w.~-])/tmp(?:/|\b)")
    for place in ("work", "home/me", "root"):
        assert fixed.search(f"='/{place}/x'"), place
    assert not fixed.search("https://example.org/" + "work/x")
    wrong = []
    for name in tracked():
        try:
            lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError:
            continue  # weights and pictures
        free = name.startswith(("tests/", "notebooks/"))
        wrong += [
            f"{name}:{number}: {line.strip()[:80]}"
            for number, line in enumerate(lines, 1)
            if fixed.search(line) or (not free and temporary.search(line))
        ]
    assert not wrong


FORBIDDEN = {
    "unpickling": r"\bpickle\.loads?\b|\bUnpickler\b",
    "torch.load of objects": r"weights_only\s*=\s*False",
    "code of strangers": r"trust_remote_code\s*=\s*True",
    "YAML that builds objects": r"\byaml\.(?:load|load_all|unsafe_load|full_load)\s*\(",
    "unused parameters under DDP": r"find_unused_parameters\s*=\s*True",
}


@pytest.mark.parametrize("file", [*SOURCES, *sorted((ROOT / "recipes").glob("*.py"))], ids=lambda f: f.stem)
def test_forbidden_calls(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    allowed = {"unpickling"} if file == PACKAGE / "data" / "plain_pickle.py" else set()  # it refuses every class
    assert not [what for what, pattern in FORBIDDEN.items() if re.search(pattern, text) and what not in allowed]
    handlers = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ExceptHandler)]
    assert not [node.lineno for node in handlers if node.type is None], "bare except"


@pytest.mark.parametrize("name", sorted(petl._PUBLIC))
def test_public_names_resolve_and_are_documented(name: str) -> None:
    public = getattr(petl, name)
    doc = inspect.getdoc(public) or ""
    assert doc
    assert not doc.startswith(f"{name}("), "a dataclass without a docstring makes one up"
    assert name in petl.__all__
    assert name in dir(petl)


def test_dir_lists_every_method_and_unknown_names_are_errors() -> None:
    classes = {entry.cls for entry in entries().values()}
    assert {"SparseTuning", "EViT", "LinearProbe", "FullFineTuning"} <= classes <= set(dir(petl))
    assert {getattr(petl, name).name for name in classes} == set(petl.list_methods())
    with pytest.raises(AttributeError, match="SparseTunign"):
        _ = petl.SparseTunign
    with pytest.raises(AttributeError, match="Digit"):
        _ = petl.data.Digit


def documented(cls: type) -> list[str]:
    """Names in the ``Args:`` section of a class's own docstring."""
    section = re.search(r"^Args:\n((?:[ ]+.*\n?|\n(?=[ ]))*)", inspect.cleandoc(cls.__doc__ or ""), re.MULTILINE)
    lines = textwrap.dedent(section.group(1)).splitlines() if section else []
    return [name for line in lines if (found := re.match(r"(\w+(?:, \w+)*):", line)) for name in found[1].split(", ")]


@pytest.mark.parametrize("name", petl.list_methods())
def test_docstrings_of_methods_name_their_options(name: str) -> None:
    cls = get_method(name)
    args = documented(cls)
    assert len(args) == len(set(args))
    assert set(args) == {field.name for field in dataclasses.fields(cls)}


@pytest.mark.parametrize(
    "name",
    [
        "Classification",
        "SideSweep",
        "Grounding",
        "GroundingModel",
        "WandbLogger",
        "data.VTAB",
        "data.ImageFolder",
        "data.Digits",
        "data.Expressions",
        "data.RefCOCO",
        "data.Scenes",
        "data.Sentences",
        "data.base.DataModule",
        "data.grounding.GroundingDataModule",
        "data.grounding_transforms.Augmentation",
        "data.references.Collector",
    ],
)
def test_docstrings_of_modules_name_their_arguments(name: str) -> None:
    cls = pkgutil.resolve_name(f"petl.{name}")  # imports on the way, whatever ran before in this process
    assert isinstance(cls, type)
    assert documented(cls) == [p for p in inspect.signature(cls.__init__).parameters if p != "self"]


def run_python(code: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, timeout=120)


def test_import_petl_is_light() -> None:
    heavy = ("torch", "timm", "transformers", "lightning", "numpy")
    done = run_python(f"import sys, petl, petl.cli; print([m for m in {heavy} if m in sys.modules])", ROOT)
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.parametrize("other", ["io", "transform", "util"])
def test_the_other_project_of_this_name_is_told_apart(other: str, tmp_path: Path) -> None:
    shutil.copytree(PACKAGE, tmp_path / "petl", ignore=shutil.ignore_patterns("__pycache__", "*.safetensors"))
    fine = run_python("import petl; print(petl.__file__)", tmp_path)
    assert fine.stdout.startswith(str(tmp_path)), fine.stderr
    (tmp_path / "petl" / other).mkdir()  # an empty folder is what an uninstall may leave behind
    assert run_python("import petl", tmp_path).returncode == 0
    (tmp_path / "petl" / other / "__init__.py").touch()
    mixed = run_python("import petl", tmp_path)
    assert mixed.returncode == 1
    assert "ImportError: two projects share the import name petl" in mixed.stderr
    assert "pip uninstall petl petl-tuning" in mixed.stderr
