"""Continues prompts: one at a time as a stream, or many in batches.

Prompts of different lengths share a batch without padding: the batch starts at the length of its shortest prompt, and
where a longer prompt still has tokens of its own, those are taken instead of the model's. Every sequence thus sees
nothing but itself, at its true positions, with or without the cache.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from megatron_ultramem.errors import CheckpointError, ConfigError
from megatron_ultramem.inference.sampling import Sampling, choose, random_streams
from megatron_ultramem.platform import prepare
from megatron_ultramem.training.tokenizers import StreamDecoder, Tokenizer

if TYPE_CHECKING:
    from megatron_ultramem.inference.model import LanguageModel


@dataclass
class Completion:
    """The continuation of one prompt.

    Attributes:
        index: place of the prompt in the list that was given.
        tokens: ids of the continuation, without the end-of-document token that ended it.
        finish_reason: 'eod', 'length' (max_new_tokens) or 'context' (model.max_sequence_length).
    """

    index: int
    prompt: str
    text: str = ""
    tokens: list[int] = field(default_factory=list)
    finish_reason: str = ""


@dataclass
class _Row:
    """One sequence of a batch."""

    prompt_ids: list[int]
    random: torch.Generator
    decoder: StreamDecoder
    completion: Completion

    def add(self, token: int) -> str:
        """Takes a new token over; returns the text that it completes."""
        self.completion.tokens.append(token)
        piece = self.decoder.push(token)
        self.completion.text += piece
        return piece

    def finish(self, reason: str) -> str:
        """Returns the text that was held back."""
        self.completion.finish_reason = reason
        piece = self.decoder.flush()
        self.completion.text += piece
        return piece


class Generator:
    """Continues prompts with a loaded model. Under tensor parallelism all ranks call the same methods alike.

    Args:
        cache: keep the keys and values of attention (the results are the same without, only slower).
        batch_size: prompts computed together at most.
    """

    def __init__(self, model: LanguageModel, *, cache: bool = True, batch_size: int = 16) -> None:
        _check_batch_size(batch_size)
        self.model, self.cache, self.batch_size = model, cache, batch_size

    @classmethod
    def load(
        cls,
        checkpoint: str | Path,
        overrides: Sequence[str] = (),
        *,
        device: str = "auto",
        cache: bool = True,
        batch_size: int = 16,
    ) -> Generator:
        """See `inference.model.load_model`, which says what is raised."""
        _check_batch_size(batch_size)
        prepare(device)  # before megatron is imported
        from megatron_ultramem.inference.model import load_model

        return cls(load_model(checkpoint, overrides, device=device), cache=cache, batch_size=batch_size)

    def close(self) -> None:
        """Ends the process groups that `load` started."""
        from megatron_ultramem.training.distributed import destroy_distributed

        destroy_distributed()

    def generate(self, prompts: Sequence[str], sampling: Sampling) -> list[str]:
        """The continuations, in the order of the prompts."""
        completions = sorted(self.completions(prompts, sampling), key=lambda completion: completion.index)
        return [completion.text for completion in completions]

    def completions(self, prompts: Sequence[str], sampling: Sampling) -> Iterator[Completion]:
        """Continuations as their batches finish; prompts of similar length go together.

        An empty prompt starts a document. What a prompt becomes does not depend on the other prompts.

        Raises:
            ConfigError: a prompt leaves no room within model.max_sequence_length; before anything is computed.
            CheckpointError: the model's logits are not finite.
        """
        rows = self._rows(prompts, sampling)
        rows.sort(key=lambda row: len(row.prompt_ids))
        for start in range(0, len(rows), self.batch_size):
            batch = rows[start : start + self.batch_size]
            for _ in self._decode(batch, sampling):
                pass
            yield from (row.completion for row in batch)

    def stream(self, prompt: str, sampling: Sampling) -> Iterator[str]:
        """The pieces of the continuation as they are made: complete characters, which join to that of `generate`."""
        for piece in self._decode(self._rows([prompt], sampling), sampling):
            if piece:
                yield piece

    def room(self, prompt: str) -> int:
        """Tokens that fit between the prompt and model.max_sequence_length; 0 or less: the prompt is too long."""
        return self.model.max_sequence_length - len(_encode(self.model.tokenizer, prompt, 0))

    def _rows(self, prompts: Sequence[str], sampling: Sampling) -> list[_Row]:
        tokenizer, limit = self.model.tokenizer, self.model.max_sequence_length
        ids = [_encode(tokenizer, prompt, number) for number, prompt in enumerate(prompts)]
        for number, prompt_ids in enumerate(ids):
            if len(prompt_ids) >= limit:
                raise ConfigError(
                    f"prompt {number + 1} has {len(prompt_ids)} tokens, which leaves no room within "
                    f"model.max_sequence_length = {limit}; legal: at most {limit - 1}"
                )
        rows = []
        streams = random_streams(ids, sampling.seed)
        for number, (prompt, prompt_ids, random) in enumerate(zip(prompts, ids, streams, strict=True)):
            decoder = StreamDecoder(tokenizer)
            for token in prompt_ids:  # how a token reads can depend on the one before it
                decoder.push(token)
            rows.append(_Row(prompt_ids, random, decoder, Completion(number, prompt)))
        return rows

    def _decode(self, rows: list[_Row], sampling: Sampling) -> Iterator[str]:
        """Fills the rows' completions; yields the piece of text of every token as it is chosen, and of every end."""
        eod, limit = self.model.tokenizer.eod, self.model.max_sequence_length
        lengths = [len(row.prompt_ids) for row in rows]
        ends = [min(length + sampling.max_new_tokens, limit) for length in lengths]
        # Where a sequence has ended, tokens do not matter any more.
        tokens_BS = torch.full((len(rows), max(ends)), eod)
        for number, row in enumerate(rows):
            tokens_BS[number, : lengths[number]] = torch.tensor(row.prompt_ids)
        session = self.model.session(len(rows), max(ends), cached=self.cache)
        growing = set(range(len(rows)))
        known, position = 0, min(lengths)
        while growing:
            logits_BV = session.append(tokens_BS[:, known:position])
            drawing = [number for number in sorted(growing) if lengths[number] <= position]
            for number, token in zip(drawing, self._choose(logits_BV, rows, drawing, sampling), strict=True):
                row = rows[number]
                if token == eod and not sampling.ignore_eod:
                    growing.remove(number)
                    yield row.finish("eod")
                    continue
                tokens_BS[number, position] = token
                yield row.add(token)
                if position + 1 == ends[number]:
                    growing.remove(number)
                    new_tokens = ends[number] - lengths[number]
                    yield row.finish("length" if new_tokens == sampling.max_new_tokens else "context")
            known, position = position, position + 1

    def _choose(self, logits_BV: torch.Tensor, rows: list[_Row], drawing: list[int], sampling: Sampling) -> list[int]:
        """Next tokens of the D rows `drawing`."""
        if not drawing:
            return []
        device = logits_BV.device
        draws = [0.0 if sampling.greedy else _uniform(rows[number].random) for number in drawing]
        uniform_D = torch.tensor(draws, dtype=torch.float64, device=device)
        # The embedding is padded: the model may give some probability to ids that are no token.
        logits_DV = logits_BV[torch.tensor(drawing, device=device), : self.model.tokenizer.vocab_size]
        chosen_D = choose(logits_DV, sampling, uniform_D)
        chosen: list[int] = self.model.agreed(chosen_D).tolist()
        if min(chosen) < 0:
            raise CheckpointError(
                f"checkpoint {self.model.folder}: its logits are not finite; legal: a checkpoint from before the run "
                "diverged"
            )
        return chosen


def _check_batch_size(batch_size: int) -> None:
    if batch_size < 1:
        raise ConfigError(f"batch_size = {batch_size}: legal: at least 1")


def _uniform(generator: torch.Generator) -> float:
    return float(torch.rand((), dtype=torch.float64, generator=generator))


def _encode(tokenizer: Tokenizer, prompt: str, number: int) -> list[int]:
    try:
        return tokenizer.encode(prompt) or [tokenizer.eod]
    except UnicodeEncodeError:
        raise ConfigError(f"prompt {number + 1} is not valid UTF-8 text: {prompt!r}") from None
