"""The job that layout tests run: a few training steps, and every gradient and parameter by its checkpoint name."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories

from megatron_ultramem.config import load_config
from megatron_ultramem.training.checkpoint_state import model_state
from megatron_ultramem.training.loop import evaluate, train_step
from megatron_ultramem.training.setup import Run, set_up

STEPS = 3  # of the comparisons of layouts
Shards = list[tuple[str, tuple[int, ...], tuple[slice, ...], np.ndarray]]


def train_job(overrides: list[str], steps: int, with_evaluation: bool = False) -> dict[str, Any]:
    """Trains `steps` steps; returns losses, gradient norms, this rank's shards of the first step's gradients before
    clipping and of the parameters after the last step."""
    run = set_up(load_config(None, overrides))
    result: dict[str, Any] = {"losses": [], "grad_norms": []}
    prepare_grads = run.optimizer.prepare_grads

    def prepare_after_capture() -> Any:
        if "grads" not in result:
            result["grads"] = gradients(run)
        return prepare_grads()

    run.optimizer.prepare_grads = prepare_after_capture
    for _ in range(steps):
        metrics = train_step(run)
        result["losses"].append(metrics["loss"])
        result["grad_norms"].append(metrics["grad_norm"])
    if with_evaluation:
        result["valid_loss"] = evaluate(run)
    result["params"] = shards(run)
    return result


def gradients(run: Run) -> Shards:
    """Shards of the reduced gradients, as this rank would save parameters."""
    if run.config.parallel.distributed_optimizer:
        _gather_gradient_buffers(run)
    # Other parameters in their place, and not only other numbers: given numbers of another dtype, a parameter gets a
    # new gradient node, without DDP's hook.
    places = [
        (module, name, param)
        for chunk in run.model
        for module in chunk.modules()
        for name, param in module.named_parameters(recurse=False)
    ]
    for module, name, param in places:
        module._parameters[name] = torch.nn.Parameter(param.main_grad.clone())
        vars(module._parameters[name]).update(vars(param))
    found = shards(run)
    for module, name, param in places:
        module._parameters[name] = param
    return found


def shards(run: Run) -> Shards:
    """(name, global shape, place, numbers) of every parameter shard that this rank would save."""
    state = model_state(run.model)
    apply_factories(state)
    return [
        (shard.key, shard.global_shape, shard.global_slice(), shard.data.detach().float().cpu().numpy().copy())
        for shard in nested_values(state)
        if isinstance(shard, ShardedTensor) and shard.data.is_floating_point()
    ]


def assemble(per_rank: list[Shards]) -> dict[str, np.ndarray]:
    """Full tensors from the shards of all ranks; fails where replicas disagree or a place is left empty."""
    full: dict[str, np.ndarray] = {}
    for key, shape, place, numbers in (shard for found in per_rank for shard in found):
        tensor = full.setdefault(key, np.full(shape, np.nan, dtype=np.float32))
        before = tensor[place]
        numbers = numbers.reshape(before.shape)
        if not np.isnan(before).all():
            np.testing.assert_allclose(numbers, before, rtol=1e-6, atol=1e-7, err_msg=f"replicas of {key} differ")
        tensor[place] = numbers
    for key, tensor in full.items():
        assert not np.isnan(tensor).any(), f"{key} has places that no rank holds"
    return full


def assert_same(actual: dict[str, np.ndarray], expected: dict[str, np.ndarray], tolerance: float) -> None:
    """Equal to round-off: the largest difference is a small part of the tensor's largest element."""
    assert actual.keys() == expected.keys()
    for key, wanted in expected.items():
        scale = np.abs(wanted).max()
        assert np.isfinite(wanted).all()
        worst = np.abs(actual[key] - wanted).max()
        assert worst <= tolerance * scale + 1e-9, f"{key}: differs by {worst:.3g}, its largest element is {scale:.3g}"


def assert_trains_like(expected: dict[str, Any], results: list[dict[str, Any]]) -> None:
    """The results of `train_job` on all ranks of a layout are those of one rank."""
    for result in results:
        np.testing.assert_allclose(result["losses"], expected["losses"], rtol=2e-6)
        np.testing.assert_allclose(result["grad_norms"], expected["grad_norms"], rtol=1e-5)
        np.testing.assert_allclose(result["valid_loss"], expected["valid_loss"], rtol=2e-6)
    for name, tolerance in (("grads", 1e-5), ("params", 2e-4)):
        assert_same(assemble([result[name] for result in results]), assemble([expected[name]]), tolerance)


def _gather_gradient_buffers(run: Run) -> None:
    """With the distributed optimizer a rank holds the reduced gradients of its own part of each bucket alone."""
    for ddp in run.chunks:
        for group in ddp.bucket_groups + ddp.expert_parallel_bucket_groups:
            ranks = group.intra_distributed_optimizer_instance_group
            for bucket in group.buckets:
                part = bucket.grad_data.numel() // ranks.size()
                own = bucket.grad_data.view(ranks.size(), part)[ranks.rank()].clone()
                dist.all_gather_into_tensor(bucket.grad_data, own, group=ranks)
    torch.distributed.barrier()
