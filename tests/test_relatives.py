"""Claims about toy/relatives.py: each name for SPPO's equation against autograd, a closed form, enumeration or scipy."""

import itertools
import math
from functools import partial

import numpy as np
import pytest
import torch
from conftest import tiny_config

from judges.base import Rule
from model import Transformer, initialize
from sppo import centred_loss, normalized_target, sequence_logps, sppo_loss, sppo_target, win_rates
from toy import relatives
from toy.games import bradley_terry, cycle, every_game, exploitability, nash, random_game
from toy.relatives import LOOKING_BACK, SPARSE, Gated, best_of_two, growth, looking_back, partial_win_rates, ring, spread
from toy.tabular import START, averages, kl, nearest_log_ratio, normalized, optimistic, play, regularized, sppo, win_rate

LOG_START = torch.tensor(START, dtype=torch.float64).log()


def random_policy(n, seed=0):
    return normalized(torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))


# ------------------------------------------------------------------------------------------------ GRPO


@pytest.fixture(scope="module")
def network():
    """A random transformer in float64, five responses of different lengths, their win rates; loss(log π) -> gradient."""
    policy = initialize(Transformer(tiny_config()), torch.Generator().manual_seed(0)).double()
    tokens = torch.randint(3, 50, (5, 9), generator=torch.Generator().manual_seed(1))
    mask = (torch.arange(9) >= 3) & (torch.arange(9) < torch.arange(5, 10)[:, None])
    rate = win_rates(random_game(5, torch.Generator().manual_seed(2)))

    def gradient(loss):
        logps = sequence_logps(policy(tokens), tokens, mask)
        parts = torch.autograd.grad(loss(logps), list(policy.parameters()))
        return torch.cat([part.flatten() for part in parts])

    return rate, gradient


@pytest.mark.parametrize("eta", [0.5, 1000.0])
def test_first_gradient_of_equation_4_7_is_mean_centred_policy_gradient_with_the_win_rate_as_reward(network, eta):
    """-2η Σ (P̂ - ½) ∇log π on a Transformer (Dr. GRPO's with r = P̂); log-probabilities are float32: 1e-6 of the norm."""
    rate, gradient = network
    ours = gradient(lambda logps: sppo_loss(logps - logps.detach(), sppo_target(rate, eta)).sum())
    theirs = gradient(lambda logps: -(relatives.grpo_advantage(rate) * logps).sum())
    assert (ours - 2 * eta * theirs).norm() < 1e-6 * ours.norm()


@pytest.mark.parametrize("loss", [sppo_loss, centred_loss])
def test_first_gradient_of_the_centred_loss_is_the_same(network, loss):
    rate, gradient = network
    of_eq_4_7 = gradient(lambda logps: sppo_loss(logps - logps.detach(), sppo_target(rate, 3.0)).sum())
    ours = gradient(lambda logps: loss(logps - logps.detach(), sppo_target(rate, 3.0)).sum())
    assert (ours - of_eq_4_7).norm() < 1e-6 * ours.norm()


@pytest.mark.parametrize("epsilon", [0.2, 0.001])
def test_grpos_clipped_ratio_has_the_same_gradient_on_policy(network, epsilon):
    """Its min(r A, clip(r, 1 ± ε) A), r = π/π_t = 1, written out; the ratio is of whole responses."""
    rate, gradient = network
    advantage = relatives.grpo_advantage(rate, divide=True)

    def clipped(logps):
        ratio = (logps - logps.detach()).exp()
        return -torch.minimum(ratio * advantage, ratio.clamp(1 - epsilon, 1 + epsilon) * advantage).sum()

    plain = gradient(lambda logps: -(advantage * logps).sum())
    assert (gradient(clipped) - plain).norm() < 1e-6 * plain.norm()


def test_advantages_are_numpys_z_scores():
    """GRPO's σ is that of a sample, with 1e-4 added; the mean of win rates is ½."""
    rate = win_rates(random_game(6, torch.Generator().manual_seed(0)))
    values = rate.numpy()
    expected = (values - 0.5) / (values.std(ddof=1) + 1e-4)
    assert relatives.grpo_advantage(rate, divide=True).tolist() == pytest.approx(expected.tolist(), abs=1e-12)


