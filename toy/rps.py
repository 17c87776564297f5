"""Theorem 4.1 on rock–paper–scissors: SPPO's average policy finds the equilibrium while its last policy runs away from it.

    python -m toy.rps          out/toy/rps.png, out/toy/rps.json

Top row, exact. The win rates against π_t sum up to the win rates against the average of all π_t so far, and
multiplicative weights has little regret, so the average's exploitability after T rounds of a fixed η is at most
max_y log(1/π_1(y))/(ηT) + η/8; from the uniform policy with η = √(8 ln n/T) that is √(ln n/(2T)). The last policy circles
outwards: where all actions are in the equilibrium π*, KL(π*‖π_{t+1}) - KL(π*‖π_t) = log Z_t - η/2, which is never negative:
each round it moves away by as much as the constant ½ of eq. 4.7 is wrong.

Bottom row, sampled. The policy is our Transformer, asked for one of three words; each round it draws K of them, and
sppo.py's `sppo_round` fits it to their win rates. Its paths are laid over the exact one from the same start.
"""

import math
import sys
from functools import partial

import torch
from matplotlib.figure import Figure
from tqdm import tqdm

from model import ModelConfig, Transformer, generate, initialize
from sppo import RoundConfig, sequence_logps, sppo_round
from toy.games import cycle, every_game, exploitability, nash
from toy.lab import BLUE, GREEN, GREY, ORANGE, PINK, SKY, YELLOW, script, slope, triangle
from toy.tabular import averages, kl, play, sppo

WORDS = ("rock", "scissors", "paper")  # each beats the next
PROMPT = [0]  # the model's only prompt is the word `rock`; what follows it is the policy

# ------------------------------------------------------------------------------------------------ exact


def exact(payoff, start, eta, rounds):
    """Exploitability of the last and of the average policy, the bound of the average, and KL(π*‖π_t), for every round."""
    path = play(partial(sppo, eta=eta), payoff, start, rounds)
    t = torch.arange(1, len(path) + 1)
    return {
        "eta": eta,
        "path": path.exp().tolist(),
        "averages": averages(path).tolist(),
        "last": exploitability(payoff, path.exp()).tolist(),
        "average": exploitability(payoff, averages(path)).tolist(),
        "bound": (-min(math.log(share) for share in start) / (eta * t) + eta / 8).tolist(),
        "kl_from_equilibrium": kl(nash(payoff), path).tolist(),
    }


def horizons(games, rounds):
    """For each game and each T: exploitability of the average of T rounds at η = √(8 ln n/T) from uniform, and its bound."""
    result = {}
    for name, payoff in tqdm(games.items(), desc="horizons", unit="game", leave=False):
        n = len(payoff)
        gaps = []
        for T in rounds:
            path = play(partial(sppo, eta=math.sqrt(8 * math.log(n) / T)), payoff, torch.full((n,), 1 / n), T - 1)
            gaps.append(exploitability(payoff, averages(path)[-1]).item())
        bounds = [math.sqrt(math.log(n) / (2 * T)) for T in rounds]
        late = [i for i, T in enumerate(rounds) if T >= 10]
        result[name] = {
            "actions": n, "rounds": list(rounds), "exploitability": gaps, "bound": bounds,
            "largest_share_of_bound": max(gap / bound for gap, bound in zip(gaps, bounds)),
            "slope": slope([rounds[i] for i in late], [gaps[i] for i in late]),
        }  # fmt: skip
    return result


# ------------------------------------------------------------------------------------------------ sampled


class WordGame:
    """What `sppo_round` plays with: a transformer that says one word, and the payoff of the words."""

    def __init__(self, policy, payoff, samples, generator):
        self.policy, self.payoff, self.samples, self.generator = policy, payoff, samples, generator

    def sample(self, prompts):
        return generate(self.policy, prompts, self.samples, max_new_tokens=1, stop_token=None, generator=self.generator)

    def judge(self, prompts, responses):
        words = torch.tensor(responses)[..., 0]  # (N, K)
        return self.payoff[words[:, :, None], words[:, None, :]]

    def logps(self, prompts, responses):
        rows = [prompt + response for prompt, some in zip(prompts, responses) for response in some]
        tokens = torch.tensor(rows)  # (B, 2): the prompt's word, the policy's
        mask = torch.tensor([False, True]).expand_as(tokens)
        return sequence_logps(self.policy(tokens), tokens, mask).view(len(prompts), -1)

    @torch.no_grad()
    def log_policy(self):
        """log π of the three words, exactly: (3,) float64."""
        return torch.log_softmax(self.policy(torch.tensor([PROMPT]))[0, -1].double(), -1)


