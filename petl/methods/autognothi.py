"""AutoGnothi (Wang et al., arXiv 2410.21815): a side network that gives Shapley values with a frozen prediction.

Two ladders read the blocks of a frozen classifier f (petl/nn/ladder.py); nothing flows back into it.

    surrogate   g(x_S) = Head(LN(z_L)[CLS])          the game: v(S) = link(g(x_S)), a probability per class
    explainer   raw    = MLP(LN(z'_L)) per token     phi = raw + (v(1) - v(0) - sum raw) / n

x_S: tokens of players outside S are no keys of any attention, in f and in the ladder. The surrogate learns f's own
output from masked inputs by KL(f(x) || g(x_S)), |S| uniform; the explainer starts from the surrogate's ladder and
minimises n E_S (v(0) + S phi - v(S))², S from the Shapley kernel. See petl.Explanation for the training.

Deviations from the published code (sheet autognothi.md, 2.10): removal is exact (there scores of removed keys are
multiplied by zero, and they leak); v(0) is the game at S = 0, not a blank input; efficiency holds over the players
(there over players and class token); subsets follow the Shapley kernel, ``sampler="vitshapley"`` gives the thresholded
law; the KL divergence is the forward one of single softmaxes; dropout of f is off; text players are content words. The
head is 4 d / r wide without an attention block, which gives the parameters printed in the paper's figure.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from petl.backbones.base import BackboneView, EncoderView
from petl.errors import PetlError, nearest
from petl.methods.base import Method, MethodModule, register
from petl.nn.ladder import FORMS, Ladder, SideBlock, ladder_parameters
from petl.nn.linear import Linear

CHOICES = {
    "form": FORMS,
    "sampler": ("kernel", "vitshapley"),
    "removal": ("keys", "mean"),
    "link": ("softmax", "sigmoid"),
    "grand": ("surrogate", "main"),
}


class _Side(nn.Module):
    """A ladder beside the classifier."""

    def __init__(self, method: AutoGnothi, view: EncoderView) -> None:
        super().__init__()
        eps = next((m.eps for b in view.block_modules() for m in b.modules() if isinstance(m, nn.LayerNorm)), 1e-6)
        self.ladder = Ladder(
            view.width, view.depth, view.heads, method.reduction, method.form, method.layers, view.norm_first, eps
        )
        self.pools_class_token = view.prefix_tokens > 0 or not view.norm_first


class Surrogate(_Side):
    """Ladder and head that give the classifier's output on coalitions."""

    def __init__(self, method: AutoGnothi, view: EncoderView, classes: int) -> None:
        super().__init__(method, view)
        e = self.ladder.width
        self.head: nn.Module = Linear(e, classes)
        if not view.norm_first:  # as BERT's pooler
            self.head = nn.Sequential(Linear(e, e), nn.Tanh(), self.head)

    def forward(self, z: Tensor, keep: Tensor | None) -> Tensor:
        """Last state of the ladder (R, T, e) -> logits (R, C), fp32. ``keep`` bool (R, T): tokens that are there."""
        z = self.ladder.finish(z)
        if self.pools_class_token:
            return self.head(z[:, 0])
        if keep is None:
            return self.head(z.mean(1))
        seen = keep[:, :, None].to(z.dtype)
        return self.head((z * seen).sum(1) / seen.sum(1).clamp(min=1))


class Explainer(_Side):
    """Ladder and a three-layer MLP on every token."""

    def __init__(self, method: AutoGnothi, view: EncoderView, classes: int) -> None:
        super().__init__(method, view)
        e = self.ladder.width
        hidden = method.head_width * e
        blocks = [SideBlock(e, view.heads, view.norm_first) for _ in range(method.extra_blocks)]
        if blocks and view.norm_first:
            blocks[0].norm1 = nn.Identity()  # type: ignore[assignment]  # the ladder has just normalised
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(e) if view.norm_first else nn.Identity()
        self.mlp = nn.Sequential(
            Linear(e, hidden), nn.GELU(), Linear(hidden, hidden), nn.GELU(), Linear(hidden, classes)
        )

    def forward(self, z: Tensor, keep: Tensor | None) -> Tensor:
        """Last state of the ladder (R, T, e) -> C numbers per token (R, T, C), fp32. ``keep`` bool (R, T)."""
        z = self.ladder.finish(z)
        for block in self.blocks:
            z = block(z, keep)
        return self.mlp(self.norm(z))


class AutoGnothiModule(nn.Module):
    """What is trained beside a classifier. Stands in a `petl.ExplainedClassifier` as ``model.petl``."""

    def __init__(self, method: AutoGnothi, view: EncoderView, classes: int) -> None:
        super().__init__()
        self.method, self.classes = method, classes
        self.surrogate, self.explainer = Surrogate(method, view, classes), Explainer(method, view, classes)
        self.null: Tensor
        self.register_buffer("null", torch.full((classes,), torch.nan))  # v(0) of images
        self.knows_null = False  # whether it has been measured, with the trained surrogate

    def start_explainer(self) -> None:
        """The explainer's ladder starts as the trained one of the surrogate."""
        self.explainer.ladder.load_state_dict(self.surrogate.ladder.state_dict())


