"""The command: all cases of all classes, a table, and every case that is not clean."""

import argparse
import json
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
import traceback
from functools import partial
from pathlib import Path

from attack import inputs, interruptions, judging, settings
from attack.case import Case, NotClean
from attack.planted import planted
from attack.world import World
from tqdm import tqdm

tqdm.monitor_interval = 0  # its thread would be there when processes fork

CLASSES = {  # name: (how many cases, one of them)
    "checkpoints": (300, inputs.checkpoints),
    "templates": (60, inputs.templates),
    "lines": (150, inputs.lines),
    "mutants": (700, inputs.mutants),
    "stages": (60, inputs.stages),
    "flags": (200, settings.flags),
    "judges": (60, judging.judges),
    "kills": (200, interruptions.kills),
    "disks": (100, interruptions.disks),
    "pairs": (60, interruptions.pairs),
    "resumes": (60, interruptions.resumes),
}


def attack(world: World, name: str, number: int, seed: int, one=None) -> dict:
    """Try one case; {class, case, complaint, story}, where no complaint is clean."""
    folder = Path(tempfile.mkdtemp(dir=world.folder))
    row = {"class": name, "case": number, "complaint": ""}
    case = None
    try:
        case = Case(world, name, number, seed, folder / "place")
        (one or CLASSES[name][1])(case)
    except NotClean as error:
        row["complaint"] = str(error)
    except Exception:  # of the attack itself, which must not be taken for clean
        row["complaint"] = traceback.format_exc()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return row | {"story": case.story if case else []}


def attack_one(work: tuple) -> dict:
    return attack(*work)


def attacks(world: World, names: list[str], share: float, seed: int, only: int | None = None, jobs: int = 1):
    """Yield the row of each case, as they are finished."""
    work = []
    for name in names:
        count = max(1, round(share * CLASSES[name][0]))
        work += [(world, name, number, seed) for number in (range(count) if only is None else [only])]

    # Long ones among short ones, so that all processes end together.
    work.sort(key=lambda item: item[2])
    if jobs == 1:
        yield from tqdm(map(attack_one, work), total=len(work), unit="case")
        return
    with multiprocessing.get_context("fork").Pool(jobs) as pool:
        yield from tqdm(pool.imap_unordered(attack_one, work), total=len(work), unit="case")
        pool.close()
        pool.join()


def place_for_files() -> str | None:
    """In memory where that is possible: each file is flushed to its disk, which is what takes the time."""
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


def table(rows: list[dict]) -> str:
    lines = [f"{'class':14}{'tried':>7}{'clean':>7}"]
    for name in [*CLASSES, "all"]:
        own = [row for row in rows if name in ("all", row["class"])]
        if own:
            lines.append(f"{name:14}{len(own):7}{sum(not row['complaint'] for row in own):7}")
    return "\n".join(lines)


def describe(row: dict, seed: int) -> str:
    story = "".join(f"\n    {line}" for line in row["story"])
    again = f"python -m tests.attack --seed {seed} --class {row['class']} --case {row['case']}"
    return f"\nNOT CLEAN {row['class']} {row['case']}: {row['complaint']}{story}\n    again: {again}"


def serve(connection) -> None:
    """For tests/test_attack.py: ("class", name, share) or ("fault", name) in, the rows out; None ends it."""
    with tempfile.TemporaryDirectory(dir=place_for_files()) as folder:
        world = World(Path(folder))
        world.build()
        while request := connection.recv():
            kind, name, *share = request
            if kind == "class":
                connection.send(list(attacks(world, [name], *share, seed=0)))
            else:
                connection.send([attack(world, "planted", 0, 0, partial(planted, name=name))])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m tests.attack", description=__doc__)
    parser.add_argument("--seed", type=int, default=0, help="random seed [0]")
    parser.add_argument("--share", type=float, default=1.0, help="of the cases of each class [1]")
    parser.add_argument("--class", dest="name", choices=CLASSES, help="one class [all]")
    parser.add_argument("--case", type=int, help="one case of the class")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="cases at the same time [one a core]")
    parser.add_argument("--out", help="JSON file for all rows")
    args = parser.parse_args(arguments)

    start = time.monotonic()
    names = [args.name] if args.name else list(CLASSES)
    rows = []
    with tempfile.TemporaryDirectory(dir=place_for_files()) as folder:
        world = World(Path(folder))
        world.build()
        for row in attacks(world, names, args.share, args.seed, args.case, args.jobs):
            rows.append(row)
            if row["complaint"]:
                tqdm.write(describe(row, args.seed), file=sys.stderr)

    print(table(rows))
    print(f"{(time.monotonic() - start) / 60:.1f} minutes, seed {args.seed}")
    if args.out:
        Path(args.out).parent.mkdir(parents=True, exist_ok=True)
        Path(args.out).write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    return int(any(row["complaint"] for row in rows))
