"""Checkpoints are data: what is read from one may not run code, whoever wrote it.

Tensors are read by torch with `weights_only`. But torch.distributed.checkpoint unpickles `.metadata` and the entries
that are not tensors (random states, Transformer Engine's state) without restraint. They are unpickled here first, by
unpicklers that know a short list of harmless classes; what needs another one is refused, and the unrestrained ones do
not see it. `run.json`, `metadata.json` and the checksums are JSON or text, `config.yaml` is loaded as plain data.

The files are read again after they were checked: who can change them in between can change anything.
"""

from __future__ import annotations

import io
import json
import os
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata

# What torch's versions write into .metadata, beside dtypes.
_METADATA = {
    "builtins": {"set", "frozenset"},
    "collections": {"OrderedDict"},
    "pathlib": {"Path", "PosixPath"},
    "torch": {"Size"},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "_StoragePrefix"},
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.planner": {
        "BytesIOWriteData",
        "SavePlan",
        "TensorWriteData",
        "WriteItem",
        "WriteItemType",
    },
}
# Of which Transformer Engine's state of a module is made: tensors, and the recipe of its FP8 scaling.
_EXTRA_STATE = {
    "collections": {"OrderedDict"},
    "torch": {"Size", "device"},
    "torch._utils": {"_rebuild_tensor_v2"},
    "torch.storage": {"_load_from_bytes"},
    "megatron.core.extensions.transformer_engine": {"TEDelayedScaling"},
    "megatron.core.safe_globals": {"safe_load_from_bytes"},
    "transformer_engine.common.recipe": {
        "DelayedScaling",
        "Float8BlockScaling",
        "Float8CurrentScaling",
        "Format",
        "MMParams",
        "MXFP8BlockScaling",
        "QParams",
        "_FormatHelper",
    },
}
# Transformer Engine asks for it before it unpickles the state of delayed scaling.
_LOAD_EXTRA_STATE = "NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE"
_BACKENDS = {"sharded_backend": "torch_dist", "common_backend": "torch"}


class UnsafeFileError(Exception):
    """A file of a checkpoint would run code, or is of a format that is not checked."""


def refuse_code(folder: Path) -> None:
    """Raises UnsafeFileError if loading the checkpoint could run code, and for damaged files what torch raises."""
    for name, expected in _BACKENDS.items():
        found = json.loads((folder / "metadata.json").read_text()).get(name, expected)
        if found != expected:
            raise UnsafeFileError(f"metadata.json: {name} = {found!r}; legal: {expected!r}")
    _load_weights_only((folder / "common.pt").read_bytes(), "common.pt")
    for entry, content in _entries(folder, read_metadata(folder)):
        value = _load_weights_only(content, entry)
        if "_extra_state" in entry:
            _check_extra_state(value, entry)


@contextmanager
def extra_state_was_checked() -> Iterator[None]:
    """Within it, Transformer Engine unpickles its state: `refuse_code` has seen the same bytes."""
    before = os.environ.get(_LOAD_EXTRA_STATE)
    os.environ[_LOAD_EXTRA_STATE] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_LOAD_EXTRA_STATE]
        else:
            os.environ[_LOAD_EXTRA_STATE] = before


def read_metadata(folder: Path) -> Metadata:
    """`.metadata` of a checkpoint in torch's format; raises as `refuse_code`."""
    with (folder / ".metadata").open("rb") as file:
        metadata = _Unpickler(file, _METADATA, ".metadata").load()
    if type(metadata) is not Metadata:
        raise UnsafeFileError(f".metadata: holds a {type(metadata).__name__}")
    return metadata


def _entries(folder: Path, metadata: Metadata) -> Iterator[tuple[str, bytes]]:
    """Name and bytes of every entry that is not a tensor."""
    for index, info in metadata.storage_data.items():
        if not isinstance(metadata.state_dict_metadata.get(index.fqn), BytesStorageMetadata):
            continue
        if getattr(info, "transform_descriptors", None):  # it would not be these bytes that are unpickled
            raise UnsafeFileError(f"{index.fqn}: is stored in a transformed way")
        with (folder / info.relative_path).open("rb") as file:
            file.seek(info.offset)
            yield index.fqn, file.read(info.length)


def _load_weights_only(content: bytes, name: str) -> Any:
    try:
        return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UnsafeFileError(f"{name}: needs more than plain data ({_first_line(error)})") from None


def _check_extra_state(value: Any, name: str) -> None:
    """Transformer Engine pickles its state into a tensor of bytes, or into a buffer of torch.save."""
    for part in value if isinstance(value, (list, tuple)) else [value]:
        if isinstance(part, io.BytesIO):
            if part.getbuffer().nbytes:
                _load_weights_only(part.getvalue(), name)
        elif isinstance(part, torch.Tensor) and part.numel():
            content = io.BytesIO(part.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
            _Unpickler(content, _EXTRA_STATE, name).load()


class _Unpickler(pickle.Unpickler):
    """Knows the classes of a list and torch's dtypes."""

    def __init__(self, file: Any, allowed: dict[str, set[str]], name: str) -> None:
        super().__init__(file)
        self._allowed, self._name = allowed, name

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and isinstance(found := getattr(torch, name, None), torch.dtype):
            return found
        if name not in self._allowed.get(module, ()):
            raise UnsafeFileError(f"{self._name}: needs {module}.{name}, which is not among what a checkpoint may hold")
        if name in ("_load_from_bytes", "safe_load_from_bytes"):  # torch's, and Megatron's in its place since 0.19
            return _weights_of(self._name)
        if module.split(".")[0] in ("megatron", "transformer_engine"):
            return _Recipe  # nothing of them needs to be installed here, nor is to be imported
        return super().find_class(module, name)

    def persistent_load(self, pid: Any) -> Any:
        raise UnsafeFileError(f"{self._name}: refers to {pid!r} outside")


class _Recipe:
    """Stands for a recipe or a part of one while they are looked at."""

    def __new__(cls, *_: Any) -> _Recipe:
        return super().__new__(cls)

    def __init__(self, *_: Any) -> None:
        pass


def _weights_of(name: str) -> Callable[[bytes], Any]:
    return lambda content: _load_weights_only(content, name)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
