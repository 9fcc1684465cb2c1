"""Layer specifications: Megatron's own attention and FFN, with memory beside the FFN where the config wants it."""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

from megatron_ultramem.compat import dense_mlp_slot, module_slot
from megatron_ultramem.config.schema import Config
from megatron_ultramem.memory.geometry import Pool, parse_layers, plan_pools
from megatron_ultramem.memory.layer import UltraMemV2
from megatron_ultramem.memory.tables import ValuePool
from megatron_ultramem.model.feed_forward import FeedForwardWithMemory
from megatron_ultramem.model.norm import AllHeadsRMSNorm, RMSNorm


def block_spec(
    config: Config, layers: range, tables: dict[int, ValuePool], backend: str, *, grouped_gemm: bool
) -> TransformerBlockSubmodules:
    """The blocks of one model chunk.

    Args:
        layers: global numbers (from 0) of the chunk's layers.
        tables: the chunk's value pools by pool number.
        backend: 'local' or 'transformer_engine'.
        grouped_gemm: whether MoE experts run as one grouped GEMM.
    """
    m = config.model
    with_moe = set(parse_layers(m.moe.layers, m.num_layers, "model.moe.layers"))
    pool_of = {layer: pool for pool in plan_pools(m) for layer in pool.layers}
    specs = [
        _layer_spec(config, layer, layer in with_moe, pool_of.get(layer), tables, backend, grouped_gemm)
        for layer in layers
    ]
    return TransformerBlockSubmodules(layer_specs=specs, layer_norm=_provider(backend)[1])


def _layer_spec(
    config: Config, layer: int, moe: bool, pool: Pool | None, tables: dict[int, ValuePool], backend: str, grouped: bool
) -> ModuleSpec:
    m = config.model
    experts = {"num_experts": m.moe.num_experts, "moe_grouped_gemm": grouped} if moe else {}
    if backend == "transformer_engine":
        spec = get_gpt_layer_with_transformer_engine_spec(qk_layernorm=m.qk_norm, **experts)
    else:
        spec = get_gpt_layer_local_spec(qk_layernorm=m.qk_norm, normalization="RMSNorm", **experts)
    spec = copy.deepcopy(spec)
    provider, norm = _provider(backend)
    sub = spec.submodules
    attention = sub.self_attention.submodules
    if backend == "local":
        sub.input_layernorm = sub.pre_mlp_layernorm = norm
        if m.qk_norm:
            attention.q_layernorm = attention.k_layernorm = norm
    if m.qk_norm and m.qk_norm_width == "all_heads":
        attention.q_layernorm = module_slot(AllHeadsRMSNorm, heads=m.num_attention_heads)
        attention.k_layernorm = module_slot(AllHeadsRMSNorm, heads=m.num_query_groups or m.num_attention_heads)
    if moe or pool is not None:
        # One name for this norm in checkpoints of both back ends (Megatron's local layers pretend that it is fused).
        sub.sharded_state_dict_keys_map.pop("pre_mlp_layernorm.", None)
    if config.data.mask_document_boundaries and backend == "local":
        # The mask that comes with the batch is then causal within documents.
        sub.self_attention.params["attn_mask_type"] = AttnMaskType.arbitrary
    if pool is not None:
        ffn = sub.mlp
        if not moe:
            # Memory reads the normalised input too, so the norm must not be fused into the FFN's first linear.
            sub.pre_mlp_layernorm = norm
            ffn = dense_mlp_slot(
                MLPSubmodules(linear_fc1=provider.column_parallel_linear(), linear_fc2=provider.row_parallel_linear())
            )
        build = functools.partial(_build_memory, config, layer, pool, tables[pool.index])
        sub.mlp = module_slot(FeedForwardWithMemory, ffn=ffn, memory=build, overlap=config.parallel.overlap_exchange)
    return spec


def _build_memory(
    config: Config, layer: int, pool: Pool, table: ValuePool, groups: ProcessGroupCollection
) -> UltraMemV2:
    m = config.model
    return UltraMemV2(
        m.memory,
        hidden_size=m.hidden_size,
        layer=layer,
        pool=pool,
        table=table,
        norm_eps=m.norm_eps,
        dtype=table.values.dtype,
        device=table.values.device,
        tokens_group=groups.tp if config.parallel.tensor_parallel_size > 1 else None,
    )


def _provider(backend: str) -> tuple[Any, type[torch.nn.Module]]:
    """The back end's linears, and its RMSNorm."""
    if backend == "local":
        return LocalSpecProvider(), RMSNorm
    from megatron.core.extensions.transformer_engine import TENorm
    from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider

    return TESpecProvider(), TENorm
