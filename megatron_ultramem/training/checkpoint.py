"""Saves and loads the checkpoints of a run: synchronous or in the background, atomic, under any layout.

`checkpoint_folder.py` says what lies on the disk, `checkpoint_state.py` what a checkpoint holds, `checkpoint_choice.py`
which one a run resumes from.
"""

from __future__ import annotations

import secrets
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue
from megatron.core.distributed import DistributedDataParallel
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch.distributed.checkpoint.api import CheckpointException

from megatron_ultramem.compat import keep_settings, later_pickles_read, start_save, write_common_file
from megatron_ultramem.config.load import save_config
from megatron_ultramem.config.schema import Config
from megatron_ultramem.errors import CheckpointError, DamagedCheckpointError, UserError, lost_another_rank
from megatron_ultramem.model.build import memory_layers
from megatron_ultramem.training import checkpoint_choice as choice
from megatron_ultramem.training import checkpoint_folder as folders
from megatron_ultramem.training import checkpoint_state as contents
from megatron_ultramem.training import checksums
from megatron_ultramem.training.checkpoint_repairs import separate_step_counters
from megatron_ultramem.training.checkpoint_safety import extra_state_was_checked
from megatron_ultramem.training.optimizer import weights_from_masters, whole_parameters
from megatron_ultramem.training.orphans import results_queue_that_ends_with_us
from megatron_ultramem.training.restarts import launch_id


@dataclass
class Position:
    """Where a run stands."""

    step: int = 0
    consumed_samples: int = 0
    consumed_tokens: int = 0
    recent_losses: list[float] = field(default_factory=list)  # by which a leap of the loss is measured


