"""The recorded answers in tests/data against the reference tools as installed: the data says what it claims to say."""

from __future__ import annotations

import pytest

from tests.support import peers
from tests.support.fixtures import GOOD, answer, damage_of, facts_of, image, read_xml

pytestmark = pytest.mark.peer

SMALL_DAMAGED = ["leaf_flipped", "metadata_leak", "sb_zeroed", "value_twice"]


def recorded_version() -> str:
    """The recorded version that the installed tools agree with: the C++ ones or the Rust ones."""
    return "0.9.0" if peers.peer_version().startswith("0.") else "1.1.0"


@pytest.mark.parametrize("name", GOOD)
def test_installed_thin_check_gives_the_recorded_verdict(name: str) -> None:
    assert (peers.run_thin_check(image(name)).status == 0) == (facts_of(name).check_status[recorded_version()] == 0)


@pytest.mark.parametrize("name", GOOD)
def test_installed_thin_dump_gives_the_recorded_content(name: str) -> None:
    result = peers.run_thin_dump(image(name))
    assert result.status == 0, result.stderr
    assert read_xml(result.stdout) == read_xml(answer(name, "xml"))


@pytest.mark.parametrize("name", SMALL_DAMAGED)
def test_installed_thin_check_refuses_what_was_recorded_as_refused(name: str) -> None:
    assert (peers.run_thin_check(image(name)).status == 0) == (damage_of(name).check_status[recorded_version()] == 0)
