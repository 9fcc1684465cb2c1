"""ultramem_conversion.json: what a Hugging Face folder that we wrote must know for the way back.

config.json holds the model; this file holds the rest of the run's settings, its position and its tokenizer. A folder
without it (one that transformers has saved) converts too, with default settings.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_ultramem.config.load import config_from_dict, config_to_dict
from megatron_ultramem.config.schema import Config
from megatron_ultramem.errors import CheckpointError, ConfigError
from megatron_ultramem.training.checkpoint_folder import Record

NAME = "ultramem_conversion.json"
VERSION = 1


@dataclass(frozen=True)
class Conversion:
    """The content of the file."""

    config: Config
    record: Record

    def write(self, folder: Path) -> None:
        content = {
            "version": VERSION,
            "settings": config_to_dict(self.config),
            "record": asdict(self.record),
        }
        (folder / NAME).write_text(json.dumps(content, indent=2) + "\n")


def read_conversion(folder: Path) -> Conversion | None:
    """The file of a folder; None if it has none. Raises CheckpointError if it is damaged or of a newer version."""
    path = folder / NAME
    if not path.is_file():
        return None
    try:
        content: dict[str, Any] = json.loads(path.read_text())
        version = content["version"]
        if version != VERSION:
            raise CheckpointError(
                f"{path} is of version {version}; legal: {VERSION}, or convert with the release that wrote it"
            )
        config = config_from_dict(content["settings"], check=False)
        return Conversion(config, Record(**content["record"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ConfigError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from None
