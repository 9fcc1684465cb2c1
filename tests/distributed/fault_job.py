"""`ultramem train`, in which one rank does at one step what ranks do on bad days.

torchrun ... -m tests.distributed.fault_job FAULT RANK STEP train <settings>
"""

from __future__ import annotations

import os
import signal
import sys
import time

from megatron_ultramem.cli import main


def fault(kind: str) -> None:
    """Happens to this process, in its main thread."""
    import torch

    if kind == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    elif kind == "stopped":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif kind == "sleeps":
        time.sleep(1e6)
    elif kind == "lonely_collective":
        torch.distributed.barrier()
    elif kind != "none":
        raise AssertionError(kind)


def arrange(kind: str, rank: int, step: int) -> None:
    """Lets the fault happen when that rank fetches its data of that step, in the first start of the ranks."""
    if int(os.environ["RANK"]) != rank or os.environ["TORCHELASTIC_RESTART_COUNT"] != "0":
        return
    from megatron_ultramem.platform import prepare

    prepare("auto")
    from megatron_ultramem.training import loop

    original, calls = loop.micro_batches, 0

    def micro_batches(*args):  # type: ignore[no-untyped-def]
        nonlocal calls
        calls += 1
        if calls == step:
            fault(kind)
        return original(*args)

    loop.micro_batches = micro_batches


if __name__ == "__main__":
    kind, rank, step, *arguments = sys.argv[1:]
    arrange(kind, int(rank), int(step))
    sys.exit(main(arguments))
