"""RMS norm of queries and keys: reference.py says what it computes, ops.py makes it differentiable."""
