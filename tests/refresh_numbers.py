"""Numbers of the pages and the commands that make them: `python tests/refresh_numbers.py`, or `make numbers`.

    python tests/refresh_numbers.py              runs every command (half a day on two cores), and writes docs/numbers/
    python tests/refresh_numbers.py rps demo     these commands only
    python tests/refresh_numbers.py --page       none: only docs/numbers.md, the list of all published numbers

The commands run in a fresh copy of the last commit, out/numbers/main: what lies in out/ cannot stand in for a measurement, and
the code can be edited meanwhile. Figures are copied back.

A source is a command, what is read from the files that it leaves, and the pieces of the pages that say so, with places for
the numbers: "exploitable by {average:.3f}". tests/test_numbers.py holds that each piece, with the numbers of the record
docs/numbers/NAME.json put in, is on its page. Besides Python's formats a number knows two: `m` puts a − for the minus sign
(`{slope:m.2f}`), `z` leaves the zero out (`{share:z.3f}` is .374).
"""

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean

ROOT = Path(__file__).resolve().parents[1]
RECORDS = ROOT / "docs/numbers"
LIST = ROOT / "docs/numbers.md"
SHARED = "../shared/data"  # inputs that are not shipped
COPY = ROOT / "out/numbers/main"  # where commands run
WRITTEN = ("figures", "benchmarks", "docs/runs")  # what they leave in the repository

README, LABORATORY, EVALUATION = "README.md", "docs/laboratory.md", "docs/evaluation.md"
JUDGES, BENCH, REAL = "docs/judges.md", "docs/side-by-side.md", "docs/runs/smollm2-instructions/README.md"


class Number(float):
    """A float with the two formats of the pages."""

    def __format__(self, form):
        if form.startswith("m"):
            return format(Number(self), form[1:]).replace("-", "−")
        if form.startswith("z"):
            return format(float(self), form[1:]).replace("0.", ".", 1)
        return format(float(self), form)


