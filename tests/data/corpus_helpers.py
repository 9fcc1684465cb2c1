"""What the data tests share and import by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

WritePair = Callable[[str, Sequence[str]], str]
"""write_pair(name, documents): makes a .bin/.idx/.json of byte tokens; returns its prefix."""


def random_documents(count: int, seed: int = 0, alphabet: str = "abcdefghij \n") -> list[str]:
    """Documents of 20 to 120 characters, no two alike."""
    generator = np.random.default_rng(seed)
    letters = np.array(list(alphabet))
    return [f"{i}:" + "".join(generator.choice(letters, generator.integers(20, 120))) for i in range(count)]
