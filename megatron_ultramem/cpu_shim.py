"""Lets the real Megatron-Core run on a machine without CUDA, over gloo.

Megatron-Core names CUDA in places that do not need it: streams and events, its RNG tracker, `device="cuda"` literals
and the type names that the optimizer checks. `install()` points those names at torch's own CPU counterparts. Where a
GPU is present nothing is patched. This is the project's one exception to "no monkey patching": Megatron-Core offers no
other way, and without it nothing here could be tested on a laptop.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch.utils import _device


class CpuEvent(torch.cpu.Event):
    """torch.cpu.Event with the constructor and the timing method of torch.cuda.Event."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def elapsed_time(self, end: CpuEvent) -> float:
        return 0.0


class CpuStream(torch.cpu.Stream):
    """torch.cpu.Stream with the constructor of torch.cuda.Stream, and events that can be waited for."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def record_event(self, event: CpuEvent | None = None) -> CpuEvent:  # type: ignore[override]
        return event or CpuEvent()


def install() -> None:
    """Patches torch.cuda and two names of Megatron-Core, which then finds no Transformer Engine; does nothing where
    CUDA is available or when called again."""
    if torch.cuda.is_available() or torch.cuda.Stream is CpuStream:
        return
    _hide_gpu_packages()
    # Megatron decorates functions with torch.compile; torch._dynamo insists on the original torch.cuda functions, so it
    # is imported before they are replaced, and kept from compiling.
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # saves two seconds of imports where it comes early enough
    from torch._dynamo import config as dynamo

    dynamo.disable = True
    from megatron.core.transformer.moe import moe_utils, token_dispatcher

    _redirect_streams()
    _redirect_rng()
    _redirect_factories()
    # 0.16 names te_general_gemm without importing it when Transformer Engine is absent.
    vars(moe_utils).setdefault("te_general_gemm", None)
    # The dispatcher hands torch.distributed its split sizes as they are; on a GPU this call makes them lists.
    token_dispatcher.maybe_move_tensor_to_cpu = _split_sizes_on_cpu


def _hide_gpu_packages() -> None:
    """Megatron takes its Adam, norms and gradient norms from these wherever they are installed; they are kernels for
    GPUs, which a machine may have and hide from this process."""
    modules: dict[str, Any] = sys.modules
    for name in ("transformer_engine", "apex"):
        if name not in modules and importlib.util.find_spec(name) is not None:
            modules[name] = None  # imports of it raise ModuleNotFoundError


def _redirect_streams() -> None:
    cuda: Any = torch.cuda
    for name in ("current_device", "set_device", "synchronize", "stream", "current_stream"):
        setattr(cuda, name, _own_copy(getattr(torch.cpu, name)))
    cuda.Stream, cuda.Event, cuda.default_stream = CpuStream, CpuEvent, _own_copy(torch.cpu.current_stream)


def _own_copy(function: Callable[..., Any]) -> Callable[..., Any]:
    """torch._dynamo does not want to meet one function under two names."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return call


def _redirect_rng() -> None:
    """The "CUDA generator" is the CPU's, so RNG-tracker forks and recomputed dropout work as on a GPU."""
    cuda: Any = torch.cuda
    generator = torch.default_generator
    cuda._initialized = True  # callbacks that wait for CUDA's initialisation run at once
    cuda.default_generators = {"cpu": generator}
    cuda.manual_seed = generator.manual_seed
    cuda.get_rng_state = cuda.random.get_rng_state = lambda device=None: generator.get_state()
    cuda.set_rng_state = cuda.random.set_rng_state = lambda state, device=None: generator.set_state(state)
    # Megatron warns at every recomputed layer that the CPU's RNG state moved: here that is the point.
    logging.getLogger("megatron.core.tensor_parallel.random").addFilter(
        lambda record: "CPU RNG state changed" not in record.getMessage()
    )


def _redirect_factories() -> None:
    # Remembers the factories as they are now: `with torch.device(...)` must go on to recognise them inside ours.
    _device._device_constructors()
    for name in ("arange", "empty", "empty_like", "full", "ones", "tensor", "zeros"):
        setattr(torch, name, _cuda_means_cpu(getattr(torch, name)))
    tensor: Any = torch.Tensor
    tensor.cuda = lambda self, *args, **kwargs: self
    original_type = tensor.type

    def type_(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs:
            return original_type(self, *args, **kwargs)
        return original_type(self).replace("torch.", "torch.cuda.")  # what Megatron's optimizer compares with

    tensor.type = type_


def _cuda_means_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(factory)
    def create(*args: Any, **kwargs: Any) -> torch.Tensor:
        if str(kwargs.get("device")).startswith("cuda"):
            kwargs["device"] = "cpu"
        return factory(*args, **kwargs)

    return create


def _split_sizes_on_cpu(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor
