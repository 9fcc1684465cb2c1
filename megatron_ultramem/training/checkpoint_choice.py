"""Which checkpoint a run resumes from, and what can be known to be wrong with it before its tensors are read."""

from __future__ import annotations

import logging
from pathlib import Path

import torch

from megatron_ultramem.config.schema import Config
from megatron_ultramem.errors import CheckpointError, DamagedCheckpointError
from megatron_ultramem.training import checkpoint_folder as folders
from megatron_ultramem.training import checkpoint_state as contents
from megatron_ultramem.training import checksums
from megatron_ultramem.training.restarts import is_restart

logger = logging.getLogger(__name__)


def wanted(config: Config) -> tuple[list[Path], bool]:
    """The checkpoints to resume from, the best first, and whether with optimizer and position. Collective; rank 0's
    word counts.

    After a restart the checkpoints of the same launch come before what checkpoint.load asks for, which was its start.
    """

    def decide() -> tuple[list[Path], bool]:
        whole_state = config.checkpoint.load_optimizer
        if config.checkpoint.load == "auto" and whole_state:
            return folders.wanted_checkpoints(config), True
        if own := folders.own_checkpoints(config):
            return own, True
        return folders.wanted_checkpoints(config), whole_state

    return contents.from_rank_0(decide)


def find_damage(folder: Path, *, checks_files: bool) -> str | None:
    """What is wrong with the files of a checkpoint; every rank reads its share of them. Collective.

    Args:
        checks_files: compares the files with their checksums too.
    """
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    found = None
    if rank == 0:
        try:
            folders.read_record(folder)
            folders.read_config(folder)
        except DamagedCheckpointError as error:
            found = str(error)
    if found is None and checks_files:
        if not (folder / checksums.SUMS_FILE).exists():
            warn(f"checkpoint {folder} has no {checksums.SUMS_FILE}: it is loaded unchecked")
        damage = checksums.find_damage(folder, rank, ranks)
        found = damage and f"checkpoint {folder} is damaged: {damage}"
    return next((answer for answer in contents.all_gather(found) if answer), None)


def warn(text: str) -> None:
    """Logs a warning once, on rank 0."""
    if torch.distributed.get_rank() == 0:
        logger.warning("%s", text)


def check_wanted(config: Config, *, tokenizer: str, vocab_size: int) -> None:
    """`check_loadable` of the checkpoint that a run will resume from, as far as that is known; nothing for a restart,
    which goes on from what passed before."""
    damage = None
    for folder in [] if is_restart() else folders.wanted_checkpoints(config):
        try:
            check_loadable(
                config,
                folder,
                tokenizer=tokenizer,
                vocab_size=vocab_size,
                whole_state=config.checkpoint.load_optimizer,
            )
            return
        except DamagedCheckpointError as error:
            damage = error
    if damage is not None:
        raise damage


def check_loadable(
    config: Config, folder: Path, *, tokenizer: str, vocab_size: int, whole_state: bool = True
) -> folders.Record:
    """What can be known to be wrong with loading a checkpoint before a process group or a model exists.

    Raises CheckpointError for missing or damaged files, another model (naming the settings) or another tokenizer.
    """
    record = folders.read_record(folder)
    contents.check_same_model(config, folder)
    if whole_state:
        if record.weights_only:
            raise CheckpointError(
                f"checkpoint {folder} holds weights alone: it was converted; legal: checkpoint.load_optimizer=false"
            )
        contents.check_same_optimizer(config, folder)
    if (record.vocab_size, record.tokenizer) != (vocab_size, tokenizer):
        raise CheckpointError(
            f"checkpoint {folder} was trained with another tokenizer (vocabulary {record.vocab_size}, "
            f"{record.tokenizer}) than data.tokenizer (vocabulary {vocab_size}, {tokenizer}); "
            "legal: the tokenizer of the checkpoint, or checkpoint.load=none in another train.run_dir"
        )
    return record
