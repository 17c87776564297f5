"""Claims about toy/judges.py: what each form of judge learns from coin flips, where SPPO goes with it, what judging costs."""

from itertools import permutations

import pytest
import torch

from judges.base import Ensemble, Transitive
from toy import judges
from toy.games import bradley_terry, cycle, nash, odd_cycle
from toy.judges import FORMS, GAMES, count_rows, counted, draw_labels, evaluate, learn, make_judge, make_pairrm, words

CYCLE, TRANSITIVE, MIXTURE = GAMES.values()
BOTH = dict(scalar=True, cyclic=2)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def learned(payoff, heads, count, steps):
    """What a judge of these heads is worth after so many labels; the worse of two seeds by error."""
    tables = [learn(len(payoff), draw_labels(payoff, count, seeded(seed)), heads, seed, steps) for seed in (0, 1)]
    return max(evaluate(torch.stack(tables).double(), payoff), key=lambda row: row["error"])


# ------------------------------------------------------------------------------------------------ what they learn


def test_bradley_terry_stays_at_chance_on_a_cycle():
    row = learned(CYCLE, FORMS["Bradley–Terry"], 5000, 100)
    assert abs(row["confidence"] - 0.5) < 0.05 and row["error"] > 0.35  # all P are 0.1 or 0.9
    assert 0.25 <= row["favourites"] <= 0.75 and row["exploitability"] > 0.08


def test_gpm_learns_a_cycle_to_within_a_twentieth():
    row = learned(CYCLE, FORMS["GPM, k = 2"], 5000, 200)
    assert row["error"] < 0.05 and row["confidence"] > 0.85 and row["favourites"] == 1 and row["exploitability"] < 0.06


@pytest.mark.parametrize(("heads", "error"), [(FORMS["combined, k = 1"], 0.07), (BOTH, 0.05)])
def test_combined_model_learns_a_cycle_and_two_planes_fit_it_better(heads, error):
    row = learned(CYCLE, heads, 5000, 200)
    assert row["error"] < error and row["confidence"] > 0.85 and row["favourites"] == 1


def test_all_forms_learn_transitive_preferences_and_agree():
    labels = draw_labels(TRANSITIVE, 5000, seeded())
    tables = torch.stack([learn(5, labels, heads, 0, 150) for heads in FORMS.values()]).double()
    assert (tables[:, None] - tables).abs().mean((2, 3)).max() < 0.05
    for row in evaluate(tables, TRANSITIVE):
        assert row["error"] < 0.05 and row["favourites"] >= 0.9 and row["exploitability"] < 0.02


def test_mixture_is_learned_by_a_scalar_with_one_plane_or_by_two_planes_not_by_less():
    labels = draw_labels(MIXTURE, 5000, seeded())
    tables = torch.stack([learn(15, labels, heads, 0) for heads in FORMS.values()]).double()
    scalar, one_plane, combined, two_planes = evaluate(tables, MIXTURE)
    for enough in (combined, two_planes):
        assert enough["error"] < 0.06 and enough["exploitability"] < 0.08
    assert scalar["error"] > 0.2 and scalar["exploitability"] > 0.2 and one_plane["error"] > 0.1


def test_logits_of_the_mixture_need_two_planes_or_one_and_a_scalar():
    """A plane is a skew-symmetric matrix of rank 2; so is a scalar's r_i - r_j, which a plane with v = (r, 1) is."""
    logits = torch.logit(MIXTURE)
    scalar = logits.mean(1)[:, None] - logits.mean(1)
    assert torch.linalg.matrix_rank(logits) == 4 and torch.linalg.matrix_rank(logits - scalar, atol=1e-9) == 2
    assert torch.linalg.matrix_rank(torch.logit(CYCLE)) == 4 and torch.linalg.matrix_rank(torch.logit(TRANSITIVE)) == 2


# ------------------------------------------------------------------------------------------------ how it is measured


def test_equilibrium_of_the_mixture_is_the_best_quality_in_every_style():
    assert nash(MIXTURE).tolist() == pytest.approx([0] * 12 + [4 / 11, 3 / 11, 4 / 11])
    assert judges.start_of(15)[-3:].sum() < 0.07


def test_any_order_of_five_words_has_3_to_7_of_10_pairs_of_the_cycle_right():
    rewards = torch.tensor(list(permutations(range(5)))).double()
    rows = evaluate(torch.stack([bradley_terry(0.01 * some) for some in rewards]), CYCLE)
    assert {round(10 * row["favourites"]) for row in rows} == {3, 4, 5, 6, 7}
    assert all(abs(row["confidence"] - 0.5) < 0.001 for row in rows)


