"""Lists of referring expressions from files: what every format has in common, and the JSON-lines form.

Each format yields `Row`s as they stand in the file. `Collector` turns them into samples; what cannot be right becomes
a problem that names file and line.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from PIL import Image

from petl.data.grounding import Box, Reference
from petl.errors import PetlError, nearest

KEYS = ("image", "expression", "bbox", "bbox_xyxy", "split", "width", "height", "ref_id")
MANIFEST = "MANIFEST.json"
LIST = "references.jsonl"
SLACK = 1.0  # pixels by which a box may reach over the edge: annotation tools round
OTHER_WAY = 0.95  # share of boxes that make sense read the other way, from which on the form is in doubt
ENOUGH = 20  # boxes, before a doubt is uttered although none is impossible


class Row(NamedTuple):
    """One expression as a file gives it, unchecked. ``corners``: the box is (x0, y0, x1, y1), not (x, y, w, h)."""

    where: str
    image: Any
    expression: Any
    box: Any
    corners: bool
    width: Any
    height: Any
    split: Any
    ref_id: Any


def leads_out(name: str) -> bool:
    """Whether a relative path is none, or leaves its folder."""
    path = PurePosixPath(name)
    return path.is_absolute() or ".." in path.parts


def is_possible(box: Box, width: int | None, height: int | None) -> bool:
    """Whether a box (x, y, w, h) has an area and lies in the picture, as far as that is known."""
    x, y, w, h = box
    fits = all(size is None or v <= size + SLACK for v, size in ((x + w, width), (y + h, height)))
    return w > 0 and h > 0 and x >= -SLACK and y >= -SLACK and fits


@dataclass
class BoxCount:
    """How many boxes of a list are impossible, and whether they would make sense in the other form."""

    total: int = 0
    impossible: int = 0
    other: int = 0  # possible when (x, y, w, h) is read as corners, or corners as (x, y, w, h)
    forms: set[bool] = field(default_factory=set)

    def see(self, raw: Box, corners: bool, width: int | None, height: int | None) -> bool:
        """Count one box; True if it is possible as it is given."""
        as_size, as_corners = raw, (raw[0], raw[1], raw[2] - raw[0], raw[3] - raw[1])
        fits = is_possible(as_corners if corners else as_size, width, height)
        self.total += 1
        self.impossible += not fits
        self.other += is_possible(as_size if corners else as_corners, width, height)
        self.forms.add(corners)
        return fits

    @property
    def share(self) -> str:
        return (
            f"{self.impossible:,} of {self.total:,} boxes ({self.impossible / max(1, self.total):.1%}) are impossible"
        )

    @property
    def hint(self) -> str | None:
        """What to say when the boxes look like the other form."""
        doubtful = self.impossible or (self.total >= ENOUGH and self.forms == {False})
        if not doubtful or self.other < OTHER_WAY * self.total or len(self.forms) != 1:
            return None
        given, other = ("x0, y0, x1, y1", "x, y, w, h") if True in self.forms else ("x, y, w, h", "x0, y0, x1, y1")
        key = "bbox" if True in self.forms else "bbox_xyxy"
        return (
            f"{self.other / self.total:.0%} of the boxes make sense as ({other}), but they are given as ({given}): "
            f'if they are ({other}), name the key "{key}"'
        )


class Collector:
    """Checks rows and sorts them into splits.

    Args:
        image_root: folder that the rows' images are relative to.
        splits: names of the splits that there may be.
        int_boxes: cut the four numbers (x, y, w, h) to whole pixels, as TransVG does.
        advice: what else to do about an unknown split.
    """

    def __init__(self, image_root: Path, splits: Iterable[str], int_boxes: bool = False, advice: str = "") -> None:
        self.image_root, self.int_boxes, self.advice = image_root, int_boxes, advice
        self.splits: dict[str, list[Reference]] = {s: [] for s in splits}
        self.boxes = BoxCount()
        self._problems: list[str] = []
        self._strays: dict[str, list[str]] = {}  # by unknown split: where it stands
        self._sizes: dict[Path, tuple[int, int] | None] = {}

    @property
    def problems(self) -> list[str]:
        """What is wrong; the share of impossible boxes comes first."""
        hint = f"; {self.boxes.hint}" if self.boxes.hint else ""
        shares = [f"{self.boxes.share}{hint}."] if self.boxes.impossible else []
        strays = [
            f"{where[0]}: split {split}; {nearest(split.strip(repr('')), self.splits)}{self.advice} "
            f"({len(where):,} expressions have it)."
            for split, where in self._strays.items()
        ]
        return [*shares, *strays, *self._problems]

    def add(self, rows: Iterable[Row]) -> None:
        for row in rows:
            problem = self._add(row)
            if problem:
                self.problem(f"{row.where}: {problem}.")

    def problem(self, text: str) -> None:
        self._problems.append(text)

    def _add(self, row: Row) -> str | None:
        """Keep the row, or say what is wrong with it."""
        if not isinstance(row.image, str) or not row.image:
            return f"image is {row.image!r}, not a path"
        if leads_out(row.image):
            return f"image {row.image!r} leads out of the image folder"
        if not isinstance(row.expression, str) or not row.expression.strip():
            return f"the expression is empty or no text ({row.expression!r})"
        if not isinstance(row.ref_id, int | str | None):
            return f"ref_id is {row.ref_id!r}, not a number or a text"
        if not isinstance(row.split, str) or row.split not in self.splits:
            self._strays.setdefault(repr(row.split), []).append(row.where)
            return None
        raw = _numbers(row.box)
        if raw is None:
            return f"the box is {row.box!r}, not a list of four numbers"
        file = self.image_root / row.image
        for key, value in (("width", row.width), ("height", row.height)):
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                return f"{key} is {value!r}, not a number of pixels"
        width, height = row.width, row.height
        if width is None or height is None:
            width, height = self._size(file) or (None, None)
        if not self.boxes.see(raw, row.corners, width, height):
            form = "x0, y0, x1, y1" if row.corners else "x, y, w, h"
            size = f"the picture of {width} x {height} pixels" if width and height else "the picture"
            return f"box {list(raw)} ({form}) has no area or does not lie in {size}"
        box = (raw[0], raw[1], raw[2] - raw[0], raw[3] - raw[1]) if row.corners else raw
        if self.int_boxes:
            box = (float(int(box[0])), float(int(box[1])), float(int(box[2])), float(int(box[3])))
        text = " ".join(row.expression.split())
        self.splits[row.split].append(Reference(file, text, box, width, height, row.image, row.ref_id))
        return None

    def _size(self, file: Path) -> tuple[int, int] | None:
        """From the file's header; a missing or damaged file is found later, with all others."""
        if file not in self._sizes:
            try:
                with Image.open(file) as image:
                    self._sizes[file] = image.size
            except Exception:  # decoders raise anything
                self._sizes[file] = None
        return self._sizes[file]


