"""Top-k of numbers held in registers, without sorting: bisection for the k-th largest, then a stable compaction.

Numbers become int32 keys of the same order. The bisection keeps `low` with at least k keys >= low and `high` with fewer
than k keys >= high; it ends as soon as exactly k keys are >= low (with distinct numbers after about log2(n) halvings of
the gap between the maximum and a lower bound that the maxima of k groups give), or when low and high are neighbours:
then the keys equal to low are ties, of which the first in order are taken.

A row of n numbers lies in two tiles, as `tiles.cover` cuts it.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# (Triton's kernels take pointers and constants that Python's types do not describe.)
from __future__ import annotations

import triton
import triton.language as tl

SMALLEST = tl.constexpr(-(2**31))


@triton.jit
def order_key(x):
    """int32 with the order of fp32 `x`; above SMALLEST for every number."""
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def kth_largest(a, b, k, GROUPS: tl.constexpr):
    """The largest `low` with at least k keys of tiles a, b >= low (or any with exactly k). GROUPS >= k divides a."""
    maxima = tl.max(tl.reshape(a, (GROUPS, a.shape[0] // GROUPS), can_reorder=True), axis=1)
    low = tl.min(maxima, axis=0)
    high = tl.minimum(tl.maximum(tl.max(maxima, axis=0), tl.max(b, axis=0)), 2147483646) + 1
    count = tl.sum((a >= low).to(tl.int32), axis=0) + tl.sum((b >= low).to(tl.int32), axis=0)
    while (count != k) & (high > low + 1):
        middle = (low & high) + ((low ^ high) >> 1)  # the mean, without overflow
        here = tl.sum((a >= middle).to(tl.int32), axis=0) + tl.sum((b >= middle).to(tl.int32), axis=0)
        if here >= k:
            low = middle
            count = here
        else:
            high = middle
    return low


@triton.jit
def places(a, b, low, k):
    """Where each number of tiles a, b goes among the k selected, >= k if it is not selected.

    Those above `low` come first, then those equal to it, each in order of position.
    """
    # One scan counts both kinds: those above low in the lower 16 bits, those equal in the upper.
    flag_a = (a > low).to(tl.int32) + ((a == low).to(tl.int32) << 16)
    flag_b = (b > low).to(tl.int32) + ((b == low).to(tl.int32) << 16)
    total_a = tl.sum(flag_a, axis=0)
    above = (total_a + tl.sum(flag_b, axis=0)) & 0xFFFF
    scan_a = tl.cumsum(flag_a, axis=0)
    scan_b = tl.cumsum(flag_b, axis=0) + total_a
    place_a = tl.where(a > low, (scan_a & 0xFFFF) - 1, tl.where(a == low, above + (scan_a >> 16) - 1, k))
    place_b = tl.where(b > low, (scan_b & 0xFFFF) - 1, tl.where(b == low, above + (scan_b >> 16) - 1, k))
    return place_a, place_b
