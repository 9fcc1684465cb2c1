"""Reads YAML files and `key=value` overrides into the configuration tree, refusing what it does not know."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from megatron_ultramem.config.presets import graph_settings, preset_settings, under
from megatron_ultramem.config.schema import Config
from megatron_ultramem.config.validate import validate
from megatron_ultramem.errors import ConfigError

Tree = TypeVar("Tree")


def load_config(path: str | Path | None = None, overrides: Sequence[str] = (), *, check: bool = True) -> Config:
    """The resolved configuration: defaults, then the YAML file, then `a.b=c` overrides in their order.

    Raises ConfigError naming the setting, its value and what is legal: for unknown keys, wrong types, values out of
    range and (unless `check` is false) illegal combinations. Needs neither a process group nor a device.
    """
    tree: Any = {}
    if path is not None:
        tree = read_yaml(Path(path))
    for override in overrides:
        apply_override(tree, override)
    return config_from_dict(tree, check=check)


def config_from_dict(tree: dict[str, Any], *, check: bool = True) -> Config:
    """The configuration with the settings of a nested dict on top of the defaults; raises as `load_config`."""
    config = resolve(tree, Config)
    if config.preset != "none":
        tree = under(tree, preset_settings(config))
        config = resolve(tree, Config)
        tree = under(tree, graph_settings(config, tree))
        config = resolve(tree, Config)
    if check:
        validate(config)
    return config


def resolve(tree: dict[str, Any], schema: type[Tree]) -> Tree:
    """A tree of dataclasses like those of `schema.py`, filled from a nested dict; raises as `load_config`."""
    _refuse_unknown(tree, schema, "")
    try:
        merged = OmegaConf.merge(OmegaConf.structured(schema), OmegaConf.create(tree))
        assert isinstance(merged, DictConfig)
        config = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        setting = getattr(error, "full_key", None) or "?"
        reason = str(getattr(error, "msg", None) or error).splitlines()[0]
        raise ConfigError(
            f"{setting} = {_lookup(tree, str(setting))!r}: {reason}; legal: {_legal(str(setting), schema)}"
        ) from None
    assert isinstance(config, schema)
    _check_ranges(config)
    return config


def config_to_dict(config: Config) -> dict[str, Any]:
    """The whole tree as plain dicts, lists and scalars (what `config.yaml` beside a checkpoint holds)."""
    return dataclasses.asdict(config)


def save_config(config: Config, path: str | Path) -> None:
    """Writes the resolved tree as YAML; `load_config(path)` gives an equal configuration."""
    Path(path).write_text(yaml.safe_dump(config_to_dict(config), sort_keys=False, width=110))


def walk(node: Any, prefix: str = "") -> Iterator[tuple[str, Any, dataclasses.Field[Any]]]:
    """Every leaf setting of a (sub)tree as (dotted name, value, field)."""
    for field in dataclasses.fields(node):
        value, name = getattr(node, field.name), prefix + field.name
        if dataclasses.is_dataclass(value):
            yield from walk(value, name + ".")
        else:
            yield name, value, field


def read_yaml(path: Path) -> dict[str, Any]:
    """A mapping from a YAML file, of which nothing but plain data is accepted; raises ConfigError naming the file."""
    try:
        tree = yaml.safe_load(path.read_text())
    except FileNotFoundError:
        raise ConfigError(f"config file {path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"config file {path}: cannot be read ({error})") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"config file {path}: not valid YAML ({str(error).replace(chr(10), ' ')})") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(f"config file {path}: must hold a mapping of settings, found {type(tree).__name__}")
    return tree


def apply_override(tree: dict[str, Any], override: str) -> None:
    """Puts `section.setting=value` into a nested dict of settings; raises ConfigError if it has another form."""
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise ConfigError(f"override {override!r}: must have the form section.setting=value")
    try:
        value = yaml.safe_load(text) if text else None
    except yaml.YAMLError:
        value = text
    if _is_text(key):  # YAML takes 2024_01_01 for a number, off for false and [^a]+ for a list
        value = value if value is None or isinstance(value, str) else text
    elif isinstance(value, str):  # YAML 1.1 reads 4e-4 as a string; a user means a number
        try:
            value = float(value) if any(c in value for c in "eE") else value
        except ValueError:
            value = text
    node = tree
    *sections, leaf = key.split(".")
    for section in sections:
        child = node.setdefault(section, {})
        if not isinstance(child, dict):
            raise ConfigError(f"override {override!r}: {section} is a setting, not a section")
        node = child
    node[leaf] = value


def _is_text(key: str) -> bool:
    return any(name == key and str(field.type) in ("str", "Optional[str]") for name, _, field in walk(Config()))


def _refuse_unknown(tree: Any, section: type, prefix: str) -> None:
    """Raises for keys that the schema does not have, with the closest that it has; also repairs YAML's 4e-4 strings."""
    fields = {field.name: field for field in dataclasses.fields(section)}
    for key, value in tree.items():
        if key not in fields:
            close = difflib.get_close_matches(str(key), list(fields), n=1)
            hint = f"did you mean {prefix}{close[0]}? " if close else ""
            raise ConfigError(
                f"{prefix}{key}: unknown setting; {hint}legal in {prefix.rstrip('.') or 'the top level'}: "
                + ", ".join(fields)
            )
        child = fields[key].default_factory
        if isinstance(child, type) and dataclasses.is_dataclass(child):
            if value is None:
                tree[key] = {}
            elif not isinstance(value, dict):
                raise ConfigError(f"{prefix}{key} = {value!r}: is a section; legal: a mapping of its settings")
            else:
                _refuse_unknown(value, child, f"{prefix}{key}.")
            continue
        _refuse_interpolation(f"{prefix}{key}", value)
        if isinstance(value, str) and "float" in str(fields[key].type):
            try:
                tree[key] = float(value)
            except ValueError:
                raise ConfigError(f"{prefix}{key} = {value!r}: not a number") from None


