"""Load an adapter and use it: backbone, method, head, labels and preprocessing together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import torch
from PIL import Image
from torch import Tensor, nn

from petl.adapters.artefact import read_config, read_tensors, recover
from petl.adapters.state import set_trained_tensors
from petl.backbones import load_backbone
from petl.backbones.classifier import Classifier
from petl.backbones.identity import Identity
from petl.data.base import read_image
from petl.data.transforms import evaluation_transform
from petl.errors import PetlError
from petl.methods.attach import attach, attached, merge, take_off
from petl.methods.base import from_dict
from petl.nn.head import Head

Picture = str | Path | Image.Image


@dataclass(frozen=True)
class Prediction:
    """The most probable class of one image, and the probability of every class by label."""

    label: str
    probability: float
    probabilities: dict[str, float]

    def top(self, count: int) -> list[tuple[str, float]]:
        """The ``count`` most probable classes."""
        return sorted(self.probabilities.items(), key=lambda item: -item[1])[:count]


class Predictor:
    """A loaded adapter. ``model`` is an ordinary module: images (B, 3, H, W) -> logits or features."""

    def __init__(self, model: nn.Module, config: dict[str, Any]) -> None:
        self.model, self.config = model.eval(), config
        self.labels: list[str] | None = config["labels"]

    @property
    def backbone(self) -> nn.Module:
        return self.model.backbone if isinstance(self.model, Classifier) else self.model

    def preprocess(self, image: Picture) -> Tensor:
        """One image -> (3, H, W), exactly as in evaluation. Raises `PetlError` for a file that is not an image."""
        if self.config["preprocessing"] is None:
            raise PetlError("this adapter was saved without preprocessing; pass tensors to predictor.model instead.")
        if not isinstance(image, Image.Image):
            image = read_image(Path(image))
        return evaluation_transform(self.config["preprocessing"])(image)

    @overload
    def classify(self, images: Picture) -> Prediction: ...  # type: ignore[overload-overlap]  # a str is a Sequence too
    @overload
    def classify(self, images: Sequence[Picture]) -> list[Prediction]: ...
    @torch.inference_mode()
    def classify(self, images: Picture | Sequence[Picture]) -> Prediction | list[Prediction]:
        """Classify one image, or several in one pass.

        Args:
            images: a path or a PIL image, or a sequence of them.

        Raises:
            PetlError: an unreadable image, or an adapter without a classification head.
        """
        if self.config["task"] != "classification":
            raise PetlError(f"this adapter was trained for {self.config['task']!r}, not for classification.")
        batch: list[Picture] = [images] if isinstance(images, (str, Path, Image.Image)) else list(images)
        x = torch.stack([self.preprocess(image) for image in batch]).to(next(self.model.parameters()).device)
        out = self.model(x)
        probabilities = getattr(out, "logits", out).float().softmax(-1).cpu()
        names = self.labels or [str(i) for i in range(probabilities.shape[1])]
        found = [
            Prediction(names[int(p.argmax())], float(p.max()), dict(zip(names, p.tolist(), strict=True)))
            for p in probabilities
        ]
        return found[0] if isinstance(images, (str, Path, Image.Image)) else found

    def merge(self) -> nn.Module:
        """Fold the adapter into the backbone, where the method has an exact merge; returns the model."""
        merge(self.backbone)
        return self.model


def load(
    source: str | Path,
    backbone: nn.Module | None = None,
    *,
    weights: str | Path | None = None,
    device: str | torch.device = "cpu",
) -> Predictor:
    """Load an adapter.

    Args:
        source: a directory, or the id of a Hugging Face hub repository.
        backbone: the frozen model, if at hand (its fingerprint must match); None = load it by the recorded name.
        weights: a local ``.safetensors`` with the backbone's weights, for adapters trained on such a file.
        device: where to put the model.

    Raises:
        PetlError: not an adapter, damaged, from a newer petl, another backbone or other weights, tensors that do not
            fit. A backbone that was passed in is left as it was.
    """
    directory = Path(source)
    recover(directory)
    if not directory.exists():
        directory = _from_hub(str(source))
    config = read_config(directory)
    tensors = read_tensors(directory, config)
    record = config["backbone"]
    if backbone is None:
        backbone = _load_recorded(directory, record, weights)
    method = from_dict(config["method"])
    attach(backbone, method)
    try:
        check_identity(directory, backbone, record)
        model = backbone
        if config["head"] is not None:
            head = config["head"]
            sizes = _size(head, "in_features"), _size(head, "num_classes")
            model = Classifier(backbone, Head(str(head.get("kind")), *sizes))
        set_trained_tensors(model, tensors, str(directory))
    except PetlError:
        take_off(backbone, attached(backbone))
        raise
    return Predictor(model.to(device), config)


def _size(head: dict[str, Any], key: str) -> int:
    value = head.get(key)
    if not isinstance(value, int) or not 0 < value < 1_000_000:
        raise PetlError(f"adapter_config.json: head.{key} is {value!r}, not a sensible size; the file was changed.")
    return value


def check_identity(directory: Path, backbone: nn.Module, record: dict[str, Any]) -> None:
    """Raise `PetlError` unless ``backbone`` (with a method attached) is the one that ``record`` describes."""
    try:
        expected = Identity(**{k: record[k] for k in Identity.__dataclass_fields__})
    except KeyError as error:
        raise PetlError(
            f"{directory}: adapter_config.json has no backbone entry {error}; the file was changed."
        ) from error
    difference = expected.difference(attached(backbone).identity)
    if difference:
        raise PetlError(
            f"{directory} was trained on {record['name'] or 'a backbone without a name'}, and this backbone is "
            f"{difference}. An adapter works only on the very weights it was trained on: load those."
        )


def _load_recorded(directory: Path, record: dict[str, Any], weights: str | Path | None) -> nn.Module:
    if not record.get("name"):
        raise PetlError(
            f"{directory} was saved without a backbone name: pass the frozen model, petl.load(…, backbone=model)."
        )
    if record.get("weights_file") and weights is None:
        raise PetlError(
            f"{directory} was trained on weights from the local file {record['weights_file']!r}: pass its path "
            "(petl.load(…, weights=…), on the command line --weights) or the model (backbone=…)."
        )
    if not isinstance(record.get("args"), dict):
        raise PetlError(f"{directory}: the backbone's args are not a mapping; the file was changed.")
    model: Any = load_backbone(str(record["name"]), record["args"], weights)
    if record.get("own_head_classes") and hasattr(model, "reset_classifier"):
        model.reset_classifier(int(record["own_head_classes"]))
    return model


def _from_hub(repo: str) -> Path:
    """Download the three files of an adapter from the Hugging Face hub."""
    if repo.count("/") != 1 or repo.startswith((".", "/")):
        raise PetlError(f"{repo} is neither a directory nor a hub id of the form 'user/name'.")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    from petl.adapters.artefact import CARD, CONFIG, TENSORS

    try:
        return Path(snapshot_download(repo, allow_patterns=[CONFIG, TENSORS, CARD]))
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise PetlError(f"{repo} is no directory here and could not be fetched from the hub: {error}") from error
