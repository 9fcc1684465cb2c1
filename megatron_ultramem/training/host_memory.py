"""Host memory for tensors of many gigabytes: pages of their own, huge ones where the system has them, which take a
fraction of the time to touch and to pin."""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Callable

import torch
from torch import Tensor


class _Pages(mmap.mmap):
    """Anonymous memory, full of zeros, that CUDA forgets before the system takes it back: another allocation at its
    address would be taken for pinned, or could not be pinned."""

    unpin: Callable[[], object] | None = None

    def __del__(self) -> None:
        if self.unpin is not None:
            self.unpin()


def host_zeros(numel: int, pin_for: torch.device | None = None) -> Tensor:
    """fp32 zeros [numel] in memory that nothing else lies in.

    Args:
        pin_for: a GPU that reads and writes it by itself; a CPU needs no pinning. Not torch's pinned allocator, which
            rounds up to the next power of two.

    Raises MemoryError where it cannot be pinned.
    """
    if numel == 0:
        return torch.empty(0)
    pages = _Pages(-1, 4 * numel, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a system without huge pages
        pages.madvise(mmap.MADV_HUGEPAGE)
    tensor = torch.frombuffer(pages, dtype=torch.float32)
    if pin_for is not None and pin_for.type == "cuda":
        cuda, address = torch.cuda.cudart(), tensor.data_ptr()
        error = int(cuda.cudaHostRegister(address, 4 * numel, 0))
        if error:
            raise MemoryError(f"{4 * numel / 2**30:.1f} GiB of host memory cannot be pinned (CUDA error {error})")
        pages.unpin = lambda: cuda.cudaHostUnregister(address)
    return tensor
