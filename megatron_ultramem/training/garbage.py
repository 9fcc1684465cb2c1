"""Python's garbage collection: on all ranks after the same step, instead of anywhere in one.

Of itself Python looks for garbage whenever enough objects have come into being, which every operation without a CUDA
graph makes some of. A search through all of them comes on every rank at another time, and the others wait for that rank
in their next collective.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def collected_every(interval: int) -> Iterator[Callable[[int], None]]:
    """Within it Python looks for garbage by itself only when the function that it yields is called with the number of a
    step that `interval` divides, and not among the objects that were there before. 0: whenever Python wants."""
    if not interval:
        yield lambda step: None
        return

    def end_step(step: int) -> None:
        if step % interval == 0:
            gc.collect()

    was_enabled, frozen_before = gc.isenabled(), gc.get_freeze_count() > 0
    gc.collect()
    if not frozen_before:
        gc.freeze()
    gc.disable()
    try:
        yield end_step
    finally:
        if not frozen_before:
            gc.unfreeze()
        if was_enabled:
            gc.enable()
