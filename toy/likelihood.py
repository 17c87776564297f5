"""Does SPPO raise the likelihood of chosen responses and lower that of rejected ones?

The paper argues that it does, and that DPO and IPO do not (abstract of v1; §4.5): they fix only the
gap between the two log-ratios log π_θ/π_t, SPPO fixes both ends. It shows no measurement. Here are
the measurements, in the small world of toy/text_game.py with its oracle.

    python -m toy.likelihood        out/toy/likelihood.png and .json; 47 s on two cores

A. One round. The four losses get the same on-policy pairs, η (β = 1/η), optimizer and shuffles. A
   pair is the best and the worst of 16 responses by win rate, or of the right ones among them,
   which differ in the ending only.
B. Twenty rounds of the whole loop with each loss, measured exactly.

Results with seed 0, and in brackets with seeds 1 and 2:
- The claim says nothing about the first step: the gradients of sppo-hard, DPO and IPO are parallel,
  and soft SPPO's has cosine 0.98 with them (.98, .97).
- η = 2, targets in reach: the claim holds. Both ends of SPPO stop where the targets are, and at
  most 3 % of the chosen responses have become less likely. With DPO 24 % have (27, 32); its
  rejected responses keep falling, to -6.7 nats. Of pairs that differ in the ending only, 57 % have
  with DPO (46, 85) and 41 % with IPO (50, 59), and DPO's mean falls by 1.5 nats (1.8, 2.7).
- η = 20: the targets are past what a chosen response can gain (1.9 nats on average, then its
  probability is 1), so SPPO still pulls it up: 13 to 20 % end below where they began (14 to 23, 13
  to 23). Of similar pairs 59 % do with DPO (39, 90) and 63 % with IPO (45, 76).
- η = 1000, as in the paper: the claim fails. The targets are never near, and sppo-hard is nearly
  DPO or IPO: 30 % of the chosen fall with each of the three (29, 33), and 56, 62 and 62 % of those
  in similar pairs. Soft SPPO is no better, 35 % (32, 37) and 82 % (73, 89): its two targets sum to
  η(P̂_w + P̂_l - 1), mostly below 0, which pushes down what the two responses share. Moved so that
  they sum to 0, they do about as well as the hard ones.
- With --lr 3e-4 only η = 2 comes to its targets. At η = 20 the losses then differ on similar pairs
  alone, and less.
- Exploitability of the average policy after 20 rounds is much the same, .061 to .070 (.057 to .093,
  .057 to .084). That of the single policies, mean of the later half, is lowest with soft SPPO, .167
  (.170, .183), and .220 to .232 with the others (.220 to .267, .212 to .255).

ipo_loss has the margin of IPO's own paper, η/2; SPPO's eq. 4.14 has η. A prompt whose responses all
tie is left out.
"""

import os
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Iterable
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean

import torch
from torch import Tensor

from data import Prompt
from engine.figures import BLUE, ORANGE, PINK, SKY, new_figure
from engine.files import remove, write_json, write_lines
from engine.progress import tqdm
from judges.base import Judge
from model import Transformer, initialize
from sppo import Regression, best_and_worst, row_losses, sppo_target, win_rates
from toy.lab import script
from toy.text_game import (
    ENDINGS,
    MAX_NEW_TOKENS,
    STRENGTHS,
    SUMS,
    classify,
    measure,
    model_config,
    write_base_policy,
)
from train import TextGame, TrainConfig, load, run

LOSSES = ("sppo", "sppo-hard", "dpo", "ipo")
# "right" is the best and the worst of the right responses.
PAIRS = {"any": "best and worst of 16", "right": "only the ending differs"}

# Part A.
ETAS = (2.0, 20.0, 1000.0)  # the paper's is 1000
REPEATS = 3  # draws of the pairs and of their order; a line in the figure shows their range
EPOCHS = 12  # passes over the pairs, of four optimizer steps each
EVERY = 4  # optimizer steps between two points of a curve

# Part B.
LOOP = dict(eta=2.0, lr=3e-4, rounds=20, samples=8, epochs=3)

BASE_STEPS = 250  # of the policy that both parts start from; it is right about 65 % of the time


