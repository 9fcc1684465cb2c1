"""Value tables sharded over two GPUs: the same training as on one, with the exchange beside the FFN too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from tests.distributed.conftest import corpus, small_run  # noqa: F401
from tests.distributed.layout_job import assemble, assert_same, train_job
from tests.distributed.test_memory_parallel import (
    COLUMNS,
    EP2,
    MODELS,
    OVERLAP,
    P2,
    PLAIN,
    ROWS,
    STATIC,
    TP2,
)
from tests.distributed.workers import WorkerPool
from tests.gpu.test_training import BF16, LOCAL, STEPS, TE, WIDE

pytestmark = [pytest.mark.gpu, pytest.mark.two_gpus]

BESIDE_FFN = "parallel.overlap_exchange=true"
GRAD_OVERLAP, _, SMALL_BUCKETS = OVERLAP
LAYOUTS = {
    ("ring", "columns"): [P2, COLUMNS],
    ("ring", "rows_static_overflow"): [P2, ROWS, f"{STATIC}=0.8"],
    ("block", "rows_to_all"): [P2, ROWS, f"{STATIC}=2"],
    ("no_ring", "rows_tp2"): [P2, ROWS, TP2],
    ("moe", "columns_ep2"): [P2, COLUMNS, EP2],
    ("block", "rows_recompute_plain_optimizer"): [P2, ROWS, PLAIN, "train.recompute=full"],
    ("ring", "rows_beside_ffn"): [P2, ROWS, BESIDE_FFN, GRAD_OVERLAP, SMALL_BUCKETS],
    ("ring", "columns_beside_ffn"): [P2, COLUMNS, BESIDE_FFN],
    ("no_ring", "columns_tp2_beside_ffn"): [P2, COLUMNS, TP2, BESIDE_FFN],
    ("moe", "columns_ep2_beside_ffn"): [P2, COLUMNS, EP2, BESIDE_FFN],
    ("no_ring", "columns_beside_ffn_recompute"): [P2, COLUMNS, BESIDE_FFN, "model.memory.recompute=true"],
}


@pytest.fixture(scope="module")
def one_gpu(gpus: WorkerPool, small_run: list[str]) -> Callable[[str], dict[str, Any]]:  # noqa: F811
    cache: dict[str, dict[str, Any]] = {}

    def reference(model: str) -> dict[str, Any]:
        if model not in cache:
            (cache[model],) = gpus.run(1, train_job, [*small_run, *MODELS[model], LOCAL], STEPS)
            for what in ("grads", "params"):
                cache[model][what] = assemble([cache[model][what]])
        return cache[model]

    return reference


@pytest.mark.parametrize(("model", "layout"), LAYOUTS, ids=["-".join(case) for case in LAYOUTS])
def test_training_in_fp32_equals_one_gpu(
    gpus: WorkerPool,
    small_run: list[str],  # noqa: F811
    one_gpu: Callable[[str], dict[str, Any]],
    model: str,
    layout: str,
) -> None:
    expected = one_gpu(model)
    settings = [*small_run, *MODELS[model], LOCAL, *LAYOUTS[model, layout]]
    results = gpus.run(2, train_job, settings, STEPS)
    for result in results:
        np.testing.assert_allclose(result["losses"], expected["losses"], rtol=1e-5)
        np.testing.assert_allclose(result["grad_norms"], expected["grad_norms"], rtol=1e-4)
    assert_same(assemble([result["grads"] for result in results]), expected["grads"], 1e-4)
    assert_same(assemble([result["params"] for result in results]), expected["params"], 2e-3)


@pytest.mark.parametrize("placement", [ROWS, COLUMNS])
def test_deterministic_training_repeats_bitwise(
    gpus: WorkerPool,
    small_run: list[str],  # noqa: F811
    placement: str,
) -> None:
    """In bf16 through Transformer Engine, with the exchange beside the FFN."""
    settings = [*small_run, *MODELS["ring"], *WIDE, TE, BF16, P2, placement, BESIDE_FFN, "train.deterministic=true"]
    first, second = (gpus.run(2, train_job, settings, STEPS) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert a["losses"] == b["losses"]
        for (key, _, _, numbers), (_, _, _, again) in zip(a["params"], b["params"], strict=True):
            assert np.array_equal(numbers, again), key


@pytest.mark.parametrize("placement", [ROWS, COLUMNS])
def test_bf16_with_transformer_engine_follows_one_gpu(
    gpus: WorkerPool,
    small_run: list[str],  # noqa: F811
    placement: str,
) -> None:
    settings = [*small_run, *MODELS["ring"], *WIDE, TE, BF16]
    (one,) = gpus.run(1, train_job, settings, STEPS)
    for result in gpus.run(2, train_job, [*settings, P2, placement, BESIDE_FFN], STEPS):
        np.testing.assert_allclose(result["losses"], one["losses"], rtol=3e-3)
        np.testing.assert_allclose(result["grad_norms"], one["grad_norms"], rtol=5e-2)
