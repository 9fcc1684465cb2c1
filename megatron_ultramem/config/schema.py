"""The configuration tree: every setting, its default, its legal values and one line of explanation.

This file is long because it is the one list of all settings; it holds no logic. `load.py` reads YAML and overrides
into it, `validate.py` checks what involves several settings, `describe.py` prints it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Optional


def setting(
    default: Any,
    help: str,
    *,
    choices: tuple[str, ...] = (),
    minimum: float | None = None,
    maximum: float | None = None,
    above: float | None = None,
) -> Any:
    """A dataclass field with its explanation and its legal range (`above` is an exclusive minimum)."""
    metadata = {"help": help, "choices": choices, "minimum": minimum, "maximum": maximum, "above": above}
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


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


@dataclass
class ParallelConfig:
    """How the model is laid out over ranks. Data parallelism takes what the other dimensions leave."""

    tensor_parallel_size: int = setting(1, "TP: ranks that split every matrix.", minimum=1)
    sequence_parallel: Optional[bool] = setting(
        None,
        "Split activations between TP regions along the sequence; "
        "null: on when TP > 1. Memory layers need it when TP > 1.",
    )
    pipeline_parallel_size: int = setting(1, "PP: pipeline stages.", minimum=1)
    virtual_pipeline_stages: int = setting(
        1, "Model chunks per pipeline rank; above 1: interleaved schedule.", minimum=1
    )
    context_parallel_size: int = setting(1, "CP: ranks that split the sequence (needs Transformer Engine).", minimum=1)
    expert_parallel_size: int = setting(1, "EP: ranks that split the experts.", minimum=1)
    memory_parallel_size: int = setting(
        1, "P: ranks that share the value tables, each with its part; the same group as that of the experts.", minimum=1
    )
    memory_placement: str = setting(
        "auto",
        "What the ranks of a memory-parallel group hold: replicated (everything; P = 1), rows (all columns of 1/P of "
        "the rows), columns (1/P of the columns of all rows), two_level (columns within a node, rows across nodes); "
        "auto: replicated for P = 1, else the fastest by the cost model (`ultramem plan`).",
        choices=("auto", "replicated", "rows", "columns", "two_level"),
    )
    memory_columns: Optional[int] = setting(
        None,
        "two_level: consecutive ranks that share columns; null: ranks_per_node (auto: the best divisor of it).",
        minimum=2,
    )
    exchange_capacity: Optional[float] = setting(
        None,
        "rows and two_level: static sizes with room for this multiple of an even share, and a second round for what "
        "does not fit; from the number of ranks that share the rows on (memory_parallel_size; two_level: the number of "
        "nodes, memory_parallel_size / memory_columns): room for all and no second round (for CUDA graphs); null: "
        "sizes follow the tokens.",
        above=0,
    )
    overlap_exchange: bool = setting(
        False, "Run the memory layer, with its exchange, on a CUDA stream of its own beside the FFN."
    )
    ranks_per_node: int = setting(8, "GPUs that a fast link joins; for the cost model and two_level.", minimum=1)
    intra_node_gb_per_s: float = setting(
        282.0, "All-to-all bandwidth of a rank within a node, for the cost model (measured on H200).", above=0
    )
    inter_node_gb_per_s: float = setting(
        45.0, "All-to-all bandwidth of a rank between nodes, for the cost model (one 400 Gb/s link).", above=0
    )
    exchange_latency_us: float = setting(
        30.0, "Time of a small all-to-all in microseconds, for the cost model (measured on H200).", minimum=0
    )
    distributed_optimizer: bool = setting(True, "Split optimizer state over data-parallel ranks.")
    overlap_grad_reduce: bool = setting(False, "Reduce gradients while the backward pass runs.")
    overlap_param_gather: bool = setting(
        False,
        "Gather parameters while the next forward pass runs (needs distributed_optimizer and overlap_grad_reduce).",
    )
    overlap_p2p: bool = setting(
        False, "Overlap pipeline sends and receives with compute; the interleaved schedule on two stages needs it."
    )
    bucket_size: Optional[int] = setting(None, "Parameters per gradient bucket; null: Megatron's choice.", minimum=1)
    timeout_minutes: float = setting(10.0, "A collective that takes longer ends the run.", above=0)


@dataclass
class TokenizerConfig:
    """Text to token ids."""

    kind: str = setting(
        "byte",
        "byte (needs no file), huggingface (tokenizer.json), sentencepiece (.model) or "
        "tiktoken (a rank file or a built-in encoding's name).",
        choices=("byte", "huggingface", "sentencepiece", "tiktoken"),
    )
    path: Optional[str] = setting(None, "Tokenizer file; not for byte.")
    eod_token: Optional[str] = setting(None, "Name of the end-of-document token; null: found by the usual names.")
    pattern: Optional[str] = setting(
        None, "Regex that cuts text before merging (tiktoken rank files only); null: that of cl100k_base."
    )


@dataclass
class DataConfig:
    """Megatron .bin/.idx datasets, made by tools/preprocess_data.py."""

    paths: list[str] = setting([], "Prefixes of .bin/.idx pairs, split into train, validation and test by `split`.")
    weights: list[float] = setting([], "Sampling weight of each path; empty: by size.")
    split: str = setting("969,30,1", "Shares of train, validation and test; training never reads the test share.")
    train_paths: list[str] = setting([], "Instead of `paths`: prefixes for training alone.")
    train_weights: list[float] = setting([], "Sampling weight of each training path.")
    valid_paths: list[str] = setting([], "Instead of `paths`: prefixes for validation alone.")
    valid_weights: list[float] = setting([], "Sampling weight of each validation path.")
    test_paths: list[str] = setting([], "Instead of `paths`: prefixes for test alone; training never reads them.")
    test_weights: list[float] = setting([], "Sampling weight of each test path.")
    sequence_length: int = setting(4096, "Tokens per sample.", minimum=1)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig, metadata={"help": "Tokenizer."})
    reset_position_ids: bool = setting(
        False, "Positions start at 0 in every document (needs mask_document_boundaries)."
    )
    mask_document_boundaries: bool = setting(False, "Attention does not cross document boundaries.")
    mask_eod_loss: bool = setting(False, "No loss on end-of-document tokens.")
    seed: int = setting(1234, "Seed of the data order.", minimum=0)
    cache_dir: Optional[str] = setting(None, "Where index files are cached; null: <run_dir>/data_cache.")
    num_workers: int = setting(0, "Loader processes per rank; 0: load in the training process.", minimum=0)


@dataclass
class OptimizerConfig:
    """AdamW."""

    lr: float = setting(4e-4, "Peak learning rate.", above=0)
    beta1: float = setting(0.9, "Adam beta1.", minimum=0, maximum=1)
    beta2: float = setting(0.95, "Adam beta2.", minimum=0, maximum=1)
    eps: float = setting(1e-8, "Adam epsilon.", above=0)
    weight_decay: float = setting(0.1, "Decoupled weight decay; not on norms and biases.", minimum=0)
    clip_grad: float = setting(1.0, "Largest global gradient norm; 0: no clipping.", minimum=0)
    value_lr_times: float = setting(
        1.0, "Learning rate of value tables: multiplier 1 + (times-1)*max(0, 1 - step/(steps*value_lr_rate)).", above=0
    )
    value_lr_rate: float = setting(1.0, "Share of the run over which that multiplier falls to 1.", above=0)
    value_lr: Optional[float] = setting(
        None, "Fixed learning rate of value tables, instead of those two (Memory+: 1e-3).", above=0
    )
    value_weight_decay: Optional[float] = setting(None, "Weight decay of value tables; null: weight_decay.", minimum=0)
    value_offload: str = setting(
        "none",
        "Keep fp32 master weights and Adam moments of value tables in host memory and update them there, by "
        "DeepSpeed's CPU Adam (extra `deepspeed`) or torch's; auto: DeepSpeed's where it is installed and compiles.",
        choices=("none", "auto", "deepspeed", "torch"),
    )
    offload_threads: Optional[int] = setting(
        None, "Threads of that update on a rank; null: the machine's cores, shared among its ranks.", minimum=1
    )


@dataclass
class ScheduleConfig:
    """Learning-rate schedule, in optimizer steps."""

    kind: str = setting("cosine", "Shape after the warm-up.", choices=("cosine", "wsd", "constant"))
    warmup_steps: int = setting(0, "Linear warm-up.", minimum=0)
    min_lr_ratio: float = setting(0.1, "Final learning rate as a share of the peak.", minimum=0, maximum=1)
    decay_steps: Optional[int] = setting(None, "Steps at which the decay ends; null: train.steps.", minimum=1)
    wsd_decay_steps: Optional[int] = setting(
        None, "Length of the final decay of wsd; null: a tenth of decay_steps.", minimum=1
    )
    wsd_decay_shape: str = setting(
        "linear", "Shape of the final decay of wsd.", choices=("linear", "cosine", "exponential", "minus_sqrt")
    )


@dataclass
class Fp8Config:
    """FP8 matrix products by Transformer Engine, on GPUs that have them (H100 and later).

    The linears of attention, FFN and MoE, and the projections of memory layers (queries, pre-values, values, gates) run
    in FP8. Keys, Tucker scores, value tables, norms, the embedding, the output layer and all gradients that are
    accumulated or reduced stay in bf16 or fp32, as without FP8. Evaluation is as training, generation is in bf16.
    """

    recipe: str = setting(
        "none",
        "How scales come about: none (no FP8), delayed (a tensor's scale from earlier steps), tensorwise (from the "
        "tensor itself), blockwise (one for 128 numbers of an activation, for 128 x 128 of a weight). Keys, Tucker "
        "scores, value tables and their gradients stay bf16 and fp32 under all of them.",
        choices=("none", "delayed", "tensorwise", "blockwise"),
    )
    format: Optional[str] = setting(
        None,
        "hybrid: E4M3 forward, E5M2 for gradients; e4m3: E4M3 throughout. null: e4m3 for blockwise, else hybrid.",
        choices=("hybrid", "e4m3"),
    )
    margin: int = setting(0, "delayed: scales leave 2^margin of headroom.", minimum=0)
    amax_history_len: int = setting(1024, "delayed: micro-batches whose largest numbers are remembered.", minimum=1)
    amax_compute_algo: str = setting(
        "max", "delayed: a scale follows the largest of them, or the newest.", choices=("max", "most_recent")
    )
    first_last_layers_bf16: bool = setting(
        False, "The first and last layers stay in bf16 (tensorwise and blockwise), as many as the next two say."
    )
    num_layers_at_start_in_bf16: int = setting(1, "Layers at the start of the model in bf16.", minimum=0)
    num_layers_at_end_in_bf16: int = setting(1, "Layers at its end in bf16.", minimum=0)
    param_gather: bool = setting(
        False,
        "Weights of these linears exist in FP8 alone, beside the optimizer's fp32, and are gathered in FP8 (needs "
        "parallel.distributed_optimizer).",
    )
    memory_projections: bool = setting(
        True, "The projections of memory layers run in FP8 too; false: in bf16, as train.cuda_graphs=memory needs it."
    )


@dataclass
class TrainConfig:
    """The run."""

    run_dir: str = setting("runs/default", "Folder of this run: metrics, logs, checkpoints.")
    steps: int = setting(1000, "Optimizer steps.", minimum=1)
    micro_batch_size: int = setting(1, "Samples per rank in one forward-backward.", minimum=1)
    global_batch_size: int = setting(8, "Samples per optimizer step.", minimum=1)
    rampup_batch_size: list[int] = setting(
        [],
        "[start, increment, samples]: grow the global batch from `start` by "
        "`increment` over `samples` samples; empty: no ramp-up.",
    )
    precision: str = setting(
        "bf16", "Parameters and activations; gradients and optimizer state are fp32.", choices=("bf16", "fp32")
    )
    fp8: Fp8Config = field(default_factory=Fp8Config, metadata={"help": "FP8 matrix products."})
    device: str = setting(
        "auto", "auto: CUDA with NCCL where a GPU is present, else CPU with gloo.", choices=("auto", "cpu", "cuda")
    )
    seed: int = setting(1234, "Seed of initialisation and dropout.", minimum=0)
    deterministic: bool = setting(False, "Only algorithms that give bitwise equal results from run to run.")
    recompute: str = setting(
        "none",
        "Activation recompute: none, selective (core attention), or full (whole blocks, memory included).",
        choices=("none", "selective", "full"),
    )
    cuda_graphs: str = setting(
        "none",
        "What is recorded as CUDA graphs, which spare the host most of its launches: memory (memory layers of "
        "kind ultramem_v2, without pipeline parallelism), full (the whole model, of any kind but an MoE; needs "
        "Transformer Engine), layers (Megatron's: attention, routers and dense FFNs of models without memory; needs "
        "Transformer Engine), or none.",
        choices=("none", "memory", "full", "layers"),
    )
    cross_entropy: str = setting(
        "megatron",
        "Kernels of the loss: Megatron's (in fp32, compiled by torch on a GPU), or Transformer Engine's one pass over "
        "the logits.",
        choices=("megatron", "transformer_engine"),
    )
    norms: str = setting(
        "backend",
        "Kernels of RMSNorms that are not fused into a linear: those of model.backend, torch's, or ultramem_kernels'.",
        choices=("backend", "torch", "ultramem"),
    )
    fused_weight_gradients: bool = setting(
        False,
        "Transformer Engine's linears add weight gradients to the fp32 buffer within their GEMM, instead of rounding "
        "them to bf16 first.",
    )
    eval_interval: int = setting(0, "Evaluate every N steps; 0: only at the end.", minimum=0)
    eval_steps: int = setting(10, "Global batches per evaluation; 0: no evaluation.", minimum=0)
    minutes: Optional[float] = setting(
        None,
        "End after so many minutes (from the end of the first step), or at `steps`: the final decay of schedule.kind = "
        "wsd begins in time. null: no limit.",
        above=0,
    )
    exit_after_steps: Optional[int] = setting(
        None,
        "Stop (with a checkpoint) after this many steps of this launch; the schedule still follows `steps`.",
        minimum=1,
    )


@dataclass
class CheckpointConfig:
    """Checkpoints in PyTorch's distributed format."""

    dir: Optional[str] = setting(None, "Folder of checkpoints; null: <run_dir>/checkpoints.")
    interval: int = setting(0, "Save every N steps; 0: only at the end.", minimum=0)
    keep_last: int = setting(3, "Checkpoints kept; 0: all.", minimum=0)
    keep_every: int = setting(0, "Checkpoints of multiples of this step are kept beside them; 0: none.", minimum=0)
    async_save: bool = setting(False, "Write in the background while training goes on.")
    async_timeout_minutes: float = setting(60.0, "A background save that takes longer has failed.", above=0)
    load: str = setting(
        "auto",
        "auto: resume from the newest checkpoint of this run if there is one, or from the one before if it is damaged; "
        "none: start afresh; or the path of a checkpoint. A run that is restarted in place goes on from its own.",
    )
    verify: bool = setting(True, "Compare the files of a checkpoint with their checksums before it is loaded.")
    load_optimizer: bool = setting(True, "Load optimizer, schedule, RNG and data position too; false: weights only.")


