"""Batch norm of queries (PKM, arXiv 1907.05242; PEER): statistics of one micro-batch, whoever holds its tokens.

Training results do not depend on the layout: the ranks that split the tokens of a micro-batch form its statistics
together, and the running ones are updated once per optimizer step from the micro-batches of all ranks.

Shapes: T tokens of this rank, Q query width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from megatron_ultramem.memory.fp32_buffers import Fp32Buffers
from megatron_ultramem.memory.init import Constant
from megatron_ultramem.memory.numerics import accumulation_dtype


class QueryBatchNorm(Fp32Buffers):
    """(q - mean) / sqrt(var + eps) * weight + bias over all tokens of a micro-batch; the running statistics in eval.

    Parameters `weight` and `bias` [Q]; buffers `running_mean` and `running_var` [Q], saved. A step moves them by
    `momentum` towards the mean over its micro-batches of their means and (unbiased) variances.
    """

    weight: nn.Parameter
    bias: nn.Parameter
    running_mean: torch.Tensor
    running_var: torch.Tensor
    pending: torch.Tensor

    def __init__(
        self,
        width: int,
        *,
        eps: float = 1e-5,
        momentum: float = 0.1,
        tokens_group: dist.ProcessGroup | None = None,
        data_group: dist.ProcessGroup | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        """
        Args:
            tokens_group: ranks that hold the other tokens of this rank's micro-batches.
            data_group: ranks with other micro-batches.
        """
        super().__init__()
        self.eps, self.momentum, self.tokens_group, self.data_group = eps, momentum, tokens_group, data_group
        for name, value in (("weight", 1.0), ("bias", 0.0)):
            made = nn.Parameter(torch.empty(width, dtype=dtype, device=device))
            made.initializer = Constant(value)  # type: ignore[attr-defined]
            self.register_parameter(name, made)
        fp32 = {"dtype": torch.float32, "device": device}
        self.register_buffer("running_mean", torch.zeros(width, **fp32))  # type: ignore[arg-type]
        self.register_buffer("running_var", torch.ones(width, **fp32))  # type: ignore[arg-type]
        # Sums over the micro-batches of this step: means, variances, and their number.
        self.register_buffer("pending", torch.zeros(2 * width + 1, **fp32), persistent=False)  # type: ignore[arg-type]

    def forward(self, query_TQ: torch.Tensor, *, count: bool = True) -> torch.Tensor:
        """Normalised queries [T, Q] in their dtype. count: false where a forward is repeated (recomputation)."""
        dtype = accumulation_dtype(query_TQ.dtype)
        wide_TQ = query_TQ.to(dtype)
        if self.training:
            mean_Q, var_Q = self._statistics(wide_TQ, count and torch.is_grad_enabled())
        else:
            mean_Q, var_Q = self.running_mean.to(dtype), self.running_var.to(dtype)
        scale_Q = self.weight.to(dtype) * torch.rsqrt(var_Q + self.eps)
        return ((wide_TQ - mean_Q) * scale_Q + self.bias.to(dtype)).to(query_TQ.dtype)

    def reset(self) -> None:
        """Running statistics of a model that has not been trained."""
        self.running_mean.zero_()
        self.running_var.fill_(1.0)
        self.pending.zero_()

    @torch.no_grad()
    def end_step(self) -> None:
        """Moves the running statistics. A collective call over `data_group`."""
        total = self.pending.clone()
        if self.data_group is not None:
            dist.all_reduce(total, group=self.data_group)
        self.pending.zero_()
        number = total[-1].clamp_min(1.0)
        weight = self.momentum * (total[-1] > 0)
        mean_Q, var_Q = total[:-1].view(2, -1) / number
        self.running_mean.lerp_(mean_Q, weight)
        self.running_var.lerp_(var_Q, weight)

    def forget_step(self) -> None:
        """Drops the statistics of the micro-batches since the last step."""
        self.pending.zero_()

    def _statistics(self, wide_TQ: torch.Tensor, count: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and biased variance over the tokens of the micro-batch."""
        tokens = torch.full((1,), len(wide_TQ), dtype=wide_TQ.dtype, device=wide_TQ.device)
        sums = self._over_tokens(torch.cat((wide_TQ.sum(0), tokens)))
        mean_Q, tokens = sums[:-1] / sums[-1].detach(), sums[-1].detach()
        var_Q = self._over_tokens((wide_TQ - mean_Q).square().sum(0)) / tokens
        if count:
            with torch.no_grad():
                unbiased_Q = var_Q * (tokens / (tokens - 1).clamp_min(1.0))
                self.pending += torch.cat((mean_Q, unbiased_Q, torch.ones_like(tokens).view(1))).float()
        return mean_Q, var_Q

    def _over_tokens(self, part: torch.Tensor) -> torch.Tensor:
        if self.tokens_group is None:
            return part
        total: torch.Tensor = _SumOverRanks.apply(part, self.tokens_group)
        return total


class _SumOverRanks(torch.autograd.Function):
    """Sum over the ranks of a group, each of which goes on with a loss of its own: so does the gradient."""

    @staticmethod
    def forward(ctx: Any, part: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        total = part.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        grad = grad.clone()
        dist.all_reduce(grad, group=ctx.group)
        return grad, None
