"""Silences messages of our dependencies that a user can do nothing about; `ultramem doctor` says what is missing."""

from __future__ import annotations

import logging
import warnings


def quiet_dependencies() -> None:
    """For the command line: call before megatron is imported. A library's user keeps their own filters."""
    # Megatron: one warning per module about Apex and Transformer Engine that are not installed.
    warnings.filterwarnings("ignore", module=r"megatron\.")
    warnings.filterwarnings("ignore", message=".*full scope is deprecated.*")
    warnings.filterwarnings("ignore", message=r".*The \.grad attribute of a Tensor that is not a leaf.*")
    # torch: collectives that Megatron calls by their older names.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed.*")
    # torch: barriers without a device use this process's GPU, which is what we mean.
    warnings.filterwarnings("ignore", message=r".*barrier\(\): using the device under current context.*")
    # Megatron: what a checkpoint writer failed with, which our CheckpointError says too.
    logging.getLogger("megatron.core.dist_checkpointing.strategies.filesystem_async").addFilter(
        lambda record: "encountered an error" not in record.getMessage()
    )
    # Megatron up to 0.17 says so of every `mlp` class that it does not know, which ours is meant to be.
    logging.getLogger("megatron.core.transformer.transformer_layer").addFilter(
        lambda record: "Unknown MLP type" not in record.getMessage()
    )
