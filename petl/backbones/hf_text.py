"""Views of Hugging Face text encoders: BERT (post-norm) and the CLIP text tower (pre-norm, causal)."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, nn
from transformers import BertForSequenceClassification, BertModel, CLIPTextModel, CLIPTextModelWithProjection
from transformers.models.bert.modeling_bert import BertLayer
from transformers.models.clip.modeling_clip import CLIPEncoderLayer

from petl.backbones.base import BlockView, Call, TextEncoder, named_weights, unsupported_block
from petl.backbones.hf_vit import CLIPBlock, HFMasks


class BertBlock(BlockView):
    module: BertLayer

    def attend(self, n: Tensor, call: Call) -> Tensor:
        mask = call.args[0] if call.args else call.kwargs.get("attention_mask")
        attention = self.module.attention
        return attention.output.dense(attention.self(n, attention_mask=mask)[0])

    def attention_branch(self, a: Tensor) -> Tensor:
        return self.module.attention.output.dropout(a)

    def after_attention(self, x: Tensor, branch: Tensor) -> Tensor:
        return self.module.attention.output.LayerNorm(branch + x)

    def ffn_input(self, y: Tensor) -> Tensor:
        return y

    def ffn_output(self, u: Tensor) -> Tensor:
        return self.module.output.dense(self.module.intermediate(u))

    def ffn_branch(self, f: Tensor) -> Tensor:
        return self.module.output.dropout(f)

    def after_ffn(self, y: Tensor, branch: Tensor) -> Tensor:
        return self.module.output.LayerNorm(branch + y)

    def block_weights(self) -> dict[str, Tensor]:
        attention, ffn = self.module.attention, self.module.output
        inner: Any = attention.self
        return named_weights(
            q=inner.query, k=inner.key, v=inner.value, out=attention.output.dense, norm1=attention.output.LayerNorm,
            fc1=self.module.intermediate.dense, fc2=ffn.dense, norm2=ffn.LayerNorm,
        )  # fmt: skip


class _HFText(HFMasks, TextEncoder):
    def __init__(self, model: nn.Module) -> None:
        self.model = model
        config: Any = model.config
        self.width, self.depth, self.heads = config.hidden_size, config.num_hidden_layers, config.num_attention_heads
        self.hidden = config.intermediate_size

    @property
    def max_length(self) -> int:
        return cast(Any, self.model).config.max_position_embeddings

    def block_modules(self) -> list[nn.Module]:
        return list(cast(nn.ModuleList, self.model.get_submodule(self.block_path)))


class HFBert(_HFText):
    """`BertModel`, or the whole of a `BertForSequenceClassification`."""

    family = "hf_bert"
    norm_first = False
    head_names = ("classifier",)

    def __init__(self, model: BertModel | BertForSequenceClassification) -> None:
        super().__init__(model)
        self.block_path = "encoder.layer" if isinstance(model, BertModel) else "bert.encoder.layer"

    def encode(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        trunk: Any = self.model if isinstance(self.model, BertModel) else cast(Any, self.model).bert
        return trunk(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state

    def block_view(self, module: nn.Module) -> BlockView:
        if type(module) is not BertLayer or module.is_decoder:
            raise unsupported_block(module, "a layer of this BERT")
        return BertBlock(module)

    def fine_tuned(self, name: str) -> bool:
        return not name.startswith("pooler.")  # reads the first token for a pre-training task; states do not pass it


class HFCLIPText(_HFText):
    family = "hf_clip_text"

    def __init__(self, model: CLIPTextModel | CLIPTextModelWithProjection) -> None:
        super().__init__(model)
        self.block_path = "encoder.layers" if isinstance(model, CLIPTextModel) else "text_model.encoder.layers"

    def block_view(self, module: nn.Module) -> BlockView:
        if type(module) is not CLIPEncoderLayer:
            raise unsupported_block(module, "a layer of this CLIP text tower")
        return CLIPBlock(module)

    @property
    def _tower(self) -> Any:
        return self.model if isinstance(self.model, CLIPTextModel) else cast(Any, self.model).text_model

    def encode(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self._tower(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state

    def after_blocks(self, tokens: Tensor) -> Tensor:
        return self._tower.final_layer_norm(tokens)

    def fine_tuned(self, name: str) -> bool:
        return not name.startswith("text_projection.")  # maps into CLIP's joint space, which nothing here uses
