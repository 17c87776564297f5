"""Which judges can learn preferences that go in circles, and where does SPPO end up with them?

    python -m toy.judges         46 s on two cores: a table, out/toy/judges.png, out/toy/judges.json

Three games whose responses are single words, and four forms of our PreferenceModel, a small
Transformer, trained on coin flips: two words at random, one flip with their true probability.
Bradley–Terry has a scalar head, GPM (2410.02197) a cyclic one of k planes, the combined model both:
1, 2k and 1 + 2k numbers a word. Beside them, without a model, the counted shares of each pair.
The learned table is compared with the true one on all pairs (`evaluate` says how); then SPPO plays
it exactly from a policy far from equilibrium, and its average policy is measured in the true game.
"Right favourites" is no measure at chance: it is 3 to 7 of 10 for any order of the five words;
`confidence`, mean P̂ of the true favourite, is ½ there.

What came out with seed 0, in brackets with seeds 1 and 2; each the mean of two draws of labels and
weights:
- Cycle of five words, 20,000 labels. Bradley–Terry: confidence 0.500 (.500, .500) where the truth
  has 0.900, whatever the number of labels. Its scores are all but equal, so SPPO stays where it
  starts, at exploitability 0.16, or follows their noise: 0.23 (.14, .16), and 0.28 (.39, .39) with
  the noise of 500 labels. With more rounds that goes on, towards a single word, 0.40.
  GPM, k = 2: mean error 0.016 (.012, .014), exploitability 0.007 (.007, .008); with the true table
  SPPO is at 0.005.
  k = 1 does not suffice, with or without a scalar: error 0.048 (.047, .047) at best, for this
  circle has rank 4, two planes. All favourites are right nevertheless, and exploitability is 0.007
  to 0.019.
- Transitive. All forms agree, and SPPO cannot tell them apart: 0.001 to 0.003 for every size.
  Bradley–Terry has the least error with 500 labels, 0.044 against 0.051 to 0.061 (.029 against .030
  to .037; .035 against .039 to .042).
- Quality × style. Bradley–Terry has an error of 0.26, and SPPO ends with one word, exploitability
  0.30 (.30, .30). A GPM with one plane spends it on style and hardly tells qualities apart: error
  0.125, exploitability 0.07 (.13, .10).
  That only the combined form gets both is true of equal k alone. A scalar r is a plane (r, 1), so
  k = 2 gets both too, with 4 numbers a word instead of 3 and a little more error: 0.106 against
  0.090 with 500 labels (.083, .069; .104, .093), 0.043 against 0.036 with 2,000, alike with 20,000.
  Both beat the shares, 0.141 and 0.068. Exploitability with 500: combined 0.08 (.03, .05), GPM 0.14
  (.05, .09), shares 0.10 (.11, .13); with 20,000 all have 0.01 to 0.03.
- With few words and many labels, counting is better than any of these trainings: 0.005 in the
  cycle.
- A training can stall where all words have nearly the same vector, and P̂ is near ½. With a cyclic
  head and 20,000 labels of the mixture 0 of 24 did with the settings below, 3 of 24 with batches of
  64 at 7e-3.
- A judge with 0.3 logits too many for the longer word moves the equilibrium of rock–paper–scissors
  from (.364, .273, .364) to (.373, .302, .325), exploitability 0.023. An ensemble with a rule that
  likes brevity, which weighs just so much that the report finds no surplus for length beyond 20,000
  votes, brings it back to 0.007 (.007, .004).
- Judging K responses takes K rows with a PreferenceModel and K(K - 1), each twice as long, with
  PairRM: 240 for K = 16, and 36 to 40 times the time.
- P + Pᵀ = 1 to 1e-7.
"""

import argparse
import functools
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory

import torch
from matplotlib.lines import Line2D
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers
from torch import Tensor

