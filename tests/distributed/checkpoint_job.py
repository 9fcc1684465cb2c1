"""The jobs that checkpoint tests run on ranks: train, save, resume; and everything that a resume must bring back."""

from __future__ import annotations

import logging
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from megatron.core import tensor_parallel
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories

from megatron_ultramem.config import load_config
from megatron_ultramem.errors import UserError
from megatron_ultramem.training import checkpoint_choice
from megatron_ultramem.training.checkpoint_state import model_state, training_state
from megatron_ultramem.training.loop import evaluate, train_step
from megatron_ultramem.training.optimizer import whole_parameters
from megatron_ultramem.training.setup import Run, set_up


def train_and_save(overrides: list[str], steps: int, saves: tuple[int, ...] = ()) -> dict[str, Any]:
    """Builds a run, which resumes as `checkpoint.load` says, and trains to `steps` in all; saves after each of `saves`.

    Returns losses, learning rates and batch sizes by step, the warnings, and this rank's whole state at the start and
    at the end.
    """
    with captured_warnings() as warnings:
        run = set_up(load_config(None, overrides))
        result: dict[str, Any] = {"steps": {}, "start": state(run), "first_step": run.position.step}
        while run.position.step < steps:
            metrics = train_step(run)
            run.checkpoints.finish()
            result["steps"][run.position.step] = {
                name: metrics[name] for name in ("loss", "lr", "value_lr", "grad_norm", "batch_size", "tokens")
            }
            if run.position.step in saves:
                run.checkpoints.save(run.position)
        run.checkpoints.close()
    return result | {"end": state(run), "warnings": warnings}


def state(run: Run) -> dict[str, Any]:
    """What continues a run: parameters and optimizer state as this rank holds them, and its random states."""
    with whole_parameters(run.chunks):
        pass  # waits for parameters that are still being gathered
    return {
        "params": {
            f"{number}.{name}": tensor.detach().float().numpy().copy()
            for number, chunk in enumerate(run.model)
            for name, tensor in chunk.state_dict().items()
            if isinstance(tensor, torch.Tensor)
        },
        "optimizer": _optimizer_state(run),
        "groups": {
            f"{number}.{name}": np.array(group[name])
            for number, group in enumerate(run.optimizer.param_groups)
            for name in ("lr", "weight_decay", "betas", "eps")
        },
        "rng": {
            "default": torch.get_rng_state().numpy().copy(),
            **{
                name: value.numpy().copy()
                for name, value in tensor_parallel.get_cuda_rng_tracker().get_states().items()
            },
        },
    }


def shards_and_losses(
    overrides: list[str], steps: int, save: bool = False, with_evaluation: bool = False
) -> dict[str, Any]:
    """Builds a run, which resumes as `checkpoint.load` says, and trains to `steps`; saves at the end if asked to.

    Returns losses and this rank's shards of model and optimizer state by checkpoint name, at the start and the end;
    with_evaluation: validation losses there too.
    """
    with captured_warnings() as warnings:
        run = set_up(load_config(None, overrides))
        result: dict[str, Any] = {"start": _shards(run) if run.position.step else [], "losses": []}
        result["first_step"] = run.position.step
        result["valid_losses"] = [evaluate(run)] if with_evaluation else []
        while run.position.step < steps:
            result["losses"].append(train_step(run)["loss"])
        if save:
            run.checkpoints.save(run.position)
        run.checkpoints.close()
        result["valid_losses"] += [evaluate(run)] if with_evaluation else []
    return result | {"end": _shards(run), "device": run.platform.device.type, "warnings": warnings}


def error_of_training(overrides: list[str], steps: int, *, largest_file: int | None = None) -> tuple[str, str, bool]:
    """Trains to `steps` with a checkpoint after each. Returns the class and the message of the error that this ends
    in, and whether it is raised alike on every rank.

    largest_file: bytes that any file may have from then on, as on a full disk.
    """
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        run = set_up(load_config(None, overrides))
        if largest_file is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, before[1]))
        while run.position.step < steps:
            train_step(run)
            run.checkpoints.finish()
            run.checkpoints.save(run.position)
        run.checkpoints.close()
    except UserError as error:
        return type(error).__name__, str(error), error.on_every_rank
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    return "", "", True


@contextmanager
def captured_warnings() -> Iterator[list[str]]:
    warnings: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: warnings.append(record.getMessage())  # type: ignore[method-assign]
    checkpoint_choice.logger.addHandler(handler)
    try:
        yield warnings
    finally:
        checkpoint_choice.logger.removeHandler(handler)


def _shards(run: Run) -> list[tuple[str, tuple[int, ...], tuple[slice, ...], np.ndarray]]:
    with whole_parameters(run.chunks):
        tree: dict[str, Any] = model_state(run.model)
        tree.update(training_state(tree, run.optimizer, loading=False))
    apply_factories(tree)
    return [
        (shard.key, shard.global_shape, shard.global_slice(), shard.data.detach().float().cpu().numpy().copy())
        for shard in nested_values(tree)
        if isinstance(shard, ShardedTensor) and shard.data is not None and shard.data.is_floating_point()
    ]


def _optimizer_state(run: Run) -> dict[str, np.ndarray]:
    found = {}
    for part, optimizer in enumerate(getattr(run.optimizer, "chained_optimizers", [run.optimizer])):
        for group_number, group in enumerate(optimizer.optimizer.param_groups):
            for number, param in enumerate(group["params"]):
                where = f"{part}.{group_number}.{number}"
                found[where] = param.detach().float().numpy().copy()
                for name, value in optimizer.optimizer.state.get(param, {}).items():
                    found[f"{where}.{name}"] = torch.as_tensor(value).float().numpy().copy()
    return found
