"""What a judge is worth: agreement with labelled pairs, calibration, circles, a taste for length.

    python -m evaluate judge --judge SPEC --pairs pairs.jsonl --out DIR

The judge sees the two responses of a pair in random order. `preference` is P(first beats second),
`label` the share of votes for the first, in [0, 1], ½ for a tie, and `difference` the first's
length minus the second's, in characters: three tensors (n,). L is the preference's logit. Turning
a pair around changes no number.
"""

from collections import defaultdict
from collections.abc import Iterable
from itertools import groupby
from functools import partial

import torch
from torch import Tensor

from engine.figures import BLUE, GREY, ORANGE, new_figure
from engine.journal import NOTHING, Journal
from engine.progress import tqdm
from judges.base import BATCH, Judge, checked, listed_tables, put

BINS = 10  # of confidence, from ½ to 1
VOTES = {1: 1.0, 2: 0.0, 0: 0.5}  # a vote as a label: 1 chosen, 2 rejected, 0 a tie
PARTS = 8  # of the pairs by length, in the figure

# ------------------------------------------------------------------------ pairs


def agreement(preference: Tensor, label: Tensor) -> dict:
    """Accuracy over the pairs with a majority, and the cross-entropy with all labels, in nats.

    A preference of ½ is half right.
    """
    decided = label != 0.5
    right = ((preference > 0.5) == (label > 0.5)).double().masked_fill(preference == 0.5, 0.5)

    # Clamped: one preference of exactly 0 that is wrong would make the mean infinite.
    p = preference.double().clamp(1e-7, 1 - 1e-7)
    return {
        "pairs": len(label),
        "decided": int(decided.sum()),
        "accuracy": right[decided].mean().item() if decided.any() else None,
        "cross_entropy": -(label * p.log() + (1 - label) * (1 - p).log()).mean().item(),
    }


def calibration(preference: Tensor, label: Tensor) -> dict:
    """Reliability: by bins of confidence max(P, 1 - P), the share of votes for the side it favours.

    The expected calibration error is the mean of |share - mean confidence| over the bins, weighted
    by their pairs.
    """
    # A judge that says ½ favours no side: half of the votes count as right.
    favoured = torch.where(preference > 0.5, label, 1 - label).double()
    favoured = favoured.masked_fill(preference == 0.5, 0.5)

    # The 1e-5 is there for rounding: .8 and 1 - .2 belong in one bin.
    confidence = torch.maximum(preference, 1 - preference).double()
    place = ((confidence - 0.5) * 2 * BINS + 1e-5).long().clamp(max=BINS - 1)

    bins = []
    for b in range(BINS):
        here = place == b
        if here.any():
            row = {"pairs": int(here.sum())}
            row["confidence"] = confidence[here].mean().item()
            row["share"] = favoured[here].mean().item()
            bins.append(row)

    error = sum(row["pairs"] * abs(row["share"] - row["confidence"]) for row in bins) / len(label)
    return {"expected_calibration_error": error, "bins": bins}


# ------------------------------------------------------------------------ length


def longer_rate(preference: Tensor, difference: Tensor) -> float | None:
    """Mean P(longer beats shorter) over the pairs of different lengths, None if there are none.

    Given labels instead of preferences, it is the share of votes for the longer response.
    """
    unlike = difference != 0
    if not unlike.any():
        return None
    return 0.5 + (difference.sign() * (preference - 0.5))[unlike].mean().item()


def length_surplus(preference: Tensor, label: Tensor, difference: Tensor) -> float | None:
    """Length bias beyond the labels, in win rate; 0 if unbiased, at any confidence.

    Least squares of label - ½ ≈ a (preference - ½) + b sign(difference): the judge is then
    (label - ½)/a, plus -b/a for the longer response. None where the judge says next to nothing
    that length does not (a < 0.1), or no lengths differ.
    """
    x = torch.stack([preference - 0.5, difference.sign()], 1).double()
    y = (label.double() - 0.5)[:, None]

    # A judge that sees only length makes the columns parallel: gelsd bears a matrix of rank 1.
    fit = torch.linalg.lstsq(x, y, rcond=1e-4, driver="gelsd")
    a, b = fit.solution[:, 0].tolist()
    if a > 0.1 and (difference != 0).any():
        return -b / a
    return None


