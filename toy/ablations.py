"""What the paper leaves out: the constant ½ for log Z/η, the number of samples, and the authors' shortcut by scores.

    python -m toy.ablations                        out/toy/ablations.png and .json

Measured is exploitability, mostly of the average of the rounds' policies. Numbers are of seed 0; seeds 1 and 2 tell the same.

The constant. log Z/η of appendix A: 0.504, 0.541, 0.770, 0.954, 0.993 at η = 0.1, 1, 10, 100, 1000 for ordered K. That of
disordered K stays near ½ while η² is small against K: at η = 10, 0.65 for K = 5, 0.52 for 50, 0.50 for 500.
  Up to η = 1 exact play hardly tells log Z and ½ apart: 0.023 and 0.024 after 100 rounds of rock-paper-scissors. At η = 1000
  they are two algorithms. One round from (.8, .15, .05): log Z leaves nothing but the best reply, (0, 0, 1); ½ leaves every
  above-average action with weight about π(P - ½), (.80, 0, .20). The gentler one is not the better one: after 3 rounds it is at
  0.140 against 0.167, but in the transitive game at 0.160 against 0.113, and after 100 rounds log Z leads in both, from
  η = 10 on: with η = 1000 it is at 0.018 against 0.052.
Samples, from (.5, .3, .2) at η = 0.3 for 100 rounds. Rock-paper-scissors: 0.15, 0.17, 0.07, 0.04, 0.03 for K = 2, 3, 5, 8, 16;
  exact play 0.009. The noise of P̂ is the smaller part: where every action is moved, sampled or not, K = 2 comes to 0.034, and in
  the transitive game to the exact 0.055, where samples alone leave 0.136. What hurts is that an action is moved only in rounds in
  which it was sampled: a rare one hardly ever, also if it would win. That is a bias, no noise: `sampled` with η = 0.1 and K = 2
  is at 0.15 after 300 rounds and at 0.23 after 1000, with K = 16 at 0.017 and 0.008 (32 replicates, not in the table). A table
  shares nothing between actions; a language model moves texts together that are alike. Winner and loser alone lose a little in
  cycles (K = 5: 0.10 against 0.07) and gain a little in the transitive game (0.071 against 0.077).
The shortcut turns a pure cycle of three into ½ everywhere. But with one response of each the true win rates are ½ as well: there
  neither pipeline learns, rightly if responses are drawn from π, for this is its equilibrium. (If they are made distinct they
  are no sample of π, and neither pipeline ever leaves any policy.) Other samples have scores that differ, and in a pure cycle
  the shortcut's average goes to the middle too. It goes wrong elsewhere:
  - Equal mean logits are not equal win rates. It stands still where L π = 0, L = logit P: exploitability 0.018, 0.048, 0.106 in
    three uneven cycles. From afar it runs around in wide circles, and their average comes closer: after 2000 exact rounds at
    η = 0.1 0.003, 0.009, 0.013, whole table 0.015, 0.011, 0.008.
  - Random games of 10 actions, as many rounds: 0.031 against 0.008 of the whole table; of 20: 0.040 against 0.009. It is ahead
    for the first 300, for it doubles the logits (P = .9 becomes .988), as if η were twice as large; with halved scores
    ("shortcut / 2") it starts like the whole table and ends at 0.036 and 0.041.
  - One each of rock, paper, scissors: rock wins, paper loses, though paper beats rock: P(winner beats loser) is .2, rebuilt .75.
  - Few samples hide it: K = 16 in rock-paper-scissors comes to 0.042, halved 0.030, whole table 0.025.
  - P = 0 or 1 has no logit: the tables become NaN, and `win_rates` says so.
"""

import math
import sys
from functools import partial
from itertools import product

import torch
from matplotlib.figure import Figure
from tqdm import tqdm

from prefmodel import transitive
from sppo import RoundConfig, normalized_target, sppo_round, win_rates
from toy.games import bradley_terry, cycle, exploitability, nash, random_game
from toy.lab import BLUE, GREEN, GREY, ORANGE, PINK, script
from toy.tabular import averages, play, sppo, sppo_half

ETAS = [10 ** (k / 4) for k in range(-4, 13)]  # 0.1 to 1000
START = (0.8, 0.15, 0.05)  # of exact play
SPREAD = (0.5, 0.3, 0.2)  # of sampled play: from START on, paper is so rare that it is hardly ever sampled
PURE = 1 / (1 + math.exp(-2))  # 0.881, a logit of 2
GAMES = {"rock-paper-scissors": cycle(), "pure cycle": cycle((PURE,) * 3), "transitive": bradley_terry([0.0, 1.0, 2.0])}
CYCLES = {"pure": (PURE,) * 3} | {str(x): x for x in ((0.9, 0.9, 0.8), (0.99, 0.6, 0.6), (0.99, 0.9, 0.6))}

