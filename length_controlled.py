"""AlpacaEval 2's win rate and length-controlled win rate: how would a model fare with answers as long as the baseline's?

`length_controlled_win_rate` is a function of arrays; `python evaluate.py lc` applies it to files of judged rows. The metric is
that of Dubois et al. (2404.04475), as tatsu-lab/alpaca_eval computes it.
"""

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from data import read_json, read_lines, text_field, write_json

GAMED = ("tanh_std_delta_len", "instruction_difficulty", "pref")  # rows of the baseline asked to be long, or short
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
    lc_standard_error: float  # the spread of the predictions over instructions, not a sampling error
    weights: tuple  # w_t, w_d, w_g: length, difficulty, model
    c: float | None  # None: nothing was fitted
    n_total: int  # rows with a preference
    n_wins: int
    n_wins_base: int
    n_draws: int
    n_missing: int  # rows without a preference: in no rate but the LC, which is predicted for them too
    avg_length: int  # characters of the model's answers
    variant: str  # a key of VARIANTS


def length_controlled_win_rate(preference, baseline_length, model_length, difficulty=None, gamed=None, c=None):
    """AlpacaEval 2's metrics of a model from n rows. With t = tanh((baseline_length - model_length) / their sd),

        P(model beats baseline) = σ(w_t t + w_d difficulty + w_g)

    is fitted to the preferences; the length-controlled win rate is the mean of P at t = 0, answers of equal length.

    preference (n,): 1 baseline better, 2 model better, 1.5 or 0 a draw, NaN or None missing. Lengths (n,) in characters.
    difficulty (n,): AlpacaEval's vector; None is the variant "minimal". gamed: the three arrays GAMED, a tuple or a dictionary;
    their rows enter the fit at a tenth of the weight and without w_g; None is the variant "noreg". c: inverse strength of
    the L1 penalty, None to choose it by cross-validation. Rows that are all draws of equal lengths are the baseline
    against itself: weights 0, 50 %, no fit.
    """
    q = check_preferences(preference)
    baseline_length, length = vector("baseline_length", baseline_length, len(q)), vector("model_length", model_length, len(q))
    d = torch.zeros_like(q) if difficulty is None else vector("difficulty", difficulty, len(q))
    kept, delta = ~q.isnan(), baseline_length - length
    y, n = q[kept] - 1, int(kept.sum())
    if n < 2:
        raise ValueError(f"{n} rows with a preference, expected at least 2")
    if c is not None and not 0 < c < math.inf:
        raise ValueError(f"c is {c}, expected a positive number")
    if gamed is not None and difficulty is None:
        raise ValueError("gamed rows have difficulties: give the difficulty vector too")

    t = torch.tanh(delta / delta.std()) if (delta != delta[0]).any() else torch.zeros_like(delta)
    x, labels, v = torch.stack([t, d, torch.ones_like(d)], 1)[kept], y, torch.ones_like(y)  # (N, 3), (N,), (N,)
    if gamed is not None:
        gamed_x, gamed_y = gamed_rows(gamed)
        x, labels, v = torch.cat([gamed_x, x]), torch.cat([gamed_y, y]), torch.cat([0.1 * torch.ones_like(gamed_y), v])
    if (y == 0.5).all() and (delta == 0).all():
        c, w = None, torch.zeros_like(x[0])
    else:
        c = choose_c(x, labels, v) if c is None else float(c)
        w = fit_l1(x, labels, v, c)
    predicted = 100 * torch.sigmoid(w[1] * d + w[2])
    wins, losses, draws = (int(case.sum()) for case in (y > 0.5, y < 0.5, y == 0.5))
    return LengthControlled(
        win_rate=100 * y.mean().item(), standard_error=100 * y.std().item() / math.sqrt(n),
        discrete_win_rate=100 * (wins + 0.5 * draws) / n, length_controlled_win_rate=predicted.mean().item(),
        lc_standard_error=predicted.std().item() / math.sqrt(len(q)), weights=tuple(w.tolist()), c=c,
        n_total=n, n_wins=wins, n_wins_base=losses, n_draws=draws, n_missing=len(q) - n, avg_length=int(length.mean()),
        variant="minimal" if difficulty is None else "noreg" if gamed is None else "length_controlled",
    )  # fmt: skip


