"""Does SPPO raise the likelihood of the chosen response and lower that of the rejected one, where DPO and IPO do not?

The paper argues so (abstract of v1; §4.5) and shows no measurement: DPO and IPO fix only the gap between the two log-ratios
log π_θ/π_t, SPPO fixes both ends. Here are the measurements, in the small world of toy/text_game.py with its oracle.

    python -m toy.likelihood        47 s on two cores: a table, out/toy/likelihood.json, out/toy/likelihood.png

A. One round. The four losses get the same on-policy pairs, η (β = 1/η), optimizer and shuffles. A pair is the best and the
   worst of 16 responses by win rate, or of the right ones among them, which differ in the ending only.
B. Twenty rounds of the whole loop with each loss, measured exactly.

What came out with seed 0, in brackets with seeds 1 and 2:
- Of the first step the claim says nothing: the gradients of sppo-hard, DPO and IPO are parallel, soft SPPO's has cosine 0.98
  with them (.98, .97).
- η = 2, targets in reach: the claim holds. Both ends of SPPO stop where the targets are, and at most 3 % of the chosen have
  become less likely. With DPO 24 % have (27, 32); its rejected responses fall without end, to -6.7 nats. Of pairs that differ
  in the ending only, 57 % have with DPO (46, 85) and 41 % with IPO (50, 59), and DPO's mean falls by 1.5 nats (1.8, 2.7).
- η = 20: the targets are past what a chosen response can gain (1.9 nats on average, then its probability is 1), so SPPO still
  pulls it up: 13 to 20 % end below where they began (14 to 23, 13 to 23). Of similar pairs 59 % do with DPO (39, 90) and
  63 % with IPO (45, 76).
- η = 1000, as in the paper: the claim fails. The targets are never near, and sppo-hard is nearly a DPO or IPO: 30 % of the
  chosen fall with each of the three (29, 33), and 56, 62 and 62 % of those in similar pairs. Soft SPPO is no better, 35 %
  (32, 37) and 82 % (73, 89): its two targets sum to η(P̂_w + P̂_l - 1), mostly below 0, which pushes down what the two
  responses share. Moved so that they sum to 0, they do about as the hard ones.
- With --lr 3e-4 only η = 2 comes to its targets. At η = 20 the losses then part on similar pairs alone, and less.
- Exploitability of the average policy after 20 rounds is alike, .061 to .070 (.057 to .093, .057 to .084). That of the single
  policies, mean of the later half, is lowest with soft SPPO, .167 (.170, .183), and .220 to .232 with the others (.220 to
  .267, .212 to .255).

ipo_loss has the margin of IPO's own paper, η/2; SPPO's eq. 4.14 has η. A prompt whose responses all tie is left out.
"""

import os
import sys
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from itertools import count, product
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean

import torch
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from tqdm import tqdm

from data import Tokenizer, remove, whole, write_json, write_lines
from model import Transformer, initialize
from sppo import PAIR_LOSSES, best_and_worst, fit, row_losses, score, sppo_target, win_rates
from toy.lab import BLUE, GREEN, GREY, ORANGE, PINK, script
from toy.text_game import MAX_NEW_TOKENS, STRENGTHS, SUMS, classify, measure, model_config, train_base, write_tokenizer
from train import TextGame, TrainConfig, load, run

LOSSES = ("sppo", *PAIR_LOSSES)
STYLES = {"chosen": "-", "rejected": "--"}
PAIRS = {"any": "best and worst of 16", "right": "only the ending differs"}  # right: best and worst of the right ones
ETAS = (2.0, 20.0, 1000.0)  # the paper's is 1000
REPEATS = 3  # draws of pairs and of their order, which a band is of
EPOCHS, EVERY = 12, 4  # passes over the pairs, of four optimizer steps each; steps between two points of a curve
LOOP = dict(eta=2.0, lr=3e-4, rounds=20, samples=8, epochs=3)  # part B
BASE_STEPS = 250  # of the policy that both parts start from; it is right about 65 % of the time


def settings(world, **changes):
    """The small world's own (train.py, preset tiny), but for selecting winner and loser, which the pairwise losses need."""
    common = dict(
        policy=str(world / "policy"), judge="toy.text_game:oracle", prompts=str(world / "prompts.jsonl"), out=str(world),
        rounds=1, samples=16, reuse_prompts=True, optimizer="adamw", warmup=0.0, epochs=EPOCHS, batch=25, micro_batch=25,
        max_new_tokens=MAX_NEW_TOKENS, template="plain", pool=1600,
    )  # fmt: skip
    return TrainConfig(**(common | changes))


def build_world(world, seed, steps):
    """What runs and toy.text_game.measure read of a world: policy/, prompts.jsonl, world.json. The judge is the oracle."""
    generator = torch.Generator().manual_seed(seed)
    model = initialize(Transformer(model_config()), generator)
    with whole(world / "policy") as folder:
        folder.mkdir()
        write_tokenizer(folder)
        train_base(model, Tokenizer(folder), steps, 128, generator)
        model.write_pretrained(folder)
    write_lines(world / "prompts.jsonl", [{"prompt": prompt} for prompt in SUMS])
    write_json(world / "world.json", {"seed": seed, "strengths": list(STRENGTHS)})


