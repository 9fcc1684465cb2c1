"""Memory of a rank, part by part, in bytes: what stays, what forward passes in flight keep, and what comes and goes.

The peak is the larger of two moments: the loss of the last stage, when the logits exist several times over, and the
backward pass of a block. `peak` is what torch's allocator hands out at that moment; `required` adds what it holds but
cannot use. The device must also hold what torch does not see (`Cluster.reserved_gib`).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, fields

from megatron_ultramem.memory.kinds import query_width
from megatron_ultramem.planning.activations import Options, Saved, block_input, saved_by_block
from megatron_ultramem.planning.fp8 import copies, saved_difference
from megatron_ultramem.planning.layout import Layout, rank_parameters
from megatron_ultramem.planning.parameters import row_bytes, row_width
from megatron_ultramem.planning.workload import Layer, Stage, Workload

GIB = 2**30
# Bytes for each logit at the peak of the loss. Transformer Engine back end: the logits, and their compiled softmax and
# its gradient out of place in fp32; twice the logits with train.cross_entropy=transformer_engine (on one H100:
# 35.3 GiB for ultramemv2_227m_1b with preset=throughput). Local: in place, on an fp32 copy if the logits are bf16.
LOSS_BYTES = {("transformer_engine", 2): 10, ("transformer_engine", 4): 12, ("local", 2): 6, ("local", 4): 4}


@dataclass(frozen=True)
class RankMemory:
    """Bytes on a rank of one pipeline stage at its peak.

    `weights` (with their copies in FP8), `gradients` and `optimizer` (master weights and moments) of dense parameters
    and experts, apart from those of value tables (whose weights include what lookups read in their place); `buffers`:
    shuffle permutations; `activations` kept for backward passes; `loss`: logits and their gradients; `exchange`:
    messages of the memory exchange, of expert dispatch and of gathers; `workspace`: temporaries of the block that
    computes; `set_up`: by which building the optimizer takes more than all of these; `fragmentation`: allowance for
    what the allocator cannot use.
    """

    weights: float
    gradients: float
    optimizer: float
    table_weights: float
    table_gradients: float
    table_optimizer: float
    buffers: float
    activations: float
    loss: float
    exchange: float
    workspace: float
    set_up: float
    fragmentation: float

    @property
    def peak(self) -> float:
        """What torch counts as allocated."""
        return self.required - self.fragmentation

    @property
    def required(self) -> float:
        return float(sum(getattr(self, part.name) for part in fields(self)))


def stage_memory(
    work: Workload, layout: Layout, stage: Stage, options: Options, fragmentation: float = 0.0
) -> RankMemory:
    """Of a rank of `stage`; `fragmentation` is a share of everything that comes and goes."""
    kept = rank_parameters(work, layout, stage)
    size, master = layout.element, 12 if layout.element == 2 else 8  # fp32 weights need no other master
    shards, table_shards = (
        (layout.data * layout.context, layout.expert_data) if layout.distributed_optimizer else (1, 1)
    )
    tokens = layout.micro_batch * work.sequence_length / layout.context
    own = tokens / layout.tensor  # in a memory layer

    in_flight = micro_batches_in_flight(layout, stage.number)
    whole = {
        layer: _saved(work, layout, layer, options, own).on_rank(tokens, layout.tensor, layout.sequence_parallel)
        for layer, _ in stage.layers
    }
    recompute = options.recompute == "full"
    left = block_input(work.model, options).on_rank(tokens, layout.tensor, layout.sequence_parallel)
    activations = in_flight * sum(count * (left if recompute else whole[layer]) for layer, count in stage.layers)
    if stage.has_output:  # input and output of the final norm, once: the last stage runs its backward at once
        activations += 2 * left
    a_logit = 2 * size if options.fused_loss else LOSS_BYTES[options.backend, size]
    loss = work.vocabulary / layout.tensor * tokens * a_logit if stage.has_output else 0.0
    workspace = max(_workspace(work, layout, layer, options, tokens) for layer, _ in stage.layers)
    if recompute:
        workspace += max(whole.values())
    elif options.recompute_memory:
        again = dataclasses.replace(options, recompute_memory=False)
        workspace += own * max(_saved(work, layout, layer, again, own).memory for layer, _ in stage.layers)
    exchange = max(_exchange(work, layout, layer, tokens) for layer, _ in stage.layers)
    if loss > workspace + exchange:
        workspace = exchange = 0.0
    else:
        loss = 0.0
    found = RankMemory(
        weights=size * (kept.dense + kept.experts)
        + sum(count * copies(layer, layout.fp8, layout.tensor, layout.expert_group) for layer, count in stage.layers),
        gradients=4 * (kept.dense + kept.experts),
        optimizer=master * (kept.dense / shards + kept.experts / table_shards),
        table_weights=size * kept.tables + _copies(work, layout, kept.tables),
        table_gradients=4 * kept.tables,
        table_optimizer=0.0 if layout.tables_on_host else master * kept.tables / table_shards,
        buffers=sum(count * _permutation(work, layer) for layer, count in stage.layers),
        activations=activations,
        loss=loss,
        exchange=exchange,
        workspace=workspace,
        set_up=0.0,
        fragmentation=fragmentation * (activations + loss + exchange + workspace),
    )
    return dataclasses.replace(found, set_up=max(0.0, _set_up(layout, stage, found) - found.peak))


def _saved(work: Workload, layout: Layout, layer: Layer, options: Options, own: float) -> Saved:
    """What a block keeps for its backward, by a token."""
    saved = saved_by_block(work.model, layer, layout.placement, options, own)
    if layout.fp8 is None:
        return saved
    return saved + saved_difference(
        work.model, layer, layout.fp8, options.element, recompute_memory=options.recompute_memory
    )


def _set_up(layout: Layout, stage: Stage, memory: RankMemory) -> float:
    """What a rank holds while its optimizer is built, where that may be the most: with the fp32 master weights of
    tables, which go to the host afterwards, and a copy of the last of them, but without moments."""
    if not layout.tables_on_host or layout.element == 4:
        return 0.0
    table_shards = layout.expert_data if layout.distributed_optimizer else 1
    masters = memory.optimizer / 3 + memory.table_gradients / table_shards
    copy = layout.element * stage.largest_table / layout.expert_group / table_shards
    held = memory.weights + memory.gradients + memory.table_weights + memory.table_gradients + memory.buffers
    return held + masters + copy


def _copies(work: Workload, layout: Layout, tables: int) -> float:
    """What lookups read in place of so many parameters of tables (table_read = fp8): 1 byte each, and an fp32 scale for
    each row, whole however its columns are shared."""
    memory = work.model.memory
    if memory.table_read != "fp8" or not tables:
        return 0.0
    rows = tables * layout.placement.columns / row_width(memory)
    return tables + rows * (row_bytes(memory, 1) - row_width(memory))


def host_memory(layout: Layout, tables: int) -> float:
    """Bytes of the host that the optimizer of a rank's tables takes (optimizer.value_offload), of so many parameters:
    fp32 master weights, two moments, and the gradient on its way."""
    if not layout.tables_on_host:
        return 0.0
    return 16.0 * tables / (layout.expert_data if layout.distributed_optimizer else 1)


def micro_batches_in_flight(layout: Layout, stage: int) -> float:
    """Forward passes of the stage that wait for their backward at its peak, in micro-batches (1F1B and interleaved)."""
    after = layout.pipeline - stage
    if layout.chunks == 1:
        return min(after, layout.micro_batches)
    chunks = 2 * (after - 1) + (layout.chunks - 1) * layout.pipeline + 1
    return min(chunks, layout.micro_batches * layout.chunks) / layout.chunks


def _permutation(work: Workload, layer: Layer) -> float:
    if not work.model.memory.shuffle:
        return 0.0
    return layer.virtual_rows * (4 if layer.virtual_rows < 2**31 else 8)


def _workspace(work: Workload, layout: Layout, layer: Layer, options: Options, tokens: float) -> float:
    """Gradients inside the block that is computing: of the FFN's inner activations, or of the side scores."""
    model, size = work.model, layout.element
    ffn = model.ffn_hidden_size if layer.parameters.ffn else 0
    if layer.has_moe:
        ffn = model.moe.top_k * model.moe.ffn_hidden_size + model.moe.shared_expert_hidden_size
    inner = tokens / layout.tensor * size * (3 * ffn + 2 * model.hidden_size)
    if not layer.has_memory:
        return inner
    memory = model.memory
    scores = layer.side_scores / memory.num_heads  # head after head
    retrieval = tokens / layout.tensor * size * (scores + 2 * query_width(memory))
    return max(inner, retrieval)


def _exchange(work: Workload, layout: Layout, layer: Layer, tokens: float) -> float:
    """Messages, as sent and as received, of the largest exchange inside a block."""
    size, hidden = layout.element, work.model.hidden_size
    gathered = tokens * hidden * size if layout.tensor > 1 else 0.0  # the whole sequence, or its reduction
    lookup = 2.0 * layout.placement.forward_bytes if layer.has_memory else 0.0
    dispatched = 0.0
    if layer.has_moe and layout.expert_group > 1:
        dispatched = 2 * tokens / layout.tensor * work.model.moe.top_k * hidden * size
    return max(gathered, lookup, dispatched)
