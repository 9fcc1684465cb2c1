from __future__ import annotations

import fcntl
import gzip
import json
import os
import signal
import subprocess
import sys
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
from corpus_helpers import random_documents

from megatron_ultramem.config.schema import TokenizerConfig
from megatron_ultramem.errors import DataError
from megatron_ultramem.training.corpus import blocks, collect_files
from megatron_ultramem.training.data.index_file import read_index
from megatron_ultramem.training.preprocess import Totals, preprocess
from megatron_ultramem.training.stdlib_corpus import SKIPPED_FOLDERS, stdlib_files
from megatron_ultramem.training.tokenizers import build_tokenizer

TOOL = Path(__file__).parents[2] / "tools" / "preprocess_data.py"
BYTE = TokenizerConfig()


def texts(prefix: Path, tokenizer: TokenizerConfig = BYTE) -> list[str]:
    """The documents of a pair; each must end with exactly one end-of-document id."""
    index, decoder = read_index(str(prefix)), build_tokenizer(tokenizer)
    documents = [index.read(i, i + 1).tolist() for i in range(index.documents)]
    assert all(ids[-1] == decoder.eod and ids.count(decoder.eod) == 1 for ids in documents)
    return [decoder.decode(ids) for ids in documents]


def outputs(prefix: Path) -> dict[str, bytes]:
    return {path.suffix: path.read_bytes() for path in sorted(prefix.parent.glob(prefix.name + ".*"))}


def write_json_lines(path: Path, documents: list[str]) -> Path:
    path.write_text("".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(documents)))
    return path


def run_tool(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(TOOL), *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


@pytest.mark.parametrize("tokenizer_config", ["byte", "huggingface", "sentencepiece", "tiktoken"], indirect=True)
def test_documents_come_back_in_order_with_eod(tokenizer_config: TokenizerConfig, tmp_path: Path) -> None:
    documents = ["first\r\n", "zweites Größe", "日本語\n", "<|endoftext|> as text"]
    files = []
    for number, text in enumerate(documents):
        files.append(tmp_path / f"{number}.txt")
        files[-1].write_bytes(text.encode())
    totals = preprocess(files, tmp_path / "out", tokenizer_config)
    assert texts(tmp_path / "out", tokenizer_config) == documents
    index = read_index(str(tmp_path / "out"))
    assert (totals.documents, totals.tokens) == (4, index.tokens)
    assert totals.text_bytes == totals.disk_bytes == sum(len(text.encode()) for text in documents)
    summary = json.loads((tmp_path / "out.json").read_text())
    tokenizer = build_tokenizer(tokenizer_config)
    assert summary["tokenizer"] == tokenizer.identity
    assert (summary["vocab_size"], summary["documents"], summary["tokens"]) == (tokenizer.vocab_size, 4, index.tokens)
    assert index.dtype is np.uint16


def test_large_vocabulary_is_stored_as_int32(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models

    words = {"<|endoftext|>": 0, **{f"w{i}": i for i in range(1, 70_000)}}
    Tokenizer(models.WordLevel(words, unk_token="<|endoftext|>")).save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "a.txt").write_text("w69999")
    preprocess([tmp_path / "a.txt"], tmp_path / "out", TokenizerConfig("huggingface", str(tmp_path)))
    index = read_index(str(tmp_path / "out"))
    assert index.dtype is np.int32
    assert index.read(0, 1).tolist() == [69_999, 0]


def test_megatron_reads_what_was_written(tmp_path: Path) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    documents = random_documents(20)
    preprocess([write_json_lines(tmp_path / "in.jsonl", documents)], tmp_path / "out", BYTE)
    dataset = IndexedDataset(str(tmp_path / "out"))
    assert len(dataset.document_indices) - 1 == len(dataset) == 20
    assert [bytes(dataset[i][:-1].tolist()).decode() for i in range(20)] == documents


def test_parallel_output_equals_serial_output_bit_by_bit(tmp_path: Path, huggingface_file: Path) -> None:
    documents = random_documents(500)
    lines = write_json_lines(tmp_path / "a.jsonl", documents)
    (tmp_path / "b.txt").write_text("one text file in between")
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(lines.read_bytes()))
    files = [lines, tmp_path / "b.txt", tmp_path / "c.jsonl.gz"]
    assert len(list(blocks(files, block_bytes=4000))) > 20
    tokenizer = TokenizerConfig("huggingface", str(huggingface_file))
    (tmp_path / "1").mkdir()
    (tmp_path / "3").mkdir()
    serial = preprocess(files, tmp_path / "1" / "out", tokenizer, workers=1)
    parallel = preprocess(files, tmp_path / "3" / "out", tokenizer, workers=3, block_bytes=4000)
    assert outputs(tmp_path / "1" / "out") == outputs(tmp_path / "3" / "out")
    assert sorted(outputs(tmp_path / "1" / "out")) == [".bin", ".idx", ".json"]
    assert serial.disk_bytes == parallel.disk_bytes == sum(path.stat().st_size for path in files)
    assert texts(tmp_path / "3" / "out", tokenizer) == [*documents, "one text file in between", *documents]


