"""What a frozen network computes, kept once and read back.

A *tap* is a tensor of the frozen network for a batch. Names: "embedded" (what enters block 0), "block.i" (output of
block i), "attention.i" and "ffn.i" (A and F of `BlockView`), "mask" (bool, (B, 1 or N, N): what each token attends to,
the same in all blocks). A `Recorder` takes the place of a method for one pass and
keeps taps; a `ReplayedBlock` answers with them, so that the method runs its own code on recorded tensors as it would
on fresh ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from petl.backbones.base import BlockView, Call
from petl.errors import PetlError

MASK = "mask"


class Recorder:
    """Runs the blocks as the frozen network does and keeps ``names`` in ``taps``."""

    def __init__(self, names: Iterable[str]) -> None:
        self.names, self.taps = frozenset(names), dict[str, Tensor]()

    def step(self, index: int, block: BlockView, x: Tensor, call: Call) -> Tensor:
        if index == 0:
            self._keep("embedded", x)
            if MASK in self.names:
                self._keep(MASK, _whole_mask(call, x))
        if self.names & {f"attention.{index}", f"ffn.{index}"}:
            a = block.attention_output(x, call)
            y = block.after_attention(x, block.attention_branch(a))
            f = block.ffn_output(block.ffn_input(y))
            out = block.after_ffn(y, block.ffn_branch(f))
            self._keep(f"attention.{index}", a)
            self._keep(f"ffn.{index}", f)
        else:
            out = block.forward(x, call)
        self._keep(f"block.{index}", out)
        return out

    def _keep(self, name: str, tap: Tensor) -> None:
        if name in self.names:
            self.taps[name] = tap.detach()


def visible(call: Call, tokens: int, device: torch.device) -> Tensor | None:
    """What each token of a frozen block attends to: bool (B or 1, T or 1, T), or None where it is everything.

    Raises:
        PetlError: the block has a mask of another kind than sdpa, eager and flash attention take.
    """
    mask = call.args[0] if call.args else call.kwargs.get("attention_mask", call.kwargs.get("attn_mask"))
    keep = None
    if isinstance(mask, Tensor) and mask.ndim == 4 and mask.shape[1] == 1:  # sdpa: bool; eager: 0 or very negative
        keep = (mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2)[:, 0]
    elif isinstance(mask, Tensor) and mask.ndim == 2 and "attn_mask" not in call.kwargs:  # flash: (B, T), 1 on words
        keep = mask.bool()[:, None]
    elif mask is not None:
        shape = f" of shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else ""
        raise PetlError(
            f"ladder_side_tuning cannot read the attention mask of this backbone, a {type(mask).__name__}{shape}; it "
            "takes one of (B, 1, 1 or T, T). In an HF model, model.set_attn_implementation('sdpa') makes such masks."
        )
    if call.kwargs.get("is_causal"):
        causal = torch.ones(1, tokens, tokens, dtype=torch.bool, device=device).tril()
        keep = causal if keep is None else keep & causal
    return keep


def _whole_mask(call: Call, x: Tensor) -> Tensor:
    """`visible` of tokens (B, N, C) as a tensor for each sample: (B, 1, N) where all tokens attend to the same."""
    keep = visible(call, x.shape[1], x.device)
    if keep is None:
        keep = torch.ones(1, 1, x.shape[1], dtype=torch.bool, device=x.device)
    if (keep == keep[:, :1]).all():
        keep = keep[:, :1]
    return keep.expand(len(x), -1, -1).clone()


def replayed_call(taps: Mapping[str, Tensor]) -> Call:
    """The call of the blocks of a recorded pass. Like Hugging Face's models without a mask where all is attended to."""
    keep = taps.get(MASK)
    return Call() if keep is None or keep.all() else Call(kwargs={"attention_mask": keep[:, None]})


class ReplayedBlock(BlockView):
    """Block ``index`` of a recorded pass, in ``dtype``; what was not recorded of it hands its input on."""

    def __init__(self, index: int, taps: Mapping[str, Tensor], dtype: torch.dtype) -> None:
        self.index, self.taps, self.dtype = index, taps, dtype

    def _tap(self, part: str, otherwise: Tensor) -> Tensor:
        found = self.taps.get(f"{part}.{self.index}")
        return otherwise if found is None else found.to(self.dtype)

    def forward(self, x: Tensor, call: Call) -> Tensor:
        return self._tap("block", x)

    def attend(self, n: Tensor, call: Call) -> Tensor:
        return self._tap("attention", n)

    def after_attention(self, x: Tensor, branch: Tensor) -> Tensor:
        return x

    def ffn_input(self, y: Tensor) -> Tensor:
        return y

    def ffn_output(self, u: Tensor) -> Tensor:
        return self._tap("ffn", u)

    def after_ffn(self, y: Tensor, branch: Tensor) -> Tensor:
        return self._tap("block", y)


class _Reached(Exception):
    """Ends a pass whose rest is not needed."""


@contextmanager
def stopping_after(block: nn.Module, into: list[Tensor]) -> Iterator[None]:
    """The pass in here ends behind ``block``, whose output is put into ``into``."""

    def stop(module: nn.Module, args: object, output: Tensor | tuple[Tensor, ...]) -> None:
        into.append(output[0] if isinstance(output, tuple) else output)
        raise _Reached

    handle = block.register_forward_hook(stop)
    try:
        yield
    except _Reached:
        pass
    finally:
        handle.remove()
