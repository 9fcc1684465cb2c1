"""Small checkpoints of the trainer, whose gains are not ones."""

from __future__ import annotations

from pathlib import Path

import torch

from megatron_ultramem.config import load_config
from megatron_ultramem.config.schema import TokenizerConfig
from megatron_ultramem.platform import prepare
from megatron_ultramem.training.preprocess import preprocess

MODEL = [
    "model.num_layers=4", "model.hidden_size=32", "model.num_attention_heads=4", "model.num_query_groups=2",
    "model.ffn_hidden_size=48", "model.max_sequence_length=64", "model.memory.num_keys=9", "model.memory.key_dim=8",
    "model.memory.top_m=6", "model.memory.value_dim=12", "model.memory.pre_value_dim=10",
    "model.memory.rows_multiple=64", "data.sequence_length=32", "train.steps=5", "train.global_batch_size=4",
    "train.micro_batch_size=2", "train.eval_steps=0", "logging.progress=false", "logging.tensorboard=false",
]  # fmt: skip
MOE = [
    "model.moe.layers='1,2'", "model.moe.num_experts=4", "model.moe.top_k=2", "model.moe.ffn_hidden_size=24",
    "model.moe.shared_expert_hidden_size=16",
]  # fmt: skip
FP32, BF16 = "train.precision=fp32", "train.precision=bf16"


def write_corpus(folder: Path, tokenizer: TokenizerConfig | None = None) -> Path:
    """Prefix of a small data set, of bytes unless another tokenizer is given."""
    folder.mkdir(parents=True, exist_ok=True)
    text = folder / "text.txt"
    text.write_text("The cat sat on the mat, and so did the dog. " * 40)
    preprocess([text], folder / "data", tokenizer or TokenizerConfig())
    return folder / "data"


def save_checkpoint(folder: Path, corpus: Path, settings: list[str]) -> Path:
    """Trains one step in `folder` and saves; returns the checkpoint. Collective."""
    overrides = [*MODEL, f"data.paths=[{corpus}]", "data.split='1,0,0'", f"train.run_dir={folder}", *settings]
    config = load_config(None, overrides)
    prepare(config.train.device)
    from megatron_ultramem.training.distributed import destroy_distributed
    from megatron_ultramem.training.loop import train_step
    from megatron_ultramem.training.setup import set_up

    run = set_up(config)
    try:
        generator = torch.Generator().manual_seed(5)
        for chunk in run.model:
            for param in chunk.parameters():
                if param.dim() == 1:  # gains of ones would hide that one of them is missing
                    param.data.copy_(param.data * (1 + 0.3 * torch.randn(param.shape, generator=generator)))
        run.optimizer.reload_model_params()
        train_step(run)
        return run.checkpoints.save(run.position)
    finally:
        destroy_distributed()
