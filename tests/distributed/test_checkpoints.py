"""Checkpoints fit every layout, refuse what does not fit, and say what went wrong when they cannot be written."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml

from megatron_ultramem.training.checkpoint_folder import list_checkpoints
from tests.distributed.checkpoint_job import error_of_training, shards_and_losses, train_and_save
from tests.distributed.layout_job import assemble
from tests.distributed.workers import WorkerPool

TP2, PP2 = "parallel.tensor_parallel_size=2", "parallel.pipeline_parallel_size=2"
PLAIN = "parallel.distributed_optimizer=false"
MODEL = ["model.num_layers=4", "model.memory.sharing=block", "model.memory.share_size=2"]
LAYOUTS = {
    "one": (1, []),
    "tp2": (2, [TP2]),
    "pp2": (2, [PP2]),
    "dp2": (2, []),
    "tp2_pp2": (4, [TP2, PP2]),
    "dp4": (4, []),
    "interleaved": (2, [PP2, "parallel.virtual_pipeline_stages=2", "parallel.overlap_p2p=true"]),
    "overlap": (
        2,
        ["parallel.overlap_grad_reduce=true", "parallel.overlap_param_gather=true", "parallel.bucket_size=20000"],
    ),
    "plain_one": (1, [PLAIN]),
    "plain_tp2": (2, [TP2, PLAIN]),
    "plain_pp2": (2, [PP2, PLAIN]),
}
FAST = [("tp2", "pp2"), ("dp2", "one")]
SLOW = [
    ("pp2", "dp2"),
    ("one", "tp2"),
    ("tp2_pp2", "one"),
    ("one", "tp2_pp2"),
    ("dp4", "tp2"),
    ("tp2", "dp4"),
    ("overlap", "pp2"),
    ("dp2", "overlap"),
    ("plain_one", "plain_tp2"),
    ("plain_tp2", "plain_pp2"),
    ("plain_pp2", "plain_one"),
    ("interleaved", "tp2"),
    ("one", "interleaved"),
]


@pytest.fixture(scope="module")
def saved(pool: WorkerPool, small_run: list[str], tmp_path_factory: pytest.TempPathFactory):
    """Saves after two steps under a layout; gives the checkpoint's folder and the whole tensors that it must hold."""
    cache: dict[tuple[str, int], tuple[Path, dict[str, np.ndarray]]] = {}

    def save(name: str, layers: int = 4) -> tuple[Path, dict[str, np.ndarray]]:
        if (name, layers) not in cache:
            ranks, layout = LAYOUTS[name]
            folder = tmp_path_factory.mktemp(name)
            settings = [*small_run, *MODEL, *layout, f"model.num_layers={layers}", f"checkpoint.dir={folder}"]
            results = pool.run(ranks, shards_and_losses, settings, 2, True)
            cache[name, layers] = folder / "step_00000002", assemble([result["end"] for result in results])
        return cache[name, layers]

    return save


@pytest.fixture
def settings(small_run: list[str], tmp_path: Path) -> list[str]:
    return [*small_run, *MODEL, f"checkpoint.dir={tmp_path / 'checkpoints'}"]


@pytest.mark.parametrize(
    ("source", "target"),
    [pytest.param(*pair, id="-to-".join(pair), marks=[] if pair in FAST else pytest.mark.slow) for pair in FAST + SLOW],
)
def test_a_checkpoint_loads_under_another_layout(
    pool: WorkerPool, small_run: list[str], saved, tmp_path: Path, source: str, target: str
) -> None:
    layers = 8 if "interleaved" in (source, target) else 4
    folder, expected = saved(source, layers)
    assert {key.split(".")[2] for key in expected if key.startswith("optimizer")} >= {"exp_avg", "exp_avg_sq"}
    settings = [
        *small_run,
        *MODEL,
        f"model.num_layers={layers}",
        f"checkpoint.dir={tmp_path}",
        f"checkpoint.load={folder}",
    ]
    ranks, layout = LAYOUTS[target]
    results = pool.run(ranks, shards_and_losses, [*settings, *layout], 4)
    loaded = assemble([result["start"] for result in results])
    assert loaded.keys() == expected.keys()
    for key, wanted in expected.items():
        np.testing.assert_array_equal(loaded[key], wanted, err_msg=key)
    ranks, layout = LAYOUTS[source]
    for straight in pool.run(ranks, shards_and_losses, [*settings, *layout], 4):
        for result in results:
            assert result["first_step"] == 2
            np.testing.assert_allclose(result["losses"], straight["losses"], rtol=2e-6)
    sizes = [("tp2" in name, "pp2" in name or name == "interleaved") for name in (source, target)]
    warned = [result["warnings"] for result in results]
    if sizes[0] == sizes[1]:
        assert not any(warned)
    else:  # dropout goes on with other random numbers: said once, by rank 0
        assert len(warned[0]) == 1 and "random states do not fit" in warned[0][0] and not any(warned[1:])


