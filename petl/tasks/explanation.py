"""AutoGnothi's training: a surrogate for the classifier on coalitions, then an explainer of the surrogate's game.

One run has stages of whole epochs: the classifier's head (only where there is no trained classifier yet), the
surrogate, the explainer. Each trains its own tensors with its own schedule; the others get no gradient and no step.
Inputs that stay the same pass the classifier once (`petl.TapCache`), and their games are played once (`game`).
"""

from __future__ import annotations

import json
from functools import partial
from math import prod
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import MeanMetric

from petl.adapters.artefact import save
from petl.backbones.base import BackboneView
from petl.errors import PetlError, nearest
from petl.methods.autognothi import AutoGnothi
from petl.methods.base import Method
from petl.models.attributions import ATTRIBUTIONS, SHAPLEY
from petl.models.explained import ExplainedClassifier, Inputs, ShapleyExplanation
from petl.models.explanation_metrics import evaluate
from petl.models.frozen_explained import BLOCKS, OUTPUTS, FrozenExplained
from petl.models.games import LAWS, Bank, Game, Play, WholeGame, surrogate_errors, surrogate_loss, trial
from petl.nn.shapley import shapley_loss, uniform_size_masks
from petl.tasks.source import ClassifierSource, rank_zero_print
from petl.tasks.stages import WARMUP, StagedTask

TABLE = 12  # players up to which the game of every training input may be tabulated


