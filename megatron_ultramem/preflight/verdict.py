"""From the reports of all ranks to what is wrong, each problem with the host that it is on. Pure functions."""

from __future__ import annotations

import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from megatron_ultramem.preflight.report import GroupRate, RankReport

Key = TypeVar("Key")
RATES: dict[str, tuple[str, str]] = {  # attribute: (name, unit)
    "matmul_tflops": ("matrix products", "TFLOP/s"),
    "copy_gb_s": ("copies on the device", "GB/s"),
    "host_copy_gb_s": ("copies from the host", "GB/s"),
    "write_mb_s": ("writing to the checkpoint folder", "MB/s"),
    "link_gb_s": ("exchange with other hosts", "GB/s"),
}


@dataclass(frozen=True)
class Limits:
    """What is still taken for healthy."""

    tolerance: float = 0.15  # by which a rate may fall short of the median
    write_tolerance: float = 0.5  # the same for writing, whose speed varies by itself
    clock_skew_s: float = 1.0


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong, and where."""

    hosts: tuple[str, ...]
    text: str

    def __str__(self) -> str:
        return f"{', '.join(self.hosts)}: {self.text}"


def find_problems(reports: Sequence[RankReport], limits: Limits) -> list[Problem]:
    """All problems, the plain contradictions first."""
    return [
        *_minorities(reports, "another configuration", lambda report: {"settings": report.config_hash[:12]}),
        *_minorities(reports, "other versions", lambda report: report.versions),
        *(Problem((report.host,), f"rank {report.rank}: {text}") for report in reports for text in report.problems),
        *_short_of_space(reports),
        *_wrong_clocks(reports, limits.clock_skew_s),
        *_slow_ranks(reports, limits),
        *_slow_hosts(reports, limits),
        *_slow_groups(reports, limits.tolerance),
    ]


def by_host(reports: Sequence[RankReport]) -> dict[str, list[RankReport]]:
    """The reports of each host, in the order of ranks."""
    found: dict[str, list[RankReport]] = defaultdict(list)
    for report in reports:
        found[report.host].append(report)
    return dict(found)


def group_rates(reports: Sequence[RankReport]) -> dict[str, list[GroupRate]]:
    """Every group of more than one rank once, by kind, with the least rate that one of its ranks saw."""
    members: dict[tuple[str, tuple[int, ...]], list[GroupRate]] = defaultdict(list)
    for report in reports:
        for rate in report.groups:
            members[rate.kind, rate.ranks].append(rate)
    found: dict[str, list[GroupRate]] = defaultdict(list)
    for (kind, ranks), rates in members.items():
        if len(ranks) > 1:
            reduce, exchange = min(rate.all_reduce_gb_s for rate in rates), min(rate.all_to_all_gb_s for rate in rates)
            found[kind].append(GroupRate(kind, ranks, reduce, exchange))
    return dict(found)


def _minorities(
    reports: Sequence[RankReport], what: str, get: Callable[[RankReport], Mapping[str, str]]
) -> Iterator[Problem]:
    """Hosts with a value that most ranks do not have."""
    for name in sorted({name for report in reports for name in get(report)}):
        values = [get(report).get(name, "none") for report in reports]
        usual, _ = Counter(values).most_common(1)[0]
        for value in sorted(set(values) - {usual}):
            ranks = [report.rank for report, found in zip(reports, values, strict=True) if found == value]
            hosts = tuple(dict.fromkeys(report.host for report in reports if report.rank in ranks))
            yield Problem(hosts, f"{what} than most ranks: {name} {value} instead of {usual} ({_ranks(ranks)})")


def _short_of_space(reports: Sequence[RankReport]) -> Iterator[Problem]:
    for host, ranks in by_host(reports).items():
        for folder in ranks[0].folders:
            if folder.free_gib is not None and folder.free_gib < folder.wanted_gib:
                yield Problem(
                    (host,),
                    f"{folder.setting} = {folder.path}: {folder.free_gib:.1f} GiB are free, and the run will write "
                    f"about {folder.wanted_gib:.1f} GiB",
                )


def _wrong_clocks(reports: Sequence[RankReport], limit: float) -> Iterator[Problem]:
    """Against the median of all hosts: rank 0's own clock may be the one that is wrong."""
    known = [report for report in reports if report.clock_skew_s is not None]
    if not known:
        return
    median = statistics.median_low([report.clock_skew_s or 0.0 for report in known])
    for report in known:
        ahead = (report.clock_skew_s or 0.0) - median
        if abs(ahead) - report.clock_error_s > limit:
            way = "ahead of" if ahead > 0 else "behind"
            yield Problem((report.host,), f"its clock is {abs(ahead):.2f} s {way} that of most hosts")


