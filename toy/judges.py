"""Which judges can learn preferences that go in circles, and where does SPPO end up with what they learned?

    python -m toy.judges          46 s on two cores: a table, out/toy/judges.png, out/toy/judges.json

Three games whose responses are single words, and four forms of our PreferenceModel, a small Transformer, trained on coin flips:
two words at random, one flip with their true probability. Bradley–Terry has a scalar head, GPM (2410.02197) a cyclic one of k
planes, the combined model both: 1, 2k and 1 + 2k numbers a word. Beside them, without a model, the counted shares of each pair.
The learned table is compared with the true one on all pairs (`evaluate` says how); then SPPO plays it exactly from a policy
far from equilibrium, and its average policy is measured in the true game. "Right favourites" is no measure at chance: it is
3 to 7 of 10 for any order of the five words; `confidence`, mean P̂ of the true favourite, is ½ there.

What came out with seed 0, in brackets with seeds 1 and 2; each the mean of two draws of labels and weights:
- Cycle of five words, 20,000 labels. Bradley–Terry: confidence 0.500 (.500, .500) where the truth has 0.900, whatever the number
  of labels. Its scores are all but equal, so SPPO stays where it starts, at exploitability 0.16, or follows their noise: 0.23
  (.14, .16), and 0.28 (.39, .39) with the noise of 500 labels. With more rounds that goes on, towards a single word, 0.40.
  GPM, k = 2: mean error 0.016 (.012, .014), exploitability 0.007 (.007, .008); with the true table SPPO is at 0.005.
  k = 1 does not suffice, with or without a scalar: error 0.048 (.047, .047) at best, for this circle has rank 4, two planes.
  All favourites are right nevertheless, and exploitability is 0.007 to 0.019.
- Transitive. All forms agree, and SPPO cannot tell them apart: 0.001 to 0.003 for every size. Bradley–Terry has the least error
  with 500 labels, 0.044 against 0.051 to 0.061 (.029 against .030 to .037; .035 against .039 to .042).
- Quality × style. Bradley–Terry has an error of 0.26, and SPPO ends with one word, exploitability 0.30 (.30, .30). A GPM with
  one plane spends it on style and hardly tells qualities apart: error 0.125, exploitability 0.07 (.13, .10).
  That only the combined form gets both is true of equal k alone. A scalar r is a plane (r, 1), so k = 2 gets both too, with 4
  numbers a word instead of 3 and a little more error: 0.106 against 0.090 with 500 labels (.083, .069; .104, .093), 0.043
  against 0.036 with 2,000, alike with 20,000. Both beat the shares, 0.141 and 0.068. Exploitability with 500: combined
  0.08 (.03, .05), GPM 0.14 (.05, .09), shares 0.10 (.11, .13); with 20,000 all have 0.01 to 0.03.
- With few words and many labels counting is better than any of these trainings: 0.005 in the cycle.
- A training can stall where all words have nearly the same vector, and P̂ is near ½. With a cyclic head and 20,000 labels of the
  mixture 0 of 24 did with the settings below, 3 of 24 with batches of 64 at 7e-3.
- A judge with 0.3 logits too many for the longer word moves the equilibrium of rock–paper–scissors from (.364, .273, .364) to
  (.373, .302, .325), exploitability 0.023. An ensemble with a rule that likes brevity, which weighs just so much
  that the report finds no surplus for length beyond 20,000 votes, brings it back to 0.007 (.007, .004).
- Judging K responses takes K rows with a PreferenceModel and K(K - 1), each twice as long, with PairRM: 240 for K = 16, and 36
  to 40 times the time.
- P + Pᵀ = 1 to 1e-7.
"""

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
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers
from tqdm import tqdm

from data import Tokenizer, write_json
from judge_report import length_surplus
from model import ModelConfig, initialize
from pairrm import PairRM, PairRMConfig
from prefmodel import Ensemble, PreferenceModel, Rule, train_preference_model
from toy.games import ROCK_PAPER_SCISSORS, bradley_terry, cycle, exploitability, nash, odd_cycle
from toy.lab import BLUE, GREEN, GREY, ORANGE, SKY, script
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
STEPS, BATCH, LR = 300, 100, 5e-3  # of each training, or two passes if that is more: 500 labels are seen 60 times
ROUNDS, ETA = 5000, 0.5  # of exact play
PROMPT = ""  # there is but one question

