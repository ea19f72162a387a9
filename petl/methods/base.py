"""What a method is: a frozen dataclass of options that builds a module of trained tensors for a backbone view."""

from __future__ import annotations

import dataclasses
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, TypeVar, cast

from torch import Tensor, nn

from petl.backbones.base import BackboneView, BlockView, Call, EncoderView, ImageEncoder, TextEncoder
from petl.backbones.identity import Identity
from petl.backbones.taps import Reader
from petl.errors import PetlError, nearest
from petl.methods.recompute import RecomputedBlock
from petl.nn.blocks import chosen_blocks

M = TypeVar("M", bound="type[Method]")
EVERY_TOWER = ("timm_vit", "hf_clip_vision", "hf_vit", "detr", "hf_bert", "hf_clip_text")


class TowerModule(nn.Module):
    """What a method trains beside one encoder, and what it does to each block of it.

    Subclasses override `block` (and `begin`); the default leaves the encoder as it is. State travels from block to
    block as a value: no tensor is kept on the module, so that checkpointing, compilation and threads stay correct.
    """

    changes_blocks: ClassVar[bool] = False
    trains_backbone: ClassVar[bool] = False
    has_output: ClassVar[bool] = False  # whether `output` needs the state after the last block

    _checkpointing = False
    recomputed = range(0)  # blocks of which no activation is kept beyond their input, see `checkpointing`

    def __init__(self, method: Method, view: EncoderView) -> None:
        super().__init__()
        self.method, self.view = method, view
        self.identity: Identity  # of the frozen encoder, set by petl.attach, as are the next three
        self.run: Any  # the `Pass` that carries the state from block to block
        self._blocks: list[BlockView]  # whose forward is replaced
        self._before: tuple[dict[str, bool], dict[str, bool]]  # requires_grad by parameter, training by module

    def install(self) -> None:
        """Change the backbone beyond its blocks; called by `petl.attach` after the fingerprint was taken."""

    def uninstall(self) -> None:
        """Undo `install`, and what `merge` left of it."""

    def frozen_cast(self) -> None:
        """Called when the frozen weights have got another dtype (see petl/methods/frozen_dtype.py)."""

    def trains(self, name: str) -> bool:
        """Whether the parameter ``name`` of the backbone is trained (as far as `install` did not put it there)."""
        return self.trains_backbone and self.view.fine_tuned(name)

    def owns(self, name: str) -> bool:
        """Whether the tensor or module ``name`` of the model belongs to the method, not to the backbone."""
        return name.startswith("petl.")

    def lr_scale(self, name: str) -> float:
        """Factor on the learning rate of the trained parameter ``name`` of the model."""
        return 1.0

    def regularisation(self) -> Tensor | None:
        """A term of the method's own that is added to the loss of a step."""
        return None

    def after_step(self, step: int, total: int) -> None:
        """Called when optimiser step ``step`` (from 1) of ``total`` is done, while its gradients are still there."""

    def training_state(self) -> dict[str, Tensor]:
        """What `after_step` goes by, beside the trained tensors: kept in checkpoints for an exact resumption."""
        return {}

    def load_training_state(self, state: dict[str, Tensor]) -> None:
        """Go on from `training_state`."""

    def begin(self, x: Tensor) -> Any:
        """The state before block 0, from the embedded tokens (B, N, C)."""
        return ()

    def block(self, index: int, block: BlockView, x: Tensor, call: Call, state: Any) -> tuple[Tensor, Any]:
        """Tokens and state after block ``index``."""
        return block.forward(x, call), state

    def first_changed(self) -> int:
        """The first block that computes something else than in the frozen network, or gets other input; the depth =
        none does.

        Read off where the trained tensors lie: in block i of the network, in ``blocks.i`` of this module (what lies
        elsewhere in here counts as before block 0). Only known when the method is attached.
        """
        if self.reads() is not None:
            return self.view.depth
        places = self.view.places(n for n, _ in self.view.model.named_parameters())
        inside = [max(0, i) for n, i in places.items() if self.view.is_backbone(n) and self.trains(n)]
        own = [re.match(r"blocks\.(\d+)\.", n) for n, _ in self.named_parameters()]
        return min([*inside, *(int(block[1]) if block else 0 for block in own), self.view.depth])

    def first_used(self) -> int:
        """The first block that the method changes or needs to see: a pass can start there, from recorded input."""
        return self.first_changed()

    @property
    def checkpointing(self) -> bool:
        """Whether the blocks from `first_changed` on are run again in the backward pass, so that only their inputs are
        kept for it."""
        return self._checkpointing

    @checkpointing.setter
    def checkpointing(self, value: bool) -> None:
        view = self.view
        if value and not self.changes_blocks and view.library_checkpointing():
            raise PetlError("the model's own gradient checkpointing is on already; leave it at that.")
        blocks: list[Any] = [] if self.changes_blocks else view.block_modules()  # those that change are run by `Pass`
        for block in blocks[self.recomputed.start : self.recomputed.stop]:
            del block.forward
        self._checkpointing = value
        self.recomputed = range(self.first_changed(), view.depth) if value else range(0)
        for block in blocks[self.recomputed.start : self.recomputed.stop]:
            block.forward = RecomputedBlock(block, self).forward

    def reads(self) -> tuple[str, ...] | None:
        """Of a method beside the encoder, in which all blocks compute what they do without it: which taps of them it
        needs (see petl/backbones/replay.py). None for the others."""
        return None

    def output(self, h: Tensor, state: Any) -> Tensor:
        """What the encoder hands on in a pair, from its own output (B, N, C) and the state after the last block."""
        return h

    def capture_blocks(self) -> tuple[int, ...]:
        """Blocks whose class-token attention row is needed."""
        return ()


