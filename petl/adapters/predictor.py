"""Load an adapter and use it: backbone, method, head, labels and preprocessing together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast, overload

import torch
from PIL import Image
from torch import Tensor, nn

from petl.adapters.artefact import read_config, read_tensors, recover
from petl.adapters.state import set_trained_tensors
from petl.backbones import load_backbone, load_text_encoder
from petl.backbones.classifier import Classifier
from petl.backbones.identity import Identity
from petl.data.base import read_image
from petl.data.grounding_transforms import letterbox
from petl.data.transforms import evaluation_transform
from petl.errors import PetlError
from petl.methods.attach import attach, attached, merge, remove
from petl.methods.base import Method, from_dict
from petl.models.grounding import GroundingModel
from petl.nn.head import Head
from petl.nn.tokens import tokenize

_HEAD_SIZES = ("image_size", "query_length", "fusion_dim", "fusion_layers", "fusion_heads", "fusion_hidden")
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
    """A loaded adapter. ``model`` is an ordinary module: images (B, 3, H, W) -> logits or features, or a
    `petl.GroundingModel`."""

    def __init__(self, model: nn.Module, config: dict[str, Any], tokenizer: Any = None) -> None:
        self.model, self.config, self.tokenizer = model.eval(), config, tokenizer
        self.labels: list[str] | None = config["labels"]

    @property
    def backbone(self) -> nn.Module:
        return self.model.backbone if isinstance(self.model, Classifier) else self.model

    def _read(self, image: Picture, task: str) -> Image.Image:
        if self.config["task"] != task:
            raise PetlError(f"this adapter was trained for {self.config['task']!r}, not for {task}.")
        if self.config["preprocessing"] is None:
            raise PetlError("this adapter was saved without preprocessing; pass tensors to predictor.model instead.")
        return image if isinstance(image, Image.Image) else read_image(Path(image))

    def preprocess(self, image: Picture) -> Tensor:
        """One image -> (3, H, W), exactly as in evaluation. Raises `PetlError` for a file that is not an image."""
        return evaluation_transform(self.config["preprocessing"])(self._read(image, "classification"))

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

    @torch.inference_mode()
    def ground(self, image: Picture, expression: str) -> tuple[float, float, float, float]:
        """The box that ``expression`` refers to: (x0, y0, x1, y1) in pixels of the image.

        Raises:
            PetlError: an unreadable image, an empty expression, or an adapter that was not trained for grounding.
        """
        boxed = letterbox(self._read(image, "grounding"), self.config["preprocessing"])
        if not expression.strip():
            raise PetlError("the expression is empty: say what to look for, e.g. 'the red bus on the left'.")
        if self.tokenizer is None:
            raise PetlError("the encoders were passed in without their tokenizer: petl.load(…, tokenizer=…).")
        model = cast(GroundingModel, self.model)
        ids, mask = tokenize(self.tokenizer, [expression], model.head.query_length)
        device = next(model.parameters()).device
        box = model(*(t.to(device) for t in (boxed.image[None], boxed.mask[None], ids, mask)))[0]
        return boxed.to_pixels(box.cpu())

    def merge(self) -> nn.Module:
        """Fold the adapter into the backbone, where the method has an exact merge; returns the model."""
        merge(self.backbone)
        return self.model


def load(
    source: str | Path,
    backbone: nn.Module | tuple[nn.Module, nn.Module] | None = None,
    *,
    weights: str | Path | None = None,
    tokenizer: Any = None,
    device: str | torch.device = "cpu",
) -> Predictor:
    """Load an adapter.

    Args:
        source: a directory, or the id of a Hugging Face hub repository.
        backbone: the frozen model, if at hand (its fingerprint must match); None = load it by the recorded name. For
            grounding the pair (image encoder, text encoder).
        weights: a local file with the (image) backbone's weights, for adapters trained on such a file.
        tokenizer: the text encoder's, where the pair was passed in; only `Predictor.ground` needs it.
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
    method = from_dict(config["method"])
    build = _grounding if config["task"] == "grounding" else _classifier
    model, tokenizer = build(directory, config, method, backbone, weights, tokenizer)
    try:
        if isinstance(model, GroundingModel):
            check_grounding(directory, model, config)
        else:
            inner = model.backbone if isinstance(model, Classifier) else model
            check_identity(directory, attached(inner).identity, config["backbone"])
        set_trained_tensors(model, tensors, str(directory))
    except PetlError:
        remove(model.backbone if isinstance(model, Classifier) else model)
        raise
    return Predictor(model.to(device), config, tokenizer)


