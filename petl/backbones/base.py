"""The backbone view: all that a method sees of a frozen network.

A view wraps a model that keeps its class and its weights. It offers each block as the two halves and their parts, so
that a method reads or changes what lies between them without copying a forward pass. `EncoderView` is what every
encoder has, images or text; `ImageEncoder` and `TextEncoder` say how to run one as a tower of a pair; `BackboneView`
adds what classification needs: pooled features, the class-token attention row.
"""

from __future__ import annotations

import re
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from petl.errors import PetlError
from petl.nn.token_reduction import cls_attention


class Call(NamedTuple):
    """Arguments of a block beside its tokens (attention mask and the like), handed on to the attention unchanged."""

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = {}  # noqa: RUF012  (never mutated)

    def mask(self) -> Any:
        """The attention mask of this call, or None."""
        return next((v for v in (*self.args, self.kwargs.get("attn_mask"), self.kwargs.get("attention_mask"))
                     if isinstance(v, Tensor)), None)  # fmt: skip


class Part(NamedTuple):
    """What computes one part of a block: a layer, or the ``slice``-th of ``of`` equal slices of its output (the q of a
    fused qkv)."""

    layer: nn.Module
    slice: int = 0
    of: int = 1


class ThreadState(threading.local):
    """What one forward pass carries from block to block; one value per thread, so that concurrent passes stay apart."""

    value: Any = None

    def __deepcopy__(self, memo: dict[int, Any]) -> ThreadState:
        return ThreadState()

    def __reduce__(self) -> tuple[type[ThreadState], tuple[()]]:
        return ThreadState, ()


