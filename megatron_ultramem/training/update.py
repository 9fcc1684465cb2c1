"""An optimizer step in its two halves, between which it can still be called off."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import torch
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32, get_grad_norm_fp32

from megatron_ultramem.compat import gradients_for_norm
from megatron_ultramem.training.optimizer_parts import optimizer_parts

# Elements. Transformer Engine's kernels of norm and clipping count those of a tensor in 32 bits, and would pass over a
# table that has more.
LONGEST = 2**30


@torch.no_grad()
def gradient_norm(optimizer: MegatronOptimizer, longest: int = LONGEST) -> float:
    """Readies the gradients of a step for the optimizer; returns their global norm. Collective."""
    optimizer.prepare_grads()
    parts = optimizer_parts(optimizer)
    groups = [part.get_grad_stats_parallel_group() for part in parts]
    gradients = [list(_in_pieces(gradients_for_norm(part), longest)) for part in parts]
    if all(group == groups[0] for group in groups):
        return float(get_grad_norm_fp32(sum(gradients, []), grad_stats_parallel_group=groups[0]))
    norms = [
        float(get_grad_norm_fp32(mine, grad_stats_parallel_group=group))
        for mine, group in zip(gradients, groups, strict=True)
    ]
    return math.sqrt(sum(norm**2 for norm in norms))


@torch.no_grad()
def update(optimizer: MegatronOptimizer, norm: float, clip: float, longest: int = LONGEST) -> None:
    """Clips the gradients whose norm `gradient_norm` gave to a norm of `clip` (0: not at all), and updates. Collective.

    Parameters are gathered over data-parallel ranks afterwards, now or while the next forward pass runs.
    """
    if clip > 0.0:
        for part in optimizer_parts(optimizer):
            gradients = (param.grad for param in part.get_parameters() if param.grad is not None)
            if holders := [_holder(piece) for piece in _in_pieces(gradients, longest)]:
                clip_grad_by_total_norm_fp32(holders, clip, norm)
    _make_room(optimizer)
    optimizer.step_with_ready_grads()


def _make_room(optimizer: MegatronOptimizer) -> None:
    """Before the first step, gives back what torch keeps of the backward pass: the moments that the step creates are as
    large as the tables, and do not fit into the pieces."""
    if torch.cuda.is_available() and not any(
        part.optimizer.state for part in optimizer_parts(optimizer) if part.optimizer
    ):
        torch.cuda.empty_cache()


def _in_pieces(tensors: Iterable[torch.Tensor], longest: int) -> Iterator[torch.Tensor]:
    """The tensors, and views of those with more elements."""
    for tensor in tensors:
        yield from tensor.view(-1).split(longest) if tensor.numel() > longest else [tensor]


def _holder(gradient: torch.Tensor) -> torch.nn.Parameter:
    """Something whose gradient it is, as Megatron wants to be given it."""
    holder = torch.nn.Parameter(gradient, requires_grad=False)
    holder.grad = gradient
    return holder
