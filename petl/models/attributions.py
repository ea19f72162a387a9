"""Attributions of one class to the players of an explained classifier: AutoGnothi, and what it is compared with.

All functions of `ATTRIBUTIONS` have one signature, ``fn(model, x, classes, generator) -> (B, n)`` in fp32: B inputs,
``classes`` (B,) long, n players (zero beyond the n_i of an input). They leave the model as it was. Options have
defaults; `functools.partial` sets others. Settings follow the benchmark of ViT-Shapley (arXiv 2206.05282; sheet
autognothi.md, 4.5), where not said otherwise:

    attention, gradients       of the classifier itself: what it computes on the full input
    leave-one-out, RISE,       of the game v(S), ``model.values``: the surrogate, players removed as everywhere
    KernelSHAP

Captum does integrated gradients and GradCAM. Its KernelSHAP takes one input at a time and unpaired coalitions, and it
has no rollout and no RISE; these are written here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from petl.backbones.base import BackboneView
from petl.backbones.players import Players
from petl.errors import PetlError, nearest
from petl.models.explained import ExplainedClassifier, Inputs, select
from petl.nn.shapley import MAX_PLAYERS, coalitions, kernel_masks, kernel_shap, kernel_weights

Attribution = Callable[[ExplainedClassifier, Inputs, Tensor, torch.Generator | None], Tensor]


class Inapplicable(PetlError):
    """This classifier does not let an attribution see what it needs; others work."""


def by_count(players: Players) -> Iterator[tuple[int, Tensor]]:
    """(n, the inputs of a batch that have n players), n ascending. Images are one group."""
    for n in players.counts.unique().tolist():
        yield n, (players.counts == n).nonzero()[:, 0]


def class_values(
    model: ExplainedClassifier, x: Inputs, masks: Tensor, classes: Tensor, players: Players | None = None
) -> Tensor:
    """v_c(S) of one class per input: coalitions bool (B, K, n), ``classes`` (B,) -> (B, K), fp32."""
    values = model.values(x, masks, players)  # (B, K, C)
    return values.gather(2, classes[:, None, None].expand(-1, values.shape[1], 1))[..., 0]


# ---- the method itself, and none


@torch.no_grad()
def autognothi(
    model: ExplainedClassifier, x: Inputs, classes: Tensor, generator: torch.Generator | None = None
) -> Tensor:
    """What the trained explainer says, (B, n)."""
    values = model.explain(x).values  # (B, n, C)
    return values.gather(2, classes[:, None, None].expand(-1, values.shape[1], 1))[..., 0]


def random(model: ExplainedClassifier, x: Inputs, classes: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Uniform numbers (B, n), drawn on the CPU."""
    players = model.players(x)
    drawn = torch.rand(len(players.counts), players.most, generator=generator)
    return drawn.to(players.of.device) * players.valid


# ---- attention


class _Watch(TorchFunctionMode):
    """Sees the attention of every block where the libraries compute it, whatever their modules are called."""

    SOFTMAX = (F.softmax, torch.softmax, Tensor.softmax)  # of attention that is not fused

    def __init__(self, width: int) -> None:
        self.width = width
        self.maps: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is F.scaled_dot_product_attention:
            query = args[0] if args else kwargs["query"]  # (B, H, T, D)
            if query.shape[1] * query.shape[3] == self.width:  # ladder side-tuning has narrow attention of its own
                self._keep(_attention_weights(*args, **(kwargs or {})))
        elif func in self.SOFTMAX:
            self._keep(out)
        return out

    def _keep(self, weights: Tensor) -> None:
        if weights.ndim == 4 and weights.shape[-2] == weights.shape[-1]:  # (B, H, T, T); pooling heads have one query
            self.maps.append(weights.float().mean(1))


def _attention_weights(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *args: Any, **options: Any
) -> Tensor:
    """(B, H, T, T), what `F.scaled_dot_product_attention` multiplies ``value`` by; its arguments."""
    scale = options.get("scale")
    scores = query.float() @ key.float().transpose(-2, -1) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, -torch.inf) if attn_mask.dtype == torch.bool else scores + attn_mask
    return scores.softmax(-1)