def test_weights_only_start_a_fresh_schedule_position_and_optimizer(
    pool: WorkerPool, settings: list[str], saved, tmp_path: Path
) -> None:
    folder, expected = saved("dp2")
    overrides = [*settings, f"checkpoint.load={folder}", "checkpoint.load_optimizer=false", "optimizer.lr=1e-2"]
    for layout in ([], [PLAIN]):
        (result,) = pool.run(1, train_and_save, [*overrides, *layout], 1)
        assert result["first_step"] == 0
        assert result["steps"][1]["lr"] == pytest.approx(1e-2 / 2)  # the first of two steps of warm-up
        start = result["start"]
        name = "decoder.layers.1.mlp.memory.retrieval.keys"
        np.testing.assert_array_equal(start["params"][f"0.{name}"], expected[name])
        assert not [key for key in start["optimizer"] if "exp_avg" in key]


def test_a_finished_run_goes_on_with_more_steps(pool: WorkerPool, settings: list[str]) -> None:
    short = [*settings, "train.steps=4", "checkpoint.load=auto"]
    pool.run(1, train_and_save, short, 4, (4,))
    (same,) = pool.run(1, train_and_save, short, 4)
    assert same["first_step"] == 4 and not same["steps"]
    (longer,) = pool.run(1, train_and_save, [*settings, "train.steps=6", "checkpoint.load=auto"], 6)
    assert list(longer["steps"]) == [5, 6]
    (warning,) = longer["warnings"]
    assert "train.steps: checkpoint 4, config 6" in warning


@pytest.mark.parametrize("layout", [[], [PLAIN]], ids=["distributed_optimizer", "plain_optimizer"])
def test_changed_settings_of_the_optimizer_hold_after_a_resume(
    pool: WorkerPool, settings: list[str], layout: list[str]
) -> None:
    overrides = [*settings, *layout, "checkpoint.load=auto"]
    changed = ["optimizer.lr=1e-2", "optimizer.weight_decay=0.2", "optimizer.beta2=0.9", "optimizer.eps=1e-6"]
    changed += ["optimizer.value_weight_decay=0.3"]
    (fresh,) = pool.run(1, train_and_save, [*overrides, *changed], 3)
    pool.run(1, train_and_save, overrides, 2, (2,))
    (resumed,) = pool.run(1, train_and_save, [*overrides, *changed], 3)
    assert resumed["first_step"] == 2
    assert resumed["end"]["groups"].keys() == fresh["end"]["groups"].keys()
    for name, wanted in fresh["end"]["groups"].items():
        np.testing.assert_array_equal(resumed["end"]["groups"][name], wanted, err_msg=name)
    rates = {float(value) for name, value in fresh["end"]["groups"].items() if name.endswith("weight_decay")}
    assert rates == {0.0, 0.2, 0.3}


def test_keep_last_and_branches_left_behind(pool: WorkerPool, settings: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    for leftover in (".saving-step_00000009-abc", ".deleting-step_00000001"):
        (folder / leftover).mkdir()
        (folder / leftover / "file").write_text("x")
    (folder / ".write-test-1").write_text("x")
    pool.run(2, train_and_save, [*settings, "checkpoint.keep_last=2"], 4, (1, 2, 3, 4))
    assert sorted(path.name for path in folder.iterdir()) == ["latest", "step_00000003", "step_00000004"]
    # Back to step 3: what follows now is another branch, and its checkpoints are the newest.
    back = [*settings, "checkpoint.keep_last=2", f"checkpoint.load={folder / 'step_00000003'}"]
    (result,) = pool.run(1, train_and_save, back, 4, (4,))
    assert result["first_step"] == 3
    assert sorted(path.name for path in folder.iterdir()) == [
        "latest",
        "step_00000003",
        "step_00000004",
        "step_00000004.abandoned",
    ]
    (again,) = pool.run(1, train_and_save, [*settings, f"checkpoint.load={folder / 'step_00000004.abandoned'}"], 4)
    assert again["first_step"] == 4


def test_run_json_and_config_describe_the_checkpoint(saved) -> None:
    folder, _ = saved("pp2")
    record = json.loads((folder / "run.json").read_text())
    assert (record["step"], record["consumed_samples"], record["consumed_tokens"]) == (2, 16, 16 * 32)
    assert record["layout"] == {"tensor_parallel_size": 1, "pipeline_parallel_size": 2}
    assert list(record["shuffles"]) == ["0", "1", "2", "3"]  # of both stages
    assert all(re.fullmatch("[0-9a-f]{16}", checksum) for checksum in record["shuffles"].values())
    assert yaml.safe_load((folder / "config.yaml").read_text())["model"]["memory"]["share_size"] == 2


def _edit_config(folder: Path, copy: Path, section: str, **changes: object) -> Path:
    """A copy of a checkpoint that claims other settings than it has."""
    shutil.copytree(folder, copy)
    tree = yaml.safe_load((copy / "config.yaml").read_text())
    tree[section].update(changes)
    (copy / "config.yaml").write_text(yaml.safe_dump(tree))
    (copy / "SHA256SUMS").unlink()
    return copy


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"qk_norm": False}, r"the checkpoint has, and this run has not: .*k_layernorm"),
        ({"tie_embeddings": False}, r"this run has, and the checkpoint has not: .*output_layer"),
        ({"ffn_hidden_size": 96}, r"shape"),
    ],
    ids=["left_over", "missing", "shape"],
)
@pytest.mark.parametrize("layout", [pytest.param("one", marks=pytest.mark.slow), "pp2"])
def test_tensors_that_do_not_fit_are_named(
    pool: WorkerPool, settings: list[str], saved, tmp_path: Path, layout: str, change: dict, message: str
) -> None:
    folder = _edit_config(saved("dp2")[0], tmp_path / "copy", "model", **change)
    ranks, overrides = LAYOUTS[layout]
    overrides = [*settings, *overrides, f"checkpoint.load={folder}"]
    overrides += [f"model.{name}={str(value).lower()}" for name, value in change.items()]
    for kind, text, alike in pool.run(ranks, error_of_training, overrides, 3):
        assert kind == "CheckpointError" and alike
        assert str(folder) in text and re.search(message, text), text


