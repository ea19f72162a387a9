"""`petl fit|validate|test|predict`: LightningCLI with a run folder, petl's callbacks, and readable errors."""

from __future__ import annotations

import logging
import shutil
import signal
import sys
import warnings
from argparse import ArgumentError
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import SIGTERMException

from petl.engine.callbacks import LoadAdapter, Progress, Results, SaveAdapter
from petl.engine.checkpoints import AtomicCheckpointIO, RunCheckpoint
from petl.engine.errors import check_class_paths, explain, underlying
from petl.engine.pictures import BoxPictures, TokenPictures
from petl.engine.tap_cache import TapCache
from petl.errors import PetlError, nearest
from petl.methods import entries, get_method

SELECT = ("last", "best")


class Parser(LightningArgumentParser):
    """Raises instead of leaving, and takes whole option names only."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs | {"allow_abbrev": False, "exit_on_error": False})


@contextmanager
def readable_errors(args: list[str]) -> Iterator[None]:
    """Turns what jsonargparse raises into one `PetlError`: the one it was raised from, or its own message explained."""
    try:
        yield
    except (ArgumentError, ValueError, TypeError) as error:
        cause = underlying(error)
        if cause is None and not (isinstance(error, ArgumentError) or "Does not validate against" in str(error)):
            raise  # not about the configuration
        raise cause or PetlError(explain(str(error), args)) from error


class SaveConfig(SaveConfigCallback):
    """The resolved config, beside the run."""

    def save_config(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage == "fit":
            folder = Path(trainer.default_root_dir)
            folder.mkdir(parents=True, exist_ok=True)
            text = self.parser.dump(self.config, skip_none=False)
            (folder / "config.yaml").write_text(text)


def register_methods() -> None:
    """Import every method, so that configs can name it by its class alone: ``--model.method SparseTuning``."""
    for entry in entries().values():
        get_method(entry.name)


class PetlCLI(LightningCLI):
    def __init__(self, args: list[str], callbacks: Sequence[Callback] = ()) -> None:
        self.more_callbacks = callbacks
        register_methods()
        sys.argv[1:] = args  # what Lightning starts the other processes of a DDP run with
        try:
            super().__init__(
                L.LightningModule,
                L.LightningDataModule,
                subclass_mode_model=True,
                subclass_mode_data=True,
                save_config_callback=SaveConfig,
                save_config_kwargs={"save_to_log_dir": False, "overwrite": True},
                parser_class=Parser,
                seed_everything_default=0,
                auto_configure_optimizers=False,
                load_from_checkpoint_support=False,
                trainer_defaults={"max_epochs": 10, "enable_model_summary": False},
            )
        except PetlError:
            self._leave_no_trace()
            raise

    def _leave_no_trace(self) -> None:
        """Delete the run folder of a training that stopped at bad input before its first step."""
        if getattr(self, "made", False) and rank_zero_only.rank == 0:  # type: ignore[attr-defined]
            run = Path(self.options.run_dir)
            if not (run / "checkpoints").exists() and not (run / "adapter").exists():
                shutil.rmtree(run, ignore_errors=True)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--run_dir", type=str, default="runs/default", help="Everything this run writes goes here.")
        parser.add_argument("--overwrite", type=bool, default=False, help="Delete what an earlier run left in run_dir.")
        parser.add_argument(
            "--select", type=str, default="last", help="Adapter to keep: 'last' epoch, or 'best' val/acc."
        )
        parser.add_argument(
            "--checkpoint_every", type=int, default=50, help="Steps between run states for resuming (--ckpt_path last)."
        )
        for name, default, text in (
            ("cache", "auto", "What the frozen network computes of an input, computed once: auto, off, or require."),
            ("cache_dir", None, "Where it lies; 'memory' = in this process; null = $PETL_CACHE or ~/.cache/petl/taps."),
            ("cache_limit", "20GB", "Of cache_dir; what was not used for longest makes room."),
            ("cache_dtype", "bfloat16", "In which it is kept: bfloat16, or float32."),
        ):
            parser.add_argument(f"--{name}", type=str if default else str | None, default=default, help=text)

    @property
    def options(self) -> Any:
        return self.config[self.config["subcommand"]]

    def before_instantiate_classes(self) -> None:
        options = self.options
        run = Path(options.run_dir)
        stage = self.config["subcommand"]
        self.made = stage == "fit" and not run.exists()  # by this run: see `_leave_no_trace`
        if options.select not in SELECT:
            raise PetlError(f"select is {options.select!r}: {nearest(options.select, SELECT)}")
        fresh = stage == "fit" and not options.get("ckpt_path") and rank_zero_only.rank == 0  # type: ignore[attr-defined]
        if fresh and (run / "config.yaml").exists():
            if not options.overwrite:
                raise PetlError(
                    f"{run} holds a run already. Continue it with --ckpt_path last, replace it with --overwrite true, "
                    "or choose another --run_dir."
                )
            shutil.rmtree(run)
        if stage == "fit" and options.get("ckpt_path") == "last" and not (run / "config.yaml").exists():
            raise PetlError(f"{run} holds no run to continue: check --run_dir, or start without --ckpt_path.")
        if stage != "fit" and not options.get("ckpt_path") and not (run / "adapter").is_dir():
            raise PetlError(
                f"{run} has no adapter to {stage}: run 'petl fit' with this config first, or give --run_dir."
            )
        options.trainer.default_root_dir = str(run)
        for logger in _logger_entries(options.trainer.logger):
            arguments, is_wandb = logger.get("init_args"), str(logger.get("class_path", "")).endswith("WandbLogger")
            if is_wandb and arguments and arguments.get("save_dir") == ".":
                arguments["save_dir"] = str(run)

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        run, options = Path(self.options.run_dir), self.options
        given = self._get(self.config_init, "trainer")
        loggers = given.get("logger")
        loggers = [] if loggers in (None, True, False) else loggers if isinstance(loggers, list) else [loggers]
        given["logger"] = [*loggers, CSVLogger(run, name="metrics")] if given.get("logger") is not False else False
        plugins = given.get("plugins") or []
        given["plugins"] = [*(plugins if isinstance(plugins, list) else [plugins]), AtomicCheckpointIO()]
        callbacks: list[Callback] = [
            Progress(),
            RunCheckpoint(run / "checkpoints", options.checkpoint_every),
            SaveAdapter(run / "adapter", options.select),
            TokenPictures(run / "pictures"),
            BoxPictures(run / "pictures", count=8),
            Results(run),
            TapCache(options.cache, options.cache_dir, options.cache_limit, options.cache_dtype),
        ]
        if self.config["subcommand"] != "fit" and not options.get("ckpt_path"):
            callbacks.append(LoadAdapter(run / "adapter"))
        callbacks += self.more_callbacks
        self.trainer_defaults = {**self.trainer_defaults, "callbacks": callbacks}
        return super().instantiate_trainer(**kwargs)

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        return super()._prepare_subcommand_kwargs(subcommand) | {"weights_only": True}


def _logger_entries(logger: Any) -> list[Any]:
    entries = logger if isinstance(logger, list) else [logger]
    return [e for e in entries if hasattr(e, "get")]


def run(args: list[str], callbacks: Sequence[Callback] = ()) -> PetlCLI:
    """Run ``petl <fit|validate|test|predict> …`` and return the CLI with its trainer, model and data.

    ``callbacks``: further ones. Raises `PetlError` for everything a user can put right.
    """
    check_class_paths(args)
    for text in (".*does not have many workers.*", ".*eval mode at the start of training.*", ".*treespec.*",
                 ".*smaller than the logging.*", ".*ended before the epoch ended.*", ".*tensorboard.*",
                 ".*Checkpoint directory.*exists and is not empty.*", ".*isinstance.*LeafSpec.*"):  # fmt: skip
        warnings.filterwarnings("ignore", text)
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    try:
        with readable_errors(args):
            return PetlCLI(args, callbacks)
    except SIGTERMException as end:  # a SystemExit with the code 0
        print("petl: terminated. Continue a training with --ckpt_path last.", file=sys.stderr)
        raise SystemExit(128 + signal.SIGTERM) from end
