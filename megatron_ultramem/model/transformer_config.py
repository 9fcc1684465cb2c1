"""Translates our settings into Megatron's TransformerConfig."""

from __future__ import annotations

import math
from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_ultramem.compat import graphed_parts
from megatron_ultramem.config.schema import Config
from megatron_ultramem.config.validate_fp8 import fp8_format
from megatron_ultramem.memory.geometry import parse_layers
from megatron_ultramem.platform import has_fused_weight_gradients


def dtype_of(config: Config) -> torch.dtype:
    """Parameters and activations."""
    return torch.bfloat16 if config.train.precision == "bf16" else torch.float32


def linear_std(config: Config) -> float:
    """Standard deviation of linear weights: sqrt(2/(5h)) (UltraMemV2, appendix A) unless set."""
    return config.model.init_std or math.sqrt(2.0 / (5.0 * config.model.hidden_size))


def uses_sequence_parallel(config: Config) -> bool:
    p = config.parallel
    return p.tensor_parallel_size > 1 if p.sequence_parallel is None else p.sequence_parallel


def transformer_config(config: Config, backend: str) -> TransformerConfig:
    """Megatron's configuration of the decoder; `backend` is 'local' or 'transformer_engine'."""
    m, p = config.model, config.parallel
    dtype = dtype_of(config)
    te = backend == "transformer_engine"
    std = linear_std(config)
    kwargs: dict[str, Any] = {
        "num_layers": m.num_layers,
        "hidden_size": m.hidden_size,
        "num_attention_heads": m.num_attention_heads,
        "num_query_groups": m.num_query_groups or m.num_attention_heads,
        "kv_channels": m.head_dim or m.hidden_size // m.num_attention_heads,
        "ffn_hidden_size": m.ffn_hidden_size,
        "normalization": "RMSNorm",
        "layernorm_epsilon": m.norm_eps,
        "gated_linear_unit": True,
        "activation_func": torch.nn.functional.silu,
        "add_bias_linear": False,
        "qk_layernorm": m.qk_norm,
        "hidden_dropout": m.hidden_dropout,
        "attention_dropout": m.attention_dropout,
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "bf16": dtype == torch.bfloat16,
        "attention_softmax_in_fp32": True,
        "init_method_std": std,
        "init_method": torch.nn.init.normal_,  # overwritten by model/initialize.py, which draws layout-independently
        "output_layer_init_method": torch.nn.init.normal_,
        "tensor_model_parallel_size": p.tensor_parallel_size,
        "sequence_parallel": uses_sequence_parallel(config),
        "pipeline_model_parallel_size": p.pipeline_parallel_size,
        "virtual_pipeline_model_parallel_size": p.virtual_pipeline_stages if p.virtual_pipeline_stages > 1 else None,
        "context_parallel_size": p.context_parallel_size,
        "expert_model_parallel_size": p.expert_parallel_size,
        "expert_tensor_parallel_size": 1,
        "overlap_p2p_comm": p.overlap_p2p,
        "batch_p2p_comm": not p.overlap_p2p,
        "deterministic_mode": config.train.deterministic,
        # Counts of unmasked tokens differ between micro-batches only when something is masked.
        "calculate_per_token_loss": config.data.mask_eod_loss,
        "persist_layer_norm": te,
        "bias_activation_fusion": te,
        # Without dropout a plain addition does, and its launch costs the host less.
        "bias_dropout_fusion": te and m.hidden_dropout > 0,
        "masked_softmax_fusion": te,
        "gradient_accumulation_fusion": te and has_fused_weight_gradients(),
        "cross_entropy_loss_fusion": te,
        "cross_entropy_fusion_impl": "te" if config.train.cross_entropy == "transformer_engine" else "native",
        "apply_rope_fusion": te,
    }
    if config.train.recompute == "full":
        kwargs.update(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)
    elif config.train.recompute == "selective":
        kwargs.update(recompute_granularity="selective", recompute_modules=["core_attn"])
    if config.train.cuda_graphs == "layers":
        kwargs |= {"cuda_graph_impl": "transformer_engine", **graphed_parts(_graphed_parts(config))}
    return TransformerConfig(**kwargs, **_moe_settings(config, te), **_fp8_settings(config))


def _graphed_parts(config: Config) -> list[str]:
    """Of layers, what Megatron's CUDA graphs record."""
    m = config.model
    with_moe = len(parse_layers(m.moe.layers, m.num_layers, "model.moe.layers"))
    return ["attn"] + ["moe_router"] * (with_moe > 0) + ["mlp"] * (with_moe < m.num_layers)


def _fp8_settings(config: Config) -> dict[str, Any]:
    fp8 = config.train.fp8
    if fp8.recipe == "none":
        return {}
    return {
        "fp8": fp8_format(fp8),
        "fp8_recipe": fp8.recipe,
        "fp8_margin": fp8.margin,
        "fp8_amax_history_len": fp8.amax_history_len,
        "fp8_amax_compute_algo": fp8.amax_compute_algo,
        "fp8_param": fp8.param_gather,
        "first_last_layers_bf16": fp8.first_last_layers_bf16,
        "num_layers_at_start_in_bf16": fp8.num_layers_at_start_in_bf16,
        "num_layers_at_end_in_bf16": fp8.num_layers_at_end_in_bf16,
    }


def _moe_settings(config: Config, te: bool) -> dict[str, Any]:
    m, moe = config.model, config.model.moe
    moe_layers = parse_layers(moe.layers, m.num_layers, "model.moe.layers")
    if not moe_layers:
        return {}
    return {
        "num_moe_experts": moe.num_experts,
        "moe_layer_freq": [int(layer in moe_layers) for layer in range(m.num_layers)],
        "moe_ffn_hidden_size": moe.ffn_hidden_size,
        "moe_shared_expert_intermediate_size": moe.shared_expert_hidden_size or None,
        "moe_shared_expert_gate": moe.shared_expert_gate,
        "moe_shared_expert_overlap": moe.shared_expert_overlap,
        "moe_router_topk": moe.top_k,
        "moe_router_score_function": moe.router_score,
        "moe_router_pre_softmax": not moe.normalize_top_k,
        "moe_router_topk_scaling_factor": moe.router_scale,
        "moe_router_num_groups": moe.router_groups,
        "moe_router_group_topk": moe.router_group_top_k,
        "moe_router_dtype": None if moe.router_dtype == "params" else moe.router_dtype,
        "moe_router_enable_expert_bias": moe.expert_bias,
        "moe_router_bias_update_rate": moe.expert_bias_rate,
        "moe_router_load_balancing_type": moe.load_balancing if moe.aux_loss_coeff else "none",
        "moe_aux_loss_coeff": moe.aux_loss_coeff,
        "moe_z_loss_coeff": moe.z_loss_coeff or None,
        "moe_token_dispatcher_type": moe.dispatcher,
        "moe_flex_dispatcher_backend": moe.flex_backend,
        "moe_grouped_gemm": te if moe.grouped_gemm is None else moe.grouped_gemm,
        "moe_permute_fusion": te if moe.permute_fusion is None else moe.permute_fusion,
        "moe_router_fusion": moe.router_fusion,
    }
