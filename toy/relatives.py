"""One equation, many names: where SPPO stands among its relatives.

    python -m toy.relatives        out/toy/relatives.png, out/toy/relatives.json

One step multiplies π_t(y) by a function of the win rate P = P(y ≻ π_t): upper panels, for 200
responses in a strict order. At η = 2 the relatives nearly agree. At η = 1000 the exact log Z (and
GVPO, `--loss centred`) leaves only the best response; the constant ½ of eq. 4.7, which is PMD-mean
and Kimi k1.5 with win rates as rewards, tends to π(P - ½)₊/Σ π(P - ½)₊. It adds (c/2) χ²(π‖π_t) to
the KL, with c/η = 0.008, 0.034, 0.045 at η = 1, 10, 1000 from START: this is why ½ is stable there.
Looking back. π_{t+1} ∝ Π π_{t-j}^a_j exp(η Σ b_j P(y ≻ π_{t-j})) is SPPO, APO, MNPO or optimistic,
and the sign of one number says which spirals inwards: `growth`. Exploitability after 4000 rounds at
η = 0.5, worst of five starts: optimistic 4e-9; SPPO, APO and MNPO 0.4. With a KL term (τ = 0.1) to
π_1 all nine arrive at one and the same policy, exploitable by up to 0.20.
A judge's budget. In a random game of ten actions, 300 rounds of 16 samples with one opponent each
(2400 pairs) end at 0.032, with all pairs (36,000) at 0.020, but 5 samples with all pairs (3000) at
0.048: comparisons can be saved, samples cannot.

What did not hold:
  - "MNPO's last policy never arrives without a KL term." Not if opponents are weighted by λ, too:
    with .9 on the newest policy and .1 on that of 9 rounds ago it does (3e-5). If all opponents
    count alike, it never does, whatever λ.
  - "The geometric mean of three policies as base, against the newest, gets to 0.04." From START.
    It shrinks by 0.04 (ηω)² a round, optimistic by 0.5: from the worst start it is still at 0.2.
    MNPO's released code does the same (smiles724/MNPO: pairs come from the newest policy alone),
    with a KL term on top: a third of the base is π_1.
  - "verl's recipe is `normalized` up to a temperature." The temperature is η: no difference. But
    its mean is over the whole batch, so a prompt that is always solved is pushed up.
  - "Dividing by GRPO's σ changes only the step size." The plain average stops converging: with
    η = 0.02 it is at 0.025 after 10,000 rounds, and the average with weights 1/σ_t at 0.002.
  - "Near-duplicates move the equilibrium." A copy of rock that beats rock takes over its share, and
    nothing else changes: no gate is needed. It does move win rates: with .4 on rock and .4 on the
    copy, .705 for the copy and .680 for paper; gated .545 and .680. The gate's price: a right sum
    that shares 3 of 5 words with the wrong one beats it with .68 instead of .95.
"""

import math
import sys
from argparse import Namespace
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from engine.figures import BLUE, GREEN, GREY, ORANGE, PINK, SKY, YELLOW, new_figure
from engine.progress import tqdm
from judges.base import Judge, checked_tables
from sppo import sppo_target
from toy.games import comal, cycle, exploitability, random_game
from toy.lab import script
from toy.tabular import START, averages, normalized, play, regularized, sppo, sppo_half, win_rate

GAMES = {"rock-paper-scissors": cycle(), "COMAL's game": comal()}

# ------------------------------------------------------------------------ one step


def grpo_advantage(reward: Tensor, divide: bool = False) -> Tensor:
    """(..., K) rewards minus their mean, as in Dr. GRPO (2503.20783); `divide`: by σ, as in GRPO.

    The mean of K win rates is ½, so -2η Σ_k (P̂_k - ½) ∇log π(y_k) is the gradient of eq. 4.7 at
    π_t, and with σ Pref-GRPO's (2508.20751).
    """
    advantage = reward - reward.mean(-1, keepdim=True)
    return advantage / (reward.std(-1, keepdim=True) + 1e-4) if divide else advantage


