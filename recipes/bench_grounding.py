"""Memory and speed of grounding with DETR-R50 and BERT-base at 640 pixels and 20 tokens, as ratios in one process.

    python recipes/bench_grounding.py --out BENCHMARKS.md            (make bench)

Compared: the frozen floor (only the vision-language part trained), M²IST, DARA and full fine-tuning. Random weights
(speed does not depend on them). Full fine-tuning trains what TransVG trains, dropout live; the others keep their
encoders in eval. The data pipeline is timed on JPEG files: those of ``--images``, or generated pictures of 640 x 480.
"""

from __future__ import annotations

import argparse
import gc
import io
import json
import tarfile
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
import transformers
from PIL import Image
from timing import DEVICE, Row, compare, machine, write_section
from transformers import BertConfig, BertModel, DetrConfig, DetrModel

import petl
from petl.costs import count_saved_bytes
from petl.data import Expressions, scenes
from petl.data.tap_store import TapStore
from petl.models.frozen import FrozenTower
from petl.tasks.grounding import Grounding

METHODS: dict[str, petl.Method | None] = {
    "floor": None,
    "M²IST": petl.M2IST(),
    "DARA": petl.DARA(),
    "full": petl.FullFineTuning(),
}

FLOOR = """The frozen floor is low here: the last fusion layer computes [REG] alone, attention maps are not kept, and
one FFN tensor is kept instead of two (the published layout keeps 178 MiB a sample). What M²IST adds to it are the taps,
which the gradients of its down-projections need; encoders in bf16 halve them."""


def network(method: petl.Method | None, bf16: bool = False) -> petl.GroundingModel:
    torch.manual_seed(0)
    vision, text = DetrModel(DetrConfig()), BertModel(BertConfig())
    if bf16:
        vision, text = vision.bfloat16(), text.bfloat16()
    return petl.GroundingModel(vision.to(DEVICE), text.to(DEVICE), method).train()


def saved_per_sample(model: petl.GroundingModel) -> int:
    """Bytes that autograd keeps for one more image with its expression."""
    two, three = (count_saved_bytes(model, *model.example(n)) for n in (2, 3))
    return three - two


def memory_rows() -> list[Row]:
    saved = {name: saved_per_sample(network(method)) for name, method in METHODS.items()}
    rows = [
        ("bytes saved for backward per sample, M²IST over the frozen floor", saved["M²IST"] / saved["floor"], "≤ 1.06"),
        ("bytes saved for backward per sample, M²IST over full fine-tuning", saved["M²IST"] / saved["full"], "≤ 0.36"),
        ("bytes saved for backward per sample, DARA over full fine-tuning", saved["DARA"] / saved["full"], ""),
    ]
    if DEVICE == "cuda" or torch.ops.mkldnn._is_mkldnn_bf16_supported():  # else bf16 convolutions take minutes
        floor, side = (saved_per_sample(network(METHODS[n], bf16=True)) for n in ("floor", "M²IST"))
        rows.insert(1, ("the same with encoders in bf16", side / floor, "≤ 1.06"))
    return rows + [(f"(MiB per sample, {name})", size / 2**20, "") for name, size in saved.items()]


def step(model: petl.GroundingModel, batch: int, boxes: Callable[[], torch.Tensor] | None = None) -> Callable[[], None]:
    """Forward, backward and optimiser step of the trained tensors; ``boxes``: the forward pass, if not the model's."""
    inputs = model.example(batch)
    forward = boxes or partial(model, *inputs)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)
    truth = torch.full((batch, 4), 0.4, device=DEVICE)

    def run() -> None:
        Grounding.loss(forward(), truth).backward()
        optimizer.step()
        optimizer.zero_grad()

    return run


def from_taps(model: petl.GroundingModel, batch: int, folder: Path, dtype: torch.dtype) -> Callable[[], torch.Tensor]:
    """Boxes from what the frozen encoders made of the example, read from a tap store of ``dtype`` at every call."""
    images, seen, ids, words = model.example(batch)
    vision = FrozenTower("image", model.petl.vision, model.vision_view.encode, ("image", "mask"))
    text = FrozenTower("text", model.petl.text, model.text_view.encode, ("ids", "words"))
    readers, samples = {}, [str(i) for i in range(batch)]
    for part, inputs in ((vision, (images, seen)), (text, (ids, words))):
        store = TapStore({"part": part.kind}, dtype, folder)
        store.fill(samples, lambda rows, part=part, inputs=inputs: part.record(*(x[rows] for x in inputs)), batch)
        readers[part.kind] = store.reader(samples)

    def boxes() -> torch.Tensor:
        taps = {kind: reader.read(range(batch))[0] for kind, reader in readers.items()}
        read = {"taps": {k: {n: t.to(DEVICE) for n, t in v.items()} for k, v in taps.items()}, "missing": {}}
        visual = vision.output(read)[:, model.vision_view.prefix_tokens :]
        return model.locate(visual, seen, text.output(read), words)

    return boxes