def _refuse_interpolation(name: str, value: Any) -> None:
    """OmegaConf would expand ${oc.env:NAME}, and with it put secrets of the environment into saved settings."""
    texts = value if isinstance(value, list) else value.values() if isinstance(value, dict) else [value]
    if any(isinstance(text, str) and "${" in text for text in texts):
        raise ConfigError(f"{name} = {value!r}: nothing is expanded in settings; legal: text without '${{'")


def _check_ranges(config: Any) -> None:
    for name, value, field in walk(config):
        if value is None or isinstance(value, (bool, list, dict)):
            continue
        limits = field.metadata
        bad = (
            (limits["choices"] and value not in limits["choices"])
            or (isinstance(value, float) and not math.isfinite(value))
            or (limits["minimum"] is not None and value < limits["minimum"])
            or (limits["maximum"] is not None and value > limits["maximum"])
            or (limits["above"] is not None and value <= limits["above"])
        )
        if bad:
            raise ConfigError(f"{name} = {value!r}: legal: {legal_values(field)}")


def legal_values(field: dataclasses.Field[Any]) -> str:
    """What a setting accepts, in words."""
    limits = field.metadata
    text = str(field.type)
    if limits["choices"]:
        return ", ".join(limits["choices"]) + (" or null" if "Optional" in text else "")
    kind = (
        "list"
        if text.startswith("list")
        else next(
            (
                word
                for key, word in (("bool", "true or false"), ("int", "an integer"), ("float", "a number"))
                if key in text
            ),
            "a string",
        )
    )
    if kind == "list":
        kind = "a list of " + ("numbers" if "float" in text else "integers" if "int" in text else "strings")
    if limits["above"] is not None:
        kind += f" above {limits['above']}"
    if limits["minimum"] is not None:
        kind += f" of at least {limits['minimum']}"
    if limits["maximum"] is not None:
        kind += f" and at most {limits['maximum']}"
    return kind + (" or null" if "Optional" in text else "")


def _legal(name: str, schema: type) -> str:
    for setting, _, field in walk(schema()):
        if setting == name or name.startswith(setting + "["):
            return legal_values(field)
    return "see `ultramem config`"


def _lookup(tree: Any, name: str) -> Any:
    for part in name.split("[")[0].split("."):
        if not isinstance(tree, dict) or part not in tree:
            return None
        tree = tree[part]
    return tree
