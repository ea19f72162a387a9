"""`petl info`, `petl classify`, `petl ground`: look at an adapter, and use it."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from petl.errors import PetlError

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".pdf", ".svg")


def info(args: Sequence[str]) -> None:
    """Print what an adapter is, what it was trained on, and whether its files are intact."""
    parser = argparse.ArgumentParser("petl info", description="What an adapter is and whether it is intact.")
    parser.add_argument("adapter", type=Path)
    parser.add_argument("--json", action="store_true", help="print the whole adapter_config.json")
    given = parser.parse_args(args)
    from petl.adapters.artefact import read_config, read_tensors, recover

    recover(given.adapter)
    config = read_config(given.adapter)
    tensors = read_tensors(given.adapter, config)
    if given.json:
        print(json.dumps(config, indent=2))
        return
    protocol: dict[str, Any] = config["protocol"]
    data, training, base = protocol.get("data") or {}, protocol.get("training") or {}, config["backbone"]
    labels = config["labels"] or []
    rows = {
        "adapter": f"{given.adapter} (schema {config['schema']}, petl {config['petl_version']})",
        "method": _method(config["method"]),
        "backbone": _encoder(base),
        **({"text": _encoder(config["text_backbone"])} if config["text_backbone"] else {}),
        **({"explains": _classifier(config["classifier"])} if config["classifier"] else {}),
        "trained": f"{config['tensors']['parameters']:,} parameters in {len(tensors)} tensors, "
        f"{config['tensors']['bytes'] / 2**20:.2f} MiB",
        "task": config["task"]
        + (f", {len(labels)} labels: {', '.join(labels[:10])}{' …' if len(labels) > 10 else ''}" if labels else ""),
        "data": ", ".join(f"{k} {v}" for k, v in data.items() if isinstance(v, (str, int, float))) or "not recorded",
        "training": ", ".join(f"{k} {v}" for k, v in training.items()) or "not recorded",
        "selection": str(protocol.get("selection", "not recorded")),
        "metrics": ", ".join(f"{k} {v:.4f}" for k, v in (protocol.get("metrics") or {}).items()) or "not recorded",
        "intact": "yes (SHA-256 of the tensors matches)",
    }
    for key, value in rows.items():
        print(f"{key:<10} {value}")


def _method(record: dict[str, Any]) -> str:
    options = ", ".join(f"{k}={v}" for k, v in record["options"].items() if v is not None)
    return f"{record['name']} ({options})" if options else record["name"]


def _classifier(record: dict[str, Any]) -> str:
    """What an explanation explains; the digest is of backbone, adapter and head together."""
    method, weights = record["method"], (record["weights"] or record["weights_bf16"])[:16]
    how = _method(method) if method else "a head of its own"
    return f"a classifier of {record['classes']} classes with {how}, whole weights {weights}"


def _encoder(record: dict[str, Any]) -> str:
    weights = (record["weights"] or record["weights_bf16"])[:16]
    return f"{record['name'] or 'not named'}, {record['parameters']:,} parameters, weights {weights}"


def picture_file(name: str) -> Path:
    """A file that a picture can be written to; the type of --out."""
    file = Path(name)
    if file.suffix.lower() not in PICTURES or file.is_dir():
        raise PetlError(f"--out {name}: a picture is a file that ends in {', '.join(PICTURES)}.")
    return file


def ground(args: Sequence[str]) -> None:
    """Print the box that an expression refers to, and draw it."""
    parser = argparse.ArgumentParser("petl ground", description="Find what an expression refers to in an image.")
    parser.add_argument("adapter", help="adapter directory or hub id")
    parser.add_argument("image", type=Path)
    parser.add_argument(
        "expression", nargs="+", help='what to look for, e.g. "the red bus on the left"; several in turn'
    )
    parser.add_argument("--weights", type=Path, help="image encoder weights, where they came from a local file")
    parser.add_argument("--out", type=picture_file, default=Path("grounded.png"), help="picture to write")
    given = parser.parse_args(args)
    import torch
    from torchvision.ops import box_convert
    from torchvision.transforms.functional import to_tensor

    from petl.adapters.predictor import load
    from petl.data.decoded import read_image
    from petl.data.transforms import to_rgb
    from petl.pictures import box_grid

    image = to_rgb(read_image(given.image))
    predictor = load(given.adapter, weights=given.weights)
    boxes = [predictor.ground(image, phrase) for phrase in given.expression]
    for phrase, box in zip(given.expression, boxes):
        print(
            f"{phrase}: "
            + " ".join(f"{v:.1f}" for v in box)
            + f"  (x0 y0 x1 y1, pixels of {image.width} x {image.height})"
        )
    corners = torch.tensor(boxes) / torch.tensor([image.width, image.height] * 2)
    shown = to_tensor(image)[None].expand(len(boxes), -1, -1, -1)
    try:
        box_grid(shown, box_convert(corners, "xyxy", "cxcywh"), None, given.expression, given.out)
    except OSError as error:
        raise PetlError(f"the picture could not be written to {given.out}: {error}") from error
    print(f"drawn: {given.out}")


def classify(args: Sequence[str]) -> None:
    """Print the most probable classes of images, and draw them with the patches that were kept."""
    parser = argparse.ArgumentParser("petl classify", description="Classify images with an adapter.")
    parser.add_argument("adapter", help="adapter directory or hub id")
    parser.add_argument("images", nargs="+", type=Path)
    parser.add_argument("--weights", type=Path, help="backbone weights, where the adapter was trained on a local file")
    parser.add_argument("--top", type=int, default=3, help="classes to print")
    parser.add_argument("--out", type=picture_file, default=Path("classified.png"), help="picture to write")
    given = parser.parse_intermixed_args(list(args))
    missing = [str(p) for p in given.images if not p.is_file()]
    if missing:
        raise PetlError(f"{len(missing)} of {len(given.images)} images do not exist: {', '.join(missing[:5])}")
    import torch

    from petl.adapters.predictor import load
    from petl.methods.attach import attached
    from petl.pictures import kept_patches, token_grid, unnormalise

    predictor = load(given.adapter, weights=given.weights)
    predictions = predictor.classify(given.images)
    for path, prediction in zip(given.images, predictions):
        print(f"{path}: " + ", ".join(f"{label} {p:.1%}" for label, p in prediction.top(given.top)))
    shown = given.images[:12]
    x = torch.stack([predictor.preprocess(p) for p in shown])
    preprocessing: Any = predictor.config["preprocessing"]
    masks: list[Any] = []
    events: Sequence[int] = ()
    if predictor.config["task"] == "classification":  # a classifier that explains itself keeps every token
        _, masks = kept_patches(predictor.backbone, predictor.model, x)
        events = getattr(attached(predictor.backbone), "events", ())
    try:
        token_grid(
            unnormalise(x, preprocessing["mean"], preprocessing["std"]),
            masks,
            events,
            [f"{p.label} {p.probability:.0%}" for p in predictions[:12]],
            None,
            given.out,
        )
    except OSError as error:
        raise PetlError(f"the picture could not be written to {given.out}: {error}") from error
    print(f"drawn: {given.out}" + (f" (first 12 of {len(given.images)})" if len(given.images) > 12 else ""))
