"""Records chosen steps: a trace of torch's profiler, a capture range for nsys, the history of the GPU's memory.

    logging.profile_steps=100-104    these steps (logging.profile_with, logging.profile_memory)
    touch <run_dir>/profile          the next logging.profile_length steps
    touch <run_dir>/memory           the memory of the next logging.profile_length steps

What the ranks of logging.profile_ranks record lies in <run_dir>/profiles: `step_N-M.rank_R.trace.json.gz` opens in
Perfetto or chrome://tracing, `step_N-M.rank_R.memory.pickle` at https://pytorch.org/memory_viz. For nsys start as

    nsys profile --capture-range=cudaProfilerApi --capture-range-end=repeat -o trace torchrun ... \
        logging.profile_with=nsys logging.nvtx=true logging.profile_steps=100-104
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from megatron_ultramem.config.schema import LoggingConfig
from megatron_ultramem.config.validate import parse_steps
from megatron_ultramem.errors import ConfigError
from megatron_ultramem.platform import Platform
from megatron_ultramem.training.requests import MEMORY, PROFILE, Requests
from megatron_ultramem.training.spans import Spans

logger = logging.getLogger(__name__)
_HISTORY = 1_000_000  # allocations and frees that a memory snapshot keeps


def check_device(config: LoggingConfig, platform: Platform) -> None:
    """Raises ConfigError for what only a GPU can record, where there is none."""
    for name, wanted in (
        ("nvtx = true", config.nvtx),
        ("profile_with = nsys", config.profile_with == "nsys"),
        ("profile_memory = true", config.profile_memory),
    ):
        if wanted and not platform.is_cuda:
            raise ConfigError(f"logging.{name}: there is no GPU; legal here: the default")


class Profiler:
    """Wraps every step; does nothing on ranks that are not to record.

    Args:
        requests: what all ranks have agreed on, looked at before each step.
    """

    def __init__(
        self,
        config: LoggingConfig,
        run_dir: Path,
        requests: Requests,
        spans: Spans,
        *,
        rank: int,
        device: torch.device,
    ) -> None:
        self._config, self._requests, self._spans, self._device = config, requests, spans, device
        self._folder, self._rank = run_dir / "profiles", rank
        self._enabled = rank in config.profile_ranks
        self._wanted = parse_steps(config.profile_steps) if config.profile_steps else range(0)
        self._steps = range(0)  # being recorded
        self._trace: Any = None
        self._memory = False

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Around step `number`: starts before the first step of a recording, writes it after the last."""
        if self._enabled and number not in self._steps:
            self._start_if_due(number)
        try:
            yield
        finally:
            if self._steps and number >= self._steps[-1]:
                self.close()

    def close(self) -> None:
        """Ends a recording, if there is one, and writes its files."""
        if not self._steps:
            return
        name = f"step_{self._steps[0]:08d}-{self._steps[-1]:08d}.rank_{self._rank:05d}"
        self._steps, self._spans.annotate = range(0), False
        self._folder.mkdir(parents=True, exist_ok=True)
        if self._trace is not None:
            self._trace.stop()
            self._trace.export_chrome_trace(str(self._folder / f"{name}.trace.json.gz"))
            self._trace = None
        elif self._config.profile_with == "nsys":
            torch.cuda.synchronize(self._device)
            torch.cuda.profiler.stop()
        if self._memory:
            torch.cuda.memory._dump_snapshot(str(self._folder / f"{name}.memory.pickle"))
            torch.cuda.memory._record_memory_history(enabled=None)
            self._memory = False
        logger.info("recorded %s in %s", name, self._folder)

    def _start_if_due(self, number: int) -> None:
        scheduled = number in self._wanted
        trace = scheduled or self._requests.agreed[PROFILE]
        memory = (scheduled and self._config.profile_memory) or self._requests.agreed[MEMORY]
        if memory and self._device.type != "cuda":
            logger.warning("the memory of step %d is not recorded: that needs a GPU", number)
            memory = False
        if not (trace or memory):
            return
        self._steps = range(number, self._wanted[-1] + 1 if scheduled else number + self._config.profile_length)
        self._memory = memory
        if memory:
            torch.cuda.memory._record_memory_history(max_entries=_HISTORY)
        if trace and self._config.profile_with == "nsys":
            torch.cuda.profiler.start()
        elif trace:
            activities = [torch.profiler.ProfilerActivity.CPU]
            if self._device.type == "cuda":
                activities.append(torch.profiler.ProfilerActivity.CUDA)
            self._trace = torch.profiler.profile(activities=activities, record_shapes=True)
            self._trace.start()
            self._spans.annotate = True
