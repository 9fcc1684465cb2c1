"""Checks that involve several settings: run before a process group or a model exists."""

from __future__ import annotations

import re

from megatron_ultramem.config.schema import Config
from megatron_ultramem.config.validate_blocks import validate_blocks
from megatron_ultramem.config.validate_faults import validate_faults
from megatron_ultramem.config.validate_fp8 import validate_fp8
from megatron_ultramem.config.validate_graphs import validate_cuda_graphs
from megatron_ultramem.config.validate_memory import expert_group_size, validate_memory_parallel
from megatron_ultramem.config.validate_moe import validate_moe
from megatron_ultramem.errors import ConfigError
from megatron_ultramem.memory.geometry import Pool, parse_layers, plan_pools


def validate(config: Config, *, training: bool = True) -> None:
    """Raises ConfigError for the first illegal combination that does not depend on the number of ranks.

    Without `training` (inference), what only gradients need is not asked for.
    """
    _validate_model(config)
    validate_moe(config)
    _validate_parallel(config, training)
    validate_blocks(config, stage_of_layer(config))
    _validate_pools(config)
    validate_memory_parallel(config)
    validate_fp8(config)
    validate_cuda_graphs(config)
    _validate_batches(config)
    _validate_rest(config)
    validate_faults(config)


def validate_world(config: Config, world_size: int) -> int:
    """Checks the layout against the number of ranks; returns the data-parallel size."""
    p = config.parallel
    model_ranks = p.tensor_parallel_size * p.pipeline_parallel_size * p.context_parallel_size
    if world_size % model_ranks:
        raise ConfigError(
            f"{world_size} ranks cannot be divided by parallel.tensor_parallel_size = {p.tensor_parallel_size} x "
            f"pipeline_parallel_size = {p.pipeline_parallel_size} x context_parallel_size = {p.context_parallel_size} "
            f"= {model_ranks}; legal: a multiple of {model_ranks} ranks"
        )
    data_parallel = world_size // model_ranks
    expert_ranks = world_size // p.pipeline_parallel_size
    if expert_ranks % expert_group_size(config):
        name = "memory_parallel_size" if p.memory_parallel_size > 1 else "expert_parallel_size"
        raise ConfigError(
            f"parallel.{name} = {expert_group_size(config)} does not divide the {expert_ranks} ranks of a pipeline "
            f"stage; legal: a divisor of {expert_ranks}"
        )
    samples = config.train.micro_batch_size * data_parallel
    for setting, value in batch_sizes(config):
        if value % samples:
            raise ConfigError(
                f"{setting} = {value} is not a multiple of train.micro_batch_size = {config.train.micro_batch_size} x "
                f"{data_parallel} data-parallel ranks; legal: a multiple of {samples}"
            )
        if p.virtual_pipeline_stages > 1 and value // samples % p.pipeline_parallel_size:
            raise ConfigError(
                f"{setting} = {value} gives {value // samples} micro-batches, which the interleaved schedule cannot "
                f"spread over parallel.pipeline_parallel_size = {p.pipeline_parallel_size}; legal: a multiple of "
                f"{samples * p.pipeline_parallel_size}"
            )
    return data_parallel


def batch_sizes(config: Config) -> list[tuple[str, int]]:
    """The global batch sizes a run can meet, with the settings they come from."""
    sizes = [("train.global_batch_size", config.train.global_batch_size)]
    if config.train.rampup_batch_size:
        start, increment, _ = config.train.rampup_batch_size
        sizes += [("train.rampup_batch_size[0]", start), ("train.rampup_batch_size[1]", increment)]
    return sizes


