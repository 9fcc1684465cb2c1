"""How tests share GPUs when pytest-xdist runs several at once (`make test-gpu`): which stay in one process, which GPU a
process takes first, who begins first and who waits for whom."""

from __future__ import annotations

import fcntl
import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import inf
from pathlib import Path
from typing import Any

import pytest

WORKER = "PYTEST_XDIST_WORKER"  # gw0, gw1, ... in the processes of pytest-xdist
PROCESSES = "PYTEST_XDIST_WORKER_COUNT"  # how many of them there are
USUAL_SECONDS = 3.0  # of a test that does not say
GROUPS = pytest.StashKey[Path]()  # the file in which they tell their parent the groups of tests


def prepare_process() -> None:
    """One of several processes: one thread each, and every one begins to count the GPUs at another one."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if gpus := _visible_gpus():
        first = int(os.environ[WORKER].removeprefix("gw")) % len(gpus)
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(gpus[first:] + gpus[:first])


def group_of(item: pytest.Item) -> str | None:
    """Tests of one group run in one process, one after the other: those that take much memory; those of a file that
    share what a fixture computes once for it; and those of a file on two GPUs. None: a test that may run anywhere."""
    if item.get_closest_marker("large"):
        return "large"
    if item.get_closest_marker("two_gpus"):
        return f"two_gpus {item.path.stem}"
    found = getattr(item, "_fixtureinfo", None)
    fixtures = found.name2fixturedefs.values() if found else ()
    shared = any(definition.scope == "module" for definitions in fixtures for definition in definitions)
    return item.path.stem if shared else None


def longest_first(items: Sequence[pytest.Item], processes: int) -> list[pytest.Item]:
    """The same tests, those of a group together, from the longest group to the shortest; at the end those that run
    alone, because they wait until nothing else is left.

    Each of several processes is dealt a second group at once where its first has no more than two tests, and keeps it
    back until that is done: behind the first, which are the longest, wait the shortest."""
    seconds: dict[str, float] = {}
    tests: dict[str, int] = {}
    for item in items:
        marker = item.get_closest_marker("seconds")
        own = marker.args[0] if marker else USUAL_SECONDS
        name = group_of(item) or item.nodeid
        seconds[name] = seconds.get(name, 0) + (-inf if item.get_closest_marker("alone") else own)
        tests[name] = tests.get(name, 0) + 1
    names = sorted(seconds, key=lambda name: (-seconds[name], name))
    others = [name for name in names if seconds[name] > -inf]
    first, rest = others[:processes], others[processes:]
    if behind := rest[::-1][: sum(tests[name] <= 2 for name in first)]:
        names = [*first, *behind, *rest[: -len(behind)], *names[len(others) :]]
    place = {name: number for number, name in enumerate(names)}
    return sorted(items, key=lambda item: place[group_of(item) or item.nodeid])


def tell_groups(items: Sequence[pytest.Item], path: Path) -> None:
    """Writes the group of each test; processes that write at the same time write the same."""
    groups = {item.nodeid: group for item in items if (group := group_of(item))}
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
        json.dump(groups, file)
    os.replace(file.name, path)


def scheduler(config: pytest.Config, log: Any) -> Any:
    """Of pytest-xdist: deals groups and single tests in the order in which they were collected (`longest_first`). Its
    own `loadgroup` reads groups from the names of tests, which it cannot change under pytest 9.2."""
    from xdist.scheduler import LoadScopeScheduling

    class Groups(LoadScopeScheduling):
        def schedule(self) -> None:
            self.groups = json.loads(config.stash[GROUPS].read_text())
            config.option.loadscopereorder = False  # by the number of their tests
            super().schedule()

        def _split_scope(self, nodeid: str) -> str:
            return str(self.groups.get(nodeid, nodeid))

    return Groups(config, log)


@contextmanager
def in_turn(*, alone: bool) -> Iterator[None]:
    """Many at a time, over all processes of this user that use the same GPUs; or, `alone`, none beside this one. Who
    wants to be alone waits until nobody else has anything to do: shut out, all others would wait for the longest."""
    gpus = "_".join(sorted(_visible_gpus()))
    path = Path(tempfile.gettempdir()) / f"ultramem_tests_{os.getuid()}_gpus_{gpus}.lock"
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        try:
            yield
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)  # not left to closing: a child may have inherited the file


def _visible_gpus() -> list[str]:
    import torch

    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",") if visible else [str(gpu) for gpu in range(torch.cuda.device_count())]
