"""Visual grounding: L1 and GIoU on the box that an expression refers to; Acc@0.5 and mean IoU."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torchmetrics import MeanMetric
from torchvision.ops import box_convert, generalized_box_iou_loss

from petl.adapters.artefact import save
from petl.adapters.rebuild import check_grounding
from petl.backbones import load_backbone, load_text_encoder
from petl.errors import PetlError
from petl.methods.base import Method, TowerModule
from petl.models.frozen import FrozenPair, FrozenText, FrozenTower
from petl.models.grounding import GroundingModel
from petl.nn.boxes import paired_iou
from petl.nn.tokens import tokenize
from petl.tasks.base import Factor, FrozenTask

HIT = 0.5  # a prediction counts when its IoU with the truth reaches this


class Grounding(FrozenTask):
    """Train a method for visual grounding (referring expression comprehension).

    Args:
        vision: image encoder by name, e.g. "hf/facebook/detr-resnet-50"; in Python also the model itself.
        text: text encoder by name, e.g. "hf/google-bert/bert-base-uncased"; in Python also the model itself.
        method: what is trained in the encoders, e.g. petl.M2IST; None = nothing, the vision-language part alone.
        image_size: side of the square input in pixels; None = what the image encoder was trained on (DETR: 640).
        query_length: text tokens, start and end included.
        fusion_dim: width of the vision-language encoder.
        fusion_layers: layers of it.
        fusion_heads: attention heads of it.
        fusion_hidden: inner width of its FFN.
        dropout: dropout inside it.
        norm_first: LayerNorm before attention and FFN; False = after them, as published.
        lr: peak learning rate of the vision-language part.
        method_lr: peak learning rate of the method's tensors, and of the encoders in full fine-tuning.
        weight_decay: decoupled weight decay, on all trained tensors.
        warmup_epochs: epochs of linear warm-up (may be a fraction).
        head_epochs: epochs in which the vision-language part learns alone, before the method does (may be a fraction;
            LP-FT, arXiv 2202.10054: what a head that knows nothing asks of the encoders distorts their features).
        lr_drop: epoch after which learning rates are divided by 10; None = cosine to min_lr.
        min_lr: value of lr at the end of the cosine.
        checkpointing: recompute activations in the backward pass: less memory, more compute.
        frozen_dtype: of the encoders' frozen weights, in which they compute then: "bfloat16"; "float32" = as they were
            loaded; "auto" = bfloat16 on hardware that computes in it. Trained tensors are fp32 in any case.
        compile: torch.compile each block of the encoders (some minutes before the first step).
        vision_args: constructor arguments for a timm model, e.g. {img_size: 384}, and norm_eps.
        vision_weights: a local file with the image encoder's weights: .safetensors, for DETR also a released .pth.
        pretrained: false = random encoders (baselines and tests).
        tokenizer: the text encoder's tokenizer, where ``text`` is a model and not a name.

    Raises:
        PetlError: unknown names, options out of range, a method that does not fit the encoders.
    """

    def __init__(
        self,
        vision: Any = "bundled/tiny_clip_vision",
        text: Any = "bundled/tiny_clip_text",
        method: Method | None = None,
        image_size: int | None = None,
        query_length: int = 20,
        fusion_dim: int = 256,
        fusion_layers: int = 6,
        fusion_heads: int = 8,
        fusion_hidden: int = 2048,
        dropout: float = 0.1,
        norm_first: bool = False,
        lr: float = 1e-4,
        method_lr: float = 1e-5,
        weight_decay: float = 1e-4,
        warmup_epochs: float = 0.0,
        head_epochs: float = 0.0,
        lr_drop: int | None = None,
        min_lr: float = 0.0,
        checkpointing: bool = False,
        frozen_dtype: str = "auto",
        compile: bool = False,
        vision_args: dict[str, Any] | None = None,
        vision_weights: str | None = None,
        pretrained: bool = True,
        tokenizer: Any = None,
    ) -> None:
        super().__init__(lr, weight_decay, warmup_epochs, min_lr, frozen_dtype, compile)
        self.require_non_negative(method_lr=method_lr, head_epochs=head_epochs, lr_drop=lr_drop or 0)
        self.method_lr, self.head_epochs, self.lr_drop, self.pretrained = method_lr, head_epochs, lr_drop, pretrained
        self.names = {"vision": _name(vision), "text": _name(text)}
        self.vision_args, self.vision_weights = dict(vision_args or {}), vision_weights
        if isinstance(vision, str):
            vision = load_backbone(vision, vision_args, vision_weights, pretrained)
        elif vision_weights or vision_args:
            raise PetlError("Grounding(vision=model): vision_args and vision_weights are for an encoder given by name.")
        self.tokenizer = tokenizer
        if isinstance(text, str):
            text, self.tokenizer = load_text_encoder(text, pretrained)
        elif tokenizer is None:
            raise PetlError("Grounding(text=model) needs the model's tokenizer too: Grounding(text=…, tokenizer=…).")
        with torch.random.fork_rng(devices=[]):  # the same head whatever was drawn before
            torch.manual_seed(self.seed)
            self.model: GroundingModel = GroundingModel(
                vision, text, method, image_size, query_length, fusion_dim, fusion_layers, fusion_heads, fusion_hidden,
                dropout, norm_first,
            )  # fmt: skip
        self.model.checkpointing = checkpointing
        vision_view, text_view = self.model.vision_view, self.model.text_view
        self._frozen = FrozenPair(
            FrozenTower("image", self.model.petl.vision, vision_view.encode, ("image", "mask")),
            FrozenText(self.model.petl.text, text_view.encode, self._tokens),
        )
        self.metrics = nn.ModuleDict(
            {f"{s}_{m}": MeanMetric() for s in ("val", "test") for m in ("acc", "iou", "loss")}
        )

    @property
    def method(self) -> Method:
        return self.model.petl.method

    @property
    def preprocessing(self) -> dict[str, Any]:
        """What the image encoder expects: input_size (3, S, S), mean, std, interpolation. Read by data modules."""
        return self.model.vision_view.preprocessing | {"input_size": (3, self.model.image_size, self.model.image_size)}

    def setup(self, stage: str) -> None:
        splits, evaluated = getattr(self.data, "splits", {}), getattr(self.data, "test_split", "test")
        if splits and not hasattr(self.data, "expressions"):
            raise PetlError(f"petl.Grounding needs expressions and boxes, which {self.data.name} does not have.")
        given = (getattr(self.data, "preprocessing", None) or {}).get("image_size", [self.model.image_size] * 2)
        if list(given) != [self.model.image_size] * 2:
            raise PetlError(
                f"the data has images of {given[0]} pixels, the model was built for {self.model.image_size}: set "
                "model.image_size and leave data.image_size out."
            )
        used = [s for s in {"fit": ("train", "val"), "validate": ("val",)}.get(stage, (evaluated,)) if s in splits]
        for message in (*self._cut([p for s in used for p in self.data.expressions(s)]), *self._leaks()):
            rank_zero_warn(message, category=UserWarning)

    def _cut(self, phrases: list[str]) -> list[str]:
        """What is lost of these expressions, in words."""
        if not phrases:
            return []
        ids = self.tokenizer(phrases, truncation=False)["input_ids"]
        length, tokenizer = self.model.head.query_length, self.tokenizer
        special = {
            tokenizer.eos_token_id,
            tokenizer.pad_token_id,
            tokenizer.bos_token_id,
        }  # CLIP's unknown word is its end
        unknown = None if tokenizer.unk_token_id in special else tokenizer.unk_token_id
        cut = sum(len(i) > length for i in ids)
        lost, words = sum(i.count(unknown) for i in ids), sum(map(len, ids)) - 2 * len(ids)
        found = []
        if cut:
            found.append(
                f"{cut} of {len(phrases)} expressions are longer than query_length={length} and lose their end."
            )
        if lost > 0.05 * words:
            found.append(f"{100 * lost / words:.0f} % of the words are not in the text encoder's vocabulary.")
        return found

    @property
    def leak(self) -> str:
        """Whether the image encoder may have been trained on the pictures it is evaluated on."""
        coco = getattr(self.data, "image_source", None) == "coco" and self.model.vision_view.family == "detr"
        if not coco or not (self.pretrained or self.vision_weights):
            return "none known"
        if self.vision_weights:
            return f"unknown: only if {Path(self.vision_weights).name} was trained without the val and test images"
        return f"yes: {self.names['vision'] or 'DETR'} was trained on COCO, val and test images included"

    def _leaks(self) -> list[str]:
        if self.leak == "none known":
            return []
        advice = "Use weights trained without them (vision_weights) for numbers that count."
        return [f"image encoder and data share pictures: {self.leak}. {advice}"]

    # ---- steps

    def frozen_part(self) -> FrozenPair:
        return self._frozen

    def _tokens(self, expressions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Ids and mask (B, L)."""
        ids, mask = tokenize(self.tokenizer, expressions, self.model.head.query_length)
        return ids.to(self.device), mask.to(self.device)

    def boxes(self, batch: dict[str, Any]) -> Tensor:
        """Predicted boxes (B, 4) of a batch, cxcywh in [0, 1] of the canvas."""
        return self.model.locate(*self._encoded(batch))

    def _encoded(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
        """What `GroundingModel.locate` takes."""
        model, frozen, taps = self.model, self._frozen, batch.get("taps", {})
        ids, words = self._tokens(batch["expression"])
        masks, which, first = batch["mask"], None, slice(None)
        if "picture" in batch:  # expressions about one picture follow each other: encode it once
            _, which, counts = batch["picture"].unique_consecutive(return_inverse=True, return_counts=True)
            first = counts.cumsum(0) - counts
            masks = masks[first]
        if "image" in taps:
            visual = frozen.vision.output(batch)[:, model.vision_view.prefix_tokens :]
        else:
            visual = model.encode_images(batch["image"][first], masks)
        text = frozen.text.output(batch) if "text" in taps else model.encode_text(ids, words)
        return visual, masks, text, words, which

    @staticmethod
    def loss(predicted: Tensor, truth: Tensor) -> Tensor:
        """L1 over the four normalised values plus 1 - GIoU, both averaged over boxes, in fp32."""
        with torch.autocast(predicted.device.type, enabled=False):
            predicted, truth = predicted.float(), truth.float()
            corners = (box_convert(b, "cxcywh", "xyxy") for b in (predicted, truth))
            return (predicted - truth).abs().sum(1).mean() + generalized_box_iou_loss(*corners, reduction="mean")

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        with torch.set_grad_enabled(not self.resting()):
            encoded = self._encoded(batch)
        loss = self.loss(self.model.locate(*encoded), batch["box"])
        self.log("train/loss", loss, prog_bar=True, batch_size=len(batch["box"]))
        return self.with_all(loss)

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self._evaluate(batch, "val")

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self._evaluate(batch, "test")

    def _evaluate(self, batch: dict[str, Any], split: str) -> None:
        predicted = self.boxes(batch)
        loss, iou = self.loss(predicted, batch["box"]), paired_iou(predicted, batch["box"])
        # the loss too is a metric: Lightning's own mean over processes divides by a rounded number of samples
        for name, value in (("loss", loss.expand(len(iou))), ("acc", (iou >= HIT).float()), ("iou", iou)):
            metric = cast(MeanMetric, self.metrics[f"{split}_{name}"])
            metric.update(value)
            self.log(f"{split}/{name}", metric, on_step=False, on_epoch=True, prog_bar=name == "acc")

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, list[Any]]:
        """Sample index, expression and predicted box, corners as shares of the picture's width and height."""
        corners = box_convert(self.boxes(batch), "cxcywh", "xyxy").clamp(0, 1)
        rows, columns = batch["mask"].any(2), batch["mask"].any(1)  # where the picture lies on the canvas
        offset = torch.stack([columns.float().argmax(1), rows.float().argmax(1)], 1).repeat(1, 2)
        extent = torch.stack([columns.sum(1), rows.sum(1)], 1).repeat(1, 2)
        shares = ((corners * self.model.image_size - offset) / extent).clamp(0, 1)
        named = dict(zip(("x0", "y0", "x1", "y1"), shares.T.tolist(), strict=True))
        return {"index": batch["index"].tolist(), "expression": list(batch["expression"]), **named}

    # ---- optimisation

    def towers(self) -> tuple[TowerModule, ...]:
        return self.model.petl.vision, self.model.petl.text

    def parameter_groups(self) -> list[dict[str, Any]]:
        return [{"params": list(self.model.head.parameters())}, *self.by_rate(self._adapting(), self.method_lr)]

    def _adapting(self) -> list[nn.Parameter]:
        """What is trained in the encoders."""
        head = {id(p) for p in self.model.head.parameters()}
        return [p for p in self.model.parameters() if p.requires_grad and id(p) not in head]

    def _head_steps(self, total: int) -> int:
        return self.warmup_steps(self.head_epochs, total)

    def resting(self) -> list[nn.Parameter]:
        """What has no step now, since the vision-language part learns alone."""
        return self._adapting() if self.global_step < self._head_steps(self.total_steps) else []

    def factors(self, total: int) -> Factor | list[Factor]:
        common, start = cast(Factor, super().factors(total)), self._head_steps(total)
        if not start:
            return common
        if start >= total:
            raise PetlError(
                f"Grounding(head_epochs={self.head_epochs:g}) with max_epochs={self.trainer.max_epochs}: the method "
                "would never learn. Fewer head_epochs, or more epochs."
            )
        warmup = max(1, self.warmup_steps(self.warmup_epochs, total))

        def late(step: int) -> float:
            return min(1.0, max(0.0, (step - start + 1) / (warmup + 1))) * common(step)

        return [common, *[late] * (len(self.parameter_groups()) - 1)]

    def decay(self, step: int, warmup: int, total: int) -> float:
        if self.lr_drop is None:
            return super().decay(step, warmup, total)
        per_epoch = self.steps_per_epoch() or total / max(1, self.trainer.max_epochs or 1)
        return 1.0 if step < self.lr_drop * per_epoch else 0.1

    def decay_in_words(self) -> str:
        return super().decay_in_words() if self.lr_drop is None else f"divided by 10 after epoch {self.lr_drop}"

    # ---- what becomes of it

    def protocol(self) -> dict[str, Any]:
        return super().protocol() | {
            "method_lr": self.method_lr,
            "head_epochs": self.head_epochs,
            "pretrained": self.pretrained,
            "leak": self.leak,
        }

    def save_adapter(self, directory: str | Path, protocol: dict[str, Any] | None = None) -> Path:
        """Write the adapter of the model as it is now (see `petl.save`); ``protocol``: how it came about."""
        return save(
            self.model,
            directory,
            self.names["vision"] if self.pretrained else None,
            text_backbone=self.names["text"] if self.pretrained else None,
            backbone_args=self.vision_args,
            weights_file=Path(self.vision_weights).name if self.vision_weights else None,
            preprocessing=getattr(self.data, "preprocessing", None),
            protocol=protocol,
        )

    def check_adapter(self, directory: Path, config: dict[str, Any]) -> None:
        """Raise `PetlError` where the adapter of ``config`` does not belong to this model."""
        check_grounding(directory, self.model, config)


def _name(encoder: Any) -> str | None:
    return encoder if isinstance(encoder, str) else None
