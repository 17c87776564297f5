"""Claims about toy/tabular.py: exact play against closed forms, published bounds, scipy, and the games' exact equilibria."""

import math
from functools import partial

import pytest
import torch

from sppo import dpo_loss, normalized_target, sppo_target
from toy import tabular
from toy.games import bradley_terry, comal, cycle, every_game, exploitability, nash, random_game
from toy.tabular import averages, fit_pairs, kl, nearest_log_ratio, normalized, play, sppo, sppo_half, win_rate

START = (0.8, 0.15, 0.05)
THREE = {"rock-paper-scissors": cycle(), "COMAL": comal()}


def random_policy(n, generator, sharpness=3.0):
    return normalized(sharpness * torch.randn(n, generator=generator, dtype=torch.float64))


# ------------------------------------------------------------------------------------------------ SPPO


def test_exact_sppo_moves_the_log_odds_of_two_actions_by_the_closed_form():
    """P(1 ≻ π) - P(2 ≻ π) = p - ½ whatever π is, so T rounds add Tη(p - ½) to log π_1/π_2."""
    path = play(partial(sppo, eta=0.3), torch.tensor([[0.5, 0.7], [0.3, 0.5]], dtype=torch.float64), (0.1, 0.9), 50)
    assert (path[-1, 0] - path[-1, 1]).item() == pytest.approx(math.log(1 / 9) + 50 * 0.3 * 0.2, abs=1e-10)
    assert path.exp().sum(-1).tolist() == pytest.approx([1.0] * 51, abs=1e-12)


def test_average_of_exact_sppo_stays_below_the_regret_bound_for_every_horizon_to_ten_thousand():
    """All horizons at once: row T plays with η = √(8 ln n/T), and is read after T rounds."""
    payoff = cycle()
    n = len(payoff)
    T = torch.arange(1, 10_001)
    eta = (8 * math.log(n) / T.double()).sqrt()[:, None]
    log_policy = torch.full((len(T), n), -math.log(n), dtype=torch.float64)
    total = torch.zeros(len(T), n).double()

    for t in T.tolist():  # rows t - 1, t, ... are still playing
        playing = slice(t - 1, None)
        total[playing] += log_policy[playing].exp()
        log_policy[playing] = sppo(payoff, [log_policy[playing]], eta[playing])

    gap = exploitability(payoff, total / T[:, None])
    assert (gap >= -1e-12).all() and (gap <= (math.log(n) / (2 * T)).sqrt()).all()


@pytest.mark.parametrize("name", every_game())
def test_average_of_exact_sppo_stays_below_the_regret_bound_in_every_game(name):
    payoff = every_game()[name]
    n = len(payoff)
    for T in (1, 2, 3, 5, 10, 30, 100, 300, 1000, 3000, 10_000):
        path = play(partial(sppo, eta=math.sqrt(8 * math.log(n) / T)), payoff, torch.full((n,), 1 / n), T - 1)
        assert exploitability(payoff, averages(path)[-1]) <= math.sqrt(math.log(n) / (2 * T)), T


@pytest.mark.parametrize("eta", [0.1, 1.0])
def test_last_policy_leaves_the_equilibrium_by_log_z_minus_half_eta_each_round(eta):
    """KL(π*‖π_{t+1}) - KL(π*‖π_t) = log Z_t - η/2 where π* has full support: P(π* ≻ π_t) = ½."""
    payoff = cycle()
    path = play(partial(sppo, eta=eta), payoff, (0.5, 0.3, 0.2), 500)
    distance = kl(nash(payoff), path)
    log_z = torch.logsumexp(path + eta * win_rate(payoff, path), -1)
    assert torch.allclose(distance.diff(), log_z[:-1] - eta / 2, atol=1e-10)
    assert (distance.diff() > 0).all()


@pytest.mark.parametrize("seed", range(20))
def test_log_z_lies_between_half_eta_and_half_eta_plus_eta_squared_over_eight(seed):
    """Jensen and Hoeffding (appendix A leaves η/2 to η): for any game, policy and η."""
    generator = torch.Generator().manual_seed(seed)
    n = int(torch.randint(2, 40, (1,), generator=generator))
    payoff = random_game(n, generator)
    log_policy = random_policy(n, generator)

    for eta in (0.01, 0.1, 1.0, 10.0, 100.0):
        rate = win_rate(payoff, log_policy)
        log_z = (eta * rate - normalized_target(rate, eta, log_policy))[0].item()
        assert eta / 2 - 1e-9 <= log_z <= min(eta / 2 + eta**2 / 8, eta * rate.max().item()) + 1e-9


