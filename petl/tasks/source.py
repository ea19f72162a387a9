"""Where the classifier of an explanation comes from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from petl.adapters.artefact import CONFIG
from petl.adapters.predictor import load
from petl.backbones import classifier_view, load_backbone, load_classifier, view
from petl.backbones.base import EncoderView
from petl.backbones.classifier import Classifier
from petl.errors import PetlError
from petl.methods.attach import attach
from petl.methods.autognothi import AutoGnothi
from petl.methods.linear_probe import LinearProbe
from petl.models.explained import ExplainedClassifier
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
    ) -> None:
        self.name = source if isinstance(source, str) and pretrained else None
        self.args, self.weights_file = args, Path(weights).name if weights else None
        self.labels: list[str] | None = None
        self.tokenizer, self.trains_head = tokenizer, trains_head
        if isinstance(source, nn.Module):
            self.model: nn.Module = source
        elif trains_head:
            self.model = load_backbone(str(source), args, weights, pretrained)
        elif (Path(source) / CONFIG).is_file():
            self._from_adapter(Path(source), weights)
        elif str(source).startswith(("timm/", "hf/")):
            self.model, self.tokenizer = load_classifier(str(source), args, weights, pretrained)
        else:
            raise PetlError(
                f"classifier {str(source)!r} is neither an adapter (no {CONFIG} there) nor a classifier by name (timm/…"
                ", hf/…). Train one first (petl fit --config quickstart/classification), or give a backbone and "
                "head_epochs."
            )

    def _from_adapter(self, directory: Path, weights: str | None) -> None:
        predictor = load(directory, weights=weights)
        if predictor.config["task"] != "classification":
            raise PetlError(
                f"{directory} was trained for {predictor.config['task']!r}; only classifiers are explained."
            )
        record = predictor.config["backbone"]
        self.model, self.labels = predictor.model, predictor.labels
        self.name, self.args, self.weights_file = record["name"], record["args"], record["weights_file"]

    @property
    def view(self) -> EncoderView:
        return view(self.model) if self.trains_head else classifier_view(self.model)

    def explained(self, method: AutoGnothi, classes: int | None) -> ExplainedClassifier:
        """The classifier with untrained side networks; ``classes`` for a head that is trained."""
        model = self.model
        if self.trains_head:
            if not classes:
                raise PetlError("the number of classes is not known: use a petl data module.")
            model = Classifier(attach(model, LinearProbe()), Head("linear", self.view.width, classes))
        return ExplainedClassifier(model, method, self.tokenizer)

    def record(self) -> dict[str, Any]:
        """What `petl.save` needs to know to find the backbone again."""
        return {"backbone": self.name, "backbone_args": self.args, "weights_file": self.weights_file}
