#!/usr/bin/env python3
"""Writes the tables of measured results in README.md, docs/comparison.md, docs/scaling.md and docs/planner.md, and how
far the planner is from them, from benchmarks/results/*.json; `--check` only compares."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

from megatron_ultramem.planning.measured import all_errors, truth
from megatron_ultramem.planning.scaling import MEMORY
from megatron_ultramem.planning.scaling_ratios import efficiency_base, fastest_moe, way_and_ranks
from megatron_ultramem.results import ORIGIN

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
# Benchmark, and the metrics that the README shows of it.
SHOWN = {
    "training": [
        "tokens_per_s", "tokens_per_s_with_optimizer", "tflops", "mfu", "gpu_busy_ms", "host_waits", "peak_gib",
        "loss_step_1", "loss_step_50",
    ],
    "memory_parallel": [
        "received_gb_s_256_mib", "tokens_per_s_with_optimizer", "step_cost_percent", "step_ms_spread_percent",
        "exchange_gb_s", "peak_gib", "table_gib", "table_gib_on_one",
    ],
    "scaling": [
        "layers", "tokens_per_s", "tokens_per_s_spread_percent", "scaling_efficiency_percent", "times_the_moe",
    ],
    "conversion": ["checkpoint_mib", "largest_tensor_mib", "tiny_model_peak_mib", "to_hf_peak_mib", "from_hf_peak_mib"],
    "offload": ["trains", "step_cost_percent", "peak_gib", "tables_with_state_gib"],
    "soak": ["restarts", "checkpoints_equal_by_every_bit", "checkpoints_lost"],
    "kernels": [
        "lookup_forward_ms", "lookup_backward_ms", "retrieval_forward_ms", "layer_forward_ms",
        "layer_forward_backward_ms", "layer_t1_us", "lookup_forward_fp8_ms", "lookup_forward_fp8_speedup",
    ],
    "fp8_curves": ["seeds", "loss_last_20", "loss_against_bf16", "loss_against_bf16_error"],
    "learning_curve": ["tokens", "train_loss", "valid_loss", "tokens_per_s"],
}  # fmt: skip
SWEPT = re.compile(r"T\d+_m\d+_")  # cases of a sweep are for plots, not for a table
ABLATED = re.compile(r"/throughput\w*-")  # presets without one of their settings: how fast they are says it all
# Ways of running a recipe that are for other pages: no preset (docs/comparison.md), no first way (docs/scaling.md), of
# the MoE none but the fastest.
OTHER_WAYS = {
    "training": re.compile(r"_\d+[mb]/(?!none$|throughput)"),
    "scaling": re.compile(r"/(?!columns_x|columns_fp8_x|cut_columns_x)"),
    "fp8_curves": re.compile(r"/seed_"),  # the mean of which is shown
}
OURS, MOE, DENSE = "ultramemv2_227m_1b", "olmoe_227m_1b", "dense_227m"  # of tools/bench_baselines.py
BUSY_PERCENT = 90  # of the wall time: from there on the GPU binds a case, below the host that launches its kernels

Cases = dict[str, dict[str, float]]  # figures by metric, by case


def main() -> int:
    stale = []
    true = truth(all_errors(ROOT))
    for path, blocks in (
        (ROOT / "README.md", {"results": table(RESULTS), "truth": true}),
        (ROOT / "docs" / "comparison.md", {"speed": speed(RESULTS), "learning": learning(RESULTS)}),
        (ROOT / "docs" / "planner.md", {"plan": plan(RESULTS), "truth": true}),
        (ROOT / "docs" / "scaling.md", {"scaling": scaling(RESULTS)}),
    ):
        text = path.read_text()
        wanted = text
        for name, content in blocks.items():
            wanted = _replaced(wanted, name, content)
        if wanted != text:
            stale.append(path.relative_to(ROOT))
            if "--check" not in sys.argv[1:]:
                path.write_text(wanted)
    if "--check" not in sys.argv[1:]:
        return 0
    for stale_path in stale:
        print(f"{stale_path}: its tables are not what benchmarks/results says; run tools/readme_table.py")
    return int(bool(stale))


def _replaced(text: str, name: str, content: str) -> str:
    """The text with the block of that name, between its two comments, filled anew; `truth` is part of a line."""
    begin, end = f"<!-- {name}: written by tools/readme_table.py -->", f"<!-- /{name} -->"
    begin += "" if name == "truth" else "\n"
    head, rest = text.split(begin)
    _, tail = rest.split(end)
    return head + begin + content + end + tail


def table(folder: Path) -> str:
    """Markdown of all results in the folder, a table for each file: cases down, metrics across."""
    parts = []
    for path in sorted(folder.glob("*.json")):
        content = json.loads(path.read_text())
        benchmark = content["benchmark"]
        compared_with = _fastest_moes(content) if benchmark == "scaling" else set()
        rows = [row for row in content["rows"] if benchmark in SHOWN and _is_shown(benchmark, row, compared_with)]
        metrics = [metric for metric in SHOWN.get(benchmark, ()) if any(row["metric"] == metric for row in rows)]
        if not metrics:
            continue
        lines = [f"| {benchmark}, {content['hardware']} | {' | '.join(metrics)} |", "|---" * (1 + len(metrics)) + "|"]
        for case, figures in _cases({"rows": rows}).items():
            cells = [_number(figures[metric]) if metric in figures else "" for metric in metrics]
            lines.append(f"| `{case}` | {' | '.join(cells)} |")
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


def _is_shown(benchmark: str, row: dict[str, Any], compared_with: set[str]) -> bool:
    case, metric = row["case"], row["metric"]
    other = None if case in compared_with else OTHER_WAYS.get(benchmark)
    return (
        metric in SHOWN[benchmark]
        and not SWEPT.match(case)
        and not (other and other.search(case))
        and not (ABLATED.search(case) and metric != "tokens_per_s")
    )


def speed(folder: Path) -> str:
    """Markdown of what tools/bench_baselines.py found on each machine."""
    parts = []
    for path in sorted(folder.glob("training_*.json")):
        content = json.loads(path.read_text())
        cases = _cases(content)
        recipes = {recipe: _fastest_way(recipe, cases) for recipe in cases if "/" not in recipe}
        recipes = {recipe: way for recipe, way in recipes.items() if way}
        if OURS in recipes and MOE in recipes and "gpu_busy_ms" in cases[OURS]:
            shown = {*recipes, *(case for case in cases if case.startswith(f"{MOE}/"))}
            content = _when_last_shown(content, shown)
            parts.append(f"**{content['hardware']}**, commit {content['commit']}, {_versions(content)}.\n\n")
            parts.append(_speed_table(recipes, cases) + "\n" + _ratios(cases) + "\n" + _ways_of_the_moe(cases))
            parts[-1] += _measured_before(content, shown)
    return "\n".join(parts) or "Not measured yet.\n"


def _fastest_way(recipe: str, cases: Cases) -> str:
    """The way that the case of a recipe is; '' if it is none."""
    ways = [case for case in cases if case.startswith(f"{recipe}/") and cases[case] == cases[recipe]]
    return ways[0].partition("/")[2] if ways else ""


def _speed_table(recipes: dict[str, str], cases: Cases) -> str:
    lines = [
        "| model | its fastest way | tokens/s | with optimizer | TFLOP/s | peak GiB | GPU busy, ms | of the wall time "
        "| bound by |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for recipe, way in recipes.items():
        own = cases[recipe]
        cells = [
            f"`{recipe}`", f"`{way}`", _number(own["tokens_per_s"]), _number(own["tokens_per_s_with_optimizer"]),
            _number(own["tflops"]), _number(own["peak_gib"]), _number(own["gpu_busy_ms"]),
            _share(own), "the GPU" if own["gpu_busy_percent"] >= BUSY_PERCENT else "launches",
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _ratios(cases: Cases) -> str:
    """What UltraMemV2 is to the others."""
    ours, moe = cases[OURS], cases[MOE]
    least = min(own["gpu_busy_ms"] for case, own in cases.items() if case.startswith(f"{MOE}/"))
    wall, step = (ours[name] / moe[name] for name in ("tokens_per_s", "tokens_per_s_with_optimizer"))
    busy, best = moe["gpu_busy_ms"] / ours["gpu_busy_ms"], least / ours["gpu_busy_ms"]
    text = (
        f"UltraMemV2 has {wall:.2f} times the MoE's tokens/s in wall time ({step:.2f} times with the optimizer). By "
        f"the time that the GPU computes it is {busy:.2f} times as fast as the MoE in its fastest way"
    )
    if best < busy:
        text += f", and {best:.2f} times as fast as in the way that keeps the GPU busy for the shortest time"
    if DENSE in cases:
        text += f"; it has {ours['tokens_per_s'] / cases[DENSE]['tokens_per_s']:.2f} times the dense model's tokens/s"
    return text + ".\n"


def _ways_of_the_moe(cases: Cases) -> str:
    ways = {case.partition("/")[2]: own for case, own in cases.items() if case.startswith(f"{MOE}/")}
    lines = [
        "| way of the MoE | Megatron-Core | tokens/s | GPU busy, ms | of the wall time | kernels | peak GiB |",
        "|---|---|---|---|---|---|---|",
    ]
    for way, own in sorted(ways.items(), key=lambda item: -item[1]["tokens_per_s"]):
        cells = [
            f"`{way}`", f"{own['megatron_core']:g}", _number(own["tokens_per_s"]), _number(own["gpu_busy_ms"]),
            _share(own), _number(own["kernels"]), _number(own["peak_gib"]),
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _share(own: dict[str, float]) -> str:
    """Of the wall time; of the two, measured one after the other, the GPU's may come out as the longer."""
    return f"{min(own['gpu_busy_percent'], 100):.0f} %"


