"""Checks of the settings of faults and of what goes with them."""

from __future__ import annotations

from megatron_ultramem.config.schema import Config
from megatron_ultramem.errors import ConfigError


def validate_faults(config: Config) -> None:
    """Raises ConfigError for the first illegal combination."""
    f = config.faults
    if f.silent_seconds < 3 * f.heartbeat_seconds:
        raise ConfigError(
            f"faults.silent_seconds = {f.silent_seconds:g}: legal: at least 3 x faults.heartbeat_seconds = "
            f"{3 * f.heartbeat_seconds:g}"
        )
