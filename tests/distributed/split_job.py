"""The job of the time-split tests: in which component the matrix products of a step fall, forward and backward."""

from __future__ import annotations

from collections import Counter

from megatron_ultramem.config import load_config
from megatron_ultramem.training.loop import train_step
from megatron_ultramem.training.setup import set_up
from megatron_ultramem.training.time_split import by_component, marked, traced


def split_job(overrides: list[str], operation: str) -> tuple[Counter[str], list[float], list[float]]:
    """How often an operation of torch runs in each component in one step; losses of that step and two more, which are
    not watched; and of a run of which no step is."""
    watched, plain = set_up(load_config(None, overrides)), None
    losses = []
    with marked(watched):
        events = traced(watched, lambda: losses.append(train_step(watched)["loss"]))
    losses += [train_step(watched)["loss"] for _ in range(2)]
    found = Counter(component for event, component in by_component(events) if event.name == operation)
    from megatron_ultramem.training.distributed import destroy_distributed

    destroy_distributed()
    plain = set_up(load_config(None, overrides))
    return found, losses, [train_step(plain)["loss"] for _ in range(3)]
