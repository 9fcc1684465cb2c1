"""A trained model for inference: loaded without optimizer or DDP, with and without a key-value cache.

Shapes: B sequences, S positions, V vocabulary as the embedding has it: padded. The trainer's loss is over all of it;
who chooses tokens must leave out the ids that the tokenizer does not have.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Protocol

import torch
from megatron.core import parallel_state
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from megatron_ultramem.compat import caching
from megatron_ultramem.config.schema import Config
from megatron_ultramem.inference.settings import inference_config
from megatron_ultramem.model.build import build_chunks
from megatron_ultramem.platform import Platform, prepare, resolve_backend, set_deterministic
from megatron_ultramem.training.checkpoint import load_weights
from megatron_ultramem.training.checkpoint_choice import check_loadable
from megatron_ultramem.training.checkpoint_folder import resolve_checkpoint
from megatron_ultramem.training.distributed import (
    destroy_distributed,
    initialize_distributed,
    world_size_from_environment,
)
from megatron_ultramem.training.setup import vocabulary
from megatron_ultramem.training.tokenizers import Tokenizer, build_tokenizer


class LanguageModel:
    """A model in evaluation mode, the same on all tensor-parallel ranks; every method is collective over them."""

    def __init__(
        self, config: Config, platform: Platform, tokenizer: Tokenizer, gpt: GPTModel, folder: Path, step: int
    ) -> None:
        self.config, self.platform, self.tokenizer, self.folder, self.step = config, platform, tokenizer, folder, step
        self.gpt = gpt.eval()
        self.max_sequence_length = config.model.max_sequence_length

    @torch.no_grad()
    def logits(self, tokens_BS: Tensor) -> Tensor:
        """fp32 [B, S, V]: the logits of the token after each position, computed without a cache."""
        return self.forward(tokens_BS)

    def session(self, batch_size: int, length: int, *, cached: bool) -> Session:
        """Sequences that grow to at most `length` tokens, computed with or without a key-value cache."""
        return CachedSession(self, batch_size, length) if cached else UncachedSession(self)

    def agreed(self, tokens_B: Tensor) -> Tensor:
        """The tokens of tensor-parallel rank 0, on all of them, so that no rank can stop before another."""
        if self.config.parallel.tensor_parallel_size > 1:
            torch.distributed.broadcast(
                tokens_B,
                src=parallel_state.get_tensor_model_parallel_src_rank(),
                group=parallel_state.get_tensor_model_parallel_group(),
            )
        return tokens_B

    def forward(self, tokens_BS: Tensor, context: StaticInferenceContext | None = None) -> Tensor:
        """As `logits`; with a context, the tokens follow those in its cache, and S is 1: the last position alone."""
        start = context.sequence_len_offset if context else 0
        tokens_BS = tokens_BS.to(self.platform.device)
        positions_BS = torch.arange(start, start + tokens_BS.shape[1], device=tokens_BS.device).expand_as(tokens_BS)
        with caching() if context else nullcontext():
            logits = self.gpt(tokens_BS, positions_BS, None, inference_context=context, runtime_gather_output=True)
        return logits.float()


class Session(Protocol):
    """Sequences of equal length that grow together."""

    def append(self, tokens_BS: Tensor) -> Tensor:
        """Adds tokens to the sequences; fp32 [B, V]: the logits of what comes next."""


class CachedSession:
    """Keeps the keys and values of attention: a token costs the work of one token."""

    def __init__(self, model: LanguageModel, batch_size: int, length: int) -> None:
        self._model = model
        self._context = StaticInferenceContext(batch_size, length)

    @torch.no_grad()
    def append(self, tokens_BS: Tensor) -> Tensor:
        context = self._context
        if context.sequence_len_offset == 0:
            return self._append(tokens_BS)
        # Megatron drops the causal mask once the cache holds something, so tokens go one by one from there.
        for token_B1 in tokens_BS.split(1, dim=1):
            logits_BV = self._append(token_B1)
        return logits_BV

    def _append(self, tokens_BS: Tensor) -> Tensor:
        context = self._context
        logits_BSV = self._model.forward(tokens_BS, context)
        context.sequence_len_offset += tokens_BS.shape[1]
        context.enable_decode_mode()
        return logits_BSV[:, -1]


class UncachedSession:
    """Computes the whole sequence again for every token: to check the cache against."""

    def __init__(self, model: LanguageModel) -> None:
        self._model = model
        self._tokens_BS: Tensor | None = None

    def append(self, tokens_BS: Tensor) -> Tensor:
        before = [] if self._tokens_BS is None else [self._tokens_BS]
        self._tokens_BS = torch.cat([*before, tokens_BS], dim=1)
        return self._model.logits(self._tokens_BS)[:, -1]


def load_model(checkpoint: str | Path, overrides: Sequence[str] = (), *, device: str = "auto") -> LanguageModel:
    """Loads the weights of a checkpoint under any layout; starts process groups, which `destroy_distributed` ends.

    Tucker's leading singular vectors u and t stay as they were saved. The trainer renews them at the start of a step,
    so a checkpoint holds those with which the run evaluated its weights at that step: the loss that was reported is
    the loss of the model that generates.

    Args:
        checkpoint: its folder, a folder of them, or a run folder (then the newest).
        overrides: `section.setting=value`, of the settings in `inference.settings.USED`.
        device: auto, cpu or cuda.

    Raises:
        CheckpointError: no checkpoint there, a damaged one, or one of another tokenizer.
        ConfigError: an override or the layout is not possible.
    """
    folder = resolve_checkpoint(checkpoint)
    platform = prepare(device)
    config = inference_config(folder, overrides, world_size_from_environment(), device)
    backend = resolve_backend(config, platform)
    tokenizer = build_tokenizer(config.data.tokenizer)
    vocab_size = vocabulary(config, tokenizer)
    record = check_loadable(config, folder, tokenizer=tokenizer.identity, vocab_size=vocab_size, whole_state=False)
    if config.train.deterministic:
        set_deterministic()
    initialize_distributed(config, platform)
    try:
        _, (gpt,) = build_chunks(config, vocab_size, backend, platform.device, draw_parameters=False)
        load_weights(folder, record, [gpt])
    except BaseException:
        destroy_distributed()
        raise
    return LanguageModel(config, platform, tokenizer, gpt, folder, record.step)
