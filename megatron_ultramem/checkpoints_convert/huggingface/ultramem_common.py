"""What the files of the memory layers share: kernels, precision, chunks of tokens, row numbers.

Shapes: T tokens, H heads, S = 2 sides (0 rows, 1 columns), N keys per side, M values per head.
"""

import functools
import importlib
import importlib.util
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import torch
from torch import nn
from transformers.utils import logging

logger = logging.get_logger(__name__)


@functools.cache
def _installed_kernels() -> ModuleType | None:
    """The package ultramem_kernels, or None; says once which it is."""
    if importlib.util.find_spec("ultramem_kernels") is None:
        logger.info("UltraMem: ultramem_kernels is not installed; memory layers run in plain PyTorch")
        return None
    kernels = importlib.import_module("ultramem_kernels")
    # A warning, because that is what is shown unless transformers' verbosity was raised.
    logger.warning(f"UltraMem: memory layers run on the kernels of {kernels.__name__} ({kernels.__path__[0]})")
    return kernels


def fused_kernels(setting: str, tensor: torch.Tensor) -> ModuleType | None:
    """The package to compute with on the tensor's device, or None for plain PyTorch; `config.memory_kernels` decides.

    Raises ImportError if the setting asks for a package that is not there.
    """
    if setting == "reference" or (setting == "auto" and not tensor.is_cuda):
        return None
    kernels = _installed_kernels()
    if kernels is None and setting == "fused":
        raise ImportError("memory_kernels = 'fused' needs the package ultramem_kernels; legal without it: 'reference'")
    return kernels


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which sums of `dtype` numbers are formed."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def chunks(tokens: int, elements_per_token: int, device: torch.device) -> Iterator[slice]:
    """Slices of the tokens whose temporaries stay near 64 Mi elements on a GPU, 1 Mi on a CPU (its caches)."""
    budget = 1 << 20 if device.type == "cpu" else 1 << 26
    step = max(1, budget // max(1, elements_per_token))
    for low in range(0, tokens, step):
        yield slice(low, min(low + step, tokens))


def pool_rows(
    keys_HSTM: torch.Tensor, keys_per_side: int, permutation: torch.Tensor | None, row_offset: int, rows: int
) -> torch.Tensor:
    """Rows [T, H*M] of selected keys (i, j): i*N + j, through the permutation, then (v + row_offset) mod rows."""
    row_HTM, column_HTM = keys_HSTM.unbind(1)
    grid_TM = (row_HTM * keys_per_side + column_HTM).transpose(0, 1).flatten(1)
    virtual_TM = grid_TM if permutation is None else permutation[grid_TM].to(torch.int64)
    return (virtual_TM + row_offset) % rows


class Fp32Buffers(nn.Module):
    """A module whose own buffers stay fp32 and unrounded, whatever it is cast to."""

    def _apply(self, fn: Any, recurse: bool = True) -> "Fp32Buffers":
        kept = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, old in kept.items():
            moved = self._buffers[name]
            if old is not None and moved is not None:
                device = moved.device
                self._buffers[name] = torch.empty_like(old, device=device) if old.is_meta else old.to(device)
        return self
