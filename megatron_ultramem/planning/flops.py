"""FLOPs of one token, term by term. A multiply-add counts 2; training counts 3 forwards (recompute adds nothing, so
the figures built on this are model FLOP/s, not hardware FLOP/s).

Conventions: causal attention counts only the unmasked half, that is (S + 1) / 2 keys per query on average; norms,
activations, rotary embedding, softmax, top-k selection and the embedding lookup count nothing; the logits are
computed over the padded vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from megatron_ultramem.config.schema import MemoryConfig, ModelConfig
from megatron_ultramem.memory.geometry import coarse_k, parse_layers, plan_pools
from megatron_ultramem.memory.kinds import blocks, kind_of, pair_candidates, pre_value_dim, query_width
from megatron_ultramem.planning.parameters import (
    attention_dims,
    ffn_replaced,
    pad_vocabulary,
    row_width,
    rows_per_token,
)


@dataclass(frozen=True)
class MemoryFlops:
    """Forward FLOPs of memory layers per token.

    Symbols: n keys per side seen by the layer, r Tucker rank (1 for product keys), c cores, k coarse candidates per
    side, m values, H heads, E blocks of `ultramem` (else 1). What a kind does not have is 0.
    """

    query_projection: float  # 2 h * 2 Dk r H; r = 1 where the ranks share a query
    pre_value_projection: float  # 2 h Dp (peer: none)
    gate_projection: float  # 2 h Dv (memory_plus)
    value_projection: float  # 2 E Dv h (pkm, peer: none)
    key_scores: float  # row and column: 2 sides * 2 n r Dk H
    coarse_combination: float  # Tucker: S_row u and S_col t: 2 sides * 2 n r H
    exact_scores: float  # Tucker: S_row[i] (sum of cores) S_col[j] on k x k pairs, each core at the m selected ones:
    # H (2 k r^2 + 2 k^2 r) + H c m (2 r^2 + 2 r);
    # product keys: a sum for each of the pairs that can be among the best
    lookup: float  # (P x') and V^T: H m (2 Dp + 2 Dv)

    @property
    def total(self) -> float:
        return sum(getattr(self, term.name) for term in fields(self))


@dataclass(frozen=True)
class FlopsPerToken:
    """FLOPs per token of all layers together; `forward` adds them up, `training` is forward and backward."""

    attention_projections: float
    attention_scores: float
    ffn: float
    moe: float
    logits: float
    memory: MemoryFlops

    @property
    def attention(self) -> float:
        return self.attention_projections + self.attention_scores

    @property
    def forward(self) -> float:
        return self.attention + self.ffn + self.moe + self.logits + self.memory.total

    @property
    def training(self) -> float:
        return 3 * self.forward


@dataclass(frozen=True)
class LayerFlops:
    """Forward FLOPs per token of one block; `memory` is None without a memory layer."""

    attention_projections: float
    attention_scores: float
    ffn: float
    moe: float
    memory: MemoryFlops | None


def layer_flops(model: ModelConfig, sequence_length: int) -> list[LayerFlops]:
    """Forward FLOPs per token of every block, averaged over the positions of a sequence."""
    hidden, moe = model.hidden_size, model.moe
    _, query_dim, key_dim = attention_dims(model)
    moe_layers = set(parse_layers(moe.layers, model.num_layers, "model.moe.layers"))
    pool_of = {layer: pool for pool in plan_pools(model) for layer in pool.layers}
    without_ffn = moe_layers | ffn_replaced(model)
    experts_width = moe.top_k * moe.ffn_hidden_size + moe.shared_expert_hidden_size
    router_width = moe.num_experts + int(moe.shared_expert_gate)
    return [
        LayerFlops(
            attention_projections=2.0 * hidden * (2 * query_dim + 2 * key_dim),
            attention_scores=2 * 2.0 * query_dim * (sequence_length + 1) / 2,
            ffn=0.0 if layer in without_ffn else 2.0 * 3 * hidden * model.ffn_hidden_size,
            moe=2.0 * hidden * (router_width + 3 * experts_width) if layer in moe_layers else 0.0,
            memory=_memory_layer_flops(model.memory, hidden, pool_of[layer].keys_per_side)
            if layer in pool_of
            else None,
        )
        for layer in range(model.num_layers)
    ]


def logits_flops(model: ModelConfig, vocab_size: int) -> float:
    """Forward FLOPs per token of the output layer."""
    return 2.0 * model.hidden_size * pad_vocabulary(model, vocab_size)


def flops_per_token(model: ModelConfig, vocab_size: int, sequence_length: int) -> FlopsPerToken:
    """FLOPs of one token of a sequence of `sequence_length` tokens, averaged over its positions."""
    layers = layer_flops(model, sequence_length)
    memory = [layer.memory for layer in layers if layer.memory is not None]
    return FlopsPerToken(
        attention_projections=sum(layer.attention_projections for layer in layers),
        attention_scores=sum(layer.attention_scores for layer in layers),
        ffn=sum(layer.ffn for layer in layers),
        moe=sum(layer.moe for layer in layers),
        logits=logits_flops(model, vocab_size),
        memory=MemoryFlops(
            **{term.name: sum(getattr(layer, term.name) for layer in memory) for term in fields(MemoryFlops)}
        ),
    )


def _memory_layer_flops(memory: MemoryConfig, hidden: int, keys_per_side: int) -> MemoryFlops:
    kind, heads, k = kind_of(memory), memory.num_heads, coarse_k(memory, keys_per_side)
    rank, cores = (memory.tucker_rank, memory.num_cores) if kind.tucker else (1, 1)
    at_selected = cores * memory.top_m * (2 * rank**2 + 2 * rank)
    tucker_pairs, sums = 2 * k * rank**2 + 2 * k**2 * rank + at_selected, pair_candidates(k, memory.top_m)
    return MemoryFlops(
        query_projection=2.0 * hidden * query_width(memory),
        pre_value_projection=2.0 * hidden * pre_value_dim(memory) if kind.tucker else 0.0,
        gate_projection=2.0 * hidden * memory.value_dim if memory.kind == "memory_plus" else 0.0,
        value_projection=2.0 * blocks(memory) * memory.value_dim * hidden if kind.own_widths else 0.0,
        key_scores=2 * 2.0 * keys_per_side * rank * memory.key_dim * heads,
        coarse_combination=2 * 2.0 * keys_per_side * rank * heads if kind.tucker else 0.0,
        exact_scores=float(heads * (tucker_pairs if kind.tucker else sums)),
        lookup=2.0 * rows_per_token(memory) * row_width(memory),
    )