@pytest.mark.parametrize("game", GAMES)
def test_truth_is_the_best_judge_and_the_reversed_truth_the_worst(game):
    payoff = GAMES[game]
    best, worst = evaluate(torch.stack([payoff, payoff.T]), payoff)
    assert best["error"] == 0 and best["favourites"] == 1 and best["exploitability"] < 0.01 and best["distance"] < 0.03
    assert worst["favourites"] == 0 and best["confidence"] + worst["confidence"] == pytest.approx(1)


def test_evaluation_by_hand():
    table = torch.tensor([[0.5, 0.8, 0.3], [0.2, 0.5, 0.9], [0.6, 0.1, 0.5]]).double()
    (row,) = evaluate(table[None], cycle((0.9, 0.9, 0.9)))  # P01 = .9, P02 = .1, P12 = .9
    assert row["error"] == pytest.approx((0.1 + 0.2 + 0) / 3) and row["favourites"] == 1
    assert row["confidence"] == pytest.approx((0.8 + 0.7 + 0.9) / 3) and row["asymmetry"] == pytest.approx(0.1)


def test_labels_are_coin_flips_with_the_true_probabilities():
    """40,000 labels on each pair; a share is off by 0.0125 (five standard errors) once in a million."""
    shares = counted(3, draw_labels(cycle((0.9, 0.7, 0.6)), 120_000, seeded()))
    assert (shares - cycle((0.9, 0.7, 0.6))).abs().max() < 0.0125


def test_counted_shares_by_hand():
    labels = torch.tensor([[0, 1], [0, 1], [1, 0], [2, 0]])
    assert counted(3, labels).tolist() == [[0.5, pytest.approx(2 / 3), 0], [pytest.approx(1 / 3), 0.5, 0.5], [1, 0.5, 0.5]]


# ------------------------------------------------------------------------------------------------ cost, symmetry


@pytest.mark.parametrize("K", range(2, 17))
def test_judging_takes_k_rows_with_a_preference_model_and_k_times_k_minus_1_with_pairrm(K):
    assert count_rows(make_judge(16, BOTH, seeded()), "", words(K)) == K
    assert count_rows(make_pairrm(16, seeded()), "", words(K)) == K * (K - 1)


def decided_pairrm(seed=0):
    """A random PairRM whose preferences are far from ½."""
    judge = make_pairrm(6, seeded(seed))
    judge.head_layer[4].weight.data.mul_(50)
    return judge


JUDGES = {form: lambda heads=heads: make_judge(6, heads, seeded()) for form, heads in FORMS.items()} | {
    "PairRM": decided_pairrm,
    "ensemble": lambda: Ensemble([make_judge(6, BOTH, seeded()), decided_pairrm(1)], weights=[3, 1]),
    "mean scores of a model": lambda: Transitive(make_judge(6, BOTH, seeded())),
    "mean scores of PairRM": lambda: Transitive(decided_pairrm()),
}


@pytest.mark.parametrize("name", JUDGES)
def test_preferences_and_their_opposites_sum_to_one(name):
    tables = JUDGES[name]().preferences_many(["word5 ", "word2 word3 "], [words(5), words(6)[1:]])
    assert (tables + tables.mT - 1).abs().max() < 1e-6
    assert ((tables - 0.5).abs().amax((1, 2)) > 0.1).all()


# ------------------------------------------------------------------------------------------------ what it shows


def test_a_counterweight_repairs_the_equilibrium_of_a_judge_that_likes_length():
    result = judges.counterweight(seeded())
    assert result["fair"]["exploitability"] == pytest.approx(0, abs=1e-6)
    assert result["biased"]["exploitability"] > 0.02 > 2 * result["repaired"]["exploitability"]
    assert result["biased"]["length_surplus"] > 0.02 and abs(result["repaired"]["length_surplus"]) < 1e-3


def test_figure_and_table_hold_what_was_measured(capsys):
    halves = {game: evaluate(torch.full_like(payoff, 0.5)[None], payoff) for game, payoff in GAMES.items()}
    learned = {game: {form: dict.fromkeys(judges.SIZES, rows) for form in judges.STYLES} for game, rows in halves.items()}
    learned["cycle of 5 words"]["GPM, k = 2"][500] = evaluate(odd_cycle(5, 0.777)[None], CYCLE)
    truth = {game: rows[0] for game, rows in halves.items()}
    bias = judges.counterweight(seeded(), labels=500)
    result = {"learned": learned, "truth": truth, "bias": bias, "cost": judges.cost(seeded(), counts=(2, 3), length=2, repeats=1)}
    judges.print_table(result)
    printed = capsys.readouterr().out
    assert "0.123" in printed and "0.777" in printed and "6 rows" in printed
    panel = judges.draw(result).axes[0]
    lines = {line.get_color(): line.get_ydata()[0] for line in panel.lines}
    assert lines[judges.STYLES["GPM, k = 2"][0]] == pytest.approx(0.123)
