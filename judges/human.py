"""Be the judge yourself: `--judge human` shows pairs of responses at the terminal.

    python train.py --judge 'human:{"votes": "my-votes.jsonl"}' …
    python prefmodel.py train --pairs my-votes.jsonl …       to learn a judge of your taste from it

The votes file is a pair file. It is written whole after each answer, so nothing is lost by Ctrl-C
or a crash, and a pair that it holds is not asked again.
"""

import itertools
import random
from collections.abc import Callable
from pathlib import Path

import torch

from data import read_pairs
from engine.files import read_lines, write_lines
from engine.lock import hold
from engine.terminal import visible
from judges.base import Judge

ANSWERS = {"1": 1.0, "2": 0.0, "0": 0.5}  # P(the first one shown wins)


class Human(Judge):
    """A judge at the terminal. `ask` takes a question and returns the line that was typed."""

    def __init__(self, votes: str | Path = "votes.jsonl", seed: int = 0, ask: Callable = input):
        self.path = Path(votes)
        self.random = random.Random(seed)
        self.ask = ask
        self.known = {}  # (prompt, first, second): P(first beats second)
        self.rows = []  # of the votes file
        if self.path.exists() and not self.path.is_file():
            raise ValueError(f"{self.path}: expected a file of votes, found a folder or a device")
        hold(self.path)  # two processes would write over each other's votes

        if self.path.exists() and self.path.stat().st_size:
            # Read twice: the rows are written back with columns that are not ours.
            self.rows = [row for _, row in read_lines(self.path)]
            for row in read_pairs(self.path):
                self.learn(row["prompt"], row["chosen"], row["rejected"], row["probability"])

    def learn(self, prompt: str, first: str, second: str, probability: float) -> None:
        self.known[prompt, first, second] = probability
        self.known[prompt, second, first] = 1 - probability

    def preferences_many(self, prompts, responses):
        """Ask for each pair of different texts that has no answer yet; (N, K, K).

        Questions come in random order, the two texts on random sides.
        """
        # A dictionary and not a set, since it keeps their order, which the seed then shuffles.
        pairs = {}
        for prompt, row in zip(prompts, responses, strict=True):
            for pair in itertools.combinations(sorted(set(row)), 2):
                if (prompt, *pair) not in self.known:
                    pairs[prompt, *pair] = None

        questions = list(pairs)
        self.random.shuffle(questions)
        for number, (prompt, *pair) in enumerate(questions, 1):
            self.random.shuffle(pair)
            self.vote(prompt, *pair, f"{number}/{len(questions)}")

        return torch.tensor([self.table(*row) for row in zip(prompts, responses)])

    def table(self, prompt: str, responses: list[str]) -> list[list[float]]:
        """K × K numbers; a text ties with itself."""
        rows = []
        for a in responses:
            rows.append([0.5 if a == b else self.known[prompt, a, b] for b in responses])
        return rows

    def vote(self, prompt: str, first: str, second: str, place: str) -> None:
        """Ask about a pair until the answer is valid, and write it down."""
        question = f"\n[{place}] {prompt}\n\n  (1) {first}\n\n  (2) {second}\n\n"
        question = visible(question)
        question += "Which is better? 1, 2, or 0 for a tie: "
        try:
            answer = self.ask(question).strip()
            while answer not in ANSWERS:
                answer = self.ask(f"{answer!r} is not 1, 2 or 0: ").strip()
        except EOFError:
            kept = f"{len(self.rows)} votes are kept in {self.path}"
            raise ValueError(f"human judge: the terminal was closed; {kept}") from None

        self.learn(prompt, first, second, ANSWERS[answer])
        chosen, rejected = (second, first) if answer == "2" else (first, second)
        row = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
        self.rows.append(row | {"probability": 0.5 if answer == "0" else 1.0})

        # After each answer, so that none is lost.
        write_lines(self.path, self.rows)
