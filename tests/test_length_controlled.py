"""Claims about length_controlled.py: AlpacaEval 2's published numbers, invariances, the fit."""

import dataclasses
import itertools
import json
import math
import re

import numpy as np
import pytest
import torch
from conftest import ROOT

from evaluate import __main__ as evaluate
from evaluate import length_controlled
from evaluate.length_controlled import GAMED, choose_c, fit_l1, length_controlled_from_weights, length_controlled_win_rate

MODELS = ["FuseChat-Gemma-2-9B-Instruct", "gemma-7b-it", "vicuna-13b-v1.5"]
PUBLISHED = [
    *MODELS,
    "Meta-Llama-3-8B-Instruct",
    "Mistral-7B-Instruct-v0.2",
    "SPPO-Gemma-2-9B-It-PairRM",
    "SPPO-Llama-3-8B-Instruct-GPM-2B",
    "SPPO-Llama-3-Instruct-8B-PairRM",
    "SPPO-Mistral7B-PairRM",
    "SPPO-Mistral7B-PairRM-ExPO",
    "Snorkel-Mistral-PairRM-DPO",
]


@pytest.fixture(scope="module")
def alpaca(shared):
    """File names without ending -> contents, and `rows`: {model: (preference, both lengths)}."""
    folder = shared / "alpaca_eval"
    if not folder.is_dir():
        pytest.skip("AlpacaEval's published numbers, ../shared/data/alpaca_eval, are not here")
    data = {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")}
    lines = [json.loads(line) for line in (folder / "preferences.jsonl").read_text().splitlines()]
    rows = {line["model"]: (line["pref"], line["len1"], line["len2"]) for line in lines}
    assert sorted(rows) == sorted(data["expected"]["models"]) == MODELS
    assert sorted(data["published_weights"]) == sorted(PUBLISHED)
    return data | {"rows": rows, "folder": folder, "expected": data["expected"]["models"]}


def judged(n=60, seed=0):
    """Preferences that depend on length and difficulty, with the other arrays of the metric."""
    random = np.random.default_rng(seed)
    baseline_length, model_length = random.integers(10, 900, n), random.integers(10, 700, n)
    difficulty = random.normal(size=n)
    logit = 0.5 - 0.003 * (baseline_length - model_length) + 0.7 * difficulty
    logit = logit + random.normal(size=n)
    return 1 + 1 / (1 + np.exp(-logit)), baseline_length, model_length, difficulty


def gamed(n=80, seed=1):
    random = np.random.default_rng(seed)
    return random.uniform(-1, 1, n), random.normal(size=n), random.uniform(1, 2, n)


# ------------------------------------------------------------------------ the leaderboard's numbers


@pytest.mark.parametrize("model", MODELS)
def test_win_rates_and_counts_are_the_leaderboards(alpaca, model):
    result = length_controlled_win_rate(*alpaca["rows"][model], c=1.0)
    expected = alpaca["expected"][model]
    for name in ("win_rate", "standard_error", "discrete_win_rate"):
        assert getattr(result, name) == pytest.approx(expected[name], abs=1e-6)
    for name in ("n_total", "n_wins", "n_wins_base", "n_draws", "avg_length"):
        assert getattr(result, name) == expected[name]


@pytest.mark.parametrize("model", PUBLISHED)
def test_lc_from_published_weights_is_the_leaderboards(alpaca, model):
    published = alpaca["published_weights"][model]
    rate = length_controlled_from_weights(published["w"], alpaca["difficulty"])
    assert rate == pytest.approx(published["lc"], abs=1e-6)


def test_the_leaderboard_on_the_page_is_recomputed_from_published_weights(alpaca):
    """docs/real-run.md: every SPPO row, and the models that they began with; its text says 1e-6 for the LC."""
    page = (ROOT / "docs/real-run.md").read_text(encoding="utf-8")
    told = re.findall(r"^\| ([\w.-]+) \| ([\d.]+) \| ([\d.]+) \| (\d+) \|$", page, re.M)
    assert {name for name, *_ in told if "SPPO" in name} == {name for name in PUBLISHED if "SPPO" in name}
    assert len(told) == 8
    for name, *numbers in told:
        published = alpaca["published_weights"][name]
        rate = length_controlled_from_weights(published["w"], alpaca["difficulty"])
        found = (rate, published["win_rate"], published["avg_length"])
        assert numbers == [f"{found[0]:.2f}", f"{found[1]:.2f}", str(found[2])], name


@pytest.mark.parametrize("model", MODELS)
def test_lc_at_the_published_c_is_the_optimum_that_the_leaderboards_solver_approached(alpaca, model):
    expected = alpaca["expected"][model]
    extra = (alpaca["difficulty"], alpaca["gamed"], expected["C_inferred"])
    result = length_controlled_win_rate(*alpaca["rows"][model], *extra)
    rate = result.length_controlled_win_rate
    assert rate == pytest.approx(expected["oracle_lc_at_C_inferred"], abs=1e-5)
    assert result.lc_standard_error == pytest.approx(expected["oracle_lc_se"], abs=1e-5)
    assert result.weights == pytest.approx(expected["oracle_weights_at_C_inferred"], abs=1e-7)
    assert rate == pytest.approx(expected["length_controlled_winrate"], abs=0.02)
    assert result.variant == "length_controlled" and result.c == expected["C_inferred"]


@pytest.mark.parametrize("model", MODELS)
def test_lc_with_c_by_cross_validation_is_within_a_fifth_of_a_point(alpaca, model):
    extra = (alpaca["difficulty"], alpaca["gamed"])
    result = length_controlled_win_rate(*alpaca["rows"][model], *extra)
    published = alpaca["expected"][model]["length_controlled_winrate"]
    assert result.length_controlled_win_rate == pytest.approx(published, abs=0.2)
    assert result.c == pytest.approx(10 ** (4 / 9))


def test_lc_of_two_models_adds_up_to_100(alpaca):
    weights = [alpaca["published_weights"][model]["w"] for model in PUBLISHED]
    d = alpaca["difficulty"]
    for a, b in itertools.permutations(weights, 2):
        there = length_controlled_from_weights(a, d, b)
        back = length_controlled_from_weights(b, d, a)
        assert there == pytest.approx(100 - back, abs=1e-9) and abs(there - 50) > 0.01


def test_the_command_evaluates_every_model_of_a_file(alpaca, tmp_path, capsys):
    folder = alpaca["folder"]
    out = tmp_path / "lc.json"
    flags = ["--annotations", folder / "preferences.jsonl", "--c", "2.5", "--out", out]
    flags += ["--difficulty", folder / "difficulty.json", "--gamed", folder / "gamed.json"]
    assert evaluate.main(["lc", *map(str, flags)]) == 0
    header, *table = capsys.readouterr().out.splitlines()
    assert header.split()[-2:] == ["c", "LC"] and [line.split()[0] for line in table] == MODELS
    for line, (model, written) in zip(table, json.loads(out.read_text()).items()):
        extra = (alpaca["difficulty"], alpaca["gamed"], 2.5)
        result = length_controlled_win_rate(*alpaca["rows"][model], *extra)
        rate = result.length_controlled_win_rate
        assert written == json.loads(json.dumps(dataclasses.asdict(result)))
        assert float(line.split()[-1]) == pytest.approx(rate, abs=0.006)


# ------------------------------------------------------------------------ what must hold on any data


def test_baseline_against_itself_is_50_without_a_fit():
    _, length, _, difficulty = judged()
    for preference in ([1.5] * 60, [None, 0.0] + [1.5] * 58):
        result = length_controlled_win_rate(preference, length, length, difficulty, gamed())
        assert result.length_controlled_win_rate == result.win_rate == 50
        assert result.weights == (0, 0, 0) and result.c is None


def test_a_model_that_is_not_the_baseline_is_fitted_even_with_its_lengths_or_only_draws():
    q, length, other_length, difficulty = judged()
    for rows in ((q, length, length), (torch.full((60,), 1.5), length, other_length)):
        result = length_controlled_win_rate(*rows, difficulty, gamed(), 100.0)
        assert result.c == 100 and min(map(abs, result.weights[:2])) > 1e-3


def test_exchanging_model_and_baseline_gives_the_rest_of_100():
    q, baseline_length, model_length, difficulty = judged()
    there = length_controlled_win_rate(q, baseline_length, model_length, difficulty, c=5.0)
    back = length_controlled_win_rate(3 - q, model_length, baseline_length, difficulty, c=5.0)
    rest = 100 - back.length_controlled_win_rate
    assert there.length_controlled_win_rate == pytest.approx(rest, abs=1e-7)
    assert abs(there.length_controlled_win_rate - 50) > 1


def test_exchanging_lengths_flips_only_the_length_weight_unless_gamed_rows_say_otherwise():
    q, baseline_length, model_length, difficulty = judged()
    sums = []
    for extra in (None, gamed()):
        there = length_controlled_win_rate(q, baseline_length, model_length, difficulty, extra, 5.0)
        back = length_controlled_win_rate(q, model_length, baseline_length, difficulty, extra, 5.0)
        sums.append(there.weights[0] + back.weights[0])
        if extra is None:
            assert there.weights[1:] == pytest.approx(back.weights[1:], abs=1e-8)
            assert there.weights[0] < -0.1
            rate = back.length_controlled_win_rate
            assert there.length_controlled_win_rate == pytest.approx(rate, abs=1e-7)
    assert abs(sums[0]) < 1e-8 and abs(sums[1]) > 1e-3


def test_length_controlled_rate_undoes_a_judge_that_only_counts_characters():
    """Longer answers win 3 to 1; the model's are longer in 3 of 4 rows, by the same amount."""
    difference = np.array([300, 300, 300, -300] * 50)
    preference = np.where(difference > 0, 1.75, 1.25)
    result = length_controlled_win_rate(preference, [500] * 200, 500 + difference, c=1e4)
    assert result.win_rate == 62.5
    assert result.length_controlled_win_rate == pytest.approx(50, abs=0.01)
    assert result.weights[0] < -1


def test_standard_error_and_discrete_rate_of_a_hand_worked_case():
    lengths = ([5, 6, 7, 8, 9], [9, 9, 8, 1, 1])
    result = length_controlled_win_rate([1.9, 1.6, 1.5, 1.1, 0], *lengths, c=1.0)
    assert (result.n_wins, result.n_wins_base, result.n_draws) == (2, 1, 2)
    assert (result.n_total, result.avg_length) == (5, 5)
    assert result.win_rate == pytest.approx(52) and result.discrete_win_rate == 60
    squares = 0.38**2 + 0.08**2 + 2 * 0.02**2 + 0.42**2
    assert result.standard_error == pytest.approx(100 * math.sqrt(squares / 4 / 5))


def test_rows_without_a_preference_count_only_in_what_is_predicted():
    """They count in the standard deviation of the lengths too: the extra row leaves it as it is."""
    q, baseline_length, model_length, difficulty = judged()
    delta = baseline_length - model_length
    far = delta.mean() + delta.std(ddof=1) * math.sqrt(61 / 60)
    whole = length_controlled_win_rate(q, baseline_length, model_length, difficulty, gamed(), 5.0)
    before = whole.length_controlled_win_rate
    columns = ((baseline_length, far), (model_length, 0.0), (difficulty, 9.0))
    extra = [np.append(values, value) for values, value in columns]
    for missing in (np.nan, None):
        more = length_controlled_win_rate([*q.tolist(), missing], *extra, gamed(), 5.0)
        assert (more.win_rate, more.standard_error) == (whole.win_rate, whole.standard_error)
        assert (more.n_total, more.n_missing) == (60, 1)
        assert more.weights == pytest.approx(whole.weights, abs=1e-8)
        predicted = 100 / (1 + math.exp(-9 * more.weights[1] - more.weights[2]))
        rate = more.length_controlled_win_rate
        assert rate == pytest.approx((60 * before + predicted) / 61, abs=1e-6)
        assert abs(rate - before) > 0.1


def test_gamed_rows_are_a_triple_or_a_dictionary_and_those_without_a_preference_are_left_out():
    t, d, q = gamed()
    longer = (np.append(t, 0.9), np.append(d, 3.0), [*q, None])
    results = [length_controlled_win_rate(*judged(), extra, 5.0) for extra in ((t, d, q), dict(zip(GAMED, (t, d, q))), longer)]
    assert results[0] == results[1] == results[2]


def test_variant_says_what_was_left_out():
    *rows, difficulty = judged()
    extras = [(), (difficulty,), (difficulty, gamed())]
    variants = [length_controlled_win_rate(*rows, *extra, c=1.0) for extra in extras]
    assert [result.variant for result in variants] == ["minimal", "noreg", "length_controlled"]
    assert variants[0].weights[1] == 0
    assert len({result.length_controlled_win_rate for result in variants}) == 3


# ------------------------------------------------------------------------ the fit


def problem(seed, n=100, kind="plain"):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 3, generator=generator, dtype=torch.float64)
    noise = torch.randn(n, generator=generator, dtype=x.dtype)
    y = torch.sigmoid(x @ torch.tensor([1.0, -2.0, 0.3], dtype=x.dtype) + noise)
    if kind == "zero column":
        x[:, 1] = 0
    elif kind == "collinear":
        x[:, 1] = 0.3 * x[:, 2]
    elif kind == "nearly collinear":
        x[:, 1] = x[:, 2] + 1e-4 * x[:, 1]
    elif kind == "separable":
        y = (x[:, 0] > 0).double()
    elif kind == "heavy tails":  # where full Newton steps diverge
        x = x * x.abs() ** 5
        y = (x[:, 0] + x[:, 1] > 0).double()
        y[:2] = 1 - y[:2]
    return x, y, torch.rand(n, generator=generator, dtype=x.dtype)