def test_with_sigma_a_prompt_of_near_ties_pulls_as_hard_as_a_clear_one():
    """Win rates ½ ± .01 and ½ ± .4: forty times the advantage without σ, 1.01 times with it."""
    near, clear = torch.tensor([[0.51, 0.49], [0.9, 0.1]]).unbind()
    for divide, ratio in ((False, 40.0), (True, 1.01)):
        pull = [relatives.grpo_advantage(rate, divide)[0] for rate in (clear, near)]
        assert (pull[0] / pull[1]).item() == pytest.approx(ratio, rel=0.01)


@pytest.mark.parametrize("game", relatives.GAMES)
def test_with_sigma_the_average_that_stays_below_the_regret_bound_is_the_one_weighted_by_steps(game):
    """Σ η_t (P(y ≻ π_t) - ½) ≤ max log 1/π_1 + Σ η_t²/8 with η_t = η/σ_t (telescoped log Z, Hoeffding)."""
    payoff = relatives.GAMES[game]
    path = play(partial(relatives.grpo, eta=0.02), payoff, START, 10_000)
    step = 0.02 / spread(payoff, path)
    weighted = torch.cumsum(step * path.exp(), 0) / torch.cumsum(step, 0)
    bound = (-LOG_START.min() + torch.cumsum(step**2 / 8, 0)) / torch.cumsum(step, 0)
    assert (exploitability(payoff, weighted) <= bound[:, 0]).all()
    assert exploitability(payoff, weighted[-1]) < 0.0025 and exploitability(payoff, averages(path)[-1]) > 0.02


# ------------------------------------------------------------------------------------------------ PMD-mean


def mixed_objective(policy, log_old, target, c):
    """⟨π, z⟩ - KL(π‖π_t) - (c/2) χ²(π‖π_t)."""
    return (policy * target).sum() - kl(policy, log_old) - c / 2 * ((policy**2 / log_old.exp()).sum() - 1)


def fitted(payoff, log_old, eta):
    """Eq. 4.7 over policies: target, log-ratio Δ, and the c of Δ + c exp(Δ) = z."""
    target = sppo_target(win_rate(payoff - 0.5, log_old), eta, baseline=0.0)
    log_ratio = nearest_log_ratio(log_old, target)
    k = log_ratio.argmax()
    return target, log_ratio, (target[k] - log_ratio[k]) / log_ratio[k].exp()


@pytest.mark.parametrize("eta", [1.0, 10.0, 1000.0])
@pytest.mark.parametrize("seed", range(3))
def test_constant_half_is_mirror_descent_with_kl_plus_chi_squared(eta, seed):
    """scipy's maximum over the simplex, c given; and autograd's gradient, the same for all actions where the maximum is."""
    optimize = pytest.importorskip("scipy.optimize")
    payoff, log_old = random_game(6, torch.Generator().manual_seed(seed)), random_policy(6, seed)
    target, log_ratio, c = fitted(payoff, log_old, eta)
    policy = (log_old + log_ratio).exp()

    gradient = torch.func.grad(mixed_objective)(policy, log_old, target, c)[policy > 1e-250]
    assert gradient.amax() - gradient.amin() < 1e-9 * eta

    def loss(values):
        values = torch.tensor(values, requires_grad=True)
        loss = -mixed_objective(values, log_old, target, c) / eta
        return loss.item(), torch.autograd.grad(loss, values)[0].numpy()

    simplex = dict(type="eq", fun=lambda values: values.sum() - 1, jac=lambda values: np.ones(6))
    where = dict(method="SLSQP", bounds=[(1e-30, 1)] * 6, constraints=[simplex], options=dict(ftol=1e-15, maxiter=500))
    found = optimize.minimize(loss, log_old.exp().numpy(), jac=True, **where)
    assert found.x.tolist() == pytest.approx(policy.tolist(), abs=1e-6)


