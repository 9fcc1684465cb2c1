"""The table lookup: reference.py says what it computes, ops.py makes it differentiable, the rest are the kernels."""
