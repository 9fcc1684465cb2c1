from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from megatron_ultramem.config.schema import TokenizerConfig
from megatron_ultramem.errors import ConfigError
from megatron_ultramem.training.tokenizers import StreamDecoder, build_tokenizer

KINDS = ("byte", "huggingface", "sentencepiece", "tiktoken")
TEXTS = {
    "ascii": "def f(x):\n    return x + 1\n",
    "accents": "naïve Straße, déjà vu",
    "combining": "e\u0301 and n\u0303",
    "emoji": "👩‍👩‍👧‍👦 family, 🏴󠁧󠁢󠁳󠁣󠁴󠁿 flag",
    "astral": "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 \U0010fffd",
    "controls": "a\x00b\x01c\x7f\u200b\ufeffd",
    "newlines": "a\r\nb\rc\n\n\td  e   ",
    "replacement": "real \ufffd inside and at the end \ufffd",
    "special": "text with <|endoftext|> and </s> in it",
    "empty": "",
}


@pytest.mark.parametrize("tokenizer_config", KINDS, indirect=True)
@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS.keys())
def test_round_trip_is_lossless_and_stays_in_the_vocabulary(tokenizer_config: TokenizerConfig, text: str) -> None:
    tokenizer = build_tokenizer(tokenizer_config)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(0 <= token < tokenizer.vocab_size for token in ids)
    assert tokenizer.eod not in ids, "special tokens must not be read out of text"
    assert 0 <= tokenizer.eod < tokenizer.vocab_size
    assert tokenizer.encode_array(text, np.uint16).tolist() == ids
    assert tokenizer.decode([*ids, tokenizer.eod]) == text


@pytest.mark.parametrize("tokenizer_config", KINDS, indirect=True)
@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS.keys())
def test_stream_gives_complete_characters_that_join_to_the_text(tokenizer_config: TokenizerConfig, text: str) -> None:
    tokenizer = build_tokenizer(tokenizer_config)
    stream = StreamDecoder(tokenizer)
    parts = [stream.push(token) for token in tokenizer.encode(text)]
    assert not any(part.endswith("\ufffd") for part in parts)
    assert "".join(parts) + stream.flush() == text


@pytest.mark.parametrize("tokenizer_config", KINDS, indirect=True)
def test_stream_of_arbitrary_ids_joins_to_their_decoding(tokenizer_config: TokenizerConfig) -> None:
    tokenizer = build_tokenizer(tokenizer_config)
    ids = np.random.default_rng(0).integers(0, tokenizer.vocab_size, 300).tolist()
    stream = StreamDecoder(tokenizer)
    assert "".join(map(stream.push, ids)) + stream.flush() == tokenizer.decode(ids)


def test_byte_tokenizer_has_256_bytes_and_eod() -> None:
    tokenizer = build_tokenizer(TokenizerConfig())
    assert (tokenizer.vocab_size, tokenizer.eod) == (257, 256)
    assert tokenizer.encode("aß") == [97, 0xC3, 0x9F]
    assert tokenizer.decode([0xC3]) == "\ufffd"


def test_identity_follows_contents_not_path(huggingface_file: Path, tmp_path: Path) -> None:
    def identity(path: Path, eod: str | None = None) -> str:
        return build_tokenizer(TokenizerConfig("huggingface", str(path), eod)).identity

    original = identity(huggingface_file)
    copy = tmp_path / "tokenizer.json"
    copy.write_bytes(huggingface_file.read_bytes())
    assert identity(copy) == original == identity(tmp_path)
    assert identity(copy, eod="<|other|>") != original
    copy.write_text(copy.read_text().replace("<|other|>", "<|changed|>"))
    assert identity(copy) != original


def test_eod_token_setting_is_obeyed(sentencepiece_file: Path, tiktoken_file: Path) -> None:
    default = build_tokenizer(TokenizerConfig("sentencepiece", str(sentencepiece_file)))
    named = build_tokenizer(TokenizerConfig("sentencepiece", str(sentencepiece_file), "<|doc|>"))
    assert named.eod != default.eod == 2  # </s>
    assert build_tokenizer(TokenizerConfig("tiktoken", str(tiktoken_file), "<|doc|>")).eod == 266


