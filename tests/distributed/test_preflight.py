"""Preflight on real ranks, which give themselves other hosts' names, clocks, settings and folders."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_ultramem.config import load_config
from megatron_ultramem.preflight import local, network
from megatron_ultramem.preflight.command import Options, run_preflight
from megatron_ultramem.preflight.report import RankReport
from megatron_ultramem.preflight.verdict import Limits
from tests.distributed.workers import WorkerPool

CPU = torch.device("cpu")
# Tests share their cores: what is not spoilt on purpose may be ten times slower.
LOOSE = Limits(tolerance=0.9, write_tolerance=0.9)


def check(
    settings: list[str], odd: dict[str, Any] | None = None, per_host: int = 1, slow: int | None = None
) -> tuple[list[RankReport], list[str]]:
    """Preflight in which rank 1 has settings, or a clock, of its own, and a rank's processor is slow."""
    rank = int(os.environ["RANK"])
    odd = odd if odd and rank == 1 else {}
    measure = local.matmul_tflops
    if rank == slow:
        local.matmul_tflops = lambda device, during: measure(device, during) / 1000  # far beyond what sharing does
    options = Options(
        LOOSE,
        write_mebibytes=1,
        group_mebibytes=0.1,
        host=f"node-{rank // per_host}",
        clock=lambda: time.time() + odd.get("ahead", 0.0),
    )
    try:
        reports, problems = run_preflight(load_config(None, [*settings, *odd.get("settings", [])]), options)
    finally:
        local.matmul_tflops = measure
    return reports, [str(problem) for problem in problems]


def test_every_rank_group_and_folder_is_measured_and_nothing_is_left(
    pool: WorkerPool, small_run: list[str], tmp_path: Path
) -> None:
    settings = [*small_run, f"train.run_dir={tmp_path}", "parallel.tensor_parallel_size=2"]
    results = pool.run(4, check, settings, None, 2)
    reports, problems = results[0]
    assert problems == []
    assert all(result[1] == problems for result in results)
    for rank, report in enumerate(reports):
        assert (report.rank, report.host) == (rank, f"node-{rank // 2}")
        assert min(report.matmul_tflops or 0, report.copy_gb_s or 0, report.write_mb_s or 0) > 0
        assert report.host_copy_gb_s is None and report.versions["torch"] == torch.__version__
        assert report.folders[0].free_gib and 0 < report.folders[0].wanted_gib < report.folders[0].free_gib
        # The ranks of a host are the tensor-parallel group here, which is not measured twice.
        assert [group.kind for group in report.groups] == ["world", "node", "data"]
        assert [group.ranks for group in report.groups[1:]] == [
            (rank // 2 * 2, rank // 2 * 2 + 1),
            (rank % 2, rank % 2 + 2),
        ]
        assert all(group.all_reduce_gb_s > 0 and group.all_to_all_gb_s > 0 for group in report.groups)
    assert [report.clock_skew_s is not None for report in reports] == [True, False, True, False]
    assert abs(reports[2].clock_skew_s or 0.0) <= reports[2].clock_error_s + 1e-3 < 0.5
    assert not list((tmp_path / "checkpoints").iterdir())


def test_a_slow_rank_is_named(pool: WorkerPool, small_run: list[str], tmp_path: Path) -> None:
    settings = [*small_run, f"train.run_dir={tmp_path}", "train.global_batch_size=6"]
    for _, problems in pool.run(3, check, settings, None, 3, 2):
        assert any(problem.startswith("node-0: rank 2: matrix products at ") for problem in problems)


def test_a_host_with_a_slow_link_is_named_and_not_its_partners(
    pool: WorkerPool, small_run: list[str], tmp_path: Path
) -> None:
    settings = [*small_run, f"train.run_dir={tmp_path}", "train.global_batch_size=12"]
    for reports, problems in pool.run(4, check_with_a_slow_link, settings, 2):
        links = [report.link_gb_s or 0.0 for report in reports]
        assert links[2] < 0.1 * min(links[:2] + links[3:])
        slow = [problem for problem in problems if "exchange with other hosts" in problem]
        assert len(slow) == 1 and slow[0].startswith("node-2: all of it: exchange with other hosts at ")


def check_with_a_slow_link(settings: list[str], slow: int) -> tuple[list[RankReport], list[str]]:
    """`check` on hosts of one rank each, in which what rank `slow` sends to another and receives comes late."""
    swap = network._swap

    def late(data: torch.Tensor, out: torch.Tensor, peer: int | None) -> None:
        if peer is not None and int(os.environ["RANK"]) == slow:
            time.sleep(0.3)
        swap(data, out, peer)

    network._swap = late
    try:
        return check(settings)
    finally:
        network._swap = swap


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7, 32])
def test_hosts_are_paired_with_others_each_time(count: int) -> None:
    rounds = network.pairings(count, 3)
    assert len(rounds) == min(3, count - 1 + count % 2) if count > 1 else not any(rounds)
    for pairs in rounds:
        assert all(pairs[other] == one != other for one, other in pairs.items())
        assert len(pairs) == count - count % 2
    met = [(one, other) for pairs in rounds for one, other in pairs.items()]
    assert len(met) == len(set(met))


