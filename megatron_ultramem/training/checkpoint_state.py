"""What a checkpoint holds, as Megatron's sharded state dict, and the comparison of a checkpoint with a run.

Beside the sharded tensors (model, optimizer, RNG states) a checkpoint folder has `config.yaml`, the resolved settings,
and `run.json` (`checkpoint_folder.Record`). Shuffle permutations are functions of a seed in the settings: checksums of
them are saved in run.json.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

import megatron.core
import numpy as np
import torch
from megatron.core import dist_checkpointing, parallel_state, tensor_parallel
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import MegatronOptimizer
from torch.distributed.checkpoint.api import CheckpointException

from megatron_ultramem import __version__
from megatron_ultramem.compat import COMMON_STATE
from megatron_ultramem.config.load import walk
from megatron_ultramem.config.schema import Config
from megatron_ultramem.errors import CheckpointError, UserError
from megatron_ultramem.training.checkpoint_folder import Record, is_extra_state, read_config
from megatron_ultramem.training.checkpoint_repairs import padding_kept, share_step
from megatron_ultramem.training.checkpoint_safety import refuse_code

Decision = TypeVar("Decision")

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
    metadata = {
        **MODEL_METADATA,
        **OPTIMIZER_METADATA,
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }
    with padding_kept(optimizer):
        state = {"optimizer": optimizer.sharded_state_dict(dict(model), is_loading=loading, metadata=metadata)}
    if not loading:
        share_step(state["optimizer"])
    if with_rng:
        state["rng"] = _rng_state()
    return state


def restore_rng(state: dict[str, Any]) -> bool:
    """Sets the generators of this rank to a state that `training_state` described. False: it was saved on a GPU and
    this is none, or the other way round; then those that draw dropout stay as they are."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if state["cuda"].shape != torch.cuda.get_rng_state().shape:
        return False
    torch.cuda.set_rng_state(state["cuda"])
    tracker = tensor_parallel.get_cuda_rng_tracker()
    states = tracker.get_states()
    wanted = {name: value for name, value in _shared(state["tracker"]).items() if name in _shared(states)}
    tracker.set_states({**states, **wanted})
    return True


def _shared(states: dict[str, Any]) -> dict[str, Any]:
    """Megatron's generators without those that nothing is drawn from: of expert parameters, which differs between the
    ranks that share a state (parameters have generators of their own); and of graphs of layers, which have no dropout
    (they are no tensors)."""
    expert = tensor_parallel.get_expert_parallel_rng_tracker_name()
    return {name: value for name, value in states.items() if name != expert and isinstance(value, torch.Tensor)}


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
        "tracker": _shared(tensor_parallel.get_cuda_rng_tracker().get_states()),
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


def words(layout: Mapping[str, int]) -> str:
    return ", ".join(f"{name} = {value}" for name, value in layout.items())


# Model settings that change how the model is computed or was drawn, but not what it is.
_FREE = {
    "model.backend",
    "model.hidden_dropout",
    "model.attention_dropout",
    "model.max_sequence_length",
    "model.init_std",
    "model.memory.recompute",
    "model.memory.kernels",
    "model.memory.table_read",
    "model.memory.init",
    "model.memory.balance_loss_coeff",
    "model.memory.tucker_penalty_coeff",
    "model.memory.tucker_penalty_threshold",
    "model.moe.load_balancing",
    "model.moe.aux_loss_coeff",
    "model.moe.z_loss_coeff",
    "model.moe.expert_bias_rate",
    "model.moe.router_dtype",
    "model.moe.dispatcher",
    "model.moe.flex_backend",
    "model.moe.grouped_gemm",
    "model.moe.permute_fusion",
    "model.moe.router_fusion",
    "model.moe.shared_expert_overlap",
    "model.vocab_size",  # run.json has the one that was used
}
# Settings of the data that do not touch the order of samples.
_FREE_DATA = {"data.cache_dir", "data.num_workers"}


def check_same_model(config: Config, folder: Path) -> None:
    """Raises CheckpointError naming every model setting in which the checkpoint differs from this run."""
    saved = read_config(folder)
    different = _differences(config, saved, lambda name: name.startswith("model.") and name not in _FREE)
    if different:
        raise CheckpointError(
            f"checkpoint {folder} is of another model: {'; '.join(different)}; "
            "legal: its settings, or checkpoint.load=none in another train.run_dir"
        )


