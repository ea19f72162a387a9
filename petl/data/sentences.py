"""Sentences of your own with one label each: lines ``label text``, CSV, TSV or JSON lines.

A batch holds ``text``, a list of strings as the files write them but for runs of white space; ``label`` (B,); ``index``
(B,). Tokenising, lower-casing and cutting to a length are the task's.
"""

from __future__ import annotations

import codecs
import csv as csv_module
import hashlib
import io
import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from petl.data.base import LabelledDataModule, Split, hold_out
from petl.errors import PetlError, nearest

ENCODINGS = ("utf-8", "latin-1", "cp1252", "utf-16", "ascii")  # proposed where a name is unknown
COLUMNS = ("text", "label")


class Sentence(NamedTuple):
    """A text and the index of its label."""

    text: str
    label: int

    @property
    def line(self) -> str:
        return f"{self.label} {self.text}"


class Row(NamedTuple):
    """What one line of a file says, with its place for messages."""

    where: str
    text: Any
    label: Any


class SentenceSplit(Split[Sentence]):
    """A split of sentences."""

    def counts(self) -> dict[str, int]:
        return {"sentences": len(self)}


def _entry(sample: Sentence) -> dict[str, Any]:
    return {"text": sample.text, "label": sample.label}


class Sentences(LabelledDataModule):
    """Text classification from files of your own; the ending of each says how it is read.

    ``.csv`` and ``.tsv``: a header with the columns text and label. ``.jsonl``, ``.ndjson`` and ``.json``: one object
    per line with the keys text and label. Any other ending: lines ``label text``, e.g. ``1 a stirring film``. Other
    columns and keys are ignored. Labels are words or integers; classes are in their order. Without a test split, the
    validation split is tested.

    Args:
        train: file of the training sentences.
        val: file of the validation sentences; None = hold out ``val_size`` of train.
        test: file of the test sentences; None = hold out ``test_size`` of train.
        val_size: held out (stratified, seeded) where there is no val file: below 1 a share of train, else a number of
            sentences; 0 = no validation.
        test_size: the same for test.
        names: what the classes are called, in the order of their labels, e.g. [negative, positive] for 0 and 1; None =
            the labels themselves.
        encoding: of the files, e.g. "utf-8" or "latin-1".
        batch_size: sentences per step over all processes together.
        num_workers: loader processes per device.
        seed: of data order and held-out sentences.
    """

    things = "sentences"

    def __init__(
        self,
        train: str,
        val: str | None = None,
        test: str | None = None,
        val_size: float = 0.1,
        test_size: float = 0.0,
        names: list[str] | None = None,
        encoding: str = "utf-8",
        batch_size: int = 32,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size, num_workers, seed=seed)
        self.sizes = {"val": val_size, "test": test_size}
        for split, size in self.sizes.items():
            if not 0 <= size < float("inf") or (size > 1 and size != int(size)):
                raise PetlError(
                    f"Sentences({split}_size={size}): it is a share of train below 1, or a whole number of sentences."
                )
        try:
            codecs.lookup(encoding)
        except LookupError as error:
            raise PetlError(f"Sentences(encoding={encoding!r}): {nearest(encoding, ENCODINGS)}") from error
        self.files = {s: Path(f) for s, f in (("train", train), ("val", val), ("test", test)) if f is not None}
        self.names, self.encoding = names, encoding
        self.name = f"sentences/{self.files['train'].name}"

    def _preprocessing(self) -> dict[str, Any]:
        return {}  # no images

    def transform(self, training: bool) -> Callable[[Sentence], dict[str, Any]]:
        return _entry

    def varies(self, split: str, stream: str = "text") -> str | None:
        return None

    def contents(self, split: str, stream: str = "text") -> list[str]:
        return [hashlib.sha256(s.text.encode()).hexdigest() for s in self.splits[split].samples]

    def read(self) -> None:
        rows = {split: self._rows(file) for split, file in self.files.items()}
        if not rows["train"]:
            found = f" ({self.problems[0]})" if self.problems else ""
            raise PetlError(f"{self.files['train']} holds no sentences{found}.")
        given = _ordered({row.label for row in rows["train"]})
        self.num_classes, self.labels = len(given), self._named(given)
        if self.num_classes > 10 and 2 * self.num_classes > len(rows["train"]):
            self.problems.append(
                f"{self.files['train']} has {self.num_classes:,} labels in {len(rows['train']):,} lines, the first is "
                f"{rows['train'][0].label!r}: does each line begin with its label?"
            )
        index = {label: i for i, label in enumerate(given)}
        for split, read in rows.items():
            self.problems += [
                f"{row.where}: label {row.label!r} of {split} is not one of train; {nearest(row.label, given)}"
                for row in read
                if row.label not in index
            ]
            if not read:
                self.problems.append(f"{self.files[split]} holds no sentences.")
            self.splits[split] = SentenceSplit(Sentence(r.text, index[r.label]) for r in read if r.label in index)
            self.split_names[split] = self.files[split].name
        self._hold_out()
        if "test" not in self.splits and "val" in self.splits:
            self.splits["test"] = self.splits["val"]
            self.split_names["test"] = f"the val split ({self.split_names['val']})"

    def _named(self, given: Sequence[str]) -> list[str]:
        """Names of the classes."""
        if self.names is None:
            return list(given)
        if len(self.names) != len(given) or len(set(self.names)) != len(given):
            shown = ", ".join(given[:10]) + (" …" if len(given) > 10 else "")
            raise PetlError(
                f"Sentences(names={self.names}): one name each, all different, for the {len(given)} labels of "
                f"{self.files['train']} in this order: {shown}."
            )
        return list(self.names)

    def _hold_out(self) -> None:
        """Move ``val_size`` and ``test_size`` of train to the splits that have no file."""
        samples = self.splits["train"].samples
        wanted = {s: v for s, v in self.sizes.items() if v and s not in self.files}
        counts = [round(v * len(samples)) if v < 1 else int(v) for v in wanted.values()]
        rest = len(samples) - sum(counts)
        if rest < 1 or 0 in counts:
            sizes = ", ".join(f"{s}_size={v:g}" for s, v in wanted.items())
            self.problems.append(f"{sizes} of {len(samples)} sentences leaves nothing to train on or to evaluate.")
            return
        parts = hold_out([s.label for s in samples], [*counts, rest], self.seed)
        for split, part in zip([*wanted, "train"], parts, strict=True):
            self.splits[split] = SentenceSplit(samples[i] for i in part)
        for split, size in wanted.items():
            self.split_names[split] = f"{size:g} held out of train"
        left = {s.label for s in self.splits["train"].samples}
        self.problems += [
            f"holding out {sum(counts)} of {len(samples)} sentences leaves none of class {name!r} to train on."
            for i, name in enumerate(self.labels)
            if i not in left
        ]

    # ---- files

    def _rows(self, file: Path) -> list[Row]:
        """Rows with a text and a label, both as clean strings; others become problems."""
        text, ending = read_text(file, self.encoding), file.suffix.lower()
        if ending in (".csv", ".tsv"):
            rows = _table_rows(file, text, "\t" if ending == ".tsv" else ",")
        elif ending in (".jsonl", ".ndjson", ".json"):
            rows = _json_rows(file, text)
        else:
            rows = _line_rows(file, text)
        good = []
        for row in rows:
            if isinstance(row, str):
                self.problems.append(row)
            elif wrong := _problem(row):
                self.problems.append(f"{row.where}: {wrong}.")
            else:
                good.append(Row(row.where, " ".join(row.text.split()), str(row.label).strip()))
        return good

    # ---- facts

    def texts(self, split: str) -> list[str]:
        """Every text of a split."""
        self._read_once()
        if split not in self.splits:
            raise PetlError(f"{self.name} has no split {split!r}; it has: {', '.join(self.splits)}.")
        return [s.text for s in self.splits[split].samples]

    def facts(self) -> list[str]:
        """Classes, and sentences that stand in training and in another split."""
        known = set(self.texts("train"))
        lines = []
        for split, data in self.splits.items():
            if split == "train" or (split == "test" and data is self.splits.get("val")):
                continue
            again = sum(s.text in known for s in data.samples)
            if again:
                lines.append(f"overlap  {again:,} of {len(data):,} sentences of {split} stand in train too")
        return super().facts() + lines

    def describe(self, split: str) -> str:
        lengths = [len(s.text.split()) for s in self.splits[split].samples] or [0]
        return f"{super().describe(split)}, {min(lengths)} to {max(lengths)} words"

    def protocol(self) -> dict[str, Any]:
        return super().protocol() | {"labels": self.labels, "encoding": self.encoding}