def length_effect(opinion: Tensor, difference: Tensor) -> float | None:
    """Correlation of an opinion, a logit or label - ½, with the difference of lengths.

    Each pair counts in both orders, so both means are 0: Σ xy/√(Σ x² Σ y²). None where no lengths
    differ, or every opinion is 0.
    """
    x = opinion.double()
    y = difference.double()
    scale = (x.square().sum() * y.square().sum()).sqrt()
    return ((x * y).sum() / scale).item() if scale > 0 else None


def length_numbers(preference: Tensor, label: Tensor, difference: Tensor) -> dict:
    return {
        "longer_rate": longer_rate(preference, difference),
        "longer_rate_of_labels": longer_rate(label, difference),
        "length_surplus": length_surplus(preference, label, difference),
        "length_correlation": length_effect(torch.logit(preference, eps=1e-7), difference),
        "length_correlation_of_labels": length_effect(label - 0.5, difference),
    }


def longer_wins(preference: Tensor, difference: Tensor) -> list[dict]:
    """For the figure: P(longer beats shorter) of each pair, sorted by the difference of lengths."""
    lean = (difference.sign() * (preference - 0.5)).tolist()
    gap = difference.abs().tolist()
    rows = sorted(zip(gap, lean), key=lambda row: row[0])
    return [{"difference": gap, "preference": 0.5 + lean} for gap, lean in rows]


# ------------------------------------------------------------------------ tables


def triples(table: Tensor) -> tuple[int, int]:
    """(K, K) P(i beats j), NaN where nobody judged -> (complete triples, those in a circle).

    A triple is complete if its three pairs are judged.
    """
    wins = (table > 0.5).double()
    known = (~table.isnan()).double().fill_diagonal_(0)

    # The trace of a cube counts closed walks of three steps. A triple has six, from three starts
    # in two directions; a circle can be walked in one direction only.
    full = round(torch.trace(known @ known @ known).item()) // 6
    circles = round(torch.trace(wins @ wins @ wins).item()) // 3
    return full, circles


def decompose(table: Tensor) -> tuple[Tensor, Tensor]:
    """(K, K) preferences -> (scalar part r_i - r_j, cyclic rest) of their logits, r the row means.

    The Helmholtz–Hodge decomposition of a skew-symmetric table: exact, no model is fitted; the two
    are orthogonal, since the rest has row sums 0.
    """
    logit = torch.logit(table.double(), eps=1e-7)
    score = logit.mean(-1)
    scalar = score[:, None] - score
    return scalar, logit - scalar


def circles_of(tables: list[Tensor]) -> dict:
    """Of (K, K) tables: triples, circles among them, cyclic share of the logits' squares."""
    counts = [triples(table) for table in tables]
    full = sum(count[0] for count in counts)
    circles = sum(count[1] for count in counts)

    # A table with gaps has no row means.
    parts = [decompose(table) for table in tables if not table.isnan().any()]
    scalar = sum(part[0].square().sum().item() for part in parts)
    cyclic = sum(part[1].square().sum().item() for part in parts)
    return {
        "tables": len(tables),
        "triples": full,
        "intransitive_triples": circles,
        "intransitive_share": circles / full if full else None,
        "cyclic_share": cyclic / (scalar + cyclic) if scalar + cyclic else None,
    }


def label_tables(pairs: list[dict], label: Iterable[float]) -> list[Tensor]:
    """One (K, K) table of mean labels for each prompt, NaN where nobody judged.

    Responses are told apart by their models' names, or else by their texts.
    """
    votes = defaultdict(lambda: defaultdict(list))  # prompt -> (first, second) -> labels
    for pair, value in zip(pairs, label):
        # By name where that is possible: two models may have given the same text.
        first = pair.get("chosen_model")
        second = pair.get("rejected_model")
        if first is None or second is None or first == second:
            first = pair["chosen"]
            second = pair["rejected"]
        votes[pair["prompt"]][first, second].append(value)
        votes[pair["prompt"]][second, first].append(1 - value)

    tables = []
    for judged in votes.values():
        names = sorted({name for name, _ in judged})
        cells = [[judged.get((a, b), [float("nan")]) for b in names] for a in names]
        table = torch.tensor([[sum(cell) / len(cell) for cell in row] for row in cells])
        tables.append(table.fill_diagonal_(0.5))
    return tables


