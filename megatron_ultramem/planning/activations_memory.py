"""What a memory layer keeps for its backward pass, in bytes for each token of a rank, its exchange included.

Legend: M rows a token (of all heads), C cores, E blocks, Dv and D widths of values and pre-values, P ranks of an
exchange, and Q queries a token, (token, owner) pairs of the exchange by rows. Normalised keys, which do not grow with
the tokens, are left out.
"""

from __future__ import annotations

import math

from megatron_ultramem.config.schema import MemoryConfig
from megatron_ultramem.memory.kinds import blocks, kind_of, num_cores, pre_value_dim, query_norm, query_width
from megatron_ultramem.parallel.cost_model import Estimate
from megatron_ultramem.parallel.traffic import core_range
from megatron_ultramem.planning.parameters import rows_per_token


def selected_keys(memory: MemoryConfig, fused: bool) -> float:
    """What a recomputed layer keeps beside its input: the selected keys of both sides."""
    return 2.0 * rows_per_token(memory) * (4 if fused and kind_of(memory).tucker else 8)


def saved_by_memory(memory: MemoryConfig, placement: Estimate, fused: bool, element: int, tokens: float) -> float:
    """Of one layer.

    `tokens`: of the rank, on which the fullest query of an exchange by rows depends. `fused`: by the kernels.
    """
    saved = _retrieval(memory, fused, element) + selected_keys(memory, fused)
    saved += saved_by_lookup(memory, placement, fused, element, tokens)
    values = element * memory.value_dim
    if memory.kind == "memory_plus":  # pooled values, gate before and after its SiLU, their product
        return saved + 4 * values
    if memory.kind == "ultramem":  # pooled values of every block, and where each score went
        return saved + blocks(memory) * values + 8 * rows_per_token(memory)
    return saved + (values if kind_of(memory).own_widths else 0)


def _retrieval(memory: MemoryConfig, fused: bool, element: int) -> float:
    rows, queries = rows_per_token(memory), query_width(memory)
    # torch's own RMSNorm: its input and normalised input in fp32, factors, output.
    parts = 8 * queries + 4 * queries / memory.key_dim + (element * queries if element < 4 else 4 * queries)
    if kind_of(memory).tucker:
        side_scores = 8.0 * memory.tucker_rank * rows  # at the selected keys
        if fused:
            return side_scores + 2 * element * queries  # before and after the norm
        return side_scores + parts + 4 * memory.tucker_rank * memory.num_cores * rows  # row scores times cores
    normed = {"rms": parts, "batch": parts, "none": float(element * queries)}[query_norm(memory)]
    return normed + 4 * rows  # softmax


def saved_by_lookup(memory: MemoryConfig, placement: Estimate, fused: bool, element: int, tokens: float) -> float:
    """Row numbers, scores and pre-inputs, of the rank's own tokens or of those that it looks up for."""
    rows, cores, own = rows_per_token(memory), num_cores(memory), blocks(memory)
    # PEER's pre-input is the layer's input, which is kept anyway.
    pre = element * pre_value_dim(memory) if kind_of(memory).own_widths else 0
    if placement.placement == "replicated":
        number = 4 if fused and kind_of(memory).tucker else 8
        return own * rows * (number + 4 * cores) + pre
    if placement.placement == "columns":
        return own * _columns(memory, placement.columns, element, own_scores=4)
    queries, across = placement.queries, placement.ranks // placement.columns
    routing = 8 * queries + 8 * rows + 8 * rows  # token of a query, entry sent, place of an entry received
    if placement.placement == "rows":
        width = rows if placement.static else fullest_query(across, rows / own, tokens * own)
        return routing + queries * (width * (4 + element * cores) + element * pre_value_dim(memory))
    return routing + queries * _columns(memory, placement.columns, element, own_scores=element)


def fullest_query(ranks: int, rows: float, tokens: float) -> float:
    """Most rows that any query of a rank wants of one owner, if rows are spread evenly: mean and a tail of the
    binomial distribution."""
    mean = rows / ranks
    return min(float(rows), mean + math.sqrt(2 * mean * math.log(max(2.0, tokens * ranks))))


def _columns(memory: MemoryConfig, ranks: int, element: int, own_scores: int) -> float:
    """Row numbers, pre-inputs and weights of all ranks' tokens; dots and scores of the rank's own."""
    rows = rows_per_token(memory)
    low, high = core_range(0, ranks, memory.value_dim, num_cores(memory))
    of_all = ranks * rows * (4 + element * (high - low)) + element * pre_value_dim(memory)
    dots = 4 * rows if pre_value_dim(memory) else 0
    return of_all + dots + own_scores * rows * num_cores(memory)
