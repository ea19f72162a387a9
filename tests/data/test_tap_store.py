"""The tap store: what is written, read and computed, and that only what is read comes into memory."""

from __future__ import annotations

import io
import json
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from petl.data import tap_store
from petl.data.tap_reader import TapReader
from petl.data.tap_shards import write_shard
from petl.data.tap_store import Filling, TapStore
from petl.errors import PetlError

KEY = {"backbone": "sha", "taps": ["block.0", "features"], "mean": [0.5, 0.25]}


def value(digest: str) -> dict[str, Tensor]:
    """The taps of a sample: (5, 8), (16,), an integer and a truth value."""
    generator = torch.Generator().manual_seed(int(digest.removeprefix("s")))
    return {
        "block.0": torch.randn(5, 8, generator=generator),
        "features": torch.randn(16, generator=generator),
        "length": torch.randint(0, 1 << 40, (), generator=generator),
        "mask": torch.rand(3, generator=generator) > 0.5,
    }


SAMPLE = 40 * 4 + 16 * 4 + 8 + 3  # bytes, in fp32


class Computing:
    """A ``compute`` that remembers what it was asked for."""

    def __init__(self, digests: Sequence[str]) -> None:
        self.digests, self.calls = digests, list[list[int]]()

    def __call__(self, positions: list[int]) -> dict[str, Tensor]:
        self.calls.append(positions)
        values = [value(self.digests[i]) for i in positions]
        return {name: torch.stack([v[name] for v in values]) for name in values[0]}


def samples(start: int, stop: int) -> list[str]:
    return [f"s{i}" for i in range(start, stop)]


def fill(store: TapStore, digests: Sequence[str], chunk: int = 4) -> Filling:
    return store.fill(digests, Computing(digests), chunk)


def assert_right(reader: TapReader, digests: Sequence[str], dtype: torch.dtype = torch.float32) -> None:
    """Whatever the reader has is what was computed; what it lacks is zero."""
    taps, missing = reader.read(range(len(digests)))
    assert missing == [i for i in range(len(digests)) if i not in reader]
    for i, digest in enumerate(digests):
        for name, expected in value(digest).items():
            kept = expected.to(dtype) if expected.is_floating_point() else expected
            assert torch.equal(taps[name][i], torch.zeros_like(kept) if i in missing else kept), (digest, name)


@pytest.fixture(params=["disk", "memory"])
def directory(request: pytest.FixtureRequest, tmp_path: Path) -> Path | None:
    return tmp_path / "cache" if request.param == "disk" else None


# ---- contents


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_computed_is_what_is_read(directory: Path | None, dtype: torch.dtype) -> None:
    digests = samples(0, 11)
    store = TapStore(KEY, dtype, directory)
    computing = Computing(digests)
    filling = store.fill(digests, computing, chunk=4)
    assert computing.calls == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10]]
    size = 56 * dtype.itemsize + 8 + 3
    assert filling == Filling(found=0, computed=11, left_out=0, nbytes=11 * size, reason=None, damaged=0)
    reader = store.reader(digests)
    assert (len(reader), reader.complete, reader.nbytes) == (11, True, 11 * size)
    assert_right(reader, digests, dtype)
    taps, _ = reader.read([7, 2, 2])  # any order, with repetitions
    assert {name: (tuple(t.shape), t.dtype) for name, t in taps.items()} == {
        "block.0": ((3, 5, 8), dtype),
        "features": ((3, 16), dtype),
        "length": ((3,), torch.int64),
        "mask": ((3, 3), torch.bool),
    }
    assert torch.equal(taps["block.0"][0], value("s7")["block.0"].to(dtype))
    assert torch.equal(taps["block.0"][1], taps["block.0"][2])


def test_equal_samples_are_computed_once(directory: Path | None) -> None:
    digests = ["s1", "s2", "s1", "s3", "s2", "s1"]
    store, computing = TapStore(KEY, torch.float32, directory), Computing(digests)
    filling = store.fill(digests, computing, chunk=2)
    assert computing.calls == [[0, 1], [3]]
    assert (filling.computed, filling.nbytes) == (3, 3 * SAMPLE)
    assert_right(store.reader(digests), digests)
    assert store.reader(digests).nbytes == 3 * SAMPLE


