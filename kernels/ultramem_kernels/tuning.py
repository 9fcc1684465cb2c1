"""Autotuning: which of several implementations is fastest for a shape, measured once and remembered on disk.

Choices are kept in one JSON file per GPU model and set of versions, in the folder that `configure` names. A shape that
was never measured is measured where that is possible (not while a CUDA graph is being captured, not with autotuning
off); otherwise the first alternative runs, which callers order by a rule.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from ultramem_kernels.settings import settings
from ultramem_kernels.tiles import next_power_of_two
from ultramem_kernels.timing import eager_ms

VERSION = 1  # of the implementations: raise it when timings of old ones no longer hold
WARM_UP, REPEATS = 2, 5


def bucket(size: int) -> int:
    """Sizes that change from call to call (tokens) are tuned for the next power of two."""
    return next_power_of_two(size)


class Tuner:
    """Choices for one device.

    Args:
        path: file of earlier choices and of new ones; written whenever something was measured.
        time_ms: milliseconds of one call of a function.
    """

    def __init__(self, path: Path, time_ms: Callable[[Callable[[], object]], float]) -> None:
        self.path, self._time_ms = path, time_ms
        self._chosen: dict[str, str] | None = None
        self._seen: dict[tuple[object, ...], str] = {}

    def choose(
        self,
        operation: str,
        shape: tuple[object, ...],
        names: Sequence[str],
        run: Callable[[str], object],
        measure: bool,
    ) -> str:
        """The name among `names` to run: the fastest known; else, with `measure`, the fastest now; else the first.

        `run(name)` must compute with the implementation `name` and leave nothing behind.
        """
        seen = self._seen.get((operation, *shape))
        if seen is not None:
            return seen
        if self._chosen is None:
            self._chosen = _read(self.path)
        key = f"{operation} {' '.join(map(str, shape))}"
        known = self._chosen.get(key, "")
        if known in names:
            return self._seen.setdefault((operation, *shape), known)
        if not measure:
            return names[0]
        times = {name: self._time_ms(lambda name=name: run(name)) for name in names}  # type: ignore[misc]
        best = min(names, key=times.__getitem__)
        self._chosen = {**_read(self.path), **self._chosen, key: best}  # other processes may have written meanwhile
        _write(self.path, self._chosen)
        return self._seen.setdefault((operation, *shape), best)


_tuners: dict[tuple[torch.device, Path | None], Tuner] = {}


def choose(
    device: torch.device, operation: str, shape: tuple[object, ...], names: Sequence[str], run: Callable[[str], object]
) -> str:
    """`Tuner.choose` of the device, within what `configure` allows."""
    key = device, settings.cache_folder
    tuner = _tuners.get(key)
    if tuner is None:
        tuner = _tuners[key] = Tuner(settings.folder() / file_name(device), _time_ms)
    measure = settings.autotune and not torch.cuda.is_current_stream_capturing()
    return tuner.choose(operation, shape, names, run, measure)


def _time_ms(call: Callable[[], object]) -> float:
    return eager_ms(call, REPEATS, WARM_UP)


def file_name(device: torch.device) -> str:
    """Of the timings: they hold for one GPU model and one set of versions."""
    parts = (torch.cuda.get_device_name(device), f"torch-{torch.__version__}", f"v{VERSION}")
    return (
        "tuned_" + "_".join("".join(c if c.isalnum() or c in ".-" else "-" for c in part) for part in parts) + ".json"
    )


def _read(path: Path) -> dict[str, str]:
    """The choices in a file; none if it is missing or damaged."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _write(path: Path, chosen: dict[str, str]) -> None:
    """Whole or not at all; a folder that cannot be written costs a measurement in the next run, nothing else."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
            json.dump(chosen, file, indent=1, sort_keys=True)
        os.replace(file.name, path)
    except OSError:
        pass
