"""What the workers of a test do: a module of its own, since they import it."""

from __future__ import annotations

import os
import time
from pathlib import Path


def work(job: str) -> str:
    if job == "die":
        os._exit(9)
    if job == "wait":
        Path("worker.pid").write_text(str(os.getpid()))
        time.sleep(600)
    return f"{job} {os.environ['WORKER']} {os.getpid()}"
