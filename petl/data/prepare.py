"""`petl data prepare`: lists of referring expressions, checked once and written as JSON-lines with checksums.

A prepared folder holds ``references.jsonl``, ``MANIFEST.json`` and, where they came out of an archive, the pictures. It
is made under a temporary name and renamed when it is whole.
"""

from __future__ import annotations

import json
import shutil
import tarfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from petl.data.base import SHOWN
from petl.data.expressions import SPLITS, Expressions
from petl.data.grounding import GroundingDataModule
from petl.data.refcoco import RefCOCO
from petl.data.references import LIST, MANIFEST, Collector, json_rows, leads_out, sha256, write_rows
from petl.errors import PetlError

FORMAT = 1


def prepare_refcoco(root: Path, dataset: str, split_by: str | None, out: Path | None, partial: bool) -> Path:
    """Write a list of RefCOCO's published files as a prepared folder; returns it. Raises `PetlError` for bad data."""
    data = RefCOCO(dataset, str(root), image_root=str(root), split_by=split_by, partial=partial)
    out = out or root / f"{dataset}_{data.split_by}"
    with new_folder(out) as folder:
        data.read()
        refuse(data.name, data.problems)
        _write(folder, data, {"dataset": dataset, "split_by": data.split_by, "partial": partial}, data.sources)
    return out


def prepare_expressions(file: Path, images: Sequence[Path], out: Path, split: str | None) -> Path:
    """Write a JSON-lines list of the user's own in the canonical form; returns the prepared folder.

    ``images``: a folder, whose pictures stay where they are; or tar archives and folders, out of which the pictures
    that the list names are gathered beside the list. Raises `PetlError` for bad data, with nothing written.
    """
    with new_folder(out) as folder:
        gathered = len(images) > 1 or not images[0].is_dir()
        if gathered:
            _gather(images, _named(file), folder)
        data = Expressions(str(file), str(folder if gathered else images[0]), split=split)
        # the temporary folder's name helps nobody
        refuse(data.name, [p.replace(f"{folder}/", "") for p in data.check().problems])
        if "val" in data.splits and data.splits["test"] is data.splits["val"]:
            del data.splits["test"]  # the list has none
        _write(folder, data, {"images": "beside the list" if gathered else str(images[0])}, [file])
    return out


def refuse(name: str, problems: Sequence[str]) -> None:
    """Raise `PetlError` if there are problems."""
    if problems:
        listed = "\n  ".join(problems[:SHOWN]) + (f"\n  and {len(problems) - SHOWN} more" * (len(problems) > SHOWN))
        raise PetlError(f"{name}: {len(problems)} problems, nothing was written:\n  {listed}")


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder under a temporary name, which gets the name ``out`` when the block ends without an exception."""
    if out.exists():
        raise PetlError(f"{out} exists already; name another --out, or remove it.")
    parents = [p for p in out.parents if not p.exists()]
    part = out.with_name(f".{out.name}.part")
    shutil.rmtree(part, ignore_errors=True)  # left by a run that was killed
    part.mkdir(parents=True)
    try:
        yield part
        part.rename(out)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        for parent in parents:
            parent.rmdir()
        raise


def _write(folder: Path, data: GroundingDataModule, about: dict[str, Any], sources: Sequence[Path]) -> None:
    write_rows(folder / LIST, {split: v.samples for split, v in data.splits.items()})
    manifest = {
        "format": FORMAT,
        **about,
        "sources": {p.name: sha256(p) for p in sources},
        "files": {LIST: sha256(folder / LIST)},
        "splits": {split: {**v.counts(), "sha256": v.digest()} for split, v in data.splits.items()},
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


# ---- pictures


def _named(file: Path) -> set[str]:
    """Pictures that a list names; what is wrong with the list is found later."""
    rows = json_rows(file, Collector(file.parent, SPLITS))
    return {row.image for row in rows if isinstance(row.image, str) and not leads_out(row.image)}


def _gather(sources: Sequence[Path], names: set[str], folder: Path) -> None:
    """Copy the named pictures from folders and tar archives to ``folder``, under the same names."""
    for source in sources:
        if source.is_dir():
            for name in (n for n in names if (source / n).is_file()):
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source / name, folder / name)
        elif source.is_file():
            _extract(source, names, folder)
        else:
            raise PetlError(f"{source} does not exist: give a folder or a tar archive of pictures.")


def _extract(archive: Path, names: set[str], folder: Path) -> None:
    """Raises `PetlError` for an archive with anything but plain files and folders inside its own root."""
    try:
        with tarfile.open(archive) as tar:
            members = tar.getmembers()
            for member in members:
                what = _unsafe(member)
                if what:
                    raise PetlError(f"{archive}: {member.name!r} {what}: refused, nothing was extracted.")
            for member in members:
                member.name = member.name.removeprefix("./")
                if member.isfile() and member.name in names:
                    tar.extract(member, folder, filter="data")
    except (tarfile.TarError, EOFError, OSError) as error:
        raise PetlError(f"{archive} is cut short or no tar archive ({error}).") from error


def _unsafe(member: tarfile.TarInfo) -> str | None:
    if leads_out(member.name) or "\\" in member.name:
        return "leads out of the folder"
    if member.issym() or member.islnk():
        return f"is a link to {member.linkname!r}"
    return None if member.isfile() or member.isdir() else "is neither a file nor a folder"
