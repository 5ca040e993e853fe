"""The different numbers in an array.  As numpy.unique, which cannot be used without loading numpy.ma: 15 ms."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray


class Distinct:
    """What *numbers* has, once each.

    :ivar values: ascending
    :ivar first: for each of them where it is first
    :ivar counts: for each of them how often it is there
    :ivar places: for each of *numbers* its place in *values*
    """

    def __init__(self, numbers: NDArray[Any]) -> None:
        order = np.argsort(numbers, kind="stable")
        ordered = numbers[order]
        is_new = np.ones(len(numbers), np.bool_)
        is_new[1:] = ordered[1:] != ordered[:-1]
        begins = np.flatnonzero(is_new)
        self.values = ordered[begins]
        self.first = order[begins]
        self.counts = np.diff(begins, append=len(numbers))
        self.places = np.empty(len(numbers), np.int64)
        self.places[order] = np.cumsum(is_new) - 1
