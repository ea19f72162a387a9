"""AutoGnothi's training: a surrogate for the classifier on coalitions, then an explainer of the surrogate's game.

One run has stages of whole epochs: the classifier's head (only where there is no trained classifier yet), the
surrogate, the explainer. Each trains its own tensors with its own schedule; the others get no gradient and no step.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torchmetrics import MeanMetric

from petl.adapters.artefact import save
from petl.backbones.base import BackboneView
from petl.backbones.players import Players
from petl.errors import PetlError, nearest
from petl.methods.autognothi import AutoGnothi
from petl.methods.base import Method
from petl.models.attributions import ATTRIBUTIONS, SHAPLEY
from petl.models.explained import ExplainedClassifier, Inputs
from petl.models.explanation_metrics import evaluate
from petl.models.games import Game, tabulate
from petl.nn.shapley import expected_loss, kernel_masks, shapley_loss, threshold_masks, uniform_size_masks
from petl.tasks.base import FrozenTask
from petl.tasks.source import ClassifierSource, rank_zero_print

STAGES = ("head", "surrogate", "explainer")
TABLE = 12  # players up to which the game of every training input may be tabulated
WARMUP = 0.05  # of the steps of a stage


class Explanation(FrozenTask):
    """Train side networks that explain a frozen classifier (AutoGnothi): surrogate first, then explainer.

    Args:
        classifier: what is explained: a directory that `petl fit` wrote for petl.Classification, or the name of a
            classifier with its head (timm/…, hf/…); with head_epochs the name of a backbone; in Python also the model.
        method: options of the side networks, a petl.AutoGnothi.
        head_epochs: epochs in which a linear head on a frozen backbone is trained first, for a backbone without one.
        surrogate_epochs: epochs of the surrogate; the explainer has what remains of trainer.max_epochs.
        head_lr: peak learning rate of the head.
        surrogate_lr: peak learning rate of the surrogate.
        lr: peak learning rate of the explainer.
        weight_decay: decoupled weight decay, on all trained tensors.
        min_agreement: share of validation inputs on which both must agree before the explainer starts.
        max_length: tokens of a text at most, start and end included.
        test_inputs: test inputs that `petl test` compares explanations on; None = all.
        baselines: explanations that `petl test` compares with; None = all of `petl.models.attributions.ATTRIBUTIONS`.
        backbone_args: constructor arguments for a timm model, e.g. {img_size: 32, patch_size: 4, num_classes: 10}.
        weights: a local .safetensors file with the classifier's weights.
        pretrained: false = random weights (tests).
        tokenizer: of a text classifier that is passed in as a model.

    Raises:
        PetlError: unknown names, options out of range, a classifier that cannot be explained.
    """

    def __init__(
        self,
        classifier: Any = "bundled/tiny_clip_vision",
        method: Method | None = None,
        head_epochs: int = 0,
        surrogate_epochs: int = 20,
        head_lr: float = 1e-2,
        surrogate_lr: float = 1e-3,
        lr: float = 1e-3,
        weight_decay: float = 1e-2,
        min_agreement: float = 0.0,
        max_length: int = 64,
        test_inputs: int | None = 200,
        baselines: list[str] | None = None,
        backbone_args: dict[str, Any] | None = None,
        weights: str | None = None,
        pretrained: bool = True,
        tokenizer: Any = None,
    ) -> None:
        super().__init__(lr, weight_decay, 0.0, 0.0)
        self.require_non_negative(
            head_lr=head_lr, surrogate_lr=surrogate_lr, head_epochs=head_epochs, min_agreement=min_agreement
        )
        if min_agreement > 1:
            raise PetlError(f"Explanation(min_agreement={min_agreement}): it is a share, 1 at most.")
        if test_inputs is not None and test_inputs < 1:
            raise PetlError(f"Explanation(test_inputs={test_inputs}): 1 or more, or null for all.")
        method = method or AutoGnothi()
        if not isinstance(method, AutoGnothi):
            raise PetlError(f"petl.Explanation trains petl.AutoGnothi, not {type(method).__name__}.")
        if surrogate_epochs < 1:
            raise PetlError(f"Explanation(surrogate_epochs={surrogate_epochs}): 1 or more, the explainer needs it.")
        names = [*ATTRIBUTIONS] if baselines is None else [*dict.fromkeys(["autognothi", *baselines])]
        for name in names:
            if name not in ATTRIBUTIONS:
                raise PetlError(f"Explanation(baselines): {name!r}: {nearest(name, ATTRIBUTIONS)}")
        self.method, self.attributions, self.test_inputs = method, names, test_inputs
        self.epochs = {"head": head_epochs, "surrogate": surrogate_epochs}
        self.lrs = {"head": head_lr, "surrogate": surrogate_lr, "explainer": lr}
        self.min_agreement, self.pretrained = min_agreement, pretrained
        self.source = ClassifierSource(
            classifier, dict(backbone_args or {}), weights, pretrained, tokenizer, head_epochs > 0, max_length
        )
        self.labels: list[str] | None = self.source.labels
        self.gate: dict[str, float] = {}  # what the surrogate was worth when the explainer started
        self._games: dict[int, Game] | None = None
        self.means = nn.ModuleDict()

    @property
    def preprocessing(self) -> dict[str, Any]:
        """What an image classifier expects: input_size (3, H, W), mean, std, interpolation. Read by data modules."""
        view = self.source.view
        if not isinstance(view, BackboneView):
            raise PetlError("this classifier reads text, and this data has images: use petl.data.Sentences.")
        return view.preprocessing

    def setup(self, stage: str) -> None:
        if not hasattr(self, "model"):
            with torch.random.fork_rng(devices=[]):  # the same side networks whatever was drawn before
                torch.manual_seed(self.seed)
                built = self.source.explained(self.method, self.data)
            self.model: ExplainedClassifier = built
            self.labels = self.source.labels
        if stage == "fit":
            self._check_plan()
            for parameter in self.tensors("head"):  # now: DDP synchronises what requires a gradient before training
                parameter.requires_grad_(True)

    def _check_plan(self) -> None:
        head, surrogate, trainer = *self.epochs.values(), self.trainer
        if "val" not in getattr(self.data, "splits", {"val": ()}):
            raise PetlError("the surrogate is judged on validation data before the explainer starts: add a val split.")
        if trainer.max_steps > 0:
            raise PetlError("stages are whole epochs: trainer.max_epochs ends them, not trainer.max_steps.")
        if (trainer.max_epochs or 0) <= head + surrogate:
            raise PetlError(
                f"trainer.max_epochs={trainer.max_epochs} leaves no epoch for the explainer after {head} of the head "
                f"and {surrogate} of the surrogate."
            )
        if any(getattr(callback, "select", "") == "best" for callback in getattr(trainer, "callbacks", ())):
            raise PetlError("select: best is for a classifier's val/acc; an explainer is that of the last epoch.")

    # ---- stages

    def stage(self) -> str:
        """The stage of the current epoch of a training, the last one outside of it."""
        head, surrogate = self.epochs.values()
        epoch = self.current_epoch if self.trainer.state.fn == "fit" else head + surrogate
        return "head" if epoch < head else "surrogate" if epoch < head + surrogate else "explainer"

    def tensors(self, stage: str) -> list[nn.Parameter]:
        """What a stage trains."""
        if stage != "head":
            return list(getattr(self.model.petl, stage).parameters())
        return list(cast(Any, self.model.classifier).head.parameters()) if self.epochs["head"] else []

    def configure_optimizers(self) -> OptimizerLRScheduler:
        per_epoch, epochs = self._total_steps() / max(1, self.trainer.max_epochs or 1), dict(self.epochs)
        epochs["explainer"] = max(1, (self.trainer.max_epochs or 1) - sum(epochs.values()))
        groups, factors, first = [], [], 0.0
        for stage in STAGES:
            length = epochs[stage] * per_epoch
            if tensors := self.tensors(stage):
                groups.append({"params": tensors, "lr": self.lrs[stage]})
                factors.append(_schedule(round(first), max(1, round(length))))
            first += length
        optimizer = torch.optim.AdamW(groups, lr=self.lr, weight_decay=self.weight_decay)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factors)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_train_epoch_start(self) -> None:
        if self.stage() == "explainer" and not self.gate:
            self._judge_surrogate()
            self.model.petl.start_explainer()

    def _judge_surrogate(self) -> None:
        """Measure the surrogate on the validation data, say so, and stop where it is too bad to be explained."""
        rows = []
        for batch in self.data.evaluation_loader("val", whole=True):
            rows.append(torch.stack(self._surrogate_errors(self.inputs(batch), batch["index"])))
        kl, agreement = torch.cat(rows, 1).mean(1).tolist()
        self.gate = {"kl": kl, "agreement": agreement, "inputs": sum(r.shape[1] for r in rows)}
        rank_zero_print(
            f"surrogate: KL {kl:.4f} on masked inputs, agrees with the classifier on {100 * agreement:.1f} % of "
            f"{self.gate['inputs']} full inputs (validation)"
        )
        if self.trainer.is_global_zero:
            folder = Path(self.trainer.default_root_dir)
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "surrogate.json").write_text(json.dumps(self.gate, indent=2) + "\n")
        if agreement < self.min_agreement:
            raise PetlError(
                f"the surrogate agrees with the classifier on {100 * agreement:.1f} % of the validation inputs, "
                f"min_agreement asks for {100 * self.min_agreement:.1f} %: Shapley values of it would explain another "
                "model. Give it more surrogate_epochs, another surrogate_lr or a smaller reduction."
            )
        self.model.measure_null(self.inputs(batch))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["surrogate_gate"] = self.gate

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self.gate = dict(checkpoint["surrogate_gate"])

    # ---- steps

    def inputs(self, batch: dict[str, Any]) -> Inputs:
        """What the classifier takes of a batch, on its device: images, or tokens of texts."""
        return self.source.inputs(batch, self.device, self.data)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        x, stage = self.inputs(batch), self.stage()
        if stage == "head":
            loss = F.cross_entropy(self.model.logits(x).float(), batch["label"])
        elif stage == "surrogate":
            self.model.petl.knows_null = False
            loss = self._kl(x, uniform_size_masks(self.model.players(x).counts)).mean()
        else:
            loss = self._explainer_loss(x, batch)
        self.log("train/loss", loss, prog_bar=True, batch_size=len(batch["index"]))
        if self.trainer.world_size > 1:  # all tensors take part, so that DDP need not search for those that do not
            loss = loss + 0.0 * sum(p.sum() for s in STAGES if s != stage for p in self.tensors(s))
        return loss

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        for stage in STAGES:
            if stage != self.stage():
                for parameter in self.tensors(stage):
                    parameter.grad = None  # no step, whatever weight decay and moments would do

    def _kl(self, x: Inputs, coalition: Tensor) -> Tensor:
        return divergence(self.model.logits(x).detach(), self.model.surrogate_logits(x, coalition), self.method.link)

    @torch.no_grad()
    def _surrogate_errors(self, x: Inputs, indices: Tensor) -> tuple[Tensor, Tensor]:
        """KL on one coalition per input, the same at every call, and agreement on the full input, (B,) each."""
        players, predicted = self.model.players(x), self.model.logits(x)
        full = self.model.surrogate_logits(x, players.valid)
        if self.method.link == "softmax":
            same = full.argmax(-1) == predicted.argmax(-1)
        else:
            same = ((full > 0) == (predicted > 0)).all(-1)
        masked = self.model.surrogate_logits(x, _fixed_masks(players, indices, uniform_size_masks))
        return divergence(predicted, masked, self.method.link), same.float()

    def _explainer_loss(self, x: Inputs, batch: dict[str, Any]) -> Tensor:
        games = self._tabulated()
        if games is not None:
            game = Game.stack([games[i] for i in batch["index"].tolist()], self.device)
            found = self.model.explain(x, game.null, game.grand)
            return expected_loss(found.values, game.exact, game.residual)
        players = self.model.players(x)
        draw = kernel_masks if self.method.sampler == "kernel" else threshold_masks
        return self._sampled_loss(x, draw(players.counts, self.method.subsets, players=players.most))

    def _sampled_loss(self, x: Inputs, masks: Tensor) -> Tensor:
        found = self.model.explain(x)
        values = self.model.values(x, masks, found.players)
        return shapley_loss(found.values, masks, values, found.null, found.players.counts)

    def _tabulated(self) -> dict[int, Game] | None:
        """The exact game of every training input by index, where that is cheaper than drawing coalitions; or None."""
        if self._games is None:
            self._games = {}
            batches = self.data.evaluation_loader("train", whole=True)
            first = self.inputs(next(iter(batches)))
            n, epochs = self.model.players(first).most, (self.trainer.max_epochs or 0) - sum(self.epochs.values())
            plain = getattr(self.data, "augmentation", "") == "none" and not isinstance(first, dict)
            if plain and n <= TABLE and 2**n <= self.method.subsets * epochs and self.method.sampler == "kernel":
                rank_zero_print(f"the game of every training input is computed once: {2**n} coalitions of {n} players")
                for batch in batches:
                    games = tabulate(self.model, self.inputs(batch))
                    self._games |= dict(zip(batch["index"].tolist(), games, strict=True))
        return self._games or None

    # ---- validation and test

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        x, stage = self.inputs(batch), self.stage()
        if self.epochs["head"]:  # in later stages too: what a run records must not depend on where it was resumed
            self._mean("val/acc", (self.model.logits(x).argmax(-1) == batch["label"]).float())
        if stage != "head":
            kl, agrees = self._surrogate_errors(x, batch["index"])
            self._mean("val/kl", kl)
            self._mean("val/agreement", agrees)
        if stage == "explainer":
            players = self.model.players(x)
            masks = _fixed_masks(players, batch["index"], lambda n, g: kernel_masks(n, self.method.subsets, g))
            self._mean("val/loss", self._sampled_loss(x, masks).expand(len(players.counts)))

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        wanted = self.test_inputs or 10**12
        step = max(1, len(self.data.splits[self.data.test_split]) // wanted)  # from every class: files lie by class
        chosen = (batch["index"] % step == 0) & (batch["index"] // step < wanted)
        if not bool(chosen.any()):
            return
        x = self.inputs({k: [t for t, c in zip(v, chosen) if c] if isinstance(v, list) else v[chosen]
                         for k, v in batch.items()})  # fmt: skip
        found = evaluate(self.model, x, self.attributions, torch.Generator().manual_seed(int(batch["index"][0])))
        for name, numbers in found.items():
            for metric, values in numbers.items():
                self._mean(f"test/{name}/{metric}", values[~values.isnan()])

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, list[Any]]:
        """Predicted class of each input, its probability, and the values of the players for it."""
        found, names = self.model.explain(self.inputs(batch)), self.labels or []
        best = self.model.link(found.logits).max(-1)
        chosen = best.indices.tolist()
        return {
            "index": batch["index"].tolist(),
            "prediction": chosen,
            "label": [names[c] for c in chosen],
            "probability": [f"{p:.6f}" for p in best.values.tolist()],
            "values": [
                " ".join(f"{v:.6f}" for v in values[:n, c].tolist())
                for values, n, c in zip(found.values, found.players.counts.tolist(), chosen, strict=True)
            ],
        }

    def on_test_epoch_end(self) -> None:
        for name in SHAPLEY:
            parts = [f"test_{name}_squared_{part}" for part in ("error", "truth")]
            if all(p in self.means for p in parts):
                error, truth = (cast(MeanMetric, self.means[p]).compute() for p in parts)
                self.log(f"test/{name}/relative_l2", (error / truth).sqrt(), sync_dist=False)

    def _mean(self, name: str, values: Tensor) -> None:
        """Log the mean over all inputs of all processes."""
        key = name.replace("/", "_").replace(" ", "_")
        if key not in self.means:
            self.means[key] = MeanMetric().to(self.device)
        metric = cast(MeanMetric, self.means[key])
        metric.update(values)
        shown = name in ("val/acc", "val/agreement")
        self.log(name, metric, on_step=False, on_epoch=True, prog_bar=shown, metric_attribute=f"means.{key}")

    # ---- record and adapter

    def protocol(self) -> dict[str, Any]:
        return super().protocol() | {
            "schedule": f"per stage: linear warm-up over {100 * WARMUP:g} % of its steps, cosine to 0",
            "stages": dict(self.epochs),
            "learning_rates": dict(self.lrs),
            "surrogate": dict(self.gate),
            "max_length": self.source.max_length,
            "pretrained": self.pretrained,
        }

    def save_adapter(self, directory: str | Path, protocol: dict[str, Any] | None = None) -> Path:
        """Write the adapter of the model as it is now (see `petl.save`); ``protocol``: how it came about."""
        return save(
            self.model,
            directory,
            **self.source.record(),
            labels=self.labels,
            preprocessing=getattr(self.data, "preprocessing", None) or None,
            protocol=protocol,
        )

    def check_adapter(self, directory: Path, config: dict[str, Any]) -> None:
        """Raise `PetlError` where the adapter of ``config`` explains another classifier."""
        self.source.check(directory, self.model, config)


def divergence(target: Tensor, found: Tensor, link: str) -> Tensor:
    """KL(f || g) of logits (B, C) of f and g: of the softmaxes, or summed over labels of two outcomes each; (B,)."""
    target, found = target.float(), found.float()
    if link == "softmax":
        return F.kl_div(found.log_softmax(-1), target.log_softmax(-1), reduction="none", log_target=True).sum(-1)
    p = target.sigmoid()
    cross, entropy = (F.binary_cross_entropy_with_logits(x, p, reduction="none") for x in (found, target))
    return (cross - entropy).sum(-1)


def _schedule(first: int, length: int) -> Callable[[int], float]:
    """Factor on the learning rate of a stage of ``length`` steps that starts at step ``first``; 0 outside of it."""
    warmup = int(WARMUP * length)

    def factor(step: int) -> float:
        local = step - first
        if not 0 <= local < length:
            return 0.0
        if local < warmup:
            return (local + 1) / (warmup + 1)
        return 0.5 * (1 + math.cos(math.pi * (local - warmup) / max(1, length - warmup)))

    return factor


def _fixed_masks(players: Players, indices: Tensor, draw: Callable[[Tensor, torch.Generator], Tensor]) -> Tensor:
    """Coalitions that depend on an input's index and its number of players alone, for all inputs of a batch."""
    drawn = [draw(n[None], torch.Generator().manual_seed(i)) for n, i in zip(players.counts.cpu(), indices.tolist())]
    return torch.cat([F.pad(masks, (0, players.most - masks.shape[-1])) for masks in drawn]).to(players.of.device)