def test_every_self_play_method_rests_at_an_equilibrium_with_full_support():
    payoff = cycle()
    steps = [partial(step, eta=1.0) for step in (sppo, sppo_half, tabular.optimistic, tabular.extragradient)]
    steps += [partial(step, eta=1.0) for step in (tabular.iterative_dpo, tabular.iterative_ipo)]
    steps.append(partial(tabular.moving_reference, eta=1.0, tau=0.1, every=5))
    for step in steps:
        path = play(step, payoff, nash(payoff), 20)
        assert torch.allclose(path[-1].exp(), nash(payoff), atol=1e-7), step


def test_policies_in_a_batch_play_as_they_would_alone():
    payoff = comal()
    starts = torch.tensor([START, (0.2, 0.5, 0.3)], dtype=torch.float64)

    for step in (sppo, sppo_half, tabular.optimistic, tabular.extragradient):
        together = play(partial(step, eta=0.7), payoff, starts, 30)
        alone = torch.stack([play(partial(step, eta=0.7), payoff, start, 30) for start in starts], 1)
        assert torch.allclose(together, alone, atol=1e-10), step


# ------------------------------------------------------------------------------------------------ the last policy


@pytest.mark.parametrize("payoff", THREE.values(), ids=THREE)
@pytest.mark.parametrize("step", [tabular.optimistic, tabular.extragradient])
def test_optimistic_and_extragradient_last_policies_reach_the_equilibrium(step, payoff):
    gap = exploitability(payoff, play(partial(step, eta=1.0), payoff, START, 2000).exp())
    assert gap.min() < 1e-9 and gap[-1] < 1e-9


@pytest.mark.parametrize("payoff", THREE.values(), ids=THREE)
def test_last_policy_of_a_moving_reference_reaches_the_equilibrium(payoff):
    path = play(partial(tabular.moving_reference, eta=1.0, tau=0.1, every=100), payoff, START, 20_000)
    assert exploitability(payoff, path[-1].exp()) < 1e-6


def test_comals_game_makes_sppo_and_ipo_circle_together():
    """The published picture: they pass all three corners again and again, and stay exploitable."""
    payoff = comal()
    ours = play(partial(sppo, eta=1.0), payoff, START, 300)
    ipo = play(partial(tabular.iterative_ipo, eta=1.0), payoff, START, 300)
    assert torch.allclose(ours, ipo, atol=1e-6)
    leader = ours[100:].argmax(-1)
    changes = leader[1:][leader.diff() != 0].tolist()
    assert len(changes) > 6 and all(b == (a + 1) % 3 for a, b in zip(changes, changes[1:]))  # a -> b -> c -> a ...
    assert exploitability(payoff, ours[100:].exp()).min() > 0.1


@pytest.mark.parametrize("tau", [0.02, 0.1, 0.5, 2.0])
@pytest.mark.parametrize("start", [(1 / 3, 1 / 3, 1 / 3), START])
def test_regularized_last_policy_is_the_fixed_point_of_the_regularized_game(tau, start):
    """π ∝ μ exp(P(y ≻ π)/τ)."""
    path = play(partial(tabular.regularized, eta=0.3, tau=tau), cycle(), start, 20_000)
    expected = torch.softmax(path[0] + cycle() @ path[-1].exp() / tau, -1)
    assert torch.allclose(path[-1].exp(), expected, atol=1e-8, rtol=0)


def test_extragradient_and_regularized_agree_on_the_regularized_equilibrium():
    a = play(partial(tabular.regularized, eta=0.3, tau=0.2), comal(), START, 3000)[-1]
    b = play(partial(tabular.extragradient, eta=1.0, tau=0.2), comal(), START, 3000)[-1]
    assert torch.allclose(a.exp(), b.exp(), atol=1e-10)


def test_bias_of_a_fixed_reference_vanishes_with_tau():
    result = tabular.bias(cycle(), taus=(0.02, 0.05, 0.1, 0.2), rounds=5000)
    for name in tabular.REFERENCES:
        gaps = result[name]["exploitability"]
        assert gaps == sorted(gaps) and gaps[0] < 0.4 * gaps[-1]


@pytest.mark.parametrize("tau", [0.1, 0.5, 2.0])
def test_nash_md_stays_below_its_published_bound(tau):
    """KL(π*_τ‖π_{T+1}) ≤ 8/(τ²(T + 1)) (2312.00886, theorem 1), π*_τ from another method."""
    equilibrium = play(partial(tabular.extragradient, eta=0.3, tau=tau), cycle(), (0.5, 0.3, 0.2), 20_000)[-1].exp()
    path = play(partial(tabular.nash_md, tau=tau), cycle(), (0.5, 0.3, 0.2), 2000)

    distance = kl(equilibrium, path[1:])
    T = torch.arange(1, 2001)
    assert (distance <= 8 / (tau**2 * (T + 1))).all()
    assert distance[-1] < 1e-3 * distance[0]


# ------------------------------------------------------------------------------------------------ exact regressions


