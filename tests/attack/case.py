"""One case: a place of its own, random numbers of its own, and what *clean* means."""

import json
import math
import random
import re
import signal
from pathlib import Path

import torch
from attack.process import Process, Result
from attack.world import Command, World, content
from safetensors.torch import load

LONGEST_SENTENCE = 1000


class NotClean(Exception):
    """Its text is what was not clean."""


class Case:
    """The number-th case of a class. Its folder `place` holds the inputs of all commands."""

    def __init__(self, world: World, name: str, number: int, seed: int, place: Path):
        self.world = world
        self.number = number
        self.random = random.Random(f"{seed} {name} {number}")
        self.place = place
        self.story = []  # what was done, for the report
        self.excused = False  # after SIGKILL or a failing disk a hidden file may be there, until the next one comes
        self.before = {}  # what was there when the last command began
        world.copy_to(place)

    def tell(self, *words) -> None:
        self.story.append(" ".join(map(str, words))[:400])

    def pick(self, values):
        return self.random.choice(list(values))

    def require(self, fits, complaint: str) -> None:
        if not fits:
            raise NotClean(complaint)

    # ---------------------------------------------------------------------------------------- running

    def run(self, known: Command, codes: tuple = (0, 2), arm=None, typed: str = "") -> Result:
        """The command, in this place; how it speaks and ends is checked."""
        return self.check(known, self.start(known, arm, typed).end(), codes)

    def start(self, known: Command, arm=None, typed: str = "") -> Process:
        self.tell(known)
        self.before = content(self.place)
        return Process(known.program, known.arguments(), self.place, arm, typed)

    def check(self, known: Command, result: Result, codes: tuple = (0, 2), alone: bool = True) -> Result:
        last = "\n".join(result.lines[-12:])
        self.excused |= result.code == -signal.SIGKILL
        self.require(result.code is not None, f"it did not end\n{last}")
        for word in ("Traceback (most recent", "Warning:", "Exception ignored", "panicked at"):
            self.require(word not in result.said, f"{word}\n{last}")
        self.require(result.code in codes, f"exit code {result.code}, expected {codes}\n{last}")

        if result.code == 2:
            self.check_sentence(known, result)
        if result.code == 0:
            numbers = re.findall(r"(?<![\w/.:-])(?:nan|inf)(?![\w/])", result.said, re.IGNORECASE)
            self.require(not numbers, f"exit code 0 with {numbers}\n{last}")
        if alone and result.code >= 0:
            self.check_files(result)
        return result

    def check_files(self, result: Result) -> None:
        """Nothing is hidden here any more; what a command would continue from may be."""
        hidden = [path.name for path in self.place.rglob(".*")]
        if result.code:
            hidden = [name for name in hidden if name.endswith((".tmp", ".lock"))]
        self.require(self.excused or not hidden, f"left behind: {hidden}")
        if result.code == 0:
            self.check_numbers()

    def settle(self, known: Command, result: Result) -> Result:
        """As check, but for what is hidden: another process may still be at work here."""
        return self.check(known, result, alone=False)

    def check_sentence(self, known: Command, result: Result) -> None:
        """One line of printable characters that begins with the name of the program, and is the last."""
        program = known.program
        line = result.lines[-1] if result.lines else ""
        begins = line.startswith((f"{program}: ", f"{program} ", f"python -m {program} "))
        self.require(begins, f"the last line is not the sentence of {program}: {line[:300]!r}")
        self.require(line.isprintable(), f"not printable: {line!r}")
        longest = LONGEST_SENTENCE + max(map(len, known.arguments()))
        self.require(len(line) <= longest, f"{len(line)} characters: {line[:200]!r}")

    def refuse(self, known: Command, *named: str) -> Result:
        """It must say no, with all of these words, and change nothing that was there."""
        before = content(self.place)
        result = self.run(known, (2,))
        for word in named:
            self.require(word in result.lines[-1], f"the sentence does not name {word}: {result.lines[-1]}")
        self.untouched(before)
        return result

    def survive(self, known: Command, *named: str, typed: str = "") -> Result:
        """It may do its work, to finite numbers, or say no, where named is one of its words; what was there stays."""
        before = content(self.place)
        result = self.run(known, typed=typed)
        if result.code == 2 and named:
            line = result.lines[-1]
            self.require(any(word in line for word in named), f"the sentence names none of {named}: {line}")
        self.untouched(before)
        return result

    # ---------------------------------------------------------------------------------------- results

    def untouched(self, before: dict, but: str = "new") -> None:
        """What was there before is what it was."""
        now = content(self.place)
        outputs = (but, "votes")
        changed = [path for path, data in before.items() if now.get(path) != data and not path.startswith(outputs)]
        self.require(not changed, f"changed or gone: {changed}")

    def same_as(self, expected: dict, but: tuple = ()) -> None:
        """What this command added is what it adds undisturbed."""
        found = self.world.added(self.place)
        differ = sorted(path for path in expected.keys() | found.keys() if expected.get(path) != found.get(path))
        differ = [path for path in differ if path not in but]
        self.require(not differ, f"not the bytes of an undisturbed run: {differ}")

    def check_numbers(self) -> None:
        """Every number that the command wrote is finite."""
        for path, data in content(self.place).items():
            if data == self.before.get(path):
                continue
            if path.endswith((".json", ".jsonl")) and not path.endswith("config.json"):
                lines = data.decode().splitlines() if path.endswith(".jsonl") else [data.decode()]
                for line in lines:
                    self.require(finite(json.loads(line)), f"{path}: not finite: {line[:200]}")
            if path.endswith(".safetensors"):
                broken = [name for name, tensor in load(data).items() if not all_finite(tensor)]
                self.require(not broken, f"{path}: not finite: {broken}")


def all_finite(tensor) -> bool:
    return bool(torch.isfinite(tensor.double()).all())


def finite(value) -> bool:
    if isinstance(value, dict):
        return all(map(finite, value.values()))
    if isinstance(value, list):
        return all(map(finite, value))
    return not isinstance(value, float) or math.isfinite(value)
