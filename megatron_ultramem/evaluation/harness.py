"""Runs lm-evaluation-harness on a model."""

from __future__ import annotations

import argparse
import importlib.util
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from megatron_ultramem.errors import ConfigError
from megatron_ultramem.evaluation.tasks import write_tasks


def evaluate(
    model: Path,
    *,
    tasks: Sequence[str] = (),
    texts: Sequence[Path] = (),
    choices: Sequence[Path] = (),
    shots: int | None = None,
    batch_size: str = "1",
    limit: int | None = None,
    device: str | None = None,
) -> dict[str, dict[str, float]]:
    """Metrics by task.

    Args:
        model: a Hugging Face folder, or a checkpoint of the trainer, which is converted for the time being.
        tasks: names of tasks of the harness, whose data it downloads unless it has them.
        texts, choices: local files; see `tasks.py`.
        shots: examples before each question; None: what the task says.
        batch_size: a number, or 'auto'.
        limit: documents of each task at most.

    Raises:
        ConfigError: the harness is not installed, or there is nothing to evaluate on.
        UserError: what `tasks.py` and a conversion raise.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError("evaluation needs lm-evaluation-harness: pip install 'megatron-ultramem[eval]'")
    if not (tasks or texts or choices):
        raise ConfigError("nothing to evaluate on; legal: names of tasks, files of texts, files of questions")
    with tempfile.TemporaryDirectory() as made:
        local = write_tasks(Path(made), texts=texts, choices=choices)
        from lm_eval import simple_evaluate
        from lm_eval.tasks import TaskManager

        with _huggingface_folder(model, Path(made)) as folder:
            found: dict[str, Any] = simple_evaluate(
                model="hf",
                model_args={"pretrained": str(folder), "trust_remote_code": True, "dtype": "auto"},
                tasks=[*tasks, *local],
                task_manager=TaskManager(include_path=made),
                num_fewshot=shots,
                batch_size=batch_size,
                limit=limit,
                device=device or ("cuda" if torch.cuda.is_available() else "cpu"),
                log_samples=False,
            )
    return {
        task: {name.partition(",")[0]: value for name, value in metrics.items() if isinstance(value, float)}
        for task, metrics in found["results"].items()
    }


@contextmanager
def _huggingface_folder(model: Path, room: Path) -> Iterator[Path]:
    """The folder itself, or one that is made of a checkpoint."""
    if (model / "config.json").is_file():
        yield model
        return
    from megatron_ultramem.checkpoints_convert.command import run_convert

    target = room / "model"
    options = {"no_verify": True, "max_shard_size": "5GB", "overrides": []}
    run_convert(argparse.Namespace(direction="to-hf", source=model, target=target, **options), Console(quiet=True))
    yield target
