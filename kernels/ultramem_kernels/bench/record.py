"""Figures as they are measured, the gates that they must pass, and what the GPU reaches at best."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from ultramem_kernels.timing import eager_ms, graph_ms


class WrongResult(RuntimeError):
    """A kernel's result is off; nothing is reported."""


class Figure(NamedTuple):
    """One measured or counted number."""

    case: str
    metric: str
    value: float
    unit: str


class Record:
    """Figures, printed as they come; cases whose results are wrong lose theirs."""

    def __init__(self) -> None:
        self.figures: list[Figure] = []
        self.wrong: list[str] = []

    def add(self, case: str, metric: str, value: float, unit: str) -> None:
        """Keeps and prints one figure."""
        self.figures.append(Figure(case, metric, round(value, 5), unit))
        print(f"{case:34s} {metric:42s} {value:12.4f} {unit}", flush=True)

    def case(self, case: str, bench: Callable[..., None], *arguments: Any) -> None:
        """`bench(record, *arguments)`; if it finds a wrong result nothing of the case is kept."""
        try:
            bench(self, *arguments)
        except WrongResult as error:
            self.wrong.append(str(error))
            self.figures = [figure for figure in self.figures if figure.case != case]
            print(f"{case}: {error}; dropped", flush=True)


def check(what: str, got: torch.Tensor, wanted: torch.Tensor, tolerance: float) -> None:
    """Raises WrongResult unless ||got - wanted|| <= tolerance * ||wanted|| (NaN never passes)."""
    if got.numel() < 1 << 26:
        got, wanted = got.double(), wanted.double()
    error = ((got - wanted).norm() / wanted.norm()).item()
    if not error <= tolerance:
        raise WrongResult(f"{what}: relative error {error:.2e} is above {tolerance:.0e}")


class Ceilings(NamedTuple):
    """What a GPU reaches: copy bandwidth (GB/s read plus written) and a large bf16 matrix product (TFLOP/s)."""

    copy_gb_s: float
    tflops: float

    def floor_ms(self, num_bytes: float, flops: float = 0.0) -> float:
        """Milliseconds that moving the bytes or computing the FLOPs takes at least, whichever is longer."""
        return max(num_bytes / self.copy_gb_s / 1e6, flops / self.tflops / 1e9)


def measure_ceilings(record: Record) -> Ceilings:
    """Of the current GPU; kept under the case `device`."""
    source = torch.randint(0, 255, (1 << 30,), device="cuda", dtype=torch.uint8)
    target = torch.empty_like(source)
    # Not from a graph: there a copy runs on the copy engine, which is slower.
    copy_gb_s = 2 * source.numel() / eager_ms(lambda: target.copy_(source)) / 1e6
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    tflops = 2 * 8192**3 / graph_ms([lambda: a @ b]) / 1e9
    record.add("device", "copy_gb_s", copy_gb_s, "GB/s")
    record.add("device", "matmul_tflops", tflops, "TFLOP/s")
    return Ceilings(copy_gb_s, tflops)
