"""The log file of a rank: every line says which rank and step; it rotates; it holds no secret."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import pytest

from megatron_ultramem.config.schema import Config
from megatron_ultramem.errors import TrainingError
from megatron_ultramem.training.progress import Progress
from megatron_ultramem.training.rank_log import rank_log

LINE = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z (\w+) rank (\d+) \S+ step (\d+) (\S+): (.*)")
logger = logging.getLogger("megatron_ultramem.training.test")


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    monkeypatch.setenv("RANK", "3")
    config = Config()
    config.train.run_dir = str(tmp_path / "run")
    return config


def lines(config: Config, rank: int = 3) -> list[tuple[str, ...]]:
    text = (Path(config.train.run_dir) / "logs" / f"rank_{rank:05d}.log").read_text()
    matches = [LINE.fullmatch(line) for line in text.splitlines()]
    assert all(matches), text
    return [match.groups() for match in matches if match]


def test_every_line_carries_rank_and_step_also_those_of_others_and_of_tracebacks(config: Config) -> None:
    with pytest.raises(ZeroDivisionError), rank_log(config) as log:
        logger.info("set up")
        log.step = 7
        logging.getLogger("megatron.core").warning("two\nlines")
        Progress(10, 0, enabled=False).update(7, {"loss": 2.5})  # of a rank that prints nothing
        raise ZeroDivisionError("division by zero")
    found = lines(config)
    assert found[:4] == [
        ("INFO", "3", "0", "training.test", "set up"),
        ("WARNING", "3", "7", "megatron.core", "two"),
        ("WARNING", "3", "7", "megatron.core", "lines"),
        ("INFO", "3", "7", "training.progress", found[3][-1]),
    ]
    assert found[3][-1].startswith("step 7/10 | loss 2.5000")
    assert found[4] == ("ERROR", "3", "7", "training.rank_log", "ended by ZeroDivisionError: division by zero")
    assert found[5][-1] == "Traceback (most recent call last):" and "raise ZeroDivisionError" in "".join(
        line[-1] for line in found
    )


def test_an_error_for_the_user_is_one_line(config: Config) -> None:
    with pytest.raises(TrainingError), rank_log(config):
        logger.info("x")
        raise TrainingError("the loss is nan")
    assert [line[-1] for line in lines(config)] == ["x", "ended by TrainingError: the loss is nan"]


def test_a_run_that_is_refused_before_it_says_anything_leaves_no_file(config: Config) -> None:
    with pytest.raises(TrainingError), rank_log(config):
        raise TrainingError("refused")
    assert not Path(config.train.run_dir).exists()


def test_logs_are_rotated_and_the_oldest_dropped(config: Config) -> None:
    config.logging.rank_log_mib, config.logging.rank_log_files = 0.01, 3
    with rank_log(config):
        for number in range(1000):
            logger.info("line %d", number)
    files = sorted((Path(config.train.run_dir) / "logs").iterdir())
    assert [file.name for file in files] == ["rank_00003.log", "rank_00003.log.1", "rank_00003.log.2"]
    assert all(file.stat().st_size <= 0.01 * 2**20 for file in files)
    assert lines(config)[-1][-1] == "line 999"


def test_warnings_reach_the_terminal_as_before_and_nothing_else_does(
    config: Config, capfd: pytest.CaptureFixture[str]
) -> None:
    with rank_log(config):
        logger.info("quiet")
        logger.warning("loud")
    assert capfd.readouterr().err == "loud\n"
    logger.info("after")
    assert [line[-1] for line in lines(config)] == ["quiet", "loud"]


def test_a_second_run_appends(config: Config) -> None:
    for text in ("first", "second"):
        with rank_log(config):
            logger.info(text)
    assert [line[-1] for line in lines(config)] == ["first", "second"]


def test_secrets_of_the_environment_are_hidden(
    config: Config, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")
    with pytest.raises(RuntimeError), rank_log(config):
        logger.warning("key=%s", "0123456789abcdef")
        raise RuntimeError("cannot log in with 0123456789abcdef")
    text = (Path(config.train.run_dir) / "logs" / "rank_00003.log").read_text() + capfd.readouterr().err
    assert "0123456789abcdef" not in text and text.count("[hidden]") >= 3
