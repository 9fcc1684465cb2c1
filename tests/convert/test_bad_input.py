"""What is wrong with a source or a target is one clear error; the source stays as it was and nothing is left behind."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from megatron_ultramem.checkpoints_convert.huggingface import FORMAT_VERSION
from megatron_ultramem.training.checksums import read_sums

Convert = Callable[..., tuple[int, str]]
FIRST, INDEX = "model-00001-of-", "model.safetensors.index.json"


@pytest.fixture
def broken(tmp_path: Path, folder: Path) -> Path:
    """A copy of the folder, to be damaged."""
    return Path(shutil.copytree(folder, tmp_path / "theirs"))


def first_file(folder: Path) -> Path:
    return next(iter(sorted(folder.glob(f"{FIRST}*"))))


def edit_json(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def digest(folder: Path) -> str:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return hashlib.sha256(b"".join(path.name.encode() + path.read_bytes() for path in files)).hexdigest()


def refused(
    convert: Convert, direction: str, source: Path, target: Path, *named: str, without: str = "Traceback"
) -> None:
    """One line that names what is wrong, the source untouched, nothing beside the target."""
    before, beside = digest(source), set(target.parent.iterdir())
    code, printed = convert(direction, source, target, "--no-verify")
    errors = [line for line in printed.splitlines() if line.startswith("error")]
    assert (code, len(errors)) == (2, 1), printed
    assert "Traceback" not in printed and without not in printed
    for part in named:
        assert part in errors[0], errors[0]
    assert digest(source) == before
    assert set(target.parent.iterdir()) == beside


def truncate(folder: Path) -> None:
    path = first_file(folder)
    os.truncate(path, path.stat().st_size - 100)


def truncate_header(folder: Path) -> None:
    os.truncate(first_file(folder), 5)


def flip_a_bit(folder: Path) -> None:
    content = bytearray(first_file(folder).read_bytes())
    content[-3] ^= 1
    first_file(folder).write_bytes(content)


def tamper_with_the_shape(folder: Path) -> None:
    path = first_file(folder)
    content = path.read_bytes()
    assert b"[384,32]" in content
    path.write_bytes(content.replace(b"[384,32]", b"[384,33]"))


def rename_a_tensor(folder: Path) -> None:
    rewrite(folder, lambda tensors: {f"{name}s": tensor for name, tensor in tensors.items()})


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    path = first_file(folder)
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    save_file(change(tensors), path, metadata={"format": "pt"})


def set_config(**values: Any) -> Callable[[Path], None]:
    return lambda folder: edit_json(folder / "config.json", lambda content: content.update(values))


BREAKS: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "truncated": (truncate, [FIRST, "truncated or damaged"]),
    "truncated-header": (truncate_header, [FIRST, "truncated or damaged"]),
    "flipped-bit": (flip_a_bit, [FIRST, "SHA-256", "without SHA256SUMS"]),
    "tampered-shape": (tamper_with_the_shape, [FIRST, "truncated or damaged"]),
    "renamed-tensor": (rename_a_tensor, [INDEX, "says that", "it is not there"]),
    "missing-index": (lambda folder: (folder / INDEX).unlink(), ["the index is missing", "legal"]),
    "damaged-index": (lambda folder: (folder / INDEX).write_text("{"), [INDEX, "cannot be read"]),
    "missing-file": (lambda folder: first_file(folder).unlink(), [INDEX, FIRST, "not in"]),
    "index-leads-outside": (
        lambda folder: edit_json(folder / INDEX, lambda content: content["weight_map"].update(x="../x.safetensors")),
        ["../x.safetensors", "not in"],
    ),
    "no-config": (lambda folder: (folder / "config.json").unlink(), ["config.json", "No such file"]),
    "config-is-no-json": (lambda folder: (folder / "config.json").write_text("{"), ["config.json", "cannot be read"]),
    "newer-remote-code": (
        set_config(format_version=FORMAT_VERSION + 1),
        [f"format_version = {FORMAT_VERSION + 1}", f"legal: 1 to {FORMAT_VERSION}"],
    ),
    "no-version": (set_config(format_version=None), ["format_version = None"]),
    "another-kind-of-model": (set_config(model_type="gpt2"), ["model_type = 'gpt2'", "legal: ultramem"]),
    "no-settings": (set_config(trainer_settings=None), ["lacks trainer_settings"]),
    "contradiction": (set_config(num_attention_heads=2), ["num_attention_heads = 2 (its trainer_settings say 4)"]),
    "vocabulary-of-another-size": (
        set_config(tokenizer_vocab_size=300),
        ["the model's vocabulary has 300 tokens", "tokenizer and settings 257"],
    ),
    "embedding-of-another-size": (set_config(vocab_size=512), ["vocab_size = 512"]),
    "newer-conversion": (
        lambda folder: edit_json(folder / "ultramem_conversion.json", lambda content: content.update(version=2)),
        ["ultramem_conversion.json", "version 2", "legal: 1"],
    ),
    "damaged-conversion": (
        lambda folder: edit_json(folder / "ultramem_conversion.json", lambda content: content.pop("record")),
        ["ultramem_conversion.json", "damaged"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BREAKS)
def test_a_damaged_folder_is_refused(tmp_path: Path, broken: Path, convert: Convert, name: str) -> None:
    damage, named = BREAKS[name]
    damage(broken)
    if name != "flipped-bit":
        (broken / "SHA256SUMS").unlink()  # which would find the file changed
    refused(convert, "from-hf", broken, tmp_path / "ours", *named)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda t: {**t, "more": torch.zeros(2)}, "left over: more"),
        (lambda t: {name: x for name, x in t.items() if "embed" not in name}, "missing: model.embed_tokens.weight"),
        (lambda t: {name: x[:-1].contiguous() for name, x in t.items()}, "[383, 32] instead of [384, 32]"),
    ],
    ids=["left-over", "missing", "another-shape"],
)
def test_every_tensor_must_be_there(tmp_path: Path, broken: Path, convert: Convert, change: Any, named: str) -> None:
    (broken / "ultramem_conversion.json").unlink()
    (broken / "SHA256SUMS").unlink()  # which would find the file changed
    rewrite(broken, change)
    names = [name for file in broken.glob("*.safetensors") for name in _names(file)]
    files = {name: file.name for file in broken.glob("*.safetensors") for name in _names(file)}
    assert len(names) == len(files)
    edit_json(broken / INDEX, lambda content: content.update(weight_map=files))
    refused(convert, "from-hf", broken, tmp_path / "ours", named)


def _names(file: Path) -> list[str]:
    with safe_open(file, framework="pt") as opened:
        return list(opened.keys())


@pytest.mark.parametrize("direction", ["to-hf", "from-hf"])
def test_a_full_disk_leaves_nothing(
    tmp_path: Path, checkpoint: Path, broken: Path, convert: Convert, direction: str
) -> None:
    """A limit on the size of files gives the error in the middle of writing."""
    source = checkpoint if direction == "to-hf" else broken
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, before[1]))
    try:
        refused(
            convert,
            direction,
            source,
            tmp_path / "target",
            "target cannot be written",
            "file" if direction == "from-hf" else "File too large",
            without="enforce fail",
        )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_disk_that_is_too_small_is_refused_at_once(
    tmp_path: Path, checkpoint: Path, convert: Convert, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 1000, 1000))
    refused(convert, "to-hf", checkpoint, tmp_path / "target", "its disk has 0.00 GiB left", "legal")


def test_every_file_of_a_folder_is_summed(tmp_path: Path, broken: Path, convert: Convert) -> None:
    assert {*read_sums(broken / "SHA256SUMS")} == {path.name for path in broken.iterdir()} - {"SHA256SUMS"}
    with (broken / "tokenizer_config.json").open("a") as file:
        file.write(" ")
    refused(convert, "from-hf", broken, tmp_path / "ours", "tokenizer_config.json is not what was written")


@pytest.mark.parametrize("change", ["swapped", "longer"])
def test_a_tokenizer_that_was_changed_is_refused(tmp_path: Path, broken: Path, convert: Convert, change: str) -> None:
    def damage(content: dict[str, Any]) -> None:
        vocabulary = content["model"]["vocab"]
        if change == "swapped":
            vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
        else:
            vocabulary["ab"] = 257

    edit_json(broken / "tokenizer.json", damage)
    (broken / "SHA256SUMS").unlink()
    named = "in another way than the byte tokenizer" if change == "swapped" else "(258 tokens) has more tokens than"
    refused(convert, "from-hf", broken, tmp_path / "ours", str(broken / "tokenizer.json"), named, "257 tokens", "legal")


def test_another_seed_does_not_move_kept_permutations(tmp_path: Path, folder: Path, convert: Convert) -> None:
    code, printed = convert("from-hf", folder, tmp_path / "ours", "--no-verify", "model.memory.shuffle_seed=77")
    assert code == 2
    assert "model.memory.shuffle_seed=77: the folder's permutations are not those of this seed" in printed


def test_too_little_memory_for_the_gate_is_refused_before_writing(
    tmp_path: Path, checkpoint: Path, folder: Path, convert: Convert, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1000))
    for direction, source in (("to-hf", checkpoint), ("from-hf", folder)):
        code, printed = convert(direction, source, tmp_path / "target")
        assert code == 2
        assert "GiB are free; legal: --no-verify" in printed
        assert not list(tmp_path.iterdir())


def test_a_target_that_exists_is_not_touched(tmp_path: Path, checkpoint: Path, folder: Path, convert: Convert) -> None:
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "mine").write_text("mine")
    for direction, source in (("to-hf", checkpoint), ("from-hf", folder)):
        refused(convert, direction, source, tmp_path / "target", "exists already", "legal")
    assert (tmp_path / "target" / "mine").read_text() == "mine"


def test_what_a_killed_conversion_left_is_named(tmp_path: Path, checkpoint: Path, convert: Convert) -> None:
    (tmp_path / ".converting-target").mkdir()
    refused(convert, "to-hf", checkpoint, tmp_path / "target", ".converting-target exists", "delete that folder")


def test_a_damaged_checkpoint_is_refused(tmp_path: Path, checkpoint: Path, convert: Convert) -> None:
    copy = Path(shutil.copytree(checkpoint, tmp_path / "ours"))
    largest = max(copy.glob("*.distcp"), key=lambda path: path.stat().st_size)
    os.truncate(largest, 1000)
    refused(convert, "to-hf", copy, tmp_path / "target", largest.name, "damaged")
    (copy / ".metadata").write_bytes(b"no pickle")
    refused(convert, "to-hf", copy, tmp_path / "target", ".metadata cannot be read")
    (copy / "run.json").unlink()
    refused(convert, "to-hf", copy, tmp_path / "target", "no checkpoint there")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--max-shard-size", "many"], "--max-shard-size many: legal"),
        (["--max-shard-size", "0GB"], "--max-shard-size 0GB: legal"),
        (["model.num_layers=3"], "model.num_layers=3: a conversion changes no setting"),
        (["data.tokenizer.kind=tiktoken"], "data.tokenizer.path is not set"),
    ],
)
def test_bad_options_of_to_hf(
    tmp_path: Path, checkpoint: Path, convert: Convert, arguments: list[str], named: str
) -> None:
    code, printed = convert("to-hf", checkpoint, tmp_path / "target", *arguments)
    assert code == 2
    assert named in printed


def test_several_processes_are_refused(
    tmp_path: Path, checkpoint: Path, convert: Convert, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, printed = convert("to-hf", checkpoint, tmp_path / "target")
    assert code == 2
    assert "runs in one process" in printed
