"""A preset is a layer of defaults: beneath what is set, above the defaults."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_ultramem.config import load_config, save_config
from megatron_ultramem.config.load import walk
from megatron_ultramem.config.presets import THROUGHPUT
from megatron_ultramem.errors import ConfigError
from megatron_ultramem.inference.settings import inference_config
from megatron_ultramem.platform import Platform, resolve_backend

PRESET, FP8_PRESET = "preset=throughput", "preset=throughput_fp8"


def test_a_preset_sets_what_is_not_set_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("train: {norms: torch}\npreset: throughput\n")
    plain = {name: value for name, value, _ in walk(load_config(None))}
    found = {name: value for name, value, _ in walk(load_config(tmp_path / "c.yaml", ["train.cross_entropy=megatron"]))}
    changed = {name: value for name, value in found.items() if value != plain[name]}
    assert changed == {
        "preset": "throughput",
        "train.norms": "torch",
        "train.cuda_graphs": "full",
        "train.fused_weight_gradients": True,
    }


def test_the_preset_for_fp8_is_that_for_throughput_in_fp8() -> None:
    fast = {name: value for name, value, _ in walk(load_config(None, [PRESET]))}
    fp8 = {name: value for name, value, _ in walk(load_config(None, [FP8_PRESET]))}
    assert {name: value for name, value in fp8.items() if value != fast[name]} == {
        "preset": "throughput_fp8",
        "train.fp8.recipe": "tensorwise",
        "model.memory.table_read": "fp8",
    }


def test_the_preset_for_fp8_leaves_what_is_set_and_what_is_not_there() -> None:
    assert load_config(None, [FP8_PRESET, "train.fp8.recipe=blockwise"]).train.fp8.recipe == "blockwise"
    kept = load_config(None, [FP8_PRESET, "train.fp8.recipe=none"])
    assert (kept.train.fp8.recipe, kept.model.memory.table_read, kept.train.cuda_graphs) == ("none", "fp8", "full")
    delayed = load_config(None, [FP8_PRESET, "train.fp8.recipe=delayed"])
    assert (delayed.train.cuda_graphs, delayed.train.fp8.memory_projections) == ("memory", False)
    dense = load_config(None, [FP8_PRESET, "model.memory.layers=none"])
    assert (dense.train.fp8.recipe, dense.model.memory.table_read) == ("tensorwise", "params")


def test_sizes_that_fp8_cannot_take_are_named_under_the_preset_too() -> None:
    with pytest.raises(ConfigError, match=r"queries of a memory layer = \d+ .* not a multiple of 16"):
        load_config(None, [FP8_PRESET, "model.memory.key_dim=6"])


@pytest.mark.parametrize(
    ("settings", "graphs"),
    [
        ([], "full"),
        (["model.memory.layers=none"], "full"),
        (["parallel.memory_parallel_size=2", "parallel.memory_placement=columns"], "full"),
        (["model.memory.kind=memory_plus"], "full"),
        (["data.mask_document_boundaries=true"], "memory"),
        (["data.mask_document_boundaries=true", "model.memory.kind=memory_plus"], "none"),
        (["parallel.tensor_parallel_size=2"], "full"),
        (["parallel.tensor_parallel_size=2", "model.hidden_dropout=0.1"], "memory"),
        (["parallel.context_parallel_size=2"], "memory"),
        (["parallel.memory_parallel_size=2", "parallel.memory_placement=rows"], "none"),
        (["model.moe.layers=0", "model.memory.layers=none"], "none"),
        (["parallel.pipeline_parallel_size=2"], "none"),
    ],
    ids=str,
)
def test_it_records_as_much_as_the_settings_allow(settings: list[str], graphs: str) -> None:
    assert load_config(None, [PRESET, *settings]).train.cuda_graphs == graphs


@pytest.mark.parametrize(
    ("settings", "graphs", "projections"),
    [
        ([], "full", True),
        (["data.mask_document_boundaries=true"], "memory", False),
        (["parallel.tensor_parallel_size=2", "model.hidden_dropout=0.1"], "memory", False),
        (["parallel.context_parallel_size=2"], "memory", False),
        (["parallel.context_parallel_size=2", "train.fp8.memory_projections=true"], "none", True),
        (["parallel.context_parallel_size=2", "train.cuda_graphs=none"], "none", True),
        (["parallel.context_parallel_size=2", "model.memory.kind=memory_plus"], "none", True),
        (["parallel.context_parallel_size=2", "model.memory.layers=none"], "none", True),
    ],
    ids=str,
)
def test_memory_projections_stay_in_bf16_where_memory_layers_alone_are_recorded(
    settings: list[str], graphs: str, projections: bool
) -> None:
    train = load_config(None, [FP8_PRESET, *settings]).train
    assert (train.cuda_graphs, train.fp8.memory_projections) == (graphs, projections)


def test_what_fp8_projections_do_not_go_with_is_named_under_the_preset_too() -> None:
    settings = [
        "parallel.memory_parallel_size=2",
        "parallel.memory_placement=columns",
        "parallel.overlap_exchange=true",
    ]
    with pytest.raises(ConfigError, match="parallel.overlap_exchange with FP8 projections"):
        load_config(None, [FP8_PRESET, *settings])


@pytest.mark.parametrize("settings", [[PRESET], [FP8_PRESET, "data.mask_document_boundaries=true"]], ids=str)
def test_a_saved_preset_loads_equal(tmp_path: Path, settings: list[str]) -> None:
    config = load_config(None, [*settings, "train.norms=backend"])
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config


def test_an_illegal_setting_is_named_under_a_preset_too() -> None:
    with pytest.raises(ConfigError, match="model.num_attention_heads = 7"):
        load_config(None, [PRESET, "model.num_attention_heads=7"])


@pytest.mark.parametrize("name", ["train.cuda_graphs", *THROUGHPUT])
def test_without_a_gpu_each_part_works_or_is_refused_by_name(name: str) -> None:
    config = load_config(None, [PRESET, *(f"{other}={_plain(other)}" for other in _parts() if other != name)])
    if name == "train.norms":  # the kernels' reference runs anywhere
        assert resolve_backend(config, _cpu()) == "local"
        return
    with pytest.raises(ConfigError, match=rf"{name} = .*preset = throughput.*legal"):
        resolve_backend(config, _cpu())


def test_a_model_trained_under_a_preset_generates_without_a_gpu(tmp_path: Path) -> None:
    save_config(load_config(None, [PRESET]), tmp_path / "config.yaml")
    config = inference_config(tmp_path, [], 1, "cpu")
    assert resolve_backend(config, _cpu()) == "local"
    assert config.train.norms == "ultramem"


def _parts() -> list[str]:
    return ["train.cuda_graphs", *THROUGHPUT]


def _plain(name: str) -> str:
    return str({name: value for name, value, _ in walk(load_config(None))}[name]).lower()


def _cpu() -> Platform:
    return Platform(torch.device("cpu"), "gloo")
