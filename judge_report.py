"""What a judge is worth: agreement with labelled pairs, calibration, circles, and how much it likes length.

    python prefmodel.py report --judge SPEC --pairs pairs.jsonl --out DIR

The judge sees the two responses of a pair in random order. `preference` is P(first beats second), `label` the share of
votes for the first, in [0, 1], ½ for a tie; L is the preference's logit. Turning a pair round changes no number.
"""

from collections import defaultdict

import torch
from tqdm import tqdm

from data import new_figure
from sppo import win_rates

BINS = 10  # of confidence, from ½ to 1


def checked_tables(judge, prompts, responses, name):
    """The judge's tables, (N, K, K) float32 on the CPU. ValueError names the judge, and a prompt whose table is none."""
    return checked(judge.preferences_many(prompts, responses), prompts, len(responses[0]), name)


def checked(tables, prompts, K, name):
    N = len(prompts)
    try:
        tables = torch.as_tensor(tables, dtype=torch.float32).detach().cpu()
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"judge {name}: expected a tensor of preferences, found {type(tables).__name__}") from None
    if tables.shape != (N, K, K):
        raise ValueError(f"judge {name}: expected preferences ({N}, {K}, {K}), found {tuple(tables.shape)}")
    for prompt, table in zip(prompts, tables):
        try:
            win_rates(table)
        except ValueError as error:
            raise ValueError(f"judge {name}, prompt {prompt[:40]!r}: {error}") from None
    return tables


# ------------------------------------------------------------------------------------------------ pairs


def agreement(preference, label):
    """Accuracy over pairs with a majority (a preference of ½ counts half), and the cross-entropy with all labels, in nats."""
    decided = label != 0.5
    right = ((preference > 0.5) == (label > 0.5)).double().masked_fill(preference == 0.5, 0.5)
    p = preference.double().clamp(1e-7, 1 - 1e-7)
    return {
        "pairs": len(label),
        "decided": int(decided.sum()),
        "accuracy": right[decided].mean().item() if decided.any() else None,
        "cross_entropy": -(label * p.log() + (1 - label) * (1 - p).log()).mean().item(),
    }


def calibration(preference, label):
    """Reliability: in bins of confidence max(P, 1 - P), mean confidence and the share of votes for the side that it favours.

    The expected calibration error is the mean of |share - confidence| over the bins, weighted by their pairs.
    """
    favoured = torch.where(preference > 0.5, label, 1 - label).double().masked_fill(preference == 0.5, 0.5)  # no side
    confidence = torch.maximum(preference, 1 - preference).double()
    place = ((confidence - 0.5) * 2 * BINS + 1e-5).long().clamp(max=BINS - 1)  # .8 and 1 - .2 fall into one bin
    bins = []
    for b in range(BINS):
        if (here := place == b).any():
            row = {"pairs": int(here.sum()), "confidence": confidence[here].mean().item(), "share": favoured[here].mean().item()}
            bins.append(row)
    error = sum(row["pairs"] * abs(row["share"] - row["confidence"]) for row in bins) / len(label)
    return {"expected_calibration_error": error, "bins": bins}


def longer_rate(preference, difference):
    """Mean P(longer beats shorter) over the pairs of different lengths; of labels, the share of votes for the longer."""
    unlike = difference != 0
    return 0.5 + (difference.sign() * (preference - 0.5))[unlike].mean().item() if unlike.any() else None


def length_surplus(preference, label, difference):
    """What the judge gives to the longer response beyond the votes, in win rate: 0 for one that is right, whatever its sharpness.

    Least squares of label - ½ ≈ a (preference - ½) + b sign(difference); then the judge is (label - ½)/a, plus -b/a for the
    longer. None where the judge says next to nothing that length does not (a < 0.1), or no lengths differ.
    """
    x = torch.stack([preference - 0.5, difference.sign()], 1).double()
    a, b = torch.linalg.lstsq(x, (label.double() - 0.5)[:, None], rcond=1e-4, driver="gelsd").solution[:, 0].tolist()
    return -b / a if a > 0.1 and (difference != 0).any() else None


