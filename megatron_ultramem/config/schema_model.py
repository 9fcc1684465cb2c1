"""Settings of the model: transformer, memory layers and MoE."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Optional

from megatron_ultramem.config.setting import setting


@dataclass
class MemoryConfig:
    """The memory layers. Settings of one kind alone say so; another kind refuses them."""

    kind: str = setting(
        "ultramem_v2",
        "Memory layer: UltraMemV2 (arXiv 2508.18756), UltraMem (2411.12364), Memory+ (2412.09764), PKM (1907.05242) "
        "or PEER (2407.04153).",
        choices=("ultramem_v2", "ultramem", "memory_plus", "pkm", "peer"),
    )
    layers: str = setting("all", "Layers (from 0) that get a memory layer: 'all', 'none', or a list such as '0,2,5-8'.")
    replaces_ffn: Optional[bool] = setting(
        None,
        "A block with memory has no FFN; false: memory stands beside the FFN or MoE. null: true for memory_plus, pkm "
        "and peer.",
    )
    join_layers: Optional[str] = setting(
        None,
        "ultramem: layers where the outputs of `layers` are added, one for each in order, on the same pipeline stage: "
        "layers=3,8 join_layers=7,12 reads block 3 and adds to block 7; null: the layers themselves.",
    )
    num_keys: int = setting(
        360,
        "n: keys per side of ONE layer's table, so that the table has n*n rows; a layer that sees g tables has "
        "floor(sqrt(g)*n) keys per side, one of ultramem floor(sqrt(value_expansion)*n).",
        minimum=1,
    )
    key_dim: int = setting(192, "Dk: width of a key and of a query half.", minimum=1)
    num_heads: int = setting(1, "Retrieval heads, each with its own keys and queries.", minimum=1)
    tucker_rank: int = setting(2, "r: rank of the Tucker cores.", minimum=1)
    num_cores: int = setting(
        2, "Tucker cores (multi-core scoring): each scores its own slice of the value width.", minimum=1
    )
    query_per_rank: bool = setting(
        True,
        "ultramem_v2: separate queries for every Tucker rank and side (paper); false: one query per side shared by "
        "the ranks (released code), as ultramem always has.",
    )
    query_norm: Optional[str] = setting(
        None,
        "memory_plus, pkm, peer: rms (queries and keys), batch (queries, over the tokens of a micro-batch) or none; "
        "null: rms for memory_plus, batch for pkm and peer.",
        choices=("rms", "batch", "none"),
    )
    top_m: int = setting(32, "m: values activated per token and head.", minimum=1)
    coarse_top_k: Optional[int] = setting(
        None,
        "Cap on the candidates per side in the coarse pass: k = min(n, top_m, coarse_top_k); null: no cap.",
        minimum=1,
    )
    value_dim: int = setting(192, "Dv: width of a value row; hidden_size for pkm and peer.", minimum=1)
    pre_value_dim: int = setting(
        192, "ultramem_v2, peer: Dp, width of a pre-value row; hidden_size for peer.", minimum=1
    )
    activation: str = setting(
        "none",
        "ultramem_v2: activation on the pre-value dot product (peer's is always gelu).",
        choices=("none", "gelu"),
    )
    value_expansion: int = setting(
        4, "ultramem: E, virtual blocks over one table (implicit value expansion), each with its projection.", minimum=1
    )
    sharing: str = setting("none", "How layers share value tables.", choices=("none", "block", "ring", "no_ring"))
    share_size: int = setting(1, "g: tables that one layer sees.", minimum=1)
    pool_size: Optional[int] = setting(
        None,
        "Memory layers per pool of tables; a pool lives on one pipeline stage. null: 1 for sharing=none, "
        "share_size for block, all memory layers for ring and no_ring. memory_plus: layers that share one table; "
        "null: all.",
        minimum=1,
    )
    window: str = setting(
        "centered",
        "Window of a layer in ring and no_ring sharing: 'centered' on its own table "
        "(paper) or 'start'ing at it (released code).",
        choices=("centered", "start"),
    )
    shuffle: bool = setting(True, "Send grid indices through a fixed random permutation.")
    shuffle_seed: int = setting(1234, "Seed of those permutations; part of the model.", minimum=0)
    keep_shuffle: bool = setting(
        False,
        "Checkpoints hold the permutations themselves, not only their seed: for imported models, whose shuffle was "
        "drawn elsewhere.",
    )
    rows_multiple: int = setting(128, "Rows of a pool are padded to a multiple of this.", minimum=1)
    init: str = setting(
        "paper", "Initialisation: the paper's derived one, or the released code's.", choices=("paper", "released")
    )
    balance_loss_coeff: float = setting(0.0, "Weight of the balance loss on coarse key selection; 0: off.", minimum=0)
    tucker_penalty_coeff: Optional[float] = setting(
        None, "Weight of the Tucker penalty; 0: off. null: 0.001 for ultramem, 0 for ultramem_v2.", minimum=0
    )
    tucker_penalty_threshold: float = setting(0.15, "Singular values below this are not penalised.", minimum=0)
    recompute: bool = setting(
        False, "Recompute the memory layer in the backward pass, keeping only its input and the selected indices."
    )
    table_read: str = setting(
        "params",
        "What lookups read: the tables in the precision of parameters, or a copy in fp8 (E4M3, one fp32 scale a row, "
        "made after every optimizer step), which halves the bytes they move. Costs 1 byte a number beside the 2 of "
        "bf16, which stay: they are what is updated, gathered and saved; gradients and optimizer are as without. With "
        "tables by columns, ranks agree on the largest number of each row (4 bytes a row and table, once a step).",
        choices=("params", "fp8"),
    )
    kernels: str = setting(
        "auto",
        "Implementation of retrieval and lookup: plain PyTorch (reference), ultramem_kernels (fused), or "
        "auto: fused on a GPU where Triton is installed.",
        choices=("auto", "reference", "fused"),
    )


@dataclass
class MoEConfig:
    """Megatron's mixture-of-experts FFN, as a baseline or combined with memory."""

    layers: str = setting("none", "Layers (from 0) whose FFN is an MoE: 'all', 'none', or a list such as '0,2,5-8'.")
    num_experts: int = setting(64, "Experts per layer.", minimum=1)
    top_k: int = setting(8, "Experts per token.", minimum=1)
    ffn_hidden_size: int = setting(1024, "Inner width of one expert.", minimum=1)
    shared_expert_hidden_size: int = setting(
        0, "Inner width of the shared expert, which every token passes; 0: none.", minimum=0
    )
    shared_expert_gate: bool = setting(False, "The shared expert's output is weighted by a sigmoid of the token.")
    shared_expert_overlap: bool = setting(
        False, "Compute the shared expert while tokens travel (dispatcher alltoall; needs a GPU)."
    )
    router_score: str = setting("softmax", "What logits of the router become.", choices=("softmax", "sigmoid"))
    normalize_top_k: bool = setting(
        True,
        "Weights of the selected experts: softmax over their logits, so that they sum to 1; false: their share of the "
        "softmax over all experts (OLMoE).",
    )
    router_scale: Optional[float] = setting(None, "The weights are multiplied by this; null: 1.", above=0)
    router_groups: Optional[int] = setting(
        None, "Experts form this many groups, of which a token uses router_group_top_k; null: one.", minimum=1
    )
    router_group_top_k: Optional[int] = setting(None, "Groups of experts per token.", minimum=1)
    router_dtype: str = setting(
        "fp32", "Precision of the router's logits; params: that of the model.", choices=("params", "fp32", "fp64")
    )
    expert_bias: bool = setting(
        False, "Balance by a bias on the scores that select (not on the weights), as DeepSeek-V3; router_score=sigmoid."
    )
    expert_bias_rate: float = setting(1e-3, "What that bias moves by per optimizer step.", above=0)
    load_balancing: str = setting(
        "aux_loss",
        "What the load-balancing loss averages over: a micro-batch, a sequence (seq_aux_loss), or the micro-batches of "
        "all data-parallel ranks so far in the step (global_aux_loss).",
        choices=("aux_loss", "seq_aux_loss", "global_aux_loss"),
    )
    aux_loss_coeff: float = setting(0.01, "Weight of the load-balancing loss; 0: off.", minimum=0)
    z_loss_coeff: float = setting(0.0, "Weight of the router z-loss; 0: off.", minimum=0)
    dispatcher: str = setting(
        "alltoall",
        "Token dispatcher; flex: DeepEP's kernels (GPUs, package deep_ep).",
        choices=("alltoall", "allgather", "flex"),
    )
    flex_backend: str = setting("deepep", "Kernels of dispatcher flex.", choices=("deepep", "hybridep"))
    grouped_gemm: Optional[bool] = setting(
        None, "Grouped GEMM over experts (needs Transformer Engine); null: where it is available."
    )
    permute_fusion: Optional[bool] = setting(
        None, "Fused (un)permutation of tokens (needs Transformer Engine); null: where it is available."
    )
    router_fusion: bool = setting(False, "Fused router and load-balancing loss (needs Transformer Engine).")


