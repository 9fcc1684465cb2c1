"""The norm kernel agrees with its reference and with torch's, forward and backward."""

from __future__ import annotations

import pytest
import torch
from kernel_helpers import relative_error
from torch.nn import functional as F
from ultramem_kernels import rms_norm_swapped


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "shape", [(1, 5, 4, 24), (2, 7, 3, 192), (1, 1, 1, 16), (1, 0, 4, 16), (3, 300, 2, 8)], ids=str
)
def test_output_and_gradients_equal_torchs(shape, dtype, device):
    x = torch.randn(shape, device=device).to(dtype)
    gain = torch.rand(shape[-1], device=device)
    leaves, wanted_leaves = ([t.clone().requires_grad_() for t in (x, gain)] for _ in range(2))
    got = rms_norm_swapped(*leaves, 1e-5, backend="triton")
    wide = F.rms_norm(wanted_leaves[0].float(), shape[-1:], wanted_leaves[1], 1e-5)
    wanted = wide.to(dtype).transpose(1, 2)
    assert got.is_contiguous() and got.shape == wanted.shape
    tolerance = 2e-6 if dtype == torch.float32 else 5e-3
    assert relative_error(got, wanted) < tolerance
    slope = torch.randn(got.shape, device=device).to(dtype)
    grads = zip(torch.autograd.grad(got, leaves, slope), torch.autograd.grad(wanted, wanted_leaves, slope), strict=True)
    for got_grad, wanted_grad in grads:
        assert relative_error(got_grad, wanted_grad) < tolerance


def test_a_view_with_gaps_is_read_in_place(device):
    whole = torch.randn(5, 2 * 4 * 16, device=device)
    view = whole.view(1, 5, 8, 16)[:, :, :4]
    got = rms_norm_swapped(view, torch.ones(16, device=device), 1e-5, backend="triton")
    assert relative_error(got, F.rms_norm(view, (16,), eps=1e-5).transpose(1, 2)) < 2e-6


def test_gradients_pass_gradcheck_in_fp64():
    leaves = [torch.randn(1, 3, 2, 6, dtype=torch.float64).requires_grad_(), torch.rand(6).double().requires_grad_()]
    assert torch.autograd.gradcheck(lambda x, gain: rms_norm_swapped(x, gain, 1e-5), leaves)
