"""Small corpora and tokenizers, made on the spot."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from pathlib import Path

import pytest
from corpus_helpers import WritePair

from megatron_ultramem.config.schema import Config, TokenizerConfig
from megatron_ultramem.training.preprocess import preprocess

TRAINING_TEXT = [
    "def hello(name):\n    return f'hello {name}'\n",
    "the quick brown fox jumps over the lazy dog, again and again",
    "Straße, naïve, œuvre, größer; 日本語のテキスト; Ελληνικά; русский язык",
    "    indented\n\tand tabbed\n\n\nwith blank lines",
] * 8


@pytest.fixture(scope="session")
def huggingface_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>", "<|other|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TRAINING_TEXT, trainer)
    path = tmp_path_factory.mktemp("huggingface") / "tokenizer.json"
    tokenizer.save(str(path))
    return path


@pytest.fixture(scope="session")
def sentencepiece_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TRAINING_TEXT),
        model_writer=model,
        vocab_size=400,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=False,
        hard_vocab_limit=False,
        user_defined_symbols=["<|doc|>"],
        minloglevel=2,
    )
    path = tmp_path_factory.mktemp("sentencepiece") / "tiny.model"
    path.write_bytes(model.getvalue())
    return path


@pytest.fixture(scope="session")
def tiktoken_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    merges = [b"he", b"ll", b"hell", b"hello", b" t", b" th", b" the", b"in", b"  ", b"\xc3\x9f"]
    tokens = [bytes([value]) for value in range(256)] + merges
    path = tmp_path_factory.mktemp("tiktoken") / "tiny.tiktoken"
    path.write_bytes(b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens)))
    return path


@pytest.fixture
def tokenizer_config(request: pytest.FixtureRequest) -> TokenizerConfig:
    """Indirect parameter: the kind."""
    kind: str = request.param
    path = None if kind == "byte" else str(request.getfixturevalue(f"{kind}_file"))
    return TokenizerConfig(kind=kind, path=path)


@pytest.fixture
def write_pair(tmp_path: Path) -> WritePair:
    """write_pair(name, documents): a .bin/.idx/.json of byte tokens; returns its prefix."""

    def write(name: str, documents: Sequence[str]) -> str:
        folder = tmp_path / f"{name}-text"
        folder.mkdir()
        files = []
        for number, document in enumerate(documents):
            files.append(folder / f"{number:04}.txt")
            files[-1].write_text(document)
        preprocess(files, tmp_path / name, TokenizerConfig())
        return str(tmp_path / name)

    return write


@pytest.fixture
def config(tmp_path: Path) -> Config:
    """Short sequences, cached and run below tmp_path; no data yet."""
    config = Config()
    config.data.sequence_length = 32
    config.data.split = "80,20"
    config.train.run_dir = str(tmp_path / "run")
    config.train.steps, config.train.global_batch_size, config.train.eval_steps = 10, 8, 2
    return config
