"""The jobs of the FP8 tests: a few steps, with what FP8 kept of each layer's projections and what experts got."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.moe.experts import SequentialMLP, TEGroupedMLP

from megatron_ultramem.config import load_config
from megatron_ultramem.model.build import memory_layers
from megatron_ultramem.training.loop import evaluate, micro_batches, train_step
from megatron_ultramem.training.measure import ready
from megatron_ultramem.training.memory_hooks import model_graph
from megatron_ultramem.training.setup import set_up


def _scales(model: list[torch.nn.Module]) -> dict[str, torch.Tensor]:
    """What delayed scaling carries on from step to step, of every module."""
    return {
        f"{number}.{name}.{direction}.{what}": getattr(module.fp8_meta[direction], what).detach().cpu()
        for number, chunk in enumerate(model)
        for name, module in chunk.named_modules()
        for direction in ("scaling_fwd", "scaling_bwd")
        for what in ("scale", "amax_history")
        if hasattr(getattr(module, "fp8_meta", {}).get(direction), what)
    }


def fp8_job(overrides: list[str], steps: int, saves: tuple[int, ...] = ()) -> dict[str, Any]:
    """Trains to `steps` in all, from where checkpoint.load says; saves after each of `saves`.

    Returns losses and gradient norms, the validation loss, parameters (names, and numbers as fp32) and which memory
    projections computed in FP8, by layer.
    """
    run = set_up(load_config(None, overrides))
    result: dict[str, Any] = {"losses": [], "grad_norms": []}
    while run.position.step < steps:
        metrics = train_step(run)
        result["losses"].append(metrics["loss"])
        result["grad_norms"].append(metrics["grad_norm"])
        if run.position.step in saves:
            run.checkpoints.save(run.position)
    run.checkpoints.close()
    result["valid_loss"] = evaluate(run)
    result["in_fp8"] = {
        layer.layer: bool(getattr(layer.query_proj, "fp8", False)) for layer in memory_layers(run.model)
    }
    result["scales"] = _scales(run.model)
    result["params"] = {
        f"{number}.{name}": param.detach().float().cpu().numpy()
        for number, chunk in enumerate(run.model)
        for name, param in chunk.named_parameters()
    }
    return result


def experts_job(overrides: list[str], steps: int) -> dict[str, Any]:
    """Trains; losses, gradient norms, the validation loss, numbers of tokens that experts got, and which of the
    experts' linears computed in FP8, by name."""
    run = set_up(load_config(None, overrides))
    experts = {
        name: module
        for chunk in run.model
        for name, module in chunk.named_modules()
        if isinstance(module, SequentialMLP | TEGroupedMLP)
    }
    tokens: list[int] = []
    for module in experts.values():
        module.register_forward_pre_hook(lambda _, inputs: tokens.extend(inputs[1].tolist()))
    metrics = [train_step(run) for _ in range(steps)]
    return {
        "losses": [one["loss"] for one in metrics],
        "grad_norms": [one["grad_norm"] for one in metrics],
        "valid_loss": evaluate(run),
        "tokens": tokens,
        "in_fp8": {
            f"{name}.{part}": linear.fp8
            for name, module in experts.items()
            for part, linear in module.named_modules()
            if hasattr(linear, "fp8")
        },
    }


def losses_around_a_change(overrides: list[str]) -> list[float]:
    """The losses of three micro-batches of the same data with the whole model as CUDA graphs: the first two of one
    step, with all attention outputs' weights set to zero between them, and the first of the next step."""
    run = set_up(load_config(None, overrides))
    for _ in range(2):
        train_step(run)
    graph = model_graph(run.memory_hooks)
    assert graph is not None and graph.recorded
    batch = next(micro_batches(run.train_data, run.position.consumed_samples, 1)(0))
    names = {"input_ids": "tokens", "position_ids": "position_ids", "labels": "labels"}
    inputs = {name: batch[key].to(run.platform.device) for name, key in names.items()}

    def loss() -> float:
        return float(graph.run(inputs).float().mean())

    ready(run)
    losses = [loss()]
    with torch.no_grad():
        for layer in run.model[0].decoder.layers:
            layer.self_attention.linear_proj.weight.zero_()
    losses.append(loss())
    ready(run)
    return [*losses, loss()]
