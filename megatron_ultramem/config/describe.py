"""Prints the configuration tree with its explanations, for `ultramem config` and `ultramem train --help`."""

from __future__ import annotations

import dataclasses
from typing import Any

import yaml
from rich.console import Console
from rich.text import Text

from megatron_ultramem.config.load import legal_values
from megatron_ultramem.config.schema import Config


def print_config(config: Config, console: Console, *, defaults: Config | None = None) -> None:
    """Prints every setting as `name: value  # explanation (legal values)`: valid YAML; changed values stand out."""
    _print_section(config, defaults or Config(), console, 0)


def _print_section(section: Any, defaults: Any, console: Console, depth: int) -> None:
    indent = "  " * depth
    for field in dataclasses.fields(section):
        value, default = getattr(section, field.name), getattr(defaults, field.name)
        if dataclasses.is_dataclass(value):
            title = Text(f"{indent}{field.name}:", style="bold")
            title.append(f"  # {field.metadata['help']}", style="dim")
            console.print(title, soft_wrap=True)
            _print_section(value, default, console, depth + 1)
            continue
        line = Text(f"{indent}{field.name}: ")
        line.append(_yaml_value(value), style="bold green" if value != default else "")
        legal = "" if field.metadata["choices"] and " " not in legal_values(field) else f" [{legal_values(field)}]"
        line.append(f"  # {field.metadata['help']}{legal}", style="dim")
        console.print(line, soft_wrap=True)


def _yaml_value(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list):
        return "[" + ", ".join(_yaml_value(item) for item in value) + "]"
    if isinstance(value, str):
        return yaml.safe_dump(value, default_flow_style=True, width=10_000).removesuffix("...\n").strip()
    return str(value)
