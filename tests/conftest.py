"""Tests run on the CPU, on any machine, but for those that are selected with `-m gpu`."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Generator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from tests.gpu_sharing import (
    GROUPS,
    PROCESSES,
    WORKER,
    in_turn,
    longest_first,
    prepare_process,
    scheduler,
    tell_groups,
)

MODULE_CACHE = pytest.StashKey[str]()


def pytest_configure(config: pytest.Config) -> None:
    # Remote code of Hugging Face folders is cached and imported from here, not from the user's home.
    config.stash[MODULE_CACHE] = os.environ["HF_MODULES_CACHE"] = tempfile.mkdtemp(prefix="hf_modules")
    config.stash[GROUPS] = Path(tempfile.gettempdir()) / f"ultramem_test_groups_{os.getpid()}.json"
    selected = config.getoption("markexpr") or ""
    if "gpu" not in selected or "not gpu" in selected:
        # Before torch looks: process groups of four ranks must not depend on how many GPUs there are.
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        # Before anything imports Triton, whose own functions are compiled or interpreted once and for all.
        os.environ.setdefault("TRITON_INTERPRET", "1")
    else:
        # Megatron's small fusions are compiled where they are used; a pool of compilers for each process costs more.
        os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
        if WORKER in os.environ:
            prepare_process()
        else:
            config.pluginmanager.register(Failures(config))


def pytest_unconfigure(config: pytest.Config) -> None:
    shutil.rmtree(config.stash[MODULE_CACHE], ignore_errors=True)
    config.stash[GROUPS].unlink(missing_ok=True)


@pytest.hookimpl(wrapper=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> Generator[None, object, object]:
    for item in items:
        if not item.get_closest_marker("gpu"):
            continue
        item.add_marker(pytest.mark.skipif(_gpus() == 0, reason="needs a CUDA GPU"))
        if item.get_closest_marker("two_gpus"):
            item.add_marker(pytest.mark.skipif(_gpus() < 2, reason="needs two GPUs"))
    result = yield  # those that -m leaves out are gone
    if hasattr(config, "workerinput"):
        tell_groups([item for item in items if item.get_closest_marker("gpu")], Path(config.workerinput["groups"]))
        if config.workerinput["longest_first"]:
            items[:] = longest_first(items, int(os.environ[PROCESSES]))
    return result


class Failures:
    """Tells of failures when they happen: a run that is cut off has no summary at its end."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        terminal = self._config.pluginmanager.get_plugin("terminalreporter")
        if report.failed and terminal:
            terminal.ensure_newline()
            terminal.write_line(f"failed in {report.when}: {report.nodeid}\n{report.longreprtext}", flush=True)


def pytest_report_header(config: pytest.Config) -> str:
    return f"megatron-core: {version('megatron-core')}"


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    node.workerinput["groups"] = str(node.config.stash[GROUPS])
    node.workerinput["longest_first"] = node.config.getoption("dist") == "loadgroup"


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    return scheduler(config, log) if config.getoption("dist") == "loadgroup" else None


@pytest.hookimpl(wrapper=True, tryfirst=True)  # waiting does not count as a test's time
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    if not item.get_closest_marker("gpu") or item.get_closest_marker("alone"):
        return (yield)
    with in_turn(alone=False):
        result = yield
    if item.get_closest_marker("large"):
        import torch

        torch.cuda.empty_cache()  # other processes use the same GPU
    return result


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    if not item.get_closest_marker("alone"):
        return (yield)
    with in_turn(alone=True):
        return (yield)


def _gpus() -> int:
    import torch

    return torch.cuda.device_count()
