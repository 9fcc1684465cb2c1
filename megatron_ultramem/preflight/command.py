"""`ultramem preflight`: the checks in order, from what costs nothing to what costs seconds, and what they found."""

from __future__ import annotations

import dataclasses
import json
import os
import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from megatron_ultramem.config.schema import Config
from megatron_ultramem.planning.parameters import count_parameters
from megatron_ultramem.platform import Platform, prepare
from megatron_ultramem.preflight import local, network
from megatron_ultramem.preflight.gpu_health import gpu_problems
from megatron_ultramem.preflight.report import RankReport
from megatron_ultramem.preflight.verdict import RATES, Limits, Problem, by_host, find_problems, group_rates
from megatron_ultramem.training.agreement import config_hash
from megatron_ultramem.training.checkpoint_folder import checkpoint_dir
from megatron_ultramem.training.distributed import (
    create_process_group,
    destroy_distributed,
    initialize_model_parallel,
)
from megatron_ultramem.training.tokenizers import build_tokenizer

_BYTES_PER_PARAMETER = 16  # of a checkpoint: the weight, its fp32 copy, two moments


@dataclasses.dataclass(frozen=True)
class Options:
    """How to measure. None: what suits the device."""

    limits: Limits = Limits()
    group_mebibytes: float | None = None  # of the tensors of collectives
    write_mebibytes: int | None = None  # of the file that each rank writes
    host: str | None = None  # name of this host
    clock: Callable[[], float] = time.time


def run_preflight(config: Config, options: Options) -> tuple[list[RankReport], list[Problem]]:
    """All ranks' reports and what is wrong, the same on every rank. Collective; leaves no process group and no file.

    Raises ConfigError if the layout does not fit the ranks.
    """
    platform = prepare(config.train.device)
    wanted_gib = _checkpoints_gib(config)
    try:
        create_process_group(config, platform)
        reports = _Checks(config, platform, options).run(wanted_gib)
    finally:
        destroy_distributed()
    return reports, find_problems(reports, options.limits)


class _Checks:
    """One rank's part. Ranks talk through a group of CPU tensors, which works where a GPU or NCCL does not."""

    def __init__(self, config: Config, platform: Platform, options: Options) -> None:
        self.config, self.options, self.device = config, options, platform.device
        self.control = dist.new_group(backend="gloo")
        self.report = RankReport(
            dist.get_rank(),
            options.host or socket.gethostname(),
            str(self.device),
            local.versions(self.device),
            config_hash(config),
        )

    def run(self, wanted_gib: float) -> list[RankReport]:
        try:
            self._measure_device()
        except RuntimeError as error:  # of CUDA
            self.report.problems.append(f"{self.device} fails: {str(error).strip().splitlines()[0]}")
            self.report.device_failed = True
        self._measure_folders(wanted_gib)
        reports = self._gather()
        leaders = [ranks[0].rank for ranks in by_host(reports).values()]
        if (skew := network.clock_skew(self.control, leaders, self.options.clock)) is not None:
            self.report.clock_skew_s, self.report.clock_error_s = skew
        if obstacle := _obstacle(reports):
            self.report.remarks.append(f"process groups were not measured: {obstacle}")
        else:
            initialize_model_parallel(self.config)
            groups = network.groups_of_layout([found.host for found in reports])
            size = self.options.group_mebibytes or (64 if self.device.type == "cuda" else 1)
            self.report.groups = network.measure_groups(groups, self.device, size)
            self.report.link_gb_s = network.link_gb_s([found.host for found in reports], self.device, size)
        return self._gather()

    def _measure_device(self) -> None:
        report, device = self.report, self.device
        dist.barrier(group=self.control)
        health: list[tuple[list[str], str | None]] = []
        report.matmul_tflops = local.matmul_tflops(device, during=lambda: health.append(gpu_problems(device)))
        for problems, remark in health:
            report.problems += problems
            report.remarks += [remark] if remark else []
        report.copy_gb_s = local.copy_gb_s(device)
        report.host_copy_gb_s = local.host_copy_gb_s(device)

    def _measure_folders(self, wanted_gib: float) -> None:
        config, report = self.config, self.report
        run_dir, folder = Path(config.train.run_dir), checkpoint_dir(config)
        report.folders = [local.free_space("checkpoint.dir", folder, wanted_gib)]
        if folder.absolute().parent != run_dir.absolute():
            report.folders.append(local.free_space("train.run_dir", run_dir, 1.0))
        mebibytes = self.options.write_mebibytes or (1024 if self.device.type == "cuda" else 16)
        dist.barrier(group=self.control)
        try:
            report.write_mb_s = local.write_mb_s(folder, report.rank, mebibytes)
        except OSError as error:
            report.problems.append(f"checkpoint.dir = {folder} cannot be written: {error.strerror or error}")

    def _gather(self) -> list[RankReport]:
        reports: list[RankReport] = [self.report] * dist.get_world_size()
        dist.all_gather_object(reports, self.report, group=self.control)
        return reports


