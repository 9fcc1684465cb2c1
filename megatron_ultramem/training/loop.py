"""The training loop: read `train`, then `train_step`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import torch
from megatron.core import num_microbatches_calculator as batch_size
from megatron.core import parallel_state

from megatron_ultramem.compat import forget_moe_losses
from megatron_ultramem.config.load import save_config
from megatron_ultramem.config.schema import Config
from megatron_ultramem.planning.devices import peak_bf16_flops
from megatron_ultramem.planning.flops import flops_per_token
from megatron_ultramem.training.anomalies import meet, rewind
from megatron_ultramem.training.data import BatchIterator
from megatron_ultramem.training.distributed import destroy_distributed
from megatron_ultramem.training.garbage import collected_every
from megatron_ultramem.training.memory_health import MemoryHealthProbe
from megatron_ultramem.training.memory_hooks import begin_step, end_step, forget_step, model_graph
from megatron_ultramem.training.metrics import MetricsLogger
from megatron_ultramem.training.moe_metrics import moe_metrics
from megatron_ultramem.training.optimizer import whole_parameters
from megatron_ultramem.training.profiling import Profiler
from megatron_ultramem.training.progress import Progress
from megatron_ultramem.training.rank_log import RankLog, rank_log
from megatron_ultramem.training.requests import hold_back_stop_signal
from megatron_ultramem.training.restarts import restart_count
from megatron_ultramem.training.setup import Run, set_up
from megatron_ultramem.training.spans import OPTIMIZER
from megatron_ultramem.training.step import forward_backward
from megatron_ultramem.training.stragglers import FILE as RANK_TIMES
from megatron_ultramem.training.stragglers import Stragglers
from megatron_ultramem.training.throughput import Throughput, peak_memory_gib
from megatron_ultramem.training.update import gradient_norm, update
from megatron_ultramem.training.watchdog import Watchdog

Metrics = dict[str, float]


def train(config: Config) -> int:
    """Trains to `train.steps`, resuming where the last checkpoint left off. Call on every rank.

    Returns the exit status of the process: 0, or 143 where a SIGTERM ended the run early (see `requests.py`).
    """
    hold_back_stop_signal()
    try:
        with rank_log(config) as log, Watchdog(config) as watchdog:
            run = set_up(config, watchdog)
            with run.requests.listening(Path(config.train.run_dir) if run.is_main else None):
                return _train(run, log)
    finally:
        destroy_distributed()


def _train(run: Run, log: RankLog) -> int:
    config, requests = run.config, run.requests
    run_dir = Path(config.train.run_dir)
    last_step = config.train.steps
    if config.train.exit_after_steps is not None:
        last_step = min(last_step, run.position.step + config.train.exit_after_steps)
    if run.is_main:
        save_config(config, run_dir / "config.yaml")
    logger = MetricsLogger(config, start_step=run.position.step, enabled=run.is_main)
    progress = Progress(config.train.steps, run.position.step, enabled=run.is_main, live=config.logging.progress)
    clock = _throughput(run)
    probe = MemoryHealthProbe(run.model)
    stragglers = Stragglers(
        run.spans,
        run.platform.device,
        config.logging.straggler_interval,
        run_dir / RANK_TIMES if run.is_main else None,
        exchange_in_graphs=config.train.cuda_graphs != "none" and config.parallel.memory_parallel_size > 1,
    )
    profiler = _profiler(run)
    with progress, closing(logger), closing(profiler), collected_every(config.train.gc_interval) as collect:
        progress.message(_opening(run))
        if run.position.step >= last_step:
            progress.message(f"nothing left to do: train.steps = {config.train.steps}")
        while run.position.step < last_step and not requests.stop:
            log.step = step = run.position.step + 1
            log_due = _due(step, config.logging.interval, last_step)
            health_due = _due(step, config.logging.memory_health_interval)

            run.watchdog.progress(step, "training")
            clock.begin_step()
            with probe.watch(health_due), profiler.step(step), run.spans.step():
                metrics = train_step(run)
                collect(step)
            clock.end_step(int(metrics["tokens_in_step"]))
            if (end := run.time_budget.last_step) is not None and end < last_step:
                last_step = end
                progress.message(f"step {step}: the learning rate decays from here on; the run ends at step {end}")
            run.checkpoints.finish()
            if run.judge.wants_rewind:
                went_back = rewind(run)
                logger.rewind(run.position.step)
                logger.log(run.position.step, went_back)
                progress.message(f"step {step}: back to step {run.position.step}, as {run.judge.last}")
                continue

            if log_due:
                metrics |= clock.read() | stragglers.read() | {"memory_gib": peak_memory_gib(run.platform.device)}
                metrics |= moe_metrics(run, batch_size.get_num_microbatches())
            if stragglers.interval and _due(step, stragglers.interval, last_step):
                progress.message(f"step {step}: {stragglers.report(step)}")
            if health_due:
                clock.pause()
                metrics |= _memory_health(probe)
            if run.valid_data is not None and _due(step, config.train.eval_interval, last_step):
                clock.pause()
                metrics["valid_loss"] = evaluate(run)
                progress.message(f"step {step}: validation loss {metrics['valid_loss']:.4f}")
            if metrics["skipped"]:
                progress.message(f"step {step}: skipped, as {run.judge.last}")
            if log_due or health_due or metrics["skipped"] or "valid_loss" in metrics:
                logger.log(step, metrics)
            progress.update(step, metrics if log_due else None)
            if _due(step, config.checkpoint.interval, last_step) or requests.stop:
                clock.pause()
                run.watchdog.progress(step, "saving")
                progress.message(f"step {step}: saving {run.checkpoints.save(run.position)}")
        run.checkpoints.close()
        if not requests.stop or run.position.step >= config.train.steps:
            return 0
        progress.message(f"step {run.position.step}: stopped by {requests.reason}; start the run again to go on")
        return requests.exit_status


def train_step(run: Run) -> Metrics:
    """One optimizer step; nothing is updated if its loss or its gradient is wrong (see `anomalies.py`)."""
    begin_step(run.memory_hooks)
    forget_moe_losses(in_place=run.config.train.cuda_graphs == "layers")
    for chunk in run.chunks:
        chunk.zero_grad_buffer()
    run.optimizer.zero_grad()

    batch_size.update_num_microbatches(run.position.consumed_samples, consistency_check=True)
    num_microbatches = batch_size.get_num_microbatches()
    totals = forward_backward(
        run.config,
        run.megatron_config,
        run.chunks,
        run.spans.loading(micro_batches(run.train_data, run.position.consumed_samples, num_microbatches)),
        num_microbatches,
        run.platform.device,
        flags=[run.time_budget.flag(), *run.requests.flags()],
        graph=model_graph(run.memory_hooks),
    )
    loss_sum, tokens, out_of_time, *flags = totals.all_ranks.tolist()  # the one wait for the device in a step
    run.requests.agree(flags)
    loss = loss_sum / max(tokens, 1.0)
    run.scheduler.step(1)
    with run.spans.measure(OPTIMIZER):
        grad_norm = gradient_norm(run.optimizer)
        anomaly = run.judge.look(loss, grad_norm, run.position.recent_losses)
        if anomaly is None:
            update(run.optimizer, grad_norm, run.config.optimizer.clip_grad)
            end_step(run.memory_hooks)
        else:
            meet(run, anomaly, totals)
            forget_step(run.memory_hooks)

    samples = batch_size.get_current_global_batch_size()
    run.position.step += 1
    run.position.consumed_samples += samples
    run.position.consumed_tokens += samples * run.config.data.sequence_length
    run.time_budget.end_step(run.position.step, out_of_time, run.scheduler)
    lr, value_lr = run.scheduler.learning_rates()
    return {
        "loss": loss,
        "lr": lr,
        "value_lr": value_lr,
        "grad_norm": grad_norm,
        "skipped": 0.0 if anomaly is None else 1.0,
        **({} if anomaly is None else {f"anomaly/{anomaly.kind}": 1.0}),
        "tokens": float(run.position.consumed_tokens),
        "tokens_in_step": float(samples * run.config.data.sequence_length),
        "batch_size": float(samples),
    }


@torch.no_grad()
def evaluate(run: Run) -> float:
    """Mean loss per token in nats over the first eval_steps global batches of the validation split: always the same."""
    assert run.valid_data is not None
    data, config = run.valid_data, run.config
    per_step = config.train.global_batch_size
    num_microbatches = per_step // (config.train.micro_batch_size * parallel_state.get_data_parallel_world_size())
    totals = torch.zeros(2, dtype=torch.float64, device=run.platform.device)
    with whole_parameters(run.chunks):
        for chunk in run.chunks:
            chunk.eval()
        for index in range(config.train.eval_steps):
            run.watchdog.progress(run.position.step, "evaluating")
            totals += forward_backward(
                config,
                run.megatron_config,
                run.chunks,
                micro_batches(data, index * per_step, num_microbatches),
                num_microbatches,
                run.platform.device,
                forward_only=True,
            ).all_ranks
        for chunk in run.chunks:
            chunk.train()
    loss_sum, tokens = totals.tolist()
    return float(loss_sum / max(tokens, 1.0))


def micro_batches(
    iterators: list[BatchIterator], consumed_samples: int, count: int
) -> Callable[[int], Iterator[dict[str, torch.Tensor]]]:
    """The next `count` micro-batches, for each model chunk from its own iterator."""
    return lambda chunk: iterators[chunk].step(consumed_samples, count)


def _memory_health(probe: MemoryHealthProbe) -> Metrics:
    return probe.collect(
        data_groups=[
            parallel_state.get_data_parallel_group(with_context_parallel=True),
            parallel_state.get_tensor_model_parallel_group(),
        ],
        pipeline_group=parallel_state.get_pipeline_model_parallel_group(),
    )


def _due(step: int, interval: int, last_step: int | None = None) -> bool:
    return step == last_step or bool(interval and step % interval == 0)


def _profiler(run: Run) -> Profiler:
    rank, run_dir = torch.distributed.get_rank(), Path(run.config.train.run_dir)
    return Profiler(run.config.logging, run_dir, run.requests, run.spans, rank=rank, device=run.platform.device)


def _throughput(run: Run) -> Throughput:
    config, device = run.config, run.platform.device
    flops = flops_per_token(config.model, run.checkpoints.vocab_size, config.data.sequence_length).training
    peak = peak_bf16_flops(torch.cuda.get_device_name(device)) if run.platform.is_cuda else None
    return Throughput(flops_per_token=flops, devices=torch.distributed.get_world_size(), peak_flops=peak, device=device)


def _opening(run: Run) -> str:
    p = run.config.parallel
    where = f"resuming after step {run.position.step}" if run.position.step else "starting"
    restarted = f"restart {restart_count()}: " if restart_count() else ""
    return (
        f"{restarted}{where} in {run.config.train.run_dir}: {torch.distributed.get_world_size()} ranks on "
        f"{run.platform.device.type} (TP {p.tensor_parallel_size}, PP {p.pipeline_parallel_size}, DP "
        f"{parallel_state.get_data_parallel_world_size()}), {run.config.train.precision}"
    )
