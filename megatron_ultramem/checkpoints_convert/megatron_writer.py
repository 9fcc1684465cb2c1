"""Writes weights as a checkpoint of the trainer, block by block.

The files are those of torch.distributed.checkpoint, which is Megatron's torch_dist format; torch's own writer asks for
one block at a time, and each block is a shard of its tensor, so that any layout can load it.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType

from megatron_ultramem.checkpoints_convert.tensors import Made, row_blocks

Progress = Callable[[int], None]


def write_checkpoint(folder: Path, tensors: Sequence[Made], advance: Progress) -> None:
    """Fills an existing folder with the tensors and what Megatron wants beside them.

    Args:
        advance: told the bytes of every block that has been made.

    Raises OSError where the disk does not take them.
    """
    from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config

    from megatron_ultramem.training.checkpoint_state import MODEL_METADATA, OPTIMIZER_METADATA, reason

    # A file for every block: in a file of several, torch keeps what it has written in memory.
    writer = dcp.FileSystemWriter(folder, single_file_per_rank=False)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*torch.distributed is disabled.*")
            dcp.save({}, storage_writer=writer, planner=_BlockPlanner(tensors, advance), no_dist=True)
    except dcp.api.CheckpointException as error:
        cause = next(iter(error.failures.values()))[0]
        # Where the disk is full, torch's zip writer ends with a RuntimeError of its own.
        raise (OSError(_plain(reason(error))) if isinstance(cause, RuntimeError) else cause) from None
    torch.save({"content_metadata": {**MODEL_METADATA, **OPTIMIZER_METADATA}}, folder / "common.pt")
    save_config(CheckpointingConfig("torch_dist"), str(folder))


def _plain(message: str) -> str:
    """Without the place in torch's sources at which its zip writer gave up."""
    return re.sub(r"\[enforce fail at [^\]]*\]\.?\s*", "", message)


class _BlockPlanner(dcp.DefaultSavePlanner):
    """Plans one item for every block, and makes a block when its turn to be written has come."""

    def __init__(self, tensors: Sequence[Made], advance: Progress) -> None:
        super().__init__(flatten_state_dict=False)
        self._tensors = {tensor.name: tensor for tensor in tensors}
        self._advance = advance

    def create_local_plan(self) -> SavePlan:
        self.plan = SavePlan([item for tensor in self._tensors.values() for item in _items(tensor)])
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor:
        assert write_item.tensor_data is not None
        chunk = write_item.tensor_data.chunk
        start = chunk.offsets[0]
        block = self._tensors[write_item.index.fqn].block(start, start + chunk.sizes[0])
        self._advance(block.nbytes)
        return block


def _items(tensor: Made) -> list[WriteItem]:
    info = tensor.info
    chunks = [
        ChunkStorageMetadata(
            torch.Size((start, *(0 for _ in info.shape[1:]))), torch.Size((stop - start, *info.shape[1:]))
        )
        for start, stop in row_blocks(info)
    ]
    return [
        WriteItem(
            index=MetadataIndex(tensor.name, chunk.offsets, number),
            type=WriteItemType.SHARD,
            tensor_data=TensorWriteData(chunk, TensorProperties(dtype=info.dtype), torch.Size(info.shape)),
        )
        for number, chunk in enumerate(chunks)
    ]
