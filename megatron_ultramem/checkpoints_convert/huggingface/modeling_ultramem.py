"""UltraMem language models for `transformers`: a decoder whose blocks have memory layers beside or instead of the FFN.

These files travel with a checkpoint; they need torch and transformers alone. Where the package ultramem_kernels is
installed and the model is on a GPU, memory layers use it (`config.memory_kernels`).
"""

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationConfig, GenerationMixin
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .configuration_ultramem import UltraMemConfig
from .ultramem_blocks import UltraMemAttention, UltraMemMLP, UltraMemRMSNorm, UltraMemRotaryEmbedding
from .ultramem_common import Fp32Buffers  # noqa: F401 (some releases copy the files that this one imports, no others)
from .ultramem_experts import UltraMemExperts, UltraMemRouter, UltraMemSparseMLP
from .ultramem_lookup import UltraMemValuePool
from .ultramem_memory import Lookup, UltraMemMemory, memory_layer, value_pools
from .ultramem_product_keys import UltraMemProductKeys, UltraMemQueryNorm
from .ultramem_retrieval import UltraMemTuckerRetrieval


class UltraMemDecoderLayer(GradientCheckpointingLayer):
    """Attention, then FFN(x) + memory(x) of the same normalised input x; the FFN, or the memory, may be absent."""

    def __init__(self, config: UltraMemConfig, layer_idx: int) -> None:
        super().__init__()
        self.dropout = config.hidden_dropout
        self.self_attn = UltraMemAttention(config, layer_idx)
        self.input_layernorm = UltraMemRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = UltraMemRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.memory = memory_layer(config, layer_idx)
        self.joins_later = (config.memory_layer(layer_idx) or {}).get("join", layer_idx) > layer_idx
        self.mlp: UltraMemMLP | UltraMemSparseMLP | None = None
        if self.memory is None or not config.memory["replaces_ffn"]:
            sparse = config.mlp_layer_types[layer_idx] == "sparse"
            self.mlp = UltraMemSparseMLP(config) if sparse else UltraMemMLP(config, config.intermediate_size)

    def forward(
        self,
        hidden_states: torch.Tensor,
        joining: torch.Tensor | None,
        lookup: Lookup | None,
        attention_mask: torch.Tensor | None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """[B, S, H] to the same.

        `joining` is the output of memory layers of earlier blocks that is added here, `lookup` looks up in the pool of
        this block's memory layer. What that gives to a later block is returned beside the hidden states.
        """
        attention, _ = self.self_attn(
            self.input_layernorm(hidden_states),
            position_embeddings=position_embeddings,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            **kwargs,
        )
        hidden_states = hidden_states + F.dropout(attention, self.dropout, self.training)
        x = self.post_attention_layernorm(hidden_states)
        parts = [] if self.mlp is None else [self.mlp(x)]
        later = None
        if self.memory is not None:
            memory = self.memory(x.reshape(-1, x.shape[-1]), lookup).view(x.shape)
            if self.joins_later:
                later = memory
            else:
                parts.append(memory)
        if joining is not None:
            parts.append(joining)
        for part in parts[1:]:
            parts[0] = parts[0] + part.to(parts[0].device)
        if parts:
            hidden_states = hidden_states + F.dropout(parts[0], self.dropout, self.training).to(hidden_states.device)
        return hidden_states, later


class UltraMemPreTrainedModel(PreTrainedModel):
    config_class = UltraMemConfig
    config: UltraMemConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["UltraMemDecoderLayer", "UltraMemValuePool"]
    _skip_keys_device_placement = ["past_key_values"]
    # Buffers, by the end of their names: retrieval in bf16 would choose other keys.
    _keep_in_fp32_modules_strict = [
        "retrieval.u",
        "retrieval.t",
        "query_norm.running_mean",
        "query_norm.running_var",
        "gate.expert_bias",
    ]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_record_outputs = {
        "hidden_states": OutputRecorder(UltraMemDecoderLayer, index=0),
        "attentions": OutputRecorder(UltraMemAttention, index=1),
    }

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        """transformers would look for the decorator of UltraMemExperts in this file."""
        return True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """As the released code of UltraMemV2; the derived initialisation of the paper is the trainer's work."""
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, UltraMemValuePool | UltraMemExperts | UltraMemRouter):
            for param in module.parameters(recurse=False):
                init.normal_(param, mean=0.0, std=std)
            if isinstance(module, UltraMemRouter) and module.expert_bias is not None:
                init.zeros_(module.expert_bias)
        elif isinstance(module, UltraMemTuckerRetrieval | UltraMemProductKeys):
            init.normal_(module.keys, mean=0.0, std=module.key_dim**-0.5)
            for gain in (getattr(module, "query_gain", None), getattr(module, "key_gain", None)):
                if gain is not None:
                    init.constant_(gain, module.key_dim**-0.4)
            if isinstance(module, UltraMemTuckerRetrieval):
                init.uniform_(module.cores, 0.0, 1.0)
            if isinstance(module, UltraMemTuckerRetrieval) and not module.cores.is_meta:  # meta: offloaded to a disk
                for name, vector in zip(("u", "t"), module.leading_vectors().unbind(1), strict=True):
                    init.copy_(getattr(module, name), vector)
        elif isinstance(module, UltraMemQueryNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
            init.zeros_(module.running_mean)
            init.ones_(module.running_var)
        elif isinstance(module, UltraMemMemory) and module.permutation is not None:
            drawn = torch.randperm(module.permutation.numel(), device=module.permutation.device)
            init.copy_(module.permutation, drawn)


class UltraMemModel(UltraMemPreTrainedModel):
    """The decoder without the output layer."""

    def __init__(self, config: UltraMemConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(UltraMemDecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.pools = nn.ModuleList(value_pools(config))
        self.norm = UltraMemRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = UltraMemRotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.memory_entries = [config.memory_layer(layer) for layer in range(config.num_hidden_layers)]
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Arguments and outputs as of every decoder of transformers; exactly one of `input_ids`, `inputs_embeds`."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("exactly one of input_ids and inputs_embeds must be given")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            start = 0 if past_key_values is None else past_key_values.get_seq_length()
            position_ids = (torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device) + start).unsqueeze(0)
        causal_mask = create_causal_mask(
            config=self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
        )
        position_embeddings = self.rotary_emb(inputs_embeds, position_ids)
        hidden_states = F.dropout(inputs_embeds, self.config.hidden_dropout, self.training)
        joining: dict[int, torch.Tensor] = {}  # outputs of memory layers on their way to a later block
        for number, (layer, entry) in enumerate(zip(self.layers, self.memory_entries, strict=True)):
            hidden_states, later = layer(
                hidden_states,
                joining.pop(number, None),
                # The call, not the module: what places modules on devices would move a module among the arguments.
                None if entry is None else self.pools[entry["pool"]].__call__,
                attention_mask=causal_mask,
                position_embeddings=position_embeddings,
                position_ids=position_ids,
                past_key_values=past_key_values,
                use_cache=use_cache,
                **kwargs,
            )
            if entry is not None and later is not None:
                block = entry["join"]
                joining[block] = joining[block] + later.to(joining[block].device) if block in joining else later
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden_states), past_key_values=past_key_values)


