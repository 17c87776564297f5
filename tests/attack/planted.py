"""Faults of a command, each of which the attack has to find: {name: (a main that has it, a word of the complaint)}."""

import json
import os
import signal
import sys
from pathlib import Path

from attack import process
from attack.case import Case
from attack.world import COMMANDS


def fails(arguments):
    return {}["missing"]


def lies(arguments):
    Path("new.json").write_text(json.dumps([float("nan")]))
    return 0


def says_nan(arguments):
    print("win rate nan")
    return 0


def leaves(arguments):
    Path(".host-1-0.new.json.tmp").write_text("half")
    print("evaluate: no space", file=sys.stderr)
    return 2


def overwrites(arguments):
    Path("prompts.jsonl").write_text("")
    print("evaluate: the file is empty", file=sys.stderr)
    return 2


def says_nothing(arguments):
    return 2


def says_much(arguments):
    print("evaluate: " + "x" * 10**5, file=sys.stderr)
    return 2


def obeys(arguments):
    print("evaluate: \x1b[31mred", file=sys.stderr)
    return 2


def dies(arguments):
    os.kill(os.getpid(), signal.SIGSEGV)


def does_nothing(arguments):
    return 0


FAULTS = {
    "a traceback": (fails, "Traceback"),
    "a number that is not finite": (lies, "not finite"),
    "a number that is said": (says_nan, "exit code 0 with"),
    "a temporary file": (leaves, "left behind"),
    "an input that is another": (overwrites, "changed or gone"),
    "no sentence": (says_nothing, "is not the sentence"),
    "a page": (says_much, "characters"),
    "a control character": (obeys, "not printable"),
    "a crash": (dies, "exit code -11"),
    "no result": (does_nothing, "not the bytes"),
}


def planted(case: Case, name: str) -> None:
    """A case in which the command has a fault."""
    known = COMMANDS["outputs"]
    expected = case.world.reference("outputs")[0]
    kept = process.MAINS[known.program]
    process.MAINS[known.program] = FAULTS[name][0]
    try:
        result = case.survive(known)
        if result.code == 0:
            case.same_as(expected)
    finally:
        process.MAINS[known.program] = kept
