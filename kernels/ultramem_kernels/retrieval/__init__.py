"""The retrieval: reference.py (what it computes), Triton and CUDA kernels, and the differentiable operation in ops.py."""
