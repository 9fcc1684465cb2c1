"""Exchanges between two GPUs through NCCL equal the lookup in whole tables, with the kernels and without."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.distributed.exchange_job import Case, exchange_jobs_on_gpus
from tests.distributed.test_exchange import CASES, assert_equals_whole
from tests.distributed.workers import WorkerPool

pytestmark = [pytest.mark.gpu, pytest.mark.two_gpus]


def on_gpus() -> dict[str, Case]:
    """The cases of two ranks: exactly, in plain PyTorch, and in fp32 and bf16 by the kernels."""
    found: dict[str, Case] = {}
    for name, case in CASES.items():
        if len(case.tokens) == 2:
            found[f"{name}-reference"] = replace(case, memory=case.memory | {"kernels": "reference"})
            dtype = case.dtype if case.dtype != torch.float64 else torch.float32
            found[f"{name}-kernels"] = replace(case, dtype=dtype, memory=case.memory | {"kernels": "fused"})
    wide = {"value_dim": 192, "pre_value_dim": 192, "num_keys": 40, "top_m": 32}
    for placement in ("rows", "columns"):
        for dtype in (torch.float32, torch.bfloat16):
            found[f"{placement}-wide-{dtype}"] = Case(placement, (300, 257), dtype=dtype, memory=wide)
    return found


@pytest.fixture(scope="module")
def results(gpus: WorkerPool) -> dict[str, list[dict[str, Any]]]:
    cases = on_gpus()
    ranks = gpus.run(2, exchange_jobs_on_gpus, list(cases.values()))
    return {name: [rank[number] for rank in ranks] for number, name in enumerate(cases)}


@pytest.mark.parametrize("name", on_gpus())
def test_exchange_equals_the_lookup_in_whole_tables(results: dict[str, list[dict[str, Any]]], name: str) -> None:
    assert_equals_whole(on_gpus()[name], results[name])