@dataclass
class FaultsConfig:
    """Ranks that end, stop or hang, and steps that go wrong."""

    watchdog: bool = setting(
        True, "Ranks watch each other; a fault ends the run with a report in <run_dir>/faults.jsonl."
    )
    heartbeat_seconds: float = setting(2.0, "Every rank leaves a sign of life this often.", above=0)
    silent_seconds: float = setting(
        60.0, "A rank without a sign of life for so long has stopped, or its host is lost.", above=0
    )
    hang_minutes: Optional[float] = setting(
        None, "A step, a save or an evaluation batch that takes longer hangs; null: parallel.timeout_minutes.", above=0
    )
    on_nonfinite: str = setting(
        "stop",
        "A loss or gradient that is not finite: stop the run; skip the batch; or rewind to the last checkpoint and go "
        "on with the data after it.",
        choices=("stop", "skip", "rewind"),
    )
    on_spike: str = setting("ignore", "A loss that leaps, likewise.", choices=("ignore", "stop", "skip", "rewind"))
    spike_threshold: float = setting(
        6.0, "A loss leaps when it is so many standard deviations above the mean of the last spike_window.", above=0
    )
    spike_window: int = setting(100, "Good steps that a leap is measured by.", minimum=2)
    max_skips: int = setting(10, "Steps skipped in a row before the run stops.", minimum=0)
    max_rewinds: int = setting(3, "Rewinds of one start before the run stops.", minimum=0)


