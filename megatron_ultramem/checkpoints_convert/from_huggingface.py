"""A Hugging Face folder as the source of a checkpoint: UltraMem, dense Llama-style, OLMoE."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from megatron_ultramem.checkpoints_convert import llama_style, shuffles
from megatron_ultramem.checkpoints_convert.account import check_sources
from megatron_ultramem.checkpoints_convert.checkpoint_target import ORIGIN, Import, precision_of
from megatron_ultramem.checkpoints_convert.conversion_file import Conversion
from megatron_ultramem.checkpoints_convert.names import FP32, model_links
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
FROM_ROPE_BASE = "follows from model.rope_base"
Tree = dict[str, Any]


@dataclass(frozen=True)
class Folder:
    """What a Hugging Face folder holds.

    Attributes:
        kind: `model_type` of its config.json.
        settings: ours, as far as the folder has them.
        vocab_size: of the model, before padding.
        precision: train.precision that holds its numbers unchanged.
        conversion: what we left there, if we wrote the folder.
    """

    path: Path
    kind: str
    reader: SafetensorsReader
    settings: Tree
    vocab_size: int
    precision: str
    conversion: Conversion | None

    @property
    def expert_files(self) -> bool:
        """Whether every expert has tensors of its own."""
        return any(".experts.0." in name for name in self.reader.tensors)


def read_folder(path: Path) -> Folder:
    """Reads all that is known before a tensor is.

    Raises CheckpointError if the folder is damaged, or of a kind or version that cannot be imported.
    """
    kind, conversion = _model_type(path), None
    reader = SafetensorsReader(path)
    if kind == ULTRAMEM:
        config, vocab_size, conversion = read_ultramem_folder(path)
        settings = config_to_dict(config)
    else:
        settings = {"model": llama_style.model_settings(path)}
        vocab_size = settings["model"]["vocab_size"]
    precision = precision_of(reader.tensors, path)
    settings.setdefault("train", {})["precision"] = precision
    return Folder(path, kind, reader, settings, vocab_size, precision, conversion)


def import_folder(folder: Folder, home: Path, overrides: Sequence[str]) -> Import:
    """Checks that the folder holds every tensor of its model in the right shape.

    Args:
        home: folder of the checkpoint, at the end.
        overrides: `section.setting=value` for the checkpoint's config.yaml.

    Raises:
        CheckpointError: tensors or files do not fit what config.json says.
        ConfigError: an override does not fit the model, or the tokenizer has more tokens than the model.
    """
    config, tokenizer = complete_settings(folder.settings, folder.path, home, overrides, {}, folder.conversion)
    check_vocabulary(folder, config, tokenizer)
    rows = pad_vocabulary(config.model, folder.vocab_size)
    links = model_links(config.model, rows, expert_files=folder.expert_files)
    recipes = [recipe for link in links for recipe in link.to_ours()]
    permutations = {
        shuffles.their_name(layer): (pool.virtual_rows,) for layer, pool in shuffles.shuffled_layers(config).items()
    }
    derived = rotary_buffers(folder)
    check_sources(recipes, folder.reader.tensors, folder.path, {**permutations, **derived})
    drawn_anew = [override for override in overrides if override.startswith("model.memory.shuffle_seed=")]
    config, more, compared = shuffles.from_theirs(config, folder.reader)
    if drawn_anew and config.model.memory.keep_shuffle:
        raise ConfigError(
            f"{drawn_anew[0]}: the folder's permutations are not those of this seed, and are kept; legal: without it"
        )
    compared |= dict.fromkeys(derived, FROM_ROPE_BASE)
    origin = {name: getattr(folder.conversion.record, name) if folder.conversion else 0 for name in ORIGIN}
    made = in_precision([*recipes, *more], folder.precision, folder.reader.tensors)
    return Import(config, folder.vocab_size, tokenizer, folder.reader, made, compared, origin)


def _model_type(folder: Path) -> str:
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
    together: Tree = {}
    for tree in trees:
        for name, value in tree.items():
            below = together.get(name)
            together[name] = _merged(below or {}, value) if isinstance(value, Mapping) else value
    return together


def check_vocabulary(folder: Folder, config: Config, tokenizer: Found) -> None:
    """Raises ConfigError if the tokenizer has more tokens than the model, CheckpointError if the settings say another
    number than the folder."""
    wanted, has = config.model.vocab_size, tokenizer.tokenizer.vocab_size
    if wanted is not None and wanted < has:
        raise ConfigError(
            f"the tokenizer ({tokenizer.config.path or tokenizer.config.kind}) has {has} tokens, the model's "
            f"vocabulary {wanted}; legal: a tokenizer with at most that many"
        )
    if (wanted or has) != folder.vocab_size:
        raise CheckpointError(
            f"{folder.path}: the model's vocabulary has {folder.vocab_size} tokens, that of its tokenizer and settings "
            f"{wanted or has}"
        )


def rotary_buffers(folder: Folder) -> dict[str, Shape]:
    """Frequencies that old versions of transformers saved with every layer."""
    return {name: info.shape for name, info in folder.reader.tensors.items() if name.endswith(".rotary_emb.inv_freq")}


def in_precision(recipes: Iterable[Recipe], precision: str, tensors: Mapping[str, TensorInfo]) -> list[Recipe]:
    """The recipes with the dtypes that train.precision gives the tensors of the checkpoint."""
    made = []
    for recipe in recipes:
        had = {tensors[name].dtype for name in recipe.sources}
        if all(dtype.is_floating_point for dtype in had):
            dtype = torch.float32 if precision == "fp32" or recipe.name.endswith(FP32) else torch.bfloat16
            others = ", ".join(sorted(str(other).removeprefix("torch.") for other in had - {dtype}))
            recipe = replace(recipe, dtype=dtype, note=f"was {others}" if others else recipe.note)
        made.append(recipe)
    return made
