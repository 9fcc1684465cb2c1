"""A Hugging Face folder as the source of a checkpoint: UltraMem, dense Llama-style, OLMoE."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from megatron_ultramem.checkpoints_convert import llama_style, shuffles
from megatron_ultramem.checkpoints_convert.account import check_sources
from megatron_ultramem.checkpoints_convert.checkpoint_target import ORIGIN, Import, precision_of
from megatron_ultramem.checkpoints_convert.conversion_file import Conversion
from megatron_ultramem.checkpoints_convert.names import model_links
from megatron_ultramem.checkpoints_convert.names_of_memory import FP32
from megatron_ultramem.checkpoints_convert.safetensors_reader import SafetensorsReader
from megatron_ultramem.checkpoints_convert.tensors import Recipe, Shape, TensorInfo
from megatron_ultramem.checkpoints_convert.tokenizer_files import Found, find_tokenizer
from megatron_ultramem.checkpoints_convert.ultramem_folder import read_json, read_ultramem_folder
from megatron_ultramem.config.load import apply_override, config_from_dict, config_to_dict
from megatron_ultramem.config.schema import Config, DataConfig
from megatron_ultramem.config.validate import validate
from megatron_ultramem.errors import CheckpointError, ConfigError
from megatron_ultramem.planning.parameters import pad_vocabulary
from megatron_ultramem.training.tokenizers import build_tokenizer

ULTRAMEM = "ultramem"
Tree = dict[str, Any]


def import_folder(folder: Path, home: Path, overrides: Sequence[str], recipe: Tree | None = None) -> Import:
    """Reads what the folder is, and checks that it holds every tensor of that in the right shape.

    Args:
        home: folder of the checkpoint, at the end.
        overrides: `section.setting=value` for the checkpoint's config.yaml.
        recipe: more settings, below the overrides.

    Raises:
        CheckpointError: the folder is damaged, or of a kind or version that cannot be imported.
        ConfigError: an override or the recipe does not fit the model, or its tokenizer has more tokens than the model.
    """
    kind = model_type(folder)
    reader = SafetensorsReader(folder)
    conversion: Conversion | None = None
    if kind == ULTRAMEM:
        config, vocab_size, conversion = read_ultramem_folder(folder)
        tree = config_to_dict(config)
    else:
        model = llama_style.model_settings(folder)
        vocab_size = model["vocab_size"]
        tree = {"model": model}
    precision = precision_of(reader.tensors, folder)
    tree.setdefault("train", {})["precision"] = precision
    config, tokenizer = complete_settings(tree, folder, home, overrides, recipe or {}, conversion)
    if (found := _vocabulary(config, tokenizer)) != vocab_size:
        raise CheckpointError(
            f"{folder}: the model's vocabulary has {vocab_size} tokens, that of its tokenizer and settings {found}"
        )
    recipes = [
        made
        for link in model_links(
            config.model,
            pad_vocabulary(config.model, vocab_size),
            expert_files=any(".experts.0." in name for name in reader.tensors),
        )
        for made in link.to_ours()
    ]
    permutations = {
        shuffles.their_name(layer): (pool.virtual_rows,) for layer, pool in shuffles.shuffled_layers(config).items()
    }
    derived = _rotary_buffers(reader.tensors) if kind != ULTRAMEM else {}
    check_sources(recipes, reader.tensors, folder, {**permutations, **derived})
    config, more, compared = shuffles.from_theirs(config, reader)
    compared |= dict.fromkeys(derived, "follows from model.rope_base")
    origin = {name: getattr(conversion.record, name) if conversion else 0 for name in ORIGIN}
    return Import(
        config,
        vocab_size,
        tokenizer,
        reader,
        [in_precision(made, precision, reader.tensors) for made in (*recipes, *more)],
        compared,
        origin,
        conversion,
    )


def model_type(folder: Path) -> str:
    """`model_type` of config.json; raises CheckpointError for one that cannot be imported."""
    found = read_json(folder / "config.json").get("model_type")
    legal = (ULTRAMEM, *llama_style.MODEL_TYPES)
    if found not in legal:
        raise CheckpointError(f"{folder / 'config.json'}: model_type = {found!r}; legal: {', '.join(legal)}")
    return str(found)


def complete_settings(
    tree: Tree, folder: Path, home: Path, overrides: Sequence[str], recipe: Tree, conversion: Conversion | None
) -> tuple[Config, Found]:
    """The settings of the checkpoint, and its tokenizer: that of the settings if they name one, else the folder's."""
    named: Tree = {}
    for override in overrides:
        apply_override(named, override)
    wishes = _merged(recipe, named)
    if wishes.get("data", {}).get("tokenizer"):
        described = config_from_dict({"data": {"tokenizer": wishes["data"]["tokenizer"]}}, check=False).data.tokenizer
        tokenizer = Found(described, None, build_tokenizer(described))
    else:
        tokenizer = find_tokenizer(folder, home, conversion.config.data.tokenizer if conversion else None)
    final = {"data": {"tokenizer": asdict(tokenizer.config)}}
    if conversion is None:
        longest = tree["model"]["max_sequence_length"]
        tree["data"] = {"sequence_length": min(DataConfig.sequence_length, longest)}
    config = config_from_dict(_merged(tree, wishes, final), check=False)
    validate(config, training=False)
    return config, tokenizer


def _merged(*trees: Mapping[str, Any]) -> Tree:
    """Later trees on top of earlier ones."""
    merged: Tree = {}
    for tree in trees:
        for name, value in tree.items():
            below = merged.get(name)
            merged[name] = _merged(below or {}, value) if isinstance(value, Mapping) else value
    return merged


def _vocabulary(config: Config, tokenizer: Found) -> int:
    """As the trainer will find it; raises ConfigError if the tokenizer has more tokens than the model."""
    wanted, has = config.model.vocab_size, tokenizer.tokenizer.vocab_size
    if wanted is not None and wanted < has:
        raise ConfigError(
            f"the tokenizer ({tokenizer.config.path or tokenizer.config.kind}) has {has} tokens, the model's "
            f"vocabulary {wanted}; legal: a tokenizer with at most that many"
        )
    return wanted or has


def _rotary_buffers(tensors: Mapping[str, TensorInfo]) -> dict[str, Shape]:
    """Frequencies that old versions of transformers saved with every layer."""
    return {name: info.shape for name, info in tensors.items() if name.endswith(".rotary_emb.inv_freq")}


def in_precision(recipe: Recipe, precision: str, tensors: Mapping[str, TensorInfo]) -> Recipe:
    """The recipe with the dtype that the checkpoint's settings give its tensor."""
    had = {tensors[name].dtype for name in recipe.sources}
    if not all(dtype.is_floating_point for dtype in had):
        return recipe
    dtype = torch.float32 if precision == "fp32" or recipe.name.endswith(FP32) else torch.bfloat16
    widened = ", ".join(sorted(str(other).removeprefix("torch.") for other in had - {dtype}))
    return replace(recipe, dtype=dtype, note=f"was {widened}" if widened else "")
