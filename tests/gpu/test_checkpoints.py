"""A run that goes from the GPU, where it computes in FP8, to the CPU and back: the same weights, optimizer state and
validation loss on both."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.distributed.checkpoint_job import shards_and_losses
from tests.distributed.conftest import corpus, small_run  # noqa: F401
from tests.distributed.layout_job import assemble
from tests.distributed.test_layouts import MODELS
from tests.distributed.workers import WorkerPool
from tests.gpu.test_fp8 import FP8_TABLES, MEMORY_WIDTHS, RECIPES, needs_fp8
from tests.gpu.test_training import BF16, LOCAL, TE, WIDE

pytestmark = [pytest.mark.gpu, needs_fp8]
MODEL = [*MODELS["block"], *WIDE, BF16, *MEMORY_WIDTHS, FP8_TABLES]
GPU = [TE, *RECIPES["delayed"]]
CPU = [LOCAL, "train.device=cpu"]


@pytest.fixture
def cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[WorkerPool]:
    """A process that sees no GPU."""
    workers = WorkerPool(1)
    with monkeypatch.context() as context:
        context.setenv("CUDA_VISIBLE_DEVICES", "")
        workers.run(1, int)  # starts it
    yield workers
    workers.close()


@pytest.mark.seconds(50)
def test_a_run_goes_to_the_cpu_and_back(
    gpus: WorkerPool,
    cpu: WorkerPool,
    small_run: list[str],  # noqa: F811
    tmp_path: Path,
) -> None:
    settings = [*small_run, *MODEL, "checkpoint.load=auto", f"train.run_dir={tmp_path}"]
    (trained,) = gpus.run(1, shards_and_losses, [*settings, *GPU], 2, True, True)
    (on_cpu,) = cpu.run(1, shards_and_losses, [*settings, *CPU], 3, True, True)
    (back,) = gpus.run(1, shards_and_losses, [*settings, *GPU], 4, False, True)
    assert [one["device"] for one in (trained, on_cpu, back)] == ["cuda", "cpu", "cuda"]
    for step, before, after in ((2, trained, on_cpu), (3, on_cpu, back)):
        assert after["first_step"] == step and len(after["losses"]) == 1
        np.testing.assert_allclose(after["valid_losses"][0], before["valid_losses"][1], rtol=1e-2)
        saved, loaded = assemble([before["end"]]), assemble([after["start"]])
        assert any("exp_avg" in name for name in saved) and loaded.keys() == saved.keys()
        for name, wanted in saved.items():
            np.testing.assert_array_equal(loaded[name], wanted, err_msg=name)
        assert len(after["warnings"]) == 1 and "another kind of device" in after["warnings"][0]
