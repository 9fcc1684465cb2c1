"""What `compat.py` makes of Megatron-Core's versions, where other tests do not see it."""

from __future__ import annotations

import importlib
import logging
import pickle
import queue
from types import ModuleType
from typing import Any

import pytest
import torch

from megatron_ultramem import platform

WRITER_LOG = "megatron.core.dist_checkpointing.strategies.filesystem_async"


@pytest.fixture(scope="module")
def compat() -> ModuleType:
    platform.prepare()
    return importlib.import_module("megatron_ultramem.compat")


@pytest.mark.parametrize("filtered", [False, True], ids=["message_shown", "message_dropped"])
def test_a_writer_that_tells_its_log_alone_tells_its_queue_too(compat: ModuleType, filtered: bool) -> None:
    logger = logging.getLogger(WRITER_LOG)

    def write(rank: int, buckets: list[Any], results: Any) -> None:
        logger.error("Local worker 0 encountered an error: no space left")
        results.put(RuntimeError("An error is caught while starting worker 0, error: <class 'OSError'>"))

    results: queue.Queue[Any] = queue.Queue()
    before = list(logger.filters)
    drop = lambda record: not filtered  # noqa: E731
    logger.addFilter(drop)
    try:
        compat._write_telling_why(write, 0, [], results)
    finally:
        logger.removeFilter(drop)
    assert str(results.get()) == "no space left" and logger.filters == before


def test_results_and_failures_that_say_why_are_passed_on(compat: ModuleType) -> None:
    why, done = OSError(28, "no space left"), {0: ["a shard"]}

    def write(rank: int, buckets: list[Any], results: Any) -> None:
        logging.getLogger(WRITER_LOG).error("Local process 0 encountered an error: %s", why)
        results.put(why)
        results.put(done)

    results: queue.Queue[Any] = queue.Queue()
    compat._write_telling_why(write, 0, [], results)
    assert results.get() is why and results.get() is done


def test_tensors_pickled_by_a_later_megatron_are_read(compat: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    import megatron.core.safe_globals as theirs

    def safe_load_from_bytes(content: bytes) -> Any:
        raise AssertionError("only its name counts")

    safe_load_from_bytes.__module__, safe_load_from_bytes.__qualname__ = theirs.__name__, compat.TENSOR_READER
    known = hasattr(theirs, compat.TENSOR_READER)
    with monkeypatch.context() as later:
        later.setattr(theirs, compat.TENSOR_READER, safe_load_from_bytes, raising=False)
        later.setattr(torch.storage, "_load_from_bytes", safe_load_from_bytes)
        content = pickle.dumps({"scale": torch.arange(3.0)})
    assert compat.TENSOR_READER.encode() in content
    with compat.later_pickles_read():
        assert torch.equal(pickle.loads(content)["scale"], torch.arange(3.0))
    assert hasattr(theirs, compat.TENSOR_READER) == known


class Optimizer:
    """As much of Megatron's as parameter groups need."""

    def __init__(self, *groups: dict[str, Any]) -> None:
        self.optimizer, self.param_groups = self, list(groups)


def group(**settings: Any) -> dict[str, Any]:
    return {"wd_mult": 1.0, "lr_mult": 1.0, "is_expert_parallel": False, "is_decoupled_lr": False, **settings}


def test_loaded_groups_get_this_run_s_settings_and_keep_their_step_and_parameters(
    compat: ModuleType,
) -> None:
    ours = [group(max_lr=0.1, params=[1]), group(max_lr=0.1, wd_mult=0.0, params=[2])]
    tables = group(max_lr=0.2, end_wd=0.3, is_decoupled_lr=True, params=[3])
    optimizer = Optimizer()
    optimizer.chained_optimizers = [Optimizer(*ours), Optimizer(tables)]  # type: ignore[attr-defined]
    # In another order, with other rates.
    state: dict[Any, Any] = {
        1: {"optimizer": {"param_groups": [group(max_lr=9.0, end_wd=9.0, is_decoupled_lr=True, step=7, params=[0])]}},
        0: {"optimizer": {"param_groups": [group(max_lr=9.0, wd_mult=0.0, step=7), group(max_lr=9.0, step=7)]}},
    }
    compat.keep_settings(state, optimizer)
    assert state[0]["optimizer"]["param_groups"] == [group(max_lr=0.1, wd_mult=0.0, step=7), group(max_lr=0.1, step=7)]
    assert state[1]["optimizer"]["param_groups"] == [
        group(max_lr=0.2, end_wd=0.3, is_decoupled_lr=True, step=7, params=[0])
    ]
