"""Steps that go wrong: a loss or a gradient that is not finite, a loss that leaps. What the settings of `faults` say is
done before anything is updated:

    stop     the run ends with an error that names the ranks where it happened
    skip     the batch is passed over: the step counts, nothing is updated
    rewind   the run goes back to its last checkpoint, and on from there with the data after the batch that went wrong
             (as in PaLM, arXiv 2204.02311, section 5.1)

All ranks see the same numbers and decide alike. The losses that a leap is measured by are saved in checkpoints, so a run
that is resumed decides as one that was not interrupted.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from megatron_ultramem.config.schema import FaultsConfig
from megatron_ultramem.errors import TrainingError

if TYPE_CHECKING:
    from megatron_ultramem.training.setup import Run

# A spread smaller than this share of the mean is taken to be this: losses of a small or a converged model hardly vary.
LEAST_SPREAD = 0.01


@dataclass(frozen=True)
class Anomaly:
    """Something wrong with a step."""

    kind: str  # nonfinite_loss, nonfinite_gradient or loss_spike
    value: float
    text: str
    action: str  # stop, skip or rewind


class AnomalyJudge:
    """Looks at the numbers of each step.

    Args:
        losses: of the last good steps, the oldest first, at most faults.spike_window of them; kept up to date here.
    """

    def __init__(self, settings: FaultsConfig) -> None:
        self.settings = settings
        self.skipped_in_a_row = self.rewinds = 0

    def of_loss(self, loss: float, losses: Sequence[float]) -> Anomaly | None:
        """Args: losses: of the last good steps, at most faults.spike_window of them."""
        f = self.settings
        if not math.isfinite(loss):
            return Anomaly("nonfinite_loss", loss, f"the loss is {loss}", f.on_nonfinite)
        if f.on_spike == "ignore" or len(losses) < f.spike_window:
            return None
        mean = statistics.fmean(losses)
        spread = max(statistics.pstdev(losses), LEAST_SPREAD * abs(mean))
        if loss <= mean + f.spike_threshold * spread:
            return None
        text = f"the loss leaps to {loss:.4f}, {(loss - mean) / spread:.1f} spreads above its mean of {mean:.4f}"
        return Anomaly("loss_spike", loss, text, f.on_spike)

    def of_gradient(self, norm: float) -> Anomaly | None:
        if math.isfinite(norm):
            return None
        text = f"the gradient norm is {norm} though the loss is finite"
        return Anomaly("nonfinite_gradient", norm, text, self.settings.on_nonfinite)

    def remember(self, loss: float, losses: list[float]) -> None:
        """A step went well."""
        self.skipped_in_a_row = 0
        losses.append(loss)
        del losses[: -self.settings.spike_window]


def meet(run: Run, anomaly: Anomaly, here: Callable[[], bool]) -> dict[str, float]:
    """Does what the settings say about an anomaly of the step at hand, short of rewinding; returns metrics of it.

    Args:
        here: whether it happened on this rank; asked if the run ends.

    Raises TrainingError, alike on every rank, where the settings say so or too many steps were passed over.
    """
    judge, limits = run.judge, run.config.faults
    if anomaly.action == "stop":
        _stop(run, anomaly, here())
    if anomaly.action == "skip":
        judge.skipped_in_a_row += 1
        if judge.skipped_in_a_row > limits.max_skips:
            _stop(run, anomaly, here(), f"{limits.max_skips} steps in a row were skipped (faults.max_skips)")
    else:
        judge.rewinds += 1
        if judge.rewinds > limits.max_rewinds:
            _stop(run, anomaly, here(), f"the run was rewound {limits.max_rewinds} times (faults.max_rewinds)")
        if run.checkpoints.last_saved is None:
            _stop(run, anomaly, here(), "there is no checkpoint to rewind to")
    return {"skipped": 1.0, f"anomaly/{anomaly.kind}": 1.0}


def rewind(run: Run) -> dict[str, float]:
    """Back to the last checkpoint, except for the data, which goes on where the run was; returns metrics of it."""
    left = run.position
    run.checkpoints.finish(blocking=True)
    run.position = run.checkpoints.rewind()
    passed_over = left.consumed_samples - run.position.consumed_samples
    run.position.consumed_samples = left.consumed_samples
    return {"rewound_from": float(left.step), "samples_passed_over": float(passed_over)}


def _stop(run: Run, anomaly: Anomaly, here: bool, *remarks: str) -> None:
    """Raises the same TrainingError on every rank, naming those where it happened and the last checkpoint."""
    run.checkpoints.finish(blocking=True)
    everywhere: list[bool] = [False] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everywhere, here)
    hosts = run.checkpoints.hosts
    ranks = ", ".join(f"{rank} on {hosts[rank]}" for rank, bad in enumerate(everywhere) if bad)
    text = f"step {run.position.step + 1}: {anomaly.text} (rank {ranks or 'none alone, but in the sum'})"
    last_good = f"last good checkpoint: {run.checkpoints.last_saved or 'none'}"
    raise TrainingError("; ".join((text, *remarks, "nothing was updated", last_good)))
