"""Backbones: find the view of a model, load one by name, list what there is.

Names of image encoders: ``bundled/tiny_clip_vision`` (in the package), ``timm/<model>[.<tag>]``, ``hf/<hub id or local
folder>``; of text encoders: ``bundled/tiny_clip_text``, ``hf/<hub id or local folder>``.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from petl.errors import PetlError, nearest

if TYPE_CHECKING:
    from torch import nn

    from petl.backbones.base import BackboneView, EncoderView, ImageEncoder, TextEncoder

BUNDLED, BUNDLED_TEXT = ("bundled/tiny_clip_vision",), ("bundled/tiny_clip_text",)
TIMM_ARGS = (  # constructor arguments a config or an adapter may set; none of them names a file or an address
    "img_size", "patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio", "qkv_bias", "qk_norm", "init_values",
    "class_token", "reg_tokens", "global_pool", "pos_embed", "no_embed_class", "pre_norm", "final_norm", "fc_norm",
    "dynamic_img_size", "drop_path_rate", "norm_eps",
)  # fmt: skip
FAMILIES = {  # what `petl ls` prints without importing a library
    "timm_vit": "timm/<name>, any VisionTransformer: timm/vit_base_patch16_224.orig_in21k, DeiT, DINOv2, CLIP, SigLIP",
    "hf_clip_vision": "hf/<hub id>: hf/openai/clip-vit-base-patch16 (vision tower)",
    "hf_vit": "hf/<hub id>: hf/google/vit-base-patch16-224-in21k",
    "detr": "hf/<hub id>: hf/facebook/detr-resnet-50 (ResNet and encoder, for grounding)",
    "hf_bert": "hf/<hub id>: hf/google-bert/bert-base-uncased (text, for grounding)",
    "hf_clip_text": "hf/<hub id>: hf/openai/clip-vit-base-patch16 (text tower, for grounding)",
}


def list_backbones(pattern: str = "*") -> list[str]:
    """Names that `load_backbone` takes, by wildcard: the bundled ones and every timm VisionTransformer.

    Hugging Face models are loaded by hub id (``hf/openai/clip-vit-base-patch16``) and are not enumerated.
    """
    from fnmatch import fnmatch

    import timm

    names = [*BUNDLED, *(f"timm/{n}" for n in timm.list_models(module="vision_transformer", pretrained=True))]
    names += [f"timm/{n}" for n in timm.list_models(module="deit", pretrained=True)]
    return [n for n in dict.fromkeys(names) if fnmatch(n, pattern)]


def _find(model: nn.Module) -> EncoderView | None:
    lineage = {f"{c.__module__}.{c.__qualname__}" for c in type(model).__mro__}
    if "timm.models.vision_transformer.VisionTransformer" in lineage:
        from petl.backbones.timm_vit import TimmViT

        return TimmViT(model)  # type: ignore[arg-type]
    if "petl.backbones.detr.DetrImageEncoder" in lineage:
        from petl.backbones.detr import Detr

        return Detr(model)  # type: ignore[arg-type]
    if not any(name.startswith("transformers.") for name in lineage):
        return None
    import transformers as hf

    from petl.backbones.hf_text import HFBert, HFCLIPText
    from petl.backbones.hf_vit import HFCLIPVision, HFViT

    if isinstance(model, (hf.CLIPVisionModel, hf.CLIPVisionModelWithProjection)):
        return HFCLIPVision(model)
    if isinstance(model, (hf.ViTModel, hf.ViTForImageClassification)):
        return HFViT(model)
    if isinstance(model, (hf.CLIPTextModel, hf.CLIPTextModelWithProjection)):
        return HFCLIPText(model)
    return HFBert(model) if isinstance(model, (hf.BertModel, hf.BertForSequenceClassification)) else None


def view(model: nn.Module) -> BackboneView:
    """The view of a classifier's backbone. Raises `PetlError` for a network that no family describes."""
    from petl.backbones.base import BackboneView

    found = _find(model)
    if isinstance(found, BackboneView):
        return found
    if found is not None:
        raise PetlError(f"a {found.family} model does not classify images; it is half of a petl.GroundingModel.")
    raise PetlError(
        f"petl has no view of {_kind(model)}. It knows timm's VisionTransformer, "
        "HF CLIPVisionModel(WithProjection), ViTModel and ViTForImageClassification. To add another network, describe "
        "its blocks in a subclass of petl.backbones.base.BackboneView (see petl/backbones/timm_vit.py, about 80 lines)."
    )


def classifier_view(model: nn.Module) -> EncoderView:
    """The view of the network inside a classifier: a `petl.Classifier`, a vision model with a head, or BERT with one.

    Raises:
        PetlError: another network.
    """
    from petl.backbones.base import BackboneView
    from petl.backbones.classifier import Classifier

    found = _find(model.backbone if isinstance(model, Classifier) else model)
    if isinstance(found, BackboneView) or (found is not None and found.family == "hf_bert" and found.head_modules()):
        return found
    raise PetlError(
        f"{_kind(model)} is no classifier that petl can look into. It knows petl.Classifier, timm's VisionTransformer "
        "with a head, HF ViTForImageClassification and BertForSequenceClassification."
    )


