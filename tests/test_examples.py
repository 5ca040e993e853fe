"""The tour that `make demo` runs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.support.fixtures import image_path

ROOT = Path(__file__).resolve().parent.parent
TOUR = ROOT / "examples" / "tour.py"


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, TOUR, *arguments]
    environment = {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env=environment)


def test_tour_of_the_sample_pool() -> None:
    done = run()
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("    clean\n") == 2
    assert "[0..1]             at 1500   at 2651\n" in done.stdout
    assert "[1000..1008]             -   at 2652\n" in done.stdout


def test_tour_leaves_the_pool_it_is_given_alone(tmp_path: Path) -> None:
    pool = image_path("snapshot_chain", tmp_path)
    before = pool.read_bytes()
    done = run(pool, "1")
    assert (done.returncode, done.stderr) == (0, "")
    assert pool.read_bytes() == before


def test_tour_stops_at_a_damaged_pool(tmp_path: Path) -> None:
    done = run(image_path("leaf_flipped", tmp_path), "3")
    assert done.returncode == 1
    assert done.stderr == "the tour needs a sound pool\n"


def test_tour_says_what_is_wrong_in_one_line(tmp_path: Path) -> None:
    done = run(image_path("empty", tmp_path), "7")
    assert done.returncode == 1
    assert done.stderr.startswith("tour: ")
    assert done.stderr.count("\n") == 1
