"""AlpacaEval 2's win rate and length-controlled win rate.

The latter asks how a model would fare with answers as long as the baseline's.
`length_controlled_win_rate` is a function of arrays; `python -m evaluate lc` applies it to files of
judged rows. The metric is that of Dubois et al. (2404.04475), as tatsu-lab/alpaca_eval computes it.
"""

import json
import math
from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from numpy.typing import ArrayLike
from torch import Tensor

from data import text_field
from engine.files import read_json, read_lines, write_json

# Columns of the gamed rows: the baseline, asked for long answers or for short ones, against itself.
GAMED = ("tanh_std_delta_len", "instruction_difficulty", "pref")
VARIANTS = {
    "length_controlled": "LC",
    "noreg": "LC without gamed rows (not comparable with the leaderboard)",
    "minimal": "LC, minimal variant (not comparable with the leaderboard)",
}
SIGNS = torch.cartesian_prod(*[torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64)] * 3)  # (27, 3)


@dataclass(frozen=True)
class LengthControlled:
    """A model against a baseline; rates and errors in percent."""

    win_rate: float
    standard_error: float  # of win_rate
    discrete_win_rate: float  # each preference rounded to a win, a loss or a draw
    length_controlled_win_rate: float
    lc_standard_error: float  # spread of predictions over instructions, not a sampling error
    weights: tuple  # w_t, w_d, w_g: length, difficulty, model
    c: float | None  # None: nothing was fitted
    n_total: int  # rows with a preference
    n_wins: int
    n_wins_base: int
    n_draws: int
    n_missing: int  # rows without a preference: in no rate but the LC, which is a prediction
    avg_length: int  # characters of the model's answers
    variant: str  # a key of VARIANTS


# ------------------------------------------------------------------------ the metric


def length_controlled_win_rate(
    preference: ArrayLike,
    baseline_length: ArrayLike,
    model_length: ArrayLike,
    difficulty: ArrayLike | None = None,
    gamed: tuple | dict | None = None,
    c: float | None = None,
) -> LengthControlled:
    """AlpacaEval 2's metrics of a model from n rows. ValueError names an argument that is wrong.

    With t = tanh((baseline_length - model_length) / its standard deviation),

        P(model beats baseline) = σ(w_t t + w_d difficulty + w_g)

    is fitted to the preferences; the length-controlled win rate is the mean of P at t = 0, answers
    of equal length. Rows that are all draws of equal lengths are the baseline against itself:
    weights 0, 50 %, no fit.

    preference (n,): 1 baseline better, 2 model better, 1.5 or 0 a draw, NaN or None missing.
    Lengths (n,) in characters. difficulty (n,): AlpacaEval's vector; None: variant "minimal".
    gamed: the three arrays GAMED, a tuple or a dictionary; None: variant "noreg".
    c: inverse strength of the L1 penalty; None: chosen by cross-validation.
    """
    q = check_preferences(preference)
    baseline_length = vector("baseline_length", baseline_length, len(q))
    length = vector("model_length", model_length, len(q))
    d = torch.zeros_like(q) if difficulty is None else vector("difficulty", difficulty, len(q))
    counts = raw_metrics(q, length)
    if c is not None and not 0 < c < math.inf:
        raise ValueError(f"c is {c}, expected a positive number")
    if gamed is not None and difficulty is None:
        raise ValueError("gamed rows have difficulties: give the difficulty vector too")

    # Predicted at t = 0, for all rows: for those without a preference too.
    w, c = fit(q, baseline_length - length, d, gamed, c)
    predicted = 100 * torch.sigmoid(w[1] * d + w[2])  # (n,)
    return LengthControlled(
        length_controlled_win_rate=predicted.mean().item(),
        lc_standard_error=predicted.std().item() / math.sqrt(len(q)),
        weights=tuple(w.tolist()),
        c=c,
        variant=variant_of(difficulty, gamed),
        **counts,
    )


def raw_metrics(q: Tensor, length: Tensor) -> dict:
    """What needs no fit: rates, and counts of rows."""
    y = q[~q.isnan()] - 1
    n = len(y)
    if n < 2:
        raise ValueError(f"{n} rows with a preference, expected at least 2")

    wins = int((y > 0.5).sum())
    draws = int((y == 0.5).sum())
    return {
        "win_rate": 100 * y.mean().item(),
        "standard_error": 100 * y.std().item() / math.sqrt(n),
        "discrete_win_rate": 100 * (wins + 0.5 * draws) / n,
        "n_total": n,
        "n_wins": wins,
        "n_wins_base": int((y < 0.5).sum()),
        "n_draws": draws,
        "n_missing": len(q) - n,
        "avg_length": int(length.mean()),
    }