def test_only_what_is_missing_is_computed(directory: Path | None) -> None:
    store = TapStore(KEY, torch.float32, directory)
    fill(store, samples(2, 5))
    digests = samples(0, 8)
    computing = Computing(digests)
    filling = store.fill(digests, computing, chunk=4)
    assert computing.calls == [[0, 1], [5, 6, 7]]
    assert (filling.found, filling.computed) == (3, 5)
    assert_right(store.reader(digests), digests)


def test_a_later_run_finds_everything(tmp_path: Path) -> None:
    digests = samples(0, 9)
    fill(TapStore(KEY, torch.float32, tmp_path), digests)
    reordered = {"mean": [0.5, 0.25], "taps": ["block.0", "features"], "backbone": "sha"}
    store = TapStore(reordered, torch.float32, tmp_path)
    assert store.reader(digests).complete
    assert fill(store, digests) == Filling(9, 0, 0, 9 * SAMPLE, None, 0)
    assert_right(store.reader(digests), digests)


@pytest.mark.parametrize(
    ("key", "dtype"),
    [(KEY | {"backbone": "other"}, torch.float32), (KEY | {"new": 1}, torch.float32), (KEY, torch.bfloat16)],
)
def test_another_key_or_type_is_another_directory(tmp_path: Path, key: dict[str, Any], dtype: torch.dtype) -> None:
    fill(TapStore(KEY, torch.float32, tmp_path), samples(0, 3))
    other = TapStore(key, dtype, tmp_path)
    assert not any(i in other.reader(samples(0, 3)) for i in range(3))
    assert fill(other, samples(0, 3)).computed == 3
    assert len({*tmp_path.iterdir()}) == 2


def test_the_directory_says_what_it_is(tmp_path: Path) -> None:
    store = TapStore(KEY, torch.bfloat16, tmp_path)
    fill(store, samples(0, 3))
    folder = tmp_path / store.digest
    assert {p.name if p.suffix != ".safetensors" else "*" for p in folder.iterdir()} == {
        "*", "key.json", "use.lock", "fill.lock"
    }  # fmt: skip
    assert json.loads((folder / "key.json").read_text()) == {"format": 1, "dtype": "bfloat16", "key": KEY}


def test_reading_what_is_not_there(directory: Path | None) -> None:
    store = TapStore(KEY, torch.float32, directory)
    assert store.reader(samples(0, 2)).read([0, 1]) == ({}, [0, 1])
    fill(store, samples(0, 4))
    digests = samples(2, 6)
    reader = store.reader(digests)
    assert ([i in reader for i in range(4)], reader.complete) == ([True, True, False, False], False)
    assert reader.nbytes == 2 * SAMPLE
    assert_right(reader, digests)
    assert reader.read([3, 0])[1] == [0]
    assert reader.read([])[1] == []
    with pytest.raises(IndexError):
        reader.read([4])


# ---- shards


