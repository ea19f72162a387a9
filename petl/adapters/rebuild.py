"""Building the model that an adapter describes, and checking that it is the right one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from petl.backbones import load_backbone, load_classifier, load_text_encoder
from petl.backbones.classifier import Classifier
from petl.backbones.identity import Identity
from petl.errors import PetlError
from petl.methods.attach import attach, remove
from petl.methods.autognothi import AutoGnothi
from petl.methods.base import Method, from_dict
from petl.models.explained import ExplainedClassifier
from petl.models.grounding import GroundingModel
from petl.nn.head import Head

_HEAD_SIZES = ("image_size", "query_length", "fusion_dim", "fusion_layers", "fusion_heads", "fusion_hidden")


def classifier(
    directory: Path, config: dict[str, Any], method: Method, backbone: Any, weights: str | Path | None, _: Any
) -> tuple[nn.Module, None]:
    if isinstance(backbone, tuple):
        raise PetlError(f"{directory} was trained for {config['task']!r}: pass one backbone, not a pair.")
    if backbone is None:
        record = config["backbone"]
        backbone = load_recorded(directory, record, weights)
        if record.get("own_head_classes") and hasattr(backbone, "reset_classifier"):
            backbone.reset_classifier(int(record["own_head_classes"]))
    attach(backbone, method)
    head = config["head"]
    if head is None:
        return backbone, None
    try:
        return Classifier(backbone, classification_head(head)), None
    except PetlError:
        remove(backbone)
        raise


def classification_head(record: dict[str, Any]) -> Head:
    """The head of a classifier's record, not yet with its tensors."""
    return Head(str(record.get("kind")), _size(record, "in_features"), _size(record, "num_classes"))


def grounding(
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
        vision = load_recorded(directory, config["backbone"], weights)
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


def explained(
    directory: Path,
    config: dict[str, Any],
    method: Method,
    backbone: Any,
    weights: str | Path | None,
    tokenizer: Any,
) -> tuple[ExplainedClassifier, Any]:
    """``backbone``: the backbone that the classifier's method is attached to, or the whole classifier."""
    record = config["classifier"]
    if record is None or not isinstance(method, AutoGnothi):
        raise PetlError(
            f"{directory}: an explanation has a classifier and the method autognothi; the file was changed."
        )
    base, inner = config["backbone"], record.get("method")
    if isinstance(backbone, tuple):
        raise PetlError(f"{directory} explains one classifier: pass that as backbone=, not a pair.")
    if backbone is not None and not attaches(config, backbone):
        return ExplainedClassifier(backbone, method, tokenizer), tokenizer
    if inner is not None:
        model, _ = classifier(directory, config, from_dict(inner), backbone, weights, None)
        try:
            return ExplainedClassifier(model, method, tokenizer), tokenizer
        except PetlError:
            remove(model.backbone if isinstance(model, Classifier) else model)
            raise
    if not base.get("name"):
        raise PetlError(f"{directory} was saved without the classifier's name: petl.load(…, backbone=classifier).")
    if base.get("weights_file") and weights is None:
        raise PetlError(f"{directory} was trained on the local file {base['weights_file']!r}: petl.load(…, weights=…).")
    model, tokenizer = load_classifier(str(base["name"]), base.get("args"), weights)
    return ExplainedClassifier(model, method, tokenizer), tokenizer


def attaches(config: dict[str, Any], backbone: Any) -> bool:
    """Whether `explained` attaches the classifier's method; not to a whole classifier, which has it already."""
    return config["classifier"].get("method") is not None and not isinstance(backbone, Classifier)


def check_explained(directory: Path, model: ExplainedClassifier, config: dict[str, Any]) -> None:
    """Raise `PetlError` unless ``model`` holds the classifier that the adapter explains: backbone, adapter and head."""
    check_identity(directory, model.identity, config["classifier"] or {}, "classifier")


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
    difference = recorded_identity(directory, record, what).difference(identity)
    if difference:
        raise PetlError(
            f"{directory} was trained on {record['name'] or f'a {what} without a name'}, and this {what} is "
            f"{difference}. An adapter works only on the very weights it was trained on: load those."
        )


def recorded_identity(directory: Path, record: dict[str, Any], what: str = "backbone") -> Identity:
    """The identity that an adapter's config records."""
    try:
        return Identity(**{k: record[k] for k in Identity.__dataclass_fields__})
    except KeyError as error:
        raise PetlError(
            f"{directory}: adapter_config.json has no {what} entry {error}; the file was changed."
        ) from error


def load_recorded(directory: Path, record: dict[str, Any], weights: str | Path | None) -> Any:
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