@pytest.mark.parametrize("c", [0.02, 0.3, 5.0, 1e4])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_fit_agrees_with_an_independent_optimiser(c, seed):
    """scipy's L-BFGS-B on w = a - b with a, b ≥ 0, where |w|₁ is the smooth sum of a and b."""
    optimize = pytest.importorskip("scipy.optimize")
    x, y, v = (values.numpy() for values in problem(seed))

    def loss(ab):
        z = x @ (ab[:3] - ab[3:])
        g = x.T @ (v * (1 / (1 + np.exp(-z)) - y))
        value = (v * (np.logaddexp(0, z) - y * z)).sum() + ab.sum() / c
        return value, np.concatenate([g, -g]) + 1 / c

    options = {"ftol": 1e-15, "gtol": 1e-10, "maxiter": 10_000}
    how = dict(jac=True, method="L-BFGS-B", bounds=[(0, None)] * 6, options=options)
    found = optimize.minimize(loss, np.zeros(6), **how).x
    ours = fit_l1(*problem(seed), c)
    assert ours.tolist() == pytest.approx((found[:3] - found[3:]).tolist(), abs=1e-5)


@pytest.mark.parametrize("kind", ["plain", "zero column", "collinear", "nearly collinear", "separable", "heavy tails"])
def test_gradient_at_the_fit_is_what_an_optimum_has(kind):
    zeros = 0
    for c in (1e-4, 0.02, 0.05, 0.3, 20.0, 1e4):
        x, y, v = problem(38, kind=kind)
        w = fit_l1(x, y, v, c)
        gradient = x.T @ (v * (torch.sigmoid(x @ w) - y))
        for g, weight in zip(gradient.tolist(), w.tolist()):
            if weight == 0:
                assert abs(g) <= 1 / c + 1e-9
            else:
                assert g == pytest.approx(-math.copysign(1 / c, weight), abs=2e-9)
        zeros += (w == 0).sum().item()
    assert 3 <= zeros < 18  # both cases of the condition were met


