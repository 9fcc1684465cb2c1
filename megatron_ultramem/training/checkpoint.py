"""Saves and loads the checkpoints of a run: synchronous or in the background, atomic, under any layout.

`checkpoint_folder.py` says what lies on the disk, `checkpoint_state.py` what a checkpoint holds.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue, AsyncRequest
from megatron.core.distributed import DistributedDataParallel
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch.distributed.checkpoint.api import CheckpointException

from megatron_ultramem.compat import separate_step_counters
from megatron_ultramem.config.load import save_config
from megatron_ultramem.config.schema import Config
from megatron_ultramem.errors import CheckpointError
from megatron_ultramem.model.build import memory_layers
from megatron_ultramem.training import checkpoint_folder as folders
from megatron_ultramem.training import checkpoint_state as contents
from megatron_ultramem.training.optimizer import whole_parameters

logger = logging.getLogger(__name__)


@dataclass
class Position:
    """Where a run stands."""

    step: int = 0
    consumed_samples: int = 0
    consumed_tokens: int = 0


class CheckpointManager:
    """Saves and loads the checkpoints of one run. All methods are collective over all ranks.

    Args:
        chunks: wrapped model chunks of this rank.
        model: the same, unwrapped.
        tokenizer: identity of the tokenizer; a checkpoint of another one is refused.
        vocab_size: of the tokenizer, before padding.
    """

    def __init__(
        self,
        config: Config,
        chunks: list[DistributedDataParallel],
        model: list[GPTModel],
        optimizer: MegatronOptimizer,
        scheduler: OptimizerParamScheduler,
        *,
        tokenizer: str,
        vocab_size: int,
    ) -> None:
        self.config, self.chunks, self.model = config, chunks, model
        self.optimizer, self.scheduler = optimizer, scheduler
        self.tokenizer, self.vocab_size = tokenizer, vocab_size
        self.folder = folders.checkpoint_dir(config)
        self.last_saved: Path | None = None
        self._shuffles = _shuffles(model)
        self._queue = AsyncCallsQueue() if config.checkpoint.async_save else None
        self._in_background: Path | None = None

    def resume(self) -> Position:
        """Clears away what a killed run left, loads what checkpoint.load asks for, and returns where to go on from."""
        self._on_rank_0(lambda: folders.remove_leftovers(self.folder), f"checkpoint folder {self.folder}")
        wanted = folders.wanted_checkpoint(self.config)
        return Position() if wanted is None else self.load(wanted)

    def save(self, position: Position) -> Path:
        """Saves everything that a bitwise resume needs; returns the folder that (once finished) holds it."""
        self.finish(blocking=True)  # one background save at a time
        target = self.folder / f"step_{position.step:08d}"
        draft = folders.new_draft(target, _shared_token())
        self._on_rank_0(lambda: draft.mkdir(parents=True), f"checkpoint folder {draft} cannot be written")
        record = self._record(position)

        def publish() -> None:
            self._publish(draft, target, record)

        with whole_parameters(self.chunks), self._write_errors(target):
            state: dict[str, Any] = contents.model_state(self.model)
            state.update(contents.training_state(state, self.optimizer, loading=False))
            request = dist_checkpointing.save(
                state,
                str(draft),
                async_sharded_save=self._queue is not None,
                content_metadata={**contents.MODEL_METADATA, **contents.OPTIMIZER_METADATA},
            )
            if self._queue is not None:
                assert isinstance(request, AsyncRequest)
                request.add_finalize_fn(publish)
                self._queue.schedule_async_request(request)
                self._in_background = target
        if self._queue is None:
            publish()
        return target

    def finish(self, blocking: bool = False) -> None:
        """Publishes a background save that is done; with `blocking`, waits for it.

        Raises CheckpointError if it failed.
        """
        if self._queue is not None and self._in_background is not None:
            with self._write_errors(self._in_background):
                self._queue.maybe_finalize_async_calls(blocking=blocking)
            if self._queue.get_num_unfinalized_calls() == 0:
                self._in_background = None

    def close(self) -> None:
        """Waits for a background save and ends its worker."""
        self.finish(blocking=True)
        if self._queue is not None:
            self._queue.close()

    def load(self, folder: Path) -> Position:
        """Loads a checkpoint, under any layout.

        Raises CheckpointError, with nothing changed on disk, for one of another model or tokenizer, or a damaged one.
        """
        record = check_loadable(self.config, folder, tokenizer=self.tokenizer, vocab_size=self.vocab_size)
        if not self.config.checkpoint.load_optimizer:
            load_weights(folder, record, self.model)
            self.optimizer.reload_model_params()
            return Position()
        _check_shuffles(folder, record, self._shuffles)
        with_rng = record.layout == contents.layout(self.config)
        state: dict[str, Any] = contents.model_state(self.model)
        state.update(contents.training_state(state, self.optimizer, loading=True, with_rng=with_rng))
        loaded = contents.load_sharded(state, folder, ignore=() if with_rng else ("rng",))
        _fill(self.model, loaded)
        with contents.settings_kept(self.optimizer):
            self.optimizer.load_state_dict(loaded["optimizer"])
        separate_step_counters(self.optimizer)
        self.scheduler.num_steps = 0
        self.scheduler.step(record.step)
        if with_rng:
            contents.restore_rng(loaded["rng"])
        self._warn_of_changes(folder, record, with_rng)
        self.last_saved = folder
        return Position(record.step, record.consumed_samples, record.consumed_tokens)

    def _record(self, position: Position) -> folders.Record:
        return folders.Record(
            **vars(position),
            tokenizer=self.tokenizer,
            vocab_size=self.vocab_size,
            layout=contents.layout(self.config),
            shuffles=contents.merged_over_ranks(self._shuffles),
            versions=contents.versions(),
            saved_at=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        )

    def _publish(self, draft: Path, target: Path, record: folders.Record) -> None:
        def complete() -> None:
            save_config(self.config, draft / "config.yaml")
            (draft / "run.json").write_text(record.to_json())
            folders.publish(draft, target, self.config.checkpoint.keep_last)

        self._on_rank_0(complete, f"checkpoint {target} cannot be written")
        self.last_saved = target

    def _on_rank_0(self, action: Callable[[], object], what: str) -> None:
        """Runs a file operation on rank 0; its failure is every rank's CheckpointError instead of a hang."""
        failure: str | None = None
        if torch.distributed.get_rank() == 0:
            try:
                action()
            except OSError as error:
                failure = f"{what}: {contents.reason(error)}; {self._last_good()}"
        contents.raise_alike(failure)

    @contextmanager
    def _write_errors(self, target: Path) -> Iterator[None]:
        """Makes what writing raises a CheckpointError. Writers report to every rank; other failures are one rank's."""
        try:
            yield
        except (CheckpointException, CheckpointingException, OSError, RuntimeError) as error:
            self._in_background = None
            failure = CheckpointError(
                f"checkpoint {target} cannot be written: {contents.reason(error)}; {self._last_good()}"
            )
            failure.on_every_rank = isinstance(error, CheckpointException)
            raise failure from error

    def _last_good(self) -> str:
        return f"last good checkpoint: {self.last_saved or 'none'}"

    def _warn_of_changes(self, folder: Path, record: folders.Record, with_rng: bool) -> None:
        if torch.distributed.get_rank() != 0:
            return
        if not with_rng:
            logger.warning(
                "checkpoint %s was saved under %s, this run has %s: random states do not fit and start afresh, so "
                "dropout goes on with other random numbers",
                folder,
                contents.words(record.layout),
                contents.words(contents.layout(self.config)),
            )
        if changed := contents.changed_data_order(self.config, folder):
            logger.warning(
                "settings that decide the order of the data differ from those of checkpoint %s (%s): samples may be "
                "read again or left out",
                folder,
                "; ".join(changed),
            )


