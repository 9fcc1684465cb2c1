"""Import of checkpoints of the released UltraMemV2 research code: an OLMo state dict with memory blocks.

Its forward differs from ours in names and order, not in numbers: keys are `[head, 2, n, Dk, r]`, SwiGLU's second half
is the gate, queries, keys and values are three blocks of one matrix, one query serves all Tucker ranks, and the shuffle
is stored. Each is turned around here, so that our layers compute the same logits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_ultramem.checkpoints_convert import shuffles
from megatron_ultramem.checkpoints_convert.account import check_sources
from megatron_ultramem.checkpoints_convert.checkpoint_target import Import, precision_of
from megatron_ultramem.checkpoints_convert.from_huggingface import complete_settings, in_precision
from megatron_ultramem.checkpoints_convert.links import grouped_qkv, renamed
from megatron_ultramem.checkpoints_convert.names import head_counts
from megatron_ultramem.checkpoints_convert.released_config import (
    BLOCK,
    MEMORY,
    POOL,
    Released,
    read_released_config,
    tensor_name,
)
from megatron_ultramem.checkpoints_convert.tensors import Recipe, Shape, TensorInfo, TensorReader
from megatron_ultramem.config.schema import Config
from megatron_ultramem.errors import CheckpointError, ConfigError
from megatron_ultramem.memory.geometry import plan_pools

WEIGHTS, SETTINGS = "model.pt", "config.yaml"


class StateDictReader:
    """`TensorReader` of a file that torch.save wrote; the file is mapped, so that only what is read is in memory."""

    def __init__(self, path: Path) -> None:
        """Raises CheckpointError if the file is missing, damaged, or holds something else than named tensors."""
        try:
            content: Any = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        except Exception as error:  # a damaged file can make unpickling raise anything
            raise CheckpointError(f"{path} cannot be read: {' '.join(str(error).split())}") from None
        if not isinstance(content, dict) or not all(isinstance(value, torch.Tensor) for value in content.values()):
            raise CheckpointError(f"{path} does not hold tensors by name; legal: an unsharded model.pt of OLMo")
        self._content: dict[str, torch.Tensor] = content
        self.tensors = {name: TensorInfo(tuple(tensor.shape), tensor.dtype) for name, tensor in content.items()}

    def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        return self._content[name][start:stop]


def import_released(folder: Path, home: Path, overrides: Sequence[str]) -> Import:
    """Reads what the folder (`model.pt`, `config.yaml`) is, and checks that it holds every tensor of that.

    Args:
        home: folder of the checkpoint, at the end.
        overrides: `section.setting=value`; model.memory.top_m where config.yaml has no mem_knn.

    Raises:
        CheckpointError: files are missing, damaged or contradictory, or the model has what the trainer has not.
        ConfigError: a setting is missing or does not fit.
    """
    reader = StateDictReader(folder / WEIGHTS)
    released = read_released_config(folder / SETTINGS, reader.tensors)
    if "top_m" not in released.model["memory"] and not any(o.startswith("model.memory.top_m=") for o in overrides):
        raise ConfigError(
            f"{folder / SETTINGS} has no mem_knn, the values activated per token; legal: model.memory.top_m=NUMBER "
            "behind the command"
        )
    precision = precision_of(reader.tensors, folder)
    tree = {"model": released.model, "train": {"precision": precision}}
    config, tokenizer = complete_settings(tree, folder, home, overrides, {}, None)
    recipes = list(_recipes(config, released, reader))
    check_sources(recipes, reader.tensors, folder, {})
    if released.shuffled:
        for layer in range(config.model.num_layers):
            name = tensor_name(MEMORY.format(layer) + "shuffle_index", reader.tensors)
            shuffles.check_permutation(name, reader.read(name))
    made = in_precision(recipes, precision, reader.tensors)
    assert config.model.vocab_size is not None
    return Import(config, config.model.vocab_size, tokenizer, reader, made)


def _recipes(config: Config, released: Released, reader: TensorReader) -> Iterator[Recipe]:
    def theirs(name: str) -> str:
        return tensor_name(name, reader.tensors)

    model = config.model
    assert model.vocab_size is not None
    vocabulary = (model.vocab_size, model.hidden_size)
    yield renamed(theirs("transformer.wte"), "embedding.word_embeddings.weight", vocabulary)
    for layer in range(model.num_layers):
        yield from _block(config, layer, theirs)
        yield from _memory(config, released, layer, reader.tensors, theirs)
    (pool,) = plan_pools(model)
    for ours, name, width in (
        ("values", "values_for_look_up", model.memory.value_dim),
        ("pre_values", "pre_values_for_look_up", model.memory.pre_value_dim),
    ):
        yield renamed(theirs(POOL + name), f"decoder.pools.0.{ours}", (pool.padded_rows, width))
    yield renamed(theirs("transformer.ln_f"), "decoder.final_layernorm.weight", (model.hidden_size,))
    if not model.tie_embeddings:
        yield renamed(theirs("transformer.ff_out"), "output_layer.weight", vocabulary)


def _block(config: Config, layer: int, theirs: Callable[[str], str]) -> Iterator[Recipe]:
    model, h, ffn = config.model, config.model.hidden_size, config.model.ffn_hidden_size
    block, ours = BLOCK.format(layer), f"decoder.layers.{layer}."
    heads, groups, width = head_counts(model)
    yield renamed(theirs(f"{block}attn_norm"), f"{ours}self_attention.linear_qkv.layer_norm_weight", (h,))
    yield _fused_qkv(theirs(f"{block}att_proj"), f"{ours}self_attention.linear_qkv.weight", heads, groups, width, h)
    if model.qk_norm:
        for name, count in (("q", heads), ("k", groups)):
            yield renamed(
                theirs(f"{block}{name}_norm"), f"{ours}self_attention.{name}_layernorm.weight", (count * width,)
            )
    yield renamed(theirs(f"{block}attn_out"), f"{ours}self_attention.linear_proj.weight", (h, heads * width))
    yield renamed(theirs(f"{block}ff_norm"), f"{ours}pre_mlp_layernorm.weight", (h,))
    yield _swiglu(theirs(f"{block}ff_proj"), f"{ours}mlp.ffn.linear_fc1.weight", ffn, h)
    yield renamed(theirs(f"{block}ff_out"), f"{ours}mlp.ffn.linear_fc2.weight", (h, ffn))


def _fused_qkv(source: str, target: str, heads: int, groups: int, width: int, h: int) -> Recipe:
    """All queries, all keys, all values, to Megatron's order by group."""
    shape = ((heads + 2 * groups) * width, h)

    def rows(reader: TensorReader, start: int, stop: int) -> torch.Tensor:
        q, k, v = reader.read(source).split([heads * width, groups * width, groups * width])
        return grouped_qkv(q, k, v, groups=groups)[start:stop]

    return Recipe(target, shape, {source: shape}, rows, note="by group")


