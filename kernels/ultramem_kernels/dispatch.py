"""Which implementation runs: by device and shape, or the one the caller names.

reference   plain PyTorch, any device and dtype
triton      any GPU that Triton supports; CPU tensors only under Triton's interpreter (tests)
cuda        hand-written kernels, NVIDIA GPUs from compute capability 8.0, 16-bit tables, common shapes
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from importlib.util import find_spec
from typing import Any

import torch

BACKENDS = ("reference", "triton", "cuda")


@lru_cache(maxsize=1)
def triton_found() -> bool:
    """Whether Triton is installed."""
    return find_spec("triton") is not None


@lru_cache(maxsize=1)
def nvrtc_found() -> bool:
    """Whether PyTorch's CUDA compiler library can be loaded."""
    from ultramem_kernels.nvrtc import BuildError, load_compiler

    try:
        load_compiler()
    except BuildError:
        return False
    return True


def choose(backend: str | None, tensor: torch.Tensor, cuda_supports: Callable[[], bool]) -> str:
    """The implementation to run on `tensor`'s device; `cuda_supports` says whether the CUDA kernels cover the shape.

    Raises ValueError for an unknown name, or for 'cuda' where the CUDA kernels cannot run.
    """
    if backend is None:
        if not tensor.is_cuda or tensor.dtype == torch.float64:
            return "reference"
        if cuda_supports() and triton_found() and nvrtc_found():  # they fill each other's gaps
            return "cuda"
        return "triton" if triton_found() else "reference"
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r}: legal are {', '.join(BACKENDS)}, or None to choose by device and shape")
    if backend == "cuda" and not cuda_supports():
        raise ValueError(
            f"backend='cuda': no hand-written kernel covers {tensor.dtype} on {tensor.device} at this shape"
        )
    return backend


def for_this_call(operator: Any, function: Callable[..., Any]) -> Callable[..., Any]:
    """The custom operator under torch.compile, which must not look inside; else the function: it costs less."""
    return operator if torch.compiler.is_compiling() else function
