"""All three space maps against a dictionary of counts, in any order of changes, commits and returns to the last one."""

from __future__ import annotations

import random
from collections import Counter
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from persistent_data.errors import InvalidArgument, NoFreeBlock, NoFreeMetadataBlock
from persistent_data.layout import ENTRIES_PER_BITMAP
from tests.support.space_maps import KINDS, Subject
from tests.support.trees import recount

if TYPE_CHECKING:
    from collections.abc import Callable

AREA = 80
"""Blocks around the border of two bitmaps on which counts are changed by hand."""
BEGIN = ENTRIES_PER_BITMAP - AREA // 2
SMALL = 40
"""Blocks of a map that is to be used up."""

offsets = st.integers(0, AREA - 1)
lengths = st.integers(0, AREA)


class SpaceMapMachine(RuleBasedStateMachine):
    """Does the same to a space map and to a dictionary.

    A large map has its counts changed in an area that allocation does not get to; of a small one blocks are allocated
    and given back until there are none.
    """

    @initialize(kind=st.sampled_from(KINDS), large=st.booleans(), cache_bytes=st.sampled_from([None, 1]))
    def begin(self, kind: str, large: bool, cache_bytes: int | None) -> None:
        self.large = large
        size = 2 * ENTRIES_PER_BITMAP if large else SMALL
        self.subject = Subject(kind, size, cache_bytes)
        self.size = size
        self.counts: Counter[int] = Counter()
        """References that are ours; the metadata map has more, to its own blocks."""
        self.committed: Counter[int] = Counter()
        self.committed_size = size

    @property
    def counts_itself(self) -> bool:
        return self.subject.kind == "metadata"

    def inc(self, begin: int, length: int) -> None:
        self.subject.start()
        self.subject.map.inc(begin, begin + length)
        self.counts.update(range(begin, begin + length))

    def dec(self, begin: int, length: int) -> None:
        self.subject.start()
        self.subject.map.dec(begin, begin + length)
        self.counts.subtract(range(begin, begin + length))

    @rule(at=offsets, length=lengths)
    def inc_range(self, at: int, length: int) -> None:
        if self.large:
            self.inc(BEGIN + at, min(length, AREA - at))

    @rule(at=offsets, length=lengths)
    def dec_range(self, at: int, length: int) -> None:
        """As far as there is a reference to each block; beyond that it is an error, and only the last commit counts."""
        if not self.large:
            return
        begin = BEGIN + at
        counted = next((i for i in range(min(length, AREA - at)) if not self.counts[begin + i]), min(length, AREA - at))
        self.dec(begin, counted)
        if not self.counts[begin + counted] and length % 8 == 0:
            self.subject.start()
            with pytest.raises(InvalidArgument):
                self.subject.map.dec(begin + counted, begin + counted + 1)
            if self.subject.can_be_reopened:
                self.go_back()

    @rule(at=offsets, count=st.sampled_from([0, 1, 2, 3, 4, 70000]))
    def set_count(self, at: int, count: int) -> None:
        if self.large:
            self.subject.start()
            self.subject.map.set_count(BEGIN + at, count)
            self.counts[BEGIN + at] = count

    @rule(nr=st.integers(1, 30))
    def new_blocks(self, nr: int) -> None:
        for _ in range(nr):
            self.subject.start()
            try:
                block = self.subject.map.new_block()
            except NoFreeMetadataBlock:
                # What it was doing is half done: only the last commit counts.
                assert self.counts_itself
                self.go_back()
                return
            except NoFreeBlock:
                assert not self.large
                assert not self.counts_itself
                free = set(range(self.size)) - set(+self.counts) - set(+self.committed)
                assert not free
                return
            assert not self.counts[block], "it was in use"
            assert not self.committed[block], "it was in use at the last commit"
            self.counts[block] = 1

    @rule(nr=st.integers(1, 30), seed=st.integers(0, 1000))
    def give_back(self, nr: int, seed: int) -> None:
        if self.large:
            return
        ours = sorted(+self.counts)
        random.Random(seed).shuffle(ours)
        for block in ours[:nr]:
            try:
                self.dec(block, 1)
            except NoFreeMetadataBlock:
                assert self.counts_itself
                self.go_back()
                return

    @rule(extra=st.sampled_from([0, 1, 30]))
    def extend(self, extra: int) -> None:
        if self.size < 100 and not (self.counts_itself and extra < 30):
            self.subject.extend(extra)
            self.size += extra

    @rule()
    def commit(self) -> None:
        try:
            self.subject.commit()
        except NoFreeMetadataBlock:
            assert self.counts_itself
            self.go_back()
            return
        self.committed = self.counts.copy()
        self.committed_size = self.size
        if self.counts_itself:
            assert self.subject.store is not None
            image = self.subject.store.image()
            own = recount(image, [], 1)
            assert image.counts("metadata") == dict(Counter(own) + self.committed)

    @rule()
    def reopen(self) -> None:
        if self.subject.can_be_reopened:
            self.commit()
            self.subject.reopen()

    def go_back(self) -> None:
        """Return to the last commit, as an abort does."""
        self.subject.reopen()
        self.counts = self.committed.copy()
        self.size = self.committed_size

    @invariant()
    def counts_agree(self) -> None:
        if not hasattr(self, "subject"):
            return
        subject = self.subject
        subject.start()
        begin, end = (BEGIN, BEGIN + AREA) if self.large else (0, self.committed_size)
        for block in range(begin, end):
            count = subject.map.get_count(block)
            if self.large or not self.counts_itself or self.counts[block]:
                assert count == self.counts[block]
            assert subject.map.more_than_one(block) == (count > 1)
        shown = self.size if subject.kind != "disk" else self.committed_size
        assert subject.map.nr_blocks == shown
        if subject.kind == "disk":
            assert subject.map.nr_free == shown - len(+self.counts)


SpaceMapMachine.TestCase.settings = settings(
    suppress_health_check=list(HealthCheck), print_blob=True, phases=set(Phase) - {Phase.explain}
)
TestSpaceMapMachine = SpaceMapMachine.TestCase


@pytest.mark.parametrize("large", [False, True], ids=["small", "large"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(max(1, settings().max_examples // 25)))
def test_a_random_walk_agrees_with_the_model(seed: int, kind: str, large: bool) -> None:
    """Longer than what hypothesis likes, with a bit of everything."""
    rng = random.Random(seed)
    machine = SpaceMapMachine()
    machine.begin(kind, large, rng.choice([None, 1]))
    steps: list[tuple[int, Callable[[], object]]] = [
        (8, lambda: machine.inc_range(rng.randrange(AREA), rng.randrange(AREA))),
        (8, lambda: machine.dec_range(rng.randrange(AREA), rng.randrange(AREA))),
        (2, lambda: machine.set_count(rng.randrange(AREA), rng.randrange(6))),
        (6, lambda: machine.new_blocks(rng.randint(1, 20))),
        (6, lambda: machine.give_back(rng.randint(1, 20), rng.randrange(1000))),
        (1, lambda: machine.extend(rng.choice([0, 1, 30]))),
        (3, machine.commit),
        (1, machine.reopen),
    ]
    weights = [weight for weight, _ in steps]
    for _ in range(120):
        rng.choices(steps, weights)[0][1]()
        machine.counts_agree()
