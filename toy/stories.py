"""SPPO on a pretrained language model: a small writer of stories, judged by a rule with a circle.

The judge sorts texts into categories: a theme (animals, food, play), none, or malformed. Animals
beat food, food beats play, play beats animals; any theme beats none, all of them beat malformed;
texts of one category tie. So no text is the best, and the equilibrium is a third of each theme.
The loop is train.py's; only prompts, judge and measurement stand here.

    python -m toy.stories --policy DIR

DIR is a checkpoint in Hugging Face layout (config.json, safetensors, tokenizer.json) of a Llama or
Mistral model that continues simple English stories, for instance one trained on TinyStories. A
quarter of a million parameters suffice: that is the size the defaults are for.

Measured on fresh samples from the policy of every round:
  shares           of the five categories, pooled over prompts
  win rate         against the base policy, mean over prompts; ½ is a tie
  exploitability   max_c P(c beats a text of the policy) - ½ over categories c: what a challenger
                   gains who commits to one category. Read off the pooled shares, it has hardly any
                   of the upward bias of estimating a best reply for each prompt from few samples;
                   a challenger who could choose prompt by prompt would gain more.
  log-likelihood   of the samples under the base policy, in nats a token: falls when they stop
                   being the English it knows
The *average* is the uniform mixture of the rounds' policies (without the base policy): draw a
round, then its text.
"""

import argparse
import re
import sys
import textwrap
import time
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from data import Tokenizer
from engine.command import Parser, exit_code
from engine.figures import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PINK,
    label_ends,
    new_figure,
    whole_ticks,
    write_figure,
)
from engine.files import write_json, write_lines
from engine.progress import tqdm
from engine.run_folder import policy_folder
from generate import generate, response_logps
from model import Transformer
from toy.games import cycle, exploitability
from train import TrainConfig, run

HEROES = {"girl": ("Lily", "Mia", "Sue", "Anna"), "boy": ("Tim", "Ben", "Max", "Tom")}
BEGINNINGS = (
    "{} loved to",
    "{} wanted a",
    "One day, {} saw a",
    "One day, {} found a",
    "One day, mom made {}",
)
PROMPTS = [
    f"Once upon a time, there was a little {kind} named {name}. {beginning.format(name)}"
    for kind, names in HEROES.items() for name in names for beginning in BEGINNINGS
]  # fmt: skip
MAX_NEW_TOKENS = 40

THEMES = {  # each beats the next, the last beats the first
    "animals": "animal bear bird bug bunny butterfly cat cow dog duck fish frog horse kitten lion "
    "mouse pet puppy rabbit squirrel turtle",
    "food": "apple ate banana bread cake candy carrot cheese cook cookie delicious dinner eat egg "
    "food fruit hungry juice lunch meal milk pie pizza sandwich snack soup sweet tasty yummy",
    "play": "ball balloon bike block boat car doll game kite puzzle slide swing toy train truck",
}
THEME_OF = {word: theme for theme, words in THEMES.items() for word in words.split()}
CATEGORIES = [*THEMES, "none", "malformed"]

# ------------------------------------------------------------------------ the rule


def classify(text: str) -> int:
    """Index into CATEGORIES. The theme is that of the first theme word, singular or plural.

    Malformed: an undecodable byte, fewer than five words, or more than two in five words that were
    said before.
    """
    words = re.findall(r"[a-z]+", text.lower())
    if "\ufffd" in text or len(words) < 5 or len(set(words)) < 0.6 * len(words):
        return CATEGORIES.index("malformed")

    # One word decides, so that a text gains nothing by naming all three themes.
    for word in words:
        theme = THEME_OF.get(word) or THEME_OF.get(word.removesuffix("s"))
        if theme:
            return CATEGORIES.index(theme)
    return CATEGORIES.index("none")


def payoff() -> Tensor:
    """(5, 5) P(category i beats category j), float64."""
    level = torch.tensor([0, 0, 0, 1, 2])  # 0 is best
    table = ((level - level[:, None]).sign().double() + 1) / 2
    # The themes are of one level: among them it is the circle that decides.
    table[:3, :3] = cycle((1, 1, 1))
    return table


def rule(prompt: str, responses: list[str]) -> Tensor:
    """The judge: `--judge toy.stories:rule`."""
    categories = [classify(response) for response in responses]
    return payoff()[categories][:, categories]


def prompt_file(out: str) -> Path:
    return Path(out) / "story-prompts.jsonl"


