"""Speed of training: step time, tokens/s, model TFLOP/s, MFU, and peak memory.

The clock runs only while training steps run. It starts at the first `begin_step` after a pause and stops at `pause`
(before an evaluation or a checkpoint) and at `read` (before metrics are written); work queued on the device is waited
for where it stops, so one wait per log interval is all that measuring costs. The first step of a launch, which builds
caches and compiles kernels, is left out.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable

import torch


class Throughput:
    """Measures steps between two calls of `read`.

    flops_per_token: training FLOPs of one token (`planning.flops.FlopsPerToken.training`).
    devices: ranks over which the tokens of a step are spread.
    peak_flops: FLOP/s of one device, or None where it is unknown, and then there is no MFU.
    """

    def __init__(
        self,
        *,
        flops_per_token: float,
        devices: int,
        peak_flops: float | None,
        device: torch.device,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._flops_per_token = flops_per_token
        self._devices = devices
        self._peak_flops = peak_flops
        self._device = device
        self._clock = clock
        self._started: float | None = None
        self._warm = False
        self._clear()

    def begin_step(self) -> None:
        """To be called before every step, after anything that should not count."""
        if self._started is None:
            self._started = self._clock()

    def end_step(self, tokens: int) -> None:
        """To be called after every step; `tokens` counts all ranks."""
        if self._warm:
            self._steps += 1
            self._tokens += tokens
            return
        self.pause()
        self._clear()
        self._warm = True

    def pause(self) -> None:
        """Stops the clock until the next `begin_step`."""
        if self._started is None:
            return
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self._seconds += self._clock() - self._started
        self._started = None

    def read(self) -> dict[str, float]:
        """Averages since the last read, and stops the clock: step_time_s, tokens_per_s, tflops_per_gpu, mfu (a share
        of 1; only where the peak is known). Empty when no step was measured, as after the first one."""
        self.pause()
        if not self._steps:
            return {}
        tokens_per_s = self._tokens / self._seconds
        flops = tokens_per_s * self._flops_per_token / self._devices
        values = {
            "step_time_s": self._seconds / self._steps,
            "tokens_per_s": tokens_per_s,
            "tflops_per_gpu": flops / 1e12,
        }
        if self._peak_flops is not None:
            values["mfu"] = flops / self._peak_flops
        self._clear()
        return values

    def _clear(self) -> None:
        self._seconds, self._steps, self._tokens = 0.0, 0, 0


def peak_memory_gib(device: torch.device) -> float:
    """Peak memory of this rank since its start, in GiB: allocated on the device for CUDA, else resident (RSS)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**30 if sys.platform == "darwin" else peak / 2**20
