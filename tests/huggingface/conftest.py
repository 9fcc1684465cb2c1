"""Megatron models, each built once."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest

from tests.huggingface.cases import CASES
from tests.huggingface.megatron_models import Reference, build_reference


@pytest.fixture(scope="session")
def reference() -> Callable[[str], Reference]:
    """What Megatron computes in a case of `CASES`."""
    return functools.cache(lambda case: build_reference(CASES[case]))