def read_text(file: Path, encoding: str) -> str:
    """The decoded file, without a byte order mark. Raises `PetlError` that names the line which does not decode."""
    try:
        data = file.read_bytes()
    except FileNotFoundError as error:
        raise PetlError(f"file {file} does not exist.") from error
    except OSError as error:
        raise PetlError(f"{file} cannot be read: {error}.") from error
    try:
        return data.decode(encoding).removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise PetlError(
            f"{file} line {line} is not text in {encoding}: {error}. Name the file's encoding, e.g. encoding='latin-1'."
        ) from error


def _lines(file: Path, text: str) -> Iterator[tuple[str, str]]:
    """Place and content of each line that is not blank. Only line feeds end one: U+0085 is a letter of old files."""
    for number, line in enumerate(io.StringIO(text), 1):
        if line.strip():
            yield f"{file} line {number}", line.strip()


def _line_rows(file: Path, text: str) -> Iterator[Row | str]:
    for where, line in _lines(file, text):
        label, *rest = line.split(None, 1)
        yield Row(where, rest[0], label) if rest else f"{where}: {line!r} is not 'label text'."


def _json_rows(file: Path, text: str) -> Iterator[Row | str]:
    for where, line in _lines(file, text):
        try:
            entry = json.loads(line)
        except ValueError as error:
            yield f"{where} is not JSON, or cut short: {error}. One object per line is read."
            continue
        missing = [c for c in COLUMNS if c not in entry] if isinstance(entry, dict) else [*COLUMNS]
        if missing:
            held = ", ".join(entry) if isinstance(entry, dict) else type(entry).__name__
            yield f"{where}: needs an object with {' and '.join(missing)}; it has {held or 'nothing'}."
        else:
            yield Row(where, entry["text"], entry["label"])


