"""What a block keeps for its backward pass, in bytes for each token.

Counted tensor by tensor from what the operations save (tests compare with the tensors that autograd really holds):

- `transformer_engine`: fused norms keep their input and output; attention keeps rotated queries and keys, values,
  output and the logarithm of its normaliser; SwiGLU keeps both halves of its input, the next linear its output.
- `local`: torch's own operations in parts, with the scores of attention in full.

Tensors as wide as the residual stream are split by sequence parallelism alone, those inside attention and the FFN by
tensor parallelism with or without it. A memory layer computes on the rank's own tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_ultramem.config.schema import ModelConfig
from megatron_ultramem.parallel.cost_model import Estimate
from megatron_ultramem.planning.activations_memory import saved_by_memory, selected_keys
from megatron_ultramem.planning.parameters import attention_dims
from megatron_ultramem.planning.workload import Layer


@dataclass(frozen=True)
class Options:
    """What decides which tensors are kept."""

    backend: str  # 'local' or 'transformer_engine'
    fused_memory: bool  # memory layers by the kernels
    element: int  # bytes of an activation
    sequence_length: int
    recompute: str  # 'none', 'selective', 'full'
    recompute_memory: bool
    fused_loss: bool = False  # train.cross_entropy=transformer_engine


@dataclass(frozen=True)
class Saved:
    """Bytes a token: of tensors as wide as the stream, of those inside attention and FFN, of the memory layer."""

    stream: float
    inner: float
    memory: float

    def __add__(self, other: Saved) -> Saved:
        return Saved(self.stream + other.stream, self.inner + other.inner, self.memory + other.memory)

    def on_rank(self, tokens: float, tensor: int, sequence_parallel: bool) -> float:
        """Bytes on one of `tensor` ranks for `tokens` of a micro-batch (its share under context parallelism)."""
        stream = self.stream / tensor if sequence_parallel else self.stream
        return tokens * (stream + (self.inner + self.memory) / tensor)


def saved_by_block(model: ModelConfig, layer: Layer, placement: Estimate, options: Options, tokens: float) -> Saved:
    """Of one block. What `recompute=full` leaves of it is the input alone, which is the caller's business.

    `tokens`: of a rank in a memory layer, on which some sizes of an exchange depend.
    """
    te = options.backend == "transformer_engine"
    inner = _attention(model, options) if te else _local_attention(model, options)
    # torch's own SwiGLU keeps two products more.
    glu = 3 if te else 5
    if layer.parameters.ffn:
        inner += glu * model.ffn_hidden_size * options.element
    if layer.has_moe:
        inner += _moe(model, options, glu)
    memory = 0.0
    if layer.has_memory and options.recompute_memory:
        memory = selected_keys(model.memory, options.fused_memory)
    elif layer.has_memory:
        memory = saved_by_memory(model.memory, placement, options.fused_memory, options.element, tokens)
    return Saved(_stream(model, options), inner, memory)


def block_input(model: ModelConfig, options: Options) -> Saved:
    """What is left of a block that is recomputed whole."""
    return Saved(float(model.hidden_size * options.element), 0.0, 0.0)


def _stream(model: ModelConfig, options: Options) -> float:
    """Both norms: input, output and factor; torch's own also keeps the normalised input, and that and the input in
    fp32."""
    if options.backend == "transformer_engine":
        return 2.0 * (2 * model.hidden_size * options.element + 4)
    return 2.0 * (model.hidden_size * (8 + options.element) + 4)


def _attention(model: ModelConfig, options: Options) -> float:
    heads, groups = model.num_attention_heads, model.num_query_groups or model.num_attention_heads
    _, query, key = attention_dims(model)
    saved = float(options.element * (2 * query + 2 * key))  # rotated queries and keys, values, output
    if model.qk_norm:
        saved += options.element * (query + key) + 4 * (heads + groups)
    return saved + 4 * heads


def _local_attention(model: ModelConfig, options: Options) -> float:
    heads, groups = model.num_attention_heads, model.num_query_groups or model.num_attention_heads
    _, query, key = attention_dims(model)
    size, repeated = options.element, groups < heads
    saved = float(size * 3 * query)  # rotated queries, keys of every head, output
    if repeated:
        saved += size * query  # values of every head
    if not repeated or (model.qk_norm and size == 4):
        saved += size * (query + 2 * key)  # the fused projection, of which values or keys before their norm are views
    if model.qk_norm:
        saved += 4 * (query + key) + 4 * (heads + groups)
        if size < 4:
            saved += 4 * (query + key)
        elif repeated:
            saved += 4 * query
    if options.recompute == "none":
        saved += heads * options.sequence_length * (4 if size == 4 else 4 + size)  # in fp32, then as they are
    return saved


def _moe(model: ModelConfig, options: Options, glu: int) -> float:
    """Inputs and activations of the chosen experts, if all are chosen evenly, and the router's figures."""
    moe, size = model.moe, options.element
    weighting = 0 if options.backend == "transformer_engine" else 1  # by the router's probability, fused or not
    experts = moe.top_k * (size * (model.hidden_size + (glu + weighting) * moe.ffn_hidden_size) + 40)
    return experts + glu * moe.shared_expert_hidden_size * size + moe.num_experts * 9