# ------------------------------------------------------------------------------------------------ the constant


def soft_value(win_rate, eta):
    """log Z/η of K samples, (..., K) -> (...): what eq. 4.7 replaces by ½."""
    return (eta * win_rate - normalized_target(win_rate, eta))[..., 0] / eta


def ordered(size):
    """Win rates (K,) in a strict total order (appendix A)."""
    return (torch.arange(size, dtype=torch.float64) + 0.5) / size


def disordered(size, generator, tables=50):
    """Win rates (tables, K) where each P(i beats j), i < j, is 0 or 1 by a coin flip (appendix A)."""
    upper = torch.randint(0, 2, (tables, size, size), generator=generator).double().triu(1)
    return win_rates(upper + (1 - upper.mT).tril(-1) + 0.5 * torch.eye(size, dtype=torch.float64))


def constant(etas, rounds, sizes, generator):
    """log Z/η by η, and what exact play from START comes to with the exact constant and with ½."""
    rates = {"ordered": ordered(100_000)} | {f"disordered, K = {size}": disordered(size, generator) for size in sizes}
    values, rows = {name: [soft_value(rate, eta).mean().item() for eta in etas] for name, rate in rates.items()}, []
    for game, length in product(("rock-paper-scissors", "transitive"), rounds):
        for constant, step in {"exact": sppo, "half": sppo_half}.items():
            start = torch.tensor(START).double().expand(len(etas), -1)
            path = play(partial(step, eta=torch.tensor(etas, dtype=torch.float64)[:, None]), GAMES[game], start, length)
            policies = {"average": averages(path[:-1])[-1], "last": path[-1].exp()}
            gain = {name: exploitability(GAMES[game], policy).tolist() for name, policy in policies.items()}
            rows.append({"game": game, "rounds": length, "constant": constant, "eta": list(etas)} | gain)
    return {"soft_value": values, "play": rows}


# ------------------------------------------------------------------------------------------------ the shortcut


def shortcut(preference, policy=None, orders=2):
    """P'(i beats j) = σ(score_i - score_j), all that uclaml/SPPO keeps of P (..., K, K); it can only be transitive.

    score_i = mean_j(L_ij - L_ji), L the judge's logit with i on the left; of a symmetric judge 2 mean_j logit P_ij. With
    orders=1 the two orders are averaged, not added. The mean is over opponents from policy (..., K); without one, over the
    K samples. P of 0 or 1 has no finite logit: a response that wins one pair and loses another gets score inf - inf.
    """
    return transitive(preference.logit() * orders / 2, policy)


def full_table(preference, policy=None):
    return preference


JUDGES = {"table": full_table, "shortcut": shortcut, "averaged": partial(shortcut, orders=1)}


def rates_against(preference, policy):
    """P(y ≻ π), (..., n, n), (..., n) -> (..., n): each policy has a game of its own."""
    return (preference * policy[..., None, :]).sum(-1)


def judged(payoff, path, eta, judge):
    """The exact step of SPPO where the K → ∞ samples are judged by `judge`."""
    policy = path[-1].exp()
    return path[-1] + normalized_target(rates_against(judge(payoff, policy), policy), eta, path[-1])


def mean_logit_equilibrium(strengths):
    """Where all scores of a cycle of three are equal, L π = 0: action i has the strength of the pair without it."""
    logit = torch.tensor(strengths, dtype=torch.float64).logit()
    return logit.roll(-1) / logit.sum()


def tables():
    """What the shortcut makes of single tables of K samples: [of the table, of the shortcut]."""
    pure, rps, pair = cycle((PURE,) * 3), cycle(), bradley_terry([math.log(9), 0.0])
    winner, loser = win_rates(rps).argmax(), win_rates(rps).argmin()
    judges = (full_table, shortcut)
    return {
        "pure cycle": [judge(pure).tolist() for judge in judges],
        "pure cycle, win rates of one of each": [win_rates(judge(pure)).tolist() for judge in judges],
        "pure cycle, win rates of (0, 0, 1)": [win_rates(judge(pure[[0, 0, 1]][:, [0, 0, 1]])).tolist() for judge in judges],
        "rock-paper-scissors, one of each, P(winner beats loser)": [judge(rps)[winner, loser].item() for judge in judges],
        "K = 2, P(winner beats loser)": [judge(pair)[0, 1].item() for judge in judges],
    }