def variant_of(difficulty: ArrayLike | None, gamed: tuple | dict | None) -> str:
    if difficulty is None:
        return "minimal"
    return "noreg" if gamed is None else "length_controlled"


def length_controlled_from_weights(
    weights: Sequence, difficulty: Sequence, baseline_weights: Sequence = (0.0, 0.0, 0.0)
) -> float:
    """LC in percent of a model with weights (w_t, w_d, w_g) against another one.

    LC(a, b) = 100 mean_i σ((w_d^a - w_d^b) d_i + w_g^a - w_g^b) = 100 - LC(b, a). Weights of 0
    are the baseline of the fits.
    """
    w = vector("weights", weights, 3) - vector("baseline_weights", baseline_weights, 3)
    d = vector("difficulty", difficulty, len(difficulty))
    return 100 * torch.sigmoid(w[1] * d + w[2]).mean().item()


# ------------------------------------------------------------------------ the fit


def fit(
    q: Tensor, delta: Tensor, d: Tensor, gamed: tuple | dict | None, c: float | None
) -> tuple[Tensor, float | None]:
    """Weights (3,) and c of the model with preferences q, differences of length delta, all (n,)."""
    # The standard deviation is over all rows, although the fit leaves out some.
    t = torch.zeros_like(delta)
    if (delta != delta[0]).any():
        t = torch.tanh(delta / delta.std())

    kept = ~q.isnan()
    x = torch.stack([t, d, torch.ones_like(d)], 1)[kept]  # (N, 3)
    y = q[kept] - 1
    itself = (y == 0.5).all() and (delta == 0).all()

    v = torch.ones_like(y)
    if gamed is not None:
        # At a tenth of the weight, as in AlpacaEval: they only steady w_t and w_d.
        gamed_x, gamed_y = gamed_rows(gamed)
        x = torch.cat([gamed_x, x])
        y = torch.cat([gamed_y, y])
        v = torch.cat([0.1 * torch.ones_like(gamed_y), v])

    # The baseline against itself: AlpacaEval fits nothing either.
    if itself:
        return torch.zeros_like(x[0]), None
    c = choose_c(x, y, v) if c is None else float(c)
    return fit_l1(x, y, v, c), c


def fit_l1(x: Tensor, y: Tensor, v: Tensor, c: float) -> Tensor:
    """The w (3,) that minimises Σ v [log(1 + exp x·w) - y x·w] + |w|₁ / c.

    x (N, 3), y (N,) in [0, 1], weights v (N,). The sum is convex. With g its gradient, w is optimal
    if and only if g_j = -sign(w_j) / c where w_j ≠ 0, and |g_j| ≤ 1/c where w_j = 0; the w returned
    fulfils this to 1e-9. ValueError if it does not get there.
    """
    zero = x.new_zeros(())

    def objective(w):
        return (v * (torch.logaddexp(x @ w, zero) - y * (x @ w))).sum() + w.abs().sum() / c

    w = x.new_zeros(3)
    for _ in range(200):
        # How far the gradient is from the condition for an optimum.
        P = torch.sigmoid(x @ w)
        g = x.T @ (v * (P - y))
        excess = torch.where(w == 0, g.abs() - 1 / c, (g + w.sign() / c).abs()).max().item()
        if excess < 1e-9:
            return w

        # Two things make H singular: a column of zeros, and two collinear columns.
        H = x.T @ ((v * P * (1 - P))[:, None] * x)
        H.diagonal().mul_(1 + 1e-12).add_(1e-20)
        step = newton_step(w, g, H, c)

        # A full step may overshoot; none may raise the objective, but for rounding.
        limit = objective(w) * (1 + 1e-12)
        while objective(w + step) > limit:
            step = step / 2
        w = w + step
    raise ValueError(
        f"the fit does not converge: at {w.tolist()} its gradient is still off by {excess:.1e}"
    )


