"""AdamW in host memory: DeepSpeed's vectorised one (extra `deepspeed`), or torch's fused one.

It works through its tensors in chunks: what goes before an update (the gradient's way to the host) and what follows it
(the way back of the values) go on beside it, and DeepSpeed's kernel, which keeps Python's lock, lets go of it in
between.
"""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_ultramem.errors import ConfigError

CHUNK = 2**24  # elements; 64 MiB of fp32
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class AdamSettings:
    """Those of one update."""

    lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float


def choose_backend(wish: str) -> str:
    """deepspeed or torch, for the setting optimizer.value_offload.

    Raises ConfigError if DeepSpeed is asked for and its kernel cannot be built; with `auto` torch takes its place.
    """
    if wish == "torch" or (wish == "auto" and importlib.util.find_spec("deepspeed") is None):
        return "torch"
    try:
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        DeepSpeedCPUAdam([torch.zeros(1)])  # compiles the kernel, once on a machine
    except Exception as error:  # of the import, of the compiler, of loading what it made
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        if wish == "deepspeed":
            raise ConfigError(
                f"optimizer.value_offload = deepspeed: DeepSpeed's CPU Adam cannot be used ({reason}); legal here: "
                "torch or auto; or install the extra `deepspeed` and a C++ compiler"
            ) from error
        logger.warning("DeepSpeed's CPU Adam cannot be used (%s): value tables are updated by torch's", reason)
        return "torch"
    return "deepspeed"


class HostAdam:
    """AdamW over fp32 tensors [N] in host memory, which it updates in place.

    Args:
        master, exp_avg, exp_avg_sq: parameters and moments, contiguous.
        backend: of `choose_backend`.
    """

    def __init__(self, master: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, backend: str, chunk: int = CHUNK) -> None:
        self.chunks = [slice(start, min(start + chunk, len(master))) for start in range(0, len(master), chunk)]
        self._params = [master[chunk] for chunk in self.chunks]
        self._optimizer = _make(self._params, backend)
        for param, chunk_ in zip(self._params, self.chunks, strict=True):
            self._optimizer.state[param] = {"exp_avg": exp_avg[chunk_], "exp_avg_sq": exp_avg_sq[chunk_]}
        self._counts_in_tensors = backend == "torch"

    def update(
        self,
        grad: Tensor,
        step: int,
        settings: AdamSettings,
        *,
        wait_for: Callable[[int], None] = lambda number: None,
        updated: Callable[[slice], None] = lambda chunk: None,
    ) -> None:
        """One update by the gradient [N] (fp32, host).

        Args:
            step: number of this update, from 1.
            wait_for: called with the number of each chunk before its gradient is read.
            updated: called with each chunk when it is done.
        """
        (group,) = self._optimizer.param_groups
        group.update(vars(settings) if self._counts_in_tensors else _bias_corrected(step, settings))
        for number, (param, chunk) in enumerate(zip(self._params, self.chunks, strict=True)):
            wait_for(number)
            before: Any = torch.tensor(float(step - 1)) if self._counts_in_tensors else step - 1
            self._optimizer.state[param]["step"] = before
            param.grad = grad[chunk]
            self._optimizer.step()
            param.grad = None
            updated(chunk)


def use_threads(wish: int | None) -> None:
    """Threads of the host's kernels in this thread; None: this rank's share of the cores, whatever OMP_NUM_THREADS
    says, which launchers set to 1."""
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    torch.set_num_threads(wish or max(1, len(os.sched_getaffinity(0)) // ranks))


def _bias_corrected(step: int, s: AdamSettings) -> dict[str, Any]:
    """Settings with which Adam without bias correction makes the update of Adam with it. DeepSpeed corrects in fp32,
    where 1 - beta**step loses digits while it is small.

    lr/c1 * m / (sqrt(v)/sqrt(c2) + eps) = lr*sqrt(c2)/c1 * m / (sqrt(v) + eps*sqrt(c2)), with ci = 1 - beta_i**step.
    """
    c1, root_c2 = 1.0 - s.betas[0] ** step, (1.0 - s.betas[1] ** step) ** 0.5
    lr = s.lr * root_c2 / c1
    decay = s.weight_decay * s.lr / lr if lr else 0.0  # times this lr
    return {"lr": lr, "betas": s.betas, "eps": s.eps * root_c2, "weight_decay": decay, "bias_correction": False}


def _make(params: list[Tensor], backend: str) -> torch.optim.Optimizer:
    if backend == "torch":
        return torch.optim.AdamW(params, fused=True)
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    made: torch.optim.Optimizer = DeepSpeedCPUAdam(params, adamw_mode=True)
    return made