def settings(world: Path, **changes) -> TrainConfig:
    """Those of the small world (train.py, preset tiny), but on winner and loser only.

    The pairwise losses need that.
    """
    common = dict(
        policy=str(world / "policy"), judge="toy.text_game:oracle",
        prompts=str(world / "prompts.jsonl"), out=str(world), rounds=1, samples=16,
        reuse_prompts=True, optimizer="adamw", warmup=0.0, epochs=EPOCHS, batch=25, micro_batch=25,
        max_new_tokens=MAX_NEW_TOKENS, template="plain", pool=1600,
    )  # fmt: skip
    return TrainConfig(**(common | changes))


def build_world(world: Path, seed: int, steps: int) -> None:
    """Write policy/, prompts.jsonl and world.json: what runs and toy.text_game.measure read.

    There is no learned judge: the oracle judges.
    """
    generator = torch.Generator().manual_seed(seed)
    model = initialize(Transformer(model_config()), generator)
    write_base_policy(world / "policy", model, steps, 128, generator)

    write_lines(world / "prompts.jsonl", [{"prompt": prompt} for prompt in SUMS])
    write_json(world / "world.json", {"seed": seed, "strengths": list(STRENGTHS)})


# ------------------------------------------------------------------------ A: likelihoods


def draw_pairs(config: TrainConfig, kind: str) -> tuple[TextGame, list[Prompt], list, Tensor]:
    """On-policy pairs: the game, N prompts, N [winner, loser], and their win rates (N, 2).

    The win rates are among the responses that are compared (`kind` is one of PAIRS). A prompt whose
    responses are all equally good has no winner and is left out; ValueError if that leaves none.
    """
    policy, tokenizer, judge, (prompts,) = load(config)
    # What round 1 samples depends on the seed alone, so all losses get the same responses.
    game = TextGame(config, policy, tokenizer, judge, number=1)

    drawn = []
    selected = []
    rates = []
    for prompt, row in zip(prompts, game.sample(prompts)):
        kept, win_rate = compared(judge, prompt, game.texts(prompt, row), kind)
        if not kept or win_rate.max() == win_rate.min():
            continue
        pair = torch.stack(best_and_worst(win_rate))
        drawn.append(prompt)
        selected.append([row[kept[k]] for k in pair])
        rates.append(win_rate[pair])

    if not drawn:
        raise ValueError(
            f"seed {config.seed}: no prompt has a better and a worse response "
            f"among its {config.samples}"
        )
    return game, drawn, selected, torch.stack(rates)


def compared(judge: Judge, prompt: Prompt, texts: list[str], kind: str) -> tuple[list[int], Tensor]:
    """Which of the K responses to a prompt are compared, and their win rates among themselves."""
    kept = list(range(len(texts)))
    if kind == "right":
        # The first classes are the right responses, one for each ending.
        kept = [k for k in kept if classify(prompt.text, texts[k]) < len(ENDINGS)]

    table = judge.preferences_many([prompt.text], [texts])[0]
    return kept, win_rates(table[kept][:, kept])


