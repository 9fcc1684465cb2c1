"""Starts the ranks of one machine with torchrun's own agent, for `--ranks N`."""

from __future__ import annotations

import logging
import os
import sys
import uuid
from collections.abc import Sequence

from megatron_ultramem.errors import ConfigError


def launch(ranks: int, arguments: Sequence[str], max_restarts: int = 0) -> int:
    """Runs `ultramem <arguments>` on `ranks` local processes; returns 0, or the exit code of a process that failed.

    When a process fails all of them are started again, up to `max_restarts` times. The same as torchrun with
    --standalone, without its log of the failure: the failing rank has said why.
    """
    if ranks < 1:
        raise ConfigError(f"--ranks {ranks}: legal: at least 1")
    if max_restarts < 0:
        raise ConfigError(f"--max-restarts {max_restarts}: legal: at least 0")
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // ranks)))
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=ranks,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=max_restarts,
        monitor_interval=0.1,
    )
    try:
        elastic_launch(config, sys.executable)("-m", "megatron_ultramem", *arguments)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode < 0:  # it could not say why
            print(f"error: rank {rank} was ended by signal {failure.signal_name()}", file=sys.stderr, flush=True)
            return 128 - failure.exitcode
        return failure.exitcode or 1
    except SignalException as error:  # the agent has ended the ranks
        print(f"ended by {error.sigval.name}", file=sys.stderr, flush=True)
        return 128 + error.sigval
    return 0
