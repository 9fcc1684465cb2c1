"""Lets one rank say what several have found, each for itself, before there is a process group to agree in.

Most errors are met by all ranks alike, but a file, or a folder that can be written, may be missing on one host alone.
"""

from __future__ import annotations

import datetime
import hashlib
import os
import time

PATIENCE = datetime.timedelta(seconds=5)  # for rank 0 to have found the same


def is_mine_to_say(text: str, *, alone: bool = True, patience: datetime.timedelta = PATIENCE) -> bool:
    """Whether this rank is the one to print `text`: rank 0, at once, or the first of the others if rank 0 stays silent.

    Ranks know of each other by the store of torchrun's agent. Without one all speak, or, unless `alone`, rank 0.
    """
    rank, restart = os.environ.get("RANK", "0"), os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return alone or rank == "0"
    from torch.distributed import TCPStore

    key = f"ultramem/said/{restart}/{hashlib.sha256(text.encode()).hexdigest()}"
    try:
        port = int(os.environ["MASTER_PORT"])
        store = TCPStore(os.environ["MASTER_ADDR"], port, is_master=False, timeout=patience, wait_for_workers=False)
        deadline = time.monotonic() + patience.total_seconds()
        while rank != "0" and time.monotonic() < deadline and not store.check([key]):
            time.sleep(0.1)  # the store's own wait would print a warning when it ends
        return bool(store.compare_set(key, "", rank).decode() == rank)
    except RuntimeError:  # the store is gone
        return alone or rank == "0"
