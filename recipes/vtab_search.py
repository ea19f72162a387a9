"""Choice of hyper-parameters for one method on one task: optuna's TPE with median pruning, train800 against val200.

A trial trains as the final run does, on train800, and counts what the last epoch has on val200. The first trial has the
settings of the methods file. ``METHOD/TASK/search.json`` is the record; ``search.journal`` holds the trials, so that a
search which was killed continues.
"""

from __future__ import annotations

import gc
import shutil
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vtab_cell import FAILED, config_file, config_hash, failure, printing_to, read_json, write_json
from vtab_methods import Settings, arguments, changed, get

from petl.errors import PetlError

SEED = 0


@dataclass(frozen=True)
class Search:
    """``before`` and ``after``: arguments of `petl fit` around those of the method."""

    out: Path
    method: str
    task: str
    config: str
    before: tuple[str, ...]
    settings: Settings
    after: tuple[str, ...]
    trials: int

    @property
    def folder(self) -> Path:
        return self.out / self.method / self.task / "search"

    @property
    def file(self) -> Path:
        return self.folder.with_suffix(".json")

    @property
    def name(self) -> str:
        return f"{self.method} / {self.task} / search"

    @property
    def key(self) -> dict[str, Any]:
        return {"method": self.method, "task": self.task}

    @property
    def rule(self) -> str:
        return f"optuna TPE with median pruning, {self.trials} trials, last epoch on val200"

    @property
    def asked(self) -> dict[str, Any]:
        settings = {key: self.settings[key] for key in ("method", "options", "lr", "weight_decay", "search")}
        return {"config": config_hash(self.config), "before": list(self.before), "after": list(self.after),
                "settings": settings, "rule": self.rule}  # fmt: skip

    def chosen(self) -> Settings:
        """The settings with what the finished search found."""
        return changed(self.settings, (read_json(self.file) or {})["chosen"])


def require_optuna() -> None:
    try:
        import optuna  # noqa: F401
    except ImportError as error:
        raise PetlError("--select needs optuna: pip install 'petl-tuning[search]'.") from error


def run_search(search: Search) -> str:
    """Carry out a search and write its record; returns a line about it. Exceptions of trials are part of the result."""
    with printing_to(search.folder.with_suffix(".log")):
        try:
            record = _search(search)
        except Exception as error:  # the other searches shall go on
            traceback.print_exc()
            record = failure(search.key, f"{type(error).__name__}: {error}")
    write_json(search.file, record)
    shutil.rmtree(search.folder, ignore_errors=True)
    if record["status"] == "failed":
        return f"{search.name}: {FAILED}: {record['reason']}"
    return f"{search.name}: {record['chosen']}, {record['val_acc']:.1%} on val200"


def _search(search: Search) -> dict[str, Any]:
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend
    from optuna.trial import TrialState

    from petl.engine.lightning_cli import run

    began = time.perf_counter()
    space = search.settings["search"]

    def objective(trial: optuna.Trial) -> float:
        values = {key: _suggest(trial, key, where) for key, where in space.items()}
        fit = ["fit", "--config", str(config_file(search.config)), *search.before,
               *arguments(changed(search.settings, values)), *search.after, "--data.train_split", "train800",
               "--run_dir", str(search.folder), "--overwrite", "true", "--seed_everything", str(SEED),
               "--data.seed", str(SEED)]  # fmt: skip
        try:
            cli = run(fit, [pruner(trial)])
            return float(cli.trainer.callback_metrics["val/acc"])
        except optuna.TrialPruned:
            raise
        except Exception as error:
            trial.set_user_attr("error", f"{type(error).__name__}: {error}")
            raise
        finally:
            gc.collect()

    journal = search.folder.with_suffix(".journal")
    asked_before = search.folder.with_name("started-search.json")
    if not asked_before.is_file() or read_json(asked_before) != search.asked:
        journal.unlink(missing_ok=True)  # the trials of another search
        write_json(asked_before, search.asked)
    study = optuna.create_study(
        storage=JournalStorage(JournalFileBackend(str(journal))),
        study_name="search",
        load_if_exists=True,
        direction="maximize",
        pruner=optuna.pruners.MedianPruner(n_startup_trials=2),
    )
    for trial in study.get_trials(states=(TrialState.RUNNING,)):  # of a process that was killed
        study.tell(trial.number, state=TrialState.FAIL)
        study.enqueue_trial(trial.params)
    given = {key: get(search.settings, key) for key in space}
    study.enqueue_trial({key: value for key, value in given.items() if value is not None}, skip_if_exists=True)
    # a search that continues does not draw again what it drew before
    study.sampler = optuna.samplers.TPESampler(seed=len(study.trials), n_startup_trials=max(2, search.trials // 3))
    made = [t for t in study.trials if t.state.is_finished() and (t.state != TrialState.FAIL or t.user_attrs)]
    study.optimize(objective, n_trials=search.trials - len(made), catch=(Exception,))
    errors = [t.user_attrs["error"] for t in study.trials if "error" in t.user_attrs]
    count = {s.name.lower(): len(study.get_trials(states=(s,))) for s in (TrialState.COMPLETE, TrialState.PRUNED)}
    if not count["complete"]:
        raise PetlError(f"no trial of {search.trials} came to its end; the last error: {errors[-1:]}")
    return {
        "status": "done",
        **search.key,
        "asked": search.asked,
        "chosen": study.best_params,
        "val_acc": study.best_value,
        "trials": search.trials,
        **count,
        "errors": errors,
        "seconds": time.perf_counter() - began,
    }


def _suggest(trial: Any, key: str, where: dict[str, Any]) -> Any:
    if "choices" in where:
        return trial.suggest_categorical(key, where["choices"])
    return trial.suggest_float(key, where["low"], where["high"], log=where.get("log", False))


def pruner(trial: Any) -> Any:
    """A callback that reports the accuracy on val200 after each epoch, and ends a trial that falls behind."""
    import optuna
    from lightning.pytorch.callbacks import Callback

    class Pruner(Callback):
        def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
            if trainer.sanity_checking:
                return
            trial.report(float(trainer.callback_metrics["val/acc"]), trainer.current_epoch)
            if trainer.current_epoch + 1 < trainer.max_epochs and trial.should_prune():
                raise optuna.TrialPruned

    return Pruner()
