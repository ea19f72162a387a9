"""Image classification: cross-entropy on a head over the pooled features of a frozen backbone with a method."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from timm.data import Mixup
from torch import Tensor, nn
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy

from petl.adapters.artefact import save
from petl.adapters.rebuild import check_identity
from petl.backbones import load_backbone
from petl.backbones.classifier import Classifier
from petl.errors import PetlError, nearest
from petl.methods.attach import attach, attached
from petl.methods.base import Method, TowerModule
from petl.models.frozen import FrozenFeatures
from petl.nn.head import HEADS, Head
from petl.tasks.base import FrozenTask

AVERAGES: dict[str, Literal["micro", "macro"]] = {"acc": "micro", "mean_class_acc": "macro"}


class Classification(FrozenTask):
    """Train a method for image classification.

    Args:
        backbone: a name (see `petl.list_backbones`), e.g. "timm/vit_base_patch16_224.orig_in21k"; in Python also the
            model itself.
        method: what is trained, e.g. petl.SparseTuning.
        head: "linear", or "bn_linear" (BatchNorm without affine part before the linear layer).
        lr: peak learning rate of AdamW.
        weight_decay: decoupled weight decay, on all trained tensors.
        warmup_epochs: epochs of linear warm-up (may be a fraction).
        min_lr: learning rate at the end of the cosine.
        label_smoothing: share of the target spread over all classes.
        mixup: Beta parameter of Mixup, 0 = off. Needs an even batch size per device.
        cutmix: Beta parameter of CutMix, 0 = off.
        checkpointing: recompute blocks in the backward pass: less memory, about a third more compute.
        frozen_dtype: of the frozen weights, in which the backbone computes then: "bfloat16"; "float32" = as they were
            loaded; "auto" = bfloat16 on hardware that computes in it. Trained tensors are fp32 in any case.
        compile: torch.compile each block (some minutes before the first step).
        backbone_args: constructor arguments for a timm model, e.g. {img_size: 32, patch_size: 4}, and norm_eps.
        weights: a local .safetensors file with the backbone's weights, instead of the published ones.
        pretrained: false = random weights (baselines and tests).
        num_classes: number of classes; normally taken from the data module.

    Raises:
        PetlError: unknown names, options out of range, a method that does not fit the backbone.
    """

    def __init__(
        self,
        backbone: Any = "bundled/tiny_clip_vision",
        method: Method | None = None,
        head: str = "linear",
        lr: float = 1e-3,
        weight_decay: float = 1e-4,
        warmup_epochs: float = 0.0,
        min_lr: float = 0.0,
        label_smoothing: float = 0.0,
        mixup: float = 0.0,
        cutmix: float = 0.0,
        checkpointing: bool = False,
        frozen_dtype: str = "auto",
        compile: bool = False,
        backbone_args: dict[str, Any] | None = None,
        weights: str | None = None,
        pretrained: bool = True,
        num_classes: int | None = None,
    ) -> None:
        super().__init__(lr, weight_decay, warmup_epochs, min_lr, frozen_dtype, compile)
        self.require_non_negative(mixup=mixup, cutmix=cutmix)
        if head not in HEADS:
            raise PetlError(f"Classification(head={head!r}): {nearest(head, HEADS)}")
        if not 0 <= label_smoothing < 1:
            raise PetlError(f"Classification(label_smoothing={label_smoothing}): it lies in [0, 1).")
        if method is None:
            from petl.methods.sparse_tuning import SparseTuning

            method = SparseTuning()
        self.backbone_name = backbone if isinstance(backbone, str) else None
        self.backbone_args, self.weights, self.pretrained = dict(backbone_args or {}), weights, pretrained
        network = backbone
        if isinstance(network, str):
            network = load_backbone(network, backbone_args, weights, pretrained)
        self.backbone = attach(network, method)
        attached(self.backbone).checkpointing = checkpointing
        self._frozen = FrozenFeatures(self.backbone)
        self.method, self.head_kind, self.num_classes = method, head, num_classes
        self.label_smoothing, self.mixup_alpha, self.cutmix_alpha = label_smoothing, mixup, cutmix
        self.labels: list[str] | None = None

    @property
    def preprocessing(self) -> dict[str, Any]:
        """What the backbone's weights expect: input_size (3, H, W), mean, std, interpolation. Read by data modules."""
        return attached(self.backbone).view.preprocessing

    def towers(self) -> tuple[TowerModule, ...]:
        return (attached(self.backbone),)

    def setup(self, stage: str) -> None:
        if hasattr(self, "model"):
            return
        data = self.data
        classes = getattr(data, "num_classes", None) or self.num_classes
        if not classes:
            raise PetlError("the number of classes is not known: use a petl data module, or pass num_classes.")
        self.labels = list(getattr(data, "labels", None) or map(str, range(classes)))
        with torch.random.fork_rng(devices=[]):  # the same head whatever strategies and callbacks drew before
            torch.manual_seed(self.seed)
            head = Head(self.head_kind, attached(self.backbone).view.width, classes)
        self.model = Classifier(self.backbone, head)
        self.accuracies = nn.ModuleDict(
            {
                f"{split}_{name}": MulticlassAccuracy(classes, average=average)
                for split in ("train", "val", "test")
                for name, average in AVERAGES.items()
                if split != "train" or name == "acc"
            }
        )
        self.losses = nn.ModuleDict({split: MeanMetric() for split in ("val", "test")})
        self.mix = None
        if self.mixup_alpha or self.cutmix_alpha:
            self.mix = Mixup(
                self.mixup_alpha, self.cutmix_alpha, label_smoothing=self.label_smoothing, num_classes=classes
            )

    def frozen_part(self) -> FrozenFeatures:
        return self._frozen

    def varies(self) -> str | None:
        return "Mixup and CutMix mix its pictures at random" if self.mixup_alpha or self.cutmix_alpha else None

    def logits(self, batch: dict[str, Any]) -> Tensor:
        """(B, K) of the images of a batch, or of what was recorded of them."""
        if "taps" not in batch:
            return self.model(batch["image"])
        return cast(Classifier, self.model).head(self._frozen.features(self._frozen.complete(batch)))

    def _accuracy(self, name: str) -> MulticlassAccuracy:
        return cast(MulticlassAccuracy, self.accuracies[name])

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        labels = batch["label"]
        if self.mix is None:
            logits = self.logits(batch)
            loss = F.cross_entropy(logits.float(), labels, label_smoothing=self.label_smoothing)
        else:
            images = batch["image"]
            if len(images) % 2:
                raise PetlError(f"Mixup pairs images and needs an even batch per device; this one has {len(images)}.")
            images, targets = self.mix(images, labels)
            logits = self.model(images)
            loss = F.cross_entropy(logits.float(), targets)
        accuracy = self._accuracy("train_acc")
        accuracy(logits, labels)
        self.log("train/loss", loss, prog_bar=True, batch_size=len(labels))
        self.log("train/acc", accuracy, on_step=False, on_epoch=True, prog_bar=True)
        return self.regularised(loss)

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self._evaluate(batch, "val")

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self._evaluate(batch, "test")

    def _evaluate(self, batch: dict[str, Any], split: str) -> None:
        logits = self.logits(batch).float()
        # a metric, since Lightning's own mean over processes divides by a rounded number of samples
        losses = cast(MeanMetric, self.losses[split])
        losses.update(F.cross_entropy(logits, batch["label"], reduction="none"))
        self.log(f"{split}/loss", losses, on_step=False, on_epoch=True)
        for name in AVERAGES:
            metric = self._accuracy(f"{split}_{name}")
            metric.update(logits, batch["label"])
            self.log(f"{split}/{name}", metric, on_step=False, on_epoch=True, prog_bar=name == "acc")

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, list[Any]]:
        """Sample index, predicted class and its probability for each image of the batch."""
        probabilities = self.model(batch["image"]).float().softmax(-1)
        best = probabilities.max(-1)
        prediction, labels = best.indices.tolist(), self.labels or []
        return {
            "index": batch["index"].tolist(),
            "prediction": prediction,
            "label": [labels[p] for p in prediction],
            "probability": [f"{p:.6f}" for p in best.values.tolist()],
        }

    def protocol(self) -> dict[str, Any]:
        return super().protocol() | {
            "label_smoothing": self.label_smoothing,
            "mixup": self.mixup_alpha,
            "cutmix": self.cutmix_alpha,
            "pretrained": self.pretrained,
        }

    def save_adapter(self, directory: str | Path, protocol: dict[str, Any] | None = None) -> Path:
        """Write the adapter of the model as it is now (see `petl.save`); ``protocol``: how it came about."""
        return save(
            self.model,
            directory,
            self.backbone_name if self.pretrained else None,
            backbone_args=self.backbone_args,
            weights_file=Path(self.weights).name if self.weights else None,
            labels=self.labels,
            preprocessing=getattr(self.data, "preprocessing", None),
            protocol=protocol,
        )

    def check_adapter(self, directory: Path, config: dict[str, Any]) -> None:
        """Raise `PetlError` where the adapter of ``config`` does not belong to this model and these classes."""
        check_identity(directory, attached(self.backbone).identity, config["backbone"])
        if config["labels"] != self.labels:
            raise PetlError(f"{directory} was trained on other classes than this data has.")
