"""What a GPU's own counters say: memory errors, throttling, temperature. Read through NVML (package nvidia-ml-py)."""

from __future__ import annotations

from typing import Any

import torch


def gpu_problems(device: torch.device) -> tuple[list[str], str | None]:
    """Problems of a GPU, and why something could not be read (None: all was). To be called while the GPU works, because
    an idle one does not throttle."""
    if device.type != "cuda":
        return [], None
    try:
        import pynvml
    except ImportError:
        return [], "memory errors and throttling of GPUs are not read: nvidia-ml-py is not installed"
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        return [], f"memory errors and throttling of GPUs are not read: {error}"
    try:
        uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
        handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
        return [*_memory_errors(pynvml, handle), *_throttling(pynvml, handle)], None
    except pynvml.NVMLError as error:
        return [], f"the counters of {device} cannot be read: {error}"
    finally:
        pynvml.nvmlShutdown()


def _memory_errors(nvml: Any, handle: Any) -> list[str]:
    found = []
    try:
        errors = nvml.nvmlDeviceGetTotalEccErrors(
            handle, nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, nvml.NVML_VOLATILE_ECC
        )
        if errors:
            found.append(f"{errors} uncorrected memory errors since the driver was loaded")
    except nvml.NVMLError_NotSupported:
        pass  # GPUs without ECC
    try:
        _, _, pending, failed = nvml.nvmlDeviceGetRemappedRows(handle)
        if pending:
            found.append("rows of its memory wait to be remapped, which takes a reset")
        if failed:
            found.append("rows of its memory could not be remapped")
    except nvml.NVMLError_NotSupported:
        pass  # before Ampere
    return found


def _throttling(nvml: Any, handle: Any) -> list[str]:
    reasons = nvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle)
    words = {
        nvml.nvmlClocksThrottleReasonHwSlowdown: "hardware slowdown",
        nvml.nvmlClocksThrottleReasonHwThermalSlowdown: "heat (hardware)",
        nvml.nvmlClocksThrottleReasonSwThermalSlowdown: "heat (driver)",
        nvml.nvmlClocksThrottleReasonHwPowerBrakeSlowdown: "power brake",
    }
    named = [text for bit, text in words.items() if reasons & bit]
    if not named:
        return []
    temperature = nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU)
    return [f"throttled: {', '.join(named)}, at {temperature} degrees Celsius"]