@pytest.mark.parametrize("eta", [0.1, 1.0, 10.0, 500.0])
def test_its_minimiser_is_lamberts_w(eta):
    """Δ + c exp(Δ) = z has the solution Δ = z - W(c exp(z)); above η = 500 exp(z) overflows."""
    special = pytest.importorskip("scipy.special")
    for payoff in every_game().values():
        target, log_ratio, c = fitted(payoff, random_policy(len(payoff)), eta)
        expected = target.numpy() - special.lambertw(c.item() * np.exp(target.numpy())).real
        assert log_ratio.tolist() == pytest.approx(expected.tolist(), abs=1e-6)


@pytest.mark.parametrize("name", every_game())
def test_at_eta_1000_constant_half_weighs_what_is_above_average_and_log_z_leaves_the_best_reply(name):
    """π(P - ½)₊/Σ π(P - ½)₊ is the limit of the one, up to log η/η; all on argmax P that of the other."""
    payoff = every_game()[name]
    log_old = random_policy(len(payoff))
    _, log_ratio, _ = fitted(payoff, log_old, 1e5)
    above = log_old.exp() * (win_rate(payoff, log_old) - 0.5).clamp(min=0)
    assert (log_old + log_ratio).exp().tolist() == pytest.approx((above / above.sum()).tolist(), abs=1e-3)
    assert sppo(payoff, [log_old], 1e5).exp().argmax() == win_rate(payoff, log_old).argmax()
    assert sppo(payoff, [log_old], 1e5).exp().max() > 0.999


def test_weight_of_chi_squared_grows_like_eta():
    """The docstring's c/η = 0.008, 0.034, 0.045 from START; in the limit Σ π(P - ½)₊, since exp(Δ) → (P - ½)η/c."""
    weights = [(fitted(cycle(), LOG_START, eta)[2] / eta).item() for eta in (1.0, 10.0, 1000.0, 1e6)]
    limit = (LOG_START.exp() * (win_rate(cycle(), LOG_START) - 0.5).clamp(min=0)).sum().item()
    assert weights == pytest.approx([0.0077, 0.0343, 0.0449, limit], abs=6e-5)


# ------------------------------------------------------------------------------------------------ GVPO, verl, best of two


@pytest.mark.parametrize("eta", [0.3, 2.0, 30.0])
@pytest.mark.parametrize("name", every_game())
def test_minimiser_of_the_centred_loss_is_the_exact_step(name, eta):
    """Newton's method on autograd's derivatives: it is quadratic in the log-weights, so one step arrives. No log Z in it."""
    payoff = every_game()[name]
    log_old = random_policy(len(payoff))
    target = sppo_target(win_rate(payoff, log_old), eta)

    def loss(log_weights):
        return centred_loss(normalized(log_weights) - log_old, target).sum()

    step = torch.linalg.pinv(torch.func.hessian(loss)(log_old)) @ torch.func.grad(loss)(log_old)
    assert normalized(log_old - step).exp().tolist() == pytest.approx(sppo(payoff, [log_old], eta).exp().tolist(), abs=1e-10)
    assert loss(log_old - step) < 1e-20 * max(1, eta**2) + 1e-24


def test_verls_target_is_the_normalized_one_if_the_batch_is_one_prompt():
    """η(r - log(mean exp ηr)/η), summed by hand."""
    reward = [0.0, 1.0, 1.0, 0.25]
    soft = math.log(sum(math.exp(3.0 * r) for r in reward) / 4) / 3.0
    rewards = torch.tensor([reward], dtype=torch.float64)
    expected = [3.0 * (r - soft) for r in reward]
    assert relatives.softmean_target(rewards, 3.0)[0].tolist() == pytest.approx(expected, abs=1e-12)
    assert normalized_target(rewards, 3.0)[0].tolist() == pytest.approx(expected, abs=1e-12)


def test_verls_soft_mean_over_a_batch_moves_prompts_whose_responses_all_tie():
    """Rewards 1, 1 and 0, 0 at η = 1: ±; normalised prompt by prompt all four targets are 0."""
    reward = torch.tensor([[1.0, 1.0], [0.0, 0.0]])
    soft = math.log((1 + math.e) / 2)
    assert relatives.softmean_target(reward, 1.0).flatten().tolist() == pytest.approx([1 - soft] * 2 + [-soft] * 2, abs=1e-6)
    assert normalized_target(reward, 1.0).abs().max() < 1e-6


