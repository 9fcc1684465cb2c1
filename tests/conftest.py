"""Tests run on the CPU, on any machine, but for those that are selected with `-m gpu`."""

from __future__ import annotations

import os
import shutil
import tempfile

import pytest

MODULE_CACHE = pytest.StashKey[str]()


def pytest_configure(config: pytest.Config) -> None:
    # Remote code of Hugging Face folders is cached and imported from here, not from the user's home.
    config.stash[MODULE_CACHE] = os.environ["HF_MODULES_CACHE"] = tempfile.mkdtemp(prefix="hf_modules")
    selected = config.getoption("markexpr") or ""
    if "gpu" not in selected or "not gpu" in selected:
        # Before torch looks: process groups of four ranks must not depend on how many GPUs there are.
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        # Before anything imports Triton, whose own functions are compiled or interpreted once and for all.
        os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_unconfigure(config: pytest.Config) -> None:
    shutil.rmtree(config.stash[MODULE_CACHE], ignore_errors=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skipif(not _has_gpu(), reason="needs a CUDA GPU"))


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()
