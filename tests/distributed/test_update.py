"""Norm and clipping of gradients are the same when long ones are taken in pieces."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from megatron_ultramem.config import load_config
from megatron_ultramem.training.setup import set_up
from megatron_ultramem.training.update import LONGEST, gradient_norm, update
from tests.distributed.workers import WorkerPool

PLAIN, BF16 = "parallel.distributed_optimizer=false", "train.precision=bf16"
PP2 = "parallel.pipeline_parallel_size=2"
MP2 = ["parallel.memory_parallel_size=2", "parallel.memory_placement=rows"]
CASES = [
    pytest.param(1, [BF16], id="1_rank_bf16"),
    pytest.param(1, [PLAIN], id="1_rank_plain", marks=pytest.mark.slow),
    pytest.param(2, [PP2, PLAIN, BF16, "optimizer.value_offload=torch"], id="stages_offloaded"),
    pytest.param(2, MP2, id="rows"),
]


@pytest.mark.parametrize(("ranks", "layout"), CASES)
def test_pieces_of_gradients_give_the_norm_and_the_update_of_whole_ones(
    pool: WorkerPool, small_run: list[str], ranks: int, layout: list[str]
) -> None:
    settings = [*small_run, *layout]
    whole, pieces = (pool.run(ranks, update_once, settings, longest) for longest in (LONGEST, 100))
    for mine, theirs in zip(pieces, whole, strict=True):
        assert mine["norm"] == pytest.approx(theirs["norm"], rel=1e-6)
        assert mine["norm"] == pytest.approx(mine["expected"], rel=1e-6) or ranks > 1
        assert mine["most"] > 100
        for name, wanted in theirs["grads"].items():
            np.testing.assert_allclose(mine["grads"][name], wanted, rtol=1e-6, err_msg=name)
            assert np.abs(wanted).max() < 0.1  # clipped, from about 1


def update_once(overrides: list[str], longest: int) -> dict[str, Any]:
    """One update by random gradients."""
    run = set_up(load_config(None, overrides))
    generator = torch.Generator().manual_seed(torch.distributed.get_rank())
    params = dict(run.chunks[0].named_parameters())
    for param in params.values():
        param.main_grad.copy_(torch.randn(param.main_grad.shape, generator=generator))
    squares = sum(float(param.main_grad.double().square().sum()) for param in params.values())
    norm = gradient_norm(run.optimizer, longest)
    update(run.optimizer, norm, 1.0, longest)
    grads = {
        f"{part}.{number}": param.grad.flatten().numpy().copy()
        for part, optimizer in enumerate(run.optimizer.chained_optimizers)
        for number, param in enumerate(optimizer.get_parameters())
        if param.grad is not None
    }
    most = max(param.numel() for param in params.values())
    return {"norm": norm, "expected": squares**0.5, "most": most, "grads": grads}
