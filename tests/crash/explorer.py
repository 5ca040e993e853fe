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

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from bufio.testing import CrashDevice
from tests.crash.workloads import POOLS, Run, Workload, use_nodes_of, without_call
from tests.support import peers
from tests.support.image import BLOCK, Image
from tests.support.pools import Content, assert_sound, content_of
from thinpool import PoolMetadata

if TYPE_CHECKING:
    from collections.abc import Iterator

    from bufio.testing import CrashImage

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


@dataclass
class Outcome:
    """What exploring a workload came to."""

    images: int = 0
    states: int = 0
    """Different contents of pools among them."""
    long_way: int = 0
    peer: int = 0
    failure: Failure | None = None


@dataclass(frozen=True)
class Failure:
    """A promise that was broken."""

    workload: Workload
    choice: str | None
    """The image, as :meth:`bufio.testing.CrashDevice.image` takes it; None if it needed no power cut."""
    reason: str

    def __str__(self) -> str:
        command = f"python -m tests.crash replay '{self.workload}'"
        if self.choice is not None:
            command += f" '{self.choice}'"
        return f"{self.workload}\n  {self.reason}\n  again with: {command}"


class BrokenPromise(AssertionError):
    """A state that should not be; says why."""


@dataclass
class _State:
    """A state that a workload has put on the device."""

    content: Content
    begun: int
    """Position of the trace when the call began that published it: from there on it may be found."""
    acknowledged: int
    """And when that call had returned: from there on nothing older may be."""
    sectors: dict[int, bytes] = field(default_factory=dict)
    """Every sector of every block that it reaches, the superblock's included."""


class Explorer:
    """One workload: what it did, and what may be left of it.

    :raises BrokenPromise: it went wrong without any power cut
    """

    def __init__(self, workload: Workload) -> None:
        begin = _base(workload.pool)
        use_nodes_of(workload.pool)
        self.workload = workload
        self.device = CrashDevice(begin)
        content = _plain(content_of(begin))
        self.states = [_State(content, 0, 0, _reached(begin))]
        self._wrong_when_durable: dict[int, tuple[bytes, frozenset[int]]] = {}
        run = Run(self.device, content)
        for number, call in enumerate(workload.calls):
            before = self.device.position
            run.call(call)
            published = run.model.published[len(self.states) :]
            for new in published:
                self.device.mark(f"state {len(self.states)}, call {number}: {call}")
                self._note(new, before)

    def _note(self, expected: Content, begun: int) -> None:
        """Take down a state that was just acknowledged, and see that it is what the model says."""
        contents = self.device.contents()
        _require_content(contents, expected)
        self.states.append(_State(expected, begun, self.device.position, _reached(contents)))

    def images(self, effort: Effort, seed: int = 0) -> Iterator[CrashImage]:
        """Yield what power cuts may leave."""
        return self.device.images(exhaustive=effort.exhaustive, samples=effort.samples, seed=seed)

    def allowed(self, image: CrashImage) -> list[_State]:
        """Return the states that may be found in *image*, the oldest first."""
        position = image.position
        last = max(n for n, state in enumerate(self.states) if state.acknowledged <= position)
        begun = [state for state in self.states[last + 1 :] if state.begun < position]
        return [self.states[last], *begun]

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


def explore(workload: Workload, effort: Effort = EFFORT, seed: int = 0) -> Outcome:
    """Try every image of *workload*; the first that breaks a promise ends it."""
    outcome = Outcome()
    try:
        explorer = Explorer(workload)
    except Exception as error:
        outcome.failure = Failure(workload, None, str(error).split("\n", 1)[0] or repr(error))
        return outcome
    found: set[int] = set()
    image = None
    try:
        for image in explorer.images(effort, seed):
            outcome.images += 1
            state = explorer.require_promise(image)
            found.add(id(state))
            # By its bytes, so that which images go the long way does not depend on the order.
            if not image.digest % effort.long_way:
                outcome.long_way += 1
                peer = bool(effort.peer) and not image.digest // effort.long_way % effort.peer
                outcome.peer += peer
                explorer.require_the_long_way(image, state, peer=peer)
    except BrokenPromise as broken:
        outcome.failure = Failure(workload, image.choice if image else None, str(broken))
    outcome.states = len(found)
    return outcome


def smallest(failure: Failure, effort: Effort = EFFORT, seed: int = 0) -> Failure:
    """Leave out calls as long as what is left fails, too."""
    at = len(failure.workload.calls) - 1
    while at >= 0:
        shorter = explore(without_call(failure.workload, at), effort, seed).failure
        if shorter is not None:
            failure = shorter
        at -= 1
    return failure


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