def _classifier(
    directory: Path, config: dict[str, Any], method: Method, backbone: Any, weights: str | Path | None, _: Any
) -> tuple[nn.Module, None]:
    if isinstance(backbone, tuple):
        raise PetlError(f"{directory} was trained for {config['task']!r}: pass one backbone, not a pair.")
    if backbone is None:
        record = config["backbone"]
        backbone = _load_recorded(directory, record, weights)
        if record.get("own_head_classes") and hasattr(backbone, "reset_classifier"):
            backbone.reset_classifier(int(record["own_head_classes"]))
    attach(backbone, method)
    head = config["head"]
    if head is None:
        return backbone, None
    try:
        sizes = _size(head, "in_features"), _size(head, "num_classes")
        return Classifier(backbone, Head(str(head.get("kind")), *sizes)), None
    except PetlError:
        remove(backbone)
        raise


def _grounding(
    directory: Path,
    config: dict[str, Any],
    method: Method,
    backbone: Any,
    weights: str | Path | None,
    tokenizer: Any,
) -> tuple[GroundingModel, Any]:
    head, text_record = config["head"], config["text_backbone"]
    if head is None or text_record is None:
        raise PetlError(f"{directory}: an adapter for grounding has a head and a text_backbone; the file was changed.")
    options: dict[str, Any] = {k: _size(head, k) for k in _HEAD_SIZES}
    if not isinstance(head.get("dropout"), (int, float)) or not 0 <= head["dropout"] < 1:
        raise PetlError(f"{directory}: head.dropout is {head.get('dropout')!r}; the file was changed.")
    options |= {"dropout": head["dropout"], "norm_first": head.get("norm_first") is True}
    if backbone is None:
        vision = _load_recorded(directory, config["backbone"], weights)
        if not text_record.get("name"):
            raise PetlError(
                f"{directory} was saved without a text encoder's name: petl.load(…, backbone=(image, text))."
            )
        text, tokenizer = load_text_encoder(str(text_record["name"]))
    elif isinstance(backbone, tuple) and len(backbone) == 2:
        vision, text = backbone
    else:
        raise PetlError(f"{directory} was trained for grounding: pass backbone=(image encoder, text encoder).")
    return GroundingModel(vision, text, method, **options), tokenizer


def _size(head: dict[str, Any], key: str) -> int:
    value = head.get(key)
    most = 100 if key.endswith("layers") else 1_000_000
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < most:
        raise PetlError(f"adapter_config.json: head.{key} is {value!r}, not a sensible size; the file was changed.")
    return value


def check_grounding(directory: Path, model: GroundingModel, config: dict[str, Any]) -> None:
    """Raise `PetlError` unless ``model`` has the encoders and the sizes of the adapter."""
    check_identity(directory, model.petl.vision.identity, config["backbone"], "image encoder")
    check_identity(directory, model.petl.text.identity, config["text_backbone"] or {}, "text encoder")
    canvas = (config["preprocessing"] or {}).get("image_size", [model.image_size] * 2)
    if canvas != [model.image_size] * 2:
        raise PetlError(f"{directory}: preprocessing gives {canvas} pixels to a model of {model.image_size}.")
    mine = model.describe()
    if mine != config["head"]:
        differing = sorted(k for k in mine if mine[k] != (config["head"] or {}).get(k))
        raise PetlError(f"{directory} has another vision-language part than the model: {', '.join(differing)} differ.")


def check_identity(directory: Path, identity: Identity, record: dict[str, Any], what: str = "backbone") -> None:
    """Raise `PetlError` unless a frozen network with this identity is the one that ``record`` describes."""
    try:
        expected = Identity(**{k: record[k] for k in Identity.__dataclass_fields__})
    except KeyError as error:
        raise PetlError(
            f"{directory}: adapter_config.json has no {what} entry {error}; the file was changed."
        ) from error
    difference = expected.difference(identity)
    if difference:
        raise PetlError(
            f"{directory} was trained on {record['name'] or f'a {what} without a name'}, and this {what} is "
            f"{difference}. An adapter works only on the very weights it was trained on: load those."
        )


def _load_recorded(directory: Path, record: dict[str, Any], weights: str | Path | None) -> Any:
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
    return load_backbone(str(record["name"]), record["args"], weights)


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
