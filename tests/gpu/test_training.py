"""Training on GPUs through NCCL and Transformer Engine: the same run as on the CPU, the same under every layout."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.distributed.conftest import corpus, small_run  # noqa: F401
from tests.distributed.layout_job import assemble, train_job
from tests.distributed.test_layouts import INTERLEAVED, MODELS, OVERLAP, PLAIN, PP2, TP2
from tests.distributed.workers import WorkerPool

pytestmark = pytest.mark.gpu
two_gpus = pytest.mark.two_gpus
STEPS = 2  # losses tell of the first update, parameters of both
TE, BF16 = "model.backend=transformer_engine", "train.precision=bf16"
LOCAL = "model.backend=local"
# Widths that flash attention takes.
WIDE = ["model.hidden_size=128", "model.head_dim=64", "model.num_attention_heads=2", "model.ffn_hidden_size=256",
        "model.max_sequence_length=128", "data.sequence_length=128"]  # fmt: skip


# Every row for every token: no choice that bf16's round-off could turn.
EVERY_ROW = ["model.memory.num_keys=4", "model.memory.top_m=16"]


@pytest.fixture(scope="module")
def run(gpus: WorkerPool, small_run: list[str]) -> Any:  # noqa: F811
    """Trains under some settings and returns the ranks' results; one-rank runs are remembered."""
    cache: dict[tuple[str, ...], list[dict[str, Any]]] = {}

    def train(ranks: int, *overrides: str) -> list[dict[str, Any]]:
        if ranks > 1:
            return gpus.run(ranks, train_job, [*small_run, *overrides], STEPS)
        if overrides not in cache:
            cache[overrides] = gpus.run(1, train_job, [*small_run, *overrides], STEPS)
        return cache[overrides]

    return train


@two_gpus
@pytest.mark.parametrize("layout", [[TP2], [PP2], OVERLAP, [PLAIN]], ids=" ".join)
def test_two_gpus_in_fp32_equal_one(run: Any, layout: list[str]) -> None:
    (one,) = run(1, *MODELS["block"], LOCAL)
    results = run(2, *MODELS["block"], LOCAL, *layout)
    for result in results:
        np.testing.assert_allclose(result["losses"], one["losses"], rtol=1e-5)
        np.testing.assert_allclose(result["grad_norms"], one["grad_norms"], rtol=1e-4)
    actual, expected = assemble([result["grads"] for result in results]), assemble([one["grads"]])
    for key, wanted in expected.items():
        worst = np.abs(actual[key] - wanted).max()
        assert worst <= 1e-4 * np.abs(wanted).max() + 1e-9, f"{key} differs by {worst}"


@two_gpus
def test_interleaved_pipeline_equals_one_gpu(run: Any) -> None:
    (one,) = run(1, *MODELS["deep_block"], LOCAL)
    for result in run(2, *MODELS["deep_block"], LOCAL, *INTERLEAVED):
        np.testing.assert_allclose(result["losses"], one["losses"], rtol=1e-5)


@two_gpus
@pytest.mark.parametrize("layout", [["parallel.context_parallel_size=2"], [TP2], [PP2]], ids=" ".join)
def test_every_gradient_with_transformer_engine_on_two_gpus_is_that_of_one(run: Any, layout: list[str]) -> None:
    """No farther from an fp32 run than twice what one GPU in bf16 is; updated parameters too."""
    model = [*MODELS["block"], *WIDE, *EVERY_ROW]
    (exact,), (one,) = run(1, *model, LOCAL), run(1, *model, TE, BF16)
    results = run(2, *model, TE, BF16, *layout)
    for what in ("grads", "params"):
        expected, rounded = assemble([exact[what]]), assemble([one[what]])
        actual = assemble([result[what] for result in results])
        assert actual.keys() == expected.keys()
        for key, wanted in expected.items():
            round_off, difference = _distance(rounded[key], wanted), _distance(actual[key], wanted)
            print(f"{what} {key}: {round_off:.4f} on one, {difference:.4f} on two")
            assert round_off < 0.25, f"{what} of {key}: bf16 differs by {round_off:.1%}: nothing to compare with"
            assert difference <= 2 * round_off + 1e-3, f"{what} of {key}: {difference:.2%}, on one GPU {round_off:.2%}"


def _distance(actual: np.ndarray, expected: np.ndarray) -> float:
    """The length of the difference as a part of the length of what is expected."""
    return float(np.linalg.norm(actual - expected) / max(np.linalg.norm(expected), 1e-12))


@pytest.mark.seconds(25)
@pytest.mark.parametrize("model", ["block", "moe_memory_dense"])
def test_transformer_engine_equals_the_local_back_end(run: Any, model: str) -> None:
    (local,) = run(1, *MODELS[model], *WIDE, LOCAL, BF16)
    (te,) = run(1, *MODELS[model], *WIDE, TE, BF16)
    np.testing.assert_allclose(te["losses"], local["losses"], rtol=5e-3)
    assert {key for key, *_ in te["params"]} == {key for key, *_ in local["params"]}


def test_packed_documents_equal_the_dense_mask(run: Any) -> None:
    masked = ["data.mask_document_boundaries=true", "data.reset_position_ids=true", *WIDE, BF16]
    (local,) = run(1, *MODELS["block"], *masked, LOCAL)
    (te,) = run(1, *MODELS["block"], *masked, TE)
    np.testing.assert_allclose(te["losses"], local["losses"], rtol=5e-3)


def test_deterministic_training_repeats_bitwise(gpus: WorkerPool, small_run: list[str]) -> None:  # noqa: F811
    settings = [*small_run, *MODELS["block"], *WIDE, TE, BF16, "train.deterministic=true", "model.hidden_dropout=0.1"]
    first, second = (gpus.run(1, train_job, settings, STEPS)[0] for _ in range(2))
    assert first["losses"] == second["losses"]
    for (key, _, _, a), (_, _, _, b) in zip(first["params"], second["params"], strict=True):
        assert np.array_equal(a, b), key


@pytest.mark.seconds(100)
def test_quickstart_trains_and_generates(tmp_path: Path) -> None:
    root = Path(__file__).resolve().parents[2]
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]  # it takes two where it sees them
    done = subprocess.run(
        [sys.executable, "tools/quickstart.py", f"train.run_dir={tmp_path}/run", f"data.paths=[{tmp_path}/data]",
         "train.steps=100", "train.eval_interval=0"], cwd=root, capture_output=True, text=True,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": first})  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "on cuda" in done.stdout