def length_effect(opinion, difference):
    """Correlation of an opinion (of either sign: a logit, or label - ½) with a difference of lengths, both 0 on average.

    Each pair counts in both orders, so the means are 0: Σ xy/√(Σ x² Σ y²). None where all lengths or opinions are equal.
    """
    x, y = opinion.double(), difference.double()
    scale = (x.square().sum() * y.square().sum()).sqrt()
    return ((x * y).sum() / scale).item() if scale > 0 else None


# ------------------------------------------------------------------------------------------------ tables


def triples(table):
    """(K, K) P(i beats j), NaN where nobody judged -> (triples whose three pairs are judged, those that go in a circle)."""
    wins = (table > 0.5).double()
    known = (~table.isnan()).double().fill_diagonal_(0)
    full = round(torch.trace(known @ known @ known).item()) // 6  # each triple in six directed ways around
    return full, round(torch.trace(wins @ wins @ wins).item()) // 3  # each circle from three starts


def decompose(table):
    """(K, K) preferences -> (scalar part r_i - r_j, cyclic rest) of their logits, r the row means: orthogonal, and exact.

    The Helmholtz–Hodge decomposition of a skew-symmetric table: the rest has row sums 0 (method: no model is needed).
    """
    logit = torch.logit(table.double(), eps=1e-7)
    score = logit.mean(-1)
    scalar = score[:, None] - score
    return scalar, logit - scalar


def circles_of(tables):
    """Over several (K, K) tables: triples, circles among them, and the cyclic share of the logits' squares."""
    counts = [triples(table) for table in tables]
    parts = [decompose(table) for table in tables if not table.isnan().any()]
    scalar, cyclic = (sum(part[side].square().sum().item() for part in parts) for side in (0, 1))
    full, circles = (sum(count[side] for count in counts) for side in (0, 1))
    return {
        "tables": len(tables),
        "triples": full,
        "intransitive_triples": circles,
        "intransitive_share": circles / full if full else None,
        "cyclic_share": cyclic / (scalar + cyclic) if scalar + cyclic else None,
    }


def label_tables(pairs, label):
    """One (K, K) table of labels for each prompt; responses are told apart by their model's name, else by their text."""
    votes = defaultdict(lambda: defaultdict(list))
    for pair, value in zip(pairs, label):
        first, second = (pair.get(f"{side}_model") for side in ("chosen", "rejected"))
        if first is None or second is None or first == second:  # no names that tell the two apart
            first, second = pair["chosen"], pair["rejected"]
        votes[pair["prompt"]][first, second].append(value)
        votes[pair["prompt"]][second, first].append(1 - value)
    tables = []
    for judged in votes.values():
        names = sorted({name for name, _ in judged})
        cells = [[judged.get((a, b), [float("nan")]) for b in names] for a in names]
        tables.append(torch.tensor([[sum(cell) / len(cell) for cell in row] for row in cells]).fill_diagonal_(0.5))
    return tables


def response_sets(pairs):
    """(prompt, its distinct response texts) for each prompt that has three or more."""
    texts = defaultdict(dict)
    for pair in pairs:
        texts[pair["prompt"]] |= {pair["chosen"]: None, pair["rejected"]: None}
    return [(prompt, list(some)) for prompt, some in texts.items() if len(some) > 2]


# ------------------------------------------------------------------------------------------------ the report


