"""The fewest and the most GPUs on which a config can be laid out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from megatron_ultramem.config.schema import Config
from megatron_ultramem.planning.evaluate import Evaluation, Evaluator
from megatron_ultramem.planning.search import any_fits, divisors, search

LARGEST_CLUSTER = 16384


def smallest_cluster(evaluator: Evaluator, config: Config) -> Evaluation | None:
    """The fastest layout on the fewest GPUs (of whole nodes, or a part of one) on which any fits."""
    return _first_that_fits(evaluator, config, range(1, LARGEST_CLUSTER + 1))


def largest_cluster(evaluator: Evaluator, config: Config, below: int) -> Evaluation | None:
    """The fastest layout on the most GPUs, under `below`, on which any fits: where the batch is too small for more."""
    return _first_that_fits(evaluator, config, range(below - 1, 0, -1))


def _first_that_fits(evaluator: Evaluator, config: Config, sizes: Iterable[int]) -> Evaluation | None:
    for gpus in _worth_trying(config, evaluator.cluster.gpus_per_node, sizes):
        if any_fits(evaluator, config, gpus):
            return search(evaluator, config, gpus).fitting[0]
    return None


def _worth_trying(config: Config, gpus_per_node: int, sizes: Iterable[int]) -> Iterator[int]:
    """Those of which pipeline stages can leave what divides the batch: all other splits are by powers of two."""
    stages = divisors(config.model.num_layers)
    for gpus in sizes:
        if (gpus < gpus_per_node or gpus % gpus_per_node == 0) and any(
            gpus % count == 0 and config.train.global_batch_size % _odd(gpus // count) == 0 for count in stages
        ):
            yield gpus


def _odd(number: int) -> int:
    """Its largest odd divisor."""
    return number // (number & -number)