# ------------------------------------------------------------------------------------------------ A: likelihoods


def draw_pairs(config, kind):
    """On-policy pairs: the game, N prompts, N (winner, loser), their win rates (N, 2) among the responses compared.

    A prompt whose responses are all equally good has no winner and is left out.
    """
    policy, tokenizer, judge, (prompts,) = load(config)
    game, drawn = TextGame(config, policy, tokenizer, judge, number=1), []
    for prompt, row in zip(prompts, game.sample(prompts)):
        texts = game.texts(prompt, row)
        kept = [k for k, text in enumerate(texts) if kind == "any" or classify(prompt.text, text) < 3]
        win_rate = win_rates(judge.preferences(prompt.text, texts)[kept][:, kept])
        if kept and win_rate.max() > win_rate.min():
            pair = torch.stack(best_and_worst(win_rate))
            drawn.append((prompt, [row[kept[k]] for k in pair], win_rate[pair]))
    if not drawn:
        raise ValueError(f"seed {config.seed}: no prompt has a better and a worse response among its {config.samples}")
    prompts, selected, win_rate = zip(*drawn)
    return game, prompts, selected, torch.stack(win_rate)


def follow(job):
    """Train on the pairs with one loss: log π_θ(y)/π_t(y) of winners and losers along the way, in nats, over all pairs."""
    config, kind = job
    game, prompts, selected, win_rate = draw_pairs(config, kind)
    config = replace(config, batch=-(-len(prompts) // 4))
    old, step = score(game, prompts, selected, config), count(1)
    ratios = [torch.zeros_like(old)]

    def log(**numbers):
        if next(step) % EVERY == 0:
            ratios.append(score(game, prompts, selected, config) - old)

    fit(game, prompts, selected, old, sppo_target(win_rate, config.eta), config, game.generator(1), log)
    ratios = torch.stack(ratios)  # (points, N, 2)
    return {
        "chosen": ratios[..., 0].mean(1).tolist(),
        "rejected": ratios[..., 1].mean(1).tolist(),
        "fell": (ratios[-1, :, 0] < 0).float().mean().item(),  # share of winners that became less likely than under π_t
    }


def first_gradients(job):
    """At θ = π_t: how far each loss's gradient points along DPO's (cosine), and facts about the pairs."""
    config, kind = job
    game, prompts, selected, win_rate = draw_pairs(config, kind)
    old, target, gradient = score(game, prompts, selected, config), sppo_target(win_rate, config.eta), {}
    for loss in LOSSES:
        game.policy.zero_grad()
        row_losses(game.logps(prompts, selected) - old, target, replace(config, loss=loss)).mean().backward()
        gradient[loss] = torch.cat([parameter.grad.flatten() for parameter in game.policy.parameters()])
    return {
        "pairs": len(prompts),
        "win_rates": win_rate.mean(0).tolist(),  # of winner and loser
        "logps": old.mean(0).tolist(),  # log π_t of winner and loser: the winner can rise by no more than minus this
        "cosines": {loss: torch.cosine_similarity(gradient[loss], gradient["dpo"], dim=0).item() for loss in LOSSES},
    }


# ------------------------------------------------------------------------------------------------ B: whole rounds


def play(config):
    """The loop of train.py with one loss, and its policies measured exactly."""
    out = Path(config.out)
    out.mkdir(parents=True)
    with open(out / "log.txt", "w") as log, open(os.devnull, "w") as bars, redirect_stdout(log), redirect_stderr(bars):
        run(config)
        return measure(Path(config.policy).parent, out)


# ------------------------------------------------------------------------------------------------ both


def experiment(folder, seed, lr, pool):
    """Both parts, in an executor; lr is that of part A. The folder gets the files of the runs, and loses what it had."""
    remove(folder)
    world, seeds = folder / "world", range(REPEATS * seed, REPEATS * (seed + 1))
    pool.submit(build_world, world, seed, BASE_STEPS).result()
    conditions = list(product(PAIRS, ETAS, LOSSES))
    jobs = [(settings(world, eta=eta, loss=loss, lr=lr, seed=s), kind) for kind, eta, loss in conditions for s in seeds]
    games = [settings(world, loss=loss, seed=seed, out=str(folder / loss), **LOOP) for loss in LOSSES]
    drawn = pool.map(first_gradients, [(settings(world, seed=seeds[0]), kind) for kind in PAIRS])
    followed, played = pool.map(follow, jobs), pool.map(play, games)
    followed = list(tqdm(followed, total=len(jobs), desc="pairs", unit="run"))
    played = list(tqdm(played, total=len(games), desc="rounds", unit="run"))
    return {
        "seed": seed,
        "pairs": dict(zip(PAIRS, drawn)),
        "steps": [EVERY * point for point in range(len(followed[0]["chosen"]))],
        "likelihoods": [
            {"pairs": kind, "eta": eta, "loss": loss, "runs": followed[REPEATS * i : REPEATS * (i + 1)]}
            for i, (kind, eta, loss) in enumerate(conditions)
        ],
        "exploitability": {
            loss: {name: [row["exploitability"] for row in result[name]] for name in ("rounds", "averages")}
            for loss, result in zip(LOSSES, played)
        },
    }


# ------------------------------------------------------------------------------------------------ showing


def print_table(result):
    def line(name, cells):
        print(f"{name:40}" + "".join(f"{cell:>16}" for cell in cells))

    def spread(runs, key, form):
        values = [run[key] if key == "fell" else run[key][-1] for run in runs]
        return f"{sum(values) / len(values):{form}} ±{(max(values) - min(values)) / 2:.2f}"

    print(f"log π_θ/π_t after {result['steps'][-1]} steps, nats, mean ± half the range of {REPEATS} draws")
    line("", LOSSES)
    for kind, title in PAIRS.items():
        line(f"{title}: cos of 1st step", (f"{cosine:.4f}" for cosine in result["pairs"][kind]["cosines"].values()))
        for eta in ETAS:
            rows = [row["runs"] for row in result["likelihoods"] if (row["pairs"], row["eta"]) == (kind, eta)]
            line(f"  η = {eta:<6g}  chosen", (spread(runs, "chosen", "+.2f") for runs in rows))
            line("              rejected", (spread(runs, "rejected", "+.2f") for runs in rows))
            line("              share of chosen that fell", (spread(runs, "fell", ".2f") for runs in rows))
    games = result["exploitability"].values()
    print(f"exploitability in {LOOP['rounds']} rounds of the small world, η = {LOOP['eta']:g}")
    line("  last policy", (f"{game['rounds'][-1]:.3f}" for game in games))
    late = LOOP["rounds"] // 2
    line("  mean of the later half's policies", (f"{fmean(game['rounds'][late:]):.3f}" for game in games))
    line("  average policy", (f"{game['averages'][-1]:.3f}" for game in games))


def draw(result):
    """Left: log-ratios by optimizer step, a row per kind of pair, a column per η. Right: exploitability by round."""
    colours, widths = (BLUE, GREEN, ORANGE, PINK), (1.5, 3.6, 2.4, 1)  # lines that coincide stay visible
    looks = {loss: dict(color=colour, linewidth=width) for loss, colour, width in zip(LOSSES, colours, widths)}
    figure = Figure(figsize=(16, 7.6), layout="constrained")
    axes = figure.subplots(len(PAIRS), len(ETAS) + 1)
    for row, side in product(result["likelihoods"], ("chosen", "rejected")):
        axis = axes[list(PAIRS).index(row["pairs"]), ETAS.index(row["eta"])]
        values, look = torch.tensor([run[side] for run in row["runs"]]), looks[row["loss"]]
        axis.plot(result["steps"], values.mean(0), STYLES[side], zorder=2 + (row["loss"] == "sppo"), **look)
        axis.fill_between(result["steps"], values.amin(0), values.amax(0), color=look["color"], alpha=0.15, linewidth=0)
        axis.set_title(f"{PAIRS[row['pairs']]}, η = {row['eta']:g}")
    for axis in axes[:, :-1].flat:
        axis.set(xlabel="optimizer step", ylabel="log π_θ/π_t (nats; linear within ±1)")
        axis.axhline(0, color=GREY, linewidth=0.8)
        axis.set_yscale("symlog", linthresh=1)
        axis.set_ylim(-40, 4)
        axis.set_yticks((-10, -1, 0, 1), ("-10", "-1", "0", "1"))
    for axis, name, title in zip(axes[:, -1], ("rounds", "averages"), ("policy of each round", "average so far")):
        for loss, game in result["exploitability"].items():
            axis.plot(range(1, len(game[name]) + 1), game[name], color=looks[loss]["color"])
        axis.set(xlabel="round", ylabel="exploitability (win rate above ½)", title=f"{title}, η = {LOOP['eta']:g}")
        axis.set_ylim(0, 0.4)
        axis.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    handles = [Line2D([], [], label=loss, **look) for loss, look in looks.items()]
    handles += [Line2D([], [], color="black", linestyle=style, label=side) for side, style in STYLES.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
    return figure


def measure_both(args):
    one_thread = dict(initializer=torch.set_num_threads, initargs=(1,))
    with ProcessPoolExecutor(2, mp_context=get_context("spawn"), **one_thread) as pool:
        return experiment(Path(args.out) / "likelihood", args.seed, args.lr, pool)


def add_flags(parser):
    parser.add_argument("--lr", type=float, default=1e-3, help="of a first step on the pairs, falls to zero [%(default)s]")


def main(arguments=None):
    return script("likelihood", __doc__, measure_both, print_table, draw, arguments, add_flags)


if __name__ == "__main__":
    sys.exit(main())
