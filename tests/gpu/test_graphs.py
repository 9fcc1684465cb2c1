"""Memory layers as CUDA graphs train as they do without, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.distributed.conftest import corpus, small_run  # noqa: F401
from tests.distributed.test_memory_parallel import COLUMNS, MODELS, OVERLAP, P2, ROWS, STATIC
from tests.distributed.workers import WorkerPool
from tests.gpu.graph_job import graph_job
from tests.gpu.test_memory_parallel import BESIDE_FFN
from tests.gpu.test_training import BF16, TE, WIDE

pytestmark = pytest.mark.gpu
GRAPHS = "train.cuda_graphs=memory"
GRAD_OVERLAP, _, SMALL_BUCKETS = OVERLAP
STEPS = 4
SETTINGS = {
    "one_gpu": (1, []),
    "one_gpu_auxiliary_losses": (1, ["model.memory.balance_loss_coeff=0.01", "model.memory.tucker_penalty_coeff=0.1"]),
    "rows": (2, [P2, ROWS, f"{STATIC}=2"]),
    "rows_overlap": (2, [P2, ROWS, f"{STATIC}=2", BESIDE_FFN, GRAD_OVERLAP, SMALL_BUCKETS]),
    "columns": (2, [P2, COLUMNS]),
    "columns_overlap": (2, [P2, COLUMNS, BESIDE_FFN, GRAD_OVERLAP, SMALL_BUCKETS]),
}


@pytest.mark.parametrize("case", SETTINGS)
def test_training_with_graphs_equals_training_without(
    gpus: WorkerPool,
    small_run: list[str],  # noqa: F811
    case: str,
) -> None:
    ranks, layout = SETTINGS[case]
    if torch.cuda.device_count() < ranks:
        pytest.skip(f"needs {ranks} GPUs")
    settings = [*small_run, *MODELS["ring"], *WIDE, TE, BF16, "train.deterministic=true", *layout]
    expected = gpus.run(ranks, graph_job, settings, STEPS)
    for found, wanted in zip(gpus.run(ranks, graph_job, [*settings, GRAPHS], STEPS), expected, strict=True):
        assert found["recorded"] and not wanted["recorded"]
        for what in ("losses", "grad_norms", "valid_loss", "moved"):
            assert found[what] == wanted[what], what
        for (key, _, _, numbers), (_, _, _, known) in zip(found["params"], wanted["params"], strict=True):
            assert np.array_equal(numbers, known), key