def settings(args: argparse.Namespace) -> TrainConfig:
    """The theory's setting, as in the small world: trains on all K samples, reuses all prompts."""
    return TrainConfig(
        policy=args.policy, judge="toy.stories:rule", prompts=str(prompt_file(args.out)),
        out=args.out, rounds=args.rounds, samples=args.samples, eta=args.eta, lr=args.lr,
        seed=args.seed, reuse_prompts=True, select="all", epochs=3, batch=8, micro_batch=8,
        warmup=0.0, optimizer="adamw", max_new_tokens=MAX_NEW_TOKENS, template="plain", pool=1024,
    )  # fmt: skip


# ------------------------------------------------------------------------ measuring


@torch.no_grad()
def log_likelihood(policy: Transformer, prompts: list, responses: list) -> float:
    """Mean log-probability of a response token, in nats.

    Takes N prompts and N lists of K responses, as token ids.
    """
    # Pooled over all tokens, so a long response weighs more than a short one.
    total = 0.0
    count = 0
    for ids, row in zip(prompts, responses, strict=True):
        total += response_logps(policy, [ids], [row]).sum().item()
        count += sum(map(len, row))
    return total / count


def category_shares(texts: list[list[str]]) -> Tensor:
    """N lists of K texts -> (N, 5) share of each category among a prompt's texts, float64."""
    categories = torch.tensor([[classify(text) for text in row] for row in texts])  # (N, K)
    return one_hot(categories, len(CATEGORIES)).double().mean(1)


def describe(shares: Tensor, base_shares: Tensor, likelihood: Tensor) -> dict:
    """The numbers of one policy, from shares (N, 5): its own and those of the base policy."""
    # Two policies meet prompt by prompt; a challenger's one category meets the pooled shares.
    table = payoff()
    return {
        "shares": dict(zip(CATEGORIES, shares.mean(0).tolist())),
        "win_rate": (shares @ table * base_shares).sum(-1).mean().item(),
        "exploitability": exploitability(table, shares.mean(0)).item(),
        "log_likelihood": likelihood.item(),
    }


def sample_policies(config: TrainConfig, tokenizer: Tokenizer) -> tuple[list, Tensor, Tensor]:
    """Fresh samples of the base policy and of the policy of each of T rounds.

    Returns their texts, 1 + T times N lists of K; shares of the categories (1 + T, N, 5); and mean
    log-likelihoods under the base policy (1 + T,).
    """
    prompts = [tokenizer.prompt_ids(prompt, "plain") for prompt in PROMPTS]
    base = Transformer.from_pretrained(config.policy)
    generator = torch.Generator().manual_seed(config.seed)

    texts = []
    likelihoods = []
    for number in tqdm(range(1, config.rounds + 2), desc="measure", unit="policy", leave=False):
        # Policy t is the one that round t starts from: the first is the base policy.
        policy = Transformer.from_pretrained(policy_folder(config, number))
        responses = generate(
            policy, prompts, config.samples, MAX_NEW_TOKENS, tokenizer.stop, generator=generator,
            rows=config.pool,
        )  # fmt: skip

        likelihoods.append(log_likelihood(base, prompts, responses))
        texts.append(
            [
                [tokenizer.response_text(ids, response, "plain") for response in row]
                for ids, row in zip(prompts, responses)
            ]
        )
    shares = torch.stack([category_shares(rows) for rows in texts])
    return texts, shares, torch.tensor(likelihoods)


def measure(config: TrainConfig, tokenizer: Tokenizer) -> dict:
    """Numbers of the base policy, each round's policy and the average so far; and a few texts."""
    texts, shares, likelihoods = sample_policies(config, tokenizer)
    base = shares[0]
    rounds = zip(shares[1:], likelihoods[1:])

    # A mixture's shares and likelihoods are the means of its members'.
    count = torch.arange(1, len(shares))
    mean_shares = shares[1:].cumsum(0) / count[:, None, None]
    mean_likelihoods = likelihoods[1:].cumsum(0) / count
    averages = zip(mean_shares, mean_likelihoods)
    return {
        "base": describe(base, base, likelihoods[0]),
        "rounds": [describe(share, base, likelihood) for share, likelihood in rounds],
        "averages": [describe(share, base, likelihood) for share, likelihood in averages],
        "texts": {"prompt": PROMPTS[0], "base": texts[0][0][:3], "last": texts[-1][0][:3]},
    }


# ------------------------------------------------------------------------ showing


