"""What may go wrong while the power stays on: calls of the device that fail, and memory that cannot be had."""

from __future__ import annotations

import errno
from contextlib import contextmanager
from itertools import combinations
from typing import TYPE_CHECKING, NamedTuple

import pytest

from bufio.memory import Slab
from bufio.testing import FaultyDevice

if TYPE_CHECKING:
    from collections import Counter
    from collections.abc import Callable, Iterator, Sequence

    from bufio.device import Device
    from bufio.testing import CrashDevice

HOW = {
    "read": ("EIO", "short"),
    "write": ("EIO", "ENOSPC", "torn", "done"),
    "flush": ("EIO",),
    "memory": ("none",),
}
"""What can happen to a call: it fails before anything is done; it transfers less than it should, and has to be called
again; half of it is done before it fails; all of it is done, and it fails."""


class Fault(NamedTuple):
    """The call with that number, counted from 0, of those of its kind does not do what it should, once."""

    kind: str
    number: int
    how: str

    def __str__(self) -> str:
        return f"{self.kind} {self.number} {self.how}"

    @classmethod
    def parse(cls, text: str) -> Fault:
        """Read what :meth:`__str__` writes.

        :raises ValueError: it is not that
        """
        words = text.split()
        if len(words) != 3 or words[2] not in HOW.get(words[0], ()) or not words[1].isdecimal():
            raise ValueError(f"{text!r} is no fault, such as 'write 3 torn'")
        return cls(words[0], int(words[1]), words[2])


@contextmanager
def inject(crash_device: CrashDevice, faults: Sequence[Fault], calls: Counter[str]) -> Iterator[Device]:
    """Give a device with *faults* in front of *crash_device*, which goes on recording what reaches it.

    :param calls: counts the calls of each kind
    """
    device = FaultyDevice(crash_device)

    def counter(kind: str) -> Callable[[object], None]:
        def note(_call: object) -> None:
            calls[kind] += 1

        return note

    device.on("read").call(counter("read"))
    device.on("write").call(counter("write"))
    device.on("flush").call(counter("flush"))
    # This one knows that what came before it is in doubt for ever.
    crash_device.fail_flushes(*(fault.number for fault in faults if fault.kind == "flush"))
    for kind, number, how in faults:
        if kind not in ("read", "write"):
            continue
        selection = device.on("read" if kind == "read" else "write", skip=number, times=1)
        if how == "torn":
            selection.tear()
        elif how == "short":
            selection.shorten()
        elif how == "done":
            selection.fail(afterwards=True)
        else:
            selection.fail(errno.EIO if how == "EIO" else errno.ENOSPC)
    out_of_memory = {fault.number for fault in faults if fault.kind == "memory"}
    take = Slab.take

    def scarce(slab: Slab) -> memoryview:
        number = calls["memory"]
        calls["memory"] += 1
        if number in out_of_memory:
            raise MemoryError("no memory for a block, as told")
        return take(slab)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Slab, "take", scarce)
        yield device


def single(calls: Counter[str]) -> Iterator[Fault]:
    """Each of so many calls, and each way in which it can go wrong."""
    for kind, ways in HOW.items():
        for number in range(calls[kind]):
            for how in ways:
                yield Fault(kind, number, how)


def pairs(calls: Counter[str]) -> Iterator[tuple[Fault, Fault]]:
    """Each two of them, in the first way in which each can go wrong.

    The second may be one that is made only because the first went wrong: an abort reads again.
    """
    some = [Fault(kind, number, ways[0]) for kind, ways in HOW.items() for number in range(calls[kind] + 2)]
    return combinations(some, 2)
