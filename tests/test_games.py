"""Claims about toy/games.py: equilibria against scipy's linear programming and by hand."""

import pytest
import torch

from toy.games import bradley_terry, comal, cycle, dominant_and_cycle, every_game, exploitability, nash, odd_cycle, random_game


def game_with_ties(seed):
    """2 to 30 actions; in a third of the games probabilities are rounded to tenths, so that ties abound."""
    generator = torch.Generator().manual_seed(seed)
    payoff = random_game(int(torch.randint(2, 31, (1,), generator=generator)), generator)
    if seed % 3:
        return payoff
    upper = payoff.mul(10).round().div(10).triu(1)
    return upper + (1 - upper.T).tril(-1) + 0.5 * torch.eye(len(payoff), dtype=torch.float64)


def is_equilibrium(payoff, policy):
    sums_to_one = policy.sum().item() == pytest.approx(1, abs=1e-9)
    return sums_to_one and policy.min() >= 0 and (payoff @ policy).max() <= 0.5 + 1e-9


@pytest.mark.parametrize("start", range(0, 200, 50))
def test_no_action_beats_nash_in_random_games(start):
    for seed in range(start, start + 50):
        payoff = game_with_ties(seed)
        assert is_equilibrium(payoff, nash(payoff)), seed


@pytest.mark.parametrize("start", range(0, 200, 50))
def test_nash_is_worth_what_linear_programming_says(start):
    """max v subject to πᵀP >= v: the value is unique even where the equilibrium is not."""
    optimize = pytest.importorskip("scipy.optimize")
    for seed in range(start, start + 50):
        payoff = game_with_ties(seed)
        n = len(payoff)
        bound = torch.cat([-payoff.T, torch.ones(n, 1)], 1).numpy()  # v - (πᵀP)_j <= 0
        simplex = [[1.0] * n + [0.0]]
        theirs = optimize.linprog([0.0] * n + [-1.0], bound, [0.0] * n, simplex, [1.0], [(0, None)] * n + [(None, None)])
        assert (nash(payoff) @ payoff).min().item() == pytest.approx(-theirs.fun, abs=1e-9), seed


@pytest.mark.parametrize("seed", range(5))
def test_nash_of_a_cycle_of_three_is_unique_and_equals_linear_programming(seed):
    optimize = pytest.importorskip("scipy.optimize")
    payoff = cycle((0.6 + 0.4 * torch.rand(3, generator=torch.Generator().manual_seed(seed))).tolist())
    bound = torch.cat([-payoff.T, torch.ones(3, 1)], 1).numpy()
    theirs = optimize.linprog([0, 0, 0, -1.0], bound, [0] * 3, [[1, 1, 1, 0]], [1], [(0, None)] * 3 + [(None, None)])
    assert nash(payoff).tolist() == pytest.approx(theirs.x[:3].tolist(), abs=1e-8)


def test_nash_of_the_small_worlds_endings():
    """Each action's share is the strength, above ½, of the duel it is not in: (.3, .4, .4) in (`!?`, `?.`, `.!`)."""
    assert nash(cycle((0.9, 0.9, 0.8))).tolist() == pytest.approx([4 / 11, 3 / 11, 4 / 11], abs=1e-9)


def test_rock_paper_scissors_is_played_evenly():
    assert nash(cycle((1.0, 1.0, 1.0))).tolist() == pytest.approx([1 / 3] * 3, abs=1e-9)


def test_a_cycle_of_five_is_played_evenly():
    payoff = cycle((0.8,) * 5)
    assert is_equilibrium(payoff, nash(payoff)) and is_equilibrium(payoff, torch.full((5,), 0.2, dtype=torch.float64))


@pytest.mark.parametrize("n", [1, 2, 7])
def test_every_policy_is_nash_where_all_tie(n):
    payoff = torch.full((n, n), 0.5, dtype=torch.float64)
    assert is_equilibrium(payoff, nash(payoff))


