"""What the paper leaves out: the constant ½ for log Z/η, the number of samples, and a shortcut.

    python -m toy.ablations                        out/toy/ablations.png, out/toy/ablations.json

What is measured is exploitability, mostly of the average of the rounds' policies. The numbers are
of seed 0; seeds 1 and 2 tell the same story.

The constant. log Z/η of appendix A is 0.504, 0.541, 0.770, 0.954, 0.993 at η = 0.1, 1, 10, 100,
1000 for ordered K. That of disordered K stays near ½ while η² is small against K: at η = 10 it is
0.65 for K = 5, 0.52 for 50, 0.50 for 500.
  Up to η = 1 exact play hardly tells log Z and ½ apart: 0.023 and 0.024 after 100 rounds of
  rock-paper-scissors. At η = 1000 they are two algorithms. One round from (.8, .15, .05): log Z
  leaves nothing but the best reply, (0, 0, 1); ½ leaves every above-average action with weight
  about π(P - ½), (.80, 0, .20). The gentler one is not always the better one: after 3 rounds it is
  at 0.140 against 0.167, but in the transitive game at 0.160 against 0.113, and after 100 rounds
  log Z leads in both from η = 10 on: with η = 1000 it is at 0.018 against 0.052.
Samples, from (.5, .3, .2) at η = 0.3 for 100 rounds. Rock-paper-scissors: 0.15, 0.17, 0.07, 0.04,
  0.03 for K = 2, 3, 5, 8, 16; exact play 0.009. The noise of P̂ is the smaller part: where every
  action is moved, sampled or not, K = 2 comes to 0.034, and in the transitive game to the exact
  0.055, where samples alone leave 0.136. What hurts is that an action is moved only in rounds in
  which it was sampled: a rare one hardly ever, even if it would win. That is a bias, not noise:
  `sampled` with η = 0.1 and K = 2 is at 0.15 after 300 rounds and at 0.23 after 1000, with K = 16
  at 0.017 and 0.008 (32 replicates, not in the table). A table shares nothing between actions; a
  language model moves similar texts together. Winner and loser alone lose a little in cycles
  (K = 5: 0.10 against 0.07) and gain a little in the transitive game (0.071 against 0.077).
The shortcut of the authors' code keeps only scores, which turns a pure cycle of three into ½
  everywhere. But with one response of each kind the true win rates are ½ as well: there neither
  pipeline learns, and rightly so if responses are drawn from π, for this is its equilibrium. (If
  they are made distinct they are no sample of π, and neither pipeline ever leaves any policy.)
  Other samples have scores that differ, and in a pure cycle the shortcut's average goes to the
  middle too. It goes wrong elsewhere:
  - Equal mean logits are not equal win rates. It stands still where L π = 0, L = logit P:
    exploitability 0.018, 0.048, 0.106 in three uneven cycles. From afar it runs around in wide
    circles, and their average comes closer: after 2000 exact rounds at η = 0.1 0.003, 0.009, 0.013,
    whole table 0.015, 0.011, 0.008.
  - Random games of 10 actions, as many rounds: 0.031 against 0.008 of the whole table; of 20: 0.040
    against 0.009. It is ahead for the first 300, for it doubles the logits (P = .9 becomes .988),
    as if η were twice as large; with halved scores it starts like the whole table
    and ends at 0.036 and 0.041.
  - One each of rock, paper, scissors: rock wins, paper loses, though paper beats rock:
    P(winner beats loser) is .2, rebuilt .75.
  - Few samples hide it: K = 16 in rock-paper-scissors comes to 0.042, halved 0.030, whole table
    0.025.
  - P = 0 or 1 has no logit: the tables become NaN, and `win_rates` says so.
"""

import math
import sys
from collections.abc import Callable
from functools import partial
from itertools import product

import torch
from torch import Generator, Tensor