def learning(folder: Path) -> str:
    """Markdown of what tools/learning_curve.py found: its table and its figure."""
    found = sorted(folder.glob("learning_curve_*.json"))
    if not found:
        return "Not measured yet.\n"
    content = json.loads(found[-1].read_text())
    words = f"**{content['hardware']}**, commit {content['commit']}, {_versions(content)}.\n\n"
    return (
        words
        + (folder / "learning_curve.md").read_text()
        + ("\n![Losses against tokens, training FLOPs and seconds](../benchmarks/results/learning_curve.png)\n")
    )


def plan(folder: Path) -> str:
    """Markdown of what tools/check_plan.py found: predicted and measured figures."""
    lines = ["| hardware | case | figure | predicted | measured | error |", "|---|---|---|---|---|---|"]
    for path in sorted(folder.glob("plan_*.json")):
        content = json.loads(path.read_text())
        units = {row["metric"]: row["unit"] for row in content["rows"]}
        for case, own in _cases(content).items():
            for metric in [name.removesuffix("_predicted") for name in own if name.endswith("_predicted")]:
                unit, error = units[f"{metric}_measured"], own[f"{metric}_error"]
                predicted, measured = (
                    f"{_number(own[f'{metric}_{what}'])} {unit}" for what in ("predicted", "measured")
                )
                lines.append(
                    f"| {content['hardware']} | `{case}` | {metric} | {predicted} | {measured} | {error:+.1f} % |"
                )
    return "\n".join(lines) + "\n"


