"""Checkpoints and converted folders that several tests read, each made once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_ultramem.cli import main
from tests.convert.checkpoints import FP32, save_checkpoint, write_corpus


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    """UltraMemV2 with a ring of tables, in fp32."""
    settings = [FP32, "model.memory.sharing=ring", "model.memory.share_size=2"]
    return save_checkpoint(tmp_path_factory.mktemp("run"), corpus, settings)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path) -> Path:
    """`checkpoint` as a Hugging Face folder in several files; not to be changed."""
    target = tmp_path_factory.mktemp("hugging") / "face"
    assert main(["convert", "to-hf", str(checkpoint), str(target), "--no-verify", "--max-shard-size", "40KB"]) == 0
    return target


@pytest.fixture
def convert(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """Runs `ultramem convert` with arguments; returns its exit code and what it printed."""

    def run(*arguments: object) -> tuple[int, str]:
        capsys.readouterr()
        code = main(["convert", *map(str, arguments)])
        printed = capsys.readouterr()
        return code, printed.out + printed.err

    return run
