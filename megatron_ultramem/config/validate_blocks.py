"""Checks of what blocks are made of: the kind of memory, its settings, and what stands beside it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from megatron_ultramem.config.schema import Config, MemoryConfig
from megatron_ultramem.errors import ConfigError
from megatron_ultramem.memory.geometry import join_layers, parse_layers
from megatron_ultramem.memory.kinds import KINDS, query_norm, replaces_ffn

_TUCKER = ("tucker_rank", "num_cores", "balance_loss_coeff", "tucker_penalty_coeff", "tucker_penalty_threshold")
_V2 = ("query_per_rank", "activation", "init")
# Settings that a kind does not have.
_FOREIGN: dict[str, tuple[str, ...]] = {
    "ultramem_v2": ("value_expansion", "query_norm", "join_layers"),
    "ultramem": (*_V2, "pre_value_dim", "query_norm"),
    "memory_plus": (*_TUCKER, *_V2, "pre_value_dim", "value_expansion", "join_layers"),
    "pkm": (*_TUCKER, *_V2, "pre_value_dim", "value_expansion", "join_layers"),
    "peer": (*_TUCKER, *_V2, "value_expansion", "join_layers"),
}


def validate_blocks(config: Config, stages: Sequence[tuple[int, int]]) -> None:
    """Raises ConfigError for the first contradiction. stages: of every layer its (pipeline stage, model chunk)."""
    m = config.model
    memory = parse_layers(m.memory.layers, m.num_layers, "model.memory.layers")
    if not memory:
        _refuse_blocks_without_memory(m.memory)
        return
    _refuse_foreign_settings(m.memory)
    both = sorted(set(memory) & set(parse_layers(m.moe.layers, m.num_layers, "model.moe.layers")))
    if both and replaces_ffn(m.memory):
        raise ConfigError(
            f"layers {_listed(both)} are both in model.memory.layers = {m.memory.layers!r} and in model.moe.layers = "
            f"{m.moe.layers!r}, but memory of kind {m.memory.kind} stands instead of the FFN "
            f"(model.memory.replaces_ffn = {'null' if m.memory.replaces_ffn is None else 'true'}); legal: separate "
            "layers, or replaces_ffn=false for memory beside the MoE"
        )
    if (
        config.parallel.context_parallel_size > 1
        and not KINDS[m.memory.kind].tucker
        and query_norm(m.memory) == "batch"
    ):
        raise ConfigError(
            f"model.memory.kind = {m.memory.kind} with batch norm of queries and parallel.context_parallel_size = "
            f"{config.parallel.context_parallel_size}: its statistics are of whole micro-batches; legal: "
            "context_parallel_size = 1, or model.memory.query_norm = rms or none (another model)"
        )
    _validate_joins(config, stages)


def _refuse_blocks_without_memory(memory: MemoryConfig) -> None:
    for name, value in (("replaces_ffn", memory.replaces_ffn), ("join_layers", memory.join_layers)):
        if value:
            raise ConfigError(
                f"model.memory.{name} = {str(value).lower()} with model.memory.layers = {memory.layers}: there is no "
                f"memory layer that it could be of; legal: {name} = null, or memory layers"
            )


def _refuse_foreign_settings(memory: MemoryConfig) -> None:
    defaults = {field.name: getattr(MemoryConfig(), field.name) for field in dataclasses.fields(memory)}
    for name in _FOREIGN[memory.kind]:
        value = getattr(memory, name)
        if value != defaults[name]:
            kinds = [kind for kind, foreign in _FOREIGN.items() if name not in foreign]
            raise ConfigError(
                f"model.memory.{name} = {value} would be ignored by model.memory.kind = {memory.kind}; legal: the "
                f"default ({'null' if defaults[name] is None else defaults[name]}), or kind = {' or '.join(kinds)}"
            )


def _validate_joins(config: Config, stages: Sequence[tuple[int, int]]) -> None:
    m, p = config.model, config.parallel
    joins = {reader: block for reader, block in join_layers(m).items() if reader != block}
    if not joins:
        return
    shown = f"model.memory.join_layers = {m.memory.join_layers!r}"
    if replaces_ffn(m.memory):
        raise ConfigError(
            f"{shown} with model.memory.replaces_ffn = true would leave blocks {_listed(sorted(joins))} without an FFN "
            "and without memory; legal: replaces_ffn=false or null"
        )
    if config.train.recompute == "full":
        raise ConfigError(
            f"train.recompute = full with {shown}: a block that is recomputed by itself cannot hand memory to another; "
            "legal: none or selective, with model.memory.recompute = true"
        )
    for reader, block in joins.items():
        here, there = (_stage(stages[layer], p.virtual_pipeline_stages) for layer in (reader, block))
        if here != there:
            raise ConfigError(
                f"{shown}: memory that reads layer {reader} (pipeline stage {here}) joins layer {block} (pipeline "
                f"stage {there}): parallel.pipeline_parallel_size = {p.pipeline_parallel_size} with "
                f"virtual_pipeline_stages = {p.virtual_pipeline_stages} puts them on different "
                "stages; legal: pairs within a stage, or a layout whose stages hold whole pairs"
            )


def _stage(place: tuple[int, int], chunks: int) -> str:
    return f"{place[0]}, model chunk {place[1]}" if chunks > 1 else str(place[0])


def _listed(layers: Sequence[int]) -> str:
    return ", ".join(map(str, layers))
