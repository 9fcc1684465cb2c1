"""A SentencePiece model as a tokenizer of the tokenizers library, for AutoTokenizer.

What it cannot express exactly, if anything, the comparison in `tokenizer_files.py` finds.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

UNIGRAM, BPE = 1, 2
CONTROL, USER_DEFINED = 3, 4
SPACE = "\u2581"  # by which SentencePiece writes a space


def convert_sentencepiece(path: Path) -> Any:
    """The tokenizer of a .model file; raises ValueError for the kinds of model that the library does not have."""
    from tokenizers import AddedToken, Tokenizer, decoders, models

    messages: Any = importlib.import_module("sentencepiece.sentencepiece_model_pb2")
    proto = messages.ModelProto.FromString(path.read_bytes())
    trained = proto.trainer_spec
    scored = [(piece.piece, piece.score) for piece in proto.pieces]
    model: models.Model
    if trained.model_type == UNIGRAM:
        model = models.Unigram(scored, unk_id=trained.unk_id, byte_fallback=trained.byte_fallback)
    elif trained.model_type == BPE:
        ids = {piece: number for number, (piece, _) in enumerate(scored)}
        model = models.BPE(
            ids, _merges(ids), unk_token=trained.unk_piece, fuse_unk=True, byte_fallback=trained.byte_fallback
        )
    else:
        raise ValueError(f"model_type {trained.model_type} is neither unigram nor BPE")
    made = Tokenizer(model)
    made.normalizer = _normalizer(proto.normalizer_spec)
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if proto.normalizer_spec.add_dummy_prefix:
        steps.append(decoders.Strip(" ", 1, 0))
    made.decoder = decoders.Sequence(steps)
    for kind, add in ((CONTROL, made.add_special_tokens), (USER_DEFINED, made.add_tokens)):
        add([AddedToken(piece.piece, normalized=False) for piece in proto.pieces if piece.type == kind])
    return made


def _merges(ids: dict[str, int]) -> list[tuple[str, str]]:
    """Pairs in the order in which they are joined: that of the pieces, which is the order they were learnt in."""
    return [
        pair for piece in ids for pair in sorted(_splits(piece, ids), key=lambda pair: (ids[pair[0]], ids[pair[1]]))
    ]


def _splits(piece: str, ids: dict[str, int]) -> Iterator[tuple[str, str]]:
    for cut in range(1, len(piece)):
        if piece[:cut] in ids and piece[cut:] in ids:
            yield piece[:cut], piece[cut:]


def _normalizer(spec: Any) -> Any:
    from tokenizers import Regex, normalizers

    steps: list[Any] = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend(SPACE))
    return normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])
