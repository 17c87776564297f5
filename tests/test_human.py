"""Claims about human.py: what is asked, what is kept, and that nothing is asked twice."""

import json

import pytest
import torch

from data import read_pairs
from judges.human import Human
from judges.load import load_judge


class Terminal:
    """Answers every question by a rule on the two texts shown; remembers the questions."""

    def __init__(self, rule, closes_after=None):
        self.rule, self.closes_after, self.questions = rule, closes_after, []

    def __call__(self, question):
        if len(self.questions) == self.closes_after:
            raise EOFError
        self.questions.append(question)
        first, second = (question.split(f"({side}) ")[1].split("\n")[0] for side in "12")
        return self.rule(first, second)


def alphabet(first, second):
    return "1" if first < second else "2"


def test_every_pair_is_asked_once_and_fills_both_sides_of_the_table(tmp_path):
    terminal = Terminal(alphabet)
    judge = Human(tmp_path / "votes.jsonl", ask=terminal)
    table = judge.preferences("p", ["b", "a", "c", "a"])
    assert len(terminal.questions) == 3  # a-b, a-c, b-c: the two a are one text
    assert table.tolist() == [[0.5, 0, 1, 0], [1, 0.5, 1, 0.5], [0, 0, 0.5, 0], [1, 0.5, 1, 0.5]]
    judge.preferences("p", ["c", "b"])
    assert len(terminal.questions) == 3
    judge.preferences("another prompt", ["c", "b"])
    assert len(terminal.questions) == 4


def test_votes_are_a_pair_file_and_are_not_asked_again(tmp_path):
    answers = {("a", "b"): "1", ("a", "c"): "0", ("b", "c"): "2"}

    def rule(first, second):
        answer = answers[min(first, second), max(first, second)]
        return answer if first < second else answer.translate(str.maketrans("12", "21"))

    path = tmp_path / "votes.jsonl"
    table = Human(path, ask=Terminal(rule)).preferences("p", ["a", "b", "c"])
    assert table.tolist() == [[0.5, 1, 0.5], [0, 0.5, 0], [0.5, 1, 0.5]]
    rows = {frozenset((row["chosen"], row["rejected"])): row for row in read_pairs(path)}
    assert rows[frozenset("bc")]["chosen"] == "c" and rows[frozenset("ac")]["probability"] == 0.5
    silent = Terminal(alphabet, closes_after=0)
    assert torch.equal(Human(path, ask=silent).preferences("p", ["a", "b", "c"]), table)


def test_a_closed_terminal_keeps_the_votes_and_says_so(tmp_path):
    path = tmp_path / "votes.jsonl"
    with pytest.raises(ValueError, match="2 votes are kept"):
        Human(path, ask=Terminal(alphabet, closes_after=2)).preferences("p", ["a", "b", "c"])
    assert len(path.read_text().splitlines()) == 2
    terminal = Terminal(alphabet)
    Human(path, ask=terminal).preferences("p", ["a", "b", "c"])
    assert len(terminal.questions) == 1


def test_sides_and_order_are_random_but_repeat_with_the_seed(tmp_path):
    responses = [f"text {n}" for n in range(8)]
    asked = []
    for number, seed in enumerate((0, 0, 1)):
        terminal = Terminal(alphabet)
        Human(tmp_path / f"{number}.jsonl", seed, terminal).preferences("p", responses)
        asked.append(terminal.questions)
    assert asked[0] == asked[1] != asked[2]
    smaller_first = sum(q.split("(1) ")[1].split("\n")[0] < q.split("(2) ")[1].split("\n")[0] for q in asked[0])
    assert 4 < smaller_first < 24  # of 28; a fair coin leaves this range 1 time in 4,000


def test_other_answers_are_asked_for_again(tmp_path):
    lines = iter(["yes", "", "3", "2"])
    judge = Human(tmp_path / "votes.jsonl", ask=lambda question: next(lines))
    table = judge.preferences("p", ["a", "b"])
    assert sorted(table.flatten().tolist()) == [0, 0.5, 0.5, 1] and next(lines, None) is None


def test_a_person_is_a_judge_on_the_command_line(tmp_path, monkeypatch):
    path = tmp_path / "mine.jsonl"
    judge = load_judge("human:" + json.dumps({"votes": str(path)}))
    monkeypatch.setattr(judge, "ask", Terminal(alphabet))
    assert judge.preferences_many(["p"], [["b", "a"]]).tolist() == [[[0.5, 0], [1, 0.5]]]
    assert path.exists()
