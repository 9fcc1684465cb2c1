"""The value tables' optimizer in host memory, on a GPU: the same training, with less memory of the GPU."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from megatron_ultramem.config import load_config
from megatron_ultramem.training.loop import train_step
from megatron_ultramem.training.offload import OffloadingOptimizer
from megatron_ultramem.training.optimizer import whole_parameters
from megatron_ultramem.training.setup import set_up
from tests.distributed.conftest import corpus, small_run  # noqa: F401
from tests.distributed.workers import WorkerPool
from tests.gpu.test_training import TE
from tests.gpu.test_training import WIDE as FOR_GRAPHS

pytestmark = pytest.mark.gpu
STEPS = 4
WIDE = ["model.memory.num_keys=200", "model.memory.value_dim=64", "model.memory.pre_value_dim=64"]


def train(overrides: list[str]) -> dict[str, Any]:
    """Losses, the tables of this rank, and the memory that the run takes of the GPU when it has ended."""
    gc.collect()  # of runs before
    before = torch.cuda.memory_allocated()
    run = set_up(load_config(None, overrides))
    losses = [train_step(run)["loss"] for _ in range(STEPS)]
    with whole_parameters(run.chunks):
        tables = {
            name: param.detach().float().cpu().numpy()
            for name, param in run.model[0].named_parameters()
            if getattr(param, "is_value_table", False)
        }
    torch.cuda.synchronize()
    gc.collect()
    offloaded = isinstance(run.optimizer, OffloadingOptimizer)
    return {
        "losses": losses,
        "tables": tables,
        "offloaded": offloaded,
        "bytes": torch.cuda.memory_allocated() - before,
    }


@pytest.mark.parametrize(
    ("distributed", "precision", "backend"),
    [
        pytest.param("true", "bf16", "deepspeed", marks=pytest.mark.seconds(95)),  # whose kernel is compiled
        ("false", "fp32", "torch"),
    ],
)
def test_it_trains_as_on_the_device_and_frees_the_state(
    gpus: WorkerPool,
    small_run: list[str],  # noqa: F811
    distributed: str,
    precision: str,
    backend: str,
) -> None:
    if backend == "deepspeed":
        pytest.importorskip("deepspeed")
    settings = [*small_run, *WIDE, f"train.precision={precision}", f"parallel.distributed_optimizer={distributed}"]
    (on_device,) = gpus.run(1, train, settings)
    (on_host,) = gpus.run(1, train, [*settings, f"optimizer.value_offload={backend}"])
    assert on_host["offloaded"] and not on_device["offloaded"]
    tolerance = 1e-2 if precision == "bf16" else 1e-4
    np.testing.assert_allclose(on_host["losses"], on_device["losses"], rtol=tolerance)
    elements = 0
    for name, wanted in on_device["tables"].items():
        elements += wanted.size
        # Round-off may turn the choice of a row, which then trains on its own.
        others = (np.abs(on_host["tables"][name] - wanted) > tolerance * np.abs(wanted).max()).mean()
        assert others < 1e-3, f"{name} differs in {others:.1%}"
    # Two moments of four bytes, and the master weights that bf16 has.
    state = (12 if precision == "bf16" else 8) * elements
    assert on_device["bytes"] - on_host["bytes"] > 0.9 * state


@pytest.mark.parametrize("graphs", ["none", "full"])
def test_the_overlap_changes_no_bit_on_a_gpu(
    gpus: WorkerPool,
    small_run: list[str],  # noqa: F811
    graphs: str,
) -> None:
    settings = [*small_run, *WIDE, "optimizer.value_offload=torch", "train.precision=bf16"]
    settings += [*FOR_GRAPHS, TE, "train.deterministic=true", f"train.cuda_graphs={graphs}"]
    (overlapped,), (waiting,) = (gpus.run(1, train_waiting, settings, wait) for wait in (False, True))
    assert overlapped["losses"] == waiting["losses"]
    for name, wanted in waiting["tables"].items():
        np.testing.assert_array_equal(overlapped["tables"][name], wanted, err_msg=name)


def late(update: Callable[..., None], *args: Any, **kwargs: Any) -> None:
    time.sleep(0.05)
    update(*args, **kwargs)


def train_waiting(overrides: list[str], wait: bool) -> dict[str, Any]:
    """`train` with, or without, waiting for the host at the end of every step; the host takes its time."""
    run = set_up(load_config(None, overrides))
    assert isinstance(run.optimizer, OffloadingOptimizer)
    for table in run.optimizer.tables:
        table.adam.update = partial(late, table.adam.update)  # type: ignore[method-assign]
    losses = []
    for _ in range(STEPS):
        losses.append(train_step(run)["loss"])
        if wait:
            run.optimizer.settle(run.optimizer.tables)
            torch.cuda.synchronize()
    with whole_parameters(run.chunks):
        tables = {t: table.values.float().cpu().numpy() for t, table in enumerate(run.optimizer.tables)}
    return {"losses": losses, "tables": tables}
