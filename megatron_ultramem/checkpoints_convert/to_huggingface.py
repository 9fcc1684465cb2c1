"""A checkpoint of the trainer as the source of a Hugging Face folder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from megatron_ultramem.checkpoints_convert import shuffles
from megatron_ultramem.checkpoints_convert.account import check_sources
from megatron_ultramem.checkpoints_convert.conversion_file import Conversion
from megatron_ultramem.checkpoints_convert.huggingface import AUTO_MAP, copy_model_files
from megatron_ultramem.checkpoints_convert.huggingface.configuration_ultramem import UltraMemConfig
from megatron_ultramem.checkpoints_convert.huggingface.modeling_ultramem import UltraMemForCausalLM
from megatron_ultramem.checkpoints_convert.huggingface_config import hf_config
from megatron_ultramem.checkpoints_convert.megatron_reader import CheckpointReader
from megatron_ultramem.checkpoints_convert.names import model_links
from megatron_ultramem.checkpoints_convert.safetensors_writer import write_safetensors
from megatron_ultramem.checkpoints_convert.tensors import Made, Recipe
from megatron_ultramem.checkpoints_convert.tokenizer_files import write_for_transformers
from megatron_ultramem.config.load import load_config
from megatron_ultramem.config.schema import Config
from megatron_ultramem.errors import CheckpointError, ConfigError
from megatron_ultramem.planning.parameters import pad_vocabulary
from megatron_ultramem.training.checkpoint_folder import Record, read_config, read_record, resolve_checkpoint
from megatron_ultramem.training.checksums import SUMS_FILE, sha256, write_sums
from megatron_ultramem.training.tokenizers import Tokenizer, build_tokenizer


@dataclass(frozen=True)
class Export:
    """A checkpoint that is to become a Hugging Face folder.

    Attributes:
        config: as saved beside the checkpoint, but for where its tokenizer lies.
        recipes: of every tensor of the folder.
    """

    folder: Path
    config: Config
    record: Record
    tokenizer: Tokenizer
    reader: CheckpointReader
    recipes: Sequence[Recipe]


def export_checkpoint(path: Path, overrides: Sequence[str]) -> Export:
    """Reads what the checkpoint is, and checks that it holds every tensor of that in the right shape.

    Args:
        path: of the checkpoint, a folder of them, or a run folder.
        overrides: `data.tokenizer.setting=value`, where the tokenizer has moved.

    Raises:
        CheckpointError: the checkpoint is damaged, or its tokenizer is another one.
        ConfigError: an override is not of the tokenizer, or the tokenizer cannot be read.
    """
    for override in overrides:
        if not override.startswith("data.tokenizer."):
            raise ConfigError(f"{override}: a conversion changes no setting of the run; legal: data.tokenizer.*")
    folder = resolve_checkpoint(path)
    record, saved = read_record(folder), read_config(folder)
    described = load_config(folder / "config.yaml", overrides, check=False).data.tokenizer
    config = replace(saved, data=replace(saved.data, tokenizer=described))
    tokenizer = build_tokenizer(described)
    if tokenizer.identity != record.tokenizer:
        raise CheckpointError(
            f"checkpoint {folder} was trained with another tokenizer ({record.tokenizer}) than data.tokenizer "
            f"({tokenizer.identity}); legal: data.tokenizer.path of that one"
        )
    shuffles.check_seed(config, record, folder)
    reader = CheckpointReader(folder)
    links = model_links(config.model, pad_vocabulary(config.model, record.vocab_size))
    recipes = [made for link in links for made in link.to_theirs()] + shuffles.recipes_to_theirs(config)
    check_sources(recipes, reader.tensors, folder, {})
    return Export(folder, config, record, tokenizer, reader, recipes)


def write_folder(
    draft: Path, export: Export, tensors: Sequence[Made], advance: Callable[[int], None], *, shard_bytes: int
) -> list[str]:
    """Fills the folder `draft`; returns what a user should know about the tokenizer.

    Args:
        advance: told the bytes of every block that has been written.
        shard_bytes: of a file of weights at most.
    """
    sums = write_safetensors(draft, tensors, advance, shard_bytes=shard_bytes)
    config, tokenizer = export.config, export.tokenizer
    dtype = torch.bfloat16 if config.train.precision == "bf16" else torch.float32
    options: dict[str, Any] = {
        "architectures": [UltraMemForCausalLM.__name__],
        "auto_map": AUTO_MAP,
        "dtype": dtype,
        "eos_token_id": tokenizer.eod,
        "pad_token_id": tokenizer.eod,
    }
    theirs = UltraMemConfig(**hf_config(config, export.record.vocab_size), **options)
    theirs.save_pretrained(str(draft))
    UltraMemForCausalLM.default_generation_config(theirs).save_pretrained(str(draft))
    copy_model_files(draft)
    Conversion(config, export.record).write(draft)
    remarks = write_for_transformers(config.data.tokenizer, tokenizer, draft, config.model.max_sequence_length)
    sums |= {file.name: sha256(file) for file in draft.iterdir() if file.name not in sums}
    write_sums(draft / SUMS_FILE, sums)
    return remarks