def response_sets(pairs: list[dict]) -> list[tuple[str, list[str]]]:
    """(prompt, its distinct response texts) for each prompt that has three or more."""
    # Dictionaries and not sets, since they keep the order of the file.
    texts = defaultdict(dict)
    for pair in pairs:
        texts[pair["prompt"]] |= {pair["chosen"]: None, pair["rejected"]: None}
    return [(prompt, list(row)) for prompt, row in texts.items() if len(row) > 2]


def voters(pairs: list[dict]) -> list[list[float]]:
    """The labels of each single annotator; none unless every pair has the same number of votes."""
    counts = {len(pair.get("votes", ())) for pair in pairs}
    if len(counts) > 1:
        return []
    return [[VOTES[pair["votes"][a]] for pair in pairs] for a in range(counts.pop())]


# ------------------------------------------------------------------------ the report


@torch.no_grad()
def report(
    judge, pairs: list[dict], name: str = "", size: int = BATCH, seed: int = 0,
    journal: Journal = NOTHING,
) -> dict:  # fmt: skip
    """Every number of a judge on labelled pairs, as data.read_pairs gives them.

    `name` is what an error message calls the judge; `size` pairs are judged at a time, with sides
    drawn at random from `seed`; `journal` keeps what it says. ValueError if the judge returns
    anything but preferences.
    """
    label = torch.tensor([pair["probability"] for pair in pairs], dtype=torch.float64)
    difference = [len(pair["chosen"]) - len(pair["rejected"]) for pair in pairs]
    difference = torch.tensor(difference, dtype=torch.float64)
    preference, extras = ask(judge, pairs, name, size, seed, journal)

    # The circles of a judge need all responses to a prompt in one table.
    tables = []
    for prompt, texts in tqdm(response_sets(pairs), desc="all responses of a prompt", leave=False):
        table = journal.keep(
            f"all of {prompt}", partial(listed_tables, judge, [prompt], [texts], name)
        )
        tables.append(torch.tensor(table[0]))

    result = agreement(preference, label) | calibration(preference, label)
    result |= length_numbers(preference, label, difference)
    result["judge"] = circles_of(tables)
    result["labels"] = circles_of(label_tables(pairs, label.tolist()))

    # Labels of 0 and 1 have no logits that could have a cyclic share.
    result["labels"].pop("cyclic_share")
    single = [circles_of(label_tables(pairs, vote)) for vote in voters(pairs)]
    if single:
        result["annotators"] = [row["intransitive_triples"] for row in single]
    result |= extras
    result["longer_wins"] = longer_wins(preference, difference)
    return result


def ask(
    judge, pairs: list[dict], name: str, size: int, seed: int, journal: Journal = NOTHING
) -> tuple[Tensor, dict[str, float]]:
    """P(chosen beats rejected) (n,) float64, and the means of the judge's extra numbers."""
    turned = torch.rand(len(pairs), generator=torch.Generator().manual_seed(seed)) < 0.5
    sides = [[pair["chosen"], pair["rejected"]] for pair in pairs]
    sides = [row[::-1] if turn else row for row, turn in zip(sides, turned)]
    prompts = [pair["prompt"] for pair in pairs]

    # A judge that takes prompts one by one has each answer kept at once.
    size = min(size, getattr(judge, "together", size))
    tables = []
    extras = defaultdict(list)
    for start in tqdm(range(0, len(pairs), size), desc="pairs", unit="batch", leave=False):
        batch = slice(start, start + size)
        ask = partial(answers, judge, prompts[batch], sides[batch], name)
        table, more = journal.keep(f"pairs from {start}", ask)
        tables.append(torch.tensor(table))

        # Disagreement and inconsistency are the same seen from either side: nothing to turn back.
        for key, value in more.items():
            extras[key].append(torch.tensor(value)[:, 0, 1])

    preference = torch.cat(tables)[:, 0, 1].double()
    preference = torch.where(turned, 1 - preference, preference)
    return preference, {key: torch.cat(values).mean().item() for key, values in extras.items()}


def answers(judge, prompts: list[str], sides: list[list[str]], name: str) -> tuple[list, dict]:
    """What `examine` finds, checked, as lists that a journal can keep."""
    tables, more = put(judge, lambda: examine(judge, prompts, sides), prompts, name)
    tables = checked(tables, prompts, 2, name)
    return tables.tolist(), {key: value.tolist() for key, value in more.items()}