@dataclass
class ModelConfig:
    """The transformer."""

    backend: str = setting(
        "auto",
        "Layer implementation: Megatron's local modules or Transformer Engine; auto: "
        "Transformer Engine where it is installed and a GPU is present.",
        choices=("auto", "local", "transformer_engine"),
    )
    num_layers: int = setting(20, "L: transformer blocks.", minimum=1)
    hidden_size: int = setting(768, "h: width of the residual stream.", minimum=1)
    num_attention_heads: int = setting(12, "Attention heads.", minimum=1)
    num_query_groups: Optional[int] = setting(
        None, "Key/value heads (grouped-query attention); null: one per head.", minimum=1
    )
    head_dim: Optional[int] = setting(
        None, "Width of an attention head; null: hidden_size / num_attention_heads.", minimum=1
    )
    ffn_hidden_size: int = setting(2496, "Inner width of the dense SwiGLU FFN.", minimum=1)
    max_sequence_length: int = setting(4096, "Longest sequence the model is built for.", minimum=1)
    rope_base: int = setting(10000, "Base of the rotary position embedding.", minimum=1)
    qk_norm: bool = setting(True, "RMS-normalise queries and keys of attention.")
    qk_norm_width: str = setting(
        "head",
        "What one of these norms spans: each head by itself, or all heads (OLMoE).",
        choices=("head", "all_heads"),
    )
    norm_eps: float = setting(1e-5, "Epsilon of every RMSNorm.", above=0)
    tie_embeddings: bool = setting(True, "Share the embedding with the output layer.")
    vocab_size: Optional[int] = setting(None, "Vocabulary; null: the tokenizer's.", minimum=1)
    vocab_size_multiple: int = setting(
        128, "The vocabulary is padded to a multiple of this, under every layout.", minimum=1
    )
    hidden_dropout: float = setting(0.0, "Dropout on residual branches.", minimum=0, maximum=1)
    attention_dropout: float = setting(0.0, "Dropout on attention weights.", minimum=0, maximum=1)
    init_std: Optional[float] = setting(
        None,
        "Standard deviation of linear weights and embeddings; null: sqrt(2/(5h)) (UltraMemV2, appendix A).",
        above=0,
    )
    memory: MemoryConfig = field(default_factory=MemoryConfig, metadata={"help": "Memory layers."})
    moe: MoEConfig = field(default_factory=MoEConfig, metadata={"help": "Mixture-of-experts layers."})
