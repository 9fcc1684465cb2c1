"""What one rank found out. Reports travel between ranks and into --json as they are."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Folder:
    """A folder that the run writes to."""

    setting: str  # that names it
    path: str
    free_gib: float | None  # None: it cannot be read
    wanted_gib: float  # that the run will write there


@dataclass(frozen=True)
class GroupRate:
    """Rates of the collectives of one process group, as this rank saw them."""

    kind: str  # 'world', 'node', or the dimension of the layout
    ranks: tuple[int, ...]
    all_reduce_gb_s: float  # of the bus: 2 (n-1)/n of the bytes, over the time
    all_to_all_gb_s: float  # received from others, over the time


@dataclass
class RankReport:
    """One rank. Rates are medians of several measurements; None: not measured here."""

    rank: int
    host: str
    device: str
    versions: dict[str, str]
    config_hash: str
    matmul_tflops: float | None = None
    copy_gb_s: float | None = None  # on the device, bytes read and written
    host_copy_gb_s: float | None = None  # from pinned host memory to the GPU
    write_mb_s: float | None = None  # to the checkpoint folder, all ranks at once
    link_gb_s: float | None = None  # to and from one rank of another host, all ranks at once; the best of some hosts
    folders: list[Folder] = field(default_factory=list)
    clock_skew_s: float | None = None  # of this host's clock against rank 0's; on the first rank of a host
    clock_error_s: float = 0.0  # how wrong that may be
    groups: list[GroupRate] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)  # that this rank found by itself
    device_failed: bool = False
    remarks: list[str] = field(default_factory=list)  # what could not be checked
