#!/usr/bin/env python3
"""Benchmark of `ultramem_kernels` on one GPU: times, floors counted from bytes and FLOPs, and a correctness gate.

    python tools/bench_kernels.py [--cases 227m,decode] [--quick]

Every timing is the median over replays of a CUDA graph that holds several calls on different indices, so it contains
neither launch gaps nor a warm cache (a case's rows are many times the L2 cache); `eager_ms` includes the launches, and
`host_ms` is the time that Python takes to launch a call. A case whose result is wrong is not reported: its rows are
dropped, the other cases go on, and the program ends with an error that names it.

Rows of the result: {"case", "metric", "value", "unit"}. Metrics ending in `_floor_ms` are counted: bytes over the
measured copy bandwidth, or FLOPs over the measured rate of a large bf16 matrix product, whichever is longer.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from ultramem_kernels.bench.fp8_lookups import bench_fp8_lookup
from ultramem_kernels.bench.layers import bench_decode, bench_layer
from ultramem_kernels.bench.lookups import bench_columns, bench_lookup
from ultramem_kernels.bench.record import Ceilings, Record, measure_ceilings
from ultramem_kernels.bench.shapes import SHAPES, Shape, make_tables, uniform_rows, zipf_rows

from megatron_ultramem.results import Row, write_results

RESULTS = Path(__file__).resolve().parents[1] / "benchmarks" / "results"
CASES = ("227m", "227m_zipf", "decode", "fp8", "partial", "120b", "sweep")
# Tokens, m, widths of values and pre-values, rows.
SWEEP = (
    (1024, 32, 192, 192, 2000000), (4096, 32, 192, 192, 2000000), (65536, 32, 192, 192, 2000000),
    (16384, 8, 192, 192, 2000000), (16384, 128, 192, 192, 2000000), (16384, 32, 64, 64, 2000000),
    (16384, 32, 768, 384, 1000000), (16384, 32, 192, 192, 130000), (16384, 33, 72, 72, 2000000),
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results file kernels_<gpu>.json")
    parser.add_argument("--cases", default=",".join(CASES), help="comma-separated (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="two sweep shapes, no comparisons")
    args = parser.parse_args()
    cases = args.cases.split(",")
    if unknown := [case for case in cases if case not in CASES]:
        parser.error(f"--cases {unknown[0]}: legal: {', '.join(CASES)}")
    if not torch.cuda.is_available():
        parser.error("no CUDA GPU found")
    torch.manual_seed(0)
    record = Record()
    ceilings = measure_ceilings(record)
    for group in ({"227m", "227m_zipf", "decode", "fp8"}, {"partial"}, {"120b"}, {"sweep"}):  # one set of tables each
        if chosen := group.intersection(cases):
            _measure(record, ceilings, chosen, args.quick, args.out)
    _write(args.out, record)
    if record.wrong:
        sys.exit("\n".join(("wrong results, not reported:", *record.wrong)))


def _measure(record: Record, ceilings: Ceilings, cases: set[str], quick: bool, out: Path) -> None:
    """Cases that share tables."""
    if "sweep" in cases:
        return _sweep(record, ceilings, quick, out)
    if "partial" in cases:
        record.case("227m_columns_of_2", bench_columns, ceilings, "227m_columns_of_2", SHAPES["227m"], 2)
        return _write(out, record)
    shape = SHAPES["120b" if "120b" in cases else "227m"]
    tables = make_tables(shape)
    if "227m" in cases:
        record.add("227m", "copy_gb_s", ceilings.copy_gb_s, "GB/s")
    for case in ("227m", "120b"):
        if case in cases:
            compare = case == "227m" and not quick
            record.case(case, bench_lookup, ceilings, case, shape, uniform_rows, tables, compare)
            record.case(case, bench_layer, ceilings, case, shape, tables, compare)
            _write(out, record)
    if "227m_zipf" in cases:
        record.case("227m_zipf", bench_lookup, ceilings, "227m_zipf", shape, zipf_rows, tables, False)
    if "fp8" in cases:
        record.case("227m_fp8", bench_fp8_lookup, ceilings, "227m_fp8", shape, tables)
    if "decode" in cases:
        record.case("decode", bench_decode, "decode", shape, tables)
    return _write(out, record)


def _sweep(record: Record, ceilings: Ceilings, quick: bool, out: Path) -> None:
    """Lookups over tokens, m, widths and rows, uniform and Zipf."""
    for tokens, m, value_dim, pre_value_dim, rows in SWEEP[:2] if quick else SWEEP:
        shape = Shape(tokens, 1 << 12, 64, 32, m, value_dim, pre_value_dim, rows, 64)
        tables = make_tables(shape)
        for name, choose_rows in (("uniform", uniform_rows), ("zipf", zipf_rows)):
            case = f"T{tokens}_m{m}_Dv{value_dim}_Dp{pre_value_dim}_{rows // 1000}k_{name}"
            record.case(case, bench_lookup, ceilings, case, shape, choose_rows, tables, False)
        _write(out, record)
        del tables


def _write(out: Path, record: Record) -> None:
    write_results(out, "kernels", [Row(*figure) for figure in record.figures])


if __name__ == "__main__":
    main()
