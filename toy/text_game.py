"""The small world: sums of two digits, a judge with a circle in it, and exact measurement of what SPPO made of it.

Prompts are `3+4=`. A response is a number and an ending: `7.` `7!` `7?`. The *oracle* prefers the right number to a
wrong one, and a well-formed response to a malformed one, with probability 0.95; among equally good responses the
endings beat each other in a circle. So quality is transitive, style is not, and the equilibrium is: always right,
endings mixed, (4, 3, 4)/11 for the strengths .9 .9 .8.

    python -m toy.text_game build WORLD           tokenizer, base policy, learned judge, prompts.jsonl, pairs.jsonl
    python train.py --preset tiny --policy WORLD/policy --judge WORLD/judge --prompts WORLD/prompts.jsonl --out RUN
    python -m toy.text_game measure WORLD RUN     exact shares and exploitability of each round and of their average

Every well-formed response can be listed (100 numbers, 3 endings), so the policy's shares are sums of exact
probabilities, not estimates.
"""

import argparse
import functools
import re
import sys
from pathlib import Path

import torch
from matplotlib.figure import Figure
from tokenizers import Regex, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend
from tqdm import tqdm

from command import exit_code
from data import Tokenizer, pad_responses, read_json, read_pairs, remove, whole, write_figure, write_json, write_lines
from model import KVCache, ModelConfig, Transformer, initialize
from prefmodel import PreferenceModel, train_preference_model
from sppo import sequence_logps
from stages import round_policies
from toy.games import cycle, exploitability, nash
from toy.lab import BLUE, GREEN, ORANGE, triangle

ENDINGS = ".!?"
STRENGTHS = (0.9, 0.9, 0.8)  # `.` beats `!`, `!` beats `?`, `?` beats `.`
QUALITY = 0.95  # right beats wrong, wrong beats malformed
SUMS = {f"{a}+{b}=": a + b for a in range(10) for b in range(10)}
NUMBERS = [str(n) for n in range(100)]
CLASSES = [f"{kind}{ending}" for kind in ("right", "wrong") for ending in ENDINGS] + ["malformed"]
MAX_NEW_TOKENS = 4  # two digits, an ending, the stop token

# ------------------------------------------------------------------------------------------------ the rules


def classify(prompt, response):
    """Index into CLASSES of a response text. ValueError for a prompt of another world."""
    if prompt not in SUMS:
        raise ValueError(f"prompt {prompt[:40]!r} is not of the small world, expected a sum of two digits like '3+4='")
    match = re.fullmatch(r"(0|[1-9]\d?)([.!?])", response)
    if match is None:
        return len(CLASSES) - 1
    return 3 * (int(match[1]) != SUMS[prompt]) + ENDINGS.index(match[2])


@functools.cache
def payoff(strengths=STRENGTHS):
    """(7, 7) P(class i beats class j) under the oracle."""
    quality = torch.tensor([0, 0, 0, 1, 1, 1, 2])  # 0 is best
    table = 0.5 + (QUALITY - 0.5) * torch.sign(quality - quality[:, None]).double()
    table[:3, :3] = table[3:6, 3:6] = cycle(strengths)
    table[6, 6] = 0.5
    return table


def oracle(prompt, responses, strengths=STRENGTHS, longer=0.0):
    """The judge of last resort, as a rule: `--judge toy.text_game:oracle`. Biased: `longer` logits for the longer response."""
    classes = [classify(prompt, response) for response in responses]
    return favour_longer(payoff(tuple(strengths))[classes][:, classes], responses, longer)


def favour_longer(table, responses, logits):
    """(K, K) preferences with so many logits more for the longer response of each pair."""
    size = torch.tensor([len(response) for response in responses])
    return torch.sigmoid(torch.logit(table) + logits * torch.sign(size[:, None] - size)) if logits else table


# ------------------------------------------------------------------------------------------------ building it


def write_tokenizer(folder):
    """One token a character, in Hugging Face layout."""
    vocabulary = {token: i for i, token in enumerate(["<unk>", "<s>", "</s>", *"0123456789+=", *ENDINGS])}
    backend = Backend(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    backend.decoder = decoders.Fuse()
    backend.save(str(folder / "tokenizer.json"))
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "tokenizer_class": "PreTrainedTokenizerFast"}
    write_json(folder / "tokenizer_config.json", special)


def model_config(layers=2, width=64):
    return ModelConfig(
        vocab_size=18, hidden_size=width, intermediate_size=3 * width, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, head_dim=width // 4, max_position_embeddings=32, tie_word_embeddings=True,
    )  # fmt: skip


def draw_response(prompt, right, endings, malformed, generator):
    """A random response text: right with this probability, endings with these shares, malformed with that one."""
    chance = torch.rand(3, generator=generator)
    ending = ENDINGS[torch.multinomial(torch.tensor(endings), 1, generator=generator)]
    wrong = int(torch.randint(18, (1,), generator=generator))
    number = SUMS[prompt] if chance[0] < right else wrong + (wrong >= SUMS[prompt])
    if chance[1] < malformed:
        return [str(number), ending, ending + str(number), str(number) + 2 * ending][int(4 * chance[2])]
    return f"{number}{ending}"