def image_encoder(model: nn.Module) -> ImageEncoder:
    """The view of the image half of a pair. Raises `PetlError` for another network."""
    from petl.backbones.base import ImageEncoder

    found = _find(model)
    if not isinstance(found, ImageEncoder):
        raise PetlError(
            f"{_kind(model)} is no image encoder that petl can use for grounding. It knows timm's VisionTransformer, "
            "HF CLIPVisionModel and ViTModel, and DetrModel (as petl.backbones.detr.DetrImageEncoder)."
        )
    return found


def text_encoder(model: nn.Module) -> TextEncoder:
    """The view of the text half of a pair. Raises `PetlError` for another network."""
    from petl.backbones.base import TextEncoder

    found = _find(model)
    if not isinstance(found, TextEncoder):
        raise PetlError(
            f"{_kind(model)} is no text encoder that petl can use for grounding. It knows HF BertModel and "
            "CLIPTextModel(WithProjection)."
        )
    return found


def _kind(model: object) -> str:
    return f"{type(model).__module__}.{type(model).__qualname__}"


def load_backbone(
    name: str, args: dict[str, Any] | None = None, weights: str | Path | None = None, pretrained: bool = True
) -> nn.Module:
    """A frozen-to-be network by name, without a classification head.

    Args:
        name: see the module docstring.
        args: constructor arguments for a timm model (``img_size``, ``embed_dim``, …) and ``norm_eps``.
        weights: a ``.safetensors`` file to load instead of the published weights (for DETR also a released ``.pth``);
            it must fit exactly, apart from classification heads.
        pretrained: False leaves the weights random (for tests and baselines).

    Raises:
        PetlError: unknown name or argument, unreadable or ill-fitting weights.
    """
    library, _, rest = name.partition("/")
    args = dict(args or {})
    for key in args:
        if key not in TIMM_ARGS:
            raise PetlError(f"backbone {name!r} takes no argument {key!r}: {nearest(key, TIMM_ARGS)}")
    if library == "bundled":
        if name not in BUNDLED:
            raise PetlError(f"backbone {name!r} is not bundled: {nearest(name, BUNDLED)}")
        from petl.backbones import bundled

        model: nn.Module = _build(name, lambda: bundled.vision(pretrained=pretrained and weights is None, **args))
    elif library == "timm":
        model = _load_timm(name, rest, args, pretrained and weights is None)
    elif library == "hf":
        model = _load_hf(name, rest, args, pretrained and weights is None)
    else:
        raise PetlError(
            f"backbone {name!r}: a name starts with 'timm/', 'hf/' or 'bundled/', "
            f"{nearest(name, [*BUNDLED, f'timm/{name}'])}"
        )
    if weights is not None:
        _load_weights(model, Path(weights))
    return model.eval()


def load_classifier(
    name: str, args: dict[str, Any] | None = None, weights: str | Path | None = None, pretrained: bool = True
) -> tuple[nn.Module, Any]:
    """A trained classifier with its own head by name, and the tokenizer of a text classifier, else None.

    Args:
        name: ``timm/<model>``, or ``hf/<hub id or local folder>`` of a ViTForImageClassification or
            BertForSequenceClassification.
        args: as in `load_backbone`, and ``num_classes``.
        weights: a ``.safetensors`` file with all of its weights, head included.
        pretrained: False leaves the weights random.

    Raises:
        PetlError: as `load_backbone`.
    """
    library, _, rest = name.partition("/")
    args = dict(args or {})
    if library == "hf":
        from transformers import AutoTokenizer, BertForSequenceClassification, ViTForImageClassification

        classes = {"vit": ViTForImageClassification, "bert": BertForSequenceClassification}
        if args or weights:
            raise PetlError(f"classifier {name!r}: args and weights are for timm models; an HF folder brings its own.")
        model = _from_hf(name, rest, classes, "vision_config", pretrained)
        text = isinstance(model, BertForSequenceClassification)
        return model.eval(), _build(
            name, lambda: AutoTokenizer.from_pretrained(rest, trust_remote_code=False)
        ) if text else None
    if library != "timm":
        raise PetlError(f"classifier {name!r}: a classifier with its own head is named 'timm/…' or 'hf/…'.")
    classes_given = args.pop("num_classes", None)
    for key in args:
        if key not in TIMM_ARGS:
            raise PetlError(
                f"classifier {name!r} takes no argument {key!r}: {nearest(key, [*TIMM_ARGS, 'num_classes'])}"
            )
    head = {} if classes_given is None else {"num_classes": classes_given}
    model = _load_timm(name, rest, args, pretrained and weights is None, head)
    if weights is not None:
        _load_weights(model, Path(weights), with_head=True)
    return model.eval(), None


