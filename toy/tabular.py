"""Self-play on games small enough to be exact: a policy is a vector of log-probabilities over n actions.

Each method is one function `step(payoff, path, eta, ...) -> log π_{t+1}`, where `path` is the list of log π_1, ..., log π_t
so far, each (..., n), float64; leading dimensions are policies that play independently. It calls the targets and losses
of sppo.py, the same that a language model is trained with; here the regression is solved exactly. The reference policy μ
of a method that has one is π_1.

    python -m toy.tabular      the last policy of every method, on rock–paper–scissors and on COMAL's game

What it shows (out/toy/tabular.png, .json): SPPO, IPO and DPO circle around the equilibrium, and outwards; optimistic,
extragradient and moving-reference updates arrive there; a fixed reference stops short of it by a bias that grows with τ; a
round costs n².
"""

import sys
import time
from functools import partial

import torch
from matplotlib.figure import Figure
from tqdm import tqdm

from sppo import dpo_loss, ipo_loss, normalized_target, optimistic_target, regularized_target, sppo_target
from toy.games import comal, cycle, exploitability, nash, random_game
from toy.lab import BLUE, GREEN, GREY, ORANGE, PINK, SKY, script, slope, triangle

# ------------------------------------------------------------------------------------------------ the methods


def win_rate(payoff, log_policy):
    """P(y ≻ π) of every action y: (n, n), (..., n) -> (..., n)."""
    return log_policy.exp() @ payoff.T


def sppo(payoff, path, eta):
    """π_{t+1} = π_t exp(ηP(y ≻ π_t))/Z: eq. 4.4 solved exactly is eq. 4.1, multiplicative weights."""
    return path[-1] + normalized_target(win_rate(payoff, path[-1]), eta, path[-1])


def sppo_half(payoff, path, eta):
    """The same with the constant ½ for log Z/η: eq. 4.7, argmin over policies π of E_{y~π_t}(log π/π_t - η(P - ½))²."""
    above_half = win_rate(payoff - 0.5, path[-1])  # P(y ≻ π) - ½ to the last digit, also beside a vertex
    return path[-1] + nearest_log_ratio(path[-1], sppo_target(above_half, eta, baseline=0.0))


def optimistic(payoff, path, eta):
    """π_{t+1} ∝ π_t exp(η(2P(y ≻ π_t) - P(y ≻ π_{t-1}))): ONPO (2502.16852), OMWU (2512.24818)."""
    previous = win_rate(payoff, path[max(len(path) - 2, 0)])
    return normalized(path[-1] + optimistic_target(win_rate(payoff, path[-1]), previous, eta))


def regularized(payoff, path, eta, tau):
    """argmax ⟨π, P(· ≻ π_t)⟩ - τ KL(π‖μ) - KL(π‖π_t)/η: magnetic mirror descent; RSPO with reverse KL (2503.00030).

    Its fixed point is the equilibrium of the game with payoff P - τ KL(π‖μ): π ∝ μ exp(P(y ≻ π)/τ).
    """
    return normalized(path[-1] + regularized_target(win_rate(payoff, path[-1]), path[-1] - path[0], eta, tau))