@torch.no_grad()
def attention_maps(model: ExplainedClassifier, x: Inputs) -> list[Tensor]:
    """Head means of the attention of every block, (B, T, T) from query to key, rows sum to 1, fp32.

    Raises:
        Inapplicable: an attention implementation whose weights are not seen.
    """
    with _Watch(model.view.width) as watch:
        model.logits(x)
    if len(watch.maps) != model.view.depth:
        raise Inapplicable(
            f"{len(watch.maps)} attention maps were seen in {model.view.depth} blocks of this {model.view.family}: the "
            "attention attributions need scaled_dot_product_attention or eager attention in each block, as "
            "model.set_attn_implementation('sdpa') gives, and no compiled classifier."
        )
    return watch.maps


def rollout(maps: list[Tensor]) -> Tensor:
    """Attention rollout (Abnar and Zuidema, arXiv 2005.00928): the product of (A_l + I) / 2, last block leftmost.

    ``maps``: (B, T, T) with rows of sum 1, first block first -> (B, T, T), rows sum to 1.
    """
    eye = torch.eye(maps[0].shape[-1], device=maps[0].device)
    joint = eye.expand_as(maps[0])
    for attention in maps:
        joint = (attention + eye) / 2 @ joint
    return joint


def _read(model: ExplainedClassifier, x: Inputs, attention: Tensor) -> Tensor:
    """The class token's row of (B, T, T) as players (B, n); the mean row where patches are pooled."""
    row = attention[:, 0] if model.petl.surrogate.pools_class_token else attention.mean(1)
    return model.players(x).total(row[..., None])[..., 0]


def attention_rollout(
    model: ExplainedClassifier, x: Inputs, classes: Tensor, generator: torch.Generator | None = None
) -> Tensor:
    """The class token's row of the `rollout`, (B, n); the same for every class. Raises like `attention_maps`."""
    return _read(model, x, rollout(attention_maps(model, x)))


def attention_last(
    model: ExplainedClassifier, x: Inputs, classes: Tensor, generator: torch.Generator | None = None
) -> Tensor:
    """The class token's attention in the last block, (B, n); the same for every class. Raises like `attention_maps`."""
    return _read(model, x, attention_maps(model, x)[-1])


# ---- gradients of the classifier


@contextmanager
def _differentiable(x: Inputs, classes: Tensor) -> Iterator[tuple[Inputs, Tensor]]:
    """Gradients work inside, under ``no_grad`` and ``inference_mode`` too: these want tensors of their own."""
    with torch.inference_mode(False), torch.enable_grad():
        yield {k: v.clone() for k, v in x.items()} if isinstance(x, Mapping) else x.clone(), classes.clone()


def _logits(model: ExplainedClassifier, x: Inputs) -> tuple[tuple[Tensor, ...], Callable[..., Tensor]]:
    """The tensors of a batch, and the classifier's logits as a function of them: what captum works with."""
    names = list(x) if isinstance(x, Mapping) else []

    def logits(*tensors: Tensor) -> Tensor:
        found = model.logits(dict(zip(names, tensors, strict=True)) if names else tensors[0])
        if torch.is_grad_enabled() and not found.requires_grad:
            raise Inapplicable(
                "no gradient comes through this classifier: its method runs the blocks without one (as ladder "
                "side-tuning does), so GradCAM and integrated gradients have nothing to read."
            )
        return found

    return (tuple(x.values()) if isinstance(x, Mapping) else (x,)), logits


