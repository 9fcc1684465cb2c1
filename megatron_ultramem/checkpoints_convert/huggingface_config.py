"""The trainer's model settings as the fields of the Hugging Face configuration (`configuration_ultramem.py`).

Pure Python: needs neither torch nor transformers.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from megatron_ultramem.config.schema import Config, ModelConfig
from megatron_ultramem.memory import kinds
from megatron_ultramem.memory.geometry import Pool, coarse_k, join_layers, parse_layers, plan_pools


def hf_config(config: Config, vocab_size: int) -> dict[str, Any]:
    """Keyword arguments of `UltraMemConfig`, but for the ids of special tokens.

    Args:
        vocab_size: of the tokenizer, before padding.
    """
    m = config.model
    multiple = m.vocab_size_multiple
    fields: dict[str, Any] = {
        "vocab_size": math.ceil(vocab_size / multiple) * multiple,
        "tokenizer_vocab_size": vocab_size,
        "hidden_size": m.hidden_size,
        "intermediate_size": m.ffn_hidden_size,
        "num_hidden_layers": m.num_layers,
        "num_attention_heads": m.num_attention_heads,
        "num_key_value_heads": m.num_query_groups or m.num_attention_heads,
        "head_dim": m.head_dim or m.hidden_size // m.num_attention_heads,
        "qk_norm": m.qk_norm_width if m.qk_norm else "none",
        "max_position_embeddings": m.max_sequence_length,
        "initializer_range": m.init_std or math.sqrt(2 / (5 * m.hidden_size)),
        "rms_norm_eps": m.norm_eps,
        "tie_word_embeddings": m.tie_embeddings,
        "rope_parameters": {"rope_type": "default", "rope_theta": float(m.rope_base)},
        "hidden_dropout": m.hidden_dropout,
        "attention_dropout": m.attention_dropout,
        "trainer_settings": dataclasses.asdict(m),
    }
    with_moe = parse_layers(m.moe.layers, m.num_layers, "model.moe.layers")
    fields["mlp_layer_types"] = ["sparse" if layer in with_moe else "dense" for layer in range(m.num_layers)]
    if with_moe:
        fields |= {
            "num_experts": m.moe.num_experts,
            "num_experts_per_tok": m.moe.top_k,
            "moe_intermediate_size": m.moe.ffn_hidden_size,
            "shared_expert_intermediate_size": m.moe.shared_expert_hidden_size,
            "shared_expert_gate": m.moe.shared_expert_gate,
            "router_score": m.moe.router_score,
            "norm_topk_prob": m.moe.normalize_top_k,
            "router_dtype": m.moe.router_dtype,
            "router_expert_bias": m.moe.expert_bias,
            "routed_scaling_factor": m.moe.router_scale or 1.0,
            "n_group": m.moe.router_groups,
            "topk_group": m.moe.router_group_top_k,
        }
    pools = plan_pools(m)
    if pools:
        fields["memory"] = _memory(m, pools)
    return fields


def _memory(model: ModelConfig, pools: list[Pool]) -> dict[str, Any]:
    memory = model.memory
    joins = join_layers(model)
    fields: dict[str, Any] = {
        "kind": memory.kind,
        "num_heads": memory.num_heads,
        "key_dim": memory.key_dim,
        "top_m": memory.top_m,
        "coarse_k": coarse_k(memory, pools[0].keys_per_side),
        "value_dim": memory.value_dim,
        "shuffle": memory.shuffle,
        "replaces_ffn": kinds.replaces_ffn(memory),
        "pools": [{"rows": pool.rows, "padded_rows": pool.padded_rows} for pool in pools],
        "layers": [
            {
                "layer": layer,
                "pool": pool.index,
                "keys_per_side": pool.keys_per_side,
                "row_offset": pool.row_offset(layer),
                **({"join": joins[layer]} if joins[layer] != layer else {}),
            }
            for pool in pools
            for layer in pool.layers
        ],
    }
    if kinds.kind_of(memory).tucker:
        fields |= {
            "tucker_rank": memory.tucker_rank,
            "num_cores": memory.num_cores,
            "query_per_rank": memory.kind == "ultramem_v2" and memory.query_per_rank,
        }
    else:
        fields["query_norm"] = kinds.query_norm(memory)
    if memory.kind == "ultramem_v2":
        fields |= {"pre_value_dim": memory.pre_value_dim, "activation": memory.activation}
    elif memory.kind == "ultramem":
        fields["value_expansion"] = memory.value_expansion
    return fields
