"""W&B through Lightning's logger, with the two habits people expect: offline without a key, one run per training."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from lightning.pytorch.loggers import WandbLogger as _WandbLogger
from lightning.pytorch.utilities import rank_zero_only

RUN_ID = "wandb_run_id.txt"


class WandbLogger(_WandbLogger):
    """Lightning's WandbLogger that needs no set-up.

    Args:
        project: W&B project.
        save_dir: the run folder; the run's id is kept there, so that a resumed training continues the same W&B run.
        name: display name of the run.
        offline: None = offline exactly when no API key is configured.
        tags: tags of the run.
    """

    def __init__(
        self,
        project: str = "petl",
        save_dir: str = ".",
        name: str | None = None,
        offline: bool | None = None,
        tags: list[str] | None = None,
    ) -> None:
        if offline is None:
            offline = not (os.environ.get("WANDB_API_KEY") or _netrc_has_key())
        super().__init__(
            project=project,
            name=name,
            save_dir=save_dir,
            offline=offline,
            id=_run_id(Path(save_dir)),
            resume="allow",
            tags=tags,
        )


def _netrc_has_key() -> bool:
    import netrc

    try:
        return any("wandb" in host for host in netrc.netrc().hosts)
    except (OSError, netrc.NetrcParseError):
        return False


def _run_id(folder: Path) -> str:
    """The id kept in ``folder``; a new one is written there by the first process."""
    file = folder / RUN_ID
    if file.is_file():
        return file.read_text().strip()
    identifier = secrets.token_hex(4)
    if rank_zero_only.rank == 0:  # type: ignore[attr-defined]
        folder.mkdir(parents=True, exist_ok=True)
        file.write_text(identifier)
    return identifier