class UltraMemForCausalLM(UltraMemPreTrainedModel, GenerationMixin):
    """The decoder with its output layer. The loss is the cross-entropy, without the auxiliary losses of the trainer."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: UltraMemConfig) -> None:
        super().__init__(config)
        self.model = UltraMemModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.generation_config = self.default_generation_config(config)
        self.post_init()

    @staticmethod
    def default_generation_config(config: UltraMemConfig) -> GenerationConfig:
        """Never chooses ids of the embedding's padding, which no tokenizer can decode."""
        made = GenerationConfig.from_model_config(config)
        made.suppress_tokens = _padding_ids(config)
        return made

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args: Any, **kwargs: Any) -> nn.Embedding:
        """As of every model of transformers; the tokenizer then has `new_num_tokens` ids, and each may be chosen."""
        embeddings = super().resize_token_embeddings(new_num_tokens, *args, **kwargs)
        if new_num_tokens is not None:
            self.config.tokenizer_vocab_size = new_num_tokens
            self.generation_config.suppress_tokens = _padding_ids(self.config)
        return embeddings

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Arguments and outputs as of every causal model of transformers; logits over the padded vocabulary."""
        outputs: BaseModelOutputWithPast = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        hidden_states = outputs.last_hidden_state
        assert hidden_states is not None
        logits = self.lm_head(hidden_states[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


def _padding_ids(config: UltraMemConfig) -> list[int] | None:
    """Ids of the embedding that the tokenizer does not have, or None."""
    return list(range(config.tokenizer_vocab_size or config.vocab_size, config.vocab_size)) or None


__all__ = ["UltraMemForCausalLM", "UltraMemModel", "UltraMemPreTrainedModel"]