# ------------------------------------------------------------------------------------------------ games


def quality_and_style(levels=5, gap=0.5, strengths=ROCK_PAPER_SCISSORS):
    """levels × 3 words: logits of a quality, transitive, plus those of a style, a circle. Equilibrium: the best three."""
    quality = gap * torch.arange(levels, dtype=torch.float64).repeat_interleave(3)
    return torch.sigmoid(quality[:, None] - quality + torch.logit(cycle(strengths)).repeat(levels, levels))


GAMES = {
    "cycle of 5 words": odd_cycle(5, 0.9),
    "transitive, 5 words": bradley_terry([0.0, 0.5, 1.0, 1.5, 2.0]),
    "quality × style, 15 words": quality_and_style(),
}


def start_of(n):
    """π_1, far from every equilibrium here: shares ∝ 1, 1/2, ..., 1/n, most on the words of least quality."""
    shares = 1 / torch.arange(1, n + 1, dtype=torch.float64)
    return shares / shares.sum()


def draw_labels(payoff, count, generator):
    """(count, 2) words, winner first: two different words at random, and a coin flipped once with their true probability."""
    n = len(payoff)
    first = torch.randint(n, (count,), generator=generator)
    second = (first + torch.randint(1, n, (count,), generator=generator)) % n
    won = torch.rand(count, generator=generator, dtype=torch.float64) < payoff[first, second]
    return torch.stack([torch.where(won, first, second), torch.where(won, second, first)], 1)


def counted(n, labels):
    """(n, n) share of a pair's labels that each word won; ½ for a pair without labels."""
    ones = torch.ones(len(labels), dtype=torch.float64)
    wins = torch.zeros(n, n, dtype=torch.float64).index_put(tuple(labels.T), ones, accumulate=True)
    return torch.where(wins + wins.T > 0, wins / (wins + wins.T).clamp(min=1), 0.5)


# ------------------------------------------------------------------------------------------------ judges


def words(n):
    return [f"word{i}" for i in range(n)]