def test_another_shuffle_is_refused(pool: WorkerPool, settings: list[str], saved, tmp_path: Path) -> None:
    folder = _edit_config(saved("one")[0], tmp_path / "copy", "train")
    record = json.loads((folder / "run.json").read_text())
    record["shuffles"]["3"] = "0" * 16
    (folder / "run.json").write_text(json.dumps(record))
    for kind, text, _ in pool.run(2, error_of_training, [*settings, PP2, f"checkpoint.load={folder}"], 3):
        assert kind == "CheckpointError" and "shuffle permutations of layers 3 differ" in text


def test_another_form_of_optimizer_state_is_refused(pool: WorkerPool, settings: list[str], saved) -> None:
    folder, _ = saved("dp2")
    other = [PLAIN, "train.precision=bf16", f"checkpoint.load={folder}"]
    ((kind, text, _),) = pool.run(1, error_of_training, [*settings, *other], 3)
    assert kind == "CheckpointError" and "parallel.distributed_optimizer: checkpoint True, config False" in text
    assert "train.precision: checkpoint 'fp32', config 'bf16'" in text and "checkpoint.load_optimizer=false" in text
    assert pool.run(1, error_of_training, [*settings, *other, "checkpoint.load_optimizer=false"], 1) == [("", "", True)]


@pytest.mark.parametrize(
    ("mode", "ranks"),
    [("async", 2), *(pytest.param(*case, marks=pytest.mark.slow) for case in (("async", 1), ("sync", 1), ("sync", 2)))],
)
def test_a_failed_write_is_reported_and_loses_nothing(
    pool: WorkerPool, settings: list[str], tmp_path: Path, mode: str, ranks: int
) -> None:
    overrides = [*settings, "checkpoint.load=auto", f"checkpoint.async_save={'true' if mode == 'async' else 'false'}"]
    pool.run(ranks, train_and_save, overrides, 1, (1,))
    results = pool.run(ranks, error_of_training, overrides, 3, largest_file=60_000)
    folder = tmp_path / "checkpoints"
    kind, text, alike = results[0]
    assert kind == "CheckpointError" and alike
    assert f"checkpoint {folder / 'step_00000002'} cannot be written: " in text
    assert re.search(r"is the disk full\?|File too large", text)  # whichever of torch and the system meets it first
    assert f"last good checkpoint: {folder / 'step_00000001'}" in text
    assert all(result[0] == "CheckpointError" and result[2] for result in results)
    assert [path.name for path in list_checkpoints(folder)] == ["step_00000001"]
    (after, *_) = pool.run(ranks, train_and_save, overrides, 2)
    assert after["first_step"] == 1
    assert not list(folder.glob(".saving-*"))


def test_a_background_save_is_published_when_it_is_finished(
    pool: WorkerPool, settings: list[str], tmp_path: Path
) -> None:
    (names,) = pool.run(1, _names_during_background_save, [*settings, "checkpoint.async_save=true"])
    assert names["scheduled"] == [] and names["closed"] == ["step_00000001"]


def _names_during_background_save(overrides: list[str]) -> dict[str, list[str]]:
    from megatron_ultramem.config import load_config
    from megatron_ultramem.training.loop import train_step
    from megatron_ultramem.training.setup import set_up

    run = set_up(load_config(None, overrides))
    train_step(run)
    target = run.checkpoints.save(run.position)
    scheduled = [path.name for path in list_checkpoints(target.parent)]
    run.checkpoints.close()
    return {"scheduled": scheduled, "closed": [path.name for path in list_checkpoints(target.parent)]}
