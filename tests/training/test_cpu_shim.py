"""The CPU on a machine that has GPUs and their packages, and checkpoints that come from GPUs."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

from megatron_ultramem import platform

ROOT = Path(__file__).resolve().parents[2]
LOOK = """
from megatron_ultramem import platform
platform.prepare("cpu")
import megatron.core.optimizer
from megatron.core.transformer.moe import experts
print(megatron.core.optimizer.USING_PYTORCH_OPTIMIZER, platform.has_transformer_engine(), experts.HAVE_TE)
"""


def test_megatron_takes_torchs_optimizer_where_transformer_engine_is_installed_too(tmp_path: Path) -> None:
    for package in ("transformer_engine", "apex"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text("raise RuntimeError('imported without a GPU')")
    path = os.pathsep.join([str(tmp_path), str(ROOT), str(ROOT / "kernels")])
    done = subprocess.run(
        [sys.executable, "-c", LOOK],
        env=os.environ | {"PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == ["True", "False", "False"]


def test_random_states_of_a_gpu_leave_dropout_as_it_is() -> None:
    platform.prepare()
    from megatron_ultramem.training.checkpoint_state import restore_rng

    cuda = torch.zeros(16, dtype=torch.uint8)  # seed and offset
    state = {"python": random.getstate(), "numpy": np.random.get_state(), "torch": torch.get_rng_state()}
    expected = torch.rand(3)
    assert not restore_rng({**state, "cuda": cuda, "tracker": {"model-parallel-rng": cuda}})
    assert torch.equal(torch.rand(3), expected)
    assert restore_rng({**state, "cuda": state["torch"], "tracker": {}})


def test_the_step_of_a_checkpoint_is_an_int() -> None:
    """Transformer Engine's AdamW hands it to a kernel as one; torch's counts in floats."""
    platform.prepare()
    from megatron_ultramem.training.checkpoint_repairs import share_step

    state = {0: {"optimizer": {"param_groups": [{"step": 3.0}]}}, 1: {"optimizer": {"param_groups": [{"step": 0.0}]}}}
    share_step(state)
    steps = [group["step"] for part in state.values() for group in part["optimizer"]["param_groups"]]
    assert steps == [3, 3] and all(type(step) is int for step in steps)
