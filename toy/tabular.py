"""Self-play on games small enough to be exact: a policy is a vector of log-probabilities.

Each method is one function `step(payoff, path, eta, ...) -> log π_{t+1}`, where `path` is the list
of log π_1, ..., log π_t so far, each (..., n) over n actions, float64; leading dimensions are
policies that play independently. It calls the targets and losses of sppo.py, the same that a
language model is trained with; here the regression is solved exactly. The reference policy μ of a
method that has one is π_1.

    python -m toy.tabular      out/toy/tabular.png, out/toy/tabular.json

What it shows, on rock–paper–scissors and on COMAL's game: SPPO, IPO and DPO circle around the
equilibrium, and outwards; optimistic, extragradient and moving-reference updates arrive there; a
fixed reference stops short of it by a bias that grows with τ; a round costs n².
"""

import sys
import time
from argparse import Namespace
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from engine.figures import BLUE, GREEN, GREY, ORANGE, PINK, SKY, new_figure, slope
from engine.progress import tqdm
from sppo import (
    dpo_loss,
    ipo_loss,
    normalized_target,
    optimistic_target,
    regularized_target,
    sppo_target,
)
from toy.games import comal, cycle, exploitability, nash, random_game
from toy.lab import script, triangle

Scalar = float | Tensor  # η or τ: one for all policies, or a tensor (..., 1) with one for each

# ------------------------------------------------------------------------ the methods


def win_rate(payoff: Tensor, log_policy: Tensor) -> Tensor:
    """P(y ≻ π) of every action y: (n, n), (..., n) -> (..., n)."""
    return log_policy.exp() @ payoff.T


def sppo(payoff: Tensor, path: list[Tensor], eta: Scalar) -> Tensor:
    """π_{t+1} = π_t exp(ηP(y ≻ π_t))/Z: eq. 4.4 solved exactly is eq. 4.1."""
    return path[-1] + normalized_target(win_rate(payoff, path[-1]), eta, path[-1])


def sppo_half(payoff: Tensor, path: list[Tensor], eta: Scalar) -> Tensor:
    """The same with the constant ½ for log Z/η, eq. 4.7.

    The argmin over policies π of E_{y~π_t}(log π/π_t - η(P - ½))².
    """
    # P(y ≻ π) - ½ in one product: subtracted afterwards, ½ would cost digits beside a vertex.
    above_half = win_rate(payoff - 0.5, path[-1])
    return path[-1] + nearest_log_ratio(path[-1], sppo_target(above_half, eta, baseline=0.0))


def optimistic(payoff: Tensor, path: list[Tensor], eta: Scalar) -> Tensor:
    """π_{t+1} ∝ π_t exp(η(2P(y ≻ π_t) - P(y ≻ π_{t-1}))): ONPO (2502.16852), OMWU (2512.24818)."""
    # In the first round there is no π_{t-1}; it is π_t itself.
    previous = win_rate(payoff, path[max(len(path) - 2, 0)])
    return normalized(path[-1] + optimistic_target(win_rate(payoff, path[-1]), previous, eta))


def regularized(payoff: Tensor, path: list[Tensor], eta: Scalar, tau: Scalar) -> Tensor:
    """argmax ⟨π, P(· ≻ π_t)⟩ - τ KL(π‖μ) - KL(π‖π_t)/η: magnetic mirror descent.

    It is also RSPO with reverse KL (2503.00030). Its fixed point is the equilibrium of the game
    with payoff P - τ KL(π‖μ): π ∝ μ exp(P(y ≻ π)/τ).
    """
    log_ratio = path[-1] - path[0]
    target = regularized_target(win_rate(payoff, path[-1]), log_ratio, eta, tau)
    return normalized(path[-1] + target)


