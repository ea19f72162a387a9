"""DARA (Liu et al., arXiv 2405.06217): domain-aware and relation-aware adapters inside two frozen encoders.

For the layers i that are paired, per modality m, with A the attention branch (after the output projection), Y the
tokens after the attention residual and U what the FFN reads (LN Y in pre-norm blocks, Y in post-norm ones):

    Y  <- X + DA_m(A)                          serial, before the residual and, in post-norm blocks, its LayerNorm
    X' <- Y + FFN(U) + RA_m(U)                 parallel to the FFN, in the same sum
    RA_m(U) = [ U_m z ‖ S z ],  z = ReLU(D_m U)       S is one map for both modalities

``variant="safe"``: DA(A) = A + s W_up ReLU(W_down A), zero up-projections: at the start the network computes what the
frozen one does. ``variant="paper"``: DA(A) = s W_up ReLU(W_down A), as figure and released code have it: attention is
replaced by the adapter's output; Kaiming-uniform W_up, since zero would delete attention; RA starts silent.

Deviations: "safe" is the default. Both branches of RA are live (in the released code the language branch is computed
and never read). The frozen encoders stay in eval; BERT keeps its token types. Widths 128 / 128 are those of the first
upload; later code has 16 / 128. No LayerNorm inside the adapters. Encoders with more layers than pairs can be adapted
at other layers than the first (``text_layers``, ``vision_layers``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from petl.backbones.base import BlockView, Call, ImageEncoder, TextEncoder
from petl.methods.base import PairModule, register
from petl.methods.pair import PairAdapter, PairedAdapters, PairMethod, PairTower

VARIANTS = ("safe", "paper")


class DARATower(PairTower):
    method: DARA

    def block(self, index: int, block: BlockView, x: Tensor, call: Call, state: Any) -> tuple[Tensor, Any]:
        j = self.pair_of.get(index)
        if j is None:
            return block.forward(x, call), state
        adapter: PairAdapter = self.adapters[j]  # type: ignore[assignment]
        a = block.attention(x, call)
        da = adapter.unimodal(a)
        y = block.after_attention(x, a + da if self.method.variant == "safe" else da)
        u = block.ffn_input(y)
        return block.after_ffn(y, block.ffn_branch(block.ffn_output(u)) + adapter.interactive(u, self.shared[j])), state

    def first_changed(self) -> int:
        return min(self.pair_of)


class DARAModule(PairedAdapters):
    def first_gradient(self) -> tuple[str, str]:
        layers = [min(t.pair_of) for t in (self.vision, self.text)]
        return f"image layer {layers[0]} and text layer {layers[1]}", "its adapters are the first trained tensors there"


@register("dara")
@dataclass(frozen=True)
class DARA(PairMethod):
    """DARA: domain-aware and relation-aware adapters inside an image and a text encoder (grounding).

    Args:
        bottleneck: width b of the domain-aware adapters.
        relation_dim: width d of the relation-aware adapters.
        shared_dim: output channels C_s of the up-projection that both encoders share.
        scale: factor s on the domain-aware adapters.
        pairs: layers adapted in each encoder; None = all layers of the shallower one.
        text_layers: which text layers where there are more than pairs: "first", "last" or "even".
        vision_layers: which image layers where there are more than pairs.
        variant: "safe" (equal to the frozen network at the start) or "paper" (adapters replace the attention branch).
    """

    variant: str = "safe"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.choose("variant", VARIANTS)

    @property
    def identity_at_start(self) -> bool:
        return self.variant == "safe"

    def build_pair(self, vision: ImageEncoder, text: TextEncoder) -> PairModule:
        return self.pair(vision, text, DARATower, DARAModule, zero_up=self.variant == "safe")
