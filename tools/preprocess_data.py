#!/usr/bin/env python3
"""Tokenise text files, folders and JSON lines into Megatron's .bin/.idx.

    tools/preprocess_data.py --input corpus/ more.jsonl.gz --output data/corpus --workers 8
    tools/preprocess_data.py --stdlib --output data/stdlib
    tools/preprocess_data.py --input wiki.jsonl --json-key text --output data/wiki \
        --tokenizer huggingface --tokenizer-path tokenizer.json

One document per file, or per line of a .jsonl file. Train on the result with `data.paths='[data/corpus]'`.
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from megatron_ultramem.config.schema import TokenizerConfig
from megatron_ultramem.errors import UserError
from megatron_ultramem.training.corpus import collect_files
from megatron_ultramem.training.preprocess import Totals, preprocess
from megatron_ultramem.training.stdlib_corpus import stdlib_files


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--input", nargs="+", type=Path, metavar="PATH", help="text or .jsonl files, folders; .gz too")
    source.add_argument("--stdlib", action="store_true", help="the Python standard library's own sources")
    parser.add_argument("--pattern", default="**/*", help="which files of a folder (default: all, '**/*')")
    parser.add_argument(
        "--output", required=True, type=Path, metavar="PREFIX", help="writes PREFIX.bin, .idx and .json"
    )
    parser.add_argument("--json-key", default="text", help="key of the text in a JSON line (default: text)")
    parser.add_argument("--tokenizer", default="byte", choices=("byte", "huggingface", "sentencepiece", "tiktoken"))
    parser.add_argument("--tokenizer-path", help="tokenizer file; not for byte")
    parser.add_argument("--eod-token", help="name of the end-of-document token (default: found by the usual names)")
    parser.add_argument("--tokenizer-pattern", help="how a tiktoken rank file cuts text (default: as cl100k_base)")
    parser.add_argument(
        "--workers", type=int, default=len(os.sched_getaffinity(0)), help="processes (default: all cores)"
    )
    parser.add_argument("--strict", action="store_true", help="stop at text that cannot be decoded, do not skip it")
    parser.add_argument("--overwrite", action="store_true", help="replace existing output")
    parsed = parser.parse_args(arguments)
    if parsed.workers < 1:
        parser.error(f"--workers {parsed.workers}: legal: 1 or more")
    return parsed


def main(arguments: list[str] | None = None) -> int:
    args = parse_arguments(arguments)
    console = Console(stderr=True, soft_wrap=True)
    tokenizer = TokenizerConfig(
        kind=args.tokenizer, path=args.tokenizer_path, eod_token=args.eod_token, pattern=args.tokenizer_pattern
    )
    # Megatron says so on import; it does not matter here.
    warnings.filterwarnings("ignore", message="Transformer Engine and Apex are not installed")
    try:
        files = stdlib_files() if args.stdlib else collect_files(args.input, args.pattern)
        with Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f}%"),
            TextColumn("{task.fields[rates]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
        ) as progress:
            bar = progress.add_task("tokenising", total=sum(path.stat().st_size for path in files), rates="")

            def show(totals: Totals) -> None:
                progress.update(bar, completed=totals.disk_bytes, rates=rates(totals))

            totals = preprocess(
                files,
                args.output,
                tokenizer,
                json_key=args.json_key,
                workers=args.workers,
                strict=args.strict,
                overwrite=args.overwrite,
                on_progress=show,
            )
    except UserError as error:
        console.print(f"error: {error}", style="red", markup=False, highlight=False)
        return 1
    report(console, args.output, totals)
    return 0


def rates(totals: Totals) -> str:
    seconds = max(totals.seconds, 1e-9)
    return f"{totals.text_bytes / seconds / 1e6:.1f} MB/s, {totals.tokens / seconds / 1e6:.2f} Mtokens/s"


def report(console: Console, prefix: Path, totals: Totals) -> None:
    lines = [
        f"{prefix}: {totals.documents:,} documents, {totals.tokens:,} tokens, {totals.text_bytes / 1e6:.1f} MB of text "
        f"in {totals.seconds:.1f} s ({rates(totals)})"
    ]
    if totals.empty:
        lines.append(f"left out: {totals.empty} empty documents")
    if totals.skipped:
        lines.append(f"skipped: {totals.skipped} documents that cannot be decoded, the first ones:")
        lines += [f"  {example}" for example in totals.skipped_examples[:5]]
    for line in lines:
        console.print(line, markup=False, highlight=False)


if __name__ == "__main__":
    sys.exit(main())
