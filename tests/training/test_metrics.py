"""Metrics sinks: what is written, and what a resumed run does with what is there."""

import json
import math

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_ultramem.config.schema import Config
from megatron_ultramem.errors import ConfigError, TrainingError
from megatron_ultramem.training.metrics import MetricsLogger


@pytest.fixture
def config(tmp_path) -> Config:
    config = Config()
    config.train.run_dir = str(tmp_path / "run")
    config.logging.tensorboard = False
    return config


def lines(config: Config, name: str = "metrics.jsonl") -> list[dict]:
    with open(f"{config.train.run_dir}/{name}") as file:
        return [json.loads(line) for line in file]


def write(config: Config, steps, start_step: int = 0) -> None:
    logger = MetricsLogger(config, start_step=start_step, enabled=True)
    for step in steps:
        logger.log(step, {"loss": 10.0 - step})
    logger.close()


def test_each_line_is_on_disk_as_soon_as_it_is_logged(config):
    logger = MetricsLogger(config, start_step=0, enabled=True)
    logger.log(1, {"loss": 2.5, "memory/layer_03/rows_touched": torch.tensor(0.25)})
    assert lines(config) == [{"step": 1, "loss": 2.5, "memory/layer_03/rows_touched": 0.25}]
    logger.close()


def test_values_that_are_not_finite_become_null(config):
    logger = MetricsLogger(config, start_step=0, enabled=True)
    logger.log(1, {"loss": math.nan, "grad_norm": math.inf, "lr": 1e-4})
    logger.close()
    assert lines(config) == [{"step": 1, "loss": None, "grad_norm": None, "lr": 1e-4}]


def test_a_resumed_run_leaves_one_consistent_curve_and_loses_nothing(config):
    write(config, range(1, 8))
    write(config, range(6, 10), start_step=5)
    assert [line["step"] for line in lines(config)] == list(range(1, 10))
    assert [line["step"] for line in lines(config, "metrics_dropped.jsonl")] == [6, 7]


def test_resuming_at_the_last_line_rewrites_nothing(config, tmp_path):
    write(config, range(1, 4))
    before = (tmp_path / "run/metrics.jsonl").stat().st_ino
    write(config, [4], start_step=3)
    assert (tmp_path / "run/metrics.jsonl").stat().st_ino == before
    assert not (tmp_path / "run/metrics_dropped.jsonl").exists()


def test_a_half_written_last_line_is_removed_on_resume(config, tmp_path):
    write(config, range(1, 4))
    with open(tmp_path / "run/metrics.jsonl", "a") as file:
        file.write('{"step": 4, "lo')
    write(config, [4], start_step=3)
    assert [line["step"] for line in lines(config)] == [1, 2, 3, 4]


def test_a_fresh_run_in_an_old_folder_starts_a_new_curve_and_keeps_the_old_lines_aside(config):
    write(config, range(1, 4))
    write(config, [1, 2])
    assert [line["step"] for line in lines(config)] == [1, 2]
    assert [line["step"] for line in lines(config, "metrics_dropped.jsonl")] == [1, 2, 3]


def test_disabled_ranks_write_nothing(config, tmp_path):
    logger = MetricsLogger(config, start_step=0, enabled=False)
    logger.log(1, {"loss": 1.0})
    logger.close()
    assert not (tmp_path / "run").exists()


def test_a_run_folder_that_cannot_be_written_is_one_clear_error(config, tmp_path):
    (tmp_path / "file").write_text("")
    config.train.run_dir = str(tmp_path / "file" / "run")
    with pytest.raises(TrainingError, match=r"cannot write the metrics file .*metrics\.jsonl"):
        MetricsLogger(config, start_step=0, enabled=True)


def test_tensorboard_shows_the_values_and_purges_what_a_resume_takes_back(config, tmp_path):
    config.logging.tensorboard = True
    write(config, range(1, 8))
    write(config, range(6, 9), start_step=5)
    events = EventAccumulator(str(tmp_path / "run/tensorboard"), purge_orphaned_data=True).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(s, 10.0 - s) for s in range(1, 9)]


def test_wandb_online_without_a_login_is_one_clear_error(config, monkeypatch, tmp_path):
    pytest.importorskip("wandb")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_API_KEY", "too-short")
    config.logging.wandb_mode = "online"
    with pytest.raises(ConfigError, match="logging.wandb_mode=online: .* legal: disabled, offline"):
        MetricsLogger(config, start_step=0, enabled=True)


def test_wandb_offline_records_the_metrics_under_one_id_across_a_resume(config, tmp_path):
    pytest.importorskip("wandb")
    config.logging.wandb_mode = "offline"
    config.logging.wandb_project = "test-project"
    write(config, range(1, 4))
    first = (tmp_path / "run/wandb_id").read_text()
    write(config, range(4, 6), start_step=3)
    assert (tmp_path / "run/wandb_id").read_text() == first
    records = list((tmp_path / "run/wandb").glob(f"offline-run-*-{first.strip()}/run-{first.strip()}.wandb"))
    assert len(records) >= 1
    content = b"".join(path.read_bytes() for path in records)
    assert b"test-project" in content and b"loss" in content
