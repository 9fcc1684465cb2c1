"""The configuration of an UltraMem folder of Hugging Face, in our settings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_ultramem.checkpoints_convert.conversion_file import Conversion, read_conversion
from megatron_ultramem.checkpoints_convert.huggingface import FORMAT_VERSION
from megatron_ultramem.checkpoints_convert.huggingface_config import hf_config
from megatron_ultramem.config.load import config_from_dict, config_to_dict
from megatron_ultramem.config.schema import Config
from megatron_ultramem.errors import CheckpointError, ConfigError


def read_json(path: Path) -> dict[str, Any]:
    """Raises CheckpointError if the file is missing or holds no JSON object."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise CheckpointError(f"{path} cannot be read: {reason}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} does not hold a JSON object")
    return content


def read_ultramem_folder(folder: Path) -> tuple[Config, int, Conversion | None]:
    """(settings, vocabulary of the tokenizer, what the conversion left) of a folder with an UltraMem model.

    The model's settings are in config.json, the others in ultramem_conversion.json, or the defaults.

    Raises:
        CheckpointError: a file is damaged, of a newer version, or config.json describes another model than the settings
            in it do.
    """
    path = folder / "config.json"
    theirs = read_json(path)
    version = theirs.get("format_version")
    if not isinstance(version, int) or not 1 <= version <= FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: format_version = {version!r}, written by another release of the model code; legal: 1 to "
            f"{FORMAT_VERSION}"
        )
    model = theirs.get("trainer_settings")
    vocab_size = theirs.get("tokenizer_vocab_size") or theirs.get("vocab_size")
    if not isinstance(model, dict) or not isinstance(vocab_size, int):
        raise CheckpointError(
            f"{path} lacks trainer_settings or vocab_size; legal: a folder that `ultramem convert to-hf` wrote, or "
            "that transformers saved of such a model"
        )
    conversion = read_conversion(folder)
    tree = {} if conversion is None else config_to_dict(conversion.config)
    try:
        config = config_from_dict({**tree, "model": model}, check=False)
    except ConfigError as error:
        raise CheckpointError(f"{path}: trainer_settings cannot be read: {error}") from None
    _check_same(path, theirs, json.loads(json.dumps(hf_config(config, vocab_size))))
    return config, vocab_size, conversion


def _check_same(path: Path, theirs: dict[str, Any], ours: dict[str, Any]) -> None:
    different = [
        f"{name} = {theirs.get(name)!r} (its trainer_settings say {value!r})"
        for name, value in ours.items()
        if theirs.get(name) != value
    ]
    if different:
        raise CheckpointError(
            f"{path} contradicts itself: {'; '.join(different[:4])}; legal: the value of trainer_settings, or "
            "both changed"
        )