from engine.figures import BLUE, GREEN, GREY, ORANGE, PINK, new_figure
from engine.progress import tqdm
from judges.base import transitive
from sppo import Game, RoundConfig, normalized_target, sppo_round, win_rates
from toy.games import bradley_terry, cycle, exploitability, nash, random_game
from toy.lab import script
from toy.tabular import averages, play, sppo, sppo_half

ETAS = [10 ** (k / 4) for k in range(-4, 13)]  # 0.1 to 1000
START = (0.8, 0.15, 0.05)  # of exact play
# Of sampled play: from START on, paper is so rare that it is hardly ever sampled.
SPREAD = (0.5, 0.3, 0.2)

PURE = 1 / (1 + math.exp(-2))  # 0.881, a logit of 2
GAMES = {
    "rock-paper-scissors": cycle(),
    "pure cycle": cycle((PURE,) * 3),
    "transitive": bradley_terry([0.0, 1.0, 2.0]),
}
UNEVEN = ((0.9, 0.9, 0.8), (0.99, 0.6, 0.6), (0.99, 0.9, 0.6))
CYCLES = {"pure": (PURE,) * 3} | {str(strengths): strengths for strengths in UNEVEN}

# ------------------------------------------------------------------------ the constant


def soft_value(win_rate: Tensor, eta: float) -> Tensor:
    """log Z/η of K samples, (..., K) -> (...): what eq. 4.7 replaces by ½."""
    # The normalized target is ηP̂ - log Z, with the same log Z for all K.
    return (eta * win_rate - normalized_target(win_rate, eta))[..., 0] / eta


def ordered(size: int) -> Tensor:
    """Win rates (K,) in a strict total order (appendix A)."""
    return (torch.arange(size, dtype=torch.float64) + 0.5) / size


def disordered(size: int, generator: Generator, tables: int = 50) -> Tensor:
    """Win rates (tables, K) where each P(i beats j), i < j, is a coin flip, 0 or 1 (appendix A)."""
    upper = torch.randint(0, 2, (tables, size, size), generator=generator).double().triu(1)
    return win_rates(upper + (1 - upper.mT).tril(-1) + 0.5 * torch.eye(size, dtype=torch.float64))


def constant(etas: list, rounds: list[int], sizes: tuple, generator: Generator) -> dict:
    """log Z/η by η, and what exact play from START comes to with the exact constant and with ½."""
    rates = {"strict ranking, K large": ordered(100_000)}
    for size in sizes:
        rates[f"coin-flip preferences, K = {size}"] = disordered(size, generator)

    values = {}
    for name, rate in rates.items():
        values[name] = [soft_value(rate, eta).mean().item() for eta in etas]

    # All η play at once.
    eta = torch.tensor(etas, dtype=torch.float64)[:, None]
    start = torch.tensor(START).double().expand(len(etas), -1)

    rows = []
    for game, length in product(("rock-paper-scissors", "transitive"), rounds):
        payoff = GAMES[game]
        for name, step in {"exact": sppo, "half": sppo_half}.items():
            path = play(partial(step, eta=eta), payoff, start, length)
            average = averages(path[:-1])[-1]

            row = {"game": game, "rounds": length, "constant": name, "eta": list(etas)}
            row["average"] = exploitability(payoff, average).tolist()
            row["last"] = exploitability(payoff, path[-1].exp()).tolist()
            rows.append(row)
    return {"soft_value": values, "play": rows}


# ------------------------------------------------------------------------ the shortcut


def shortcut(preference: Tensor, policy: Tensor | None = None, orders: int = 2) -> Tensor:
    """P'(i beats j) = σ(score_i - score_j), all that uclaml/SPPO keeps of P (..., K, K).

    It can only be transitive. score_i = mean_j(L_ij - L_ji), L the judge's logit with i on the
    left; of a symmetric judge 2 mean_j logit P_ij. With orders=1 the two orders are averaged, not
    added. The mean is over opponents from policy (..., K); without one, over the K samples. P of 0
    or 1 has no finite logit: a response that wins one pair and loses another scores inf - inf.
    """
    return transitive(preference.logit() * orders / 2, policy)


