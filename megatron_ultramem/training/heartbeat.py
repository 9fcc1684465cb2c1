"""Signs of life that ranks leave for each other in the launcher's store, where those of a lost rank can be read."""

from __future__ import annotations

import datetime
import json
import os
from dataclasses import asdict, dataclass

from torch.distributed import PrefixStore, Store, TCPStore

ENDED = "ended"
STORE_TIMEOUT = datetime.timedelta(seconds=30)


@dataclass(frozen=True)
class Sign:
    """What a rank last said of itself."""

    rank: int
    host: str
    pid: int
    beat: int  # counts up with every sign
    step: int | None  # None: before the first
    doing: str
    still_for: float  # seconds since its main thread last got anywhere
    collective: str | None  # the last that it began, where known
    waiting: bool  # whether it has not come out of that one

    @property
    def has_ended(self) -> bool:
        return self.doing.startswith(ENDED)

    def __str__(self) -> str:
        where = self.doing if self.step is None else f"step {self.step}, {self.doing}"
        last = (
            "unknown" if self.collective is None else self.collective + (", in which it waits" if self.waiting else "")
        )
        return f"rank {self.rank} on {self.host} (pid {self.pid}), {where}, last collective {last}"


class SignBoard:
    """Reads and writes signs.

    Args:
        store: one of its own, because a thread that waits in a store's `get` keeps the others out of it.
        token: word that only the ranks of this start know, so that signs of the start before are not read.
    """

    def __init__(self, store: Store, token: str) -> None:
        self._store = PrefixStore(f"ultramem/signs/{token}", store)

    def post(self, sign: Sign) -> None:
        self._store.set(str(sign.rank), json.dumps(asdict(sign)))

    def read(self, rank: int) -> Sign | None:
        """None: that rank has left no sign yet."""
        if not self._store.check([str(rank)]):
            return None
        return Sign(**json.loads(self._store.get(str(rank))))

    def declare(self, event: str, rank: int) -> bool:
        """Announces an event; True on the one rank that was the first to do so."""
        return bool(self._store.compare_set(event, "", str(rank)).decode() == str(rank))

    def declared(self, event: str) -> bool:
        return bool(self._store.check([event]))


def connect_store() -> Store | None:
    """A connection of this process to the store of torchrun's agent, or of rank 0; None without a launcher."""
    if "MASTER_ADDR" not in os.environ:
        return None
    return TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, timeout=STORE_TIMEOUT)
