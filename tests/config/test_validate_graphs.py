"""train.cuda_graphs goes only with what can be recorded."""

from __future__ import annotations

import pytest

from megatron_ultramem.config import load_config
from megatron_ultramem.errors import ConfigError

GRAPHS = "train.cuda_graphs=memory"
P2 = "parallel.memory_parallel_size=2"


@pytest.mark.parametrize(
    "layout",
    [
        [],
        [P2, "parallel.memory_placement=columns"],
        [P2, "parallel.memory_placement=rows", "parallel.exchange_capacity=2"],
        ["train.recompute=selective"],
    ],
    ids=str,
)
def test_static_placements_can_be_recorded(layout: list[str]) -> None:
    assert load_config(None, [GRAPHS, *layout]).train.cuda_graphs == "memory"


@pytest.mark.parametrize(
    ("setting", "more", "said"),
    [
        ("model.memory.layers=none", [], "model.memory.layers = none"),
        ("model.memory.kind=memory_plus", [], "model.memory.kind = memory_plus; legal: ultramem_v2"),
        (
            "model.memory.tucker_penalty_coeff=0.1",
            ["model.memory.tucker_rank=3"],
            "model.memory.tucker_penalty_coeff = 0.1; legal: 0, or model.memory.tucker_rank = 2",
        ),
        ("model.memory.recompute=true", [], "model.memory.recompute = true; legal: false"),
        ("train.recompute=full", [], "train.recompute = full; legal: none or selective"),
        ("parallel.pipeline_parallel_size=2", [], "parallel.pipeline_parallel_size = 2; legal: 1"),
        ("parallel.overlap_param_gather=true", ["parallel.overlap_grad_reduce=true"], "overlap_param_gather = true"),
        ("parallel.memory_placement=rows", [P2], "parallel.exchange_capacity = none; legal: at least"),
        (
            "parallel.memory_placement=rows",
            [P2, "parallel.exchange_capacity=1.5"],
            "parallel.exchange_capacity = 1.5; legal: at least parallel.memory_parallel_size = 2",
        ),
    ],
)
def test_what_cannot_be_recorded_is_refused(setting: str, more: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match="train.cuda_graphs = memory") as refused:
        load_config(None, [GRAPHS, setting, *more])
    assert said in str(refused.value)
