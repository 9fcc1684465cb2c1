"""Secrets of the environment appear in no log, no message, no saved setting and no other file of a run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_ultramem.config import load_config
from megatron_ultramem.errors import ConfigError
from megatron_ultramem.redaction import is_secret_name, redact, refuse_secrets
from tests.distributed.conftest import corpus, small_run  # noqa: F401

KEY = "5ecre7c0ffee5ecre7c0ffee5ecre7c0ffee5ecr"


@pytest.mark.parametrize("name", ["WANDB_API_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "DB_PASSWORD", "apikey"])
def test_names_that_are_taken_for_secrets(name: str) -> None:
    assert is_secret_name(name)


@pytest.mark.parametrize("name", ["PATH", "HOME", "TOKENIZERS_PARALLELISM", "KEYBOARD", "WANDB_PROJECT", "MASTER_ADDR"])
def test_names_that_are_not(name: str) -> None:
    assert not is_secret_name(name)


def test_text_is_redacted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("SHORT_TOKEN", "a")
    assert redact(f"a login with {KEY} failed") == "a login with [hidden] failed"


def test_a_secret_in_a_setting_is_refused_without_showing_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    with pytest.raises(ConfigError, match="logging.wandb_name holds the value of .* WANDB_API_KEY") as refused:
        refuse_secrets(load_config(None, [f"logging.wandb_name=run-{KEY}"]))
    assert KEY not in str(refused.value)


def test_settings_do_not_reach_into_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    with pytest.raises(ConfigError, match="logging.wandb_name = .*: nothing is expanded") as refused:
        load_config(None, ["logging.wandb_name=${oc.env:WANDB_API_KEY}"])
    assert KEY not in str(refused.value)
    with pytest.raises(ConfigError, match="data.paths = .*: nothing is expanded"):
        load_config(None, ["data.paths=['${oc.env:HOME}/x']"])


def test_no_file_and_no_output_of_a_run_holds_a_secret(small_run: list[str], tmp_path: Path) -> None:  # noqa: F811
    pytest.importorskip("wandb")
    run_dir = tmp_path / "run"
    settings = [*small_run, f"train.run_dir={run_dir}", "train.exit_after_steps=2", "logging.interval=1"]
    settings += ["logging.wandb_mode=offline", "logging.tensorboard=true"]
    environment = {**os.environ, "WANDB_API_KEY": KEY, "HF_TOKEN": KEY[::-1]}
    command = [sys.executable, "-m", "megatron_ultramem", "train", *settings]
    done = subprocess.run(command, capture_output=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr.decode()
    files = {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}
    names = {path.name for path in files}
    assert names >= {"config.yaml", "metrics.jsonl", "rank_00000.log", "run.json"}
    assert any(name.endswith(".wandb") for name in names)
    for secret in (KEY, KEY[::-1]):
        for path, content in files.items():
            assert secret.encode() not in content, path
        assert secret.encode() not in done.stdout + done.stderr


def test_an_error_that_quotes_a_secret_hides_it(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "megatron_ultramem", "train", f"train.device={KEY}"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "MY_API_KEY": KEY}, timeout=60)
    assert done.returncode == 2 and "train.device = '[hidden]': legal" in done.stderr
    assert KEY not in done.stdout + done.stderr
