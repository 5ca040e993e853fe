"""Explore what power cuts may leave, and what comes of devices and of memory that fail.

python -m tests.crash                                  one hundred thousand images, from seed 1
python -m tests.crash --images 2000000 --seed 7 --all  each pair and each sequence of three calls, then by chance
python -m tests.crash replay 'small: insert 0 7; commit' '12:3,4[1-3]'
python -m tests.crash mutations                        defects put into the engine: each has to be found
python -m tests.crash fuzz --cases 3000 --seed 1       images damaged on purpose, and what is answered from them
python -m tests.crash fuzz --case 17 --seed 1          one of them again
python -m tests.crash kill --rounds 300                processes that commit to a file, killed at random moments
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import shutil
import sys
import tempfile
import time
from itertools import chain, count
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from tests.crash import fuzz as fuzzing
from tests.crash.damage import make_case
from tests.crash.explorer import BrokenPromise, Effort, Explorer, Outcome, explore, explore_faults, smallest
from tests.crash.faults import Fault
from tests.crash.mutations import MUTATIONS, find
from tests.crash.processes import BrokenPromise as BrokenInProcess
from tests.crash.processes import Supervisor, figures_of
from tests.crash.workloads import Workload, exhaustive, random_workload, scripted
from tests.support import peers

if TYPE_CHECKING:
    from collections.abc import Iterator

_PAIRS_BY_CHANCE = 200


class _Job(NamedTuple):
    workload: Workload
    effort: Effort
    seed: int
    faults: int = 0
    """0: only power cuts; 1: each fault as well; 2: each two of them, too."""


def _explore(job: _Job) -> Outcome:
    if job.faults:
        return explore_faults(job.workload, seed=job.seed, by_pairs=job.faults > 1)
    return explore(job.workload, job.effort, job.seed)


def _jobs(effort: Effort, seed: int, *, everything: bool) -> tuple[list[_Job], Iterator[_Job]]:
    """What has to be explored in any case, and what more there is."""
    scripts = list(scripted())
    singles = [script for script in scripts if len(script.calls) == 2]
    if everything:
        cuts = [*scripts, *exhaustive(1), *exhaustive(2), *exhaustive(3)]
        faulty = [*singles, *exhaustive(2)]
        twice_faulty = [script for script in singles if script.pool == "small"]
    else:
        more = [script for script in scripts if len(script.calls) > 2]
        cuts = [*singles, *exhaustive(2), *random.Random(seed).sample(more, _PAIRS_BY_CHANCE)]
        faulty = [script for script in singles if script.pool == "small"]
        twice_faulty = [Workload.parse("small: insert 0 7; commit")]
    fixed = [
        *(_Job(workload, effort, seed) for workload in cuts),
        *(_Job(workload, effort, seed, 1) for workload in faulty),
        *(_Job(workload, effort, seed, 2) for workload in twice_faulty),
    ]
    return fixed, (_Job(random_workload(number), effort, seed) for number in count(seed * 1_000_000))


def run(args: argparse.Namespace) -> int:
    """Explore until there are enough images, and print what came of it."""
    effort = Effort(peer=Effort().peer if peers.is_available() else 0)
    fixed, more = _jobs(effort, args.seed, everything=args.all)
    began = time.monotonic()
    total = Outcome()
    nr_workloads = 0
    failures = []
    with multiprocessing.Pool(args.jobs) as pool:
        for outcome in pool.imap(_explore, chain(fixed, more), chunksize=4):
            nr_workloads += 1
            total.add(outcome)
            if outcome.failure is not None:
                failures.append(outcome.failure)
            if sys.stderr.isatty():
                print(f"\r{nr_workloads} workloads, {total.images} images", end="", file=sys.stderr, flush=True)
            if len(failures) >= args.failures or (nr_workloads >= len(fixed) and total.images >= args.images):
                break
        pool.terminate()
    seconds = time.monotonic() - began
    figures = {
        "seed": args.seed,
        "workloads": nr_workloads,
        "images": total.images,
        "states": total.states,
        "long_way": total.long_way,
        "peer": total.peer,
        "faults": total.faults,
        "seconds": round(seconds, 1),
        "images_per_second": round(total.images / seconds),
        "failures": len(failures),
    }
    if args.json:
        print(json.dumps(figures))
    else:
        if sys.stderr.isatty():
            print("\r\x1b[K", end="", file=sys.stderr)
        width = max(map(len, figures))
        for name, figure in figures.items():
            print(f"{name.replace('_', ' '):{width}}  {figure:>12,}")
    for failure in failures[: args.failures]:
        print(f"\n{smallest(failure, effort, args.seed)}", file=sys.stderr)
    return 1 if failures else 0


def replay(args: argparse.Namespace) -> int:
    """Repeat one workload, or one image of it, and say what is wrong with it."""
    workload = Workload.parse(args.workload)
    faults = [Fault.parse(text) for text in args.fault]
    if args.choice is None:
        outcome = explore(workload, seed=args.seed, faults=faults)
        print(outcome.failure or f"sound: {outcome.images} images of {workload}")
        return 1 if outcome.failure else 0
    explorer = Explorer(workload, faults)
    image = explorer.device.image(args.choice)
    try:
        explorer.require_the_long_way(image, explorer.require_promise(image), peer=peers.is_available())
    except BrokenPromise as broken:
        print(broken)
        for position, event in enumerate(explorer.device.trace[: image.position]):
            print(f"  {position:4}  {_describe(event)}")
        return 1
    print(f"sound: {image}")
    return 0


def _describe(event: object) -> str:
    data = getattr(event, "data", None)
    if data is not None:
        offset = getattr(event, "offset", 0)
        return f"write of {len(data)} bytes at block {offset // 4096}"
    return repr(event)


def mutations(args: argparse.Namespace) -> int:
    """Put each defect into the engine, one at a time, and print how it was found."""
    missed = 0
    width = max(map(len, MUTATIONS))
    for name in args.names or MUTATIONS:
        began = time.monotonic()
        found, nr_workloads, nr_images = find(name, seed=args.seed)
        seconds = time.monotonic() - began
        missed += found is None
        how = "NOT FOUND" if found is None else f"{found.workload}"
        print(f"{name:{width}}  {nr_workloads:5} workloads  {nr_images:8,} images  {seconds:6.1f} s  {how}", flush=True)
    return 1 if missed else 0


_CASES_AT_A_TIME = 50
_JOBS_OF_A_PROCESS = 20


def fuzz(args: argparse.Namespace) -> int:
    """Damage images, and print what was answered from them."""
    fuzzing.prepare()
    if args.case is not None:
        case = make_case(args.seed, args.case)
        print(f"{case.base}: {case.story}")
        tally = fuzzing.run(fuzzing.Job(args.seed, args.case, args.case + 1))
    else:
        tally = fuzzing.Tally()
        jobs = (
            fuzzing.Job(args.seed, begin, min(begin + _CASES_AT_A_TIME, args.cases))
            for begin in range(0, args.cases, _CASES_AT_A_TIME)
        )
        began = time.monotonic()
        with multiprocessing.Pool(args.jobs, maxtasksperchild=_JOBS_OF_A_PROCESS) as pool:
            for part in pool.imap(fuzzing.run, jobs):
                tally.add(part)
                if sys.stderr.isatty():
                    print(f"\r{tally.cases} cases", end="\r", file=sys.stderr, flush=True)
                if len(tally.failures) >= args.failures:
                    break
            pool.terminate()
        print(f"{tally.cases:9,}  cases from seed {args.seed} in {time.monotonic() - began:.0f} seconds")
    for verdict in sorted(tally.answers):
        print(f"{tally.answers[verdict]:9,}  {verdict}")
    print(f"{len(tally.failures):9,}  failures")
    for failure in tally.failures[: args.failures]:
        print(f"\n{failure}", file=sys.stderr)
    return 1 if tally.failures else 0


def kill(args: argparse.Namespace) -> int:
    """Kill processes that commit to a file, and print what came of it."""
    began = time.monotonic()
    directory = Path(tempfile.mkdtemp(prefix="thinpool-kill-"))
    supervisor = Supervisor(directory / "pool", args.seed)
    try:
        for _ in range(args.rounds):
            supervisor.round()
    except BrokenInProcess as broken:
        print(broken, file=sys.stderr)
        return 1
    shutil.rmtree(directory)
    for name, figure in figures_of(supervisor.tally).items():
        print(f"{name.replace('_', ' '):16}  {figure:>8,}")
    print(f"{'seconds':16}  {time.monotonic() - began:>8.1f}")
    return 0


def main() -> int:
    """Parse the command line, and do it."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.crash", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=100_000, help="go on until there are so many")
    parser.add_argument("--all", action="store_true", help="first each pair of calls, and each sequence of three")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes; by default one for each processor")
    parser.add_argument("--failures", type=int, default=1, help="stop when so many workloads have failed")
    parser.add_argument("--json", action="store_true")
    parser.set_defaults(act=run)
    commands = parser.add_subparsers(metavar="COMMAND")
    command = commands.add_parser("replay", help="repeat a workload, or one image of it")
    command.add_argument("workload")
    command.add_argument("choice", nargs="?")
    command.add_argument("--fault", action="append", default=[], help="what goes wrong meanwhile; may be repeated")
    command.set_defaults(act=replay)
    command = commands.add_parser("mutations", help="see that defects in the engine are found")
    command.add_argument("names", nargs="*", metavar="NAME")
    command.set_defaults(act=mutations)
    command = commands.add_parser("fuzz", help="damage images on purpose, and ask everything that reads them")
    command.add_argument("--cases", type=int, default=3000)
    command.add_argument("--case", type=int, help="this one only")
    command.set_defaults(act=fuzz)
    # Before or behind the command alike.
    command.add_argument("--seed", type=int, default=argparse.SUPPRESS)
    command.add_argument("--jobs", type=int, default=argparse.SUPPRESS)
    command.add_argument("--failures", type=int, default=argparse.SUPPRESS)
    command = commands.add_parser("kill", help="kill processes that commit to a file")
    command.add_argument("--rounds", type=int, default=300)
    command.add_argument("--seed", type=int, default=argparse.SUPPRESS)
    command.set_defaults(act=kill)
    args = parser.parse_args()
    act = args.act
    return int(act(args))


if __name__ == "__main__":
    sys.exit(main())
