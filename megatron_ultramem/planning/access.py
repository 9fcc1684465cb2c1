"""Bytes of parameters that a token costs in memory access, in training and in decoding, beside an equal MoE.

Parameters are read from memory once for all tokens that are computed together, so that a token pays a share: all of the
dense weights, the experts that any of the tokens chose, and the rows that it looked up, which no other token shares
(an upper bound: tokens of a batch may want the same row). Training reads weights twice (forward, and for the gradient
of the input) and reads, adds and writes fp32 gradients.

The equal MoE has the same attention, embedding and widths; its experts (top-8, evenly chosen) take the place of FFN and
memory, with the same parameters in all and the same active ones.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_ultramem.planning.parameters import row_bytes, row_width, rows_per_token
from megatron_ultramem.planning.workload import Layer, Workload

EQUAL_MOE_TOP_K = 8
DECODING_BATCHES = (1, 8, 64, 512)
GRADIENT = 8  # bytes of an fp32 gradient read and written


@dataclass(frozen=True)
class EqualMoE:
    """Experts that stand for the FFN and memory of a model; `num_experts` need not be whole."""

    num_experts: float
    top_k: int
    expert_parameters: float


@dataclass(frozen=True)
class Access:
    """Bytes a token, over all layers and without embedding and attention's cache."""

    dense: float  # attention, FFN, routers, keys and projections of memory, output layer
    experts: float
    rows: float

    @property
    def total(self) -> float:
        return self.dense + self.experts + self.rows


@dataclass(frozen=True)
class Comparison:
    """One situation: `tokens` computed together, for the model and (with memory layers) for its equal MoE."""

    situation: str
    tokens: int
    model: Access
    moe: Access | None


def equal_moe(work: Workload) -> EqualMoE | None:
    """One block's experts; None without memory layers."""
    if not work.pools:
        return None
    rows = rows_per_token(work.model.memory) * row_width(work.model.memory)
    with_memory = [layer for layer in work.layers if layer.has_memory]
    top_k, expert = work.model.moe.top_k, _one_expert(work)
    active = sum(_replaced(layer) + (top_k * expert if layer.has_moe else 0) for layer in work.layers)
    active += len(with_memory) * rows
    tables = sum(pool.rows for pool in work.pools) * row_width(work.model.memory)
    total = sum(_replaced(layer) + layer.parameters.experts for layer in work.layers) + tables
    size = active / len(work.layers) / EQUAL_MOE_TOP_K
    return EqualMoE(total / len(work.layers) / size, EQUAL_MOE_TOP_K, size)


def training_access(work: Workload, tokens: int, element: int) -> Comparison:
    """`tokens` of one micro-batch on a rank that holds the whole model."""
    rows = 2 * row_bytes(work.model.memory, element) + GRADIENT * row_width(work.model.memory)
    return _compare(work, "training", tokens, 2 * element + GRADIENT, rows)


def decoding_access(work: Workload, batch: int, element: int) -> Comparison:
    """One new token for each of `batch` sequences."""
    return _compare(work, "decoding", batch, element, row_bytes(work.model.memory, element))


def _compare(work: Workload, situation: str, tokens: int, per_parameter: float, per_row: float) -> Comparison:
    model = work.model
    attention = sum(layer.parameters.attention for layer in work.layers) + work.vocabulary * model.hidden_size
    own = Access(
        dense=per_parameter * (attention + sum(_replaced(layer) for layer in work.layers)) / tokens,
        experts=per_parameter
        * sum(
            _experts_read(layer.parameters.experts, model.moe.num_experts, model.moe.top_k, tokens)
            for layer in work.layers
        )
        / tokens,
        rows=per_row * rows_per_token(model.memory) * sum(layer.has_memory for layer in work.layers),
    )
    moe = equal_moe(work)
    if moe is None:
        return Comparison(situation, tokens, own, None)
    experts = _experts_read(moe.num_experts * moe.expert_parameters, moe.num_experts, moe.top_k, tokens)
    router = moe.num_experts * model.hidden_size
    return Comparison(
        situation,
        tokens,
        own,
        Access(
            dense=per_parameter * (attention + len(work.layers) * router) / tokens,
            experts=per_parameter * len(work.layers) * experts / tokens,
            rows=0.0,
        ),
    )


def _experts_read(parameters: float, num_experts: float, top_k: int, tokens: int) -> float:
    """Parameters of the experts that at least one of the tokens chose, expected, of a layer's `parameters`."""
    if not parameters:
        return 0.0
    return parameters * (1 - (1 - top_k / num_experts) ** tokens)


def _replaced(layer: Layer) -> int:
    """Weights of FFN and memory that every token reads."""
    p = layer.parameters
    return p.ffn + p.memory + p.shared_expert + p.router


def _one_expert(work: Workload) -> int:
    with_moe = next((layer for layer in work.layers if layer.has_moe), None)
    return with_moe.parameters.experts // work.model.moe.num_experts if with_moe else 0
