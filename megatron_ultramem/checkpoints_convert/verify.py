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

TOLERANCE = {"fp32": 1e-4, "bf16": 0.5}
"""Largest difference of a logit that passes. In bf16 a rounding may send a token to other experts or value rows, after
which its logits are those of another computation: the difference says little, top-1 agreement more."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_PROMPT_TOKENS = 64


@dataclass(frozen=True)
class Comparison:
    """What the gate found.

    Attributes:
        largest: difference of two logits, absolute.
        top_1: share of positions at which both sides find the same token the likeliest.
    """

    precision: str
    prompts: int
    positions: int
    largest: float
    top_1: float

    @property
    def tolerance(self) -> float:
        return TOLERANCE[self.precision]

    def __str__(self) -> str:
        return (
            f"logits of {self.prompts} prompts ({self.positions} positions) in {self.precision}: largest difference "
            f"{self.largest:.2g} (tolerance {self.tolerance:g}), top-1 agreement {100 * self.top_1:.1f} %"
        )


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
    model = loader.from_pretrained(str(folder), dtype=DTYPES[precision], **options).to(device).eval()
    with torch.no_grad():
        return [model(torch.tensor([ids], device=device)).logits[0].float().cpu() for ids in prompts]


def compare(ours: Sequence[torch.Tensor], theirs: Sequence[torch.Tensor], precision: str) -> Comparison:
    """Compares logits [S, V]; raises CheckpointError above the tolerance."""
    largest, same, positions = 0.0, 0, 0
    for our, their in zip(ours, theirs, strict=True):
        assert our.shape == their.shape, (our.shape, their.shape)
        largest = max(largest, float((our - their).abs().max().nan_to_num(torch.inf)))
        same += int((our.argmax(-1) == their.argmax(-1)).sum())
        positions += our.shape[0]
    found = Comparison(precision, len(ours), positions, largest, same / positions)
    if not found.largest <= found.tolerance:
        raise CheckpointError(f"the two sides of the conversion do not compute the same: {found}")
    return found