def full_table(preference: Tensor, policy: Tensor | None = None) -> Tensor:
    """The judge whose table is kept as it is."""
    return preference


JUDGES = {"table": full_table, "shortcut": shortcut, "averaged": partial(shortcut, orders=1)}


def rates_against(preference: Tensor, policy: Tensor) -> Tensor:
    """P(y ≻ π), (..., n, n), (..., n) -> (..., n): each policy has a game of its own."""
    return (preference * policy[..., None, :]).sum(-1)


def judged(payoff: Tensor, path: list[Tensor], eta: float, judge: Callable) -> Tensor:
    """The exact step of SPPO where the K → ∞ samples are judged by `judge`."""
    policy = path[-1].exp()
    return path[-1] + normalized_target(rates_against(judge(payoff, policy), policy), eta, path[-1])


def mean_logit_equilibrium(strengths: tuple) -> Tensor:
    """Where all scores of a cycle of three are equal, L π = 0."""
    # Action i has the strength of the pair without it.
    logit = torch.tensor(strengths, dtype=torch.float64).logit()
    return logit.roll(-1) / logit.sum()


def tables() -> dict:
    """What the shortcut makes of single tables of K samples: [of the table, of the shortcut]."""
    pure = cycle((PURE,) * 3)
    uneven = pure[[0, 0, 1]][:, [0, 0, 1]]
    pair = bradley_terry([math.log(9), 0.0])
    rps = cycle()
    winner = win_rates(rps).argmax()
    loser = win_rates(rps).argmin()

    def read(judge):
        beats = "P(winner beats loser)"
        return {
            "pure cycle": judge(pure).tolist(),
            "pure cycle, win rates of one of each": win_rates(judge(pure)).tolist(),
            "pure cycle, win rates of (0, 0, 1)": win_rates(judge(uneven)).tolist(),
            f"rock-paper-scissors, one of each, {beats}": judge(rps)[winner, loser].item(),
            f"K = 2, {beats}": judge(pair)[0, 1].item(),
        }

    whole = read(full_table)
    rebuilt = read(shortcut)
    return {name: [whole[name], rebuilt[name]] for name in whole}


def exact_shortcut(sizes: tuple, games: int, rounds: int, eta: float, generator: Generator) -> dict:
    """Exact play by judge.

    Cycles of three are played from START, random games of each size from the uniform policy.
    """
    # About evenly spaced on a logarithmic axis.
    marks = sorted({round(rounds ** (k / 30)) for k in range(31)})
    steps = {judge: partial(judged, eta=eta, judge=table) for judge, table in JUDGES.items()}
    return {
        "rounds": marks,
        "cycles": play_cycles(steps, rounds),
        "random": play_random_games(steps, sizes, games, marks, generator),
    }


def play_cycles(steps: dict[str, Callable], rounds: int) -> list[dict]:
    """Exploitability of each judge's average, and of the point of equal scores, by cycle."""
    payoff = torch.stack([cycle(strengths) for strengths in CYCLES.values()])
    start = torch.tensor(START).double().expand(len(payoff), -1)
    paths = {judge: play(step, payoff, start, rounds) for judge, step in steps.items()}

    rows = []
    for i, (game, strengths) in enumerate(CYCLES.items()):
        point = mean_logit_equilibrium(strengths)
        row = {"game": game, "equilibrium": nash(payoff[i]).tolist(), "point": point.tolist()}
        for judge, path in paths.items():
            row[judge] = exploitability(payoff[i], averages(path[:-1, i])[-1]).item()
        row["equal_scores"] = exploitability(payoff[i], point).item()
        rows.append(row)
    return rows


