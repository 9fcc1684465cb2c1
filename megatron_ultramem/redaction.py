"""Keeps secrets of the environment (WANDB_API_KEY, HF_TOKEN, ...) out of logs, error messages and saved settings."""

from __future__ import annotations

import os
import re

from megatron_ultramem.config.load import walk
from megatron_ultramem.errors import ConfigError

_NAME = re.compile(r"(?:^|_)(?:\w*KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS?)$", re.IGNORECASE)
_SHORTEST = 8  # characters; shorter values would be found in any text
HIDDEN = "[hidden]"


def is_secret_name(name: str) -> bool:
    """Whether an environment variable of this name is taken for a secret."""
    return _NAME.search(name) is not None


def secrets_in_environment() -> dict[str, str]:
    """Names and values of the environment variables that are taken for secrets."""
    return {name: value for name, value in os.environ.items() if is_secret_name(name) and len(value) >= _SHORTEST}


def redact(text: str) -> str:
    """The text with every secret of the environment hidden."""
    for value in secrets_in_environment().values():
        text = text.replace(value, HIDDEN)
    return text


def refuse_secrets(tree: object) -> None:
    """Raises ConfigError, without the value, if a setting of a (sub)tree holds a secret of the environment."""
    found = secrets_in_environment()
    for setting, value, _ in walk(tree):
        for name, secret in found.items():
            if secret in str(value):
                raise ConfigError(
                    f"{setting} holds the value of the environment variable {name}: settings are saved and shown; "
                    "legal: leave it in the environment"
                )
