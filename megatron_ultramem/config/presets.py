"""Presets: a layer of defaults between those of `schema.py` and the file.

`throughput` turns on what makes training on GPUs faster without changing what is computed (beyond rounding); each of
its settings helped by itself (`tools/bench_training.py --ablate`). `throughput_fp8` computes and reads in FP8 too, as
far as `train.fp8` and `model.memory.table_read` go. Settings that they know and leave alone, because no measurement
spoke for them, are named in ARCHITECTURE.md.
"""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

from megatron_ultramem.config.schema import Config
from megatron_ultramem.config.validate import validate
from megatron_ultramem.errors import ConfigError
from megatron_ultramem.memory.geometry import parse_layers

THROUGHPUT: dict[str, Any] = {
    "train.cross_entropy": "transformer_engine",
    "train.norms": "ultramem",
    "train.fused_weight_gradients": True,
}
FP8: dict[str, Any] = {"train.fp8.recipe": "tensorwise", "model.memory.table_read": "fp8"}  # goes with full graphs
GRAPHS, PROJECTIONS = "train.cuda_graphs", "train.fp8.memory_projections"


def preset_settings(config: Config) -> dict[str, Any]:
    """What the preset of a configuration sets, by setting, but `graph_settings`."""
    if config.preset == "none":
        return {}
    fp8 = FP8 if config.preset == "throughput_fp8" else {}
    if not parse_layers(config.model.memory.layers, config.model.num_layers, "model.memory.layers"):
        fp8 = {name: value for name, value in fp8.items() if not name.startswith("model.memory")}
    return {**THROUGHPUT, **fp8}


def graph_settings(config: Config, tree: dict[str, Any]) -> dict[str, Any]:
    """The most of CUDA graphs that the settings allow, of which the preset's others are part by now; of memory layers
    alone with their projections in bf16, if need be.

    Args:
        tree: a nested dict of what is set and stays.
    """
    if config.preset == "none" or _sets(tree, GRAPHS):
        return {}
    for graphs in ("full", "memory"):
        if _is_legal(config, cuda_graphs=graphs):
            return {GRAPHS: graphs}
    bf16 = dataclasses.replace(config.train.fp8, memory_projections=False)
    if (
        not _sets(tree, PROJECTIONS)
        and _is_legal(config, cuda_graphs="none")
        and _is_legal(config, cuda_graphs="memory", fp8=bf16)
    ):
        return {GRAPHS: "memory", PROJECTIONS: False}
    return {GRAPHS: "none"}


def under(tree: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """A copy of a nested dict of settings, with what it does not set taken from `defaults`."""
    merged = copy.deepcopy(tree)
    for name, value in defaults.items():
        node = merged
        *sections, leaf = name.split(".")
        for section in sections:
            node[section] = dict(node.get(section) or {})
            node = node[section]
        node.setdefault(leaf, value)
    return merged


def _sets(tree: dict[str, Any], name: str) -> bool:
    node: Any = tree
    for part in name.split("."):
        node = (node or {}).get(part)
    return node is not None


def _is_legal(config: Config, **train: Any) -> bool:
    try:
        validate(dataclasses.replace(config, train=dataclasses.replace(config.train, **train)))
    except ConfigError:
        return False
    return True