@pytest.mark.parametrize("eta", [0.1, 1.0, 10.0])
def test_nearest_log_ratio_is_scipys_minimum_over_all_policies(eta):
    """Over free logits θ: Δ = θ - log Σ π exp(θ)."""
    optimize = pytest.importorskip("scipy.optimize")
    generator = torch.Generator().manual_seed(0)
    for n in (2, 3, 6):
        payoff = random_game(n, generator)
        log_policy = random_policy(n, generator, 1.0)
        target = sppo_target(win_rate(payoff, log_policy), eta)

        def squares(theta, log_policy=log_policy, target=target):
            log_ratio = torch.from_numpy(theta) - torch.logsumexp(log_policy + torch.from_numpy(theta), -1)
            return (log_policy.exp() * (log_ratio - target) ** 2).sum().item()

        ours = nearest_log_ratio(log_policy, target)
        assert torch.logsumexp(log_policy + ours, -1).abs() < 1e-9
        found = [optimize.minimize(squares, x, method="BFGS", options={"gtol": 1e-9}).fun for x in (target.numpy(), [0.0] * n)]
        assert squares(ours.numpy()) == pytest.approx(min(found), rel=1e-6, abs=1e-12)


@pytest.mark.parametrize("eta", [1e-3, 1.0, 30.0, 1000.0])
def test_nearest_log_ratio_solves_its_lagrange_equations(eta):
    """(z - Δ)/exp(Δ) is one constant c for all actions, and Σ π exp(Δ) = 1."""
    generator = torch.Generator().manual_seed(1)
    log_policy = random_policy(5, generator, 1.0)
    target = sppo_target(win_rate(random_game(5, generator), log_policy), eta)
    ours = nearest_log_ratio(log_policy, target)
    assert torch.logsumexp(log_policy + ours, -1).abs() < 1e-8
    c = (target - ours).clamp(min=0).log() - ours
    felt = target - ours > 1e-6 * eta  # the others' part of the constraint is below rounding
    assert felt.any() and (c[felt].amax() - c[felt].amin()) < 1e-4


def test_constant_half_is_the_exact_normaliser_for_small_eta():
    generator = torch.Generator().manual_seed(2)
    payoff = random_game(6, generator)
    log_policy = random_policy(6, generator)
    for eta in (0.01, 0.1, 1.0):
        difference = sppo_half(payoff, [log_policy], eta) - sppo(payoff, [log_policy], eta)
        assert difference.abs().max() <= eta**2 / 4


def test_dpo_on_a_bradley_terry_game_recovers_its_rewards():
    rewards = torch.tensor([0.3, -1.0, 2.0, 0.0], dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    log_ratio = fit_pairs(bradley_terry(rewards), random_policy(4, generator, 0.5), 0.7, dpo_loss)
    assert torch.allclose(log_ratio - log_ratio[0], 0.7 * (rewards - rewards[0]), atol=1e-8)


@pytest.mark.parametrize("seed", range(10))
def test_dpo_matches_expected_wins_in_games_that_are_not_bradley_terry(seed):
    """Its stationarity condition, Zermelo's: Σ_j π_j σ(r_i - r_j) = Σ_j π_j P_ij for every i."""
    generator = torch.Generator().manual_seed(seed)
    payoff = 0.02 + 0.96 * random_game(5, generator)
    log_policy = random_policy(5, generator, 1.0)
    payoff.fill_diagonal_(0.5)
    path = [log_policy, tabular.iterative_dpo(payoff, [log_policy], eta=2.0)]
    reward = (path[1] - path[0]) / 2.0
    expected = torch.sigmoid(reward[:, None] - reward) @ log_policy.exp()
    assert torch.allclose(expected, win_rate(payoff, log_policy), atol=1e-8)


def test_ipo_is_sppo_when_pairs_are_drawn_from_the_policy():
    for seed in range(10):
        generator = torch.Generator().manual_seed(seed)
        payoff = random_game(6, generator)
        log_policy = random_policy(6, generator, 1.0)
        ours = sppo(payoff, [log_policy], 0.8)
        assert torch.allclose(tabular.iterative_ipo(payoff, [log_policy], 0.8), ours, atol=1e-8)


# ------------------------------------------------------------------------------------------------ the script


def test_the_script_measures_prints_and_draws(capsys):
    short = {name: (step, 20) for name, (step, _) in tabular.METHODS.items()}
    result = {
        "games": {name: tabular.compare(payoff, short) for name, payoff in (("one", cycle()), ("COMAL's game", comal()))},
        "bias": tabular.bias(cycle(), taus=(0.5, 1.0), rounds=200),
        "speed": tabular.speed(torch.Generator().manual_seed(0), sizes=((10, 5), (500, 2), (600, 2))),
    }
    assert len(tabular.draw(result).axes) == 4
    tabular.print_table(result)
    table = capsys.readouterr().out
    assert all(name in table for name in tabular.METHODS)
