"""Reports of faults name the last collective: NCCL's are recorded too."""

from __future__ import annotations

import re

import pytest
import torch

from megatron_ultramem.config import load_config
from megatron_ultramem.training import flight_recorder
from megatron_ultramem.training.loop import train_step
from megatron_ultramem.training.setup import set_up
from tests.distributed.conftest import corpus, small_run  # noqa: F401
from tests.distributed.workers import WorkerPool

pytestmark = pytest.mark.gpu


def collectives_of_a_step(overrides: list[str]) -> tuple[str, set[str]]:
    """The last collective, and the names of all that were recorded."""
    run = set_up(load_config(None, overrides))
    train_step(run)
    torch.cuda.synchronize()
    entries = flight_recorder.traces()["nccl"]["entries"]
    return str(flight_recorder.last_collective()), {entry["profiling_name"] for entry in entries}


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.two_gpus)])
def test_collectives_of_nccl_are_recorded(gpus: WorkerPool, small_run: list[str], ranks: int) -> None:  # noqa: F811
    for last, names in gpus.run(ranks, collectives_of_a_step, small_run):
        assert re.fullmatch(r"(nccl|gloo):\w+ \d+ of .+", last), last
        assert any(name.startswith("nccl:") for name in names), names
