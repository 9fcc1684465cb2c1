"""Megatron's DDP, optimizer and scheduler, with the value tables' own learning rate and weight decay."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import (
    MegatronOptimizer,
    OptimizerConfig,
    ParamKey,
    ParamPredicate,
    get_megatron_optimizer,
    get_standard_config_overrides,
)
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_ultramem.config.schema import Config
from megatron_ultramem.model.build import value_pools
from megatron_ultramem.model.transformer_config import dtype_of
from megatron_ultramem.training.checkpoint_repairs import install_adam_checkpoint_fix
from megatron_ultramem.training.memory_hooks import MemoryHooks
from megatron_ultramem.training.offload import offload_tables
from megatron_ultramem.training.optimizer_parts import optimizer_parts


def wrap_chunks(
    config: Config, megatron_config: TransformerConfig, chunks: list[GPTModel]
) -> tuple[list[DistributedDataParallel], list[MemoryHooks]]:
    """Wraps the chunks in Megatron's precision module and DDP, and connects their memory layers with it."""
    p = config.parallel
    ddp_config = DistributedDataParallelConfig(
        use_distributed_optimizer=p.distributed_optimizer,
        overlap_grad_reduce=p.overlap_grad_reduce,
        overlap_param_gather=p.overlap_param_gather,
        grad_reduce_in_fp32=True,
        bucket_size=p.bucket_size,
        fp8_param_gather=config.train.fp8.param_gather,
    )
    wrapped, hooks = [], []
    for number, chunk in enumerate(chunks):
        module: torch.nn.Module = Float16Module(megatron_config, chunk) if megatron_config.bf16 else chunk
        with _stream_of_ddp(config):
            ddp = DistributedDataParallel(megatron_config, ddp_config, module, disable_bucketing=number > 0)
        wrapped.append(ddp)
        hooks.append(MemoryHooks(ddp, chunk, config))
    return wrapped, hooks


@contextmanager
def _stream_of_ddp(config: Config) -> Iterator[None]:
    """DDP ties the parameters' gradient nodes to the stream that it is built on. Where Megatron records layers with
    these nodes, that must not be the default stream, which cannot be recorded."""
    if config.train.cuda_graphs != "layers":
        yield
        return
    stream, outer = torch.cuda.Stream(), torch.cuda.current_stream()
    stream.wait_stream(outer)
    with torch.cuda.stream(stream):
        yield
    outer.wait_stream(stream)


@contextmanager
def whole_parameters(chunks: list[DistributedDataParallel]) -> Iterator[None]:
    """Waits for parameters that are still on their way: gathered while the next forward pass runs, whose hooks it keeps
    out of what is not a training step, or updated by the host. The next forward pass gathers them again: they may have
    been loaded within, and only then does Megatron derive the transposes of weights that are FP8 alone."""
    for pool in value_pools(chunks):
        pool.settle()
    overlapped = [chunk for chunk in chunks if chunk.ddp_config.overlap_param_gather]
    for chunk in overlapped:
        chunk.disable_forward_pre_hook()
    try:
        yield
    finally:
        for chunk in overlapped:
            chunk.enable_forward_pre_hook()
            for group in chunk.bucket_groups + chunk.expert_parallel_bucket_groups:
                group.param_gather_dispatched = False  # as the reduction of gradients leaves it


@torch.no_grad()
def weights_from_masters(chunks: list[DistributedDataParallel], optimizer: MegatronOptimizer) -> None:
    """Makes the weights anew from the distributed optimizer's fp32 masters, as it does at the end of a step. Weights in
    FP8 alone are saved as the bf16 numbers next to them, of which other scales come out. Collective.

    With `parallel.overlap_param_gather`: before the first forward, or within `whole_parameters`."""
    for part in optimizer_parts(optimizer):
        part._copy_main_params_to_model_params()
    for chunk in chunks:
        if not chunk.ddp_config.overlap_param_gather:  # otherwise the next forward gathers
            chunk.start_param_sync()


