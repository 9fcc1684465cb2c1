"""The machines that a plan is for: GPUs, memory, bandwidths, and what of them programs reach.

Peaks are datasheet figures; what programs reach of them is a share, measured where the comment says so. A preset can be
changed setting by setting (`cluster.memory_gib=141`), or a YAML file of the same settings can take its place.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from megatron_ultramem.errors import ConfigError
from megatron_ultramem.planning.devices import peak_bf16_flops


@dataclass(frozen=True)
class Cluster:
    """One kind of GPU, `gpus_per_node` of them behind a fast link, and nodes behind a slower one.

    Bandwidths are what one GPU receives in a large collective, in GB/s (1e9 bytes).
    """

    name: str
    memory_gib: float  # that torch reports as the device's total
    peak_tflops: float  # dense bf16
    hbm_gb_per_s: float
    intra_node_gb_per_s: float
    inter_node_gb_per_s: float
    gpus_per_node: int = 8
    fp8_times: float = 2.0  # peak of dense FP8 products, in peaks of bf16; 0: there are none
    latency_us: float = 30.0  # of a small collective; measured between H200s
    launch_us: float = 10.0  # host time of a kernel launch with what Python does around it; measured on an H100 machine
    # CUDA context, NCCL's and cuBLAS's own buffers, which torch's allocator does not see: 3.6 on a rank of two H200s.
    reserved_gib: float = 4.0
    fragmentation: float = 0.06  # share of activations and buffers that the allocator holds but cannot use

    @property
    def usable_gib(self) -> float:
        """What torch's allocator can hand out."""
        return self.memory_gib - self.reserved_gib


def _peak(name: str) -> float:
    found = peak_bf16_flops(name)
    assert found is not None
    return found / 1e12


def presets() -> dict[str, Cluster]:
    """H100, H200 and B200 machines (SXM, NVLink, one 400 Gb/s link a GPU) and A100 (80 GB, one 200 Gb/s link a GPU)."""
    # All-to-all within a node: 282 GB/s was measured on H200, whose NVLink is the H100's; others by their links' speed.
    nvlink4 = 282.0
    return {
        "h100": Cluster("h100", 79.1, _peak("h100"), 3350.0, nvlink4, 45.0),
        "h200": Cluster("h200", 139.8, _peak("h200"), 4800.0, nvlink4, 45.0),
        "b200": Cluster("b200", 178.3, _peak("b200"), 8000.0, 2 * nvlink4, 45.0),
        "a100": Cluster("a100", 79.2, _peak("a100"), 2039.0, nvlink4 * 300 / 450, 22.5, fp8_times=0.0),
    }


def load_cluster(source: str | Cluster, overrides: Sequence[str] = ()) -> Cluster:
    """A preset by its name, or a YAML file of settings (which may name a `preset` to start from), then overrides.

    Args:
        source: h100, h200, b200, a100, the path of a .yaml file, or a cluster.
        overrides: 'cluster.setting=value'.

    Raises:
        ConfigError: naming the setting or file, its value and what is legal.
    """
    known = presets()
    settings: dict[str, Any] = {}
    base: Cluster | None
    if isinstance(source, Cluster):
        base = source
    elif source.lower() in known:
        base = known[source.lower()]
    elif source.endswith((".yaml", ".yml")):
        settings = _read(Path(source))
        preset = settings.pop("preset", None)
        if preset is not None and preset not in known:
            raise ConfigError(f"cluster file {source}: preset = {preset!r}; legal: {', '.join(known)}")
        base = known[preset] if preset else None
        settings.setdefault("name", Path(source).stem)
    else:
        raise ConfigError(f"--cluster {source}: unknown; legal: {', '.join(known)}, or a .yaml file of settings")
    for override in overrides:
        key, _, text = override.partition("=")
        settings[key.removeprefix("cluster.")] = yaml.safe_load(text) if text else None
    return _checked(base, settings)


def _read(path: Path) -> dict[str, Any]:
    try:
        settings = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"cluster file {path}: cannot be read ({str(error).replace(chr(10), ' ')})") from None
    if not isinstance(settings, dict):
        raise ConfigError(f"cluster file {path}: must hold a mapping of settings, found {type(settings).__name__}")
    return settings


def _checked(base: Cluster | None, settings: dict[str, Any]) -> Cluster:
    fields = {field.name: field for field in dataclasses.fields(Cluster)}
    for key, value in settings.items():
        if key not in fields:
            close = difflib.get_close_matches(str(key), list(fields), n=1)
            hint = f"did you mean cluster.{close[0]}? " if close else ""
            raise ConfigError(f"cluster.{key}: unknown setting; {hint}legal: {', '.join(fields)}")
        if key == "name":
            continue
        whole, zero_is_fine = key == "gpus_per_node", key in _MAY_BE_ZERO
        if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)):
            raise ConfigError(f"cluster.{key} = {value!r}: legal: {'an integer' if whole else 'a number'}")
        if value < 0 or (value == 0 and not zero_is_fine):
            raise ConfigError(f"cluster.{key} = {value}: legal: {'0 or more' if zero_is_fine else 'above 0'}")
    missing = [name for name, field in fields.items() if field.default is dataclasses.MISSING and name not in settings]
    if base is None and missing:
        raise ConfigError(
            f"cluster {settings.get('name')}: missing {', '.join(missing)}; or name a `preset` to start from"
        )
    cluster = Cluster(**settings) if base is None else dataclasses.replace(base, **settings)
    if cluster.memory_gib <= cluster.reserved_gib:
        raise ConfigError(
            f"cluster.memory_gib = {cluster.memory_gib:g}: legal: above cluster.reserved_gib = "
            f"{cluster.reserved_gib:g}, which programs cannot use"
        )
    return cluster


_MAY_BE_ZERO = ("fp8_times", "latency_us", "launch_us", "reserved_gib", "fragmentation")