def test_best_of_two_is_the_law_of_the_winner_of_two_samples():
    """By enumeration of all pairs: y' and y'' from π, the judge picks. The shares sum to 1 without a normaliser."""
    for payoff in (cycle(), random_game(5, torch.Generator().manual_seed(0)), bradley_terry([0.0, 1.0, 3.0])):
        log_old = random_policy(len(payoff))
        old = log_old.exp().tolist()
        won = [0.0] * len(old)
        for i, j in itertools.product(range(len(old)), repeat=2):
            won[i] += old[i] * old[j] * payoff[i, j].item()
            won[j] += old[i] * old[j] * payoff[j, i].item()
        assert best_of_two(payoff, [log_old]).exp().tolist() == pytest.approx(won, abs=1e-15)
        assert sum(won) == pytest.approx(1, abs=1e-15)


def test_best_of_two_is_sppo_at_eta_2_to_first_order():
    """log 2P - 2(P - ½) = -2(P - ½)² + ...: where judges hardly differ, by ε, the policies differ by O(ε²)."""
    log_old = random_policy(5)
    payoff = random_game(5, torch.Generator().manual_seed(0)) - 0.5
    distance = []
    for size in (1e-2, 1e-3):
        weak = 0.5 + size * payoff
        distance.append((best_of_two(weak, [log_old]) - sppo(weak, [log_old], 2.0)).abs().max().item())
    assert distance[0] < 1e-4 and distance[0] / distance[1] == pytest.approx(100, rel=0.1)


def test_last_policy_of_best_of_two_goes_to_the_corners_and_its_average_stays_away():
    """Against the same rounds in plain NumPy: 400 of them, .30 and .094 (rounds 361 to 401 are at most at .38)."""
    policy, total = np.array(START), np.zeros(3)
    table = cycle().numpy()
    for _ in range(401):
        total, last = total + policy, policy
        policy = 2 * policy * (table @ policy)
        policy /= policy.sum()
    path = play(best_of_two, cycle(), START, 400)
    assert path[-1].exp().tolist() == pytest.approx(last.tolist(), abs=1e-9)
    assert exploitability(cycle(), averages(path)[-1]).item() == pytest.approx((table @ total / 401).max() - 0.5, abs=1e-9)
    assert path[-1].exp().max() > 0.999 and exploitability(cycle(), averages(path)[-1]) > 0.09


# ------------------------------------------------------------------------------------------------ looking back


def test_sppo_optimistic_and_regularized_are_three_ways_of_looking_back():
    """`tabular` has them from their own definitions; all 60 rounds agree."""
    payoff = cycle()
    for known, ours in (
        (partial(sppo, eta=0.7), dict(base=(1,), opponents=(1,))),
        (partial(optimistic, eta=0.7), dict(base=(1,), opponents=(2, -1))),
    ):
        assert torch.allclose(play(partial(looking_back, eta=0.7, **ours), payoff, START, 60), play(known, payoff, START, 60))

    # The proximal step at η has the log-weights of the explicit one at η/(1 + ητ).
    ours = play(partial(looking_back, eta=0.7 / 1.07, tau=0.1, base=(1,), opponents=(1,)), payoff, START, 60)
    assert torch.allclose(ours, play(partial(regularized, eta=0.7, tau=0.1), payoff, START, 60))


@pytest.mark.parametrize("alpha", [0.3, -0.3])
def test_apo_is_an_extrapolation_of_sppos_steps(alpha):
    """π_{t+1} ∝ π̂_{t+1} (π̂_{t+1}/π̂_t)^α with π̂_{t+1} the step from π_t, in probabilities, not logarithms."""
    policies, guesses = [np.array(START)], []
    table = cycle().numpy()
    for _ in range(30):
        guess = policies[-1] * np.exp(0.5 * table @ policies[-1])
        guesses.append(guess / guess.sum())
        policy = guesses[-1] * (guesses[-1] / guesses[max(len(guesses) - 2, 0)]) ** alpha
        policies.append(policy / policy.sum())
    weights = (1 + alpha, -alpha)
    ours = play(partial(looking_back, eta=0.5, base=weights, opponents=weights), cycle(), START, 30)
    assert ours.exp().flatten().tolist() == pytest.approx(np.concatenate(policies).tolist(), abs=1e-9)


