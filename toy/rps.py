"""Theorem 4.1 on rock–paper–scissors: SPPO's average policy finds the equilibrium, its last one
runs away from it.

    python -m toy.rps          out/toy/rps.png, out/toy/rps.json

Top row, exact. The win rates against π_1, π_2, ... sum to the win rates against their average, and
multiplicative weights has little regret, so after T rounds with a fixed η the average's
exploitability is at most max_y log(1/π_1(y))/(ηT) + η/8; from the uniform policy with
η = √(8 ln n/T) that is √(ln n/(2T)). The last policy circles outwards: where the equilibrium π*
contains all actions, KL(π*‖π_{t+1}) - KL(π*‖π_t) = log Z_t - η/2, which is never negative. In each
round it moves away by as much as the constant ½ of eq. 4.7 is wrong.

Bottom row, sampled. The policy is our Transformer, asked for one of three words; in each round it
draws K of them, and sppo.py's `sppo_round` fits it to their win rates. Its paths are drawn over the
exact one from the same start.
"""

import math
import sys
from argparse import Namespace
from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import Tensor

from engine.figures import BLUE, GREEN, GREY, ORANGE, PINK, SKY, YELLOW, new_figure, slope
from engine.progress import tqdm
from generate import generate
from model import ModelConfig, Transformer, initialize
from sppo import Game, RoundConfig, sequence_logps, sppo_round
from toy.games import cycle, every_game, exploitability, nash
from toy.lab import script, triangle
from toy.tabular import averages, kl, play, sppo

WORDS = ("rock", "scissors", "paper")  # each beats the next
PROMPT = [0]  # the model's only prompt is the word `rock`; what follows it is the policy
START = (0.6, 0.3, 0.1)

# ------------------------------------------------------------------------ exact


def describe(payoff: Tensor, path: Tensor) -> dict:
    """The policies of a path (T, n), their averages, and the exploitability of both, by round."""
    average = averages(path)
    return {
        "path": path.exp().tolist(),
        "averages": average.tolist(),
        "last": exploitability(payoff, path.exp()).tolist(),
        "average": exploitability(payoff, average).tolist(),
    }


def exact(payoff: Tensor, start: tuple, eta: float, rounds: int) -> dict:
    """Exact play: `describe`, the bound of the average, and KL(π*‖π_t), for t = 1 to rounds + 1."""
    path = play(partial(sppo, eta=eta), payoff, start, rounds)

    # The bound starts from the action that has the least weight in π_1.
    t = torch.arange(1, len(path) + 1)
    surprise = -min(math.log(share) for share in start)

    return {
        "eta": eta,
        **describe(payoff, path),
        "bound": (surprise / (eta * t) + eta / 8).tolist(),
        "kl_from_equilibrium": kl(nash(payoff), path).tolist(),
    }


def horizons(games: dict[str, Tensor], rounds: list[int]) -> dict:
    """For each game and each T: exploitability of the average of T rounds, and its bound.

    Play is from the uniform policy at η = √(8 ln n/T), so the bound is √(ln n/(2T)).
    """
    result = {}
    for name, payoff in tqdm(games.items(), desc="horizons", unit="game", leave=False):
        n = len(payoff)
        uniform = torch.full((n,), 1 / n)
        gaps = []
        for T in rounds:
            step = partial(sppo, eta=math.sqrt(8 * math.log(n) / T))
            path = play(step, payoff, uniform, T - 1)
            gaps.append(exploitability(payoff, averages(path)[-1]).item())
        bounds = [math.sqrt(math.log(n) / (2 * T)) for T in rounds]

        # The rate is asymptotic: the first few rounds would only bend the fitted line.
        late = [(T, gap) for T, gap in zip(rounds, gaps) if T >= 10]
        result[name] = {
            "actions": n,
            "rounds": list(rounds),
            "exploitability": gaps,
            "bound": bounds,
            "largest_share_of_bound": max(gap / bound for gap, bound in zip(gaps, bounds)),
            "slope": slope(*zip(*late)),
        }
    return result


# ------------------------------------------------------------------------ sampled