def numbers_of(value):
    """The same, each number in it a Number."""
    if isinstance(value, dict):
        return {key: numbers_of(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [numbers_of(inner) for inner in value]
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return Number(value) if is_number else value


@dataclass
class Source:
    command: str  # shell, from the root of the repository
    read: Callable[[], dict]  # the numbers, from the files that the command leaves
    pages: dict[str, list[str]] = field(default_factory=dict)  # page: pieces of it
    shipped: bool = False  # what it leaves is in the repository: the numbers are read there, not from the record


def load(path: str):
    """A JSON file of the repository, or, from out/, of the copy in which the commands ran."""
    folder = COPY if path.startswith("out/") else ROOT
    return json.loads((folder / path).read_text(encoding="utf-8"))


def lines(path: str) -> list[dict]:
    return [json.loads(line) for line in (ROOT / path).read_text(encoding="utf-8").splitlines()]


# ------------------------------------------------------------------------------------------------ the demo's world

POLICIES = ("base", "last", "average")


DEMO = """make demo
python -m toy.text_game measure out/demo/world out/demo/run --gif
cp out/demo/run/measure.gif figures/demo.gif"""


def read_demo():
    measured = load("out/demo/run/measure.json")
    found = {name: measured[name] for name in POLICIES}
    return found | {"equilibrium": measured["equilibrium"]}


def demo_row(name):
    shares = "".join(f"{{{name}[endings][{i}]:8.3f}}" for i in range(3))
    return f"{name:14}{{{name}[right]:8.3f}}{shares}{{{name}[malformed]:12.4f}}{{{name}[exploitability]:17.4f}}"


def single_row(title, name):
    shares = " ".join(f"{{{name}[endings][{i}]:z.3f}}" for i in range(3))
    return f"| {title} | {{{name}[right]:.3f}} | {shares} | {{{name}[exploitability]:.3f}} |"


def read_single():
    return {name: load(f"out/one/{name}/measure.json")["last"] for name in ("mean", "distilled")}


PLAIN = "--prompts out/demo/world/prompts.jsonl --template plain --max-new-tokens 4"
SINGLE = f"""make demo
python -m evaluate average out/demo/run --out out/one/mean/round-01/policy
python -m evaluate distill out/demo/run --out out/one/distilled/round-01/policy {PLAIN}
python -m toy.text_game measure out/demo/world out/one/mean
python -m toy.text_game measure out/demo/world out/one/distilled"""

BEST_OF = {"base": "out/demo/world/policy", "last": "out/demo/run/round-80/policy", "mixture": "out/demo/run"}
BEST = "make demo\n" + "\n".join(
    f"python -m evaluate outputs --policy {policy} --best-of 16 --judge out/demo/world/judge --out out/best/{name}.json {PLAIN}\n"
    f"python -m evaluate winrate --policy out/best/{name}.json --against {policy} --samples 16"
    f" --judge toy.text_game:oracle --out out/best/{name}-wins.json {PLAIN}"
    for name, policy in BEST_OF.items()
)


def read_best():
    found = {}
    for name in BEST_OF:
        result = load(f"out/best/{name}-wins.json")
        found[name] = {"rate": result["win_rate"], "low": result["interval_95"][0], "high": result["interval_95"][1]}
    return found


MATRIX = f"""make demo
python -m evaluate winrate --policy out/demo/run --judge toy.text_game:oracle --samples 16 --out out/matrix.json \\
    {PLAIN}
cp out/matrix.png figures/matrix.png"""


def read_matrix():
    result = load("out/matrix.json")
    table, names = result["win_rate"], result["policies"]
    rounds = [i for i, name in enumerate(names) if name.startswith("round")]
    rate, later, earlier = min((table[i][j], i, j) for i in rounds for j in rounds if j < i)
    return {
        "losing": result["later_loses_to_earlier"],
        "pairs": result["pairs_of_rounds"],
        "later": int(names[later].split()[1]),
        "earlier": int(names[earlier].split()[1]),
        "clearest": rate,
        "least_of_average": result["least_of_average"],
    }


SEEDS = (0, 1, 2)
TARGETS = {  # name: (its judge and target, the beginning of its row)
    "learned": ("--judge $WORLD/judge", "learned judge (each seed a world of its own)"),
    "oracle": ("--judge toy.text_game:oracle", "`--judge toy.text_game:oracle`"),
    "optimistic": ("--judge toy.text_game:oracle --target optimistic", "… `--target optimistic`"),
    "regularized": (
        "--judge toy.text_game:oracle --target regularized --tau 0.1 --reference-every 10",
        "… `--target regularized --tau 0.1 --reference-every 10`",
    ),
}


def target_commands():
    """The learned judge has a world of its own for each seed; with the oracle all play in the first."""
    commands = []
    for seed in SEEDS:
        own = f"out/targets/world-{seed}"
        commands.append(f"python -m toy.text_game build {own} --seed {seed}")
        for name, (flags, _) in TARGETS.items():
            world = own if name == "learned" else "out/targets/world-0"
            run = f"out/targets/{name}-{seed}"
            flags = flags.replace("$WORLD", world)
            inputs = f"--policy {world}/policy --prompts {world}/prompts.jsonl"
            commands.append(f"python train.py --preset tiny {inputs} {flags} --seed {seed} --out {run}")
            commands.append(f"python -m toy.text_game measure {world} {run}")
    return "\n".join(commands)


def read_targets():
    found = {}
    for name in TARGETS:
        runs = [load(f"out/targets/{name}-{seed}/measure.json") for seed in SEEDS]
        found[name] = {key: [run[key]["exploitability"] for run in runs] for key in ("average", "last")}
    return found


def target_row(name):
    title = TARGETS[name][1]
    average, last = (", ".join(f"{{{name}[{key}][{i}]:.3f}}" for i in range(3)) for key in ("average", "last"))
    return f"| {title} | {average} | {last} |"


SKEWED = """python -m toy.text_game build out/skewed --strengths .8 .9 .65
python train.py --preset tiny --policy out/skewed/policy --prompts out/skewed/prompts.jsonl --judge out/skewed/judge \\
    --out out/skewed-learned
python -m toy.text_game measure out/skewed out/skewed-learned
python train.py --preset tiny --policy out/skewed/policy --prompts out/skewed/prompts.jsonl \\
    --judge 'toy.text_game:oracle:{"strengths": [0.8, 0.9, 0.65]}' --out out/skewed-oracle
python -m toy.text_game measure out/skewed out/skewed-oracle"""


def read_skewed():
    found = {name: load(f"out/skewed-{name}/measure.json") for name in ("learned", "oracle")}
    equilibrium = found["learned"]["equilibrium"]
    return {"equilibrium": equilibrium} | {name: result["average"] for name, result in found.items()}


def shares_of(place):
    return "(" + ", ".join(f"{{{place}[{i}]:z.3f}}" for i in range(3)) + ")"


# ------------------------------------------------------------------------------------------------ the laboratory


def toy(name, flags="", figure=""):
    return f"python -m toy.{name}{flags}" + (f"\ncp out/toy/{figure or name}.png figures/{name}.png" if figure else "")


def read_rps():
    result = load("out/toy/rps.json")
    slopes = [-row["slope"] for row in result["horizons"].values()]
    ends = [row["average"][-1] for row in result["sampled"]["neural"]]
    shares = [row["largest_share_of_bound"] for row in result["horizons"].values()]
    return {
        "slope_low": -min(slopes),
        "slope_high": -max(slopes),
        "share_of_bound": max(shares),
        "rounds": result["sampled"]["rounds"],
        "low": min(ends),
        "high": max(ends),
        "exact": result["sampled"]["exact"]["average"][-1],
    }


def read_tabular():
    games = load("out/toy/tabular.json")["games"]
    arrived = {name: [rows[name]["round_below_1e-9"] for rows in games.values()] for name in next(iter(games.values()))}
    looking = arrived["optimistic"] + arrived["extragradient"]
    moving = sorted(arrived["moving reference"])
    return {"first": min(looking), "last": max(looking), "moving": moving}


LOSSES = {"sppo": "SPPO", "sppo-hard": "SPPO, hard labels", "dpo": "DPO", "ipo": "IPO"}


def read_likelihood():
    found = {"any": {}, "right": {}}
    for row in load("out/toy/likelihood.json")["likelihoods"]:
        cell = {
            "fell": 100 * fmean(run["fell"] for run in row["runs"]),
            "chosen": fmean(run["chosen"][-1] for run in row["runs"]),
            "rejected": fmean(run["rejected"][-1] for run in row["runs"]),
        }
        found[row["pairs"]].setdefault(row["loss"], {})[f"η{row['eta']:g}"] = cell
    sppo = [cells[loss]["η2"]["fell"] for cells in found.values() for loss in ("sppo", "sppo-hard")]
    return found | {"sppo_at_2": max(sppo)}


def likelihood_row(loss):
    """Log-ratios of chosen and rejected responses: three η for the best and worst of 16, three for similar ones."""
    cells = []
    for kind in ("any", "right"):
        for eta in ("η2", "η20", "η1000"):
            cells.append(f"{{{kind}[{loss}][{eta}][chosen]:m+.1f}}, {{{kind}[{loss}][{eta}][rejected]:m+.1f}}")
    return f"| {LOSSES[loss]} | " + " | ".join(cells) + " |"


def read_ablations():
    rows = {row["judge"]: row["mean"][-1] for row in load("out/toy/ablations.json")["shortcut"]["random"] if row["actions"] == 10}
    return {"scores": rows["shortcut"], "table": rows["table"]}


def read_judges():
    result = load("out/toy/judges.json")
    circle = result["learned"]["cycle of 5 words"]

    def end(form):
        return fmean(row["exploitability"] for row in circle[form]["20000"])

    return {
        "bradley_terry": end("Bradley–Terry"),
        "gpm": end("GPM, k = 2"),
        "truth": result["truth"]["cycle of 5 words"]["exploitability"],
        "logits": result["bias"]["logits"],
        "biased": result["bias"]["biased"]["exploitability"],
        "repaired": result["bias"]["repaired"]["exploitability"],
    }


def read_relatives():
    budgets, averages = {}, {}
    for seed, out in enumerate(("out/toy", "out/toy-1", "out/toy-2")):
        result = load(f"{out}/relatives.json")
        rows = {f"{row['K']} {row['m']}": row["exploitability"] for row in result["budget"]}
        budgets[f"seed {seed}"] = {key: rows[key] for key in ("16 1", "5 4", "16 15")}
        averages = averages or result["averages"]["rock-paper-scissors"]
        if seed == 0:
            back = result["looking_back"]["rock-paper-scissors"]
    return budgets | {
        "apo": back["APO, α = 0.3"]["last"],
        "mnpo": back["MNPO, last 3"]["last"],
        "code": back["MNPO's code, last 3"]["last"],
        "with_kl": max(row["with_kl"] for row in back.values()),
        "grpo": averages["GRPO with σ, average"],
        "weighted": averages["weighted by 1/σ"],
    }


def read_social_choice():
    result = load("out/toy/social_choice.json")
    at_five = result["rates"]["sizes"].index(5)
    votes = result["votes"]
    return {
        "borda": 100 * result["rates"]["Borda passes over the Condorcet winner"][at_five],
        "copy": 100 * result["rates"]["Borda is moved by a copy"][at_five],
        "tables": votes["tables"],
        "winners": votes["with a Condorcet winner"],
        "passed": votes["Borda passes over it"],
        "tied": votes["Borda ties it with another"],
    }


def read_stories():
    result = load("out/stories/stories.json")
    last = result["rounds"][-1]
    return {
        "win_rate": last["win_rate"],
        "last_likelihood": last["log_likelihood"],
        "base_likelihood": result["base"]["log_likelihood"],
        "average": result["averages"][-1]["exploitability"],
        "base": result["base"]["exploitability"],
        "last": last["exploitability"],
    }


# ------------------------------------------------------------------------------------------------ side by side


def read_bench(path="benchmarks/side_by_side.json"):
    result = load(path)
    rows = {f"{row['stage']} {row['case']}": row for row in result["rows"]}
    keys = ("ours", "theirs", "ratio", "required", "floor")
    return {name: {key: row[key] for key in keys} for name, row in rows.items()} | {"minutes": result["minutes"]}


REAL_BENCH = "benchmarks/real.json"


def read_neighbour():
    result = load("benchmarks/neighbour.json")
    rates = {name: [row["tokens_a_second"] for row in rows] for name, rows in result["threads"].items()}
    return {"share": result["share"]} | {name.replace(" ", "_"): rates[name] for name in rates}


def bench_rows():
    """The rows of docs/side-by-side.md: all that are in the figure but recomputing, which is an aside."""
    sys.path.append(str(ROOT / "benchmarks"))  # last: real/ is a folder of ours, and real.py a file there
    from side_by_side import NAMES

    units = {"sample": "ms/token", "fit": "ms/pair"}
    for row in load("benchmarks/side_by_side.json")["rows"]:
        name = NAMES.get((row["stage"], row["case"]))
        if name is None or row["case"] == "memory, recomputing":
            continue
        yield bench_row(row, name, "GB" if row["case"] == "memory" else units.get(row["stage"], "s"))


def real_bench_rows():
    """The rows of docs/benchmarks.md."""
    for row in load(REAL_BENCH)["rows"]:
        yield bench_row(row, row["name"], row["unit"])


def bench_row(row, name, unit):
    place = f"{row['stage']} {row['case']}"
    required = f"{{{place}[required]:g}}" if row["required"] else ""
    floor = f"{{{place}[floor]:.3g}}" if row["floor"] else ""
    times = f"{{{place}[ours]:.3g}} {unit} | {{{place}[theirs]:.3g}} | **{{{place}[ratio]:.2f}}**"
    return f"| {name} | {times} | {required} | {floor} |"


# ------------------------------------------------------------------------------------------------ the real model

FOLDER = "docs/runs/smollm2-instructions"


ARRIVAL = {  # row of the page: (row of the script, its last columns)
    "optimistic": ("optimistic", 6),
    "… then η = 1": ("optimistic, then η/2", 6),
    "… then 1e-4": ("optimistic, then lr/3", 1),
    "moving reference, τ = 0.1, every 10": ("moving reference", 6),
    "… then η = 1, every 20": ("moving reference, then η/2", 6),
    "… then 1e-4 ": ("moving reference, then lr/3", 1),
    "… then 3e-5": ("moving reference, then lr/10", 1),
}


def read_arrival():
    text = (COPY / "out/toy/arrival.txt").read_text(encoding="utf-8")
    found = {}
    for line in text.splitlines()[1:8]:
        words = line.split()
        found[" ".join(words[:-6])] = [float(word) for word in words[-6:]]
    return found


def arrival_rows():
    for title, (name, count) in ARRIVAL.items():
        cells = [f"{{{name}[{n}]:.{4 if n == 0 else 3}f}}" for n in range(6 - count, 6)]
        yield f"| {title.strip()} " + "| " * (6 - count) + "| " + " | ".join(cells) + " |"


ARRIVES = "--target regularized --tau 0.1"
FIRST_HALF = f"{ARRIVES} --reference-every 10 --rounds 40"
SECOND_HALF = f"{ARRIVES} --reference-every 20 --eta 1 --samples 64 --select best-worst --epochs 12 --lr 2e-4 --rounds 40"
ARRIVING = {  # run: (world, judge)
    "shares-0": (0, "out/arrives/judge-0"),
    "shares-1": (1, "out/arrives/judge-1"),
    "shares-2": (2, "out/arrives/judge-2"),
    "votes-0": (0, "out/arrives/world-0/judge"),
    "votes-1": (1, "out/arrives/world-1/judge"),
    "votes-2": (2, "out/arrives/world-2/judge"),
    "oracle-0": (0, "toy.text_game:oracle"),
    "oracle-1": (1, "toy.text_game:oracle"),
    "oracle-2": (2, "toy.text_game:oracle"),
}


def arrives_commands():
    """Judges of single votes and of shares of votes; two halves of 40 rounds, measured at the end."""
    commands = []
    for seed in SEEDS:
        world, soft, judge = (f"out/arrives/{name}-{seed}" for name in ("world", "soft", "judge"))
        commands.append(f"python -m toy.text_game build {world} --seed {seed}")
        commands.append(f"python -m toy.arrival {world} --soft {soft}.jsonl")
        inputs = f"--pairs {soft}.jsonl --backbone {world}/policy --template plain --cyclic 4"
        commands.append(f"python prefmodel.py train {inputs} --batch 250 --lr 1e-3 --epochs 4 --out {judge}")
    for name, (seed, judge) in ARRIVING.items():
        world, run = f"out/arrives/world-{seed}", f"out/arrives/{name}"
        inputs = f"--preset tiny --prompts {world}/prompts.jsonl --judge {judge}"
        commands.append(f"python train.py {inputs} --policy {world}/policy {FIRST_HALF} --out {run}-first")
        commands.append(f"python train.py {inputs} --policy {run}-first/round-40/policy {SECOND_HALF} --out {run}")
        commands.append(f"python -m toy.text_game measure {world} {run}")
    for seed in SEEDS:
        world = f"out/arrives/world-{seed}"
        commands.append(f"python -m toy.arrival {world} > out/arrives/votes-{seed}.txt")
        soft = f"--judge out/arrives/judge-{seed} > out/arrives/shares-{seed}.txt"
        commands.append(f"python -m toy.arrival {world} out/arrives/shares-{seed} {soft}")
    return "\n".join(commands)


def read_arrives(folder="out/arrives"):
    """Of the last policies; of the judges' equilibria, of right sums alone; deviations in nats."""
    found = {"last": {name: load(f"{folder}/{name}/measure.json")["last"]["exploitability"] for name in ARRIVING}}
    for kind in ("votes", "shares"):
        texts = [(COPY / folder / f"{kind}-{seed}.txt").read_text(encoding="utf-8") for seed in SEEDS]
        found[kind] = [float(re.search(r"of right sums .*truly (\S+)", text)[1]) for text in texts]
    deviates = [re.findall(r"deviates by (\S+) in all prompts, (\S+) in each", text) for text in texts]
    found["base"] = [float(rows[0][1]) for rows in deviates]
    found["common"] = [float(rows[1][0]) for rows in deviates]
    found["each"] = [float(rows[1][1]) for rows in deviates]
    return found


def read_real():
    measured = load(f"{FOLDER}/measure.json")
    found = {"base": measured["base"]}
    found |= {f"round {i}": row for i, row in enumerate(measured["rounds"], 1)}
    for seed in (1, 2):
        other = load(f"{FOLDER}/seed-{seed}.measure.json")
        found[f"seed {seed} base"], found[f"seed {seed} last"] = other["base"], other["rounds"][-1]
    found |= {"seed 0 base": found["base"], "seed 0 last": found["round 8"]}
    paper = load(f"{FOLDER}/paper.measure.json")
    found["paper base"], found["paper last"] = paper["base"], paper["rounds"][-1]
    found |= {"ifeval": load(f"{FOLDER}/ifeval.json"), "ability": load(f"{FOLDER}/ability.json")["policies"]}
    return found | {"average": measured["average"], "kinds": measured["constraints"], "rounds": real_rounds()}


def real_rounds():
    """What each round trained on, and what it cost, by number."""
    found = {}
    for row in lines(f"{FOLDER}/metrics.jsonl"):
        here = found.setdefault(f"r{row['round']}", {"losses": []})
        if "loss" in row:
            here["losses"].append(row["loss"])
            here |= {"best": row["best_log_ratio"], "worst": row["worst_log_ratio"]}
        else:
            here["target"] = row["mean_squared_target"]
    for row in lines(f"{FOLDER}/timings.jsonl"):
        here = found.setdefault(f"r{row['round']}", {})
        here[row["stage"]] = row["seconds"]
        here["peak_gb"] = max(here.get("peak_gb", 0), row["peak_gb"])
    return found


SEEN = ("pass:.3f", "quality:.3f", "on_topic:.2f", "distinct_bigrams:.3f", "tokens_unless_short:.0f", "log_likelihood:.2f")


def before_and_after(title, run, set_name):
    """A row of a run's base and last policy on a held-out set, with the gain."""
    cells = []
    for column in SEEN:
        name, form = column.split(":")
        cells.append(" → ".join(f"{{{run} {when}[{set_name}][{name}]:{form}}}" for when in ("base", "last")))
    last = f"{run} last[{set_name}]"
    gain = f"{{{last}[gain]:+.2f}} ({{{last}[gain_interval][0]:+.2f}} to {{{last}[gain_interval][1]:+.2f}})"
    return f"| {title} | {gain} | " + " | ".join(cells) + " |"


def seed_rows(run="seed"):
    for set_name, shown in (("topics", "topics"), ("kinds", "constraints")):
        for seed in SEEDS:
            yield before_and_after(f"{shown}, seed {seed}", f"{run} {seed}", set_name)


LORA = (
    "python -m real.instructions --seed 2 --out out/full-2 --measure-every 8  # its first round\n"
    "python -m real.instructions --lora 16 --lr 6e-4 --seed 0 --out out/lora-0 --measure-every 8\n"
    "python -m real.instructions --lora 16 --lr 6e-4 --seed 1 --out out/lora-1 --measure-every 8\n"
    "python -m real.instructions --lora 16 --lr 6e-4 --seed 2 --out out/lora-2 --measure-every 8\n"
    f"for seed in 0 1 2; do cp out/lora-$seed/measure.json {FOLDER}/lora-$seed.measure.json; done\n"
    f"for seed in 0 1 2; do cp out/lora-$seed/metrics.jsonl {FOLDER}/lora-$seed.metrics.jsonl; done\n"
    f"for run in full-2 lora-2; do cp out/$run/timings.jsonl {FOLDER}/$run.timings.jsonl; done"
)


def read_lora():
    found = {}
    for seed in SEEDS:
        measured = load(f"{FOLDER}/lora-{seed}.measure.json")
        found[f"lora {seed} base"], found[f"lora {seed} last"] = measured["base"], measured["rounds"][-1]
    for name in ("lora-2", "full-2"):
        (fit,) = [row for row in lines(f"{FOLDER}/{name}.timings.jsonl") if row["round"] == 1 and row["stage"] == "policy"]
        found[name] = {"fit": fit["seconds"], "gb": fit["peak_gb"]}
    return found


def other_rows():
    """The paper's setting; IFEval; perplexity and sums."""
    yield before_and_after("η = 1000, RMSProp 5e-7, one round", "paper", "topics")

    for name in ("base", "last", "average"):
        cells = []
        for level in ("prompt", "instruction"):
            place = f"ifeval[{name}][{level}]"
            low, high = (f"{{{place}[interval][{end}]:.3f}}" for end in (0, 1))
            ends = " to ".join(f"{{{place}[difference_interval][{end}]:+.3f}}" for end in (0, 1))
            cells.append(f"{{{place}[strict]:.3f}} ({low} to {high})" + (f", {ends}" if name != "base" else ""))
        yield f"| {name} | {cells[0]} | {cells[1]} |"

    for shown, name in (("base", "base"), ("round 4", "round-04"), ("last", "round-08"), ("average", "average")):
        place = f"ability[{name}]"
        ends = " to ".join(f"{{{place}[sums_interval][{end}]:.2f}}" for end in (0, 1))
        yield f"| {shown} | {{{place}[perplexity]:.1f}} | {{{place}[sums]:.2f}} ({ends}) |"


JUDGED = "docs/runs/smollm2-judge"


def read_people():
    report = load(f"{JUDGED}/report.json")
    return {"people": {name.removeprefix("LLMBar, "): judges for name, judges in report.items()}}


def people_rows():
    for name in ("PandaLM, held out", "Natural", "Neighbor", "GPTInst", "GPTOut", "Manual"):
        learned = f"{name}][learned"
        ends = " to ".join(f"{{people[{learned}][accuracy_interval][{end}]:.3f}}" for end in (0, 1))
        cells = [f"{{people[{learned}][pairs]:.0f}}", f"{{people[{learned}][accuracy]:.3f}} ({ends})"]
        cells += [f"{{people[{learned}][expected_calibration_error]:.3f}}", f"{{people[{name}][longer wins][accuracy]:.3f}}"]
        cells += [f"{{people[{learned}][longer_rate]:.3f}}", f"{{people[{learned}][longer_rate_of_labels]:.3f}}"]
        yield f"| {name if name[0] == 'P' else 'LLMBar, ' + name} | " + " | ".join(cells) + " |"


def real_rows():
    yield from seed_rows()
    yield from other_rows()
    policies = ["base", *(f"round {i}" for i in range(1, 9)), "average"]
    for set_name in ("topics", "kinds"):
        for name in policies:
            cell = f"{{{name}[{set_name}]"
            obeys = f"{cell}[pass]:.3f}} ({cell}[pass_interval][0]:.3f}} to {cell}[pass_interval][1]:.3f}})"
            columns = ("quality]:.3f", "on_topic]:.3f", "distinct_bigrams]:.3f", "tokens]:.0f", "log_likelihood]:.3f")
            columns = (*columns, "win_rate]:.3f")
            yield f"| {name} | {obeys} | " + " | ".join(f"{cell}[{column}}}" for column in columns) + " |"

    groups = (
        ("at least", "at most", "sentences", "paragraphs", "bullets", "numbered"),
        ("no commas", "keyword", "forbidden", "start", "title", "json"),
        ("between", "capitals", "end", "highlights", "lowercase"),
        ("placeholders", "postscript", "question", "quotes"),
    )
    for group in groups:
        for name in ("base", "last"):
            yield f"| {name} | " + " | ".join(f"{{kinds[{name}][{kind}]:.2f}}" for kind in group) + " |"

    for number in range(1, 9):
        here = f"{{rounds[r{number}]"
        losses = ", ".join(f"{here}[losses][{i}]:.1f}}" for i in range(3))
        seconds = f"{here}[responses]:.0f}}, {here}[logps]:.0f}}, {here}[policy]:.0f}}"
        ratios = f"{here}[best]:.1f}}, {here}[worst]:.1f}}"
        yield f"| {number} | {here}[target]:.1f}} | {losses} | {ratios} | {seconds} | {here}[peak_gb]:.1f}} |"


# ------------------------------------------------------------------------------------------------ all of them


TYPED = ("llm-judge", "times")


def typed(name):
    """Numbers of a source whose command needs a server or a clock: they are typed into its record."""
    return lambda: load(f"docs/numbers/{name}.json")["numbers"]


SOURCES = {
    "demo": Source(
        DEMO,
        read_demo,
        {
            README: [demo_row(name) for name in POLICIES],
            EVALUATION: [single_row("mixture of the 80 rounds", "average"), single_row("last round", "last")],
        },
    ),
    "targets": Source(target_commands(), read_targets, {LABORATORY: [target_row(name) for name in TARGETS]}),
    "skewed": Source(
        SKEWED,
        read_skewed,
        {
            LABORATORY: [
                f"There it is {shares_of('equilibrium')}",
                f"{shares_of('learned[endings]')} and an exploitability of {{learned[exploitability]:.3f}} with the learned",
                f"{shares_of('oracle[endings]')} and {{oracle[exploitability]:.3f}} with the oracle",
            ]
        },
    ),
    "single": Source(
        SINGLE,
        read_single,
        {EVALUATION: [single_row("mean of their weights", "mean"), single_row("distilled, 64 samples a prompt", "distilled")]},
    ),
    "best-of-16": Source(
        BEST,
        read_best,
        {
            EVALUATION: [
                "{base[rate]:.3f} (base), {last[rate]:.3f} (last)",
                "{mixture[rate]:.3f} (mixture; 95 % interval {mixture[low]:.3f} to {mixture[high]:.3f})",
            ]
        },
    ),
    "matrix": Source(
        MATRIX,
        read_matrix,
        {
            EVALUATION: [
                "loses to the earlier one in {losing:,.0f} of {pairs:,.0f} pairs of rounds",
                "round {later:.0f} to round {earlier:.0f} ({clearest:.3f})",
                "wins at least {least_of_average:.3f} against each",
            ]
        },
    ),
    "rps": Source(
        toy("rps", figure="rps-short"),
        read_rps,
        {
            LABORATORY: [
                "(log–log slope {slope_low:m.2f} to {slope_high:m.2f})",
                "after {rounds:.0f} rounds its average is exploitable by {low:.3f} to {high:.3f}, the exact one by {exact:.3f}",
            ]
        },
    ),
    "tabular": Source(
        toy("tabular"),
        read_tabular,
        {
            LABORATORY: [
                "below 1e-9 after {first:.0f} to {last:.0f} rounds at η = 1",
                "a moving reference after {moving[0]:,.0f} and {moving[1]:,.0f}",
            ]
        },
    ),
    "likelihood": Source(
        toy("likelihood", figure="likelihood"),
        read_likelihood,
        {
            LABORATORY: [
                "at most {sppo_at_2:.0f} % of the chosen responses lose likelihood, against {any[dpo][η2][fell]:.0f} % with DPO,"
                " or {right[dpo][η2][fell]:.0f} %",
                "({any[sppo][η1000][fell]:.0f} %, similar pairs {right[sppo][η1000][fell]:.0f} %)",
                "DPO ({any[dpo][η1000][fell]:.0f} %, {right[dpo][η1000][fell]:.0f} %)",
                *(likelihood_row(loss) for loss in LOSSES),
            ]
        },
    ),
    "ablations": Source(
        toy("ablations"),
        read_ablations,
        {LABORATORY: ["levels off at an exploitability of {scores:.3f}", "with the whole table it is at {table:.3f}"]},
    ),
    "judges": Source(
        toy("judges"),
        read_judges,
        {
            LABORATORY: [
                "ends at an exploitability of {bradley_terry:.2f}",
                "leads to {gpm:.3f} ({truth:.3f} with the true preferences)",
                "likes length by {logits:g} logits moves the equilibrium to an exploitability of {biased:.3f}",
                "brings it back to {repaired:.3f}",
            ]
        },
    ),
    "relatives": Source(
        toy("relatives", figure="relatives")
        + "\npython -m toy.relatives --seed 1 --out out/toy-1\npython -m toy.relatives --seed 2 --out out/toy-2",
        read_relatives,
        {
            LABORATORY: [
                "APO's and MNPO's last policies run around at {apo:.1f}",
                "shrinks its circle, but slowly: {code:.1f}",
                "exploitable by up to {with_kl:.2f}",
                "(2,400 judged pairs) are at {seed 0[16 1]:.3f}, 5 samples with all pairs (3,000) at {seed 0[5 4]:.3f},"
                " 16 with all pairs (36,000) at {seed 0[16 15]:.3f}",
                "Seeds 1 and 2: {seed 1[16 1]:.3f}, {seed 1[5 4]:.3f}, {seed 1[16 15]:.3f} and"
                " {seed 2[16 1]:.3f}, {seed 2[5 4]:.3f}, {seed 2[16 15]:.3f}",
                "the average is at {grpo:.3f} after 10,000 rounds",
                "goes on falling ({weighted:.3f})",
            ]
        },
    ),
    "arrival": Source(
        "make demo\nmkdir -p out/toy\npython -m toy.arrival out/demo/world out/demo/run > out/toy/arrival.txt",
        read_arrival,
        {LABORATORY: [*arrival_rows()]},
    ),
    "arrives": Source(
        arrives_commands(),
        read_arrives,
        {
            LABORATORY: [
                "| one vote a pair | {votes[0]:.3f}, {votes[1]:.3f}, {votes[2]:.3f}"
                " | {last[votes-0]:.3f}, {last[votes-1]:.3f}, {last[votes-2]:.3f} |",
                "| shares of votes | {shares[0]:.3f}, {shares[1]:.3f}, {shares[2]:.3f}"
                " | {last[shares-0]:.3f}, {last[shares-1]:.3f}, {last[shares-2]:.3f} |",
                "| oracle | 0 | {last[oracle-0]:.3f}, {last[oracle-1]:.3f}, {last[oracle-2]:.3f} |",
                "common deviations are {common[0]:.3f}, {common[1]:.3f} and {common[2]:.3f} nats, and each prompt's own are"
                " {each[0]:.3f}, {each[1]:.3f} and {each[2]:.3f}"
                " (in the base policies {base[0]:.3f}, {base[1]:.3f} and {base[2]:.3f})",
            ]
        },
    ),
    "social-choice": Source(
        toy("social_choice", f" --votes {SHARED}/pandalm/pairs.jsonl", "social_choice"),
        read_social_choice,
        {
            LABORATORY: [
                "in {borda:.0f} % of the random games of five",
                "can move it in {copy:.0f} %",
                "so do {winners:.0f} of the {tables:.0f} tables",
                "with another in {tied:.0f}",
            ]
        },
    ),
    "stories": Source(
        f"python -m toy.stories --policy {SHARED}/stories260K --out out/stories\ncp out/stories/stories.png figures/stories.png",
        read_stories,
        {
            LABORATORY: [
                "the last policy beats the base model {win_rate:.2f} of the time",
                "({last_likelihood:m.2f} nats a token against {base_likelihood:m.2f})",
                "{average:.2f} against {base:.2f} (base) and {last:.2f} (last)",
            ]
        },
    ),
    "llm-judge": Source(
        "the commands of docs/judges.md, a language model as judge",
        typed("llm-judge"),
        {JUDGES: ["accuracy {accuracy:.2f}, calibration error {error:.2f}", "(order inconsistency {inconsistency:.1f})"]},
    ),
    "times": Source(
        "time make demo; time make test",
        typed("times"),
        {
            README: [
                "{demo_minutes:.0f} min {demo_seconds:.0f} s on two cores",
                "`make test` {test_minutes:.0f} min {test_seconds:.0f} s",
            ]
        },
    ),
    "neighbour": Source(
        "python -m real.smollm2 --out out/smollm2\npython benchmarks/neighbour.py --policy out/smollm2 --stages 4",
        read_neighbour,
        {
            "docs/benchmarks.md": [
                "| unset: two | {all[0]:.0f} | {all[1]:.0f} |",
                "| 1 | {one[0]:.0f} | {one[1]:.0f} |",
                "| 0: as many as there are idle cores | {idle_cores[0]:.0f} | {idle_cores[1]:.0f} |",
                "keeps {share:.2f} of the quiet speed",
            ]
        },
        shipped=True,
    ),
    "bench-real": Source(
        "python -m real.smollm2 --out out/smollm2\n"
        "python -m venv out/llama\n"
        "out/llama/bin/pip install xllamacpp\n"
        "python benchmarks/real.py --llama out/llama/bin/python --only fit lora judge round memory\n"
        "python benchmarks/real.py --llama out/llama/bin/python --only sample --prompts 24",
        lambda: read_bench(REAL_BENCH),
        {"docs/benchmarks.md": [*real_bench_rows(), "the last command took {minutes:.0f} minutes"]},
        shipped=True,
    ),
    "bench": Source("make bench", read_bench, {BENCH: [*bench_rows(), "it took {minutes:.0f} minutes"]}, shipped=True),
    "real": Source(
        "make real",
        read_real,
        {
            README: [
                "| before | {base[topics][pass]:.3f} | {base[topics][quality]:.3f} | {base[topics][log_likelihood]:.3f} |",
                "| after eight rounds | {round 8[topics][pass]:.3f} | {round 8[topics][quality]:.3f}"
                " | {round 8[topics][log_likelihood]:.3f} |",
            ],
            REAL: [*real_rows()],
        },
        shipped=True,
    ),
    "real-lora": Source(
        "python -m real.smollm2 --out out/smollm2\n" + LORA,
        read_lora,
        {
            REAL: [
                *seed_rows("lora"),
                "took {lora-2[fit]:.0f} seconds, with all weights {full-2[fit]:.0f}, and {lora-2[gb]:.1f} GB"
                " at the peak, not {full-2[gb]:.1f}:",
            ]
        },
        shipped=True,
    ),
    "people": Source(
        "python -m real.smollm2 --out out/smollm2\n"
        f"python -m real.judge --pandalm {SHARED}/pandalm/pairs.jsonl --llmbar {SHARED}/llmbar/pairs.jsonl",
        read_people,
        {f"{JUDGED}/README.md": [*people_rows()]},
        shipped=True,
    ),
}


# ------------------------------------------------------------------------------------------------ records and the list


def record_of(name):
    return load(f"docs/numbers/{name}.json")


def numbers(name):
    source = SOURCES[name]
    return numbers_of(source.read() if source.shipped else record_of(name)["numbers"])


def pieces():
    """(source, page, piece of it with its numbers) of every published number."""
    for name, source in SOURCES.items():
        found = numbers(name)
        for page, templates in source.pages.items():
            for template in templates:
                yield name, page, template.format(**found)


def machine():
    """Its processor, its cores and torch's version, in words."""
    import torch

    model = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").is_file():
        rows = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((row.split(": ")[1] for row in rows if row.startswith("model name")), model)
    return f"{model}, {os.cpu_count()} cores, torch {torch.__version__}"


def commit():
    command = ["git", "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


def write_record(name, seconds, made_from):
    source = SOURCES[name]
    record = {"command": source.command.splitlines(), "commit": made_from, "machine": machine(), "seconds": round(seconds)}
    record |= {} if source.shipped else {"numbers": source.read()}
    RECORDS.mkdir(exist_ok=True)
    text = json.dumps(record, indent=1, ensure_ascii=False)
    (RECORDS / f"{name}.json").write_text(text + "\n", encoding="utf-8")


def make_copy():
    """The last commit as a tree of its own, with the environment and the inputs of this one beside it; returns its name."""
    made_from = commit()
    shutil.rmtree(COPY, ignore_errors=True)
    COPY.mkdir(parents=True)
    tree = subprocess.run(["git", "archive", made_from], cwd=ROOT, capture_output=True, check=True).stdout
    subprocess.run(["tar", "-x"], cwd=COPY, input=tree, check=True)
    for link, target in ((COPY / ".venv", ROOT / ".venv"), (COPY.parent / "shared", ROOT.parent / "shared")):
        link.unlink(missing_ok=True)
        link.symlink_to(target)
    return made_from


def refresh(name, made_from):
    """Run the commands of a source in one shell, and record what came out."""
    print(f"{name}:\n{SOURCES[name].command}", flush=True)
    start = time.time()
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    subprocess.run(["bash", "-ec", SOURCES[name].command], cwd=COPY, env=os.environ | {"PATH": path}, check=True)
    # What was written just now: files of the commit are as old as it is.
    for file in (file for folder in WRITTEN for file in (COPY / folder).rglob("*")):
        if file.is_file() and file.stat().st_mtime >= start:
            shutil.copy(file, ROOT / file.relative_to(COPY))
    write_record(name, time.time() - start, made_from)


def listing():
    """docs/numbers.md."""
    rows = []
    for name, page, piece in pieces():
        record = record_of(name)
        shown = " ".join(piece.split()).replace("|", "\\|")
        link = f"[{page}]({os.path.relpath(ROOT / page, LIST.parent)})"
        rows.append(f"| {shown} | {link} | [{name}](numbers/{name}.json) | {record['commit']} | {record['machine']} |")

    heading = """# Published numbers

Written by `make numbers`, which runs every command again (`python tests/refresh_numbers.py NAME` runs one), records what came
out in `docs/numbers/`, and fails where a page says something else. A record has its command in full. Where the machine was not
recorded, the numbers were measured before there were records.

| number | page | command | commit | machine |
|---|---|---|---|---|
"""
    return heading + "\n".join(rows) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    runnable = [name for name in SOURCES if name not in TYPED]
    names = dict(nargs="*", metavar="NAME", choices=[*runnable, []])
    parser.add_argument("names", help=f"of sources [all]: {', '.join(runnable)}", **names)
    parser.add_argument("--page", action="store_true", help="run nothing, write docs/numbers.md from the records")
    args = parser.parse_args()
    if not args.page:
        made_from = make_copy()
        for name in args.names or runnable:
            refresh(name, made_from)
    LIST.write_text(listing(), encoding="utf-8")

    wrong = list(missing())
    for line in wrong:
        print(line, file=sys.stderr)
    return int(bool(wrong))


def missing():
    """What should be on a page and is not, in words."""
    pages = {}
    for name, page, piece in pieces():
        text = pages.setdefault(page, squeezed((ROOT / page).read_text(encoding="utf-8")))
        if squeezed(piece) not in text:
            yield f"{page}: {squeezed(piece)!r} is not there; it is what {name} gave (docs/numbers/{name}.json)"


def squeezed(text):
    return " ".join(text.split())


if __name__ == "__main__":
    sys.exit(main())
