"""Every way in which data can be wrong gives one error that names it, before anything is built."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from corpus_helpers import WritePair, random_documents

from megatron_ultramem.config.schema import Config, TokenizerConfig
from megatron_ultramem.errors import ConfigError, DataError
from megatron_ultramem.training.data import build_datasets, check_data
from megatron_ultramem.training.tokenizers import build_tokenizer

BYTE = build_tokenizer(TokenizerConfig())


@pytest.fixture
def prefix(config: Config, write_pair: WritePair) -> str:
    """Good data, entered into `config`."""
    prefix = write_pair("data", random_documents(50))
    config.data.paths = [prefix]
    check_data(config, BYTE)
    return prefix


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_missing_file_is_named(config: Config, prefix: str, suffix: str) -> None:
    Path(prefix + suffix).unlink()
    with pytest.raises(DataError, match=rf"{prefix}{suffix} does not exist; .*preprocess_data.py"):
        check_data(config, BYTE)


def test_prefix_with_a_suffix_gets_a_hint(config: Config, prefix: str) -> None:
    config.data.paths = [prefix + ".bin"]
    with pytest.raises(DataError, match=r"give the prefix without"):
        check_data(config, BYTE)


def overwrite(at: int, value: bytes) -> Callable[[bytes], bytes]:
    return lambda contents: contents[:at] + value + contents[at + len(value) :]


DAMAGE: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda _: b"", "does not start like an index file"),
    "text": (lambda _: b"this is text" * 100, "does not start like an index file"),
    "cut in the header": (lambda c: c[:20], "ends after 20 bytes"),
    "cut in the arrays": (lambda c: c[:-8], r"it has \d+ bytes and should have \d+ for 50 documents"),
    "longer": (lambda c: c + b"\0", "should have"),
    "version": (overwrite(9, struct.pack("<Q", 7)), "version 7"),
    "dtype": (overwrite(17, b"\x63"), "dtype code 99"),
    "huge count": (overwrite(18, struct.pack("<Q", 1 << 60)), "should have"),
    "negative length": (overwrite(34, struct.pack("<i", -5)), "negative length"),
    "other length": (overwrite(34, struct.pack("<i", 3)), "offsets and lengths disagree"),
    "other boundary": (lambda c: c[:-8] + struct.pack("<q", 3), "does not end at its 50 documents"),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGE.values(), ids=DAMAGE.keys())
def test_damaged_idx_is_named_with_how_to_rebuild_it(
    config: Config, prefix: str, damage: Callable[[bytes], bytes], message: str
) -> None:
    path = Path(prefix + ".idx")
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError, match=rf"{path} is damaged: .*{message}.*--overwrite --output {prefix}"):
        check_data(config, BYTE)


@pytest.mark.parametrize("change", [lambda c: c[:-2], lambda c: c + b"\0\0"], ids=["shorter", "longer"])
def test_bin_that_does_not_fit_its_idx_is_refused(
    config: Config, prefix: str, change: Callable[[bytes], bytes]
) -> None:
    path = Path(prefix + ".bin")
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(DataError, match=r"data.bin has \d+ bytes, but .*data.idx describes \d+ tokens of 2 bytes"):
        check_data(config, BYTE)


@pytest.mark.parametrize("split", ["", "a,b,c", "0,0,0", "90;10", "1,1,1,1", "-1,2", "90,,10", "nan,1"])
def test_bad_split_is_refused(config: Config, prefix: str, split: str) -> None:
    config.data.split = split
    with pytest.raises(ConfigError, match=r"data.split=.*legal: one to three shares"):
        check_data(config, BYTE)


@pytest.mark.parametrize(
    ("split", "empty"), [("0,1,0", "train"), ("1,0,0", "valid"), ("100", "valid"), ("999,1", "valid")]
)
def test_split_without_documents_is_refused(config: Config, prefix: str, split: str, empty: str) -> None:
    config.data.split = split
    with pytest.raises(DataError, match=rf"data.paths {prefix}: .* none of its 50 documents for {empty}"):
        check_data(config, BYTE)


def test_split_shorter_than_a_sample_is_refused(config: Config, prefix: str) -> None:
    config.data.split = "98,2"
    config.data.sequence_length = 1024
    with pytest.raises(DataError, match=r"the 1 documents of valid have \d+ tokens, fewer than .* = 1025"):
        check_data(config, BYTE)


def test_validation_data_is_not_asked_for_without_evaluation(config: Config, prefix: str) -> None:
    config.data.split = "1"
    config.train.eval_steps = 0
    check_data(config, BYTE)


def test_data_of_another_tokenizer_is_refused(config: Config, prefix: str, tiktoken_file: Path) -> None:
    other = build_tokenizer(TokenizerConfig("tiktoken", str(tiktoken_file)))
    with pytest.raises(DataError, match=rf"made with the tokenizer {BYTE.identity}, but .* {other.identity}"):
        check_data(config, other)


@pytest.mark.parametrize("contents", ["", "{}", "[1]", "nonsense"])
def test_unreadable_summary_is_named(config: Config, prefix: str, contents: str) -> None:
    Path(prefix + ".json").write_text(contents)
    with pytest.raises(DataError, match=rf"{prefix}.json does not say which tokenizer"):
        check_data(config, BYTE)


def test_ids_beyond_the_vocabulary_are_refused_without_a_summary(config: Config, prefix: str) -> None:
    Path(prefix + ".json").unlink()
    check_data(config, BYTE)
    ids = np.fromfile(prefix + ".bin", dtype=np.uint16)
    ids[3] = 257
    ids.tofile(prefix + ".bin")
    with pytest.raises(DataError, match=r"document 0 has the token id 257, outside the tokenizer's vocabulary of 257"):
        check_data(config, BYTE)


@pytest.mark.parametrize("option", ["mask_document_boundaries", "reset_position_ids"])
def test_options_that_need_eod_refuse_documents_without_it(config: Config, prefix: str, option: str) -> None:
    ids = np.fromfile(prefix + ".bin", dtype=np.uint16)
    ids[ids == 256] = 10
    ids.tofile(prefix + ".bin")
    check_data(config, BYTE)
    setattr(config.data, option, True)
    with pytest.raises(DataError, match="does not end with the end-of-document id 256"):
        check_data(config, BYTE)


def test_model_too_small_for_the_data_is_refused(config: Config, prefix: str) -> None:
    config.model.max_sequence_length = 16
    with pytest.raises(ConfigError, match=r"data.sequence_length=32 exceeds model.max_sequence_length=16"):
        check_data(config, BYTE)
    config.model.max_sequence_length, config.model.vocab_size = 32, 256
    with pytest.raises(ConfigError, match=r"model.vocab_size=256 is smaller than .* 257"):
        check_data(config, BYTE)


def test_settings_that_contradict_or_name_nothing_are_refused(config: Config, prefix: str) -> None:
    config.data.train_paths = [prefix]
    with pytest.raises(ConfigError, match="both set"):
        check_data(config, BYTE)
    config.data.paths = []
    with pytest.raises(ConfigError, match=r"data.valid_paths is empty and train.eval_steps=2"):
        check_data(config, BYTE)
    config.data.valid_paths, config.data.valid_weights = [prefix], [1.0, 2.0]
    with pytest.raises(ConfigError, match=r"data.valid_weights has 2 entries for the 1 of data.valid_paths"):
        check_data(config, BYTE)
    config.data.train_paths = []
    with pytest.raises(ConfigError, match="no training data: set data.paths"):
        check_data(config, BYTE)


def test_second_of_several_paths_is_checked_too(config: Config, prefix: str, write_pair: WritePair) -> None:
    config.data.paths = [prefix, write_pair("tiny", ["a" * 100])]
    with pytest.raises(DataError, match=r"tiny: .* none of its 1 documents for valid"):
        check_data(config, BYTE)


def test_cache_that_cannot_be_written_is_named(config: Config, prefix: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    config.data.cache_dir = str(tmp_path / "file")
    with pytest.raises(DataError, match=r"file/\w+ cannot be written .*set data.cache_dir"):
        build_datasets(config, BYTE, train_samples=1, valid_samples=0, test_samples=0, is_built_on_rank=lambda: True)


def test_data_that_other_tools_made_needs_no_summary(config: Config, prefix: str) -> None:
    summary = Path(prefix + ".json")
    assert json.loads(summary.read_text())["tokenizer"] == BYTE.identity
    summary.unlink()
    check_data(config, BYTE)
