"""The differentiable RMS norm with swapped dimensions. Legend as in reference.py."""

from __future__ import annotations

from typing import Any, Optional

import torch

from ultramem_kernels.dispatch import choose, for_this_call
from ultramem_kernels.rms_norm import reference


def run_rms_norm_forward(x: torch.Tensor, gain: torch.Tensor, eps: float, backend: Optional[str]) -> torch.Tensor:
    """Contiguous [G, A, B, D]."""
    if choose(backend, x, lambda: False) == "reference":
        return reference.rms_norm_swapped(x, gain, eps)
    from ultramem_kernels.rms_norm import kernel_triton

    return kernel_triton.forward(x, gain.contiguous(), eps)


rms_norm_forward = torch.library.custom_op("ultramem::rms_norm_forward", mutates_args=())(run_rms_norm_forward)


@rms_norm_forward.register_fake
def _(x, gain, eps, backend):  # type: ignore[no-untyped-def]
    G, B, A, D = x.shape
    return x.new_empty(G, A, B, D)


def run_rms_norm_backward(
    x: torch.Tensor, gain: torch.Tensor, grad: torch.Tensor, eps: float, backend: Optional[str]
) -> tuple[torch.Tensor, torch.Tensor]:
    """(gradient of x [G, B, A, D], gradient of the gain [D])."""
    if choose(backend, x, lambda: False) == "reference":
        return reference.backward_swapped(x, gain, grad, eps)
    from ultramem_kernels.rms_norm import kernel_triton

    grad_x, grad_gain = kernel_triton.backward(x, gain.contiguous(), grad, eps)
    return grad_x, grad_gain.to(gain.dtype)


rms_norm_backward = torch.library.custom_op("ultramem::rms_norm_backward", mutates_args=())(run_rms_norm_backward)


@rms_norm_backward.register_fake
def _(x, gain, grad, eps, backend):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape), torch.empty_like(gain)


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, gain: torch.Tensor, eps: float, backend: str | None) -> torch.Tensor:
        ctx.save_for_backward(x, gain)
        ctx.eps, ctx.backend = eps, backend
        return for_this_call(rms_norm_forward, run_rms_norm_forward)(x, gain, eps, backend)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, gain = ctx.saved_tensors
        return (
            *for_this_call(rms_norm_backward, run_rms_norm_backward)(x, gain, grad.contiguous(), ctx.eps, ctx.backend),
            None,
            None,
        )


def rms_norm_swapped(
    x_GBAD: torch.Tensor, gain_D: torch.Tensor, eps: float, *, backend: str | None = None
) -> torch.Tensor:
    """RMS norm over D of `x` [G, B, A, D], written as contiguous [G, A, B, D] in the dtype of `x`.

    Queries [T, 2*R*Dk] as view(1, T, 2*R, Dk) give [1, 2*R, T, Dk], which views as query_SRTD; keys [2, n, R, Dk] give
    key_SRND. `x` may have any strides as long as D is contiguous.
    """
    if x_GBAD.dim() != 4 or gain_D.shape != x_GBAD.shape[-1:]:
        raise ValueError(f"x {tuple(x_GBAD.shape)} must be [G, B, A, D] and the gain {tuple(gain_D.shape)} [D]")
    if x_GBAD.stride(-1) != 1:
        x_GBAD = x_GBAD.contiguous()
    return _RmsNorm.apply(x_GBAD, gain_D, eps, backend)