class WordGame(Game):
    """A transformer that says one word, and the payoff of the words."""

    def __init__(self, policy: Transformer, payoff: Tensor, samples: int, generator):
        self.policy = policy
        self.payoff = payoff
        self.samples = samples
        self.generator = generator

    def sample(self, prompts):
        # Without a stop token, each response is exactly one word.
        options = dict(max_new_tokens=1, stop_token=None, generator=self.generator)
        return generate(self.policy, prompts, self.samples, **options)

    def judge(self, prompts, responses):
        words = torch.tensor(responses)[..., 0]  # (N, K)
        return self.payoff[words[:, :, None], words[:, None, :]]

    def logps(self, prompts, responses):
        rows = []
        for prompt, words in zip(prompts, responses):
            rows += [prompt + word for word in words]

        # Of the two words of a row the first is the prompt's, and does not count.
        tokens = torch.tensor(rows)  # (B, 2)
        mask = torch.tensor([False, True]).expand_as(tokens)
        return sequence_logps(self.policy(tokens), tokens, mask).view(len(prompts), -1)

    @torch.no_grad()
    def log_policy(self) -> Tensor:
        """log π of the three words, exactly: (3,) float64."""
        return torch.log_softmax(self.policy(torch.tensor([PROMPT]))[0, -1].double(), -1)


def model_config() -> ModelConfig:
    """The smallest transformer that is still one: one layer of width 16."""
    return ModelConfig(
        vocab_size=len(WORDS), hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, head_dim=8, max_position_embeddings=8,
    )  # fmt: skip


def teach(policy: Transformer, shares: tuple, steps: int = 300) -> None:
    """Train a fresh policy to say the words with these shares: the base policy."""
    shares = torch.tensor(shares)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-2, weight_decay=0.0)

    for _ in range(steps):
        logits = policy(torch.tensor([PROMPT]))[0, -1]
        loss = -(shares * torch.log_softmax(logits, -1)).sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def neural(
    payoff: Tensor, start: tuple, eta: float, rounds: int, samples: int, seed: int
) -> Tensor:
    """log π_1, ..., log π_{rounds + 1} of a transformer under `sppo_round`: (rounds + 1, 3)."""
    generator = torch.Generator().manual_seed(seed)
    policy = initialize(Transformer(model_config()), generator)
    teach(policy, start)
    game = WordGame(policy, payoff, samples, generator)

    # The theory's setting: all K responses, fitted well in each round, the gradient not clipped.
    config = RoundConfig(
        eta=eta, select="all", epochs=16, batch=1, optimizer="adamw", lr=4e-3, warmup=0.0, clip=1e9
    )

    path = [game.log_policy()]
    for _ in tqdm(range(rounds), desc=f"transformer, seed {seed}", unit="round", leave=False):
        sppo_round(game, [PROMPT], config, generator)
        path.append(game.log_policy())
    return torch.stack(path)


def compare(
    payoff: Tensor, start: tuple, eta: float, rounds: int, samples: int, seeds: Iterable[int]
) -> dict:
    """The exact path from `start`, and a transformer's path for each seed.

    Each is a `describe`; a transformer's has its total variation from the exact one in each round.
    """
    reference = exact(payoff, start, eta, rounds - 1)
    exact_path = torch.tensor(reference["path"])

    rows = []
    for seed in seeds:
        # The policy after the last round is dropped: the exact path ends one earlier, too.
        path = neural(payoff, start, eta, rounds, samples, seed)[:rounds]
        distance = (path.exp() - exact_path).abs().sum(-1) / 2
        row = {"seed": seed, **describe(payoff, path)}
        row["total_variation_from_exact"] = distance.tolist()
        rows.append(row)

    settings = {"start": start, "eta": eta, "rounds": rounds, "samples": samples}
    return {**settings, "exact": reference, "neural": rows}


# ------------------------------------------------------------------------ what it shows

HORIZONS = sorted({round(10 ** (k / 10)) for k in range(41)})  # 1 to 10,000


