"""Exact parameter counts of a model, from its configuration alone.

Three numbers are called "active parameters" in the literature, and they differ by 5 % for UltraMemV2-227M/1.2B, so
this file says which is which:

- `ParameterCounts.total` is every parameter of the model that Megatron builds: the (tied) embedding once, all keys,
  padded vocabulary and padded pool rows included. It equals the sum of `numel()` over the modules.
- `ParameterCounts.active` is every parameter that one token's forward pass reads: all of `total` except the table
  rows that the token does not fetch and the experts it is not routed to. All product keys are scored, so all count.
- `ParameterCounts.published` follows the paper's table 10 (arXiv 2508.18756), whose counts are reproduced for both
  OLMoE-227M/1.18B and UltraMemV2-227M/1.2B by: keys counted at the n of one layer's own table (`num_keys`: 360)
  and not at the sqrt(g)*n keys (1138) that a layer which sees g tables really has; the embedding counted once in the
  active parameters and not at all in the total. With it UltraMemV2 has 224.3M active of 1.181B (published: 225M,
  1.18B) and OLMoE 228.4M of 1.181B (227M, 1.18B). The real UltraMemV2 reads 236.3M per token and has 1.231B.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_ultramem.config.schema import MemoryConfig, ModelConfig
from megatron_ultramem.memory.geometry import Pool, parse_layers, plan_pools
from megatron_ultramem.memory.kinds import blocks, kind_of, pre_value_dim, query_norm, query_width, replaces_ffn


@dataclass(frozen=True)
class PublishedCounts:
    """Active and total parameters by the convention of the paper's table 10 (see the top of the file)."""

    active: int
    total: int


@dataclass(frozen=True)
class ParameterCounts:
    """Parameters of a model, by part; the parts from `tables` to `norms` add up to `total`.

    `tables`: values and pre-values of all pools. `memory_dense`: everything else of the memory layers (projections,
    keys, key and query gains, Tucker cores). `attention`: projections and QK-norm gains. `ffn`: dense FFNs. `moe`:
    routers, experts and shared experts. `embedding`: input embedding, and the output matrix when it is not tied.
    `norms`: the two norms of every block and the final one.
    """

    total: int
    active: int
    tables: int
    memory_dense: int
    attention: int
    ffn: int
    moe: int
    embedding: int
    norms: int
    published: PublishedCounts


@dataclass(frozen=True)
class LayerParameters:
    """Parameters of one block, value tables aside; what tensor parallelism does not split is apart.

    `attention`: projections; `attention_gains`: of the QK-norm; `norms`: the two of the block; `ffn`: the dense one;
    `router`, `experts` (all of them) and `shared_expert` of an MoE; `memory`: the memory layer outside its pool.
    """

    attention: int
    attention_gains: int
    norms: int
    ffn: int = 0
    router: int = 0
    experts: int = 0
    shared_expert: int = 0
    memory: int = 0

    @property
    def moe(self) -> int:
        return self.router + self.experts + self.shared_expert


def pad_vocabulary(model: ModelConfig, vocab_size: int) -> int:
    """Rows of the embedding: `vocab_size` rounded up to a multiple of `model.vocab_size_multiple`."""
    multiple = model.vocab_size_multiple
    return (vocab_size + multiple - 1) // multiple * multiple


def attention_dims(model: ModelConfig) -> tuple[int, int, int]:
    """(head width, total query width, total key width) of attention."""
    head_dim = model.head_dim or model.hidden_size // model.num_attention_heads
    groups = model.num_query_groups or model.num_attention_heads
    return head_dim, head_dim * model.num_attention_heads, head_dim * groups


def row_width(memory: MemoryConfig) -> int:
    """Elements of one row of a pool, over all of its tables."""
    return memory.value_dim + pre_value_dim(memory)


def row_bytes(memory: MemoryConfig, element: int) -> int:
    """What a lookup reads of one row, of tables in `element` bytes; in FP8 codes, and an fp32 scale for each table."""
    if memory.table_read != "fp8":
        return element * row_width(memory)
    return row_width(memory) + 4 * (2 if pre_value_dim(memory) else 1)


def rows_per_token(memory: MemoryConfig) -> int:
    """Rows of a pool that one memory layer reads for a token."""
    return memory.num_heads * memory.top_m


