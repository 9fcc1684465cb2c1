"""Looks for layouts that fit: TP x PP x VPP x CP x memory- and expert-parallel x placement x micro-batch x recompute.

Every legal combination is judged, less what cannot be better: a micro-batch larger than one that does not fit, and a
heavier recomputation where a lighter one fits. Layouts that fit are ranked by predicted tokens/s.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from megatron_ultramem.config.schema import Config
from megatron_ultramem.parallel.cost_model import estimates
from megatron_ultramem.planning.clusters import Cluster
from megatron_ultramem.planning.evaluate import Evaluation, Evaluator, with_recompute
from megatron_ultramem.planning.layout import Layout, layout_of
from megatron_ultramem.planning.memory import GIB, RankMemory

MAX_CHUNKS = 4
LEAST_TOKENS_OF_CONTEXT = 2048  # of a context-parallel rank


@dataclass
class Refusals:
    """Why layouts were not taken: illegal ones by their reason, those for which only the batch is too small apart, and
    the legal one that came closest to fitting."""

    illegal: Counter[str] = field(default_factory=Counter)
    small_batch: Counter[str] = field(default_factory=Counter)
    closest: tuple[Config, RankMemory] | None = None

    def too_large(self, config: Config, memory: RankMemory) -> None:
        if self.closest is None or memory.required < self.closest[1].required:
            self.closest = config, memory


@dataclass
class Found:
    """Layouts that fit, fastest first, and why the others do not."""

    gpus: int
    fitting: list[Evaluation]
    refusals: Refusals


def search(evaluator: Evaluator, config: Config, gpus: int) -> Found:
    """The layouts of `config` on `gpus` ranks that fit, best first, each with its best context parallelism, micro-batch
    and recomputation."""
    refusals = Refusals()
    best: dict[tuple[object, ...], Evaluation] = {}
    for found in _fitting(evaluator, config, gpus, refusals):
        family = _family(found)
        if family not in best or _rank(found) < _rank(best[family]):
            best[family] = found
    return Found(gpus, sorted(best.values(), key=_rank), refusals)


def any_fits(evaluator: Evaluator, config: Config, gpus: int) -> bool:
    """Whether a layout of `config` on `gpus` ranks fits; quicker than to find them all."""
    return next(_fitting(evaluator, config, gpus, Refusals()), None) is not None


def binding_constraint(evaluator: Evaluator, found: Found) -> str:
    """What keeps every layout from fitting, in words; only where none fits."""
    closest = found.refusals.closest
    if closest is None:
        refused = found.refusals.small_batch or found.refusals.illegal
        what = "the global batch binds" if found.refusals.small_batch else "no layout is legal"
        reason, count = refused.most_common(1)[0]
        return f"{what}: {reason} (so for {count} of {refused.total()} layouts refused alike)"
    layout, memory = layout_of(closest[0], found.gpus), closest[1]
    which = f"the layout that comes closest ({describe(closest[0], layout)})"
    return f"memory binds: {which} {needs(memory, evaluator.cluster)}"


def needs(memory: RankMemory, cluster: Cluster) -> str:
    """Why so much memory does not fit, in words."""
    parts = sorted(dataclasses.fields(memory), key=lambda part: -getattr(memory, part.name))[:3]
    named = ", ".join(f"{part.name.replace('_', ' ')} {getattr(memory, part.name) / GIB:.1f}" for part in parts)
    return (
        f"needs {memory.required / GIB:.1f} GiB, and a rank can use {cluster.usable_gib:.1f} of {cluster.memory_gib:g} "
        f"GiB; the largest parts: {named}"
    )


def describe(config: Config, layout: Layout) -> str:
    """'TP 2, PP 4, P 8 by rows, DP 16, micro-batch 2, recompute full', without what is 1 or none."""
    p = config.parallel
    sizes = [
        ("TP", p.tensor_parallel_size),
        ("PP", p.pipeline_parallel_size),
        ("VPP", p.virtual_pipeline_stages),
        ("CP", p.context_parallel_size),
        ("EP", p.expert_parallel_size),
    ]
    words = [f"{name} {size}" for name, size in sizes if size > 1]
    if p.memory_parallel_size > 1:
        words.append(f"P {p.memory_parallel_size} by {layout.placement.label}")
    words += [f"DP {layout.data}", f"micro-batch {config.train.micro_batch_size}"]
    if config.train.recompute != "none":
        words.append(f"recompute {config.train.recompute}")
    elif config.model.memory.recompute:
        words.append("recompute memory")
    return ", ".join(words)


def as_overrides(settings: dict[str, object]) -> str:
    """Settings as the command line takes them."""
    return " ".join(f"{key}={_word(value)}" for key, value in settings.items())


def _word(value: object) -> str:
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _fitting(evaluator: Evaluator, config: Config, gpus: int, refusals: Refusals) -> Iterator[Evaluation]:
    modes = _modes(evaluator)
    for placed in _placed(evaluator, config, gpus, refusals):
        unfit: set[str] = set()  # modes in which a smaller micro-batch did not fit
        for sized in _micro_batches(evaluator, placed, gpus):
            for mode in modes:
                if mode in unfit:
                    continue
                candidate = with_recompute(sized, mode)
                _, memory = evaluator.memory(candidate, layout_of(candidate, gpus))
                if evaluator.fits(memory):
                    yield evaluator.evaluate(candidate, gpus)
                    break
                unfit.add(mode)
                refusals.too_large(candidate, memory)
            if len(unfit) == len(modes):
                break


def _modes(evaluator: Evaluator) -> list[str]:
    """Recompute modes worth trying: fused attention has no scores that `selective` could drop."""
    return [mode for mode in evaluator.modes if mode != "selective" or evaluator.backend == "local"]


def _placed(evaluator: Evaluator, config: Config, gpus: int, refusals: Refusals) -> Iterator[Config]:
    """Legal combinations of the parallel sizes with every placement of the tables that has no problem."""
    cluster, model = evaluator.cluster, config.model
    sequence = config.data.sequence_length
    contexts = [1, *(size for size in _powers(gpus) if size > 1 and sequence // size >= LEAST_TOKENS_OF_CONTEXT)]
    has_memory, has_moe = bool(evaluator.work.pools), any(layer.has_moe for layer in evaluator.work.layers)
    for tensor in _powers(min(gpus, cluster.gpus_per_node)):
        for pipeline in divisors(model.num_layers):
            if gpus % (tensor * pipeline):
                continue
            chunks = [1] if pipeline == 1 else [n for n in divisors(model.num_layers // pipeline) if n <= MAX_CHUNKS]
            for context in contexts:
                if gpus % (tensor * pipeline * context):
                    continue
                for chunk in chunks:
                    for group in _powers(gpus // pipeline) if has_memory or has_moe else [1]:
                        candidate = _with_sizes(config, tensor, pipeline, chunk, context, group, has_memory, has_moe)
                        yield from _placements(evaluator, candidate, gpus, refusals)


def _placements(evaluator: Evaluator, candidate: Config, gpus: int, refusals: Refusals) -> Iterator[Config]:
    # Static sizes are for placements that have them, whichever is the fastest without.
    plain = dataclasses.replace(candidate, parallel=dataclasses.replace(candidate.parallel, exchange_capacity=None))
    smallest = _with(plain, micro_batch_size=1, cuda_graphs="none")
    reason = evaluator.problem(smallest, gpus)
    if reason:
        reasons = refusals.small_batch if reason.startswith("train.") else refusals.illegal
        reasons[reason] += 1
        return
    in_modes = [with_recompute(smallest, mode) for mode in _modes(evaluator)]
    layout = layout_of(smallest, gpus)
    least, memory = min(
        ((one, evaluator.memory(one, layout)[1]) for one in in_modes), key=lambda found: found[1].required
    )
    if not evaluator.fits(memory):  # with less there is nothing to try
        refusals.too_large(least, memory)
        return
    for estimate in estimates(candidate):
        if estimate.problem:
            continue
        parallel = dataclasses.replace(candidate.parallel, memory_placement=estimate.placement)
        if estimate.placement == "two_level":
            parallel.memory_columns = estimate.columns
        if estimate.placement == "columns":
            parallel.exchange_capacity = None
        placed = dataclasses.replace(candidate, parallel=parallel)
        graphs_go_with_it = not evaluator.problem(_with(placed, micro_batch_size=1), gpus)
        yield placed if graphs_go_with_it else _with(placed, cuda_graphs="none")


def _micro_batches(evaluator: Evaluator, placed: Config, gpus: int) -> Iterator[Config]:
    p = placed.parallel
    data = gpus // (p.tensor_parallel_size * p.pipeline_parallel_size * p.context_parallel_size)
    for size in _powers(placed.train.global_batch_size // data):
        candidate = _with(placed, micro_batch_size=size)
        if not evaluator.problem(candidate, gpus):
            yield candidate


def _with_sizes(
    config: Config, tensor: int, pipeline: int, chunks: int, context: int, group: int, memory: bool, moe: bool
) -> Config:
    parallel = dataclasses.replace(
        config.parallel,
        tensor_parallel_size=tensor,
        sequence_parallel=None,
        pipeline_parallel_size=pipeline,
        virtual_pipeline_stages=chunks,
        overlap_p2p=chunks > 1,
        context_parallel_size=context,
        expert_parallel_size=group if moe else 1,
        memory_parallel_size=group if memory else 1,
        memory_placement="auto",
        memory_columns=None,
        exchange_capacity=config.parallel.exchange_capacity if memory and group > 1 else None,
        overlap_exchange=config.parallel.overlap_exchange and memory and group > 1,
    )
    return dataclasses.replace(config, parallel=parallel)


def _with(config: Config, **train: object) -> Config:
    return dataclasses.replace(config, train=dataclasses.replace(config.train, **train))  # type: ignore[arg-type]


def _family(found: Evaluation) -> tuple[object, ...]:
    layout = found.layout
    return layout.tensor, layout.pipeline, layout.chunks, layout.expert_group, layout.placement.placement


def _rank(found: Evaluation) -> tuple[float, ...]:
    """Faster first; of what is within 1 % the one that needs less memory, then the one with fewer splits."""
    layout = found.layout
    speed = round(math.log(found.time.tokens_per_s) / math.log(1.01))
    return -speed, round(found.memory.required / GIB), layout.pipeline * layout.chunks, layout.tensor, layout.context


def _powers(limit: int) -> list[int]:
    return [1 << exponent for exponent in range(max(1, limit).bit_length())]


def divisors(number: int) -> list[int]:
    """Ascending."""
    return [size for size in range(1, number + 1) if number % size == 0]
