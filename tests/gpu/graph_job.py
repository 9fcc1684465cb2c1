"""The job of the CUDA-graph tests: a few training steps, and whether graphs ran in them."""

from __future__ import annotations

from typing import Any

from megatron_ultramem.config import load_config
from megatron_ultramem.errors import TrainingError
from megatron_ultramem.model.build import value_pools
from megatron_ultramem.training.loop import evaluate, train_step
from megatron_ultramem.training.memory_health import MemoryHealthProbe
from megatron_ultramem.training.setup import set_up
from tests.distributed.layout_job import shards


def graph_job(overrides: list[str], steps: int) -> dict[str, Any]:
    """Losses, gradient norms and parameters of `steps` steps, the last but one watched by the health probe; the loss of
    an evaluation after it; whether graphs were recorded; and what the exchanges moved."""
    run = set_up(load_config(None, overrides))
    probe = MemoryHealthProbe(run.model)
    metrics, valid = [], 0.0
    for step in range(steps):
        with probe.watch(step == steps - 2):
            metrics.append(train_step(run))
        if step == steps - 2:
            valid = evaluate(run)
    pools = value_pools(run.model)
    traffic = getattr(pools[0].placement, "traffic", None) if pools else None
    graphs = run.memory_hooks[0].graphs
    return {
        "losses": [step["loss"] for step in metrics],
        "grad_norms": [step["grad_norm"] for step in metrics],
        "valid_loss": valid,
        "params": shards(run),
        "recorded": graphs is not None and graphs.recorded,
        "moved": None if traffic is None else (traffic.received, traffic.messages),
    }


def refused_recording(overrides: list[str]) -> str:
    """What a run says whose model asks the device for a number while it is recorded."""
    run = set_up(load_config(None, overrides))
    train_step(run)

    def look(_: Any, __: Any, output: Any) -> None:
        assert output[0].sum().item() != 0.0

    run.model[0].decoder.layers[0].mlp.register_forward_hook(look)
    try:
        train_step(run)
    except TrainingError as error:
        return str(error)
    return "recorded"
