"""The tensors of memory layers and of their pools, by kind of layer. Both sides call them alike."""

from __future__ import annotations

from megatron_ultramem.checkpoints_convert.links import Same
from megatron_ultramem.checkpoints_convert.tensors import Shape
from megatron_ultramem.config.schema import ModelConfig
from megatron_ultramem.memory.geometry import Pool
from megatron_ultramem.memory.kinds import blocks, kind_of, pre_value_dim, query_norm, query_width


def memory_links(model: ModelConfig, layer: int, pool: Pool) -> list[Same]:
    """Of one memory layer, without its permutation (`shuffles.py`) and its pool."""
    shapes: dict[str, Shape] = {"query_proj.weight": (query_width(model.memory), model.hidden_size)}
    shapes |= _projections(model)
    shapes |= {f"retrieval.{name}": shape for name, shape in _retrieval(model, pool).items()}
    return [
        Same(f"decoder.layers.{layer}.mlp.memory.{name}", f"model.layers.{layer}.memory.{name}", shape)
        for name, shape in shapes.items()
    ]


def table_links(model: ModelConfig, pool: Pool) -> list[Same]:
    """Of one pool."""
    widths = {"values": model.memory.value_dim, "pre_values": pre_value_dim(model.memory)}
    return [
        Same(f"decoder.pools.{pool.index}.{name}", f"model.pools.{pool.index}.{name}", (pool.padded_rows, width))
        for name, width in widths.items()
        if width
    ]


def _projections(model: ModelConfig) -> dict[str, Shape]:
    memory, h = model.memory, model.hidden_size
    if memory.kind == "ultramem_v2":
        return {"pre_value_proj.weight": (memory.pre_value_dim, h), "value_proj.weight": (h, memory.value_dim)}
    if memory.kind == "ultramem":
        return {"value_proj.weight": (h, blocks(memory) * memory.value_dim)}
    if memory.kind == "memory_plus":
        return {"gate_proj.weight": (memory.value_dim, h), "value_proj.weight": (h, memory.value_dim)}
    return {}  # pkm and peer: rows are as wide as the model


def _retrieval(model: ModelConfig, pool: Pool) -> dict[str, Shape]:
    memory = model.memory
    heads, width, keys = memory.num_heads, memory.key_dim, pool.keys_per_side
    gains: dict[str, Shape] = {"query_gain": (width,), "key_gain": (width,)}
    if kind_of(memory).tucker:
        rank = memory.tucker_rank
        return {
            "keys": (heads, 2, keys, rank, width),
            "cores": (heads, memory.num_cores, rank, rank),
            **gains,
            "u": (heads, rank),
            "t": (heads, rank),
        }
    norm = query_norm(memory)
    batch = {f"query_norm.{name}": (query_width(memory),) for name in ("weight", "bias", "running_mean", "running_var")}
    return {"keys": (heads, 2, keys, width), **(gains if norm == "rms" else batch if norm == "batch" else {})}
