"""Host memory of its own pages: zeros, kept as long as any view of it, given back afterwards."""

from __future__ import annotations

import gc

import psutil
import pytest
import torch

from megatron_ultramem.training.host_memory import host_zeros


@pytest.mark.parametrize("numel", [0, 1, 1023, 2**20 + 3])
def test_it_holds_zeros_on_pages_of_its_own(numel: int) -> None:
    tensors = [host_zeros(numel) for _ in range(3)]
    for tensor in tensors:
        assert tensor.shape == (numel,) and tensor.dtype == torch.float32 and not tensor.any()
        assert tensor.data_ptr() % 4096 == 0
    if numel:
        tensors[0].fill_(1.0)
        assert not tensors[1].any() and not tensors[2].any()


def test_a_view_keeps_it_and_the_last_one_gives_it_back() -> None:
    size = 2**28  # bytes
    used = psutil.Process().memory_info
    view = host_zeros(size // 4).fill_(2.0)[-8:]
    gc.collect()
    held = used().rss
    assert view.sum() == 16
    del view
    gc.collect()
    assert used().rss < held - 0.9 * size


@pytest.mark.gpu
def test_pinned_memory_can_be_had_again_and_again() -> None:
    device = torch.device("cuda")
    for _ in range(3):
        tensors = [host_zeros(1000 + number, pin_for=device) for number in range(20)]
        assert all(tensor.is_pinned() for tensor in tensors)
        there = [torch.full((len(tensor),), 3.0, device=device) for tensor in tensors]
        for tensor, values in zip(tensors, there, strict=True):
            tensor.copy_(values, non_blocking=True)
        torch.cuda.synchronize()
        assert all(bool((tensor == 3).all()) for tensor in tensors)
        del tensors
    assert not torch.zeros(10**6).is_pinned()
