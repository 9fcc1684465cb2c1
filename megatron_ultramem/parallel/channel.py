"""The memory-parallel group as the exchanges use it: packed all-to-alls, counted, with errors that name the rank."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch.nn import functional as F

from megatron_ultramem.errors import ExchangeError, TrainingError
from megatron_ultramem.parallel.traffic import Traffic, align

GRACE_SECONDS = 3.0  # that ranks which also failed get to say so


class Channel:
    """All-to-alls over one group. Every method is a collective call."""

    def __init__(self, group: dist.ProcessGroup, traffic: Traffic, name: str) -> None:
        """`name` of the exchange, for error messages."""
        self.group, self.traffic, self.name = group, traffic, name
        self.ranks, self.rank = group.size(), group.rank()

    def all_to_all(
        self,
        direction: str,
        arrays: Sequence[torch.Tensor],
        send: Sequence[Sequence[int]],
        receive: Sequence[Sequence[int]],
    ) -> list[torch.Tensor]:
        """Moves several arrays in one message.

        Args:
            direction: 'forward' or 'backward', for the counter.
            arrays: each [sum of its send counts, ...], ordered by destination.
            send, receive: for each array, how many of its first dimension go to and come from every rank.

        Returns:
            For each array what came in, ordered by source.
        """
        # Larger elements first, so that every part is aligned for its elements.
        order = sorted(range(len(arrays)), key=lambda number: -arrays[number].element_size())
        words = [math.prod(array.shape[1:]) * array.element_size() // 2 for array in arrays]  # of an element, in int16
        align_parts = align if len(arrays) > 1 else int
        sent = [align_parts(2 * sum(words[i] * send[i][p] for i in order)) for p in range(self.ranks)]
        received = [align_parts(2 * sum(words[i] * receive[i][p] for i in order)) for p in range(self.ranks)]
        flat = [array.reshape(-1).view(torch.int16) for array in arrays]
        if len(arrays) == 1:
            buffer = flat[0]
        else:
            splits = {i: flat[i].split([words[i] * count for count in send[i]]) for i in order}
            pad = flat[0].new_zeros(align(1) // 2)
            parts = []
            for p in range(self.ranks):
                parts += [splits[i][p] for i in order]
                parts.append(pad[: (sent[p] - 2 * sum(words[i] * send[i][p] for i in order)) // 2])
            buffer = torch.cat(parts)
        came = buffer.new_empty(sum(received) // 2)
        self._run(
            direction,
            sum(received) - received[self.rank],
            lambda: dist.all_to_all_single(
                came.view(torch.uint8), buffer.view(torch.uint8), received, sent, group=self.group
            ),
        )
        if len(arrays) == 1:
            return [came.view(arrays[0].dtype).view(sum(receive[0]), *arrays[0].shape[1:])]
        pieces: dict[int, list[torch.Tensor]] = {i: [] for i in order}
        for p, part in enumerate(came.split([size // 2 for size in received])):
            start = 0
            for i in order:
                stop = start + words[i] * receive[i][p]
                pieces[i].append(part[start:stop])
                start = stop
        return [
            torch.cat(pieces[i]).view(array.dtype).view(sum(receive[i]), *array.shape[1:])
            for i, array in enumerate(arrays)
        ]

    def even_all_to_all(self, direction: str, arrays: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """`all_to_all` of equal parts of arrays [P*T, ...], the r-th of them for rank r."""
        even = [[len(array) // self.ranks] * self.ranks for array in arrays]
        return self.all_to_all(direction, arrays, even, even)

    def largest(self, number: torch.Tensor, direction: str) -> int:
        """The maximum over the ranks of a scalar tensor, on the host: waits for the device."""
        self._run(direction, 0, lambda: dist.all_reduce(number, op=dist.ReduceOp.MAX, group=self.group))
        return int(number)

    def _run(self, direction: str, received: int, collective: Callable[[], object]) -> None:
        self.traffic.add(direction, received)
        try:
            with self.traffic.timed():
                collective()
        except RuntimeError as error:
            raise ExchangeError(self._explain(direction, error)) from error

    def _explain(self, direction: str, error: RuntimeError) -> str:
        ranks = dist.get_process_group_ranks(self.group)
        silent = _silent_ranks(ranks)
        what = (
            f"rank {', '.join(map(str, silent))} ended or did not answer"
            if silent
            else f"a rank of {ranks} ended or did not answer"
        )
        reason = str(error).strip().splitlines() or [repr(error)]
        return (
            f"{what} in the {direction} exchange by {self.name} of memory values (within parallel.timeout_minutes); "
            f"see that rank's own output. {reason[0]}"
        )


def check_room(lookups: int, room: int) -> None:
    """Raises TrainingError for more lookups of a rank than an exchange has room for: the others would be lost."""
    if lookups > room:
        raise TrainingError(
            f"{lookups} lookups of a rank in an exchange of memory values with room for {room}; legal: at most {room}, "
            "or parallel.exchange_capacity = null, for sizes that follow the tokens"
        )


def pad(x_TX: torch.Tensor, tokens: int, value: int = 0) -> torch.Tensor:
    """More tokens of `value` at the end: where all ranks must send as many. Raises TrainingError if there are more."""
    check_room(len(x_TX), tokens)
    missing = tokens - len(x_TX)
    return F.pad(x_TX, (0, 0) * (x_TX.dim() - 1) + (0, missing), value=value) if missing else x_TX


def _silent_ranks(ranks: Sequence[int]) -> list[int]:
    """Those of `ranks` that do not report a failed exchange of their own within the grace period: the likely cause.

    Empty where the store that ranks report to is gone, or all reported.
    """
    key = "megatron_ultramem/exchange_failed/{}"
    try:
        store = dist.distributed_c10d._get_default_store()
        store.set(key.format(dist.get_rank()), "1")
        deadline = time.monotonic() + GRACE_SECONDS
        while True:
            silent = [rank for rank in ranks if not store.check([key.format(rank)])]
            if not silent or time.monotonic() > deadline:
                return silent
            time.sleep(0.1)
    except (RuntimeError, ValueError):
        return []
