"""`ultramem plan`: reads config and cluster, makes the plan, shows it."""

from __future__ import annotations

import argparse
import dataclasses
import json

from rich.console import Console

from megatron_ultramem.config import load_config
from megatron_ultramem.config.schema import Config
from megatron_ultramem.errors import ConfigError
from megatron_ultramem.planning.clusters import Cluster, load_cluster

DEFAULT_CLUSTER = "h100"


def run_plan(args: argparse.Namespace) -> None:
    """Raises the errors of `load_config`, `load_cluster` and `make_plan`."""
    from megatron_ultramem.planning.plan import make_plan

    if args.gpus is not None and args.gpus < 1:
        raise ConfigError(f"--gpus {args.gpus}: legal: 1 or more")
    if args.top < 1:
        raise ConfigError(f"--top {args.top}: legal: 1 or more")
    of_cluster = [override for override in args.overrides if override.startswith("cluster.")]
    config = load_config(args.config, [word for word in args.overrides if word not in of_cluster], check=False)
    plan = make_plan(
        config,
        vocabulary(config),
        _cluster(args.cluster, of_cluster, config),
        args.gpus,
        look_for_layouts=args.search if args.search is not None else args.gpus is not None,
    )
    if args.picture is not None:
        from megatron_ultramem.planning.picture import draw_plan

        draw_plan(plan, args.picture)
    if args.json:
        print(json.dumps(plan.as_dict(), indent=1))
        return
    from megatron_ultramem.planning.report import print_plan

    console = Console(highlight=False, soft_wrap=True)
    print_plan(plan, console, args.top)
    if args.picture is not None:
        console.print(f"picture: {args.picture}")


def vocabulary(config: Config) -> int:
    """model.vocab_size, or the tokenizer's."""
    if config.model.vocab_size is not None:
        return config.model.vocab_size
    from megatron_ultramem.training.tokenizers import build_tokenizer

    return build_tokenizer(config.data.tokenizer).vocab_size


def _cluster(name: str | None, overrides: list[str], config: Config) -> Cluster:
    """The cluster that was named; without a name an H100 one with the links that the config's settings describe."""
    if name is not None:
        return load_cluster(name, overrides)
    p = config.parallel
    links = dataclasses.replace(
        load_cluster(DEFAULT_CLUSTER),
        gpus_per_node=p.ranks_per_node,
        intra_node_gb_per_s=p.intra_node_gb_per_s,
        inter_node_gb_per_s=p.inter_node_gb_per_s,
        latency_us=p.exchange_latency_us,
    )
    return load_cluster(links, overrides)