def length_controlled_from_weights(weights, difficulty, baseline_weights=(0.0, 0.0, 0.0)):
    """LC in percent of a model with weights (w_t, w_d, w_g) against another one; weights 0 are the baseline of the fits.

    LC(a, b) = 100 mean_i σ((w_d^a - w_d^b) d_i + w_g^a - w_g^b) = 100 - LC(b, a).
    """
    _, w_d, w_g = vector("weights", weights, 3) - vector("baseline_weights", baseline_weights, 3)
    return 100 * torch.sigmoid(w_d * vector("difficulty", difficulty, len(difficulty)) + w_g).mean().item()


def fit_l1(x, y, v, c):
    """x (N, 3), y (N,) in [0, 1], weights v (N,) -> the w (3,) that minimises Σ v [log(1 + exp x·w) - y x·w] + |w|₁ / c.

    The sum is convex. With g its gradient, w is optimal if and only if g_j = -sign(w_j) / c where w_j ≠ 0, and |g_j| ≤ 1/c
    where w_j = 0; the w returned fulfils this to 1e-9. Proximal Newton: a step goes to the minimum of the quadratic model
    plus |w|₁ / c, the best of 27 candidates: each sign pattern of w leaves a linear system.
    """
    w, zero, active = x.new_zeros(3), x.new_zeros(()), SIGNS.abs()

    def objective(w):
        return (v * (torch.logaddexp(x @ w, zero) - y * (x @ w))).sum() + w.abs().sum() / c

    for _ in range(200):
        P = torch.sigmoid(x @ w)
        g = x.T @ (v * (P - y))
        excess = torch.where(w == 0, g.abs() - 1 / c, (g + w.sign() / c).abs()).max().item()
        if excess < 1e-9:
            return w
        H = x.T @ ((v * P * (1 - P))[:, None] * x)
        H.diagonal().mul_(1 + 1e-12).add_(1e-20)  # a column of x may be 0, or two may be collinear
        system = H * active[:, :, None] * active[:, None, :] + torch.diag_embed(1 - active)  # (27, 3, 3)
        candidates = torch.linalg.solve(system, active * (H @ w - g - SIGNS / c))  # (27, 3)
        u = candidates - w
        step = u[(u @ g + (u @ H * u).sum(1) / 2 + candidates.abs().sum(1) / c).argmin()]
        limit = objective(w) * (1 + 1e-12)  # no step may go up, but for rounding
        while objective(w + step) > limit:
            step = step / 2
        w = w + step
    raise ValueError(f"the fit does not converge: at {w.tolist()} its gradient is still off by {excess:.1e}")


def choose_c(x, y, v):
    """The c of ten from 1e-4 to 1e4 with the best held-out log-likelihood in five folds; of equal ones the smallest."""
    if len(y) < 5:
        raise ValueError(f"{len(y)} rows with a preference are too few for five folds: give c")
    fold, scores = torch.arange(len(y) - 1, -1, -1) % 5, {}
    for c in torch.logspace(-4, 4, 10, dtype=torch.float64).tolist():
        scores[c] = 0.0
        for held in (fold == k for k in range(5)):
            w = fit_l1(x[~held], y[~held], v[~held], c)
            P = torch.sigmoid(x[held] @ w).clamp(1e-15, 1 - 1e-15)
            scores[c] += (v[held] * (y[held] * P.log() + (1 - y[held]) * (1 - P).log())).mean().item()
    return max(scores, key=scores.get)


def check_preferences(values, places=None):
    """Preferences as a float64 vector in [1, 2], NaN where missing. ValueError names the place of anything else."""
    values = values.tolist() if hasattr(values, "tolist") else list(values)
    for i, q in enumerate(values):
        number = isinstance(q, (int, float)) and not isinstance(q, bool)
        if q is not None and not (number and (q != q or q == 0 or 1 <= q <= 2)):
            where = places[i] if places else f"row {i + 1}"
            raise ValueError(f"{where}: preference is {q!r}, expected a number from 1 to 2, 0 for a draw, or null")
    q = torch.tensor([math.nan if q is None else q for q in values], dtype=torch.float64)
    return torch.where(q == 0, 1.5, q)


def gamed_rows(gamed):
    """Features (G, 3) with 0 for the model's own weight, and labels (G,), of the rows that have a preference."""
    if isinstance(gamed, dict):
        if missing := [name for name in GAMED if name not in gamed]:
            raise ValueError(f"gamed: there is no {missing[0]!r}")
        gamed = [gamed[name] for name in GAMED]
    t, d, q = gamed
    q = check_preferences(q)
    t, d = vector(f"gamed {GAMED[0]}", t, len(q)), vector(f"gamed {GAMED[1]}", d, len(q))
    return torch.stack([t, d, torch.zeros_like(t)], 1)[~q.isnan()], q[~q.isnan()] - 1


