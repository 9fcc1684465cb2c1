#!/usr/bin/env python3
"""Evaluates a model with EleutherAI's lm-evaluation-harness.

    python tools/evaluate.py path/to/huggingface_folder --tasks hellaswag,arc_easy --batch-size auto
    python tools/evaluate.py runs/my_run --texts held_out.jsonl --choices questions.jsonl

A checkpoint of the trainer is converted first, for the time being. Tasks of the harness download their data; local
files need no network: --texts for bits per byte and perplexity ({"text": ...} a line), --choices for accuracy
({"question": ..., "choices": [...], "answer": 2} a line). The same tasks run with `lm_eval --model hf` itself.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from megatron_ultramem.errors import UserError
from megatron_ultramem.evaluation.harness import evaluate
from megatron_ultramem.quiet import quiet_dependencies


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="Hugging Face folder, checkpoint, or run folder")
    parser.add_argument("--tasks", default="", help="names of tasks, with commas between them")
    parser.add_argument("--texts", type=Path, nargs="+", default=[], help="JSON lines of texts")
    parser.add_argument("--choices", type=Path, nargs="+", default=[], help="JSON lines of questions")
    parser.add_argument("--shots", type=int, help="examples before each question (default: what the task says)")
    parser.add_argument("--batch-size", default="1", help="a number, or auto (default 1)")
    parser.add_argument("--limit", type=int, help="documents of each task at most")
    parser.add_argument("--device", help="cpu or cuda (default: cuda where it is)")
    parser.add_argument("--output", type=Path, help="write the metrics to this JSON file")
    args = parser.parse_args()
    quiet_dependencies()
    try:
        results = evaluate(
            args.model,
            tasks=[name for name in args.tasks.split(",") if name],
            texts=args.texts,
            choices=args.choices,
            shots=args.shots,
            batch_size=args.batch_size,
            limit=args.limit,
            device=args.device,
        )
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    table = Table("task", "metric", "value")
    for task, metrics in results.items():
        for name, value in metrics.items():
            table.add_row(task, name, f"{value:.4f}")
    Console().print(table)
    if args.output is not None:
        args.output.write_text(json.dumps(results, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