def stage_of_layer(config: Config) -> list[tuple[int, int]]:
    """For every layer its (pipeline stage, model chunk on that stage), as Megatron's schedules place them."""
    p = config.parallel
    per_chunk = config.model.num_layers // (p.pipeline_parallel_size * p.virtual_pipeline_stages)
    return [
        (layer // per_chunk % p.pipeline_parallel_size, layer // per_chunk // p.pipeline_parallel_size)
        for layer in range(config.model.num_layers)
    ]


def _validate_model(config: Config) -> None:
    m = config.model
    if m.head_dim is None and m.hidden_size % m.num_attention_heads:
        raise ConfigError(
            f"model.num_attention_heads = {m.num_attention_heads} does not divide model.hidden_size = "
            f"{m.hidden_size}; legal: a divisor, or set model.head_dim"
        )
    if (m.head_dim or m.hidden_size // m.num_attention_heads) % 2:
        raise ConfigError(
            f"model.head_dim = {m.head_dim or m.hidden_size // m.num_attention_heads} is odd; rotary "
            f"embeddings need an even head width"
        )
    if m.qk_norm_width == "all_heads" and not m.qk_norm:
        raise ConfigError("model.qk_norm_width = all_heads would be ignored by model.qk_norm = false; legal: head")
    if m.memory.keep_shuffle and not m.memory.shuffle:
        raise ConfigError(
            "model.memory.keep_shuffle = true without a shuffle (model.memory.shuffle = false) would be ignored; "
            "legal: false"
        )
    groups = m.num_query_groups or m.num_attention_heads
    if m.num_attention_heads % groups:
        raise ConfigError(
            f"model.num_query_groups = {groups} does not divide model.num_attention_heads = "
            f"{m.num_attention_heads}; legal: a divisor"
        )
    if config.data.sequence_length > m.max_sequence_length:
        raise ConfigError(
            f"data.sequence_length = {config.data.sequence_length} exceeds model.max_sequence_length = "
            f"{m.max_sequence_length}; legal: at most that"
        )


def _validate_parallel(config: Config, training: bool) -> None:
    p, m = config.parallel, config.model
    tp, pp, vp, cp = (
        p.tensor_parallel_size,
        p.pipeline_parallel_size,
        p.virtual_pipeline_stages,
        p.context_parallel_size,
    )
    groups = m.num_query_groups or m.num_attention_heads
    for setting, value in (
        ("model.num_attention_heads", m.num_attention_heads),
        ("model.num_query_groups", groups),
        ("model.ffn_hidden_size", m.ffn_hidden_size),
        ("model.vocab_size_multiple", m.vocab_size_multiple),
    ):
        if value % tp:
            raise ConfigError(
                f"parallel.tensor_parallel_size = {tp} does not divide {setting} = {value}; legal: a divisor of it"
            )
    sequence_parallel = tp > 1 if p.sequence_parallel is None else p.sequence_parallel
    memory = parse_layers(m.memory.layers, m.num_layers, "model.memory.layers")
    moe = parse_layers(m.moe.layers, m.num_layers, "model.moe.layers")
    if sequence_parallel and tp == 1:
        raise ConfigError(
            "parallel.sequence_parallel = true needs parallel.tensor_parallel_size above 1; legal: false or null"
        )
    if training and tp > 1 and not sequence_parallel and (memory or moe):
        raise ConfigError(
            "parallel.sequence_parallel = false with parallel.tensor_parallel_size = "
            f"{tp}: memory and MoE layers need every rank to hold its own tokens; legal: true or null"
        )
    if sequence_parallel and config.data.sequence_length % (tp * cp):
        raise ConfigError(
            f"data.sequence_length = {config.data.sequence_length} is not a multiple of "
            f"tensor_parallel_size x context_parallel_size = {tp * cp}, over which the sequence is split"
        )
    if cp > 1 and config.data.sequence_length % (2 * cp):
        raise ConfigError(
            f"data.sequence_length = {config.data.sequence_length} is not a multiple of 2 x "
            f"parallel.context_parallel_size = {2 * cp}"
        )
    if cp > 1 and config.data.mask_document_boundaries:
        raise ConfigError(
            "data.mask_document_boundaries = true is not supported with "
            f"parallel.context_parallel_size = {cp}; legal: false, or context_parallel_size = 1"
        )
    if cp > 1 and m.memory.balance_loss_coeff > 0 and memory:
        raise ConfigError(
            f"model.memory.balance_loss_coeff = {m.memory.balance_loss_coeff} with parallel.context_parallel_size = "
            f"{cp}: each rank would balance its own part of a sequence; legal: 0, or context_parallel_size = 1"
        )
    if config.data.reset_position_ids and not config.data.mask_document_boundaries:
        raise ConfigError(
            "data.reset_position_ids = true without data.mask_document_boundaries = true would be ignored: rotary "
            "positions are relative; legal: both, or false"
        )
    if cp > 1 and m.backend == "local":
        raise ConfigError(
            f"parallel.context_parallel_size = {cp} needs Transformer Engine; model.backend = local has "
            "none; legal: context_parallel_size = 1, or backend transformer_engine"
        )
    if vp > 1 and pp == 1:
        raise ConfigError(f"parallel.virtual_pipeline_stages = {vp} needs parallel.pipeline_parallel_size above 1")
    if vp > 1 and pp == 2 and not p.overlap_p2p:
        raise ConfigError(
            "parallel.virtual_pipeline_stages above 1 with parallel.pipeline_parallel_size = 2 and "
            "parallel.overlap_p2p = false: Megatron-Core computes a wrong loss there without saying so; legal: "
            "parallel.overlap_p2p=true, or virtual_pipeline_stages = 1"
        )
    if m.num_layers % (pp * vp):
        raise ConfigError(
            f"model.num_layers = {m.num_layers} cannot be split evenly over pipeline_parallel_size x "
            f"virtual_pipeline_stages = {pp} x {vp} = {pp * vp}; legal: a multiple of {pp * vp}"
        )
    if p.expert_parallel_size > 1 and not moe:
        raise ConfigError(
            f"parallel.expert_parallel_size = {p.expert_parallel_size} without MoE layers "
            "(model.moe.layers = none) would be ignored; legal: 1"
        )
    if p.overlap_param_gather and not (p.distributed_optimizer and p.overlap_grad_reduce):
        raise ConfigError(
            "parallel.overlap_param_gather = true needs parallel.distributed_optimizer = true and "
            "parallel.overlap_grad_reduce = true"
        )


def _validate_pools(config: Config) -> None:
    stages = stage_of_layer(config)
    for pool in plan_pools(config.model):
        refuse_split_pool(config, pool, stages)


def refuse_split_pool(config: Config, pool: Pool, stages: list[tuple[int, int]]) -> None:
    """Raises if the layers of a pool lie on more than one (pipeline stage, model chunk)."""
    homes = sorted({stages[layer] for layer in pool.layers})
    if len(homes) > 1:
        p = config.parallel
        per_chunk = config.model.num_layers // (p.pipeline_parallel_size * p.virtual_pipeline_stages)
        raise ConfigError(
            f"parallel.pipeline_parallel_size = {p.pipeline_parallel_size} with virtual_pipeline_stages = "
            f"{p.virtual_pipeline_stages} puts {per_chunk} layers on a stage and would split pool {pool.index} of "
            f"{len(pool.layers)} memory layers ({pool.layers[0]} to {pool.layers[-1]}) over {len(homes)} stages; "
            "legal: a layout whose stages hold whole pools, or a smaller model.memory.pool_size (another model)"
        )


def _validate_batches(config: Config) -> None:
    ramp = config.train.rampup_batch_size
    if ramp:
        if len(ramp) != 3 or min(ramp) < 1:
            raise ConfigError(f"train.rampup_batch_size = {ramp}: legal: [start, increment, samples], all positive")
        start, increment, _ = ramp
        if start > config.train.global_batch_size or (config.train.global_batch_size - start) % increment:
            raise ConfigError(
                f"train.rampup_batch_size = {ramp}: cannot reach train.global_batch_size = "
                f"{config.train.global_batch_size} from {start} in steps of {increment}"
            )


def parse_steps(steps: str) -> range:
    """logging.profile_steps, '100-104' or '100', as a range; raises ConfigError."""
    match = re.fullmatch(r"(\d+)(?:-(\d+))?", steps)
    found = range(int(match[1]), int(match[2] or match[1]) + 1) if match else range(0)
    if not found or found[0] < 1:
        raise ConfigError(
            f"logging.profile_steps = {steps!r}: legal: a step or a range of steps from 1, such as '100-104'"
        )
    return found


def _validate_rest(config: Config) -> None:
    if config.logging.profile_steps is not None:
        parse_steps(config.logging.profile_steps)
    s, d, o = config.schedule, config.data, config.optimizer
    if o.value_lr is not None and o.value_lr_times != 1.0:
        raise ConfigError(
            f"optimizer.value_lr_times = {o.value_lr_times} would be ignored with optimizer.value_lr = {o.value_lr}; "
            "legal: 1, or value_lr = null"
        )
    if o.value_offload != "none" and not parse_layers(
        config.model.memory.layers, config.model.num_layers, "model.memory.layers"
    ):
        raise ConfigError(
            f"optimizer.value_offload = {o.value_offload} without memory layers (model.memory.layers = none) would be "
            "ignored; legal: none"
        )
    decay_steps = s.decay_steps or config.train.steps
    if s.kind != "constant" and s.warmup_steps >= decay_steps:
        raise ConfigError(
            f"schedule.warmup_steps = {s.warmup_steps}: legal: fewer than the {decay_steps} steps of the schedule"
        )
    wsd_decay_steps = s.wsd_decay_steps or max(1, decay_steps // 10)
    if s.kind == "wsd" and wsd_decay_steps > decay_steps - s.warmup_steps:
        raise ConfigError(
            f"schedule.wsd_decay_steps = {s.wsd_decay_steps} ({wsd_decay_steps} steps): legal: at most the "
            f"{decay_steps - s.warmup_steps} steps after the warm-up"
        )
    if config.train.minutes is not None:
        _validate_minutes(config)
    per_split = d.train_paths or d.valid_paths or d.test_paths
    if d.paths and per_split:
        raise ConfigError("data.paths and data.train_paths/valid_paths/test_paths are both set; legal: one of the two")
    for name in ("", "train_", "valid_", "test_"):
        paths, weights = getattr(d, f"{name}paths"), getattr(d, f"{name}weights")
        if weights and len(weights) != len(paths):
            raise ConfigError(
                f"data.{name}weights has {len(weights)} entries for the {len(paths)} of data.{name}paths; "
                "legal: as many, or none"
            )
        if any(weight <= 0 for weight in weights):
            raise ConfigError(f"data.{name}weights = {weights}: legal: positive numbers")
    if d.tokenizer.kind == "byte" and d.tokenizer.path:
        raise ConfigError(f"data.tokenizer.path = {d.tokenizer.path!r} would be ignored by kind byte; legal: null")
    if d.tokenizer.kind != "byte" and not d.tokenizer.path:
        raise ConfigError(f"data.tokenizer.path = null: kind {d.tokenizer.kind} needs a file")


def _validate_minutes(config: Config) -> None:
    """A run by the clock decides on the way when it decays: nothing that is resumed could know."""
    for name, value, legal in (
        ("schedule.kind", config.schedule.kind, "wsd"),
        ("checkpoint.load", config.checkpoint.load, "none"),
        ("checkpoint.interval", config.checkpoint.interval, 0),
        ("train.exit_after_steps", config.train.exit_after_steps, None),
    ):
        if value != legal:
            raise ConfigError(f"train.minutes = {config.train.minutes} with {name} = {value}; legal: {legal}")
