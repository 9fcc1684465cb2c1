"""Presets: a layer of defaults between those of `schema.py` and the file.

`throughput` turns on what was measured to make training on GPUs faster without changing what is computed (beyond
rounding); `tools/bench_training.py --ablate` measures each part. Settings it knows and leaves alone, because no
measurement spoke for them, are named in ARCHITECTURE.md.
"""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

from megatron_ultramem.config.schema import Config
from megatron_ultramem.config.validate import validate
from megatron_ultramem.errors import ConfigError

THROUGHPUT: dict[str, Any] = {
    "train.cross_entropy": "transformer_engine",
    "train.norms": "ultramem",
    "train.fused_weight_gradients": True,
}
GRAPHS = "train.cuda_graphs"


def preset_settings(config: Config) -> dict[str, Any]:
    """What the preset of a configuration sets, by setting; the most of CUDA graphs that its other settings allow."""
    if config.preset == "none":
        return {}
    return {GRAPHS: _most_graphs(config), **THROUGHPUT}


def under(tree: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """A copy of a nested dict of settings, with what it does not set taken from `defaults`."""
    merged = copy.deepcopy(tree)
    for name, value in defaults.items():
        section, leaf = name.split(".")
        merged[section] = {leaf: value, **(merged.get(section) or {})}
    return merged


def _most_graphs(config: Config) -> str:
    for graphs in ("full", "memory"):
        candidate = dataclasses.replace(config, train=dataclasses.replace(config.train, cuda_graphs=graphs))
        try:
            validate(candidate)
        except ConfigError:
            continue
        return graphs
    return "none"
