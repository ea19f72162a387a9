"""Faults of the tap store: damage, a full disk, a limit, and directories that are not as they should be."""

from __future__ import annotations

import errno
import os
import random
import resource
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from petl.data import tap_places, tap_store
from petl.data.tap_places import USE
from petl.data.tap_shards import DamagedError, open_shard, write_shard
from petl.data.tap_store import Filling, TapStore
from tests.data.test_tap_store import KEY, SAMPLE, assert_right, fill, samples


def shards(store: TapStore, root: Path) -> list[Path]:
    return sorted((root / store.digest).glob("*.safetensors"))


def leftovers(root: Path) -> list[Path]:
    return [*root.rglob(".tmp-*")]


def used_bytes(root: Path) -> int:
    return sum(f.stat().st_size for f in root.rglob("*") if f.is_file())


# ---- damage


def test_any_flipped_bit_is_found_or_harmless(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(3, 4), "b": torch.arange(6, dtype=torch.bfloat16).view(3, 2)}
    file = write_shard(tmp_path, "key", ["s0", "s1", "s2"], tensors).file
    assert file is not None
    whole, draw, found = file.read_bytes(), random.Random(0), 0
    for at in range(len(whole)):
        damaged = bytearray(whole)
        damaged[at] ^= 1 << draw.randrange(8)
        copy = tmp_path / f"{at}.safetensors"
        copy.write_bytes(damaged)
        try:
            shard = open_shard(copy, "key")
        except DamagedError:
            found += 1
        else:
            assert list(shard.digests) == ["s0", "s1", "s2"]
            assert all(torch.equal(shard.tensors[name], t) for name, t in tensors.items()), at
        copy.unlink()
    assert found > 0.95 * len(whole), "all but names and blanks that nobody reads"


@pytest.mark.parametrize("fault", ["cut", "empty", "short", "flipped", "noise", "foreign key", "folder"])
def test_a_damaged_shard_is_removed_and_computed_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    monkeypatch.setattr(tap_store, "SECONDS", 0.0)
    digests = samples(0, 12)
    store = TapStore(KEY, torch.float32, tmp_path)
    fill(store, digests)
    victim = shards(store, tmp_path)[1]
    data = bytearray(victim.read_bytes())
    if fault == "foreign key":
        other = TapStore(KEY | {"backbone": "other"}, torch.float32, tmp_path)
        fill(other, digests)
        data = bytearray(shards(other, tmp_path)[0].read_bytes())
    data[-5] ^= 1 if fault == "flipped" else 0
    victim.unlink()
    if fault == "folder":
        victim.mkdir()
    else:
        victim.write_bytes(
            {"cut": data[:-1], "empty": b"", "short": data[:5], "noise": os.urandom(len(data))}.get(fault, data)
        )
    again = TapStore(KEY, torch.float32, tmp_path)
    reader = again.reader(digests)
    assert sum(i in reader for i in range(12)) == 8
    assert_right(reader, digests)
    assert fill(again, digests) == Filling(8, 4, 0, 12 * SAMPLE, None, int(fault != "folder"))
    assert not victim.is_file()
    assert_right(again.reader(digests), digests)


def test_a_shard_that_vanishes_between_listing_and_opening(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    digests = samples(0, 4)
    fill(TapStore(KEY, torch.float32, tmp_path), digests)
    listing = os.listdir

    def listed(folder: Any) -> list[str]:
        names = listing(folder)
        for file in Path(folder).glob("*.safetensors"):
            file.unlink()
        return names

    monkeypatch.setattr(tap_places.os, "listdir", listed)
    store = TapStore(KEY, torch.float32, tmp_path)
    monkeypatch.undo()
    assert fill(store, digests) == Filling(0, 4, 0, 4 * SAMPLE, None, 0)


# ---- disk


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_ends_the_filling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    monkeypatch.setattr(tap_store, "SECONDS", 0.0)
    store, digests, real, calls = TapStore(KEY, torch.float32, tmp_path), samples(0, 12), getattr(os, call), []

    def full(*args: Any) -> Any:
        calls.append(args)
        if len(calls) > 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*args)

    monkeypatch.setattr(f"petl.data.tap_shards.os.{call}", full)
    filling = fill(store, digests)
    assert (filling.computed, filling.left_out, filling.nbytes) == (4, 8, 4 * SAMPLE)
    assert (filling.reason or "").startswith("disk full: ")
    assert not leftovers(tmp_path)
    assert_right(store.reader(digests), digests)
    monkeypatch.undo()
    assert fill(store, digests) == Filling(4, 8, 0, 12 * SAMPLE, None, 0), "there is room again"


def test_a_file_size_that_the_system_refuses(tmp_path: Path) -> None:
    store = TapStore(KEY, torch.float32, tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))  # write() really fails, in the middle
    try:
        filling = fill(store, samples(0, 40))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (filling.computed, filling.left_out) == (0, 40)
    assert (filling.reason or "").startswith("disk full: ")
    assert not leftovers(tmp_path)
    assert not shards(store, tmp_path)