def test_the_action_that_beats_all_others_is_played_alone():
    order = torch.tensor([3, 0, 4, 1, 2])  # 0 is best: action 1
    payoff = torch.where(order[:, None] < order, 0.7, 0.3).double().fill_diagonal_(0.5)
    assert nash(payoff).tolist() == pytest.approx([0, 1, 0, 0, 0], abs=1e-9)


def test_duplicates_of_an_action_share_its_weight():
    copies = [0, 0, 1, 2, 2, 2]
    payoff = cycle((0.9, 0.9, 0.8))[copies][:, copies]
    policy = nash(payoff)
    assert is_equilibrium(payoff, policy)
    shares = [policy[[i for i, a in enumerate(copies) if a == action]].sum().item() for action in range(3)]
    assert shares == pytest.approx([4 / 11, 3 / 11, 4 / 11], abs=1e-9)


def test_exploitability_is_zero_at_nash():
    for seed in range(20):
        payoff = game_with_ties(seed)
        assert exploitability(payoff, nash(payoff)).item() == pytest.approx(0, abs=1e-9)


def test_exploitability_elsewhere_by_hand():
    """Against all-0 the best reply is 2, which wins .8; against (½, ½, 0) it is 0: ½ · ½ + ½ · .9 = .7."""
    policies = torch.tensor([[1, 0, 0], [0.5, 0.5, 0]], dtype=torch.float64)
    assert exploitability(cycle((0.9, 0.9, 0.8)), policies).tolist() == pytest.approx([0.3, 0.2])


# ------------------------------------------------------------------------------------------------ the games


@pytest.mark.parametrize("name", every_game())
def test_every_game_is_symmetric_and_constant_sum(name):
    payoff = every_game()[name]
    assert payoff.dtype == torch.float64 and payoff.min() >= 0 and payoff.max() <= 1
    assert torch.allclose(payoff + payoff.T, torch.ones_like(payoff), atol=1e-12)
    assert is_equilibrium(payoff, nash(payoff))


def test_comals_game_is_as_published_and_is_rock_paper_scissors_listed_backwards():
    a, b, c = range(3)
    payoff = comal()
    assert (payoff[b, a], payoff[c, b], payoff[a, c]) == (0.9, 0.9, 0.8)
    assert torch.allclose(payoff.flip(0, 1), cycle((0.9, 0.9, 0.8)))


@pytest.mark.parametrize("n", [3, 5, 9])
def test_odd_cycle_is_won_by_each_action_against_half_of_the_others_and_is_played_evenly(n):
    payoff = odd_cycle(n, 0.7)
    assert ((payoff == 0.7).sum(1) == n // 2).all()
    assert is_equilibrium(payoff, torch.full((n,), 1 / n, dtype=torch.float64))
    assert torch.equal(payoff.roll((1, 1), (0, 1)), payoff)


@pytest.mark.parametrize("n", [1, 2, 8])
def test_odd_cycle_refuses_a_size_without_a_circle(n):
    with pytest.raises(ValueError, match=f"n is {n}, expected an odd number"):
        odd_cycle(n)


def test_bradley_terry_game_is_transitive_in_its_log_odds():
    log_odds = torch.logit(bradley_terry([0.0, 2.0, -1.0, 0.5]))
    assert torch.allclose(log_odds[:, :, None] + log_odds[None], log_odds[:, None, :].expand(4, 4, 4), atol=1e-12)
    assert nash(bradley_terry([0.0, 2.0, -1.0, 0.5])).tolist() == pytest.approx([0, 1, 0, 0], abs=1e-9)


def test_dominant_action_is_played_alone_and_the_rest_is_a_circle():
    payoff = dominant_and_cycle()
    assert nash(payoff).tolist() == pytest.approx([1, 0, 0, 0], abs=1e-9)
    assert torch.equal(payoff[1:, 1:], cycle())


def test_random_games_repeat_with_their_seed():
    one, two, other = (random_game(5, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    assert torch.equal(one, two) and not torch.equal(one, other)
