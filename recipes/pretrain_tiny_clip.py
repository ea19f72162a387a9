"""Pre-train the bundled two-tower CLIP on generated scenes and CIFAR-10 photographs, and write its weights.

    python recipes/pretrain_tiny_clip.py --cifar DIR --out petl/backbones/bundled

``--cifar`` is a folder ``train/CLASS/*.jpg``, ``test/CLASS/*.jpg`` or a ``.tar.xz`` of it, or where torchvision's
CIFAR10 lies or goes (downloaded). Objective: UniCL (arXiv 2204.03610), i.e. InfoNCE in which all captions of the same
class count as positives, plus one dense term on scenes: every patch names the shape and colour of the object under
it. Half of the patches are dropped at random (FLIP, arXiv 2212.00794) until the last fifth of the run, which makes a
step cheaper and the network used to missing tokens. Runs on CPU (bf16 autocast) or GPU; a killed run goes on from its
last checkpoint.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import tarfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from petl.backbones import bundled
from petl.data import scenes

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
TEMPLATES = ("a photo of a {}", "a {}", "a small photo of a {}", "a blurry photo of a {}", "the {} in the middle")
EXTRA_WORDS = (
    "top bottom left right middle center front back behind next to near far beside between upper lower corner side "
    "leftmost rightmost topmost last biggest largest smallest bigger smaller big little tall short long closest "
    "of the a an on in at with and is above below under over from that which who person man woman boy girl child "
    "people kid guy lady player hand head hair shirt jacket coat hat pants dress shoes bag umbrella glasses bike "
    "bicycle bus train car motorcycle boat plane sheep cow elephant giraffe zebra bear bench chair table couch bed "
    "bowl plate cup bottle glass food pizza cake sandwich banana apple carrot broccoli donut book phone laptop tv "
    "clock vase plant flower tree sign light window wall brown gray grey tan dark bright number one two three four "
    "standing sitting holding wearing walking looking facing riding eating only not no digit object thing picture"
).split()


def build_tokenizer(path: Path) -> None:
    """Write the fixed word-level vocabulary: the scene grammar, CIFAR-10 captions and common referring words."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    grammar = [*scenes.SHAPES, *scenes.COLORS, *scenes.SIZES, *scenes.TEXTURES, *scenes.BACKGROUNDS, *scenes.ORDINALS]
    captions = " ".join(TEMPLATES).replace("{}", "").split()
    words = ["[PAD]", "[UNK]", "[BOS]", "[EOS]", *sorted({*grammar, *captions, *CLASSES, *EXTRA_WORDS})]
    tok = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    tok.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tok.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.Punctuation(behavior="removed")]
    )
    tok.post_processor = processors.TemplateProcessing(
        single="[BOS] $A [EOS]", special_tokens=[("[BOS]", 2), ("[EOS]", 3)]
    )
    tok.save(str(path))