def measure(args: Namespace) -> dict:
    """Everything. The seed is for the random games and the first of five transformers."""
    payoff = cycle()
    seeds = range(args.seed, args.seed + 5)
    return {
        "equilibrium": nash(payoff).tolist(),
        "exact": exact(payoff, START, eta=0.3, rounds=3000),
        "horizons": horizons(every_game(args.seed), HORIZONS),
        "sampled": compare(payoff, START, eta=0.4, rounds=100, samples=512, seeds=seeds),
    }


def print_table(result: dict) -> None:
    print_exact(result["exact"])
    print_horizons(result["horizons"])
    print_sampled(result["sampled"])


def print_exact(rows: dict) -> None:
    title = f"exact, η = {rows['eta']}      round  exploitability: last"
    print(title + "   average     bound   KL from equilibrium")

    distance = rows["kl_from_equilibrium"]
    for t in (1, 10, 100, 1000, 3000):
        last = rows["last"][t - 1]
        average = rows["average"][t - 1]
        bound = rows["bound"][t - 1]
        print(f"{t:25}{last:22.4f}{average:10.4f}{bound:10.4f}{distance[t - 1]:22.4f}")

    grows = all(before < after for before, after in zip(distance, distance[1:]))
    print(f"KL grows in every round: {grows}")


def print_horizons(games: dict) -> None:
    title = "\nη = √(8 ln n/T) from uniform, T = 1 to 10,000"
    print(title + "    largest share of the bound    log–log slope")
    for name, row in games.items():
        print(f"  {name:44}{row['largest_share_of_bound']:28.3f}{row['slope']:17.2f}")


def print_sampled(sampled: dict) -> None:
    rounds = sampled["rounds"]
    title = f"\ntransformer, η = {sampled['eta']}, K = {sampled['samples']}"
    title += f": exploitability after {rounds} rounds"
    print(title + "    last   average   mean distance")

    reference = sampled["exact"]
    print(f"  {'exact':57}{reference['last'][-1]:9.4f}{reference['average'][-1]:10.4f}")
    for row in sampled["neural"]:
        name = f"seed {row['seed']}"
        distance = sum(row["total_variation_from_exact"]) / rounds
        print(f"  {name:57}{row['last'][-1]:9.4f}{row['average'][-1]:10.4f}{distance:16.3f}")


# ------------------------------------------------------------------------ the figure


def draw(result: dict):
    """Top: exact play. Bottom: the transformer beside it, and all games at all horizons."""
    figure = new_figure(15, 9.5)
    top, (simplex2, curves2, horizon) = figure.subplots(2, 3)

    draw_exact(top, result)
    draw_sampled_paths(simplex2, result["sampled"], result["equilibrium"])
    draw_sampled_curves(curves2, result["sampled"])
    draw_horizons(horizon, result["horizons"])
    return figure


def draw_short(result: dict):
    """The top row by itself, which says what the theorem says."""
    figure = new_figure(15, 4.7)
    draw_exact(figure.subplots(1, 3), result)
    return figure


def draw_exact(panels, result: dict) -> None:
    simplex, curves, distances = panels
    draw_exact_path(simplex, result["exact"], result["equilibrium"])
    draw_exact_curves(curves, result["exact"])
    draw_distance(distances, result["exact"])


def draw_exact_path(axes, rows: dict, equilibrium: list) -> None:
    point = triangle(axes, [f"all {word}" for word in WORDS])
    # More rounds would blacken the edge, where the last policy ends up.
    shown = 400
    path = point(rows["path"][:shown])
    average = point(rows["averages"][:shown])

    label = f"policy of each round, 1 to {shown}"
    axes.plot(*path, color=ORANGE, linewidth=0.8, label=label)
    axes.plot(*average, color=BLUE, linewidth=1.5, label="average of the rounds so far")
    mark_start_and_end(axes, point, rows["path"][0], equilibrium)
    axes.set_title(f"Exact SPPO, η = {rows['eta']}", pad=14)


def draw_exact_curves(axes, rows: dict) -> None:
    t = range(1, len(rows["last"]) + 1)
    axes.plot(t, rows["last"], color=ORANGE, linewidth=0.8, label="policy of each round")
    axes.plot(t, rows["average"], color=BLUE, label="average of the rounds so far")
    axes.plot(t, rows["bound"], "--", color=GREY, label="bound: max log(1/π₁)/(ηt) + η/8")

    axes.set(xscale="log", yscale="log", ylim=(1e-3, 20))
    axes.set(xlabel="round t", ylabel="exploitability (win rate above ½)")
    axes.set_title("Only the average converges")
    axes.legend(frameon=False, fontsize=9)