def test_a_directory_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    digests = samples(0, 3)
    store = TapStore(KEY, torch.float32, tmp_path / "file" / "cache")
    filling = fill(store, digests)
    assert (filling.computed, filling.left_out) == (0, 3)
    assert (filling.reason or "").startswith("cannot write: ")
    assert store.reader(digests).read([0, 1])[1] == [0, 1]


def test_a_directory_that_is_read_only_still_gives_what_it_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(TapStore(KEY, torch.float32, tmp_path), samples(0, 4))
    opening = os.open

    def read_only(path: Any, flags: int, *mode: int) -> int:
        if flags & os.O_RDWR:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return opening(path, flags, *mode)

    monkeypatch.setattr(tap_places.os, "open", read_only)
    store, digests = TapStore(KEY, torch.float32, tmp_path), samples(0, 6)
    filling = fill(store, digests)
    assert (filling.found, filling.computed, filling.left_out) == (4, 0, 2)
    assert (filling.reason or "").startswith("cannot write: ")
    assert_right(store.reader(digests), digests)


# ---- limit


@pytest.mark.parametrize("place", ["disk", "memory"])
def test_a_limit_smaller_than_the_data_keeps_a_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    limit, digests = 20_000, samples(0, 100)
    store = TapStore(KEY, torch.float32, tmp_path if place == "disk" else None, limit)
    filling = fill(store, digests)
    assert filling.reason == "limit"
    assert 0 < filling.computed < 60
    assert filling.computed + filling.left_out == 100
    assert used_bytes(tmp_path) <= limit
    assert (limit - tap_store.HEADER) / (SAMPLE + tap_store.SAMPLE) - 1 < filling.computed
    assert_right(store.reader(digests), digests)
    again = fill(store, digests)
    assert again.found >= filling.computed
    assert again.reason == "limit"
    assert used_bytes(tmp_path) <= limit


def test_the_least_recently_used_key_that_nobody_has_open_makes_room(tmp_path: Path) -> None:
    digests = samples(0, 20)

    def store(number: int, limit: int | None = None) -> TapStore:
        return TapStore(KEY | {"number": number}, torch.float32, tmp_path, limit)

    folders = {}
    for number, age in ((0, 100), (1, 300), (2, 200), (3, 400)):
        made = store(number)
        fill(made, digests)
        folders[number] = tmp_path / made.digest
        held = made if number == 3 else None
        del made
        then = time.time() - age
        os.utime(folders[number] / USE, (then, then))
    assert held is not None
    size = used_bytes(folders[0])
    limit = used_bytes(tmp_path) + tap_store.HEADER + 20 * (SAMPLE + tap_store.SAMPLE) - size - size // 2
    new = store(4, limit)
    assert fill(new, digests).left_out == 0
    assert {n for n, folder in folders.items() if folder.exists()} == {0, 3}, "1 and 2 are the oldest, 3 is in use"
    assert used_bytes(tmp_path) <= limit
    assert_right(held.reader(digests), digests)
    del new, held
    store(3)  # opened: from now on the most recently used
    fill(store(5, limit), digests)
    assert (folders[0].exists(), folders[3].exists()) == (False, True)


def test_what_a_reader_needs_is_not_evicted(tmp_path: Path) -> None:
    digests = samples(0, 20)
    reader = (store := TapStore(KEY, torch.float32, tmp_path)).reader(digests)
    folder = tmp_path / store.digest
    fill(store, digests)
    del store
    other = TapStore(KEY | {"n": 2}, torch.float32, tmp_path, limit=1000)
    assert fill(other, digests).reason == "limit"
    assert folder.exists()
    del reader
    assert fill(other, digests).computed == 0, "a limit below one shard"
    assert not folder.exists()


# ---- directories


@pytest.mark.parametrize("missing", ["module", "file system"])
def test_without_locks_everything_works_and_nothing_is_evicted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    def unsupported(*_: Any) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    if missing == "module":
        monkeypatch.setattr(tap_places, "fcntl", None)
    else:
        monkeypatch.setattr(tap_places.fcntl, "flock", unsupported)
        monkeypatch.setattr(tap_places.fcntl, "lockf", unsupported)
    digests = samples(0, 10)
    assert fill(TapStore(KEY, torch.float32, tmp_path), digests).computed == 10
    store = TapStore(KEY, torch.float32, tmp_path)
    assert fill(store, digests).found == 10
    assert_right(store.reader(digests), digests)
    assert fill(TapStore(KEY | {"n": 2}, torch.float32, tmp_path, limit=5000), digests).reason == "limit"
    assert fill(store, digests).found == 10


def test_a_directory_that_somebody_removes_meanwhile(tmp_path: Path) -> None:
    digests = samples(0, 8)
    store = TapStore(KEY, torch.float32, tmp_path)
    fill(store, digests[:4])
    shutil.rmtree(tmp_path / store.digest)
    filling = fill(store, digests)
    assert (filling.found, filling.computed, filling.left_out) == (4, 0, 4)
    assert (filling.reason or "").startswith("cannot write: ")
    assert_right(store.reader(digests), digests)
