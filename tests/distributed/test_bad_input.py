"""Bad input, through the command line: one line says what is wrong and what is legal, and nothing is lost."""

from __future__ import annotations

import datetime
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_ultramem.cli import main
from megatron_ultramem.config import load_config
from megatron_ultramem.config.schema import TokenizerConfig
from megatron_ultramem.errors import TrainingError
from megatron_ultramem.one_voice import is_mine_to_say
from megatron_ultramem.training.loop import train_step
from megatron_ultramem.training.preprocess import preprocess
from megatron_ultramem.training.setup import set_up
from tests.distributed.workers import WorkerPool

TP2, PP2 = "parallel.tensor_parallel_size=2", "parallel.pipeline_parallel_size=2"


def run_main(arguments: list[str]) -> tuple[int, str, str]:
    """`ultramem <arguments>` in this process: exit code, and what it and its libraries wrote to stdout and stderr."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        saved = os.dup(1), os.dup(2)
        os.dup2(out.fileno(), 1)
        os.dup2(err.fileno(), 2)
        try:
            code = main(arguments)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for stream, copy in zip((1, 2), saved, strict=True):
                os.dup2(copy, stream)
                os.close(copy)
        out.seek(0)
        err.seek(0)
        return code, out.read().decode(), err.read().decode()


@pytest.fixture(scope="module")
def run_dir(pool: WorkerPool, small_run: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with two checkpoints and metrics, that bad input must not harm."""
    folder = tmp_path_factory.mktemp("run")
    settings = [
        *small_run,
        f"train.run_dir={folder}",
        "train.exit_after_steps=2",
        "checkpoint.interval=1",
        "logging.interval=1",
    ]
    ((code, _, errors),) = pool.run(1, run_main, ["train", *settings])
    assert code == 0, errors
    return folder


@pytest.fixture(scope="module")
def settings(small_run: list[str], run_dir: Path) -> list[str]:
    return [*small_run, f"train.run_dir={run_dir}", "checkpoint.load=auto"]


@pytest.fixture(scope="module")
def other_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Settings of a tokenizer of words, and data made with it."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("words")
    tokenizer = Tokenizer(models.WordLevel({"<eod>": 0, "<unk>": 1, "some": 2, "words": 3}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "a.txt").write_text("some words and more " * 100)
    (folder / "b.txt").write_text("some other words " * 100)
    config = TokenizerConfig(kind="huggingface", path=str(folder / "tokenizer.json"), eod_token="<eod>")
    preprocess([folder / "a.txt", folder / "b.txt"], folder / "data", config)
    return [
        "data.tokenizer.kind=huggingface",
        f"data.tokenizer.path={folder / 'tokenizer.json'}",
        "data.tokenizer.eod_token=<eod>",
        f"data.paths=[{folder / 'data'}]",
        "data.split='50,50,0'",
    ]


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of checkpoints and metrics; cached indices of data may come and go."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and "data_cache" not in path.parts
    }


def assert_one_clear_error(result: tuple[int, str, str], *patterns: str) -> None:
    code, _, errors = result
    assert code == 2, errors
    (line,) = errors.splitlines()
    assert line.startswith("error: ")
    for pattern in patterns:
        assert re.search(pattern, line), f"{pattern!r} is not in: {line}"


