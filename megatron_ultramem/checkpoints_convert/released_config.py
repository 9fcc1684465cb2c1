"""Settings of the trainer for a checkpoint of the released research code (OLMo with memory blocks).

What shapes say is taken from them; `config.yaml` says the rest, and must not contradict them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from megatron_ultramem.checkpoints_convert.tensors import TensorInfo
from megatron_ultramem.errors import CheckpointError

BLOCK, MEMORY, POOL = "transformer.blocks.{}.", "transformer.mem_blocks.{}.", "transformer.full_memory_layer."
# What OLMo can be told and the trainer has no counterpart for: the values that can be imported.
_LEGAL: dict[str, tuple[Any, ...]] = {
    "layer_norm_type": ("rms",),
    "activation_type": ("swiglu",),
    "block_type": ("sequential",),
    "rope": (True,),
    "alibi": (False,),
    "include_bias": (False,),
    "norm_after": (False,),
    "scale_logits": (False,),
    "embedding_layer_norm": (False,),
    "clip_qkv": (None,),
}
_MEMORY_SETTINGS = ("mem_knum", "mem_knn", "mem_share_ratio", "mem_use_glu_act", "mem_q_for_each_tucker_rank")
_DEFAULT = {"rope": False, "layer_norm_type": "default", "activation_type": "swiglu", "block_type": "sequential"}


@dataclass(frozen=True)
class Released:
    """What a checkpoint of the released code is.

    Attributes:
        model: the trainer's `model` section.
        query_per_rank: `mem_q_for_each_tucker_rank`: the query projection has a query for every Tucker rank, of which
            the forward uses the first alone.
        shuffled: permutations are stored.
    """

    model: dict[str, Any]
    query_per_rank: bool
    shuffled: bool


def tensor_name(name: str, tensors: Mapping[str, TensorInfo]) -> str:
    """The name itself, or that of the weight of a module of that name."""
    return name if name in tensors else f"{name}.weight"


def read_released_config(path: Path, tensors: Mapping[str, TensorInfo]) -> Released:
    """Raises CheckpointError for a file that is damaged, contradicts the tensors, or has what the trainer has not."""
    theirs = _read_model_section(path)
    wrong = [
        f"{name} = {value!r} (legal: {', '.join(map(repr, legal))})"
        for name, legal in _LEGAL.items()
        if (value := theirs.get(name, _DEFAULT.get(name, legal[0]))) not in legal
    ]
    rope_base = theirs.get("rope_theta", 10000)
    if not isinstance(rope_base, int | float) or rope_base != int(rope_base):
        wrong.append(f"rope_theta = {rope_base!r} (legal: a whole number)")
    if unknown := sorted(str(name) for name in theirs if str(name).startswith("mem_") and name not in _MEMORY_SETTINGS):
        listed = ", ".join(f"{name} = {theirs[name]!r}" for name in unknown)
        wrong.append(f"{listed} (known: {', '.join(_MEMORY_SETTINGS)})")
    if wrong:
        raise CheckpointError(f"{path}: the trainer has no counterpart for {'; '.join(wrong)}")
    shapes = _Shapes(path, tensors)
    layers = len({match[1] for name in tensors if (match := re.match(r"transformer\.blocks\.(\d+)\.", name))})
    vocab_rows, hidden = shapes.of("transformer.wte")
    heads = _required(path, theirs, "n_heads")
    groups = theirs.get("n_kv_heads") or (1 if theirs.get("multi_query_attention") else heads)
    eps = theirs.get("layer_norm_eps", 1e-5)
    model = {
        "num_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_query_groups": groups,
        "ffn_hidden_size": shapes.of(BLOCK.format(0) + "ff_out")[1],
        "max_sequence_length": _required(path, theirs, "max_sequence_length"),
        "rope_base": int(rope_base),
        "qk_norm": bool(theirs.get("attention_layer_norm", False)),
        "norm_eps": float(eps),
        "tie_embeddings": bool(theirs.get("weight_tying", True)),
        "vocab_size": vocab_rows,
        "vocab_size_multiple": math.gcd(vocab_rows, 128),
    }
    if model["qk_norm"]:
        model["qk_norm_width"] = "all_heads"
    shuffled = tensor_name(MEMORY.format(0) + "shuffle_index", tensors) in tensors
    memory = _memory(path, theirs, shapes, layers)
    memory |= {"shuffle": shuffled, "keep_shuffle": shuffled}
    shapes.compare(theirs, {"d_model": hidden, "n_layers": layers})
    return Released({**model, "memory": memory}, bool(theirs.get("mem_q_for_each_tucker_rank", False)), shuffled)


class _Shapes:
    """Shapes by name; a missing tensor is the user's error."""

    def __init__(self, path: Path, tensors: Mapping[str, TensorInfo]) -> None:
        self.path, self.tensors = path, tensors

    def of(self, name: str) -> tuple[int, ...]:
        found = self.tensors.get(tensor_name(name, self.tensors))
        if found is None:
            raise CheckpointError(f"{self.path.parent} has no {name}: this is no checkpoint of the released code")
        return found.shape

    def count(self, prefix: str) -> int:
        return sum(name.startswith(prefix) for name in self.tensors)

    def compare(self, theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
        """Raises if config.yaml says something else than the tensors do."""
        different = [
            f"{name} = {theirs[name]!r}, the tensors say {value!r}"
            for name, value in ours.items()
            if theirs.get(name) is not None and theirs[name] != value
        ]
        if different:
            raise CheckpointError(f"{self.path}: {'; '.join(different)}")


def _memory(path: Path, theirs: Mapping[str, Any], shapes: _Shapes, layers: int) -> dict[str, Any]:
    """One pool over all layers; a layer's window begins at its own table: (v + l * knum^2) mod (knum^2 * layers)."""
    first = MEMORY.format(0)
    heads, _, keys, key_dim, rank = shapes.of(f"{first}keys")
    rows, value_dim = shapes.of(f"{POOL}values_for_look_up")
    if (present := len({name.split(".")[2] for name in shapes.tensors if ".mem_blocks." in name})) != layers:
        raise CheckpointError(f"{path.parent}: {present} of {layers} blocks have memory; legal: all")
    if heads > 2:
        raise CheckpointError(f"{path.parent}: {heads} memory heads, which share queries; legal: 1 or 2")
    num_keys = math.isqrt(rows // layers)
    tables = _tables_seen(keys, num_keys)
    if num_keys**2 * layers != rows or tables is None:
        raise CheckpointError(
            f"{path.parent}: {rows} rows of values and {keys} keys per side do not come from {layers} tables of n*n "
            "rows, of which a layer sees a whole number"
        )
    shapes.compare(theirs, {"mem_knum": num_keys})
    if "mem_share_ratio" in theirs and keys != int(math.sqrt(rows * theirs["mem_share_ratio"])):
        raise CheckpointError(
            f"{path}: mem_share_ratio = {theirs['mem_share_ratio']}, the tensors say {tables / layers:g}"
        )
    memory = {
        "layers": "all",
        "num_keys": num_keys,
        "key_dim": key_dim,
        "num_heads": heads,
        "tucker_rank": rank,
        "num_cores": shapes.count(f"{first}tucker_core."),
        "query_per_rank": False,
        "value_dim": value_dim,
        "pre_value_dim": shapes.of(f"{POOL}pre_values_for_look_up")[1],
        "activation": "gelu" if theirs.get("mem_use_glu_act") else "none",
        "sharing": "ring",
        "share_size": tables,
        "pool_size": layers,
        "window": "start",
        "rows_multiple": math.gcd(rows, 128),
        "init": "released",
    }
    if "mem_knn" in theirs:
        memory["top_m"] = theirs["mem_knn"]
    return memory


def _tables_seen(keys: int, num_keys: int) -> int | None:
    """g with keys = floor(sqrt(g) * num_keys), if there is one."""
    least = -(-(keys**2) // num_keys**2)
    return least if math.isqrt(least * num_keys**2) == keys else None


def _required(path: Path, theirs: Mapping[str, Any], name: str) -> int:
    value = theirs.get(name)
    if not isinstance(value, int):
        raise CheckpointError(f"{path}: {name} = {value!r}; legal: an integer")
    return value


def _read_model_section(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = error.strerror if isinstance(error, OSError) else " ".join(str(error).split())
        raise CheckpointError(f"{path} cannot be read: {reason}") from None
    section = content.get("model", content) if isinstance(content, dict) else None
    if not isinstance(section, dict):
        raise CheckpointError(f"{path} does not hold settings of a model")
    return section
