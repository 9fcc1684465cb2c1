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
    # torch: how Megatron from 0.19 on reads what is not sharded, which one rank may well do alone.
    warnings.filterwarnings("ignore", message=".*The argument order of load has been changed.*")
    warnings.filterwarnings("ignore", message=".*assuming the intent is to (load|save) in a single process.*")
    for logger, part in _MESSAGES:
        logging.getLogger(logger).addFilter(
            lambda record, part=part: part not in record.getMessage()  # type: ignore[misc]
        )


# Loggers of Megatron, and a part of what they need not say.
_MESSAGES = (
    # What a checkpoint writer failed with: our CheckpointError says it too.
    ("megatron.core.dist_checkpointing.strategies.filesystem_async", "encountered an error"),
    ("megatron.core.dist_checkpointing.strategies.filesystem_async", "An error is caught while"),
    # Up to 0.17, of every `mlp` class that it does not know, which ours is meant to be.
    ("megatron.core.transformer.transformer_layer", "Unknown MLP type"),
    # From 0.19 on, of what it is used for here, and of what it then computes itself.
    ("megatron.core.models.gpt.gpt_model", "GPTModel IS DEPRECATED"),
    ("megatron.core.dist_checkpointing.strategies.torch", "async save is deprecated"),
    ("megatron.core.dist_checkpointing.strategies.common", "load_common is deprecated"),
    ("megatron.core.distributed.distributed_data_parallel", "full_param_layout not provided"),
)