def train_base(model, tokenizer, steps, batch, generator):
    """Supervised training on responses that are right 70 % of the time and end in `.` 70 % of the time."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    prompts = list(SUMS)
    pool = [(p, draw_response(p, 0.7, (0.7, 0.15, 0.15), 0.03, generator)) for p in prompts for _ in range(200)]
    ids = [(tokenizer.prompt_ids(p, "plain"), tokenizer.encode(r) + [tokenizer.eos]) for p, r in pool]
    for step in tqdm(range(steps), desc="base policy", unit="step"):
        chosen = torch.randint(len(ids), (batch,), generator=generator).tolist()
        tokens, mask = pad_responses(*zip(*[ids[i] for i in chosen]))
        loss = -sequence_logps(model(tokens), tokens, mask).mean()
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * (1 - step / steps)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def draw_pairs(count, strengths, generator):
    """Judged pairs: two responses of many kinds, and a coin flipped once with the oracle's probability."""
    prompts, pairs = list(SUMS), []
    for _ in tqdm(range(count), desc="judged pairs", unit="pair"):
        prompt = prompts[int(torch.randint(len(prompts), (1,), generator=generator))]
        first, second = (draw_response(prompt, 0.7, (1 / 3, 1 / 3, 1 / 3), 0.1, generator) for _ in range(2))
        probability = oracle(prompt, [first, second], strengths)[0, 1]
        if torch.rand(1, generator=generator) >= probability:
            first, second = second, first
        pairs.append({"prompt": prompt, "chosen": first, "rejected": second})
    return pairs


def build(world, seed=0, strengths=STRENGTHS, pairs=40_000):
    """Write the world's folders: policy/, judge/, prompts.jsonl, pairs.jsonl, world.json; the last one when all is there."""
    world, generator = Path(world), torch.Generator().manual_seed(seed)
    if (world / "world.json").exists():
        raise FileExistsError(f"{world}: a world is there already; choose another folder, or delete it")
    for name in ("policy", "judge"):  # of a build that was stopped
        remove(world / name)
    write_lines(world / "prompts.jsonl", [{"prompt": prompt} for prompt in SUMS])
    model = initialize(Transformer(model_config()), generator)
    with whole(world / "policy") as folder:
        folder.mkdir()
        write_tokenizer(folder)
        train_base(model, Tokenizer(folder), 600, 256, generator)
        model.write_pretrained(folder)
    write_lines(world / "pairs.jsonl", draw_pairs(pairs, strengths, generator))
    judged = read_pairs(world / "pairs.jsonl")
    judge = PreferenceModel.from_backbone(world / "policy", generator, scalar=True, cyclic=4, template="plain")
    with tqdm(total=4 * len(judged), unit="pair", desc="learned judge") as progress:
        train_preference_model(judge, judged, epochs=4, lr=1e-3, batch=250, generator=generator, progress=progress)
    judge.save_pretrained(world / "judge")
    write_json(world / "world.json", {"seed": seed, "strengths": list(strengths), "quality": QUALITY})


def build_debugging(world):
    """A world for the debugger, in a second: one layer, trained just enough to write a number and an ending; two prompts."""
    world, generator = Path(world), torch.Generator().manual_seed(0)
    model = initialize(Transformer(model_config(layers=1, width=16)), generator)
    with whole(world / "policy") as folder:
        folder.mkdir()
        write_tokenizer(folder)
        train_base(model, Tokenizer(folder), 150, 64, generator)
        model.write_pretrained(folder)
    write_lines(world / "prompts.jsonl", [{"prompt": "3+4="}, {"prompt": "5+9="}])
    write_json(world / "world.json", {"seed": 0, "strengths": list(STRENGTHS), "quality": QUALITY})


# ------------------------------------------------------------------------------------------------ measuring


@torch.no_grad()
def class_shares(model, tokenizer):
    """(100 prompts, 7 classes) exact probabilities that the policy's response falls into each class, float64.

    A response that contains <unk> or <s> counts as malformed, though it decodes to the text without it.
    """
    prompts = torch.tensor([tokenizer.prompt_ids(prompt, "plain") for prompt in SUMS])  # all equally long
    responses = [(*tokenizer.encode(number + ending), tokenizer.eos) for number in NUMBERS for ending in ENDINGS]
    parts = [probabilities(model, some, responses) for some in prompts.split(25)]  # whose caches stay small
    probability = torch.cat(parts).view(len(SUMS), len(NUMBERS), len(ENDINGS))
    right = probability[range(len(SUMS)), list(SUMS.values())]
    wrong = probability.sum(1) - right
    malformed = (1 - right.sum(1) - wrong.sum(1)).clamp(min=0)
    return torch.cat([right, wrong, malformed[:, None]], dim=1)


