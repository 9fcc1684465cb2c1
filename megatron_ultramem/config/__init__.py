"""Configuration: one tree of dataclasses, YAML files, `key=value` overrides, and the checks before a run."""

from megatron_ultramem.config.load import config_from_dict, config_to_dict, load_config, save_config
from megatron_ultramem.config.schema import Config, MemoryConfig, ModelConfig

__all__ = ["Config", "MemoryConfig", "ModelConfig", "config_from_dict", "config_to_dict", "load_config", "save_config"]
