"""Explained classifiers that several tests save: on the bundled backbone, and a tiny BERT with its tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

import petl
from petl.methods.attach import attached
from petl.nn.head import Head

VISION, ARGS, LABELS = "bundled/tiny_clip_vision", {"img_size": 32}, ["ant", "bee", "cat", "dog"]
PREPROCESSING = {"image_size": [32, 32], "mean": [0.5] * 3, "std": [0.25] * 3, "interpolation": "bicubic",
                 "mode": "resize"}  # fmt: skip
SMALL: dict[str, Any] = {"players": (2, 4), "reduction": 8}
WORDS = ["a", "film", "stir", "##ring", "dull", "and", "not", "play", "##s", "!"]


def shaken(module: nn.Module, std: float) -> nn.Module:
    """``module`` as if it had been trained."""
    torch.manual_seed(5)
    with torch.no_grad():
        for p in module.parameters():
            p.normal_(0, std)
    return module


def classifier(method: petl.Method | None = None) -> petl.Classifier:
    """On the bundled backbone, as after training."""
    backbone = petl.attach(petl.load_backbone(VISION, ARGS), method or petl.LinearProbe())
    shaken(attached(backbone), 0.1)
    model = petl.Classifier(backbone, Head("linear", 128, 4))
    shaken(model.head, 0.4)
    return model.eval()


def explained(model: nn.Module | None = None, **options: Any) -> petl.ExplainedClassifier:
    net = petl.ExplainedClassifier(model or classifier(), petl.AutoGnothi(**SMALL | options))
    shaken(net.petl, 0.2)
    return net.eval()


def save(net: nn.Module, directory: Path, **changes: Any) -> Path:
    """As `petl fit` saves a run on the bundled backbone."""
    options = {"labels": LABELS, "preprocessing": PREPROCESSING, "protocol": {"seed": 3}} | changes
    return petl.save(net, directory, VISION, backbone_args=ARGS, **options)


def text_classifier(folder: Path) -> str:
    """A random BERT with a head and its tokenizer in ``folder``; the name under which it is loaded."""
    from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]) + "\n")
    tokenizer = BertTokenizerFast(vocab=str(folder / "vocab.txt"))
    tokenizer.save_pretrained(folder)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = BertConfig(**shape, vocab_size=len(tokenizer), max_position_embeddings=16, num_labels=2)
    model = BertForSequenceClassification(config)
    shaken(model, 0.3)
    model.save_pretrained(folder)
    return f"hf/{folder}"


def explained_text(name: str) -> petl.ExplainedClassifier:
    model, tokenizer = petl.backbones.load_classifier(name)
    net = petl.ExplainedClassifier(model, petl.AutoGnothi(reduction=4), tokenizer)
    shaken(net.petl, 0.3)
    return net.eval()


def picture(width: int = 40, height: int = 32) -> Image.Image:
    return Image.fromarray(np.random.default_rng(width).integers(0, 255, (height, width, 3), dtype=np.uint8))
