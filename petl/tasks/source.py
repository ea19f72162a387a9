"""Where the classifier of an explanation comes from, and what it takes of a batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_only
from torch import nn

from petl.adapters.artefact import CONFIG, read_config
from petl.adapters.predictor import load
from petl.adapters.rebuild import check_explained, check_identity
from petl.backbones import classifier_view, load_backbone, load_classifier, view
from petl.backbones.base import BackboneView, EncoderView
from petl.backbones.classifier import Classifier
from petl.backbones.identity import identify
from petl.errors import PetlError
from petl.methods.attach import attach
from petl.methods.autognothi import AutoGnothi
from petl.methods.linear_probe import LinearProbe
from petl.models.explained import ExplainedClassifier, Inputs
from petl.nn.head import Head


class ClassifierSource:
    """A classifier by adapter directory, by name, or as a model; or a backbone that still needs a head.

    ``trains_head``: the classifier is a linear head on the backbone ``source``, trained before it is explained.
    """

    def __init__(
        self,
        source: Any,
        args: dict[str, Any],
        weights: str | None,
        pretrained: bool,
        tokenizer: Any,
        trains_head: bool,
        max_length: int,
    ) -> None:
        self.name = source if isinstance(source, str) and pretrained else None
        self.args, self.weights_file = args, Path(weights).name if weights else None
        self.labels: list[str] | None = None
        self.tokenizer, self.trains_head = tokenizer, trains_head
        directory = None if isinstance(source, nn.Module) else Path(str(source))
        if directory is None:
            self.model: nn.Module = source
        elif trains_head and (directory / CONFIG).is_file():
            raise PetlError(f"{source} is an adapter, which brings the head of its classifier: set head_epochs to 0.")
        elif trains_head:
            self.model = load_backbone(str(source), args, weights, pretrained)
        elif (directory / CONFIG).is_file():
            self._from_adapter(directory, weights)
        elif str(source).startswith(("timm/", "hf/")):
            self.model, self.tokenizer = load_classifier(str(source), args, weights, pretrained)
        else:
            raise PetlError(
                f"classifier {str(source)!r} is neither an adapter (no {CONFIG} there) nor a classifier by name (timm/…"
                ", hf/…). Train one first (petl fit --config quickstart/classification), or give a backbone and "
                "head_epochs."
            )
        self.view: EncoderView = view(self.model) if trains_head else classifier_view(self.model)
        self.max_length = min(max_length, getattr(self.view, "max_length", max_length))  # it has so many positions
        if max_length < 3:
            raise PetlError(f"Explanation(max_length={max_length}): a text has a start, a word and an end: 3 or more.")

    def _from_adapter(self, directory: Path, weights: str | None) -> None:
        task = read_config(directory)["task"]
        if task != "classification":
            raise PetlError(f"{directory} was trained for {task!r}; only classifiers are explained.")
        predictor = load(directory, weights=weights)
        record = predictor.config["backbone"]
        self.model, self.labels = predictor.model, predictor.labels
        self.name, self.args, self.weights_file = record["name"], record["args"], record["weights_file"]

    def explained(self, method: AutoGnothi, data: Any) -> ExplainedClassifier:
        """The classifier with untrained side networks; names its classes, by ``data`` where it does not name them."""
        model, classes, labels = self.model, getattr(data, "num_classes", None), getattr(data, "labels", None)
        if self.trains_head:
            if not classes:
                raise PetlError("the number of classes is not known: use a petl data module.")
            model = Classifier(attach(model, LinearProbe()), Head("linear", self.view.width, classes))
        found = ExplainedClassifier(model, method, self.tokenizer)
        if classes not in (None, found.petl.classes):
            raise PetlError(f"the data has {classes} classes, the classifier {found.petl.classes}.")
        self.labels = self.labels or list(labels or map(str, range(found.petl.classes)))
        if labels is not None and list(labels) != self.labels:
            rank_zero_print(
                f"classes of the data {list(labels)[:5]} are named otherwise by the classifier: its names are kept."
            )
        return found

    def inputs(self, batch: dict[str, Any], device: torch.device, data: Any) -> Inputs:
        """Images, or tokens of texts."""
        if "image" in batch and isinstance(self.view, BackboneView):
            return batch["image"].to(device)
        if "text" not in batch or self.tokenizer is None:
            raise PetlError(f"{data.name} has no {'images' if self.tokenizer is None else 'texts'} to explain.")
        tokens = self.tokenizer(
            batch["text"], padding=True, truncation=True, max_length=self.max_length, return_tensors="pt"
        )
        return {k: tokens[k].to(device) for k in ("input_ids", "attention_mask")}

    def check(self, directory: Path, model: ExplainedClassifier, config: dict[str, Any]) -> None:
        """Raise `PetlError` where the adapter of ``config`` explains another classifier."""
        if self.trains_head:  # it comes with the adapter
            check_identity(directory, identify(model.view), config["backbone"])
        else:
            check_explained(directory, model, config)

    def record(self) -> dict[str, Any]:
        """What `petl.save` needs to know to find the backbone again."""
        return {"backbone": self.name, "backbone_args": self.args, "weights_file": self.weights_file}


@rank_zero_only
def rank_zero_print(text: str) -> None:
    print(text, flush=True)
