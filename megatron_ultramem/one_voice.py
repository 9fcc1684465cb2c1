"""Lets one rank say what several have found, each for itself, before there is a process group to agree in."""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import os

PATIENCE = datetime.timedelta(seconds=3)  # for rank 0 to have found the same


def is_mine_to_say(text: str, patience: datetime.timedelta = PATIENCE) -> bool:
    """Whether this rank is the one to print `text`: rank 0, at once, or the first of the others if rank 0 stays silent.

    Ranks know of each other by the store of torchrun's agent; without one every rank speaks for itself.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return True
    from torch.distributed import TCPStore

    rank, restart = os.environ.get("RANK", "0"), os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    key = f"ultramem/said/{restart}/{hashlib.sha256(text.encode()).hexdigest()}"
    try:
        port = int(os.environ["MASTER_PORT"])
        store = TCPStore(os.environ["MASTER_ADDR"], port, is_master=False, timeout=patience, wait_for_workers=False)
        if rank != "0":
            with contextlib.suppress(RuntimeError):  # it has not
                store.wait([key], patience)
        return bool(store.compare_set(key, "", rank).decode() == rank)
    except RuntimeError:  # the store is gone
        return True