def model_config():
    return ModelConfig(
        vocab_size=len(WORDS), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, max_position_embeddings=8,
    )  # fmt: skip


def teach(policy, shares, steps=300):
    """Train a fresh policy to say the words with these shares: the base policy."""
    shares = torch.tensor(shares)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-2, weight_decay=0.0)
    for _ in range(steps):
        loss = -(shares * torch.log_softmax(policy(torch.tensor([PROMPT]))[0, -1], -1)).sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def neural(payoff, start, eta, rounds, samples, seed):
    """log π_1, ..., log π_{rounds + 1} (rounds + 1, 3) of a transformer trained by `sppo_round` on `samples` words a round."""
    generator = torch.Generator().manual_seed(seed)
    policy = initialize(Transformer(model_config()), generator)
    teach(policy, start)
    game = WordGame(policy, payoff, samples, generator)
    settings = RoundConfig(eta=eta, select="all", epochs=16, batch=1, optimizer="adamw", lr=4e-3, warmup=0.0, clip=1e9)
    path = [game.log_policy()]
    for _ in tqdm(range(rounds), desc=f"transformer, seed {seed}", unit="round", leave=False):
        sppo_round(game, [PROMPT], settings, generator)
        path.append(game.log_policy())
    return torch.stack(path)


def compare(payoff, start, eta, rounds, samples, seeds):
    """The exact path from `start`, and the neural ones beside it: exploitability by round, and distance to the exact path."""
    reference = exact(payoff, start, eta, rounds - 1)
    result = {"start": start, "eta": eta, "rounds": rounds, "samples": samples, "exact": reference, "neural": []}
    for seed in seeds:
        path = neural(payoff, start, eta, rounds, samples, seed)[:rounds]
        distance = (path.exp() - torch.tensor(reference["path"])).abs().sum(-1) / 2
        result["neural"].append({
            "seed": seed, "path": path.exp().tolist(), "averages": averages(path).tolist(),
            "last": exploitability(payoff, path.exp()).tolist(), "average": exploitability(payoff, averages(path)).tolist(),
            "total_variation_from_exact": distance.tolist(),
        })  # fmt: skip
    return result


# ------------------------------------------------------------------------------------------------ what it shows

HORIZONS = sorted({round(10 ** (k / 10)) for k in range(41)})  # 1 to 10,000


def measure(args):
    """All of it. The seed is that of the random games and of the first of five transformers; the rest is exact."""
    return {
        "equilibrium": nash(cycle()).tolist(),
        "exact": exact(cycle(), (0.6, 0.3, 0.1), eta=0.3, rounds=3000),
        "horizons": horizons(every_game(args.seed), HORIZONS),
        "sampled": compare(cycle(), (0.6, 0.3, 0.1), eta=0.4, rounds=100, samples=512, seeds=range(args.seed, args.seed + 5)),
    }


def print_table(result):
    rows, sampled = result["exact"], result["sampled"]
    distance = rows["kl_from_equilibrium"]
    print(f"exact, η = {rows['eta']}      round  exploitability: last   average     bound   KL from equilibrium")
    for t in (1, 10, 100, 1000, 3000):
        print(f"{t:25}{rows['last'][t - 1]:22.4f}{rows['average'][t - 1]:10.4f}", end="")
        print(f"{rows['bound'][t - 1]:10.4f}{distance[t - 1]:22.4f}")
    print(f"KL grows in every round: {all(a < b for a, b in zip(distance, distance[1:]))}")
    print("\nη = √(8 ln n/T) from uniform, T = 1 to 10,000    largest share of the bound    log–log slope")
    for name, row in result["horizons"].items():
        print(f"  {name:44}{row['largest_share_of_bound']:28.3f}{row['slope']:17.2f}")
    K, rounds = sampled["samples"], sampled["rounds"]
    print(f"\ntransformer, η = {sampled['eta']}, K = {K}: exploitability after {rounds} rounds    last   average   mean distance")
    print(f"  {'exact':57}{sampled['exact']['last'][-1]:9.4f}{sampled['exact']['average'][-1]:10.4f}")
    for row in sampled["neural"]:
        mean = sum(row["total_variation_from_exact"]) / rounds
        print(f"  {'seed ' + str(row['seed']):57}{row['last'][-1]:9.4f}{row['average'][-1]:10.4f}{mean:16.3f}")


def draw(result):
    figure = Figure(figsize=(15, 9.5), layout="constrained")
    (simplex, curves, distances), (simplex2, curves2, horizon) = figure.subplots(2, 3)
    draw_exact(result, simplex, curves, distances)
    draw_sampled(result, simplex2, curves2)
    draw_horizons(result["horizons"], horizon)
    return figure


