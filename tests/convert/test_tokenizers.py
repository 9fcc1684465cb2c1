"""Tokenizers travel: AutoTokenizer reads texts as training did, and the run's own file comes back."""

from __future__ import annotations

import base64
import io
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import sentencepiece
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer

from megatron_ultramem.checkpoints_convert.tokenizer_files import SAMPLES, find_tokenizer, write_for_transformers
from megatron_ultramem.config.schema import TokenizerConfig
from megatron_ultramem.errors import CheckpointError, ConfigError
from megatron_ultramem.training.checkpoint_folder import read_config
from megatron_ultramem.training.tokenizers import build_tokenizer
from tests.convert.checkpoints import FP32, save_checkpoint, write_corpus

TRAINING_TEXT = [
    "def hello(name):\n    return f'hello {name}'\n",
    "the quick brown fox jumps over the lazy dog, again and again",
    "Straße, naïve, œuvre, größer; 日本語のテキスト; Ελληνικά; русский язык",
] * 8
LLAMA = {
    "model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity",
    "remove_extra_whitespaces": False,
}  # fmt: skip


def huggingface(folder: Path, *, adds_special_tokens: bool = False) -> TokenizerConfig:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(TRAINING_TEXT, trainer)
    if adds_special_tokens:
        made.post_processor = processors.TemplateProcessing(
            single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
        )
    made.save(str(folder / "made.json"))
    return TokenizerConfig("huggingface", str(folder / "made.json"))


def sentencepieces(folder: Path, **options: object) -> TokenizerConfig:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TRAINING_TEXT), model_writer=model, vocab_size=400, hard_vocab_limit=False,
        minloglevel=2, **options,
    )  # fmt: skip
    (folder / "made.model").write_bytes(model.getvalue())
    return TokenizerConfig("sentencepiece", str(folder / "made.model"))


def tiktokens(folder: Path) -> TokenizerConfig:
    tokens = [bytes([value]) for value in range(256)]
    tokens += [b"th", b"in", b"er", b"  ", b"the", b" the", "ö".encode(), b"ing"]
    ranks = "".join(f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(tokens))
    (folder / "made.tiktoken").write_text(ranks)
    return TokenizerConfig("tiktoken", str(folder / "made.tiktoken"), eod_token="<|doc|>")


MAKERS: dict[str, Callable[[Path], TokenizerConfig]] = {
    "byte": lambda folder: TokenizerConfig(),
    "huggingface": huggingface,
    "sentencepiece-llama": lambda folder: sentencepieces(folder, **LLAMA),
    "sentencepiece-no-prefix": lambda folder: sentencepieces(folder, **LLAMA, add_dummy_prefix=False),
    "sentencepiece-unigram": lambda folder: sentencepieces(folder, model_type="unigram"),
    "tiktoken": tiktokens,
}


@pytest.mark.parametrize("kind", MAKERS)
def test_auto_tokenizer_reads_as_training_did(tmp_path: Path, kind: str) -> None:
    config = MAKERS[kind](tmp_path)
    ours, there = build_tokenizer(config), tmp_path / "hf"
    there.mkdir()
    assert write_for_transformers(config, ours, there, 64) == []
    theirs = AutoTokenizer.from_pretrained(str(there))
    for text in (*SAMPLES, "unseen: ¿qué? \u2603", "a"):
        ids = ours.encode(text)
        assert theirs(text).input_ids == ids
        if "\u2047" not in ours.decode(ids):  # as SentencePiece writes what it does not know
            assert theirs.decode(ids) == ours.decode(ids)
    assert (theirs.eos_token_id, theirs.model_max_length) == (ours.eod, 64)