def exact_shortcut(sizes, games, rounds, eta, generator):
    """Exact play by judge: cycles of three from START, and random games of each size from the uniform policy."""
    marks = sorted({round(rounds ** (k / 30)) for k in range(31)})
    result = {"rounds": marks, "cycles": [], "random": []}
    payoff = torch.stack([cycle(strengths) for strengths in CYCLES.values()])
    steps = {judge: partial(judged, eta=eta, judge=table) for judge, table in JUDGES.items()}
    start = torch.tensor(START).double().expand(len(payoff), -1)
    paths = {judge: play(step, payoff, start, rounds) for judge, step in steps.items()}
    for number, (name, strengths) in enumerate(CYCLES.items()):
        point = mean_logit_equilibrium(strengths)
        policies = {judge: averages(path[:-1, number])[-1] for judge, path in paths.items()} | {"equal_scores": point}
        numbers = {name: exploitability(payoff[number], policy).item() for name, policy in policies.items()}
        result["cycles"].append({"game": name, "equilibrium": nash(payoff[number]).tolist(), "point": point.tolist()} | numbers)
    for size in sizes:
        payoff = torch.stack([random_game(size, generator) for _ in range(games)])
        start = torch.full((games, size), 1 / size, dtype=torch.float64)
        for judge, step in steps.items():
            policy = averages(play(step, payoff, start, rounds - 1))[torch.tensor(marks) - 1]
            gain = rates_against(payoff, policy).amax(-1) - 0.5  # (marks, games)
            numbers = {"mean": gain.mean(1).tolist(), "spread": gain.std(1).tolist()}
            result["random"].append({"actions": size, "judge": judge} | numbers)
    return result


# ------------------------------------------------------------------------------------------------ samples


class Table(torch.nn.Module):
    """A policy of its own over n actions for each of N prompts, which share nothing."""

    def __init__(self, start):
        super().__init__()
        self.logits = torch.nn.Parameter(start.double().log())

    def forward(self):
        return torch.log_softmax(self.logits, -1)


class Copies:
    """What `sppo_round` plays: prompt k is a game of its own, payoff[k] (N, n, n), from start[k] (N, n).

    The prompts are in equal blocks, one for each of `judges`, which take and return tables (..., K, K).
    """

    def __init__(self, payoff, start, judges, samples, generator):
        self.payoff, self.judges, self.samples, self.generator = payoff, judges, samples, generator
        self.policy = Table(start)

    @torch.no_grad()
    def sample(self, prompts):
        return torch.multinomial(self.policy().exp()[prompts], self.samples, replacement=True, generator=self.generator).tolist()

    def judge(self, prompts, responses):
        y = torch.tensor(responses)
        table = self.payoff[torch.tensor(prompts)[:, None, None], y[:, :, None], y[:, None, :]]  # (N, K, K)
        return torch.cat([judge(part) for judge, part in zip(self.judges, table.chunk(len(self.judges)))])

    def logps(self, prompts, responses):
        return self.policy()[prompts].gather(1, torch.tensor(responses))


def sampled(payoff, start, judges, samples, select, rounds, eta, generator, steps=25):
    """log π_1, ..., log π_{rounds + 1} of each prompt, (rounds + 1, N, n): rounds of `sppo_round`, all prompts in one batch.

    25 steps of RMSProp at η/30 leave less than 1% of the squared targets of winners and losers. More is left where no policy
    can fit them, 3% of all K, and 9% of K = 2 where the third action has vanished. No clipping, so that replicates do not couple.
    """
    game = Copies(payoff, start, judges, samples, generator)
    config = RoundConfig(
        eta=eta, select=select, epochs=steps, batch=len(payoff), micro_batch=len(payoff), optimizer="rmsprop",
        lr=eta / 30, warmup=0.0, clip=math.inf,
    )  # fmt: skip
    path = [game.policy().detach()]
    for _ in range(rounds):
        sppo_round(game, list(range(len(payoff))), config, generator)
        path.append(game.policy().detach())
    return torch.stack(path)


def everybody(payoff, path, eta, samples, generator):
    """The exact step for all actions, sampled or not, with P̂ from K samples: the noise of P̂ alone."""
    y = torch.multinomial(path[-1].exp(), samples, replacement=True, generator=generator)  # (N, K)
    return path[-1] + normalized_target(payoff[:, y].mean(-1).T, eta, path[-1])


