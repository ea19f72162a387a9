"""Several processes at one tap store: shared work, death in the middle, eviction while another opens it."""

from __future__ import annotations

import multiprocessing
import os
import queue
import time
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import torch

from petl.data import tap_places, tap_store
from petl.data.tap_store import Filling, TapStore
from tests.data.test_tap_faults import leftovers, shards, used_bytes
from tests.data.test_tap_store import KEY, SAMPLE, Computing, assert_right, fill, samples

FORK = multiprocessing.get_context("fork")  # starts at once: torch is loaded


class Child:
    """Another process that fills the same key, and begins when it is told to."""

    def __init__(self, root: Path, count: int, seconds: float, keep: float = 0.0, limit: int | None = None) -> None:
        self.log, self.options = root / f"log{uuid4().hex}", (root / "cache", count, seconds, keep, limit)
        self.begin, self.end = FORK.Event(), FORK.Queue()
        self.process = FORK.Process(target=self.run, daemon=True)
        self.process.start()

    def run(self) -> None:
        directory, count, seconds, keep, limit = self.options
        tap_store.SECONDS = keep
        digests = samples(0, count)
        computing = Computing(digests)

        def compute(positions: list[int]) -> dict[str, torch.Tensor]:
            with open(self.log, "a", encoding="utf-8") as log:
                log.write("".join(f"{i}\n" for i in positions))
            time.sleep(seconds)
            return computing(positions)

        store = TapStore(KEY, torch.float32, directory, limit)
        self.begin.wait()
        filling = store.fill(digests, compute, chunk=2)
        self.end.put((filling, store.reader(digests).complete))

    def result(self) -> tuple[Filling, bool]:
        """The filling, and whether all can be read."""
        return self.end.get(timeout=60)

    def asked_for(self) -> list[int]:
        return [int(i) for i in self.log.read_text().split()] if self.log.exists() else []

    def kill(self, after: int) -> None:
        """SIGKILL when so many samples were asked for."""
        end = time.monotonic() + 60
        while len(self.asked_for()) < after and time.monotonic() < end:
            time.sleep(0.005)
        self.process.kill()
        self.process.join()


def two(root: Path, count: int, seconds: float, **options: Any) -> list[Child]:
    children = [Child(root, count, seconds, **options) for _ in range(2)]
    for child in children:
        child.begin.set()
    return children


@pytest.mark.parametrize("keep", [0.0, 10.0], ids=["written at once", "written late"])
def test_two_processes_share_the_work(tmp_path: Path, keep: float) -> None:
    digests, children = samples(0, 20), two(tmp_path, count=20, seconds=0.05, keep=keep)
    results = [child.result() for child in children]
    assert sorted(children[0].asked_for() + children[1].asked_for()) == list(range(20)), "nothing is computed twice"
    for child, (filling, complete) in zip(children, results, strict=True):
        assert complete
        assert filling.computed == len(child.asked_for()) > 0
        assert filling == Filling(20 - filling.computed, filling.computed, 0, 20 * SAMPLE, None, 0)
    assert_right(TapStore(KEY, torch.float32, tmp_path / "cache").reader(digests), digests)
    assert not leftovers(tmp_path)


def test_two_processes_keep_the_limit(tmp_path: Path) -> None:
    digests, children = samples(0, 200), two(tmp_path, count=200, seconds=0.0, limit=60_000)
    assert [child.result()[0].reason for child in children] == ["limit", "limit"]
    assert used_bytes(tmp_path / "cache") <= 60_000
    reader = TapStore(KEY, torch.float32, tmp_path / "cache").reader(digests)
    assert any(i in reader for i in range(200))
    assert_right(reader, digests)


def test_who_puts_something_under_a_limit_waits_for_its_turn(tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    with open(tmp_path / "cache" / tap_places.LIMIT, "wb") as lock:
        tap_places.fcntl.lockf(lock, tap_places.fcntl.LOCK_EX, 1, 0)
        child = Child(tmp_path, count=4, seconds=0.0, limit=60_000)
        child.begin.set()
        with pytest.raises(queue.Empty):
            child.end.get(timeout=0.5)
        assert len(child.asked_for()) == 2
        assert not [*tmp_path.rglob("*.safetensors")]
    assert child.result()[1]


def test_who_is_done_keeps_nobody_waiting(tmp_path: Path) -> None:
    store = TapStore(KEY, torch.float32, tmp_path / "cache")
    fill(store, samples(0, 4), chunk=2)
    for file in shards(store, tmp_path / "cache"):
        file.unlink()
    child = Child(tmp_path, count=4, seconds=0.0)
    child.begin.set()
    assert child.result()[0].computed == 4


def test_one_of_two_processes_is_killed_and_the_other_finishes(tmp_path: Path) -> None:
    digests, (first, second) = samples(0, 20), two(tmp_path, count=20, seconds=0.1)
    first.kill(after=6)
    filling, complete = second.result()
    assert complete
    assert filling.found + filling.computed == 20
    assert filling.found >= 4, "what the dead process had written is used"
    both = {*first.asked_for()} & {*second.asked_for()}
    assert both <= {*first.asked_for()[-2:]}, "only the chunk it died at is computed again"
    assert_right(TapStore(KEY, torch.float32, tmp_path / "cache").reader(digests), digests)


def test_a_killed_filling_is_continued(tmp_path: Path) -> None:
    digests, child = samples(0, 20), Child(tmp_path, count=20, seconds=0.1)
    child.begin.set()
    child.kill(after=8)
    store = TapStore(KEY, torch.float32, tmp_path / "cache")
    assert fill(store, digests, chunk=2) == Filling(6, 14, 0, 20 * SAMPLE, None, 0)
    assert_right(store.reader(digests), digests)


def test_leftovers_of_the_dead_are_removed_and_those_of_the_living_are_not(tmp_path: Path) -> None:
    store = TapStore(KEY, torch.float32, tmp_path)
    half = tmp_path / store.digest / ".tmp-half.safetensors"
    half.write_bytes(b"half")
    TapStore(KEY, torch.float32, tmp_path)
    assert half.exists(), "the first may be writing it"
    del store
    TapStore(KEY, torch.float32, tmp_path)
    assert not half.exists()


@pytest.mark.parametrize("before", [True, False], ids=["before the lock", "before the file"])
def test_a_directory_evicted_while_it_is_opened_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: bool
) -> None:
    digests, done = samples(0, 4), []
    folder = tmp_path / TapStore(KEY, torch.float32, tmp_path).digest
    step = "_flock" if before else "os.open"
    real = tap_places._flock if before else os.open

    def evicted_first(*args: Any, **options: Any) -> Any:
        if not done:
            done.append(folder.rename(tmp_path / ".tmp-evicted"))
        return real(*args, **options)

    monkeypatch.setattr(f"petl.data.tap_places.{step}", evicted_first)
    store = TapStore(KEY, torch.float32, tmp_path)
    monkeypatch.undo()
    assert done
    assert fill(store, digests) == Filling(0, 4, 0, 4 * SAMPLE, None, 0)
    assert fill(TapStore(KEY | {"n": 2}, torch.float32, tmp_path, limit=1000), digests).reason == "limit"
    assert folder.exists(), "it is held"
    assert not done[0].exists(), "what an eviction left behind is removed"