@pytest.mark.parametrize("kind", MAKERS)
def test_the_own_file_comes_back(tmp_path: Path, kind: str) -> None:
    config = MAKERS[kind](tmp_path)
    ours, there, home = build_tokenizer(config), tmp_path / "hf", tmp_path / "home"
    there.mkdir()
    write_for_transformers(config, ours, there, 64)
    still_there = find_tokenizer(there, home, config)
    assert (still_there.config, still_there.file, still_there.tokenizer.identity) == (config, None, ours.identity)
    if config.path is not None:
        Path(config.path).unlink()
        moved = find_tokenizer(there, home, config)
        assert moved.tokenizer.identity == ours.identity
        assert moved.file is not None and moved.file.parent == there
        assert Path(moved.config.path or "") == home / moved.file.name


@pytest.mark.parametrize("kind", [kind for kind in MAKERS if kind != "huggingface"])
def test_a_tokenizer_json_of_another_tokenizer_is_refused(tmp_path: Path, kind: str) -> None:
    config = MAKERS[kind](tmp_path)
    there = tmp_path / "hf"
    there.mkdir()
    write_for_transformers(config, build_tokenizer(config), there, 64)
    shutil.copyfile(huggingface(tmp_path).path or "", there / "tokenizer.json")
    with pytest.raises(CheckpointError, match=f"in another way than the {config.kind} tokenizer of the run"):
        find_tokenizer(there, tmp_path / "home", config)


def test_special_tokens_that_training_did_not_see_are_named(tmp_path: Path) -> None:
    config = huggingface(tmp_path, adds_special_tokens=True)
    (note,) = write_for_transformers(config, build_tokenizer(config), tmp_path, 64)
    assert "AutoTokenizer adds special tokens" in note


def test_a_tokenizer_that_would_read_otherwise_is_left_out(tmp_path: Path) -> None:
    config = sentencepieces(tmp_path, model_type="word")
    (note,) = write_for_transformers(config, build_tokenizer(config), tmp_path, 64)
    assert "no tokenizer.json" in note and "neither unigram nor BPE" in note
    assert not (tmp_path / "tokenizer.json").exists()
    assert (tmp_path / "tokenizer.model").exists()


def test_a_folder_with_a_damaged_or_no_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="has no tokenizer.json or tokenizer.model"):
        find_tokenizer(tmp_path, tmp_path / "home")
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ConfigError, match="tokenizer.json"):
        find_tokenizer(tmp_path, tmp_path / "home")


def test_a_run_with_a_tokenizer_file_goes_there_and_back(
    tmp_path: Path, convert: Callable[..., tuple[int, str]]
) -> None:
    """Also where the file has moved, and where it is gone."""
    config = sentencepieces(tmp_path, **LLAMA)
    corpus = write_corpus(tmp_path / "corpus", config)
    settings = [FP32, "data.tokenizer.kind=sentencepiece", f"data.tokenizer.path={config.path}"]
    original = save_checkpoint(tmp_path / "run", corpus, settings)
    moved = shutil.move(str(config.path), tmp_path / "elsewhere.model")
    code, printed = convert("to-hf", original, tmp_path / "hf")
    assert code == 2 and "made.model cannot be read" in printed
    code, printed = convert("to-hf", original, tmp_path / "hf", f"data.tokenizer.path={moved}")
    assert code == 0, printed
    Path(moved).unlink()
    code, printed = convert("from-hf", tmp_path / "hf", tmp_path / "back")
    assert code == 0, printed
    back = read_config(tmp_path / "back").data.tokenizer
    assert back == TokenizerConfig("sentencepiece", str(tmp_path / "back/tokenizer.model"))
    assert build_tokenizer(back).encode(SAMPLES[0])


def test_another_tokenizer_than_that_of_the_run_is_refused(
    tmp_path: Path, checkpoint: Path, convert: Callable[..., tuple[int, str]]
) -> None:
    config = huggingface(tmp_path)
    settings = ["data.tokenizer.kind=huggingface", f"data.tokenizer.path={config.path}"]
    code, printed = convert("to-hf", checkpoint, tmp_path / "hf", *settings)
    assert code == 2
    assert "was trained with another tokenizer (byte-257-" in printed