def test_cross_validation_holds_out_every_fifth_row_counted_from_the_last(monkeypatch):
    x, y, v = problem(4, n=12)
    x[:, 0] = torch.arange(12)
    left_out = []

    def fit(x, y, v, c):
        left_out.append(sorted(set(range(12)) - set(x[:, 0].int().tolist())))
        return torch.zeros(3, dtype=x.dtype)

    monkeypatch.setattr(length_controlled, "fit_l1", fit)
    assert choose_c(x, y, v) == 1e-4  # all equal: the smallest
    assert left_out == [[1, 6, 11], [0, 5, 10], [4, 9], [3, 8], [2, 7]] * 10


def test_cross_validation_penalises_noise_and_not_a_clear_effect():
    x, y, v = problem(5, n=200)
    noise = torch.rand(200, generator=torch.Generator().manual_seed(6), dtype=y.dtype).round()
    assert choose_c(x, noise, v) < 0.1 < 2 < choose_c(x, y, v)


# ------------------------------------------------------------------------ files


def annotation(k, **changes):
    row = {"instruction": f"do {k}", "output_1": "b" * (5 + k), "output_2": "m" * (1 + k * k)}
    row |= {"generator_1": "base", "generator_2": "mine", "preference": 1 + k / 9}
    row |= changes
    return {key: value for key, value in row.items() if value != "absent"}


