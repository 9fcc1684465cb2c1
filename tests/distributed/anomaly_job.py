"""The jobs of test_anomalies.py: runs in which the model goes wrong at chosen batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from megatron_ultramem.config import load_config
from megatron_ultramem.errors import TrainingError
from megatron_ultramem.training import loop
from megatron_ultramem.training.setup import Run, set_up
from tests.distributed.checkpoint_job import state


def spoil(run: Run, factors: dict[int, float]) -> None:
    """Multiplies the last norm's output by a factor at batches given by the samples consumed before them: NaN makes the
    loss and all gradients NaN, a large negative one lets the loss leap."""
    module = run.model[-1].decoder.final_layernorm
    if module is not None:
        module.register_forward_hook(lambda _, __, out: out * factors.get(run.position.consumed_samples, 1.0))


def train_step_by_step(overrides: list[str], steps: int, factors: dict[int, float]) -> list[dict[str, Any]]:
    """Metrics of every step and this rank's whole state after it."""
    run = set_up(load_config(None, overrides))
    spoil(run, factors)
    results = []
    for _ in range(steps):
        metrics = loop.train_step(run)
        results.append({"metrics": metrics, "position": vars(run.position).copy(), "state": state(run)})
    return results


def train_whole(overrides: list[str], factors: dict[int, float]) -> dict[str, Any]:
    """`train` to its end; the error that it ends in, and this rank's state and position then."""
    runs: list[Run] = []

    def spoiled(*args: Any) -> Run:
        runs.append(set_up(*args))
        spoil(runs[0], factors)
        return runs[0]

    last: dict[str, Any] = {}
    with replaced("set_up", spoiled), replaced("destroy_distributed", lambda: last.update(state=state(runs[0]))):
        try:
            loop.train(load_config(None, overrides))
        except TrainingError as error:
            last["error"] = str(error)
    return {"error": "", "position": vars(runs[0].position), "ranks": torch.distributed.get_world_size(), **last}


@contextmanager
def replaced(name: str, value: Callable[..., Any]) -> Iterator[None]:
    original = getattr(loop, name)
    setattr(loop, name, value)
    try:
        yield
    finally:
        setattr(loop, name, original)
