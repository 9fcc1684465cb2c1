"""When Python looks for garbage: on all ranks after the same step, instead of anywhere in one.

Of itself Python looks whenever enough objects have come into being, which every operation without a CUDA graph makes
some of. A search through all of them takes a tenth of a second and more; it comes on every rank at another time, and
the others wait for that rank in their next collective.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def collected_every(interval: int) -> Iterator[Callable[[int], None]]:
    """Within it Python looks for garbage only when the function that it yields is called with the number of a step that
    `interval` divides, and not among the objects that were there before. 0: whenever Python wants, as before."""
    if not interval:
        yield lambda step: None
        return

    def end_step(step: int) -> None:
        if step % interval == 0:
            gc.collect()

    was_enabled = gc.isenabled()
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield end_step
    finally:
        gc.unfreeze()
        if was_enabled:
            gc.enable()
