"""What the released research code computes, written down literally from its description, for tests of the import.

A state dict under its names, random, and the forward of the whole model on one sequence: loops over heads and tokens
where the description has them, nothing shared with the code under test.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

State = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Sizes:
    layers: int = 4
    hidden: int = 32
    heads: int = 4
    kv_heads: int = 2
    ffn: int = 24
    vocabulary: int = 300
    knum: int = 6
    share_ratio: float = 0.5
    key_dim: int = 8
    rank: int = 2
    cores: int = 2
    memory_heads: int = 1
    m: int = 5
    value_dim: int = 12
    pre_value_dim: int = 10
    query_per_rank: bool = False
    gelu: bool = False
    tied: bool = True
    qk_norm: bool = True

    @property
    def n(self) -> int:
        return int(math.sqrt(self.knum**2 * self.layers * self.share_ratio))

    @property
    def head_width(self) -> int:
        return self.hidden // self.heads

    def config(self) -> dict[str, Any]:
        """config.yaml."""
        model = {
            "d_model": self.hidden, "n_heads": self.heads, "n_kv_heads": self.kv_heads, "n_layers": self.layers,
            "mlp_hidden_size": 2 * self.ffn, "activation_type": "swiglu", "block_type": "sequential", "rope": True,
            "rope_theta": 500, "layer_norm_type": "rms", "layer_norm_eps": 1e-5, "attention_layer_norm": self.qk_norm,
            "include_bias": False, "weight_tying": self.tied, "max_sequence_length": 64,
            "vocab_size": self.vocabulary - 3, "embedding_size": self.vocabulary, "clip_qkv": None,
            "mem_knum": self.knum, "mem_share_ratio": self.share_ratio, "mem_knn": self.m,
            "mem_q_for_each_tucker_rank": self.query_per_rank, "mem_use_glu_act": self.gelu,
        }  # fmt: skip
        return {"run_name": "released", "model": model, "optimizer": {"name": "adamw"}}


def random_state(sizes: Sizes, seed: int = 0) -> State:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int, std: float = 0.2) -> torch.Tensor:
        return std * torch.randn(shape, generator=generator)

    def gain(width: int) -> torch.Tensor:
        return 1 + draw(width)

    s = sizes
    state = {"transformer.wte.weight": draw(s.vocabulary, s.hidden), "transformer.ln_f.weight": gain(s.hidden)}
    if not s.tied:
        state["transformer.ff_out.weight"] = draw(s.vocabulary, s.hidden)
    for layer in range(s.layers):
        block, memory = f"transformer.blocks.{layer}.", f"transformer.mem_blocks.{layer}."
        qkv = (s.heads + 2 * s.kv_heads) * s.head_width
        state |= {
            f"{block}attn_norm.weight": gain(s.hidden),
            f"{block}att_proj.weight": draw(qkv, s.hidden),
            f"{block}attn_out.weight": draw(s.hidden, s.hidden),
            f"{block}ff_norm.weight": gain(s.hidden),
            f"{block}ff_proj.weight": draw(2 * s.ffn, s.hidden),
            f"{block}ff_out.weight": draw(s.hidden, s.ffn),
            f"{memory}query_proj.weight": draw((s.rank if s.query_per_rank else 1) * 2 * s.key_dim, s.hidden),
            f"{memory}pre_values_proj.weight": draw(s.pre_value_dim, s.hidden),
            f"{memory}values_proj.weight": draw(s.hidden, s.value_dim),
            f"{memory}keys": draw(s.memory_heads, 2, s.n, s.key_dim, s.rank),
            f"{memory}query_norm.weight": gain(s.key_dim),
            f"{memory}keys_norm.weight": gain(s.key_dim),
            f"{memory}shuffle_index": torch.randperm(s.n**2, generator=generator),
        }
        if s.qk_norm:
            state |= {
                f"{block}q_norm.weight": gain(s.heads * s.head_width),
                f"{block}k_norm.weight": gain(s.kv_heads * s.head_width),
            }
        cores = [torch.rand(s.memory_heads, s.rank, s.rank, generator=generator) for _ in range(s.cores)]
        state |= {f"{memory}tucker_core.{number}": core for number, core in enumerate(cores)}
        left, _, right = torch.linalg.svd(sum(cores))
        state[f"{memory}tucker_core_u"] = left[:, :, 0].view(1, s.memory_heads, 1, s.rank).clone()
        state[f"{memory}tucker_core_v"] = right[:, 0, :].view(1, s.memory_heads, 1, s.rank).clone()
    rows = s.knum**2 * s.layers
    state["transformer.full_memory_layer.values_for_look_up"] = draw(rows, s.value_dim, std=0.5)
    state["transformer.full_memory_layer.pre_values_for_look_up"] = draw(rows, s.pre_value_dim, std=0.5)
    return state


def forward(state: State, s: Sizes, tokens: list[int]) -> torch.Tensor:
    """Logits [T, vocabulary] of one sequence."""
    hidden = state["transformer.wte.weight"][tokens]
    for layer in range(s.layers):
        block = f"transformer.blocks.{layer}."
        hidden = hidden + attention(state, s, block, rms_norm(hidden, state[f"{block}attn_norm.weight"]))
        x = rms_norm(hidden, state[f"{block}ff_norm.weight"])
        value, gate = (x @ state[f"{block}ff_proj.weight"].T).chunk(2, dim=-1)
        feed_forward = (F.silu(gate) * value) @ state[f"{block}ff_out.weight"].T
        hidden = hidden + feed_forward + memory(state, s, layer, x)
    hidden = rms_norm(hidden, state["transformer.ln_f.weight"])
    return hidden @ state["transformer.wte.weight" if s.tied else "transformer.ff_out.weight"].T


def rms_norm(x: torch.Tensor, gain: torch.Tensor, eps: float = 1e-5) -> torch.Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * gain


def attention(state: State, s: Sizes, block: str, x: torch.Tensor) -> torch.Tensor:
    width = s.head_width
    q, k, v = (x @ state[f"{block}att_proj.weight"].T).split(
        [s.heads * width, s.kv_heads * width, s.kv_heads * width], dim=-1
    )
    if s.qk_norm:
        q, k = rms_norm(q, state[f"{block}q_norm.weight"]), rms_norm(k, state[f"{block}k_norm.weight"])
    T = len(x)
    angles = torch.arange(T)[:, None] / 500 ** (torch.arange(0, width, 2) / width)
    angles = torch.cat((angles, angles), dim=-1)

    def rotate(head: torch.Tensor) -> torch.Tensor:
        first, second = head.chunk(2, dim=-1)
        return head * angles.cos() + torch.cat((-second, first), dim=-1) * angles.sin()

    out = []
    for head in range(s.heads):
        shared = head // (s.heads // s.kv_heads)
        query = rotate(q[:, head * width : (head + 1) * width])
        key = rotate(k[:, shared * width : (shared + 1) * width])
        scores = (query @ key.T / math.sqrt(width)).masked_fill(torch.ones(T, T).triu(1).bool(), -torch.inf)
        out.append(scores.softmax(-1) @ v[:, shared * width : (shared + 1) * width])
    return torch.cat(out, dim=-1) @ state[f"{block}attn_out.weight"].T


def memory(state: State, s: Sizes, layer: int, x: torch.Tensor) -> torch.Tensor:
    """The memory branch [T, hidden] of normalised FFN inputs."""
    prefix = f"transformer.mem_blocks.{layer}."
    ranks = s.rank if s.query_per_rank else 1
    # With a query for every rank, only the first of them is used.
    q = (x @ state[f"{prefix}query_proj.weight"].T).view(len(x), ranks, 2, s.key_dim)[:, 0]
    q = rms_norm(q, state[f"{prefix}query_norm.weight"])  # [T, 2, Dk]
    keys = state[f"{prefix}keys"].transpose(-1, -2)
    keys = rms_norm(keys, state[f"{prefix}keys_norm.weight"]).transpose(-1, -2)  # [head, 2, n, Dk, r]
    cores = [state[f"{prefix}tucker_core.{number}"] for number in range(s.cores)]
    pre_input = x @ state[f"{prefix}pre_values_proj.weight"].T
    values = state["transformer.full_memory_layer.values_for_look_up"]
    pre_values = state["transformer.full_memory_layer.pre_values_for_look_up"]
    n = s.n
    pooled = torch.zeros(len(x), s.value_dim)
    for token in range(len(x)):
        for head in range(s.memory_heads):
            u = state[f"{prefix}tucker_core_u"][0, head, 0]
            v = state[f"{prefix}tucker_core_v"][0, head, 0]
            query = q[token]  # head i uses query i // 2, and there is one
            row_scores = torch.einsum("d,ndr->nr", query[0], keys[head, 0])
            column_scores = torch.einsum("d,ndr->nr", query[1], keys[head, 1])
            rows = (row_scores @ u).topk(min(s.m, n)).indices
            columns = (column_scores @ v).topk(min(s.m, n)).indices
            by_core = [row_scores[rows] @ core[head] @ column_scores[columns].T for core in cores]
            best = sum(by_core).flatten().topk(s.m).indices
            for pair in best.tolist():
                i, j = pair // len(columns), pair % len(columns)
                grid = int(rows[i]) * n + int(columns[j])
                shuffled = int(state[f"{prefix}shuffle_index"][grid])
                row = (shuffled % n**2 + layer * s.knum**2) % (s.knum**2 * s.layers)
                p = pre_input[token] @ pre_values[row]
                p = F.gelu(p) if s.gelu else p
                slices = values[row].view(s.cores, -1)
                pooled[token] += torch.cat([p * by_core[c][i, j] * slices[c] for c in range(s.cores)])
    return pooled @ state[f"{prefix}values_proj.weight"].T
