"""What each placement of the value tables would cost, and which one a run would take."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from megatron_ultramem.config.schema import Config
from megatron_ultramem.memory.geometry import plan_pools
from megatron_ultramem.parallel.cost_model import (
    PASSING_NS,
    ROUTING_NS,
    choose,
    estimates,
    tokens_per_rank,
    widths,
)


def print_placements(config: Config, console: Console) -> None:
    """Prints the tables' share of a rank, the figures of every placement, and the choice with its reason."""
    p, pools, w = config.parallel, plan_pools(config.model), widths(config)
    if not pools:
        console.print("no memory layers (model.memory.layers = none): nothing to place")
        return
    tables = sum(pool.padded_rows for pool in pools) * (w.value_dim + w.pre_value_dim) * w.size
    in_all = f"{show_bytes(tables)} in all"
    if p.pipeline_parallel_size > 1:
        in_all += f" over {p.pipeline_parallel_size} pipeline stages"
    share = tables / p.memory_parallel_size / p.pipeline_parallel_size
    console.print(
        f"value tables: {len(pools)} pool{'s' if len(pools) > 1 else ''}, {in_all}; {show_bytes(share)} on a rank with "
        f"parallel.memory_parallel_size = {p.memory_parallel_size}"
    )
    console.print(
        f"a memory layer, per micro-batch of {tokens_per_rank(config)} tokens a rank; bytes a rank receives, if rows "
        f"are used evenly; {p.intra_node_gb_per_s:g} GB/s within {p.ranks_per_node} ranks of a node, "
        f"{p.inter_node_gb_per_s:g} GB/s between nodes, {p.exchange_latency_us:g} us a message, {ROUTING_NS:g} ns to "
        f"send a row to its owner, {PASSING_NS:g} ns for each that comes where all go to all ranks"
    )
    table = Table("placement", "forward", "backward", "a token", "time", "remark")
    chosen = choose(config)
    for estimate in estimates(config):
        mark, moved = estimate == chosen, estimate.forward_bytes + estimate.backward_bytes
        table.add_row(
            estimate.label,
            show_bytes(estimate.forward_bytes),
            show_bytes(estimate.backward_bytes),
            show_bytes(moved / tokens_per_rank(config)),
            f"{estimate.total_us / 1000:.3f} ms",
            "; ".join(filter(None, ["chosen" if mark else "", estimate.problem])),
            style="bold" if mark else None,
        )
    console.print(table)
    why = "as set"
    if p.memory_placement == "auto":
        why = (
            "the fastest without a problem"
            if not chosen.problem
            else "none is without a problem: the fastest legal one"
        )
    if p.memory_parallel_size == 1:
        why = "parallel.memory_parallel_size = 1: every rank holds all tables of its stage"
    console.print(f"parallel.memory_placement = {p.memory_placement} -> {chosen.label} ({why})")


def show_bytes(number: float) -> str:
    """Three digits: 1.23 GB."""
    for unit in ("B", "KB", "MB"):
        if number < 1000:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:.3g} GB" if number < 1000 else f"{number / 1000:,.3g} TB"
