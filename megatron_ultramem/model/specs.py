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
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_ultramem.compat import dense_mlp_slot, module_slot
from megatron_ultramem.config.schema import Config
from megatron_ultramem.config.validate_fp8 import fp8_projections
from megatron_ultramem.memory.base import MemoryLayer
from megatron_ultramem.memory.build import LAYERS
from megatron_ultramem.memory.geometry import Pool, join_layers, parse_layers, plan_pools
from megatron_ultramem.memory.kinds import replaces_ffn
from megatron_ultramem.memory.tables import ValuePool
from megatron_ultramem.model.feed_forward import FeedForwardWithMemory, Joint
from megatron_ultramem.model.fp8 import fp8_checkpoint, fp8_linear
from megatron_ultramem.model.fp8_ffn import Fp8FFN
from megatron_ultramem.model.norm import AllHeadsRMSNorm, KernelRMSNorm, RMSNorm


def block_spec(
    config: Config, layers: range, tables: dict[int, ValuePool], backend: str, megatron_config: TransformerConfig
) -> TransformerBlockSubmodules:
    """The blocks of one model chunk.

    Args:
        layers: global numbers (from 0) of the chunk's layers.
        tables: the chunk's value pools by pool number.
        backend: 'local' or 'transformer_engine'.
        megatron_config: of all blocks.
    """
    m, grouped_gemm = config.model, megatron_config.moe_grouped_gemm
    with_moe = set(parse_layers(m.moe.layers, m.num_layers, "model.moe.layers"))
    pool_of = {layer: pool for pool in plan_pools(m) for layer in pool.layers}
    joins = {reader: joined for reader, joined in join_layers(m).items() if reader != joined}
    joints = {reader: Joint() for reader in joins if reader in layers}
    incoming = {joins[reader]: joint for reader, joint in joints.items()}
    specs = []
    for layer in layers:
        moe, pool = layer in with_moe, pool_of.get(layer)
        wrapped = pool is not None or layer in incoming
        spec = _layer_spec(config, backend, moe=moe, grouped_gemm=grouped_gemm, own_norm=moe or wrapped)
        if wrapped:
            memory = (
                None
                if pool is None
                else functools.partial(_build_memory, config, megatron_config, layer, pool, tables[pool.index])
            )
            without_ffn = pool is not None and replaces_ffn(m.memory)
            spec.submodules.mlp = module_slot(
                FeedForwardWithMemory,
                ffn=None if without_ffn else spec.submodules.mlp,
                memory=memory,
                sends=joints.get(layer),
                receives=incoming.get(layer),
                overlap=config.parallel.overlap_exchange,
            )
        specs.append(spec)
    return TransformerBlockSubmodules(layer_specs=specs, layer_norm=_provider(config, backend)[1])


def _layer_spec(config: Config, backend: str, *, moe: bool, grouped_gemm: bool, own_norm: bool) -> ModuleSpec:
    """Megatron's block with a dense or MoE FFN. own_norm: the norm before it is a module of its own."""
    m = config.model
    experts = {"num_experts": m.moe.num_experts, "moe_grouped_gemm": grouped_gemm} if moe else {}
    if backend == "transformer_engine":
        spec = get_gpt_layer_with_transformer_engine_spec(qk_layernorm=m.qk_norm, **experts)
    else:
        spec = get_gpt_layer_local_spec(qk_layernorm=m.qk_norm, normalization="RMSNorm", **experts)
    spec = copy.deepcopy(spec)
    provider, norm = _provider(config, backend)
    sub = spec.submodules
    attention = sub.self_attention.submodules
    if backend == "local":
        sub.input_layernorm = sub.pre_mlp_layernorm = norm
    elif moe:
        sub.pre_mlp_layernorm = norm
    if m.qk_norm:
        attention.q_layernorm = attention.k_layernorm = norm
    if m.qk_norm and m.qk_norm_width == "all_heads":
        attention.q_layernorm = module_slot(AllHeadsRMSNorm, heads=m.num_attention_heads)
        attention.k_layernorm = module_slot(AllHeadsRMSNorm, heads=m.num_query_groups or m.num_attention_heads)
    if own_norm:
        # One name for this norm in checkpoints of both back ends (Megatron's local layers pretend that it is fused).
        sub.sharded_state_dict_keys_map.pop("pre_mlp_layernorm.", None)
    if own_norm and not moe:
        # Memory reads the normalised input too, so the norm must not be fused into the FFN's first linear.
        sub.pre_mlp_layernorm = norm
        sub.mlp = dense_mlp_slot(
            MLPSubmodules(linear_fc1=provider.column_parallel_linear(), linear_fc2=provider.row_parallel_linear()),
            Fp8FFN if config.train.fp8.recipe == "tensorwise" else MLP,
        )
    if config.data.mask_document_boundaries and backend == "local":
        # The mask that comes with the batch is then causal within documents.
        sub.self_attention.params["attn_mask_type"] = AttnMaskType.arbitrary
    return spec


def _build_memory(
    config: Config,
    megatron_config: TransformerConfig,
    layer: int,
    pool: Pool,
    table: ValuePool,
    groups: ProcessGroupCollection,
) -> MemoryLayer:
    m, in_fp8 = config.model, fp8_projections(config)
    return LAYERS[m.memory.kind](
        m.memory,
        hidden_size=m.hidden_size,
        layer=layer,
        pool=pool,
        table=table,
        norm_eps=m.norm_eps,
        dtype=table.values.dtype,
        device=table.values.device,
        linear=fp8_linear(megatron_config) if in_fp8 else None,
        checkpoint=fp8_checkpoint if in_fp8 else None,
        tokens_group=groups.tp if config.parallel.tensor_parallel_size > 1 else None,
        data_group=groups.dp,
    )


def _provider(config: Config, backend: str) -> tuple[Any, type[torch.nn.Module]]:
    """The back end's linears, and the RMSNorm of `train.norms`."""
    norms = {"torch": RMSNorm, "ultramem": KernelRMSNorm}
    if backend == "local":
        return LocalSpecProvider(), norms.get(config.train.norms, RMSNorm)
    from megatron.core.extensions.transformer_engine import TENorm
    from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider

    return TESpecProvider(), norms.get(config.train.norms, TENorm)