def newton_step(w: Tensor, g: Tensor, H: Tensor, c: float) -> Tensor:
    """Proximal Newton: the u (3,) that minimises g·u + u·Hu / 2 + |w + u|₁ / c."""
    # For each of the 27 patterns of signs of w + u, the minimum is the solution of a linear system,
    # in which a weight of sign 0 is held at 0. The best of these candidates is the minimum of all.
    active = SIGNS.abs()
    system = H * active[:, :, None] * active[:, None, :] + torch.diag_embed(1 - active)
    candidates = torch.linalg.solve(system, active * (H @ w - g - SIGNS / c))  # (27, 3)
    u = candidates - w
    model = u @ g + (u @ H * u).sum(1) / 2 + candidates.abs().sum(1) / c
    return u[model.argmin()]


def choose_c(x: Tensor, y: Tensor, v: Tensor) -> float:
    """The c of ten from 1e-4 to 1e4 with the best held-out log-likelihood in five folds.

    Of equally good ones it is the smallest.
    """
    if len(y) < 5:
        raise ValueError(f"{len(y)} rows with a preference are too few for five folds: give c")

    # AlpacaEval's folds: every fifth row, counted from the last one.
    fold = torch.arange(len(y) - 1, -1, -1) % 5
    scores = {}
    for c in torch.logspace(-4, 4, 10, dtype=torch.float64).tolist():
        scores[c] = 0.0
        for k in range(5):
            held = fold == k
            w = fit_l1(x[~held], y[~held], v[~held], c)
            P = torch.sigmoid(x[held] @ w).clamp(1e-15, 1 - 1e-15)
            log_likelihood = y[held] * P.log() + (1 - y[held]) * (1 - P).log()
            scores[c] += (v[held] * log_likelihood).mean().item()

    # Of equal values, max returns the first.
    return max(scores, key=scores.get)


# ------------------------------------------------------------------------ checks


def check_preferences(values: ArrayLike, places: Sequence[str] | None = None) -> Tensor:
    """Preferences as a float64 vector in [1, 2], NaN where missing; 0, a draw, becomes 1.5.

    ValueError names the place of anything else.
    """
    values = values.tolist() if hasattr(values, "tolist") else list(values)
    for i, q in enumerate(values):
        if q is None:
            continue

        # True would pass for 1; NaN is the one number that differs from itself.
        number = isinstance(q, (int, float)) and not isinstance(q, bool)
        if not number or not (q != q or q == 0 or 1 <= q <= 2):
            where = places[i] if places else f"row {i + 1}"
            expected = "a number from 1 to 2, 0 for a draw, or null"
            raise ValueError(f"{where}: preference is {q!r}, expected {expected}")

    q = torch.tensor([math.nan if q is None else q for q in values], dtype=torch.float64)
    return torch.where(q == 0, 1.5, q)


def gamed_rows(gamed: tuple | dict) -> tuple[Tensor, Tensor]:
    """Features (G, 3) and labels (G,) of the gamed rows that have a preference."""
    if isinstance(gamed, dict):
        for name in GAMED:
            if name not in gamed:
                raise ValueError(f"gamed: there is no {name!r}")
        gamed = [gamed[name] for name in GAMED]
    t, d, q = gamed

    q = check_preferences(q)
    t = vector(f"gamed {GAMED[0]}", t, len(q))
    d = vector(f"gamed {GAMED[1]}", d, len(q))
    x = torch.stack([t, d, torch.zeros_like(t)], 1)  # without w_g, the model's own weight
    kept = ~q.isnan()
    return x[kept], q[kept] - 1