BAD_SETTINGS = {
    "interleaved_without_overlap": (
        [PP2, "parallel.virtual_pipeline_stages=2"],
        ["parallel.virtual_pipeline_stages above 1", "legal: parallel.overlap_p2p=true"],
    ),
    "layout_that_does_not_divide_the_ranks": (
        [TP2],
        [r"1 ranks cannot be divided by parallel.tensor_parallel_size = 2", "legal: a multiple of 2 ranks"],
    ),
    "layout_that_does_not_divide_the_heads": (
        ["parallel.tensor_parallel_size=3"],
        [r"parallel.tensor_parallel_size = 3 does not divide model.num_attention_heads = 4", "legal: a divisor"],
    ),
    "layers_that_do_not_fill_the_stages": (
        ["parallel.pipeline_parallel_size=3"],
        ["model.num_layers = 4 cannot be split", "legal: a multiple of 3"],
    ),
    "pipeline_that_splits_a_pool": (
        [PP2, "model.memory.sharing=ring", "model.memory.share_size=2"],
        ["parallel.pipeline_parallel_size = 2", "puts 2 layers on a stage", "pool 0 of 4 memory layers", "legal: "],
    ),
    "more_values_than_the_grid_has": (
        ["model.memory.top_m=145"],
        [r"model.memory.top_m=145", "144", "legal: "],
    ),
    "unknown_setting": (["model.num_layer=4"], ["model.num_layer: unknown setting; did you mean model.num_layers?"]),
    "wrong_type": (["train.steps=many"], ["train.steps = 'many'", "legal: an integer of at least 1"]),
    "out_of_range": (["optimizer.lr=-1"], ["optimizer.lr = -1", "legal: a number above 0"]),
    "batch_that_does_not_divide": (["train.micro_batch_size=3"], ["train.global_batch_size = 8", "legal: a multiple"]),
    "missing_data": (["data.paths=[/nowhere/text]"], ["/nowhere/text.bin does not exist", "tools/preprocess_data.py"]),
    "unreadable_checkpoint_path": (["checkpoint.load=/nowhere"], ["/nowhere: no checkpoint there; legal: "]),
    "checkpoint_folder_in_proc": (["checkpoint.dir=/proc/x"], ["checkpoint.dir = /proc/x cannot be written", "legal"]),
    "run_folder_in_proc": (["train.run_dir=/proc/x"], ["train.run_dir = /proc/x cannot be written", "legal: "]),
    "checkpoint_of_another_config": (
        ["model.hidden_size=64", "model.memory.top_m=4"],
        [
            "is of another model: model.hidden_size: checkpoint 32, config 64; model.memory.top_m: checkpoint 6, ",
            "legal: ",
        ],
    ),
    "checkpoint_with_another_shuffle": (
        ["model.memory.shuffle_seed=1"],
        ["model.memory.shuffle_seed: checkpoint 1234, config 1"],
    ),
    "checkpoint_of_another_precision": (
        ["train.precision=bf16"],
        ["train.precision: checkpoint 'fp32', "],
    ),
}


@pytest.mark.parametrize("name", BAD_SETTINGS)
def test_a_bad_setting_is_one_clear_error(pool: WorkerPool, settings: list[str], run_dir: Path, name: str) -> None:
    changes, patterns = BAD_SETTINGS[name]
    before = contents(run_dir)
    (result,) = pool.run(1, run_main, ["train", *settings, *changes])
    assert_one_clear_error(result, *patterns)
    assert contents(run_dir) == before


@pytest.mark.parametrize(
    ("content", "pattern"),
    [
        (None, r"config file .*settings\.yaml: no such file"),
        ("model: [", r"config file .*settings\.yaml: not valid YAML"),
        ("- a list", r"config file .*settings\.yaml: must hold a mapping of settings, found list"),
        ("model:\n  num_layer: 4\n", r"model\.num_layer: unknown setting; did you mean model\.num_layers\?"),
        ("train:\n  steps: 2.5\n", r"train\.steps = 2\.5: .*legal: an integer of at least 1"),
        ("model: 7\n", r"model = 7: is a section; legal: a mapping of its settings"),
    ],
    ids=["missing", "not_yaml", "no_mapping", "unknown_key", "wrong_type", "section"],
)
def test_a_bad_config_file_is_one_clear_error(
    pool: WorkerPool, tmp_path: Path, content: str | None, pattern: str
) -> None:
    path = tmp_path / "settings.yaml"
    if content is not None:
        path.write_text(content)
    (result,) = pool.run(1, run_main, ["train", "--config", str(path)])
    assert_one_clear_error(result, pattern)


def test_a_checkpoint_of_another_vocabulary_is_refused(
    pool: WorkerPool, settings: list[str], run_dir: Path, other_tokenizer: list[str]
) -> None:
    before = contents(run_dir)
    (result,) = pool.run(1, run_main, ["train", *settings, *other_tokenizer])
    assert_one_clear_error(
        result, r"trained with another tokenizer \(vocabulary 257, .*\) than data.tokenizer", "legal"
    )
    assert contents(run_dir) == before


@pytest.mark.parametrize("damage", ["index", "data"])
def test_damaged_data_is_one_clear_error(
    pool: WorkerPool, settings: list[str], run_dir: Path, corpus: Path, tmp_path: Path, damage: str
) -> None:
    for suffix in (".bin", ".idx", ".json"):
        shutil.copy(f"{corpus}{suffix}", tmp_path / f"words{suffix}")
    path = tmp_path / ("words.idx" if damage == "index" else "words.bin")
    path.write_bytes(path.read_bytes()[:-40])
    before = contents(run_dir)
    (result,) = pool.run(1, run_main, ["train", *settings, f"data.paths=[{tmp_path / 'words'}]"])
    assert_one_clear_error(result, str(path))
    assert contents(run_dir) == before


