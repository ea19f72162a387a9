"""Worker processes that live on from job to job: importing torch and Lightning takes seconds, a small run not more."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import get_context, parent_process
from multiprocessing.connection import Connection, wait
from typing import Any, Generic, TypeVar

J = TypeVar("J")
DIED = "the worker process ended (killed, out of memory, or crashed)"


def _serve(connection: Connection, work: Callable[[Any], str], environment: dict[str, str]) -> None:
    """A worker: one job after the other, until there are no more or whoever started it is gone."""
    os.environ |= environment

    def follow() -> None:
        parent = parent_process()
        assert parent is not None
        parent.join()
        os._exit(1)  # nobody waits for the result, and another sweep may run this job

    threading.Thread(target=follow, daemon=True).start()
    while (job := connection.recv()) is not None:
        connection.send(work(job))


class _Worker(Generic[J]):
    def __init__(self, work: Callable[[J], str], environment: dict[str, str]) -> None:
        context = get_context("spawn")
        self.connection, far = context.Pipe()
        self.process = context.Process(target=_serve, args=(far, work, environment))
        self.process.start()
        far.close()  # so that the end of the worker is the end of the pipe
        self.job: J | None = None

    def give(self, job: J) -> None:
        self.job = job
        self.connection.send(job)


def run_all(
    jobs: Sequence[J], work: Callable[[J], str], environments: Sequence[dict[str, str]]
) -> Iterator[tuple[J, str | None]]:
    """Run ``work(job)`` for every job, in a worker for each of ``environments`` (variables that it adds to its own).

    Yields each job with the line that ``work`` returned as it ends; None where its worker died, which is replaced.
    ``work`` is a function of a module and handles its own exceptions.
    """
    left, workers = deque(jobs), list[_Worker[J]]()
    try:
        for environment in environments[: len(jobs)]:
            workers.append(_Worker(work, environment))
            workers[-1].give(left.popleft())
        while busy := [w for w in workers if w.job is not None]:
            ready = wait([w.connection for w in busy])
            for worker in [w for w in busy if w.connection in ready]:
                job = worker.job
                assert job is not None
                worker.job = None
                try:
                    line = worker.connection.recv()
                except (EOFError, OSError):
                    line, place = None, workers.index(worker)
                    if left:
                        workers[place] = worker = _Worker(work, environments[place])
                if left:
                    worker.give(left.popleft())
                yield job, line
    finally:
        for worker in workers:
            if worker.job is None and worker.process.is_alive():
                worker.connection.send(None)
            else:
                worker.process.kill()
            worker.process.join()
