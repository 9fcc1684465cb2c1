"""The configuration under which a checkpoint generates: its own model, another layout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from megatron_ultramem.config.load import load_config
from megatron_ultramem.config.schema import Config, Fp8Config, ParallelConfig
from megatron_ultramem.config.validate import validate
from megatron_ultramem.errors import ConfigError
from megatron_ultramem.training.checkpoint_folder import read_config

USED = (
    "data.tokenizer",
    "model.backend",
    "model.max_sequence_length",
    "model.memory.kernels",
    "model.memory.table_read",
    "model.moe.grouped_gemm",
    "parallel.tensor_parallel_size",
    "parallel.timeout_minutes",
    "train.deterministic",
    "train.precision",
)
"""Settings that an override may change; the others belong to the model or to training."""

_SPLITS = ("pipeline_parallel_size", "virtual_pipeline_stages", "context_parallel_size", "expert_parallel_size")


def inference_config(folder: Path, overrides: Sequence[str], world_size: int, device: str) -> Config:
    """The checkpoint's settings with overrides, laid out for generation on `world_size` ranks.

    Tensor parallelism takes all ranks, and sequence parallelism is off: a decoding step has one token, which cannot be
    split. Memory and MoE layers then work on the same tokens on every tensor-parallel rank; a forward pass may do that,
    while training would sum their gradients too often, and is refused.

    Raises:
        CheckpointError: the checkpoint's settings cannot be read.
        ConfigError: an override is not used in generation, or the layout does not fit the model or the ranks.
    """
    for override in overrides:
        _check_used(override.partition("=")[0])
    read_config(folder)  # so that what is wrong with the file is told from what is wrong with the overrides
    saved = load_config(folder / "config.yaml", overrides, check=False)
    named = {override.partition("=")[0] for override in overrides}
    tensor_parallel = world_size
    if "parallel.tensor_parallel_size" in named:
        tensor_parallel = saved.parallel.tensor_parallel_size
    if tensor_parallel != world_size:
        raise ConfigError(
            f"parallel.tensor_parallel_size = {tensor_parallel} on {world_size} ranks: generation splits the model "
            f"over all ranks; legal: {world_size}, or --ranks {tensor_parallel}"
        )
    config = replace(
        saved,
        parallel=ParallelConfig(
            tensor_parallel_size=tensor_parallel,
            sequence_parallel=False,
            timeout_minutes=saved.parallel.timeout_minutes,
        ),
        # What training may have had of a faster machine.
        model=replace(
            saved.model,
            moe=replace(
                saved.model.moe,
                dispatcher="alltoall",
                permute_fusion=None,
                router_fusion=False,
                shared_expert_overlap=False,
            ),
        ),
        # Documents are masked off from each other in training batches; a prompt is one document.
        data=replace(saved.data, mask_document_boundaries=False),
        checkpoint=replace(saved.checkpoint, load_optimizer=False),
        train=replace(
            saved.train,
            device=device,
            recompute="none",
            cuda_graphs="none",
            micro_batch_size=1,
            rampup_batch_size=[],
            # A decoding step has few tokens: FP8 would pad them to 16 and gain nothing.
            fp8=Fp8Config(),
            cross_entropy="megatron",
            fused_weight_gradients=False,
        ),
    )
    validate(config, training=False)
    return config


def _check_used(name: str) -> None:
    if name in (f"parallel.{split}" for split in _SPLITS):
        raise ConfigError(
            f"{name} is fixed at 1 in generation, whatever the checkpoint was trained with; legal: "
            "parallel.tensor_parallel_size to split the model"
        )
    if not any(name == used or name.startswith(used + ".") for used in USED):
        raise ConfigError(f"{name} cannot be set in generation; legal: {', '.join(USED)}")
