"""Every state that a power cut may leave of a workload, and whether it is the one that was promised.

After a call that commits has returned, its state is *acknowledged*: a cut from then on leaves that one or a later one.
While such a call runs it leaves that one or the one before.

What a pool is, is what can be reached from its superblock.  So an image is right if its superblock is one that is
allowed at that moment, byte for byte, and if each block that this superblock's state reaches has the bytes that it had
when that state was whole.  That is compared for **every** image, and it takes microseconds.  The state itself was read
once by two readers that share no code (our check, and ``tests.support.image``), recounted, and compared with plain
dictionaries.  To keep this honest, a share of the images goes the long way all the same: opened by the engine, read,
recounted and compared; and a share of those is given to the reference ``thin_check``.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from bufio.testing import CrashDevice
from tests.crash.faults import Fault, inject, pairs, single
from tests.crash.workloads import POOLS, Run, Workload, use_nodes_of, without_call
from tests.support import peers
from tests.support.image import BLOCK, Image
from tests.support.pools import Content, assert_sound, content_of
from thinpool import PoolMetadata, ThinError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from bufio.testing import CrashImage

Result = TypeVar("Result")

SECTOR = 512
_SECTORS_PER_BLOCK = BLOCK // SECTOR


class Effort(NamedTuple):
    """How much to try, see :meth:`bufio.testing.CrashDevice.images`; and which share of it goes which way."""

    exhaustive: int = 12
    samples: int = 64
    long_way: int = 256
    """One image of so many goes the long way."""
    peer: int = 64
    """One image of so many of those is given to the reference ``thin_check``; 0 for none."""


EFFORT = Effort()
FEW_IMAGES = Effort(exhaustive=3, samples=3, long_way=64, peer=0)
"""For workloads that are run again and again, each time with another fault."""


@dataclass
class Outcome:
    """What exploring a workload came to."""

    images: int = 0
    states: int = 0
    """Different contents of pools among them."""
    long_way: int = 0
    peer: int = 0
    faults: int = 0
    failure: Failure | None = None

    def add(self, other: Outcome) -> None:
        """Take in what exploring something else came to."""
        self.images += other.images
        self.states += other.states
        self.long_way += other.long_way
        self.peer += other.peer
        self.faults += other.faults
        self.failure = self.failure or other.failure


@dataclass(frozen=True)
class Failure:
    """A promise that was broken."""

    workload: Workload
    faults: tuple[Fault, ...]
    choice: str | None
    """The image, as :meth:`bufio.testing.CrashDevice.image` takes it; None if it needed no power cut."""
    reason: str

    def __str__(self) -> str:
        command = f"python -m tests.crash replay '{self.workload}'"
        for fault in self.faults:
            command += f" --fault '{fault}'"
        if self.choice is not None:
            command += f" '{self.choice}'"
        return f"{self.workload}\n  {self.reason}\n  again with: {command}"


class BrokenPromise(AssertionError):
    """A state that should not be; says why."""


@dataclass(frozen=True, eq=False)
class _State:
    """A state that a workload has put on the device."""

    content: Content
    sectors: dict[int, bytes]
    """Every sector of every block that it reaches, the superblock's included."""


