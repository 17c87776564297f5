"""A judge that learned from people: SmolLM2 with a head, fitted to the votes of annotators.

    python -m real.smollm2 --out out/smollm2
    python -m real.judge --pandalm PANDALM/pairs.jsonl --llmbar LLMBAR/pairs.jsonl \\
        --policy out/smollm2 --out out/smollm2-judge

PandaLM's test set (2306.05087) has pairs of responses with three votes each, LLMBar (2310.07641)
pairs that experts agree on, in sets: "Natural", and four adversarial ones, in which the response
that looks better is the worse one. Both are pair files, as data.read_pairs takes them; the votes
are shares, ties ½; LLMBar's rows have their `set` as well.

A share of PandaLM's prompts is held out, and nothing is chosen by what they say: the judge is that
of the last step. Beside it stand two that need no training: "longer wins", with the probability
that fits the training pairs, and a coin.

    OUT/training.jsonl, held-out.jsonl    PandaLM's pairs, split by prompt
    OUT/judge/                            the judge, as `prefmodel.py train` leaves it
    OUT/preferences/SET.jsonl             what it says of the pairs of a set
    OUT/report.json, report.png           accuracy, calibration and cross-entropy by set

Whenever it is stopped, the same command continues, to the same numbers.
"""

import argparse
import sys
from pathlib import Path

import torch
from torch import Tensor

import prefmodel
from data import read_pairs, text_field
from engine.command import Parser, add_flags, check_settings, exit_code
from engine.figures import BLUE, GREY, ORANGE, new_figure, error_bars, write_figure
from engine.files import keep_lines, read_lines, unfinished_folder, write_json, write_lines
from engine.run_folder import claim
from evaluate.judge_report import agreement, ask, calibration, longer_rate
from judges.load import load_judge
from prefmodel import JudgeConfig, split_pairs

# One pass over 750 pairs, a pair at a time, which needs the least memory. One text in nine is
# longer than 256 tokens.
RECIPE = dict(
    held_out=0.25, cyclic=0, epochs=1, batch=8, micro_batch=1, lr=3e-5, max_tokens=256,
)  # fmt: skip
FLAGS = (
    "scalar", "cyclic", "template", "epochs", "batch", "micro_batch", "max_tokens", "lr",
    "held_out", "dtype", "seed", "save_minutes", "device",
)  # fmt: skip
HELD_OUT = "PandaLM, held out"
RESAMPLES = 2000
COLOURS = {"learned": BLUE, "longer wins": ORANGE}

# --------------------------------------------------------------------------------------- the pairs


def llmbar_sets(path: str) -> dict[str, list[dict]]:
    """{set: its pairs}, in the order of the file."""
    sets = {}
    for (where, row), pair in zip(read_lines(path), read_pairs(path), strict=True):
        name = "LLMBar, " + text_field(row, "set", where).removeprefix("Adversarial/")
        sets.setdefault(name, []).append(pair)
    return sets


def remembered(path: Path, judge: str, pairs: list[dict], device: str) -> Tensor:
    """(n,) P(chosen beats rejected) of a judge folder, read, or asked for and written."""
    if not path.exists():
        preference, _ = ask(load_judge(judge, device), pairs, path.stem, size=4, seed=0)
        rows = [pair | {"preference": p} for pair, p in zip(pairs, preference.tolist())]
        write_lines(path, rows)

    rows = [row for _, row in read_lines(path)]
    preference = [row.pop("preference", None) for row in rows]
    if rows != pairs:
        raise ValueError(f"{path}: not of these pairs; delete the folder to ask the judge again")
    return torch.tensor(preference, dtype=torch.float64)


# --------------------------------------------------------------------------------------- numbers


def lengths(pairs: list[dict]) -> Tensor:
    """(n,) how many characters longer the first response is."""
    difference = [len(pair["chosen"]) - len(pair["rejected"]) for pair in pairs]
    return torch.tensor(difference, dtype=torch.float64)


def labels(pairs: list[dict]) -> Tensor:
    return torch.tensor([pair["probability"] for pair in pairs], dtype=torch.float64)


def interval(pairs: list[dict], preference: Tensor) -> list[float]:
    """The 95 % bootstrap interval of the accuracy; prompts are drawn, with all of their pairs."""
    prompts = list(dict.fromkeys(pair["prompt"] for pair in pairs))
    number = {prompt: n for n, prompt in enumerate(prompts)}
    place = torch.tensor([number[pair["prompt"]] for pair in pairs])

    label = labels(pairs)
    decided = (label != 0.5).double()
    right = 0.5 + 0.5 * torch.sign(preference - 0.5) * torch.sign(label - 0.5)
    right = torch.zeros(len(prompts)).double().index_add(0, place, right * decided)
    decided = torch.zeros(len(prompts)).double().index_add(0, place, decided)

    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(len(prompts), (RESAMPLES, len(prompts)), generator=generator)
    accuracy = right[drawn].sum(-1) / decided[drawn].sum(-1)
    return accuracy.nanquantile(torch.tensor([0.025, 0.975]).double()).tolist()


