"""The table lookup: reference.py (what it computes), Triton and CUDA kernels, and the differentiable operations in ops.py."""
