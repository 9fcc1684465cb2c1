"""Every tensor of a model under its name in our checkpoints and in a Hugging Face folder, from the configuration.

Their names are those of transformers' Llama and OLMoE for what these have too, so the same list serves to import them.
"""

from __future__ import annotations

from collections.abc import Iterator

from megatron_ultramem.checkpoints_convert.links import GroupedQkv, Link, Same, Stacked
from megatron_ultramem.config.schema import ModelConfig
from megatron_ultramem.memory.geometry import Pool, parse_layers, plan_pools


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
    links: list[Link] = [Same("embedding.word_embeddings.weight", "model.embed_tokens.weight", (vocab_rows, h))]
    for layer in range(model.num_layers):
        pool = pool_of.get(layer)
        links += _attention(model, layer)
        links += _feed_forward(model, layer, layer in moe, pool is not None, expert_files)
        if pool is not None:
            links += _memory(model, layer, pool)
    for pool in pools:
        links += _tables(model, pool)
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


def _feed_forward(model: ModelConfig, layer: int, moe: bool, memory: bool, expert_files: bool) -> Iterator[Link]:
    ours, theirs, h = f"decoder.layers.{layer}.", f"model.layers.{layer}.", model.hidden_size
    norm = "pre_mlp_layernorm.weight" if moe or memory else "mlp.linear_fc1.layer_norm_weight"
    yield Same(ours + norm, f"{theirs}post_attention_layernorm.weight", (h,))
    ffn = f"{ours}mlp.ffn." if memory else f"{ours}mlp."
    if not moe:
        yield from _swiglu(ffn, f"{theirs}mlp.", model.ffn_hidden_size, h)
        return
    experts, width = model.moe.num_experts, model.moe.ffn_hidden_size
    yield Same(f"{ffn}router.weight", f"{theirs}mlp.gate.weight", (experts, h))
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


def _swiglu(ours: str, theirs: str, width: int, h: int) -> Iterator[Link]:
    parts = ((f"{theirs}gate_proj.weight", width), (f"{theirs}up_proj.weight", width))
    yield Stacked(f"{ours}linear_fc1.weight", (2 * width, h), parts)
    yield Same(f"{ours}linear_fc2.weight", f"{theirs}down_proj.weight", (h, width))


def _memory(model: ModelConfig, layer: int, pool: Pool) -> Iterator[Link]:
    memory, h = model.memory, model.hidden_size
    heads, rank, width = memory.num_heads, memory.tucker_rank, memory.key_dim
    query_width = heads * 2 * (rank if memory.query_per_rank else 1) * width
    for name, shape in (
        ("query_proj.weight", (query_width, h)),
        ("pre_value_proj.weight", (memory.pre_value_dim, h)),
        ("value_proj.weight", (h, memory.value_dim)),
        ("retrieval.keys", (heads, 2, pool.keys_per_side, rank, width)),
        ("retrieval.cores", (heads, memory.num_cores, rank, rank)),
        ("retrieval.query_gain", (width,)),
        ("retrieval.key_gain", (width,)),
        ("retrieval.u", (heads, rank)),
        ("retrieval.t", (heads, rank)),
    ):
        yield Same(f"decoder.layers.{layer}.mlp.memory.{name}", f"model.layers.{layer}.memory.{name}", shape)


def _tables(model: ModelConfig, pool: Pool) -> Iterator[Link]:
    for name, width in (("values", model.memory.value_dim), ("pre_values", model.memory.pre_value_dim)):
        shape = (pool.padded_rows, width)
        yield Same(f"decoder.pools.{pool.index}.{name}", f"model.pools.{pool.index}.{name}", shape)
