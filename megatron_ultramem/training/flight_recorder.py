"""The last collective of this process, from PyTorch's flight recorders: NCCL has one, and gloo in newer versions."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass

# A heartbeat reads the recorder, which costs about 15 us an entry; torch keeps 2000 entries by default.
BUFFER_SIZE = 256


@dataclass(frozen=True)
class Collective:
    """The last one that this process has begun, of any process group."""

    name: str  # as gloo:all_reduce, or nccl:all_gather
    group: str  # description of the process group
    number: int  # of the collectives of that group
    done: bool

    def __str__(self) -> str:
        return f"{self.name} {self.number} of {self.group}"


def limit_buffer() -> None:
    """Sets the size of the recorder where the environment does not; call before the first process group."""
    if "TORCH_NCCL_TRACE_BUFFER_SIZE" not in os.environ:
        os.environ.setdefault("TORCH_FR_BUFFER_SIZE", str(BUFFER_SIZE))


def last_collective() -> Collective | None:
    """None where there was none yet, or this torch does not record them."""
    entries = [entry for recorder in traces().values() for entry in recorder.get("entries") or []]
    if not entries:
        return None
    last = max(entries, key=lambda entry: entry["time_created_ns"])
    group = last["process_group"]
    return Collective(
        last["profiling_name"],
        group[1] if len(group) > 1 and group[1] not in ("", "undefined") else f"group {group[0]}",
        last["p2p_seq_id"] if last["is_p2p"] else last["collective_seq_id"],
        last["retired"] or last["state"] == "completed",
    )


def traces() -> dict[str, dict]:
    """Everything that the recorders hold, `nccl` and `others`; without those that this torch does not have."""
    import torch._C._distributed_c10d as c10d

    dumps = {"nccl": getattr(c10d, "_dump_nccl_trace_json", None), "others": getattr(c10d, "_dump_fr_trace_json", None)}
    return {
        name: json.loads(dump(includeCollectives=True, onlyActive=False) or "{}")
        for name, dump in dumps.items()
        if dump is not None
    }
