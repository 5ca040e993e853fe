"""Memory for buffers, and the process-wide parameters."""

from __future__ import annotations

import pytest

from bufio.memory import Parameters, Slab


def test_slab_gives_each_taker_memory_of_its_own() -> None:
    slab = Slab(4096)
    views = [slab.take() for _ in range(600)]
    for at, view in enumerate(views):
        view[:] = at.to_bytes(2, "little") * 2048
    assert all(view == at.to_bytes(2, "little") * 2048 for at, view in enumerate(views))
    for view in views[::2]:
        slab.give_back(view)
    again = [slab.take() for _ in range(300)]
    kept = views[1::2]
    for view in again:
        view[:] = bytes(4096)
    assert all(view == (2 * at + 1).to_bytes(2, "little") * 2048 for at, view in enumerate(kept))


def test_limit_is_divided_among_those_who_share_it() -> None:
    class Sharer:
        def __init__(self) -> None:
            self.told = 0

        def limit_changed(self) -> None:
            self.told += 1

        def evict_old(self, now: float) -> None:
            pytest.fail("nobody asked for it")

    parameters = Parameters()
    parameters.max_cache_size_bytes = 1000
    one, two = Sharer(), Sharer()
    parameters.join(one)
    assert parameters.share_bytes() == 1000
    parameters.join(two)
    assert parameters.share_bytes() == 500
    assert one.told == 2
    parameters.max_cache_size_bytes = 600
    assert (parameters.share_bytes(), one.told, two.told) == (300, 3, 2)
    parameters.leave(two)
    assert parameters.share_bytes() == 600
    assert one.told == 4


@pytest.mark.parametrize("size", [0, -1])
def test_limit_has_to_be_positive(size: int) -> None:
    with pytest.raises(ValueError, match=str(size)):
        Parameters().max_cache_size_bytes = size


def test_account_knows_its_peak() -> None:
    parameters = Parameters()
    parameters.account(500)
    parameters.account(-200)
    assert (parameters.current_allocated_bytes, parameters.peak_allocated_bytes) == (300, 500)