def gains(payoff, path):
    """Mean and spread over replicates of how exploitable average and last policy are: (n, n), (rounds + 1, N, n)."""
    both = {"average": exploitability(payoff, averages(path[:-1])[-1]), "last": exploitability(payoff, path[-1].exp())}
    return {name: [gain.mean().item(), gain.std(correction=0).item()] for name, gain in both.items()}


def samples(sizes, replicates, rounds, eta, generator):
    """`gains` by K, selection, judge and game; selection "everybody" is the noise of P̂ alone."""
    blocks = [(judge, game) for judge in JUDGES for game in GAMES]
    payoff = torch.stack([GAMES[game] for _, game in blocks]).repeat_interleave(replicates, 0)
    start, rows = torch.tensor(SPREAD).double(), []
    for size, select in tqdm(list(product(sizes, ("best-worst", "all"))), desc="samples", leave=False):
        judges = list(JUDGES.values())
        path = sampled(payoff, start.expand(len(payoff), -1), judges, size, select, rounds, eta, generator)
        for (judge, game), part in zip(blocks, path.split(replicates, 1)):
            rows.append({"samples": size, "select": select, "judge": judge, "game": game, **gains(GAMES[game], part)})
    for size, (game, table) in product(sizes, GAMES.items()):
        path = play(partial(everybody, eta=eta, samples=size, generator=generator), table, start.expand(replicates, -1), rounds)
        rows.append({"samples": size, "select": "everybody", "judge": "table", "game": game, **gains(table, path)})
    for (judge, rule), (game, table) in product(JUDGES.items(), GAMES.items()):
        path = play(partial(judged, eta=eta, judge=rule), table, start[None], rounds)
        rows.append({"samples": None, "select": "exact", "judge": judge, "game": game, **gains(table, path)})
    return rows


