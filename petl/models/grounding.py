"""Visual grounding: the box in an image that an expression refers to (TransVG, arXiv 2104.08541) on frozen encoders."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from petl.backbones import image_encoder, load_backbone, load_text_encoder, text_encoder
from petl.errors import PetlError
from petl.methods.attach import attach_pair
from petl.methods.base import Method, PairModule, TowerModule
from petl.methods.linear_probe import LinearProbe
from petl.nn.fusion import GroundingHead


class GroundingModel(nn.Module):
    """Two frozen encoders, a method on both, and a vision-language encoder with a box head that is always trained.

    Args:
        vision: image encoder: a timm VisionTransformer, HF CLIP vision tower, HF ViT, HF `DetrModel` (its ResNet and
            encoder are used, not its decoder), or a name for `petl.load_backbone`.
        text: text encoder: HF BERT or CLIP text tower, or a name for `petl.backbones.load_text_encoder`.
        method: what is trained inside or beside the encoders; None = nothing, the vision-language part alone.
        image_size: side of the square input in pixels; None = what the image encoder was trained on (DETR: 640).
        query_length: text tokens, start and end included (20; 40 is usual for RefCOCOg).
        fusion_dim: width of the vision-language encoder.
        fusion_layers: layers of it.
        fusion_heads: attention heads of it.
        fusion_hidden: inner width of its FFN.
        dropout: dropout inside it.
        norm_first: LayerNorm before attention and FFN; False = after them, as published.

    Raises:
        PetlError: encoders that petl does not know, sizes that do not fit, or a method that does not.
    """

    def __init__(
        self,
        vision: nn.Module | str,
        text: nn.Module | str,
        method: Method | None = None,
        image_size: int | None = None,
        query_length: int = 20,
        fusion_dim: int = 256,
        fusion_layers: int = 6,
        fusion_heads: int = 8,
        fusion_hidden: int = 2048,
        dropout: float = 0.1,
        norm_first: bool = False,
    ) -> None:
        super().__init__()
        vision = load_backbone(vision) if isinstance(vision, str) else _without_decoder(vision)
        text = load_text_encoder(text)[0] if isinstance(text, str) else text
        self.vision_view, self.text_view = image_encoder(vision), text_encoder(text)
        self.image_size = image_size or self.vision_view.preprocessing["input_size"][1]
        if not self.vision_view.accepts(self.image_size):
            own = self.vision_view.preprocessing["input_size"][1]
            raise PetlError(
                f"image_size={self.image_size}: this image encoder has position embeddings for {own} x {own} pixels; "
                "a timm model can be built for another size (vision_args: {img_size: …})."
            )
        if not 3 <= query_length <= self.text_view.max_length:
            raise PetlError(
                f"query_length={query_length}: it lies between 3 (start, a word, end) and the "
                f"{self.text_view.max_length} positions of the text encoder."
            )
        grid = self.vision_view.grid((3, self.image_size, self.image_size))
        self.head = GroundingHead(
            self.vision_view.width, self.text_view.width, grid, query_length, fusion_dim, fusion_layers, fusion_heads,
            fusion_hidden, dropout, norm_first,
        )  # fmt: skip
        self.petl: PairModule = attach_pair(vision, text, method or LinearProbe())
        self.vision, self.text = vision, text
        self.head.to(next(vision.parameters()).device)

    @property
    def checkpointing(self) -> bool:
        """Recompute activations in the backward pass instead of keeping them."""
        return self.head.checkpointing

    @checkpointing.setter
    def checkpointing(self, value: bool) -> None:
        self.head.checkpointing = self.petl.vision.checkpointing = self.petl.text.checkpointing = value

    def forward(
        self,
        pixel_values: Tensor,
        pixel_mask: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor,
        image_index: Tensor | None = None,
    ) -> Tensor:
        """Boxes (B, 4), cxcywh in [0, 1] of the padded canvas, fp32.

        Args:
            pixel_values: (B, 3, S, S), normalised for the image encoder.
            pixel_mask: (B, S, S), 1 on the picture and 0 on padding.
            input_ids: (B, L) with L = query_length.
            attention_mask: (B, L), 1 on words and 0 on padding.
            image_index: (B,), which image each expression is about, where images have several: each is encoded once.
        """
        visual, text = self.encode(pixel_values, pixel_mask, input_ids, attention_mask)
        return self.locate(visual, pixel_mask, text, attention_mask, image_index)

    def encode(
        self, pixel_values: Tensor, pixel_mask: Tensor, input_ids: Tensor, attention_mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        """What the encoders, with the method, hand to the vision-language encoder: (B, N_v, C_v) and (B, L, C_l)."""
        return self.encode_images(pixel_values, pixel_mask), self.encode_text(input_ids, attention_mask)

    def encode_images(self, pixel_values: Tensor, pixel_mask: Tensor) -> Tensor:
        """The image half of `encode`."""
        pair = getattr(self, "petl", None)  # gone after petl.detach
        visual = _output(pair and pair.vision, self.vision_view.encode(pixel_values, pixel_mask))
        return visual[:, self.vision_view.prefix_tokens :]

    def encode_text(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """The text half of `encode`."""
        pair = getattr(self, "petl", None)
        return _output(pair and pair.text, self.text_view.encode(input_ids, attention_mask))

    def locate(
        self,
        visual: Tensor,
        pixel_mask: Tensor,
        text: Tensor,
        attention_mask: Tensor,
        image_index: Tensor | None = None,
    ) -> Tensor:
        """Boxes as of `forward`, from what `encode` gives."""
        seen = self.vision_view.token_mask(pixel_mask)
        if image_index is not None:
            visual, seen = visual[image_index], seen[image_index]
        return self.head(visual, seen, text, attention_mask)

    def describe(self) -> dict[str, Any]:
        """The sizes of the model beside its encoders, as JSON values."""
        return {"kind": "grounding", "image_size": self.image_size, **self.head.sizes}

    def example(self, count: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Inputs of ``count`` blank samples."""
        like, size = next(self.vision.parameters()), (count, self.image_size, self.image_size)
        ids = torch.ones(count, self.head.query_length, dtype=torch.long, device=like.device)
        images = torch.zeros(count, 3, *size[1:], device=like.device, dtype=like.dtype)
        return images, torch.ones(size, dtype=torch.bool, device=like.device), ids, torch.ones_like(ids)


def _output(tower: TowerModule | None, h: Tensor) -> Tensor:
    return h if tower is None else tower.output(h, tower.run.take())


def _without_decoder(model: nn.Module) -> nn.Module:
    if type(model).__name__ != "DetrModel":
        return model
    from petl.backbones.detr import DetrImageEncoder

    wrapped: Any = DetrImageEncoder(model)  # type: ignore[arg-type]
    return wrapped.eval()