def cached_rows(batch: int, rounds: int) -> list[Row]:
    """M²IST on ViT-B/16 at 224 pixels and BERT-base: a step on recorded taps over one that runs both encoders."""
    torch.manual_seed(0)
    vision = timm.create_model("vit_base_patch16_224", num_classes=0)
    model = petl.GroundingModel(vision.to(DEVICE), BertModel(BertConfig()).to(DEVICE), petl.M2IST()).train()
    with tempfile.TemporaryDirectory() as name:
        runs = {"uncached": step(model, batch)}
        for kept in (torch.float32, torch.bfloat16):
            word = str(kept).removeprefix("torch.")
            runs[word] = step(model, batch, from_taps(model, batch, Path(name) / word, kept))
        seconds = compare(runs, rounds, warm_up=1)
    what = "training step of M²IST, ViT-B/16 at 224 pixels and BERT-base, on taps in"
    rows = [(f"{what} {kept} over uncached", seconds[kept] / seconds["uncached"], "≤ 0.40") for kept in seconds]
    return [*rows[1:], ("(seconds of such an uncached step, per sample)", seconds["uncached"] / batch, "")]


def step_rows(batch: int, rounds: int) -> list[Row]:
    targets = {"M²IST": "≤ 0.45", "DARA": "≤ 0.55", "floor": ""}
    seconds = compare({n: step(network(m), batch) for n, m in METHODS.items()}, rounds, warm_up=1)
    rows = [(f"training step, time of {n} over full fine-tuning", seconds[n] / seconds["full"], t)
            for n, t in targets.items()]  # fmt: skip
    rows.append(("(seconds of a full fine-tuning step, per sample)", seconds["full"] / batch, ""))
    if DEVICE == "cuda":
        peaks = {}
        for name, method in METHODS.items():
            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            run = step(network(method), batch)
            run(), run()
            peaks[name] = torch.cuda.max_memory_allocated()
            del run
        rows.append(("peak memory, M²IST over full fine-tuning", peaks["M²IST"] / peaks["full"], "≤ 0.36"))
    return rows


def pictures(source: Path | None, folder: Path, count: int) -> list[Path]:
    """JPEG files: those of a folder or ``.tar``, or generated ones."""
    if source is not None and source.is_dir():
        return sorted(source.rglob("*.jpg"))[:count]
    files = []
    if source is not None:
        with tarfile.open(source) as tar:  # members are read, nothing is extracted
            for member in tar:
                if member.isfile() and member.name.endswith(".jpg") and len(files) < count:
                    files.append(folder / f"{len(files)}.jpg")
                    files[-1].write_bytes(tar.extractfile(member).read())  # type: ignore[union-attr]
        return files
    for n in range(count):
        buffer = io.BytesIO()
        scenes.make_scene(n, 640).image.crop((0, 0, 640, 480)).save(buffer, "JPEG", quality=90)
        files.append(folder / f"{n}.jpg")
        files[-1].write_bytes(buffer.getvalue())
    return files


def data_row(source: Path | None, count: int) -> Row:
    """Augmented training samples per second through decoding, transforms and collation, in this process."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        lines = []
        root = source if source is not None and source.is_dir() else Path(name)
        for path in pictures(source, Path(name), count):
            with Image.open(path) as image:
                box = [image.width * 0.3, image.height * 0.3, image.width * 0.4, image.height * 0.4]
            line = {"image": path.relative_to(root).as_posix(), "bbox": box, "split": "train"}
            lines.append(line | {"expression": "the thing on the left side"})
            lines.append(line | {"expression": "the bright thing"})
        listed = Path(name) / "list.jsonl"
        listed.write_text("".join(json.dumps(line) + "\n" for line in lines))
        record: dict[str, Any] = {"image_size": 640, "mean": (0.5,) * 3, "std": (0.5,) * 3}
        data = Expressions(str(listed), image_root=str(root), batch_size=8, check_images=False, **record)
        data.setup("fit")
        best = 0.0
        for _ in range(3):
            began = time.perf_counter()
            seen = sum(len(batch["image"]) for batch in data.train_dataloader())
            best = max(best, seen / (time.perf_counter() - began))
    torch.set_num_threads(threads)
    return "data pipeline, samples/s on one core at 640 pixels from JPEG (best of 3 passes)", best, "≥ 60"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=2 if DEVICE == "cpu" else 64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--images", type=Path, help="folder or .tar of JPEG files for the data pipeline")
    parser.add_argument("--out", type=Path, help="Markdown file to write to")
    args = parser.parse_args()
    rows = [data_row(args.images, 48), *memory_rows(), *step_rows(args.batch, args.rounds)]
    rows += cached_rows(4 * args.batch, args.rounds)  # with few samples the optimiser weighs most
    files = "those of --images" if args.images else "generated pictures"
    given = " --images FILE" if args.images else ""
    write_section(
        args.out,
        "Grounding, DETR-R50 and BERT-base at 640 pixels, 20 tokens, fp32",
        f"`python recipes/bench_grounding.py --batch {args.batch} --rounds {args.rounds}{given}` on {machine()}, "
        f"transformers {transformers.__version__}. Ratios of medians, taken in turns in one process; JPEG files: "
        f"{files}.\n\n{FLOOR}",
        rows,
    )


if __name__ == "__main__":
    main()