def lc(tmp_path, rows, *arguments):
    path = tmp_path / "annotations.jsonl"
    if not isinstance(rows, str):
        rows = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_text(rows)
    return evaluate.main(["lc", "--annotations", str(path), *map(str, arguments)])


def test_lists_lines_and_compact_rows_mean_the_same(tmp_path):
    rows = [annotation(k) for k in range(10)]
    compact = {"model": "mine", "pref": [row["preference"] for row in rows]}
    compact |= {"len1": [5 + k for k in range(10)], "len2": [1 + k * k for k in range(10)]}
    results = []
    for content in (rows, json.dumps(rows, indent=1), [compact]):
        assert lc(tmp_path, content, "--out", tmp_path / "out.json") == 0
        results.append(json.loads((tmp_path / "out.json").read_text()))
    assert results[0] == results[1] == results[2] and results[0]["mine"]["n_total"] == 10


@pytest.mark.parametrize("ascii_only", [True, False])
def test_lengths_are_code_points_of_the_raw_text(tmp_path, ascii_only):
    text = " 😀é\n"  # 4 code points, 5 UTF-16 units, 8 bytes
    rows = [annotation(k, output_2=text * 10) for k in range(5)]
    lines = [json.dumps(row, ensure_ascii=ascii_only) for row in rows]
    assert lc(tmp_path, "\n".join(lines), "--out", tmp_path / "out.json") == 0
    assert json.loads((tmp_path / "out.json").read_text())["mine"]["avg_length"] == 40


