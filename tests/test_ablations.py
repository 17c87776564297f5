"""Claims about toy/ablations.py: the constant, the shortcut, and a table of logits that learns like the exact step."""

import json
import sys
from functools import partial

import pytest
import torch

from sppo import win_rates
from toy import ablations
from toy.ablations import (
    GAMES,
    SPREAD,
    START,
    Copies,
    disordered,
    everybody,
    full_table,
    judged,
    mean_logit_equilibrium,
    ordered,
    sampled,
    shortcut,
    soft_value,
)
from toy.games import ROCK_PAPER_SCISSORS, bradley_terry, cycle, random_game
from toy.tabular import play, sppo, sppo_half


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def start(policy=SPREAD, copies=1):
    return torch.tensor(policy, dtype=torch.float64).expand(copies, -1)


# ------------------------------------------------------------------------------------------------ the constant


@pytest.mark.parametrize("eta, value", [(0.1, 0.504), (1, 0.541), (10, 0.770), (100, 0.954), (1000, 0.993)])
def test_constant_of_a_strict_order_is_that_of_the_appendix(eta, value):
    """Its closed form is log((exp(η) - 1)/η)/η."""
    assert soft_value(ordered(100_000), eta).item() == pytest.approx(value, abs=5e-4)


def test_constant_of_coin_flips_goes_to_one_half_with_k_and_leaves_it_with_eta():
    few, many = (disordered(size, generator()) for size in (5, 500))
    assert soft_value(many, 10.0).mean().item() == pytest.approx(0.5, abs=0.005)
    assert soft_value(few, 10.0).mean().item() > 0.6
    assert soft_value(many, 1000.0).mean().item() > 0.54


def test_one_round_with_huge_eta_keeps_the_best_reply_by_log_z_and_all_above_average_by_one_half():
    payoff = cycle()
    path = [start(START)[0].log()]
    gain = (payoff @ path[0].exp() - 0.5).clamp(min=0) * path[0].exp()
    assert sppo(payoff, path, 1000.0).exp().tolist() == pytest.approx([0, 0, 1], abs=1e-9)
    assert sppo_half(payoff, path, 1000.0).exp().tolist() == pytest.approx((gain / gain.sum()).tolist(), abs=0.005)
    assert gain.count_nonzero() == 2


def test_one_half_stays_among_policies_where_eta_is_large():
    path = play(partial(sppo_half, eta=1000.0), cycle(), START, 100)
    assert path.exp().sum(-1).tolist() == pytest.approx([1] * 101, abs=1e-9)


# ------------------------------------------------------------------------------------------------ the shortcut


def test_shortcut_of_a_pure_cycle_is_one_half_everywhere():
    assert shortcut(cycle((0.881,) * 3)).flatten().tolist() == pytest.approx([0.5] * 9)


def test_shortcut_of_bradley_terry_doubles_the_logits():
    table = bradley_terry([0.3, -1.0, 2.0, 0.0])
    torch.testing.assert_close(shortcut(table).logit(), 2 * table.logit())
    torch.testing.assert_close(shortcut(table, orders=1), table)


def test_shortcut_is_transitive_and_ordered_by_mean_logit_also_where_the_table_is_not():
    tables = torch.stack([random_game(6, generator(seed)) for seed in range(50)])
    rebuilt = shortcut(tables)
    order = tables.logit().mean(-1).argsort(-1)  # worst response first
    ascending = torch.stack([table[k][:, k] for table, k in zip(rebuilt, order)])
    above = torch.triu(torch.ones(6, 6, dtype=torch.bool), 1)
    assert (ascending[:, above] < 0.5).all()
    assert any((table[k][:, k][above] > 0.5).any() for table, k in zip(tables, order))


def test_shortcut_by_policy_is_the_limit_of_samples():
    counts = torch.tensor([5, 3, 2])
    y = torch.arange(3).repeat_interleave(counts)
    of_samples = shortcut(cycle()[y][:, y])
    torch.testing.assert_close(of_samples, shortcut(cycle(), counts / counts.sum())[y][:, y].double(), rtol=1e-6, atol=1e-6)


def test_scores_of_certain_preferences_have_no_number_and_win_rates_refuses_them():
    with pytest.raises(ValueError, match="is nan"):
        win_rates(shortcut(cycle((1.0, 1.0, 1.0))))


@pytest.mark.parametrize("strengths", [ROCK_PAPER_SCISSORS, (0.99, 0.9, 0.6)])
def test_shortcut_stands_still_at_equal_scores_where_the_whole_table_moves(strengths):
    payoff = cycle(strengths)
    point = mean_logit_equilibrium(strengths)
    path = [point.log()]
    torch.testing.assert_close(judged(payoff, path, 1.0, shortcut), path[0])
    assert (judged(payoff, path, 1.0, full_table) - path[0]).abs().max() > 0.01


def test_whole_table_is_the_exact_step():
    path = [start()[0].log()]
    torch.testing.assert_close(judged(cycle(), path, 0.7, full_table), sppo(cycle(), path, 0.7))


# ------------------------------------------------------------------------------------------------ samples