class Explorer:
    """One workload: what it did, and what may be left of it.

    :param faults: what goes wrong meanwhile
    :raises BrokenPromise: it went wrong without any power cut
    """

    def __init__(self, workload: Workload, faults: Sequence[Fault] = ()) -> None:
        begin = _base(workload.pool)
        use_nodes_of(workload.pool)
        self.workload = workload
        self._faults = faults
        self.device = CrashDevice(begin)
        self._state = _State(_plain(content_of(begin)), _reached(begin))
        self._allowed: list[tuple[int, tuple[_State, ...]]] = [(0, (self._state,))]
        """From which position of the trace on which states may be found, the oldest first."""
        self._wrong_when_durable: dict[int, tuple[bytes, frozenset[int]]] = {}
        self.calls: Counter[str] = Counter()
        """Calls of the device, and allocations of memory, by kind."""
        with inject(self.device, faults, self.calls) as device:
            run = _insist(lambda: Run(device, self._state.content), faults)
            for number, call in enumerate(workload.calls):
                self._call(run, call, number)
            if faults:
                self._call(run, "commit", len(workload.calls))

    def _call(self, run: Run, call: str, number: int) -> None:
        before = self.device.position
        nr_published = len(run.model.published)
        error = run.call(call)
        written = self.device.position > before
        for content in run.model.published[nr_published:]:
            if not written:
                # Nothing was to be done, so nothing is promised beyond what was.
                _require_content(self.device.contents(), content)
                continue
            self.device.mark(f"{call} (call {number})")
            self._acknowledge(content, before)
        if run.has_failed or run.is_closed:
            self._recover(run, call, before)
        elif error is not None and call in ("flag", "unflag"):
            self._doubt_flags(run, call, before)

    def _acknowledge(self, expected: Content, before: int) -> None:
        """Take down a state whose call has returned, and see that it is what the model says.

        :param before: the position when that call began: from then on it may be found, if not yet for certain
        """
        contents = self.device.contents()
        _require_content(contents, expected)
        new = _State(expected, _reached(contents))
        self._allowed.append((before + 1, (*self._allowed[-1][1], new)))
        self._allowed.append((self.device.position, (new,)))
        self._state = new

    def _recover(self, run: Run, call: str, before: int) -> None:
        """Go on after a call that failed: nothing may be changed before an abort, and that leads to a whole state."""
        in_flight = run.model.in_flight(call)
        contents = self.device.contents()
        found = _plain(content_of(contents))
        state = self._state
        # Two states may have the same content.
        if contents[:SECTOR] != state.sectors[0]:
            if found != in_flight:
                raise BrokenPromise(f"{call} failed, and left neither the state before nor the one after")
            state = _State(found, _reached(contents))
            self._allowed.append((before + 1, (*self._allowed[-1][1], state)))
        closed = run.is_closed
        if closed:
            run.pool = self._reopened(run)
        else:
            for change in (lambda: run.pool.create_thin(99), run.pool.alloc_data_block, run.pool.commit):
                try:
                    change()
                except ThinError:
                    continue
                raise BrokenPromise(f"{call} failed, and something could be changed before an abort")
            closed = self._abort(run)
        contents = self.device.contents()
        _require_content(contents, state.content)
        if state is not self._state and not closed:
            # Which one it is has been settled, unless the pool was closed: what is read back need not be durable.
            self._allowed.append((self.device.position, (state,)))
        self._state = state
        run.model.go_on_from(state.content)

    def _doubt_flags(self, run: Run, call: str, before: int) -> None:
        """Expect either state of the flags: they may be on the device although the call has failed."""
        contents = self.device.contents()
        in_flight = run.model.in_flight(call)
        if contents[:SECTOR] == self._state.sectors[0]:
            return
        if in_flight is None or _plain(content_of(contents)) != in_flight:
            raise BrokenPromise(f"{call} failed, and changed more than the flags")
        self._state = _State(in_flight, _reached(contents))
        self._allowed.append((before + 1, (*self._allowed[-1][1], self._state)))
        run.model.published.append(in_flight)

    def _reopened(self, run: Run) -> PoolMetadata:
        return _insist(lambda: PoolMetadata.open(run.device), self._faults)

    def _abort(self, run: Run) -> bool:
        """Abort, and say whether the pool had to be closed for it."""
        try:
            _insist(run.pool.abort, self._faults)
        except ThinError:
            # The abort could not open the last commit again, which leaves only this.
            run.pool.close()
            run.pool = self._reopened(run)
            return True
        return False

    def images(self, effort: Effort, seed: int = 0) -> Iterator[CrashImage]:
        """Yield what power cuts may leave."""
        return self.device.images(exhaustive=effort.exhaustive, samples=effort.samples, seed=seed)

    def allowed(self, image: CrashImage) -> tuple[_State, ...]:
        """Return the states that may be found in *image*, the oldest first."""
        return next(states for begin, states in reversed(self._allowed) if begin <= image.position)

    def require_promise(self, image: CrashImage) -> _State:
        """Find out which state *image* holds, and that all of it is there.

        :raises BrokenPromise: it is none that is allowed, or not whole
        """
        allowed = self.allowed(image)
        superblock = image.changed.get(0) or image.durable[:SECTOR]
        holding = [state for state in allowed if state.sectors[0] == superblock]
        for state in holding:
            if self._is_whole(image, state):
                return state
        if holding:
            raise BrokenPromise(f"{image}: the state of its superblock is not whole: {self._explain(image)}")
        raise BrokenPromise(f"{image}: the superblock is of none of the {len(allowed)} states allowed here")

    def _is_whole(self, image: CrashImage, state: _State) -> bool:
        reached = state.sectors
        missing = self._wrong_sectors(image.durable, state)
        mended = 0
        for sector, data in image.changed.items():
            wanted = reached.get(sector)
            if wanted is None:
                continue
            if data != wanted:
                return False
            mended += sector in missing
        return mended == len(missing)

    def _wrong_sectors(self, durable: bytes, state: _State) -> frozenset[int]:
        """Return the sectors of *state* that are not what they should be in what is durable for certain."""
        known = self._wrong_when_durable.get(id(state))
        if known is None or known[0] is not durable:
            wrong = frozenset(
                sector
                for sector, data in state.sectors.items()
                if durable[sector * SECTOR : (sector + 1) * SECTOR] != data
            )
            known = self._wrong_when_durable[id(state)] = durable, wrong
        return known[1]

    def _explain(self, image: CrashImage) -> str:
        try:
            content_of(image.contents())
            assert_sound(image.device())
        except Exception as error:
            return str(error).split("\n", 1)[0] or repr(error)
        return "blocks differ from those of the commit, though they are sound"

    def require_the_long_way(self, image: CrashImage, state: _State, *, peer: bool) -> None:
        """Open, read, recount and compare *image*, which holds *state*.

        :raises BrokenPromise: something is not as it should be
        """
        contents = image.contents()
        try:
            with PoolMetadata.open(image.device(), read_only=True) as pool:
                assert pool.devices().keys() == state.content.devices.keys(), "the engine finds other devices"
            assert_sound(image.device())
            _require_content(contents, state.content)
            if peer:
                peers.assert_accepted(contents)
        except Exception as error:
            raise BrokenPromise(f"{image}: {error}") from error


