"""The published forms of RefCOCO: the files of lichengunc/refer, and rows as on the Hugging Face hub."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from petl.data.plain_pickle import read_plain_pickle
from petl.data.references import Collector, Row, text_lines
from petl.errors import PetlError

HUB_SPLITS = {"validation": "val"}
ROW_KEYS = ("bbox", "sentences", "raw_anns")  # what tells the hub's rows from other files
AGREE = 1.0  # pixels


# ---- lichengunc/refer


def refer_files(folder: Path, split_by: str) -> tuple[Path, Path] | None:
    """``refs(<split_by>).p`` and ``instances.json``; None if neither is there, `PetlError` if one is."""
    refs, instances = folder / f"refs({split_by}).p", folder / "instances.json"
    if refs.is_file() and instances.is_file():
        return refs, instances
    others = sorted(p.name for p in folder.glob("refs(*).p")) if folder.is_dir() else []
    if refs.is_file():
        raise PetlError(f"{folder} holds {refs.name} without instances.json, where the boxes are: put it beside it.")
    if instances.is_file():
        raise PetlError(
            f"{folder} holds instances.json without {refs.name}, where the expressions are; it has: "
            f"{', '.join(others) or 'no refs(…).p'}. Choose another split_by, or put the file beside it."
        )
    if others:
        raise PetlError(f"{folder} holds {', '.join(others)}, but neither {refs.name} nor instances.json.")
    return None


def refer_rows(refs_file: Path, instances_file: Path, problems: Collector) -> Iterator[Row]:
    """One row per sentence. The file name in the refs is not used: the publishers say that it is wrong."""
    refs = read_plain_pickle(refs_file)
    try:
        instances = json.loads("".join(text_lines(instances_file)))
        images = {image["id"]: image for image in instances["images"]}
        boxes = {a["id"]: a["bbox"] for a in instances["annotations"]}
    except (ValueError, KeyError, TypeError) as error:
        what = f"{type(error).__name__}: {error}"
        raise PetlError(f"{instances_file} is cut short or no list of COCO instances ({what}).") from error
    if not isinstance(refs, list):
        raise PetlError(f"{refs_file} holds {type(refs).__name__}, not the list of referred objects.")
    for number, ref in enumerate(refs):
        where = f"{refs_file} entry {number}"
        try:
            ref_id, ann_id, image_id, split = (ref[k] for k in ("ref_id", "ann_id", "image_id", "split"))
            texts = [s["sent"] or s.get("raw", "") for s in ref["sentences"]]
            box, image = boxes.get(ann_id), images.get(image_id)
        except (KeyError, TypeError, AttributeError) as error:
            problems.problem(f"{where} is no referred object: {type(error).__name__}: {error}.")
            continue
        if box is None or image is None:
            what = f"annotation {ann_id}" if box is None else f"image {image_id}"
            problems.problem(f"{where} (ref_id {ref_id}) names {what}, which {instances_file} does not have.")
            continue
        size = image.get("width"), image.get("height")
        for part in split_names(split):
            for text in texts:
                yield Row(where, image.get("file_name"), text, box, False, *size, part, ref_id)


def split_names(split: Any) -> list[Any]:
    """ReferItGame writes "testAB" for an object that is in testA and in testB."""
    letters = split.removeprefix("test") if isinstance(split, str) and split.startswith("test") else ""
    return [f"test{letter}" for letter in letters] if letters.isalpha() and letters.isupper() else [split]


# ---- rows of the hub


def hub_files(folder: Path) -> list[Path]:
    """Files with rows, in ``folder`` or its ``data``: parquet, JSON or JSON-lines."""
    places = [p for p in (folder, folder / "data") if p.is_dir()]
    return sorted(
        f for p in places for kind in ("parquet", "jsonl", "json") for f in p.glob(f"*.{kind}") if _has_rows(f)
    )


def _has_rows(file: Path) -> bool:
    if file.suffix == ".parquet":
        return True
    with open(file, "rb") as handle:
        head = handle.read(1 << 16)
    return all(f'"{key}"'.encode() in head for key in ROW_KEYS)


def read_hub_file(file: Path) -> list[dict[str, Any]]:
    if file.suffix == ".parquet":
        try:
            import pyarrow.parquet as parquet
        except ImportError as error:
            raise PetlError(f"{file} is a parquet file: install pyarrow to read it (pip install pyarrow).") from error
        try:
            rows: list[dict[str, Any]] = parquet.read_table(file).to_pylist()
            return rows
        except Exception as error:  # pyarrow raises its own kinds and OSError
            raise PetlError(f"{file} is cut short or no parquet file ({error}).") from error
    text = "".join(text_lines(file))
    try:
        read = json.loads(text) if file.suffix == ".json" else [json.loads(s) for s in text.splitlines() if s.strip()]
    except ValueError as error:
        raise PetlError(f"{file} is not JSON, or cut short: {error}.") from error
    if not isinstance(read, list) or not all(isinstance(row, dict) for row in read):
        raise PetlError(f"{file} does not hold a list of rows.")
    return read


def hub_rows(files: Iterable[Path], first_test: str, problems: Collector) -> Iterator[Row]:
    """One row per sentence of rows as in ``jxu124/refcoco``; ``first_test`` is what the hub calls "test".

    Whether ``bbox`` is (x, y, w, h) or corners is not documented: it is found by comparing all rows with the COCO
    annotation in ``raw_anns``. Raises `PetlError` where the two fit neither way.
    """
    found = [(file, number, row) for file in files for number, row in enumerate(read_hub_file(file))]
    corners = _has_corners(found)
    names = {**HUB_SPLITS, "test": first_test}
    for file, number, row in found:
        where = f"{file} row {number}"
        try:
            info = _parsed(row.get("raw_image_info")) or {}
            image = str(row.get("image_path") or info["file_name"]).rpartition("/")[2]
            split = str(row.get("split") or file.name.partition("-")[0].partition(".")[0])
            texts = [s["sent"] or s.get("raw", "") for s in row["sentences"]]
            ref_id = row["ref_id"]
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            problems.problem(f"{where} is no referred object: {type(error).__name__}: {error}.")
            continue
        for text in texts:
            size = info.get("width"), info.get("height")
            yield Row(where, image, text, row["bbox"], corners, *size, names.get(split, split), ref_id)


def _parsed(value: Any) -> Any:
    return json.loads(value) if isinstance(value, str) else value


def _has_corners(found: list[tuple[Path, int, dict[str, Any]]]) -> bool:
    """Whether ``bbox`` is (x0, y0, x1, y1) in every row."""
    fits = {True: 0, False: 0}
    for file, number, row in found:
        try:
            given, (x, y, w, h) = [float(v) for v in row["bbox"]], _parsed(row["raw_anns"])["bbox"]
        except (KeyError, TypeError, ValueError) as error:
            raise PetlError(
                f"{file} row {number}: bbox cannot be compared with raw_anns ({type(error).__name__}: {error}); "
                "without it the meaning of bbox is unknown."
            ) from error
        for corners, box in ((True, (x, y, x + w, y + h)), (False, (x, y, w, h))):
            fits[corners] += len(given) == 4 and all(abs(a - b) <= AGREE for a, b in zip(given, box))
    full = [corners for corners, count in fits.items() if count == len(found)]
    if not found or len(full) != 1:
        where = found[0][0].parent if found else "the rows"
        raise PetlError(
            f"{where}: bbox equals the box of raw_anns as (x, y, w, h) in {fits[False]} and as corners in {fits[True]} "
            f"of {len(found)} rows; it must be one of the two in all of them."
        )
    return full[0]
