"""SPPO on a pretrained language model: a small writer of English stories, and a rule with a circle in it as the judge.

The judge sorts texts into categories: a theme (animals, food, play), none, or malformed. Animals beat food, food beats
play, play beats animals; any theme beats none, all of them beat malformed; texts of one category tie. So no text is the
best, and the equilibrium is a third of each theme. The loop is train.py's; only prompts, judge and measurement stand here.

    python -m toy.stories --policy ../shared/data/stories260K

Measured on fresh samples from the policy of every round:
  shares           of the five categories, pooled over prompts
  win rate         against the base policy, mean over prompts; ½ is a tie
  exploitability   max_c P(c beats a text of the policy) - ½ over categories c: what a challenger gains who commits to
                   one category. Read off the pooled shares, it has hardly any of the upward bias of estimating a best reply
                   for each prompt from few samples; a challenger who could choose prompt by prompt would gain more.
  log-likelihood   of the samples under the base policy, nats a token: falls when they stop being the English it knows
The *average* is the uniform mixture of the rounds' policies (without the base policy): draw a round, then its text.
"""

import argparse
import re
import sys
import time
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch.nn.functional import one_hot
from tqdm import tqdm

from command import exit_code
from data import Tokenizer, pad_responses, write_figure, write_json, write_lines
from model import Transformer, generate
from sppo import sequence_logps
from toy.games import cycle, exploitability
from train import TrainConfig, policy_folder, run

HEROES = {"girl": ("Lily", "Mia", "Sue", "Anna"), "boy": ("Tim", "Ben", "Max", "Tom")}
BEGINNINGS = ("{} loved to", "{} wanted a", "One day, {} saw a", "One day, {} found a", "One day, mom made {}")
PROMPTS = [
    f"Once upon a time, there was a little {kind} named {name}. {beginning.format(name)}"
    for kind, names in HEROES.items() for name in names for beginning in BEGINNINGS
]  # fmt: skip
MAX_NEW_TOKENS = 40

THEMES = {  # each beats the next, the last beats the first
    "animals": "animal bear bird bug bunny butterfly cat cow dog duck fish frog horse kitten lion mouse pet puppy rabbit "
    "squirrel turtle",
    "food": "apple ate banana bread cake candy carrot cheese cook cookie delicious dinner eat egg food fruit hungry juice "
    "lunch meal milk pie pizza sandwich snack soup sweet tasty yummy",
    "play": "ball balloon bike block boat car doll game kite puzzle slide swing toy train truck",
}
THEME_OF = {word: theme for theme, words in THEMES.items() for word in words.split()}
CATEGORIES = [*THEMES, "none", "malformed"]

# ------------------------------------------------------------------------------------------------ the rule


def classify(text):
    """Index into CATEGORIES. The theme is that of the first theme word, singular or plural.

    Malformed: an undecodable byte, fewer than five words, or more than two in five words that were said before.
    """
    words = re.findall(r"[a-z]+", text.lower())
    if "\ufffd" in text or len(words) < 5 or len(set(words)) < 0.6 * len(words):
        return CATEGORIES.index("malformed")
    themes = (THEME_OF.get(word) or THEME_OF.get(word.removesuffix("s")) for word in words)
    return CATEGORIES.index(next(filter(None, themes), "none"))


def payoff():
    """(5, 5) P(category i beats category j), float64."""
    level = torch.tensor([0, 0, 0, 1, 2])  # 0 is best
    table = ((level - level[:, None]).sign().double() + 1) / 2
    table[:3, :3] = cycle((1, 1, 1))
    return table


def rule(prompt, responses):
    """The judge: `--judge toy.stories:rule`."""
    categories = [classify(response) for response in responses]
    return payoff()[categories][:, categories]