from data import Tokenizer
from engine.figures import BLUE, GREEN, GREY, ORANGE, SKY, new_figure
from engine.files import write_json
from engine.progress import tqdm
from evaluate.judge_report import length_surplus
from judges.base import Ensemble, Rule
from judges.pairrm import PairRM, PairRMConfig
from model import ModelConfig, initialize
from prefmodel import PreferenceModel, train_preference_model
from toy.games import ROCK_PAPER_SCISSORS, bradley_terry, cycle, exploitability, nash, odd_cycle
from toy.lab import script
from toy.tabular import averages, play, sppo
from toy.text_game import favour_longer

FORMS = {  # heads of a PreferenceModel, in order of the numbers that each word gets: 1, 2, 3, 4
    "Bradley–Terry": dict(scalar=True, cyclic=0),
    "GPM, k = 1": dict(scalar=False, cyclic=1),
    "combined, k = 1": dict(scalar=True, cyclic=1),
    "GPM, k = 2": dict(scalar=False, cyclic=2),
}
COUNTED = "counted shares"  # no model: of each pair, the share of its labels
SIZES = (500, 2000, 20_000)  # labels
REPEATS = 2  # draws of labels and of weights

# Each training takes so many steps, or two passes if that is more: 500 labels are seen 60 times.
STEPS = 300
BATCH = 100
LR = 5e-3

ROUNDS = 5000  # of exact play
ETA = 0.5
PROMPT = ""  # there is but one question

# ------------------------------------------------------------------------ games


def quality_and_style(levels=5, gap=0.5, strengths=ROCK_PAPER_SCISSORS) -> Tensor:
    """levels × 3 words: logits of a quality, transitive, plus those of a style, a circle.

    The equilibrium mixes the three words of the best quality.
    """
    # Word 3q + s has quality q and style s.
    quality = gap * torch.arange(levels, dtype=torch.float64).repeat_interleave(3)
    style = torch.logit(cycle(strengths)).repeat(levels, levels)
    return torch.sigmoid(quality[:, None] - quality + style)


GAMES = {
    "cycle of 5 words": odd_cycle(5, 0.9),
    "transitive, 5 words": bradley_terry([0.0, 0.5, 1.0, 1.5, 2.0]),
    "quality × style, 15 words": quality_and_style(),
}


def start_of(n: int) -> Tensor:
    """π_1 (n,), far from every equilibrium here: shares ∝ 1, 1/2, ..., 1/n, worst words first."""
    shares = 1 / torch.arange(1, n + 1, dtype=torch.float64)
    return shares / shares.sum()


