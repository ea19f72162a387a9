"""Many trainings of image classifiers from one pass of a frozen backbone: one member for each setting or task."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy

from petl.adapters.artefact import save
from petl.backbones import load_backbone
from petl.backbones.classifier import Classifier
from petl.errors import PetlError
from petl.methods.attach import attached, fit, mount, remove
from petl.methods.base import Method, MethodModule, TowerModule
from petl.methods.ladder import LadderSideTuning
from petl.methods.side_by_side import SideBySide, SideModules
from petl.models.frozen import FrozenFeatures
from petl.nn.head import Head
from petl.tasks.base import Factor, FrozenTask, cosine
from petl.tasks.classification import AVERAGES
from petl.tasks.side_members import NUMBERS, Labels, Member, read_members


class SideSweep(FrozenTask):
    """Train methods beside one frozen backbone together, each as if it were alone.

    Every member has a method, a head, settings of AdamW, a seed, and perhaps labels of its own for the same images.
    They share the images, their order, and one pass of the backbone (or its recorded activations), and nothing else:
    in fp32 on a CPU each ends with the tensors, bit for bit, that `petl.Classification` with its settings and seed
    ends with on the same order of images. Gradients are clipped for each member apart; only where precision 16-mixed
    skips a step, it skips that of all.

    Args:
        members: settings by name: any of ``method`` (a registry name, in Python also a method), ``options`` of it,
            ``head``, ``lr``, ``weight_decay``, ``warmup_epochs``, ``min_lr``, ``label_smoothing``, ``seed`` (default:
            that of the run) and ``labels`` (a JSON object or a CSV file, sample name -> label). What a member leaves
            out is as given below. Without ``method``, ``options`` change those of the method below.
        backbone: a name (see `petl.list_backbones`); in Python also the model itself.
        method: of members that name none: petl.LadderSideTuning or petl.LinearProbe; None = the former.
        head: "linear", or "bn_linear" (BatchNorm without affine part before the linear layer).
        lr: peak learning rate of AdamW.
        weight_decay: decoupled weight decay, on all trained tensors.
        warmup_epochs: epochs of linear warm-up (may be a fraction).
        min_lr: learning rate at the end of the cosine.
        label_smoothing: share of the target spread over all classes.
        checkpointing: recompute side blocks in the backward pass instead of keeping what they computed.
        frozen_dtype: of the frozen weights: "bfloat16", "float32", or "auto", as in `petl.Classification`.
        compile: torch.compile each block with what all members compute beside it (minutes before the first step).
        backbone_args: constructor arguments for a timm model, e.g. {img_size: 32, patch_size: 4}, and norm_eps.
        weights: a local .safetensors file with the backbone's weights, instead of the published ones.
        pretrained: false = random weights (baselines and tests).

    Raises:
        PetlError: unknown names, options out of range, or a method that changes the backbone's blocks.
    """

    def __init__(
        self,
        members: dict[str, dict[str, Any] | None],
        backbone: Any = "bundled/tiny_clip_vision",
        method: Method | None = None,
        head: str = "linear",
        lr: float = 1e-3,
        weight_decay: float = 1e-4,
        warmup_epochs: float = 0.0,
        min_lr: float = 0.0,
        label_smoothing: float = 0.0,
        checkpointing: bool = False,
        frozen_dtype: str = "auto",
        compile: bool = False,
        backbone_args: dict[str, Any] | None = None,
        weights: str | None = None,
        pretrained: bool = True,
    ) -> None:
        super().__init__(lr, weight_decay, warmup_epochs, min_lr, frozen_dtype, compile)
        default = Member(method or LadderSideTuning(), head, lr, weight_decay, warmup_epochs, min_lr, label_smoothing)
        self.members = read_members(members, default)
        self.label_files = {n: Labels.read(m.labels) for n, m in self.members.items() if m.labels}
        self.backbone_name = backbone if isinstance(backbone, str) else None
        self.backbone_args, self.weights, self.pretrained = dict(backbone_args or {}), weights, pretrained
        self.backbone = self._load() if isinstance(backbone, str) else backbone
        modules = self._build()
        for module in modules:
            module.checkpointing = checkpointing
        methods = SideBySide(tuple(m.method for m in self.members.values()))
        mount(SideModules(methods, modules[0].view, modules))
        self._frozen = FrozenFeatures(self.backbone)

    def _load(self) -> nn.Module:
        return load_backbone(str(self.backbone_name), self.backbone_args, self.weights, self.pretrained)

    def _build(self) -> list[MethodModule]:
        """Each module with the numbers that a run of its own would draw, behind those that loading a backbone draws."""
        states: dict[int | None, Tensor] = {None: torch.get_rng_state()}
        modules = []
        for name, member in self.members.items():
            with torch.random.fork_rng(devices=[]):
                if member.seed not in states:
                    torch.manual_seed(member.seed or 0)
                    if self.backbone_name:
                        self._load()
                    states[member.seed] = torch.get_rng_state()
                torch.set_rng_state(states[member.seed])
                try:
                    modules.append(fit(self.backbone, member.method))
                except PetlError as error:
                    raise PetlError(f"member {name!r}: {error}") from error
        return modules

    @property
    def preprocessing(self) -> dict[str, Any]:
        """What the backbone's weights expect; read by data modules."""
        return self.side.view.preprocessing

    @property
    def side(self) -> SideModules:
        return cast(SideModules, self._frozen.module)

    def towers(self) -> tuple[TowerModule, ...]:
        return (self.side,)

    def frozen_part(self) -> FrozenFeatures:
        return self._frozen

    def setup(self, stage: str) -> None:
        if hasattr(self, "model"):
            return
        if not getattr(self.data, "num_classes", None):
            raise PetlError("a sweep needs a petl data module for classification, which knows its classes.")
        self.classes = {
            n: self.label_files[n].classes if n in self.label_files else list(self.data.labels) for n in self.members
        }
        heads = nn.ModuleList()
        for name, member in self.members.items():
            with torch.random.fork_rng(devices=[]):  # the head that a run of its own has
                torch.manual_seed(self._seed_of(member))
                heads.append(Head(member.head, self.side.view.width, len(self.classes[name])))
        self.model: _Classifiers = _Classifiers(self.backbone, heads)
        self.metrics = nn.ModuleList(nn.ModuleDict(_metrics(len(c))) for c in self.classes.values())
        for i, name in enumerate(self.members):
            for split, data in self.data.splits.items() if name in self.label_files else ():
                indices = self.label_files[name].indices([s.name for s in data.samples], split)
                self.register_buffer(f"labels_{split}_{i}", indices, persistent=False)

    def _seed_of(self, member: Member) -> int:
        return self.seed if member.seed is None else member.seed

    # ---- steps

    def logits(self, batch: dict[str, Any]) -> list[Tensor]:
        """(B, K) of each member, for the images of a batch or for what was recorded of them."""
        if "taps" not in batch:
            return self.model(batch["image"])
        return self.model.classify(self._frozen.features(self._frozen.complete(batch)))

    def _targets(self, batch: dict[str, Any], split: str) -> list[Tensor]:
        """Classes (B,) of each member."""
        found = []
        for i in range(len(self.members)):
            own = getattr(self, f"labels_{split}_{i}", None)
            found.append(batch["label"] if own is None else own[batch["index"]])
        return found

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        losses = []
        for (name, member), logits, target in zip(
            self.members.items(), self.logits(batch), self._targets(batch, "train"), strict=True
        ):
            losses.append(F.cross_entropy(logits.float(), target, label_smoothing=member.label_smoothing))
            self.log(f"train/{name}/loss", losses[-1], batch_size=len(target))
        total = torch.stack(losses).sum()  # every member gets the gradient of its own loss
        self.log("train/loss", total.detach() / len(losses), prog_bar=True, batch_size=len(batch["index"]))
        return self.regularised(total)

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self._evaluate(batch, "val", "val")

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self._evaluate(batch, "test", self.data.test_split)

    def _evaluate(self, batch: dict[str, Any], stage: str, split: str) -> None:
        for name, found, logits, target in zip(
            self.members, self.metrics, self.logits(batch), self._targets(batch, split), strict=True
        ):
            values = {"loss": (F.cross_entropy(logits.float(), target, reduction="none"),)}
            for key, metric in cast(Any, found)[stage].items():
                metric.update(*values.get(key, (logits.float(), target)))
                self.log(f"{stage}/{name}/{key}", metric, on_step=False, on_epoch=True)

    # ---- optimisation: one group and one schedule for each member

    def parameter_groups(self) -> list[dict[str, Any]]:
        return [
            {"params": [*module.parameters(), *head.parameters()], "lr": m.lr, "weight_decay": m.weight_decay}
            for m, module, head in zip(self.members.values(), self.side.each(), self.model.heads, strict=True)
        ]

    def factors(self, total: int) -> list[Factor]:
        return [self._factor(member, total) for member in self.members.values()]

    def _factor(self, member: Member, total: int) -> Factor:
        warmup = self.warmup_steps(member.warmup_epochs, total)
        low = member.min_lr / member.lr if member.lr else 0.0
        return lambda step: (step + 1) / (warmup + 1) if step < warmup else cosine(low, step, warmup, total)

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: int | float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        for group in optimizer.param_groups:
            alone: Any = SimpleNamespace(param_groups=[group])
            self.clip_gradients(alone, gradient_clip_val, gradient_clip_algorithm)

    # ---- what becomes of it

    @contextmanager
    def alone(self, name: str) -> Iterator[Classifier]:
        """A member as the classifier it would be by itself, on the same backbone; the others are off meanwhile."""
        side, index = self.side, list(self.members).index(name)
        remove(self.backbone)
        module = side.each()[index]
        checkpointing = module.checkpointing
        try:
            yield Classifier(mount(module, side.identity), self.model.heads[index])
        finally:
            remove(self.backbone)
            module.checkpointing = checkpointing
            mount(side, side.identity)

    def save_adapter(self, directory: str | Path, protocol: dict[str, Any] | None = None) -> Path:
        """Write the adapters of all members as they are now: for ``…/adapter``, to ``…/MEMBER/adapter``.

        ``protocol``: how they came about (see `petl.save`).
        """
        directory = Path(directory)
        for name in self.members:
            with self.alone(name) as model:
                save(
                    model,
                    directory.parent / name / directory.name,
                    self.backbone_name if self.pretrained else None,
                    backbone_args=self.backbone_args,
                    weights_file=Path(self.weights).name if self.weights else None,
                    labels=self.classes[name],
                    preprocessing=getattr(self.data, "preprocessing", None),
                    protocol=self._protocol_of(name, protocol or {}),
                )
        return directory.parent

    def _protocol_of(self, name: str, protocol: Mapping[str, Any]) -> dict[str, Any]:
        member, found, mark = self.members[name], dict(protocol), f"/{name}/"
        numbers = {key: getattr(member, key) for key in NUMBERS}
        found["training"] = {
            **super().protocol(),
            **numbers,
            "schedule": f"linear warm-up over {member.warmup_epochs:g} epochs, cosine to {member.min_lr:g}, per step",
            "seed": self._seed_of(member),
            "pretrained": self.pretrained,
            "beside": [other for other in self.members if other != name],
        }
        if name in self.label_files:
            found["labels"] = {"file": self.label_files[name].file.name, "sha256": self.label_files[name].digest}
        found["metrics"] = {k.replace(mark, "/"): v for k, v in found.get("metrics", {}).items() if mark in k}
        return found


class _Classifiers(Classifier):
    """A backbone with the modules of several members, and their heads: images (B, 3, H, W) -> logits (B, K) of each."""

    def __init__(self, backbone: nn.Module, heads: nn.ModuleList) -> None:
        super().__init__(backbone, cast(Head, heads))

    @property
    def heads(self) -> list[Head]:
        return list(cast(Any, self.head))

    def forward(self, x: Tensor) -> list[Tensor]:  # type: ignore[override]
        return self.classify(self._view.features(x))

    def classify(self, frozen: Tensor) -> list[Tensor]:
        """Logits of each member, behind the pass that gave the ``frozen`` features (B, C)."""
        features = cast(SideModules, attached(self.backbone)).features(frozen)
        return [head(f) for head, f in zip(self.heads, features, strict=True)]


def _metrics(classes: int) -> dict[str, nn.Module]:
    """By split: loss, and accuracies of this many classes."""
    return {
        split: nn.ModuleDict(
            {"loss": MeanMetric()}
            | {name: MulticlassAccuracy(classes, average=average) for name, average in AVERAGES.items()}
        )
        for split in ("val", "test")
    }
