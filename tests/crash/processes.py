"""Processes that are killed while they commit to a file, and whether the file says what they were promised.

A supervisor starts a child that opens a pool, makes calls by chance, and tells each call that commits over a pipe:
before it is made, with the state that it will lead to, and once it has returned.  At a random moment comes SIGKILL;
before that, in some rounds, SIGINT, after which the child aborts and goes on.  Then the file has to hold the state that
was acknowledged last, or the one in flight; it must be sound; and the next child goes on from there.

The system keeps what was written, flushed or not, when a process is killed.  So this says nothing about flushes, which
the explorer is for; it says that a process gives its writes to the system in an order that may end anywhere, that it
promises nothing too early, and that nothing which it leaves behind, locks included, is in its successor's way.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import time
from contextlib import nullcontext
from dataclasses import dataclass, field, fields
from itertools import count
from typing import TYPE_CHECKING, NamedTuple

from bufio import FileDevice, MemoryDevice
from tests.crash.mutations import put_in
from tests.crash.workloads import POOLS, Run, random_workload, use_nodes_of
from tests.support import peers
from tests.support.pools import Content, assert_sound, content_of
from thinpool import PoolMetadata

if TYPE_CHECKING:
    from collections.abc import Iterator
    from multiprocessing.connection import Connection
    from pathlib import Path

ROUNDS_OF_A_POOL = 10
"""Then there is another one: they fill up."""
_MOST_COMMITS = 12
_USUAL_DELAY = 0.002  # seconds; a call that commits takes about as long
_INTERRUPTED = 4  # one round of so many
_PATIENCE = 30.0  # seconds for whatever a child does between two messages


class _Begins(NamedTuple):
    """A call that commits is about to be made."""

    call: str
    in_flight: Content


class _Returned(NamedTuple):
    """It has come back: its state is promised."""


class _Refused(NamedTuple):
    """It has come back, and has changed nothing."""


class _Recovered(NamedTuple):
    """A call failed or was interrupted; after an abort, this is what the child goes on from."""

    content: Content
    was_interrupted: bool


class BrokenPromise(AssertionError):
    """What a killed process left behind is not what it was promised."""


@dataclass
class Tally:
    """What came of some rounds."""

    rounds: int = 0
    commits: int = 0
    """Acknowledged ones."""
    while_opening: int = 0
    while_committing: int = 0
    between_commits: int = 0
    in_flight_found: int = 0
    """Of those that were killed while they committed, how many had got there."""
    interrupts: int = 0
    peer: int = 0
    """Files that were given to the reference ``thin_check``, too."""


# The child


def _commits_of(seed: int) -> Iterator[str]:
    """Yield calls without end."""
    for number in count(seed * 1_000_000):
        yield from random_workload(number).calls


def _child(path: str, pool: str, seed: int, pipe: Connection, defect: str | None, *, flushes: bool) -> None:
    """Open a pool and change it until the end comes.

    :param flushes: wait for the disk, as a commit does; as most of the time goes there, so do most kills.  Nothing that
        can be found here depends on it, and without it they fall between two writes
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # Interrupts come only within calls of the library: this program's own code does not expect them.
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    use_nodes_of(pool)
    if not flushes:
        setattr(FileDevice, "flush", lambda device: None)  # noqa: B010
    with put_in(defect) if defect else nullcontext():
        begin = _content(path)
        run = Run(FileDevice(path, exclusive=True), begin)
        for call in _commits_of(seed):
            in_flight = run.model.in_flight(call)
            if in_flight is not None:
                pipe.send(_Begins(call, in_flight))
            was_interrupted = _make(run, call)
            if was_interrupted or run.has_failed or run.is_closed:
                if run.is_closed:
                    run.pool = PoolMetadata.open(run.device)
                else:
                    run.pool.abort()
                run.model.go_on_from(_content(path))
                pipe.send(_Recovered(run.model.content(), was_interrupted))
            elif in_flight is not None:
                pipe.send(_Returned() if run.model.published[-1] == in_flight else _Refused())


def _make(run: Run, call: str) -> bool:
    """Make a call, and say whether it was interrupted."""
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
        run.call(call)
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    except KeyboardInterrupt:
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
        return True
    return False


def _content(path: str | Path) -> Content:
    """Read a pool by other means than the engine's, without what does not show who made it."""
    with open(path, "rb") as file:
        return content_of(file.read())._replace(data_counts={})


# The supervisor


@dataclass
class _Story:
    """What a child has told so far."""

    allowed: list[Content]
    """What may be found if it is killed now: what was acknowledged last, and what is in flight."""
    tally: Tally
    call: str = ""
    """The call that commits and has not returned."""
    nr_begun: int = 0
    nr_recovered: int = 0

    def listen(self, pipe: Connection, seconds: float) -> bool:
        """Wait for a message, and take it in; False if none has come, or no more can."""
        try:
            if not pipe.poll(seconds):
                return False
            message = pipe.recv()
        except (EOFError, OSError):  # the end, or the middle of a message
            return False
        if isinstance(message, _Begins):
            self.call = message.call
            self.allowed = [self.allowed[0], message.in_flight]
            self.nr_begun += 1
        elif isinstance(message, _Returned):
            self.call = ""
            self.allowed = self.allowed[1:]
            self.tally.commits += 1
        elif isinstance(message, _Refused):
            self.call = ""
            self.allowed = self.allowed[:1]
        elif isinstance(message, _Recovered):
            if message.content not in self.allowed:
                raise BrokenPromise(
                    f"after an abort in {self.call or 'a call'} there is a state that was never committed"
                )
            self.call = ""
            self.allowed = [message.content]
            self.nr_recovered += 1
            self.tally.interrupts += message.was_interrupted
        return True


