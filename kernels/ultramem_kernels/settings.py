"""What a process may set about the kernels, once, before it uses them: `configure`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass
class Settings:
    """
    Attributes:
        autotune: whether implementations may be timed for shapes that the cache does not know; else rules choose.
        cache_folder: where compiled kernels and the results of autotuning are kept.
    """

    autotune: bool = True
    cache_folder: Path | None = None

    def folder(self) -> Path:
        """`cache_folder`, by default ~/.cache/ultramem_kernels."""
        return self.cache_folder or Path.home() / ".cache" / "ultramem_kernels"


settings = Settings()


def configure(*, autotune: bool | None = None, cache_folder: Path | str | None = None) -> None:
    """Changes the settings given for this process.

    autotune      time alternatives once per shape (the default) or choose by fixed rules. Calls with
                  `deterministic=True` never time anything and never read timings
    cache_folder  a folder; it is made when something is first written to it
    """
    if autotune is not None:
        settings.autotune = autotune
    if cache_folder is not None:
        settings.cache_folder = Path(cache_folder)