def examine(judge, prompts: list[str], responses: list[list[str]]) -> tuple[Tensor, dict]:
    """Tables and extra numbers (see judges/base.py); a judge of another class has tables only."""
    if isinstance(judge, Judge):
        return judge.examine(prompts, responses)
    return judge.preferences_many(prompts, responses), {}


# ------------------------------------------------------------------------ showing it


def print_report(result: dict) -> None:
    """One line a number; "-" where a number cannot be given."""

    def line(name, value, form=".4f"):
        text = "-" if value is None else format(value, form)
        print(f"{name:58}{text:>10}")

    line("pairs", result["pairs"], "d")
    line(f"accuracy on the {result['decided']} with a majority", result["accuracy"])
    line("cross-entropy with the labels, nats (a coin has 0.6931)", result["cross_entropy"])
    line("expected calibration error", result["expected_calibration_error"])

    line("mean P(longer beats shorter)", result["longer_rate"])
    line("share of votes for the longer", result["longer_rate_of_labels"])
    line("what it gives to the longer beyond the votes", result["length_surplus"])
    line("correlation of its logit with length", result["length_correlation"])
    line("correlation of the labels with length", result["length_correlation_of_labels"])

    for name in ("judge", "labels"):
        row = result[name]
        line(f"{name}: intransitive of {row['triples']} triples", row["intransitive_triples"], "d")
    for number, count in enumerate(result.get("annotators", ()), 1):
        line(f"annotator {number}: intransitive triples", count, "d")
    line("share of its logits' squares that no scores explain", result["judge"]["cyclic_share"])

    if "order_inconsistency" in result:
        line("order inconsistency, mean |L_ij + L_ji|", result["order_inconsistency"])
    if "ensemble_disagreement" in result:
        line("disagreement in the ensemble, standard deviation", result["ensemble_disagreement"])


def draw(result: dict):
    """Left: reliability. Right: how often the longer response wins, by difference of lengths."""
    figure = new_figure(10, 4.4)
    reliability, length = figure.subplots(1, 2)
    draw_reliability(reliability, result)
    draw_length(length, result["longer_wins"])
    return figure


def draw_reliability(axes, result: dict) -> None:
    """Confidence against votes: a calibrated judge lies on the diagonal."""
    bins = result["bins"]
    confidence = [row["confidence"] for row in bins]
    share = [row["share"] for row in bins]
    area = [20 + 400 * row["pairs"] / result["pairs"] for row in bins]

    axes.plot([0.5, 1], [0.5, 1], "--", color=GREY, label="calibrated")
    axes.plot(confidence, share, color=BLUE, linewidth=1)
    axes.scatter(confidence, share, area, BLUE, label="judge (area: number of pairs)")
    axes.set(xlabel="confidence of the judge", ylabel="share of votes for the side it favours")
    axes.set(ylim=(-0.03, 1.06))
    axes.set_title(f"Calibration error {result['expected_calibration_error']:.3f}")
    axes.legend(frameon=False, loc="lower right")


def draw_length(axes, rows: list[dict]) -> None:
    """Means over parts of about equally many pairs, since most differ little in length."""
    points = length_parts([row for row in rows if row["difference"] > 0])
    axes.axhline(0.5, color=GREY, linewidth=0.8)
    if points:  # an empty line would move the axes
        axes.plot(*zip(*points), "o-", color=ORANGE)

    axes.set(xlabel=f"difference of lengths (characters), up to {PARTS} parts of the pairs")
    axes.set(ylabel="mean P(longer beats shorter)", title="Does it like length?", ylim=(0, 1))


def length_parts(rows: list[dict]) -> list[tuple[float, float]]:
    """(mean difference, mean preference) of each part of rows that are sorted by difference.

    Pairs of one difference stay together, so that no two parts stand at the same place.
    """
    # By difference, smallest first: the rows are sorted.
    ties = [list(group) for _, group in groupby(rows, key=lambda row: row["difference"])]
    parts = []
    share = 0.0
    left = len(rows)
    for tie in ties:
        # A new part once the last one has its share of what was left when it began.
        if not parts or (len(parts) < PARTS and len(parts[-1]) >= share):
            share = left / (PARTS - len(parts))
            parts.append([])
        parts[-1] += tie
        left -= len(tie)

    return [
        tuple(sum(row[key] for row in part) / len(part) for key in ("difference", "preference"))
        for part in parts
    ]