def print_result(result: dict) -> None:
    for name in ("base", "last"):
        print(f"\n{result['texts']['prompt']} ... ({name} policy)")
        for text in result["texts"][name]:
            shown = " ".join(text.split())
            print(textwrap.fill(shown, 100, initial_indent="   ... ", subsequent_indent="       "))

    titles = "".join(f"{name:>10}" for name in (*CATEGORIES, "win rate"))
    print(f"\n{'':8}{titles}  exploitability  log-likelihood")
    last = result["rounds"][-1]
    average = result["averages"][-1]
    for name, row in (("base", result["base"]), ("last", last), ("average", average)):
        shares = [*row["shares"].values(), row["win_rate"]]
        numbers = "".join(f"{number:10.3f}" for number in shares)
        print(f"{name:8}{numbers}{row['exploitability']:16.3f}{row['log_likelihood']:16.3f}")


def draw(result: dict, path: Path) -> None:
    """Left: shares of the categories by round. Right: exploitability by round."""
    figure = new_figure(12, 4.6)
    left, right = figure.subplots(1, 2)
    draw_shares(left, [result["base"], *result["rounds"]])
    draw_exploitability(right, result)
    for axes in (left, right):
        axes.set_xlabel("round (0: base policy)")
        axes.set_xlim(0, len(result["rounds"]))
        whole_ticks(axes.xaxis)
    write_figure(path, figure)


def draw_shares(axes, policies: list[dict]) -> None:
    ends = []
    for category, colour, marker in zip(CATEGORIES, (BLUE, ORANGE, GREEN, PINK, GREY), "os^Dx"):
        shares = [row["shares"][category] for row in policies]
        axes.plot(shares, marker=marker, color=colour, markersize=4, clip_on=False)
        ends.append((shares[-1], category, colour))
    axes.set(ylabel="share of texts", ylim=(0, 1))
    label_ends(axes, ends)

    # The theme of most texts, round by round, without repeating it.
    themes = [max(THEMES, key=row["shares"].get) for row in policies[1:]]
    moves = [theme for theme, before in zip(themes, [None, *themes]) if theme != before]
    axes.set_title("The leading theme: " + ", then ".join(moves), fontsize=11)


def draw_exploitability(axes, result: dict) -> None:
    last = [row["exploitability"] for row in (result["base"], *result["rounds"])]
    averages = [row["exploitability"] for row in result["averages"]]
    axes.plot(last, "s-", color=ORANGE, markersize=4, clip_on=False)
    # The average begins with round 1; round 0 is the base policy.
    numbers = range(1, len(last))
    axes.plot(numbers, averages, "o-", color=BLUE, markersize=4, clip_on=False)

    axes.set(ylabel="exploitability (win rate above ½)", ylim=(0, 0.6))
    ends = [(last[-1], "policy of\neach round", ORANGE)]
    ends += [(averages[-1], "average of the\nrounds so far", BLUE)]
    label_ends(axes, ends, gap=0.11)
    found = f"average {averages[-1]:.2f}, last policy {last[-1]:.2f}"
    axes.set_title(f"A challenger gains in the end: {found}", fontsize=11)


# ------------------------------------------------------------------------ command line


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__)

    def flag(name, default, text):
        kind = type(default)
        parser.add_argument(f"--{name}", type=kind, default=default, help=f"{text} [%(default)s]")

    base = "checkpoint folder of the base policy, Hugging Face layout"
    parser.add_argument("--policy", required=True, help=base)
    flag("out", "out/stories", "run folder")
    flag("rounds", 14, "rounds of SPPO")
    flag("samples", 16, "responses per prompt, trained on and measured")
    flag("eta", 15.0, "nats of log-ratio per unit of win rate")
    flag("lr", 1e-4, "of a round's first step, falls to zero")
    flag("seed", 0, "random seed")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    start = time.monotonic()
    args = parse_arguments(arguments)
    out = Path(args.out)

    def work():
        # The tokenizer first: without a checkpoint nothing is written.
        tokenizer = Tokenizer(args.policy)
        config = settings(args)
        write_lines(prompt_file(args.out), [{"prompt": prompt} for prompt in PROMPTS])
        run(config)

        result = measure(config, tokenizer)
        write_json(out / "stories.json", result)
        draw(result, out / "stories.png")
        print_result(result)
        seconds = time.monotonic() - start
        print(f"\n{out / 'stories.json'}, {out / 'stories.png'}: {seconds:.0f} s")

    return exit_code("toy.stories", work)


if __name__ == "__main__":
    sys.exit(main())
