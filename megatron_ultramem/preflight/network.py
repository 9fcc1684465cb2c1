"""Collectives of every process group of the layout, timed, and the clocks of the hosts, compared."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_ultramem.preflight.local import REPEATS, synchronize
from megatron_ultramem.preflight.report import GroupRate

_PINGS = 10
_PARTNERS = 3  # hosts that a host is paired with: a slow one makes its partners look slow, but not with the others


def groups_of_layout(hosts: Sequence[str]) -> dict[str, dist.ProcessGroup]:
    """This rank's groups by kind: the world, the ranks of its host, and those of Megatron's dimensions, without groups
    of one rank and without kinds that group all ranks as an earlier kind does. Collective.

    Args:
        hosts: of every rank.
    """
    mine = hosts[dist.get_rank()]
    same_host = [rank for rank, host in enumerate(hosts) if host == mine]
    candidates: dict[str, Callable[[], Any]] = {
        "world": lambda: dist.group.WORLD,
        "node": lambda: dist.new_group(same_host, use_local_synchronization=True),
        "tensor": parallel_state.get_tensor_model_parallel_group,
        "context": parallel_state.get_context_parallel_group,
        "pipeline": parallel_state.get_pipeline_model_parallel_group,
        "data": lambda: parallel_state.get_data_parallel_group(with_context_parallel=True),
        "memory or expert": parallel_state.get_expert_model_parallel_group,
    }
    found: dict[str, dist.ProcessGroup] = {}
    seen: list[list[tuple[int, ...]]] = []
    for kind, get in candidates.items():
        ranks = same_host if kind == "node" else dist.get_process_group_ranks(get())
        partition: list[tuple[int, ...]] = [()] * dist.get_world_size()
        dist.all_gather_object(partition, tuple(ranks))
        if partition not in seen and any(len(group) > 1 for group in partition):
            seen.append(partition)
            found[kind] = get()
    return found


def measure_groups(groups: Mapping[str, dist.ProcessGroup], device: torch.device, mebibytes: float) -> list[GroupRate]:
    """All groups of a kind at once, one kind after the other; tensors of that size. Collective."""
    rates = []
    for kind, group in groups.items():
        size = dist.get_world_size(group)
        words = max(size, int(mebibytes * 2**20) // 4 // size * size)
        data = torch.zeros(words, device=device)  # which sums leave as they are
        out = torch.empty_like(data)
        reduce = _median_seconds(partial(dist.all_reduce, data, group=group), device)
        exchange = _median_seconds(partial(dist.all_to_all_single, out, data, group=group), device)
        share = 4 * words * (size - 1) / size / 1e9
        rates.append(GroupRate(kind, tuple(dist.get_process_group_ranks(group)), 2 * share / reduce, share / exchange))
    return rates


def link_gb_s(hosts: Sequence[str], device: torch.device, mebibytes: float) -> float | None:
    """Bytes a second that this rank sends to and receives from a rank of another host at the same time, in the best of
    some pairings of hosts; None where there is nobody to be paired with. Collective.

    Collectives of a whole group are as slow as its slowest host and do not tell which it is; pairs do.
    """
    by_host: dict[str, list[int]] = {}
    for rank, host in enumerate(hosts):
        by_host.setdefault(host, []).append(rank)
    if len(by_host) == 1:
        return None
    names = list(by_host)
    mine = hosts[dist.get_rank()]
    place = by_host[mine].index(dist.get_rank())
    data = torch.zeros(max(1, int(mebibytes * 2**20) // 4), device=device)
    out = torch.empty_like(data)
    best = None
    for pairs in pairings(len(names), _PARTNERS):
        partner = names[pairs[names.index(mine)]] if names.index(mine) in pairs else None
        peers = by_host[partner] if partner is not None else []
        peer = peers[place] if place < len(peers) else None
        seconds = _median_seconds(partial(_swap, data, out, peer), device)
        if peer is not None:
            best = max(best or 0.0, 4 * len(data) / seconds / 1e9)
    return best


def pairings(count: int, rounds: int) -> list[dict[int, int]]:
    """Who meets whom in so many rounds, or all there are, of a tournament in which everybody meets everybody once.
    With an odd count somebody rests."""
    seats = list(range(count + count % 2))
    found = []
    for _ in range(min(rounds, len(seats) - 1)):
        half = zip(seats, reversed(seats), strict=True)
        found.append({one: other for one, other in half if one < count and other < count})
        seats = [seats[0], seats[-1], *seats[1:-1]]
    return found


def _swap(data: torch.Tensor, out: torch.Tensor, peer: int | None) -> None:
    if peer is None:
        return
    for work in dist.batch_isend_irecv([dist.P2POp(dist.isend, data, peer), dist.P2POp(dist.irecv, out, peer)]):
        work.wait()


def clock_skew(
    group: dist.ProcessGroup, leaders: Sequence[int], clock: Callable[[], float]
) -> tuple[float, float] | None:
    """Seconds by which this host's clock is ahead of rank 0's, and how wrong that may be; None on ranks that are not
    among `leaders`, one for each host. Each in turn asks rank 0 for the time, and the quickest answer counts.
    Collective over `group`, of CPU tensors, which holds all ranks."""
    rank, now = dist.get_rank(), torch.zeros(1, dtype=torch.float64)
    answer = None
    for leader in leaders:
        if leader == 0:
            answer = (0.0, 0.0) if rank == 0 else answer
        elif rank == leader:
            tries = []
            for _ in range(_PINGS):
                asked = clock()
                dist.send(now, 0, group=group)
                dist.recv(now, 0, group=group)
                heard = clock()
                tries.append((heard - asked, (asked + heard) / 2 - float(now)))
            delay, ahead = min(tries)
            answer = ahead, delay / 2
        elif rank == 0:
            for _ in range(_PINGS):
                dist.recv(now, leader, group=group)
                now.fill_(clock())
                dist.send(now, leader, group=group)
    dist.barrier(group=group)
    return answer


def _median_seconds(collective: Callable[[], object], device: torch.device) -> float:
    """Of several calls after a first one, which makes the connections."""
    collective()
    times = []
    for _ in range(REPEATS):
        synchronize(device)
        dist.barrier()
        started = time.perf_counter()
        collective()
        synchronize(device)
        times.append(time.perf_counter() - started)
    return statistics.median(times)
