"""The comparison of two devices, worked out thin block by thin block from an independent reader of the image."""

from __future__ import annotations

from itertools import combinations
from typing import TYPE_CHECKING

from thinpool.differences import Difference

if TYPE_CHECKING:
    from collections.abc import Mapping

Mappings = dict[int, tuple[int, int]]
MAX_PAIRS = 12


def kind_of(left: int | None, right: int | None) -> str:
    if right is None:
        return "left_only"
    if left is None:
        return "right_only"
    return "same" if left == right else "different"


def expected(left: Mapping[int, tuple[int, int]], right: Mapping[int, tuple[int, int]]) -> list[Difference]:
    """The comparison, thin block by thin block."""
    found: list[Difference] = []
    for thin in sorted({*left, *right}):
        a, b = left[thin][0] if thin in left else None, right[thin][0] if thin in right else None
        new = (kind_of(a, b), thin, a, b)
        if found:
            last = found[-1]
            n = last.length
            after = (
                last.kind,
                last.thin_begin + n,
                None if last.left_data_begin is None else last.left_data_begin + n,
                None if last.right_data_begin is None else last.right_data_begin + n,
            )
            if after == new:
                found[-1] = last._replace(length=n + 1)
                continue
        found.append(Difference(new[0], thin, 1, a, b))
    return found


def pairs_of(devices: Mapping[int, Mappings]) -> list[tuple[int, int]]:
    """The first device with itself, and some pairs from near and far."""
    ids = sorted(devices)
    pairs = list(combinations(ids, 2))
    return [(ids[0], ids[0]), *pairs[:: max(1, len(pairs) // MAX_PAIRS)]]
