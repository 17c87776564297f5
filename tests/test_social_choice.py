"""Claims about toy/social_choice.py: voting rules against their definitions by enumeration, scipy, and by hand."""

import itertools
import json

import pytest
import torch

from engine.files import write_lines
from sppo import dpo_loss
from toy import social_choice
from toy.games import bradley_terry, cycle, dominant_and_cycle, nash, random_game
from toy.lab import script
from toy.social_choice import (
    MISTAKES,
    borda,
    clone,
    condorcet,
    leader,
    misses_smith,
    misses_winner,
    moved_by_copy,
    read_votes,
    smallest,
    smith,
    support,
    vote_tables,
)
from toy.tabular import fit_pairs


def games(count=400):
    """Random games of 3 to 8 responses; in all of them the equilibrium is unique."""
    return [random_game(3 + seed % 6, torch.Generator().manual_seed(seed)) for seed in range(count)]


def names(chosen):
    return set(chosen.nonzero()[:, 0].tolist())


# ------------------------------------------------------------------------------------------------ definitions


@pytest.mark.parametrize(("n", "voters"), [(2, 2), (3, 2), (4, 2), (5, 1)])
def test_smith_set_is_the_smallest_of_all_sets_that_beat_everybody_outside(n, voters):
    """Of every table of votes, ties included, by enumeration of all sets."""
    sets = [set(some) for size in range(1, n + 1) for some in itertools.combinations(range(n), size)]
    for table in vote_tables(n, voters):
        dominating = [some for some in sets if all(table[i, j] > 0.5 for i in some for j in set(range(n)) - some)]
        assert names(smith(table)) == min(dominating, key=len)


def test_condorcet_winner_is_a_smith_set_of_one():
    for game in games(200):
        assert condorcet(game).any() == (smith(game).sum() == 1)
        assert names(condorcet(game)) <= names(smith(game))


def test_rules_of_a_batch_are_those_of_its_tables():
    tables = torch.stack([random_game(5, torch.Generator().manual_seed(seed)) for seed in range(20)])
    for rule in (borda, leader, condorcet, smith, support):
        assert torch.equal(rule(tables), torch.stack([rule(table) for table in tables]))


def test_vote_tables_are_all_tables():
    tables = vote_tables(3, 2)
    assert len(tables) == 27 == len({tuple(table.flatten().tolist()) for table in tables})
    assert torch.equal(tables + tables.mT, torch.ones_like(tables))


@pytest.mark.parametrize("seed", range(20))
def test_bradley_terry_ranks_by_borda(seed):
    """Its maximum-likelihood scores (Newton's method), every pair compared equally often: Σ_j σ(r_i - r_j) = Σ_j P_ij, and
    the left side grows with r_i."""
    game = 0.02 + 0.96 * random_game(6, torch.Generator().manual_seed(seed))
    game.fill_diagonal_(0.5)
    scores = fit_pairs(game, torch.full((6,), 1 / 6).double().log(), 1.0, dpo_loss)
    assert torch.equal(scores.argsort(), game.mean(-1).argsort())


# ------------------------------------------------------------------------------------------------ why Nash


def test_support_of_nash_lies_in_the_smith_set_of_400_random_games():
    assert all(names(support(game)) <= names(smith(game)) for game in games())


def test_condorcet_winner_gets_everything_in_400_random_games():
    won = [game for game in games() if condorcet(game).any()]
    assert len(won) > 100 and all(nash(game)[condorcet(game)].item() == pytest.approx(1, abs=1e-9) for game in won)


def test_a_copy_changes_no_share_of_nash_in_400_random_games():
    """Every response is copied in turn; the two copies share what the one had."""
    for game in games():
        before = nash(game)
        for k in range(len(game)):
            after = nash(clone(game, k))
            after[k] += after[-1]
            assert after[:-1].tolist() == pytest.approx(before.tolist(), abs=1e-9)