def probabilities(model, prompts, responses):
    """(n, T) prompts and R responses, tuples of tokens -> (n, R), float64. A beginning that responses share is run once."""
    n, longest = len(prompts), max(map(len, responses))
    cache = KVCache(model.config, n, prompts.shape[1] + longest - 1, prompts.device, torch.float32)
    following = model.head(model.model(prompts, cache)[:, -1]).double().softmax(-1)  # (n, V)
    beginnings, joint = [()], {(): following}  # joint: of a beginning and each next token
    for length in range(1, longest):
        longer = sorted({response[:length] for response in responses if len(response) > length})
        parent = torch.tensor([beginnings.index(beginning[:-1]) for beginning in longer])
        cache.keep((parent[:, None] * n + torch.arange(n)).flatten())  # the rows of one beginning are neighbours
        token = torch.tensor([beginning[-1] for beginning in longer]).repeat_interleave(n)[:, None]
        following = model.head(model.model(token, cache)[:, -1]).double().softmax(-1).view(len(longer), n, -1)
        joint |= {b: joint[b[:-1]][:, b[-1], None] * row for b, row in zip(longer, following)}
        beginnings = longer
    return torch.stack([joint[response[:-1]][:, response[-1]] for response in responses], dim=1)


def describe(shares, table):
    """One policy's numbers. `right` and `malformed` are shares of all responses, `endings` of the well-formed ones.

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


def measure(world, run):
    """RUN/measure.json and measure.png: base policy, every round's policy, the last, and the rounds' average.

    The average is the theorem's: a mixture that draws a round, then a response of its policy, so its shares are
    the means of the rounds' shares. The base policy is not part of it.
    """
    world, run = Path(world), Path(run)
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
    return result


def print_table(result):
    print(f"{'':14}{'right':>8}{'.':>8}{'!':>8}{'?':>8}{'malformed':>12}{'exploitability':>17}")
    for name in ("base", "last", "average"):
        row = result[name]
        shares = "".join(f"{share:8.3f}" for share in row["endings"])
        print(f"{name:14}{row['right']:8.3f}{shares}{row['malformed']:12.4f}{row['exploitability']:17.4f}")
    print(f"{'equilibrium':14}{1:8.3f}{''.join(f'{share:8.3f}' for share in result['equilibrium'])}{0:12.4f}{0:17.4f}")


def draw(result, path):
    """Left: the path of the endings on their triangle. Right: exploitability by round, and the share of right answers."""
    def endings(rows):
        return point([row["endings"] for row in rows])

    figure = Figure(figsize=(11, 4.6), layout="constrained")
    simplex, curve = figure.subplots(1, 2)
    point = triangle(simplex, [f"all “{ending}”" for ending in ENDINGS])
    start = [result["base"]]
    simplex.plot(*endings(start + result["rounds"]), ".-", color=ORANGE, linewidth=0.8, label="policy of each round")
    simplex.plot(*endings(result["averages"]), ".-", color=BLUE, label="average of the rounds so far")
    simplex.plot(*endings(start), "o", color="black", label="base policy")
    simplex.plot(*point(result["equilibrium"]), "*", color=GREEN, markersize=15, label="Nash equilibrium")
    simplex.set_title("Endings of the responses (shares)", pad=14)
    simplex.legend(frameon=False, loc="upper left", bbox_to_anchor=(-0.06, 1), fontsize=8)

    rounds = range(len(result["rounds"]) + 1)
    curve.plot(rounds, [row["exploitability"] for row in start + result["rounds"]], color=ORANGE, label="policy of each round")
    average = [row["exploitability"] for row in result["averages"]]
    curve.plot(rounds[1:], average, color=BLUE, label="average of the rounds so far")
    curve.plot(rounds, [1 - row["right"] for row in start + result["rounds"]], ":", color=GREEN, label="wrong answers (share)")
    curve.set(xlabel="round", ylabel="exploitability (win rate above ½)", title="Exact exploitability", ylim=(0, None))
    curve.legend(frameon=False)
    write_figure(path, figure)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("build", help="write the world")
    command.add_argument("world")
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--strengths", type=float, nargs=3, default=STRENGTHS, help=". beats !, ! beats ?, ? beats . [.9 .9 .8]")
    command.add_argument("--pairs", type=int, default=40_000, help="judged pairs that the learned judge sees [40000]")
    command = commands.add_parser("measure", help="measure a run exactly")
    command.add_argument("world")
    command.add_argument("run")
    args = parser.parse_args()

    def work():
        if args.command == "build":
            build(args.world, args.seed, args.strengths, args.pairs)
        else:
            print_table(measure(args.world, args.run))

    return exit_code("toy.text_game", work)


if __name__ == "__main__":
    sys.exit(main())