def test_tiktoken_pattern_cuts_text(tiktoken_file: Path) -> None:
    whole = build_tokenizer(TokenizerConfig("tiktoken", str(tiktoken_file)))
    letters = build_tokenizer(TokenizerConfig("tiktoken", str(tiktoken_file), pattern=r"(?s)."))
    assert (len(whole.encode("hello")), len(letters.encode("hello"))) == (1, 5)
    assert whole.identity != letters.identity


def test_truncation_and_padding_of_a_tokenizer_file_are_ignored(huggingface_file: Path, tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(huggingface_file))
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=8)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    ours = build_tokenizer(TokenizerConfig("huggingface", str(tmp_path)))
    assert ours.decode(ours.encode("a long enough text")) == "a long enough text"


BAD = {
    "no path": (TokenizerConfig("huggingface"), "data.tokenizer.path is not set"),
    "unknown kind": (TokenizerConfig("words", "x"), "legal are byte"),
    "byte with path": (TokenizerConfig("byte", path="x"), "leave it null"),
    "byte with eod": (TokenizerConfig("byte", eod_token="x"), "data.tokenizer.eod_token"),
    "pattern for another kind": (TokenizerConfig("huggingface", "x", pattern="."), "data.tokenizer.pattern"),
    "unknown encoding": (TokenizerConfig("tiktoken", "no_such_base"), "cl100k_base"),
    "pattern for an encoding": (TokenizerConfig("tiktoken", "cl100k_base", pattern="."), "no file 'cl100k_base'"),
}


@pytest.mark.parametrize(("config", "message"), BAD.values(), ids=BAD.keys())
def test_bad_settings_are_refused(config: TokenizerConfig, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_tokenizer(config)


@pytest.mark.parametrize("kind", ["huggingface", "sentencepiece"])
def test_missing_file_is_named(kind: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere.* cannot be read: No such file"):
        build_tokenizer(TokenizerConfig(kind, str(tmp_path / "nowhere")))


@pytest.mark.parametrize("kind", ["huggingface", "sentencepiece", "tiktoken"])
@pytest.mark.parametrize("contents", [b"", b"{}", b"\x00\xff" * 50], ids=["empty", "json", "binary"])
def test_file_of_another_kind_is_refused(kind: str, contents: bytes, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(contents)
    with pytest.raises(ConfigError, match=f"kind={kind} needs"):
        build_tokenizer(TokenizerConfig(kind, str(path)))


@pytest.mark.parametrize("kind", ["huggingface", "sentencepiece"])
def test_unknown_eod_token_is_refused(kind: str, request: pytest.FixtureRequest) -> None:
    path = str(request.getfixturevalue(f"{kind}_file"))
    with pytest.raises(ConfigError, match=r"no token '<nope>'.*data.tokenizer.eod_token"):
        build_tokenizer(TokenizerConfig(kind, path, "<nope>"))


def test_tokenizer_without_any_usual_eod_is_refused(huggingface_file: Path, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(huggingface_file.read_text().replace("<|endoftext|>", "<|fin|>"))
    with pytest.raises(ConfigError, match=r"none of .*set data.tokenizer.eod_token"):
        build_tokenizer(TokenizerConfig("huggingface", str(path)))
    assert build_tokenizer(TokenizerConfig("huggingface", str(path), "<|fin|>")).eod == 0


def test_built_in_encoding_without_a_network_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    for name in ("https_proxy", "HTTPS_PROXY"):  # nothing listens there: refused at once
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    with pytest.raises(ConfigError, match="TIKTOKEN_CACHE_DIR"):
        build_tokenizer(TokenizerConfig("tiktoken", "p50k_base"))


def test_tokenizers_and_preprocessing_import_without_torch() -> None:
    code = (
        "import sys, megatron_ultramem.training.tokenizers, megatron_ultramem.training.preprocess\n"
        "sys.exit('torch' in sys.modules)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    assert subprocess.run([sys.executable, "-c", code], env=environment, check=False).returncode == 0
