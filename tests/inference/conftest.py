"""One small trained checkpoint and its generator, shared by the tests of generation."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from megatron_ultramem.inference import Generator
from tests.inference.train_job import MODEL, train_checkpoint, write_corpus


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """A run folder, and the validation loss that the trainer reported when it was saved."""
    folder = tmp_path_factory.mktemp("generation")
    write_corpus(folder)
    return folder / "run", train_checkpoint(folder, MODEL)


@pytest.fixture(scope="module")
def generator(checkpoint: tuple[Path, float]) -> Iterator[Generator]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    made = Generator.load(checkpoint[0])
    yield made
    made.close()
    torch.set_num_threads(threads)