@pytest.mark.parametrize("game", GAMES)
def test_a_round_on_all_of_many_samples_is_the_closed_form(game):
    """K = 4000: P̂ is off by about 0.4/√K, so log π by 0.3 · 0.006; the step itself is 20 times larger."""
    path = sampled(GAMES[game][None], start(), [full_table], 4000, "all", 1, 0.3, generator(), steps=100)
    exact = play(partial(sppo, eta=0.3), GAMES[game], SPREAD, 1)
    assert (exact[1] - exact[0]).abs().max() > 0.02
    torch.testing.assert_close(path[:, 0], exact, rtol=0, atol=0.006)


def test_winner_and_loser_reach_their_targets():
    """K = 2: the targets are ±η(P - ½)/2 (§5.3), and the third action takes up the slack; two samples alike teach nothing."""
    payoff = GAMES["transitive"]
    eta = 0.3
    path = sampled(payoff.expand(64, 3, 3), start(copies=64), [full_table], 2, "best-worst", 1, eta, generator())
    change = path[1] - path[0]
    counts = [(change.abs() < 1e-12).all(-1).sum().item()]
    for i, j in ((0, 1), (0, 2), (1, 2)):
        target = eta * (payoff[j, i] - 0.5) / 2
        reached = ((change[:, j] - target).abs() < 2e-3) & ((change[:, i] + target).abs() < 2e-3)
        counts.append(reached.sum().item())
    assert sum(counts) == 64 and min(counts) > 0


@pytest.mark.parametrize("judge", [full_table, shortcut])
def test_one_response_of_each_teaches_nothing_about_a_pure_cycle(judge, monkeypatch):
    """Distinct responses are no sample of π: every win rate is ½, also far from the equilibrium."""
    monkeypatch.setattr(Copies, "sample", lambda self, prompts: [[0, 1, 2] for _ in prompts])
    path = sampled(GAMES["pure cycle"][None], start(), [judge], 3, "all", 3, 0.3, generator())
    torch.testing.assert_close(path[-1], path[0], rtol=0, atol=1e-9)


def test_replicates_do_not_touch_each_other(monkeypatch):
    monkeypatch.setattr(Copies, "sample", lambda self, prompts: [[0, 1]] + [[k % 3, 2] for k in prompts[1:]])
    alone, among = (
        sampled(cycle().expand(n, 3, 3), start(copies=n), [full_table], 2, "all", 2, 0.3, generator()) for n in (1, 5)
    )  # fmt: skip
    torch.testing.assert_close(among[:, 0], alone[:, 0], rtol=0, atol=1e-4)
    assert (alone[-1] - alone[0]).abs().max() > 0.05


def test_judges_take_equal_blocks_of_prompts():
    payoff = torch.stack([cycle()] * 4)
    game = Copies(payoff, start(copies=4), [full_table, shortcut], 3, generator())
    tables = game.judge([0, 1, 2, 3], [[0, 1, 2], [0, 0, 1]] * 2)
    torch.testing.assert_close(tables[0], cycle())
    torch.testing.assert_close(tables[2], shortcut(cycle()))
    torch.testing.assert_close(tables[3], shortcut(tables[1]))


def test_moving_every_action_is_unbiased():
    """Mean log-ratio differences over 4000 replicates with K = 2 are those of exact win rates; normalisers drop out."""
    path = [start(copies=4000).log()]
    step = everybody(cycle(), path, 0.3, 2, generator()) - path[0]
    exact = sppo(cycle(), [path[0][0]], 0.3) - path[0][0]
    for i, j in ((0, 1), (1, 2)):
        assert (step[:, i] - step[:, j]).mean().item() == pytest.approx((exact[i] - exact[j]).item(), abs=0.006)


# ------------------------------------------------------------------------------------------------ the script


SMALL = dict(replicates=2, rounds=3, sizes=(2, 3), games=2, actions=(3,), long=20)


def test_main_writes_figure_and_numbers_and_prints_them(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ablations, "measure", partial(ablations.measure, **SMALL))
    monkeypatch.setattr(sys, "argv", ["ablations", "--out", str(tmp_path)])
    assert ablations.main() == 0
    assert (tmp_path / "ablations.png").read_bytes().startswith(b"\x89PNG")
    numbers = json.loads((tmp_path / "ablations.json").read_text())
    assert numbers["tables"]["K = 2, P(winner beats loser)"] == pytest.approx([0.9, 0.988], abs=1e-3)
    assert "0.504       0.541       0.770       0.954       0.993" in capsys.readouterr().out


def test_same_seed_same_numbers_and_another_seed_others():
    first, again, other = (ablations.measure(seed, **SMALL) for seed in (0, 0, 1))
    assert first == again
    assert first["samples"] != other["samples"] and first["shortcut"]["random"] != other["shortcut"]["random"]


def test_unwritable_folder_is_named(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(ablations, "measure", partial(ablations.measure, **SMALL))
    monkeypatch.setattr(sys, "argv", ["ablations", "--out", str(tmp_path / "file")])
    assert ablations.main() == 2
    assert str(tmp_path / "file") in capsys.readouterr().err