@pytest.mark.parametrize("name", LOOKING_BACK)
def test_growth_of_a_small_circle_is_that_of_numpys_largest_root(name):
    """x^k = Σ_j (a_j + iεb_j) x^(k-1-j): log|x|/ε² for small ε, to 1 %."""
    base, opponents = LOOKING_BACK[name]
    size = max(len(base), len(opponents))
    a, b = (np.pad(np.array(v, float), (0, size - len(v))) for v in (base, opponents))
    roots = np.roots(np.concatenate([[1], -(a + 1e-3j * b)]))
    assert np.log(np.abs(roots).max()) / 1e-6 == pytest.approx(growth(base, opponents), rel=0.01)


@pytest.mark.parametrize("name", LOOKING_BACK)
def test_last_policy_spirals_inwards_where_growth_is_negative(name):
    """From close to the equilibrium the KL from it shrinks or grows at the rate 2 growth (ηω)², ω from the game's eigenvalues."""
    payoff, eta, rounds = cycle(), 0.5, 600
    base, opponents = LOOKING_BACK[name]
    equilibrium = nash(payoff)
    turn = torch.eye(3).double() - equilibrium.expand(3, 3)
    omega = torch.linalg.eigvals(turn @ payoff @ equilibrium.diag()).imag.max().item()

    start = normalized(equilibrium.log() + torch.tensor([1e-3, 0.0, -1e-3]))
    path = play(partial(looking_back, eta=eta, base=base, opponents=opponents), payoff, start.exp(), rounds)
    distance = kl(equilibrium, path)
    rate = (distance[-1] / distance[rounds // 3]).log().item() / (rounds - rounds // 3)
    expected = 2 * growth(base, opponents) * (eta * omega) ** 2
    assert np.sign(rate) == np.sign(expected) and rate == pytest.approx(expected, rel=0.3, abs=2e-4)


def test_no_weights_help_mnpo_as_long_as_all_opponents_count_alike():
    """2AB ≥ C(k + 1)/k > C for 20,000 random λ of 1 to 12 policies; weighted like λ, they can."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(20_000):
        k = int(torch.randint(1, 13, (1,), generator=generator))
        weights = torch.rand(k, generator=generator) ** 4
        assert growth((weights / weights.sum()).tolist(), [1 / k] * k) > 0
    assert all(growth([1 / k] * k, [1 / k] * k) > 0 for k in range(1, 50)) and growth(SPARSE, SPARSE) < 0


@pytest.mark.parametrize("alpha", [-0.9, -0.5, 0.0, 0.25, 0.5, 0.9])
def test_no_extrapolation_helps_apo(alpha):
    weights = (1 + alpha, -alpha)
    assert (
        growth(weights, weights) == pytest.approx((2 * alpha**2 - alpha + 1) / (2 * (1 - alpha) ** 3))
        and growth(weights, weights) > 0
    )


@pytest.mark.parametrize("game", relatives.GAMES)
@pytest.mark.parametrize("name", LOOKING_BACK)
def test_with_a_kl_term_every_one_arrives_at_the_regularised_equilibrium(game, name):
    """π ∝ π_1 exp(P(y ≻ π)/τ), whatever the past counts."""
    base, opponents = LOOKING_BACK[name]
    step = partial(looking_back, eta=0.5, base=base, opponents=opponents, tau=0.1)
    last = play(step, relatives.GAMES[game], START, 2000)[-1].exp()
    expected = torch.softmax(LOG_START + relatives.GAMES[game] @ last / 0.1, -1)
    assert last.tolist() == pytest.approx(expected.tolist(), abs=1e-10)


# ------------------------------------------------------------------------------------------------ a judge's budget


@pytest.mark.parametrize(("K", "m"), [(16, 1), (16, 15), (8, 3), (5, 2), (5, 4), (2, 1)])
def test_on_a_ring_everyone_meets_m_others_in_half_as_many_pairs(K, m):
    asked = ring(50, K, m, torch.Generator().manual_seed(0))
    assert torch.equal(asked, asked.mT) and (asked.sum(-1) == m).all() and not asked.diagonal(0, 1, 2).any()
    assert (asked.sum((1, 2)) == K * m).all()


@pytest.mark.parametrize(("K", "m"), [(5, 1), (5, 3), (4, 4), (4, 0)])
def test_a_ring_that_cannot_be_is_refused(K, m):
    with pytest.raises(ValueError, match=f"m is {m}, expected 1 to {K - 1}"):
        ring(1, K, m, torch.Generator())


@pytest.mark.parametrize("m", [1, 2, 3, 4])
def test_win_rates_from_m_random_opponents_are_unbiased_with_the_variance_of_draws_without_replacement(m):
    """All subsets of m of the K - 1 = 4 others, each once: mean P̂, variance ((K-1)/K)² S²/m (1 - m/(K - 1))."""
    table = random_game(5, torch.Generator().manual_seed(0))
    for i in range(5):
        others = [j for j in range(5) if j != i]
        estimates = []
        for opponents in itertools.combinations(others, m):
            asked = torch.zeros(5, 5, dtype=torch.bool)
            asked[i, list(opponents)] = True
            estimates.append(partial_win_rates(table, asked)[i].item())
        variance = (4 / 5) ** 2 * table[i, others].var().item() / m * (1 - m / 4)
        assert np.mean(estimates) == pytest.approx(win_rates(table)[i].item(), abs=1e-12)
        assert np.var(estimates) == pytest.approx(variance, abs=1e-12)


def test_every_opponent_is_as_likely_on_the_ring_and_win_rates_average_to_one_half():
    """20,000 rings of 5 with 2 neighbours: each pair in half of them, five standard errors are 0.018."""
    asked = ring(20_000, 5, 2, torch.Generator().manual_seed(0))
    share = asked.double().mean(0)[~torch.eye(5, dtype=torch.bool)]
    assert (share - 0.5).abs().max() < 0.018
    table = random_game(5, torch.Generator().manual_seed(1))
    rates = partial_win_rates(table, asked)
    assert torch.allclose(rates.mean(-1), torch.full((20_000,), 0.5).double(), atol=1e-12)
    assert (rates.mean(0) - win_rates(table)).abs().max() < 0.01


def test_winner_loser_and_one_more_overrate_the_winner():
    """The authors' checkpoint estimates P̂ of 5 from {winner, loser, one of the others}. That a response meets itself once in
    three, not once in five, is undone here; what is left is that its one fixed opponent is the worst: .03 too much."""
    bias = []
    for seed in range(500):
        table = random_game(5, torch.Generator().manual_seed(seed))
        rate = win_rates(table)
        winner, loser = int(rate.argmax()), int(rate.argmin())
        thirds = [k for k in range(5) if k not in (winner, loser)]
        expected = (0.5 + 4 * (table[winner, loser] + table[winner, thirds].mean()) / 2) / 5
        bias.append((expected - rate[winner]).item())
    assert np.mean(bias) > 5 * np.std(bias) / 500**0.5 and np.mean(bias) == pytest.approx(0.03, abs=0.02)


@pytest.mark.parametrize("seed", range(2))
def test_one_opponent_for_each_of_16_samples_beats_all_pairs_of_5(seed):
    """2400 pairs against 3000, after 300 rounds; the docstring's .032, .048 and, for all pairs of 16, .020."""
    payoff = random_game(10, torch.Generator().manual_seed(seed))
    gaps = [
        relatives.sampled(payoff, 0.3, 300, K, m, 64, torch.Generator().manual_seed(1)) for K, m in ((16, 15), (16, 1), (5, 4))
    ]
    assert gaps[0] < gaps[1] < 0.8 * gaps[2]
    if seed == 0:
        assert gaps == pytest.approx([0.020, 0.032, 0.048], abs=0.003)


# ------------------------------------------------------------------------------------------------ near-duplicates


def shared_words(texts):
    """Words in both of two texts, as a share of the words in either (Jaccard)."""
    words = [set(text.split()) for text in texts]
    return torch.tensor([[len(a & b) / len(a | b) for b in words] for a in words])


def talkative(prompt, responses):
    """Rock–paper–scissors by the first word; of equal ones the longer wins with 0.9."""
    move = [("rock", "scissors", "paper").index(text.split()[0]) for text in responses]
    size = torch.tensor([len(text) for text in responses])
    same = torch.tensor(move)[:, None] == torch.tensor(move)
    return torch.where(same, 0.5 + 0.4 * torch.sign(size[:, None] - size), cycle()[move][:, move])


TEXTS = ["rock", "scissors", "paper", "rock rock"]
CROWDED = torch.tensor([0.4, 0.15, 0.05, 0.4])


def test_behind_the_gate_a_near_duplicate_is_a_clone():
    """Its table is that of the game in which rock is listed twice, and SPPO's steps, merged, are those of the game without."""
    table = Gated(Rule(talkative), shared_words).preferences("", TEXTS).double()
    twice = [0, 1, 2, 0]
    assert torch.allclose(table, cycle()[twice][:, twice], atol=1e-6)

    clones = play(partial(sppo, eta=1.0), table, CROWDED, 100).exp()
    merged = torch.stack([clones[:, 0] + clones[:, 3], clones[:, 1], clones[:, 2]], -1)
    assert torch.allclose(merged, play(partial(sppo, eta=1.0), cycle(), (0.8, 0.15, 0.05), 100).exp(), atol=1e-4)


def test_without_the_gate_a_crowd_of_duplicates_outshines_the_action_that_beats_it():
    plain = Rule(talkative).preferences("", TEXTS) @ CROWDED
    gated = Gated(Rule(talkative), shared_words).preferences("", TEXTS) @ CROWDED
    assert plain[2:].tolist() == pytest.approx([0.68, 0.705], abs=1e-6)
    assert gated[2:].tolist() == pytest.approx([0.68, 0.545], abs=1e-6)


@pytest.mark.parametrize("seed", range(20))
def test_equilibrium_needs_no_gate(seed):
    """Composition consistency of maximal lotteries: replace an action by a group with any games inside of it, and the group
    gets the share of the action. Here 1 to 4 copies of each of 5 actions."""
    generator = torch.Generator().manual_seed(seed)
    payoff = random_game(5, generator)
    owner = torch.arange(5).repeat_interleave(torch.randint(1, 5, (5,), generator=generator))
    inside = random_game(len(owner), generator)
    table = torch.where(owner[:, None] == owner, inside, payoff[owner][:, owner])
    merged = torch.zeros(5).double().index_add(0, owner, nash(table))
    assert merged.tolist() == pytest.approx(nash(payoff).tolist(), abs=1e-9)


def test_the_gate_mutes_differences_of_one_word():
    """3 of 5 words shared: .95 becomes ½ + .4 · .45 = .68."""
    judge = Rule(lambda prompt, texts: [[0.5, 0.95], [0.05, 0.5]])
    table = Gated(judge, shared_words).preferences("7+8", ["the answer is 15", "the answer is 16"])
    assert table[0, 1].item() == pytest.approx(0.68, abs=1e-6)


# ------------------------------------------------------------------------------------------------ the script


def test_the_script_measures_prints_and_draws(capsys, monkeypatch):
    monkeypatch.setattr(relatives, "BUDGETS", {4: (1, 3), 2: (1,)})
    generator = torch.Generator().manual_seed(0)
    result = {
        "steps": relatives.steps(n=20),
        "looking_back": relatives.look_back(generator, rounds=40),
        "averages": relatives.other_averages(rounds=30),
        "budget": relatives.budget(generator, rounds=3, games=4),
    }
    assert len(relatives.draw(result).axes) == 4
    relatives.print_table(result)
    table = capsys.readouterr().out
    assert all(name in table for name in LOOKING_BACK) and "one policy" in table and "weighted by 1/σ" in table
