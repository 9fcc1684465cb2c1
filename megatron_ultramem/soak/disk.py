"""A disk that can be full: a small tmpfs."""

from __future__ import annotations

import errno
import os
import subprocess
import time
from pathlib import Path

FILLER = "filler"
BLOCK = bytes(2**16)


class SmallDisk:
    """A tmpfs of `mib` MiB, mounted at `folder` within the context; OSError where mounting is not allowed."""

    def __init__(self, folder: Path, mib: int) -> None:
        self.folder, self.mib = folder, mib

    def __enter__(self) -> SmallDisk:
        self.folder.mkdir(parents=True, exist_ok=True)
        command = ["mount", "-t", "tmpfs", "-o", f"size={self.mib}m", "tmpfs", str(self.folder)]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True)
        except subprocess.CalledProcessError as error:
            raise OSError(errno.EPERM, error.stderr.strip()) from error
        return self

    def __exit__(self, *_: object) -> None:
        subprocess.run(["umount", "--lazy", str(self.folder)], check=True)

    def fill(self, seconds: float) -> None:
        """Leaves no room on the disk for so long, whatever is deleted meanwhile."""
        path, until = self.folder / FILLER, time.monotonic() + seconds
        try:
            with open(path, "wb", buffering=0) as file:
                while time.monotonic() < until:
                    try:
                        file.write(BLOCK)
                    except OSError as error:
                        if error.errno != errno.ENOSPC:
                            raise
                        time.sleep(0.02)
        finally:
            os.unlink(path)
