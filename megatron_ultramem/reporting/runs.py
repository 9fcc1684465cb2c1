"""Reads what a run left behind: metrics.jsonl, config.yaml and baselines.json."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_ultramem.config.load import config_to_dict, load_config
from megatron_ultramem.config.schema import Config
from megatron_ultramem.errors import ConfigError, UserError
from megatron_ultramem.planning.parameters import count_parameters
from megatron_ultramem.training.metrics import METRICS_FILE

_HEALTH_NAME = re.compile(r"memory/layer_(\d+)/(.+)")


@dataclass(frozen=True)
class Series:
    """One metric over the run: `values[i]` (NaN where it was not finite) at optimizer step `steps[i]`, ascending."""

    steps: list[int]
    values: list[float]


@dataclass
class Run:
    """What is known of one run. `config` is None without a readable config.yaml; `baselines` are losses by name."""

    name: str
    metrics: dict[str, Series]
    config: Config | None = None
    baselines: dict[str, float] = field(default_factory=dict)

    def health(self) -> dict[str, dict[int, Series]]:
        """Memory-health metrics: by name, then by layer number."""
        found: dict[str, dict[int, Series]] = {}
        for name, series in self.metrics.items():
            if match := _HEALTH_NAME.fullmatch(name):
                found.setdefault(match[2], {})[int(match[1])] = series
        return {name: dict(sorted(layers.items())) for name, layers in found.items()}

    def describe(self) -> list[str]:
        """Two lines for the header: the model with its parameters, and the layout; none without a config."""
        return [] if self.config is None else [describe_model(self.config), describe_layout(self.config)]


def load_run(folder: str | Path) -> Run:
    """Reads a run folder (or the path of its metrics.jsonl). An unfinished last line is ignored.

    Raises UserError naming the file: missing, unreadable, empty, or damaged before its last line.
    """
    path = Path(folder)
    if path.is_dir() or path.name != METRICS_FILE:
        path = path / METRICS_FILE
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; a run folder (setting train.run_dir) holds {METRICS_FILE}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    metrics = _parse(text, path)
    if not metrics:
        raise UserError(f"{path}: holds no metrics yet; the first come after `logging.interval` steps")
    run_dir = path.parent
    return Run(run_dir.resolve().name, metrics, _read_config(run_dir), _read_baselines(run_dir / "baselines.json"))


def _parse(text: str, path: Path) -> dict[str, Series]:
    """Metrics by name. Of several values for one step the last counts."""
    points: dict[str, dict[int, float]] = {}
    lines = text.splitlines()
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            step = record.pop("step")
            for name, value in record.items():
                points.setdefault(name, {})[int(step)] = math.nan if value is None else float(value)
        except (ValueError, KeyError, TypeError, AttributeError):
            if number == len(lines):
                break  # the run was killed while it wrote, or writes now
            raise UserError(f"{path}, line {number}: not a metrics record: {line[:60]!r}") from None
    return {
        name: Series(sorted(at_step), [at_step[step] for step in sorted(at_step)]) for name, at_step in points.items()
    }


def _read_config(run_dir: Path) -> Config | None:
    """The run's config: from its folder, or else from its newest checkpoint, which also knows the vocabulary.

    None when there is none, or when another version wrote one that this one cannot read.
    """
    checkpoints = sorted(run_dir.glob("checkpoints/*/config.yaml"), reverse=True)
    for path in [run_dir / "config.yaml", *checkpoints]:
        try:
            config = load_config(path, check=False)
        except ConfigError:
            continue
        if config.model.vocab_size is None:
            config.model.vocab_size = _vocabulary(checkpoints)
        return config
    return None


def _vocabulary(checkpoints: list[Path]) -> int | None:
    """The tokenizer's vocabulary as recorded in run.json beside a checkpoint's config; None where that is missing."""
    for path in checkpoints:
        try:
            return int(json.loads(path.with_name("run.json").read_text())["vocab_size"])
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return None


def _read_baselines(path: Path) -> dict[str, float]:
    if not path.exists():
        return {}
    try:
        return {str(name): float(loss) for name, loss in json.loads(path.read_text()).items()}
    except (OSError, ValueError, TypeError, AttributeError):
        raise UserError(f'{path}: must hold losses by name, such as {{"unigram": 3.1, "bigram": 2.4}}') from None


def describe_model(config: Config) -> str:
    """`20 layers × 768 · memory in every layer (n 360, top-32, ring of 10) · 1.23B parameters, 236M active`."""
    model, memory = config.model, config.model.memory
    parts = [f"{model.num_layers} layer{'s' if model.num_layers > 1 else ''} × {model.hidden_size}"]
    if memory.layers != "none":
        sharing = "" if memory.sharing == "none" else f", {memory.sharing} of {memory.share_size}"
        kind = "memory" if memory.kind == "ultramem_v2" else memory.kind
        parts.append(f"{kind} in {_which(memory.layers)} (n {memory.num_keys}, top-{memory.top_m}{sharing})")
    if model.moe.layers != "none":
        parts.append(f"MoE in {_which(model.moe.layers)} ({model.moe.num_experts} experts, top-{model.moe.top_k})")
    if model.vocab_size is not None:
        counts = count_parameters(model, model.vocab_size)
        parts.append(f"{format_count(counts.total)} parameters, {format_count(counts.active)} active")
    return "  ·  ".join(parts)


def _which(layers: str) -> str:
    return "every layer" if layers == "all" else f"layers {layers}"


def describe_layout(config: Config) -> str:
    """`TP 2 · PP 2 · batch 768 × 4096 tokens · bf16`, leaving out the dimensions of size 1."""
    parallel, train = config.parallel, config.train
    sizes = (
        ("TP", parallel.tensor_parallel_size),
        ("PP", parallel.pipeline_parallel_size),
        ("VPP", parallel.virtual_pipeline_stages),
        ("CP", parallel.context_parallel_size),
        ("EP", parallel.expert_parallel_size),
    )
    layout = [f"{name} {size}" for name, size in sizes if size > 1] or ["data parallel only"]
    batch = f"batch {train.global_batch_size:,} × {config.data.sequence_length:,} tokens"
    return "  ·  ".join([*layout, batch, train.precision, f"{train.steps:,} steps"])


def format_count(number: float) -> str:
    """Three digits: 1.23B, 236M, 4.56k."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.3g}"


def config_items(config: Config) -> list[tuple[str, Any]]:
    """Every setting as (dotted name, value)."""

    def walk(node: dict[str, Any], prefix: str) -> list[tuple[str, Any]]:
        items: list[tuple[str, Any]] = []
        for key, value in node.items():
            items += walk(value, f"{prefix}{key}.") if isinstance(value, dict) else [(prefix + key, value)]
        return items

    return walk(config_to_dict(config), "")
