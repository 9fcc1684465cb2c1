"""An optimizer step in its two halves, between which it can still be called off."""

from __future__ import annotations

import torch
from megatron.core.optimizer import ChainedOptimizer, MegatronOptimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32


@torch.no_grad()
def gradient_norm(optimizer: MegatronOptimizer) -> float:
    """Readies the gradients of a step for the optimizer; returns their global norm. Collective."""
    optimizer.prepare_grads()
    return float(optimizer.get_grad_norm())


@torch.no_grad()
def update(optimizer: MegatronOptimizer, norm: float, clip: float) -> None:
    """Clips the gradients whose norm `gradient_norm` gave to a norm of `clip` (0: not at all), and updates. Collective.

    Parameters are gathered over data-parallel ranks afterwards, now or while the next forward pass runs.
    """
    if clip > 0.0:
        for part in _parts(optimizer):
            if parameters := part.get_parameters():
                clip_grad_by_total_norm_fp32(parameters, clip, norm)
    optimizer.step_with_ready_grads()


def _parts(optimizer: MegatronOptimizer) -> list[MegatronOptimizer]:
    return optimizer.chained_optimizers if isinstance(optimizer, ChainedOptimizer) else [optimizer]
