"""Device, backend and capability choice: CUDA with NCCL, or CPU with gloo; Transformer Engine found or not.

Everything else asks this module and never torch.cuda, so that one code path serves laptops and GPUs.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import random
from dataclasses import dataclass

import numpy as np
import torch

from megatron_ultramem.config.schema import Config, MoEConfig
from megatron_ultramem.errors import ConfigError
from megatron_ultramem.memory.geometry import parse_layers


@dataclass(frozen=True)
class Platform:
    """Where this process computes."""

    device: torch.device
    backend: str  # of torch.distributed

    @property
    def is_cuda(self) -> bool:
        return self.device.type == "cuda"


def prepare(device: str = "auto") -> Platform:
    """Chooses the device and makes Megatron-Core runnable on it; call before megatron is imported.

    Args:
        device: auto, cpu or cuda (setting train.device). Under torchrun a CUDA process takes the GPU of its local rank.

    Raises:
        ConfigError: cuda was asked for and there is none, or there are fewer GPUs than local ranks.
    """
    available = torch.cuda.is_available()
    if device == "cuda" and not available:
        raise ConfigError("train.device = cuda: no CUDA device was found; legal here: cpu or auto")
    if device == "cpu" and available:
        raise ConfigError(
            "train.device = cpu on a machine with a GPU: Megatron-Core would still use the GPU; hide it "
            "with CUDA_VISIBLE_DEVICES='' in the environment"
        )
    if available:
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        if local_rank >= torch.cuda.device_count():
            raise ConfigError(
                f"LOCAL_RANK {local_rank}: this machine has {torch.cuda.device_count()} GPUs; start at "
                "most one rank per GPU"
            )
        torch.cuda.set_device(local_rank)
        return Platform(torch.device("cuda", local_rank), "nccl")
    from megatron_ultramem import cpu_shim

    cpu_shim.install()
    return Platform(torch.device("cpu"), "gloo")


@functools.cache
def has_transformer_engine() -> bool:
    """Whether Transformer Engine is installed (it may still fail to import: see `ultramem doctor`)."""
    return importlib.util.find_spec("transformer_engine") is not None


@functools.cache
def has_fused_weight_gradients() -> bool:
    """Whether NVIDIA's Apex extension that adds weight gradients to main_grad inside the GEMM is installed."""
    return importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is not None


def resolve_backend(config: Config, platform: Platform) -> str:
    """The layer implementation: 'local' or 'transformer_engine'; raises ConfigError where it cannot be had."""
    backend = config.model.backend
    if backend == "auto":
        backend = "transformer_engine" if platform.is_cuda and has_transformer_engine() else "local"
    if backend == "transformer_engine" and not (platform.is_cuda and has_transformer_engine()):
        missing = "Transformer Engine is not installed" if platform.is_cuda else "there is no GPU"
        raise ConfigError(f"model.backend = transformer_engine: {missing}; legal here: local or auto")
    if config.train.fp8.recipe != "none":
        _check_fp8(config, backend, platform)
    _check_speed(config, backend, platform)
    if config.parallel.context_parallel_size > 1 and backend == "local":
        raise ConfigError(
            f"parallel.context_parallel_size = {config.parallel.context_parallel_size} needs Transformer "
            "Engine, which was not found; legal here: 1"
        )
    if parse_layers(config.model.moe.layers, config.model.num_layers, "model.moe.layers"):
        _check_moe(config.model.moe, backend, platform)
    return backend


def _check_fp8(config: Config, backend: str, platform: Platform) -> None:
    """Raises ConfigError without Transformer Engine, and on GPUs without FP8."""
    recipe = config.train.fp8.recipe
    if backend != "transformer_engine":
        missing = "there is no GPU" if not platform.is_cuda else "Transformer Engine is not installed"
        raise ConfigError(f"train.fp8.recipe = {recipe} needs Transformer Engine on a GPU: {missing}; legal here: none")
    found, needed = torch.cuda.get_device_capability(platform.device), (9, 0) if recipe == "blockwise" else (8, 9)
    if found < needed:
        raise ConfigError(
            f"train.fp8.recipe = {recipe}: {torch.cuda.get_device_name(platform.device)} has compute capability "
            f"{found[0]}.{found[1]}, FP8 in this recipe needs {needed[0]}.{needed[1]}; legal here: none"
        )


def _check_speed(config: Config, backend: str, platform: Platform) -> None:
    """Raises ConfigError for what makes training faster only, where it cannot be had."""
    train, preset = config.train, "" if config.preset == "none" else f" (preset = {config.preset} may have set it)"
    if train.cuda_graphs != "none" and not platform.is_cuda:
        raise ConfigError(f"train.cuda_graphs = {train.cuda_graphs}{preset}: there is no GPU; legal here: none")
    if train.cuda_graphs != "none" and (name := _moving_memory()):
        raise ConfigError(
            f"train.cuda_graphs = {train.cuda_graphs}{preset} with {name} = {os.environ[name]} in the environment: "
            "NCCL would register memory of the graphs, which may be mapped elsewhere later; legal: "
            "NCCL_GRAPH_REGISTER = 0 beside it, or cuda_graphs = none"
        )
    if config.parallel.overlap_exchange and not platform.is_cuda:
        raise ConfigError("parallel.overlap_exchange = true: there is no GPU; legal here: false")
    for name, value, legal in (
        ("cuda_graphs", train.cuda_graphs, ("none", "memory")),
        ("cross_entropy", train.cross_entropy, ("megatron",)),
        ("fused_weight_gradients", train.fused_weight_gradients, (False,)),
    ):
        if backend == "local" and value not in legal:
            raise ConfigError(
                f"train.{name} = {str(value).lower()}{preset} needs Transformer Engine, but the back end is local; "
                f"legal: {' or '.join(str(one).lower() for one in legal)}"
            )


def _moving_memory() -> str:
    """The variable that makes torch map memory as it is needed while NCCL registers that of graphs; '' if none does."""
    if os.environ.get("NCCL_GRAPH_REGISTER") == "0":
        return ""
    allocator = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
    return next((name for name in allocator if "expandable_segments:True" in os.environ.get(name, "")), "")


def _check_moe(moe: MoEConfig, backend: str, platform: Platform) -> None:
    """Raises ConfigError for what needs Transformer Engine, a GPU or DeepEP where they are not."""
    for name in ("grouped_gemm", "permute_fusion", "router_fusion"):
        if getattr(moe, name) and backend == "local":
            legal = "false" if name == "router_fusion" else "false, null"
            raise ConfigError(
                f"model.moe.{name} = true needs Transformer Engine, but the back end here is local; legal: {legal}"
            )
    if moe.shared_expert_overlap and not platform.is_cuda:
        raise ConfigError("model.moe.shared_expert_overlap = true needs a GPU; legal here: false")
    if moe.dispatcher == "flex" and not (platform.is_cuda and importlib.util.find_spec("deep_ep") is not None):
        missing = "the package deep_ep is not installed" if platform.is_cuda else "there is no GPU"
        raise ConfigError(f"model.moe.dispatcher = flex: {missing}; legal here: alltoall, allgather")


def seed_everything(seed: int) -> None:
    """Seeds Python, NumPy and torch on this process (Megatron's RNG tracker is seeded apart)."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def set_deterministic() -> None:
    """Only algorithms that give bitwise equal results from run to run; torch raises where there is none."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    os.environ.setdefault("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "0")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    # Filling fresh memory costs bandwidth and hides nothing here: every kernel writes its whole output.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
