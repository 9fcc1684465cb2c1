"""Optional losses on the retrieval, off by default: balance loss and Tucker penalty.

Shapes: T tokens, H heads, S=2 sides, R Tucker ranks, N keys per side, D key width, K coarse candidates.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from megatron_ultramem.memory.numerics import accumulation_dtype


class AuxiliaryLossScale:
    """What the trainer multiplies every auxiliary loss with: the scale of the main loss's gradient of a microbatch.

    Own state, because Megatron sets the scale of its own auxiliary losses for MoE models only.
    """

    value: torch.Tensor | float = 1.0

    @classmethod
    def set(cls, scale: torch.Tensor | float) -> None:
        old = cls.value
        if isinstance(scale, torch.Tensor) and isinstance(old, torch.Tensor) and old.device == scale.device:
            old.copy_(scale)  # in place: recorded CUDA graphs read it there
        else:
            cls.value = scale.clone() if isinstance(scale, torch.Tensor) else scale


class AuxiliaryLoss(torch.autograd.Function):
    """Returns `output` unchanged; in the backward the scalar `loss` gets the gradient `AuxiliaryLossScale.value`."""

    @staticmethod
    def forward(ctx: Any, output: torch.Tensor, loss: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(loss)
        return output.view_as(output)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        (loss,) = ctx.saved_tensors
        return grad_output, torch.ones_like(loss) * AuxiliaryLossScale.value


def balance_loss(
    query_HSRTD: torch.Tensor,
    key_HSRND: torch.Tensor,
    leading_HSR: torch.Tensor,
    k: int,
    *,
    tokens_group: dist.ProcessGroup | None = None,
    counts_HSN: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Balance of the coarse key selection: sum over sides, mean over heads, of N * sum_i f_i p_i.

    f_i is key i's share of all selections, p_i the mean softmax of the coarse scores; perfectly even use gives 1 per
    side. Takes normalised queries and keys. Over the ranks of `tokens_group`, which hold different tokens, f is the
    group's and the local losses (and their gradients) add up to the group's.

    Returns the loss (gradients through p) and the group's selection counts, float [H, S, N]; giving them back as
    `counts_HSN` skips the selection and the collective (recomputation).
    """
    H, S, R, T, D = query_HSRTD.shape
    N = key_HSRND.shape[3]
    dtype = accumulation_dtype(query_HSRTD.dtype)
    weighted = query_HSRTD.to(dtype) * leading_HSR.to(dtype)[..., None, None]
    query_HSTE = weighted.transpose(2, 3).reshape(H, S, T, R * D)
    key_HSNE = key_HSRND.to(dtype).transpose(2, 3).reshape(H, S, N, R * D)
    coarse_HSTN = query_HSTE @ key_HSNE.mT
    if counts_HSN is None:
        chosen_HSTK = coarse_HSTN.detach().topk(k, dim=-1, sorted=False).indices
        counts_HSN = torch.zeros(H, S, N, dtype=dtype, device=coarse_HSTN.device)
        counts_HSN.scatter_add_(-1, chosen_HSTK.flatten(2), torch.ones_like(chosen_HSTK.flatten(2), dtype=dtype))
        if tokens_group is not None:
            dist.all_reduce(counts_HSN, group=tokens_group)
    selections = counts_HSN.sum(-1, keepdim=True).clamp_min(1)  # k times the group's tokens
    shares_HSN = counts_HSN / selections
    mean_softmax_HSN = coarse_HSTN.softmax(-1).sum(2) * (k / selections)
    return N * (shares_HSN * mean_softmax_HSN).sum(-1).sum(1).mean(), counts_HSN


def tucker_penalty(cores_HCRR: torch.Tensor, threshold: float) -> torch.Tensor:
    """1/(R-1) * sum over heads and i >= 2 of max(0, lambda_i - threshold)^2, with lambda the singular values of the
    summed cores (UltraMem, arXiv 2411.12364): it keeps the coarse pass, which sees lambda_1 alone, faithful."""
    summed_HRR = cores_HCRR.to(accumulation_dtype(cores_HCRR.dtype)).sum(1)
    others_HR = (_two_singular_values if summed_HRR.shape[-1] == 2 else torch.linalg.svdvals)(summed_HRR)[:, 1:]
    return (others_HR - threshold).clamp_min(0).square().sum() / (cores_HCRR.shape[-1] - 1)


def _two_singular_values(matrix_HRR: torch.Tensor) -> torch.Tensor:
    """Both singular values of 2 x 2 matrices, written out: cuSOLVER's cannot be recorded in a CUDA graph. The matrix is
    a rotation times p plus a reflection times q, so that its singular values are p + q and |p - q|."""
    (a, b), (c, d) = (row.unbind(-1) for row in matrix_HRR.unbind(-2))
    tiny = torch.finfo(matrix_HRR.dtype).tiny  # p's gradient at 0 is 0, as svdvals has none there
    p = ((a + d).square() + (b - c).square() + tiny).sqrt() / 2
    q = ((a - d).square() + (b + c).square() + tiny).sqrt() / 2
    return torch.stack([p + q, (p - q).abs()], dim=-1)
