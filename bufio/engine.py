"""How requests reach a device.

An engine is given block transfers and does them; neighbours become one vectored call.  :class:`SyncEngine` is done when
its call returns.  The asynchronous engine will implement the same protocol.  Source: docs/bufio.md, "Engines".
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Protocol

    from bufio.device import Device, ReadableBuffer, WritableBuffer

    class Engine(Protocol):
        """Carries out transfers.  The result is a list as long as the requests: None, or the error of that one."""

        def read(self, device: Device, requests: Sequence[tuple[int, memoryview]]) -> list[OSError | None]:
            """Fill each view from its byte offset."""

        def write(self, device: Device, requests: Sequence[tuple[int, memoryview]]) -> list[OSError | None]:
            """Write each view to its byte offset.  Nothing is durable before the device's flush."""

        @property
        def calls(self) -> int:
            """Transfers that reached a device so far, one for each vectored call."""


MAX_COALESCED_BYTES = 1 << 20
"""A vectored call carries at most this much."""


class SyncEngine:
    """Does each transfer before it returns."""

    def __init__(self) -> None:
        self.calls = 0

    def read(self, device: Device, requests: Sequence[tuple[int, memoryview]]) -> list[OSError | None]:
        """Fill each view from its byte offset."""
        return self._transfer(requests, device.readinto, device.preadv)

    def write(self, device: Device, requests: Sequence[tuple[int, memoryview]]) -> list[OSError | None]:
        """Write each view to its byte offset."""
        return self._transfer(requests, device.pwrite, device.pwritev)

    def _transfer(
        self,
        requests: Sequence[tuple[int, memoryview]],
        one: Callable[[WritableBuffer, int], None] | Callable[[ReadableBuffer, int], None],
        many: Callable[[Sequence[WritableBuffer], int], None] | Callable[[Sequence[ReadableBuffer], int], None],
    ) -> list[OSError | None]:
        count = len(requests)
        results: list[OSError | None] = [None] * count
        first = 0
        while first < count:
            offset, view = requests[first]
            end = offset + view.nbytes
            last = first + 1
            while last < count:
                next_offset, next_view = requests[last]
                if next_offset != end or end - offset >= MAX_COALESCED_BYTES:
                    break
                end += next_view.nbytes
                last += 1
            self.calls += 1
            try:
                if last - first == 1:
                    one(view, offset)
                else:
                    many([v for _, v in requests[first:last]], offset)
            except OSError as error:
                if last - first == 1:
                    results[first] = error
                else:
                    # One bad place must not take its neighbours with it.
                    for at in range(first, last):
                        results[at : at + 1] = self._transfer(requests[at : at + 1], one, many)
            first = last
        return results
