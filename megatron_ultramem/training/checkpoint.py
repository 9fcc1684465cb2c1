"""Checkpoint folders: atomic saves (synchronous or not), the newest one, retention, resume.

A checkpoint is written as `.saving-step_N` and renamed to `step_N` when every rank has finished, so that a folder with
that name is always whole: a kill at any moment leaves the one before.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue, AsyncRequest
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_ultramem.compat import separate_step_counters
from megatron_ultramem.config.load import save_config
from megatron_ultramem.config.schema import Config
from megatron_ultramem.errors import CheckpointError
from megatron_ultramem.training import checkpoint_state as contents

_NAME = re.compile(r"step_(\d+)")


@dataclass
class Position:
    """Where a run stands."""

    step: int = 0
    consumed_samples: int = 0
    consumed_tokens: int = 0


def checkpoint_dir(config: Config) -> Path:
    """Folder of this run's checkpoints."""
    return Path(config.checkpoint.dir or Path(config.train.run_dir) / "checkpoints")


def list_checkpoints(folder: Path) -> list[Path]:
    """Whole checkpoints in `folder`, oldest first."""
    if not folder.is_dir():
        return []
    found = [(int(match[1]), path) for path in folder.iterdir() if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def resolve_checkpoint(path: str | Path) -> Path:
    """A checkpoint from its own path, a folder of checkpoints, or a run folder (then the newest one there)."""
    path = Path(path)
    if (path / "run.json").is_file():
        return path
    for folder in (path, path / "checkpoints"):
        if found := list_checkpoints(folder):
            return found[-1]
    raise CheckpointError(f"{path}: no checkpoint there; legal: a step_N folder, a folder of them, or a run folder")


def read_run_json(folder: Path) -> dict[str, Any]:
    """step, consumed_samples, consumed_tokens, tokenizer, vocab_size, layout, versions of a checkpoint."""
    try:
        content: dict[str, Any] = json.loads((folder / "run.json").read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise CheckpointError(f"checkpoint {folder}: run.json cannot be read ({error})") from None
    return content


def check_writable(folder: Path) -> None:
    """Raises CheckpointError before training if checkpoints could not be written to `folder`."""
    probe = folder / f".write-test-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_text("x")
        probe.unlink()
    except OSError as error:
        raise CheckpointError(
            f"checkpoint folder {folder} cannot be written: {error.strerror or error}; "
            "legal: checkpoint.dir on a writable file system"
        ) from None


class CheckpointManager:
    """Saves and loads the checkpoints of one run. All methods are collective over all ranks.

    Args:
        model: unwrapped model chunks of this rank.
        tokenizer: identity of the tokenizer; a checkpoint of another one is refused.
        vocab_size: of the tokenizer, before padding.
    """

    def __init__(
        self,
        config: Config,
        model: list[GPTModel],
        optimizer: MegatronOptimizer,
        scheduler: OptimizerParamScheduler,
        *,
        tokenizer: str,
        vocab_size: int,
    ) -> None:
        self.config, self.model, self.optimizer, self.scheduler = config, model, optimizer, scheduler
        self.tokenizer, self.vocab_size = tokenizer, vocab_size
        self.folder = checkpoint_dir(config)
        self.last_saved: Path | None = None
        self._queue = AsyncCallsQueue() if config.checkpoint.async_save else None

    def save(self, position: Position) -> Path:
        """Saves everything that a bitwise resume needs; returns the folder that (once finished) holds it."""
        self.finish(blocking=True)  # one background save at a time
        target = self.folder / f"step_{position.step:08d}"
        draft = self.folder / f".saving-{target.name}"
        self._on_rank_0(lambda: _empty_folder(draft), f"checkpoint folder {draft} cannot be written")
        description = self._describe(position)
        state: dict[str, Any] = contents.model_state(self.model)
        state.update(contents.training_state(state, self.optimizer, loading=False))
        state["scheduler"] = self.scheduler.state_dict()
        request = dist_checkpointing.save(
            state,
            str(draft),
            async_sharded_save=self._queue is not None,
            content_metadata={**contents.MODEL_METADATA, **contents.OPTIMIZER_METADATA},
        )
        if self._queue is None:
            self._publish(draft, target, description)
        else:
            assert isinstance(request, AsyncRequest)
            request.add_finalize_fn(lambda: self._publish(draft, target, description))
            self._queue.schedule_async_request(request)
        return target

    def finish(self, blocking: bool = False) -> None:
        """Publishes a background save that is done; with `blocking`, waits for it."""
        if self._queue is not None:
            self._queue.maybe_finalize_async_calls(blocking=blocking)

    def close(self) -> None:
        """Waits for a background save and ends its worker."""
        if self._queue is not None:
            self.finish(blocking=True)
            self._queue.close()

    def resume(self) -> Position:
        """Loads what checkpoint.load asks for and returns the position to go on from."""
        wish = self.config.checkpoint.load
        if wish == "none":
            return Position()
        if wish == "auto":
            found = list_checkpoints(self.folder)
            if not found:
                return Position()
            return self.load(found[-1])
        return self.load(resolve_checkpoint(wish))

    def load(self, folder: Path) -> Position:
        """Loads a checkpoint, under any layout.

        Raises CheckpointError, with nothing changed on disk, for one of another model or tokenizer, or a damaged one.
        """
        run = read_run_json(folder)
        contents.check_same_model(self.config, folder)
        if (run["vocab_size"], run["tokenizer"]) != (self.vocab_size, self.tokenizer):
            raise CheckpointError(
                f"checkpoint {folder} was trained with another tokenizer (vocabulary {run['vocab_size']}, "
                f"{run['tokenizer']}) than data.tokenizer (vocabulary {self.vocab_size}, {self.tokenizer})"
            )
        whole = self.config.checkpoint.load_optimizer
        with_rng = run["layout"] == contents.layout(self.config)
        state: dict[str, Any] = contents.model_state(self.model)
        if whole:
            state.update(contents.training_state(state, self.optimizer, loading=True, with_rng=with_rng))
        loaded = contents.load_sharded(state, folder, whole=whole)
        for number, chunk in enumerate(self.model):
            chunk.load_state_dict(loaded[f"model{number}"], strict=True)
        if not whole:
            self.optimizer.reload_model_params()
            return Position()
        self.optimizer.load_state_dict(loaded["optimizer"])
        separate_step_counters(self.optimizer)
        self.scheduler.num_steps = 0
        self.scheduler.step(run["step"])
        if with_rng:
            contents.restore_rng(loaded["rng"])
        self.last_saved = folder
        return Position(run["step"], run["consumed_samples"], run["consumed_tokens"])

    def _describe(self, position: Position) -> str:
        """Contents of run.json."""
        return json.dumps(
            {
                **vars(position),
                "tokenizer": self.tokenizer,
                "vocab_size": self.vocab_size,
                "layout": contents.layout(self.config),
                "versions": contents.versions(),
                "saved_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            },
            indent=2,
        )

    def _publish(self, draft: Path, target: Path, description: str) -> None:
        self._on_rank_0(lambda: self._complete(draft, target, description), f"checkpoint {target} cannot be written")
        self.last_saved = target

    def _complete(self, draft: Path, target: Path, description: str) -> None:
        """Adds what is not sharded, gives the folder its name, and drops the oldest ones."""
        save_config(self.config, draft / "config.yaml")
        (draft / "run.json").write_text(description)
        for file in draft.iterdir():
            _sync(file)
        if target.exists():  # saved before by a run that was rewound
            shutil.rmtree(target)
        os.replace(draft, target)
        _sync(self.folder)
        keep = self.config.checkpoint.keep_last
        for old in list_checkpoints(self.folder)[:-keep] if keep else []:
            doomed = old.with_name(f".deleting-{old.name}")  # so that a half-deleted one is never taken for whole
            os.replace(old, doomed)
            shutil.rmtree(doomed, ignore_errors=True)

    def _on_rank_0(self, action: Any, what: str) -> None:
        """Runs a file operation on rank 0; its failure is every rank's CheckpointError instead of a hang."""
        failure: list[str | None] = [None]
        if torch.distributed.get_rank() == 0:
            try:
                action()
            except OSError as error:
                failure = [f"{what}: {error.strerror or error}"]
        torch.distributed.broadcast_object_list(failure, src=0)
        if failure[0]:
            raise CheckpointError(failure[0])


def _empty_folder(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)


def _sync(path: Path) -> None:
    """Forces a file or folder to the disk, where the file system can."""
    with contextlib.suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
