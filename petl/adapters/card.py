"""The model card that is written beside an adapter: everything in it comes from the config."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any


def model_card(config: Mapping[str, Any]) -> str:
    """README.md of an adapter directory."""
    method, backbone, protocol = config["method"], config["backbone"], config["protocol"]
    weights = backbone["weights"] or backbone["weights_bf16"]
    labels = config["labels"] or []
    metrics = protocol.get("metrics") or {}
    shown = ", ".join(labels[:12]) + (f", … ({len(labels)} classes)" if len(labels) > 12 else "")
    text = config["text_backbone"]
    explained = config["classifier"]
    loads_by_name = backbone["name"] and not backbone["weights_file"] and (text is None or text["name"])
    call = 'ground("image.jpg", "the dog on the left")' if text else 'classify("image.jpg")'
    model = "(image_encoder, text_encoder)" if text else "the_frozen_model"
    if explained:
        reads_text = explained["family"] == "hf_bert"
        call = f'explain("{"a sentence" if reads_text else "image.jpg"}").values  # Shapley value by player and class'
        model = "the_classifier, tokenizer=its_tokenizer" if reads_text else "the_frozen_model"
    lines = [
        "---",
        "library_name: petl",
        f"tags: [petl, {method['name']}, {config['task']}]",
        "---",
        f"# {method['name']} adapter for {backbone['name'] or 'a backbone of your own'}",
        "",
        f"{config['tensors']['parameters']:,} trained parameters on a frozen backbone of {backbone['parameters']:,}. "
        "The backbone itself is not in here; loading checks that it is the right one.",
        "",
        "```python",
        "import petl",
        'predictor = petl.load("path/to/this/directory")'
        if loads_by_name
        else f'predictor = petl.load("path/to/this/directory", backbone={model})',
        f"predictor.{call}",
        "```",
        "",
        "| | |",
        "|---|---|",
        f"| method | `{method['name']}` `{json.dumps(method['options'])}` |",
        f"| backbone | `{backbone['name']}`, weights SHA-256 `{weights[:16]}` |",
        *(
            [f"| text encoder | `{text['name']}`, weights SHA-256 `{(text['weights'] or text['weights_bf16'])[:16]}` |"]
            if text
            else []
        ),
        *([f"| explains | {_classifier(explained)} |"] if explained else []),
        f"| labels | {shown or 'none'} |",
        *(f"| {name} | {value:.4f} |" for name, value in metrics.items()),
        "",
        "## How it was trained",
        "",
        "```json",
        json.dumps(protocol, indent=2),
        "```",
        "",
    ]
    return "\n".join(lines)


def _classifier(record: Mapping[str, Any]) -> str:
    method, weights = record["method"], record["weights"] or record["weights_bf16"]
    how = f"with `{method['name']}` `{json.dumps(method['options'])}`" if method else "with a head of its own"
    return (
        f"a classifier of {record['classes']} classes, {how}; backbone, adapter and head together SHA-256 "
        f"`{weights[:16]}`. Its prediction is not changed"
    )
