"""What a model costs: trained parameters, multiply-accumulates, and bytes kept for the backward pass.

Counted, not estimated, and without running the network: a copy whose tensors have shapes but no data (torch's
`FakeTensorMode`) goes through the same operations and the same autograd. MACs come from torch's flop counter, bytes
from what autograd keeps for batches of two and three images: at one image some copies vanish that larger batches make.
Attention masks count as they do on a batch with padding (a real run without any skips them).
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary, WeakSet, finalize

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from petl.errors import PetlError
from petl.methods.attach import attached
from petl.methods.base import MethodModule, PairModule, TowerModule

UNITS = {"gb": 10**9, "gib": 2**30, "mb": 10**6, "mib": 2**20}


@dataclass(frozen=True)
class SavedBytes:
    """Bytes that grow with the batch: ``per_image`` (slope over the batch size) and ``constant``."""

    per_image: int
    constant: int

    def largest_batch(self, room: int) -> int:
        """The largest batch whose bytes fit into ``room``; 0 = not even one image does."""
        return max(0, (room - self.constant) // max(1, self.per_image))


class Part(NamedTuple):
    """Parameters under one path of the model, and how many of them are trained."""

    path: str
    parameters: int
    trained: int


class KeptFrom(NamedTuple):
    """``first``: the first block of an encoder in whose forward pass something is kept for backward that is no
    parameter; None = in no block."""

    encoder: str
    first: int | None
    depth: int

    def __str__(self) -> str:
        if self.first is None:
            return f"in no block of the {self.encoder}"
        return f"in the {self.encoder} from block {self.first} on (of 0 to {self.depth - 1})"


@dataclass(frozen=True)
class Report:
    """Counts of a model with a method attached.

    ``trainable``: parameters of the method; ``head``: of the classification head, or of the vision-language part of a
    grounding model, whose ``macs`` and ``saved_bytes`` are those of an image with its expression; ``total``: of
    everything; ``backbone``: without head and what the method added. ``macs``: multiply-accumulates of one image,
    forward ("GFLOPs" in most papers are 10^9 of these). ``saved_bytes``: kept for backward; ``peak_bytes``: the most
    that lives at once in the forward pass of training, those among them. ``weight_bytes``: of all parameters and
    buffers; ``trained_bytes``: of the trained ones. ``first_gradient``: where the backward pass ends in the backbone,
    and why; ``kept_from``: the blocks that keep activations for it. ``parts``: parameters by module. ``counted``: in
    which precision, and how.
    """

    method: str
    input_size: tuple[int, int, int]
    trainable: int
    head: int
    total: int
    backbone: int
    macs: int
    saved_bytes: SavedBytes
    peak_bytes: SavedBytes
    weight_bytes: int
    trained_bytes: int
    first_gradient: tuple[str, str]
    kept_from: tuple[KeptFrom, ...]
    parts: tuple[Part, ...]
    counted: str

    @property
    def fixed_bytes(self) -> int:
        """Weights, one gradient for each trained parameter, and the two moments that AdamW keeps of it."""
        return self.weight_bytes + 3 * self.trained_bytes

    def largest_batch(self, memory: int) -> int:
        """The largest batch of a training step in ``memory`` bytes, by this forecast; 0 = not even one image fits.

        Not in it: the CUDA context, workspace of kernels, fragmentation of the allocator, and what only the backward
        pass makes.
        """
        room = memory - self.fixed_bytes
        return min(self.saved_bytes.largest_batch(room), self.peak_bytes.largest_batch(room))

    def batch_line(self, memory: int) -> str:
        """`largest_batch` in words."""
        batch, given = self.largest_batch(memory), f"{memory / 1e9:.4g} GB"
        fits = f"at most {batch:,} images" if batch else "not even one image"
        return (
            f"batch       {fits} in {given}: weights, gradients, AdamW state, activations (not counted: CUDA context, "
            "workspace of kernels, allocator fragmentation, temporaries of the backward pass)"
        )

    def table(self) -> str:
        """Parameters by module; the columns add up to the last line."""
        rows = [("module", "parameters", "trained"), *((p, f"{n:,}", f"{t:,}") for p, n, t in self.parts),
                ("all", f"{self.total:,}", f"{self.trainable + self.head:,}")]  # fmt: skip
        wide, *columns = (max(len(row[i]) for row in rows) for i in range(3))
        return "\n".join(f"  {p:<{wide}}  {n:>{columns[0]}}  {t:>{columns[1]}}" for p, n, t in rows)

    def __str__(self) -> str:
        share = 100 * self.trainable / self.backbone
        saved, peak, trained = self.saved_bytes, self.peak_bytes, self.trained_bytes
        return "\n".join(
            [
                f"method      {self.method}, input {'x'.join(map(str, self.input_size))}",
                f"parameters  {self.trainable:,} trained ({share:.2f} % of the backbone's {self.backbone:,}) "
                f"+ {self.head:,} in the head",
                f"compute     {self.macs / 1e9:.3f} GMACs per image, forward",
                f"memory      {saved.per_image / 2**20:.2f} MiB per image kept for backward"
                f" + {saved.constant / 2**20:.2f} MiB whatever the batch; {peak.per_image / 2**20:.2f} MiB per image "
                "at the peak of the forward pass",
                f"fixed       {self.weight_bytes / 2**20:.1f} MiB of weights + {trained / 2**20:.1f} MiB of gradients"
                f" + {2 * trained / 2**20:.1f} MiB of AdamW state",
                f"gradient    goes back to {self.first_gradient[0]}: {self.first_gradient[1]}; "
                f"activations are kept {' and '.join(map(str, self.kept_from))}",
                f"counted     {self.counted}",
            ]
        )


def parse_memory(text: str) -> int:
    """Bytes of "8GB", "7.5 GiB", "900MB" (powers of 1000) or "900MiB" (powers of 1024)."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]+)\s*", text.lower())
    if not found or found[2] not in UNITS:
        raise PetlError(f"memory {text!r}: give a number with its unit GB, GiB, MB or MiB, such as 24GB.")
    return int(float(found[1]) * UNITS[found[2]])