def test_models_of_one_file_are_told_apart_and_each_is_paired_with_the_first_difficulties(tmp_path, capsys):
    rows = [annotation(k, generator_2=name) for k in range(9) for name in ("mine", "yours")]
    rows.append(annotation(9, preference=None))
    difficulties = [math.sin(k) for k in range(10)]
    file = tmp_path / "difficulty.json"
    file.write_text(json.dumps(difficulties))
    out = tmp_path / "out.json"
    assert lc(tmp_path, rows, "--difficulty", file, "--c", 3, "--out", out) == 0
    results = json.loads(out.read_text())
    assert (results["mine"]["n_total"], results["mine"]["n_missing"]) == (9, 1)
    assert results["yours"]["n_missing"] == 0
    columns = ([1 + k / 9, 5 + k, 1 + k * k] for k in range(9))
    expected = length_controlled_win_rate(*zip(*columns), difficulties[:9], c=3.0)
    assert results["yours"]["weights"] == list(expected.weights)
    printed = capsys.readouterr().out
    assert "mine: without a preference, and only in the LC: 1 of 10 rows" in printed
    assert "yours: 9 rows, paired with the first 9 of 10" in printed
    assert "mine: 10 rows" not in printed
    assert "LC without gamed rows (not comparable with the leaderboard)" in printed


