"""M²IST (Liu et al., arXiv 2407.01131): side adapters that read two frozen encoders and never enter them.

Per paired layer i and modality m, with A the attention output after its projection and F the FFN output after its
second linear layer (both before LayerScale, dropout and residual), nothing of it with a gradient:

    S_m <- S_m + IEA_m(A) + EA_m(F)            EA: the vision or language expert, s W_up ReLU(W_down F)
    IEA_m(A) = [ U_m z ‖ S z ],  z = ReLU(D_m A)      the interaction expert; S is one map for both modalities

The stream S_m starts as the embedded tokens X_m (``side_seed="embedding"``) or at zero, and is added to the encoder's
output H_m before the vision-language encoder. The backward pass ends at the taps: it needs no activation of an encoder.

Deviations: up-projections start at zero, so that the first step sees H_m + X_m (or H_m alone with "zero"). Taps and
sums are the same in both modalities (the released code taps language after a LayerNorm, normalises its terms, and
applies that LayerNorm twice in BERT). No LayerNorm inside the adapters, encoders in eval, BERT with token types. The
unused modules of the released code are left out. CLIP's image tokens pass its final LayerNorm. Encoders with more
layers than pairs can be tapped at other layers than the first (``text_layers``, ``vision_layers``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from petl.backbones.base import BlockView, Call, ImageEncoder, TextEncoder
from petl.backbones.replay import ReplayedBlock
from petl.methods.base import PairModule, register
from petl.methods.pair import PairAdapter, PairedAdapters, PairMethod, PairTower

SEEDS = ("embedding", "zero")


class M2ISTTower(PairTower):
    """The state is the side stream (B, N, C), in fp32 whatever the dtype of the encoder."""

    method: M2IST
    has_output: ClassVar[bool] = True

    def begin(self, x: Tensor) -> Tensor:
        return x.detach().float() if self.method.side_seed == "embedding" else x.new_zeros((), dtype=torch.float32)

    def block(self, index: int, block: BlockView, x: Tensor, call: Call, state: Any) -> tuple[Tensor, Any]:
        with torch.no_grad():
            a = block.attention_output(x, call)
            y = block.after_attention(x, block.attention_branch(a))
            f = block.ffn_output(block.ffn_input(y))
            out = block.after_ffn(y, block.ffn_branch(f))
        j = self.pair_of.get(index)
        if j is None:
            return out, state
        spare = self.checkpointing or not isinstance(block, ReplayedBlock)  # beside a recording there is memory enough
        if spare and self.training and torch.is_grad_enabled():  # keep the taps alone for backward
            return out, state + checkpoint(self.experts, j, a, f, use_reentrant=False, preserve_rng_state=False)
        return out, state + self.experts(j, a, f)

    def reads(self) -> tuple[str, ...]:
        seed = ["embedded"] if self.method.side_seed == "embedding" else []
        return (*seed, *(f"{part}.{i}" for i in self.pair_of for part in ("attention", "ffn")))

    def experts(self, j: int, a: Tensor, f: Tensor) -> Tensor:
        """What pair ``j`` adds to the stream: interaction expert on A, vision or language expert on F."""
        adapter: PairAdapter = self.adapters[j]  # type: ignore[assignment]
        return adapter.interactive(a, self.shared[j]) + adapter.unimodal(f)

    def output(self, h: Tensor, state: Any) -> Tensor:
        return h.detach() + state


class M2ISTModule(PairedAdapters):
    def first_gradient(self) -> tuple[str, str]:
        return "side streams", "adapters read the encoders without a gradient; nothing inside them takes part"


@register("m2ist")
@dataclass(frozen=True)
class M2IST(PairMethod):
    """M²IST: interactive side adapters beside an image and a text encoder, no gradient inside them (grounding).

    Args:
        bottleneck: width b of the vision and language experts.
        relation_dim: width d of the interaction experts.
        shared_dim: output channels C_s of the up-projection that both modalities share.
        scale: factor s on the vision and language experts.
        pairs: layers tapped in each encoder; None = all layers of the shallower one.
        text_layers: which text layers where there are more than pairs: "first", "last" or "even".
        vision_layers: which image layers where there are more than pairs.
        side_seed: what the side streams start from: "embedding" (the embedded tokens) or "zero".
    """

    side_seed: str = "embedding"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.choose("side_seed", SEEDS)

    @property
    def identity_at_start(self) -> bool:
        return self.side_seed == "zero"

    def build_pair(self, vision: ImageEncoder, text: TextEncoder) -> PairModule:
        return self.pair(vision, text, M2ISTTower, M2ISTModule)