def check_same_optimizer(config: Config, folder: Path) -> None:
    """Raises CheckpointError if the checkpoint's optimizer state has another form than this run's."""
    names = ("parallel.distributed_optimizer", "train.precision")
    if different := _differences(config, read_config(folder), lambda name: name in names):
        raise CheckpointError(
            f"checkpoint {folder} keeps the optimizer state in another form: {'; '.join(different)}; "
            "legal: its settings, or checkpoint.load_optimizer=false, which loads the weights alone"
        )


def changed_data_order(config: Config, folder: Path) -> list[str]:
    """Settings that decide which samples come next, where they differ from the checkpoint's."""
    return _differences(
        config,
        read_config(folder),
        lambda name: (
            (name.startswith("data.") and name not in _FREE_DATA) or name in ("train.steps", "train.global_batch_size")
        ),
    )


def _differences(config: Config, saved: Config, counts: Callable[[str], bool]) -> list[str]:
    theirs = {name: value for name, value, _ in walk(saved)}
    return [
        f"{name}: checkpoint {theirs.get(name)!r}, config {value!r}"
        for name, value, _ in walk(config)
        if counts(name) and theirs.get(name) != value
    ]


def other_shuffles(folder: Path, record: Record, shuffles: Mapping[str, str]) -> str | None:
    """Says which layers of this rank permute their rows in another way than those of the checkpoint did."""
    wrong = [layer for layer, checksum in shuffles.items() if record.shuffles.get(layer) != checksum]
    if not wrong:
        return None
    return (
        f"checkpoint {folder}: the shuffle permutations of layers {', '.join(wrong)} differ from those it was trained "
        f"with, though model.memory.shuffle_seed is the same; this torch ({torch.__version__}) draws other ones than "
        f"torch {record.versions.get('torch')}, with which it was saved"
    )


def load_sharded(state: dict[str, Any], folder: Path, *, ignore: tuple[str, ...] = ()) -> dict[str, Any]:
    """Loads what `state` describes. Collective.

    Args:
        ignore: beginnings of names that the checkpoint may have and `state` does not ask for.

    Raises:
        CheckpointError: tensors are missing, left over, of another shape, or the files are damaged or would run code.
    """
    failure, loaded = None, {}
    try:
        refuse_code(folder)
        loaded, left_over, missing = dist_checkpointing.load(
            state, str(folder), strict=dist_checkpointing.validation.StrictHandling.RETURN_ALL
        )
        failure = _misfits(
            {key for key in left_over if not key.startswith((*ignore, COMMON_STATE)) and not is_extra_state(key)},
            {key for key in missing if not is_extra_state(key)},
        )
        if failure:
            failure = f"checkpoint {folder} does not fit this run: {failure}"
    except (Exception, CheckpointException) as error:  # a damaged file can make unpickling raise anything
        failure = f"checkpoint {folder} cannot be loaded: {reason(error)}; legal: another one as checkpoint.load"
    raise_alike(failure)
    return loaded


def _misfits(left_over: set[str], missing: set[str]) -> str:
    return "; ".join(
        f"{what} {', '.join(sorted(keys)[:8])}{f' and {len(keys) - 8} more' if len(keys) > 8 else ''}"
        for what, keys in (
            ("the checkpoint has, and this run has not:", left_over),
            ("this run has, and the checkpoint has not:", missing),
        )
        if keys
    )


def reason(error: BaseException) -> str:
    """One line that says what went wrong."""
    if isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]  # of the first rank that failed
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    text = " ".join(text.split()) or type(error).__name__
    # What torch's zip writer says of a full disk.
    return f"a file could not be written to its end; is the disk full? ({text})" if "unexpected pos" in text else text


def raise_alike(failure: str | None) -> None:
    """Raises CheckpointError with the first rank's failure on every rank, if there is one. Collective."""
    failures = all_gather(failure)
    for found in failures:
        if found:
            raise CheckpointError(found)


def merged_over_ranks(mapping: Mapping[str, str]) -> dict[str, str]:
    """The union of every rank's mapping, sorted by number. Collective."""
    merged = {key: value for found in all_gather(dict(mapping)) for key, value in found.items()}
    return dict(sorted(merged.items(), key=lambda item: int(item[0])))


def from_rank_0(decide: Callable[[], Decision]) -> Decision:
    """What rank 0 decides, on every rank; a UserError there is raised on every rank too. Collective."""
    answer: list[Any] = [None, None]
    if torch.distributed.get_rank() == 0:
        try:
            answer[0] = decide()
        except UserError as error:
            answer[1] = error
    torch.distributed.broadcast_object_list(answer, src=0)
    if answer[1] is not None:
        raise answer[1]
    return cast(Decision, answer[0])


def all_gather(value: Any) -> list[Any]:
    """The values of all ranks, in their order. Collective."""
    gathered: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(gathered, value)
    return gathered
