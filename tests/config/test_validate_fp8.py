"""What FP8 matrix products do not go with is refused, with the number, before anything is built."""

from __future__ import annotations

import pytest
import torch

from megatron_ultramem.config import load_config
from megatron_ultramem.config.validate_fp8 import fp8_format, fp8_projections
from megatron_ultramem.errors import ConfigError
from megatron_ultramem.platform import Platform, resolve_backend

TENSORWISE, DELAYED = "train.fp8.recipe=tensorwise", "train.fp8.recipe=delayed"


@pytest.mark.parametrize("recipe", ["delayed", "tensorwise", "blockwise"])
def test_the_default_model_takes_every_recipe(recipe: str) -> None:
    config = load_config(None, [f"train.fp8.recipe={recipe}"])
    assert fp8_format(config.train.fp8) == ("e4m3" if recipe == "blockwise" else "hybrid")
    assert fp8_projections(config)


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["train.precision=fp32"], ["train.precision = fp32", "legal: bf16"]),
        (["model.backend=local"], ["model.backend = local"]),
        (["model.ffn_hidden_size=2500"], ["FFN of a rank = 2500", "multiple of 16"]),
        (["model.ffn_hidden_size=2512", "parallel.tensor_parallel_size=2"], ["FFN of a rank = 1256"]),
        (["data.sequence_length=1000"], ["tokens of a rank's micro-batch = 1000", "data.sequence_length"]),
        (
            ["data.sequence_length=48", "parallel.tensor_parallel_size=2"],
            ["tokens of a rank's memory layers = 24", "tensor_parallel_size"],
        ),
        (["model.memory.pre_value_dim=72"], ["width of a pre-value = 72"]),
        (["model.memory.value_dim=72"], ["width of the pooled values = 72"]),
        (["model.memory.key_dim=71"], ["queries of a memory layer = 284"]),
        (["model.moe.layers=1", "model.moe.ffn_hidden_size=40"], ["width of an expert = 40"]),
        (["train.fp8.num_layers_at_end_in_bf16=2"], ["num_layers_at_end_in_bf16 = 2 would be ignored"]),
        (["train.fp8.margin=1"], ["margin = 1 would be ignored", "recipe = tensorwise"]),
        (
            [
                "train.fp8.first_last_layers_bf16=true",
                "train.fp8.num_layers_at_start_in_bf16=6",
                "parallel.pipeline_parallel_size=4",
            ],
            ["num_layers_at_start_in_bf16 = 6", "at most the 5 layers"],
        ),
        *(
            (
                [
                    "train.fp8.first_last_layers_bf16=true",
                    f"train.fp8.num_layers_at_start_in_bf16={start}",
                    f"train.fp8.num_layers_at_end_in_bf16={end}",
                ],
                [f"start_in_bf16 = {start} and num_layers_at_end_in_bf16 = {end}", "legal: fewer than 20 together"],
            )
            for start, end in ((20, 20), (20, 0), (1, 19))
        ),
        (["train.cuda_graphs=memory"], ["train.cuda_graphs", "memory_projections = false"]),
        (
            ["parallel.memory_parallel_size=2", "parallel.overlap_exchange=true"],
            ["parallel.overlap_exchange", "memory_projections = false"],
        ),
        (["train.fp8.param_gather=true", "parallel.distributed_optimizer=false"], ["param_gather = true needs"]),
        (
            ["train.fp8.recipe=none", "train.fp8.param_gather=true"],
            ["train.fp8.param_gather = true would be ignored by recipe = none; legal: false"],
        ),
        (
            ["train.fp8.param_gather=true", "checkpoint.load_optimizer=false"],
            ["train.fp8.param_gather = true with checkpoint.load_optimizer = false", "legal: param_gather = false, or"],
        ),
    ],
)
def test_what_does_not_go_with_fp8_is_refused(overrides: list[str], named: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(None, [TENSORWISE, *overrides])
    for part in named:
        assert part in str(error.value), str(error.value)


def test_a_single_layer_may_be_left_to_fp8() -> None:
    layers = ["train.fp8.num_layers_at_start_in_bf16=1", "train.fp8.num_layers_at_end_in_bf16=18"]
    load_config(None, [TENSORWISE, "train.fp8.first_last_layers_bf16=true", *layers])


def test_delayed_scaling_cannot_leave_layers_out() -> None:
    with pytest.raises(ConfigError, match="first_last_layers_bf16 = true with recipe = delayed"):
        load_config(None, [DELAYED, "train.fp8.first_last_layers_bf16=true"])


def test_widths_of_memory_projections_do_not_matter_where_they_stay_in_bf16() -> None:
    bf16 = ["train.fp8.memory_projections=false", "model.memory.value_dim=72", "train.cuda_graphs=memory"]
    assert not fp8_projections(load_config(None, [TENSORWISE, *bf16]))


def test_without_a_gpu_fp8_is_refused_before_anything_is_built() -> None:
    with pytest.raises(ConfigError, match="train.fp8.recipe = delayed needs Transformer Engine on a GPU: there is no"):
        resolve_backend(load_config(None, [DELAYED]), Platform(torch.device("cpu"), "gloo"))
