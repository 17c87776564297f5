"""What else a policy can do, before and after: does obeying cost it language, or arithmetic?

    python -m real.ability --base out/smollm2 --run out/smollm2-instructions --out ability.json

Two measures that no preference here speaks of. The perplexity of a neutral text: exp of the mean
negative log-likelihood a token, of TEXT below, which was written for this file. And a hundred sums
of two two-digit numbers, asked as a chat and answered greedily: the share in which the first number
after any repetition of the question is the sum.

The run's average policy is the uniform mixture of its rounds' policies: its likelihood is the mean
of theirs, of the whole text, and its share of right sums is the mean of theirs.
"""

import argparse
import math
import re
import sys

import torch
from torch import Tensor

from data import Tokenizer
from engine.command import Parser, exit_code
from engine.files import require_empty, write_json
from engine.run_folder import round_policies
from generate import generate
from model import Transformer
from real.measurement import interval
from sppo import sequence_logps

SUMS = 100
NEW_TOKENS = 48

TEXT = """
The ferry left the eastern quay at twenty past six, ten minutes late, because a lorry with \
timber had to be turned on the ramp. Nobody complained. In the saloon the regular passengers had \
already taken their usual places: the two teachers by the window, the postman with his \
crossword, a girl who was learning lines for a play and moved her lips as she read. The crossing \
takes fifty minutes in calm weather. On the north side one sees first the chimney of the old \
cannery, then the church, which is white and stands too close to the water, and at last the row \
of boathouses under the hill.

The island has been inhabited for at least nine hundred years. Its people fished, kept sheep and \
cut peat, and when the herring failed they left, a few families at a time. The census of 1881 \
counted four hundred and twelve persons; that of 1951, seventy. Since the causeway between the \
two southern skerries was built the number has risen again a little, and the school, which had \
been closed for a generation, now has eleven pupils and a leaking roof.

What the visitor notices is the wind. It bends the few trees towards the south-east and fills \
every conversation held out of doors with pauses. Hens are kept behind walls. The washing lines \
are made of fencing wire, and a pair of trousers once travelled, according to the shopkeeper, as \
far as the lighthouse. He tells the story with some pride, leaning on the freezer, and adds that \
they came back dry.

Water is the other difficulty. There are two small lakes, both brown, and a spring beside the \
road that has never been known to fail, though in the summer of 1976 it ran no thicker than a \
pencil. The council has drilled three times. The first hole gave salt water, the second gave \
none, and the third, which everybody had advised against, turned out to be so good that a brewery \
on the mainland asked for the analysis. Nothing came of it. The brewery was sold, the letter was \
framed, and it hangs today in the passage of the community hall, between a map of the drains and \
a photograph of the lifeboat crew.
"""


@torch.no_grad()
def text_logp(policy: Transformer, tokens: list[int]) -> float:
    """log π(text), in nats, without its first token."""
    row = torch.tensor([tokens])
    return sequence_logps(policy(row), row, torch.ones_like(row, dtype=torch.bool)).item()


def sums() -> list[tuple[int, int]]:
    """The same hundred pairs of numbers from 10 to 99, always."""
    generator = torch.Generator().manual_seed(0)
    return [tuple(pair) for pair in torch.randint(10, 100, (SUMS, 2), generator=generator).tolist()]


def is_right(answer: str, a: int, b: int) -> bool:
    """Whether an answer gives a + b: its first number, once "a + b =" has been taken away."""
    repeated = rf"{a}\s*(?:\+|and|plus)\s*{b}"
    found = re.findall(r"\d+", re.sub(repeated, "", answer.replace(",", "")))
    return bool(found) and int(found[0]) == a + b


def right_sums(policy: Transformer, tokenizer: Tokenizer) -> list[bool]:
    asked = [f"What is {a} + {b}?" for a, b in sums()]
    prompts = [tokenizer.prompt_ids(text, "chat") for text in asked]
    answers = generate(policy, prompts, 1, NEW_TOKENS, tokenizer.stop, temperature=0)

    texts = [
        tokenizer.response_text(prompt, answer, "chat")
        for prompt, (answer,) in zip(prompts, answers)
    ]
    return [is_right(text, *pair) for text, pair in zip(texts, sums(), strict=True)]


def row(logp: float, right: Tensor, tokens: int) -> dict:
    """One policy's numbers: of the text, and of the sums with a 95 % bootstrap interval."""
    return {
        "nats_per_token": -logp / tokens,
        "perplexity": math.exp(-logp / tokens),
        "sums": right.mean().item(),
        "sums_interval": interval(right),
    }


def measure(args: argparse.Namespace) -> None:
    """Base, every round, their average: printed, and written as JSON."""
    require_empty(args.out)
    tokenizer = Tokenizer(args.base)
    tokens = tokenizer.encode(TEXT.strip())
    folders = {"base": args.base}
    folders |= {folder.parent.name: folder for folder in round_policies(args.run)}
    if len(folders) == 1:
        raise FileNotFoundError(f"--run {args.run}: no round-NN/policy there")

    logps, right = [], []
    for name, folder in folders.items():
        policy = Transformer.from_pretrained(folder, "float32")
        logps.append(text_logp(policy, tokens))
        right.append(torch.tensor(right_sums(policy, tokenizer), dtype=torch.float64))
        show(name, row(logps[-1], right[-1], len(tokens) - 1))

    rows = zip(folders, logps, right)
    result = {name: row(logp, sums, len(tokens) - 1) for name, logp, sums in rows}
    rounds = torch.tensor(logps[1:], dtype=torch.float64)
    mixed = rounds.logsumexp(0).item() - math.log(len(rounds))
    result["average"] = row(mixed, torch.stack(right[1:]).mean(0), len(tokens) - 1)
    show("average", result["average"])
    write_json(args.out, {"tokens": len(tokens), "policies": result})


def show(name: str, numbers: dict) -> None:
    low, high = numbers["sums_interval"]
    text = f"perplexity {numbers['perplexity']:7.2f}"
    print(f"{name:10} {text}   sums {numbers['sums']:.2f} ({low:.2f} to {high:.2f})", flush=True)


def main(arguments: list[str] | None = None) -> int:
    parser = Parser(description=__doc__)
    parser.add_argument("--base", required=True, help="checkpoint folder that the run began with")
    parser.add_argument("--run", required=True, help="folder of the run")
    parser.add_argument("--out", required=True, help="JSON to write, a new file")
    args = parser.parse_args(arguments)
    inputs = (args.base, args.run)
    return exit_code("real.ability", lambda: measure(args), out=args.out, inputs=inputs)


if __name__ == "__main__":
    sys.exit(main())
