"""A device of numbered blocks, clients with much and with little memory, and threads."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from bufio import Client
from tests.support.bufio import FEW_BYTES, NR_BLOCKS, SIZE, Threads, content, dismiss_other_caches
from tests.support.devices import FaultyMemory

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(autouse=True)
def alone() -> None:
    dismiss_other_caches()


@pytest.fixture
def device() -> FaultyMemory:
    return FaultyMemory(b"".join(content(block) for block in range(NR_BLOCKS)))


@pytest.fixture
def client(device: FaultyMemory) -> Iterator[Client]:
    client = Client(device, SIZE)
    yield client
    device.clear()
    client.discard_all()


@pytest.fixture
def few(device: FaultyMemory) -> Iterator[Client]:
    """A client with room for eight buffers and one in reserve."""
    client = Client(device, SIZE, cache_bytes=FEW_BYTES)
    yield client
    device.clear()
    client.discard_all()


@pytest.fixture
def threads() -> Threads:
    return Threads()