def load_cifar(source: Path, split: str) -> tuple[Tensor, Tensor]:
    """Photographs (N, 3, 32, 32) uint8 and labels (N,), in a fixed order."""
    files: list[tuple[str, bytes]] = []
    if source.is_file():
        with tarfile.open(source) as tar:  # read in memory, nothing is extracted
            for member in tar:
                parts = Path(member.name).parts
                if member.isfile() and split in parts and parts[-2] in CLASSES:
                    files.append((member.name, tar.extractfile(member).read()))  # type: ignore[union-attr]
    elif (source / split).is_dir():
        files = [(str(p), p.read_bytes()) for p in (source / split).glob("*/*.jpg")]
    if files:
        files.sort()
        arrays = [np.asarray(Image.open(io.BytesIO(data)).convert("RGB")) for _, data in files]
        labels = torch.tensor([CLASSES.index(Path(name).parts[-2]) for name, _ in files])
        return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous(), labels
    from torchvision.datasets import CIFAR10

    data = CIFAR10(str(source), train=split == "train", download=True)
    return torch.from_numpy(data.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(data.targets)


def make_scenes(first: int, count: int) -> tuple[Tensor, list[str], Tensor]:
    """Pictures (N, 3, 64, 64) uint8, captions, dense targets (N, 64, 2): shape and colour of each patch, 0 = none."""
    images, captions, targets = [], [], torch.zeros(count, 64, 2, dtype=torch.long)
    grid, patch = bundled.IMAGE_SIZE // bundled.PATCH_SIZE, bundled.PATCH_SIZE
    for n in range(count):
        scene = scenes.make_scene(first + n)
        images.append(np.asarray(scene.image))
        captions.append(scene.caption)
        for thing in scene.things:
            x0, y0, x1, y1 = (v / patch for v in thing.box)
            ids = (scenes.SHAPES.index(thing.shape) + 1, list(scenes.COLORS).index(thing.color) + 1)
            for row in range(max(0, round(y0)), min(grid, max(round(y1), round(y0) + 1))):
                for col in range(max(0, round(x0)), min(grid, max(round(x1), round(x0) + 1))):
                    targets[n, row * grid + col] = torch.tensor(ids)
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous(), captions, targets


def augment(x: Tensor, gen: torch.Generator) -> Tensor:
    """CIFAR pictures (B, 3, 32, 32) in [0, 1] -> (B, 3, 64, 64): crop, flip, brightness, contrast, sometimes grey."""
    b = len(x)
    x = F.pad(x, (4, 4, 4, 4), mode="reflect")
    dy, dx = torch.randint(0, 9, (2, b), generator=gen)
    rows, cols = dy[:, None] + torch.arange(32), dx[:, None] + torch.arange(32)
    x = x[torch.arange(b)[:, None, None], :, rows[:, :, None], cols[:, None, :]].permute(0, 3, 1, 2)
    x = torch.where(torch.rand(b, 1, 1, 1, generator=gen) < 0.5, x.flip(-1), x)
    contrast, brightness = (torch.rand(b, 1, 1, 1, generator=gen) for _ in range(2))
    x = (x - 0.5) * (0.7 + 0.6 * contrast) + 0.4 + 0.2 * brightness
    x = torch.where(torch.rand(b, 1, 1, 1, generator=gen) < 0.15, x.mean(1, keepdim=True).expand_as(x), x)
    return F.interpolate(x, size=64, mode="bicubic", antialias=False).clamp(0, 1)


class TinyCLIP(nn.Module):
    """Both towers, the learned temperature, and the dense heads that are thrown away after pre-training."""

    def __init__(self) -> None:
        super().__init__()
        self.vision = bundled.vision(pretrained=False, num_classes=bundled.EMBED_DIM)
        self.text = bundled.text(pretrained=False)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        self.dense = nn.Linear(bundled.WIDTH, len(scenes.SHAPES) + 1 + len(scenes.COLORS) + 1)
        self.mean, self.std = (torch.tensor(v).view(1, 3, 1, 1) for v in (bundled.MEAN, bundled.STD))

    def tokens(self, images: Tensor, keep: Tensor | None = None) -> Tensor:
        """Tokens (B, 1 + kept, C) after the final norm; ``keep`` (B, kept) indexes the patches that are seen."""
        v = self.vision
        x = v._pos_embed(v.patch_embed((images - self.mean.to(images)) / self.std.to(images)))
        if keep is not None:
            x = torch.cat([x[:, :1], x[:, 1:].gather(1, keep[..., None].expand(-1, -1, x.shape[-1]))], 1)
        return v.norm(v.blocks(x))

    def encode_text(self, captions: list[str]) -> Tensor:
        batch = bundled.tokenizer()(captions, padding=True, truncation=True, return_tensors="pt")
        device = self.logit_scale.device
        out = self.text(input_ids=batch["input_ids"].to(device), attention_mask=batch["attention_mask"].to(device))
        return F.normalize(out.text_embeds.float(), dim=-1)

    def encode_image(self, images: Tensor) -> Tensor:
        return F.normalize(self.vision.head(self.tokens(images)[:, 0]).float(), dim=-1)


def unicl(image: Tensor, text: Tensor, scale: Tensor, group: Tensor) -> Tensor:
    """Two-way InfoNCE where entries of the same ``group`` are positives of each other (UniCL, eq. 3-5)."""
    logits = scale.exp().clamp(max=100) * image @ text.T  # (B, B)
    same = (group[:, None] == group[None, :]).float()
    target = same / same.sum(1, keepdim=True)
    both = F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)
    return both / 2


