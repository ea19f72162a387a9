"""A training in stages: whole epochs, each with its own tensors, learning rate and schedule."""

from __future__ import annotations

from abc import abstractmethod

from torch import nn

from petl.tasks.base import Factor, FrozenTask, cosine

WARMUP = 0.05  # of the steps of a stage


class StagedTask(FrozenTask):
    """A task that trains other tensors in each stage; the rest has no gradient and no step.

    Subclasses set ``stages``, the names in order; ``epochs`` of each but the last, which has what remains of the
    trainer's; and ``lrs``, the peak learning rates.
    """

    stages: tuple[str, ...]
    epochs: dict[str, int]
    lrs: dict[str, float]

    @abstractmethod
    def tensors(self, stage: str) -> list[nn.Parameter]:
        """What a stage trains."""

    def stage(self) -> str:
        """The stage of the current epoch of a training, the last one outside of it."""
        if self.trainer.state.fn == "fit":
            end = 0
            for stage, length in self.epochs.items():
                end += length
                if self.current_epoch < end:
                    return stage
        return self.stages[-1]

    def parameter_groups(self) -> list[dict[str, object]]:
        return [{"params": self.tensors(stage), "lr": self.lrs[stage]} for stage in self.stages]

    def factors(self, total: int) -> list[Factor]:
        epochs = self.trainer.max_epochs or 1
        lengths = {**self.epochs, self.stages[-1]: max(1, epochs - sum(self.epochs.values()))}
        found, first = [], 0.0
        for stage in self.stages:
            length = lengths[stage] * total / max(1, epochs)
            if self.tensors(stage):
                found.append(_factor(round(first), max(1, round(length))))
            first += length
        return found

    def resting(self) -> list[nn.Parameter]:
        now = self.stage()
        return [p for stage in self.stages if stage != now for p in self.tensors(stage)]


def _factor(first: int, length: int) -> Factor:
    """Of a stage of ``length`` steps that starts at step ``first``: warm-up, cosine to 0; 0 outside of it."""
    warmup = int(WARMUP * length)

    def factor(step: int) -> float:
        local = step - first
        if not 0 <= local < length:
            return 0.0
        return (local + 1) / (warmup + 1) if local < warmup else cosine(0.0, local, warmup, length)

    return factor
