"""What docs/format.md promises: each test it names exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NAMED = sorted(set(re.findall(r"`(test_\w+…?)`", (ROOT / "docs" / "format.md").read_text())))


@pytest.fixture(scope="module")
def tests() -> list[str]:
    sources = (path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    return [name for source in sources for name in re.findall(r"def (test_\w+)\(", source)]


def test_names_are_found() -> None:
    assert len(NAMED) > 40


@pytest.mark.parametrize("name", NAMED)
def test_every_test_that_the_format_names_exists(name: str, tests: list[str]) -> None:
    if name.endswith("…"):
        assert any(test.startswith(name[:-1]) for test in tests)
    else:
        assert name in tests