def check_loadable(config: Config, folder: Path, *, tokenizer: str, vocab_size: int) -> folders.Record:
    """What can be known to be wrong with loading a checkpoint before a process group or a model exists.

    Raises CheckpointError for missing or damaged files, another model (naming the settings) or another tokenizer.
    """
    record = folders.read_record(folder)
    contents.check_same_model(config, folder)
    if config.checkpoint.load_optimizer:
        if record.weights_only:
            raise CheckpointError(
                f"checkpoint {folder} holds weights alone: it was converted; legal: checkpoint.load_optimizer=false"
            )
        contents.check_same_optimizer(config, folder)
    if (record.vocab_size, record.tokenizer) != (vocab_size, tokenizer):
        raise CheckpointError(
            f"checkpoint {folder} was trained with another tokenizer (vocabulary {record.vocab_size}, "
            f"{record.tokenizer}) than data.tokenizer (vocabulary {vocab_size}, {tokenizer}); "
            "legal: the tokenizer of the checkpoint, or checkpoint.load=none in another train.run_dir"
        )
    return record


def load_weights(folder: Path, record: folders.Record, model: list[GPTModel]) -> None:
    """Fills unwrapped model chunks from a checkpoint of the same model, under any layout. Collective.

    Raises CheckpointError for tensors that are missing, left over or of another shape, and for damaged files.
    """
    _check_shuffles(folder, record, _shuffles(model))
    _fill(model, contents.load_sharded(contents.model_state(model), folder, ignore=("optimizer", "rng")))


def _fill(model: list[GPTModel], loaded: dict[str, Any]) -> None:
    for number, chunk in enumerate(model):
        misfits = chunk.load_state_dict(loaded[f"model{number}"], strict=False)
        keys = [key for key in misfits.missing_keys + misfits.unexpected_keys if not contents.is_extra_state(key)]
        if keys:  # load_sharded has compared the names that are saved; these are torch's
            raise CheckpointError(f"model chunk {number} and the checkpoint do not fit: {', '.join(keys[:8])}")


def _shuffles(model: list[GPTModel]) -> dict[str, str]:
    return {str(layer.layer): layer.shuffle_checksum() for layer in memory_layers(model)}


def _check_shuffles(folder: Path, record: folders.Record, shuffles: dict[str, str]) -> None:
    contents.raise_alike(contents.other_shuffles(folder, record, shuffles))


def _shared_token() -> str:
    """The same random word on every rank."""
    token: list[Any] = [secrets.token_hex(4)]
    torch.distributed.broadcast_object_list(token, src=0)
    return str(token[0])
