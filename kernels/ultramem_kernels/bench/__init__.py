"""What `tools/bench_kernels.py` measures: shapes, cases, floors counted from bytes and FLOPs, correctness gates."""
