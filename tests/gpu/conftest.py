"""GPU tests compare fp32 runs, so matrices are multiplied in fp32: Transformer Engine would take TF32, of 10 bits."""

from __future__ import annotations

import os

# Read by cuBLAS when a process starts to use it; the ranks of a test inherit it.
os.environ.setdefault("NVIDIA_TF32_OVERRIDE", "0")