def build_optimizer(
    config: Config, chunks: list[DistributedDataParallel]
) -> tuple[MegatronOptimizer, OptimizerParamScheduler]:
    """Megatron's AdamW over the wrapped chunks, and the schedule that sets its learning rates."""
    install_adam_checkpoint_fix()
    o, bf16 = config.optimizer, config.train.precision == "bf16"
    optimizer_config = OptimizerConfig(
        optimizer="adam",
        lr=o.lr,
        min_lr=o.lr * config.schedule.min_lr_ratio,
        weight_decay=o.weight_decay,
        adam_beta1=o.beta1,
        adam_beta2=o.beta2,
        adam_eps=o.eps,
        clip_grad=o.clip_grad,
        bf16=bf16,
        params_dtype=dtype_of(config),
        use_distributed_optimizer=config.parallel.distributed_optimizer,
        overlap_param_gather=config.parallel.overlap_param_gather,
        fp8_recipe=None if config.train.fp8.recipe == "none" else config.train.fp8.recipe,
    )
    overrides: dict[ParamKey, Any] = dict(get_standard_config_overrides(optimizer_config))
    value_decay = o.weight_decay if o.value_weight_decay is None else o.value_weight_decay
    tables = ParamPredicate(name="value_table", fn=lambda param: getattr(param, "is_value_table", False))
    overrides[ParamKey(predicate=tables)] = {
        # Megatron tells parameter groups apart by this flag (and others) when it loads a checkpoint.
        "is_decoupled_lr": True,
        "start_wd": value_decay,
        "end_wd": value_decay,
    }
    optimizer = get_megatron_optimizer(optimizer_config, chunks, config_overrides=overrides)
    optimizer = offload_tables(config, optimizer, chunks)
    return optimizer, _build_scheduler(config, optimizer)


class Scheduler(OptimizerParamScheduler):
    """Megatron's schedule, counted in optimizer steps; value tables get a decaying multiple of it, or a fixed rate.

    The multiplier is 1 + (times - 1) * max(0, 1 - step / (max_steps * rate)) (UltraMemV2, section 4.2.9).
    """

    def __init__(
        self, *args: Any, value_lr_times: float, value_lr_steps: float, value_lr: float | None, **kwargs: Any
    ) -> None:
        self.value_lr_times, self.value_lr_steps, self.value_lr = value_lr_times, value_lr_steps, value_lr
        super().__init__(*args, **kwargs)

    def value_multiplier(self) -> float:
        return 1.0 + (self.value_lr_times - 1.0) * max(0.0, 1.0 - self.num_steps / self.value_lr_steps)

    def get_lr(self, param_group: dict[str, Any]) -> float:
        lr: float = super().get_lr(param_group)
        return self._of_tables(lr) if param_group.get("is_decoupled_lr") else lr

    def learning_rates(self) -> tuple[float, float]:
        """Those of ordinary parameters and of value tables at this step."""
        lr: float = super().get_lr({})
        return lr, self._of_tables(lr)

    def _of_tables(self, lr: float) -> float:
        return lr * self.value_multiplier() if self.value_lr is None else self.value_lr


def _build_scheduler(config: Config, optimizer: MegatronOptimizer) -> Scheduler:
    o, s = config.optimizer, config.schedule
    decay_steps = s.decay_steps or config.train.steps
    return Scheduler(
        optimizer,
        init_lr=0.0,
        max_lr=o.lr,
        min_lr=o.lr * s.min_lr_ratio,
        lr_warmup_steps=s.warmup_steps,
        # Megatron wants more decay than warm-up even where the schedule is constant.
        lr_decay_steps=max(decay_steps, s.warmup_steps + 1),
        lr_decay_style="WSD" if s.kind == "wsd" else s.kind,
        start_wd=o.weight_decay,
        end_wd=o.weight_decay,
        wd_incr_steps=0,
        wd_incr_style="constant",
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
        wsd_decay_steps=s.wsd_decay_steps or max(1, decay_steps // 10),
        lr_wsd_decay_style=s.wsd_decay_shape,
        value_lr_times=o.value_lr_times,
        value_lr_steps=config.train.steps * o.value_lr_rate,
        value_lr=o.value_lr,
    )
