"""A tiny RefCOCO in every published form: pictures, the refer files, and the hub's rows."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

PLAIN: dict[str, Any] = {"image_size": 64, "mean": (0.5,) * 3, "std": (0.5,) * 3, "batch_size": 2}
SIZES = {1: (80, 60), 2: (50, 90), 3: (64, 64)}
# image, box, split, sentences
REFS: list[tuple[int, list[float], str, list[str]]] = [
    (1, [5.5, 10.0, 30.25, 20.0], "train", ["Left dog", "dog on the left"]),
    (1, [40.0, 10.0, 39.5, 45.0], "train", ["right dog"]),
    (2, [0.0, 0.0, 50.0, 90.0], "val", ["everything"]),
    (3, [10.0, 30.0, 20.0, 20.0], "testA", ["the bright man", "man"]),
    (3, [1.0, 2.0, 60.0, 61.0], "testB", ["the wall"]),
]


def file_name(image: int) -> str:
    return f"COCO_train2014_{image:012d}.jpg"


def pictures(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for image, (width, height) in SIZES.items():
        pixels = np.random.default_rng(image).integers(0, 255, (height, width, 3), np.uint8)
        Image.fromarray(pixels).save(folder / file_name(image))
    return folder


def refs() -> list[dict[str, Any]]:
    return [
        {
            "ref_id": n, "ann_id": 100 + n, "category_id": 1, "image_id": image, "split": split,
            "file_name": f"wrong_{n}.jpg", "sent_ids": [10 * n + k for k in range(len(texts))],
            "sentences": [{"raw": t, "sent": t, "sent_id": 10 * n + k, "tokens": t.split()}
                          for k, t in enumerate(texts)],
        }
        for n, (image, _, split, texts) in enumerate(REFS)
    ]  # fmt: skip


def instances() -> dict[str, Any]:
    images = [{"id": i, "file_name": file_name(i), "width": w, "height": h} for i, (w, h) in SIZES.items()]
    boxes = [{"id": 100 + n, "image_id": ref[0], "bbox": ref[1]} for n, ref in enumerate(REFS)]
    return {"images": images, "annotations": boxes, "categories": []}


def write_refer(root: Path, listed: Any = None, coco: Any = None, dataset: str = "refcoco") -> Path:
    """``root/<dataset>/refs(unc).p``, as Python 2 would pickle it, and ``instances.json``; returns root."""
    folder = root / dataset
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "refs(unc).p").write_bytes(pickle.dumps(refs() if listed is None else listed, protocol=2))
    (folder / "instances.json").write_text(json.dumps(instances() if coco is None else coco))
    return root


def hub(corners: bool = True) -> dict[str, list[dict[str, Any]]]:
    """Rows of the hub by the name of their file."""
    coco, files = instances(), {"train": "train", "val": "validation", "testA": "test", "testB": "testB"}
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in files.values()}
    for ref, box in zip(refs(), coco["annotations"], strict=True):
        x, y, w, h = box["bbox"]
        image = next(i for i in coco["images"] if i["id"] == ref["image_id"])
        rows[files[ref["split"]]].append({
            "image_id": ref["image_id"], "file_name": ref["file_name"], "ref_id": ref["ref_id"],
            "ann_id": ref["ann_id"], "split": files[ref["split"]], "sentences": ref["sentences"],
            "bbox": [x, y, x + w, y + h] if corners else [x, y, w, h], "raw_anns": json.dumps(box),
            "raw_image_info": json.dumps(image), "image_path": f"coco/train2014/{image['file_name']}",
        })  # fmt: skip
    return rows


def write_hub(root: Path, corners: bool = True) -> Path:
    (root / "data").mkdir(parents=True, exist_ok=True)
    for name, rows in hub(corners).items():
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (root / "data" / f"{name}-00000-of-00001.jsonl").write_text(lines)
    return root
