"""`ultramem convert`: checkpoints to and from Hugging Face, in one process, a block at a time."""

from __future__ import annotations

import argparse
import functools
import importlib.util
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from megatron_ultramem.checkpoints_convert import verify
from megatron_ultramem.checkpoints_convert.account import print_account
from megatron_ultramem.checkpoints_convert.checkpoint_target import Import, write_model
from megatron_ultramem.checkpoints_convert.from_huggingface import ULTRAMEM, Folder, read_folder
from megatron_ultramem.checkpoints_convert.target_folder import check_free, new_folder
from megatron_ultramem.checkpoints_convert.tensors import Made, Recipe, TensorInfo, make
from megatron_ultramem.errors import CheckpointError, ConfigError
from megatron_ultramem.training.checksums import SUMS_FILE, find_damage

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def run_convert(args: argparse.Namespace, console: Console | None = None) -> None:
    """Runs the command; raises the errors of `megatron_ultramem.errors`, and then leaves nothing behind.

    Args:
        console: where it says what it does; None: the terminal.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(
            "ultramem convert runs in one process, whatever layout the checkpoint has; legal: no launcher"
        )
    if importlib.util.find_spec("transformers") is None or importlib.util.find_spec("safetensors") is None:
        raise ConfigError(
            "ultramem convert needs transformers and safetensors, which are not installed: pip install "
            "'megatron-ultramem[hf]'"
        )
    _quiet_transformers()
    console = console or Console(highlight=False, soft_wrap=True)
    directions = {"to-hf": _to_hf, "from-hf": _from_hf, "from-released": _from_released, "upcycle": _upcycle}
    directions[args.direction](args, console)


def parse_size(text: str) -> int:
    """Bytes of '5GB', '200MB', …; raises ConfigError."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?B)?", text.strip().upper())
    if not found or float(found[1]) == 0:
        raise ConfigError(f"--max-shard-size {text}: legal: a size such as 5GB or 200MB")
    return int(float(found[1]) * _UNITS[found[2] if found[2] not in (None, "B") else ""])


def _to_hf(args: argparse.Namespace, console: Console) -> None:
    from megatron_ultramem.checkpoints_convert.huggingface.modeling_ultramem import UltraMemForCausalLM
    from megatron_ultramem.checkpoints_convert.to_huggingface import export_checkpoint, write_folder

    shard_bytes = parse_size(args.max_shard_size)
    check_free(args.target)
    export = export_checkpoint(args.source, args.overrides)
    _check_sums(export.folder, console)
    tensors = [make(recipe, export.reader) for recipe in export.recipes]
    if not args.no_verify:
        verify.check_memory(tensor.info for tensor in tensors)
    with new_folder(args.target, _bytes(tensors)) as draft:
        with _progress(console, "writing", _bytes(tensors)) as advance:
            remarks = write_folder(draft, export, tensors, advance, shard_bytes=shard_bytes)
        prompts = verify.prompts_for(export.tokenizer, export.config.model.max_sequence_length)
        _gate(
            args,
            console,
            lambda precision: verify.our_logits(export.folder, prompts, precision, args.overrides),
            # By the files that were copied: loaded from the draft, they would stay in the user's cache of modules.
            lambda precision: verify.their_logits(draft, prompts, precision, UltraMemForCausalLM),
        )
    if left := export.reader.left_behind:
        console.print(f"not weights, and so not converted: {len(left)} entries of optimizer, random and FP8 state")
    _report(console, args, export.recipes, export.reader.tensors, {}, remarks)


def _from_hf(args: argparse.Namespace, console: Console) -> None:
    from megatron_ultramem.checkpoints_convert.from_huggingface import import_folder

    check_free(args.target)
    folder = read_folder(args.source)
    _check_sums(args.source, console)
    model = import_folder(folder, args.target.absolute(), args.overrides)
    _write_import(args, console, model, _their_logits(folder))


def _upcycle(args: argparse.Namespace, console: Console) -> None:
    from megatron_ultramem.checkpoints_convert.upcycle import import_upcycled

    check_free(args.target)
    folder = read_folder(args.source)
    _check_sums(args.source, console)
    model = import_upcycled(folder, args.target.absolute(), args.config, args.overrides)
    _write_import(args, console, model, _their_logits(folder))


