"""`petl data prepare`: convert and check lists of referring expressions once."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from petl.errors import PetlError, nearest

KINDS = ("refcoco", "expressions")


def prepare(args: Sequence[str]) -> None:
    """Write a prepared folder, and print what it holds and how to use it."""
    kind = args[0] if args else ""
    if kind not in KINDS:
        usage = "petl data prepare refcoco --root DIR, or petl data prepare expressions --file F --images DIR --out DIR"
        raise PetlError(f"usage: {usage}" + (f"; {kind!r}: {nearest(kind, KINDS)}" if kind else ""))
    (_refcoco if kind == "refcoco" else _expressions)(args[1:])


def _refcoco(args: Sequence[str]) -> None:
    parser = argparse.ArgumentParser("petl data prepare refcoco", description="RefCOCO's files as JSON-lines")
    parser.add_argument("--root", type=Path, required=True, help="folder that holds DATASET/refs(SPLIT_BY).p")
    parser.add_argument("--dataset", default="refcoco", help="refcoco, refcoco+, refcocog or refclef")
    parser.add_argument("--split_by", help="unc, umd, google or berkeley; default: the data set's usual one")
    parser.add_argument("--out", type=Path, help="folder to write; default: ROOT/DATASET_SPLIT_BY, where petl looks")
    parser.add_argument("--partial", action="store_true", help="a part of the data set: published numbers do not hold")
    given = parser.parse_args(args)
    from petl.data.prepare import prepare_refcoco

    out = prepare_refcoco(given.root, given.dataset, given.split_by, given.out, given.partial)
    _show(out, f"class_path: petl.data.RefCOCO with root: {given.root if given.out is None else out}")


def _expressions(args: Sequence[str]) -> None:
    parser = argparse.ArgumentParser("petl data prepare expressions", description="check and write a list of your own")
    parser.add_argument("--file", type=Path, required=True, help="JSON-lines with image, expression, bbox or bbox_xyxy")
    parser.add_argument("--images", type=Path, nargs="+", required=True, help="a folder; or tar archives and folders")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--split", help="every line belongs to this split: train, val or test")
    given = parser.parse_args(args)
    from petl.data.prepare import prepare_expressions
    from petl.data.references import LIST

    out = prepare_expressions(given.file, given.images, given.out, given.split)
    own = len(given.images) == 1 and given.images[0].is_dir()
    root = f" and image_root: {given.images[0]}" if own else ""
    _show(out, f"class_path: petl.data.Expressions with file: {out / LIST}{root}")


def _show(out: Path, usage: str) -> None:
    from petl.data.references import read_manifest

    for split, counts in read_manifest(out)["splits"].items():
        print(f"{split:<8} " + ", ".join(f"{v:,} {k}" for k, v in counts.items() if isinstance(v, int)))
    print(f"written  {out}\nuse it   {usage}")
