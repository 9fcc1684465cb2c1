"""Peak dense bf16 FLOP/s of known GPUs, for model FLOP/s utilisation (MFU). Datasheets quote the figure with 2:4
sparsity; a dense model can reach half of it, which is what stands here. An unknown device has no MFU."""

from __future__ import annotations

# (words of the device's name as CUDA reports it, dense bf16 FLOP/s). The first entry whose words are all in the name
# wins, so the special forms of a chip stand before its general form.
_PEAK_BF16 = (
    # NVIDIA GB200 NVL72 datasheet: 360 PFLOP/s FP16/BF16 with sparsity over 72 GPUs, half of it dense.
    (("gb200",), 2500e12),
    # NVIDIA DGX B200 / HGX B200 datasheet: 36 PFLOP/s FP16/BF16 with sparsity over 8 GPUs, half of it dense.
    (("b200",), 2250e12),
    # NVIDIA H200 datasheet: BF16 1671 TFLOP/s with sparsity (NVL), 1979 TFLOP/s with sparsity (SXM).
    (("h200", "nvl"), 835.5e12),
    (("gh200",), 989.5e12),  # NVIDIA GH200 datasheet: the H100 SXM figure
    (("h200",), 989.5e12),
    # NVIDIA H100 datasheet: BF16 1979 (SXM), 1671 (NVL) and 1513 (PCIe) TFLOP/s with sparsity.
    (("h100", "nvl"), 835.5e12),
    (("h100", "pcie"), 756.5e12),
    (("h100",), 989.5e12),
    # NVIDIA A100 datasheet: BF16 312 TFLOP/s dense for every form.
    (("a100",), 312e12),
)


def peak_bf16_flops(device_name: str) -> float | None:
    """Dense bf16 FLOP/s of the device that CUDA calls `device_name`; None when it is unknown or a MIG slice."""
    name = device_name.lower().replace("-", " ")
    if "mig" in name.split():
        return None
    for words, peak in _PEAK_BF16:
        if all(word in name for word in words):
            return peak
    return None
