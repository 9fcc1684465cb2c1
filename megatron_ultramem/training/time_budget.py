"""Runs that end after some minutes (`train.minutes`) instead of after a number of steps.

The schedule holds the learning rate until its final decay begins (wsd), so when that is can be decided on the way: as
soon as the share of the time that comes before the decay is over, the steps that fill the rest at the run's own speed
are the decay. A schedule that falls from the start would have to know the speed before the first step.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from megatron_ultramem.config.schema import Config
from megatron_ultramem.training.optimizer import Scheduler


class TimeBudget:
    """Counts from the end of the first step, which compiles; evaluations count too.

    Attributes:
        last_step: the step at which the run ends, once that is known.
    """

    def __init__(self, config: Config, clock: Callable[[], float] = time.monotonic) -> None:
        decay_steps = config.schedule.decay_steps or config.train.steps
        self._decay_share = (config.schedule.wsd_decay_steps or max(1, decay_steps // 10)) / decay_steps
        self._seconds = None if config.train.minutes is None else 60 * config.train.minutes
        self._clock = clock
        self._began: float | None = None
        self._steps = 0
        self.last_step: int | None = None

    def flag(self) -> float:
        """1.0 if for this rank it is time to decay, else 0.0: to be summed over ranks, as their clocks differ."""
        if self._seconds is None or self._began is None or self.last_step is not None:
            return 0.0
        return float(self._clock() - self._began >= (1 - self._decay_share) * self._seconds)

    def end_step(self, step: int, flags: float, scheduler: Scheduler) -> None:
        """To be called after every step with the sum of the flags; ends the schedule when one of them is up."""
        if self._began is None:
            self._began = self._clock()
            return
        self._steps += 1
        if not flags or self.last_step is not None:
            return
        if step >= scheduler.lr_decay_steps - scheduler.wsd_decay_steps:  # it decays already, and will be done in time
            self.last_step = scheduler.lr_decay_steps
            return
        rest = max(1, round(self._steps * self._decay_share / (1 - self._decay_share)))
        self.last_step = step + rest
        scheduler.lr_decay_steps, scheduler.wsd_decay_steps = self.last_step, rest