def moving_reference(
    payoff: Tensor, path: list[Tensor], eta: Scalar, tau: Scalar, every: int
) -> Tensor:
    """`regularized`, whose μ becomes the current policy every so many rounds.

    MPO (2410.16714) and COMAL (2410.23223).
    """
    start = (len(path) - 1) // every * every
    return regularized(payoff, path[start:], eta, tau)


def extragradient(payoff: Tensor, path: list[Tensor], eta: Scalar, tau: Scalar = 0.0) -> Tensor:
    """Look ahead to π_{t+½}, then go from π_t with the win rates against it: EGPO (2503.08942).

    EGPO's explicit step, log π_t + η(P - τ log π_t/μ), is the proximal one at η/(1 - ητ).
    """
    log_ratio = path[-1] - path[0]
    proximal = eta / (1 - eta * tau)

    target = regularized_target(win_rate(payoff, path[-1]), log_ratio, proximal, tau)
    ahead = normalized(path[-1] + target)

    target = regularized_target(win_rate(payoff, ahead), log_ratio, proximal, tau)
    return normalized(path[-1] + target)


def nash_md(payoff: Tensor, path: list[Tensor], tau: Scalar, eta: Scalar | None = None) -> Tensor:
    """π_{t+1} ∝ π_t^μ exp(ηP(y ≻ π_t^μ)) with the mixture π_t^μ ∝ π_t^{1-ητ} μ^{ητ}.

    Nash-MD (2312.00886). eta None is its paper's 2/(τ(t + 2)), with which
    KL(π*_τ‖π_{T+1}) ≤ 8/(τ²(T + 1)); a fixed one keeps a small bias.
    """
    if eta is None:
        eta = 2 / (tau * (len(path) + 2))
    mixture = normalized((1 - eta * tau) * path[-1] + eta * tau * path[0])
    return normalized(mixture + sppo_target(win_rate(payoff, mixture), eta))


def iterative_dpo(payoff: Tensor, path: list[Tensor], eta: float) -> Tensor:
    """Minimiser of DPO's loss (2305.18290, eq. 7; β = 1/η) over pairs from π_t.

    The winner of a pair is drawn from P. One policy (n,) at a time.
    """
    return normalized(path[-1] + fit_pairs(payoff, path[-1], eta, dpo_loss))


def iterative_ipo(payoff: Tensor, path: list[Tensor], eta: float) -> Tensor:
    """Minimiser of IPO's loss (2310.12036, eq. 17; β = 1/η) over the same pairs.

    It is SPPO's exact step again.
    """
    return normalized(path[-1] + fit_pairs(payoff, path[-1], eta, ipo_loss))


# ------------------------------------------------------------------------ exact regressions


def normalized(log_weights: Tensor) -> Tensor:
    """log π with π ∝ exp(log_weights); a constant in the target drops out here."""
    return torch.log_softmax(log_weights, -1)


def nearest_log_ratio(log_policy: Tensor, target: Tensor) -> Tensor:
    """Δ that minimises Σ π (Δ - z)² among the log-ratios of policies, Σ π exp(Δ) = 1.

    All are (..., n), and Σ π exp(z) ≥ 1 is needed. Lagrange: Δ + c exp(Δ) = z with one c ≥ 0 for
    all actions, found by bisection. With v = Δ + log c it reads v + exp(v) = z + log c, whose left
    side is convex: Newton's steps fall onto the root.
    """

    def log_ratio(log_c):
        """Δ of every action, given c."""
        x = target + log_c
        v = torch.where(x > 1, x.clamp(min=1).log(), x)
        for _ in range(8):
            v = v - (v + v.exp() - x) / (1 + v.exp())
        # Two forms of the same number: take the one that loses fewer digits.
        return torch.where(x < 1, target - v.exp(), v - log_c)

    def surplus(log_ratio):
        """Σ π exp(Δ) - 1, action by action."""
        # Without the 1, which would hide what is lost at a vertex.
        policy = log_policy.exp()
        growth = torch.where(log_ratio.abs() < 1, torch.expm1(log_ratio), log_ratio.exp() - 1)
        large = (log_policy + log_ratio).exp() - policy
        return torch.where(log_ratio < 1, policy * growth, large)

    # The ends of the bisection, of log c.
    high = target.amax(-1, keepdim=True).clamp(min=1).log() + 1
    low = log_policy.amin(-1, keepdim=True) - 2 * target.abs().amax(-1, keepdim=True) - 40

    for _ in range(80):
        middle = (low + high) / 2
        too_much = surplus(log_ratio(middle)).sum(-1, keepdim=True) > 0
        low = torch.where(too_much, middle, low)
        high = torch.where(too_much, high, middle)
    return log_ratio(high)