def test_minimal_variant_is_printed_under_its_name(tmp_path, capsys):
    assert lc(tmp_path, [annotation(k) for k in range(10)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith(" LC") and "LC, minimal variant (not comparable with the leaderboard)" in lines


GOOD = [annotation(k) for k in range(3)]
COMPACT = {"model": "mine", "pref": [1.2, 2.5], "len1": [3, 4], "len2": [3, 5]}
TWO = COMPACT | {"pref": [1.2, 1.3]}
SAME_INDEX = [annotation(0, index=7), annotation(1), annotation(2, index=7)]
NO_PREFERENCE = "expected a number or null under 'preference'"
TOO_LARGE = "preference is 2.5, expected a number from 1 to 2"
NO_TEXT = "expected a string under 'output_2', found null"
NO_NAME = "expected a string under 'generator_2', found nothing"
NO_INSTRUCTION = "expected a string under 'instruction'"
UNEQUAL = "expected lists of one length under 'pref', 'len1' and 'len2'"


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([*GOOD, annotation(3, preference="absent")], "{file}, line 4: " + NO_PREFERENCE),
        (json.dumps([*GOOD, annotation(3, preference=2.5)]), "{file}, row 4: " + TOO_LARGE),
        ([*GOOD, annotation(3, preference=0.5)], "{file}, line 4: preference is 0.5"),
        ([*GOOD, annotation(3, preference="1.5")], "{file}, line 4: preference is '1.5'"),
        ([*GOOD, annotation(3, preference=True)], "{file}, line 4: preference is True"),
        ([*GOOD, annotation(3, preference=float("inf"))], "{file}, line 4: preference is inf"),
        ([*GOOD, annotation(1)], "{file}, line 4: mine has the same instruction as in line 2"),
        (SAME_INDEX, "{file}, line 3: mine has the same index as in line 1"),
        ([*GOOD, annotation(3, output_2=None)], "{file}, line 4: " + NO_TEXT),
        ([*GOOD, annotation(3, generator_2="absent")], "{file}, line 4: " + NO_NAME),
        ([*GOOD, annotation(3, instruction="absent")], "{file}, line 4: " + NO_INSTRUCTION),
        ("[1, 2]", "{file}, row 1: expected a JSON object, found int"),
        ("[]", "{file}: the list is empty"),
        ("", "{file}: the file is empty"),
        ('[{"a": ', "{file}: not valid JSON"),
        ([COMPACT], "{file}, line 1, number 2: preference is 2.5"),
        ([COMPACT | {"pref": [1.2]}], "{file}, line 1: " + UNEQUAL),
        ([TWO | {"len2": [3, "x"]}], "{file}, mine: model_length: expected 2 numbers"),
        ([TWO | {"pref": [1.2, None]}], "{file}, mine: 1 rows with a preference, expected at least 2"),
        ([TWO], "{file}, mine: 2 rows with a preference are too few for five folds"),
        ([TWO] * 2, "{file}, line 2: mine has the same model as in line 1"),
    ],
)
def test_bad_annotations_are_named_with_file_and_row(tmp_path, capsys, rows, message):
    assert lc(tmp_path, rows) == 2
    printed = capsys.readouterr()
    file = tmp_path / "annotations.jsonl"
    assert printed.err.startswith("evaluate: " + message.format(file=file))
    assert printed.err.count("\n") == 1 and printed.out == ""


NOT_A_NUMBER = "mine: difficulty: expected 3 numbers, found something else"
GAMED_ROWS = dict(zip(GAMED, ([0.1], [0.2], [1.3])))


@pytest.mark.parametrize(
    ("option", "content", "message"),
    [
        ("--difficulty", [0.1, 0.2], "mine: difficulty: expected 3 numbers, found 2"),
        ("--difficulty", [0.1, float("nan"), 0.2], "mine: difficulty: number 2 is not finite"),
        ("--difficulty", [0.1, "x", 0.2], NOT_A_NUMBER),
        ("--difficulty", {"a": 1}, "file.json: expected a JSON list, found dict"),
        ("--gamed", GAMED_ROWS, "mine: gamed rows have difficulties: give the"),
        ("--gamed", [1], "file.json: expected a JSON object, found list"),
        ("--c", 0, "mine: c is 0.0, expected a positive number"),
    ],
)
def test_bad_options_are_named(tmp_path, capsys, option, content, message):
    file = tmp_path / "file.json"
    file.write_text(json.dumps(content))
    assert lc(tmp_path, GOOD, option, content if option == "--c" else file) == 2
    assert message in capsys.readouterr().err


def test_bad_gamed_rows_are_named():
    t, d, q = gamed()
    for extra, message in (
        ({"pref": q}, "gamed: there is no 'tanh_std_delta_len'"),
        ((t, d[1:], q), "gamed instruction_difficulty: expected 80 numbers, found 79"),
        ((t, d, q + 1), "preference is 2.*expected a number from 1 to 2"),
    ):
        with pytest.raises(ValueError, match=message):
            length_controlled_win_rate(*judged(), extra, 1.0)


def test_missing_files_are_named(tmp_path, capsys):
    assert evaluate.main(["lc", "--annotations", str(tmp_path / "nowhere.json")]) == 2
    assert lc(tmp_path, GOOD, "--difficulty", tmp_path / "lost.json") == 2
    errors = capsys.readouterr().err
    assert "nowhere.json: no such file" in errors and "lost.json" in errors
