"""From measurements of many hosts to the one that stands out."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest

from megatron_ultramem.preflight.report import Folder, GroupRate, RankReport
from megatron_ultramem.preflight.verdict import Limits, find_problems, group_rates

HOSTS, PER_HOST = 4, 8
LIMITS = Limits(tolerance=0.15, clock_skew_s=1.0)


def healthy() -> list[RankReport]:
    """32 ranks that differ by a few per cent."""
    reports = []
    for rank in range(HOSTS * PER_HOST):
        host, local = divmod(rank, PER_HOST)
        noise = 1 + 0.01 * (rank * 7 % 5 - 2)
        node = tuple(range(host * PER_HOST, (host + 1) * PER_HOST))
        rail = tuple(range(local, HOSTS * PER_HOST, PER_HOST))
        reports.append(
            RankReport(
                rank,
                f"node-{host}",
                f"cuda:{local}",
                {"torch": "2.13.0", "nccl": "2.29"},
                "a" * 64,
                matmul_tflops=700 * noise,
                copy_gb_s=2500 * noise,
                host_copy_gb_s=55 * noise,
                write_mb_s=900 * (1 + 0.2 * (rank % 3 - 1)),
                link_gb_s=45 * noise,
                folders=[Folder("checkpoint.dir", "/scratch", 900.0, 60.0)],
                clock_skew_s=0.001 * host if local == 0 else None,
                groups=[GroupRate("node", node, 400 * noise, 300 * noise), GroupRate("data", rail, 40.0, 30.0)],
            )
        )
    return reports


def test_a_healthy_cluster_has_no_problems() -> None:
    assert find_problems(healthy(), LIMITS) == []


def slow(attribute: str, factor: float) -> Callable[[RankReport], None]:
    return lambda report: setattr(report, attribute, getattr(report, attribute) * factor)


def other_version(report: RankReport) -> None:
    report.versions = {**report.versions, "nccl": "2.20"}


def slow_links(report: RankReport) -> None:
    report.groups = [
        dataclasses.replace(rate, all_reduce_gb_s=rate.all_reduce_gb_s / 2) if rate.kind == "node" else rate
        for rate in report.groups
    ]


def full(report: RankReport) -> None:
    report.folders = [Folder("checkpoint.dir", "/scratch", 5.0, 60.0)]


CASES: dict[str, tuple[list[int], Callable[[RankReport], None], str]] = {
    "matmul_of_a_rank": ([19], slow("matmul_tflops", 0.6), "node-2: rank 19: matrix products at 4"),
    "copy_of_a_rank": ([19], slow("copy_gb_s", 0.6), "node-2: rank 19: copies on the device"),
    "pcie_of_a_rank": ([19], slow("host_copy_gb_s", 0.4), "node-2: rank 19: copies from the host at 22"),
    "a_slow_host": (list(range(8, 16)), slow("matmul_tflops", 0.6), "node-1: all of it: matrix products"),
    "slow_writes_of_a_host": (list(range(8, 16)), slow("write_mb_s", 0.2), "node-1: all of it: writing"),
    "slow_links_of_a_host": (list(range(24, 32)), slow_links, "node-3: node group of ranks 24 to 31: all-reduce at 19"),
    "slow_network_of_a_host": (
        list(range(24, 32)),
        slow("link_gb_s", 0.5),
        "node-3: all of it: exchange with other hosts at 2",
    ),
    "slow_adapter_of_a_rank": ([19], slow("link_gb_s", 0.5), "node-2: rank 19: exchange with other hosts at 2"),
    "another_nccl": (
        [9, 10],
        other_version,
        "node-1: other versions than most ranks: nccl 2.20 instead of 2.29 (",
    ),
    "other_settings": (
        [31],
        lambda report: setattr(report, "config_hash", "b" * 64),
        "node-3: another configuration than most ranks: settings bbbbbbbbbbbb instead of aaaaaaaaaaaa (rank 31)",
    ),
    "throttled": ([4], lambda report: report.problems.append("throttled: heat"), "node-0: rank 4: throttled: heat"),
    "a_full_disk": ([16], full, "node-2: checkpoint.dir = /scratch: 5.0 GiB are free, and the run will write about 60"),
    "a_fast_clock": (
        [8],
        lambda report: setattr(report, "clock_skew_s", 90.0),
        "node-1: its clock is 90.00 s ahead",
    ),
    "a_slow_clock": ([8], lambda report: setattr(report, "clock_skew_s", -90.0), "node-1: its clock is 90.00 s behind"),
}


@pytest.mark.parametrize("case", CASES)
def test_what_stands_out_is_named_once_and_nothing_else(case: str) -> None:
    ranks, spoil, expected = CASES[case]
    reports = healthy()
    for rank in ranks:
        spoil(reports[rank])
    (problem,) = find_problems(reports, LIMITS)
    assert str(problem).startswith(expected)


def test_rank_0s_own_clock_may_be_the_wrong_one() -> None:
    reports = healthy()
    for report in reports:
        if report.clock_skew_s is not None and report.host != "node-0":
            report.clock_skew_s = -30.0  # as they look from a clock that is ahead
    (problem,) = find_problems(reports, LIMITS)
    assert str(problem).startswith("node-0: its clock is 30.00 s ahead of")


def test_a_group_is_as_fast_as_its_slowest_rank_saw_it() -> None:
    reports = healthy()
    reports[5].groups[0] = dataclasses.replace(reports[5].groups[0], all_to_all_gb_s=7.0)
    rates = {rate.ranks: rate.all_to_all_gb_s for rate in group_rates(reports)["node"]}
    assert rates[tuple(range(8))] == 7.0 and rates[tuple(range(8, 16))] > 290


def test_hosts_of_one_rank_are_compared_with_each_other() -> None:
    reports = healthy()[::PER_HOST]
    reports[2].matmul_tflops = 300.0
    (problem,) = find_problems(reports, LIMITS)
    assert str(problem).startswith("node-2: all of it: matrix products at 300")