def explore(workload: Workload, effort: Effort = EFFORT, seed: int = 0, faults: Sequence[Fault] = ()) -> Outcome:
    """Try every image of *workload*; the first that breaks a promise ends it."""
    outcome = Outcome()
    try:
        explorer = Explorer(workload, faults)
    except Exception as error:
        reason = str(error).split("\n", 1)[0] or repr(error)
        outcome.failure = Failure(workload, tuple(faults), None, f"{type(error).__name__}: {reason}")
        return outcome
    found: set[int] = set()
    image = None
    try:
        for image in explorer.images(effort, seed):
            outcome.images += 1
            state = explorer.require_promise(image)
            found.add(id(state))
            # By its bytes, so that which images go the long way does not depend on the order.
            key = image.digest + 1
            if not key % effort.long_way:
                outcome.long_way += 1
                peer = bool(effort.peer) and not key // effort.long_way % effort.peer
                outcome.peer += peer
                explorer.require_the_long_way(image, state, peer=peer)
    except BrokenPromise as broken:
        outcome.failure = Failure(workload, tuple(faults), image.choice if image else None, str(broken))
    outcome.states = len(found)
    return outcome


def explore_faults(
    workload: Workload, effort: Effort = FEW_IMAGES, seed: int = 0, *, by_pairs: bool = False
) -> Outcome:
    """As :func:`explore`, for each fault that *workload* can meet; and *by_pairs*, for each two of them."""
    total = Outcome()
    calls = Explorer(workload).calls
    each: Iterable[tuple[Fault, ...]] = ((fault,) for fault in single(calls))
    for faults in chain(each, pairs(calls)) if by_pairs else each:
        outcome = explore(workload, effort, seed, faults)
        total.add(outcome)
        total.faults += 1
        if outcome.failure is not None:
            break
    return total


def smallest(failure: Failure, effort: Effort = EFFORT, seed: int = 0) -> Failure:
    """Leave out calls as long as what is left fails, too."""
    at = len(failure.workload.calls) - 1
    while at >= 0:
        shorter = explore(without_call(failure.workload, at), effort, seed, failure.faults).failure
        if shorter is not None:
            failure = shorter
        at -= 1
    return failure


def _insist(call: Callable[[], Result], faults: Sequence[Fault]) -> Result:
    """Call again as long as a fault may be what was in the way: each goes wrong once."""
    for _ in faults:
        try:
            return call()
        except (ThinError, MemoryError):
            continue
    return call()


_bases: dict[str, bytes] = {}


def _base(pool: str) -> bytes:
    if pool not in _bases:
        use_nodes_of(pool)
        _bases[pool] = POOLS[pool]()
    return _bases[pool]


def make_pools() -> None:
    """Make every pool that a workload may begin with, unless that was done before."""
    for pool in POOLS:
        _base(pool)


def _plain(content: Content) -> Content:
    return content._replace(data_counts={})


def _require_content(contents: bytes, expected: Content) -> None:
    found = _plain(content_of(contents))
    for name in Content._fields:
        if getattr(found, name) != getattr(expected, name):
            raise BrokenPromise(f"{name} is {getattr(found, name)} instead of {getattr(expected, name)}")


def _reached(contents: bytes) -> dict[int, bytes]:
    """Every sector of every block that can be reached from the superblock, which is sound."""
    image = Image.from_bytes(contents)
    metadata, _ = image.recount()
    if image.counts("metadata") != metadata:
        raise BrokenPromise("the counts of the metadata space map are not what a recount gives")
    sectors = {}
    for block in metadata:
        first = block * _SECTORS_PER_BLOCK
        for sector in range(first, first + _SECTORS_PER_BLOCK):
            sectors[sector] = contents[sector * SECTOR : (sector + 1) * SECTOR]
    return sectors