@torch.no_grad()
def report(judge, pairs, name="", together=32, seed=0):
    """Every number of the judge on labelled pairs (as data.read_pairs gives them); sides are drawn at random."""
    label = torch.tensor([pair["probability"] for pair in pairs], dtype=torch.float64)
    turned = torch.rand(len(pairs), generator=torch.Generator().manual_seed(seed)) < 0.5
    sides = [[pair["chosen"], pair["rejected"]][:: -1 if turn else 1] for pair, turn in zip(pairs, turned)]
    tables, inconsistency, spread = [], [], []
    for start in tqdm(range(0, len(pairs), together), desc="pairs", unit="batch", leave=False):
        batch = [pair["prompt"] for pair in pairs[start : start + together]], sides[start : start + together]
        if hasattr(judge, "both_orders"):  # a cross-encoder
            logits = judge.logits_many(*batch)
            table = judge.both_orders(logits)
            inconsistency.append((logits + logits.mT)[:, 0, 1].abs())
        elif hasattr(judge, "mean_and_disagreement"):  # an ensemble
            table, deviation = judge.mean_and_disagreement(*batch)
            spread.append(deviation[:, 0, 1])
        else:
            table = judge.preferences_many(*batch)
        tables.append(checked(table, batch[0], 2, name))
    preference = torch.cat(tables)[:, 0, 1].double()
    preference = torch.where(turned, 1 - preference, preference)  # of the chosen one
    difference = torch.tensor([len(pair["chosen"]) - len(pair["rejected"]) for pair in pairs], dtype=torch.float64)
    sets = response_sets(pairs)
    sets = [checked_tables(judge, [p], [row], name)[0] for p, row in tqdm(sets, desc="all responses of a prompt", leave=False)]
    result = agreement(preference, label) | calibration(preference, label)
    result["longer_rate"], result["longer_rate_of_labels"] = longer_rate(preference, difference), longer_rate(label, difference)
    result["length_surplus"] = length_surplus(preference, label, difference)
    result["length_correlation"] = length_effect(torch.logit(preference, eps=1e-7), difference)
    result["length_correlation_of_labels"] = length_effect(label - 0.5, difference)
    result["judge"], result["labels"] = circles_of(sets), circles_of(label_tables(pairs, label.tolist()))
    result["labels"].pop("cyclic_share")  # labels of 0 and 1 have no logit
    if votes := voters(pairs):
        result["annotators"] = [circles_of(label_tables(pairs, vote))["intransitive_triples"] for vote in votes]
    if inconsistency:
        result["order_inconsistency"] = torch.cat(inconsistency).mean().item()
    if spread:
        result["ensemble_disagreement"] = torch.cat(spread).mean().item()
    by_length = sorted(zip((difference.sign() * (preference - 0.5)).tolist(), difference.abs().tolist()), key=lambda row: row[1])
    result["longer_wins"] = [{"difference": gap, "preference": 0.5 + lean} for lean, gap in by_length]
    return result


def voters(pairs):
    """The labels of each single annotator, if every pair has the same number of `votes` (1: chosen, 2: rejected, 0: tie)."""
    counts = {len(pair.get("votes", ())) for pair in pairs}
    if counts == {0} or len(counts) > 1:
        return []
    return [[{1: 1.0, 2: 0.0, 0: 0.5}[pair["votes"][a]] for pair in pairs] for a in range(counts.pop())]


def print_report(result):
    def line(name, value, form=".4f"):
        print(f"{name:58}{'-' if value is None else format(value, form):>10}")

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


def draw(result):
    """Left: reliability. Right: how often the longer response wins, by the difference of their lengths."""
    figure = new_figure(10, 4.4)
    reliability, length = figure.subplots(1, 2)
    bins = result["bins"]
    confidence, share, area = zip(*[(row["confidence"], row["share"], 20 + 400 * row["pairs"] / result["pairs"]) for row in bins])
    reliability.plot([0.5, 1], [0.5, 1], "--", color="#777777", label="calibrated")
    reliability.plot(confidence, share, color="#0072B2", linewidth=1)
    reliability.scatter(confidence, share, area, "#0072B2", label="judge (area: number of pairs)")
    reliability.set(xlabel="confidence of the judge", ylabel="share of votes for the side it favours", ylim=(-0.03, 1.06))
    reliability.set_title(f"Calibration error {result['expected_calibration_error']:.3f}")
    reliability.legend(frameon=False, loc="lower right")
    rows = [row for row in result["longer_wins"] if row["difference"] > 0]
    parts = [rows[i * len(rows) // 8 : (i + 1) * len(rows) // 8] for i in range(8)]
    middle = [[sum(row[key] for row in part) / len(part) for key in ("difference", "preference")] for part in parts if part]
    length.axhline(0.5, color="#777777", linewidth=0.8)
    length.plot(*zip(*middle), "o-", color="#D55E00") if middle else None
    length.set(xlabel="difference of lengths (characters), an eighth of the pairs each", ylim=(0, 1))
    length.set(ylabel="mean P(longer beats shorter)", title="Does it like length?")
    return figure
