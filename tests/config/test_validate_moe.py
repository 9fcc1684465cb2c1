"""MoE settings that contradict each other, or what is installed, are refused with what is legal."""

from __future__ import annotations

import pytest
import torch

from megatron_ultramem.config import load_config
from megatron_ultramem.errors import ConfigError
from megatron_ultramem.platform import Platform, resolve_backend

MOE = ["model.moe.layers=all", "model.memory.layers=none"]
REFUSED = {
    "more-chosen-than-there-are": (["model.moe.top_k=65"], ["top_k = 65 exceeds model.moe.num_experts = 64"]),
    "one-expert-of-weight-one": (["model.moe.top_k=1"], ["model.moe.normalize_top_k = true", "top_k = 1"]),
    "bias-on-softmax": (["model.moe.expert_bias=true"], ["router_score = softmax", "router_score=sigmoid"]),
    "half-of-group-limits": (["model.moe.router_groups=8"], ["router_groups = 8", "router_group_top_k = null"]),
    "groups-that-do-not-divide": (
        ["model.moe.router_groups=7", "model.moe.router_group_top_k=2"],
        ["router_groups = 7", "a divisor of model.moe.num_experts (64)"],
    ),
    "groups-too-small": (
        ["model.moe.router_groups=32", "model.moe.router_group_top_k=2"],
        ["a token's 8 experts", "have 2 each"],
    ),
    "gate-of-nothing": (["model.moe.shared_expert_gate=true"], ["shared_expert_hidden_size = 0"]),
    "overlap-of-allgather": (
        [
            "model.moe.shared_expert_hidden_size=8",
            "model.moe.shared_expert_overlap=true",
            "model.moe.dispatcher=allgather",
        ],
        ["dispatcher = allgather"],
    ),
    "flex-alone": (["model.moe.dispatcher=flex"], ["expert_parallel_size = 1 and tensor_parallel_size = 1"]),
    "experts-that-do-not-divide": (["parallel.expert_parallel_size=3"], ["does not divide model.moe.num_experts = 64"]),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    settings, said = REFUSED[name]
    with pytest.raises(ConfigError) as caught:
        load_config(None, [*MOE, *settings])
    for words in [*said, "legal"]:
        assert words in str(caught.value)


def test_settings_of_experts_do_not_matter_without_them() -> None:
    load_config(None, ["model.moe.top_k=65", "model.moe.expert_bias=true"])


@pytest.mark.parametrize(
    "settings",
    [
        ["model.moe.top_k=1", "model.moe.normalize_top_k=false"],
        ["model.moe.top_k=1", "model.moe.router_score=sigmoid", "model.moe.expert_bias=true"],
        ["model.moe.router_groups=8", "model.moe.router_group_top_k=4"],
        ["model.moe.shared_expert_hidden_size=8", "model.moe.shared_expert_gate=true"],
        ["model.moe.dispatcher=flex", "parallel.expert_parallel_size=8"],
    ],
    ids=str,
)
def test_accepted(settings: list[str]) -> None:
    load_config(None, [*MOE, *settings])


CPU, GPU = Platform(torch.device("cpu"), "gloo"), Platform(torch.device("cuda", 0), "nccl")


@pytest.mark.parametrize("name", ["grouped_gemm", "permute_fusion", "router_fusion"])
def test_what_needs_transformer_engine_is_refused_without_it(name: str) -> None:
    config = load_config(None, [*MOE, f"model.moe.{name}=true", "model.backend=local"])
    for platform in (CPU, GPU):
        with pytest.raises(ConfigError, match=f"model.moe.{name} = true needs Transformer Engine.*legal: false"):
            resolve_backend(config, platform)
    without_moe = load_config(None, [f"model.moe.{name}=true", "model.backend=local"])
    assert resolve_backend(without_moe, CPU) == "local"


def test_what_needs_a_gpu_or_deepep_is_refused_without() -> None:
    shared = ["model.moe.shared_expert_hidden_size=8", "model.moe.shared_expert_overlap=true", "model.backend=local"]
    with pytest.raises(ConfigError, match="shared_expert_overlap = true needs a GPU; legal here: false"):
        resolve_backend(load_config(None, [*MOE, *shared]), CPU)
    assert resolve_backend(load_config(None, [*MOE, *shared]), GPU) == "local"
    flex = ["model.moe.dispatcher=flex", "parallel.expert_parallel_size=8", "model.backend=local"]
    for platform, missing in ((CPU, "there is no GPU"), (GPU, "deep_ep is not installed")):
        with pytest.raises(ConfigError, match=f"dispatcher = flex: .*{missing}; legal here: alltoall, allgather"):
            resolve_backend(load_config(None, [*MOE, *flex]), platform)
