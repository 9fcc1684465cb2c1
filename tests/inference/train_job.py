"""Trains the small checkpoint that tests of generation read, through the trainer itself."""

from __future__ import annotations

from pathlib import Path

from megatron_ultramem.config import load_config
from megatron_ultramem.config.schema import TokenizerConfig
from megatron_ultramem.platform import prepare
from megatron_ultramem.training.preprocess import preprocess

SENTENCES = ("the cat sat on the mat. ", "a dög ran to the høuse. ", "she sells sea shells. ")
END = "fin."
MODEL = [
    "model.num_layers=2",
    "model.hidden_size=32",
    "model.num_attention_heads=4",
    "model.num_query_groups=2",
    "model.ffn_hidden_size=64",
    "model.max_sequence_length=64",
    "model.memory.num_keys=12",
    "model.memory.key_dim=8",
    "model.memory.top_m=6",
    "model.memory.value_dim=16",
    "model.memory.pre_value_dim=12",
    "model.memory.sharing=block",
    "model.memory.share_size=2",
    "data.split='80,20,0'",
    "data.sequence_length=32",
    "data.mask_document_boundaries=true",
    "optimizer.lr=1e-2",
    "train.steps=80",
    "train.global_batch_size=8",
    "train.micro_batch_size=8",
    "train.eval_steps=1",
    "train.recompute=full",
    "train.precision=fp32",
    "logging.progress=false",
    "logging.tensorboard=false",
]


def train_checkpoint(folder: Path, settings: list[str]) -> float:
    """Trains on the corpus of `write_corpus` into `folder`/run; returns the validation loss at the end. Collective."""
    config = load_config(None, [*settings, f"data.paths=[{folder / 'data'}]", f"train.run_dir={folder / 'run'}"])
    prepare(config.train.device)
    from megatron_ultramem.training.distributed import destroy_distributed
    from megatron_ultramem.training.loop import evaluate, train_step
    from megatron_ultramem.training.setup import set_up

    run = set_up(config)
    try:
        for _ in range(config.train.steps):
            train_step(run)
        loss = evaluate(run)
        run.checkpoints.save(run.position)
    finally:
        destroy_distributed()
    return loss


def write_corpus(folder: Path) -> None:
    """Prefix `folder`/data: documents of sentences, each with the same end."""
    text = folder / "text"
    text.mkdir()
    files = []
    for number in range(24):
        files.append(text / f"{number}.txt")
        files[-1].write_text(SENTENCES[number % 3] * (1 + number % 4) + END)
    preprocess(files, folder / "data", TokenizerConfig())
