"""What DARA and M²IST have in common: per pair of layers, one bottleneck for each modality and one whose
up-projection belongs to both."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from petl.backbones.base import BackboneView, EncoderView, ImageEncoder, TextEncoder
from petl.errors import PetlError
from petl.methods.base import EVERY_TOWER, Method, MethodModule, PairModule, TowerModule
from petl.nn.bottleneck import Bottleneck, SharedUpBottleneck, up_projection
from petl.nn.linear import Linear

PLACES = ("first", "last", "even")


class PairAdapter(nn.Module):
    """The adapters of one layer: ``unimodal`` (DA, VEA, LEA) and ``interactive`` (RA, IEA)."""

    def __init__(self, width: int, method: PairMethod, zero_up: bool) -> None:
        super().__init__()
        self.unimodal = Bottleneck(width, method.bottleneck, method.scale, zero_up)
        self.interactive = SharedUpBottleneck(width, method.relation_dim, method.shared_dim)


class PairTower(TowerModule):
    """One encoder's half: an adapter at each of ``layers``, in order."""

    changes_blocks: ClassVar[bool] = True

    def __init__(
        self, method: PairMethod, view: EncoderView, layers: tuple[int, ...], shared: nn.ModuleList, zero_up: bool
    ) -> None:
        super().__init__(method, view)
        self.pair_of = {layer: j for j, layer in enumerate(layers)}  # block index -> index of its pair
        self.adapters = nn.ModuleList(PairAdapter(view.width, method, zero_up) for _ in layers)
        self.shared: tuple[Linear, ...] = tuple(shared)  # type: ignore[arg-type]  # a tuple: registered in the pair alone

    def macs(self, tokens: int) -> int:
        method: PairMethod = self.method  # type: ignore[assignment]
        return tokens * len(self.adapters) * 2 * self.view.width * (method.bottleneck + method.relation_dim)


class PairedAdapters(PairModule):
    vision: PairTower
    text: PairTower

    def macs(self, visual_tokens: int, text_tokens: int) -> int:
        return self.vision.macs(visual_tokens) + self.text.macs(text_tokens)


@dataclass(frozen=True)
class PairMethod(Method):
    """Options of a method on two encoders whose layers are paired.

    Where an encoder has more layers than there are pairs, ``text_layers`` and ``vision_layers`` choose: the "first"
    ones, the "last" ones, or "even" steps that end at the last layer.
    """

    bottleneck: int = 128
    relation_dim: int = 128
    shared_dim: int = 256
    scale: float = 0.1
    pairs: int | None = None
    text_layers: str = "first"
    vision_layers: str = "even"

    backbones: ClassVar[tuple[str, ...]] = ()
    towers: ClassVar[tuple[str, ...]] = EVERY_TOWER

    def __post_init__(self) -> None:
        for option in ("bottleneck", "relation_dim", "shared_dim"):
            self.require(option, getattr(self, option), 1)
        self.require("scale", self.scale, 0, integer=False)
        if self.pairs is not None:
            self.require("pairs", self.pairs, 1)
        for option in ("text_layers", "vision_layers"):
            self.choose(option, PLACES)

    def layers(self, vision: ImageEncoder, text: TextEncoder) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The paired layers of both encoders; `PetlError` where this pair cannot be adapted so."""
        depth = min(vision.depth, text.depth)
        pairs = depth if self.pairs is None else self.pairs
        name = type(self).__name__
        if pairs > depth:
            raise PetlError(
                f"{name}(pairs={pairs}): the encoders have {vision.depth} and {text.depth} layers, so at most {depth} "
                "can be paired; pairs=None takes as many as there are."
            )
        width = min(vision.width, text.width)
        if self.shared_dim > width:
            raise PetlError(
                f"{name}(shared_dim={self.shared_dim}): the shared up-projection cannot be wider than an encoder; "
                f"these have {vision.width} (image) and {text.width} (text) channels, so at most {width}."
            )
        return place(self.vision_layers, pairs, vision.depth), place(self.text_layers, pairs, text.depth)

    def pair(
        self,
        vision: ImageEncoder,
        text: TextEncoder,
        tower: type[PairTower],
        module: type[PairedAdapters],
        zero_up: bool = True,
    ) -> PairedAdapters:
        """``module`` around one ``tower`` for each encoder; ``zero_up`` is about the unimodal adapters."""
        vision_layers, text_layers = self.layers(vision, text)
        shared = nn.ModuleList(up_projection(self.relation_dim, self.shared_dim) for _ in vision_layers)
        return module(
            self,
            tower(self, vision, vision_layers, shared, zero_up),
            tower(self, text, text_layers, shared, zero_up),
            shared,
        )

    def build(self, view: BackboneView) -> MethodModule:
        raise self._needs_a_pair()

    def parameter_count(self, view: BackboneView) -> int:
        raise self._needs_a_pair()

    def _needs_a_pair(self) -> PetlError:
        name = type(self).__name__
        return PetlError(f"{self.name!r} works on two encoders: petl.GroundingModel(vision, text, petl.{name}()).")

    def pair_parameter_count(self, vision: ImageEncoder, text: TextEncoder) -> int:
        """Sheets dara.md and m2ist.md, section 3: 2 C b + b + C per unimodal adapter; the shared map counts once."""
        b, d, shared = self.bottleneck, self.relation_dim, self.shared_dim
        widths = (vision.width, text.width)
        unimodal = sum(2 * c * b + b + c for c in widths)
        interactive = d * (sum(widths) + 2) + (d + 1) * (sum(widths) - shared)
        return len(self.layers(vision, text)[0]) * (unimodal + interactive)


def place(where: str, count: int, depth: int) -> tuple[int, ...]:
    """``count`` of ``depth`` layers: the "first", the "last", or "even" steps that end at the last."""
    if where == "even":
        return tuple((i + 1) * depth // count - 1 for i in range(count))
    return tuple(range(count) if where == "first" else range(depth - count, depth))
