"""The vision-language part against TransVG's, rebuilt from `torch.nn`; masks, order of tokens, sizes, memory."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from petl.costs import count_saved_bytes
from petl.errors import PetlError
from petl.nn.fusion import FusionLayer, GroundingHead

L, GRID = 5, (3, 3)
N = GRID[0] * GRID[1]


def head(**options: object) -> GroundingHead:
    sizes = {"fusion_dim": 16, "fusion_layers": 3, "fusion_heads": 4, "fusion_hidden": 24} | options
    part = GroundingHead(12, 10, GRID, L, **sizes)
    with torch.no_grad():
        for p in part.parameters():
            if p.ndim == 1:  # biases and LayerNorms are not trivial
                p.normal_(1.0 if p.shape == (16,) and p.mean() > 0.5 else 0.0, 0.2)
    return part.eval()


def inputs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Visual tokens and mask, text states and mask, both with padding."""
    seen, words = torch.ones(3, N, dtype=torch.bool), torch.ones(3, L, dtype=torch.long)
    seen[0, 6:], words[0, 3:], seen[1, ::2] = False, 0, False
    return torch.randn(3, N, 12), seen, torch.randn(3, L, 10), words


class TransVGLayer(nn.Module):
    """The encoder layer of DETR and TransVG, from `nn.MultiheadAttention`, with the weights of ``layer``."""

    def __init__(self, layer: FusionLayer) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, layer.heads, batch_first=True)
        self.layer = layer
        with torch.no_grad():
            for kind in ("weight", "bias"):
                parts = [getattr(m, kind) for m in (layer.query, layer.key, layer.value)]
                getattr(self.attention, f"in_proj_{kind}").copy_(torch.cat(parts))
                getattr(self.attention.out_proj, kind).copy_(getattr(layer.out, kind))

    def forward(self, z: Tensor, position: Tensor, padded: Tensor) -> Tensor:
        layer, n = self.layer, self.layer.norm1(z) if self.layer.norm_first else z
        q = k = n + position
        z = z + self.attention(q, k, n, key_padding_mask=padded, need_weights=True)[0]
        if layer.norm_first:
            return z + layer.fc2(F.relu(layer.fc1(layer.norm2(z))))
        z = layer.norm1(z)
        return layer.norm2(z + layer.fc2(F.relu(layer.fc1(z))))


def transvg(part: GroundingHead, visual: Tensor, seen: Tensor, text: Tensor, words: Tensor) -> Tensor:
    """[REG] | text | visual; position rows in this order; key padding mask True = padding; box from token 0."""
    count = len(visual)
    reg = part.reg_token.weight.view(1, 1, -1).repeat(count, 1, 1)
    z = torch.cat([reg, part.text_projection(text), part.visual_projection(visual)], 1)
    position = part.position.weight[None]
    padded = torch.cat([torch.zeros(count, 1, dtype=torch.bool), words == 0, ~seen], 1)
    for layer in part.layers:
        z = TransVGLayer(layer).eval()(z, position, padded)
    linear = [m for m in part.box.modules() if isinstance(m, nn.Linear)]
    x = part.norm(z[:, 0])
    for i, layer in enumerate(linear):
        x = layer(x) if i == len(linear) - 1 else F.relu(layer(x))
    assert len(linear) == 3
    return torch.sigmoid(x)


@pytest.mark.parametrize("options", [{}, {"norm_first": True}, {"fusion_layers": 1}, {"fusion_heads": 16}])
@torch.no_grad()
def test_it_computes_what_transvg_computes(options: dict) -> None:
    part, x = head(**options), inputs()
    found = part(*x)
    torch.testing.assert_close(found, transvg(part, *x), atol=1e-5, rtol=1e-5)
    assert (found[1:] - found[:1]).abs().amax(1).min() > 1e-3, "boxes depend on the sample"


@torch.no_grad()
def test_each_position_row_belongs_to_its_token() -> None:
    """Row 0 is [REG]'s, rows 1..L are the words', the rest the picture's: a masked token's row moves nothing."""
    part, x = head(), tuple(t[:1] for t in inputs())
    before = part(*x)
    silent = []
    for row in range(1 + L + N):
        kept = part.position.weight[row].clone()
        part.position.weight[row] += 1
        silent.append(torch.equal(part(*x), before))
        part.position.weight[row] = kept
    assert [row for row, quiet in enumerate(silent) if quiet] == [4, 5, *(1 + L + i for i in (6, 7, 8))]


