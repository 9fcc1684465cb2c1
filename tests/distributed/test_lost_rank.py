"""A rank that dies or hangs in the exchange ends the others, with an error that names it."""

from __future__ import annotations

import datetime
import multiprocessing
import os
import time
from multiprocessing.connection import Connection

import pytest
import torch
import torch.distributed as dist

from megatron_ultramem.errors import ExchangeError
from megatron_ultramem.parallel.channel import Channel
from megatron_ultramem.parallel.traffic import Traffic
from tests.distributed.workers import free_port

RANKS, LOST, TIMEOUT = 3, 1, 4.0


def exchange_until_lost(rank: int, port: int, how: str, answer: Connection) -> None:
    dist.init_process_group(
        "gloo",
        init_method=f"tcp://127.0.0.1:{port}",
        rank=rank,
        world_size=RANKS,
        timeout=datetime.timedelta(seconds=TIMEOUT),
    )
    channel = Channel(dist.group.WORLD, Traffic(), "rows")
    ones = [[1] * RANKS]
    channel.all_to_all("forward", [torch.ones(RANKS)], ones, ones)
    if rank == LOST:
        if how == "dies":
            os._exit(1)
        time.sleep(4 * TIMEOUT)
        os._exit(0)
    started = time.monotonic()
    try:
        channel.all_to_all("backward", [torch.ones(RANKS)], ones, ones)
        answer.send(("no error", 0.0))
    except ExchangeError as error:
        answer.send((str(error), time.monotonic() - started))
    answer.close()
    time.sleep(1.0)  # rank 0 holds the store that the others report to
    os._exit(0)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["dies", "hangs"])
def test_the_others_end_within_the_timeout_and_name_it(how: str) -> None:
    context = multiprocessing.get_context("spawn")
    port, answers, processes = free_port(), [], []
    for rank in range(RANKS):
        ours, theirs = context.Pipe(duplex=False)
        processes.append(context.Process(target=exchange_until_lost, args=(rank, port, how, theirs)))
        processes[-1].start()
        theirs.close()
        answers.append(ours)
    try:
        for rank in set(range(RANKS)) - {LOST}:
            assert answers[rank].poll(60)
            message, seconds = answers[rank].recv()
            assert message.startswith(f"rank {LOST} ended or did not answer in the backward exchange by rows"), message
            assert seconds < 2 * TIMEOUT + 5
    finally:
        for process in processes:
            process.kill()
            process.join()
