"""The measuring instruments: they count what they say, and the whole bench runs at a small size."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from bufio import MemoryDevice
from tools.bench import engine
from tools.bench.measure import Lap, Result, Stopwatch, interleave, table
from tools.bench.pools import CountingDevice

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


def test_each_round_begins_with_another_contestant() -> None:
    order: list[str] = []

    def contestant(name: str) -> Callable[[], dict[str, Lap]]:
        def run() -> dict[str, Lap]:
            order.append(name)
            return {"work": Lap(1, 1.0, 2.0)}

        return run

    results = interleave({name: contestant(name) for name in "abc"}, 3)
    assert "".join(order) == "abcbcacab"
    assert [len(result.laps) for result in results["work"].values()] == [3, 3, 3]


def test_rates_are_slowest_median_fastest() -> None:
    result = Result("r", [Lap(100, 2.0, 4.0), Lap(100, 1.0, 2.0), Lap(100, 0.5, 1.0)])
    assert result.rates("cpu") == (50, 100, 200)
    assert result.rates("wall") == (25, 50, 100)


def test_stopwatch_counts_only_while_it_runs() -> None:
    watch = Stopwatch()
    assert watch.lap(1) == Lap(1, 0.0, 0.0)
    with watch.running():
        sum(range(10_000))
    counted = watch.lap(1)
    sum(range(10_000))
    assert watch.lap(1) == counted
    assert counted.wall > 0


def test_table_is_aligned() -> None:
    assert table(["name", "n"], [["a", "10"], ["bcdef", "7"]]).splitlines() == [
        "name    n",
        "-----  --",
        "a      10",
        "bcdef   7",
    ]


def test_counting_device_counts_blocks_read() -> None:
    device = CountingDevice(MemoryDevice(8 * 4096))
    device.readinto(bytearray(4096), 0)
    device.preadv([bytearray(4096), bytearray(8192)], 4096)
    device.pwrite(bytes(4096), 0)
    assert device.blocks_read == 4


@pytest.mark.slow
def test_whole_bench_runs_at_a_small_size(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "bench.json"
    sizes = ["--mappings", "2000", "--operations", "1000", "--large", "20000", "--rounds", "2"]
    assert engine.main([*sizes, "--directory", str(tmp_path), "--json", str(out)]) == 0
    assert set(engine.MEASUREMENTS) < set(json.loads(out.read_text()))
    assert "LMDB" in capsys.readouterr().out
