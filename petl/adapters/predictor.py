"""Load an adapter and use it: backbone, method, head, labels and preprocessing together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast, overload

import torch
from PIL import Image
from torch import Tensor, nn

from petl.adapters import rebuild
from petl.adapters.artefact import read_config, read_tensors, recover
from petl.adapters.peft_format import is_plain, load_plain
from petl.adapters.state import set_trained_tensors
from petl.backbones.base import BackboneView
from petl.backbones.classifier import Classifier
from petl.data.decoded import read_image
from petl.data.grounding_transforms import letterbox
from petl.data.transforms import evaluation_transform
from petl.errors import PetlError
from petl.methods.attach import attached, merge, remove
from petl.methods.base import from_dict
from petl.models.explained import ExplainedClassifier, Inputs, ShapleyExplanation, explain
from petl.models.grounding import GroundingModel
from petl.nn.tokens import tokenize

if TYPE_CHECKING:
    from petl.adapters.many import AdapterSet

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
    """A loaded adapter. ``model`` is an ordinary module: images (B, 3, H, W) -> logits or features, a
    `petl.GroundingModel` or a `petl.ExplainedClassifier`."""

    def __init__(self, model: nn.Module, config: dict[str, Any], tokenizer: Any = None) -> None:
        self.model, self.config, self.tokenizer = model.eval(), config, tokenizer
        self.labels: list[str] | None = config["labels"]

    @property
    def backbone(self) -> nn.Module:
        model = self.model.classifier if isinstance(self.model, ExplainedClassifier) else self.model
        return model.backbone if isinstance(model, Classifier) else model

    @property
    def reads_text(self) -> bool:
        """Whether this is a classifier of sentences."""
        return isinstance(self.model, ExplainedClassifier) and not isinstance(self.model.view, BackboneView)

    def _read(self, image: Picture, task: str) -> Image.Image:
        if self.reads_text:
            raise PetlError("this classifier reads text: pass a sentence, not an image.")
        if self.config["task"] != task and (self.config["task"], task) != ("explanation", "classification"):
            raise PetlError(f"this adapter was trained for {self.config['task']!r}, not for {task}.")
        if self.config["preprocessing"] is None:
            raise PetlError("this adapter was saved without preprocessing; pass tensors to predictor.model instead.")
        return image if isinstance(image, Image.Image) else read_image(Path(image))

    def preprocess(self, image: Picture) -> Tensor:
        """One image -> (3, H, W), exactly as in evaluation. Raises `PetlError` for a file that is not an image."""
        opened = self._read(image, "classification")
        return evaluation_transform(self.config["preprocessing"])(opened)

    @overload
    def classify(self, images: Picture) -> Prediction: ...  # type: ignore[overload-overlap]  # a str is a Sequence too
    @overload
    def classify(self, images: Sequence[Picture]) -> list[Prediction]: ...
    @torch.inference_mode()
    def classify(self, images: Picture | Sequence[Picture]) -> Prediction | list[Prediction]:
        """Classify one image, or several in one pass; sentences where the classifier reads text.

        Args:
            images: a path or a PIL image, or a sequence of them.

        Raises:
            PetlError: an unreadable image, or an adapter without a classification head.
        """
        batch: list[Picture] = [images] if isinstance(images, (str, Path, Image.Image)) else list(images)
        out = self.model(self._inputs(batch))
        found = self.predictions(getattr(out, "logits", out))
        return found[0] if isinstance(images, (str, Path, Image.Image)) else found

    def predictions(self, logits: Tensor) -> list[Prediction]:
        """Labels and probabilities of logits (B, K)."""
        probabilities = logits.float().softmax(-1).cpu()
        names = self.labels or [str(i) for i in range(probabilities.shape[1])]
        return [
            Prediction(names[int(p.argmax())], float(p.max()), dict(zip(names, p.tolist(), strict=True)))
            for p in probabilities
        ]

    def _inputs(self, batch: Sequence[Picture]) -> Inputs:
        device = next(self.model.parameters()).device
        if self.reads_text:
            return {k: v.to(device) for k, v in self.tokens(batch).items()}
        return torch.stack([self.preprocess(image) for image in batch]).to(device)

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

    def explain(self, image: Picture | str) -> ShapleyExplanation:
        """Prediction and Shapley values of one image, or of a text where the classifier reads text.

        Raises:
            PetlError: an unreadable image, an empty text, or an adapter that was not trained to explain.
        """
        if not isinstance(self.model, ExplainedClassifier):
            task = self.config["task"]
            raise PetlError(
                f"this adapter was trained for {task!r}, not to explain: "
                + (
                    "train side networks on it with petl fit --config explain/autognothi --model.classifier DIRECTORY."
                    if task == "classification"
                    else "only classifiers are explained."
                )
            )
        if not self.reads_text and isinstance(image, (str, Path)) and not _is_file(image):
            raise PetlError(f"this classifier looks at images, and there is no file {_short(image)}.")
        return explain(self.model, self._inputs([image]))

    def tokens(self, text: Any) -> dict[str, Tensor]:
        """input_ids and attention_mask (B, T) of a text, or of several; what is too long is cut."""
        texts = list(text) if isinstance(text, (list, tuple)) else [text]
        for one in texts:
            if not isinstance(one, str) or not one.strip() or _is_file(one):
                kind = f"the file {_short(one)}" if isinstance(one, (str, Path)) and _is_file(one) else _short(one)
                raise PetlError(f"this classifier reads text: pass a sentence, not {kind}.")
        training, view = self.config["protocol"].get("training"), cast(Any, self.model).view
        recorded = training.get("max_length") if isinstance(training, dict) else None
        length = min(n for n in (recorded, view.max_length) if isinstance(n, int))
        found = self.tokenizer(texts, padding=True, truncation=True, max_length=length, return_tensors="pt")
        return {k: found[k] for k in ("input_ids", "attention_mask")}

    def merge(self) -> nn.Module:
        """Fold the adapter into the backbone, where the method has an exact merge; returns the model."""
        if isinstance(self.model, ExplainedClassifier):
            raise PetlError("side networks explain the very classifier that they were trained on: it is not merged.")
        merge(self.backbone)
        return self.model


@overload
def load(  # type: ignore[overload-overlap]  # a str is a Sequence too
    source: str | Path,
    backbone: nn.Module | tuple[nn.Module, nn.Module] | None = None,
    *,
    weights: str | Path | None = None,
    tokenizer: Any = None,
    device: str | torch.device = "cpu",
) -> Predictor: ...
@overload
def load(
    source: Sequence[str | Path] | Mapping[str, str | Path],
    backbone: nn.Module | None = None,
    *,
    weights: str | Path | None = None,
    device: str | torch.device = "cpu",
) -> AdapterSet: ...
def load(
    source: str | Path | Sequence[str | Path] | Mapping[str, str | Path],
    backbone: Any = None,
    *,
    weights: str | Path | None = None,
    tokenizer: Any = None,
    device: str | torch.device = "cpu",
) -> Predictor | AdapterSet:
    """Load an adapter, or several classifiers that share one frozen backbone (see `petl.AdapterSet`).

    Args:
        source: a directory, or the id of a Hugging Face hub repository; a list of them, or names with them, for a set.
            A directory that peft wrote needs the backbone.
        backbone: the frozen model, if at hand (its fingerprint must match); None = load it by the recorded name. For
            grounding the pair (image encoder, text encoder).
        weights: a local file with the (image) backbone's weights, for adapters trained on such a file.
        tokenizer: the text encoder's, where the pair was passed in; only `Predictor.ground` needs it.
        device: where to put the model.

    Raises:
        PetlError: not an adapter, damaged, from a newer petl, another backbone or other weights, tensors that do not
            fit; in a set, adapters of different backbones, fully fine-tuned ones or no classifiers. A backbone that was
            passed in is left as it was.
    """
    if not isinstance(source, (str, Path)):
        from petl.adapters.load_set import load_set

        return load_set(source, backbone, weights, device)
    directory = locate(source)
    if is_plain(directory):
        plain, config = load_plain(directory, backbone)
        return Predictor(plain.to(device), config)
    config = read_config(directory)
    tensors = read_tensors(directory, config)
    method = from_dict(config["method"])
    build: Any = {"grounding": rebuild.grounding, "explanation": rebuild.explained}.get(
        config["task"], rebuild.classifier
    )
    model, tokenizer = build(directory, config, method, backbone, weights, tokenizer)
    try:
        if isinstance(model, GroundingModel):
            rebuild.check_grounding(directory, model, config)
        elif not isinstance(model, ExplainedClassifier):
            inner = model.backbone if isinstance(model, Classifier) else model
            rebuild.check_identity(directory, attached(inner).identity, config["backbone"])
        elif backbone is not None and not rebuild.attaches(config, backbone):
            rebuild.check_explained(directory, model, config)
        set_trained_tensors(model, tensors, str(directory))
        if isinstance(model, ExplainedClassifier):
            rebuild.check_explained(directory, model, config)
    except PetlError:
        if isinstance(model, ExplainedClassifier):
            model = model.release()
        if config["task"] != "explanation" or rebuild.attaches(config, backbone):
            remove(model.backbone if isinstance(model, Classifier) else model)
        raise
    return Predictor(model.to(device), config, tokenizer)


def locate(source: str | Path) -> Path:
    """The directory of an adapter, fetched from the hub where it is no directory here."""
    directory = Path(source)
    recover(directory)
    return directory if directory.exists() else _from_hub(str(source))


def _is_file(name: str | Path) -> bool:
    try:
        return Path(name).is_file()
    except OSError:  # a sentence is too long for a name
        return False


def _short(given: object) -> str:
    text = repr(str(given) if isinstance(given, (str, Path)) else given)
    return text if len(text) <= 80 else f"{text[:78]}…{text[-1]}"


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