def draw_distance(axes, rows: dict) -> None:
    distance = rows["kl_from_equilibrium"]
    axes.plot(range(1, len(distance) + 1), distance, color=ORANGE)
    axes.set(xlabel="round t", ylabel="KL(equilibrium ‖ policy of round t), nats")
    axes.set_ylim(0, None)
    axes.set_title("The last policy moves away in every round")


def draw_sampled_paths(axes, sampled: dict, equilibrium: list) -> None:
    point = triangle(axes, [f"all {word}" for word in WORDS])
    draw_runs(axes, sampled, lambda row: point(row["path"]), lambda row: point(row["averages"]))
    mark_start_and_end(axes, point, sampled["exact"]["path"][0], equilibrium)

    title = f"Our Transformer, {sampled['samples']} samples a round, η = {sampled['eta']}"
    axes.set_title(f"{title}: {len(sampled['neural'])} seeds", pad=14)


def draw_sampled_curves(axes, sampled: dict) -> None:
    t = range(1, sampled["rounds"] + 1)
    draw_runs(axes, sampled, lambda row: (t, row["last"]), lambda row: (t, row["average"]))

    axes.set(xlabel="round", ylabel="exploitability (win rate above ½)", ylim=(0, 0.42))
    axes.set_title("Sampled and exact")
    axes.legend(frameon=False, fontsize=9)


def draw_runs(axes, sampled: dict, last: Callable, average: Callable) -> None:
    """All transformers, and the exact play over them; last(row) and average(row) give x and y."""
    for row in sampled["neural"]:
        # The first seed stands for all of them in the legend.
        first = row is sampled["neural"][0]
        last_label = "transformer, each round" if first else None
        average_label = "transformer, average" if first else None
        axes.plot(*last(row), color=ORANGE, linewidth=0.6, label=last_label)
        axes.plot(*average(row), color=BLUE, linewidth=0.9, label=average_label)

    reference = sampled["exact"]
    axes.plot(*last(reference), "--", color="black", linewidth=1, label="exact, each round")
    axes.plot(*average(reference), ":", color="black", linewidth=1.6, label="exact, average")


def mark_start_and_end(axes, point: Callable, start: list, equilibrium: list) -> None:
    axes.plot(*point(start), "o", color="black", label="start")
    axes.plot(*point(equilibrium), "*", color=GREEN, markersize=15, label="Nash equilibrium")
    axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(-0.14, 1.04))


def draw_horizons(axes, games: dict) -> None:
    """All games on one pair of axes: against T/ln n they share one bound."""
    colours = (ORANGE, BLUE, GREEN, PINK, SKY, YELLOW, "black")
    for (name, row), colour in zip(games.items(), colours):
        x = [T / math.log(row["actions"]) for T in row["rounds"]]
        look = dict(color=colour, linewidth=0.8, markersize=4, marker=".")
        # COMAL's game is rock–paper–scissors backwards: its curve lies on that one's.
        if name == "rock-paper-scissors":
            look |= dict(linewidth=5, marker="", alpha=0.5)
        if name == "COMAL's game":
            name += " (on rock-paper-scissors)"
        axes.plot(x, row["exploitability"], label=name, **look)

    x = [0.3, 1e4]
    bound = [math.sqrt(1 / (2 * v)) for v in x]
    axes.plot(x, bound, "--", color=GREY, label="bound √(ln n / 2T)")

    axes.set(xscale="log", yscale="log", ylim=(1e-5, 2))
    axes.set(xlabel="T / ln n  (T rounds, n actions)")
    axes.set(ylabel="exploitability of the average of T rounds")
    axes.set_title("All games stay below the bound, η = √(8 ln n/T)")
    axes.legend(frameon=False, fontsize=8, loc="lower left")


if __name__ == "__main__":
    sys.exit(script("rps", __doc__, measure, print_table, draw, short=draw_short))
