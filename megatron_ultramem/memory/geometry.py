"""Which layers share which value tables, and where each layer's window of rows lies. Pure Python.

A *pool* is the set of value tables of a group of consecutive memory layers, one table of n*n rows per layer. A layer
sees g (`share_size`) of them through floor(sqrt(g)*n) keys per side. A virtual row v (after the shuffle) is the
physical row `(v + offset) mod rows` of the pool. Two kinds differ: layers of a `memory_plus` pool see one and the same
table, and a table of `ultramem` is seen E (`value_expansion`) times over, through floor(sqrt(E)*n) keys per side.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron_ultramem.errors import ConfigError
from megatron_ultramem.memory.kinds import blocks, kind_of, num_cores, tucker_penalty

if TYPE_CHECKING:  # the config package checks its settings with this module: importing it here would be a circle
    from megatron_ultramem.config.schema import MemoryConfig, ModelConfig


@dataclass(frozen=True)
class Pool:
    """The tables of one group of memory layers. All sizes are in rows, `keys_per_side` in keys.

    `virtual_rows` (keys_per_side squared) may be a little smaller than the g*table_rows of the window, because keys
    per side are a whole number, and is larger than `rows` where a table is seen several times over. Rows from `rows` up
    to `padded_rows` are padding and are never looked up.
    """

    index: int
    layers: tuple[int, ...]  # global layer numbers, from 0
    num_tables: int
    table_rows: int
    rows: int
    padded_rows: int
    keys_per_side: int
    virtual_rows: int
    offsets: tuple[int, ...]  # first physical row of each layer's window, in the order of `layers`

    def row_offset(self, layer: int) -> int:
        """First physical row of the window of global layer number `layer`; ValueError if it is not in the pool."""
        return self.offsets[self.layers.index(layer)]


def parse_layers(spec: str, num_layers: int, setting: str) -> list[int]:
    """Layer numbers of 'all', 'none' or a list such as '0,2,5-8', ascending and without repeats.

    `setting` is the name of the setting, for the ConfigError that anything else raises.
    """
    text = spec.strip()
    if text == "all":
        return list(range(num_layers))
    if text == "none":
        return []
    legal = f"legal: 'all', 'none', or numbers from 0 to {num_layers - 1} and ranges of them, such as '0,2,5-8'"
    layers: set[int] = set()
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.strip().isdecimal() or (dash and not last.strip().isdecimal()):
            raise ConfigError(f"{setting}={spec!r}: {part.strip()!r} is not a layer number or a range; {legal}")
        low, high = int(first), int(last) if dash else int(first)
        if low > high or high >= num_layers:
            raise ConfigError(f"{setting}={spec!r}: {part.strip()!r} is out of range; {legal}")
        layers.update(range(low, high + 1))
    return sorted(layers)


def join_layers(model: ModelConfig) -> dict[int, int]:
    """For every memory layer, the block that its output is added to: its own, or as `model.memory.join_layers` says.

    Raises ConfigError if that does not name a later block (or the same) for each.
    """
    memory = model.memory
    layers = parse_layers(memory.layers, model.num_layers, "model.memory.layers")
    if memory.join_layers is None:
        return {layer: layer for layer in layers}
    joined = parse_layers(memory.join_layers, model.num_layers, "model.memory.join_layers")
    shown = f"model.memory.join_layers={memory.join_layers!r}"
    for name, text in (("layers", memory.layers), ("join_layers", memory.join_layers)):
        firsts = [part.partition("-")[0].strip() for part in text.split(",")]
        if len(firsts) > 1 and firsts != sorted(firsts, key=int):
            raise ConfigError(f"model.memory.{name}={text!r} is matched in order; legal: ascending numbers")
    if len(joined) != len(layers):
        raise ConfigError(
            f"{shown} names {len(joined)} blocks for the {len(layers)} memory layers (model.memory.layers="
            f"{memory.layers!r}); legal: a different one for each, in the same order, or null"
        )
    for layer, block in zip(layers, joined, strict=True):
        if block < layer:
            raise ConfigError(
                f"{shown} adds memory that reads block {layer} to block {block}, which comes before it; "
                f"legal: {layer} or later"
            )
    return dict(zip(layers, joined, strict=True))


def coarse_k(config: MemoryConfig, keys_per_side: int) -> int:
    """Candidates per side in the coarse pass: min(keys per side, top_m, coarse_top_k)."""
    cap = keys_per_side if config.coarse_top_k is None else config.coarse_top_k
    return min(keys_per_side, config.top_m, cap)


def plan_pools(model: ModelConfig) -> list[Pool]:
    """Groups consecutive memory layers into pools; [] without memory layers.

    Raises ConfigError, naming the setting, its value and what is legal, for settings that contradict each other.
    """
    config = model.memory
    layers = parse_layers(config.layers, model.num_layers, "model.memory.layers")
    if not layers:
        return []
    pool_size = _pool_size(config, len(layers))
    num_tables = 1 if kind_of(config).one_table else pool_size
    table_rows = config.num_keys**2
    rows = num_tables * table_rows
    keys_per_side = math.isqrt(config.share_size * blocks(config) * table_rows)
    _check_widths(config, model.hidden_size, keys_per_side)
    offsets = tuple(
        0 if num_tables == 1 else _window_start(config, position, pool_size) * table_rows
        for position in range(pool_size)
    )
    return [
        Pool(
            index=index,
            layers=tuple(layers[start : start + pool_size]),
            num_tables=num_tables,
            table_rows=table_rows,
            rows=rows,
            padded_rows=-(-rows // config.rows_multiple) * config.rows_multiple,
            keys_per_side=keys_per_side,
            virtual_rows=keys_per_side**2,
            offsets=offsets,
        )
        for index, start in enumerate(range(0, len(layers), pool_size))
    ]


def _window_start(config: MemoryConfig, position: int, pool_size: int) -> int:
    """First table (from 0 in the pool) that the layer at `position` sees."""
    g = config.share_size
    if config.sharing == "none":
        return position
    if config.sharing == "block":
        return 0
    # The paper's ring of 4 shows layer 1 the tables {24, 1, 2, 3}: (g-1)//2 tables before its own, the rest after.
    start = position - (g - 1) // 2 if config.window == "centered" else position
    if config.sharing == "ring":
        return start % pool_size
    return min(max(start, 0), pool_size - g)


def _pool_size(config: MemoryConfig, memory_layers: int) -> int:
    """The pool size that the settings ask for, after checking it against sharing and the number of layers."""
    g, name = config.share_size, "model.memory.pool_size"
    if config.sharing != "none" and not kind_of(config).shares:
        own = "all layers of a pool share one table" if kind_of(config).one_table else "every layer has its own table"
        raise ConfigError(
            f"model.memory.sharing={config.sharing} with model.memory.kind={config.kind}: {own}; legal: none, or kind="
            "ultramem_v2, pkm or peer"
        )
    if config.sharing == "none" and g != 1:
        raise ConfigError(
            f"model.memory.share_size={g} with model.memory.sharing=none: a layer sees only its own table; "
            "legal: share_size=1, or sharing=block, ring or no_ring"
        )
    default = {"none": 1, "block": g}.get(config.sharing, memory_layers)
    if kind_of(config).one_table:
        default = memory_layers
    if config.kind == "ultramem" and config.pool_size not in (None, 1):
        raise ConfigError(
            f"{name}={config.pool_size} with model.memory.kind=ultramem: every layer has its own table; "
            "legal: null or 1"
        )
    size = default if config.pool_size is None else config.pool_size
    shown = f"{name}={'null' if config.pool_size is None else size}"
    if config.sharing == "block" and size != g:
        raise ConfigError(f"{shown} with model.memory.sharing=block: legal: null or share_size ({g})")
    if g > size:
        raise ConfigError(
            f"model.memory.share_size={g} is more than the {size} tables of a pool ({shown}); legal: 1 to {size}"
        )
    if memory_layers % size:
        lowest = 1 if config.sharing == "block" else g
        divisors = ", ".join(str(d) for d in range(lowest, memory_layers + 1) if memory_layers % d == 0)
        what = "model.memory.share_size" if config.sharing == "block" else name
        raise ConfigError(
            f"{what}={size} does not divide the {memory_layers} memory layers (model.memory.layers={config.layers!r}); "
            f"legal: {divisors or 'no value for this share_size'}"
        )
    return size


def _check_widths(config: MemoryConfig, hidden_size: int, keys_per_side: int) -> None:
    virtual_rows = keys_per_side**2
    if config.top_m > virtual_rows:
        raise ConfigError(
            f"model.memory.top_m={config.top_m} is more than the {virtual_rows} rows that a layer sees "
            f"({keys_per_side} keys per side, model.memory.num_keys={config.num_keys}); legal: 1 to {virtual_rows}"
        )
    k = coarse_k(config, keys_per_side)
    if config.top_m > k * k:
        raise ConfigError(
            f"model.memory.top_m={config.top_m} is more than the {k}*{k} candidates of the coarse pass "
            f"(model.memory.coarse_top_k={config.coarse_top_k}); legal: top_m up to {k * k}, or coarse_top_k at least "
            f"{math.isqrt(config.top_m - 1) + 1}"
        )
    if config.value_dim % num_cores(config):
        raise ConfigError(
            f"model.memory.value_dim={config.value_dim} does not divide into model.memory.num_cores="
            f"{config.num_cores} slices; legal: a multiple of {config.num_cores}"
        )
    if kind_of(config).tucker and tucker_penalty(config) > 0 and config.tucker_rank == 1:
        raise ConfigError(
            f"model.memory.tucker_penalty_coeff={tucker_penalty(config)} with model.memory.tucker_rank=1: "
            "a core of rank 1 has nothing to penalise; legal: tucker_penalty_coeff=0, or tucker_rank of 2 or more"
        )
    if not kind_of(config).own_widths:
        names = ("value_dim", "pre_value_dim") if kind_of(config).has_pre_values else ("value_dim",)
        for name in names:
            if getattr(config, name) != hidden_size:
                raise ConfigError(
                    f"model.memory.{name}={getattr(config, name)} with model.memory.kind={config.kind}, whose values "
                    f"are as wide as the model; legal: model.hidden_size ({hidden_size})"
                )