def fit_pairs(payoff: Tensor, log_policy: Tensor, eta: float, loss: Callable) -> Tensor:
    """Δ (n,) that minimises Σ_ij π_i π_j P_ij loss(Δ_i, Δ_j, 1/η), by Newton's method.

    The sum is a convex function of the differences Δ_i - Δ_j.
    """
    weight = log_policy.exp()[:, None] * log_policy.exp() * payoff

    def expected(log_ratio):
        return (weight * loss(log_ratio[:, None], log_ratio[None, :], 1 / eta)).sum()

    log_ratio = torch.zeros_like(log_policy)
    for _ in range(50):
        gradient = torch.func.grad(expected)(log_ratio)
        if gradient.abs().max() < 1e-13:
            break

        # The Hessian is singular, as a constant added to all Δ changes nothing.
        hessian = torch.func.hessian(expected)(log_ratio)
        log_ratio = log_ratio - torch.linalg.pinv(hessian) @ gradient
    return log_ratio


# ------------------------------------------------------------------------ playing


def play(step: Callable, payoff: Tensor, start, rounds: int) -> Tensor:
    """log π_1, ..., log π_{rounds + 1}, stacked: (rounds + 1, ..., n).

    start is π_1 (..., n), all of it positive.
    """
    path = [torch.as_tensor(start, dtype=torch.float64).log()]
    for _ in range(rounds):
        path.append(step(payoff, path))
    return torch.stack(path)


def averages(path: Tensor) -> Tensor:
    """The mixtures (π_1 + ... + π_t)/t of theorem 4.1, for each t.

    (T, ..., n) log-policies -> (T, ..., n) policies.
    """
    t = torch.arange(1, len(path) + 1).view(-1, *[1] * (path.dim() - 1))
    return torch.cumsum(path.exp(), 0) / t


def kl(policy: Tensor, log_policy: Tensor) -> Tensor:
    """KL(policy‖exp(log_policy)) in nats, (..., n) -> (...)."""
    return (torch.xlogy(policy, policy) - policy * log_policy).sum(-1)


# ------------------------------------------------------------------------ what it shows

START = (0.8, 0.15, 0.05)

# name: (step, rounds). DPO's η is smaller because a logit is about 4(P - ½): the same speed near ½.
METHODS = {
    "SPPO": (partial(sppo, eta=1.0), 2000),
    "SPPO, constant ½": (partial(sppo_half, eta=1.0), 500),
    "iterative IPO": (partial(iterative_ipo, eta=1.0), 500),
    "iterative DPO": (partial(iterative_dpo, eta=0.25), 500),
    "optimistic": (partial(optimistic, eta=1.0), 2000),
    "extragradient": (partial(extragradient, eta=1.0), 2000),
    "regularized": (partial(regularized, eta=1.0, tau=0.1), 2000),
    "Nash-MD": (partial(nash_md, tau=0.1), 2000),
    "moving reference": (partial(moving_reference, eta=1.0, tau=0.1, every=100), 20_000),
}


