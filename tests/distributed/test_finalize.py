"""Gradients that are divided without a look at the number of tokens are those that Megatron divides."""

from __future__ import annotations

import pytest
import torch
from megatron.core.distributed import finalize_model_grads

from megatron_ultramem.config import load_config
from megatron_ultramem.training.loop import train_step
from megatron_ultramem.training.setup import set_up
from tests.distributed.test_layouts import MODELS, PP2
from tests.distributed.test_memory_parallel import COLUMNS, P2
from tests.distributed.workers import WorkerPool


def gradients(overrides: list[str], by_megatron: bool) -> dict[str, torch.Tensor]:
    """Of the first step, dense and of tables and experts."""
    run = set_up(load_config(None, overrides))
    if by_megatron:
        run.megatron_config.finalize_model_grads_func = finalize_model_grads
    train_step(run)
    return {name: param.main_grad.clone() for name, param in run.model[0].named_parameters()}


@pytest.mark.parametrize("layout", [[P2, COLUMNS], [PP2]], ids=["columns", "pp2"])
def test_gradients_are_divided_as_by_megatron(pool: WorkerPool, small_run: list[str], layout: list[str]) -> None:
    settings = [*small_run, *MODELS["block"], "data.mask_eod_loss=true", "optimizer.clip_grad=0", *layout]
    found, wanted = pool.run(2, gradients, settings, False), pool.run(2, gradients, settings, True)
    for mine, known in zip(found, wanted, strict=True):
        assert mine.keys() == known.keys() and any(".pools." in name for name in mine)
        for name, numbers in known.items():
            assert numbers.any() and torch.equal(mine[name], numbers), name