class Explanation(StagedTask):
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
        checkpointing: recompute the side blocks in the backward pass: a third of the memory, a sixth more time.
        bank: coalitions per training input whose values are computed once (see `petl.models.games.Bank`): each step
            draws method.subsets of these; None = new ones at each step. With up to 12 players, all coalitions are
            computed once where they are no more than the bank, or than a training without a bank would draw.
        test_inputs: test inputs that `petl test` compares explanations on; None = all.
        baselines: explanations that `petl test` compares with; None = all of `petl.models.attributions.ATTRIBUTIONS`.
        backbone_args: constructor arguments for a timm model, e.g. {img_size: 32, patch_size: 4, num_classes: 10}.
        weights: a local .safetensors file with the classifier's weights.
        pretrained: false = random weights (tests).
        tokenizer: of a text classifier that is passed in as a model.

    Raises:
        PetlError: unknown names, options out of range, a classifier that cannot be explained.
    """

    stages = ("head", "surrogate", "explainer")

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
        checkpointing: bool = True,
        bank: int | None = None,
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
        if bank is not None and (bank % 2 or bank < method.subsets):
            raise PetlError(
                f"Explanation(bank={bank}): an even number of coalitions, no less than the {method.subsets} that a "
                "step draws of them."
            )
        if surrogate_epochs < 1:
            raise PetlError(f"Explanation(surrogate_epochs={surrogate_epochs}): 1 or more, the explainer needs it.")
        names = [*ATTRIBUTIONS] if baselines is None else [*dict.fromkeys(["autognothi", *baselines])]
        for name in names:
            if name not in ATTRIBUTIONS:
                raise PetlError(f"Explanation(baselines): {name!r}: {nearest(name, ATTRIBUTIONS)}")
        self.method, self.attributions, self.test_inputs, self.bank = method, names, test_inputs, bank
        self.epochs = {"head": head_epochs, "surrogate": surrogate_epochs}
        self.lrs = {"head": head_lr, "surrogate": surrogate_lr, "explainer": lr}
        self.min_agreement, self.pretrained, self.checkpointing = min_agreement, pretrained, checkpointing
        self.source = ClassifierSource(
            classifier, dict(backbone_args or {}), weights, pretrained, tokenizer, head_epochs > 0, max_length
        )
        self.labels: list[str] | None = self.source.labels
        self.gate: dict[str, float] = {}  # what the surrogate was worth when the explainer started
        self._kept: dict[str, Any] = {}  # by split: what `_once` computed of it
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
            built.checkpointing = self.checkpointing
            self.model: ExplainedClassifier = built
            self.labels = self.source.labels
            self._frozen = FrozenExplained(built, self.source.trains_head)
        if stage == "fit":
            self._check_plan()
            self._kept = {}
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
        if self.bank and (reason := self.data.varies("train")):
            raise PetlError(f"bank={self.bank}: values are kept of inputs that stay the same, but {reason}.")

    # ---- stages

    def tensors(self, stage: str) -> list[nn.Parameter]:
        """What a stage trains."""
        if stage != "head":
            return list(getattr(self.model.petl, stage).parameters())
        return list(cast(Any, self.model.classifier).head.parameters()) if self.epochs["head"] else []

    def frozen_part(self) -> FrozenExplained:
        return self._frozen

    def on_fit_start(self) -> None:
        """Tell the data what each stage needs of an input that was recorded."""
        pictures, blocks = frozenset({"image", OUTPUTS}), frozenset({OUTPUTS, BLOCKS})
        explainer = blocks if self.game() else blocks | pictures
        starts = 0, self.epochs["head"], sum(self.epochs.values())
        train = tuple(zip(starts, (frozenset({OUTPUTS}), pictures, explainer), strict=True))
        self.data.needs = {"train": train, "val": ((0, blocks | pictures),)}

    def on_train_epoch_start(self) -> None:
        if self.stage() == "explainer" and not self.gate:
            self._judge_surrogate()
            self.model.petl.start_explainer()

    def _judge_surrogate(self) -> None:
        """Measure the surrogate on the validation data, say so, and stop where it is too bad to be explained."""
        rows = []
        for batch in self.data.evaluation_loader("val", whole=True):
            rows.append(torch.stack(self._surrogate_errors(batch)))
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

    def logits(self, batch: dict[str, Any]) -> Tensor:
        """(B, C) of the classifier."""
        found = self._frozen.logits(batch)
        return self.model.logits(self.inputs(batch)) if found is None else found

    def explain(
        self, batch: dict[str, Any], null: Tensor | None = None, grand: Tensor | None = None
    ) -> ShapleyExplanation:
        """Of a batch, see `ExplainedClassifier.explain`."""
        found = self._frozen.recorded(batch, self.data.preprocessing.get("image_size", ()))
        return self.model.explain(self.inputs(batch) if found is None else found, null, grand)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        stage = self.stage()
        if stage == "head":
            loss = F.cross_entropy(self.logits(batch).float(), batch["label"])
        elif stage == "surrogate":
            self.model.petl.knows_null = False
            x = self.inputs(batch)
            masks = uniform_size_masks(self.model.players(x).counts)
            loss = surrogate_loss(self.model, x, self.logits(batch), masks).mean()
        else:
            loss = self._explainer_loss(batch)
        self.log("train/loss", loss, prog_bar=True, batch_size=len(batch["index"]))
        return self.with_all(loss)

    def _surrogate_errors(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        return surrogate_errors(self.model, self.inputs(batch), self.logits(batch), batch["index"])

    def _explainer_loss(self, batch: dict[str, Any]) -> Tensor:
        game = self.game()
        if game is None:
            x = self.inputs(batch)
            players = self.model.players(x)
            masks = LAWS[self.method.sampler](players.counts, self.method.subsets, players=players.most)
            return self._sampled_loss(batch, masks, self.model.values(x, masks, players))
        if "train" not in self._kept:
            rank_zero_print(f"the game of every training input is computed once: {game}")
        kept = self._once("train", game.key(), game.play, batch)
        return game.loss(self.explain(batch, kept["null"], kept["grand"]), kept)

    def _sampled_loss(self, batch: dict[str, Any], masks: Tensor, values: Tensor) -> Tensor:
        found = self.explain(batch)
        most = found.players.most
        return shapley_loss(found.values, masks[..., :most], values, found.null, found.players.counts)

    # ---- what the trained surrogate says of inputs that stay the same

    def game(self) -> Game | None:
        """What is kept of the game of every training input; None where coalitions are drawn at each step."""
        if self.data.varies("train"):
            return None
        method, view, longest = self.method, self.model.view, self.source.max_length
        draws = method.subsets * ((self.trainer.max_epochs or 0) - sum(self.epochs.values()))
        if isinstance(view, BackboneView):
            longest = prod(method.players or view.grid((3, *self.data.preprocessing["image_size"])))
            if longest <= TABLE and 2**longest <= (self.bank or draws) and method.sampler == "kernel":
                return WholeGame(longest)
        return Bank(self.bank, method.subsets, method.sampler, longest) if self.bank else None

    def _once(self, split: str, key: dict[str, Any], play: Play, batch: dict[str, Any]) -> dict[str, Tensor]:
        """What ``play`` makes of a batch, as a rule from what it once made of the whole split."""
        if split not in self._kept:
            about = {**self._frozen.surrogate_key(), **key, "precision": str(self.trainer.precision)}
            about |= {"preprocessing": self.data.preprocessing, "max_length": self.source.max_length}
            call = partial(self._play, play)
            self._kept[split] = self.data.once(split, about, call, anyway=split == "train")
        kept, missing = self._kept[split].read(batch["index"].tolist())
        return self._play(play, batch) if missing else {name: t.to(self.device) for name, t in kept.items()}

    def _play(self, play: Play, batch: dict[str, Any]) -> dict[str, Tensor]:
        return play(self.model, self.inputs(batch), batch["index"])

    def _trial(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """What the explainer's validation goes by: errors of the surrogate, and v(S) of coalitions."""
        trainer, play = self.trainer, partial(trial, width=self.source.max_length)
        keeps = self.data.place[1] is not None and not self.data.varies("val")  # a cache that is not off
        if keeps and trainer.state.fn == "fit" and trainer.limit_val_batches == 1.0:
            return self._once("val", {"trial": self.method.subsets}, play, batch)
        return self._play(play, batch)

    # ---- validation and test

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        stage, kept = self.stage(), None
        if self.epochs["head"]:  # in later stages too: what a run records must not depend on where it was resumed
            self._mean("val/acc", (self.logits(batch).argmax(-1) == batch["label"]).float())
        if stage == "head":
            return
        if stage == "surrogate":
            kl, agrees = self._surrogate_errors(batch)
        else:
            kept = self._trial(batch)
            kl, agrees = kept["kl"], kept["agrees"]
        self._mean("val/kl", kl)
        self._mean("val/agreement", agrees)
        if kept:
            loss = self._sampled_loss(batch, kept["masks"], kept["values"])
            self._mean("val/loss", loss.expand(len(batch["index"])))

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
            "bank": self.bank,
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
