"""The logit gate: both sides of a conversion compute a few prompts, and must agree."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_ultramem.checkpoints_convert.tokenizer_files import SAMPLES
from megatron_ultramem.errors import CheckpointError
from megatron_ultramem.training.tokenizers import Tokenizer

LARGEST_FP32 = 1e-4
"""Tolerance in fp32: of the largest difference of a logit."""
RELATIVE_BF16 = 0.3
"""Tolerance in bf16: of the differences' root mean square, as a share of that of the logits. There a rounding can send
a token to other experts or value rows, after which its logits are of another computation: single differences are as
large as logits, with nothing wrong. It finds a conversion that mixes up tensors; fp32 finds a slight one."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_PROMPT_TOKENS = 64


@dataclass(frozen=True)
class Comparison:
    """What the gate found.

    Attributes:
        largest: difference of two logits, absolute.
        relative: root mean square of the differences, as a share of that of the logits.
        top_1: share of positions at which both sides find the same token the likeliest.
    """

    precision: str
    prompts: int
    positions: int
    largest: float
    relative: float
    top_1: float

    @property
    def passed(self) -> bool:
        return self.largest <= LARGEST_FP32 if self.precision == "fp32" else self.relative <= RELATIVE_BF16

    def __str__(self) -> str:
        largest, relative = f"largest difference {self.largest:.2g}", f"relative difference {self.relative:.2g}"
        if self.precision == "fp32":
            largest += f" (tolerance {LARGEST_FP32:g})"
        else:
            relative += f" (tolerance {RELATIVE_BF16:g})"
        where = f"logits of {self.prompts} prompts ({self.positions} positions) in {self.precision}"
        return f"{where}: {largest}, {relative}, top-1 agreement {100 * self.top_1:.1f} %"


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

    model = load_model(checkpoint, [*overrides, f"train.precision={precision}"])
    try:
        return [model.logits(torch.tensor([ids]))[0].cpu() for ids in prompts]
    finally:
        destroy_distributed()
        del model
        gc.collect()


def their_logits(
    folder: Path, prompts: Sequence[Sequence[int]], precision: str, loader: Any, **options: Any
) -> list[torch.Tensor]:
    """The same of a Hugging Face folder.

    Args:
        loader: class of transformers with `from_pretrained`, which takes `options`.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    options |= {"dtype": DTYPES[precision], "local_files_only": True}
    model = loader.from_pretrained(str(folder), **options).to(device).eval()
    with torch.no_grad():
        return [model(torch.tensor([ids], device=device)).logits[0].float().cpu() for ids in prompts]


def compare(ours: Sequence[torch.Tensor], theirs: Sequence[torch.Tensor], precision: str) -> Comparison:
    """Compares logits [S, V]; raises CheckpointError above the tolerance."""
    our, their = torch.cat(list(ours)).double(), torch.cat(list(theirs)).double()
    assert our.shape == their.shape, (our.shape, their.shape)
    difference = our - their
    found = Comparison(
        precision,
        prompts=len(ours),
        positions=len(our),
        largest=float(difference.abs().max().nan_to_num(torch.inf)),
        relative=float((difference.norm() / our.norm()).nan_to_num(torch.inf)),
        top_1=float((our.argmax(-1) == their.argmax(-1)).double().mean()),
    )
    if not found.passed:
        raise CheckpointError(f"the two sides of the conversion do not compute the same: {found}")
    return found
