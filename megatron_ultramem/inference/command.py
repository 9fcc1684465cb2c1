"""`ultramem generate`: prompts from the command line or a file, text to the terminal or JSON lines to a file."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from megatron_ultramem.errors import ConfigError
from megatron_ultramem.inference.sampling import Sampling

if TYPE_CHECKING:
    from megatron_ultramem.inference.generate import Completion, Generator


def run_generate(args: argparse.Namespace) -> None:
    """Runs the command on this rank; rank 0 talks.

    Raises UserErrors: for prompts, options and the output file before the model is loaded.
    """
    prompts = [args.prompt] if args.prompts_file is None else read_prompts(args.prompts_file)
    sampling = Sampling(args.max_new_tokens, args.temperature, args.top_k, args.top_p, args.seed, args.ignore_eod)
    with _output(args.output) as file:
        from megatron_ultramem.inference.generate import Generator

        generator = Generator.load(
            args.checkpoint, args.overrides, device=args.device, cache=not args.no_cache, batch_size=args.batch_size
        )
        try:
            if args.prompts_file is None and args.output is None:
                _stream(generator, args.prompt, sampling)
            else:
                _batch(generator, prompts, sampling, file)
        finally:
            generator.close()


def read_prompts(path: Path) -> list[str]:
    """The prompts of a file: lines of text, or of JSON if its name ends in .jsonl. Raises ConfigError."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"--prompts-file {path} cannot be read: {reason}") from None
    if not lines:
        raise ConfigError(f"--prompts-file {path} is empty; legal: at least one prompt")
    if path.suffix != ".jsonl":
        return lines
    prompts = []
    for number, line in enumerate(lines, start=1):
        try:
            prompt = json.loads(line)["prompt"]
        except (json.JSONDecodeError, KeyError, TypeError):
            prompt = None
        if not isinstance(prompt, str):
            raise ConfigError(f'--prompts-file {path}, line {number}: {line!r}; legal: {{"prompt": "text"}}')
        prompts.append(prompt)
    return prompts


def _stream(generator: Generator, prompt: str, sampling: Sampling) -> None:
    room = generator.room(prompt)
    if _is_main() and 0 < room < sampling.max_new_tokens:
        limit = generator.model.max_sequence_length
        print(f"note: {room} tokens fit within model.max_sequence_length = {limit}", file=sys.stderr)
    if _is_main() and room > 0:
        print(prompt, end="", flush=True)
    for piece in generator.stream(prompt, sampling):
        if _is_main():
            print(piece, end="", flush=True)
    if _is_main():
        print(flush=True)


def _batch(generator: Generator, prompts: list[str], sampling: Sampling, file: TextIO | None) -> None:
    start, tokens = time.perf_counter(), 0
    for completion in generator.completions(prompts, sampling):
        tokens += len(completion.tokens)
        if not _is_main():
            continue
        if file is not None:
            print(json.dumps(asdict(completion), ensure_ascii=False), file=file, flush=True)
        else:
            print(_readable(completion, len(prompts)), flush=True)
    if _is_main():
        seconds = time.perf_counter() - start
        print(
            f"{len(prompts)} prompts, {tokens} tokens in {seconds:.1f} s ({tokens / seconds:.1f} tokens/s)",
            file=sys.stderr,
        )


def _readable(completion: Completion, count: int) -> str:
    return f"--- prompt {completion.index + 1} of {count}\n{completion.prompt}{completion.text}\n"


def _is_main() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _output(path: Path | None) -> AbstractContextManager[TextIO | None]:
    return nullcontext() if path is None or not _is_main() else _open(path)


@contextmanager
def _open(path: Path) -> Iterator[TextIO]:
    try:
        file = path.open("w", encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"--output {path} cannot be written: {error.strerror}; legal: a file in a folder that exists"
        ) from None
    with file:
        yield file
