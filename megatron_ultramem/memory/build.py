"""The class of every kind of memory layer."""

from __future__ import annotations

from megatron_ultramem.memory.base import MemoryLayer
from megatron_ultramem.memory.layer import UltraMemV2
from megatron_ultramem.memory.memory_plus import MemoryPlus
from megatron_ultramem.memory.peer import PEER
from megatron_ultramem.memory.pkm import PKM
from megatron_ultramem.memory.ultramem_v1 import UltraMem

LAYERS: dict[str, type[MemoryLayer]] = {
    "ultramem_v2": UltraMemV2,
    "ultramem": UltraMem,
    "memory_plus": MemoryPlus,
    "pkm": PKM,
    "peer": PEER,
}
