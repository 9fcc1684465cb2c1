"""What tells the kinds of memory layer (`model.memory.kind`) apart, for everything that needs no tensors. Pure Python.

| kind | retrieval | tables | in the block |
|---|---|---|---|
| ultramem_v2 (2508.18756) | Tucker, separate queries per rank | values and pre-values | beside the FFN |
| ultramem (2411.12364) | Tucker, one query per side | values, seen E times over | beside the FFN, or of a later block |
| memory_plus (2412.09764) | product keys, softmax | values, one table for all layers; silu gate | instead of the FFN |
| pkm (1907.05242) | product keys, softmax | values as wide as the model | instead of the FFN |
| peer (2407.04153) | product keys, softmax | experts of one neuron: pre-values in, values out | instead of the FFN |
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the config package checks its settings with this module: importing it here would be a circle
    from megatron_ultramem.config.schema import MemoryConfig


@dataclass(frozen=True)
class Kind:
    """The settings of `model.memory` that a kind has, and what it does where they are null.

    Attributes:
        tucker: scores by Tucker cores, without softmax; else by sums of product keys, with softmax.
        has_pre_values: a row's weight also depends on its pre-value.
        replaces_ffn: the block has no FFN unless `replaces_ffn` says otherwise.
        own_widths: value_dim (and pre_value_dim) are free; else they are the model's width.
        one_table: all layers of a pool see the same single table.
        shares: `sharing` may be other than none.
        query_norm: of product-key queries.
        tucker_penalty: weight of the Tucker penalty.
    """

    tucker: bool = False
    has_pre_values: bool = False
    replaces_ffn: bool = True
    own_widths: bool = True
    one_table: bool = False
    shares: bool = True
    query_norm: str = "none"
    tucker_penalty: float = 0.0


KINDS = {
    "ultramem_v2": Kind(tucker=True, has_pre_values=True, replaces_ffn=False),
    "ultramem": Kind(tucker=True, replaces_ffn=False, shares=False, tucker_penalty=0.001),
    "memory_plus": Kind(one_table=True, shares=False, query_norm="rms"),
    "pkm": Kind(own_widths=False, query_norm="batch"),
    "peer": Kind(has_pre_values=True, own_widths=False, query_norm="batch"),
}


def kind_of(memory: MemoryConfig) -> Kind:
    return KINDS[memory.kind]


def pre_value_dim(memory: MemoryConfig) -> int:
    """Dp, 0 where the kind has no pre-values."""
    return memory.pre_value_dim if kind_of(memory).has_pre_values else 0


def num_cores(memory: MemoryConfig) -> int:
    """C, scores of a selected row: one for product keys."""
    return memory.num_cores if kind_of(memory).tucker else 1


def activation(memory: MemoryConfig) -> str:
    """On the pre-value dot product: 'none' or 'gelu'."""
    return "gelu" if memory.kind == "peer" else memory.activation


def blocks(memory: MemoryConfig) -> int:
    """E: virtual blocks over one physical table (UltraMem's implicit value expansion)."""
    return memory.value_expansion if memory.kind == "ultramem" else 1


def query_ranks(memory: MemoryConfig) -> int:
    """Queries per head and side."""
    return memory.tucker_rank if memory.kind == "ultramem_v2" and memory.query_per_rank else 1


def query_width(memory: MemoryConfig) -> int:
    """Output width of the query projection."""
    return memory.num_heads * 2 * query_ranks(memory) * memory.key_dim


def query_norm(memory: MemoryConfig) -> str:
    """Of product-key queries: 'rms', 'batch' or 'none'. (Tucker kinds always have their RMSNorm.)"""
    return memory.query_norm or kind_of(memory).query_norm


def replaces_ffn(memory: MemoryConfig) -> bool:
    """Whether a block with memory has no FFN."""
    return kind_of(memory).replaces_ffn if memory.replaces_ffn is None else memory.replaces_ffn


def tucker_penalty(memory: MemoryConfig) -> float:
    """Weight of the Tucker penalty."""
    return kind_of(memory).tucker_penalty if memory.tucker_penalty_coeff is None else memory.tucker_penalty_coeff


def pair_candidates(k: int, m: int) -> int:
    """Pairs that the exact pass of product keys scores; see `product_keys.best_pairs`."""
    return sum(min(k, m // (row + 1)) for row in range(min(k, m)))