def play_random_games(
    steps: dict[str, Callable], sizes: tuple, games: int, marks: list[int], generator: Generator
) -> list[dict]:
    """Exploitability of each judge's average after `marks` rounds: mean and spread over games."""
    rows = []
    for size in sizes:
        payoff = torch.stack([random_game(size, generator) for _ in range(games)])
        start = torch.full((games, size), 1 / size, dtype=torch.float64)

        for judge, step in steps.items():
            path = play(step, payoff, start, marks[-1] - 1)
            policy = averages(path)[torch.tensor(marks) - 1]

            # `exploitability` is of one game; here each policy has its own.
            gain = rates_against(payoff, policy).amax(-1) - 0.5  # (marks, games)

            row = {"actions": size, "judge": judge}
            row["mean"] = gain.mean(1).tolist()
            row["spread"] = gain.std(1).tolist()
            rows.append(row)
    return rows


# ------------------------------------------------------------------------ samples


class Table(torch.nn.Module):
    """A policy of its own over n actions for each of N prompts, which share nothing."""

    def __init__(self, start: Tensor):
        super().__init__()
        self.logits = torch.nn.Parameter(start.double().log())

    def forward(self) -> Tensor:
        """log π (N, n)."""
        return torch.log_softmax(self.logits, -1)


class Copies(Game):
    """Many games at once: prompt k is a game of its own, payoff[k] (N, n, n), from start[k] (N, n).

    The prompts are in equal blocks, one for each of `judges`, which take and return tables
    (..., K, K).
    """

    def __init__(self, payoff: Tensor, start: Tensor, judges: list, samples: int, generator):
        self.payoff = payoff
        self.policy = Table(start)
        self.judges = judges
        self.samples = samples
        self.generator = generator

    @torch.no_grad()
    def sample(self, prompts):
        policy = self.policy().exp()[prompts]
        options = dict(replacement=True, generator=self.generator)
        return torch.multinomial(policy, self.samples, **options).tolist()

    def judge(self, prompts, responses):
        y = torch.tensor(responses)
        game = torch.tensor(prompts)[:, None, None]
        table = self.payoff[game, y[:, :, None], y[:, None, :]]  # (N, K, K)

        blocks = table.chunk(len(self.judges))
        return torch.cat([judge(block) for judge, block in zip(self.judges, blocks)])

    def logps(self, prompts, responses):
        return self.policy()[prompts].gather(1, torch.tensor(responses))


def sampled(
    payoff: Tensor, start: Tensor, judges: list, samples: int, select: str, rounds: int, eta: float,
    generator: Generator, steps: int = 25,
) -> Tensor:  # fmt: skip
    """log π_1, ..., log π_{rounds + 1} of each prompt, (rounds + 1, N, n): rounds of `sppo_round`.

    25 steps of RMSProp at η/30 leave less than 1% of the squared targets of winners and losers.
    More is left where no policy can fit them: 3% of all K, and 9% of K = 2 where the third action
    has vanished.
    """
    game = Copies(payoff, start, judges, samples, generator)
    # All prompts are one batch. Clipping its gradient would couple the replicates.
    config = RoundConfig(
        eta=eta, select=select, epochs=steps, batch=len(payoff), micro_batch=len(payoff),
        optimizer="rmsprop", lr=eta / 30, warmup=0.0, clip=math.inf,
    )  # fmt: skip

    path = [game.policy().detach()]
    for _ in range(rounds):
        sppo_round(game, list(range(len(payoff))), config, generator)
        path.append(game.policy().detach())
    return torch.stack(path)


def everybody(
    payoff: Tensor, path: list[Tensor], eta: float, samples: int, generator: Generator
) -> Tensor:
    """The exact step for all actions, sampled or not, with P̂ from K samples: only its noise."""
    y = torch.multinomial(path[-1].exp(), samples, replacement=True, generator=generator)  # (N, K)
    # Every action meets the K samples, which are the opponents only.
    return path[-1] + normalized_target(payoff[:, y].mean(-1).T, eta, path[-1])


def gains(payoff: Tensor, path: Tensor) -> dict[str, list[float]]:
    """How exploitable the average and the last policy are: mean and spread over replicates.

    (n, n), (rounds + 1, N, n) -> {"average": [mean, spread], "last": [mean, spread]}.
    """
    average = exploitability(payoff, averages(path[:-1])[-1])
    last = exploitability(payoff, path[-1].exp())
    return {
        "average": [average.mean().item(), average.std(correction=0).item()],
        "last": [last.mean().item(), last.std(correction=0).item()],
    }


