"""Be the judge yourself: `--judge prefmodel:human` shows pairs of responses at the terminal and keeps every answer.

    python train.py --judge 'prefmodel:human:{"votes": "my-votes.jsonl"}' …
    python prefmodel.py train --pairs my-votes.jsonl …       afterwards, a PreferenceModel that has learned your taste

The votes file is a pair file. It is written whole behind each answer, so nothing is lost by Ctrl-C or a crash, and a pair
that it holds is not asked again.
"""

import itertools
import random
from pathlib import Path

import torch

from data import read_lines, read_pairs, write_lines

ANSWERS = {"1": 1.0, "2": 0.0, "0": 0.5}


class Human:
    """A judge (see prefmodel.py) at the terminal. `ask` takes a question and returns the line that was typed."""

    def __init__(self, votes="votes.jsonl", seed=0, ask=input):
        self.path, self.ask, self.random, self.rows = Path(votes), ask, random.Random(seed), []
        self.known, pairs = {}, []
        if self.path.exists() and self.path.stat().st_size:
            pairs, self.rows = read_pairs(self.path), [row for _, row in read_lines(self.path)]  # with columns that are not ours
        for row in pairs:
            self.learn(row["prompt"], row["chosen"], row["rejected"], row["probability"])

    def learn(self, prompt, first, second, probability):
        self.known[prompt, first, second], self.known[prompt, second, first] = probability, 1 - probability

    def preferences(self, prompt, responses):
        return self.preferences_many([prompt], [responses])[0]

    def preferences_many(self, prompts, responses):
        """Ask for every pair of different texts that has no answer yet, in random order and on random sides; (N, K, K)."""
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
        tables = [
            [[0.5 if a == b else self.known[prompt, a, b] for b in row] for a in row] for prompt, row in zip(prompts, responses)
        ]
        return torch.tensor(tables)

    def vote(self, prompt, first, second, place):
        question = f"\n[{place}] {prompt}\n\n  (1) {first}\n\n  (2) {second}\n\nWhich is better? 1, 2, or 0 for a tie: "
        try:
            while (answer := self.ask(question).strip()) not in ANSWERS:
                question = f"{answer!r} is not 1, 2 or 0: "
        except EOFError:
            raise ValueError(f"human judge: the terminal was closed; {len(self.rows)} votes are kept in {self.path}") from None
        self.learn(prompt, first, second, ANSWERS[answer])
        if answer == "2":
            first, second = second, first
        probability = 0.5 if answer == "0" else 1.0
        self.rows.append({"prompt": prompt, "chosen": first, "rejected": second, "probability": probability})
        write_lines(self.path, self.rows)