LAUNCHERS = {
    "ranks": ["megatron_ultramem", "train", "--ranks", "2"],
    "torchrun": ["torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "megatron_ultramem", "train"],
}


@pytest.mark.parametrize(
    ("launcher", "damage"),
    [
        ("torchrun", "index"),
        pytest.param("torchrun", "missing", marks=pytest.mark.slow),
        pytest.param("ranks", "missing", marks=pytest.mark.slow),
    ],
)
def test_of_several_ranks_one_says_what_is_wrong_with_the_data(
    settings: list[str], corpus: Path, tmp_path: Path, launcher: str, damage: str
) -> None:
    prefix = tmp_path / "words"
    if damage == "index":
        shutil.copy(f"{corpus}.bin", tmp_path)
        (tmp_path / "words.idx").write_bytes(Path(f"{corpus}.idx").read_bytes()[:-40])
    overrides = [*settings, f"train.run_dir={tmp_path / 'run'}", f"data.paths=[{prefix}]"]
    command = [sys.executable, "-m", *LAUNCHERS[launcher], *overrides]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    said = [line for line in done.stderr.splitlines() if line.startswith("error")]
    assert done.returncode != 0 and len(said) == 1, done.stderr
    what = r"words\.bin does not exist" if damage == "missing" else r"words\.idx is damaged"
    assert re.fullmatch(rf"error \[rank 0 on \S+\]: .*{what}.*", said[0]), said
    assert "DataError" not in done.stderr  # no traceback


def test_an_error_of_one_rank_alone_is_said_by_that_rank(pool: WorkerPool) -> None:
    assert pool.run(2, _who_says, {0: "both", 1: "both"}) == [True, False]
    assert pool.run(2, _who_says, {1: "only one"}) == [None, True]
    assert pool.run(2, _who_says, {0: "one", 1: "another"}) == [True, True]


def test_a_folder_that_one_rank_alone_cannot_write_is_named_by_it(
    pool: WorkerPool, settings: list[str], tmp_path: Path
) -> None:
    """As on a host that lacks a mount; the other rank would wait for it, and is not asked to."""
    (tmp_path / "file").touch()
    answers = pool.run(2, _main_on_rank_1, ["train", *settings, f"checkpoint.dir={tmp_path / 'file'}"])
    code, _, errors = answers[1]
    assert code == 2 and errors.count("\n") == 1
    assert re.match(rf"error \[rank 1 on \S+\]: checkpoint.dir = {tmp_path / 'file'} cannot be written", errors)


def _main_on_rank_1(arguments: list[str]) -> tuple[int, str, str] | None:
    return run_main(arguments) if os.environ["RANK"] == "1" else None


def _who_says(texts: dict[int, str]) -> bool | None:
    text = texts.get(int(os.environ["RANK"]))
    return None if text is None else is_mine_to_say(text, patience=datetime.timedelta(seconds=2))


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


DAMAGE = {
    "shard_cut_short": ("*.distcp", _truncate, "cannot be loaded"),
    "shard_empty": ("*.distcp", lambda path: path.write_bytes(b""), "cannot be loaded"),
    "shard_missing": ("*.distcp", Path.unlink, "(cannot be loaded|is missing)"),
    "metadata_missing": (".metadata", Path.unlink, r"is damaged: \.metadata is missing"),
    "metadata_cut_short": (".metadata", _truncate, "cannot be loaded"),
    "common_cut_short": ("common.pt", _truncate, "cannot be loaded"),
    "common_missing": ("common.pt", Path.unlink, r"is damaged: common\.pt is missing"),
    "format_broken": ("metadata.json", lambda path: path.write_text("{"), "cannot be loaded"),
    "run_json_broken": ("run.json", lambda path: path.write_text('{"step": '), r"is damaged: run\.json cannot be read"),
    "config_broken": ("config.yaml", lambda path: path.write_text("model: ["), "its settings cannot be read"),
}


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_checkpoint_is_one_clear_error(
    pool: WorkerPool, settings: list[str], run_dir: Path, tmp_path: Path, name: str, ranks: int
) -> None:
    pattern, damage, message = DAMAGE[name]
    folder = tmp_path / "checkpoints" / "step_00000002"
    shutil.copytree(run_dir / "checkpoints" / "step_00000002", folder)
    (folder.parent / "latest").symlink_to(folder.name)
    for path in sorted(folder.glob(pattern))[:1]:
        damage(path)
    before = contents(tmp_path)
    # Checksums would find all of it before it is met (test_damaged_checkpoints.py).
    changes = [f"checkpoint.dir={folder.parent}", "checkpoint.verify=false", *([PP2] if ranks == 2 else [])]
    results = pool.run(ranks, run_main, ["train", *settings, *changes])
    assert_one_clear_error(results[0], f"checkpoint {folder}", message)
    assert [(code, errors) for code, _, errors in results[1:]] == [(2, "")] * (ranks - 1)
    assert contents(tmp_path) == before


def test_a_checkpoint_folder_that_is_a_file_is_refused(pool: WorkerPool, settings: list[str], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("kept")
    (result,) = pool.run(1, run_main, ["train", *settings, f"checkpoint.dir={tmp_path / 'file'}"])
    assert_one_clear_error(result, f"checkpoint.dir = {tmp_path / 'file'} cannot be written", "legal: ")
    assert (tmp_path / "file").read_text() == "kept"


def test_gradients_that_are_not_finite_stop_the_run_and_name_the_last_good_checkpoint(
    pool: WorkerPool, settings: list[str], run_dir: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(run_dir, run, symlinks=True)
    before = contents(run)
    changes = [f"train.run_dir={run}", "optimizer.lr=1e30", "checkpoint.interval=1", "checkpoint.async_save=true"]
    (result,) = pool.run(1, run_main, ["train", *settings, *changes])
    last_good = run / "checkpoints" / "step_00000003"
    assert_one_clear_error(
        result,
        rf"step 4: the gradient norm is (nan|inf) though the loss is finite \(rank 0 on \S+\); "
        rf"nothing was updated; last good checkpoint: {last_good}$",
    )
    assert last_good.is_dir()
    (report,) = map(json.loads, (run / "faults.jsonl").read_text().splitlines())
    assert (report["kind"], report["ranks"][0]["step"], report["ranks"][0]["host"]) == (
        "error",
        4,
        socket.gethostname(),
    )
    assert re.match(r"rank 0 on \S+ \(pid \d+\), step 4, training, last collective .*: TrainingError: ", report["text"])
    assert contents(run).items() >= {name: data for name, data in before.items() if "checkpoints" in name}.items()


def test_a_loss_that_is_not_finite_names_the_rank_that_has_it(
    pool: WorkerPool, settings: list[str], run_dir: Path
) -> None:
    results = pool.run(2, _train_with_one_poisoned_rank, settings)
    last_good = run_dir / "checkpoints" / "step_00000002"
    for message, changed in results:
        where = f"rank 1 on {socket.gethostname()}"
        assert message == f"step 3: the loss is nan ({where}); nothing was updated; last good checkpoint: {last_good}"
        assert not changed


def _train_with_one_poisoned_rank(overrides: list[str]) -> tuple[str, list[str]]:
    """The error that a step ends in when rank 1's last norm holds a NaN, and the parameters that the step changed."""
    run = set_up(load_config(None, [*overrides, "parallel.distributed_optimizer=true"]))
    if torch.distributed.get_rank() == 1:
        with torch.no_grad():
            run.model[0].decoder.final_layernorm.weight[0] = np.nan
    before = {name: param.detach().nan_to_num() for name, param in run.model[0].named_parameters()}
    try:
        train_step(run)
    except TrainingError as error:
        after = {name: param.nan_to_num() for name, param in run.model[0].named_parameters()}
        return str(error), [name for name in before if not torch.equal(before[name], after[name])]
    return "no error", []


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_loss_that_is_not_finite_ends_every_rank_of_a_real_run(
    pool: WorkerPool, settings: list[str], tmp_path: Path, ranks: int
) -> None:
    overrides = [*settings, f"train.run_dir={tmp_path}", "checkpoint.interval=1"]
    pool.run(1, _save_poisoned, overrides)
    command = [sys.executable, "-m", "megatron_ultramem", "train", *(["--ranks", "2"] if ranks == 2 else [])]
    before = contents(tmp_path / "checkpoints")
    done = subprocess.run([*command, *overrides], capture_output=True, text=True, timeout=300)
    result = done.returncode, done.stdout, done.stderr
    who = r"0 on \S+, 1 on \S+" if ranks == 2 else r"0 on \S+"
    assert_one_clear_error(
        result, rf"step 2: the loss is nan \(rank {who}\); nothing was updated; last good checkpoint: "
    )
    assert contents(tmp_path / "checkpoints") == before
    assert [json.loads(line)["kind"] for line in (tmp_path / "faults.jsonl").read_text().splitlines()] == ["error"]


def _save_poisoned(overrides: list[str]) -> None:
    """A checkpoint of step 1 with a NaN among its weights."""
    run = set_up(load_config(None, overrides))
    train_step(run)
    for part in run.optimizer.chained_optimizers:
        part.optimizer.param_groups[-1]["params"][0].data[0] = np.nan
    run.optimizer.step()
    run.checkpoints.save(run.position)