def spread(payoff: Tensor, log_policy: Tensor) -> Tensor:
    """σ of P(y ≻ π) over y ~ π, (..., 1), with GRPO's 1e-4 against a division by 0."""
    variance = (log_policy.exp() * win_rate(payoff - 0.5, log_policy) ** 2).sum(-1, keepdim=True)
    return variance.sqrt() + 1e-4


def grpo(payoff: Tensor, path: list[Tensor], eta: float) -> Tensor:
    """π_{t+1} ∝ π_t exp(η(P - ½)/σ_t): exact play with the win rates divided by their spread."""
    return normalized(path[-1] + eta * win_rate(payoff - 0.5, path[-1]) / spread(payoff, path[-1]))


def best_of_two(payoff: Tensor, path: list[Tensor]) -> Tensor:
    """π_{t+1} = 2 π_t P(y ≻ π_t), the winner of two samples: WIND (2410.20727), BOND at N = 2.

    It sums to 1 without a log Z. log 2P = 2(P - ½) + ..., to first order SPPO at η = 2.
    """
    # Normalised all the same: the rounding error of the sum would double in every round.
    return normalized(path[-1] + (2 * win_rate(payoff, path[-1])).log())


def softmean_target(reward: Tensor, eta: float) -> Tensor:
    """η(r - softmean_η r), verl's recipe/sppo: the soft mean is over all of the batch (N, K)."""
    return eta * reward - torch.logsumexp(eta * reward.flatten(), 0) + math.log(reward.numel())


def steps(etas: tuple = (2.0, 1000.0), n: int = 200) -> dict:
    """π_{t+1}/π_t by win rate: n actions in a strict order, π_t uniform."""
    payoff = torch.ones(n, n, dtype=torch.float64).tril(-1).fill_diagonal_(0.5)
    old = torch.full((n,), 1 / n, dtype=torch.float64).log()
    result = {"win_rate": win_rate(payoff, old).tolist()}
    for eta in etas:
        new = {
            "exact log Z; GVPO": sppo(payoff, [old], eta),
            "constant ½; PMD-mean, Kimi k1.5": sppo_half(payoff, [old], eta),
            "best of two": best_of_two(payoff, [old]),
        }
        result[str(eta)] = {name: (policy - old).exp().tolist() for name, policy in new.items()}
    return result


# ------------------------------------------------------------------------ policies that look back

THIRDS = (1 / 3,) * 3
SPARSE = (0.9, *[0.0] * 8, 0.1)
LOOKING_BACK = {  # name: (a, b)
    "SPPO": ((1,), (1,)),
    "APO, α = 0.3": ((1.3, -0.3), (1.3, -0.3)),
    "APO, α = -0.3": ((0.7, 0.3), (0.7, 0.3)),
    "MNPO, last 3": (THIRDS, THIRDS),
    "MNPO, λ = (.9, 0, ..., 0, .1)": (SPARSE, [0.1] * 10),
    "… opponents weighted by λ, too": (SPARSE, SPARSE),
    "MNPO's code, last 2": ((0.5, 0.5), (1,)),
    "MNPO's code, last 3": (THIRDS, (1,)),
    "optimistic": ((1,), (2, -1)),
}


def looking_back(
    payoff: Tensor, path: list[Tensor], eta: float, base: tuple, opponents: tuple, tau: float = 0.0
) -> Tensor:
    """π_{t+1} ∝ π_1^ητ (Π_j π_{t-j}^a_j)^(1-ητ) exp(η Σ_j b_j P(y ≻ π_{t-j})).

    `base` are the a_j, `opponents` the b_j, j = 0, 1, ...; each sums to 1. MNPO (2509.23102) has
    a = λ and equal b, APO (2410.06293) a = b = (1 + α, -α), ONPO b = (2, -1); π_0, ... are π_1.
    """
    count = max(len(base), len(opponents))
    past = [path[max(len(path) - 1 - j, 0)] for j in range(count)]
    prior = sum(a * log_policy for a, log_policy in zip(base, past))
    rate = sum(b * win_rate(payoff, log_policy) for b, log_policy in zip(opponents, past))
    prior = (1 - eta * tau) * prior + eta * tau * path[0]
    return normalized(prior + sppo_target(rate, eta))


