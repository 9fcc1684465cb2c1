"""Which rank holds the others up, and where the time of a step goes.

Ranks wait for each other in every step, so all steps take the same time everywhere. What differs is a rank's own time:
the forward and backward passes (data loading among them) without the memory exchange, in which it waits for others.
With tensor parallelism the ranks of a group go in step within those passes too: a slow one shows as a slow group.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_ultramem.errors import TrainingError
from megatron_ultramem.training.spans import DATA, EXCHANGE, GRAD_SYNC, OPTIMIZER, STEP, Spans

_FORWARD, _BACKWARD, _SCHEDULE = "forward-compute", "backward-compute", "forward-backward"  # Megatron's names
FILE = "rank_times.jsonl"
PARTS = ("step", "own", "data", "forward", "backward", "exchange", "bubble", "grad_sync", "optimizer")


def parts_of_step(seconds: Mapping[str, float]) -> dict[str, float]:
    """From the seconds of spans to those of PARTS: `bubble` is the time of the pipeline schedule in which no pass ran,
    `own` that of the passes without the exchange."""
    named = {name: seconds.get(name, 0.0) for name in (STEP, DATA, EXCHANGE, GRAD_SYNC, OPTIMIZER)}
    forward, backward, schedule = (seconds.get(name, 0.0) for name in (_FORWARD, _BACKWARD, _SCHEDULE))
    return {
        **named,
        "forward": forward,
        "backward": backward,
        "own": forward + backward - named[EXCHANGE],
        "bubble": max(0.0, schedule - forward - backward - named[GRAD_SYNC]),
    }


class Stragglers:
    """Gathers the times of all ranks. Every method is a collective call."""

    def __init__(
        self,
        spans: Spans,
        device: torch.device,
        interval: int,
        file: Path | None = None,
        *,
        exchange_in_graphs: bool = False,
    ) -> None:
        """
        Args:
            interval: steps between reports; 0: none.
            file: where reports leave the times of every rank, a JSON line each (on one rank).
            exchange_in_graphs: the memory exchange is replayed as a part of CUDA graphs and cannot be told from the
                passes: it is in the own times of ranks, and there is no metric of it.

        Attributes:
            interval: the same, but 0 where there is only one rank.
        """
        self._spans, self._device, self._file = spans, device, file
        self._hidden = {"exchange"} if exchange_in_graphs else set()
        ranks = dist.get_world_size()
        self.interval = interval if ranks > 1 else 0
        self._hosts: list[str] = [""] * ranks
        dist.all_gather_object(self._hosts, socket.gethostname())
        self._steps = 0
        self._total_RP = torch.zeros(ranks, len(PARTS), dtype=torch.float64)

    def read(self) -> dict[str, float]:
        """Metrics of the steps since the last read: `time/<part>_s`, the mean over ranks of each part of a step; the
        least, median and largest own time of a rank, and the rank with the largest. Empty when no step was measured."""
        steps, seconds = self._spans.read()
        if not steps:
            return {}
        parts = parts_of_step(seconds)
        local = torch.tensor([parts[name] for name in PARTS], dtype=torch.float64, device=self._device)
        gathered = torch.empty(len(self._hosts) * len(PARTS), dtype=torch.float64, device=self._device)
        dist.all_gather_into_tensor(gathered, local)
        times_RP = gathered.cpu().view(-1, len(PARTS))
        self._steps += steps
        self._total_RP += times_RP
        means = (times_RP.mean(dim=0) / steps).tolist()
        own_R = times_RP[:, PARTS.index("own")] / steps
        named = {f"time/{name}_s": mean for name, mean in zip(PARTS, means, strict=True) if name not in self._hidden}
        return named | {
            "rank_time/least_s": float(own_R.min()),
            "rank_time/median_s": float(own_R.quantile(0.5)),
            "rank_time/most_s": float(own_R.max()),
            "rank_time/slowest_rank": float(own_R.argmax()),
        }

    def report(self, step: int) -> str:
        """Names the slowest rank of the steps since the last report. Raises TrainingError if `file` is not writable."""
        self.read()
        if not self._steps:
            return "slowest rank: no step was measured yet"
        times_RP, steps = self._total_RP / self._steps, self._steps
        self._steps = 0
        self._total_RP.zero_()
        self._write(step, steps, times_RP)
        own_R = times_RP[:, PARTS.index("own")]
        rank, median = int(own_R.argmax()), float(own_R.quantile(0.5))
        slowest = dict(zip(PARTS, times_RP[rank].tolist(), strict=True))
        return (
            f"slowest of {len(own_R)} ranks over {steps} steps: rank {rank} on {self._hosts[rank]} with "
            f"{slowest['own']:.4g} s of its own a step (data {slowest['data']:.2g} s); median {median:.4g} s "
            f"({slowest['own'] / median - 1:+.0%})"
            + ("; with the memory exchange, which CUDA graphs hide, and in which ranks wait" if self._hidden else "")
        )

    def _write(self, step: int, steps: int, times_RP: torch.Tensor) -> None:
        if self._file is None:
            return
        named = (found for found in zip(PARTS, times_RP.T, strict=True) if found[0] not in self._hidden)
        parts = {f"{name}_s": times_R.tolist() for name, times_R in named}
        try:
            with self._file.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, "steps": steps, "host": self._hosts, **parts}) + "\n")
        except OSError as error:
            raise TrainingError(f"cannot write the times of ranks, {self._file}: {error}") from error
