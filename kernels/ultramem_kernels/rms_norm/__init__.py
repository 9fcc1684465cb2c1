"""RMS norm of queries and keys: reference.py, kernel_triton.py, and the differentiable operation in ops.py."""
