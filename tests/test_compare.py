"""Claims about --compare m: a judge that is asked about some of the pairs, and the win rates that come of it."""

import itertools
from collections import Counter

import pytest
import torch
from children import content, flags
from conftest import tiny_settings

import train
from judges.base import Judge
from judges.budget import compare, draw_pairs, fill
from sppo import win_rates
from toy.debug import build_debugging

ASKED = []


def near(prompt, responses):
    """A rule that writes down what it is asked; its preferences go in a circle, and are small enough that nothing is cut."""
    ASKED.append((prompt, *responses))
    value = torch.tensor([float(sum(map(ord, text)) % 17) for text in responses])
    return 0.5 + 0.1 * torch.sin(value[:, None] - value)


class Table(Judge):
    """P(a beats b) of texts that are numbers, from a table."""

    def __init__(self, table):
        self.table = table

    def preferences_many(self, prompts, responses):
        return torch.stack([self.table[[int(a) for a in row]][:, [int(b) for b in row]] for row in responses])


def random_table(K, seed=0):
    draw = torch.Generator().manual_seed(seed)
    margin = 0.2 * torch.randn(K, K, generator=draw)
    return 0.5 + ((margin - margin.T) / 2).clamp(-0.2, 0.2)


@pytest.mark.parametrize(("K", "m"), [(4, 2), (4, 3), (5, 2), (6, 4), (6, 5), (16, 2)])
def test_each_response_meets_m_others_and_no_pair_is_drawn_twice(K, m):
    for seed in range(20):
        pairs = draw_pairs(K, m, torch.Generator().manual_seed(seed))
        assert len(set(pairs)) == len(pairs) == K * m // 2 and all(i < j for i, j in pairs)
        met = Counter(k for pair in pairs for k in pair)
        assert set(met.values()) == {m} and len(met) == K


@pytest.mark.parametrize(("K", "m"), [(4, 2), (5, 2), (5, 4)])
def test_over_all_seatings_the_win_rates_average_to_those_of_all_pairs(K, m):
    """By enumeration of the K! orders around the circle, for preferences with circles in them."""
    table = random_table(K)
    total = torch.zeros(K, dtype=torch.float64)
    orders = list(itertools.permutations(range(K)))
    circle = draw_pairs(K, m, torch.Generator().manual_seed(0))  # some seating; the orders turn it into every other
    for seat in orders:
        known = torch.zeros(K, K, dtype=torch.bool)
        for i, j in circle:
            known[seat[i], seat[j]] = known[seat[j], seat[i]] = True
        margin = (table.double() - 0.5).masked_fill(~known, 0)
        total += (0.5 + fill(margin, known)).mean(-1)
    assert torch.allclose(total / len(orders), table.double().mean(-1), atol=1e-6)


def test_all_opponents_give_the_whole_table():
    table = random_table(6, seed=3)
    pairs = [draw_pairs(6, 5, torch.Generator().manual_seed(1))]
    (found,) = compare(Table(table), ["p"], [list("012345")], "t", pairs)
    assert torch.allclose(found, table.fill_diagonal_(0.5), atol=1e-6)


def test_what_was_judged_stays_as_it_was_and_the_rest_is_a_table_of_preferences():
    table = random_table(7, seed=2)
    pairs = [draw_pairs(7, 2, torch.Generator().manual_seed(seed)) for seed in range(5)]
    found = list(compare(Table(table), ["p"] * 5, [list("0123456")] * 5, "t", pairs))
    win_rates(torch.stack(found))
    for one, row in zip(found, pairs):
        for i, j in row:
            assert one[i, j] == pytest.approx(table[i, j].item(), abs=1e-6)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compare")
    build_debugging(folder)
    return folder


def test_a_run_asks_as_many_pairs_as_it_says_and_ends_alike_when_it_is_stopped_while_it_judges(world, tmp_path, capsys):
    settings = dict(judge="test_compare:near", samples=6, compare=2, rounds=1)
    ASKED.clear()
    train.run(tiny_settings(world, tmp_path / "whole", **settings))
    probe = ASKED.pop(0)
    assert probe[1:] == ("yes", "no") and len(ASKED) == 2 * 6 * 2 // 2 and all(len(row) == 3 for row in ASKED)

    calls = len(ASKED)
    count, whole = iter(range(100)), near

    def failing(prompt, responses):
        if next(count) == 6:
            raise ValueError("away")
        return whole(prompt, responses)

    failing.__qualname__ = "near"
    globals()["near"] = failing
    try:
        assert train.main(flags(tiny_settings(world, tmp_path / "run", **settings))) == 2
    finally:
        globals()["near"] = whole
    ASKED.clear()
    assert train.main(flags(tiny_settings(world, tmp_path / "run", **settings))) == 0
    assert len(ASKED) - 1 == calls - 5  # one call was the first probe
    assert content(tmp_path / "run") == content(tmp_path / "whole")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(samples=5, compare=5), "--compare is 5, expected an even number below --samples 5"),
        (dict(samples=5, compare=3), "--compare is 3, expected an even number below --samples 5"),
        (dict(samples=4, compare=4), "--compare is 4, expected an even number below --samples 4"),
        (dict(samples=4, compare=2, target="optimistic"), "neither --opponents nor --target optimistic"),
    ],
)
def test_what_cannot_be_is_refused(world, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        train.run(tiny_settings(world, tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()