@torch.no_grad()
def evaluate(model: TinyCLIP, cifar: tuple[Tensor, Tensor], device: str) -> dict[str, float]:
    """Held-out figures: zero-shot CIFAR-10 test accuracy, and picture -> caption retrieval among 200 unseen scenes."""
    model.eval()
    images, labels = cifar
    texts = model.encode_text([TEMPLATES[0].format(c) for c in CLASSES])
    hits = 0
    for start in range(0, len(images), 500):
        x = F.interpolate(images[start : start + 500].to(device).float() / 255, size=64, mode="bicubic").clamp(0, 1)
        hits += int(((model.encode_image(x) @ texts.T).argmax(1).cpu() == labels[start : start + 500]).sum())
    pictures, captions, _ = make_scenes(10_000_000, 200)
    rank = model.encode_image(pictures.to(device).float() / 255) @ model.encode_text(captions).T
    right = [captions[j] == captions[i] for i, j in enumerate(rank.argmax(1).tolist())]
    model.train()
    return {"cifar10_zero_shot": hits / len(images), "scene_retrieval_at_1_of_200": sum(right) / len(right)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cifar", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=bundled.ROOT)
    parser.add_argument("--steps", type=int, default=2400)
    parser.add_argument("--photos", type=int, default=160, help="photographs in a batch")
    parser.add_argument("--scenes", type=int, default=96, help="scenes in a batch")
    parser.add_argument("--pool", type=int, default=40_000, help="scenes generated before training")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    args.out.mkdir(parents=True, exist_ok=True)
    build_tokenizer(args.out / "tokenizer.json")  # a changed vocabulary must go to the package itself: the default

    torch.manual_seed(args.seed)
    model = TinyCLIP().to(device)
    decay = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW([{"params": decay, "weight_decay": 0.05}, {"params": rest, "weight_decay": 0.0}],
                                  lr=args.lr, betas=(0.9, 0.98))  # fmt: skip
    photos, labels = load_cifar(args.cifar, "train")
    held_out = load_cifar(args.cifar, "test")
    pictures, captions, dense = make_scenes(0, args.pool)
    print(
        f"{len(photos)} photographs, {len(pictures)} scenes, {sum(p.numel() for p in model.parameters()):,} parameters"
    )

    state, step, first, began = args.out / "pretrain.ckpt", 0, 0, time.time()
    if state.exists():
        saved = torch.load(state, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        first = step = saved["step"]
    while step < args.steps:
        gen = torch.Generator().manual_seed(args.seed * 1_000_003 + step)  # a step is a function of its number
        warm, progress = min(1.0, (step + 1) / 150), step / args.steps
        for group in optimizer.param_groups:
            group["lr"] = args.lr * warm * 0.5 * (1 + math.cos(math.pi * progress))
        i = torch.randint(0, len(photos), (args.photos,), generator=gen)
        j = torch.randint(0, len(pictures), (args.scenes,), generator=gen)
        x = torch.cat([augment(photos[i].float() / 255, gen), pictures[j].float() / 255]).to(device)
        t = torch.randint(0, len(TEMPLATES), (args.photos,), generator=gen).tolist()
        texts = [TEMPLATES[k].format(CLASSES[c]) for k, c in zip(t, labels[i].tolist())]
        texts += [captions[k] for k in j.tolist()]
        group_ids = torch.cat([labels[i], 100 + j]).to(device)
        keep = None
        if progress < 0.8:
            keep = torch.rand(len(x), 64, generator=gen).argsort(1)[:, :32].to(device)
        with torch.autocast(device, dtype=torch.bfloat16):
            tokens = model.tokens(x, keep)
            image = model.vision.head(tokens[:, 0])
            patch_logits = model.dense(tokens[args.photos :, 1:]).float()
        target = dense[j].to(device)
        if keep is not None:
            target = target.gather(1, keep[args.photos :, :, None].expand(-1, -1, 2))
        shape, color = patch_logits.split([len(scenes.SHAPES) + 1, len(scenes.COLORS) + 1], -1)
        local = F.cross_entropy(shape.flatten(0, 1), target[..., 0].flatten()) + F.cross_entropy(
            color.flatten(0, 1), target[..., 1].flatten()
        )
        match = unicl(F.normalize(image.float(), dim=-1), model.encode_text(texts), model.logit_scale, group_ids)
        loss = match + 0.25 * local
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        if step % 20 == 0:
            rate = (step - first) * len(x) / (time.time() - began)
            print(f"step {step} match {match.item():.3f} dense {local.item():.3f} {rate:.0f} img/s", flush=True)
        if step % 200 == 0:
            torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}, state)
        if step % 800 == 0:
            print(json.dumps(evaluate(model, held_out, device)), flush=True)

    half = {k: v.detach().half().cpu().contiguous() for k, v in model.state_dict().items()}
    for tower in ("vision", "text"):
        part = {k.removeprefix(f"{tower}."): v for k, v in half.items() if k.startswith(f"{tower}.")}
        save_file(part, args.out / f"{tower}.safetensors")
    card = {
        "recipe": "recipes/pretrain_tiny_clip.py", "seed": args.seed, "steps": args.steps, "lr": args.lr,
        "batch": {"photos": args.photos, "scenes": args.scenes}, "scene_pool": args.pool,
        "data": {"photos": "CIFAR-10 train (50,000)", "scenes": f"petl/data/scenes.py version {scenes.VERSION}"},
        "held_out": evaluate(model, held_out, device), "torch": torch.__version__, "device": device,
        "parameters": {t: sum(v.numel() for k, v in half.items() if k.startswith(f"{t}.")) for t in ("vision", "text")},
    }  # fmt: skip
    (args.out / "MODEL.json").write_text(json.dumps(card, indent=2) + "\n")
    state.unlink(missing_ok=True)
    print(json.dumps(card["held_out"]))


if __name__ == "__main__":
    main()
