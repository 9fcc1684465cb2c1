"""FP8 matrix products: every recipe trains like bf16, resumes bit by bit, and its checkpoints load elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.distributed.conftest import corpus, small_run  # noqa: F401
from tests.distributed.test_layouts import MODELS, OVERLAP, TP2
from tests.distributed.test_memory_parallel import COLUMNS, P2
from tests.distributed.workers import WorkerPool
from tests.gpu.fp8_job import experts_job, fp8_job, losses_around_a_change
from tests.gpu.test_training import BF16, LOCAL, TE, WIDE, two_gpus

needs_fp8 = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (9, 0), reason="needs a GPU with FP8"
)
pytestmark = [pytest.mark.gpu, pytest.mark.seconds(8), needs_fp8]
STEPS = 4
FP8_TABLES, GATHER = "model.memory.table_read=fp8", "train.fp8.param_gather=true"
MEMORY_WIDTHS = ["model.memory.key_dim=16", "model.memory.value_dim=32", "model.memory.pre_value_dim=32"]
WIDTHS = [*WIDE, BF16, *MEMORY_WIDTHS, "train.deterministic=true"]
MODEL = [*MODELS["block"], *WIDTHS]
MOE_WITH_MEMORY = [*MODELS["moe_memory_dense"], *WIDTHS, "train.deterministic=false"]
RECIPES = {
    "delayed": ["train.fp8.recipe=delayed", "train.fp8.amax_history_len=4"],
    "tensorwise": ["train.fp8.recipe=tensorwise"],
    "blockwise": ["train.fp8.recipe=blockwise"],
}
SLOW = ("delayed", "blockwise")


@pytest.fixture(scope="module")
def run(gpus: WorkerPool, small_run: list[str]) -> Any:  # noqa: F811
    """`fp8_job` on one GPU under some settings; remembered."""
    cache: dict[tuple[str, ...], dict[str, Any]] = {}

    def train(*overrides: str) -> dict[str, Any]:
        if overrides not in cache:
            cache[overrides] = gpus.run(1, fp8_job, [*small_run, *MODEL, *overrides], STEPS)[0]
        return cache[overrides]

    return train


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_trains_like_bf16(run: Any, recipe: str) -> None:
    bf16, fp8 = run(TE), run(TE, *RECIPES[recipe])
    assert all(fp8["in_fp8"].values()) and not any(bf16["in_fp8"].values())
    np.testing.assert_allclose(fp8["losses"], bf16["losses"], rtol=1e-2)
    np.testing.assert_allclose(fp8["grad_norms"], bf16["grad_norms"], rtol=0.2)
    np.testing.assert_allclose(fp8["valid_loss"], bf16["valid_loss"], rtol=1e-2)
    assert fp8["params"].keys() == bf16["params"].keys()


@pytest.mark.seconds(65)
def test_experts_train_like_in_bf16_whatever_tokens_they_get(gpus: WorkerPool, small_run: list[str]) -> None:  # noqa: F811
    """A group of GEMMs for all experts, and a linear for each: tokens of an expert are padded to what FP8 takes."""
    settings = [*small_run, *MOE_WITH_MEMORY, TE]
    (bf16,) = gpus.run(1, experts_job, settings, STEPS)
    assert bf16["in_fp8"] and not any(bf16["in_fp8"].values())
    for fp8 in (RECIPES["tensorwise"], RECIPES["blockwise"], [*RECIPES["tensorwise"], "model.moe.grouped_gemm=false"]):
        (found,) = gpus.run(1, experts_job, [*settings, *fp8], STEPS)
        assert found["in_fp8"] and all(found["in_fp8"].values()), fp8
        assert any(tokens % 16 for tokens in found["tokens"])
        np.testing.assert_allclose(found["losses"], bf16["losses"], rtol=1e-2, err_msg=" ".join(fp8))
        np.testing.assert_allclose(found["grad_norms"], bf16["grad_norms"], rtol=0.2, err_msg=" ".join(fp8))
        np.testing.assert_allclose(found["valid_loss"], bf16["valid_loss"], rtol=1e-2, err_msg=" ".join(fp8))


def test_first_and_last_layers_stay_in_bf16(run: Any) -> None:
    ends = ["train.fp8.first_last_layers_bf16=true", "train.fp8.num_layers_at_end_in_bf16=2"]
    assert run(TE, *RECIPES["tensorwise"], *ends)["in_fp8"] == {0: False, 1: True, 2: False, 3: False}


@pytest.mark.slow
def test_memory_projections_stay_in_bf16(run: Any) -> None:
    found = run(TE, *RECIPES["delayed"], "train.fp8.memory_projections=false")
    assert not any(found["in_fp8"].values())
    np.testing.assert_allclose(found["losses"], run(TE)["losses"], rtol=1e-2)


@pytest.mark.slow
def test_recomputed_memory_layers_give_the_same_losses(run: Any) -> None:
    kept, recomputed = run(TE, *RECIPES["delayed"]), run(TE, *RECIPES["delayed"], "model.memory.recompute=true")
    np.testing.assert_allclose(recomputed["losses"], kept["losses"], rtol=1e-4)
    np.testing.assert_allclose(recomputed["grad_norms"], kept["grad_norms"], rtol=1e-2)


@pytest.mark.parametrize("recipe", ["tensorwise", *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_weights_in_fp8_alone_start_from_the_same_numbers(run: Any, recipe: str) -> None:
    """With delayed scaling the first steps differ: such weights have scales of their own before the first forward."""
    plain, gathered = run(TE, *RECIPES[recipe]), run(TE, *RECIPES[recipe], "train.fp8.param_gather=true")
    np.testing.assert_allclose(gathered["losses"], plain["losses"], rtol=2e-2 if recipe == "delayed" else 2e-3)


RESUMED = {
    "delayed_and_tables": [*RECIPES["delayed"], FP8_TABLES],
    "bf16": [],
    "tensorwise_fp8_weights": [*RECIPES["tensorwise"], GATHER],
    "delayed_fp8_weights": [*RECIPES["delayed"], GATHER],
    "blockwise": RECIPES["blockwise"],
}


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[] if case == "delayed_and_tables" else pytest.mark.slow) for case in RESUMED]
)
def test_resuming_is_bitwise(gpus: WorkerPool, small_run: list[str], tmp_path: Path, case: str) -> None:  # noqa: F811
    settings = [*small_run, *MODEL, TE, *RESUMED[case], "checkpoint.load=auto", f"train.run_dir={tmp_path}"]
    (straight,) = gpus.run(1, fp8_job, settings, STEPS, (STEPS // 2,))
    (resumed,) = gpus.run(1, fp8_job, settings, STEPS)
    assert resumed["losses"] == straight["losses"][STEPS // 2 :]
    assert bool(straight["scales"]) == ("delayed" in case)
    for what in ("scales", "params"):
        for name, numbers in straight[what].items():
            assert np.array_equal(resumed[what][name], numbers), name
    assert resumed["valid_loss"] == straight["valid_loss"]


def test_a_checkpoint_moves_between_back_ends_and_precisions(
    gpus: WorkerPool,
    small_run: list[str],  # noqa: F811
    tmp_path: Path,
) -> None:
    settings = [*small_run, *MODEL, "checkpoint.load=auto", f"train.run_dir={tmp_path}"]
    (saved,) = gpus.run(1, fp8_job, [*settings, TE, *RECIPES["delayed"]], 2, (2,))
    (loaded,) = gpus.run(1, fp8_job, [*settings, LOCAL], 2)
    np.testing.assert_allclose(loaded["valid_loss"], saved["valid_loss"], rtol=5e-3)
    for name in saved["params"]:
        if ".memory." in name:
            assert np.array_equal(loaded["params"][name], saved["params"][name]), name


def test_tables_read_in_fp8_train_like_those_in_bf16(run: Any) -> None:
    in_full, read_in_fp8 = run(TE), run(TE, FP8_TABLES)
    assert read_in_fp8["losses"][0] != in_full["losses"][0]
    np.testing.assert_allclose(read_in_fp8["losses"], in_full["losses"], rtol=5e-3)
    np.testing.assert_allclose(read_in_fp8["valid_loss"], in_full["valid_loss"], rtol=5e-3)


@pytest.mark.parametrize("graphs", [pytest.param("memory", marks=pytest.mark.slow), "full"])
def test_recorded_lookups_read_what_each_step_makes_of_the_tables(run: Any, graphs: str) -> None:
    plain, recorded = run(TE, FP8_TABLES), run(TE, FP8_TABLES, f"train.cuda_graphs={graphs}")
    assert recorded["losses"] == plain["losses"]
    assert recorded["valid_loss"] == plain["valid_loss"]


@pytest.mark.parametrize("recipe", ["none", "tensorwise", pytest.param("blockwise", marks=pytest.mark.slow)])
def test_recorded_weights_become_fp8_once_a_step(gpus: WorkerPool, small_run: list[str], recipe: str) -> None:  # noqa: F811
    settings = [*small_run, *MODEL, TE, f"train.fp8.recipe={recipe}", "train.cuda_graphs=full"]
    (found,) = gpus.run(1, losses_around_a_change, settings)
    first, changed, next_step = found
    assert (changed == first) == (recipe != "none")  # bf16 weights are read where they lie
    assert next_step != first


LAYOUTS = {
    "tp2": (RECIPES["tensorwise"], [TP2]),
    "columns": ([FP8_TABLES], [P2, COLUMNS]),
    "dp2_fp8_weights": ([*RECIPES["tensorwise"], GATHER], []),
}


@two_gpus
@pytest.mark.parametrize("case", LAYOUTS)
def test_two_gpus_train_like_one(gpus: WorkerPool, small_run: list[str], run: Any, case: str) -> None:  # noqa: F811
    settings, layout = LAYOUTS[case]
    one = run(TE, *settings)
    for two in gpus.run(2, fp8_job, [*small_run, *MODEL, TE, *settings, *layout], STEPS):
        np.testing.assert_allclose(two["losses"], one["losses"], rtol=1e-2)
        np.testing.assert_allclose(two["valid_loss"], one["valid_loss"], rtol=1e-2)


@two_gpus
def test_weights_in_fp8_alone_resume_bit_by_bit_on_two_gpus(
    gpus: WorkerPool,
    small_run: list[str],  # noqa: F811
    tmp_path: Path,
) -> None:
    """Those that the forward gathers, after a save too."""
    settings = [*small_run, *MODEL, TE, *RECIPES["tensorwise"], GATHER, *OVERLAP]
    plain = gpus.run(2, fp8_job, settings, STEPS)
    settings += ["checkpoint.load=auto", f"train.run_dir={tmp_path}"]
    straight = gpus.run(2, fp8_job, settings, STEPS, (STEPS // 2,))
    resumed = gpus.run(2, fp8_job, settings, STEPS)
    for before, first, second in zip(plain, straight, resumed, strict=True):
        assert first["losses"] == before["losses"]
        assert second["losses"] == first["losses"][STEPS // 2 :]
        assert second["valid_loss"] == first["valid_loss"] == before["valid_loss"]
        for name, numbers in first["params"].items():
            assert np.array_equal(second["params"][name], numbers), name