class MethodModule(TowerModule):
    """The trained tensors of a method on one backbone. Stands in the model as ``model.petl``."""

    view: BackboneView

    @property
    def beside(self) -> bool:
        """Whether all blocks compute what they do in the frozen network; see `reader`."""
        return self.reads() is not None

    def reader(self, first: int | None) -> Reader | None:
        """Of a method ``beside`` the network: what reads its block outputs; None where only the head is trained.

        ``first``: how many tokens of the last state are wanted, None = all.
        """
        return None

    def last(self, h: Tensor, z: Tensor) -> Tensor:
        """Output of the last block with the method: from the frozen h (B, N, C) and the last state of the reader."""
        return h

    def merge(self) -> None:
        """Fold the trained tensors into the backbone (only called where the method is ``mergeable``)."""

    def token_counts(self, patches: int) -> list[tuple[int, int]]:
        """Tokens per block, prefix included: (into attention, into FFN)."""
        return [(patches + self.view.prefix_tokens,) * 2] * self.view.depth

    def macs(self, tokens: list[tuple[int, int]]) -> int:
        """Multiply-accumulates per image of the trained part, for `token_counts`."""
        return 0

    def first_gradient(self) -> tuple[str, str]:
        """The first point of the backbone that takes part in the backward pass, and why."""
        return "head", "nothing inside the backbone is trained"


class PairModule(nn.Module):
    """The trained tensors of a method on the two encoders of a pair. Stands in a `GroundingModel` as ``model.petl``.

    ``shared``: what belongs to both encoders, registered here alone.
    """

    def __init__(self, method: Method, vision: TowerModule, text: TowerModule, shared: nn.Module | None = None) -> None:
        super().__init__()
        self.method, self.vision, self.text, self.shared = method, vision, text, shared

    @property
    def trains_backbone(self) -> bool:
        return self.vision.trains_backbone

    def macs(self, visual_tokens: int, text_tokens: int) -> int:
        """Multiply-accumulates per sample of the trained part, for tokens with prefix."""
        return 0

    def first_gradient(self) -> tuple[str, str]:
        """The first point of the encoders that takes part in the backward pass, and why."""
        if self.trains_backbone:
            return "first trained stage of each encoder", "its weights are trained"
        return "vision-language encoder", "nothing inside the encoders is trained"