def _obstacle(reports: Sequence[RankReport]) -> str | None:
    """Why collectives would hang."""
    if len({report.config_hash for report in reports}) > 1:
        return "the ranks have different settings"
    return "the device of a rank fails" if any(report.device_failed for report in reports) else None


def _checkpoints_gib(config: Config) -> float:
    """What the checkpoints that are kept will take, and the next one, which is written before the oldest goes."""
    vocab_size = config.model.vocab_size or build_tokenizer(config.data.tokenizer).vocab_size
    checkpoint = count_parameters(config.model, vocab_size).total * _BYTES_PER_PARAMETER
    return checkpoint * (max(1, config.checkpoint.keep_last) + 1) / 2**30


def print_result(reports: Sequence[RankReport], problems: Sequence[Problem], console: Console) -> None:
    """A line for each host (its slowest rank), one for each kind of group, and the problems."""
    console.print(f"{len(reports)} ranks on {len(by_host(reports))} hosts; of each host its slowest rank")
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    titles = (
        "host",
        "ranks",
        "TFLOP/s",
        "copy GB/s",
        "from host GB/s",
        "write MB/s",
        "link GB/s",
        "free GiB",
        "clock s",
    )
    for title in titles:
        table.add_column(title, justify="left" if title == "host" else "right")
    for host, ranks in by_host(reports).items():
        rates = (_least(ranks, name) for name in RATES)
        free = next((folder.free_gib for folder in ranks[0].folders if folder.free_gib is not None), None)
        skew = ranks[0].clock_skew_s
        table.add_row(host, str(len(ranks)), *rates, _number(free), "-" if skew is None else f"{skew:+.4f}")
    console.print(table)
    for kind, groups in group_rates(reports).items():
        reduce, exchange = (
            [getattr(group, name) for group in groups] for name in ("all_reduce_gb_s", "all_to_all_gb_s")
        )
        console.print(
            f"{kind}: {len(groups)} groups of {len(groups[0].ranks)} ranks, all-reduce {min(reduce):.4g} to "
            f"{max(reduce):.4g} GB/s, all-to-all {min(exchange):.4g} to {max(exchange):.4g} GB/s"
        )
    for remark in dict.fromkeys(remark for report in reports for remark in report.remarks):
        console.print(f"note: {remark}")
    for problem in problems:
        console.print(f"PROBLEM {problem}", style="red")
    if not problems:
        console.print("no problems found")


def write_json(path: Path, reports: Sequence[RankReport], problems: Sequence[Problem]) -> None:
    """All that was measured, for machines."""
    content = {
        "reports": [dataclasses.asdict(report) for report in reports],
        "problems": [dataclasses.asdict(problem) for problem in problems],
    }
    path.write_text(json.dumps(content, indent=2) + "\n")


def preflight(config: Config, options: Options, json_path: Path | None) -> int:
    """Runs it, lets rank 0 print; returns 0, or 1 on every rank if there are problems."""
    reports, problems = run_preflight(config, options)
    if int(os.environ.get("RANK", "0")) == 0:
        print_result(reports, problems, Console(highlight=False, markup=False, soft_wrap=True))
        if json_path is not None:
            write_json(json_path, reports, problems)
    return 1 if problems else 0


def _least(ranks: Sequence[RankReport], attribute: str) -> str:
    values = [value for report in ranks if (value := getattr(report, attribute)) is not None]
    return _number(min(values, default=None))


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
