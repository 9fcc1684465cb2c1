"""Every tensor of a model under its name in our checkpoints and in a Hugging Face folder, from the configuration.

Their names are those of transformers' Llama and OLMoE for what these have too, so the same list serves to import them.
"""

from __future__ import annotations

from collections.abc import Iterator

from megatron_ultramem.checkpoints_convert.links import GroupedQkv, Link, Same, Stacked
from megatron_ultramem.checkpoints_convert.names_of_memory import memory_links, table_links
from megatron_ultramem.config.schema import ModelConfig
from megatron_ultramem.memory.geometry import join_layers, parse_layers, plan_pools
from megatron_ultramem.planning.parameters import ffn_replaced

FP32 = (
    ".retrieval.u",
    ".retrieval.t",
    ".query_norm.running_mean",
    ".query_norm.running_var",
    ".expert_bias",
)
"""How the names of buffers end, on both sides, that are fp32 in every model."""


def model_links(model: ModelConfig, vocab_rows: int, *, expert_files: bool = False) -> list[Link]:
    """All tensors, in the order of the layers.

    Args:
        vocab_rows: of the embedding, padding included.
        expert_files: theirs has a tensor for every projection of every expert (OLMoE as published) and not two for
            all experts together.
    """
    h = model.hidden_size
    moe = set(parse_layers(model.moe.layers, model.num_layers, "model.moe.layers"))
    pools = plan_pools(model)
    pool_of = {layer: pool for pool in pools for layer in pool.layers}
    # Blocks whose FFN shares its slot with memory of this block, or with what memory of an earlier one sends.
    wrapped = {*pool_of, *join_layers(model).values()}
    without_ffn = ffn_replaced(model)
    links: list[Link] = [Same("embedding.word_embeddings.weight", "model.embed_tokens.weight", (vocab_rows, h))]
    for layer in range(model.num_layers):
        pool = pool_of.get(layer)
        links += _attention(model, layer)
        links.append(_feed_forward_norm(model, layer, layer in moe or layer in wrapped))
        if layer not in without_ffn:
            links += _feed_forward(model, layer, layer in moe, layer in wrapped, expert_files)
        if pool is not None:
            links += memory_links(model, layer, pool)
    for pool in pools:
        links += table_links(model, pool)
    links.append(Same("decoder.final_layernorm.weight", "model.norm.weight", (h,)))
    if not model.tie_embeddings:
        links.append(Same("output_layer.weight", "lm_head.weight", (vocab_rows, h)))
    return links


def head_counts(model: ModelConfig) -> tuple[int, int, int]:
    """(heads, groups, head width) of attention."""
    heads = model.num_attention_heads
    return heads, model.num_query_groups or heads, model.head_dim or model.hidden_size // heads


def _attention(model: ModelConfig, layer: int) -> Iterator[Link]:
    ours, theirs, h = f"decoder.layers.{layer}.self_attention.", f"model.layers.{layer}.", model.hidden_size
    heads, groups, width = head_counts(model)
    # Megatron's local layers save this norm as if it were fused into the projection, as Transformer Engine's is.
    yield Same(f"{ours}linear_qkv.layer_norm_weight", f"{theirs}input_layernorm.weight", (h,))
    q, k, v = (f"{theirs}self_attn.{name}_proj.weight" for name in "qkv")
    yield GroupedQkv(f"{ours}linear_qkv.weight", (q, k, v), heads, groups, width, h)
    if model.qk_norm:
        whole = model.qk_norm_width == "all_heads"
        for name, count in (("q", heads), ("k", groups)):
            shape = (count * width if whole else width,)
            yield Same(f"{ours}{name}_layernorm.weight", f"{theirs}self_attn.{name}_norm.weight", shape)
    yield Same(f"{ours}linear_proj.weight", f"{theirs}self_attn.o_proj.weight", (h, heads * width))


def _feed_forward_norm(model: ModelConfig, layer: int, apart: bool) -> Link:
    """apart: the norm is a module of its own, and not fused into the FFN's first linear."""
    name = "pre_mlp_layernorm.weight" if apart else "mlp.linear_fc1.layer_norm_weight"
    theirs = f"model.layers.{layer}.post_attention_layernorm.weight"
    return Same(f"decoder.layers.{layer}.{name}", theirs, (model.hidden_size,))


def _feed_forward(model: ModelConfig, layer: int, moe: bool, wrapped: bool, expert_files: bool) -> Iterator[Link]:
    theirs, h = f"model.layers.{layer}.", model.hidden_size
    ffn = f"decoder.layers.{layer}.mlp.ffn." if wrapped else f"decoder.layers.{layer}.mlp."
    if not moe:
        yield from _swiglu(ffn, f"{theirs}mlp.", model.ffn_hidden_size, h)
        return
    experts, width = model.moe.num_experts, model.moe.ffn_hidden_size
    yield Same(f"{ffn}router.weight", f"{theirs}mlp.gate.weight", (experts, h))
    if model.moe.expert_bias:
        yield Same(f"{ffn}router.expert_bias", f"{theirs}mlp.gate.expert_bias", (experts,))
    fc1, fc2 = (f"{ffn}experts.experts.linear_{name}.weight" for name in ("fc1", "fc2"))
    shape1, shape2 = (experts, 2 * width, h), (experts, h, width)
    if expert_files:
        names = [f"{theirs}mlp.experts.{number}." for number in range(experts)]
        parts = [(f"{name}{side}_proj.weight", width) for name in names for side in ("gate", "up")]
        yield Stacked(fc1, shape1, tuple(parts))
        yield Stacked(fc2, shape2, tuple((f"{name}down_proj.weight", h) for name in names))
    else:
        yield Same(fc1, f"{theirs}mlp.experts.gate_up_proj", shape1)
        yield Same(fc2, f"{theirs}mlp.experts.down_proj", shape2)
    if model.moe.shared_expert_hidden_size:
        shared = model.moe.shared_expert_hidden_size
        yield from _swiglu(f"{ffn}shared_experts.", f"{theirs}mlp.shared_expert.", shared, h)
        if model.moe.shared_expert_gate:
            yield Same(f"{ffn}shared_experts.gate_weight", f"{theirs}mlp.shared_expert_gate.weight", (1, h))


def _swiglu(ours: str, theirs: str, width: int, h: int) -> Iterator[Link]:
    parts = ((f"{theirs}gate_proj.weight", width), (f"{theirs}up_proj.weight", width))
    yield Stacked(f"{ours}linear_fc1.weight", (2 * width, h), parts)
    yield Same(f"{ours}linear_fc2.weight", f"{theirs}down_proj.weight", (h, width))