def _table_rows(file: Path, text: str, delimiter: str) -> Iterator[Row | str]:
    reader = csv_module.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    last = 0  # line where the last good row ends: a quote that is never closed runs on to the end of the file
    try:
        header = [name.strip() for name in reader.fieldnames or []]
        if not set(COLUMNS) <= set(header):
            raise PetlError(f"{file}: the header must have the columns text and label; it has {header}.")
        reader.fieldnames, last = header, reader.line_num
        for row in reader:
            last = reader.line_num
            where = f"{file} line {last}"
            if None in row:
                yield f"{where}: more cells than the header has columns; put quotes around a text with {delimiter!r}."
            else:
                yield Row(where, row["text"] or "", row["label"] or "")
    except csv_module.Error as error:
        raise PetlError(
            f"{file} line {last + 1}: {error}. A text with quotes is put in quotes, its own are doubled."
        ) from error


def _problem(row: Row) -> str | None:
    """What is wrong with a row, if anything."""
    if not isinstance(row.text, str):
        return f"text is {row.text!r}, not a string"
    if not isinstance(row.label, (str, int)) or isinstance(row.label, bool):
        return f"label is {row.label!r}, not a string or an integer"
    if not row.text.strip() or not str(row.label).strip():
        return "text or label is empty"
    try:
        f"{row.text}{row.label}".encode()
    except UnicodeEncodeError:
        return "the text has half a surrogate pair, which is no character"
    return None


def _ordered(labels: set[str]) -> list[str]:
    """Integers by value, words by letters."""
    whole = all(re.fullmatch(r"[+-]?\d+", label) for label in labels)
    return sorted(labels, key=lambda label: (int(label), label)) if whole else sorted(labels)