class BlockView(ABC):
    """One transformer block on tokens (B, N, C), in parts:

        n = attention_input(x)
        A = attend(n)                 after the output projection, before LayerScale, dropout and residual
        y = after_attention(x, attention_branch(A))
        u = ffn_input(y)
        F = ffn_output(u)             after the second linear layer, before LayerScale, dropout and residual
        out = after_ffn(y, ffn_branch(F))

    Pre-norm blocks normalise inside `attention_input` and `ffn_input`, post-norm blocks inside `after_attention` and
    `after_ffn`.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def attention_input(self, x: Tensor) -> Tensor:
        return x

    @abstractmethod
    def attend(self, n: Tensor, call: Call) -> Tensor: ...

    def attention_output(self, x: Tensor, call: Call) -> Tensor:
        return self.attend(self.attention_input(x), call)

    def attention_branch(self, a: Tensor) -> Tensor:
        return a

    def after_attention(self, x: Tensor, branch: Tensor) -> Tensor:
        return x + branch

    @abstractmethod
    def ffn_input(self, y: Tensor) -> Tensor: ...

    @abstractmethod
    def ffn_output(self, u: Tensor) -> Tensor: ...

    def ffn_branch(self, f: Tensor) -> Tensor:
        return f

    def after_ffn(self, y: Tensor, branch: Tensor) -> Tensor:
        return y + branch

    def attention(self, x: Tensor, call: Call) -> Tensor:
        """The whole attention branch, without the residual."""
        return self.attention_branch(self.attention_output(x, call))

    def ffn(self, y: Tensor) -> Tensor:
        """The whole FFN branch on tokens after the attention residual, without the residual."""
        return self.ffn_branch(self.ffn_output(self.ffn_input(y)))

    def forward(self, x: Tensor, call: Call) -> Tensor:
        """The block as the network computes it."""
        y = self.after_attention(x, self.attention(x, call))
        return self.after_ffn(y, self.ffn(y))

    def parts(self) -> dict[str, Part]:
        """The layers of the block, in order: ``norm1``, ``q``, ``k``, ``v``, ``out``, ``norm2``, ``fc1``, ``fc2``."""
        raise PetlError(
            f"the layers of a {type(self.module).__name__} are not known one by one, which methods that change single "
            "layers need. Adapters between the layers (AdaptFormer, Sparse-Tuning) still work."
        )

    def block_weights(self) -> dict[str, Tensor]:
        """Weights and biases, by part: ``q``, ``k``, ``v``, ``out``, ``fc1``, ``fc2``, ``norm1``, ``norm2``.

        Keys are ``"q.weight"``, ``"q.bias"`` and so on; a bias that the block does not have is left out. LayerScale is
        folded into ``out`` and ``fc2``. Raises `PetlError` where these parts would not compute what the block does.
        """
        raise PetlError(
            f"the weights of a {type(self.module).__name__} cannot be read part by part, so a side network cannot be "
            "pruned from them (init='prune'). Start it at random."
        )

    def release(self) -> None:  # noqa: B027  (most views leave nothing behind)
        """Undo what the view did to the block."""


class RankingBlock(BlockView):
    """A pre-norm block of a network with a class token, whose attention can rank the other tokens."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        self._captured = ThreadState()
        self._handles: list[RemovableHandle] = []

    @abstractmethod
    def _query_key_modules(self) -> list[nn.Module]:
        """The projections whose outputs hold queries and keys: one fused module, or query and key in this order."""

    @abstractmethod
    def _cls_query_and_keys(self, outputs: list[Tensor]) -> tuple[Tensor, Tensor, float]:
        """Of these outputs: class-token query (B, H, 1, D) and keys (B, H, N, D) as attention uses them; the scale."""

    def capture(self) -> None:
        """Keep queries and keys of every pass, so that `attention_and_cls_row` costs one query row and no more."""
        for module in self._query_key_modules():
            self._handles.append(module.register_forward_hook(self._keep))

    def release(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _keep(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self._captured.value = [*(self._captured.value or []), output]

    def attention_and_cls_row(self, x: Tensor, call: Call) -> tuple[Tensor, Tensor]:
        """`attention(x)` through the fused kernel, and the class token's attention to all tokens, fp32 (B, N)."""
        self._captured.value = None
        branch = self.attention(x, call)
        captured, self._captured.value = self._captured.value, None
        query, key, scale = self._cls_query_and_keys(captured)
        return branch, cls_attention(query, key, scale)


class EncoderView(ABC):
    """A frozen transformer encoder. Subclasses set the attributes from the model in their constructor."""

    family: ClassVar[str]
    model: nn.Module
    width: int
    depth: int
    heads: int
    hidden: int  # inner width of the FFN
    prefix_tokens: int = 0  # class, distillation and register tokens in front of the patches
    block_path: str  # e.g. "blocks": block i is the module "blocks.i"
    head_names: tuple[str, ...] = ()  # modules that classify: trained with a method, not part of the fingerprint
    mask_argument: str = "attention_mask"  # under which a block takes the mask of its attention
    norm_first: bool = True  # LayerNorm before attention and FFN; False = after the residual

    def masking_obstacle(self) -> str | None:
        """Why removing tokens by masking keys would not work in this network, or None."""
        return None

    def key_mask(self, keep: Tensor, dtype: torch.dtype) -> Tensor:
        """The mask to give to a block so that only tokens in ``keep``, bool (R, T), are attended to: (R, 1, 1, T)."""
        return keep[:, None, None]

    def after_blocks(self, tokens: Tensor) -> Tensor:
        """What `encode` of an image or text encoder does with the output of the last block, (B, N, C)."""
        return tokens

    @abstractmethod
    def block_modules(self) -> list[nn.Module]:
        """The transformer blocks in order."""

    @abstractmethod
    def block_view(self, module: nn.Module) -> BlockView:
        """The view of one block; a `PetlError` says why where the block cannot be split into its halves."""

    def library_checkpointing(self) -> bool:
        """Whether the library's own activation checkpointing is switched on."""
        return any(getattr(m, "gradient_checkpointing", False) for m in self.block_modules())

    def head_modules(self) -> list[tuple[str, nn.Module]]:
        """(path, module) of the network's own trained head, where it has one."""
        found = [(name, self.model.get_submodule(name)) for name in self.head_names if hasattr(self.model, name)]
        return [(name, module) for name, module in found if any(True for _ in module.parameters())]

    def is_backbone(self, name: str) -> bool:
        """Whether a parameter path belongs to the backbone proper: neither its head nor what petl added."""
        return not name.startswith(("petl.", *(f"{h}." for h in self.head_names)))

    def fine_tuned(self, name: str) -> bool:
        """Whether full fine-tuning trains the backbone parameter ``name``."""
        return True

    def places(self, names: Iterable[str]) -> dict[str, int]:
        """The block in which each of ``names`` lies, -1 = before block 0, the depth = behind the last.

        ``names``: of tensors or modules, in the order of the network.
        """
        block, found, place = re.compile(rf"{re.escape(self.block_path)}\.(\d+)(?:\.|$)"), dict[str, int](), -1
        for name in names:
            if inside := block.match(name):
                place = int(inside[1])
            elif place >= 0:
                place = self.depth
            found[name] = place
        return found


class ImageEncoder(EncoderView):
    """An encoder of images whose tokens lie on a grid."""

    @property
    @abstractmethod
    def preprocessing(self) -> dict[str, Any]:
        """``input_size`` (3, H, W) in pixels, ``mean``, ``std`` (of values in [0, 1]) and ``interpolation``."""

    @abstractmethod
    def grid(self, input_size: tuple[int, int, int]) -> tuple[int, int]:
        """Rows and columns of tokens for an image of ``input_size`` (3, H, W)."""

    def accepts(self, size: int) -> bool:
        """Whether images of ``size`` x ``size`` pixels can be encoded."""
        return size == self.preprocessing["input_size"][1]

    @abstractmethod
    def encode(self, pixel_values: Tensor, pixel_mask: Tensor) -> Tensor:
        """Tokens (B, P + N, C) of images (B, 3, H, W); ``pixel_mask`` (B, H, W) is True on the picture."""

    def token_mask(self, pixel_mask: Tensor) -> Tensor:
        """``pixel_mask`` (B, H, W) on the token grid: bool (B, N), True on the picture (nearest pixel)."""
        rows, columns = self.grid((3, *pixel_mask.shape[-2:]))
        return F.interpolate(pixel_mask[None].float(), size=(rows, columns))[0].flatten(1).bool()


class TextEncoder(EncoderView):
    """An encoder of token ids."""

    @property
    @abstractmethod
    def max_length(self) -> int:
        """Positions the encoder has."""

    @abstractmethod
    def encode(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """States (B, L, C) of the last layer for ids (B, L); ``attention_mask`` (B, L) is 1 on words, 0 on padding."""


class BackboneView(ImageEncoder):
    """A vision transformer as a classifier's backbone."""

    patch_size: tuple[int, int]

    @abstractmethod
    def features(self, x: Tensor) -> Tensor:
        """Pooled features (B, width) of images (B, 3, H, W), as the network's own head would get them."""

    @property
    def pooled_tokens(self) -> int | None:
        """How many tokens in front are all that `pool` reads; None = it reads the patches too."""
        return self.prefix_tokens

    @abstractmethod
    def pool(self, tokens: Tensor) -> Tensor:
        """What `features` does after the last block: its output, at least `pooled_tokens` (B, n, C), -> (B, width)."""

    @abstractmethod
    def outer_layers(self) -> dict[str, nn.Module]:
        """Layers outside the blocks, in order: ``patch_embedding``, the convolution that makes tokens; ``pre_norm`` of
        these and ``final_norm``, before or after the pooling, where the network has them."""

    @abstractmethod
    def reduction_obstacle(self) -> str | None:
        """Why dropping tokens would be wrong in this network, or None."""

    def grid(self, input_size: tuple[int, int, int]) -> tuple[int, int]:
        """Rows and columns of patches for an image of ``input_size`` (3, H, W)."""
        return input_size[1] // self.patch_size[0], input_size[2] // self.patch_size[1]

    def macs(self, tokens: list[tuple[int, int]], patches: int) -> int:
        """Multiply-accumulates per image for ``tokens`` (into attention, into FFN) per block; patch embedding included.

        Sheet sparse_tuning.md section 5: 4 n C² + 2 n² C + 2 m C F per block; norms and activations are not counted.
        """
        c, f = self.width, self.hidden
        embed = patches * c * 3 * self.patch_size[0] * self.patch_size[1]
        head = sum(p.numel() for _, m in self.head_modules() for n, p in m.named_parameters() if n.endswith("weight"))
        return embed + head + sum(4 * n * c * c + 2 * n * n * c + 2 * m * c * f for n, m in tokens)


def named_weights(**parts: nn.Module) -> dict[str, Tensor]:
    """``{"q.weight": …}`` of the modules by part; by attribute, as a layer around another one hands on its tensors."""
    found = {f"{part}.{n}": getattr(m, n, None) for part, m in parts.items() for n in ("weight", "bias")}
    return {name: tensor.detach() for name, tensor in found.items() if isinstance(tensor, Tensor)}


def unsupported_block(module: nn.Module, where: str) -> PetlError:
    return PetlError(
        f"{where} is a {type(module).__name__}, which petl cannot split into an attention and an FFN branch "
        "(parallel and windowed blocks are not supported). Methods that leave the blocks alone "
        "(LinearProbe, FullFineTuning) still work."
    )