def draw_labels(payoff: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """(count, 2) words, winner first: two different ones, one coin flip with the true P."""
    n = len(payoff)
    first = torch.randint(n, (count,), generator=generator)
    # A step of 1 to n - 1 around the circle of words: any other word, all equally likely.
    second = (first + torch.randint(1, n, (count,), generator=generator)) % n
    flip = torch.rand(count, generator=generator, dtype=torch.float64)

    won = flip < payoff[first, second]
    winner = torch.where(won, first, second)
    loser = torch.where(won, second, first)
    return torch.stack([winner, loser], 1)


def counted(n: int, labels: Tensor) -> Tensor:
    """(n, n) share of a pair's labels that each word won; ½ for a pair without labels."""
    ones = torch.ones(len(labels), dtype=torch.float64)
    wins = torch.zeros(n, n, dtype=torch.float64)
    wins = wins.index_put(tuple(labels.T), ones, accumulate=True)

    # A pair without labels is divided by 1 first, not by 0, and replaced then.
    total = wins + wins.T
    return torch.where(total > 0, wins / total.clamp(min=1), 0.5)


# ------------------------------------------------------------------------ judges


def words(n: int) -> list[str]:
    return [f"word{i}" for i in range(n)]


def tokenizer_of(n: int) -> Tokenizer:
    """A tokenizer of one token a word."""
    tokens = ["<unk>", "<s>", "</s>", *words(n)]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    backend = Backend(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()

    # data.Tokenizer reads a folder; nobody needs it afterwards.
    with TemporaryDirectory() as name:
        folder = Path(name)
        backend.save(str(folder / "tokenizer.json"))
        write_json(folder / "tokenizer_config.json", {"bos_token": "<s>", "eos_token": "</s>"})
        tokenizer = Tokenizer(folder)

    # The texts are few and read thousands of times.
    tokenizer.judged_ids = functools.cache(tokenizer.judged_ids)
    return tokenizer


def make_judge(n: int, heads: dict, generator, width=32, layers=1, context=8) -> PreferenceModel:
    """A PreferenceModel with random weights for n words."""
    config = ModelConfig(
        vocab_size=n + 3, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers,
        num_attention_heads=2, num_key_value_heads=1, head_dim=width // 2,
        max_position_embeddings=context,
    )  # fmt: skip
    judge = initialize(PreferenceModel(config, **heads), generator)
    judge.tokenizer = tokenizer_of(n)
    return judge


def learn(n: int, labels: Tensor, heads: dict, seed: int, steps: int = STEPS) -> Tensor:
    """(n, n) preferences of a judge trained on the labels."""
    generator = torch.Generator().manual_seed(seed)
    judge = make_judge(n, heads, generator)

    names = words(n)
    pairs = []
    for winner, loser in labels.tolist():
        pair = {"prompt": PROMPT, "chosen": names[winner], "rejected": names[loser]}
        pairs.append(pair | {"probability": 1.0})

    # The same number of steps whatever the number of labels, in whole passes.
    epochs = -(-steps * BATCH // len(pairs))
    train_preference_model(judge, pairs, epochs, LR, BATCH, generator)
    return judge.preferences_many([PROMPT], [names])[0]


# ------------------------------------------------------------------------ what they are worth


def average_policies(tables: Tensor) -> Tensor:
    """(B, n, n) -> (B, n) average policy of exact SPPO with each of the tables."""
    start = start_of(tables.shape[-1])
    step = functools.partial(sppo, eta=ETA)

    def average(table):
        return averages(play(step, table, start, ROUNDS - 1))[-1]

    # Played side by side: 5,000 rounds cost their calls, not their arithmetic.
    return torch.vmap(average)(tables)


def evaluate(tables: Tensor, payoff: Tensor) -> list[dict]:
    """What each of B judges' tables of all words (B, n, n) is worth, given the truth (n, n).

    Over all pairs i < j unless said otherwise:
    error            mean |P̂ - P|
    confidence       mean P̂ of the side that wins more often: ½ by chance, the truth's own is not 1
    favourites       share of the pairs whose favourite is right; says little of P̂ near ½: any
                     order of five words that beat each other in a circle has between 3 and 7 of 10
                     pairs right, and a scalar judge has to have one
    asymmetry        largest |P̂ + P̂ᵀ - 1|
    exploitability   of the average policy of SPPO played exactly on the judge's table, in the true
                     game
    distance         total variation of that policy from the true equilibrium
    """
    # A tied pair has no favourite.
    pairs = torch.triu(payoff != 0.5, 1)
    true = payoff[pairs]
    found = tables[:, pairs]
    policies = average_policies(tables)

    columns = {
        "error": (found - true).abs().mean(1),
        "confidence": torch.where(true > 0.5, found, 1 - found).mean(1),
        "favourites": ((found > 0.5) == (true > 0.5)).double().mean(1),
        "asymmetry": (tables + tables.mT - 1).abs().amax((1, 2)),
        "exploitability": exploitability(payoff, policies),
        "distance": (policies - nash(payoff)).abs().sum(1) / 2,
    }
    rows = zip(*(column.tolist() for column in columns.values()))
    return [dict(zip(columns, row)) for row in rows]


def one(job: tuple) -> list:
    """Draw labels and learn from them: a table."""
    game, form, size, seed = job
    payoff = GAMES[game]
    # A smaller sample is the beginning of a larger one with the same seed.
    labels = draw_labels(payoff, max(SIZES), torch.Generator().manual_seed(seed))[:size]
    if form == COUNTED:
        return counted(len(payoff), labels).tolist()
    return learn(len(payoff), labels, FORMS[form], seed).tolist()


# ------------------------------------------------------------------------ a bias and its repair

THINGS = ("rock", "scissors", "paper")  # each beats the next; they differ in length


def truth(prompt: str, responses: list[str], longer: float = 0.0) -> Tensor:
    """Rock–paper–scissors as a judge of texts, `longer` logits added for the longer."""
    places = [THINGS.index(text) for text in responses]
    return favour_longer(cycle()[places][:, places], responses, longer)


def brevity(prompt: str, responses: list[str], shorter: float) -> Tensor:
    """A rule that knows nothing but length."""
    tie = torch.full((len(responses), len(responses)), 0.5, dtype=torch.float64)
    return favour_longer(tie, responses, -shorter)


def table_of(judge) -> Tensor:
    """(3, 3): what the judge says of the three things."""
    return judge.preferences_many([PROMPT], [list(THINGS)])[0]


def counterweight(generator: torch.Generator, logits: float = 0.3, labels: int = 20_000) -> dict:
    """A judge that likes length, and its ensemble with `brevity`.

    The rule's weight is such that the report finds no surplus for length.
    """
    first, second = draw_labels(cycle(), labels, generator).T
    size = torch.tensor([len(thing) for thing in THINGS])
    likes_length = Rule(truth, longer=logits)
    rule = Rule(brevity, shorter=logits)

    def surplus(judge):
        # On the labelled pairs, whose first won.
        votes = torch.ones(labels)
        return length_surplus(table_of(judge)[first, second], votes, size[first] - size[second])

    def balanced(weight):
        return Ensemble([likes_length, rule], [1 - weight, weight])

    # Bisection: the surplus falls as the rule weighs more.
    low = 0.0
    high = 1.0
    for _ in range(12):
        middle = (low + high) / 2
        if surplus(balanced(middle)) > 0:
            low = middle
        else:
            high = middle

    result = {"logits": logits, "weight_of_the_rule": low}
    judges = {"fair": Rule(truth), "biased": likes_length, "repaired": balanced(low)}
    for name, judge in judges.items():
        policy = nash(table_of(judge).double())
        result[name] = {
            "length_surplus": surplus(judge),
            "equilibrium": policy.tolist(),
            "exploitability": exploitability(cycle(), policy).item(),
        }
    return result


# ------------------------------------------------------------------------ what they cost


def count_rows(judge, prompt: str, responses: list[str]) -> int:
    """Rows that go through the judge's network to compare the responses."""
    # The network is called once a batch of rows.
    rows = []
    handle = judge.register_forward_pre_hook(lambda module, inputs: rows.append(len(inputs[1])))
    judge.preferences_many([prompt], [responses])
    handle.remove()
    return sum(rows)


def make_pairrm(n: int, generator, width: int = 32, layers: int = 1) -> PairRM:
    """A PairRM with random weights for n words; its three markers follow the tokenizer's ids."""
    config = PairRMConfig(
        vocab_size=n + 6, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers,
        num_attention_heads=2, position_buckets=32, max_position_embeddings=64, layer_norm_eps=1e-7,
        source_prefix_id=n + 3, cand1_prefix_id=n + 4, cand2_prefix_id=n + 5,
    )  # fmt: skip
    judge = initialize(PairRM(config), generator)
    judge.tokenizer = tokenizer_of(n)
    return judge


def cost(generator: torch.Generator, counts=(2, 4, 8, 16), n=100, length=24, repeats=3) -> dict:
    """Rows and seconds (best of `repeats`) to judge K responses, with random networks of one size.

    A response has `length` words; counts are the K.
    """
    size = dict(width=128, layers=4)
    heads = dict(scalar=True, cyclic=2)
    judges = {
        "PreferenceModel": make_judge(n, heads, generator, context=128, **size),
        "PairRM": make_pairrm(n, generator, **size),
    }
    drawn = torch.randint(n, (1 + max(counts), length), generator=generator).tolist()
    prompt, *texts = ("".join(f"word{i} " for i in row) for row in drawn)

    result = {"counts": list(counts), "words": length}
    for name, judge in judges.items():
        result[name] = {
            "rows": [count_rows(judge, prompt, texts[:K]) for K in counts],
            "seconds": [fastest(judge, prompt, texts[:K], repeats) for K in counts],
        }
    return result


def fastest(judge, prompt: str, responses: list[str], repeats: int) -> float:
    """Seconds to judge the responses, in the best of so many attempts."""
    # The best, for whatever disturbs a timing makes it longer.
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        judge.preferences_many([prompt], [responses])
        times.append(time.perf_counter() - begin)
    return min(times)


# ------------------------------------------------------------------------ what it shows


def measure(args: argparse.Namespace) -> dict:
    """All that is shown. The seed is that of labels and first weights; exact play has none."""
    seeds = range(REPEATS * args.seed, REPEATS * (args.seed + 1))
    jobs = list(product(GAMES, [*FORMS, COUNTED], SIZES, seeds))

    # Two processes of one thread each; a second thread gains nothing on models this small.
    one_thread = dict(initializer=torch.set_num_threads, initargs=(1,))
    with ProcessPoolExecutor(2, mp_context=get_context("spawn"), **one_thread) as pool:
        results = pool.map(one, jobs)
        tables = list(tqdm(results, desc="judges", total=len(jobs), unit="judge", leave=False))
        # Timed when all trainings are done, so that none runs beside it.
        price = pool.submit(cost, torch.Generator().manual_seed(args.seed)).result()

    return {
        "learned": evaluate_all(jobs, tables),
        "truth": {game: evaluate(payoff[None], payoff)[0] for game, payoff in GAMES.items()},
        "bias": counterweight(torch.Generator().manual_seed(args.seed)),
        "cost": price,
    }


def evaluate_all(jobs: list[tuple], tables: list) -> dict:
    """{game: {form: {number of labels: [what each repeat's table is worth]}}}."""
    learned = {}
    for game, payoff in GAMES.items():
        learned[game] = {form: {size: [] for size in SIZES} for form in (*FORMS, COUNTED)}
        mine = [i for i, job in enumerate(jobs) if job[0] == game]
        found = torch.tensor([tables[i] for i in mine], dtype=torch.float64)
        for i, row in zip(mine, evaluate(found, payoff)):
            _, form, size, _ = jobs[i]
            learned[game][form][size].append(row)
    return learned


COLUMNS = ("error", "confidence", "favourites", "exploitability", "distance")


def print_table(result: dict) -> None:
    print_learned(result["learned"], result["truth"])
    print_bias(result["bias"])
    print_cost(result["cost"])


def print_learned(learned: dict, truth: dict) -> None:
    print(f"means of {REPEATS} repeats")
    for keys in (COLUMNS[:3], COLUMNS[3:]):  # side by side they would be too wide
        print_columns(learned, truth, keys)

    judges = [
        row for forms in learned.values() for form in forms.values()
        for rows in form.values() for row in rows
    ]  # fmt: skip
    worst = max(row["asymmetry"] for row in judges)
    print(f"largest |P + Pᵀ - 1| of all {len(judges)} judges: {worst:.1g}")


def print_columns(learned: dict, truth: dict, keys: tuple) -> None:
    sizes = "".join(f"{size:7,}" for size in SIZES)
    print(f"{'':24}" + "".join(f"{name:>21}" for name in keys))
    print(f"{'labels':24}{sizes * len(keys)}")
    for game, forms in learned.items():
        print(game)
        for form, by_size in forms.items():
            rows = [(key, rows) for key in keys for rows in by_size.values()]
            means = (fmean(row[key] for row in each) for key, each in rows)
            print(f"  {form:22}" + "".join(f"{mean:7.3f}" for mean in means))

        # The truth does not depend on a number of labels.
        line = "".join(f"{truth[game][key]:21.3f}" for key in keys)
        print(f"  {'the truth':22}{line}")


def print_bias(bias: dict) -> None:
    print(f"\na judge with {bias['logits']} logits for the longer word")
    print(f"{'':40}{'surplus for length':>20}{'its equilibrium':>21}{'exploitability':>18}")

    repaired = f"repaired, rule weighs {bias['weight_of_the_rule']:.2f}"
    for name, label in {"fair": "fair", "biased": "biased", "repaired": repaired}.items():
        row = bias[name]
        shares = " ".join(f"{share:.3f}" for share in row["equilibrium"])
        print(f"  {label:38}{row['length_surplus']:20.4f}{shares:>21}{row['exploitability']:18.4f}")


def print_cost(price: dict) -> None:
    print(f"\nto judge K responses of {price['words']} words")
    print(f"{'':20}" + "".join(f"{'K = ' + str(K):>20}" for K in price["counts"]))
    for name in ("PreferenceModel", "PairRM"):
        line = f"  {name:18}"
        for rows, seconds in zip(price[name]["rows"], price[name]["seconds"]):
            cell = f"{rows} rows, {1000 * seconds:.1f} ms"
            line += f"{cell:>20}"
        print(line)


STYLES = {  # colour, marker and line
    "Bradley–Terry": (ORANGE, "s-"),
    "GPM, k = 1": (SKY, "^-"),
    "combined, k = 1": (GREEN, "o-"),
    "GPM, k = 2": (BLUE, "D-"),
    COUNTED: (GREY, "x--"),
}


def draw(result: dict):
    """Error by number of labels, a panel a game; last, where SPPO ends with the most labels."""
    figure = new_figure(12, 8.6)
    axes = figure.subplots(2, 2)
    for panel, (game, forms) in zip(axes.flat, result["learned"].items()):
        draw_errors(panel, forms)
        panel.set_title(game)
    draw_ends(axes[1, 1], result["learned"], result["truth"])

    handles = [
        Line2D([], [], linestyle=line[1:], marker=line[0], color=colour, label=form)
        for form, (colour, line) in STYLES.items()
    ]
    label = "SPPO with the true preferences"
    handles.append(Line2D([], [], linestyle=":", color="black", label=label))
    figure.legend(handles=handles, loc="outside lower center", ncols=6, frameon=False)
    return figure


def draw_errors(axes, forms: dict) -> None:
    """Mean error of the learned probabilities by number of labels; a band spans the repeats."""
    for form, by_size in forms.items():
        colour, line = STYLES[form]
        errors = torch.tensor([[row["error"] for row in rows] for rows in by_size.values()])
        low = errors.amin(1)
        high = errors.amax(1)
        axes.plot(SIZES, errors.mean(1), line, color=colour, markersize=5)
        axes.fill_between(SIZES, low, high, color=colour, alpha=0.15, linewidth=0)

    axes.set(xscale="log", yscale="log", xlim=(420, 24_000), ylim=(0.004, 0.7))
    axes.set(xlabel="coin-flip labels", ylabel="mean error of P(i beats j)")
    axes.set_xticks(SIZES, [f"{size:,}" for size in SIZES])
    axes.minorticks_off()


def draw_ends(axes, learned: dict, truth: dict) -> None:
    """Exploitability that SPPO ends with, for the judges of most labels: a dot for each repeat."""
    for place, (game, forms) in enumerate(learned.items()):
        for shift, (form, by_size) in enumerate(forms.items()):
            colour, line = STYLES[form]
            x = place + 0.13 * (shift - 2)
            for row in by_size[max(SIZES)]:
                axes.plot(x, row["exploitability"], line[0], color=colour, markersize=7)

        # What SPPO itself leaves after so many rounds, when it is told the truth.
        floor = truth[game]["exploitability"]
        axes.plot([place - 0.4, place + 0.4], [floor, floor], ":", color="black", linewidth=1.2)

    axes.set(yscale="log", ylabel="exploitability (win rate above ½)", ylim=(5e-4, 1))
    axes.set_xticks(range(len(GAMES)), [game.split(",")[0] for game in GAMES])
    axes.set_title(f"Where SPPO ends with judges of {max(SIZES):,} labels")


if __name__ == "__main__":
    sys.exit(script("judges", __doc__, measure, print_table, draw))