@dataclass(frozen=True)
class Save:
    """A checkpoint on its way to the disk."""

    draft: Path  # where it is written
    target: Path  # its name once it is whole
    began: float  # of time.monotonic


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
        self.hosts: list[str] = contents.all_gather(socket.gethostname())
        self._queue = AsyncCallsQueue() if config.checkpoint.async_save else None
        self._in_background: Save | None = None

    def resume(self) -> Position:
        """Clears away what a killed run left, loads what checkpoint.load asks for, and returns where to go on from.

        With checkpoint.load=auto a damaged checkpoint is renamed and gives way to the one before, with a warning.
        Raises CheckpointError if none is left.
        """
        self._on_rank_0(lambda: folders.remove_leftovers(self.folder), f"checkpoint folder {self.folder}")
        wanted, whole_state = choice.wanted(self.config)
        if wanted:
            return self._load_first_whole(wanted, whole_state, falls_back=self.config.checkpoint.load == "auto")
        return Position()

    def rewind(self) -> Position:
        """Loads the last checkpoint that this run has saved or resumed from, or an older one if that is damaged. No
        background save may be under way."""
        assert self.last_saved is not None
        last = self.last_saved
        older = [path for path in folders.list_checkpoints(self.folder)[::-1] if path.name < last.name]
        with whole_parameters(self.chunks):
            return self._load_first_whole([last, *older], whole_state=True, falls_back=True)

    def save(self, position: Position) -> Path:
        """Saves everything that a bitwise resume needs; returns the folder that (once finished) holds it."""
        self.finish(blocking=True)  # one background save at a time
        target = self.folder / f"step_{position.step:08d}"
        save = Save(folders.new_draft(target, _shared_token()), target, time.monotonic())
        self._on_rank_0(lambda: save.draft.mkdir(parents=True), f"checkpoint folder {save.draft} cannot be written")
        record = self._record(position)
        results_queue_that_ends_with_us()
        with whole_parameters(self.chunks), self._write_errors(save):
            state: dict[str, Any] = contents.model_state(self.model)
            state.update(contents.training_state(state, self.optimizer, loading=False))
            request = start_save(state, save.draft, {**contents.MODEL_METADATA, **contents.OPTIMIZER_METADATA})
            if request.async_fn is not None:  # this rank has something to write
                request = request._replace(async_fn=partial(checksums.write_and_sum, request.async_fn))
            request.add_finalize_fn(lambda: self._publish(save, record))
            if self._queue is not None:
                self._queue.schedule_async_request(request)
                self._in_background = save
            else:
                request.execute_sync()
        return target

    def finish(self, blocking: bool = False) -> None:
        """Publishes a background save that is done; with `blocking`, waits for it.

        Raises CheckpointError if it failed, or has not ended within checkpoint.async_timeout_minutes.
        """
        while self._queue is not None and (save := self._in_background) is not None:
            with self._write_errors(save):
                self._queue.maybe_finalize_async_calls()
                minutes = (time.monotonic() - save.began) / 60
                if self._queue.get_num_unfinalized_calls() == 0:
                    self._in_background = None
                elif minutes > (limit := self.config.checkpoint.async_timeout_minutes):
                    raise TimeoutError(f"not finished after checkpoint.async_timeout_minutes = {limit:g}")
                elif not blocking:
                    return
                else:
                    time.sleep(0.02)

    def close(self) -> None:
        """Waits for a background save and ends its worker."""
        self.finish(blocking=True)
        if self._queue is not None:
            self._queue.close()

    def load(self, folder: Path, whole_state: bool = True) -> Position:
        """Loads a checkpoint, under any layout; without `whole_state` its weights alone.

        Raises CheckpointError, with nothing changed on disk, for one of another model or tokenizer, or a damaged one.
        """
        record = choice.check_loadable(
            self.config, folder, tokenizer=self.tokenizer, vocab_size=self.vocab_size, whole_state=whole_state
        )
        if not whole_state:
            load_weights(folder, record, self.model)
            self.optimizer.reload_model_params()
            return Position()
        _check_shuffles(folder, record, self._shuffles)
        with_rng = record.layout == contents.layout(self.config)
        state: dict[str, Any] = contents.model_state(self.model)
        state.update(contents.training_state(state, self.optimizer, loading=True, with_rng=with_rng))
        loaded = contents.load_sharded(state, folder, ignore=() if with_rng else ("rng",))
        _fill(self.model, loaded)
        keep_settings(loaded["optimizer"], self.optimizer)
        self.optimizer.load_state_dict(loaded["optimizer"])
        separate_step_counters(self.optimizer)
        if self.config.train.fp8.param_gather:
            weights_from_masters(self.chunks, self.optimizer)
        self.scheduler.num_steps = 0
        self.scheduler.step(record.step)
        if with_rng and not contents.restore_rng(loaded["rng"]):
            choice.warn(
                f"checkpoint {folder} was saved on another kind of device: its random states do not fit here, so "
                "dropout goes on with other random numbers"
            )
        self._warn_of_changes(folder, record, with_rng)
        self.last_saved = folder
        return Position(record.step, record.consumed_samples, record.consumed_tokens, list(record.recent_losses))

    def _load_first_whole(self, candidates: list[Path], whole_state: bool, falls_back: bool) -> Position:
        """Loads the first checkpoint that is not damaged. The damaged ones before it are renamed, with a warning."""
        damaged: dict[Path, str] = {}
        for folder in candidates:
            if damage := choice.find_damage(folder, checks_files=self.config.checkpoint.verify):
                damaged[folder] = damage
                continue
            for bad, damage in damaged.items() if falls_back else ():
                choice.warn(f"{damage}; it is renamed to {bad.name}.damaged, and {folder.name} is taken instead")
                self._on_rank_0(partial(folders.set_aside, bad), f"checkpoint {bad} cannot be renamed")
            return self.load(folder, whole_state)
        raise DamagedCheckpointError(
            f"{damaged[candidates[0]]}; there is no other to go on from; legal: another one as checkpoint.load, or "
            "checkpoint.load=none, which starts afresh"
        )

    def _record(self, position: Position) -> folders.Record:
        return folders.Record(
            step=position.step,
            consumed_samples=position.consumed_samples,
            consumed_tokens=position.consumed_tokens,
            recent_losses=tuple(position.recent_losses),
            tokenizer=self.tokenizer,
            vocab_size=self.vocab_size,
            layout=contents.layout(self.config),
            shuffles=contents.merged_over_ranks(self._shuffles),
            versions=contents.versions(),
            saved_at=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            launch=launch_id(),
        )

    def _publish(self, save: Save, record: folders.Record) -> None:
        part, failure = {}, None
        try:
            part = checksums.take_part(save.draft, torch.distributed.get_rank())
        except (OSError, ValueError) as error:
            failure = contents.reason(error)
        parts = contents.all_gather((part, failure))

        def complete() -> None:
            if failures := [failure for _, failure in parts if failure]:
                raise OSError(failures[0])
            write_common_file(save.draft)
            save_config(self.config, save.draft / "config.yaml")
            (save.draft / "run.json").write_text(record.to_json())
            checksums.complete_sums(save.draft, {name: digest for part, _ in parts for name, digest in part.items()})
            folders.publish(
                save.draft, save.target, self.config.checkpoint.keep_last, self.config.checkpoint.keep_every
            )

        self._on_rank_0(complete, f"checkpoint {save.target} cannot be written")
        self.last_saved = save.target

    def _on_rank_0(self, action: Callable[[], object], what: str) -> None:
        """Runs a file operation on rank 0; its failure is every rank's CheckpointError instead of a hang."""
        failure: str | None = None
        if torch.distributed.get_rank() == 0:
            try:
                action()
            except OSError as error:
                failure = f"{what}: {contents.reason(error)} (rank 0 on {self.hosts[0]}); {self._last_good()}"
        contents.raise_alike(failure)

    @contextmanager
    def _write_errors(self, save: Save) -> Iterator[None]:
        """Makes what writing raises a CheckpointError. Writers report to every rank; other failures are one rank's."""
        try:
            yield
        except (CheckpointException, CheckpointingException, UserError, OSError, EOFError, RuntimeError) as error:
            self._give_up_background_save()
            if torch.distributed.get_rank() == 0:
                folders.discard(save.draft)
            if isinstance(error, UserError) or lost_another_rank(error):
                raise
            failure = CheckpointError(
                f"checkpoint {save.target} cannot be written: {contents.reason(error)} ({self._culprit(error)}); "
                f"{self._last_good()}"
            )
            failure.on_every_rank = isinstance(error, CheckpointException)
            raise failure from error

    def _give_up_background_save(self) -> None:
        """Ends its writer, for which Python would wait at exit, however long it hangs."""
        self._in_background = None
        for call in self._queue.async_calls if self._queue is not None else ():
            call.async_caller.close(abort=True)

    def _culprit(self, error: BaseException) -> str:
        """The rank where writing failed, as far as this one knows, and its host."""
        failed = error.failures if isinstance(error, CheckpointException) else {}
        ranks = sorted(failed) or [torch.distributed.get_rank()]
        return ", ".join(f"rank {rank} on {self.hosts[rank]}" for rank in ranks)

    def _last_good(self) -> str:
        return f"last good checkpoint: {self.last_saved or 'none'}"

    def _warn_of_changes(self, folder: Path, record: folders.Record, with_rng: bool) -> None:
        if not with_rng:
            choice.warn(
                f"checkpoint {folder} was saved under {contents.words(record.layout)}, this run has "
                f"{contents.words(contents.layout(self.config))}: random states do not fit and start afresh, so "
                "dropout goes on with other random numbers"
            )
        if changed := contents.changed_data_order(self.config, folder):
            choice.warn(
                f"settings that decide the order of the data differ from those of checkpoint {folder} "
                f"({'; '.join(changed)}): samples may be read again or left out"
            )


def load_weights(folder: Path, record: folders.Record, model: list[GPTModel]) -> None:
    """Fills unwrapped model chunks from a checkpoint of the same model, under any layout. Collective.

    Raises CheckpointError for tensors that are missing, left over or of another shape, and for damaged files.
    """
    _check_shuffles(folder, record, _shuffles(model))
    _fill(model, contents.load_sharded(contents.model_state(model), folder, ignore=folders.NOT_WEIGHTS))


def _fill(model: list[GPTModel], loaded: dict[str, Any]) -> None:
    for number, chunk in enumerate(model):
        with extra_state_was_checked(), later_pickles_read():
            misfits = chunk.load_state_dict(loaded[f"model{number}"], strict=False)
        keys = [key for key in misfits.missing_keys + misfits.unexpected_keys if not folders.is_extra_state(key)]
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
