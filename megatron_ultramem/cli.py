"""`ultramem train|generate|preflight|convert|config|plan|doctor`: parses, calls, prints.

Imports are inside the commands: `--help` must not wait for torch and Megatron.
"""

from __future__ import annotations

import argparse
import os
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_ultramem.errors import ConfigError, UserError, lost_another_rank

if TYPE_CHECKING:
    from megatron_ultramem.config.schema import Config


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code. A UserError becomes one line on stderr and exit code 2."""
    from megatron_ultramem.quiet import quiet_dependencies

    quiet_dependencies()
    arguments = list(sys.argv[1:] if argv is None else argv)
    args = _parse(arguments)
    try:
        if getattr(args, "max_restarts", 0) and args.ranks is None:
            raise ConfigError(
                f"--max-restarts {args.max_restarts} needs --ranks; torchrun has such an option of its own"
            )
        if getattr(args, "ranks", None) is not None and "RANK" not in os.environ:
            from megatron_ultramem.launch import launch

            if args.run is _train:
                _load_settings(args)  # what is wrong with them no restart mends
            return launch(args.ranks, arguments, getattr(args, "max_restarts", 0))
        code: int | None = args.run(args)
        return code or 0
    except UserError as error:
        _report(error)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        return 130
    except RuntimeError as error:
        if int(os.environ.get("WORLD_SIZE", "1")) == 1 or not lost_another_rank(error):
            raise
        reason = str(error).splitlines()[-1]
        print(f"rank {os.environ.get('RANK')} ended because another one did ({reason})", file=sys.stderr, flush=True)
        return 3


def _report(error: UserError) -> None:
    """One line on stderr, from one of the ranks that found the error."""
    from megatron_ultramem.one_voice import is_mine_to_say
    from megatron_ultramem.redaction import redact

    rank, ranks = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    if ranks == "1" or (error.on_every_rank and rank == "0"):
        where = ""
    else:
        where = f" [rank {rank} on {socket.gethostname()}]" if error.on_many_ranks else f" [rank {rank}]"
    if ranks == "1" or not error.on_many_ranks or is_mine_to_say(str(error), alone=not error.on_every_rank):
        print(redact(f"error{where}: {error}"), file=sys.stderr, flush=True)


def _parse(arguments: list[str]) -> argparse.Namespace:
    """Settings may stand before, between and after options, which argparse alone does not allow."""
    parser = _parser()
    args, rest = parser.parse_known_args(arguments)
    if rest and (not hasattr(args, "overrides") or any(word.startswith("-") for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        args.overrides = [*args.overrides, *rest]
    return args


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="ultramem", description="Pretrains UltraMemV2 models on Megatron-Core.")
    commands = parser.add_subparsers(required=True, metavar="command")
    settings = "Settings are given as section.setting=value; `ultramem config` lists all of them with explanations."

    train = commands.add_parser(
        "train",
        help="train a model",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Trains a model, or goes on where its last checkpoint left off.\n" + settings,
        epilog="examples:\n"
        "  ultramem train --config examples/configs/quickstart.yaml --ranks 2 train.steps=50\n"
        "  torchrun --nproc-per-node 8 -m megatron_ultramem train --config my.yaml\n\n" + _sections(),
    )
    _add_config(train)
    _add_ranks(train)
    train.add_argument(
        "--max-restarts", type=int, default=0, help="with --ranks: start all again this often when one fails"
    )
    train.set_defaults(run=_train)

    generate = commands.add_parser(
        "generate",
        help="continue prompts with a trained model",
        description="Continues prompts with a trained model, streaming to the terminal.",
    )
    _add_generation(generate)
    _add_ranks(generate)
    generate.set_defaults(run=_generate)

    convert = commands.add_parser(
        "convert",
        help="convert checkpoints to and from Hugging Face",
        description="Converts weights to and from Hugging Face folders, a block at a time, accounts for every tensor, "
        "and compares the logits of both sides.",
    )
    _add_conversions(convert)
    convert.set_defaults(run=_convert)

    config = commands.add_parser(
        "config",
        help="print the resolved settings, each with an explanation",
        description="Prints the resolved settings as YAML. " + settings,
    )
    _add_config(config)
    config.set_defaults(run=_config)

    plan = commands.add_parser(
        "plan",
        help="parameters, FLOPs, memory, communication and time of a config on a cluster, and layouts that fit",
        description="Predicts what a config costs on a cluster, says whether its layout fits, and looks for layouts "
        "that do. " + settings + " cluster.setting=value changes the cluster.",
        epilog="examples:\n"
        "  ultramem plan --config my.yaml parallel.memory_parallel_size=8\n"
        "  ultramem plan --config my.yaml --gpus 64 --cluster h200 --picture plan.png\n"
        "  ultramem plan --config my.yaml --gpus 1024 --cluster h100 cluster.inter_node_gb_per_s=22 --json",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_config(plan)
    _add_plan(plan)
    plan.set_defaults(run=_plan)

    preflight = commands.add_parser(
        "preflight",
        help="measure every rank, link and folder of a job, and name the host that stands out",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Measures what a run with these settings would use: GPUs, process groups, clocks, folders.\n"
        "Start it with the ranks of the run. Ends with status 1 if something is wrong. " + settings,
        epilog="example:\n  torchrun --nproc-per-node 8 -m megatron_ultramem preflight --config my.yaml",
    )
    _add_config(preflight)
    _add_ranks(preflight)
    preflight.add_argument(
        "--tolerance", type=float, default=0.15, help="by which a rate may fall short of the median (default 0.15)"
    )
    preflight.add_argument(
        "--write-tolerance", type=float, default=0.5, help="the same for writing to folders (default 0.5)"
    )
    preflight.add_argument(
        "--max-clock-skew", type=float, default=1.0, help="seconds that a host's clock may be off (default 1)"
    )
    preflight.add_argument("--json", type=Path, help="write all measurements to this file")
    preflight.set_defaults(run=_preflight)

    doctor = commands.add_parser("doctor", help="what was found on this machine, and what it changes")
    doctor.add_argument("--json", action="store_true", help="machine-readable output")
    doctor.set_defaults(run=_doctor)
    return parser


def _add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", type=Path, help="YAML file of settings")
    parser.add_argument("overrides", nargs="*", metavar="section.setting=value", help="settings on top of the file")


def _add_plan(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--gpus", type=int, help="GPUs of the cluster (default: as few as the config's layout needs)")
    parser.add_argument("--cluster", help="h100, h200, b200, a100, or a .yaml file of settings (default: h100 with the "
                        "links that parallel.* describes)")  # fmt: skip
    parser.add_argument("--search", action=argparse.BooleanOptionalAction, default=None,
                        help="look for layouts that fit (default: where --gpus is given)")  # fmt: skip
    parser.add_argument("--top", type=int, default=10, help="layouts to list (default 10)")
    parser.add_argument("--json", action="store_true", help="machine-readable output")
    parser.add_argument("--picture", type=Path, help="draw memory and time to this .png file")


def _add_generation(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoint", required=True, type=Path, help="checkpoint, folder of them, or run folder")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt", help="text to continue, as a stream; '' starts a document")
    source.add_argument(
        "--prompts-file",
        type=Path,
        help='prompts to continue in batches: one a line, or in a .jsonl file {"prompt": ...} a line',
    )
    parser.add_argument("--output", type=Path, help="write JSON lines to this file instead of text to the terminal")
    parser.add_argument("--max-new-tokens", type=int, default=128, help="tokens to add at most (default 128)")
    parser.add_argument("--temperature", type=float, default=1.0, help="0: greedy (default 1)")
    parser.add_argument("--top-k", type=int, default=0, help="sample among the k likeliest tokens; 0: all (default)")
    parser.add_argument("--top-p", type=float, default=1.0, help="sample within this probability mass (default 1)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the sampling (default 0)")
    parser.add_argument("--ignore-eod", action="store_true", help="go on after an end-of-document token")
    parser.add_argument("--batch-size", type=int, default=16, help="prompts computed together at most (default 16)")
    parser.add_argument("--no-cache", action="store_true", help="compute the whole sequence for every token (slow)")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"), help="where to compute")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="section.setting=value",
        help="settings on top of the checkpoint's, such as train.precision=bf16; the model is split over all ranks",
    )


def _add_conversions(parser: argparse.ArgumentParser) -> None:
    directions = parser.add_subparsers(required=True, metavar="direction", dest="direction")

    def add(name: str, what: str, source: str, target: str, settings: str) -> argparse.ArgumentParser:
        direction = directions.add_parser(name, help=what, description=f"Converts {what}.")
        direction.add_argument("source", type=Path, help=source)
        direction.add_argument("target", type=Path, help=target)
        direction.add_argument("overrides", nargs="*", metavar="section.setting=value", help=settings)
        return direction

    def add_verification(direction: argparse.ArgumentParser) -> None:
        direction.add_argument("--no-verify", action="store_true", help="do not compare the logits of both sides")
        direction.add_argument(
            "--verify-precision",
            default="fp32",
            choices=("fp32", "bf16"),
            help="of that comparison (default fp32: logits within 1e-4; bf16: within 1.5 times the distance of our own "
            "bf16 logits from our fp32 ones)",
        )

    checkpoint, settings = "folder of the checkpoint to make", "of the checkpoint's settings"
    to_hf = add(
        "to-hf",
        "a checkpoint of the trainer to a Hugging Face folder",
        "checkpoint, folder of them, or run folder",
        "folder to make",
        "data.tokenizer.path, if the tokenizer has moved",
    )
    to_hf.add_argument("--max-shard-size", default="5GB", help="of a file of weights (default 5GB)", metavar="SIZE")
    add_verification(to_hf)
    from_hf = add(
        "from-hf",
        "a Hugging Face folder (UltraMem, Llama-style, OLMoE) to a checkpoint to train on from",
        "Hugging Face folder",
        checkpoint,
        settings,
    )
    add_verification(from_hf)
    upcycle = add(
        "upcycle",
        "a dense Hugging Face folder to a checkpoint with memory layers whose output is zero: the same logits",
        "Hugging Face folder (Llama-style, OLMoE, or UltraMem without memory)",
        checkpoint,
        settings,
    )
    upcycle.add_argument("--config", type=Path, required=True, help="YAML file with model.memory, and the new run")
    add_verification(upcycle)
    add(
        "from-released",
        "a checkpoint of the released research code (model.pt, config.yaml) to one to train on from",
        "its folder",
        checkpoint,
        f"{settings}; model.memory.top_m, if config.yaml does not say it",
    )


def _add_ranks(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--ranks", type=int, help="start this many processes on this machine (else: torchrun's)")


def _sections() -> str:
    import dataclasses

    from megatron_ultramem.config.schema import Config

    lines, defaults = ["settings, and their sections:"], Config()
    for field in dataclasses.fields(Config):
        section = getattr(defaults, field.name)
        names = dataclasses.fields(section) if dataclasses.is_dataclass(section) else ()
        inner = f" ({', '.join(name.name for name in names)})" if names else ""
        lines.append(f"  {field.name}: {field.metadata['help']}{inner}")
    return "\n".join(lines)


def _load_settings(args: argparse.Namespace) -> Config:
    from megatron_ultramem.config import load_config

    return load_config(args.config, args.overrides)


def _train(args: argparse.Namespace) -> int:
    from megatron_ultramem.training.requests import hold_back_stop_signal

    hold_back_stop_signal()  # before torch starts threads
    config = _load_settings(args)
    from megatron_ultramem.platform import prepare

    prepare(config.train.device)
    from megatron_ultramem.training.loop import train

    return train(config)


def _generate(args: argparse.Namespace) -> None:
    from megatron_ultramem.inference.command import run_generate

    run_generate(args)


def _convert(args: argparse.Namespace) -> None:
    from megatron_ultramem.checkpoints_convert.command import run_convert

    run_convert(args)


def _config(args: argparse.Namespace) -> None:
    from rich.console import Console

    from megatron_ultramem.config import load_config
    from megatron_ultramem.config.describe import print_config

    print_config(load_config(args.config, args.overrides), Console(highlight=False))


def _plan(args: argparse.Namespace) -> None:
    from megatron_ultramem.planning.command import run_plan

    run_plan(args)


def _preflight(args: argparse.Namespace) -> int:
    from megatron_ultramem.config import load_config
    from megatron_ultramem.errors import ConfigError

    config = load_config(args.config, args.overrides)
    if not 0 < args.tolerance < 1 or not 0 < args.write_tolerance < 1 or args.max_clock_skew <= 0:
        raise ConfigError("--tolerance, --write-tolerance: legal: between 0 and 1; --max-clock-skew: above 0")
    from megatron_ultramem.platform import prepare

    prepare(config.train.device)
    from megatron_ultramem.preflight.command import Options, preflight
    from megatron_ultramem.preflight.verdict import Limits

    limits = Limits(args.tolerance, args.write_tolerance, args.max_clock_skew)
    return preflight(config, Options(limits), args.json)


def _doctor(args: argparse.Namespace) -> None:
    import json

    from megatron_ultramem.doctor import collect, render

    findings = collect()
    if args.json:
        import dataclasses

        print(json.dumps([dataclasses.asdict(finding) for finding in findings], indent=2))
    else:
        render(findings)
