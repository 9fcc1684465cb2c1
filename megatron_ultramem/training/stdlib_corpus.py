"""Real text that every machine has: the Python standard library's own sources, of the interpreter in use."""

from __future__ import annotations

import random
import sysconfig
from pathlib import Path

from megatron_ultramem.errors import DataError

# Tests are huge tables and odd encodings on purpose; the others are not the standard library, or no source text.
SKIPPED_FOLDERS = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idle_test", "lib2to3", "__pycache__", "lib-dynload"}
)


def stdlib_files(seed: int = 1234) -> list[Path]:
    """The .py files of the standard library, without tests and whatever is not UTF-8, in a shuffled order.

    The order depends on the names and `seed` alone. It is shuffled so that a split by position does not make
    the end of the alphabet the validation set.

    Raises DataError when this interpreter comes without sources.
    """
    root = Path(sysconfig.get_path("stdlib"))
    files = sorted(path for path in root.rglob("*.py") if not SKIPPED_FOLDERS & set(path.relative_to(root).parts))
    files = [path for path in files if _is_utf8(path)]
    if not files:
        raise DataError(f"the standard library of this interpreter has no readable .py files in {root}")
    random.Random(seed).shuffle(files)
    return files


def _is_utf8(path: Path) -> bool:
    try:
        path.read_bytes().decode()
    except (UnicodeDecodeError, OSError):
        return False
    return True
