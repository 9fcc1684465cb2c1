"""The shuffle permutation and the way from grid indices to physical rows."""

from __future__ import annotations

import torch

from megatron_ultramem.memory.shuffle import checksum, physical_rows, shuffle_permutation


def test_it_is_a_permutation_in_the_smallest_dtype() -> None:
    permutation = shuffle_permutation(1000, seed=1, pool=0, layer=0)
    assert permutation.dtype == torch.int32
    assert torch.equal(permutation.sort().values, torch.arange(1000, dtype=torch.int32))


def test_it_is_a_function_of_seed_pool_and_layer() -> None:
    torch.manual_seed(0)
    first = shuffle_permutation(500, seed=1, pool=2, layer=3)
    torch.manual_seed(1)
    assert torch.equal(first, shuffle_permutation(500, seed=1, pool=2, layer=3))
    others = [(2, 2, 3), (1, 3, 3), (1, 2, 4)]
    assert not any(torch.equal(first, shuffle_permutation(500, seed=s, pool=p, layer=n)) for s, p, n in others)


def test_checksum_tells_permutations_apart_but_not_dtypes() -> None:
    first, second = (shuffle_permutation(500, seed=seed, pool=0, layer=0) for seed in (1, 2))
    assert checksum(first) == checksum(first.to(torch.int64)) != checksum(second)
    assert len(checksum(first)) == 16


def test_physical_rows_follow_the_definition() -> None:
    permutation = torch.tensor([2, 0, 3, 1], dtype=torch.int32)
    indices = torch.tensor([[0, 1], [2, 3]])
    assert physical_rows(indices, permutation, row_offset=3, rows=5).tolist() == [[0, 3], [1, 4]]
    assert physical_rows(indices, None, row_offset=3, rows=5).tolist() == [[3, 4], [0, 1]]
    assert physical_rows(indices, permutation, row_offset=0, rows=5).dtype == torch.int64
