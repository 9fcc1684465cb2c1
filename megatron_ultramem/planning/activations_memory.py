"""What a memory layer keeps for its backward pass, in bytes for each token of a rank, its exchange included.

Legend: M rows a token (of all heads), C cores, Dv and D widths of values and pre-values, P ranks of an exchange, and Q
queries a token, (token, owner) pairs of the exchange by rows.
"""

from __future__ import annotations

import math

from megatron_ultramem.config.schema import MemoryConfig, ModelConfig
from megatron_ultramem.parallel.cost_model import Estimate
from megatron_ultramem.parallel.traffic import core_range
from megatron_ultramem.planning.parameters import query_width, rows_per_token


def selected_keys(memory: MemoryConfig, fused: bool) -> float:
    """What a recomputed layer keeps beside its input: the selected keys of both sides."""
    return 2.0 * rows_per_token(memory) * (4 if fused else 8)


def saved_by_memory(model: ModelConfig, placement: Estimate, fused: bool, element: int, tokens: float) -> float:
    """Of one layer; its normalised keys, which do not grow with the tokens, are left out.

    `tokens`: of the rank, on which the fullest query of an exchange by rows depends. `fused`: by the kernels.
    """
    memory = model.memory
    rows, rank, queries = rows_per_token(memory), memory.tucker_rank, query_width(memory)
    saved = selected_keys(memory, fused) + 4 * 2 * rank * rows  # side scores at the selected keys
    saved += element * memory.value_dim  # pooled values
    if fused:
        saved += 2 * element * queries  # before and after their norm
    else:
        # Input (in fp32) and normalised input of the norm, its factors, its output; row scores times cores.
        saved += 8 * queries + 4 * queries / memory.key_dim + (element * queries if element < 4 else 4 * queries)
        saved += 4 * rank * memory.num_cores * rows
    return saved + saved_by_lookup(memory, placement, fused, element, tokens)


def saved_by_lookup(memory: MemoryConfig, placement: Estimate, fused: bool, element: int, tokens: float) -> float:
    """Row numbers, scores and pre-inputs, of the rank's own tokens or of those that it looks up for."""
    rows, cores, pre = rows_per_token(memory), memory.num_cores, memory.pre_value_dim * element
    if placement.placement == "replicated":
        return (4 if fused else 8) * rows + 4 * rows * cores + pre
    if placement.placement == "columns":
        return _columns(memory, placement.columns, element, own_scores=4)
    queries, across = placement.queries, placement.ranks // placement.columns
    routing = 8 * queries + 8 * rows + 8 * rows  # token of a query, entry sent, place of an entry received
    if placement.placement == "rows":
        width = rows if placement.static else fullest_query(across, rows, tokens)
        return routing + queries * (width * (4 + element * cores) + pre)
    return routing + queries * _columns(memory, placement.columns, element, own_scores=element)


def fullest_query(ranks: int, rows: int, tokens: float) -> float:
    """Most rows that any query of a rank wants of one owner, if rows are spread evenly: mean and a tail of the
    binomial distribution."""
    mean = rows / ranks
    return min(float(rows), mean + math.sqrt(2 * mean * math.log(max(2.0, tokens * ranks))))


def _columns(memory: MemoryConfig, ranks: int, element: int, own_scores: int) -> float:
    """Row numbers, pre-inputs and weights of all ranks' tokens; dots and scores of the rank's own."""
    rows = rows_per_token(memory)
    low, high = core_range(0, ranks, memory.value_dim, memory.num_cores)
    of_all = ranks * rows * (4 + element * (high - low)) + element * memory.pre_value_dim
    return of_all + 4 * rows + own_scores * rows * memory.num_cores