def gradcam(model: ExplainedClassifier, x: Inputs, classes: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """GradCAM on tokens (B, n), arXiv 1610.02391, signed (without its ReLU), of the class logit.

    Activations are the normalised tokens that enter the last attention: the last block's output has no gradient at the
    patches where a class token is read. Weights of channels are gradients averaged over the tokens of players.

    Raises:
        Inapplicable: the classifier's method cuts the gradient.
    """
    from captum.attr import LayerGradCam

    block = model.view.block_modules()[-1]
    norm = next((m for m in block.modules() if isinstance(m, nn.LayerNorm)), None) if model.view.norm_first else None
    with _differentiable(x, classes) as (x, classes):
        players = model.players(x)
        of_players, channels_first = (players.of >= 0)[..., None], nn.Identity()  # (B, T, 1); what captum looks at

        def seen(tokens: Tensor) -> Tensor:
            return torch.where(of_players, channels_first(tokens.transpose(1, 2)).transpose(1, 2), tokens)

        if norm is not None:
            handle = norm.register_forward_hook(lambda module, args, out: seen(out))
        else:  # post-norm: the block's input is normalised
            handle = block.register_forward_pre_hook(lambda module, args: (seen(args[0]), *args[1:]))
        try:
            tensors, logits = _logits(model, x)
            cam = LayerGradCam(logits, channels_first).attribute(tensors, target=classes)  # (B, 1, T)
        finally:
            handle.remove()
        share = of_players.shape[1] / of_players.sum(1).clamp(min=1)  # captum's mean runs over all tokens
        return players.total(cam.detach().transpose(1, 2).float())[..., 0] * share


def integrated_gradients(
    model: ExplainedClassifier,
    x: Inputs,
    classes: Tensor,
    generator: torch.Generator | None = None,
    steps: int = 32,
    rows: int = 64,
) -> Tensor:
    """Integrated gradients of the class probability (B, n), arXiv 1703.01365, summed with their sign.

    From the mean colour (0 after normalisation) over the pixels of an image; over the embedded words of a text, as they
    enter the first block, from zero, special tokens as they are. The sum over players is p(x) - p(baseline).

    Args:
        model, x, classes, generator: as everywhere here.
        steps: Gauss-Legendre points on the path.
        rows: points that run through the classifier at once, at least one per input.

    Raises:
        Inapplicable: the classifier's method cuts the gradient.
    """
    from captum.attr import IntegratedGradients

    with _differentiable(x, classes) as (x, classes):
        tensors, logits = _logits(model, x)
        players = model.players(x)
        at_once = {"target": classes, "n_steps": steps, "internal_batch_size": max(rows, len(classes))}
        if not isinstance(x, Mapping):
            assert isinstance(model.view, BackboneView)
            method = IntegratedGradients(lambda images: model.link(logits(images)))
            pixels = method.attribute(x, torch.zeros_like(x), **at_once).sum(1, keepdim=True).float()  # (B, 1, H, W)
            patches = F.avg_pool2d(pixels, model.view.patch_size, divisor_override=1).flatten(1)  # sums (B, patches)
            return players.total(F.pad(patches, (model.view.prefix_tokens, 0))[..., None])[..., 0]

        def probabilities(embedded: Tensor, *tensors: Tensor) -> Tensor:
            first = model.view.block_modules()[0]
            handle = first.register_forward_pre_hook(lambda module, args: (embedded, *args[1:]))
            try:
                return model.link(logits(*tensors))
            finally:
                handle.remove()

        embedded = model.embedded(x)  # (B, T, C)
        nothing = embedded.masked_fill((players.of >= 0)[..., None], 0.0)
        found = IntegratedGradients(probabilities).attribute(
            embedded, nothing, additional_forward_args=tensors, **at_once
        )
        return players.total(found.sum(2, keepdim=True).float())[..., 0]


# ---- the game


@torch.no_grad()
def leave_one_out(
    model: ExplainedClassifier, x: Inputs, classes: Tensor, generator: torch.Generator | None = None
) -> Tensor:
    """v(all) - v(all but i), (B, n), in n + 1 evaluations."""
    players = model.players(x)
    n, device = players.most, players.of.device
    masks = torch.cat([torch.ones(1, n, dtype=torch.bool), ~torch.eye(n, dtype=torch.bool)]).to(device)
    values = class_values(model, x, masks.expand(len(players.counts), -1, -1), classes, players)  # (B, n + 1)
    return (values[:, :1] - values[:, 1:]) * players.valid


@torch.no_grad()
def rise(
    model: ExplainedClassifier,
    x: Inputs,
    classes: Tensor,
    generator: torch.Generator | None = None,
    subsets: int = 512,
    keep: float = 0.5,
) -> Tensor:
    """RISE, arXiv 1806.07421: the mean of v(S) over random coalitions with i, (B, n).

    Args:
        model, x, classes, generator: as everywhere here.
        subsets: coalitions per input (2000 in ViT-Shapley).
        keep: probability of each player to be in one.
    """
    players = model.players(x)
    drawn = torch.rand(len(players.counts), subsets, players.most, generator=generator) < keep
    masks = drawn.to(players.of.device) & players.valid[:, None]
    values = class_values(model, x, masks, classes, players)  # (B, K)
    return (values[:, None] @ masks.float())[:, 0] / masks.sum(1).clamp(min=1)


@torch.no_grad()
def kernelshap(
    model: ExplainedClassifier,
    x: Inputs,
    classes: Tensor,
    generator: torch.Generator | None = None,
    subsets: int | None = None,
) -> Tensor:
    """KernelSHAP of the surrogate, arXiv 1705.07874, (B, n), by `petl.nn.shapley.kernel_shap`.

    Args:
        model, x, classes, generator: as everywhere here.
        subsets: evaluations per input beside v(none) and v(all), paired draws from the Shapley kernel; None = as many
            as the explainer's training takes of one input in one step, but 32 at least. Where all proper coalitions are
            no more than that, each is taken once and the result is exact.

    Raises:
        PetlError: an odd number of draws.
    """
    players, budget = model.players(x), max(BUDGET, model.method.subsets) if subsets is None else subsets
    found = torch.zeros(len(players.counts), players.most, device=players.of.device)
    for n, rows in by_count(players):
        if n == 0:
            continue
        masks, weights = proper_coalitions(n, rows, budget, generator)
        ends = torch.tensor([False, True], device=found.device)[:, None].expand(len(rows), 2, n)
        asked = F.pad(torch.cat([ends, masks], 1), (0, players.most - n))
        values = class_values(model, select(x, rows), asked, classes[rows], players.select(rows))[..., None]
        null, grand, inner = values[:, 0], values[:, 1], values[:, 2:]
        ridge = 1e-6 if weights is None else 0.0
        found[rows, :n] = kernel_shap(masks, inner, null, grand, ridge, weights)[..., 0]
    return found


def proper_coalitions(
    n: int, rows: Tensor, budget: int, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor | None]:
    """Coalitions bool (R, K, n) for `kernel_shap` of R inputs, on the device of ``rows`` (R,); weights (R, K) or None.

    All 2^n - 2 proper ones, weighted by the Shapley kernel, where ``budget`` suffices for them and n <= 16; otherwise
    ``budget`` paired draws that count alike. Raises PetlError for an odd ``budget`` in that case.
    """
    if n > MAX_PLAYERS or 2**n - 2 > budget:
        return kernel_masks(torch.full_like(rows, n), budget, generator), None
    masks, weights = coalitions(n)[1:-1].to(rows.device), kernel_weights(n)[1:-1].to(rows.device)
    return masks.expand(len(rows), -1, -1), weights.expand(len(rows), -1)


ATTRIBUTIONS: dict[str, Attribution] = {
    "autognothi": autognothi,
    "random": random,
    "attention rollout": attention_rollout,
    "attention last": attention_last,
    "gradcam": gradcam,
    "integrated gradients": integrated_gradients,
    "leave-one-out": leave_one_out,
    "rise": rise,
    "kernelshap": kernelshap,
}
BUDGET = 32  # evaluations of KernelSHAP at least
SHAPLEY = ("autognothi", "kernelshap")  # these estimate Shapley values of the surrogate, so there is a truth


def find(name: str, attributions: Mapping[str, Attribution] = ATTRIBUTIONS) -> Attribution:
    """One of ``attributions`` by name. Raises `PetlError` with the nearest name."""
    if name not in attributions:
        raise PetlError(f"attribution {name!r} is not known: {nearest(name, list(attributions))}")
    return attributions[name]
