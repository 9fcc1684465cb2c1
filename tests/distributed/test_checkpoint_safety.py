"""Checkpoints that someone else wrote, with code in them: refused by everything that loads one, and nothing is run."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_ultramem.config import load_config
from megatron_ultramem.errors import CheckpointError, ConfigError
from megatron_ultramem.training.checkpoint_safety import (
    UnsafeFileError,
    _check_extra_state,
    read_metadata,
    refuse_code,
)
from megatron_ultramem.training.checksums import SUMS_FILE
from tests.distributed.checkpoint_job import train_and_save
from tests.distributed.workers import WorkerPool


class Payload:
    """Makes a folder when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.makedirs, (str(self.mark),)


@pytest.fixture(scope="module")
def saved(pool: WorkerPool, small_run: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    pool.run(1, train_and_save, [*small_run, f"checkpoint.dir={folder}"], 1, (1,))
    return folder / "step_00000001"


@pytest.fixture
def checkpoint(saved: Path, tmp_path: Path) -> Path:
    """A copy without checksums: who can write a checkpoint can write fitting ones."""
    shutil.copytree(saved, tmp_path / "step_00000001")
    (tmp_path / "step_00000001" / SUMS_FILE).unlink()
    return tmp_path / "step_00000001"


def replace_entry(folder: Path, entry: str, content: bytes) -> None:
    """Lets an entry of a checkpoint that is not a tensor be these bytes."""
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    (index,) = (index for index in metadata.storage_data if index.fqn.startswith(entry))
    info = metadata.storage_data[index]
    info.relative_path, info.offset, info.length = "__9_9.distcp", 0, len(content)
    (folder / info.relative_path).write_bytes(content)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def in_metadata(folder: Path, mark: Path, protocol: int) -> None:
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    metadata.planner_data = Payload(mark)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata, protocol=protocol))


def in_common(folder: Path, mark: Path) -> None:
    torch.save({**torch.load(folder / "common.pt", weights_only=True), "x": Payload(mark)}, folder / "common.pt")


def in_entry(folder: Path, mark: Path, entry: str, *, zipped: bool = True) -> None:
    buffer = io.BytesIO()
    torch.save([Payload(mark)], buffer, _use_new_zipfile_serialization=zipped)
    replace_entry(folder, entry, buffer.getvalue())


def in_extra_state(folder: Path, mark: Path, how: str) -> None:
    """As Transformer Engine would unpickle it: out of a tensor of bytes, or out of a buffer."""
    payload = Payload(mark)
    inner = io.BytesIO()
    torch.save(payload, inner)
    value: Any = inner
    if how == "tensor":
        value = torch.frombuffer(bytearray(pickle.dumps({"scale_fwd": payload})), dtype=torch.uint8)
    elif how == "tensor_in_tensor":  # the way that plain pickle stores a tensor

        class Storage:
            def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
                return torch.storage._load_from_bytes, (inner.getvalue(),)

        value = torch.frombuffer(bytearray(pickle.dumps({"scale_fwd": Storage()})), dtype=torch.uint8)
    outer = io.BytesIO()
    torch.save([value], outer)
    replace_entry(folder, "decoder.layers.0.self_attention.linear_proj._extra_state", outer.getvalue())


ATTACKS: dict[str, Callable[[Path, Path], None]] = {
    "metadata": lambda folder, mark: in_metadata(folder, mark, 2),
    "metadata_protocol_4": lambda folder, mark: in_metadata(folder, mark, 4),
    "common": in_common,
    "random_states": lambda folder, mark: in_entry(folder, mark, "rng"),
    "random_states_old_format": lambda folder, mark: in_entry(folder, mark, "rng", zipped=False),
    "extra_state_tensor": lambda folder, mark: in_extra_state(folder, mark, "tensor"),
    "extra_state_tensor_in_tensor": lambda folder, mark: in_extra_state(folder, mark, "tensor_in_tensor"),
    "extra_state_buffer": lambda folder, mark: in_extra_state(folder, mark, "buffer"),
}


def test_scales_are_looked_at_without_transformer_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU saved loads where the recipe's classes cannot be imported; what hides among them does not."""
    module = types.ModuleType("transformer_engine.common.recipe")
    recipe = type("DelayedScaling", (), {"__module__": module.__name__})
    module.DelayedScaling = recipe  # type: ignore[attr-defined]
    made = recipe()
    made.margin = 0
    with monkeypatch.context() as installed:
        for name in ("transformer_engine", "transformer_engine.common", module.__name__):
            installed.setitem(sys.modules, name, module)
        content = pickle.dumps({"recipe": made, "scale_fwd": torch.ones(3)})
        other = pickle.dumps({"recipe": made, "run": os.system})
    _check_extra_state(torch.frombuffer(bytearray(content), dtype=torch.uint8), "x._extra_state")
    with pytest.raises(UnsafeFileError, match="system"):
        _check_extra_state(torch.frombuffer(bytearray(other), dtype=torch.uint8), "x._extra_state")


def load_for_training(settings: list[str]) -> str:
    from megatron_ultramem.training.setup import set_up

    try:
        set_up(load_config(None, settings))
    except CheckpointError as error:
        return str(error)
    return "loaded"


def load_for_generation(folder: Path) -> str:
    from megatron_ultramem.inference import Generator

    try:
        Generator.load(folder)
    except CheckpointError as error:
        return str(error)
    return "loaded"


@pytest.mark.parametrize("attack", ATTACKS)
def test_code_in_a_checkpoint_is_refused_and_not_run(
    pool: WorkerPool, small_run: list[str], checkpoint: Path, tmp_path: Path, attack: str
) -> None:
    mark = tmp_path / "ran"
    ATTACKS[attack](checkpoint, mark)
    settings = [*small_run, f"train.run_dir={tmp_path / 'run'}", f"checkpoint.load={checkpoint}"]
    for message in (
        *pool.run(1, load_for_training, settings),
        *pool.run(1, load_for_generation, checkpoint),
    ):
        assert message.startswith(f"checkpoint {checkpoint} cannot be loaded: "), message
        assert "not among what a checkpoint may hold" in message or "needs more than plain data" in message
    assert not mark.exists()


def test_the_payload_does_run_where_nothing_holds_it_back(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Payload(tmp_path / "ran")))
    assert (tmp_path / "ran").exists()


def test_what_the_trainer_saves_passes(checkpoint: Path) -> None:
    refuse_code(checkpoint)
    assert read_metadata(checkpoint).state_dict_metadata


def test_another_format_is_refused(pool: WorkerPool, small_run: list[str], checkpoint: Path, tmp_path: Path) -> None:
    content = json.loads((checkpoint / "metadata.json").read_text())
    (checkpoint / "metadata.json").write_text(json.dumps(content | {"sharded_backend": "zarr"}))
    settings = [*small_run, f"train.run_dir={tmp_path / 'run'}", f"checkpoint.load={checkpoint}"]
    (message,) = pool.run(1, load_for_training, settings)
    assert "metadata.json: sharded_backend = 'zarr'; legal: 'torch_dist'" in message


@pytest.mark.parametrize("name", ["config.yaml", "other.yaml"])
def test_yaml_makes_no_objects(checkpoint: Path, tmp_path: Path, name: str) -> None:
    mark = tmp_path / "ran"
    (checkpoint / name).write_text(f"train: !!python/object/apply:os.makedirs ['{mark}']\n")
    with pytest.raises(ConfigError, match="not valid YAML"):
        load_config(checkpoint / name)
    assert not mark.exists()
