"""Steps that go wrong: a loss or a gradient that is not finite, a loss that leaps. What the settings of `faults` say is
done before anything is updated:

    stop     the run ends with an error that names the ranks where it happened
    skip     the batch is passed over: the step counts, nothing is updated
    rewind   the run goes back to its last checkpoint, and on from there with the data after the batch that went wrong
             (as in PaLM, arXiv 2204.02311, section 5.1)

All ranks see the same numbers and decide alike. The losses that a leap is measured by are saved in checkpoints, so that
a run that is resumed decides as one that was not interrupted.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING, NoReturn

import torch

from megatron_ultramem.config.schema import FaultsConfig
from megatron_ultramem.errors import TrainingError
from megatron_ultramem.training.step import LossTotals

if TYPE_CHECKING:
    from megatron_ultramem.training.setup import Run

# A spread smaller than this share of the mean is taken to be this: losses of a small or a converged model hardly vary.
LEAST_SPREAD = 0.01


@dataclass(frozen=True)
class Anomaly:
    """Something wrong with a step."""

    kind: str  # nonfinite_loss, nonfinite_gradient or loss_spike
    text: str
    action: str  # stop, skip or rewind

    def __str__(self) -> str:
        return self.text


class AnomalyJudge:
    """Looks at the numbers of each step, and counts what went wrong."""

    def __init__(self, settings: FaultsConfig) -> None:
        self.settings = settings
        self.last: Anomaly | None = None  # of the last step
        self.skipped_in_a_row = self.rewinds = 0

    def look(self, loss: float, grad_norm: float, losses: list[float]) -> Anomaly | None:
        """What is wrong with a step, if anything is.

        Args:
            losses: of the last good steps, the oldest first; a good one is added, and an old one leaves.
        """
        self.last = self._find(loss, grad_norm, losses)
        if self.last is None:
            self.skipped_in_a_row = 0
            if self.settings.on_spike != "ignore":
                losses.append(loss)
                del losses[: -self.settings.spike_window]
        return self.last

    @property
    def wants_rewind(self) -> bool:
        return self.last is not None and self.last.action == "rewind"

    def _find(self, loss: float, grad_norm: float, losses: list[float]) -> Anomaly | None:
        f = self.settings
        if not math.isfinite(loss):
            return Anomaly("nonfinite_loss", f"the loss is {loss}", f.on_nonfinite)
        if not math.isfinite(grad_norm):
            text = f"the gradient norm is {grad_norm} though the loss is finite"
            return Anomaly("nonfinite_gradient", text, f.on_nonfinite)
        if f.on_spike == "ignore" or len(losses) < f.spike_window:
            return None
        mean = statistics.fmean(losses)
        spread = max(statistics.pstdev(losses), LEAST_SPREAD * abs(mean))
        if loss <= mean + f.spike_threshold * spread:
            return None
        text = f"the loss leaps to {loss:.4f}, {(loss - mean) / spread:.1f} spreads above its mean of {mean:.4f}"
        return Anomaly("loss_spike", text, f.on_spike)


def meet(run: Run, anomaly: Anomaly, totals: LossTotals) -> None:
    """Counts an anomaly of the step at hand, of which nothing has been updated.

    Raises TrainingError, alike on every rank, where the settings end the run at this one, or at so many.
    """
    judge, limits = run.judge, run.config.faults
    if anomaly.action == "stop":
        _stop(run, anomaly, totals)
    if anomaly.action == "skip":
        judge.skipped_in_a_row += 1
        if judge.skipped_in_a_row > limits.max_skips:
            _stop(run, anomaly, totals, f"the {limits.max_skips} steps before were skipped (faults.max_skips)")
    else:
        judge.rewinds += 1
        if judge.rewinds > limits.max_rewinds:
            _stop(run, anomaly, totals, f"the run was rewound {limits.max_rewinds} times (faults.max_rewinds)")
        run.checkpoints.finish(blocking=True)
        if run.checkpoints.last_saved is None:
            _stop(run, anomaly, totals, "there is no checkpoint to rewind to")


def rewind(run: Run) -> dict[str, float]:
    """Back to the last checkpoint, except for the data, which goes on where the run was; returns metrics of it."""
    left, anomaly = run.position, run.judge.last
    assert anomaly is not None
    run.position = run.checkpoints.rewind()
    passed_over = left.consumed_samples - run.position.consumed_samples
    run.position.consumed_samples = left.consumed_samples
    return {
        f"anomaly/{anomaly.kind}": 1.0,
        "rewound_from": float(left.step),
        "samples_passed_over": float(passed_over),
    }


def _stop(run: Run, anomaly: Anomaly, totals: LossTotals, *remarks: str) -> NoReturn:
    """Raises the same TrainingError on every rank, naming those where it happened and the last checkpoint."""
    run.checkpoints.finish(blocking=True)
    if anomaly.kind == "nonfinite_gradient":
        here = not _finite_gradients(run)
    else:
        here = not math.isfinite(float(totals.this_rank[0]))
    everywhere: list[bool] = [False] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everywhere, here)
    hosts = run.checkpoints.hosts
    ranks = ", ".join(f"{rank} on {hosts[rank]}" for rank, bad in enumerate(everywhere) if bad)
    where = f" (rank {ranks or 'none alone, but in the sum'})" if anomaly.kind != "loss_spike" else ""
    last_good = f"last good checkpoint: {run.checkpoints.last_saved or 'none'}"
    text = f"step {run.position.step + 1}: {anomaly.text}{where}"
    raise TrainingError("; ".join((text, "nothing was updated", *remarks, last_good)))


def _finite_gradients(run: Run) -> bool:
    buffers = [buffer for chunk in run.chunks for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers)]
    return all(bool(buffer.grad_data.isfinite().all()) for buffer in buffers)