def test_a_clock_that_is_wrong_is_named(pool: WorkerPool, small_run: list[str], tmp_path: Path) -> None:
    settings = [*small_run, f"train.run_dir={tmp_path}", "train.global_batch_size=6"]
    for reports, problems in pool.run(3, check, settings, {"ahead": 25.0}):
        assert reports[1].clock_skew_s == pytest.approx(25.0, abs=reports[1].clock_error_s + 0.01)
        # Rates of a busy machine may add problems of their own.
        assert [problem for problem in problems if "clock" in problem][0].startswith("node-1: its clock is 25.")


def test_other_settings_on_a_host_are_named_and_no_group_is_made(
    pool: WorkerPool, small_run: list[str], tmp_path: Path
) -> None:
    settings = [*small_run, f"train.run_dir={tmp_path}", "train.global_batch_size=6"]
    for reports, problems in pool.run(3, check, settings, {"settings": ["optimizer.lr=2e-3"]}):
        assert any(text.startswith("node-1: another configuration than most ranks: settings ") for text in problems)
        assert not any(report.groups for report in reports)
        assert reports[0].remarks == ["process groups were not measured: the ranks have different settings"]


def test_a_folder_that_cannot_be_written_is_named(pool: WorkerPool, small_run: list[str], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    settings = [*small_run, f"train.run_dir={tmp_path}", f"checkpoint.dir={tmp_path / 'file' / 'x'}"]
    reports, problems = pool.run(2, check, settings)[0]
    assert [problem.split(" cannot")[0] for problem in problems if " cannot" in problem] == [
        f"node-{rank}: rank {rank}: checkpoint.dir = {tmp_path / 'file' / 'x'}" for rank in (0, 1)
    ]
    assert reports[0].groups


def test_rates_are_those_of_the_work_done(tmp_path: Path) -> None:
    a = torch.randn(512, 512)
    seconds = local.median_seconds(lambda: a @ a, CPU)
    assert 0.1 < local.matmul_tflops(CPU) / (2 * 512**3 / seconds / 1e12) < 10
    assert 0.05 < local.copy_gb_s(CPU) < 1000
    assert local.write_mb_s(tmp_path / "new", 0, 16) > 1 and not list((tmp_path / "new").iterdir())


@pytest.mark.slow
def test_the_command_prints_and_writes_json(small_run: list[str], tmp_path: Path) -> None:
    settings = [*small_run, f"train.run_dir={tmp_path / 'run'}"]
    command = [sys.executable, "-m", "megatron_ultramem", "preflight", "--ranks", "2"]
    command += ["--tolerance", "0.9", "--write-tolerance", "0.99"]  # tests share their cores and their disk
    done = subprocess.run(
        [*command, "--json", str(tmp_path / "found.json"), *settings], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("2 ranks on 1 hosts") and done.stdout.endswith("no problems found\n")
    found = json.loads((tmp_path / "found.json").read_text())
    assert [report["rank"] for report in found["reports"]] == [0, 1] and found["problems"] == []
