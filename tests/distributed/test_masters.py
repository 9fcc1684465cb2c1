"""Weights made anew from the optimizer's fp32 masters are those of the last step."""

from __future__ import annotations

import pytest
import torch

from megatron_ultramem.config import load_config
from megatron_ultramem.training.loop import train_step
from megatron_ultramem.training.optimizer import weights_from_masters, whole_parameters
from megatron_ultramem.training.setup import set_up
from tests.distributed.workers import WorkerPool

CASES = {
    "replicated": [],
    "gathered_by_the_forward": ["parallel.overlap_grad_reduce=true", "parallel.overlap_param_gather=true"],
    "rows": ["parallel.memory_parallel_size=2", "parallel.memory_placement=rows"],
}


def step_after(overrides: list[str], loses_weights: bool) -> float:
    """Loss of a second step, before which weights were lost and made anew as a checkpoint is loaded, or not."""
    run = set_up(load_config(None, overrides))
    train_step(run)
    if loses_weights:
        with whole_parameters(run.chunks), torch.no_grad():
            for param in run.model[0].parameters():
                param.zero_()
            weights_from_masters(run.chunks, run.optimizer)
    return train_step(run)["loss"]


def made_anew(overrides: list[str]) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Every parameter after a step, and after it was lost and made anew."""
    run = set_up(load_config(None, overrides))
    train_step(run)
    with whole_parameters(run.chunks), torch.no_grad():
        known = {name: param.clone() for name, param in run.model[0].named_parameters()}
        for param in run.model[0].parameters():
            param.zero_()
    weights_from_masters(run.chunks, run.optimizer)
    with whole_parameters(run.chunks):
        return {name: (param.detach().clone(), known[name]) for name, param in run.model[0].named_parameters()}


@pytest.mark.parametrize("case", CASES)
def test_weights_are_those_of_the_last_step(pool: WorkerPool, small_run: list[str], case: str) -> None:
    for params in pool.run(2, made_anew, [*small_run, "train.precision=bf16", *CASES[case]]):
        for name, (found, known) in params.items():
            assert torch.equal(found, known), name


@pytest.mark.parametrize("case", CASES)
def test_a_step_with_weights_made_anew_is_the_one_with_those_it_had(
    pool: WorkerPool, small_run: list[str], case: str
) -> None:
    settings = [*small_run, "train.precision=bf16", *CASES[case]]
    assert pool.run(2, step_after, settings, True) == pool.run(2, step_after, settings, False)