def growth(base: tuple, opponents: tuple) -> float:
    """By how much a small circle around the equilibrium grows in a round, per (ηω)².

    There log π - log π* turns by ±iηω, so a round is x_{t+1} = Σ_j (a_j + iηω b_j) x_{t-j}; its
    root nearest to 1 has log|root| = (ηω)² (2AB - C)/(2A³), A = Σ a_j (j + 1), B = Σ b_j (j + 1),
    C = Σ a_j (j + 1)². Negative: the last policy spirals inwards. With k equal b, B = (k + 1)/2 and
    C ≤ kA, so it is positive for every λ; APO's has the sign of 2α² - α + 1 > 0.
    """
    A = sum(a * (j + 1) for j, a in enumerate(base))
    B = sum(b * (j + 1) for j, b in enumerate(opponents))
    C = sum(a * (j + 1) ** 2 for j, a in enumerate(base))
    return (2 * A * B - C) / (2 * A**3)


def look_back(generator: Generator, rounds: int, eta: float = 0.5, tau: float = 0.1) -> dict:
    """Exploitability of each method without and with the KL term, from START and 4 random starts.

    `last` is the worst of the last tenth of the rounds and of the starts: one round might be luck.
    """
    random = torch.softmax(torch.randn(4, 3, generator=generator, dtype=torch.float64), -1)
    starts = torch.cat([torch.tensor([START], dtype=torch.float64), random])
    kept = sorted({round(rounds ** (k / 150)) for k in range(151)})
    result = {"rounds": kept, "eta": eta, "tau": tau}

    for game, payoff in GAMES.items():
        result[game] = {}
        fixed = play(partial(regularized, eta=eta, tau=tau), payoff, starts, rounds)[-1].exp()
        for name, (base, opponents) in tqdm(LOOKING_BACK.items(), desc=game, leave=False):
            step = partial(looking_back, eta=eta, base=base, opponents=opponents)
            path = play(step, payoff, starts, rounds)
            gap = exploitability(payoff, path.exp())
            with_kl = play(partial(step, tau=tau), payoff, starts, rounds)[-1].exp()
            result[game][name] = {
                "growth": growth(base, opponents),
                "last": gap[-rounds // 10 :].amax().item(),
                "average": exploitability(payoff, averages(path)[-1]).amax().item(),
                "with_kl": exploitability(payoff, with_kl).amax().item(),
                "from_regularized": (with_kl - fixed).abs().amax().item(),
                "by_round": gap[kept, 0].clamp(min=0).tolist(),
            }
    return result


def other_averages(rounds: int, eta: float = 0.02) -> dict:
    """Exploitability by game: GRPO's average, that of its regret bound, and best of two."""
    result = {}
    for game, payoff in GAMES.items():
        path = play(partial(grpo, eta=eta), payoff, START, rounds)
        weight = 1 / spread(payoff, path)
        weighted = (weight * path.exp()).sum(0) / weight.sum()
        two = play(best_of_two, payoff, START, 400)
        result[game] = {
            "GRPO with σ, average": exploitability(payoff, averages(path)[-1]).item(),
            "weighted by 1/σ": exploitability(payoff, weighted).item(),
            "best of two, last": exploitability(payoff, two[-40:].exp()).amax().item(),
            "average": exploitability(payoff, averages(two)[-1]).item(),
        }
    return result


# ------------------------------------------------------------------------ what is asked of a judge


def ring(tables: int, K: int, m: int, generator: Generator) -> Tensor:
    """(tables, K, K) bool: which pairs are judged if everyone meets m neighbours on a random ring.

    K m/2 pairs instead of K (K - 1)/2. ValueError if m is not in 1 ... K - 1, or odd like K.
    """
    if not 1 <= m < K or m * K % 2:
        raise ValueError(f"ring: m is {m}, expected 1 to {K - 1}, and even if K = {K} is odd")
    seat = torch.rand(tables, K, generator=generator).argsort(-1)
    forward = (seat[:, :, None] - seat[:, None]) % K
    steps = torch.minimum(forward, K - forward)

    # An odd m meets the one who sits opposite as well.
    opposite = (2 * steps == K) & (m % 2 == 1)
    return (steps > 0) & (steps <= m // 2) | opposite


def partial_win_rates(preference: Tensor, asked: Tensor) -> Tensor:
    """(..., K) P̂ from the pairs asked: their mean stands for K - 1 opponents, and one tie is added.

    Unbiased if opponents are drawn at random; on a ring the K win rates average to ½.
    """
    K = preference.shape[-1]
    others = (preference * asked).sum(-1) / asked.sum(-1)
    return (0.5 + (K - 1) * others) / K


def sampled(
    payoff: Tensor, eta: float, rounds: int, K: int, m: int, games: int, generator: Generator
) -> float:
    """Mean exploitability of the average after rounds of K samples with m opponents each.

    A sampled action moves by the mean target of its copies, the others by normalisation only.
    """
    n = len(payoff)
    log_policy = torch.full((games, n), 1 / n, dtype=torch.float64).log()
    total = torch.zeros_like(log_policy)
    for _ in range(rounds):
        total = total + log_policy.exp()
        action = torch.multinomial(log_policy.exp(), K, True, generator=generator)  # (games, K)
        table = payoff[action[:, :, None], action[:, None]]
        target = sppo_target(partial_win_rates(table, ring(games, K, m, generator)), eta)

        copies = F.one_hot(action, n).double()  # (games, K, n)
        moved = (copies * target[..., None]).sum(1) / copies.sum(1).clamp(min=1)
        log_policy = normalized(log_policy + moved)
    return exploitability(payoff, total / rounds).mean().item()


BUDGETS = {16: (1, 2, 4, 8, 15), 8: (1, 2, 4, 7), 5: (2, 4), 4: (1, 2, 3), 2: (1,)}  # K: m


def budget(generator: Generator, rounds: int, eta: float = 0.3, games: int = 64) -> list[dict]:
    """What the average is worth after so many rounds, and how many pairs were judged for it."""
    payoff = random_game(10, generator)
    rows = []
    for K, m in [(K, m) for K, opponents in BUDGETS.items() for m in opponents]:
        gap = sampled(payoff, eta, rounds, K, m, games, generator)
        rows.append({"K": K, "m": m, "pairs": rounds * K * m // 2, "exploitability": gap})
    return rows


class Gated(Judge):
    """P̃ = ½ + (1 - similarity)(P - ½), so that near-duplicates tie: S-SPPO (2606.01561).

    similarity(K texts) -> (K, K) in [0, 1]. The linear form is ours: the paper's was not at hand.
    """

    def __init__(self, judge, similarity: Callable[[list[str]], Tensor]):
        self.judge = judge
        self.similarity = similarity

    def preferences_many(self, prompts, responses):
        tables = checked_tables(self.judge, prompts, responses, "to be gated")
        similar = torch.stack([self.similarity(row) for row in responses])
        return 0.5 + (1 - similar) * (tables - 0.5)


# ------------------------------------------------------------------------ what it shows


def measure(args: Namespace) -> dict:
    """Everything. The seed is for random games, starts and samples."""
    return {
        "steps": steps(),
        "looking_back": look_back(Generator().manual_seed(args.seed), rounds=4000),
        "averages": other_averages(rounds=10_000),
        "budget": budget(Generator().manual_seed(args.seed), rounds=300),
    }


def print_table(result: dict) -> None:
    print_looking_back(result["looking_back"])

    print("\nexploitability of other averages")
    for game, row in result["averages"].items():
        print(f"  {game}")
        print("    " + ", ".join(f"{name} {gap:.4f}" for name, gap in row.items()))

    print("\njudge's budget: K samples, m opponents each; exploitability of the average")
    for row in sorted(result["budget"], key=lambda row: row["exploitability"]):
        print(f"{row['pairs']:8,} pairs{row['K']:4}{row['m']:4}{row['exploitability']:10.4f}")


def print_looking_back(result: dict) -> None:
    print(f"exploitability, η = {result['eta']}, worst of 5 starts")
    print(f"{'':33}{'':9}" + "".join(f"{game:>22}" for game in GAMES))
    print(f"{'':33}{'growth':>9}" + f"{'last':>12}{'average':>10}" * len(GAMES))
    for name in LOOKING_BACK:
        rows = [result[game][name] for game in GAMES]
        cells = "".join(f"{row['last']:12.1g}{row['average']:10.4f}" for row in rows)
        print(f"  {name:31}{rows[0]['growth']:+9.3f}{cells}")

    rows = [row for game in GAMES for row in result[game].values()]
    apart = max(row["from_regularized"] for row in rows)
    worst = max(row["with_kl"] for row in rows)
    print(f"  with a KL term, τ = {result['tau']}: one policy ({apart:.0g} apart), at {worst:.2f}")


# ------------------------------------------------------------------------ the figure


def draw(result: dict):
    figure = new_figure(13.5, 10)
    (small, large), (back, pairs) = figure.subplots(2, 2)
    draw_steps(small, result["steps"], "2.0")
    draw_steps(large, result["steps"], "1000.0")
    draw_looking_back(back, result["looking_back"])
    draw_budget(pairs, result["budget"])
    return figure


def draw_steps(axes, rows: dict, eta: str) -> None:
    looks = ((ORANGE, "-"), (BLUE, "-"), (GREEN, "--"))
    for (name, ratio), (colour, line) in zip(rows[eta].items(), looks):
        axes.plot(rows["win_rate"], ratio, line, color=colour, label=name)

    axes.axhline(1, color=GREY, linewidth=0.8)
    # At η = 1000 the best of 200 gets all the weight, 200 times its own.
    axes.set_ylim(0, min(max(rows[eta]["exact log Z; GVPO"]) * 1.05, 8))
    axes.set(xlabel="win rate P(y ≻ π$_t$)", ylabel="π$_{t+1}$(y) / π$_t$(y)")
    axes.set_title(f"One step at η = {float(eta):g}")
    axes.legend(frameon=False, loc="upper left")


def draw_looking_back(axes, result: dict) -> None:
    colours = (ORANGE, PINK, None, None, GREY, SKY, None, BLUE, GREEN)
    for name, colour in zip(LOOKING_BACK, colours):
        if colour:
            gap = result["rock-paper-scissors"][name]["by_round"]
            axes.plot(result["rounds"], gap, color=colour, linewidth=1.2, label=name)

    axes.set(xscale="log", yscale="log", ylim=(1e-8, 3), xlabel="round")
    axes.set(ylabel="exploitability of the last policy")
    axes.set_title("Looking back helps only some: rock–paper–scissors, no KL term")
    axes.legend(frameon=False, fontsize=9, loc="lower left")


def draw_budget(axes, rows: list[dict]) -> None:
    for K, colour in zip(BUDGETS, (BLUE, GREEN, PINK, ORANGE, YELLOW)):
        chosen = [row for row in rows if row["K"] == K]
        places = [(row["pairs"], row["exploitability"]) for row in chosen]
        axes.plot(*zip(*places), "o-", color=colour, label=f"{K} samples a prompt")
        for row, place in zip(chosen, places):
            axes.annotate(f" m = {row['m']}", place, fontsize=8, va="bottom", color=colour)

    axes.set(xscale="log", xlabel="judged pairs in 300 rounds")
    axes.set(ylabel="exploitability of the average")
    axes.margins(x=0.12)
    axes.set_ylim(0, None)
    axes.set_title("A judge's budget: samples count, opponents (m) hardly")
    axes.legend(frameon=False)


if __name__ == "__main__":
    sys.exit(script("relatives", __doc__, measure, print_table, draw))