# Columns of docs/scaling.md: heading, metric. Those of which nothing was measured are left out.
SCALING = {
    "layers": "layers", "tokens/s": "tokens_per_s", "spread, %": "tokens_per_s_spread_percent",
    "of ideal, %": "scaling_efficiency_percent", "steps, of ideal, %": "step_scaling_efficiency_percent",
    "times the MoE": "times_the_moe", "steps, times the MoE": "step_times_the_moe",
    "exchange, GB/s": "exchange_gb_s", "hidden, %": "exchange_hidden_percent",
    "step, ms": "step_ms", "step's spread, %": "step_ms_spread_percent", "predicted, ms": "predicted_step_ms",
    "error, %": "step_error_percent", "peak, GiB": "peak_gib", "predicted, GiB": "predicted_peak_gib",
}  # fmt: skip
SHARES = ("scaling_efficiency_percent", "step_scaling_efficiency_percent")


def scaling(folder: Path) -> str:
    """Markdown of what tools/bench_scaling.py found on each machine: a line for a run, with all the cases that it is,
    and one for what does not fit."""
    parts = []
    for path in sorted(folder.glob("scaling_*.json")):
        content = json.loads(path.read_text())
        cases = _cases(content)
        units = {(row["case"], row["metric"]): row["unit"] for row in content["rows"]}
        runs: dict[tuple[object, ...], list[str]] = {}  # cases of the same figures, by these
        for case, own in cases.items():
            if "step_ms" in own:
                recipe, ranks = case.partition("/")[0], way_and_ranks(case)[1]
                runs.setdefault((recipe, ranks, own["step_ms"], own.get("tokens_per_s")), []).append(case)
        columns = {
            name: metric for name, metric in SCALING.items() if any(metric in cases[c[0]] for c in runs.values())
        }
        lines = ["| case | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
        for same in sorted(runs.values(), key=lambda same: way_and_ranks(same[0])):
            cells = [_scaling_cell(metric, units.get((same[0], metric)), cases[same[0]]) for metric in columns.values()]
            names = ", ".join([f"`{same[0]}`", *(f"`{way_and_ranks(case)[0].partition('/')[2]}`" for case in same[1:])])
            lines.append(f"| {names} | " + " | ".join(cells) + " |")
        head = f"**{content['hardware']}**, commit {content['commit']}, {_versions(content)}.\n\n"
        parts.append(head + "\n".join(lines) + "\n" + _unfit(cases))
        shown = {case for case, own in cases.items() if "step_ms" in own}
        parts[-1] += _measured_before(content, shown) + _of_other_commits(content, [own[0] for own in runs.values()])
    return "\n".join(parts) or "Not measured yet.\n"


def _scaling_cell(metric: str, unit: str | None, own: dict[str, float]) -> str:
    """A figure; a share of the ideal with what it is against, if that is not the same way on one rank."""
    if unit is None:
        return ""
    if metric in SHARES:
        base = unit.removeprefix("% of ")
        return _number(own[metric]) + ("" if base == "x1" else f" (of `{base}`)")
    return f"{round(own[metric], 1) + 0.0:g}" if metric.endswith("percent") else _number(own[metric])


def _of_other_commits(content: dict[str, Any], runs: list[str]) -> str:
    """Which ratios have two commits in them."""
    speeds = _speeds(content)
    commits = dict.fromkeys(speeds, content["commit"])
    commits |= {case: call["commit"] for call in content.get("earlier", ()) for case in call["cases"]}
    found = []
    for case in sorted(set(runs) & speeds.keys()):
        moe = fastest_moe(speeds, way_and_ranks(case)[1]) if case.startswith(f"{MEMORY}/") else None
        others = [base for base in (efficiency_base(case, speeds), moe) if base and commits[base] != commits[case]]
        found += [f"`{case}` (against `{base.partition('/')[2]}` at {commits[base]})" for base in others]
    return f"\nRatios of figures of two commits: {', '.join(found)}.\n" if found else ""


def _speeds(content: dict[str, Any]) -> dict[str, float]:
    return {row["case"]: row["value"] for row in content["rows"] if row["metric"] == "tokens_per_s"}


def _fastest_moes(content: dict[str, Any]) -> set[str]:
    """The cases of the MoE that others are compared with."""
    speeds = _speeds(content)
    return {moe for case in speeds if (moe := fastest_moe(speeds, way_and_ranks(case)[1]))}


def _unfit(cases: Cases) -> str:
    """What does not fit, with what the planner says that a rank would hold."""
    found = [f"`{case}` ({_number(own['predicted_peak_gib'])} GiB)" for case, own in cases.items() if "fits" in own]
    return f"\nNot run, as the planner says that they do not fit a GPU: {', '.join(sorted(found))}.\n" if found else ""


def _when_last_shown(content: dict[str, Any], shown: set[str]) -> dict[str, Any]:
    """The file as of the last call that measured any of the cases shown."""
    earlier = [call for call in content.get("earlier", ()) if shown.intersection(call["cases"])]
    if shown.difference(*(call["cases"] for call in earlier)) or not earlier:
        return content
    return content | {name: earlier[-1][name] for name in ORIGIN} | {"earlier": earlier[:-1]}


def _measured_before(content: dict[str, Any], shown: set[str]) -> str:
    """Which of the cases shown are not of the commit that the table is headed with."""
    lines = [
        f"\nMeasured before, at commit {call['commit']}: {', '.join(f'`{case}`' for case in sorted(own))}.\n"
        for call in content.get("earlier", ())
        if call["commit"] != content["commit"] and (own := shown.intersection(call["cases"]))
    ]
    return "".join(lines)


def _cases(content: dict[str, Any]) -> Cases:
    cases: Cases = {}
    for row in content["rows"]:
        cases.setdefault(row["case"], {})[row["metric"]] = row["value"]
    return cases


def _versions(content: dict[str, Any]) -> str:
    names = {"torch": "torch", "megatron-core": "Megatron-Core", "transformer-engine": "Transformer Engine"}
    return ", ".join(f"{shown} {content['versions'].get(name, '-')}" for name, shown in names.items())


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


if __name__ == "__main__":
    raise SystemExit(main())
