"""Optimizer steps of large tables: norm and clipping reach all of a gradient, and there is room for the moments."""

from __future__ import annotations

import pytest
import torch

from megatron_ultramem.config import load_config
from megatron_ultramem.training.loop import train_step
from megatron_ultramem.training.setup import set_up
from megatron_ultramem.training.update import gradient_norm, update
from tests.distributed.conftest import corpus, small_run  # noqa: F401
from tests.distributed.workers import WorkerPool

pytestmark = pytest.mark.gpu
LAST = 2**20  # elements
# One table of 2 * 4100**2 rows of 64 values, and one of 2 numbers a row: 18 bytes for each make 40 GB.
HUGE = ["model.num_layers=2", "model.memory.sharing=block", "model.memory.share_size=2", "model.memory.num_keys=4100"]
HUGE += ["model.memory.value_dim=64", "model.memory.pre_value_dim=2", "train.precision=bf16"]


def norm_and_clipped(overrides: list[str]) -> tuple[int, float, float]:
    """Elements of the largest table; the norm of a gradient of ones at its end; and those ones, clipped to half."""
    run = set_up(load_config(None, overrides))
    for chunk in run.chunks:
        chunk.zero_grad_buffer()
    table = max(run.chunks[0].parameters(), key=torch.Tensor.numel)
    table.main_grad.view(-1)[-LAST:] = 1.0
    norm = gradient_norm(run.optimizer)
    update(run.optimizer, norm, norm / 2)
    return table.numel(), norm, float(table.main_grad.view(-1)[-LAST:].mean())


@pytest.mark.large
def test_norm_and_clipping_reach_the_end_of_a_huge_table(gpus: WorkerPool, small_run: list[str]) -> None:  # noqa: F811
    if torch.cuda.get_device_properties(0).total_memory < 60 * 2**30:
        pytest.skip("needs a GPU of 60 GiB")
    ((elements, norm, clipped),) = gpus.run(1, norm_and_clipped, [*small_run, *HUGE])
    assert elements > 2**31
    assert norm == pytest.approx(LAST**0.5, rel=1e-5)
    assert clipped == pytest.approx(0.5, rel=1e-5)


def reserved_around_the_first_step(overrides: list[str]) -> tuple[int, int]:
    """Bytes that torch holds of the GPU before and after, of which a GiB is in no use."""
    run = set_up(load_config(None, overrides))
    torch.empty(2**30, dtype=torch.uint8, device=run.platform.device)
    before = torch.cuda.memory_reserved()
    train_step(run)
    return before, torch.cuda.memory_reserved()


def test_the_first_step_gives_back_what_is_in_no_use(gpus: WorkerPool, small_run: list[str]) -> None:  # noqa: F811
    gpus.run(1, reserved_around_the_first_step, small_run)  # libraries take what they keep
    ((before, after),) = gpus.run(1, reserved_around_the_first_step, small_run)
    assert after < before - 2**29
