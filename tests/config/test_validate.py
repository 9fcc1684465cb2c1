"""Contradictions between settings are refused before anything starts, naming both and a way out."""

from __future__ import annotations

import pytest
import torch

from megatron_ultramem.cli import main
from megatron_ultramem.config import load_config
from megatron_ultramem.config.validate import stage_of_layer, validate_world
from megatron_ultramem.errors import ConfigError
from megatron_ultramem.platform import Platform, resolve_backend

TP2, PP2 = "parallel.tensor_parallel_size=2", "parallel.pipeline_parallel_size=2"
DENSE = "model.memory.layers=none"


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["model.num_attention_heads=7"], ["model.num_attention_heads = 7", "divisor"]),
        (["model.num_query_groups=5"], ["model.num_query_groups = 5", "divisor"]),
        (["data.sequence_length=8192"], ["data.sequence_length = 8192", "model.max_sequence_length = 4096"]),
        (["model.moe.layers=all", "model.moe.top_k=65"], ["model.moe.top_k = 65", "num_experts = 64"]),
        (["parallel.tensor_parallel_size=5"], ["parallel.tensor_parallel_size = 5", "num_attention_heads = 12"]),
        ([TP2, "parallel.sequence_parallel=false"], ["parallel.sequence_parallel = false", "memory", "true or null"]),
        (["parallel.sequence_parallel=true"], ["parallel.sequence_parallel = true", "tensor_parallel_size"]),
        ([TP2, "data.sequence_length=4095"], ["data.sequence_length = 4095", "= 2"]),
        (["parallel.context_parallel_size=2", "model.backend=local"], ["context_parallel_size = 2", "backend"]),
        (["parallel.context_parallel_size=2", "data.mask_document_boundaries=true"], ["mask_document_boundaries"]),
        (["parallel.virtual_pipeline_stages=2"], ["virtual_pipeline_stages = 2", "pipeline_parallel_size"]),
        ([DENSE, PP2, "parallel.virtual_pipeline_stages=2"], ["overlap_p2p = false", "wrong loss", "overlap_p2p=true"]),
        ([DENSE, "parallel.pipeline_parallel_size=3"], ["model.num_layers = 20", "= 3", "multiple of 3"]),
        (["parallel.overlap_param_gather=true"], ["overlap_param_gather", "overlap_grad_reduce = true"]),
        (["train.rampup_batch_size=[3,2,100]"], ["train.rampup_batch_size = [3, 2, 100]", "global_batch_size = 8"]),
        (["train.rampup_batch_size=[1,2]"], ["train.rampup_batch_size = [1, 2]", "start, increment, samples"]),
        (["schedule.warmup_steps=1000"], ["schedule.warmup_steps = 1000", "1000 steps"]),
        (["schedule.kind=wsd", "schedule.wsd_decay_steps=2000"], ["schedule.wsd_decay_steps = 2000", "at most"]),
        (
            ["schedule.kind=wsd", "schedule.warmup_steps=950"],
            ["schedule.wsd_decay_steps = None (100 steps)", "50 steps"],
        ),
        (["data.paths=[a]", "data.valid_paths=[b]"], ["data.paths", "data.train_paths", "one of the two"]),
        (["data.paths=[a]", "data.weights=[1,2]"], ["data.weights", "2 entries", "data.paths"]),
        (["data.paths=[a]", "data.weights=[-1]"], ["data.weights", "positive"]),
        (["data.tokenizer.path=x"], ["data.tokenizer.path = 'x'", "byte"]),
        (["data.tokenizer.kind=tiktoken"], ["data.tokenizer.path = null", "tiktoken"]),
        (["model.qk_norm=false", "model.qk_norm_width=all_heads"], ["qk_norm_width = all_heads", "qk_norm = false"]),
        (["model.memory.shuffle=false", "model.memory.keep_shuffle=true"], ["keep_shuffle = true", "shuffle = false"]),
        (["model.memory.top_m=200000"], ["model.memory.top_m", "129600"]),
        (
            ["model.memory.sharing=ring", "model.memory.share_size=10", PP2],
            ["pipeline_parallel_size = 2", "pool 0", "20 memory layers", "pool_size"],
        ),
    ],
)
def test_a_contradiction_is_refused(overrides: list[str], named: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(None, overrides)
    for part in named:
        assert part in str(error.value), str(error.value)


@pytest.mark.parametrize(
    ("overrides", "ranks", "named"),
    [
        ([TP2, PP2], 6, ["6 ranks", "multiple of 4"]),
        (
            ["train.global_batch_size=8", "train.micro_batch_size=3"],
            1,
            ["train.global_batch_size = 8", "multiple of 3"],
        ),
        (["train.rampup_batch_size=[2,2,8]"], 4, ["train.rampup_batch_size[0] = 2", "4 data-parallel"]),
        (
            [PP2, "parallel.virtual_pipeline_stages=2", "parallel.overlap_p2p=true", "train.global_batch_size=3"],
            2,
            ["train.global_batch_size = 3", "interleaved"],
        ),
    ],
)
def test_a_layout_that_does_not_fit_the_ranks_is_refused(overrides: list[str], ranks: int, named: list[str]) -> None:
    config = load_config(None, overrides)
    with pytest.raises(ConfigError) as error:
        validate_world(config, ranks)
    for part in named:
        assert part in str(error.value), str(error.value)


def test_grouped_gemm_is_refused_without_transformer_engine() -> None:
    config = load_config(None, ["model.moe.layers=0", "model.moe.grouped_gemm=true"])
    with pytest.raises(ConfigError, match="model.moe.grouped_gemm = true.*legal: false, null"):
        resolve_backend(config, Platform(torch.device("cpu"), "gloo"))


def test_data_parallelism_takes_the_ranks_that_are_left() -> None:
    assert validate_world(load_config(None, [TP2, PP2]), 16) == 4


def test_interleaved_stages_hold_layers_as_megatron_places_them() -> None:
    config = load_config(
        None, [PP2, "parallel.virtual_pipeline_stages=2", "parallel.overlap_p2p=true", "model.num_layers=8"]
    )
    assert stage_of_layer(config) == [(0, 0)] * 2 + [(1, 0)] * 2 + [(0, 1)] * 2 + [(1, 1)] * 2


def test_a_pool_may_fill_a_stage_exactly() -> None:
    load_config(None, ["model.memory.sharing=ring", "model.memory.share_size=5", "model.memory.pool_size=10", PP2])


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["data.reset_position_ids=true"], "data.mask_document_boundaries = true would be ignored"),
        (["parallel.context_parallel_size=2", "model.memory.balance_loss_coeff=0.1"], "balance_loss_coeff = 0.1"),
    ],
)
def test_settings_that_would_be_ignored_or_wrong_are_refused(overrides: list[str], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        load_config(None, overrides)


@pytest.mark.parametrize(
    ("options", "said"), [(["--ranks", "0"], "--ranks 0"), (["--max-restarts", "2"], "--max-restarts 2 needs --ranks")]
)
def test_options_for_ranks_are_not_ignored(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, options: list[str], said: str
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    assert main(["train", *options]) == 2
    assert said in capsys.readouterr().err


def test_an_exchange_beside_the_ffn_is_refused_without_a_gpu() -> None:
    config = load_config(None, ["parallel.memory_parallel_size=2", "parallel.overlap_exchange=true"])
    with pytest.raises(ConfigError, match="parallel.overlap_exchange = true: there is no GPU; legal here: false"):
        resolve_backend(config, Platform(torch.device("cpu"), "gloo"))


@pytest.mark.parametrize("variable", ["PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"])
def test_graphs_in_memory_that_moves_are_refused_while_nccl_registers_it(
    monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    gpu = Platform(torch.device("cuda", 0), "nccl")
    recorded = load_config(None, ["train.cuda_graphs=memory", "model.backend=local"])
    for name in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF", "NCCL_GRAPH_REGISTER"):
        monkeypatch.delenv(name, raising=False)
    assert resolve_backend(recorded, gpu) == "local"
    monkeypatch.setenv(variable, "max_split_size_mb:512,expandable_segments:True")
    with pytest.raises(ConfigError, match=f"train.cuda_graphs = memory with {variable} = .*NCCL_GRAPH_REGISTER = 0"):
        resolve_backend(recorded, gpu)
    assert resolve_backend(load_config(None, ["model.backend=local"]), gpu) == "local"
    monkeypatch.setenv("NCCL_GRAPH_REGISTER", "0")
    assert resolve_backend(recorded, gpu) == "local"
