"""Writes an imported model as a checkpoint that training can start from and `ultramem generate` reads."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from megatron_ultramem.checkpoints_convert import shuffles
from megatron_ultramem.checkpoints_convert.megatron_writer import write_checkpoint
from megatron_ultramem.checkpoints_convert.names import FP32
from megatron_ultramem.checkpoints_convert.tensors import Made, Recipe, TensorInfo, TensorReader
from megatron_ultramem.checkpoints_convert.tokenizer_files import Found
from megatron_ultramem.config.load import save_config
from megatron_ultramem.config.schema import Config
from megatron_ultramem.errors import CheckpointError
from megatron_ultramem.training.checkpoint_folder import Record
from megatron_ultramem.training.checksums import complete_sums, sha256

ORIGIN = ("step", "consumed_samples", "consumed_tokens")


@dataclass(frozen=True)
class Import:
    """A model that is to become a checkpoint.

    Attributes:
        config: complete.
        vocab_size: before padding.
        tokenizer: with the place where its file will be.
        recipes: of every tensor of the checkpoint.
        compared: tensors of the source that only had to equal something, and what.
        origin: step, consumed_samples and consumed_tokens of the run that the model comes from.
    """

    config: Config
    vocab_size: int
    tokenizer: Found
    reader: TensorReader
    recipes: Sequence[Recipe]
    compared: Mapping[str, str] = field(default_factory=dict)
    origin: Mapping[str, int] = field(default_factory=lambda: dict.fromkeys(ORIGIN, 0))


def write_model(draft: Path, model: Import, tensors: Sequence[Made], advance: Callable[[int], None]) -> None:
    """Fills the folder `draft`: tensors, tokenizer, settings and record.

    Args:
        advance: told the bytes of every block that has been made.
    """
    from megatron_ultramem.training.checkpoint_state import versions

    write_checkpoint(draft, tensors, advance)
    if (file := model.tokenizer.file) is not None:
        shutil.copyfile(file, draft / file.name)
    save_config(model.config, draft / "config.yaml")
    record = Record(
        step=model.origin["step"],
        consumed_samples=model.origin["consumed_samples"],
        consumed_tokens=model.origin["consumed_tokens"],
        tokenizer=model.tokenizer.tokenizer.identity,
        vocab_size=model.vocab_size,
        layout={"tensor_parallel_size": 1, "pipeline_parallel_size": 1},
        shuffles=shuffles.checksums(model.config),
        versions=versions(),
        saved_at=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        weights_only=True,
    )
    (draft / "run.json").write_text(record.to_json())
    complete_sums(draft, {path.name: sha256(path) for path in draft.glob("*.distcp")})


def precision_of(tensors: Mapping[str, TensorInfo], source: object) -> str:
    """train.precision that holds every number of the source unchanged: bf16 if all that count are, else fp32.

    Some buffers are fp32 in every model. Raises CheckpointError for numbers that neither holds.
    """
    floats = {
        name: info.dtype for name, info in tensors.items() if info.dtype.is_floating_point and not name.endswith(FP32)
    }
    wide = [name for name, dtype in floats.items() if dtype == torch.float64]
    if wide:
        raise CheckpointError(f"{source}: {wide[0]} is of dtype float64; legal: float32, bfloat16, float16")
    return "bf16" if set(floats.values()) <= {torch.bfloat16} else "fp32"
