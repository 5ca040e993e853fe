"""The explorer of crash states: a part of what ``make test-crash`` does, and whether it finds what it should."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.crash.explorer import Effort, Failure, explore, explore_faults, smallest
from tests.crash.faults import Fault
from tests.crash.mutations import MUTATIONS, find, put_in
from tests.crash.workloads import POOLS, Workload, random_workload, use_nodes_of

if TYPE_CHECKING:
    from collections.abc import Iterator

EFFORT = Effort(samples=8, long_way=16, peer=8)


@pytest.fixture(autouse=True)
def nodes_of_usual_size() -> Iterator[None]:
    yield
    use_nodes_of("small")


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize(
    "calls",
    [
        "insert 0 7; commit",
        "snap 9 0; insert 9 7; commit; delete 9; commit",
        "provision 2 0 60; commit; remove_range 0 0 300; reopen; insert 0 1; commit",
        "hold; let_go; hold; flag; abort; insert 1 3; commit",
        "grow_metadata 16; grow_data 17000; provision 0 300 40; commit",
    ],
)
def test_every_power_cut_leaves_what_was_promised(pool: str, calls: str) -> None:
    outcome = explore(Workload.parse(f"{pool}: {calls}"), EFFORT)
    assert outcome.failure is None
    assert outcome.images > 10
    assert outcome.states > 1
    assert outcome.long_way


@pytest.mark.parametrize(
    "calls", ["insert 0 7; commit", "snap 9 0; reopen; insert 9 1; commit", "hold; let_go; commit"]
)
def test_every_fault_leaves_what_was_promised(calls: str) -> None:
    outcome = explore_faults(Workload.parse(f"small: {calls}"))
    assert outcome.failure is None
    assert outcome.faults > 20


@pytest.mark.slow
@pytest.mark.damages
@pytest.mark.parametrize("name", MUTATIONS)
def test_defects_of_the_engine_are_found(name: str) -> None:
    failure, _, _ = find(name)
    assert failure is not None


def test_failure_is_made_smaller_and_can_be_repeated() -> None:
    long = Workload.parse("small: create 9; insert 0 7; snap 5 0; commit; id 6; insert 0 500; commit")
    with put_in("superblock before the flush"):
        failure = explore(long).failure
        assert failure is not None
        short = smallest(failure)
        assert len(short.workload.calls) < len(long.calls)
        assert short.choice is not None
        assert str(short.workload) in str(short)
        assert explore(Workload.parse(str(short.workload))).failure is not None
    assert explore(short.workload).failure is None


@pytest.mark.parametrize("seed", range(20))
def test_workloads_and_faults_are_read_as_they_are_written(seed: int) -> None:
    workload = random_workload(seed)
    assert Workload.parse(str(workload)) == workload
    fault = Fault("write", seed, "torn")
    assert Fault.parse(str(fault)) == fault
    assert f"--fault '{fault}'" in str(Failure(workload, (fault,), None, "some reason"))


@pytest.mark.parametrize(
    "text", ["insert 0 7", "large: commit", "small: fly 1", "small: insert x y", "write 3", "flush 1 torn", "none"]
)
def test_what_is_no_workload_or_fault_is_refused(text: str) -> None:
    for parse in (Workload.parse, Fault.parse):
        with pytest.raises(ValueError, match=r"begin with|none of the calls|no fault"):
            parse(text)


# What was found this way


@pytest.mark.parametrize("flush", [1, 2])
@pytest.mark.parametrize(
    "calls",
    ["insert 0 7; reopen; insert 0 8; remove_range 1 0 100; commit", "remove_range 0 0 99; reopen; insert 0 8; commit"],
)
def test_reopened_after_a_failed_flush_the_older_commit_is_spared_until_the_newer_is_durable(
    calls: str, flush: int
) -> None:
    """The last flush of a close failed, and the pool was opened again: it began with the newer commit, overwrote what
    only the older one needed, and a power cut brought the older one back."""
    outcome = explore(Workload.parse(f"small: {calls}"), faults=[Fault("flush", flush, "EIO")])
    assert outcome.failure is None
    assert outcome.images > 10
