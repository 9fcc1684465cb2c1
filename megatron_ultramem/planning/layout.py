"""Sizes that a layout gives: ranks, tokens of a rank, micro-batches, and parameters on every rank."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_ultramem.config.schema import Config
from megatron_ultramem.config.validate_memory import expert_group_size
from megatron_ultramem.parallel.cost_model import Estimate, choose
from megatron_ultramem.planning.fp8 import Fp8, fp8_of
from megatron_ultramem.planning.workload import Stage, Workload


@dataclass(frozen=True)
class Layout:
    """A legal layout of a run over `gpus` ranks."""

    gpus: int
    tensor: int
    pipeline: int
    chunks: int  # model chunks of a rank (virtual pipeline stages)
    context: int
    expert_group: int  # ranks that share experts and value tables
    data: int  # data-parallel replicas
    micro_batch: int  # samples
    micro_batches: int  # of a rank in a step
    sequence_parallel: bool
    distributed_optimizer: bool
    tables_on_host: bool  # the optimizer of the value tables
    overlap_param_gather: bool
    element: int  # bytes of a parameter or an activation
    placement: Estimate  # of the value tables, with what one lookup moves
    fp8: Fp8 | None  # matrix products

    @property
    def expert_data(self) -> int:
        """Ranks that hold the same experts and table shards."""
        return self.gpus // (self.pipeline * self.expert_group)


def layout_of(config: Config, gpus: int) -> Layout:
    """The sizes of `config` on `gpus` ranks; it must be legal (config/validate.py) on that number."""
    p = config.parallel
    data = gpus // (p.tensor_parallel_size * p.pipeline_parallel_size * p.context_parallel_size)
    return Layout(
        gpus=gpus,
        tensor=p.tensor_parallel_size,
        pipeline=p.pipeline_parallel_size,
        chunks=p.virtual_pipeline_stages,
        context=p.context_parallel_size,
        expert_group=expert_group_size(config),
        data=data,
        micro_batch=config.train.micro_batch_size,
        micro_batches=config.train.global_batch_size // (config.train.micro_batch_size * data),
        sequence_parallel=p.tensor_parallel_size > 1 if p.sequence_parallel is None else p.sequence_parallel,
        distributed_optimizer=p.distributed_optimizer,
        tables_on_host=config.optimizer.value_offload != "none",
        overlap_param_gather=p.overlap_param_gather,
        element=2 if config.train.precision == "bf16" else 4,
        placement=choose(config),
        fp8=fp8_of(config),
    )


@dataclass(frozen=True)
class RankParameters:
    """Parameters that a rank of one stage holds.

    `dense` are reduced over all data-parallel ranks; `experts` and `tables` over those that hold the same shard.
    """

    dense: int
    experts: int
    tables: int

    @property
    def total(self) -> int:
        return self.dense + self.experts + self.tables


def rank_parameters(work: Workload, layout: Layout, stage: Stage) -> RankParameters:
    """Counts of a rank; every rank of a stage holds the same number."""
    tp, hidden = layout.tensor, work.model.hidden_size
    matrix = work.vocabulary * hidden // tp
    dense = experts = 0
    for layer, count in stage.layers:
        p = layer.parameters
        gate = hidden if p.shared_expert and work.model.moe.shared_expert_gate else 0
        split = (p.attention + p.ffn + p.shared_expert - gate) // tp
        dense += count * (split + gate + p.attention_gains + p.norms + p.router + p.memory)
        experts += count * p.experts // layout.expert_group
    if stage.has_embedding:
        dense += matrix
    if stage.has_output:
        dense += hidden  # the final norm
        if not work.model.tie_embeddings or not stage.has_embedding:
            dense += matrix
    return RankParameters(dense, experts, stage.tables // layout.expert_group)
