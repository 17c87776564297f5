"""Claims about toy/arrival.py: what samples, judge and fit do to the last policy, each with the others exact."""

from functools import partial

import pytest
import torch
from conftest import tiny_settings
from safetensors.torch import load_file

import train
from data import read_pairs
from engine.files import write_json, write_lines
from judges.base import Rule
from model import Transformer
from toy import arrival, tabular
from toy.debug import build_debugging
from toy.games import cycle, exploitability, nash, random_game
from toy.text_game import SUMS, classify, draw_pairs, oracle

N = 100  # tables


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def play(stages, samples=0, error=arrival.EXACT, start=arrival.START[:N]):
    """Mean exploitability of the last policies of 100 tables."""
    game = arrival.TABLES[: len(start)]
    return arrival.gain(game, arrival.play(game, start, stages, samples, error, generator())).mean().item()


def noise(rounds, eta, every, samples, lr=1.0, error=arrival.EXACT):
    """The same from the equilibrium: what is left then is noise alone."""
    return play([(rounds, eta, every, lr)], samples, error, nash(cycle()).expand(N, 3))


# ------------------------------------------------------------------------ samples


@pytest.mark.parametrize(
    ("every", "step"),
    [(0, partial(tabular.optimistic, eta=0.7)), (5, partial(tabular.moving_reference, eta=0.7, tau=0.1, every=5))],
)
def test_without_noise_it_is_the_play_of_the_tables(every, step):
    path = tabular.play(step, cycle(), (0.8, 0.15, 0.05), 23)
    start = torch.tensor([[0.8, 0.15, 0.05]]).double().expand(N, 3)
    last = arrival.play(arrival.TABLES[:N], start, [(23, 0.7, every, 1.0)], 0, arrival.EXACT, generator())
    assert torch.allclose(last, path[-1].exp().expand(N, 3), atol=1e-6)


@pytest.mark.parametrize("name", ["optimistic", "moving reference"])
def test_without_noise_80_rounds_are_enough(name):
    assert play(arrival.SCHEDULES[name]) < 1e-4


def test_a_falling_step_size_does_not_help_optimistic_updates_but_a_moving_reference():
    """An error turns by ηω a round and shrinks by (ηω)²/2, while samples add η²: whatever η, as much is left. With a reference
    it shrinks by ητ: a quarter of the step leaves half of the noise, √(η/τ)."""
    optimistic = [noise(int(400 / eta), eta, 0, 400) for eta in (0.5, 1.0)]
    moving = [noise(int(100 / eta), eta, int(20 / eta), 400) for eta in (0.5, 2.0)]
    assert optimistic[0] == pytest.approx(optimistic[1], rel=0.2)
    assert moving[0] == pytest.approx(moving[1] / 2, rel=0.2)
    assert moving[1] < optimistic[1]


@pytest.mark.parametrize("every", [0, 10])
def test_four_times_the_samples_halve_what_is_left(every):
    few, many = (noise(80, 2.0, every, samples) for samples in (400, 1600))
    assert many == pytest.approx(few / 2, rel=0.2)


# ------------------------------------------------------------------------ the judge


@pytest.mark.parametrize("seed", range(3))
def test_equilibrium_of_a_large_game_is_one(seed):
    game = random_game(40, generator(seed))
    policy = arrival.equilibrium(game, [0, 1, 2])
    assert exploitability(game, policy) < 1e-9 and policy.sum() == pytest.approx(1) and policy.min() >= 0
    assert torch.allclose(policy, nash(game), atol=1e-9)


def test_what_the_judge_was_taught_is_all_that_its_pairs_contain():
    taught = set(arrival.TAUGHT)
    for pair in draw_pairs(1000, (0.9, 0.9, 0.8), generator()):
        for response in (pair["chosen"], pair["rejected"]):
            assert response in taught or classify(pair["prompt"], response) == 6


def preferences(**settings):
    """(100, 57, 57): the oracle's, under these settings."""
    rule = Rule(partial(oracle, **settings))
    return rule.preferences_many(list(SUMS), [arrival.TAUGHT] * len(SUMS)).double()


@pytest.mark.parametrize("strengths", [(0.9, 0.9, 0.8), (0.6, 0.9, 0.7)])
def test_a_judges_error_is_what_its_equilibrium_is_exploited_by_in_the_true_game(strengths):
    """Of the oracle it is 0; of an oracle with other strengths that of its circle's equilibrium."""
    errors = arrival.judged(preferences(strengths=strengths), {})
    assert list(errors) == ["equilibrium", "… of right sums"]
    expected = exploitability(cycle(), nash(cycle(strengths))).item()
    assert (expected < 1e-9) == (strengths == (0.9, 0.9, 0.8))
    for own, true in errors.values():
        assert own == pytest.approx(0, abs=1e-6) and true == pytest.approx(expected, abs=1e-6)


# ------------------------------------------------------------------------ the fit