@dataclasses.dataclass(frozen=True)
class Method(ABC):
    """Options of a method. Subclasses are frozen dataclasses, registered by name with `register`."""

    name: ClassVar[str]
    backbones: ClassVar[tuple[str, ...]] = ("timm_vit", "hf_clip_vision", "hf_vit")
    host: ClassVar[str] = "petl.GroundingModel"  # what it is for where it works on no lone backbone
    towers: ClassVar[tuple[str, ...]] = ()  # encoder families it works on as half of a pair
    mergeable: ClassVar[bool] = False

    @property
    def identity_at_start(self) -> bool:
        """Whether the attached network computes what the frozen one does before the first step."""
        return True

    @abstractmethod
    def build(self, view: BackboneView) -> MethodModule:
        """The trained module for this backbone; raises `PetlError` where the method does not fit it."""

    @abstractmethod
    def parameter_count(self, view: BackboneView) -> int:
        """Trained parameters without head, from the formula of the paper."""

    def build_pair(self, vision: ImageEncoder, text: TextEncoder) -> PairModule:
        """The trained module for a pair of encoders: here one module for each, with nothing in common."""
        return PairModule(self, self.build(cast(Any, vision)), self.build(cast(Any, text)))

    def pair_parameter_count(self, vision: ImageEncoder, text: TextEncoder) -> int:
        """Trained parameters on a pair without the vision-language part, from the formula of the paper."""
        return self.parameter_count(cast(Any, vision)) + self.parameter_count(cast(Any, text))

    def to_dict(self) -> dict[str, Any]:
        return {"name": self.name, "options": dataclasses.asdict(self)}

    def blocks(self, view: EncoderView) -> tuple[int, ...]:
        """The blocks that option ``layers`` names, in order; all where there is none. `PetlError` for one beyond."""
        return chosen_blocks(view.depth, getattr(self, "layers", None))

    def trained_places(self, view: EncoderView) -> tuple[int, ...]:
        """Places (`EncoderView.places`) where something is trained: ``layers`` and what follows the blocks, or all."""
        first = () if getattr(self, "layers", None) is not None else (-1,)
        return (*first, *self.blocks(view), view.depth)

    def check_layers(self) -> None:
        """Make option ``layers`` a tuple. Raises `PetlError` unless it is None or a list of integers."""
        layers = getattr(self, "layers", None)
        if layers is None:
            return
        if not isinstance(layers, (list, tuple)) or any(isinstance(i, bool) or not isinstance(i, int) for i in layers):
            raise PetlError(f"{type(self).__name__}(layers={layers!r}): give a list of block numbers.")
        object.__setattr__(self, "layers", tuple(layers))

    def require(self, name: str, value: Any, low: float, integer: bool = True, below: float = math.inf) -> None:
        """Raise `PetlError` unless option ``name`` is a number of at least ``low`` and less than ``below``."""
        kinds: tuple[type[float], ...] = (int,) if integer else (int, float)
        if isinstance(value, bool) or not isinstance(value, kinds) or not low <= value < below:
            kind = "an integer" if integer else "a number"
            limits = f"at least {low}" + (f" and below {below}" if below < math.inf else "")
            raise PetlError(f"{type(self).__name__}({name}={value!r}): {name} must be {kind} of {limits}.")

    def choose(self, option: str, valid: tuple[str, ...]) -> None:
        """Raise `PetlError` unless ``option`` is one of ``valid``."""
        value = getattr(self, option)
        if value not in valid:
            raise PetlError(f"{type(self).__name__}({option}={value!r}): {nearest(str(value), valid)}")


def register(name: str) -> Callable[[M], M]:
    """Class decorator: the registry name under which configs and adapters know a method."""

    def mark(cls: M) -> M:
        cls.name = name
        return cls

    return mark


def from_dict(spec: dict[str, Any]) -> Method:
    """The method of ``{"name": …, "options": {…}}``: registry names and known options, nothing imported by path."""
    from petl.methods import get_method

    if not isinstance(spec, dict) or not isinstance(spec.get("options", {}), dict):
        raise PetlError("the method entry must be a mapping with 'name' and 'options'.")
    cls = get_method(str(spec.get("name")))
    options, known = spec.get("options", {}), {f.name for f in dataclasses.fields(cls)}
    for key in options:
        if key not in known:
            raise PetlError(f"method {cls.name!r} has no option {key!r}: {nearest(key, known)}")
    try:
        return cls(**options)
    except (TypeError, ValueError) as error:
        raise PetlError(f"method {cls.name!r} cannot be built from {options}: {error}") from error