def _check_sums(folder: Path, console: Console) -> None:
    """Compares a source with its checksums, if it has any."""
    if not (folder / SUMS_FILE).exists():
        return
    files = len((folder / SUMS_FILE).read_bytes().splitlines())
    with _progress(console, "checking", files, MofNCompleteColumn()) as advance:
        for number in range(files):
            if damage := find_damage(folder, number, files):
                raise CheckpointError(
                    f"{folder} is damaged: {damage}; legal: an undamaged copy or, if it was changed on purpose, the "
                    f"same without {SUMS_FILE}"
                )
            advance(1)


def _their_logits(folder: Folder) -> Callable[[Sequence[Sequence[int]], str], Any]:
    """Never by the code that lies in the folder: it came from somewhere else."""
    from transformers import AutoModelForCausalLM

    from megatron_ultramem.checkpoints_convert.huggingface.modeling_ultramem import UltraMemForCausalLM

    loader = UltraMemForCausalLM if folder.kind == ULTRAMEM else AutoModelForCausalLM
    return lambda prompts, precision: verify.their_logits(folder.path, prompts, precision, loader)


def _from_released(args: argparse.Namespace, console: Console) -> None:
    from megatron_ultramem.checkpoints_convert.released import import_released

    check_free(args.target)
    _write_import(args, console, import_released(args.source, args.target.absolute(), args.overrides), None)


def _write_import(
    args: argparse.Namespace,
    console: Console,
    model: Import,
    their_logits: Callable[[Sequence[Sequence[int]], str], Any] | None,
) -> None:
    """Writes a checkpoint, compares it with its source (None: which nothing here can run), and prints what was done."""
    tensors = [make(recipe, model.reader) for recipe in model.recipes]
    tokenizer, file = model.tokenizer.tokenizer, model.tokenizer.file
    if their_logits is not None and not args.no_verify:
        verify.check_memory(tensor.info for tensor in tensors)
    with new_folder(args.target, _bytes(tensors)) as draft:
        with _progress(console, "writing", _bytes(tensors)) as advance:
            write_model(draft, model, tensors, advance)
        # Until the folder has its name, the tokenizer's path in its settings leads nowhere.
        moved = [] if file is None else [f"data.tokenizer.path={draft / file.name}"]
        prompts = verify.prompts_for(tokenizer, model.config.model.max_sequence_length)
        if their_logits is None:
            console.print("logits were not compared: the code that trained the source is no package that can be run")
        else:
            _gate(
                args,
                console,
                lambda precision: verify.our_logits(draft, prompts, precision, moved),
                functools.partial(their_logits, prompts),
            )
    _report(console, args, model.recipes, model.reader.tensors, model.compared, [])
    console.print(
        f"train on with: ultramem train --config {args.target / 'config.yaml'} checkpoint.load={args.target} "
        "checkpoint.load_optimizer=false train.run_dir=..."
    )


def _gate(args: argparse.Namespace, console: Console, ours: Callable[[str], Any], theirs: Callable[[str], Any]) -> None:
    if args.no_verify:
        console.print("logits were not compared (--no-verify)")
        return
    console.print(str(verify.run_gate(args.verify_precision, ours, theirs)))


def _report(
    console: Console,
    args: argparse.Namespace,
    recipes: Sequence[Recipe],
    tensors: Mapping[str, TensorInfo],
    compared: Mapping[str, str],
    remarks: Sequence[str],
) -> None:
    print_account(recipes, tensors, compared, console)
    for remark in remarks:
        console.print(f"note: {remark}")
    console.print(f"written: {args.target}")


def _bytes(tensors: Sequence[Made]) -> int:
    return sum(tensor.info.nbytes for tensor in tensors)


@contextmanager
def _progress(console: Console, what: str, total: int, *counts: ProgressColumn) -> Iterator[Callable[[int], None]]:
    """A bar; yields what moves it on.

    Args:
        counts: what stands behind the bar; none: bytes.
    """
    numbers = counts or (DownloadColumn(), TransferSpeedColumn())
    with Progress(TextColumn(what), BarColumn(), *numbers, TimeRemainingColumn(), console=console) as bar:
        task = bar.add_task(what, total=total)
        yield lambda amount: bar.advance(task, amount)


def _quiet_transformers() -> None:
    """A bar of its own for every load, and remarks on special tokens, would bury what the conversion says."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