def measure(seed, replicates=64, rounds=100, sizes=(2, 3, 5, 8, 16), games=100, actions=(3, 5, 10, 20), long=2000):
    """Everything, as a dictionary: `rounds` of sampled play at η = 0.3, `long` of exact play by judge at η = 0.1."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "constant": constant(ETAS, sorted({3, rounds}), (5, 50, 500), generator),
        "tables": tables(),
        "shortcut": exact_shortcut(actions, games, long, 0.1, generator),
        "samples": samples(sizes, replicates, rounds, 0.3, generator),
    }


# ------------------------------------------------------------------------------------------------ showing

SELECT = {"best-worst": "winner and loser", "all": "all K", "everybody": "every action, sampled or not"}
TITLE = {"table": "whole table", "shortcut": "shortcut", "averaged": "shortcut / 2"}


def find(rows, **what):
    return [row for row in rows if all(row[key] == value for key, value in what.items())]


def print_result(result):
    def line(name, *cells):
        print(f"  {name:49}" + "".join(f"{cell:>13}" for cell in cells))

    print("log Z/η")
    line("η", *(f"{eta:g}" for eta in ETAS[::4]))
    for name, value in result["constant"]["soft_value"].items():
        line(name, *(f"{x:.3f}" for x in value[::4]))
    print("\nexact play from (.8, .15, .05): exploitability of average, last policy")
    line("η", *(f"{eta:g}" for eta in ETAS[::4]))
    for row in result["constant"]["play"]:
        numbers = [f"{a:.3f} {abs(last):.2f}" for a, last in zip(row["average"], row["last"])]
        line(f"{row['game']}, {row['rounds']} rounds, {row['constant']}", *numbers[::4])
    rows = result["samples"]
    print("\nsampled play from (.5, .3, .2), η = 0.3: exploitability of the average ± spread over replicates")
    line("K", *(row["samples"] for row in find(rows, game="transitive", judge="table", select="all")), "exact")
    shown = [(game, "table", select) for game in GAMES for select in SELECT]
    for game, judge, select in shown + [(game, judge, "all") for game in GAMES for judge in ("averaged", "shortcut")]:
        part = find(rows, game=game, judge=judge, select=select) + find(rows, game=game, judge=judge, select="exact")
        label = SELECT[select] if judge == "table" else TITLE[judge]
        line(f"{game}, {label}", *(f"{row['average'][0]:.3f}±{row['average'][1]:.3f}" for row in part))
    print("\nsingle tables: of the judge, rebuilt by the shortcut")
    for name, values in list(result["tables"].items())[1:]:
        line(name.ljust(56), *("  " + " ".join(f"{x:.3f}" for x in torch.tensor(value).view(-1)) for value in values))
    print("\nexact play by judge, η = 0.1: exploitability of the average, and where all scores are equal")
    line("", *TITLE.values(), "L π = 0")
    for row in result["shortcut"]["cycles"]:
        line(f"cycle {row['game']}", *(f"{row[key]:.4f}" for key in (*JUDGES, "equal_scores")))
    for size in sorted({row["actions"] for row in result["shortcut"]["random"]}):
        line(f"random games of {size}, mean", *(f"{x['mean'][-1]:.4f}" for x in find(result["shortcut"]["random"], actions=size)))


def draw(result):
    figure = Figure(figsize=(15, 8.4), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.1)
    axes = figure.subplot_mosaic("AABBCC;PQDDEE")

    axis = axes["A"]
    for (name, value), colour, marker in zip(result["constant"]["soft_value"].items(), (ORANGE, BLUE, GREEN, PINK), "sov^"):
        axis.semilogx(ETAS, value, marker=marker, markersize=4, color=colour, label=name)
    axis.axhline(0.5, color=GREY, linestyle="--", label="the paper's ½")
    axis.set(xlabel="η (nats per unit of win rate)", ylabel="log Z/η (win rate)", title="What ½ stands for", ylim=(0.48, 1.02))
    axis.legend(frameon=False, fontsize=9)

    axis = axes["B"]
    longest = max(row["rounds"] for row in result["constant"]["play"])
    for game, colour in (("rock-paper-scissors", ORANGE), ("transitive", BLUE)):
        for constant, style, mark in (("exact", "-", "o"), ("half", "--", "s")):
            (row,) = find(result["constant"]["play"], game=game, rounds=longest, constant=constant)
            label = f"{game}, {'log Z' if constant == 'exact' else '½'}"
            axis.loglog(row["eta"], row["average"], style, marker=mark, markersize=4, color=colour, label=label)
    axis.set(xlabel="η (nats per unit of win rate)", ylabel="exploitability (win rate above ½)")
    axis.set_title(f"Average of {longest} exact rounds")
    axis.legend(frameon=False, fontsize=9)

    rows = find(result["samples"], game="rock-paper-scissors")
    lines = [(dict(judge="table", select=select), label) for select, label in SELECT.items()]
    by_k(axes["C"], rows, lines, (ORANGE, BLUE, GREEN), "Averages, rock-paper-scissors from K samples")
    lines = [(dict(judge=judge, select="all"), label) for judge, label in TITLE.items()]
    by_k(axes["E"], rows, lines, (BLUE, ORANGE, GREEN), "The same, by what is kept of the table")

    titles = ("A pure cycle:\nthe judge's table", "rebuilt from\nmean scores")
    for name, table, title in zip("PQ", result["tables"]["pure cycle"], titles):
        axes[name].imshow(table, cmap="cividis", vmin=0, vmax=1)
        for i, j in product(range(3), range(3)):
            colour = "white" if table[i][j] < 0.6 else "black"
            axes[name].text(j, i, f"{table[i][j]:.3f}", ha="center", va="center", color=colour, fontsize=9)
        axes[name].set(xticks=range(3), yticks=range(3), xlabel="response j", title=title)
    axes["P"].set_ylabel("P(response i beats j)")

    axis, rows = axes["D"], result["shortcut"]["random"]
    size = sorted(row["actions"] for row in rows)[len(rows) // 2]
    for row, colour in zip(find(rows, actions=size), (BLUE, ORANGE, GREEN)):
        axis.loglog(result["shortcut"]["rounds"], row["mean"], color=colour, label=TITLE[row["judge"]])
    axis.set(xlabel="exact rounds, η = 0.1", ylabel="exploitability (win rate above ½)")
    axis.set_title(f"Averages, random games of {size} actions")
    axis.legend(frameon=False, fontsize=9)
    return figure


def by_k(axis, rows, lines, colours, title):
    """Mean and spread over replicates against K, and exact play right of them."""
    for number, ((what, label), colour, marker) in enumerate(zip(lines, colours, "sov")):
        part = find(rows, **what)
        places = torch.arange(len(part) + 1) + 0.1 * (number - 1)
        mean, spread = zip(*(row["average"] for row in part + find(rows, judge=what["judge"], select="exact")))
        axis.errorbar(places, mean, spread, marker=marker, markersize=4, color=colour, capsize=2, label=label)
    axis.set_xticks(range(len(part) + 1), [*(row["samples"] for row in part), "exact"])
    axis.set(xlabel="responses sampled per round, K", ylabel="exploitability (win rate above ½)", title=title)
    axis.legend(frameon=False, fontsize=9)


def main(arguments=None):
    return script("ablations", __doc__, lambda args: measure(args.seed), print_result, draw, arguments)


if __name__ == "__main__":
    sys.exit(main())
