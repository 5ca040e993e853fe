"""The bar that people see who wait: after a second, on a terminal only, and gone at the end."""

from __future__ import annotations

import io
import re
from contextlib import redirect_stderr
from typing import TYPE_CHECKING

import pytest

import thinpool.check
from tests.support.fixtures import image_path
from tests.support.surgeon import Surgeon
from tools import _progress
from tools._progress import Progress
from tools.thin_check import main

if TYPE_CHECKING:
    from pathlib import Path


class Terminal(io.StringIO):
    """What a person looks at."""

    def isatty(self) -> bool:
        return True

    def screen(self) -> list[str]:
        """The lines that are left on it."""
        lines = []
        for line in self.getvalue().split("\n"):
            shown = ""
            for part in line.split("\r"):
                shown = part + shown[len(part) :]
            lines.append(shown.rstrip())
        return lines

    def bars(self) -> list[str]:
        """Every bar that was drawn, without blanks at the end."""
        return [part.rstrip() for part in self.getvalue().split("\r") if "[" in part and "%" in part]


class Clock:
    """Time in seconds, which passes only when it is looked at."""

    def __init__(self, step: float) -> None:
        self.now = 0.0
        self.step = step

    def __call__(self) -> float:
        self.now += self.step
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock(1.0)
    monkeypatch.setattr(_progress, "monotonic", clock)
    return clock


def check(*arguments: str | Path) -> tuple[int, Terminal]:
    """Run thin_check before a terminal."""
    terminal = Terminal()
    with redirect_stderr(terminal):
        return main([str(argument) for argument in arguments]), terminal


def test_nothing_is_shown_within_a_second(clock: Clock) -> None:
    clock.step = 0.09
    with redirect_stderr(Terminal()) as terminal, Progress("Work") as progress:
        for done in range(10):
            progress(done, 10)
    assert terminal.getvalue() == ""


def test_the_bar_grows_and_goes_away(clock: Clock) -> None:
    with redirect_stderr(Terminal()) as terminal, Progress("Work") as progress:
        progress(0, 4)
        progress(1, 4)
        progress.stage = "the rest"
        progress(4, 4)
    assert terminal.bars() == [
        f"Work [{'>'.ljust(40)}] 0%",
        f"Work [{('=' * 10 + '>').ljust(40)}] 25%",
        f"Work [{'=' * 40}] 100%, the rest",
    ]
    assert terminal.screen() == [""]


def test_it_is_redrawn_no_more_than_twice_a_second(clock: Clock) -> None:
    clock.step = 0.01
    with redirect_stderr(Terminal()) as terminal, Progress("Work") as progress:
        for done in range(400):
            progress(done, 400)
    assert 3 <= len(terminal.bars()) <= 6


def test_only_a_terminal_sees_it(clock: Clock) -> None:
    for stream in (io.StringIO(), None):
        with redirect_stderr(stream), Progress("Work") as progress:
            progress(1, 2)
        assert stream is None or stream.getvalue() == ""


def test_a_terminal_that_has_gone_stops_nothing(clock: Clock) -> None:
    with redirect_stderr(Terminal()) as terminal, Progress("Work") as progress:
        progress(1, 2)
        terminal.close()
        progress(2, 2)


# thin_check


@pytest.fixture
def damaged(tmp_path: Path) -> Path:
    """Some hundred leaves, the last of a device damaged."""
    path = image_path("deep", tmp_path)
    surgeon = Surgeon(path.read_bytes())
    surgeon.flip(surgeon.leaves(surgeon.device_root(next(iter(surgeon.image.devices()))))[-1])
    path.write_bytes(surgeon.content())
    return path


@pytest.mark.parametrize("worth_arrays", [0, 1 << 30])
def test_a_check_tells_how_far_it_has_come(
    clock: Clock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, worth_arrays: int
) -> None:
    monkeypatch.setattr(thinpool.check, "WORTH_ARRAYS", worth_arrays)
    status, terminal = check(image_path("deep", tmp_path))
    assert status == 0
    bars = terminal.bars()
    percentages = [int(found[1]) for bar in bars if (found := re.search(r"\] (\d+)%, mapping tree$", bar))]
    assert len(percentages) == len(bars) > 2
    assert percentages == sorted(percentages)
    assert percentages[-1] > 80
    assert all(bar.startswith("Checking thin metadata [") for bar in bars)
    assert terminal.screen() == [""], "neither a bar nor the names of stages are left"


def test_findings_are_not_mixed_with_the_bar(clock: Clock, damaged: Path) -> None:
    status, terminal = check(damaged)
    assert status == 64
    assert terminal.bars()
    lines = terminal.screen()
    assert lines[0].startswith("mapping tree: node error: checksum error: block ")
    assert lines[-2:] == ["Check of mappings failed", ""]
    assert not any("%" in line for line in lines)


@pytest.mark.parametrize("option", ["-q", "--json"])
def test_what_is_not_for_people_leaves_the_terminal_clean(clock: Clock, damaged: Path, option: str) -> None:
    status, terminal = check(option, damaged)
    assert (status, terminal.screen()) == (64, [""])
    assert bool(terminal.bars()) == (option == "--json")