def compare(payoff: Tensor, methods: dict = METHODS) -> dict:
    """For each method: exploitability of the last policy by round, and of the average of all.

    Also the round in which the last policy first comes below 1e-9, and the path.
    """
    result = {}
    for name, (step, rounds) in tqdm(methods.items(), desc="methods", unit="method", leave=False):
        path = play(step, payoff, START, rounds)
        last = exploitability(payoff, path.exp()).clamp(min=0)
        arrived = (last < 1e-9).nonzero()

        # Every round at first, then each tenth: 20,000 points would only make the file large.
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
TAUS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0)


def bias(payoff: Tensor, taus: tuple = TAUS, rounds: int = 20_000) -> dict:
    """Where a fixed reference leads, by μ and τ.

    Exploitability there in the original game, and the error of the fixed-point equation.
    """
    # All references and all τ play at once: (2, τ, 3).
    tau = torch.tensor(taus, dtype=torch.float64)[:, None]
    start = torch.tensor(list(REFERENCES.values()), dtype=torch.float64)[:, None]
    start = start.expand(-1, len(taus), -1)
    path = play(partial(regularized, eta=0.3, tau=tau), payoff, start, rounds)

    # π ∝ μ exp(P(y ≻ π)/τ), see `regularized`.
    expected = normalized(path[0] + win_rate(payoff, path[-1]) / tau).exp()
    error = (expected - path[-1].exp()).abs().amax(-1)

    result = {"tau": list(taus)}
    for name, gap, wrong in zip(REFERENCES, exploitability(payoff, path[-1].exp()), error):
        result[name] = {"exploitability": gap.tolist(), "fixed_point_error": wrong.tolist()}
    return result


SIZES = ((100, 10_000), (250, 2000), (500, 1000), (1000, 300), (2000, 100), (4000, 30))


def speed(generator: torch.Generator, sizes: tuple = SIZES) -> dict:
    """Seconds a round of exact SPPO by number of actions; `sizes` are pairs (actions, rounds).

    The exponent of the cost is a least-squares fit from 500 actions on.
    """
    step = partial(sppo, eta=0.1)
    rows = []
    for n, rounds in sizes:
        payoff = random_game(n, generator)
        start = torch.full((n,), 1 / n)
        # The first rounds are slower: memory is allocated and touched for the first time.
        play(step, payoff, start, 3)

        begin = time.perf_counter()
        play(step, payoff, start, rounds)
        seconds = (time.perf_counter() - begin) / rounds
        rows.append({"actions": n, "rounds": rounds, "seconds_per_round": seconds})

    # Below 500 actions the fixed cost of a call still shows.
    large = [(row["actions"], row["seconds_per_round"]) for row in rows if row["actions"] >= 500]
    return {"rows": rows, "exponent": slope(*zip(*large))}


def measure(args: Namespace) -> dict:
    """Everything. The seed is for the games that are timed; the rest is exact."""
    games = {"rock-paper-scissors": cycle(), "COMAL's game": comal()}
    return {
        "games": {name: compare(payoff) for name, payoff in games.items()},
        "bias": bias(cycle()),
        "speed": speed(torch.Generator().manual_seed(args.seed)),
    }


def print_table(result: dict) -> None:
    games = result["games"]
    print(f"{'exploitability':20}" + "".join(f"{game:^36}" for game in games))
    print(f"{'':20}" + f"{'last':>12}{'average':>12}{'< 1e-9 at':>12}" * len(games))
    for name in METHODS:
        cells = ""
        for rows in games.values():
            row = rows[name]
            arrival = row["round_below_1e-9"] or "-"
            cells += f"{row['last']:12.2g}{row['average']:12.4f}{arrival:>12}"
        print(f"{name:20}{cells}")

    worst = max(max(result["bias"][name]["fixed_point_error"]) for name in REFERENCES)
    print(f"regularized: fixed-point equation holds to {worst:.1g} for every τ and μ")

    seconds = 1e4 * result["speed"]["rows"][0]["seconds_per_round"]
    exponent = result["speed"]["exponent"]
    print(f"speed: 10,000 rounds of a 100-action game in {seconds:.2f} s")
    print(f"from 500 actions on the cost grows as n^{exponent:.2f}")