def moving_reference(payoff, path, eta, tau, every):
    """`regularized`, whose μ becomes the current policy every so many rounds: MPO (2410.16714), COMAL (2410.23223)."""
    return regularized(payoff, path[(len(path) - 1) // every * every :], eta, tau)


def extragradient(payoff, path, eta, tau=0.0):
    """Look ahead to π_{t+½}, then go from π_t with the win rates against π_{t+½}: EGPO (2503.08942).

    EGPO's explicit step, log π_t + η(P - τ log π_t/μ), is the proximal one at η/(1 - ητ).
    """
    target = partial(regularized_target, reference_log_ratio=path[-1] - path[0], eta=eta / (1 - eta * tau), tau=tau)
    ahead = normalized(path[-1] + target(win_rate(payoff, path[-1])))
    return normalized(path[-1] + target(win_rate(payoff, ahead)))


def nash_md(payoff, path, tau, eta=None):
    """π_{t+1} ∝ π_t^μ exp(ηP(y ≻ π_t^μ)) with the mixture π_t^μ ∝ π_t^{1-ητ} μ^{ητ}: Nash-MD (2312.00886).

    eta None is the paper's 2/(τ(t + 2)), with which KL(π*_τ‖π_{T+1}) ≤ 8/(τ²(T + 1)); a fixed one keeps a small bias.
    """
    eta = 2 / (tau * (len(path) + 2)) if eta is None else eta
    mixture = normalized((1 - eta * tau) * path[-1] + eta * tau * path[0])
    return normalized(mixture + sppo_target(win_rate(payoff, mixture), eta))


def iterative_dpo(payoff, path, eta):
    """Minimiser of DPO's loss (2305.18290, eq. 7; β = 1/η) over pairs from π_t whose winner is drawn from P."""
    return normalized(path[-1] + fit_pairs(payoff, path[-1], eta, dpo_loss))


def iterative_ipo(payoff, path, eta):
    """Minimiser of IPO's loss (2310.12036, eq. 17; β = 1/η) over the same pairs. It is SPPO's exact step again."""
    return normalized(path[-1] + fit_pairs(payoff, path[-1], eta, ipo_loss))


# ------------------------------------------------------------------------------------------------ exact regressions


def normalized(log_weights):
    """log π with π ∝ exp(log_weights); a constant in the target drops out here."""
    return torch.log_softmax(log_weights, -1)


def nearest_log_ratio(log_policy, target):
    """Δ that minimises Σ π (Δ - z)² among the log-ratios of policies, Σ π exp(Δ) = 1; for Σ π exp(z) ≥ 1. All (..., n).

    Lagrange: Δ + c exp(Δ) = z with one c ≥ 0 for all actions, found by bisection. With v = Δ + log c it reads
    v + exp(v) = z + log c, whose left side is convex: Newton's steps fall onto the root.
    """

    def log_ratio(log_c):
        x = target + log_c
        v = torch.where(x > 1, x.clamp(min=1).log(), x)
        for _ in range(8):
            v = v - (v + v.exp() - x) / (1 + v.exp())
        return torch.where(x < 1, target - v.exp(), v - log_c)  # whichever form loses fewer digits

    def surplus(log_ratio):  # Σ π exp(Δ) - 1 without the 1, which would hide what a vertex loses
        growth = torch.where(log_ratio.abs() < 1, torch.expm1(log_ratio), log_ratio.exp() - 1)
        return torch.where(log_ratio < 1, log_policy.exp() * growth, (log_policy + log_ratio).exp() - log_policy.exp())

    high = target.amax(-1, keepdim=True).clamp(min=1).log() + 1  # of log c
    low = log_policy.amin(-1, keepdim=True) - 2 * target.abs().amax(-1, keepdim=True) - 40
    for _ in range(80):
        middle = (low + high) / 2
        too_much = surplus(log_ratio(middle)).sum(-1, keepdim=True) > 0
        low, high = torch.where(too_much, middle, low), torch.where(too_much, high, middle)
    return log_ratio(high)


def fit_pairs(payoff, log_policy, eta, loss):
    """Δ (n,) that minimises Σ_ij π_i π_j P_ij loss(Δ_i, Δ_j, 1/η), a convex function of differences, by Newton's method."""
    weight = log_policy.exp()[:, None] * log_policy.exp() * payoff

    def expected(log_ratio):
        return (weight * loss(log_ratio[:, None], log_ratio[None, :], 1 / eta)).sum()

    log_ratio = torch.zeros_like(log_policy)
    for _ in range(50):
        gradient = torch.func.grad(expected)(log_ratio)
        if gradient.abs().max() < 1e-13:
            break
        log_ratio = log_ratio - torch.linalg.pinv(torch.func.hessian(expected)(log_ratio)) @ gradient
    return log_ratio


# ------------------------------------------------------------------------------------------------ playing


def play(step, payoff, start, rounds):
    """log π_1, ..., log π_{rounds + 1}, stacked: (rounds + 1, ..., n). start is π_1 (..., n), all of it positive."""
    path = [torch.as_tensor(start, dtype=torch.float64).log()]
    for _ in range(rounds):
        path.append(step(payoff, path))
    return torch.stack(path)


def averages(path):
    """The mixtures (π_1 + ... + π_t)/t of theorem 4.1, for each t: (T, ..., n) log-policies -> (T, ..., n) policies."""
    return torch.cumsum(path.exp(), 0) / torch.arange(1, len(path) + 1).view(-1, *[1] * (path.dim() - 1))


def kl(policy, log_policy):
    """KL(policy‖exp(log_policy)) in nats, (..., n) -> (...)."""
    return (torch.xlogy(policy, policy) - policy * log_policy).sum(-1)


# ------------------------------------------------------------------------------------------------ what it shows

START = (0.8, 0.15, 0.05)
METHODS = {  # name: (step, rounds)
    "SPPO": (partial(sppo, eta=1.0), 2000),
    "SPPO, constant ½": (partial(sppo_half, eta=1.0), 500),
    "iterative IPO": (partial(iterative_ipo, eta=1.0), 500),
    "iterative DPO": (partial(iterative_dpo, eta=0.25), 500),  # a logit is about 4(P - ½): the same speed near ½
    "optimistic": (partial(optimistic, eta=1.0), 2000),
    "extragradient": (partial(extragradient, eta=1.0), 2000),
    "regularized": (partial(regularized, eta=1.0, tau=0.1), 2000),
    "Nash-MD": (partial(nash_md, tau=0.1), 2000),
    "moving reference": (partial(moving_reference, eta=1.0, tau=0.1, every=100), 20_000),
}


def compare(payoff, methods=METHODS):
    """{method: exploitability of the last policy by round, of the average of all rounds, round of arrival below 1e-9, path}."""
    result = {}
    for name, (step, rounds) in tqdm(methods.items(), desc="methods", unit="method", leave=False):
        path = play(step, payoff, START, rounds)
        last = exploitability(payoff, path.exp()).clamp(min=0)
        arrived = (last < 1e-9).nonzero()
        kept = [t for t in range(rounds + 1) if t < 500 or t % 10 == 0]
        result[name] = {
            "last": last[-1].item(),
            "average": exploitability(payoff, averages(path)[-1]).item(),
            "round_below_1e-9": int(arrived[0]) + 1 if len(arrived) else None,
            "rounds": [t + 1 for t in kept],
            "last_by_round": last[kept].tolist(),
            "path": path[:500].exp().tolist(),
        }
    return result


REFERENCES = {"uniform μ": (1 / 3, 1 / 3, 1 / 3), "μ = (.8, .15, .05)": START}


def bias(payoff, taus=(0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0), rounds=20_000):
    """Where a fixed reference leads, by μ and τ: exploitability there in the original game, and its fixed-point error."""
    tau = torch.tensor(taus, dtype=torch.float64)[:, None]
    start = torch.tensor(list(REFERENCES.values()), dtype=torch.float64)[:, None].expand(-1, len(taus), -1)  # (2, τ, 3)
    path = play(partial(regularized, eta=0.3, tau=tau), payoff, start, rounds)
    error = (normalized(path[0] + win_rate(payoff, path[-1]) / tau).exp() - path[-1].exp()).abs().amax(-1)
    result = {"tau": list(taus)}
    for name, gap, wrong in zip(REFERENCES, exploitability(payoff, path[-1].exp()), error):
        result[name] = {"exploitability": gap.tolist(), "fixed_point_error": wrong.tolist()}
    return result


def speed(generator, sizes=((100, 10_000), (250, 2000), (500, 1000), (1000, 300), (2000, 100), (4000, 30))):
    """Seconds a round of exact SPPO by number of actions, and the exponent of its cost from 500 actions on (least squares)."""
    rows = []
    for n, rounds in sizes:
        payoff, start = random_game(n, generator), torch.full((n,), 1 / n)
        play(partial(sppo, eta=0.1), payoff, start, 3)
        begin = time.perf_counter()
        play(partial(sppo, eta=0.1), payoff, start, rounds)
        rows.append({"actions": n, "rounds": rounds, "seconds_per_round": (time.perf_counter() - begin) / rounds})
    large = [row for row in rows if row["actions"] >= 500]
    return {"rows": rows, "exponent": slope([row["actions"] for row in large], [row["seconds_per_round"] for row in large])}


def measure(args):
    """All of it. The seed is that of the games that are timed; the rest is exact."""
    games = {"rock-paper-scissors": cycle(), "COMAL's game": comal()}
    return {
        "games": {name: compare(payoff) for name, payoff in games.items()},
        "bias": bias(cycle()),
        "speed": speed(torch.Generator().manual_seed(args.seed)),
    }


def print_table(result):
    print(f"{'exploitability':20}" + "".join(f"{game:^36}" for game in result["games"]))
    print(f"{'':20}" + f"{'last':>12}{'average':>12}{'< 1e-9 at':>12}" * len(result["games"]))
    for name in METHODS:
        cells = ""
        for rows in result["games"].values():
            row = rows[name]
            cells += f"{row['last']:12.2g}{row['average']:12.4f}{row['round_below_1e-9'] or '-':>12}"
        print(f"{name:20}{cells}")
    worst = max(max(result["bias"][name]["fixed_point_error"]) for name in REFERENCES)
    print(f"regularized: fixed-point equation holds to {worst:.1g} for every τ and μ")
    rows = result["speed"]["rows"]
    print(f"speed: 10,000 rounds of a 100-action game in {1e4 * rows[0]['seconds_per_round']:.2f} s;", end=" ")
    print(f"from 500 actions on the cost grows as n^{result['speed']['exponent']:.2f}")


STYLES = {
    "SPPO": (ORANGE, "-"), "iterative IPO": (BLUE, "--"), "iterative DPO": (PINK, "-"), "optimistic": (SKY, "-"),
    "extragradient": (PINK, "--"), "regularized": (GREY, "-"), "Nash-MD": (GREY, ":"), "moving reference": (GREEN, "-"),
}  # fmt: skip


def draw(result):
    figure = Figure(figsize=(13, 9.5), layout="constrained")
    (simplex, curves), (biases, speeds) = figure.subplots(2, 2)
    rows = result["games"]["COMAL's game"]
    point = triangle(simplex, ("all a", "all b", "all c"))
    for name, rounds in (("SPPO", 60), ("iterative IPO", 60), ("moving reference", 500)):
        colour, line = STYLES[name]
        simplex.plot(*point(rows[name]["path"][:rounds]), line, color=colour, linewidth=1.2, label=f"{name}, {rounds} rounds")
    simplex.plot(*point(START), "o", color="black", label="start")
    simplex.plot(*point(nash(comal())), "*", color="black", markersize=14, label="Nash equilibrium")
    simplex.legend(frameon=False, fontsize=9, loc="upper left", bbox_to_anchor=(-0.12, 1))
    simplex.set_title("COMAL's game: policy of each round")
    for name, (colour, line) in STYLES.items():
        curves.plot(rows[name]["rounds"], rows[name]["last_by_round"], line, color=colour, linewidth=1.2, label=name)
    curves.set(xscale="log", yscale="log", xlabel="round", ylabel="exploitability of the last policy", ylim=(1e-12, 2))
    curves.set_title("COMAL's game: only some last policies arrive")
    curves.legend(frameon=False, fontsize=9, loc="lower left")
    for name, colour in zip(REFERENCES, (BLUE, ORANGE)):
        biases.plot(result["bias"]["tau"], result["bias"][name]["exploitability"], "o-", color=colour, label=name)
    biases.set(xscale="log", yscale="log", xlabel="τ (weight of the KL, in win rate)", ylabel="exploitability at the fixed point")
    biases.set_title("Rock–paper–scissors: the bias of a fixed reference")
    biases.legend(frameon=False)
    rows = result["speed"]["rows"]
    actions, seconds = [row["actions"] for row in rows], [row["seconds_per_round"] for row in rows]
    speeds.plot(actions, seconds, "o-", color=BLUE, label="measured")
    speeds.plot(actions, [seconds[-1] * (n / actions[-1]) ** 2 for n in actions], "--", color=GREY, label="n²")
    speeds.set(xscale="log", yscale="log", xlabel="actions n", ylabel="seconds a round", title="Cost of a round of exact SPPO")
    speeds.legend(frameon=False)
    return figure


if __name__ == "__main__":
    sys.exit(script("tabular", __doc__, measure, print_table, draw))