def layer_parameters(model: ModelConfig) -> list[LayerParameters]:
    """Parameters of every block, in the order of the layers."""
    hidden, moe = model.hidden_size, model.moe
    _, query_dim, key_dim = attention_dims(model)
    moe_layers = set(parse_layers(moe.layers, model.num_layers, "model.moe.layers"))
    pool_of = {layer: pool for pool in plan_pools(model) for layer in pool.layers}
    without_ffn = moe_layers | ffn_replaced(model)
    return [
        LayerParameters(
            attention=hidden * (query_dim + 2 * key_dim) + query_dim * hidden,
            attention_gains=_attention_gains(model),
            norms=2 * hidden,
            ffn=0 if layer in without_ffn else 3 * hidden * model.ffn_hidden_size,
            router=hidden * moe.num_experts if layer in moe_layers else 0,
            experts=moe.num_experts * expert_parameters(model) if layer in moe_layers else 0,
            shared_expert=_shared_expert(model) if layer in moe_layers else 0,
            memory=_memory_layer(model.memory, hidden, pool_of[layer].keys_per_side) if layer in pool_of else 0,
        )
        for layer in range(model.num_layers)
    ]


def ffn_replaced(model: ModelConfig) -> set[int]:
    """Layers whose memory takes the place of their FFN."""
    if not replaces_ffn(model.memory):
        return set()
    return set(parse_layers(model.memory.layers, model.num_layers, "model.memory.layers"))


def _attention_gains(model: ModelConfig) -> int:
    """Of the norms of queries and keys."""
    if not model.qk_norm:
        return 0
    head_dim, query_dim, key_dim = attention_dims(model)
    return query_dim + key_dim if model.qk_norm_width == "all_heads" else 2 * head_dim


def _shared_expert(model: ModelConfig) -> int:
    gate = model.hidden_size if model.moe.shared_expert_gate else 0
    return 3 * model.hidden_size * model.moe.shared_expert_hidden_size + gate


def expert_parameters(model: ModelConfig) -> int:
    """Of one SwiGLU expert."""
    return 3 * model.hidden_size * model.moe.ffn_hidden_size


def table_parameters(memory: MemoryConfig, pool: Pool) -> int:
    """Of all tables of a pool, padding included."""
    return pool.padded_rows * row_width(memory)


def count_parameters(model: ModelConfig, vocab_size: int) -> ParameterCounts:
    """Counts of `model` with `vocab_size` tokens (padded here as the model pads it). Definitions at the top."""
    layers, memory, pools = layer_parameters(model), model.memory, plan_pools(model)
    attention = sum(layer.attention + layer.attention_gains for layer in layers)
    norms = sum(layer.norms for layer in layers) + model.hidden_size
    ffn, moe = sum(layer.ffn for layer in layers), sum(layer.moe for layer in layers)
    moe_layers = sum(layer.experts > 0 for layer in layers)
    moe_active = moe - moe_layers * (model.moe.num_experts - model.moe.top_k) * expert_parameters(model)

    embedding_once = pad_vocabulary(model, vocab_size) * model.hidden_size
    embedding = embedding_once if model.tie_embeddings else 2 * embedding_once

    tables = sum(table_parameters(memory, pool) for pool in pools)
    memory_layers = sum(len(pool.layers) for pool in pools)
    rows_read = rows_per_token(memory) * row_width(memory) * memory_layers
    memory_dense = sum(layer.memory for layer in layers)
    memory_own_keys = memory_layers * _memory_layer(memory, model.hidden_size, memory.num_keys)

    common = attention + ffn + norms
    return ParameterCounts(
        total=common + moe + embedding + memory_dense + tables,
        active=common + moe_active + embedding + memory_dense + rows_read,
        tables=tables,
        memory_dense=memory_dense,
        attention=attention,
        ffn=ffn,
        moe=moe,
        embedding=embedding,
        norms=norms,
        published=PublishedCounts(
            active=common + moe_active + embedding_once + memory_own_keys + rows_read,
            total=common + moe + memory_own_keys + sum(pool.rows * row_width(memory) for pool in pools),
        ),
    )


def _memory_layer(memory: MemoryConfig, hidden: int, keys_per_side: int) -> int:
    """Parameters of one memory layer outside its pool."""
    query, side_keys = query_width(memory), 2 * memory.num_heads * keys_per_side * memory.key_dim
    if kind_of(memory).tucker:
        projections = hidden * (query + pre_value_dim(memory) + blocks(memory) * memory.value_dim)
        cores = memory.num_heads * memory.num_cores * memory.tucker_rank**2
        return projections + side_keys * memory.tucker_rank + cores + 2 * memory.key_dim
    gate_and_value = 2 * hidden * memory.value_dim if memory.kind == "memory_plus" else 0
    norm = {"rms": 2 * memory.key_dim, "batch": 2 * query, "none": 0}[query_norm(memory)]
    return hidden * query + gate_and_value + side_keys + norm
