"""A pool of real processes that tests lend ranks from: started once, because importing Megatron takes seconds.

`pool.run(ranks, job, ...)` calls `job(...)` on the first `ranks` processes, each with torchrun's environment variables
for a fresh rendezvous, and returns their results in rank order. A job initialises and destroys its process groups.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import psutil
from torch.distributed import TCPStore

TIMEOUT = 240.0  # seconds for one job
GRACE = 60.0  # for a rank when another has failed
MAX_THREADS = 500  # of a rank between jobs; those of process groups that stay alive are never idle


class JobFailed(AssertionError):
    """A rank raised; the message holds its traceback."""


class WorkerPool:
    """Up to `size` spawned processes of one thread, started when a job first needs them. A job that takes longer than
    `timeout` seconds fails; shortly before, each of its ranks prints where it is."""

    def __init__(self, size: int, timeout: float = TIMEOUT) -> None:
        self._size, self._timeout = size, timeout
        self._workers: list[tuple[Any, Connection]] = []

    def run(self, ranks: int, job: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Any]:
        """Results of `job(*args, **kwargs)` on `ranks` ranks; raises JobFailed with the tracebacks of those that failed
        (the next job gets new processes then)."""
        self._start(ranks)
        # As torchrun does: a rank that bound a port found free before could find it taken by another test run.
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        for rank, (_, pipe) in enumerate(self._workers[:ranks]):
            environment = {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(ranks),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(store.port),
                "TORCHELASTIC_USE_AGENT_STORE": "True",
                "TORCHELASTIC_RESTART_COUNT": "0",
            }
            pipe.send((environment, job, args, kwargs))
        answers: list[tuple[bool, Any]] = []
        for _, pipe in self._workers[:ranks]:
            # Once a rank has failed, the others may wait for it for ever.
            patience = self._timeout if all(ok for ok, _ in answers) else GRACE
            try:
                answers.append(pipe.recv() if pipe.poll(patience) else (False, f"no answer within {patience:.0f} s"))
            except EOFError:
                answers.append((False, "ended without an answer"))
        failed = [f"rank {rank}:\n{text}" for rank, (ok, text) in enumerate(answers) if not ok]
        if failed:
            self.close(kill=True)
            raise JobFailed("\n".join(failed))
        if any(psutil.Process(process.pid).num_threads() > MAX_THREADS for process, _ in self._workers):
            self.close()
        return [result for _, result in answers]

    def close(self, kill: bool = False) -> None:
        for process, pipe in self._workers:
            if kill:
                process.kill()
            pipe.close()
        for process, _ in self._workers:
            process.join(10)
        self._workers = []

    def _start(self, ranks: int) -> None:
        assert ranks <= self._size, f"{ranks} ranks of a pool of {self._size}"
        context = multiprocessing.get_context("spawn")
        for rank in range(len(self._workers), ranks):
            ours, theirs = context.Pipe()
            # Not daemons: checkpoint writers start processes of their own.
            process = context.Process(target=_serve, args=(theirs, rank, 0.9 * self._timeout))
            process.start()
            theirs.close()
            self._workers.append((process, ours))


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _serve(pipe: Connection, rank: int, patience: float) -> None:
    os.environ.update(OMP_NUM_THREADS="1", LOCAL_RANK=str(rank))
    import torch

    torch.set_num_threads(1)
    from megatron_ultramem.quiet import quiet_dependencies

    quiet_dependencies()
    from megatron_ultramem.platform import prepare

    prepare("auto")
    from megatron_ultramem.training.distributed import destroy_distributed

    while True:
        try:
            environment, job, args, kwargs = pipe.recv()
        except EOFError:
            return
        os.environ.update(environment)
        faulthandler.dump_traceback_later(patience)
        try:
            answer = job(*args, **kwargs)
        except BaseException:
            pipe.send((False, traceback.format_exc()))
            return  # what the job left behind, CUDA errors for one, must not reach another
        destroy_distributed()
        _let_go_of_models()
        faulthandler.cancel_dump_traceback_later()
        torch.use_deterministic_algorithms(False)
        pipe.send((True, answer))


def _let_go_of_models() -> None:
    """Frees what a job built. Megatron's DDP, its gradient hooks and the optimizer hold each other through C++, where
    Python's garbage collector does not see it, and a MoE's dispatchers hold the graph of the last micro-batch; a model
    that stays alive keeps its process groups, and dozens of gloo threads with them, which are never idle."""
    import gc

    import torch
    from megatron.core.distributed import DistributedDataParallel
    from megatron.core.transformer.moe.token_dispatcher import MoETokenDispatcher

    for found in gc.get_objects():
        if type(found) is DistributedDataParallel:
            found.grad_accs.clear()
            found.config.grad_scale_func = found.config.no_sync_func = None  # methods of the optimizer and of the DDP
        elif issubclass(type(found), MoETokenDispatcher):
            vars(found).clear()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # other processes use the same GPU
