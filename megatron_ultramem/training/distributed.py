"""Process groups: torch's, then Megatron's, from our settings."""

from __future__ import annotations

import datetime
import os

import torch
from megatron.core import parallel_state, tensor_parallel
from torch.distributed.rendezvous import rendezvous

from megatron_ultramem.config.schema import Config
from megatron_ultramem.config.validate import validate_world
from megatron_ultramem.config.validate_memory import expert_group_size
from megatron_ultramem.platform import Platform
from megatron_ultramem.training.agreement import check_same_config
from megatron_ultramem.training.flight_recorder import limit_buffer
from megatron_ultramem.training.graph_recording import release_all
from megatron_ultramem.training.restarts import restart_count


def world_size_from_environment() -> int:
    """Ranks that torchrun (or srun) started; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def initialize_distributed(config: Config, platform: Platform) -> None:
    """Creates torch's default group (from torchrun's environment, or one rank alone) and Megatron's groups.

    Raises ConfigError before any group exists if the layout does not fit the number of ranks.
    """
    create_process_group(config, platform)
    check_same_config(config)
    initialize_model_parallel(config)


def create_process_group(config: Config, platform: Platform) -> None:
    """Torch's default group alone; raises ConfigError before if the layout does not fit the number of ranks."""
    world_size = world_size_from_environment()
    validate_world(config, world_size)
    limit_buffer()
    timeout = datetime.timedelta(minutes=config.parallel.timeout_minutes)
    rank = int(os.environ.get("RANK", "0"))
    # Without device_id: torch would then create a communicator for every one of Megatron's groups, used or not.
    torch.distributed.init_process_group(
        platform.backend, timeout=timeout, store=_store(timeout), rank=rank, world_size=world_size
    )


def _store(timeout: datetime.timedelta) -> torch.distributed.Store:
    """Where ranks find each other: the launcher's store, or one of this process alone."""
    if "RANK" not in os.environ:
        return torch.distributed.HashStore()
    store, _, _ = next(rendezvous("env://", timeout=timeout))
    # Ranks that torchrun's agent restarts find the same store, with the addresses of those that are gone.
    return torch.distributed.PrefixStore(f"restart_{restart_count()}", store)


def initialize_model_parallel(config: Config) -> None:
    """Megatron's groups and its RNG tracker, on top of torch's default group."""
    p = config.parallel
    beside_ffn = p.overlap_exchange and torch.distributed.get_backend() == "nccl"
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=p.tensor_parallel_size,
        pipeline_model_parallel_size=p.pipeline_parallel_size,
        virtual_pipeline_model_parallel_size=p.virtual_pipeline_stages if p.virtual_pipeline_stages > 1 else None,
        context_parallel_size=p.context_parallel_size,
        expert_model_parallel_size=expert_group_size(config),
        expert_tensor_parallel_size=1,
        distributed_timeout_minutes=p.timeout_minutes,  # Megatron makes a timedelta of it, fractions included
        # The exchange of memory layers beside the FFN is what they wait for.
        high_priority_stream_groups=["tp_ep_mp"] if beside_ffn else None,
    )
    graphs = config.train.cuda_graphs
    tensor_parallel.model_parallel_cuda_manual_seed(
        config.train.seed,
        # Megatron's graphs ask for Transformer Engine's record of generators; a process keeps the one it made first.
        te_rng_tracker=graphs == "layers",
        # Tensor-parallel blocks switch generators, which no graph can record. There is no dropout to draw from them
        # then, so that Megatron's record for inference will do, which switches nothing.
        inference_rng_tracker=graphs == "full" and p.tensor_parallel_size > 1,
        force_reset_rng=True,
    )


def destroy_distributed() -> None:
    """Ends all groups, and first the CUDA graphs that refer to them; safe to call when there are none."""
    release_all()
    if torch.distributed.is_initialized():
        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()
