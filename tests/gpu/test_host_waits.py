"""In the forward and backward of a step the host waits for the GPU only where ARCHITECTURE.md says so."""

from __future__ import annotations

import pytest

from megatron_ultramem.config import load_config
from tests.distributed.conftest import corpus, small_run  # noqa: F401
from tests.distributed.test_memory_parallel import MODELS
from tests.distributed.workers import WorkerPool
from tests.gpu.test_fp8 import FP8_TABLES, MEMORY_WIDTHS, RECIPES, needs_fp8
from tests.gpu.test_training import BF16, TE, WIDE

pytestmark = pytest.mark.gpu
CASES = {
    "eager": [
        "model.memory.balance_loss_coeff=0.01",
        "model.memory.tucker_penalty_coeff=0.1",
        "data.mask_eod_loss=true",
    ],
    "fp8": [*RECIPES["tensorwise"], FP8_TABLES, *MEMORY_WIDTHS],
    "documents": ["data.mask_document_boundaries=true"],
    "throughput": ["preset=throughput"],
}


def waits_job(overrides: list[str]) -> dict[str, int]:
    from megatron_ultramem.training.host_waits import host_waits
    from megatron_ultramem.training.loop import train_step
    from megatron_ultramem.training.setup import set_up

    run = set_up(load_config(None, overrides))
    for _ in range(3):  # compilation, recording, and a step as all others are
        train_step(run)
    return dict(host_waits(run))


@pytest.mark.parametrize("case", [pytest.param(case, marks=needs_fp8 if case == "fp8" else ()) for case in CASES])
def test_the_host_waits_nowhere(gpus: WorkerPool, small_run: list[str], case: str) -> None:  # noqa: F811
    (found,) = gpus.run(1, waits_job, [*small_run, *MODELS["ring"], *WIDE, TE, BF16, *CASES[case]])
    assert found == {}


def test_a_wait_is_found_and_named(gpus: WorkerPool, small_run: list[str]) -> None:  # noqa: F811
    """Singular values of Tucker cores beyond 2 x 2 are cuSOLVER's, which the host waits for."""
    penalty = ["model.memory.tucker_rank=3", "model.memory.tucker_penalty_coeff=0.1"]
    (found,) = gpus.run(1, waits_job, [*small_run, *MODELS["ring"], *WIDE, TE, BF16, *penalty])
    assert any("svd" in where for where in found), found