@dataclass
class LoggingConfig:
    """What is recorded. A JSONL metrics file is always written to <run_dir>/metrics.jsonl."""

    interval: int = setting(10, "Log every N steps.", minimum=1)
    memory_health_interval: int = setting(100, "Memory-health metrics every N steps; 0: never.", minimum=0)
    progress: bool = setting(True, "Live progress line in the terminal.")
    tensorboard: bool = setting(True, "Write TensorBoard event files to <run_dir>/tensorboard.")
    wandb_mode: str = setting("disabled", "Weights & Biases.", choices=("disabled", "offline", "online"))
    wandb_project: str = setting("megatron-ultramem", "Weights & Biases project.")
    wandb_name: Optional[str] = setting(None, "Weights & Biases run name; null: the name of run_dir.")
    prometheus_port: Optional[int] = setting(
        None, "Serve the newest metrics to Prometheus at this port; null: do not.", minimum=1, maximum=65535
    )
    prometheus_address: str = setting(
        "127.0.0.1", "Address it listens at; by default this machine alone can ask. Nothing checks who does."
    )
    rank_log_mib: float = setting(
        64.0, "Size at which the log of a rank, <run_dir>/logs/rank_N.log, is rotated, in MiB.", above=0
    )
    rank_log_files: int = setting(3, "Log files kept for a rank, with the one that is written to.", minimum=2)
    straggler_interval: int = setting(100, "Name the slowest rank every N steps; 0: never.", minimum=0)
    profile_steps: Optional[str] = setting(
        None, "Steps to profile, such as '100-104'; touching <run_dir>/profile is another way."
    )
    profile_length: int = setting(
        3, "Steps recorded after <run_dir>/profile or <run_dir>/memory was touched.", minimum=1
    )
    profile_ranks: list[int] = setting([0], "Ranks that record.")
    profile_with: str = setting(
        "torch", "torch's profiler, or a capture range for nsys (GPU).", choices=("torch", "nsys")
    )
    profile_memory: bool = setting(False, "Record the memory of the steps of profile_steps too (GPU).")
    nvtx: bool = setting(False, "Mark the parts of a step as NVTX ranges, which nsys shows (GPU).")


@dataclass
class Config:
    """Everything that defines a run."""

    preset: str = setting(
        "none",
        "throughput: other defaults for settings that cost nothing but speed (config/presets.py); throughput_fp8: FP8 "
        "matrix products and tables read in FP8 beside them; what is set in the file or on the command line stays.",
        choices=("none", "throughput", "throughput_fp8"),
    )
    model: ModelConfig = field(default_factory=ModelConfig, metadata={"help": "The transformer."})
    parallel: ParallelConfig = field(default_factory=ParallelConfig, metadata={"help": "Layout over ranks."})
    data: DataConfig = field(default_factory=DataConfig, metadata={"help": "Data and tokenizer."})
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig, metadata={"help": "AdamW."})
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig, metadata={"help": "Learning rate."})
    train: TrainConfig = field(default_factory=TrainConfig, metadata={"help": "The run."})
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig, metadata={"help": "Checkpoints."})
    faults: FaultsConfig = field(default_factory=FaultsConfig, metadata={"help": "Faults and how they are met."})
    logging: LoggingConfig = field(default_factory=LoggingConfig, metadata={"help": "Metrics and logs."})
