"""A plan as tables in the terminal."""

from __future__ import annotations

import dataclasses
from dataclasses import fields

from rich.console import Console
from rich.table import Table

from megatron_ultramem.planning.memory import GIB, host_memory
from megatron_ultramem.planning.placements import print_placements, show_bytes
from megatron_ultramem.planning.plan import Plan
from megatron_ultramem.planning.search import as_overrides, describe

ROOFLINE = (
    "Times are predicted by a roofline: matrix products at {matmul:.0%} of peak plus their bytes, memory-bound parts "
    "by bytes over {hbm:.0f} GB/s, exchanges by bytes over the links plus {latency:g} us a message, and at least "
    "{launch:g} us for every kernel that the host launches (planning/time_model.py and calibration.py have the rest)."
)


def print_plan(plan: Plan, console: Console, top: int) -> None:
    """All tables; of the layouts that were found the best `top`."""
    _parameters(plan, console)
    _flops(plan, console)
    _access(plan, console)
    _verdict(plan, console)
    _memory(plan, console)
    _communication(plan, console)
    _time(plan, console)
    print_placements(plan.shown.config, console)
    if plan.found is not None:
        _layouts(plan, console, top)


def _parameters(plan: Plan, console: Console) -> None:
    counts, rank = plan.parameters, plan.shown.parameters
    table = Table("parameters", "", title="Model", title_justify="left")
    for name in ("total", "active"):
        table.add_row(name, f"{getattr(counts, name):,}", style="bold")
    for name in ("tables", "memory_dense", "attention", "ffn", "moe", "embedding", "norms"):
        if getattr(counts, name):
            table.add_row(f"  {name.replace('_', ' ')}", f"{getattr(counts, name):,}")
    table.add_row("as published: total", f"{counts.published.total:,}")
    table.add_row("as published: active", f"{counts.published.active:,}")
    stage = f" (stage {plan.shown.stage})" if plan.shown.layout.pipeline > 1 else ""
    table.add_row(f"on the fullest rank{stage}", f"{rank.total:,}", style="bold")
    for field in fields(rank):
        if getattr(rank, field.name):
            table.add_row(f"  {field.name}", f"{getattr(rank, field.name):,}")
    console.print(table)


def _flops(plan: Plan, console: Console) -> None:
    flops = plan.flops
    table = Table("FLOPs per token", "forward", "share")
    rows = [
        ("attention projections", flops.attention_projections),
        ("attention scores (causal half)", flops.attention_scores),
        ("FFN", flops.ffn),
        ("MoE", flops.moe),
        *(
            (f"memory: {field.name.replace('_', ' ')}", getattr(flops.memory, field.name))
            for field in fields(flops.memory)
        ),
        ("logits", flops.logits),
    ]
    for name, value in rows:
        if value:
            table.add_row(name, _count(value), f"{value / flops.forward:.1%}")
    table.add_row("forward", _count(flops.forward), "", style="bold")
    table.add_row("training (3 forwards)", _count(flops.training), "", style="bold")
    console.print(table)


def _access(plan: Plan, console: Console) -> None:
    table = Table(
        "memory access per token",
        "tokens at once",
        "dense",
        "experts",
        "rows",
        "in all",
        "equal MoE",
        title_justify="left",
    )
    for found in plan.access:
        table.add_row(
            found.situation,
            f"{found.tokens:,}",
            *(show_bytes(getattr(found.model, name)) for name in ("dense", "experts", "rows", "total")),
            show_bytes(found.moe.total) if found.moe else "-",
        )
    console.print(table)


def _verdict(plan: Plan, console: Console) -> None:
    cluster, own = plan.cluster, plan.shown.config is plan.config
    what = "the layout of the config" if own or plan.problem else "layout"
    name = f"{plan.gpus} x {cluster.name} ({cluster.usable_gib:.1f} of {cluster.memory_gib:g} GiB usable)"
    if plan.problem:
        console.print(f"On {name}, {what} does not do: {plan.problem}", style="bold red")
        if not own and plan.found is not None:
            console.print("What follows is of the best layout that was found.")
    else:
        console.print(f"On {name}, {what} fits.", style="bold green")
    console.print(f"Layout: {describe(plan.shown.config, plan.shown.layout)}")


def _memory(plan: Plan, console: Console) -> None:
    modes = plan.modes
    table = Table("recompute", *modes, title="Memory of the fullest rank, GiB", title_justify="left")
    for column in table.columns[1:]:
        column.justify = "right"
    parts = fields(plan.shown.memory)
    for part in parts:
        values = [getattr(shown.memory, part.name) / GIB for shown in modes.values()]
        if any(values):
            table.add_row(part.name.replace("_", " "), *(f"{value:.2f}" for value in values))
    for name in ("peak", "required"):
        table.add_row(name, *(f"{getattr(shown.memory, name) / GIB:.2f}" for shown in modes.values()), style="bold")
    table.add_row("", *("fits" if shown.fits else "too large" for shown in modes.values()))
    console.print(table)
    if on_host := host_memory(plan.shown.layout, plan.shown.parameters.tables):
        console.print(f"The value tables' optimizer takes {on_host / GIB:.2f} GiB of host memory a rank.")


def _communication(plan: Plan, console: Console) -> None:
    if not plan.traffic:
        return
    table = Table("received by a rank in a step", "bytes", "messages", "time on the links")
    for name, moved in plan.traffic.items():
        table.add_row(
            name.replace("_", " "),
            show_bytes(moved.received),
            f"{moved.messages:,.0f}",
            f"{moved.seconds * 1e3:,.1f} ms",
        )
    console.print(table)


def _time(plan: Plan, console: Console) -> None:
    from megatron_ultramem.planning import calibration

    time, cluster = plan.shown.time, plan.cluster
    table = Table("predicted time of a step", "", "share")
    for name, seconds in dataclasses.asdict(time.times).items():
        if seconds:
            table.add_row(name.replace("_", " "), f"{seconds * 1e3:,.1f} ms", f"{seconds / time.seconds:.1%}")
    table.add_row("step", f"{time.seconds * 1e3:,.1f} ms", "", style="bold")
    console.print(table)
    console.print(
        f"{time.tokens_per_s:,.0f} tokens/s, {time.tokens_per_s / plan.gpus:,.0f} a GPU, MFU {time.mfu:.1%} of "
        f"{cluster.peak_tflops:g} TFLOP/s; mostly bound by {time.bound_by.replace('_', ' ')}"
    )
    console.print(
        ROOFLINE.format(
            matmul=calibration.MATMUL,
            hbm=calibration.COPY * cluster.hbm_gb_per_s,
            latency=cluster.latency_us,
            launch=cluster.launch_us,
        ),
        style="dim",
    )


def _layouts(plan: Plan, console: Console, top: int) -> None:
    assert plan.found is not None
    fitting = plan.found.fitting
    table = Table(
        "", "layout", "GiB", "tokens/s", "MFU", "bound by",
        title=f"Layouts that fit, best first ({min(top, len(fitting))} of {len(fitting)})", title_justify="left",
    )  # fmt: skip
    for number, found in enumerate(fitting[:top], start=1):
        table.add_row(
            str(number),
            describe(found.config, found.layout),
            f"{found.memory.required / GIB:.1f}",
            f"{found.time.tokens_per_s:,.0f}",
            f"{found.time.mfu:.1%}",
            found.time.bound_by.replace("_", " "),
        )
    console.print(table)
    console.print("The first as settings: " + as_overrides(fitting[0].settings(plan.config)))


def _count(number: float) -> str:
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.4g} {unit}"
    return f"{number:.4g}"
