"""The fixed permutation of virtual rows that breaks the topology of the key grid.

It is a function of (seed, pool, layer) alone: a checkpoint keeps the seed and a checksum, not the permutation.
"""

from __future__ import annotations

import hashlib

import torch


def shuffle_permutation(
    virtual_rows: int, *, seed: int, pool: int, layer: int, device: torch.device | str | None = None
) -> torch.Tensor:
    """Permutation of [0, virtual_rows): int32 where that is enough, else int64.

    Always drawn on the CPU, so that it does not depend on the device the model lives on (and not drawn on the meta
    device, which has no numbers).
    """
    digest = hashlib.sha256(f"shuffle/{seed}/{pool}/{layer}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    dtype = torch.int32 if virtual_rows <= torch.iinfo(torch.int32).max else torch.int64
    if torch.device(device or "cpu").type == "meta":
        return torch.empty(virtual_rows, dtype=dtype, device="meta")
    return torch.randperm(virtual_rows, generator=generator, dtype=dtype).to(device)


def checksum(permutation: torch.Tensor) -> str:
    """16 hexadecimal digits that tell permutations apart, whatever their dtype and device."""
    digest = hashlib.sha256()
    for part in permutation.split(1 << 22):
        digest.update(part.to("cpu", torch.int64).numpy().astype("<i8").tobytes())
    return digest.hexdigest()[:16]


def physical_rows(
    indices_TM: torch.Tensor, permutation: torch.Tensor | None, row_offset: int, rows: int
) -> torch.Tensor:
    """Rows of the pool (int64) of virtual grid indices: through the permutation, then (v + row_offset) mod rows."""
    virtual_TM = indices_TM if permutation is None else permutation[indices_TM].to(torch.int64)
    return (virtual_TM + row_offset) % rows