@pytest.mark.parametrize("error", [(1.0, 0.0, 0.0), (0.7, 0.03, 0.0), (0.7, 0.0, 0.05)])
def test_how_targets_were_met_is_found_again(error, monkeypatch):
    """Of policies that were made so: part of the exact step, one error for all prompts, one for each."""
    part, common, each = error
    own, random = preferences(), generator()
    policies = [torch.rand(N, len(arrival.TAUGHT), generator=random).double() + 0.5]
    game = cycle()
    for _ in range(40):
        new = policies[-1].clone()
        old = policies[-1].gather(1, arrival.RIGHT)
        rate = (old / old.sum(1, keepdim=True)) @ game.T
        added = common * torch.randn(1, 3, generator=random) + each * torch.randn(N, 3, generator=random)
        new.scatter_(1, arrival.RIGHT, old * (part * 2 * rate + added).exp())
        policies.append(new / new.sum(1, keepdim=True))

    monkeypatch.setattr(arrival, "shares", lambda number: policies[number])
    found = arrival.met(own, 2.0, list(range(41)))
    assert found[0] == pytest.approx(part, abs=0.05)
    assert found[1] == pytest.approx(common, rel=0.5, abs=0.01)
    assert found[2] == pytest.approx(each, rel=0.3, abs=0.01)


@pytest.mark.parametrize("name", ["optimistic", "moving reference"])
def test_the_error_of_the_fit_falls_with_the_learning_rate_and_not_with_the_step_size(name):
    """So a smaller η alone makes the last policy worse, and a smaller learning rate better."""
    smaller = [
        play(arrival.SCHEDULES[name + then], 0, arrival.ERROR, arrival.START) for then in ("", ", then η/2", ", then lr/3")
    ]
    assert smaller[2] < 0.6 * smaller[0] < 0.6 * smaller[1]


# ------------------------------------------------------------------------ of a run


@pytest.mark.parametrize(("common", "own"), [(0.05, 0.0), (0.0, 0.1), (0.03, 0.2)])
def test_deviations_are_those_that_were_added_to_the_equilibrium(common, own):
    """Each response's log-probability moves by Gaussian numbers; a common shift of all three changes no policy."""
    random = generator()
    shift = common * torch.tensor([1.0, -1.0, 0.0]).double() + own * torch.randn(N, 3, generator=random).double()
    policy = torch.full((N, len(arrival.TAUGHT)), 1e-3).double()
    policy.scatter_(1, arrival.RIGHT, nash(cycle()) * shift.exp())
    found = arrival.deviations(policy, (0.9, 0.9, 0.8))
    aim = torch.tensor([4, 3, 4]).double() / 11
    size = (aim[:2].sum() - (aim[0] - aim[1]) ** 2).sqrt().item()  # standard deviation of (1, -1, 0)
    spread = (aim * (1 - aim)).sum().sqrt().item()  # of three independent numbers
    assert found[0] == pytest.approx(common * size, abs=own / 8 + 1e-9)
    assert found[1] == pytest.approx(own * spread, rel=0.15, abs=1e-9)


def test_softened_pairs_have_the_probabilities_whose_coin_flips_the_votes_were(tmp_path):
    pairs = draw_pairs(4000, (0.9, 0.9, 0.8), generator())
    write_lines(tmp_path / "pairs.jsonl", pairs)
    write_json(tmp_path / "world.json", {"strengths": [0.9, 0.9, 0.8]})
    assert arrival.main([str(tmp_path), "--soft", str(tmp_path / "soft.jsonl")]) == 0
    soft = read_pairs(tmp_path / "soft.jsonl")
    assert [(pair["chosen"], pair["rejected"]) for pair in soft] == [(pair["chosen"], pair["rejected"]) for pair in pairs]

    # Of the pairs with probability p or 1 - p, whose chosen one won, a share of p has p.
    for p in (0.8, 0.9, 0.95):
        sides = [pair["probability"] > 0.5 for pair in soft if min(abs(pair["probability"] - q) for q in (p, 1 - p)) < 1e-9]
        assert sum(sides) / len(sides) == pytest.approx(p, abs=0.05) and len(sides) > 100


def test_a_second_run_begins_where_the_first_ended_and_takes_its_policy_as_reference(tmp_path):
    build_debugging(tmp_path / "world")
    same = dict(target="regularized", tau=0.1)
    train.run(tiny_settings(tmp_path / "world", tmp_path / "first", rounds=1, **same))
    last = tmp_path / "first/round-01/policy"
    train.run(tiny_settings(tmp_path / "world", tmp_path / "second", rounds=1, policy=str(last), **same))

    folder = tmp_path / "second/round-01"
    logps, reference = (load_file(folder / f"{name}.safetensors")[name] for name in ("logps", "reference"))
    assert torch.allclose(logps, reference, atol=1e-5)
    new, old = (Transformer.from_pretrained(path) for path in (folder / "policy", last))
    base = Transformer.from_pretrained(tmp_path / "world/policy")
    steps = [sum((a - b).norm() ** 2 for a, b in zip(new.parameters(), x.parameters())).sqrt() for x in (old, base)]
    assert 0 < steps[0] < steps[1]