def vector(name, values, n):
    try:
        values = torch.as_tensor(values, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise ValueError(f"{name}: expected {n} numbers, found something else among them") from None
    if values.shape != (n,):
        raise ValueError(f"{name}: expected {n} numbers, found {' x '.join(map(str, values.shape))}")
    if not values.isfinite().all():
        raise ValueError(f"{name}: number {values.isfinite().int().argmin() + 1} is not finite")
    return values


# ------------------------------------------------------------------------------------------------ files


def read_annotations(path):
    """A JSON list or JSON lines -> {model: [(place in the file, preference, baseline's length, model's length)]}.

    AlpacaEval's rows: instruction, output_1 of the baseline, output_2 of the model generator_2, and preference; lengths are
    code points. Or one row a model: model, and the lists pref, len1 and len2.
    """
    in_brackets = Path(path).is_file() and Path(path).read_bytes().lstrip().startswith(b"[")
    rows = ((f"{path}, row {k}", row) for k, row in enumerate(read_json(path, list), 1)) if in_brackets else read_lines(path)
    models, seen = {}, {}
    for where, row in rows:
        if not isinstance(row, dict):
            raise ValueError(f"{where}: expected a JSON object, found {type(row).__name__}")
        if "len1" in row:
            model, unique = text_field(row, "model", where), ("model",)
            columns = [row.get(key) for key in ("pref", "len1", "len2")]
            if not all(isinstance(column, list) and len(column) == len(columns[0]) for column in columns):
                raise ValueError(f"{where}: expected lists of one length under 'pref', 'len1' and 'len2'")
            entries = [(f"{where}, number {k}", *entry) for k, entry in enumerate(zip(*columns), 1)]
        else:
            model, unique = text_field(row, "generator_2", where), ("instruction", "index")
            _, *outputs = (text_field(row, key, where) for key in ("instruction", "output_1", "output_2"))
            if "preference" not in row:
                raise ValueError(f"{where}: expected a number or null under 'preference', found nothing")
            entries = [(where, row["preference"], *map(len, outputs))]
        for key in unique:
            if key in row and (earlier := seen.setdefault((model, key, json.dumps(row[key])), where)) != where:
                raise ValueError(f"{where}: {model} has the same {key} as in {earlier.removeprefix(f'{path}, ')}")
        models.setdefault(model, []).extend(entries)
    return models


def lc(args):
    """The command: a table of every model in the file, and all numbers as JSON."""
    difficulty, gamed = args.difficulty and read_json(args.difficulty, list), args.gamed and read_json(args.gamed)
    results, notes = {}, []
    for model, entries in read_annotations(args.annotations).items():
        places, judged, *lengths = zip(*entries)
        judged = check_preferences(judged, places)
        d = None if difficulty is None else difficulty[: len(judged)]
        try:
            result = results[model] = length_controlled_win_rate(judged, *lengths, d, gamed, args.c)
        except ValueError as error:
            raise ValueError(f"{args.annotations}, {model}: {error}") from None
        if result.n_missing:
            notes.append(f"{model}: without a preference, and only in the LC: {result.n_missing} of {len(judged)} rows")
        if d is not None and len(d) < len(difficulty):  # as AlpacaEval does
            notes.append(f"{model}: {len(d)} rows, paired with the first {len(d)} of {len(difficulty)} difficulties")
    if not results:
        raise ValueError(f"{args.annotations}: the list is empty, expected judged rows")
    width = max(map(len, results))
    print(f"{'':{width}}      n  win rate   s.e.  discrete        c  {VARIANTS[result.variant]}")
    for model, r in results.items():
        rates = f"{r.win_rate:8.2f}  {r.standard_error:5.2f}  {r.discrete_win_rate:8.2f}"
        print(f"{model:{width}}  {r.n_total:5}  {rates}  {'-' if r.c is None else format(r.c, '.4g'):>7}", end="")
        print(f"  {r.length_controlled_win_rate:.2f}")
    print("".join(note + "\n" for note in notes), end="")
    if args.out:
        write_json(args.out, {model: asdict(result) for model, result in results.items()})
