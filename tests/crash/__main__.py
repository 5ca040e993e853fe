"""Explore what power cuts may leave.

python -m tests.crash                                  one hundred thousand images, from seed 1
python -m tests.crash --images 2000000 --seed 7 --all  each pair and each sequence of three calls, then by chance
python -m tests.crash replay 'small: insert 0 7; commit' '12:3,4[1-3]'
python -m tests.crash mutations                        defects put into the engine: each has to be found
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import sys
import time
from itertools import chain, count
from typing import TYPE_CHECKING, NamedTuple

from tests.crash.explorer import BrokenPromise, Effort, Explorer, Outcome, explore, smallest
from tests.crash.mutations import MUTATIONS, find
from tests.crash.workloads import Workload, exhaustive, random_workload, scripted
from tests.support import peers

if TYPE_CHECKING:
    from collections.abc import Iterator

_PAIRS_BY_CHANCE = 200


class _Job(NamedTuple):
    workload: Workload
    effort: Effort
    seed: int


def _explore(job: _Job) -> Outcome:
    return explore(job.workload, job.effort, job.seed)


def _workloads(seed: int, *, everything: bool) -> tuple[list[Workload], Iterator[Workload]]:
    """What has to be explored in any case, and what more there is."""
    scripts = list(scripted())
    if everything:
        fixed = [*scripts, *exhaustive(1), *exhaustive(2), *exhaustive(3)]
    else:
        singles = [script for script in scripts if len(script.calls) == 2]
        pairs = [script for script in scripts if len(script.calls) > 2]
        fixed = [*singles, *exhaustive(2), *random.Random(seed).sample(pairs, _PAIRS_BY_CHANCE)]
    return fixed, (random_workload(number) for number in count(seed * 1_000_000))


def run(args: argparse.Namespace) -> int:
    """Explore until there are enough images, and print what came of it."""
    effort = Effort(peer=Effort().peer if peers.is_available() else 0)
    fixed, more = _workloads(args.seed, everything=args.all)
    began = time.monotonic()
    total = Outcome()
    nr_workloads = 0
    failures = []
    with multiprocessing.Pool(args.jobs) as pool:
        jobs = (_Job(workload, effort, args.seed) for workload in chain(fixed, more))
        for outcome in pool.imap(_explore, jobs, chunksize=4):
            nr_workloads += 1
            total.images += outcome.images
            total.states += outcome.states
            total.long_way += outcome.long_way
            total.peer += outcome.peer
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
    if args.choice is None:
        outcome = explore(workload, seed=args.seed)
        print(outcome.failure or f"sound: {outcome.images} images of {workload}")
        return 1 if outcome.failure else 0
    explorer = Explorer(workload)
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
    command.set_defaults(act=replay)
    command = commands.add_parser("mutations", help="see that defects in the engine are found")
    command.add_argument("names", nargs="*", metavar="NAME")
    command.set_defaults(act=mutations)
    args = parser.parse_args()
    act = args.act
    return int(act(args))


if __name__ == "__main__":
    sys.exit(main())
