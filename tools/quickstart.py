#!/usr/bin/env python3
"""Trains a small UltraMemV2 on the Python standard library's own sources, and shows what came of it.

Every step is a command that works by itself; each is printed before it runs. `make quickstart` runs this.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from megatron_ultramem.config import Config, load_config
from megatron_ultramem.platform import prepare
from megatron_ultramem.quiet import quiet_dependencies

ROOT = Path(__file__).resolve().parents[1]
CONFIG = Path("examples/configs/quickstart.yaml")


def main() -> int:
    quiet_dependencies()
    console = Console(highlight=False, soft_wrap=True)
    started = time.monotonic()
    overrides = sys.argv[1:]
    config = load_config(ROOT / CONFIG, overrides)
    run_dir, data = config.train.run_dir, config.data.paths[0]
    # Two ranks, so that process groups are real; a rank needs a GPU of its own where there are any.
    ranks = min(2, torch.cuda.device_count()) if torch.cuda.is_available() else 2

    def run(*command: str) -> None:
        console.print(f"\n$ {shlex.join(command)}", style="bold cyan", markup=False)
        subprocess.run([sys.executable, *command[1:]], cwd=ROOT, check=True)

    try:
        run("python", "tools/preprocess_data.py", "--stdlib", "--output", data, "--workers", "1", "--overwrite")
        run("python", "-m", "megatron_ultramem", "train", "--config", str(CONFIG), "--ranks", str(ranks), *overrides)
        baselines = _baselines(config)
        (ROOT / run_dir / "baselines.json").write_text(json.dumps(baselines))
        run("python", "tools/report_run.py", run_dir, "-o", f"{run_dir}/report.png")
        run("python", "-m", "megatron_ultramem", "generate", "--checkpoint", run_dir, "--prompt", "def ",
            "--max-new-tokens", "200", "--temperature", "0.7", "--seed", "1")  # fmt: skip
    except subprocess.CalledProcessError as error:
        return error.returncode
    loss = _last_valid_loss(ROOT / run_dir / "metrics.jsonl")
    table = Table(title="Validation loss, nats per byte")
    table.add_column("model")
    table.add_column("loss", justify="right")
    for name, value in baselines.items():
        table.add_row(f"{name} counts of the training data", f"{value:.3f}")
    table.add_row("UltraMemV2 after this run", f"[bold]{loss:.3f}")
    console.print()
    console.print(table)
    console.print(f"Report: {run_dir}/report.png   Checkpoints: {run_dir}/checkpoints   TensorBoard: tensorboard "
                  f"--logdir {run_dir}   ({time.monotonic() - started:.0f} s)")  # fmt: skip
    if loss >= min(baselines.values()):
        console.print("The model should be well below both: something is wrong.", style="bold red")
        return 1
    return 0


def _baselines(config: Config) -> dict[str, float]:
    """Losses of unigram and bigram counts on the same split."""
    prepare(config.train.device)
    from megatron_ultramem.training.ngram import unigram_bigram_baselines
    from megatron_ultramem.training.tokenizers import build_tokenizer

    unigram, bigram = unigram_bigram_baselines(config, build_tokenizer(config.data.tokenizer))
    return {"unigram": unigram, "bigram": bigram}


def _last_valid_loss(metrics: Path) -> float:
    losses = [record["valid_loss"] for record in map(json.loads, metrics.read_text().splitlines())
              if "valid_loss" in record]  # fmt: skip
    return float(losses[-1])


if __name__ == "__main__":
    raise SystemExit(main())