@dataclass
class Supervisor:
    """Starts children and kills them.

    :param path: where the pool is; made by :meth:`round`
    :param seed: what the children do, and when they are killed, as far as that can be told
    :param defect: put into the engine of each child, see :mod:`tests.crash.mutations`
    """

    path: Path
    seed: int = 1
    defect: str | None = None
    tally: Tally = field(default_factory=Tally)
    _expected: Content | None = None

    def __post_init__(self) -> None:
        self._processes = multiprocessing.get_context("forkserver")
        self._processes.set_forkserver_preload(["__main__", __name__])

    def round(self) -> None:
        """Start a child, kill it, and look what it has left.

        :raises BrokenPromise: that is wrong
        """
        number = self.tally.rounds
        pool = list(POOLS)[number // ROUNDS_OF_A_POOL % len(POOLS)]
        if number % ROUNDS_OF_A_POOL == 0:
            use_nodes_of(pool)
            self.path.write_bytes(POOLS[pool]())
            self._expected = _content(self.path)
        try:
            self._round(pool, number)
        except BrokenPromise as broken:
            raise BrokenPromise(f"seed {self.seed}, round {number}, pool {pool}, {self.path}: {broken}") from broken
        finally:
            use_nodes_of("small")
        self.tally.rounds += 1

    def _round(self, pool: str, number: int) -> None:
        assert self._expected is not None
        seed = self.seed * 1_000_000 + number
        dice = random.Random(seed)
        story = _Story([self._expected], self.tally)
        receiver, sender = self._processes.Pipe(duplex=False)
        child = self._processes.Process(
            target=_child,
            args=(str(self.path), pool, seed, sender, self.defect),
            kwargs={"flushes": number // ROUNDS_OF_A_POOL % 2 == 0},
            daemon=True,
        )
        child.start()
        sender.close()
        with receiver:
            try:
                self._let_it_work(child.pid, receiver, story, dice, interrupt=number % _INTERRUPTED == 1)
            finally:
                died = not child.is_alive()
                child.kill()
                child.join(_PATIENCE)
            while story.listen(receiver, 0):
                pass
        if died:
            raise BrokenPromise(
                f"the child died by itself (in {story.call or 'no call that commits'}); see its message"
            )
        self._look(pool, story)

    def _let_it_work(
        self, pid: int | None, pipe: Connection, story: _Story, dice: random.Random, *, interrupt: bool
    ) -> None:
        """Return when it is time to kill the child."""
        assert pid is not None
        if interrupt:
            self._work(pipe, story, dice)
            if not story.nr_begun:
                return
            os.kill(pid, signal.SIGINT)
            nr_recovered = story.nr_recovered
            # Not for ever: what is raised in a finalizer is lost, interrupts too, and the child has not noticed.
            for _ in range(_MOST_COMMITS):
                if story.nr_recovered > nr_recovered or not story.listen(pipe, _PATIENCE):
                    break
        self._work(pipe, story, dice)

    def _work(self, pipe: Connection, story: _Story, dice: random.Random) -> None:
        """Wait for some commits, and a moment."""
        enough = story.nr_begun + dice.randrange(_MOST_COMMITS)
        while story.nr_begun < enough and story.listen(pipe, _PATIENCE):
            pass
        time.sleep(dice.expovariate(1 / _USUAL_DELAY))

    def _look(self, pool: str, story: _Story) -> None:
        image = self.path.read_bytes()
        try:
            found = _content(self.path)
            assert found in story.allowed, f"the state is none of the {len(story.allowed)} that it may be"
            assert_sound(MemoryDevice(image))
            if self.tally.rounds % ROUNDS_OF_A_POOL == 0 and peers.is_available():
                peers.assert_accepted(image)
                self.tally.peer += 1
            with PoolMetadata.open(self.path) as opened:
                assert opened.devices().keys() == found.devices.keys(), "the engine finds other devices"
            assert _content(self.path) == found, "opening and closing it has changed something"
        except Exception as error:
            raise BrokenPromise(f"killed in {story.call or 'no call that commits'}: {error}") from error
        self._expected = found
        if story.call:
            self.tally.while_committing += 1
            self.tally.in_flight_found += found == story.allowed[-1]
        elif story.nr_begun:
            self.tally.between_commits += 1
        else:
            self.tally.while_opening += 1


def figures_of(tally: Tally) -> dict[str, int]:
    """Return what a tally says, by name."""
    return {each.name: getattr(tally, each.name) for each in fields(tally)}