def samples(
    sizes: tuple, replicates: int, rounds: int, eta: float, generator: Generator
) -> list[dict]:
    """`gains` by K, selection, judge and game.

    Selection "everybody" is the noise of P̂ alone, "exact" is K → ∞.
    """
    start = torch.tensor(SPREAD).double()
    rows = play_sampled(start, sizes, replicates, rounds, eta, generator)

    for size, (game, payoff) in product(sizes, GAMES.items()):
        step = partial(everybody, eta=eta, samples=size, generator=generator)
        path = play(step, payoff, start.expand(replicates, -1), rounds)
        row = {"samples": size, "select": "everybody", "judge": "table", "game": game}
        rows.append(row | gains(payoff, path))

    for (judge, rule), (game, payoff) in product(JUDGES.items(), GAMES.items()):
        path = play(partial(judged, eta=eta, judge=rule), payoff, start[None], rounds)
        row = {"samples": None, "select": "exact", "judge": judge, "game": game}
        rows.append(row | gains(payoff, path))
    return rows


def play_sampled(
    start: Tensor, sizes: tuple, replicates: int, rounds: int, eta: float, generator: Generator
) -> list[dict]:
    """Sampled play for each K and selection; all judges, games and replicates at once."""
    blocks = list(product(JUDGES, GAMES))
    payoff = torch.stack([GAMES[game] for _, game in blocks]).repeat_interleave(replicates, 0)
    starts = start.expand(len(payoff), -1)
    judges = list(JUDGES.values())

    # What `Copies` expects: the prompts of a judge are neighbours.
    rows = []
    settings = list(product(sizes, ("best-worst", "all")))
    for size, select in tqdm(settings, desc="samples", leave=False):
        path = sampled(payoff, starts, judges, size, select, rounds, eta, generator)
        for (judge, game), part in zip(blocks, path.split(replicates, 1)):
            row = {"samples": size, "select": select, "judge": judge, "game": game}
            rows.append(row | gains(GAMES[game], part))
    return rows


def measure(
    seed: int, replicates: int = 64, rounds: int = 100, sizes: tuple = (2, 3, 5, 8, 16),
    games: int = 100, actions: tuple = (3, 5, 10, 20), long: int = 2000,
) -> dict:  # fmt: skip
    """Everything: `rounds` of sampled play at η = 0.3, `long` of exact play by judge at η = 0.1."""
    # One generator for all parts: their order is part of what a seed means.
    generator = torch.Generator().manual_seed(seed)
    return {
        "constant": constant(ETAS, sorted({3, rounds}), (5, 50, 500), generator),
        "tables": tables(),
        "shortcut": exact_shortcut(actions, games, long, 0.1, generator),
        "samples": samples(sizes, replicates, rounds, 0.3, generator),
    }


# ------------------------------------------------------------------------ the table

SELECT = {
    "best-worst": "winner and loser",
    "all": "all K",
    "everybody": "every action, sampled or not",
}
TITLE = {
    "table": "whole table",
    "shortcut": "mean scores (authors' code)",
    "averaged": "mean scores, halved",
}


def find(rows: list[dict], **what) -> list[dict]:
    """The rows that have all of these values."""
    return [row for row in rows if all(row[key] == value for key, value in what.items())]


def line(name: str, *cells) -> None:
    """One row of the table that is printed."""
    print(f"{name:28}" + "".join(f"{cell:>12}" for cell in cells))


def print_result(result: dict) -> None:
    print_constant(result["constant"])
    print_samples(result["samples"])
    print_tables(result["tables"])
    print_shortcut(result["shortcut"])