def test_chunks_are_gathered_and_large_ones_divided(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    digests = samples(0, 40)
    few = TapStore(KEY, torch.float32, tmp_path)
    fill(few, digests, chunk=2)
    assert len([*(tmp_path / few.digest).glob("*.safetensors")]) == 1
    monkeypatch.setattr(tap_store, "SECONDS", 0.0)  # every chunk is older than that
    slow = TapStore(KEY | {"n": 3}, torch.float32, tmp_path)
    fill(slow, digests, chunk=10)
    assert len([*(tmp_path / slow.digest).glob("*.safetensors")]) == 4
    monkeypatch.setattr(tap_store, "SHARD", 7 * SAMPLE)
    divided = TapStore(KEY | {"n": 2}, torch.float32, tmp_path)
    assert fill(divided, digests, chunk=40).computed == 40
    assert len([*(tmp_path / divided.digest).glob("*.safetensors")]) == 6
    assert_right(divided.reader(digests), digests)


def resident() -> dict[str, int]:
    """KiB of this process's memory, private (RssAnon) and of mapped files (RssFile)."""
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    return {line[0].rstrip(":"): int(line[1]) for line in lines if line and line[0] in ("RssAnon:", "RssFile:")}


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_only_what_is_read_comes_into_memory(tmp_path: Path) -> None:
    digests, size = samples(0, 32), 2 << 20
    store = TapStore(KEY, torch.bfloat16, tmp_path)
    store.fill(digests, lambda at: {"x": torch.arange(len(at))[:, None].expand(-1, size // 2) + at[0] * 1.0}, chunk=4)
    packed = pickle.dumps(store.reader(digests))
    assert len(packed) < 10_000
    before = resident()
    reader: TapReader = pickle.loads(packed)  # maps the 64 MiB anew, as a loader process does
    for index in (3, 30):
        taps, _ = reader.read([index])
        assert taps["x"].shape == (1, size // 2)
        assert (taps["x"] == index).all()
    del taps
    after = resident()
    assert after["RssAnon"] - before["RssAnon"] < 24 << 10
    assert after["RssFile"] - before["RssFile"] < 24 << 10  # of 64 MiB
    assert any(tmp_path.name in line for line in Path("/proc/self/maps").read_text().splitlines())


def test_what_a_reader_gives_is_the_callers_own(directory: Path | None) -> None:
    store = TapStore(KEY, torch.float32, directory)
    fill(store, samples(0, 4))
    reader = store.reader(samples(0, 4))
    for tap in reader.read([0, 1, 2, 3])[0].values():
        tap.zero_()
    assert_right(reader, samples(0, 4))


def test_what_compute_returns_may_be_used_again(directory: Path | None) -> None:
    buffer = torch.zeros(2, 3, requires_grad=True)

    def compute(positions: list[int]) -> dict[str, Tensor]:
        with torch.no_grad():
            buffer.copy_(torch.tensor(positions)[:, None].float().expand(2, 3))
        return {"x": buffer}

    store = TapStore(KEY, torch.float32, directory)
    store.fill(samples(0, 6), compute, chunk=2)
    taps, _ = store.reader(samples(0, 6)).read(range(6))
    assert taps["x"][:, 0].tolist() == [0, 1, 2, 3, 4, 5]
    assert not taps["x"].requires_grad


# ---- other processes and devices


class Batches(torch.utils.data.Dataset):
    """Batches of a reader, by lists of positions."""

    def __init__(self, reader: TapReader) -> None:
        self.reader = reader

    def __getitem__(self, indices: list[int]) -> dict[str, Tensor]:
        return self.reader.read(indices)[0]


def test_loader_processes_read_the_files(tmp_path: Path) -> None:
    digests = samples(0, 8)
    store = TapStore(KEY, torch.float32, tmp_path)
    fill(store, digests)
    loader = DataLoader(Batches(store.reader(digests)), sampler=[[0, 5], [7, 1]], batch_size=None, num_workers=1)
    read = torch.cat([batch["features"] for batch in loader])
    assert torch.equal(read, torch.stack([value(digests[i])["features"] for i in (0, 5, 7, 1)]))


def test_files_that_vanish_before_a_copy_of_a_reader_maps_them(tmp_path: Path) -> None:
    digests = samples(0, 6)
    store = TapStore(KEY, torch.float32, tmp_path)
    fill(store, digests[:3])
    first = {*(tmp_path / store.digest).glob("*.safetensors")}
    fill(store, digests)
    buffer = io.BytesIO(pickle.dumps(store.reader(digests)))
    for file in first:
        file.unlink()
    copy: TapReader = pickle.load(buffer)
    assert copy.read([4, 0])[1] == [1]
    assert not copy.complete
    assert_right(copy, digests)
    assert store.reader(digests).complete, "this process has them mapped"
    assert_right(store.reader(digests), digests)


def test_all_in_one_tensor(directory: Path | None) -> None:
    digests = ["s3", "s0", "s3", "s9", "s5"]
    store = TapStore(KEY, torch.float32, directory)
    fill(store, samples(3, 6), chunk=2)
    fill(store, samples(0, 2), chunk=2)
    reader = store.reader(digests)
    held = reader.to("cpu")
    assert (held.nbytes, held.complete, len(held)) == (reader.nbytes, False, 5) == (3 * SAMPLE, False, 5)
    assert_right(held, digests)
    assert not reader.fits("cpu")
    elsewhere = reader.to("meta")
    taps, missing = elsewhere.read([3, 0])
    assert missing == [0]
    assert {(t.device.type, len(t)) for t in taps.values()} == {("meta", 2)}
    assert (taps["block.0"].dtype, taps["length"].dtype) == (torch.float32, torch.int64)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_taps_on_a_gpu(tmp_path: Path) -> None:
    digests = ["s3", "s0", "s3", "s9", "s5"]
    store = TapStore(KEY, torch.bfloat16, tmp_path)
    store.fill(["s3", "s5"], lambda at: {n: t.cuda() for n, t in Computing(["s3", "s5"])(at).items()}, chunk=2)
    reader = store.reader(digests)
    assert reader.fits("cuda")
    held = reader.to("cuda")
    order = [4, 1, 0, 3, 2]
    (taps, missing), (expected, same) = held.read(order), reader.read(order)
    assert missing == same == [1, 3]
    assert all(t.is_cuda and torch.equal(t.cpu(), expected[name]) for name, t in taps.items())
    assert held.read([1])[1] == [0]
    assert taps["features"].dtype == torch.bfloat16


# ---- wrong use


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"key": {"x": torch.zeros(1)}}, "JSON values"),
        ({"dtype": torch.int8}, "torch.bfloat16"),
        ({"limit": 0}, "positive number of bytes"),
    ],
)
def test_wrong_options(options: dict[str, Any], words: str) -> None:
    with pytest.raises(PetlError, match=words):
        TapStore(**({"key": KEY, "dtype": torch.float32} | options))


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (lambda n: {"x": torch.zeros(n, 4)}, r"\(3,\).*\(2, 4\)"),
        (lambda n: {"x": torch.zeros(n, 3), "y": torch.zeros(n)}, "belongs into the key"),
        (lambda n: {"x": torch.zeros(n, 3, dtype=torch.int64)}, "belongs into the key"),
        (lambda n: {"x": torch.zeros(n + 1, 3)}, "2 samples were asked for"),
        (lambda n: {}, "no taps"),
    ],
)
def test_taps_of_a_key_are_always_the_same(directory: Path | None, wrong: Any, words: str) -> None:
    store = TapStore(KEY, torch.float32, directory)

    def compute(positions: list[int]) -> dict[str, Tensor]:
        return {"x": torch.ones(len(positions), 3)} if positions[0] < 4 else wrong(len(positions))

    with pytest.raises(PetlError, match=words):
        store.fill(samples(0, 8), compute, chunk=2)
    assert store.reader(samples(0, 8)).read(range(8))[1] == [4, 5, 6, 7], "what came before is kept"
    with pytest.raises(PetlError, match="at least 1"):
        store.fill(samples(0, 1), compute, chunk=0)


def test_what_compute_raises_comes_through(directory: Path | None) -> None:
    store, digests = TapStore(KEY, torch.float32, directory), samples(0, 8)

    def compute(positions: list[int]) -> dict[str, Tensor]:
        if 4 in positions:
            raise OSError("image 4 cannot be read")
        return Computing(digests)(positions)

    with pytest.raises(OSError, match="image 4"):
        store.fill(digests, compute, chunk=2)
    assert fill(store, digests) == Filling(4, 4, 0, 8 * SAMPLE, None, 0)


def test_a_shard_that_does_not_fit_its_key_is_not_used(tmp_path: Path) -> None:
    store = TapStore(KEY, torch.float32, tmp_path)
    fill(store, samples(0, 2))
    write_shard(tmp_path / store.digest, store.digest, ["s2"], {"block.0": torch.zeros(1, 5, 8)})
    digests = samples(0, 4)
    assert fill(store, digests) == Filling(2, 2, 0, 4 * SAMPLE, None, 1)
    assert_right(store.reader(digests), digests)
