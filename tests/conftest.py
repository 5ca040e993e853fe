"""Oracles, hypothesis profiles and a deadline for every test.  The variables are described in docs/testing.md."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, settings

# Before anything of it is imported: failed assertions in the helpers shall show their values, as those in tests do.
pytest.register_assert_rewrite("tests.support")

from bufio import FileDevice, MemoryDevice  # noqa: E402
from bufio.testing import FaultyDevice  # noqa: E402
from tests.support import oracles, peers  # noqa: E402
from thinpool.storage import Storage  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator
    from types import FrameType

    from thinpool.layout import Superblock

_DEADLINE = 60.0  # seconds
_MARKED_DEADLINES = {"kernel": 300.0, "slow": 300.0}
_DEADLINE_FACTOR = {"ci": 2, "long": 20}  # by hypothesis profile
_DEVICES_CHECKED = 3  # of a test that makes many, the last ones
_REPEAT = 5.0  # a handler that catches everything, as hypothesis does to shrink, is interrupted again

_UNHURRIED = [HealthCheck.too_slow, HealthCheck.data_too_large]
settings.register_profile("default", deadline=None, max_examples=50, stateful_step_count=30)
settings.register_profile(
    "ci", deadline=None, max_examples=200, stateful_step_count=50, suppress_health_check=_UNHURRIED, print_blob=True
)
settings.register_profile(
    "long", deadline=None, max_examples=1000, stateful_step_count=100, suppress_health_check=_UNHURRIED, print_blob=True
)
_PROFILE = os.environ.get("THINPOOL_HYPOTHESIS_PROFILE", "default")
settings.load_profile(_PROFILE)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip or fail a test whose oracle is not on this machine."""
    for marker, missing in oracles.MISSING.items():
        if item.get_closest_marker(marker) is not None:
            reason = missing()
            if reason is not None:
                oracles.give_up(reason)


@pytest.fixture(autouse=True)
def committed_metadata_is_accepted(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """After every test that commits, the reference thin_check passes on what the last commits left.

    An extra: where the reference tools are missing nothing is skipped.  A test that damages what it has committed says
    so with the marker ``damages``.
    """
    committed: dict[int, FileDevice | MemoryDevice] = {}
    commit = Storage.commit

    def note_commit(self: Storage, fields: Superblock) -> None:
        commit(self, fields)
        device = self.bm.device
        if isinstance(device, FaultyDevice):
            device = device.inner
        if isinstance(device, FileDevice | MemoryDevice):
            committed.pop(id(device), None)
            committed[id(device)] = device
            if len(committed) > _DEVICES_CHECKED:
                del committed[next(iter(committed))]

    monkeypatch.setattr(Storage, "commit", note_commit)
    yield
    if request.node.get_closest_marker("damages") is None and peers.is_available():
        for device in committed.values():
            if isinstance(device, MemoryDevice):
                peers.assert_accepted(device.contents())
            elif Path(device.path).exists():
                peers.assert_accepted(device.path)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    """Fail a test that hangs.  (faulthandler_timeout in pyproject.toml shows where one hangs that cannot be failed.)"""
    if threading.current_thread() is not threading.main_thread():
        return (yield)
    marked = [limit for name, limit in _MARKED_DEADLINES.items() if item.get_closest_marker(name) is not None]
    seconds = max([_DEADLINE, *marked]) * _DEADLINE_FACTOR.get(_PROFILE, 1)

    def expire(_signal: int, _frame: FrameType | None) -> None:
        pytest.fail(f"still running after {seconds:g} s")

    previous = signal.signal(signal.SIGALRM, expire)
    signal.setitimer(signal.ITIMER_REAL, seconds, _REPEAT)
    try:
        return (yield)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