@pytest.mark.parametrize("n", [3, 5])
def test_nash_of_votes_is_what_linear_programming_gives_and_stays_in_the_smith_set(n):
    """Of an odd number of voters no pair ties, and then the maximal lottery is unique (Laffond, Laslier, Le Breton 1997)."""
    optimize = pytest.importorskip("scipy.optimize")
    tables = vote_tables(n, 1 if n == 5 else 3)
    for table in tables[:: max(1, len(tables) // 60)]:
        bound = torch.cat([-table.T, torch.ones(n, 1)], 1).numpy()
        where = ([0.0] * n, [[1.0] * n + [0.0]], [1.0], [(0, None)] * n + [(None, None)])
        theirs = optimize.linprog([0.0] * n + [-1.0], bound, *where)
        assert nash(table).tolist() == pytest.approx(theirs.x[:n].tolist(), abs=1e-8)
        assert names(support(table)) <= names(smith(table))


# ------------------------------------------------------------------------------------------------ how others go wrong


@pytest.mark.parametrize("name", MISTAKES)
def test_smallest_example_says_what_stands_above_it_in_the_figure(name):
    mistake, rule, says = MISTAKES[name]
    example = smallest(mistake, rule)
    table = torch.tensor(example["table"], dtype=torch.float64)
    A, B, C = range(3)
    if "Condorcet" in name:
        assert says == "C beats both, Borda names A"
        assert (len(table), example["voters"], names(condorcet(table)), names(borda(table))) == (3, 5, {C}, {A})
    elif "copy" in name:
        assert says == "a copy of C makes Borda name B, not A"
        assert (len(table), example["voters"], names(borda(table)), names(borda(clone(table, C)))) == (3, 3, {A}, {B})
    else:
        assert says == "all beat C, the leader is C"
        assert (len(table), example["voters"], names(leader(table))) == (4, 3, {C})
        assert (table[C, [A, B, 3]] < 0.5).all() and C not in names(smith(table))


def test_no_smaller_example_exists():
    """Of Borda and the Condorcet winner, by the arithmetic of 3 responses: C needs a majority of both, A all of B."""
    for voters in range(1, 5):
        assert not misses_winner(vote_tables(3, voters), borda).any()
    assert not any(misses_winner(vote_tables(2, voters), borda).any() for voters in range(1, 20))
    assert not any(misses_smith(vote_tables(3, voters), leader).any() for voters in range(1, 10))
    assert not any(misses_smith(vote_tables(4, voters), leader).any() for voters in (1, 2))


def test_the_leader_never_misses_a_condorcet_winner_and_is_never_moved_by_a_copy():
    """All tables of 2 to 4 responses and up to 4 voters, and random games."""
    tables = [vote_tables(n, v) for n in (2, 3, 4) for v in (1, 2, 3, 4)] + [game[None] for game in games(200)]
    for batch in tables:
        assert not misses_winner(batch, leader).any() and not moved_by_copy(batch, leader).any()


def test_the_leader_is_the_best_of_all_mixtures_if_the_follower_sees_the_response():
    """Σ_i π_i min_j P_ij is linear in π. It is 0.2 in rock–paper–scissors, where Nash is sure of ½ from a blind follower."""
    assert cycle().amin(1).tolist() == pytest.approx([0.2, 0.1, 0.1]) and names(leader(cycle())) == {0}
    generator = torch.Generator().manual_seed(0)
    for game in games(50):
        mixtures = torch.softmax(2 * torch.randn(1000, len(game), generator=generator).double(), -1)
        assert (mixtures @ game.amin(1)).max() <= game.amin(1).max() + 1e-12
        assert (nash(game) @ game).min().item() == pytest.approx(0.5, abs=1e-9)


@pytest.mark.parametrize("game", [bradley_terry([0.0, 0.5, 2.0]), dominant_and_cycle()])
def test_where_somebody_is_best_all_rules_agree(game):
    assert names(support(game)) == names(leader(game)) == names(borda(game)) == names(condorcet(game))


def test_first_check_of_borda_against_condorcet_winners():
    """Of 400 random games it misses the Condorcet winner in a few; a copy moves it in about half."""
    stacks = [torch.stack([game for game in games() if len(game) == n]) for n in range(3, 9)]
    missed, moved = (sum(int(mistake(stack, borda).sum()) for stack in stacks) for mistake in (misses_winner, moved_by_copy))
    assert 4 <= missed <= 20 and 150 <= moved <= 250


# ------------------------------------------------------------------------------------------------ real votes


def test_pandalms_voters_agree_with_borda_as_often_as_with_nash(shared):
    """The numbers of the docstring. 999 pairs; 467 triples of models on a prompt are complete (README of the data)."""
    models, pooled, single = read_votes(str(shared / "pandalm/pairs.jsonl"))
    assert len(models) == 5 and torch.allclose(pooled + pooled.T, torch.ones(5, 5).double())
    winner = models.index("llama-7b")
    assert names(borda(pooled)) == names(support(pooled)) == names(condorcet(pooled)) == {winner}
    assert sum(len(table) == 3 for table in single) == 467
    assert social_choice.count(single) == {
        "tables": 619, "with a Condorcet winner": 551, "Borda passes over it": 0, "Borda ties it with another": 10,
        "everybody is beaten": 1,
    }  # fmt: skip


def line(chosen, rejected, votes, prompt="p", **more):
    return {
        "prompt": prompt,
        "chosen": "x",
        "rejected": "y",
        "votes": votes,
        "chosen_model": chosen,
        "rejected_model": rejected,
    } | more


def test_votes_become_tables_by_hand(tmp_path):
    """a beats b by 2 of 3, and b ties with c once; c beats a. On prompt q only a and b were compared."""
    lines = [line("a", "b", [1, 1, 2]), line("b", "c", [0, 1, 2]), line("c", "a", [1, 1, 1]), line("b", "a", [1, 1, 1], "q")]
    write_lines(tmp_path / "votes.jsonl", lines)
    models, pooled, single = read_votes(str(tmp_path / "votes.jsonl"))
    assert models == ["a", "b", "c"]
    assert single[0].tolist() == [pytest.approx(row) for row in ([0.5, 2 / 3, 0], [1 / 3, 0.5, 0.5], [1, 0.5, 0.5])]
    assert len(single) == 1 and pooled[0, 1].item() == pytest.approx(1 / 3)


def test_votes_are_exact_where_the_probability_is_rounded(tmp_path):
    """.6667 for 2 of 3 would break Borda's ties; a line without votes has only its probability."""
    lines = [line("a", "b", [1, 1, 2], probability=0.6667), line("a", "c", [], probability=0.75)]
    write_lines(tmp_path / "votes.jsonl", lines)
    _, pooled, _ = read_votes(str(tmp_path / "votes.jsonl"))
    assert pooled[0].tolist() == [0.5, pytest.approx(2 / 3, abs=1e-15), 0.75]


# ------------------------------------------------------------------------------------------------ the script


def run(arguments):
    parts = (social_choice.measure, social_choice.print_table, social_choice.draw)
    return script("social_choice", "", *parts, arguments, social_choice.add_flags)


def test_the_script_writes_a_table_and_a_figure(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(social_choice, "SIZES", (3, 4))
    monkeypatch.setattr(social_choice, "GAMES", 40)
    write_lines(tmp_path / "votes.jsonl", [line("a", "b", [1, 1, 2]), line("b", "c", [1, 1, 1]), line("a", "c", [1, 1, 1])])
    assert run(["--out", str(tmp_path), "--votes", str(tmp_path / "votes.jsonl")]) == 0
    result = json.loads((tmp_path / "social_choice.json").read_text())
    assert result["rates"]["Nash"] == [0, 0] and result["votes"]["tables"] == 1
    assert (tmp_path / "social_choice.png").stat().st_size > 10_000
    table = capsys.readouterr().out
    assert all(name in table for name in (*MISTAKES, "the small world", "real votes"))
    world = result["tables"]["the small world"]
    assert world["Nash"] == pytest.approx([4 / 11, 3 / 11, 4 / 11, 0, 0, 0, 0]) and world["names"][0] == "right."
    assert max(world["mean win rate"]) == world["mean win rate"][0]


@pytest.mark.parametrize(
    ("content", "message"), [(None, "no such file"), ({"prompt": "p"}, "chosen"), ("models", "chosen_model")]
)
def test_a_votes_file_that_says_nothing_of_models_is_refused(tmp_path, capsys, content, message):
    path = tmp_path / "votes.jsonl"
    if content:
        write_lines(path, [content if content != "models" else {"prompt": "p", "chosen": "x", "rejected": "y"}])
    assert run(["--out", str(tmp_path), "--votes", str(path)]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("toy.social_choice: ") and message in error and "votes.jsonl" in error
