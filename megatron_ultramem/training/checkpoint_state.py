"""What a checkpoint holds, as Megatron's sharded state dict, and the comparison of a checkpoint with a run.

Beside the sharded tensors (model, optimizer, RNG states) a checkpoint folder has `config.yaml`, the resolved settings,
and `run.json`: step, position in the data, tokenizer, layout and versions. Shuffle permutations are functions of the
seed in the config and are not saved.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import megatron.core
import numpy as np
import torch
from megatron.core import dist_checkpointing, parallel_state, tensor_parallel
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import MegatronOptimizer

from megatron_ultramem import __version__
from megatron_ultramem.config.load import load_config, walk
from megatron_ultramem.config.schema import Config
from megatron_ultramem.errors import CheckpointError

# Makes the optimizer's state independent of the layout (MegatronCore's own default cannot be saved by it).
OPTIMIZER_METADATA = {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}
MODEL_METADATA = {"non_homogeneous_layers": True, "singleton_local_shards": False}


def model_state(chunks: list[GPTModel]) -> dict[str, Any]:
    """Sharded tensors of this rank's chunks; keys carry global layer and pool numbers, so any layout can read them."""
    metadata = {**MODEL_METADATA, **OPTIMIZER_METADATA}
    return {f"model{number}": chunk.sharded_state_dict(metadata=metadata) for number, chunk in enumerate(chunks)}


def training_state(
    model: dict[str, Any], optimizer: MegatronOptimizer, *, loading: bool, with_rng: bool = True
) -> dict[str, Any]:
    """Optimizer and RNG state to save or to load beside `model` (of `model_state`)."""
    metadata = {**MODEL_METADATA, **OPTIMIZER_METADATA}
    groups = {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
    state = {
        "optimizer": optimizer.sharded_state_dict(dict(model), is_loading=loading, metadata={**metadata, **groups})
    }
    if with_rng:
        state["rng"] = _rng_state()
    return state


def restore_rng(state: dict[str, Any]) -> None:
    """Sets the generators of this rank to a state that `training_state` described."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    torch.cuda.set_rng_state(state["cuda"])
    tensor_parallel.get_cuda_rng_tracker().set_states(state["tracker"])


def _rng_state() -> ShardedObject:
    """Dropout differs between tensor and pipeline ranks alone: data-parallel ranks share one state."""
    tp, pp = parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_pipeline_model_parallel_rank()
    shape = (
        parallel_state.get_pipeline_model_parallel_world_size(),
        parallel_state.get_tensor_model_parallel_world_size(),
    )
    state = {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(),
        "tracker": tensor_parallel.get_cuda_rng_tracker().get_states(),
    }
    return ShardedObject(
        "rng", state, shape, (pp, tp), replica_id=parallel_state.get_data_parallel_rank(with_context_parallel=True)
    )


def layout(config: Config) -> dict[str, int]:
    """What decides whether RNG states fit."""
    p = config.parallel
    return {"tensor_parallel_size": p.tensor_parallel_size, "pipeline_parallel_size": p.pipeline_parallel_size}


def versions() -> dict[str, str]:
    return {"megatron_ultramem": __version__, "megatron_core": megatron.core.__version__, "torch": torch.__version__}


def check_same_model(config: Config, folder: Path) -> None:
    """Raises CheckpointError naming every model setting in which the checkpoint differs from this run."""
    saved = load_config(folder / "config.yaml", check=False)
    # Settings that change how the model is computed but not what it is.
    free = {
        "model.backend",
        "model.hidden_dropout",
        "model.attention_dropout",
        "model.max_sequence_length",
        "model.init_std",
        "model.memory.recompute",
        "model.memory.lookup_backend",
        "model.memory.init",
        "model.memory.balance_loss_coeff",
        "model.memory.tucker_penalty_coeff",
        "model.memory.tucker_penalty_threshold",
        "model.moe.aux_loss_coeff",
        "model.moe.z_loss_coeff",
        "model.moe.dispatcher",
        "model.moe.grouped_gemm",
        "model.vocab_size",
    }
    mine = {name: value for name, value, _ in walk(config) if name.startswith("model.") and name not in free}
    theirs = {name: value for name, value, _ in walk(saved)}
    different = [
        f"{name}: checkpoint {theirs.get(name)!r}, config {value!r}"
        for name, value in mine.items()
        if theirs.get(name) != value
    ]
    if different:
        raise CheckpointError(f"checkpoint {folder} is of another model: " + "; ".join(different))


def load_sharded(state: dict[str, Any], folder: Path, *, whole: bool) -> dict[str, Any]:
    """Loads what `state` describes.

    Args:
        whole: also refuse tensors in the checkpoint that `state` does not ask for.

    Raises:
        CheckpointError: tensors are missing, left over, of another shape, or the files are damaged.
    """
    try:
        loaded, missing, unexpected = dist_checkpointing.load(
            state, str(folder), strict=dist_checkpointing.validation.StrictHandling.RETURN_ALL
        )
    except (CheckpointingException, RuntimeError, ValueError, KeyError, OSError, EOFError) as error:
        reason = str(error).strip().splitlines()
        raise CheckpointError(f"checkpoint {folder} cannot be loaded: {reason[0] if reason else error!r}") from error
    left_over = {key for key in missing if whole or not key.startswith(("optimizer", "chained", "rng"))}
    problems = [
        f"{what}: {', '.join(sorted(keys)[:8])}{' …' if len(keys) > 8 else ''}"
        for what, keys in (
            ("the checkpoint has, this run has not", left_over),
            ("this run has, the checkpoint has not", set(unexpected)),
        )
        if keys
    ]
    if problems:
        raise CheckpointError(f"checkpoint {folder} does not fit this run: " + "; ".join(problems))
    return loaded