def tokenizer_of(n):
    """One token a word. data.Tokenizer reads a folder, which is gone afterwards. Texts are few and read often: kept."""
    backend = Backend(models.WordLevel({t: i for i, t in enumerate(["<unk>", "<s>", "</s>", *words(n)])}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    with TemporaryDirectory() as folder:
        backend.save(str(Path(folder) / "tokenizer.json"))
        write_json(Path(folder) / "tokenizer_config.json", {"bos_token": "<s>", "eos_token": "</s>"})
        tokenizer = Tokenizer(folder)
    tokenizer.judged_ids = functools.cache(tokenizer.judged_ids)
    return tokenizer


def make_judge(n, heads, generator, width=32, layers=1, context=8):
    """A PreferenceModel with random weights for n words."""
    config = ModelConfig(
        vocab_size=n + 3, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers, num_attention_heads=2,
        num_key_value_heads=1, head_dim=width // 2, max_position_embeddings=context,
    )  # fmt: skip
    judge = initialize(PreferenceModel(config, **heads), generator)
    judge.tokenizer = tokenizer_of(n)
    return judge


def learn(n, labels, heads, seed, steps=STEPS):
    """(n, n) preferences of a judge trained on the labels."""
    generator = torch.Generator().manual_seed(seed)
    judge = make_judge(n, heads, generator)
    names = [(f"word{i}", f"word{j}") for i, j in labels.tolist()]
    pairs = [{"prompt": PROMPT, "chosen": winner, "rejected": loser, "probability": 1.0} for winner, loser in names]
    train_preference_model(judge, pairs, -(-steps * BATCH // len(pairs)), LR, BATCH, generator)
    return judge.preferences(PROMPT, words(n))


# ------------------------------------------------------------------------------------------------ what they are worth


def average_policies(tables):
    """(B, n, n) -> (B, n) average policy of exact SPPO with each of the tables."""
    start = start_of(tables.shape[-1])
    return torch.vmap(lambda table: averages(play(functools.partial(sppo, eta=ETA), table, start, ROUNDS - 1))[-1])(tables)


def evaluate(tables, payoff):
    """What each of B judges' tables of all words (B, n, n) is worth; over all pairs i < j unless said otherwise.

    error                mean |P̂ - P|
    confidence           mean P̂ of the side that wins more often: ½ by chance, the truth's own is not 1
    favourites           share of the pairs whose favourite is right; says little of P̂ near ½: any order of five words that
                         beat each other in a circle has between 3 and 7 of 10 pairs right, and a scalar judge has to have one
    asymmetry            largest |P̂ + P̂ᵀ - 1|
    exploitability       of the average policy of SPPO played exactly on the judge's table, in the true game
    distance             total variation of that policy from the true equilibrium
    """
    pairs = torch.triu(payoff != 0.5, 1)
    true, found, policies = payoff[pairs], tables[:, pairs], average_policies(tables)
    columns = {
        "error": (found - true).abs().mean(1),
        "confidence": torch.where(true > 0.5, found, 1 - found).mean(1),
        "favourites": ((found > 0.5) == (true > 0.5)).double().mean(1),
        "asymmetry": (tables + tables.mT - 1).abs().amax((1, 2)),
        "exploitability": exploitability(payoff, policies),
        "distance": (policies - nash(payoff)).abs().sum(1) / 2,
    }
    return [dict(zip(columns, row)) for row in zip(*(column.tolist() for column in columns.values()))]


def one(job):
    """Draw labels and learn from them: a table. Smaller samples are beginnings of larger ones with the same seed."""
    game, form, size, seed = job
    n = len(GAMES[game])
    labels = draw_labels(GAMES[game], max(SIZES), torch.Generator().manual_seed(seed))[:size]
    return (counted(n, labels) if form == COUNTED else learn(n, labels, FORMS[form], seed)).tolist()


# ------------------------------------------------------------------------------------------------ a bias, and its counterweight

THINGS = ("rock", "scissors", "paper")  # each beats the next; they differ in length


def truth(prompt, responses, longer=0.0):
    """Rock–paper–scissors as a judge of texts, with so many logits more for the longer text of a pair."""
    places = [THINGS.index(text) for text in responses]
    return favour_longer(cycle()[places][:, places], responses, longer)


def brevity(prompt, responses, shorter):
    """A rule that knows nothing but length."""
    tie = torch.full((len(responses), len(responses)), 0.5, dtype=torch.float64)
    return favour_longer(tie, responses, -shorter)


def counterweight(generator, logits=0.3, labels=20_000):
    """A judge that likes length, and its ensemble with `brevity`, so weighted that the report's length surplus is 0."""
    first, second = draw_labels(cycle(), labels, generator).T
    size = torch.tensor([len(thing) for thing in THINGS])
    likes_length, rule = Rule(truth, longer=logits), Rule(brevity, shorter=logits)

    def surplus(judge):  # on the labelled pairs, whose first won
        table = judge.preferences(PROMPT, list(THINGS))
        return length_surplus(table[first, second], torch.ones(labels), size[first] - size[second])

    low, high = 0.0, 1.0  # of the rule's weight
    for _ in range(12):
        middle = (low + high) / 2
        low, high = (middle, high) if surplus(Ensemble([likes_length, rule], [1 - middle, middle])) > 0 else (low, middle)
    judges = {"fair": Rule(truth), "biased": likes_length, "repaired": Ensemble([likes_length, rule], [1 - low, low])}
    result = {"logits": logits, "weight_of_the_rule": low}
    for name, judge in judges.items():
        policy = nash(judge.preferences(PROMPT, list(THINGS)).double())
        gain = exploitability(cycle(), policy).item()
        result[name] = {"length_surplus": surplus(judge), "equilibrium": policy.tolist(), "exploitability": gain}
    return result


# ------------------------------------------------------------------------------------------------ what they cost


def count_rows(judge, prompt, responses):
    """Rows that go through the judge's network to compare the responses."""
    rows = []
    handle = judge.register_forward_pre_hook(lambda module, inputs: rows.append(len(inputs[0])))
    judge.preferences(prompt, responses)
    handle.remove()
    return sum(rows)


def make_pairrm(n, generator, width=32, layers=1):
    """A PairRM with random weights for n words; the three markers are ids behind those of the tokenizer."""
    config = PairRMConfig(
        vocab_size=n + 6, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers, num_attention_heads=2,
        position_buckets=32, max_position_embeddings=64, layer_norm_eps=1e-7, source_prefix_id=n + 3, cand1_prefix_id=n + 4,
        cand2_prefix_id=n + 5,
    )  # fmt: skip
    judge = initialize(PairRM(config), generator)
    judge.tokenizer = tokenizer_of(n)
    return judge


def cost(generator, counts=(2, 4, 8, 16), n=100, length=24, repeats=3):
    """Rows and seconds (best of `repeats`) to judge K responses of `length` words with random networks of equal size."""
    size = dict(width=128, layers=4)
    judges = {
        "PreferenceModel": make_judge(n, dict(scalar=True, cyclic=2), generator, context=128, **size),
        "PairRM": make_pairrm(n, generator, **size),
    }
    drawn = torch.randint(n, (1 + max(counts), length), generator=generator)
    prompt, *texts = (" ".join(f"word{i}" for i in row) + " " for row in drawn.tolist())
    result = {"counts": list(counts), "words": length}
    for name, judge in judges.items():
        seconds = []
        for K in counts:
            times = []
            for _ in range(repeats):
                begin = time.perf_counter()
                judge.preferences(prompt, texts[:K])
                times.append(time.perf_counter() - begin)
            seconds.append(min(times))
        result[name] = {"rows": [count_rows(judge, prompt, texts[:K]) for K in counts], "seconds": seconds}
    return result


# ------------------------------------------------------------------------------------------------ what it shows


def measure(args):
    """The seed is that of the labels and of the first weights; exact play has none."""
    seeds = range(REPEATS * args.seed, REPEATS * (args.seed + 1))
    jobs = list(product(GAMES, [*FORMS, COUNTED], SIZES, seeds))
    one_thread = dict(initializer=torch.set_num_threads, initargs=(1,))
    with ProcessPoolExecutor(2, mp_context=get_context("spawn"), **one_thread) as pool:
        tables = list(tqdm(pool.map(one, jobs), total=len(jobs), desc="judges", unit="judge", leave=False))
        price = pool.submit(cost, torch.Generator().manual_seed(args.seed)).result()
    learned = {game: {form: {size: [] for size in SIZES} for form in (*FORMS, COUNTED)} for game in GAMES}
    for game, payoff in GAMES.items():
        some = [(job, table) for job, table in zip(jobs, tables) if job[0] == game]
        rows = evaluate(torch.tensor([table for _, table in some], dtype=torch.float64), payoff)
        for ((_, form, size, _), _), row in zip(some, rows):
            learned[game][form][size].append(row)
    exact = {game: evaluate(payoff[None], payoff)[0] for game, payoff in GAMES.items()}
    bias = counterweight(torch.Generator().manual_seed(args.seed))
    return {"learned": learned, "truth": exact, "bias": bias, "cost": price}


COLUMNS = ("error", "confidence", "favourites", "exploitability", "distance")


def print_table(result):
    print(f"means of {REPEATS} repeats;" + " " * 4 + "".join(f"{name:>21}" for name in COLUMNS))
    print(f"{'labels':24}" + "".join(f"{size:7,}" for size in SIZES) * len(COLUMNS))
    for game, forms in result["learned"].items():
        print(game)
        for form, sizes in forms.items():
            print(f"  {form:22}" + "".join(f"{fmean(r[k] for r in rows):7.3f}" for k in COLUMNS for rows in sizes.values()))
        print(f"  {'the truth':22}" + "".join(f"{result['truth'][game][key]:21.3f}" for key in COLUMNS))
    rows = [row for forms in result["learned"].values() for sizes in forms.values() for some in sizes.values() for row in some]
    print(f"largest |P + Pᵀ - 1| of all {len(rows)} judges: {max(row['asymmetry'] for row in rows):.1g}")
    bias = result["bias"]
    print(f"\n{'a judge with ' + str(bias['logits']) + ' logits for the longer word':50}", end="")
    print(f"{'surplus for length':>20}{'its equilibrium':>21}{'exploitability':>18}")
    for name in ("fair", "biased", "repaired"):
        row, label = bias[name], f"{name}, rule weighs {bias['weight_of_the_rule']:.2f}" if name == "repaired" else name
        shares = " ".join(f"{share:.3f}" for share in row["equilibrium"])
        print(f"  {label:48}{row['length_surplus']:20.4f}{shares:>21}{row['exploitability']:18.4f}")
    price = result["cost"]
    print(f"\nto judge K responses of {price['words']} words" + "".join(f"{'K = ' + str(K):>20}" for K in price["counts"]))
    for name in ("PreferenceModel", "PairRM"):
        cells = (f"{r} rows, {1000 * s:.1f} ms" for r, s in zip(price[name]["rows"], price[name]["seconds"]))
        print(f"  {name:30}" + "".join(f"{cell:>20}" for cell in cells))


STYLES = {
    "Bradley–Terry": (ORANGE, "s-"), "GPM, k = 1": (SKY, "^-"), "combined, k = 1": (GREEN, "o-"), "GPM, k = 2": (BLUE, "D-"),
    COUNTED: (GREY, "x--"),
}  # fmt: skip


def draw(result):
    """Error of the probabilities by number of labels, a panel a game; last, where SPPO ends with the judges of most labels."""
    figure = Figure(figsize=(12, 8.6), layout="constrained")
    axes = figure.subplots(2, 2)
    for axis, (game, forms) in zip(axes.flat, result["learned"].items()):
        for form, sizes in forms.items():
            colour, line = STYLES[form]
            values = torch.tensor([[row["error"] for row in rows] for rows in sizes.values()])
            axis.plot(SIZES, values.mean(1), line, color=colour, markersize=5)
            axis.fill_between(SIZES, values.amin(1), values.amax(1), color=colour, alpha=0.15, linewidth=0)
        axis.set(xscale="log", yscale="log", xlim=(420, 24_000), ylim=(0.004, 0.7), title=game)
        axis.set(xlabel="coin-flip labels", ylabel="mean error of P(i beats j)")
        axis.set_xticks(SIZES, [f"{size:,}" for size in SIZES])
        axis.minorticks_off()
    last = axes[1, 1]
    for place, (game, forms) in enumerate(result["learned"].items()):
        for shift, (form, sizes) in enumerate(forms.items()):
            for row in sizes[max(SIZES)]:
                x = place + 0.13 * (shift - 2)
                last.plot(x, row["exploitability"], STYLES[form][1][0], color=STYLES[form][0], markersize=7)
        floor = result["truth"][game]["exploitability"]
        last.plot([place - 0.4, place + 0.4], [floor, floor], ":", color="black", linewidth=1.2)
    last.set(yscale="log", ylabel="exploitability (win rate above ½)", ylim=(5e-4, 1))
    last.set_xticks(range(len(GAMES)), [game.split(",")[0] for game in GAMES])
    last.set_title(f"Where SPPO ends with judges of {max(SIZES):,} labels")
    handles = [Line2D([], [], linestyle=line[1:], marker=line[0], color=c, label=form) for form, (c, line) in STYLES.items()]
    handles.append(Line2D([], [], linestyle=":", color="black", label="SPPO with the true preferences"))
    figure.legend(handles=handles, loc="outside lower center", ncols=6, frameon=False)
    return figure


if __name__ == "__main__":
    sys.exit(script("judges", __doc__, measure, print_table, draw))
