"""The logit gate: both sides of a conversion compute a few prompts, and must agree."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from megatron_ultramem.checkpoints_convert.tensors import TensorInfo
from megatron_ultramem.checkpoints_convert.tokenizer_files import SAMPLES
from megatron_ultramem.errors import CheckpointError
from megatron_ultramem.training.tokenizers import Tokenizer

LARGEST_FP32 = 1e-4
"""Tolerance in fp32: of the largest difference of a logit."""
TIMES_OWN_BF16 = 1.5
"""Tolerance in bf16: their distance from our fp32 logits, as a multiple of that of our own bf16 logits. A rounding can
send a token to other experts or value rows, so that no fixed distance fits every model; it sends ours there as well."""
SLACK_BF16, SLACK_TOP_1 = 0.005, 0.05
"""Added to the tolerated distance, and to the tolerated share of positions with another likeliest token."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_PROMPT_TOKENS = 64


@dataclass(frozen=True)
class Comparison:
    """What the gate found.

    Attributes:
        largest: difference of two logits, absolute.
        relative: root mean square of the differences, as a share of that of the logits.
        top_1: share of positions at which both sides find the same token the likeliest.
        own_relative, own_top_1: in bf16, the same of our own bf16 logits. All are against our fp32 logits there.
    """

    precision: str
    prompts: int
    positions: int
    largest: float
    relative: float
    top_1: float
    own_relative: float = 0.0
    own_top_1: float = 1.0

    @property
    def relative_tolerance(self) -> float:
        """Of `relative`, in bf16."""
        return TIMES_OWN_BF16 * self.own_relative + SLACK_BF16

    @property
    def top_1_tolerance(self) -> float:
        """Least `top_1`, in bf16."""
        return 1 - TIMES_OWN_BF16 * (1 - self.own_top_1) - SLACK_TOP_1

    @property
    def passed(self) -> bool:
        if self.precision == "fp32":
            return self.largest <= LARGEST_FP32
        return self.relative <= self.relative_tolerance and self.top_1 >= self.top_1_tolerance

    def __str__(self) -> str:
        largest, relative = f"largest difference {self.largest:.2g}", f"relative difference {self.relative:.2g}"
        agreement = f"top-1 agreement {100 * self.top_1:.1f} %"
        if self.precision == "fp32":
            largest += f" (tolerance {LARGEST_FP32:g})"
        else:
            relative += f" (tolerance {self.relative_tolerance:.2g}, ours {self.own_relative:.2g})"
            agreement += f" (at least {100 * max(self.top_1_tolerance, 0):.1f} %)"
        what = self.precision if self.precision == "fp32" else "bf16 against ours in fp32"
        where = f"logits of {self.prompts} prompts ({self.positions} positions) in {what}"
        return f"{where}: {largest}, {relative}, {agreement}"


def prompts_for(tokenizer: Tokenizer, max_length: int) -> list[list[int]]:
    """Token ids of the prompts; each begins a document, so none is empty."""
    length = min(_PROMPT_TOKENS, max_length)
    return [[tokenizer.eod, *tokenizer.encode(text)][:length] for text in SAMPLES]


def our_logits(
    checkpoint: Path, prompts: Sequence[Sequence[int]], precision: str, overrides: Sequence[str]
) -> list[torch.Tensor]:
    """fp32 [S, V] for each prompt, of a checkpoint of the trainer."""
    from megatron_ultramem.platform import prepare

    prepare()
    from megatron_ultramem.inference.model import load_model
    from megatron_ultramem.training.distributed import destroy_distributed

    # The other side reads the tables themselves.
    read = "model.memory.table_read=params"
    model = load_model(checkpoint, [*overrides, f"train.precision={precision}", read])
    try:
        return [model.logits(torch.tensor([ids]))[0].cpu() for ids in prompts]
    finally:
        destroy_distributed()
        del model
        gc.collect()


def their_logits(folder: Path, prompts: Sequence[Sequence[int]], precision: str, loader: Any) -> list[torch.Tensor]:
    """The same of a Hugging Face folder.

    Args:
        loader: class of transformers with `from_pretrained`.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = loader.from_pretrained(str(folder), dtype=DTYPES[precision], local_files_only=True).to(device).eval()
    with torch.no_grad():
        return [model(torch.tensor([ids], device=device)).logits[0].float().cpu() for ids in prompts]


def run_gate(
    precision: str, ours: Callable[[str], list[torch.Tensor]], theirs: Callable[[str], list[torch.Tensor]]
) -> Comparison:
    """Computes both sides, one after the other so that one model is in memory at a time, and compares them.

    Args:
        ours, theirs: logits in a precision.

    Raises CheckpointError above the tolerance, and where memory does not suffice.
    """
    try:
        exact = ours("fp32")
        own = exact if precision == "fp32" else ours(precision)
        return compare(exact, theirs(precision), precision, own)
    except (MemoryError, RuntimeError) as error:  # torch.OutOfMemoryError is a RuntimeError, that of CPUs has no name
        short = isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate memory" in str(error)
        if not short:
            raise
        raise CheckpointError(
            "memory does not suffice to compare the logits of both sides; legal: --no-verify, or more memory"
        ) from error


def check_memory(tensors: Iterable[TensorInfo]) -> None:
    """Raises CheckpointError if a model of these tensors does not fit into free memory in fp32, as the gate has it."""
    needed = sum(math.prod(info.shape) for info in tensors) * torch.float32.itemsize
    free = torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else psutil.virtual_memory().available
    if needed > free:
        raise CheckpointError(
            f"to compare the logits of both sides the model needs {needed / 2**30:.2f} GiB, and "
            f"{free / 2**30:.2f} GiB are free; legal: --no-verify, or more memory"
        )


def compare(
    exact: Sequence[torch.Tensor], theirs: Sequence[torch.Tensor], precision: str, own: Sequence[torch.Tensor]
) -> Comparison:
    """Compares logits [S, V] with `exact`, our own in fp32; raises CheckpointError above the tolerance.

    Args:
        own: ours in `precision`, by which the tolerance is measured.
    """
    largest, relative, top_1 = _distance(exact, theirs)
    _, own_relative, own_top_1 = _distance(exact, own)
    positions = sum(len(logits) for logits in exact)
    found = Comparison(precision, len(exact), positions, largest, relative, top_1, own_relative, own_top_1)
    if not found.passed:
        raise CheckpointError(f"the two sides of the conversion do not compute the same: {found}")
    return found


def _distance(exact: Sequence[torch.Tensor], others: Sequence[torch.Tensor]) -> tuple[float, float, float]:
    """Largest difference, relative difference and top-1 agreement; infinite where a logit is no number."""
    our, their = torch.cat(list(exact)).double(), torch.cat(list(others)).double()
    assert our.shape == their.shape, (our.shape, their.shape)
    difference = our - their
    return (
        float(difference.abs().max().nan_to_num(torch.inf)),
        float((difference.norm() / our.norm()).nan_to_num(torch.inf)),
        float((our.argmax(-1) == their.argmax(-1)).double().mean()),
    )