def numbers(pairs: list[dict], preference: Tensor) -> dict:
    """What a judge is worth on a set."""
    label = labels(pairs)
    result = agreement(preference, label)
    result["accuracy_interval"] = interval(pairs, preference)
    error = calibration(preference, label)["expected_calibration_error"]
    result["expected_calibration_error"] = error
    result["longer_rate"] = longer_rate(preference, lengths(pairs))
    result["longer_rate_of_labels"] = longer_rate(label, lengths(pairs))
    return result


def compare(sets: dict, learned: dict, training: list[dict]) -> dict:
    """{set: {judge: numbers}} of the learned judge and the two trivial ones."""
    rate = longer_rate(labels(training), lengths(training))
    result = {}
    for name, pairs in sets.items():
        longer = 0.5 + (rate - 0.5) * lengths(pairs).sign()
        coin = torch.full_like(longer, 0.5)
        judges = {"learned": learned[name], "longer wins": longer, "coin": coin}
        result[name] = {judge: numbers(pairs, p) for judge, p in judges.items()}
    return result


# --------------------------------------------------------------------------------------- showing


def print_table(result: dict) -> None:
    print(f"{'':24}{'judge':12}{'accuracy':>9}   {'95 %':14}{'ECE':>7}{'nats':>8}{'longer':>8}")
    for name, judges in result.items():
        for judge, row in judges.items():
            low, high = row["accuracy_interval"]
            line = f"{row['accuracy']:9.3f}   {low:.3f} to {high:.3f}"
            line += f"{row['expected_calibration_error']:7.3f}{row['cross_entropy']:8.3f}"
            print(f"{name:24}{judge:12}{line}{row['longer_rate']:8.3f}")


def draw(result: dict):
    """Accuracy by set, with intervals."""
    figure = new_figure(9, 4.2)
    axes = figure.subplots()
    for shift, (judge, colour) in zip((-0.2, 0.2), COLOURS.items()):
        rows = [judges[judge] for judges in result.values()]
        value = [row["accuracy"] for row in rows]
        error = error_bars(value, [row["accuracy_interval"] for row in rows])
        places = [n + shift for n in range(len(rows))]
        style = dict(width=0.38, color=colour, capsize=3, ecolor="black")
        axes.bar(places, value, yerr=error, label=judge, **style)

    axes.axhline(0.5, color=GREY, linewidth=1, linestyle="--", label="coin")
    names = [f"{name}\n{judges['coin']['pairs']} pairs" for name, judges in result.items()]
    axes.set_xticks(range(len(names)), [name.replace(", ", "\n", 1) for name in names])
    axes.set(ylabel="accuracy, with 95 % interval over prompts", ylim=(0, 1))
    axes.set_title("How often a judge agrees with people")
    axes.legend(frameon=False, ncols=3, loc="upper right")
    return figure


# --------------------------------------------------------------------------------------- command


def play(args: argparse.Namespace) -> None:
    """The whole command: pairs, training, preferences, numbers and figure."""
    check_settings(args, JudgeConfig)
    out = Path(args.out)
    sets = llmbar_sets(args.llmbar)  # before an hour of training
    settings = {name: getattr(args, name) for name in FLAGS} | {"policy": args.policy}
    claim(out, settings, JudgeConfig)

    # Split here and not by the training: what it holds out chooses its best epoch.
    generator = torch.Generator().manual_seed(args.seed)
    training, held_out = split_pairs(read_pairs(args.pandalm), args.held_out, generator)
    keep_lines(out / "training.jsonl", training, "pairs than --pandalm gives")
    keep_lines(out / "held-out.jsonl", held_out, "pairs than --pandalm gives")
    sets = {HELD_OUT: held_out} | sets

    judge = out / "judge"
    if not judge.exists() or unfinished_folder(judge).exists():
        changes = {"pairs": str(out / "training.jsonl"), "backbone": args.policy, "out": str(judge)}
        changes |= {"held_out": 0.0, "patience": None, "from_scratch": False}
        prefmodel.train(argparse.Namespace(**(vars(args) | changes)))

    learned = {}
    for name, pairs in sets.items():
        path = out / "preferences" / f"{name.replace(', ', '-').replace(' ', '-')}.jsonl"
        learned[name] = remembered(path, str(judge), pairs, args.device)

    result = compare(sets, learned, training)
    write_json(out / "report.json", result)
    write_figure(out / "report.png", draw(result))
    print_table(result)
    print(f"\n{out}: judge, report.json, report.png")


def main(arguments: list[str] | None = None) -> int:
    parser = Parser(description=__doc__)
    parser.add_argument("--pandalm", required=True, help="PandaLM's pairs, with shares of votes")
    parser.add_argument("--llmbar", required=True, help="LLMBar's pairs, with a set each")
    parser.add_argument("--policy", default="out/smollm2", help="the backbone [out/smollm2]")
    parser.add_argument("--out", default="out/smollm2-judge", help="folder [out/smollm2-judge]")
    add_flags(parser, JudgeConfig, FLAGS, **RECIPE)
    args = parser.parse_args(arguments)
    stopped = f"stopped; the same command continues in {args.out}"
    inputs = (args.pandalm, args.llmbar, args.policy)
    return exit_code("real.judge", lambda: play(args), stopped, args.out, inputs)


if __name__ == "__main__":
    sys.exit(main())