def settings(args):
    """The theory's setting, as in the small world: all K samples are trained on, and every round sees every prompt."""
    return TrainConfig(
        policy=args.policy, judge="toy.stories:rule", prompts=str(Path(args.out) / "story-prompts.jsonl"), out=args.out,
        rounds=args.rounds, samples=args.samples, eta=args.eta, lr=args.lr, seed=args.seed,
        reuse_prompts=True, select="all", epochs=3, batch=8, micro_batch=8, warmup=0.0, optimizer="adamw",
        max_new_tokens=MAX_NEW_TOKENS, template="plain", pool=1024,
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------ measuring


@torch.no_grad()
def log_likelihood(policy, prompts, responses):
    """Mean log-probability of a response token, in nats. N prompts, N lists of K responses, as token ids."""
    total, count = 0.0, 0
    for ids, row in zip(prompts, responses, strict=True):
        tokens, mask = pad_responses([ids] * len(row), row)
        total += sequence_logps(policy(tokens), tokens, mask).sum().item()
        count += mask.sum().item()
    return total / count


def describe(shares, base_shares, likelihood):
    """The numbers of one policy from its shares (N, 5) of the categories by prompt, and those of the base policy."""
    return {
        "shares": dict(zip(CATEGORIES, shares.mean(0).tolist())),
        "win_rate": (shares @ payoff() * base_shares).sum(-1).mean().item(),
        "exploitability": exploitability(payoff(), shares.mean(0)).item(),
        "log_likelihood": likelihood.item(),
    }


def measure(config, tokenizer):
    """Numbers of the base policy, of each round's policy and of the average of the rounds so far; and a few texts."""
    prompts = [tokenizer.prompt_ids(prompt, "plain") for prompt in PROMPTS]
    base, generator = Transformer.from_pretrained(config.policy), torch.Generator().manual_seed(config.seed)
    texts, shares, likelihoods = [], [], []
    for number in tqdm(range(1, config.rounds + 2), desc="measure", unit="policy", leave=False):
        policy = Transformer.from_pretrained(policy_folder(config, number))
        rows = generate(policy, prompts, config.samples, MAX_NEW_TOKENS, tokenizer.eos, generator=generator, rows=config.pool)
        texts.append([[tokenizer.response_text(ids, y, "plain") for y in row] for ids, row in zip(prompts, rows)])
        categories = torch.tensor([[classify(text) for text in row] for row in texts[-1]])  # (N, K)
        shares.append(one_hot(categories, len(CATEGORIES)).double().mean(1))
        likelihoods.append(log_likelihood(base, prompts, rows))
    shares, likelihoods = torch.stack(shares), torch.tensor(likelihoods)  # (1 + T, N, 5), (1 + T,)
    count = torch.arange(1, len(shares))
    averages = zip(shares[1:].cumsum(0) / count[:, None, None], likelihoods[1:].cumsum(0) / count)
    return {
        "base": describe(shares[0], shares[0], likelihoods[0]),
        "rounds": [describe(share, shares[0], likelihood) for share, likelihood in zip(shares[1:], likelihoods[1:])],
        "averages": [describe(share, shares[0], likelihood) for share, likelihood in averages],
        "texts": {"prompt": PROMPTS[0], "base": texts[0][0][:3], "last": texts[-1][0][:3]},
    }


# ------------------------------------------------------------------------------------------------ showing


def print_result(result):
    for name in ("base", "last"):
        print(f"\n{result['texts']['prompt']} ... ({name} policy)")
        for text in result["texts"][name]:
            print("   ...", " ".join(text.split()))
    print(f"\n{'':8}" + "".join(f"{name:>11}" for name in (*CATEGORIES, "win rate")) + "  exploitability  log-likelihood")
    for name, row in {"base": result["base"], "last": result["rounds"][-1], "average": result["averages"][-1]}.items():
        numbers = "".join(f"{number:11.3f}" for number in (*row["shares"].values(), row["win_rate"]))
        print(f"{name:8}{numbers}{row['exploitability']:16.3f}{row['log_likelihood']:16.3f}")


def draw(result, path):
    """Left: shares of the categories by round. Right: exploitability of each round's policy and of the average so far."""
    blue, orange, green, pink, grey = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#777777"
    policies = [result["base"], *result["rounds"]]
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for category, colour, marker in zip(CATEGORIES, (blue, orange, green, pink, grey), "os^Dx"):
        left.plot([row["shares"][category] for row in policies], marker=marker, color=colour, markersize=4, label=category)
    left.set(xlabel="round (0: base policy)", ylabel="share of texts", title="What the policy writes", ylim=(-0.03, 1.12))
    left.legend(frameon=False, loc="upper center", ncols=5, columnspacing=1, handlelength=1.5, fontsize=9)
    right.plot([row["exploitability"] for row in policies], "s-", color=orange, markersize=4, label="policy of each round")
    averages = [row["exploitability"] for row in result["averages"]]
    right.plot(range(1, len(policies)), averages, "o-", color=blue, markersize=4, label="average of the rounds so far")
    right.set(xlabel="round (0: base policy)", ylabel="exploitability (win rate above ½)", title="What a challenger gains")
    right.set_ylim(0, 0.6)
    right.legend(frameon=False, loc="upper left", fontsize=9)
    write_figure(path, figure)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", required=True, help="checkpoint folder of the base policy, Hugging Face layout")
    parser.add_argument("--out", default="out/stories", help="run folder [%(default)s]")
    parser.add_argument("--rounds", type=int, default=14, help="rounds of SPPO [%(default)s]")
    parser.add_argument("--samples", type=int, default=16, help="responses per prompt, trained on and measured [%(default)s]")
    parser.add_argument("--eta", type=float, default=15.0, help="nats of log-ratio per unit of win rate [%(default)s]")
    parser.add_argument("--lr", type=float, default=1e-4, help="of a round's first step, falls to zero [%(default)s]")
    parser.add_argument("--seed", type=int, default=0, help="of everything random [%(default)s]")
    args, start = parser.parse_args(), time.monotonic()

    def work():
        tokenizer, config, out = Tokenizer(args.policy), settings(args), Path(args.out)
        write_lines(out / "story-prompts.jsonl", [{"prompt": prompt} for prompt in PROMPTS])
        run(config)
        result = measure(config, tokenizer)
        write_json(out / "stories.json", result)
        draw(result, out / "stories.png")
        print_result(result)
        print(f"\n{out / 'stories.json'}, {out / 'stories.png'}: {time.monotonic() - start:.0f} s")

    return exit_code("toy.stories", work)


if __name__ == "__main__":
    sys.exit(main())