@torch.no_grad()
@pytest.mark.parametrize("which", [1, 3])
def test_polarity_of_the_masks(which: int) -> None:
    """True is seen: what lies under False is not read, and turning a mask round changes the boxes."""
    part, x = head(), list(inputs())
    before, mask = part(*x), x[which].bool()
    kept = x[which - 1].clone()
    x[which - 1] = kept.masked_fill(~mask[..., None], 100.0)
    assert torch.equal(part(*x), before)
    x[which - 1] = kept.masked_fill(mask[..., None], 100.0)
    assert not torch.isclose(part(*x), before).all(1).any()
    x[which - 1], x[which] = kept, ~mask
    changed = (part(*x) - before).abs().amax(1)
    assert (changed[:2] > 1e-6).all()
    for dtype in (torch.bool, torch.long, torch.float32):
        x[which] = mask.to(dtype)
        assert torch.equal(part(*x), before)


@torch.no_grad()
def test_everything_padded_is_no_nan() -> None:
    part, (visual, seen, text, words) = head(), inputs()
    words[1], seen[2] = 0, False
    assert part(visual, seen, text, words).isfinite().all()
    assert part(visual, seen & False, text, words * 0).isfinite().all()


def test_start_and_range() -> None:
    part = GroundingHead(12, 10, GRID, L, 16, 3, 4, 24)
    for layer in part.layers:  # Xavier-uniform matrices
        for p in (p for p in layer.parameters() if p.ndim > 1):
            bound = (6 / sum(p.shape)) ** 0.5
            assert 0.9 * bound < p.abs().max() <= bound
    assert part.position.weight.std().item() == pytest.approx(1, abs=0.15)  # default of nn.Embedding
    boxes = part(*inputs())
    assert (boxes.shape, boxes.dtype) == ((3, 4), torch.float32)
    assert 0 <= boxes.min() < boxes.max() <= 1


def test_inputs_in_bf16_and_autocast_give_fp32_boxes() -> None:
    part, (visual, seen, text, words) = head(), inputs()
    expected = part(visual, seen, text, words)
    found = part(visual.bfloat16(), seen, text.bfloat16(), words)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, atol=0.02, rtol=0.1)
    with torch.autocast("cpu", torch.bfloat16):
        found = part(visual, seen, text, words)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, atol=0.05, rtol=0.1)


def test_dropout_lives_in_training_alone() -> None:
    part, x = head(dropout=0.5), inputs()
    assert torch.equal(part(*x), part(*x))
    assert not torch.equal(part.train()(*x), part(*x))
    still = head(dropout=0.0)
    assert torch.equal(still.train()(*x), still.eval()(*x))


def test_memory_grows_with_the_tokens_and_not_with_their_square() -> None:
    """No kernel on the CPU fuses attention with dropout; a map of tokens x tokens per head must not be kept."""
    layer = FusionLayer(32, 8, 64, 0.1).train()
    kept = []
    for tokens in (100, 200, 400):
        z = torch.randn(2, tokens, 32, requires_grad=True)
        mask = torch.ones(2, tokens, dtype=torch.bool)
        kept.append(count_saved_bytes(layer, z, torch.randn(tokens, 32), mask))
    assert kept[2] - kept[1] == pytest.approx(2 * (kept[1] - kept[0]), rel=0.05)


def test_checkpointing_recomputes_layers_with_the_same_dropout() -> None:
    part, x = head(dropout=0.3).train(), inputs()
    gradients, kept = [], []
    for checkpointing in (False, True):
        part.checkpointing = checkpointing
        torch.manual_seed(5)
        kept.append(count_saved_bytes(part, *x))
        part.zero_grad()
        torch.manual_seed(5)
        part(*x).pow(2).sum().backward()
        gradients.append([p.grad.clone() for p in part.parameters()])
    for one, two in zip(*gradients, strict=True):
        torch.testing.assert_close(one, two, atol=1e-6, rtol=1e-5)
    assert kept[1] < 0.5 * kept[0]


def test_sizes_that_do_not_fit() -> None:
    with pytest.raises(PetlError, match="fusion_dim 18 does not divide into fusion_heads 4"):
        head(fusion_dim=18)
    part, (visual, seen, text, words) = head(), inputs()
    with pytest.raises(PetlError, match=r"8 visual tokens .* built for 9: images must have the size"):
        part(visual[:, 1:], seen[:, 1:], text, words)
    with pytest.raises(PetlError, match=r"4 text tokens .* built for 5: pad or cut .* query_length=5"):
        part(visual, seen, text[:, 1:], words[:, 1:])
    assert part.sizes == {
        "vision_width": 12, "text_width": 10, "grid": [3, 3], "query_length": L,
        "fusion_dim": 16, "fusion_layers": 3, "fusion_heads": 4, "fusion_hidden": 24, "dropout": 0.1,
        "norm_first": False,
    }  # fmt: skip
