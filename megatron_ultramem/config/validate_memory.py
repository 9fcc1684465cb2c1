"""Checks of the memory-parallel settings, before a process group or a model exists."""

from __future__ import annotations

from megatron_ultramem.config.schema import Config
from megatron_ultramem.errors import ConfigError
from megatron_ultramem.memory.geometry import parse_layers, plan_pools
from megatron_ultramem.parallel.cost_model import choose, estimates, splits, two_level_columns


def expert_group_size(config: Config) -> int:
    """Ranks of Megatron's expert group: experts and value tables share it."""
    return max(config.parallel.expert_parallel_size, config.parallel.memory_parallel_size)


def validate_memory_parallel(config: Config) -> None:
    """Raises ConfigError for the first illegal combination."""
    p, m = config.parallel, config.model
    P, placement = p.memory_parallel_size, p.memory_placement
    memory = parse_layers(m.memory.layers, m.num_layers, "model.memory.layers")
    moe = parse_layers(m.moe.layers, m.num_layers, "model.moe.layers")
    if memory and moe and p.expert_parallel_size != P:
        raise ConfigError(
            f"parallel.memory_parallel_size = {P} and parallel.expert_parallel_size = {p.expert_parallel_size}: value "
            "tables and experts share one group; legal: equal sizes"
        )
    if P == 1:
        _refuse_without_group(config)
        return
    if not memory:
        raise ConfigError(
            f"parallel.memory_parallel_size = {P} without memory layers (model.memory.layers = none) would be ignored; "
            "legal: 1"
        )
    if placement == "replicated":
        raise ConfigError(
            f"parallel.memory_placement = replicated with parallel.memory_parallel_size = {P}; legal: auto, rows, "
            "columns or two_level, or memory_parallel_size = 1"
        )
    _refuse_huge_pools(config)
    if placement == "two_level":
        share = two_level_columns(config)
        if not splits(P, share):
            columns = p.memory_columns or "null"
            legal = " or ".join(str(count) for count in range(2, P) if splits(P, count))
            raise ConfigError(
                f"parallel.memory_placement = two_level with parallel.memory_columns = {columns}: {share} of "
                f"parallel.memory_parallel_size = {P} ranks to share columns are not two or more groups of two or "
                "more; legal: " + (f"parallel.memory_columns = {legal}" if legal else "another placement")
            )
    elif p.memory_columns is not None:
        raise ConfigError(
            f"parallel.memory_columns = {p.memory_columns} would be ignored with parallel.memory_placement = "
            f"{placement}; legal: null, or memory_placement = two_level"
        )
    choice = choose(config)
    if not choice.legal:
        tried = "; ".join(f"{estimate.label}: {estimate.problem}" for estimate in estimates(config))
        raise ConfigError(
            f"parallel.memory_parallel_size = {P} with parallel.memory_placement = {placement}: "
            + (tried if placement == "auto" else choice.problem)
        )
    if p.exchange_capacity is not None and choice.placement == "columns":
        raise ConfigError(
            f"parallel.exchange_capacity = {p.exchange_capacity} would be ignored: the placement is columns, whose "
            "sizes are static anyway; legal: null, or parallel.memory_placement = rows"
        )
    if p.overlap_exchange and p.overlap_param_gather:
        raise ConfigError(
            "parallel.overlap_exchange = true with parallel.overlap_param_gather = true: the memory layer's stream "
            "would not wait for gathered parameters; legal: one of the two"
        )


def _refuse_without_group(config: Config) -> None:
    p = config.parallel
    for name, value, legal in (
        ("memory_placement", p.memory_placement, ("auto", "replicated")),
        ("memory_columns", p.memory_columns, (None,)),
        ("exchange_capacity", p.exchange_capacity, (None,)),
        ("overlap_exchange", p.overlap_exchange, (False,)),
    ):
        if value not in legal:
            raise ConfigError(
                f"parallel.{name} = {value} would be ignored with parallel.memory_parallel_size = 1; legal: "
                f"{' or '.join('null' if one is None else str(one).lower() for one in legal)}, or memory_parallel_size "
                "of 2 or more"
            )


def _refuse_huge_pools(config: Config) -> None:
    limit = 2**31
    for pool in plan_pools(config.model):
        if pool.padded_rows >= limit:
            raise ConfigError(
                f"a pool of {pool.padded_rows} rows (model.memory.num_keys = {config.model.memory.num_keys}) cannot be "
                f"shared: exchanged row numbers have 32 bits; legal: fewer than {limit} rows, or a smaller "
                "model.memory.pool_size"
            )
