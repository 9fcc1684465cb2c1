"""Whether two runs have saved the same."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch

from megatron_ultramem.training.checkpoint_safety import refuse_code
from megatron_ultramem.training.checksums import SUMS_FILE, find_damage


def differences(checkpoint: Path, reference: Path) -> list[str]:
    """Names of the tensors (parameters and optimizer state) in which two checkpoints differ by a bit, or which one of
    them lacks."""
    ours, theirs = _tensors(checkpoint), _tensors(reference)
    return sorted(
        name for name in ours.keys() | theirs.keys()
        if name not in ours or name not in theirs or not _same(ours[name], theirs[name])
    )  # fmt: skip


def damage(checkpoint: Path) -> str | None:
    """What is wrong with the files of a checkpoint."""
    return find_damage(checkpoint) if (checkpoint / SUMS_FILE).exists() else f"{SUMS_FILE} is missing"


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.numpy().tobytes() == b.numpy().tobytes()


def _tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    refuse_code(checkpoint)  # all that follows would run it
    with tempfile.TemporaryDirectory() as folder:
        dcp_to_torch_save(checkpoint, Path(folder) / "whole.pt")
        whole: dict[str, Any] = torch.load(Path(folder) / "whole.pt", weights_only=False)  # our own
    return dict(_flat("", whole))


def _flat(name: str, value: Any) -> list[tuple[str, torch.Tensor]]:
    if isinstance(value, torch.Tensor):
        return [(name, value)]
    if isinstance(value, dict):
        return [leaf for key, inner in value.items() for leaf in _flat(f"{name}/{key}", inner)]
    return []