def follow(job: tuple[TrainConfig, str]) -> dict:
    """Train on the pairs with one loss, and follow log π_θ(y)/π_t(y) of winners and losers.

    Means over all pairs, in nats, every few steps; and the share of winners that have in the end
    become less likely than under π_t.
    """
    config, kind = job
    game, prompts, selected, win_rate = draw_pairs(config, kind)
    # However many pairs there are, an epoch is four steps, so that all curves are equally long.
    config = replace(config, batch=-(-len(prompts) // 4))

    old = game.score(prompts, selected, config)
    data = Regression(prompts, selected, old, sppo_target(win_rate, config.eta))

    # Measured over all pairs: each step's own batch is another one.
    ratios = [torch.zeros_like(old)]
    for step, _ in enumerate(game.fit(data, config, game.generator(1)), 1):
        if step % EVERY == 0:
            ratios.append(game.score(prompts, selected, config) - old)

    chosen, rejected = torch.stack(ratios).unbind(-1)  # (points, N)
    fell = chosen[-1] < 0
    return {
        "chosen": chosen.mean(1).tolist(),
        "rejected": rejected.mean(1).tolist(),
        "fell": fell.float().mean().item(),
    }


def first_gradients(job: tuple[TrainConfig, str]) -> dict:
    """At θ = π_t: cosine of each loss's gradient with DPO's, and facts about the pairs.

    `win_rates` and `logps` (log π_t) are means over the winners and over the losers. A winner can
    gain no more than minus its log π_t.
    """
    config, kind = job
    game, prompts, selected, win_rate = draw_pairs(config, kind)
    old = game.score(prompts, selected, config)
    target = sppo_target(win_rate, config.eta)

    gradient = {}
    for loss in LOSSES:
        # The log-ratios are 0 here, but their gradients are not.
        game.policy.zero_grad()
        log_ratio = game.logps(prompts, selected) - old
        row_losses(log_ratio, target, replace(config, loss=loss)).mean().backward()
        gradients = [parameter.grad.flatten() for parameter in game.policy.parameters()]
        gradient[loss] = torch.cat(gradients)

    dpo = gradient["dpo"]
    cosines = {loss: torch.cosine_similarity(gradient[loss], dpo, dim=0) for loss in LOSSES}
    return {
        "pairs": len(prompts),
        "win_rates": win_rate.mean(0).tolist(),
        "logps": old.mean(0).tolist(),
        "cosines": {loss: cosine.item() for loss, cosine in cosines.items()},
    }


# ------------------------------------------------------------------------ B: whole rounds


def play(config: TrainConfig) -> dict:
    """The loop of train.py with one loss, and exact measurements of its policies."""
    out = Path(config.out)
    out.mkdir(parents=True)
    # Its lines go to a file and its progress bars nowhere: several runs share one terminal.
    with open(out / "log.txt", "w") as log, open(os.devnull, "w") as bars:
        with redirect_stdout(log), redirect_stderr(bars):
            run(config)
            return measure(Path(config.policy).parent, out)


# ------------------------------------------------------------------------ both


def experiment(folder: Path, seed: int, lr: float, pool: Executor) -> dict:
    """Both parts, in an executor; lr is that of part A.

    The files of the runs are written into `folder`, and what was in it before is deleted.
    """
    remove(folder)
    world = folder / "world"
    pool.submit(build_world, world, seed, BASE_STEPS).result()

    # Part A with several seeds for each condition; no two seeds of this script share one of them.
    seeds = range(REPEATS * seed, REPEATS * (seed + 1))
    conditions = list(product(PAIRS, ETAS, LOSSES))
    jobs = []
    for kind, eta, loss in conditions:
        jobs += [(settings(world, eta=eta, loss=loss, lr=lr, seed=s), kind) for s in seeds]

    # Part B.
    games = []
    for loss in LOSSES:
        games.append(settings(world, loss=loss, seed=seed, out=str(folder / loss), **LOOP))

    # Everything is handed out before anything is waited for, so that no process is ever idle.
    drawn = pool.map(first_gradients, [(settings(world, seed=seeds[0]), kind) for kind in PAIRS])
    followed = pool.map(follow, jobs)
    played = pool.map(play, games)
    followed = list(tqdm(followed, total=len(jobs), desc="pairs", unit="run"))
    played = list(tqdm(played, total=len(games), desc="rounds", unit="run"))

    likelihoods = []
    for i, (kind, eta, loss) in enumerate(conditions):
        runs = followed[REPEATS * i : REPEATS * (i + 1)]
        likelihoods.append({"pairs": kind, "eta": eta, "loss": loss, "runs": runs})
    return {
        "seed": seed,
        "pairs": dict(zip(PAIRS, drawn)),
        "steps": [EVERY * point for point in range(len(followed[0]["chosen"]))],
        "likelihoods": likelihoods,
        "exploitability": {loss: gains(result) for loss, result in zip(LOSSES, played)},
    }


def gains(result: dict) -> dict[str, list[float]]:
    """Exploitability of each round's policy and of the averages, from what `measure` returns."""
    return {
        name: [row["exploitability"] for row in result[name]] for name in ("rounds", "averages")
    }


# ------------------------------------------------------------------------ the table


def print_table(result: dict) -> None:
    print_likelihoods(result)
    print_exploitability(result["exploitability"].values())


def print_likelihoods(result: dict) -> None:
    print(
        f"log π_θ/π_t after {result['steps'][-1]} steps, nats, "
        f"mean ± half the range of {REPEATS} draws"
    )
    line("", LOSSES)
    for kind, title in PAIRS.items():
        cosines = result["pairs"][kind]["cosines"].values()
        line(f"{title}: cos of 1st step", (f"{cosine:.4f}" for cosine in cosines))

        for eta in ETAS:
            rows = [row for row in result["likelihoods"] if row["pairs"] == kind]
            rows = [row["runs"] for row in rows if row["eta"] == eta]
            line(f"  η = {eta:<6g}  chosen", (spread(runs, "chosen", "+.2f") for runs in rows))
            line("              rejected", (spread(runs, "rejected", "+.2f") for runs in rows))
            fell = (spread(runs, "fell", ".2f") for runs in rows)
            line("              share of chosen that fell", fell)


def print_exploitability(games: Iterable[dict]) -> None:
    """`games` has one entry for each of LOSSES."""
    print(f"exploitability in {LOOP['rounds']} rounds of the small world, η = {LOOP['eta']:g}")
    late = LOOP["rounds"] // 2

    line("  last policy", (f"{game['rounds'][-1]:.3f}" for game in games))
    later_half = (f"{fmean(game['rounds'][late:]):.3f}" for game in games)
    line("  mean of the later half's policies", later_half)
    line("  average policy", (f"{game['averages'][-1]:.3f}" for game in games))


def line(name: str, cells: Iterable[str]) -> None:
    print(f"{name:40}" + "".join(f"{cell:>15}" for cell in cells))


def spread(runs: list[dict], key: str, form: str) -> str:
    """Mean and half the range over runs of `key`, at its last step if it has one for every step."""
    values = [run[key] if key == "fell" else run[key][-1] for run in runs]
    return f"{sum(values) / len(values):{form}} ±{(max(values) - min(values)) / 2:.2f}"


# ------------------------------------------------------------------------ the figure

NAMES = {"sppo": "SPPO", "sppo-hard": "SPPO, hard labels", "dpo": "DPO", "ipo": "IPO"}
COLOURS = {"sppo": BLUE, "sppo-hard": SKY, "dpo": ORANGE, "ipo": PINK}
GROUPS = {"any": "best and worst of 16", "right": "right answers that differ in the ending"}


def draw(result: dict):
    """Bars: the share of chosen responses that became less likely, by kind of pair, η and loss."""
    figure = new_figure(10, 4.4)
    axes = figure.subplots()
    places = {}
    for kind, eta in product(PAIRS, ETAS):
        # A group for each η, with a gap between the two kinds of pairs.
        places[kind, eta] = len(places) + 0.4 * (kind != next(iter(PAIRS)))

    for row in result["likelihoods"]:
        shift = 0.2 * (LOSSES.index(row["loss"]) - 1.5)
        draw_bar(axes, places[row["pairs"], row["eta"]] + shift, row)

    axes.set_xticks([*places.values()], [f"η = {eta:g}" for _, eta in places])
    for kind, title in GROUPS.items():
        middle = fmean(place for (other, _), place in places.items() if other == kind)
        below = dict(transform=axes.get_xaxis_transform(), ha="center", va="top", fontsize=11)
        axes.text(middle, -0.1, title, **below)
    axes.set(ylim=(0, 100), ylabel="% of chosen responses")
    axes.set_title("Chosen responses that are less likely after training than before")
    axes.legend(frameon=False, loc="upper left", ncols=len(LOSSES))
    return figure


def draw_bar(axes, place: float, row: dict) -> None:
    """The mean over the draws of the pairs, and a line over their range."""
    shares = [100 * run["fell"] for run in row["runs"]]
    mean = fmean(shares)
    # The legend names each loss once.
    first = row["pairs"] == next(iter(PAIRS)) and row["eta"] == ETAS[0]
    look = dict(width=0.18, color=COLOURS[row["loss"]], label=NAMES[row["loss"]] if first else None)
    axes.bar(place, mean, **look)
    axes.plot([place, place], [min(shares), max(shares)], color="black", linewidth=0.8)
    axes.text(place, max(shares) + 1, f"{mean:.0f}", ha="center", va="bottom", fontsize=8)


# ------------------------------------------------------------------------ command line


def measure_both(args: Namespace) -> dict:
    # Spawned, not forked: a fork of a process in which torch runs threads can hang.
    one_thread = dict(initializer=torch.set_num_threads, initargs=(1,))
    with ProcessPoolExecutor(2, mp_context=get_context("spawn"), **one_thread) as pool:
        return experiment(Path(args.out) / "likelihood", args.seed, args.lr, pool)


def add_flags(parser: ArgumentParser) -> None:
    help = "of a first step on the pairs, falls to zero [%(default)s]"
    parser.add_argument("--lr", type=float, default=1e-3, help=help)


def main(arguments: list[str] | None = None) -> int:
    return script("likelihood", __doc__, measure_both, print_table, draw, arguments, add_flags)


if __name__ == "__main__":
    sys.exit(main())
