"""The measuring instruments: they count what they say, and the whole bench runs at a small size."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from bufio import MemoryDevice
from tools.bench import bufio as caches
from tools.bench import engine
from tools.bench import tools as readers
from tools.bench.compare import BLOCKS_PER_SECOND, NANOSECONDS, Goal, Row, Unit, report, rows_of
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


def laps(name: str, *seconds: float) -> Result:
    """One operation in each round, which took that long by the wall clock."""
    return Result(name, [Lap(1, 0.0, wall) for wall in seconds])


def test_ratio_is_the_median_of_the_ratios_of_rounds() -> None:
    # The ratio of the medians would be 1: a machine that was slow in one round for both must not hide the difference.
    row = Row("work", NANOSECONDS, "wall", laps("ours", 2.0, 20.0, 4.0), laps("theirs", 1.0, 10.0, 4.0))
    assert row.ratio == 2
    rate = Row("work", BLOCKS_PER_SECOND, "wall", laps("ours", 2.0, 20.0, 4.0), laps("theirs", 1.0, 10.0, 4.0))
    assert rate.ratio == 0.5


@pytest.mark.parametrize(
    ("unit", "goal", "text", "of_goal", "is_met"),
    [
        (NANOSECONDS, Goal(plus=3e9), "3e+09", 2 / 3, True),
        (NANOSECONDS, Goal(times=1.5, plus=0.25e9), "1.5 x + 2.5e+08", 2 / 1.75, False),
        (BLOCKS_PER_SECOND, Goal(times=0.5), "0.5 x", 1, True),
        (BLOCKS_PER_SECOND, Goal(times=0.8), "0.8 x", 0.5 / 0.8, False),
    ],
)
def test_goal_is_at_most_for_a_time_and_at_least_for_a_rate(
    unit: Unit, goal: Goal, text: str, of_goal: float, is_met: bool
) -> None:
    row = Row("work", unit, "wall", laps("ours", 2.0), laps("theirs", 1.0), goal)
    assert str(goal) == text
    assert row.of_goal == pytest.approx(of_goal)
    assert row.is_met is is_met


def test_report_sets_each_contestant_beside_the_counterpart() -> None:
    results = {"work": {"ours": laps("ours", 2e-9), "theirs": laps("theirs", 1e-9)}}
    rows = rows_of(results, "theirs", NANOSECONDS, ["wall"], {("work", "ours"): Goal(plus=1500)})
    assert report(rows).splitlines() == [
        "ns per block    by  clock  median   range  theirs  ratio      goal  met",
        "------------  ----  -----  ------  ------  ------  -----  --------  ---",
        "work          ours   wall       2  2 .. 2       1   2.00  <= 1,500  yes",
    ]


def test_bench_of_the_caches_runs_and_leaves_nothing_behind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "bench.json"
    files = tmp_path / "files"
    files.mkdir()
    assert caches.main(["--rounds", "1", "--size", "1", "--dir", str(files), "--json", str(out)]) == 0
    assert not list(files.iterdir())
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert {row["measurement"] for row in rows} >= set(caches.MEASUREMENTS) - {"direct"}  # not every file system has it
    assert "locked dict" in capsys.readouterr().out


def test_bench_of_the_tools_runs_beside_anything_of_their_names(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    peers, files, out = tmp_path / "peers", tmp_path / "files", tmp_path / "bench.json"
    peers.mkdir()
    files.mkdir()
    for program in {command.program for command in readers.COMMANDS.values()}:
        script = peers / program
        script.write_text("#!/bin/sh\necho 9.9.9\n")
        script.chmod(0o755)
    monkeypatch.setenv("THINPOOL_PEER_DIR", str(peers))
    sizes = ["--mappings", "300", "--rounds", "2", "--directory", str(files)]
    assert readers.main([*sizes, "--json", str(out)]) == 0
    assert not list(files.iterdir())
    (measured,) = (value for key, value in json.loads(out.read_text()).items() if key != "environment")
    operations = {row["operation"] for row in measured["rows"]}
    assert operations == set(readers.COMMANDS) - {"thin_delta"}, "the pool has one device"
    assert all(len(row["rounds"]) == 2 and min(row["rounds"]) > 0 for row in measured["rows"] if row["clock"] == "wall")
    assert all(peak > 1 for peak in measured["peaks_mib"]["ours"]["thin_check"])
    assert "9.9.9" in capsys.readouterr().out


def test_bench_of_the_tools_says_what_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "thin_check"
    script.write_text('#!/bin/sh\n[ "$1" = --version ] || { echo not today >&2; exit 3; }\n')
    script.chmod(0o755)
    monkeypatch.setenv("THINPOOL_PEER_DIR", str(tmp_path))
    with pytest.raises(SystemExit, match="exit status 3: not today"):
        readers.main(["--mappings", "300", "--only", "thin_check", "--directory", str(tmp_path)])
    monkeypatch.setenv("THINPOOL_PEER_DIR", str(tmp_path / "none"))
    with pytest.raises(SystemExit, match="THINPOOL_PEER_DIR"):
        readers.main(["--mappings", "300"])


@pytest.mark.slow
def test_whole_bench_runs_at_a_small_size(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "bench.json"
    sizes = ["--mappings", "2000", "--operations", "1000", "--large", "20000", "--rounds", "2"]
    assert engine.main([*sizes, "--directory", str(tmp_path), "--json", str(out)]) == 0
    assert set(engine.MEASUREMENTS) < set(json.loads(out.read_text()))
    assert "LMDB" in capsys.readouterr().out