def print_constant(result: dict) -> None:
    # Every fourth η: 0.1, 1, 10, 100, 1000.
    etas = [f"{eta:g}" for eta in ETAS[::4]]
    print("log Z/η")
    line("η", *etas)
    for name, value in result["soft_value"].items():
        line(name, *(f"{x:.3f}" for x in value[::4]))

    print("\nexact play from (.8, .15, .05): exploitability of average, last policy")
    line("η", *etas)
    for number, row in enumerate(result["play"]):
        if not number or row["game"] != result["play"][number - 1]["game"]:
            print(row["game"])
        # Without its sign: where the last policy is the equilibrium, rounding can leave -0.
        numbers = [f"{a:.3f} {abs(last):.2f}" for a, last in zip(row["average"], row["last"])]
        line(f"  {row['rounds']} rounds, {row['constant']}", *numbers[::4])


def print_samples(rows: list[dict]) -> None:
    title = "\nsampled play from (.5, .3, .2), η = 0.3: exploitability of the average"
    print(title + " ± spread over replicates")
    part = find(rows, game="transitive", judge="table", select="all")
    line("K", *(row["samples"] for row in part), "exact")

    # First the whole table by what is trained on, then the other judges with all K.
    shown = [("table", select) for select in SELECT] + [("averaged", "all"), ("shortcut", "all")]
    for game in GAMES:
        print(game)
        for judge, select in shown:
            part = find(rows, game=game, judge=judge, select=select)
            part += find(rows, game=game, judge=judge, select="exact")

            label = SELECT[select] if judge == "table" else TITLE[judge]
            numbers = [f"{row['average'][0]:.3f}±{row['average'][1]:.3f}" for row in part]
            line(label, *numbers)


def print_tables(tables: dict) -> None:
    print("\nsingle tables: of the judge, rebuilt by the shortcut")
    # The first is the whole table of the pure cycle, which the figure shows.
    for name, values in list(tables.items())[1:]:
        cells = []
        for value in values:
            numbers = torch.tensor(value).view(-1)
            cells.append(" " + " ".join(f"{x:.3f}" for x in numbers))
        print(f"{name}: {' '.join(cells)}")


def print_shortcut(result: dict) -> None:
    title = "\nexact play by judge, η = 0.1: exploitability of the average"
    print(title + ", and where all scores are equal")
    line("", "whole table", "mean scores", "halved", "L π = 0")
    for row in result["cycles"]:
        line(f"cycle {row['game']}", *(f"{row[key]:.4f}" for key in (*JUDGES, "equal_scores")))

    for size in sorted({row["actions"] for row in result["random"]}):
        rows = find(result["random"], actions=size)
        line(f"random games of {size}, mean", *(f"{row['mean'][-1]:.4f}" for row in rows))


# ------------------------------------------------------------------------ the figure


def draw(result: dict):
    """Top: the constant, and the number of samples. Bottom: the shortcut."""
    figure = new_figure(15, 8.4)
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.1)
    axes = figure.subplot_mosaic("AABBCC;PQDDEE")

    draw_constant(axes["A"], result["constant"]["soft_value"])
    draw_play(axes["B"], result["constant"]["play"])
    draw_selections(axes["C"], result["samples"])
    draw_tables(axes["P"], axes["Q"], result["tables"]["pure cycle"])
    draw_random_games(axes["D"], result["shortcut"])
    draw_judges(axes["E"], result["samples"])
    return figure


def draw_constant(axes, values: dict) -> None:
    colours = (ORANGE, BLUE, GREEN, PINK)
    for (name, value), colour, marker in zip(values.items(), colours, "sov^"):
        axes.semilogx(ETAS, value, marker=marker, markersize=4, color=colour, label=name)
    axes.axhline(0.5, color=GREY, linestyle="--", label="the paper's ½")

    axes.set(xlabel="η (nats per unit of win rate)", ylabel="log Z/η (win rate)")
    axes.set(title="What ½ stands for", ylim=(0.48, 1.02))
    axes.legend(frameon=False, fontsize=9)