def _build(name: str, construct: Any) -> Any:
    try:
        return construct()
    except (TypeError, RuntimeError, ValueError, OSError, AssertionError) as error:
        raise PetlError(f"backbone {name!r} could not be built: {type(error).__name__}: {error}") from error


def _load_timm(
    name: str, rest: str, args: dict[str, Any], pretrained: bool, head: dict[str, Any] | None = None
) -> nn.Module:
    """``head``: {"num_classes": …}, or empty for the model's own; None = no head."""
    import timm
    from torch import nn

    if not timm.is_model(rest.partition(".")[0]):
        known = list_backbones() if "." in rest else {n.partition(".")[0] for n in list_backbones()}
        raise PetlError(f"timm has no model {rest!r}: {nearest(name, known)}")
    norm_eps, head = args.pop("norm_eps", None), {"num_classes": 0} if head is None else head
    model = _build(name, lambda: timm.create_model(rest, pretrained=pretrained, **head, **args))
    for module in model.modules():
        if norm_eps is not None and isinstance(module, nn.LayerNorm):
            module.eps = float(norm_eps)
    return model


def load_text_encoder(name: str, pretrained: bool = True) -> tuple[nn.Module, Any]:
    """A text encoder by name, and its tokenizer.

    Raises:
        PetlError: unknown name, or a model that cannot be loaded.
    """
    library, _, rest = name.partition("/")
    if library == "bundled":
        if name not in BUNDLED_TEXT:
            raise PetlError(f"text encoder {name!r} is not bundled: {nearest(name, BUNDLED_TEXT)}")
        from petl.backbones import bundled

        return bundled.text(pretrained).eval(), bundled.tokenizer()
    if library != "hf":
        raise PetlError(
            f"text encoder {name!r}: a name starts with 'hf/' or 'bundled/', "
            f"{nearest(name, [*BUNDLED_TEXT, f'hf/{name}'])}"
        )
    from transformers import AutoTokenizer, BertModel, CLIPTextModel

    classes = {"bert": BertModel, "clip": CLIPTextModel, "clip_text_model": CLIPTextModel}
    model = _from_hf(name, rest, classes, "text_config", pretrained)
    return model.eval(), _build(name, lambda: AutoTokenizer.from_pretrained(rest, trust_remote_code=False))


def _load_hf(name: str, rest: str, args: dict[str, Any], pretrained: bool) -> nn.Module:
    from transformers import CLIPVisionModel, DetrModel, ViTModel

    if args:
        raise PetlError(
            f"backbone {name!r}: args {sorted(args)} are for timm models; an HF model brings its own config."
        )
    classes = {"clip": CLIPVisionModel, "clip_vision_model": CLIPVisionModel, "vit": ViTModel, "detr": DetrModel}
    model = _from_hf(name, rest, classes, "vision_config", pretrained)
    if not isinstance(model, DetrModel):
        return model
    from petl.backbones.detr import DetrImageEncoder

    return DetrImageEncoder(model)


def _from_hf(name: str, rest: str, classes: dict[str, Any], part: str, pretrained: bool) -> nn.Module:
    """A model of one of ``classes``, by the model type of the config at ``rest``; ``part``: its section of a pair."""
    from transformers import AutoConfig

    config: Any = _build(name, lambda: AutoConfig.from_pretrained(rest, trust_remote_code=False))
    if config.model_type not in classes:
        raise PetlError(f"{name!r} is a {config.model_type!r} model; petl takes {', '.join(classes)} here.")
    cls = classes[config.model_type]
    if pretrained:
        return _build(name, lambda: cls.from_pretrained(rest, trust_remote_code=False, use_safetensors=True))
    return _build(name, lambda: cls(getattr(config, part, config)))


def _load_weights(model: nn.Module, path: Path, with_head: bool = False) -> None:
    encoder = _find(model)
    assert encoder is not None
    heads = () if with_head else tuple(f"{h}." for h in encoder.head_names)
    own = {k: v for k, v in model.state_dict().items() if not k.startswith(heads)}
    given = {k: v.float() for k, v in _read_weights(path, encoder.family).items() if not k.startswith(heads)}
    wrong = [k for k in own.keys() & given.keys() if own[k].shape != given[k].shape]
    if own.keys() != given.keys() or wrong:
        missing, extra = sorted(own.keys() - given.keys()), sorted(given.keys() - own.keys())
        raise PetlError(
            f"weights file {path} does not fit the backbone: {len(missing)} tensors missing {missing[:3]}, "
            f"{len(extra)} unknown {extra[:3]}, {len(wrong)} of another shape {sorted(wrong)[:3]}. "
            "Check the constructor arguments (backbone_args)."
        )
    model.load_state_dict(given, strict=False)


def _read_weights(path: Path, family: str) -> dict[str, Any]:
    """Tensors of a ``.safetensors`` file; for DETR also of a released ``.pth``."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise PetlError(f"weights file {path} does not exist.")
    if family == "detr" and path.suffix != ".safetensors":
        from petl.backbones.detr import read_released

        return read_released(path)
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise PetlError(f"weights file {path} is not a readable .safetensors file: {error}") from error
