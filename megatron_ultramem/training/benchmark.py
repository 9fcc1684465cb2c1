"""Measures a training run: what `tools/bench_training.py` writes down."""

from __future__ import annotations

import gc

import torch
from megatron.core import parallel_state

from megatron_ultramem.config.schema import Config
from megatron_ultramem.planning.devices import peak_bf16_flops
from megatron_ultramem.planning.flops import flops_per_token
from megatron_ultramem.results import Row
from megatron_ultramem.training.distributed import destroy_distributed
from megatron_ultramem.training.graph_recording import release_all
from megatron_ultramem.training.host_waits import host_waits
from megatron_ultramem.training.loop import train_step
from megatron_ultramem.training.measure import covered_ms, forward_backward_only, median_seconds, trace
from megatron_ultramem.training.setup import Run, set_batch_size, set_up
from megatron_ultramem.training.time_split import time_split

MICRO_BATCHES = 8  # per measured optimizer step
MEASURED_STEPS = 3


def measure(config: Config, case: str, steps: int, *, whole: bool = True) -> list[Row]:
    """Rows of a configuration, trained for `steps` steps; empty on all ranks but the first. Changes
    train.global_batch_size.

    whole: losses and the profiler's figures too; otherwise speed and memory alone.
    """
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    run = set_up(config)
    try:
        losses, norms = _train(run, steps)
        rows = _speed(run, case)
        if whole:
            rows += [
                Row(case, f"loss_step_{step}", losses[step - 1], "nats/token")
                for step in sorted({1, steps, *range(10, steps, 10)})
            ]
            rows.append(Row(case, "grad_norm_last", norms[-1], ""))
        if run.platform.is_cuda:
            busy = covered_ms(trace(run, lambda: forward_backward_only(run, 1)))
            rows.append(Row(case, "gpu_busy_ms", busy, "ms per micro-batch"))
            if whole:
                rows += _profile(run, case)
        return rows if run.is_main else []
    finally:
        let_go(run)


def steps_measured(micro_batches: int) -> int:
    """Steps of so many micro-batches whose data `measure` reads beyond those of the training."""
    return -(-(MEASURED_STEPS + 1) * MICRO_BATCHES // micro_batches)


def _train(run: Run, steps: int) -> tuple[list[float], list[float]]:
    losses, norms = [], []
    for step in range(steps):
        metrics = train_step(run)
        losses.append(metrics["loss"])
        norms.append(metrics["grad_norm"])
        if run.is_main and (step + 1) % 10 == 0:
            print(f"step {step + 1}: loss {losses[-1]:.4f}", flush=True)
    return losses, norms


def _speed(run: Run, case: str) -> list[Row]:
    config = run.config
    _take_micro_batches(run, MICRO_BATCHES)
    tokens = config.train.global_batch_size * config.data.sequence_length
    step_seconds = median_seconds(run, lambda: train_step(run), MEASURED_STEPS)
    peak = torch.cuda.max_memory_allocated() / 2**30 if run.platform.is_cuda else 0.0
    count = MICRO_BATCHES // _data_parallel_size()
    seconds = median_seconds(run, lambda: forward_backward_only(run, count), MEASURED_STEPS)
    flops = flops_per_token(config.model, run.checkpoints.vocab_size, config.data.sequence_length).training
    reached = tokens / seconds * flops / torch.distributed.get_world_size()
    rows = [
        Row(case, "tokens_per_s", tokens / seconds, "tokens/s"),
        Row(case, "tokens_per_s_with_optimizer", tokens / step_seconds, "tokens/s"),
        Row(case, "tflops", reached / 1e12, "TFLOP/s per GPU"),
        Row(case, "peak_gib", peak, "GiB"),
        Row(case, "step_ms", step_seconds * 1e3, "ms"),
    ]
    if run.is_main:
        print(f"{case}: {tokens / seconds:,.0f} tokens/s, {tokens / step_seconds:,.0f} with optimizer", flush=True)
    possible = peak_bf16_flops(torch.cuda.get_device_name()) if run.platform.is_cuda else None
    if possible is not None:
        rows.append(Row(case, "mfu", 100.0 * reached / possible, "% of the bf16 peak"))
    return rows


def _profile(run: Run, case: str) -> list[Row]:
    waits = host_waits(run)
    for wait, times in waits.items() if run.is_main else ():
        print(f"the host waits {times} times: {wait}", flush=True)
    release_all()  # what is recorded has no launches to tell apart
    _take_micro_batches(run, 1)
    forward_backward_only(run, 1)
    milliseconds = time_split(run)
    return [
        Row(case, "host_waits", waits.total(), "over two micro-batches"),
        *(
            Row(
                case, f"{name}_ms", value, "ms per step" if name in ("optimizer", "grad_sync") else "ms per micro-batch"
            )
            for name, value in milliseconds.items()
        ),
    ]


def _take_micro_batches(run: Run, count: int) -> None:
    """Of all ranks together; at least one each."""
    count = max(count, _data_parallel_size())
    run.config.train.global_batch_size = run.config.train.micro_batch_size * count
    set_batch_size(run.config, run.position.consumed_samples)


def _data_parallel_size() -> int:
    return int(parallel_state.get_data_parallel_world_size())


def let_go(run: Run) -> None:
    """Ends the groups and frees the model: Megatron's DDP, its gradient hooks and the optimizer hold each other through
    C++, where Python's garbage collector does not see it."""
    destroy_distributed()
    for chunk in run.chunks:
        chunk.grad_accs.clear()
    run.megatron_config.grad_scale_func = run.megatron_config.no_sync_func = None
    for name in list(vars(run)):
        delattr(run, name)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