# ------------------------------------------------------------------------ the figure

STYLES = {  # SPPO is wide: iterative IPO, the same step, lies on it
    "SPPO": (ORANGE, "-"),
    "iterative IPO": (BLUE, "--"),
    "iterative DPO": (PINK, "-"),
    "optimistic": (SKY, "-"),
    "extragradient": (PINK, "--"),
    "regularized": (GREY, "-"),
    "Nash-MD": (GREY, ":"),
    "moving reference": (GREEN, "-"),
}


def draw(result: dict):
    figure = new_figure(13, 9.5)
    (simplex, curves), (biases, speeds) = figure.subplots(2, 2)
    rows = result["games"]["COMAL's game"]

    draw_paths(simplex, rows)
    draw_curves(curves, rows)
    draw_bias(biases, result["bias"])
    draw_speed(speeds, result["speed"]["rows"])
    return figure


def draw_paths(axes, rows: dict) -> None:
    point = triangle(axes, ("all a", "all b", "all c"))
    for name, rounds in (("SPPO", 60), ("iterative IPO", 60), ("moving reference", 500)):
        _, line = STYLES[name]
        path = point(rows[name]["path"][:rounds])
        axes.plot(*path, line, label=f"{name}, {rounds} rounds", **look(name))

    equilibrium = point(nash(comal()))
    axes.plot(*point(START), "o", color="black", label="start")
    axes.plot(*equilibrium, "*", color="black", markersize=14, label="Nash equilibrium")
    axes.legend(frameon=False, fontsize=9, loc="upper left", bbox_to_anchor=(-0.12, 1))
    axes.set_title("COMAL's game: policy of each round")


def look(name: str) -> dict:
    """Colour and width of a method's line."""
    colour, _ = STYLES[name]
    wide = dict(linewidth=5, alpha=0.4)
    return dict(color=colour, **(wide if name == "SPPO" else dict(linewidth=1.2)))


def draw_curves(axes, rows: dict) -> None:
    for name, (_, line) in STYLES.items():
        axes.plot(rows[name]["rounds"], rows[name]["last_by_round"], line, label=name, **look(name))

    # Beyond 3,000 rounds only the moving reference goes on, below what is shown.
    axes.set(xscale="log", yscale="log", xlim=(1, 3000), ylim=(1e-12, 2))
    axes.set(xlabel="round", ylabel="exploitability of the last policy")
    axes.set_title("COMAL's game: only some last policies arrive")
    axes.legend(frameon=False, fontsize=9, loc="lower left")


def draw_bias(axes, result: dict) -> None:
    for name, colour in zip(REFERENCES, (BLUE, ORANGE)):
        axes.plot(result["tau"], result[name]["exploitability"], "o-", color=colour, label=name)

    axes.set(xscale="log", yscale="log", ylabel="exploitability at the fixed point")
    axes.set_xlabel("τ (weight of the KL, in win rate)")
    axes.set_title("Rock–paper–scissors: the bias of a fixed reference")
    axes.legend(frameon=False)


def draw_speed(axes, rows: list[dict]) -> None:
    actions = [row["actions"] for row in rows]
    seconds = [row["seconds_per_round"] for row in rows]
    # n² through the last point, where it is least disturbed by fixed costs.
    square = [seconds[-1] * (n / actions[-1]) ** 2 for n in actions]

    axes.plot(actions, seconds, "o-", color=BLUE, label="measured")
    axes.plot(actions, square, "--", color=GREY, label="n²")
    axes.set(xscale="log", yscale="log", xlabel="actions n", ylabel="seconds a round")
    axes.set_title("Cost of a round of exact SPPO")
    axes.legend(frameon=False)


if __name__ == "__main__":
    sys.exit(script("tabular", __doc__, measure, print_table, draw))