@register("autognothi")
@dataclass(frozen=True)
class AutoGnothi(Method):
    """AutoGnothi: Shapley values of every patch or word, from a side network that leaves the prediction alone.

    Args:
        reduction: r; the side networks are width / r wide.
        head_width: hidden width of the explainer's MLP, in side widths.
        subsets: coalitions K per input and step of the explainer's training, in complementary pairs.
        sampler: law of the coalitions: "kernel" (the Shapley kernel), or "vitshapley" (as published, biased).
        form: of the ladder: "sum" (AutoGnothi) or "gate" (LST).
        layers: blocks that the ladders tap, from 0 or, backwards, from -1; None = all.
        extra_blocks: side attention blocks before the explainer's MLP.
        players: (rows, columns) of neighbouring patches that are one player; None = every patch.
        whole_words: text: a word is one player, not each of its pieces.
        removal: "keys" removes players from every attention; "mean" puts the mean colour in their place.
        link: "softmax", or "sigmoid" for labels that do not exclude each other.
        grand: what the values sum to, above v(0): "surrogate" (its value of the full input) or "main" (the prediction).
    """

    reduction: int = 8
    head_width: int = 4
    subsets: int = 32
    sampler: str = "kernel"
    form: str = "sum"
    layers: tuple[int, ...] | None = None
    extra_blocks: int = 0
    players: tuple[int, int] | None = None
    whole_words: bool = True
    removal: str = "keys"
    link: str = "softmax"
    grand: str = "surrogate"

    backbones: ClassVar[tuple[str, ...]] = ()
    host: ClassVar[str] = "petl.ExplainedClassifier"
    explains: ClassVar[tuple[str, ...]] = ("timm_vit", "hf_clip_vision", "hf_vit", "hf_bert")

    def __post_init__(self) -> None:
        for option in ("reduction", "head_width", "subsets"):
            self.require(option, getattr(self, option), 1)
        self.require("extra_blocks", self.extra_blocks, 0)
        for option, valid in CHOICES.items():
            value = getattr(self, option)
            if value not in valid:
                raise PetlError(f"AutoGnothi({option}={value!r}): {nearest(str(value), valid)}")
        if self.subsets % 2:
            raise PetlError(
                f"AutoGnothi(subsets={self.subsets}): coalitions are drawn in complementary pairs, so subsets is even: "
                f"{self.subsets + 1}, for instance."
            )
        self.check_layers()
        if self.players is not None:
            object.__setattr__(self, "players", tuple(self.players))  # YAML and JSON give lists
            if len(self.players) != 2:
                raise PetlError(f"AutoGnothi(players={self.players}): it is (rows, columns) of players.")
            for number in self.players:
                self.require("players", number, 1)

    def build_explainer(self, view: EncoderView, classes: int) -> AutoGnothiModule:
        """The side networks for a classifier with this view; raises `PetlError` where they do not fit it."""
        name = type(self).__name__
        if view.family not in self.explains:
            raise PetlError(f"{name} does not explain {view.family}; it explains {', '.join(self.explains)}.")
        obstacle = view.masking_obstacle() if self.removal == "keys" else None
        if obstacle:
            raise PetlError(
                f"{name} removes players by masking keys, and that does not work here: {obstacle}. "
                f'{name}(removal="mean") puts the mean colour in place of removed patches instead.'
            )
        return AutoGnothiModule(self, view, classes)

    def build(self, view: BackboneView) -> MethodModule:
        raise self._needs_a_classifier()

    def parameter_count(self, view: BackboneView) -> int:
        raise self._needs_a_classifier()

    def _needs_a_classifier(self) -> PetlError:
        return PetlError("'autognothi' explains a classifier: petl.ExplainedClassifier(classifier, petl.AutoGnothi()).")

    def explainer_parameter_count(self, view: EncoderView, classes: int) -> tuple[int, int]:
        """Trained parameters (surrogate, explainer), sheet autognothi.md 2.1 and 2.2."""
        e = view.width // self.reduction
        ladder = ladder_parameters(view.width, view.depth, self.reduction, self.form, self.layers, view.norm_first)
        pooler = 0 if view.norm_first else e * e + e
        hidden = self.head_width * e
        mlp = e * hidden + hidden + hidden * hidden + hidden + hidden * classes + classes
        extra = self.extra_blocks * (12 * e * e + 13 * e)
        if view.norm_first:
            mlp += 2 * e
            extra -= 2 * e if self.extra_blocks else 0
        return ladder + pooler + e * classes + classes, ladder + extra + mlp
