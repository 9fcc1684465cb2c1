"""Settings of what surrounds training: data, checkpoints, faults and logs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Optional

from megatron_ultramem.config.setting import setting


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
