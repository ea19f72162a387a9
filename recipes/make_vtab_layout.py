"""Build tasks in the VTAB-1k layout from small real data sets, for `petl.data.VTAB`.

    python recipes/make_vtab_layout.py --data DIR --out ROOT

writes ``ROOT/{sign_digits,mnist,fashion_mnist,cifar10}/`` with ``train800.txt``, ``val200.txt``,
``train800val200.txt``, ``test.txt``, ``labels.txt`` and ``images/``: 800 / 200 / up to 1,000 images, disjoint,
stratified, from ``--seed``. The Fashion-MNIST sprite holds only 900 images: there train800.txt lists 500, val200.txt
100 and test.txt the other 300 (the file names are the layout's and stay).

DIR (default: $PETL_TEST_DATA, else ../shared/data) has in ``images/``: ``sign_digits64.tar.xz`` and
``cifar10_jpg.tar.xz`` (class folders of JPEG files), ``mnist-t10k-images-idx3-ubyte.gz`` and
``mnist-t10k-labels-idx1-ubyte.gz``, and ``fashion-mnist-sprite.png`` (rows 3c to 3c + 2 of 28 x 28 tiles are class c).
Archives are read in memory; no path of an archive becomes a path on disk.
"""

from __future__ import annotations

import argparse
import gzip
import io
import os
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
from PIL import Image

from petl.data.base import hold_out
from petl.errors import PetlError

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
FASHION = ("T-shirt", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")


class Encoded(NamedTuple):
    """An image file's bytes, ".jpg" or ".png", and its label."""

    data: bytes
    suffix: str
    label: int


class Source(NamedTuple):
    """A data set: its images, class names, and the sizes of train, val and test (at most)."""

    images: list[Encoded]
    names: list[str]
    sizes: tuple[int, int, int]


def archive(file: Path, folder: str) -> tuple[list[Encoded], list[str]]:
    """JPEG files ``.../folder/CLASS/x.jpg`` of a tar archive, sorted by name; ``folder`` may be "" for any."""
    found: dict[str, list[tuple[str, bytes]]] = {}
    with tarfile.open(file, "r:xz") as tar:
        for member in tar:
            path = PurePosixPath(member.name)
            if path.is_absolute() or ".." in path.parts:
                raise PetlError(f"{file}: member {member.name!r} leads out of the archive; it is not used.")
            hidden = any(part.startswith(".") for part in path.parts)  # macOS resource forks among them
            if not member.isfile() or hidden or path.suffix.lower() not in (".jpg", ".jpeg") or len(path.parts) < 2:
                continue
            if folder and folder not in path.parts[:-2]:
                continue
            content = tar.extractfile(member)
            assert content is not None  # a regular file
            found.setdefault(path.parts[-2], []).append((member.name, content.read()))
    names = sorted(found)
    return [Encoded(d, ".jpg", i) for i, n in enumerate(names) for _, d in sorted(found[n])], names


def png(pixels: np.ndarray) -> bytes:
    """A grey image (H, W) uint8 as a PNG file."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def sign_digits(folder: Path) -> Source:
    images, names = archive(folder / "sign_digits64.tar.xz", "")
    return Source(images, [DIGITS[int(n)] if n.isdecimal() else n for n in names], (800, 200, 1000))


def cifar10(folder: Path) -> Source:
    images, names = archive(folder / "cifar10_jpg.tar.xz", "test")  # its 10,000 are enough
    return Source(images, names, (800, 200, 1000))


def mnist(folder: Path) -> Source:
    pixels = np.frombuffer(
        gzip.decompress((folder / "mnist-t10k-images-idx3-ubyte.gz").read_bytes()), np.uint8, offset=16
    )
    labels = np.frombuffer(
        gzip.decompress((folder / "mnist-t10k-labels-idx1-ubyte.gz").read_bytes()), np.uint8, offset=8
    )
    pixels = pixels.reshape(-1, 28, 28)
    images = [Encoded(png(p), ".png", int(c)) for p, c in zip(pixels, labels, strict=True)]
    return Source(images, list(DIGITS), (800, 200, 1000))


def fashion_mnist(folder: Path) -> Source:
    sprite = np.asarray(Image.open(folder / "fashion-mnist-sprite.png"))[..., 0]  # (840, 840), grey in every channel
    tiles = sprite.reshape(30, 28, 30, 28).transpose(0, 2, 1, 3).reshape(900, 28, 28)
    return Source([Encoded(png(t), ".png", i // 90) for i, t in enumerate(tiles)], list(FASHION), (500, 100, 300))


TASKS: dict[str, Callable[[Path], Source]] = {
    "sign_digits": sign_digits,
    "mnist": mnist,
    "fashion_mnist": fashion_mnist,
    "cifar10": cifar10,
}


def write(task: Path, source: Source, seed: int) -> str:
    """One task folder; returns a line that says what is in it."""
    train, val, test = source.sizes
    test = min(test, len(source.images) - train - val)
    parts = hold_out([image.label for image in source.images], [train, val, test], seed)
    (task / "images").mkdir(parents=True, exist_ok=True)

    def lines(indices: list[int]) -> Iterator[str]:
        for i in indices:
            data, suffix, label = source.images[i]
            name = f"images/{i:05d}{suffix}"
            (task / name).write_bytes(data)
            yield f"{name} {label}\n"

    lists = dict(zip(("train800", "val200", "test"), ("".join(lines(p)) for p in parts), strict=True))
    lists["train800val200"] = lists["train800"] + lists["val200"]
    for name, text in lists.items():
        (task / f"{name}.txt").write_text(text, encoding="utf-8")
    (task / "labels.txt").write_text("".join(f"{n}\n" for n in source.names), encoding="utf-8")
    return f"{task.name}: {len(source.names)} classes, {train} train, {val} val, {test} test"


def main() -> None:
    parser = argparse.ArgumentParser(description="Tasks in the VTAB-1k layout from small real data sets.")
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("PETL_TEST_DATA") or "../shared/data"))
    parser.add_argument("--out", type=Path, required=True, help="root of the task folders")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    folder = args.data / "images"
    if not folder.is_dir():
        parser.error(f"{folder} is not a folder: give --data or set PETL_TEST_DATA")
    for name in args.tasks:
        try:
            print(write(args.out / name, TASKS[name](folder), args.seed), flush=True)
        except (PetlError, OSError) as error:
            parser.error(f"{name}: {error}")


if __name__ == "__main__":
    main()
