"""The differentiable RMS norm with swapped dimensions. Legend as in reference.py."""

from __future__ import annotations

from types import ModuleType
from typing import Any, Optional

import torch

from ultramem_kernels.dispatch import choose, for_this_call
from ultramem_kernels.rms_norm import cuda, reference


def _kernels(backend: str | None, x: torch.Tensor, gain: torch.Tensor) -> ModuleType | None:
    """The module whose kernels run; None for the reference."""
    chosen = choose(backend, x, lambda: cuda.supports(x, gain))
    if chosen == "triton":
        from ultramem_kernels.rms_norm import kernel_triton

        return kernel_triton
    return cuda if chosen == "cuda" else None


def run_rms_norm_forward(
    x: torch.Tensor, gain: torch.Tensor, eps: float, rows_out: int, backend: Optional[str]
) -> torch.Tensor:
    """Contiguous [G, A, rows_out, D]."""
    kernels = _kernels(backend, x, gain)
    if kernels is None:
        return reference.rms_norm_swapped(x, gain, eps, rows_out)
    y: torch.Tensor = kernels.forward(x, gain, eps, rows_out)
    return y


rms_norm_forward = torch.library.custom_op("ultramem::rms_norm_forward", mutates_args=())(run_rms_norm_forward)


@rms_norm_forward.register_fake
def _(x, gain, eps, rows_out, backend):  # type: ignore[no-untyped-def]
    G, _, A, D = x.shape
    return x.new_empty(G, A, rows_out, D)


def run_rms_norm_backward(
    x: torch.Tensor, gain: torch.Tensor, grad: torch.Tensor, eps: float, backend: Optional[str]
) -> tuple[torch.Tensor, torch.Tensor]:
    """(gradient of x [G, B, A, D], gradient of the gain [D])."""
    kernels = _kernels(backend, x, gain)
    if kernels is None:
        return reference.backward_swapped(x, gain, grad, eps)
    gradients: tuple[torch.Tensor, torch.Tensor] = kernels.backward(x, gain, grad, eps)
    return gradients


rms_norm_backward = torch.library.custom_op("ultramem::rms_norm_backward", mutates_args=())(run_rms_norm_backward)


@rms_norm_backward.register_fake
def _(x, gain, grad, eps, backend):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape), torch.empty_like(gain)


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        gain: torch.Tensor,
        eps: float,
        backend: str | None,
    ) -> torch.Tensor:
        ctx.save_for_backward(x, gain)
        ctx.eps, ctx.backend = eps, backend
        return for_this_call(rms_norm_forward, run_rms_norm_forward)(x, gain, eps, x.shape[1], backend)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, gain = ctx.saved_tensors
        backward = for_this_call(rms_norm_backward, run_rms_norm_backward)
        grad_x, grad_gain = backward(x, gain, grad.contiguous(), ctx.eps, ctx.backend)
        return grad_x, grad_gain, None, None


def rms_norm_swapped(
    x_GBAD: torch.Tensor, gain_D: torch.Tensor, eps: float, *, backend: str | None = None
) -> torch.Tensor:
    """RMS norm over D of `x` [G, B, A, D], written as contiguous [G, A, B, D] in the dtype of `x`.

    Queries [T, 2*R*Dk] as view(1, T, 2*R, Dk) give [1, 2*R, T, Dk], which views as query_SRTD; keys [2, n, R, Dk] give
    key_SRND. `x` may have any strides as long as D is contiguous.
    """
    if x_GBAD.dim() != 4 or gain_D.shape != x_GBAD.shape[-1:]:
        raise ValueError(f"x {tuple(x_GBAD.shape)} must be [G, B, A, D] and the gain {tuple(gain_D.shape)} [D]")
    if x_GBAD.stride(3) != 1:
        x_GBAD = x_GBAD.contiguous()
    return _RmsNorm.apply(x_GBAD, gain_D.contiguous(), eps, backend)
