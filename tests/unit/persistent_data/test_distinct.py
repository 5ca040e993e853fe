"""The different numbers in an array, against numpy.unique, and without what that loads."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from persistent_data.distinct import Distinct


@given(st.lists(st.integers(-5, 5)))
def test_it_is_what_numpy_says(numbers: list[int]) -> None:
    array = np.array(numbers, np.int64)
    found = Distinct(array)
    values, first, places, counts = np.unique(array, return_index=True, return_inverse=True, return_counts=True)
    assert found.values.tolist() == values.tolist()
    assert found.first.tolist() == first.tolist()
    assert found.places.tolist() == places.tolist()
    assert found.counts.tolist() == counts.tolist()


def test_masked_arrays_are_not_loaded() -> None:
    program = (
        "import sys, numpy; from persistent_data.distinct import Distinct; Distinct(numpy.arange(3)); "
        "print('numpy.ma' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
