"""Builds the model chunks of this rank. The one file that uses Megatron's GPTModel."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_ultramem.config.schema import Config
from megatron_ultramem.config.validate import stage_of_layer
from megatron_ultramem.memory.base import MemoryLayer
from megatron_ultramem.memory.geometry import plan_pools
from megatron_ultramem.memory.tables import Placement, ValuePool
from megatron_ultramem.memory.tucker_layer import refresh_layers
from megatron_ultramem.model.fp8 import plain_parameters
from megatron_ultramem.model.initialize import initialize
from megatron_ultramem.model.pools import PoolBank
from megatron_ultramem.model.specs import block_spec
from megatron_ultramem.model.transformer_config import dtype_of, linear_std, transformer_config
from megatron_ultramem.parallel.placement import memory_placement


def padded_vocab_size(config: Config, vocab_size: int) -> int:
    """Rows of the embedding: the same under every layout, so that checkpoints fit all of them."""
    multiple = config.model.vocab_size_multiple
    return math.ceil(vocab_size / multiple) * multiple


def build_chunks(
    config: Config, vocab_size: int, backend: str, device: torch.device, *, draw_parameters: bool = True
) -> tuple[TransformerConfig, list[GPTModel]]:
    """The initialised model chunks of this rank, one for each virtual pipeline stage, in fp32 or bf16.

    Needs Megatron's process groups. Every parameter has the same numbers under every layout.

    Args:
        vocab_size: of the tokenizer (or model.vocab_size), before padding.
        backend: 'local' or 'transformer_engine'.
        draw_parameters: false leaves them as allocated, for a checkpoint to fill.
    """
    megatron_config = transformer_config(config, backend)
    megatron_config.perform_initialization = draw_parameters
    groups = ProcessGroupCollection.use_mpu_process_groups()
    placement = memory_placement(config, groups)
    chunks = [
        _build_chunk(config, megatron_config, stage, vocab_size, backend, device, groups, placement)
        for stage in range(config.parallel.virtual_pipeline_stages)
    ]
    if draw_parameters:
        with plain_parameters(chunks):
            initialize(chunks, config.train.seed, linear_std(config))
        refresh_layers(memory_layers(chunks))
    return megatron_config, chunks


def memory_layers(chunks: list[GPTModel]) -> list[MemoryLayer]:
    """The memory layers on this rank, in the order of their layers."""
    return [module for chunk in chunks for module in chunk.modules() if isinstance(module, MemoryLayer)]


def value_pools(chunks: Sequence[torch.nn.Module]) -> list[ValuePool]:
    """The value pools on this rank."""
    return [module for chunk in chunks for module in chunk.modules() if isinstance(module, ValuePool)]


def _build_chunk(
    config: Config,
    megatron_config: TransformerConfig,
    virtual_stage: int,
    vocab_size: int,
    backend: str,
    device: torch.device,
    groups: ProcessGroupCollection,
    placement: Placement,
) -> GPTModel:
    m, p = config.model, config.parallel
    stage = parallel_state.get_pipeline_model_parallel_rank()
    home = (stage, virtual_stage)
    stages = stage_of_layer(config)
    layers = [layer for layer, place in enumerate(stages) if place == home]
    pools = [pool for pool in plan_pools(m) if stages[pool.layers[0]] == home]
    tables = {
        pool.index: ValuePool(
            m.memory,
            pool,
            hidden_size=m.hidden_size,
            num_layers=m.num_layers,
            ffn_ratio=m.ffn_hidden_size / m.hidden_size,
            placement=placement,
            dtype=dtype_of(config),
            device=device,
        )
        for pool in pools
    }
    vp_stage = virtual_stage if p.virtual_pipeline_stages > 1 else None
    model = GPTModel(
        config=megatron_config,
        transformer_layer_spec=block_spec(config, range(layers[0], layers[-1] + 1), tables, backend, megatron_config),
        vocab_size=padded_vocab_size(config, vocab_size),
        max_sequence_length=m.max_sequence_length,
        pre_process=home == (0, 0),
        post_process=home == (p.pipeline_parallel_size - 1, p.virtual_pipeline_stages - 1),
        share_embeddings_and_output_weights=m.tie_embeddings,
        position_embedding_type="rope",
        rotary_base=m.rope_base,
        vp_stage=vp_stage,
    )
    if tables:
        # As a child of the decoder, the bank is saved by name and belongs to this stage.
        model.decoder.pools = PoolBank(megatron_config, list(tables.values()), groups)
    _mark_expert_parameters(model)
    if config.train.fused_weight_gradients:
        _fuse_weight_gradients(model)
    return model.to(device)


def _fuse_weight_gradients(model: torch.nn.Module) -> None:
    """Transformer Engine's linears add weight gradients to `main_grad` within the GEMM. Megatron's setting for it,
    gradient_accumulation_fusion, would ask the same of Megatron's own output layer, which needs Apex for it."""
    for module in model.modules():
        if hasattr(module, "fuse_wgrad_accumulation"):
            module.fuse_wgrad_accumulation = True  # type: ignore[assignment]


def _mark_expert_parameters(model: torch.nn.Module) -> None:
    """Puts experts into Megatron's expert buffers whatever the expert parallelism is, and into the gradient norm.

    Without expert parallelism Megatron takes experts for ordinary parameters; under tensor parallelism with expert
    tensor parallelism of 1 their gradients would then never be summed over the tensor-parallel ranks, which hold
    different tokens. And 0.16 counts an expert in the norm on tensor-parallel rank 0 alone, though the ranks hold
    different experts (or shards of their optimizer state).
    """
    for module in model.modules():
        if isinstance(module, MoELayer):
            for param in module.experts.parameters():
                param.allreduce = False
                param.tensor_model_parallel = True
