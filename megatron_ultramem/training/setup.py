"""Builds everything a training run needs, in the order cheap and refusing first, expensive last."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.core import num_microbatches_calculator as batch_size
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_ultramem.compat import finalize_gradients
from megatron_ultramem.config.schema import Config
from megatron_ultramem.config.validate import validate_world
from megatron_ultramem.errors import ConfigError
from megatron_ultramem.model.build import build_chunks, value_pools
from megatron_ultramem.parallel.placement import ShardedPlacement
from megatron_ultramem.platform import Platform, prepare, resolve_backend, seed_everything, set_deterministic
from megatron_ultramem.redaction import refuse_secrets
from megatron_ultramem.training.anomalies import AnomalyJudge
from megatron_ultramem.training.checkpoint import CheckpointManager, Position
from megatron_ultramem.training.checkpoint_choice import check_wanted
from megatron_ultramem.training.checkpoint_folder import check_writable, checkpoint_dir
from megatron_ultramem.training.data import BatchIterator, build_datasets, check_data, sample_counts
from megatron_ultramem.training.distributed import initialize_distributed, world_size_from_environment
from megatron_ultramem.training.memory_hooks import MemoryHooks
from megatron_ultramem.training.optimizer import Scheduler, build_optimizer, wrap_chunks
from megatron_ultramem.training.profiling import check_device
from megatron_ultramem.training.requests import Requests
from megatron_ultramem.training.spans import EXCHANGE, GRAD_SYNC, Spans
from megatron_ultramem.training.time_budget import TimeBudget
from megatron_ultramem.training.tokenizers import Tokenizer, build_tokenizer
from megatron_ultramem.training.watchdog import Watchdog


@dataclass
class Run:
    """The parts of a training run on this rank, and where it stands."""

    config: Config
    platform: Platform
    tokenizer: Tokenizer
    megatron_config: TransformerConfig
    model: list[GPTModel]
    chunks: list[DistributedDataParallel]
    memory_hooks: list[MemoryHooks]
    optimizer: MegatronOptimizer
    scheduler: Scheduler
    spans: Spans
    checkpoints: CheckpointManager
    train_data: list[BatchIterator]  # one for each model chunk
    valid_data: list[BatchIterator] | None
    watchdog: Watchdog
    judge: AnomalyJudge
    time_budget: TimeBudget
    position: Position = field(default_factory=Position)
    requests: Requests = field(default_factory=Requests)

    @property
    def is_main(self) -> bool:
        """The rank that writes metrics and talks to the terminal."""
        return torch.distributed.get_rank() == 0


def set_up(config: Config, watchdog: Watchdog | None = None) -> Run:
    """Checks everything that can be wrong, then builds process groups, model, optimizer and data, and resumes.

    Args:
        watchdog: begins to watch as soon as there are ranks to be watched; None: nobody watches.

    Raises the errors of `megatron_ultramem.errors`, all of the cheap ones before a process group or a model exists.
    """
    validate_world(config, world_size_from_environment())
    refuse_secrets(config)
    platform = prepare(config.train.device)
    check_device(config.logging, platform)
    backend = resolve_backend(config, platform)
    tokenizer = build_tokenizer(config.data.tokenizer)
    vocab_size = vocabulary(config, tokenizer)
    check_data(config, tokenizer)
    check_writable(Path(config.train.run_dir), "train.run_dir")
    check_writable(checkpoint_dir(config), "checkpoint.dir")
    check_wanted(config, tokenizer=tokenizer.identity, vocab_size=vocab_size)
    if config.train.deterministic:
        set_deterministic()

    initialize_distributed(config, platform)
    seed_everything(config.train.seed)
    train_data, valid_data = _build_data(config, tokenizer, dense_mask=backend == "local")
    if watchdog is not None:
        watchdog.start()
    megatron_config, model = build_chunks(config, vocab_size, backend, platform.device)
    chunks, hooks = wrap_chunks(config, megatron_config, model)
    optimizer, scheduler = build_optimizer(config, chunks)
    spans = Spans(platform.device, nvtx=config.logging.nvtx)
    _connect(config, megatron_config, chunks, optimizer, spans)
    checkpoints = CheckpointManager(
        config, chunks, model, optimizer, scheduler, tokenizer=tokenizer.identity, vocab_size=vocab_size
    )
    run = Run(
        config,
        platform,
        tokenizer,
        megatron_config,
        model,
        chunks,
        hooks,
        optimizer,
        scheduler,
        spans,
        checkpoints,
        train_data,
        valid_data,
        watchdog or Watchdog(config),
        AnomalyJudge(config.faults),
        TimeBudget(config),
    )
    run.position = checkpoints.resume()
    set_batch_size(config, run.position.consumed_samples)
    return run


def vocabulary(config: Config, tokenizer: Tokenizer) -> int:
    """model.vocab_size, or the tokenizer's; raises ConfigError if the tokenizer's ids would not fit."""
    wanted = config.model.vocab_size
    if wanted is not None and wanted < tokenizer.vocab_size:
        raise ConfigError(
            f"model.vocab_size = {wanted} is smaller than the tokenizer's {tokenizer.vocab_size} tokens; "
            "legal: at least that, or null"
        )
    return wanted or tokenizer.vocab_size


def _connect(
    config: Config,
    megatron_config: TransformerConfig,
    chunks: list[DistributedDataParallel],
    optimizer: MegatronOptimizer,
    spans: Spans,
) -> None:
    """Tells Megatron's schedules how to scale the loss, when to synchronise and how to finish the gradients, and
    whatever takes time what to measure it with."""

    def finish_gradients(*args: Any, **kwargs: Any) -> None:
        with spans.measure(GRAD_SYNC):
            finalize_gradients(*args, **kwargs)

    megatron_config.grad_scale_func = optimizer.scale_loss
    megatron_config.finalize_model_grads_func = finish_gradients
    megatron_config.timers = spans
    for pool in value_pools([chunk.module for chunk in chunks]):
        if isinstance(pool.placement, ShardedPlacement):
            pool.placement.traffic.timed = partial(spans.measure, EXCHANGE)
    if config.parallel.overlap_grad_reduce:
        no_sync = [chunk.no_sync for chunk in chunks]
        megatron_config.no_sync_func = no_sync if len(chunks) > 1 else no_sync[0]


def _build_data(
    config: Config, tokenizer: Tokenizer, *, dense_mask: bool
) -> tuple[list[BatchIterator], list[BatchIterator] | None]:
    counts = sample_counts(config)
    datasets = build_datasets(
        config,
        tokenizer,
        train_samples=counts.train,
        valid_samples=counts.valid,
        test_samples=0,
        is_built_on_rank=lambda: True,
    )
    rank, size = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    assert datasets.train is not None

    def iterators(dataset: torch.utils.data.Dataset) -> list[BatchIterator]:
        return [
            BatchIterator(
                dataset,
                config.train.micro_batch_size,
                rank,
                size,
                config.data.num_workers,
                dense_attention_mask=dense_mask,
                wraps="rewind" in (config.faults.on_nonfinite, config.faults.on_spike),
            )
            for _ in range(config.parallel.virtual_pipeline_stages)
        ]

    return iterators(datasets.train), iterators(datasets.valid) if datasets.valid is not None else None


def set_batch_size(config: Config, consumed_samples: int) -> None:
    """Megatron's calculator of micro-batches, with the batch-size ramp-up."""
    batch_size.destroy_num_microbatches_calculator()
    batch_size.init_num_microbatches_calculator(
        torch.distributed.get_rank(),
        config.train.rampup_batch_size or None,
        config.train.global_batch_size,
        config.train.micro_batch_size,
        parallel_state.get_data_parallel_world_size(),
    )
    batch_size.update_num_microbatches(consumed_samples, consistency_check=False)
