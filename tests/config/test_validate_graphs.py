"""train.cuda_graphs goes only with what can be recorded."""

from __future__ import annotations

import pytest

from megatron_ultramem.config import load_config
from megatron_ultramem.errors import ConfigError

GRAPHS, FULL = "train.cuda_graphs=memory", "train.cuda_graphs=full"
LAYERS, PLAIN = "train.cuda_graphs=layers", ["model.memory.layers=none"]
P2 = "parallel.memory_parallel_size=2"
TWO_LEVEL = ["parallel.memory_parallel_size=8", "parallel.memory_columns=2", "parallel.memory_placement=two_level"]


@pytest.mark.parametrize(
    "layout",
    [
        [],
        [P2, "parallel.memory_placement=columns"],
        [P2, "parallel.memory_placement=rows", "parallel.exchange_capacity=2"],
        [*TWO_LEVEL, "parallel.exchange_capacity=4"],
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
        (
            "parallel.exchange_capacity=3",
            TWO_LEVEL,
            "parallel.exchange_capacity = 3.0; legal: at least parallel.memory_parallel_size / memory_columns = 4",
        ),
    ],
)
def test_what_cannot_be_recorded_is_refused(setting: str, more: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match="train.cuda_graphs = memory") as refused:
        load_config(None, [GRAPHS, setting, *more])
    assert said in str(refused.value)


@pytest.mark.parametrize(
    "layout",
    [
        [],
        ["model.memory.layers=none"],
        ["model.hidden_dropout=0.1"],
        ["model.memory.kind=memory_plus"],
        ["model.memory.kind=ultramem", "model.memory.layers=0,5", "model.memory.join_layers=4,9"],
        [P2, "parallel.memory_placement=columns", "parallel.overlap_exchange=true"],
    ],
    ids=str,
)
def test_whole_models_with_static_sizes_can_be_recorded(layout: list[str]) -> None:
    assert load_config(None, [FULL, *layout]).train.cuda_graphs == "full"


@pytest.mark.parametrize(
    ("setting", "more", "said"),
    [
        ("model.moe.layers=0", ["model.memory.layers=1"], "model.moe.layers = 0; legal: none, or cuda_graphs = memory"),
        (
            "model.moe.layers=0",
            ["model.memory.layers=none"],
            "model.moe.layers = 0; legal: none, or cuda_graphs = none",
        ),
        ("data.mask_document_boundaries=true", [], "data.mask_document_boundaries = true; legal: false"),
        ("model.attention_dropout=0.1", [], "model.attention_dropout = 0.1; legal: 0.0"),
        ("model.backend=local", [], "model.backend = local; legal: auto or transformer_engine"),
        ("train.recompute=selective", [], "train.recompute = selective; legal: none"),
        ("parallel.tensor_parallel_size=2", ["model.hidden_dropout=0.1"], "model.hidden_dropout = 0.1; legal: 0.0"),
        ("parallel.context_parallel_size=2", [], "parallel.context_parallel_size = 2; legal: 1"),
        ("parallel.pipeline_parallel_size=2", [], "parallel.pipeline_parallel_size = 2; legal: 1"),
        ("parallel.overlap_grad_reduce=true", [], "parallel.overlap_grad_reduce = true; legal: false"),
        ("parallel.memory_placement=rows", [P2], "parallel.exchange_capacity = none; legal: at least"),
        ("train.fp8.recipe=delayed", ["model.ffn_hidden_size=2560"], "recipe = delayed; legal: none or tensorwise"),
    ],
)
def test_whole_models_that_cannot_be_recorded_are_refused(setting: str, more: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match="train.cuda_graphs = full") as refused:
        load_config(None, [FULL, setting, *more])
    assert said in str(refused.value)


@pytest.mark.parametrize("moe", ["none", "0-3", "all"])
def test_layers_without_memory_can_be_recorded_by_megatron(moe: str) -> None:
    found = load_config(None, [LAYERS, *PLAIN, f"model.moe.layers={moe}"])
    assert found.train.cuda_graphs == "layers"


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("model.memory.layers=all", "model.memory.layers = all; legal: none"),
        ("model.backend=local", "model.backend = local; legal: auto or transformer_engine"),
        ("train.precision=fp32", "train.precision = fp32; legal: bf16"),
        ("train.fused_weight_gradients=true", "train.fused_weight_gradients = true; legal: false"),
        ("parallel.pipeline_parallel_size=2", "parallel.pipeline_parallel_size = 2; legal: 1"),
    ],
)
def test_layers_that_megatron_cannot_record_are_refused(setting: str, said: str) -> None:
    with pytest.raises(ConfigError, match="train.cuda_graphs = layers") as refused:
        load_config(None, [LAYERS, *PLAIN, setting])
    assert said in str(refused.value)
