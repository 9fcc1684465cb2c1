"""Text from installed packages, and the tokenizer trained on it."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_ultramem.config.schema import TokenizerConfig
from megatron_ultramem.errors import ConfigError, DataError
from megatron_ultramem.training.package_corpus import LARGEST_BYTES, package_files, train_tokenizer
from megatron_ultramem.training.tokenizers import build_tokenizer


@pytest.fixture
def packages(tmp_path: Path) -> Path:
    for number in range(200):
        path = tmp_path / f"package_{number % 7}" / f"module_{number}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"def function_{number}(x):\n    return x + {number}\n" * 5)
    return tmp_path


def test_documents_are_held_out_by_their_contents_wherever_they_lie(packages: Path) -> None:
    found = package_files(0.2, [packages])
    assert len(found.train) + len(found.held_out) == 200
    assert not set(found.train) & set(found.held_out)
    assert found.held_out_bytes == sum(path.stat().st_size for path in found.held_out)
    assert 20 < len(found.held_out) < 60
    for path in packages.glob("*/*.py"):
        path.rename(packages / path.name)
    moved = package_files(0.2, [packages])
    assert [path.name for path in moved.held_out] == [path.name for path in found.held_out]
    assert [path.name for path in moved.train] == [path.name for path in found.train]


def test_copies_and_what_is_no_text_are_left_out(packages: Path) -> None:
    before = package_files(0.2, [packages])
    one = before.held_out[0]
    (packages / "copy.md").write_bytes(one.read_bytes())
    (packages / "latin.py").write_bytes(b"# caf\xe9\n")
    (packages / "empty.py").touch()
    (packages / "data.txt").write_bytes(b"0" * (LARGEST_BYTES + 1))
    (packages / "image.png").write_bytes(b"text")
    (packages / ".hidden").mkdir()
    (packages / ".hidden" / "cache.py").write_text("hidden")
    after = package_files(0.2, [packages])
    assert len(after.train) + len(after.held_out) == 200
    assert {path.read_bytes() for path in after.held_out} == {path.read_bytes() for path in before.held_out}


def test_too_little_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "only.py").write_text("x = 1\n")
    with pytest.raises(DataError, match=r"1 different text and code files in .* are too few to hold 2% out"):
        package_files(0.02, [tmp_path])


def test_the_tokenizer_is_of_the_wanted_size_and_gives_the_text_back(packages: Path, tmp_path: Path) -> None:
    train_tokenizer(package_files(0.2, [packages]).train, 300, tmp_path / "made" / "tokenizer.json")
    tokenizer = build_tokenizer(TokenizerConfig(kind="huggingface", path=str(tmp_path / "made" / "tokenizer.json")))
    text = "def function_7(y):\n\treturn 'été' + y  # <|endoftext|>\n"
    ids = tokenizer.encode(text)
    assert tokenizer.vocab_size <= 300 and len(ids) < len(text.encode()) and tokenizer.eod not in ids
    assert tokenizer.decode(ids) == text
    with pytest.raises(ConfigError, match="vocabulary of 256: legal: at least 257"):
        train_tokenizer([], 256, tmp_path / "small.json")
