"""The configuration tree: every setting, its default, its legal values and one line of explanation.

The sections are in `schema_model.py`, `schema_training.py` and `schema_run.py`; none of these files holds logic.
`load.py` reads YAML and overrides into the tree, `validate.py` checks what involves several settings, `describe.py`
prints it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from megatron_ultramem.config.schema_model import MemoryConfig, ModelConfig, MoEConfig
from megatron_ultramem.config.schema_run import (
    CheckpointConfig,
    DataConfig,
    FaultsConfig,
    LoggingConfig,
    TokenizerConfig,
)
from megatron_ultramem.config.schema_training import (
    Fp8Config,
    OptimizerConfig,
    ParallelConfig,
    ScheduleConfig,
    TrainConfig,
)
from megatron_ultramem.config.setting import setting

__all__ = [
    "CheckpointConfig", "Config", "DataConfig", "FaultsConfig", "Fp8Config", "LoggingConfig", "MemoryConfig",
    "MoEConfig", "ModelConfig", "OptimizerConfig", "ParallelConfig", "ScheduleConfig", "TokenizerConfig",
    "TrainConfig", "setting",
]  # fmt: skip


@dataclass
class Config:
    """Everything that defines a run."""

    preset: str = setting(
        "none",
        "throughput: other defaults for settings that change nothing but speed and rounding (config/presets.py); "
        "throughput_fp8: FP8 matrix products and tables read in FP8 beside them; what is set in the file or on the "
        "command line stays.",
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