def test_folder_is_searched_in_order_without_hidden_files(tmp_path: Path) -> None:
    for name in ("b.txt", "a/z.txt", "a/y.md", ".hidden.txt", ".git/c.txt"):
        path = tmp_path / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    preprocess(collect_files([tmp_path / "in"]), tmp_path / "all", BYTE)
    assert texts(tmp_path / "all") == ["a/y.md", "a/z.txt", "b.txt"]
    preprocess(collect_files([tmp_path / "in"], "**/*.txt"), tmp_path / "some", BYTE)
    assert texts(tmp_path / "some") == ["a/z.txt", "b.txt"]


def test_progress_grows_to_the_size_of_the_input(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl.gz"
    path.write_bytes(gzip.compress(write_json_lines(tmp_path / "t.jsonl", random_documents(2_000)).read_bytes()))
    seen: list[tuple[int, int]] = []

    def record(totals: Totals) -> None:
        seen.append((totals.disk_bytes, totals.tokens))

    preprocess([path], tmp_path / "out", BYTE, block_bytes=20_000, on_progress=record)
    assert len(seen) > 2
    assert seen == sorted(seen)
    assert seen[-1] == (path.stat().st_size, read_index(str(tmp_path / "out")).tokens)


def test_undecodable_and_empty_documents_are_counted_and_left_out(tmp_path: Path) -> None:
    (tmp_path / "good.txt").write_text("good")
    (tmp_path / "latin1.txt").write_bytes("größe".encode("latin-1"))
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "damaged.txt.gz").write_bytes(gzip.compress(b"text" * 99)[:-9])
    lines = [b'{"text": "fine"}', b"", b'{"text": "cut off', b'{"text": "half a pair \\ud800"}', b'{"text": "\xff"}']
    (tmp_path / "lines.jsonl").write_bytes(b"\n".join(lines))
    files = [tmp_path / name for name in ("good.txt", "latin1.txt", "empty.txt", "damaged.txt.gz", "lines.jsonl")]
    totals = preprocess(files, tmp_path / "out", BYTE)
    assert texts(tmp_path / "out") == ["good", "fine"]
    assert (totals.documents, totals.empty, totals.skipped) == (2, 1, 5)
    reasons = "\n".join(totals.skipped_examples)
    for part in ("latin1.txt: not UTF-8 at byte 2", "damaged.txt.gz: damaged gzip", "lines.jsonl:3: not JSON",
                 "lines.jsonl:4: half a surrogate pair", "lines.jsonl:5: not UTF-8"):  # fmt: skip
        assert part in reasons


@pytest.mark.parametrize("workers", [1, 2])
def test_strict_stops_at_undecodable_text_and_leaves_nothing(tmp_path: Path, workers: int) -> None:
    (tmp_path / "latin1.txt").write_bytes(b"gr\xf6sse")
    with pytest.raises(DataError, match=r"latin1.txt: not UTF-8 at byte 2"):
        preprocess([tmp_path / "latin1.txt"], tmp_path / "out", BYTE, strict=True, workers=workers)
    assert [path.name for path in tmp_path.iterdir()] == ["latin1.txt"]


BAD_LINES = {
    "no key": (b'{"body": "x"}', r"in.jsonl:2: .*no key 'text' \(its keys are body\)"),
    "not text": (b'{"text": 3}', r"in.jsonl:2: .*int, not text"),
    "list": (b"[1]", r"in.jsonl:2: .*it is no object"),
}


@pytest.mark.parametrize(("line", "message"), BAD_LINES.values(), ids=BAD_LINES.keys())
@pytest.mark.parametrize("workers", [1, 2])
def test_json_line_without_text_is_named(tmp_path: Path, line: bytes, message: str, workers: int) -> None:
    (tmp_path / "in.jsonl").write_bytes(b'{"text": "good"}\n' + line + b"\n")
    with pytest.raises(DataError, match=message):
        preprocess([tmp_path / "in.jsonl"], tmp_path / "out", BYTE, workers=workers)
    assert not list(tmp_path.glob("out*"))


def test_line_numbers_hold_beyond_the_first_block(tmp_path: Path) -> None:
    lines = [json.dumps({"text": text}) for text in random_documents(300)]
    lines[290] = "{}"
    (tmp_path / "in.jsonl").write_text("\n".join(lines))
    with pytest.raises(DataError, match=r"in.jsonl:291: .*its keys are none"):
        preprocess([tmp_path / "in.jsonl"], tmp_path / "out", BYTE, block_bytes=1000)


