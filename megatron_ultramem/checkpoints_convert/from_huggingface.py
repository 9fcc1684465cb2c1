"""A Hugging Face folder as the source of a checkpoint: UltraMem, dense Llama-style, OLMoE."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from megatron_ultramem.checkpoints_convert import llama_style, shuffles
from megatron_ultramem.checkpoints_convert.account import check_sources
from megatron_ultramem.checkpoints_convert.checkpoint_target import ORIGIN, Import, precision_of
from megatron_ultramem.checkpoints_convert.names import model_links
from megatron_ultramem.checkpoints_convert.safetensors_reader import SafetensorsReader
from megatron_ultramem.checkpoints_convert.tensors import Recipe
from megatron_ultramem.checkpoints_convert.tokenizer_files import Found, find_tokenizer
from megatron_ultramem.checkpoints_convert.ultramem_folder import read_json, read_ultramem_folder
from megatron_ultramem.config.load import config_from_dict, config_to_dict, with_overrides
from megatron_ultramem.config.schema import Config, TokenizerConfig
from megatron_ultramem.config.validate import validate
from megatron_ultramem.errors import CheckpointError, ConfigError
from megatron_ultramem.planning.parameters import pad_vocabulary
from megatron_ultramem.training.tokenizers import build_tokenizer