def draw_exact(result, simplex, curves, distances):
    rows = result["exact"]
    t = range(1, len(rows["last"]) + 1)
    point = triangle(simplex, [f"all {word}" for word in WORDS])
    shown = 400  # rounds; more would blacken the edge
    simplex.plot(*point(rows["path"][:shown]), color=ORANGE, linewidth=0.8, label=f"policy of each round, 1 to {shown}")
    simplex.plot(*point(rows["averages"][:shown]), color=BLUE, linewidth=1.5, label="average of the rounds so far")
    mark(simplex, point, rows["path"][0], result["equilibrium"])
    simplex.set_title(f"Exact SPPO, η = {rows['eta']}", pad=14)
    curves.plot(t, rows["last"], color=ORANGE, linewidth=0.8, label="policy of each round")
    curves.plot(t, rows["average"], color=BLUE, label="average of the rounds so far")
    curves.plot(t, rows["bound"], "--", color=GREY, label="bound: max log(1/π₁)/(ηt) + η/8")
    curves.set(xscale="log", yscale="log", xlabel="round t", ylabel="exploitability (win rate above ½)", ylim=(1e-3, 20))
    curves.set_title("Only the average converges")
    curves.legend(frameon=False, fontsize=9)
    distances.plot(t, rows["kl_from_equilibrium"], color=ORANGE)
    distances.set(xlabel="round t", ylabel="KL(equilibrium ‖ policy of round t), nats", ylim=(0, None))
    distances.set_title("The last policy moves away in every round")


def draw_sampled(result, simplex, curves):
    sampled, equilibrium = result["sampled"], result["equilibrium"]
    t = range(1, sampled["rounds"] + 1)
    point = triangle(simplex, [f"all {word}" for word in WORDS])
    for row in sampled["neural"]:
        first = row is sampled["neural"][0]
        simplex.plot(*point(row["path"]), color=ORANGE, linewidth=0.6, label="transformer, each round" if first else None)
        simplex.plot(*point(row["averages"]), color=BLUE, linewidth=0.9, label="transformer, average" if first else None)
        curves.plot(t, row["last"], color=ORANGE, linewidth=0.6, label="transformer, each round" if first else None)
        curves.plot(t, row["average"], color=BLUE, linewidth=0.9, label="transformer, average" if first else None)
    for axes, last, average in (
        (simplex, point(sampled["exact"]["path"]), point(sampled["exact"]["averages"])),
        (curves, (t, sampled["exact"]["last"]), (t, sampled["exact"]["average"])),
    ):
        axes.plot(*last, "--", color="black", linewidth=1, label="exact, each round")
        axes.plot(*average, ":", color="black", linewidth=1.6, label="exact, average")
    mark(simplex, point, sampled["exact"]["path"][0], equilibrium)
    title = f"Our Transformer, {sampled['samples']} samples a round, η = {sampled['eta']}"
    simplex.set_title(f"{title}: {len(sampled['neural'])} seeds", pad=14)
    curves.set(xlabel="round", ylabel="exploitability (win rate above ½)", ylim=(0, 0.42), title="Sampled and exact")
    curves.legend(frameon=False, fontsize=9)


def mark(simplex, point, start, equilibrium):
    simplex.plot(*point(start), "o", color="black", label="start")
    simplex.plot(*point(equilibrium), "*", color=GREEN, markersize=15, label="Nash equilibrium")
    simplex.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(-0.14, 1.04))


def draw_horizons(rows, axes):
    """All games on one pair of axes: against T/ln n they share one bound."""
    colours = (ORANGE, BLUE, GREEN, PINK, SKY, YELLOW, "black")
    for (name, row), colour in zip(rows.items(), colours):
        x = [T / math.log(row["actions"]) for T in row["rounds"]]
        line = ".--" if name == "COMAL's game" else ".-"  # the same curve as rock-paper-scissors
        axes.plot(x, row["exploitability"], line, color=colour, linewidth=0.8, markersize=4, label=name)
    x = [0.3, 1e4]
    axes.plot(x, [math.sqrt(1 / (2 * v)) for v in x], "--", color=GREY, label="bound √(ln n / 2T)")
    axes.set(xscale="log", yscale="log", xlabel="T / ln n  (T rounds, n actions)")
    axes.set(ylabel="exploitability of the average of T rounds", ylim=(1e-5, 2))
    axes.set_title("All games stay below the bound, η = √(8 ln n/T)")
    axes.legend(frameon=False, fontsize=8, loc="lower left")


if __name__ == "__main__":
    sys.exit(script("rps", __doc__, measure, print_table, draw))
