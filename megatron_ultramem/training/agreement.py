"""All ranks must have been started with the same settings; anything else ends in a hang or in silent nonsense."""

from __future__ import annotations

import hashlib
from collections import Counter
from typing import Any

import torch.distributed as dist

from megatron_ultramem.config.load import walk
from megatron_ultramem.config.schema import Config
from megatron_ultramem.errors import ConfigError

SHOWN = 4  # ranks, and settings of each, that the message names


def config_hash(config: Config) -> str:
    """Identifies the resolved settings."""
    return hashlib.sha256(repr([(name, value) for name, value, _ in walk(config)]).encode()).hexdigest()


def check_same_config(config: Config) -> None:
    """Compares the settings of all ranks of the default group; a collective call.

    Raises:
        ConfigError: alike on every rank, naming the ranks that differ from most others and the settings in which.
    """
    hashes: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(hashes, config_hash(config))
    if len(set(hashes)) == 1:
        return
    settings: list[dict[str, Any]] = [{} for _ in hashes]
    dist.all_gather_object(settings, {name: value for name, value, _ in walk(config)})
    usual_hash, _ = Counter(hashes).most_common(1)[0]  # the lowest rank's, where none is most common
    usual_rank = hashes.index(usual_hash)
    odd = [rank for rank, found in enumerate(hashes) if found != usual_hash]
    named = "; ".join(
        f"rank {rank}: {_differences(settings[rank], settings[usual_rank], usual_rank)}" for rank in odd[:SHOWN]
    )
    more = f"; and {len(odd) - SHOWN} more ranks" if len(odd) > SHOWN else ""
    raise ConfigError(f"the ranks were started with different settings: {named}{more}; legal: the same on all ranks")


def _differences(mine: dict[str, Any], usual: dict[str, Any], usual_rank: int) -> str:
    names = [name for name in usual if mine.get(name) != usual[name]]
    shown = ", ".join(f"{name} = {mine.get(name)!r} (rank {usual_rank}: {usual[name]!r})" for name in names[:SHOWN])
    return shown + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
