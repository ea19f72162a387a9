"""AdaLoRA (Zhang et al., arXiv 2303.10512): low-rank changes of the weights that share a budget of ranks.

    W x + (alpha / r) P Λ Q x        P (d x r) = lora_B, Λ diagonal = lora_E, Q (r x k) = lora_A, Λ = 0 at the start
    loss + gamma mean(|PᵀP - I|_F, |QQᵀ - I|_F)

After every optimiser step the importance of each triplet (a column of P, an entry of Λ, a row of Q) is updated from
|w dL/dw|, smoothed, and its uncertainty. Between ``start`` and ``end`` of the training the budget, the number of
entries of Λ that stay, falls along a cubic from r to ``target_r`` times the number of layers; the others are set to
zero. In the last part the choice is fixed.

peft computes layers, importance and budget; the schedule is given here in shares of the training, whose length peft
wants beforehand. Deviations: pruned entries stay in the tensors, as zeros (peft cuts them off when it saves), so the
count of parameters is that before pruning; alpha is divided by the initial rank throughout, as in peft.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from petl.backbones.base import BackboneView
from petl.errors import PetlError
from petl.methods.base import register
from petl.methods.peft_targets import Target
from petl.methods.peft_tuner import ADAPTER, PeftMethod, PeftModule


class AdaLoRAModule(PeftModule):
    """The budget lives in peft's tuner and its config; `training_state` is all of it that changes."""

    method: AdaLoRA

    def regularisation(self) -> Tensor | None:
        terms = []
        for layer in self.layers:
            q, p = layer.lora_A[ADAPTER], layer.lora_B[ADAPTER]
            for gram in (q @ q.T, p.T @ p):
                terms.append(torch.linalg.matrix_norm(gram - torch.eye(len(gram), device=gram.device)))
        return self.method.gamma * torch.stack(terms).mean()

    def after_step(self, step: int, total: int) -> None:
        config = self.config
        end = max(2, int(self.method.end * total))  # peft prunes at this step by the importance of earlier ones
        start = min(int(self.method.start * total), end - 1)
        config.total_step, config.tinit, config.tfinal = total, start, total - end
        self.tuners[0].update_and_allocate(step)

    def training_state(self) -> dict[str, Tensor]:
        allocator = self.tuners[0].rankallocator
        state = {f"ipt.{n}": t for n, t in allocator.exp_avg_ipt.items()}
        state |= {f"unc.{n}": t for n, t in allocator.exp_avg_unc.items()}
        return state | {f"kept.{n}": torch.tensor(kept) for n, kept in (self.config.rank_pattern or {}).items()}

    def load_training_state(self, state: dict[str, Tensor]) -> None:
        allocator = self.tuners[0].rankallocator
        device = self.layers[0].lora_A[ADAPTER].device
        parts: dict[str, dict[str, Tensor]] = {"ipt": {}, "unc": {}, "kept": {}}
        for name, tensor in state.items():
            kind, _, path = name.partition(".")
            parts[kind][path] = tensor.to(device)
        allocator.exp_avg_ipt, allocator.exp_avg_unc = parts["ipt"], parts["unc"]
        allocator.ipt = dict(parts["ipt"])  # of the step itself: overwritten before it is read
        self.config.rank_pattern = {n: t.tolist() for n, t in parts["kept"].items()} or None


@register("adalora")
@dataclass(frozen=True)
class AdaLoRA(PeftMethod):
    """AdaLoRA: low-rank changes of the weights whose ranks are pruned in training, where they matter least.

    Args:
        r: rank at the start.
        target_r: mean rank at the end.
        alpha: the product is scaled by alpha / r.
        targets: layers (see petl.LoRA), each as a whole.
        dropout: on the input of the product.
        start: share of the training before ranks are pruned.
        end: share of the training after which the ranks stay.
        interval: steps from one pruning to the next.
        gamma: weight of the term that keeps the factors orthogonal.
        layers: blocks (see petl.LoRA).
    """

    r: int = 12
    target_r: int = 8
    alpha: float = 8
    targets: tuple[str, ...] = ("qkv",)
    dropout: float = 0.0
    start: float = 0.1
    end: float = 0.7
    interval: int = 10
    gamma: float = 0.1
    layers: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("r", "target_r", "interval"):
            self.require(name, getattr(self, name), 1)
        for name in ("alpha", "gamma"):
            self.require(name, getattr(self, name), 0, integer=False)
        for name in ("dropout", "start"):
            self.require(name, getattr(self, name), 0, integer=False, below=1)
        self.require("end", self.end, 0, integer=False)
        if self.target_r >= self.r or not self.start < self.end <= 1:
            raise PetlError(
                f"AdaLoRA(r={self.r}, target_r={self.target_r}, start={self.start}, end={self.end}): ranks fall from r "
                "to a smaller target_r, between the shares start < end of the training, which lie in [0, 1]."
            )

    def build(self, view: BackboneView) -> AdaLoRAModule:
        return AdaLoRAModule(self, view, self.find(view))

    def peft_config(self, view: BackboneView, targets: list[Target]) -> Any:
        from peft import AdaLoraConfig

        return AdaLoraConfig(
            init_r=self.r,
            target_r=self.target_r,
            lora_alpha=self.alpha,  # type: ignore[arg-type]
            lora_dropout=self.dropout,
            deltaT=self.interval,
            orth_reg_weight=self.gamma,
            total_step=1,  # until the first step tells it
            target_modules=[t.name for t in targets],
        )

    def layer_parameters(self, target: Target) -> int:
        return self.r * (target.fan_in + target.fan_out + 1)

    def layer_macs(self, target: Target, positions: int) -> int | None:
        return positions * self.r * (target.fan_in + target.fan_out)