def count_macs(model: nn.Module, *inputs: Tensor) -> int:
    """Multiply-accumulates of one forward pass on ``inputs`` (matrix products and convolutions, as papers count)."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(*inputs)
    return counter.get_total_flops() // 2


def count_saved_bytes(model: nn.Module, *inputs: Tensor) -> int:
    """Bytes of distinct storages that autograd keeps for backward after a forward pass, without parameters."""
    return _kept(model, inputs, ())[0]


def _kept(model: nn.Module, inputs: tuple[Tensor, ...], towers: Iterable[TowerModule]) -> tuple[int, list[int | None]]:
    """`count_saved_bytes`, and of each of ``towers`` the first block in whose forward pass some of it is kept."""
    weights, running = _storages(model), list[tuple[int, int]]()
    kept: WeakKeyDictionary[torch.UntypedStorage, int] = WeakKeyDictionary()  # without what is freed on the way
    where: WeakKeyDictionary[torch.UntypedStorage, tuple[int, int]] = WeakKeyDictionary()

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage not in weights:
            kept[storage] = storage.nbytes()
            if running:
                where.setdefault(storage, running[-1])
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), _noting(towers, running):
        out = model(*inputs)
    found = sum(kept.values())
    first = [min((i for j, i in where.values() if j == tower), default=None) for tower, _ in enumerate(towers)]
    del out  # held until here, and the graph with it
    return found, first


@contextmanager
def _noting(towers: Iterable[TowerModule], running: list[tuple[int, int]]) -> Iterator[None]:
    """While a block runs, ``running`` ends with the index of its tower and its own."""
    handles = []
    for j, tower in enumerate(towers):
        for i, block in enumerate(tower.view.block_modules()):
            handles.append(block.register_forward_pre_hook(lambda *_, at=(j, i): running.append(at)))
            handles.append(block.register_forward_hook(lambda *_: running.clear()))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _storages(model: nn.Module) -> set[torch.UntypedStorage]:
    """What parameters and buffers lie in. Storages are told apart as objects: without data they have no address."""
    return {t.untyped_storage() for t in (*model.parameters(), *model.buffers())}


class _Live(TorchDispatchMode):
    """Counts the bytes of the storages that operations make, while they live. ``peak``: the most at once."""

    def __init__(self, model: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        super().__init__()
        self.peak = self.now = 0
        self.seen = WeakSet(_storages(model) | {t.untyped_storage() for t in inputs})

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.untyped_storage() not in self.seen:
                self._add(tensor.untyped_storage())
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        size = storage.nbytes()
        self.seen.add(storage)
        self.now += size
        self.peak = max(self.peak, self.now)
        finalize(storage, self._drop, size)

    def _drop(self, size: int) -> None:
        self.now -= size


def report(
    model: nn.Module, input_size: tuple[int, int, int] | None = None, autocast: torch.dtype | None = None
) -> Report:
    """Count what ``model`` costs; the model itself is neither run nor changed.

    Args:
        model: a model after `petl.attach`, a `petl.Classifier` around one, or a `petl.GroundingModel`.
        input_size: (3, H, W) in pixels; None = what the backbone was trained on.
        autocast: dtype of mixed precision in training, such as torch.bfloat16; None = the model's own dtype throughout.

    Raises:
        PetlError: no method is attached.
    """
    from petl.models.grounding import GroundingModel

    module: MethodModule | PairModule
    heads: list[nn.Module]
    if isinstance(model, GroundingModel):
        if input_size not in (None, (3, model.image_size, model.image_size)):
            raise PetlError(
                f"this grounding model was built for images of {model.image_size} pixels, not {input_size}."
            )
        size, module, heads = (3, model.image_size, model.image_size), model.petl, [model.head]
    else:
        size, module, heads = _single(model, input_size)
    counts, how = _count(model, size, autocast)
    precision = str(autocast or next(model.parameters()).dtype).removeprefix("torch.")
    parameters = dict(model.named_parameters())
    trained = [p for p in parameters.values() if p.requires_grad]
    head = sum(p.numel() for m in heads for p in m.parameters())
    total = sum(p.numel() for p in parameters.values())
    trainable = sum(p.numel() for p in trained) - head
    return Report(
        method=module.method.name,
        input_size=size,
        trainable=trainable,
        head=head,
        total=total,
        backbone=total - head - _added(module),
        macs=counts.macs,
        saved_bytes=counts.saved,
        peak_bytes=counts.peak,
        weight_bytes=_bytes([*parameters.values(), *model.buffers()]),
        trained_bytes=_bytes(trained),
        first_gradient=module.first_gradient(),
        kept_from=counts.kept_from,
        parts=_parts(parameters),
        counted=f"{'under autocast to' if autocast else 'in'} {precision}, {how}",
    )


def _added(module: MethodModule | PairModule) -> int:
    """Parameters that the method brought, wherever in the model they lie."""
    inside = (p for t in _towers(module).values() for n, p in t.view.model.named_parameters() if t.owns(n))
    return sum(p.numel() for p in {*module.parameters(), *inside})


def _towers(module: MethodModule | PairModule) -> dict[str, TowerModule]:
    """The halves of a method by the encoder that each is for."""
    if isinstance(module, PairModule):
        return {"image encoder": module.vision, "text encoder": module.text}
    return {"backbone": module}


class _Counts(NamedTuple):
    saved: SavedBytes
    peak: SavedBytes
    macs: int
    kept_from: tuple[KeptFrom, ...]


def _count(model: nn.Module, size: tuple[int, int, int], autocast: torch.dtype | None) -> tuple[_Counts, str]:
    """The counts of a copy of ``model``, and how they were obtained."""
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    try:
        with FakeCopyMode(fake):
            twin = copy.deepcopy(model)
        with fake:
            return _run(twin, size, autocast), "on tensors without data"
    except PetlError:
        raise
    except Exception as error:  # an operation that needs values, or whose result's shape torch does not know beforehand
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        device = next(model.parameters()).device.type
        return _run(copy.deepcopy(model), size, autocast), f"by running it on {device} ({reason})"


def _run(model: nn.Module, size: tuple[int, int, int], autocast: torch.dtype | None) -> _Counts:
    model.train()
    saved, peak, first = {}, {}, list[int | None]()
    towers = _towers(_module(model))
    for n in (2, 3):
        inputs = _inputs(model, n, size)
        with (
            torch.autocast(inputs[0].device.type, autocast, enabled=autocast is not None),
            _Live(model, inputs) as live,
        ):
            saved[n], first = _kept(model, inputs, towers.values())
        peak[n] = live.peak
    macs = count_macs(model.eval(), *_inputs(model, 1, size))
    kept = (KeptFrom(name, i, t.view.depth) for (name, t), i in zip(towers.items(), first, strict=True))
    return _Counts(_line(saved), _line(peak), macs, tuple(kept))


def _line(counted: dict[int, int]) -> SavedBytes:
    """Slope and constant from the bytes at batches of 2 and 3."""
    return SavedBytes(per_image=counted[3] - counted[2], constant=3 * counted[2] - 2 * counted[3])


def _inputs(model: nn.Module, count: int, size: tuple[int, int, int]) -> tuple[Tensor, ...]:
    """Blank inputs of ``count`` samples."""
    from petl.models.grounding import GroundingModel

    if isinstance(model, GroundingModel):
        return model.example(count)
    like = next(model.parameters())
    return (torch.zeros(count, *size, device=like.device, dtype=like.dtype),)


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def _parts(parameters: dict[str, nn.Parameter]) -> tuple[Part, ...]:
    """Parameters by path: down to the first number in it (a list of blocks), and at most three names deep."""
    found: dict[str, list[nn.Parameter]] = {}
    for name, parameter in parameters.items():
        names = name.split(".")
        names = names[:-1] if len(names) > 2 else names
        stop = next((i for i, word in enumerate(names) if word.isdigit()), 3)
        found.setdefault(".".join(names[: min(stop, 3)]), []).append(parameter)
    return tuple(
        Part(path, sum(p.numel() for p in group), sum(p.numel() for p in group if p.requires_grad))
        for path, group in found.items()
    )


def _module(model: nn.Module) -> MethodModule | PairModule:
    """The method module of whatever `report` takes."""
    from petl.backbones.classifier import Classifier
    from petl.models.grounding import GroundingModel

    if isinstance(model, GroundingModel):
        return model.petl
    return attached(model.backbone if isinstance(model, Classifier) else model)


def _single(
    model: nn.Module, input_size: tuple[int, int, int] | None
) -> tuple[tuple[int, int, int], MethodModule, list[nn.Module]]:
    """Input size, method module and heads of a backbone with a method, or of a classifier around one."""
    from petl.backbones.classifier import Classifier

    module = attached(model.backbone if isinstance(model, Classifier) else model)
    heads = [m for _, m in module.view.head_modules()] + ([model.head] if isinstance(model, Classifier) else [])
    return input_size or tuple(module.view.preprocessing["input_size"]), module, heads