def draw_play(axes, rows: list[dict]) -> None:
    longest = max(row["rounds"] for row in rows)
    looks = {  # by constant
        "exact": dict(linestyle="-", marker="o", markersize=4),
        "half": dict(linestyle="--", marker="s", markersize=4),
    }
    names = {"exact": "log Z", "half": "½"}

    for game, colour in (("rock-paper-scissors", ORANGE), ("transitive", BLUE)):
        for constant, look in looks.items():
            (row,) = find(rows, game=game, rounds=longest, constant=constant)
            label = f"{game}, {names[constant]}"
            axes.loglog(row["eta"], row["average"], color=colour, label=label, **look)

    axes.set(xlabel="η (nats per unit of win rate)", ylabel="exploitability (win rate above ½)")
    axes.set_title(f"Average of {longest} exact rounds")
    axes.legend(frameon=False, fontsize=9)


def draw_selections(axes, rows: list[dict]) -> None:
    lines = [(dict(judge="table", select=select), label) for select, label in SELECT.items()]
    draw_by_samples(axes, rows, lines, (ORANGE, BLUE, GREEN))
    axes.set_title("Averages, rock-paper-scissors from K samples")


def draw_judges(axes, rows: list[dict]) -> None:
    lines = [(dict(judge=judge, select="all"), label) for judge, label in TITLE.items()]
    draw_by_samples(axes, rows, lines, (BLUE, ORANGE, GREEN))
    axes.set_title("The same, by what is kept of the judge's table")


def draw_by_samples(axes, rows: list[dict], lines: list[tuple], colours: tuple) -> None:
    """Mean and spread over replicates against K, with exact play to the right of them."""
    rows = find(rows, game="rock-paper-scissors")
    sizes = sorted({row["samples"] for row in rows if row["samples"] is not None})

    for i, ((what, label), colour, marker) in enumerate(zip(lines, colours, "sov")):
        part = find(rows, **what) + find(rows, judge=what["judge"], select="exact")
        mean, spread = zip(*(row["average"] for row in part))

        # Side by side, so that the bars do not hide each other.
        places = torch.arange(len(part)) + 0.1 * (i - 1)
        look = dict(marker=marker, markersize=4, color=colour, capsize=2)
        axes.errorbar(places, mean, spread, label=label, **look)

    axes.set_xticks(range(len(sizes) + 1), [*sizes, "exact"])
    axes.set(xlabel="responses sampled per round, K", ylabel="exploitability (win rate above ½)")
    axes.legend(frameon=False, fontsize=9)


def draw_tables(left, right, tables: list) -> None:
    """The judge's table of a pure cycle, and what the shortcut rebuilds of it."""
    titles = ("A pure cycle:\nthe judge's table", "rebuilt from\nmean scores")
    for axes, table, title in zip((left, right), tables, titles):
        axes.imshow(table, cmap="cividis", vmin=0, vmax=1)
        for i, j in product(range(3), range(3)):
            # Legible on dark and on light cells.
            colour = "white" if table[i][j] < 0.6 else "black"
            look = dict(ha="center", va="center", color=colour, fontsize=9)
            axes.text(j, i, f"{table[i][j]:.3f}", **look)
        axes.set(xticks=range(3), yticks=range(3), xlabel="response j", title=title)
    left.set_ylabel("P(response i beats j)")


def draw_random_games(axes, result: dict) -> None:
    rows = result["random"]
    # One of the larger sizes; the table has them all.
    size = sorted(row["actions"] for row in rows)[len(rows) // 2]
    for row, colour in zip(find(rows, actions=size), (BLUE, ORANGE, GREEN)):
        axes.loglog(result["rounds"], row["mean"], color=colour, label=TITLE[row["judge"]])

    axes.set(xlabel="exact rounds, η = 0.1", ylabel="exploitability (win rate above ½)")
    axes.set_title(f"Averages, random games of {size} actions")
    axes.legend(frameon=False, fontsize=9)


def main(arguments: list[str] | None = None) -> int:
    def measure_all(args):
        return measure(args.seed)

    return script("ablations", __doc__, measure_all, print_result, draw, arguments)


if __name__ == "__main__":
    sys.exit(main())