def vector(name: str, values: ArrayLike, n: int) -> Tensor:
    """n finite numbers as float64, or a ValueError that names them."""
    try:
        values = torch.as_tensor(values, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise ValueError(f"{name}: expected {n} numbers, found something else among them") from None
    if values.shape != (n,):
        found = " x ".join(map(str, values.shape))
        raise ValueError(f"{name}: expected {n} numbers, found {found}")
    finite = values.isfinite()
    if not finite.all():
        raise ValueError(f"{name}: number {finite.int().argmin() + 1} is not finite")
    return values


# ------------------------------------------------------------------------ files


def read_annotations(path: str | Path) -> dict[str, list[tuple]]:
    """{model: [(place in the file, preference, baseline's length, model's length)]}.

    The file is a JSON list, or JSON lines. AlpacaEval's rows: instruction, output_1 of the
    baseline, output_2 of the model generator_2, and preference; lengths are code points. Or one row
    a model: model, and the lists pref, len1 and len2. ValueError names a bad or repeated row.
    """
    models = {}
    seen = {}
    for where, row in read_rows(path):
        if not isinstance(row, dict):
            raise ValueError(f"{where}: expected a JSON object, found {type(row).__name__}")
        if "len1" in row:
            model = text_field(row, "model", where)
            unique = ("model",)
            entries = compact_entries(row, where)
        else:
            model = text_field(row, "generator_2", where)
            unique = ("instruction", "index")
            entries = [entry_of(row, where)]

        # A row that is there twice would count twice, and shift the difficulties of those after it.
        for key in unique:
            if key in row:
                earlier = seen.setdefault((model, key, json.dumps(row[key])), where)
                if earlier != where:
                    place = earlier.removeprefix(f"{path}, ")
                    raise ValueError(f"{where}: {model} has the same {key} as in {place}")
        models.setdefault(model, []).extend(entries)
    return models


def read_rows(path: str | Path) -> Iterator[tuple[str, object]]:
    """Yield (where, row) of a JSON list or of JSON lines, told apart by the first character."""
    if Path(path).is_file() and Path(path).read_bytes().lstrip().startswith(b"["):
        for number, row in enumerate(read_json(path, list), 1):
            yield f"{path}, row {number}", row
    else:
        yield from read_lines(path)


def compact_entries(row: dict, where: str) -> list[tuple]:
    """The entries of a row that holds all of a model's preferences."""
    columns = [row.get(key) for key in ("pref", "len1", "len2")]
    lists = all(isinstance(column, list) for column in columns)
    if not lists or len({len(column) for column in columns}) > 1:
        raise ValueError(f"{where}: expected lists of one length under 'pref', 'len1' and 'len2'")
    return [(f"{where}, number {k}", *entry) for k, entry in enumerate(zip(*columns), 1)]


def entry_of(row: dict, where: str) -> tuple:
    """The entry of one of AlpacaEval's rows."""
    # The instruction must be there, since repeated rows are found by it.
    text_field(row, "instruction", where)
    baseline = text_field(row, "output_1", where)
    answer = text_field(row, "output_2", where)
    if "preference" not in row:
        raise ValueError(f"{where}: expected a number or null under 'preference', found nothing")
    return where, row["preference"], len(baseline), len(answer)


# ------------------------------------------------------------------------ the command


def lc(args: Namespace) -> None:
    """Print a table of every model in a file of judged rows, and write all numbers as JSON."""
    difficulty = read_json(args.difficulty, list) if args.difficulty else None
    gamed = read_json(args.gamed) if args.gamed else None

    results = {}
    notes = []
    for model, entries in read_annotations(args.annotations).items():
        places, preference, *lengths = zip(*entries)
        preference = check_preferences(preference, places)
        n = len(preference)

        # As AlpacaEval does: row k goes with difficulty k, even if rows before it are missing.
        d = None if difficulty is None else difficulty[:n]
        try:
            result = length_controlled_win_rate(preference, *lengths, d, gamed, args.c)
        except ValueError as error:
            raise ValueError(f"{args.annotations}, {model}: {error}") from None
        results[model] = result

        if result.n_missing:
            missing = f"{result.n_missing} of {n} rows"
            notes.append(f"{model}: without a preference, and only in the LC: {missing}")
        if d is not None and n < len(difficulty):
            first = f"the first {n} of {len(difficulty)} difficulties"
            notes.append(f"{model}: {n} rows, paired with {first}")

    if not results:
        raise ValueError(f"{args.annotations}: the list is empty, expected judged rows")
    print_table(results)
    for note in notes:
        print(note)
    if args.out:
        write_json(args.out, {model: asdict(result) for model, result in results.items()})


def print_table(results: dict[str, LengthControlled]) -> None:
    """One line a model; all are of one variant, which is named if it is not the published one."""
    width = max(map(len, results))
    variant = VARIANTS[next(iter(results.values())).variant]
    print(f"{'':{width}}      n  win rate   s.e.  discrete        c     LC")
    for model, r in results.items():
        rates = f"{r.win_rate:8.2f}  {r.standard_error:5.2f}  {r.discrete_win_rate:8.2f}"
        c = "-" if r.c is None else format(r.c, ".4g")
        rate = f"{r.length_controlled_win_rate:.2f}"
        print(f"{model:{width}}  {r.n_total:5}  {rates}  {c:>7}  {rate:>5}")
    if variant != "LC":
        print(variant)