def _slow_ranks(reports: Sequence[RankReport], limits: Limits) -> Iterator[Problem]:
    """Ranks that fall short of the median of their host."""
    for attribute, (name, unit) in RATES.items():
        for host, ranks in by_host(reports).items():
            rates = {report.rank: rate for report in ranks if (rate := getattr(report, attribute)) is not None}
            for rank, rate, median in _short(rates, _tolerance(attribute, limits)):
                share = f"{rate / median:.0%} of its host's median of {median:.4g}"
                yield Problem((host,), f"rank {rank}: {name} at {rate:.4g} {unit}, {share}")


def _slow_hosts(reports: Sequence[RankReport], limits: Limits) -> Iterator[Problem]:
    """Hosts that are slow as a whole, by the median of their ranks."""
    for attribute, (name, unit) in RATES.items():
        medians = {}
        for host, ranks in by_host(reports).items():
            rates = [rate for report in ranks if (rate := getattr(report, attribute)) is not None]
            if rates:
                medians[host] = statistics.median(rates)
        for host, rate, median in _short(medians, _tolerance(attribute, limits)):
            share = f"{rate / median:.0%} of the hosts' median of {median:.4g}"
            yield Problem((host,), f"all of it: {name} at {rate:.4g} {unit}, {share}")


def _short(rates: Mapping[Key, float], tolerance: float) -> Iterator[tuple[Key, float, float]]:
    """(key, rate, median) of the rates that fall short of the median of them all."""
    if not rates:
        return
    median = statistics.median(rates.values())
    for key, rate in rates.items():
        if rate < (1 - tolerance) * median:
            yield key, rate, median


def _slow_groups(reports: Sequence[RankReport], tolerance: float) -> Iterator[Problem]:
    """Groups whose collectives fall short of the median of their kind, among groups of their size."""
    hosts = {report.rank: report.host for report in reports}
    for kind, all_groups in group_rates(reports).items():
        for size in sorted({len(group.ranks) for group in all_groups}):
            groups = [group for group in all_groups if len(group.ranks) == size]
            for attribute, name in (("all_reduce_gb_s", "all-reduce"), ("all_to_all_gb_s", "all-to-all")):
                median = statistics.median(getattr(group, attribute) for group in groups)
                for group in groups:
                    rate = getattr(group, attribute)
                    if rate < (1 - tolerance) * median:
                        share = f"{rate / median:.0%} of such groups' median of {median:.4g}"
                        yield Problem(
                            tuple(dict.fromkeys(hosts[rank] for rank in group.ranks)),
                            f"{kind} group of {_ranks(group.ranks)}: {name} at {rate:.4g} GB/s, {share}",
                        )


def _tolerance(attribute: str, limits: Limits) -> float:
    return limits.write_tolerance if attribute == "write_mb_s" else limits.tolerance


def _ranks(ranks: Sequence[int]) -> str:
    """`rank 3`, `ranks 0 to 7`, `ranks 0, 8, 16 and 5 more`."""
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    if list(ranks) == list(range(ranks[0], ranks[-1] + 1)):
        return f"ranks {ranks[0]} to {ranks[-1]}"
    more = f" and {len(ranks) - 3} more" if len(ranks) > 3 else ""
    return f"ranks {', '.join(map(str, ranks[:3]))}{more}"