def _swiglu(source: str, target: str, ffn: int, h: int) -> Recipe:
    """OLMo's gate is the second half, Megatron's the first."""

    def rows(reader: TensorReader, start: int, stop: int) -> torch.Tensor:
        return reader.read(source).roll(ffn, dims=0)[start:stop]

    return Recipe(target, (2 * ffn, h), {source: (2 * ffn, h)}, rows, note="halves exchanged")


def _memory(
    config: Config, released: Released, layer: int, tensors: Mapping[str, TensorInfo], theirs: Callable[[str], str]
) -> Iterator[Recipe]:
    memory, h = config.model.memory, config.model.hidden_size
    (pool,) = plan_pools(config.model)
    block, ours = MEMORY.format(layer), f"decoder.layers.{layer}.mlp.memory."
    heads, rank, width, keys = memory.num_heads, memory.tucker_rank, memory.key_dim, pool.keys_per_side
    yield _query(theirs(f"{block}query_proj"), f"{ours}query_proj.weight", config, released)
    yield renamed(theirs(f"{block}pre_values_proj"), f"{ours}pre_value_proj.weight", (memory.pre_value_dim, h))
    yield renamed(theirs(f"{block}values_proj"), f"{ours}value_proj.weight", (h, memory.value_dim))
    yield _keys(theirs(f"{block}keys"), f"{ours}retrieval.keys", (heads, 2, keys, rank, width))
    cores = [theirs(f"{block}tucker_core.{number}") for number in range(memory.num_cores)]
    yield _cores(cores, f"{ours}retrieval.cores", (heads, memory.num_cores, rank, rank), tensors)
    for name, gain in (("query_norm", "query_gain"), ("keys_norm", "key_gain")):
        yield renamed(theirs(block + name), f"{ours}retrieval.{gain}", (width,))
    for name, vector in (("tucker_core_u", "u"), ("tucker_core_v", "t")):
        there = _with_ones(tensors, theirs(block + name), (1, heads, 1, rank))
        yield _reshaped(theirs(block + name), f"{ours}retrieval.{vector}", there, (heads, rank))
    if released.shuffled:
        permutation = renamed(theirs(f"{block}shuffle_index"), shuffles.our_name(layer), (pool.virtual_rows,))
        yield shuffles.in_our_dtype(permutation, pool.virtual_rows)


def _query(source: str, target: str, config: Config, released: Released) -> Recipe:
    """Both heads use the first query; with a query for every rank, the others carry nothing."""
    memory, h = config.model.memory, config.model.hidden_size
    used = 2 * memory.key_dim
    rows_there = used * (memory.tucker_rank if released.query_per_rank else 1)

    def rows(reader: TensorReader, start: int, stop: int) -> torch.Tensor:
        return reader.read(source, 0, used).repeat(memory.num_heads, 1)[start:stop]

    note = f"first {used} rows: the others are not used" if released.query_per_rank else ""
    return Recipe(target, (memory.num_heads * used, h), {source: (rows_there, h)}, rows, note=note)


def _keys(source: str, target: str, shape: Shape) -> Recipe:
    heads, sides, keys, rank, width = shape

    def rows(reader: TensorReader, start: int, stop: int) -> torch.Tensor:
        return reader.read(source, start, stop).transpose(-1, -2)

    return Recipe(target, shape, {source: (heads, sides, keys, width, rank)}, rows, note="last two axes exchanged")


def _cores(sources: Sequence[str], target: str, shape: Shape, tensors: Mapping[str, TensorInfo]) -> Recipe:
    heads, _, rank, _ = shape

    def rows(reader: TensorReader, start: int, stop: int) -> torch.Tensor:
        cores = [reader.read(name).reshape(heads, rank, rank) for name in sources]
        return torch.stack(cores, dim=1)[start:stop]

    return Recipe(target, shape, {name: _with_ones(tensors, name, (heads, rank, rank)) for name in sources}, rows)


def _with_ones(tensors: Mapping[str, TensorInfo], name: str, shape: Shape) -> Shape:
    """The tensor's own shape where it has axes of length one more or fewer than `shape`, else `shape`."""
    own = tensors[name].shape if name in tensors else shape
    return own if [n for n in own if n != 1] == [n for n in shape if n != 1] else shape


def _reshaped(source: str, target: str, there: Shape, here: Shape) -> Recipe:
    def rows(reader: TensorReader, start: int, stop: int) -> torch.Tensor:
        return reader.read(source).reshape(here)[start:stop]

    return Recipe(target, here, {source: there}, rows)
