"""Settings of training: layout over ranks, optimizer, schedule, precision and steps."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Optional

from megatron_ultramem.config.setting import setting


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
    gc_interval: int = setting(
        0,
        "Python's garbage collection runs after every N steps, on all ranks after the same one; tensors in cycles stay "
        "until then. 0: whenever Python wants, on each rank at another time, for which the others wait; it wants more "
        "often the more the host does (without CUDA graphs).",
        minimum=0,
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