def test_bad_input_is_refused(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(DataError, match="nowhere does not exist"):
        collect_files([tmp_path / "nowhere"])
    with pytest.raises(DataError, match=r"matches the pattern '\*.c'"):
        collect_files([tmp_path / "folder"], "*.c")
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(DataError, match="no document that can be used"):
        preprocess([tmp_path / "empty.txt"], tmp_path / "out", BYTE)
    with pytest.raises(DataError, match="no input file"):
        preprocess([], tmp_path / "out", BYTE)
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(b'{"text": "x"}\n' * 99)[:-9])
    with pytest.raises(DataError, match=r"cut.jsonl.gz is a damaged gzip file"):
        preprocess([tmp_path / "cut.jsonl.gz"], tmp_path / "out", BYTE)
    with pytest.raises(DataError, match="cannot write to"):
        preprocess([tmp_path / "empty.txt"], tmp_path / "empty.txt" / "out", BYTE)
    assert not list(tmp_path.glob("out*"))


def test_existing_output_survives_unless_overwrite(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("old")
    preprocess([tmp_path / "a.txt"], tmp_path / "out", BYTE)
    before = outputs(tmp_path / "out")
    (tmp_path / "a.txt").write_text("new")
    with pytest.raises(DataError, match=r"out.bin exists; .*--overwrite"):
        preprocess([tmp_path / "a.txt"], tmp_path / "out", BYTE)
    assert outputs(tmp_path / "out") == before
    preprocess([tmp_path / "a.txt"], tmp_path / "out", BYTE, overwrite=True)
    assert texts(tmp_path / "out") == ["new"]


def test_output_that_is_also_input_is_refused(tmp_path: Path) -> None:
    (tmp_path / "corpus.json").write_text("precious")
    with pytest.raises(DataError, match="is also an input"):
        preprocess([tmp_path / "corpus.json"], tmp_path / "corpus", BYTE, overwrite=True)
    assert (tmp_path / "corpus.json").read_text() == "precious"


def test_second_run_on_the_same_prefix_is_refused_and_a_dead_one_replaced(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    partial = tmp_path / "out.partial"
    partial.mkdir()
    (partial / "data.bin").write_bytes(b"left by a killed run")
    with (partial / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(DataError, match="another run is writing"):
            preprocess([tmp_path / "a.txt"], tmp_path / "out", BYTE)
        assert (partial / "data.bin").exists()
    preprocess([tmp_path / "a.txt"], tmp_path / "out", BYTE)
    assert texts(tmp_path / "out") == ["text"]
    assert not partial.exists()


def killed_before(moment: int, files: list[Path], prefix: Path) -> None:
    """Preprocesses and is killed right before its `moment`-th removal or renaming of a file."""
    left = moment

    def kill(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal left
        if event in ("os.remove", "os.rename"):
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(kill)
    preprocess(files, prefix, BYTE, overwrite=True)


@pytest.mark.parametrize("moment", range(1, 6))
def test_killed_run_leaves_the_old_pair_the_new_pair_or_none(tmp_path: Path, moment: int) -> None:
    (tmp_path / "a.txt").write_text("old")
    preprocess([tmp_path / "a.txt"], tmp_path / "out", BYTE)
    (tmp_path / "a.txt").write_text("new")
    process = get_context("fork").Process(target=killed_before, args=(moment, [tmp_path / "a.txt"], tmp_path / "out"))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    if moment == 1:
        assert texts(tmp_path / "out") == ["old"]
    elif moment == 5:
        assert texts(tmp_path / "out") == ["new"]
    else:
        with pytest.raises(DataError, match=r"out.idx does not exist"):
            texts(tmp_path / "out")
    preprocess([tmp_path / "a.txt"], tmp_path / "out", BYTE, overwrite=True)
    assert texts(tmp_path / "out") == ["new"]
    assert sorted(outputs(tmp_path / "out")) == [".bin", ".idx", ".json"]


def test_tool_reports_and_fails_with_one_line(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("ab")
    done = run_tool("--input", tmp_path / "a.txt", "--output", tmp_path / "out", "--workers", "1")
    assert done.returncode == 0, done.stderr
    assert "1 documents, 3 tokens" in done.stderr
    assert "MB/s" in done.stderr
    again = run_tool("--input", tmp_path / "a.txt", "--output", tmp_path / "out")
    assert again.returncode == 1
    assert f"error: {tmp_path}/out.bin exists" in again.stderr
    assert "Traceback" not in again.stderr


def test_stdlib_files_are_sources_in_a_fixed_shuffled_order() -> None:
    files = stdlib_files()
    names = [path.name for path in files]
    assert {"argparse.py", "dataclasses.py", "zipimport.py"} <= set(names)
    assert not any(SKIPPED_FOLDERS & set(path.parts[-4:]) for path in files)
    assert files == stdlib_files()
    assert files != sorted(files) == sorted(stdlib_files(seed=1))
    assert files != stdlib_files(seed=1)
