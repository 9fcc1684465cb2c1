"""Megatron collects the results of checkpoint writers in a queue that is a process of its own. When a rank is killed
that process stays behind for good, and keeps the rank's standard output open; ours ends with its rank."""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from multiprocessing.managers import SyncManager
from typing import Any

POLL_SECONDS = 1.0


def results_queue_that_ends_with_us() -> None:
    """Gives Megatron's writers their queue; call before a save. Does nothing where they have one."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    module: Any = filesystem_async
    if getattr(module, "_results_queue", False) is not None:  # a later Megatron may do without
        return
    manager = SyncManager(ctx=multiprocessing.get_context("spawn"))
    manager.start(end_with_parent)
    module._results_queue = manager.Queue()


def end_with_parent() -> None:
    """Ends this process soon after its parent has ended."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(POLL_SECONDS)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