def _numbers(box: Any) -> Box | None:
    if not isinstance(box, (list, tuple)) or len(box) != 4:
        return None
    if not all(isinstance(v, (int, float)) and not isinstance(v, bool) and math.isfinite(v) for v in box):
        return None
    return float(box[0]), float(box[1]), float(box[2]), float(box[3])


def json_rows(file: Path, problems: Collector, split: str | None = None) -> Iterator[Row]:
    """Rows of a JSON-lines file; lines that are no such object become problems.

    ``split``: the one that every line belongs to; None = what its key says, "train" where it has none. Raises
    `PetlError` if there is no such file, if it is not text, or if it is not the one that the manifest beside it names.
    """
    verify(file)
    for number, line in enumerate(text_lines(file), 1):
        where, line = f"{file} line {number}", line.strip()
        if not line:
            continue
        try:
            entry = json.loads(line)
        except ValueError as error:
            problems.problem(f"{where} is not JSON, or cut short: {error}.")
            continue
        if not isinstance(entry, dict):
            problems.problem(f"{where} is not a JSON object but {type(entry).__name__}.")
            continue
        missing = [key for key in ("image", "expression") if key not in entry]
        if missing or ("bbox" in entry) == ("bbox_xyxy" in entry):
            wanted = missing or ["either bbox or bbox_xyxy"]
            unknown = [k for k in entry if k not in KEYS]
            guess = f"; {unknown[0]!r}: {nearest(unknown[0], KEYS)}" if unknown else ""
            problems.problem(f"{where}: needs {' and '.join(wanted)}; it has {', '.join(entry) or 'nothing'}{guess}.")
            continue
        corners = "bbox_xyxy" in entry
        yield Row(
            where, entry["image"], entry["expression"], entry["bbox_xyxy" if corners else "bbox"], corners,
            entry.get("width"), entry.get("height"), split or entry.get("split", "train"), entry.get("ref_id"),
        )  # fmt: skip


def text_lines(file: Path) -> Iterator[str]:
    try:
        with open(file, encoding="utf-8-sig") as handle:
            yield from handle
    except FileNotFoundError as error:
        raise PetlError(f"file {file} does not exist.") from error
    except (UnicodeDecodeError, OSError) as error:
        raise PetlError(f"{file} cannot be read as text in UTF-8: {error}.") from error


def write_rows(file: Path, splits: dict[str, list[Reference]]) -> None:
    """The canonical form: one object per line, boxes as [x, y, w, h] in pixels."""
    with open(file, "w", encoding="utf-8") as handle:
        for split, samples in splits.items():
            for s in samples:
                entry = {
                    "image": s.name, "expression": s.expression, "bbox": list(s.box), "width": s.width,
                    "height": s.height, "split": split, "ref_id": s.ref_id,
                }  # fmt: skip
                handle.write(json.dumps({k: v for k, v in entry.items() if v is not None}, ensure_ascii=False) + "\n")


def sha256(file: Path) -> str:
    with open(file, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def read_manifest(folder: Path) -> dict[str, Any]:
    """What `petl data prepare` recorded in this folder; empty where it did not write."""
    file = folder / MANIFEST
    if not file.is_file():
        return {}
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise PetlError(f"{file} is not JSON, or cut short: {error}. Prepare the data again.") from error
    return manifest if isinstance(manifest, dict) else {}


def verify(file: Path) -> None:
    """Raise `PetlError` if the manifest beside ``file`` gives it another checksum."""
    files = read_manifest(file.parent).get("files")
    expected = files.get(file.name) if isinstance(files, dict) else None
    if expected and file.is_file() and sha256(file) != expected:
        raise PetlError(
            f"{file} is not what 'petl data prepare' wrote: its SHA-256 differs from {file.parent / MANIFEST}. "
            "Prepare it again, or delete the manifest if you changed the list on purpose."
        )
