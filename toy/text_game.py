"""The small world: sums of two digits, a judge with a circle in its preferences, exact shares.

Prompts are `3+4=`. A response is a number and an ending: `7.` `7!` `7?`. The *oracle* prefers the
right number to a wrong one, and a well-formed response to a malformed one, with probability 0.95;
among equally good responses the endings beat each other in a circle. So quality is transitive,
style is not, and the equilibrium is: always right, endings mixed, (4, 3, 4)/11 for the strengths
.9 .9 .8.

    python -m toy.text_game build WORLD
        writes the tokenizer, the base policy, a learned judge, prompts.jsonl and pairs.jsonl
    python train.py --preset tiny --policy WORLD/policy --judge WORLD/judge \\
        --prompts WORLD/prompts.jsonl --out RUN
    python -m toy.text_game measure WORLD RUN
        exact shares and exploitability of each round's policy and of their average; with --gif
        also a moving picture of them

Every well-formed response can be listed (100 numbers, 3 endings), so the policy's shares are sums
of exact probabilities, not estimates.
"""

import argparse
import functools
import math
import re
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from tokenizers import Regex, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend
from torch import Tensor

from data import Tokenizer, read_pairs
from engine.command import Parser, exit_code
from engine.figures import BLUE, GREEN, ORANGE, label_ends, new_figure, whole_ticks, write_figure
from engine.files import (
    atomic_write,
    read_json,
    remove,
    require_empty,
    unfinished_folder,
    write_json,
    write_lines,
)
from engine.progress import tqdm
from engine.run_folder import round_policies
from generate import KVCache, response_logps
from model import ModelConfig, Transformer, initialize
from prefmodel import PreferenceModel, train_preference_model
from sppo import optimizer_step
from toy.games import cycle, exploitability, nash
from toy.lab import triangle

ENDINGS = ".!?"
STRENGTHS = (0.9, 0.9, 0.8)  # `.` beats `!`, `!` beats `?`, `?` beats `.`
QUALITY = 0.95  # right beats wrong, wrong beats malformed
SUMS = {f"{a}+{b}=": a + b for a in range(10) for b in range(10)}
NUMBERS = [str(n) for n in range(100)]
CLASSES = [f"{kind}{ending}" for kind in ("right", "wrong") for ending in ENDINGS] + ["malformed"]
MAX_NEW_TOKENS = 4  # two digits, an ending, the stop token

# ------------------------------------------------------------------------ the rules


def classify(prompt: str, response: str) -> int:
    """Index into CLASSES of a response text. ValueError for a prompt of another world."""
    if prompt not in SUMS:
        raise ValueError(
            f"prompt {prompt[:40]!r} is not of the small world, "
            "expected a sum of two digits like '3+4='"
        )

    # No leading zero: each number has one spelling, so that well-formed responses can be listed.
    match = re.fullmatch(r"(0|[1-9]\d?)([.!?])", response)
    if match is None:
        return CLASSES.index("malformed")
    wrong = int(match[1]) != SUMS[prompt]
    return len(ENDINGS) * wrong + ENDINGS.index(match[2])


@functools.cache
def payoff(strengths: tuple = STRENGTHS) -> Tensor:
    """(7, 7) P(class i beats class j) under the oracle, float64."""
    quality = torch.tensor([0, 0, 0, 1, 1, 1, 2])  # of each class; 0 is best
    table = 0.5 + (QUALITY - 0.5) * torch.sign(quality - quality[:, None]).double()

    # Classes of equal quality differ in their endings only.
    table[:3, :3] = cycle(strengths)
    table[3:6, 3:6] = cycle(strengths)
    table[6, 6] = 0.5
    return table


def oracle(prompt: str, responses: list[str], strengths=STRENGTHS, longer: float = 0.0) -> Tensor:
    """(K, K) true preferences, a rule for `--judge toy.text_game:oracle`.

    `longer` makes it a biased judge: it adds that many logits for the longer response of a pair.
    """
    classes = [classify(prompt, response) for response in responses]
    table = payoff(tuple(strengths))[classes][:, classes]
    return favour_longer(table, responses, longer)


