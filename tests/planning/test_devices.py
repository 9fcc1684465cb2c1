"""Peaks of devices by the names that CUDA reports."""

import pytest

from megatron_ultramem.planning.devices import peak_bf16_flops


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989.5),
        ("NVIDIA H100 PCIe", 756.5),
        ("NVIDIA H100 NVL", 835.5),
        ("NVIDIA H200", 989.5),
        ("NVIDIA H200 NVL", 835.5),
        ("NVIDIA GH200 480GB", 989.5),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA B200", 2250),
        ("NVIDIA GB200", 2500),
    ],
)
def test_known_devices_have_their_dense_peak(name, tflops):
    assert peak_bf16_flops(name) == tflops * 1e12


@pytest.mark.parametrize(
    "name", ["NVIDIA GeForce RTX 3060", "NVIDIA H20", "NVIDIA A10", "NVIDIA H100 80GB HBM3 MIG 1g.10gb"]
)
def test_unknown_devices_and_slices_have_none(name):
    assert peak_bf16_flops(name) is None
