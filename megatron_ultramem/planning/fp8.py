"""What FP8 matrix products (train.fp8) change in a plan: which weights and inputs they concern, and what a block keeps.

Transformer Engine's linears multiply codes of one byte at the FP8 peak. Their bf16 inputs, and the gradients of their
outputs, are cast before (`calibration.FP8_CAST_BYTES`); weights are cast once a step, or not at all where they exist in
FP8 alone. A weight takes 2 bytes more, its codes as they are and transposed, unless they are all there is. For its
backward a linear keeps its input as codes, which spares half of what nobody else keeps; attention keeps its own output
anyway, and the router the input of an MoE.

Keys, Tucker scores, tables, norms, the router, the embedding and the output layer are as without FP8.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_ultramem.config.schema import Config, ModelConfig
from megatron_ultramem.config.validate_fp8 import fp8_projections
from megatron_ultramem.planning.activations import Saved
from megatron_ultramem.planning.flops import MemoryFlops
from megatron_ultramem.planning.parameters import attention_dims
from megatron_ultramem.planning.workload import Layer


@dataclass(frozen=True)
class Fp8:
    """
    Attributes:
        recipe: train.fp8.recipe.
        share: of the layers, whose products are in FP8.
        projections: those of memory layers too.
        only_codes: the weights exist in FP8 alone.
    """

    recipe: str
    share: float
    projections: bool
    only_codes: bool


def fp8_of(config: Config) -> Fp8 | None:
    """None: no product is in FP8."""
    fp8, layers = config.train.fp8, config.model.num_layers
    if fp8.recipe == "none":
        return None
    in_bf16 = fp8.num_layers_at_start_in_bf16 + fp8.num_layers_at_end_in_bf16 if fp8.first_last_layers_bf16 else 0
    share = max(0, layers - in_bf16) / layers
    return Fp8(fp8.recipe, share, fp8_projections(config), fp8.param_gather)


def projection_weights(layer: Layer) -> float:
    """Of a memory layer: queries, pre-values, gate, values."""
    m = layer.flops.memory
    return 0.0 if m is None else sum(_projections_of_input(m) + (m.value_projection,)) / 2


def _projections_of_input(m: MemoryFlops) -> tuple[float, ...]:
    """FLOPs of the projections that a memory layer's input goes through; 0 where a kind has none."""
    return m.query_projection, m.pre_value_projection, m.gate_projection


def linears_of_block(layer: Layer, fp8: Fp8) -> int:
    """Transformer Engine's linears of a block that are in FP8; those of an MoE's experts count as two."""
    p, m = layer.parameters, layer.flops.memory
    number = 2 + 2 * (p.ffn > 0) + 2 * (p.shared_expert > 0) + 2 * layer.has_moe
    if m is not None and fp8.projections:
        number += sum(flops > 0 for flops in (*_projections_of_input(m), m.value_projection))
    return number


def weights_of_rank(layer: Layer, fp8: Fp8, tensor: int, expert_group: int) -> float:
    """Of a block's linears in FP8, on a rank."""
    p = layer.parameters
    own = (p.attention + p.ffn + p.shared_expert) / tensor + p.experts / expert_group
    return fp8.share * (own + (projection_weights(layer) if fp8.projections else 0.0))


def copies(layer: Layer, fp8: Fp8 | None, tensor: int, expert_group: int) -> float:
    """Bytes of a rank for a block's weights in FP8, beside those of the parameters."""
    if fp8 is None or fp8.only_codes:  # two codes take what a bf16 weight takes
        return 0.0
    return 2.0 * weights_of_rank(layer, fp8, tensor, expert_group)


def saved_difference(model: ModelConfig, layer: Layer, fp8: Fp8, element: int, *, recompute_memory: bool) -> Saved:
    """Bytes a token that a block keeps for its backward beyond those of bf16 (negative: fewer), of all its layers."""
    hidden, p, moe = model.hidden_size, layer.parameters, model.moe
    spared = element - 1
    _, query, _ = attention_dims(model)
    stream = -float(hidden * spared)  # the normalised input of attention's linear
    inner = float(query)  # attention's output, once more
    copies_of_input, kept_anyway = 0, layer.has_moe  # of the second norm's output
    if p.ffn:
        copies_of_input, inner = copies_of_input + 1, inner - model.ffn_hidden_size * spared
    if p.shared_expert:
        copies_of_input, inner = copies_of_input + 1, inner - moe.shared_expert_hidden_size * spared
    if layer.has_moe:
        inner -= moe.top_k * (hidden + moe.ffn_hidden_size) * spared
    memory, m = 0.0, layer.flops.memory
    if m is not None and fp8.projections and not recompute_memory:
        copies_of_input += sum(flops > 0 for flops in _projections_of_input(m))
        memory = -m.value_projection / 2 / hidden * spared  # the pooled values
        kept_anyway |= model.memory.kind == "peer"  # the input of its lookup
    elif m is not None:
        kept_anyway = True
    stream += hidden * (copies_of_input - (0 if kept_anyway else element))
    return Saved(fp8.share * stream, fp8.share * inner, fp8.share * memory)