def favour_longer(table: Tensor, responses: list[str], logits: float) -> Tensor:
    """(K, K) preferences, with so many logits added for the longer response of each pair."""
    # Without a bias the table stays as it is to the last bit; sigmoid(logit(p)) is not exactly p.
    if not logits:
        return table
    size = torch.tensor([len(response) for response in responses])
    return torch.sigmoid(torch.logit(table) + logits * torch.sign(size[:, None] - size))


# ------------------------------------------------------------------------ building it


def write_tokenizer(folder: Path) -> None:
    """A tokenizer of one token a character, in Hugging Face layout."""
    tokens = ["<unk>", "<s>", "</s>", *"0123456789+=", *ENDINGS]
    vocabulary = {token: i for i, token in enumerate(tokens)}

    # The pattern matches any one character, and the decoder joins them without spaces.
    backend = Backend(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    backend.decoder = decoders.Fuse()
    backend.save(str(folder / "tokenizer.json"))

    special = {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    write_json(folder / "tokenizer_config.json", special)


def model_config(layers: int = 2, width: int = 64) -> ModelConfig:
    return ModelConfig(
        vocab_size=18, hidden_size=width, intermediate_size=3 * width, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, head_dim=width // 4,
        max_position_embeddings=32, tie_word_embeddings=True,
    )  # fmt: skip


def draw_response(prompt: str, right: float, endings: tuple, malformed: float, generator) -> str:
    """A random response text: right with this probability, with these shares of the endings, and
    malformed with that probability."""
    # All numbers are drawn whether or not they are used, so each response takes as many.
    chance = torch.rand(3, generator=generator)
    ending = ENDINGS[torch.multinomial(torch.tensor(endings), 1, generator=generator)]
    wrong = int(torch.randint(18, (1,), generator=generator))
    wrong += wrong >= SUMS[prompt]  # skips the right sum

    number = SUMS[prompt] if chance[0] < right else wrong
    if chance[1] >= malformed:
        return f"{number}{ending}"
    broken = [f"{number}", ending, f"{ending}{number}", f"{number}{ending}{ending}"]
    return broken[int(4 * chance[2])]


def train_base(model: Transformer, tokenizer, steps: int, batch: int, generator) -> None:
    """Supervised training on responses of which 70 % are right and 70 % end in `.`."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    shares = (0.7, 0.15, 0.15)

    prompts = [tokenizer.prompt_ids(prompt, "plain") for prompt in SUMS]
    pool = []
    for index, prompt in enumerate(SUMS):
        for _ in range(200):
            response = draw_response(prompt, 0.7, shares, 0.03, generator)
            pool.append((index, tokenizer.encode(response) + [tokenizer.eos]))

    for step in tqdm(range(steps), desc="base policy", unit="step"):
        chosen = torch.randint(len(pool), (batch,), generator=generator).tolist()
        responses = [[] for _ in prompts]
        for index, response in (pool[i] for i in chosen):
            responses[index].append(response)
        loss = -response_logps(model, prompts, responses).mean()
        loss.backward()

        # The gradient is not clipped; its norm is only checked to be finite.
        lr = 3e-3 * (1 - step / steps)
        optimizer_step(optimizer, model, lr, math.inf, f"step {step + 1}")


def write_base_policy(folder: Path, model: Transformer, steps: int, batch: int, generator) -> None:
    """Train `model` as the base policy, and write it with its tokenizer as a checkpoint folder."""
    with atomic_write(folder) as temporary:
        temporary.mkdir()
        write_tokenizer(temporary)
        train_base(model, Tokenizer(temporary), steps, batch, generator)
        model.write_pretrained(temporary)


def draw_pairs(count: int, strengths: tuple, generator) -> list[dict]:
    """Judged pairs: two responses of many kinds, and a coin flip with the oracle's probability."""
    prompts = list(SUMS)
    thirds = (1 / 3, 1 / 3, 1 / 3)

    pairs = []
    for _ in tqdm(range(count), desc="judged pairs", unit="pair"):
        prompt = prompts[int(torch.randint(len(prompts), (1,), generator=generator))]
        first = draw_response(prompt, 0.7, thirds, 0.1, generator)
        second = draw_response(prompt, 0.7, thirds, 0.1, generator)

        probability = oracle(prompt, [first, second], strengths)[0, 1]
        if torch.rand(1, generator=generator) < probability:
            pairs.append({"prompt": prompt, "chosen": first, "rejected": second})
        else:
            pairs.append({"prompt": prompt, "chosen": second, "rejected": first})
    return pairs


def build(world: str | Path, seed: int = 0, strengths=STRENGTHS, pairs: int = 40_000) -> None:
    """Write a world's folder: policy/, judge/, prompts.jsonl, pairs.jsonl and world.json.

    The folder appears whole, and FileExistsError is raised if something is there already.
    """
    place = require_empty(world, "folder")
    world = unfinished_folder(place)
    remove(world)  # of a build that was stopped

    generator = torch.Generator().manual_seed(seed)
    write_lines(world / "prompts.jsonl", [{"prompt": prompt} for prompt in SUMS])
    model = initialize(Transformer(model_config()), generator)
    write_base_policy(world / "policy", model, 600, 256, generator)

    write_lines(world / "pairs.jsonl", draw_pairs(pairs, strengths, generator))
    build_judge(world, generator)
    settings = {"seed": seed, "strengths": list(strengths), "quality": QUALITY}
    write_json(world / "world.json", settings)
    world.rename(place)


def build_judge(world: Path, generator: torch.Generator) -> None:
    """Train the world's judge on its pairs, starting from its base policy."""
    pairs = read_pairs(world / "pairs.jsonl")
    heads = dict(scalar=True, cyclic=4, template="plain")
    judge = PreferenceModel.from_backbone(world / "policy", generator, **heads)

    epochs = 4
    with tqdm(total=epochs * len(pairs), unit="pair", desc="learned judge") as progress:
        train_preference_model(
            judge, pairs, epochs=epochs, lr=1e-3, batch=250, generator=generator, progress=progress
        )
    judge.save_pretrained(world / "judge")


# ------------------------------------------------------------------------ measuring


@torch.no_grad()
def class_shares(model: Transformer, tokenizer: Tokenizer) -> Tensor:
    """(100 prompts, 7 classes) exact probabilities of each class of response, float64.

    A response that contains <unk> or <s> counts as malformed, though it decodes to the text
    without it.
    """
    # Prompts are all equally long.
    prompts = torch.tensor([tokenizer.prompt_ids(prompt, "plain") for prompt in SUMS])
    texts = [number + ending for number in NUMBERS for ending in ENDINGS]
    responses = [(*tokenizer.encode(text), tokenizer.eos) for text in texts]

    # 25 prompts at a time keep the key/value cache small.
    parts = [probabilities(model, batch, responses) for batch in prompts.split(25)]
    probability = torch.cat(parts).view(len(SUMS), len(NUMBERS), len(ENDINGS))

    right = probability[range(len(SUMS)), list(SUMS.values())]  # (100, 3)
    wrong = probability.sum(1) - right
    # The malformed ones are too many to list: they are the rest, which rounding may take below 0.
    malformed = (1 - right.sum(1) - wrong.sum(1)).clamp(min=0)
    return torch.cat([right, wrong, malformed[:, None]], dim=1)


def probabilities(model: Transformer, prompts: Tensor, responses: list[tuple]) -> Tensor:
    """(n, T) prompts, R responses as tuples of tokens -> (n, R) probabilities, float64.

    A prefix that several responses share goes through the model once.
    """
    n = len(prompts)
    longest = max(map(len, responses))
    size = prompts.shape[1] + longest - 1  # a last token predicts nothing, and is not cached
    cache = KVCache(model.config, n, size, prompts.device, torch.float32)

    def following(tokens):
        """Probabilities of the next token, a row for each row of the cache."""
        return model.head(model.model(tokens, cache)[:, -1]).double().softmax(-1)

    # joint[prefix] (n, V): probability of the prefix and each token after it.
    prefixes = [()]
    joint = {(): following(prompts)}
    for length in range(1, longest):
        longer = sorted({response[:length] for response in responses if len(response) > length})

        # The cache holds n neighbouring rows for each prefix; each longer one takes its parent's.
        parent = torch.tensor([prefixes.index(prefix[:-1]) for prefix in longer])
        cache.keep((parent[:, None] * n + torch.arange(n)).flatten())
        token = torch.tensor([prefix[-1] for prefix in longer]).repeat_interleave(n)[:, None]

        rows = following(token).view(len(longer), n, -1)
        for prefix, row in zip(longer, rows):
            joint[prefix] = joint[prefix[:-1]][:, prefix[-1], None] * row
        prefixes = longer
    return torch.stack([joint[response[:-1]][:, response[-1]] for response in responses], dim=1)


def describe(shares: Tensor, table: Tensor) -> dict:
    """The numbers of one policy from its shares (100, 7) and the payoff table (7, 7).

    `right` and `malformed` are shares of all responses, `endings` of the well-formed ones.
    Exploitability is E_x max_y P(y ≻ π|x) - ½: the best reply may differ from prompt to prompt.
    """
    mean = shares.mean(0)
    endings = mean[:3] + mean[3:6]
    return {
        "right": mean[:3].sum().item(),
        "endings": (endings / endings.sum()).tolist(),
        "malformed": mean[6].item(),
        "exploitability": exploitability(table, shares).mean().item(),
    }


def measure(world: str | Path, run: str | Path, film: bool = False) -> dict:
    """Write RUN/measure.json and RUN/measure.png, with `film` also RUN/measure.gif.

    FileNotFoundError if the run has no policies.

    They show the base policy, the policy of every round, the last one, and the rounds' average,
    which is the theorem's: a mixture that draws a round, then a response of its policy. So its
    shares are the means of the rounds' shares. The base policy is not part of it.
    """
    world = Path(world)
    run = Path(run)
    table = payoff(tuple(read_json(world / "world.json")["strengths"]))
    folders = round_policies(run)
    if not folders:
        raise FileNotFoundError(f"{run}: no round-01/policy in it, expected the folder of a run")

    shares = []
    for folder in tqdm([world / "policy", *folders], desc="measure", unit="policy"):
        shares.append(class_shares(Transformer.from_pretrained(folder), Tokenizer(folder)))
    shares = torch.stack(shares)  # (1 + T, 100, 7)
    averages = shares[1:].cumsum(0) / torch.arange(1, len(shares))[:, None, None]

    result = {
        "base": describe(shares[0], table),
        "last": describe(shares[-1], table),
        "average": describe(averages[-1], table),
        "equilibrium": nash(table)[:3].tolist(),
        "rounds": [describe(share, table) for share in shares[1:]],
        "averages": [describe(share, table) for share in averages],
    }
    write_json(run / "measure.json", result)
    draw(result, run / "measure.png")
    if film:
        draw_film(result, run / "measure.gif")
    return result


# ------------------------------------------------------------------------ showing


def print_table(result: dict) -> None:
    rows = {name: result[name] for name in ("base", "last", "average")}
    endings = result["equilibrium"]
    rows["equilibrium"] = dict(right=1, endings=endings, malformed=0, exploitability=0)

    print(f"{'':14}{'right':>8}{'.':>8}{'!':>8}{'?':>8}{'malformed':>12}{'exploitability':>17}")
    for name, row in rows.items():
        shares = "".join(f"{share:8.3f}" for share in (row["right"], *row["endings"]))
        print(f"{name:14}{shares}{row['malformed']:12.4f}{row['exploitability']:17.4f}")


def draw(result: dict, path: Path) -> None:
    """Left: the path of the endings on their triangle. Right: exploitability, and wrong answers."""
    figure = new_figure(11.5, 4.6)
    simplex, curve = figure.subplots(1, 2)
    draw_endings(simplex, result)
    draw_exploitability(curve, result)
    write_figure(path, figure)


def draw_endings(axes, result: dict) -> None:
    """Shares of the three endings: a point for each policy; names stand outside the triangle."""
    point = triangle(axes, [f"all “{ending}”" for ending in ENDINGS])
    rounds, averages, equilibrium = paths(result, point)
    axes.plot(*rounds, ".-", color=ORANGE, linewidth=0.8, markersize=4)
    axes.plot(*averages, ".-", color=BLUE, markersize=4)

    # Which way the policies run: an early step, away from the other marks, and the last one.
    for i in (len(result["rounds"]) // 10, -2):
        arrow = dict(arrowstyle="-|>", color=ORANGE, mutation_scale=18)
        axes.annotate("", rounds[:, i + 1], rounds[:, i], arrowprops=arrow)
    axes.plot(*rounds[:, 0], "o", color="black")
    axes.plot(*equilibrium, "*", color=GREEN, markersize=15)

    names = [
        ("average of the\nrounds so far", (-0.08, 0.62), averages.T, BLUE),
        ("base policy", (-0.12, 0.3), rounds.T[:1], "black"),
        ("policy of each\nround", (1.08, 0.62), rounds.T, ORANGE),
        ("Nash\nequilibrium", (1.14, 0.36), equilibrium[None], GREEN),
        (f"round {len(result['rounds'])}", (0.35, -0.09), rounds.T[-1:], ORANGE),
    ]
    for name, place, points, colour in names:
        # A thin line from the name to the nearest point that it names.
        nearest = min(points.tolist(), key=lambda xy: math.dist(xy, place))
        line = dict(arrowstyle="-", color=colour, linewidth=0.6, shrinkB=4)
        box = dict(ha="center", va="center", fontsize=9, color=colour)
        axes.annotate(name, nearest, place, arrowprops=line, **box)
    axes.set_title("Endings of the responses (shares)", pad=14)


def paths(result: dict, point: Callable) -> tuple[Tensor, Tensor, Tensor]:
    """On the triangle: base policy and rounds (2, 1 + T), averages (2, T), equilibrium (2,)."""
    rounds = [row["endings"] for row in (result["base"], *result["rounds"])]
    averages = [row["endings"] for row in result["averages"]]
    return point(rounds), point(averages), point(result["equilibrium"])


def draw_exploitability(axes, result: dict) -> None:
    """Exploitability by round, and the share of wrong answers."""
    policies = [result["base"], *result["rounds"]]
    rounds = range(len(policies))

    last = [row["exploitability"] for row in policies]
    average = [row["exploitability"] for row in result["averages"]]
    wrong = [1 - row["right"] for row in policies]
    axes.plot(rounds, last, color=ORANGE)
    # The average begins with round 1; round 0 is the base policy.
    axes.plot(rounds[1:], average, color=BLUE)
    axes.plot(rounds, wrong, ":", color=GREEN)

    axes.set(xlabel="round (0: base policy)", ylabel="exploitability (win rate above ½)")
    axes.set(xlim=(0, rounds[-1]), ylim=(0, None))
    whole_ticks(axes.xaxis)
    axes.set_title("Exact exploitability")
    ends = [(last[-1], "policy of\neach round", ORANGE)]
    ends += [(average[-1], "average of the\nrounds so far", BLUE)]
    ends += [(wrong[-1], "wrong answers\n(share)", GREEN)]
    label_ends(axes, ends, gap=0.11)


def draw_film(result: dict, path: Path) -> None:
    """The same as a moving picture of 8 seconds, round by round: a GIF that runs for ever."""
    # Imported late: few commands draw.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from PIL import Image

    figure = new_figure(8.2, 3.6)
    figure.set_dpi(100)
    canvas = FigureCanvasAgg(figure)
    simplex, curve = figure.subplots(1, 2)
    show = film_endings(simplex, result), film_exploitability(curve, result)

    frames = []
    for number in tqdm(range(1, len(result["rounds"]) + 1), desc="film", leave=False):
        for part in show:
            part(number)
        canvas.draw()
        # The places were found for the first frame, and stay.
        figure.set_layout_engine("none")
        frames.append(Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB"))

    # One palette, of the fullest frame: frames then differ only where something moves.
    palette = frames[-1].quantize(256)
    frames = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]

    # Hundredths of a second are all that a GIF knows; the last frame stays for one second.
    times = [10 * max(2, round(700 / len(frames)))] * (len(frames) - 1) + [1000]
    with atomic_write(path) as temporary:
        frames[0].save(
            temporary, "GIF", save_all=True, append_images=frames[1:], duration=times, loop=0
        )


def film_endings(axes, result: dict) -> Callable:
    """The triangle; returns the function that shows it after so many rounds."""
    point = triangle(axes, [f"all “{ending}”" for ending in ENDINGS])
    rounds, averages, equilibrium = paths(result, point)
    axes.plot(*equilibrium, "*", color=GREEN, markersize=15)
    line = dict(arrowstyle="-", color=GREEN, linewidth=0.6, shrinkB=6)
    name = dict(ha="center", va="center", fontsize=9, color=GREEN, arrowprops=line)
    axes.annotate("Nash\nequilibrium", equilibrium.tolist(), (1.05, 0.6), **name)

    # Faintly where the policies will run, from the first frame on.
    axes.plot(*rounds, color=ORANGE, linewidth=0.4, alpha=0.4)
    (trail,) = axes.plot([], [], color=ORANGE, linewidth=1)
    (spiral,) = axes.plot([], [], color=BLUE, linewidth=1.6)
    (policy,) = axes.plot([], [], "o", color=ORANGE, markersize=9)
    (average,) = axes.plot([], [], "o", color=BLUE, markersize=7)
    axes.set_title("Endings of the responses (shares)", fontsize=10, pad=12)

    def show(number):
        recent = slice(max(0, number - 8), number + 1)
        trail.set_data(*rounds[:, recent])
        spiral.set_data(*averages[:, :number])
        policy.set_data(*rounds[:, number, None])
        average.set_data(*averages[:, number - 1, None])

    return show


def film_exploitability(axes, result: dict) -> Callable:
    """Exploitability; returns the function that shows it after so many rounds."""
    last = [row["exploitability"] for row in result["rounds"]]
    average = [row["exploitability"] for row in result["averages"]]
    (each,) = axes.plot([], [], color=ORANGE)
    (mean,) = axes.plot([], [], color=BLUE, linewidth=1.6)

    axes.set(xlim=(0, len(last)), ylim=(0, 1.35 * max(last + average)), xlabel="round")
    axes.set_ylabel("exploitability (win rate above ½)")
    corner = dict(ha="right", va="top", transform=axes.transAxes)
    axes.text(0.97, 0.97, "the last policy", color=ORANGE, **corner)
    axes.text(0.97, 0.89, "the average of all rounds", color=BLUE, **corner)

    def show(number):
        each.set_data(range(1, number + 1), last[:number])
        mean.set_data(range(1, number + 1), average[:number])

    return show


# ------------------------------------------------------------------------ command line


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)

    command = commands.add_parser("build", help="write the world")
    command.add_argument("world", help="new folder")
    command.add_argument("--seed", type=int, default=0, help="random seed [%(default)s]")
    order = ". beats !, ! beats ?, ? beats . [.9 .9 .8]"
    command.add_argument("--strengths", type=float, nargs=3, default=STRENGTHS, help=order)
    count = "judged pairs that the learned judge sees [%(default)s]"
    command.add_argument("--pairs", type=int, default=40_000, help=count)

    command = commands.add_parser("measure", help="measure a run exactly")
    command.add_argument("world")
    command.add_argument("run")
    film = "also write RUN/measure.gif, the figure as a moving picture"
    command.add_argument("--gif", action="store_true", help=film)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    args = parse_arguments(arguments)

    def work():
        if args.command == "build":
            build(args.world, args.seed, args.strengths, args.pairs)
        else:
            print_table(measure(args.world, args.run, args.gif))

    return exit_code("toy.text_game", work)


if __name__ == "__main__":
    sys.exit(main())
