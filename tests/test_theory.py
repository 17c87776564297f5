"""Claims about docs/theory.md: each relative in its table has a line of our code, and a test that runs that line.

And about the published schedules of the learning rate in docs/real-run.md.
"""

import ast
import re

import pytest
from conftest import ROOT
from refresh_map import QUOTATION, line_of

from sppo import learning_rate
from train import parse_config

PAGE = (ROOT / "docs/theory.md").read_text(encoding="utf-8")
COLUMNS = ["name", "paper", "what it regresses Δ on", "exact step", "converges", "here", "test"]


def table(text):
    """The rows of a page's only table, each a dictionary by column."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    header, rule, *rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    assert header == COLUMNS and set("".join(rule)) <= set("-|")
    return [dict(zip(COLUMNS, row, strict=True)) for row in rows]


ROWS = {row["name"]: row for row in table(PAGE)}
NAMES = list(ROWS)

# ------------------------------------------------------------------------ which function a test comes to


def names_in(tree):
    """The names that a piece of code takes from outside, and those of attributes: what it may call."""
    nodes = list(ast.walk(tree))
    names = [node for node in nodes if isinstance(node, ast.Name)]
    own = {node.arg for node in nodes if isinstance(node, ast.arg)} | {n.id for n in names if isinstance(n.ctx, ast.Store)}
    return {n.id for n in names} - own | {node.attr for node in nodes if isinstance(node, ast.Attribute)}


def definitions(path):
    """{name: the names in its code} of the functions, classes and constants at the top of a file."""
    found = {}
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found[node.name] = names_in(node)
        elif isinstance(node, ast.Assign):
            found |= {target.id: names_in(node.value) for target in node.targets if isinstance(target, ast.Name)}
    return found


CODE = {}
for file in [ROOT / "sppo.py", *sorted((ROOT / "toy").glob("*.py"))]:
    CODE |= definitions(file)
FILES = {path: definitions(path) for path in sorted((ROOT / "tests").glob("test_*.py"))}


def reached(test, own):
    """All names that a test may come to, through its own file, the toys and sppo.py."""
    known, waiting = CODE | own, [test]
    seen = set()
    while waiting:
        name = waiting.pop()
        if name in known and name not in seen:
            seen.add(name)
            waiting += known[name]
    return seen


# ------------------------------------------------------------------------ the claims


@pytest.mark.parametrize("name", NAMES)
def test_every_relative_has_a_line_of_code_that_defines_what_it_names(name):
    found = QUOTATION.findall(ROWS[name]["here"])
    assert found and ROWS[name]["here"].count("](") == len(found), "a link that is not to a line of code"
    for file, line, _, target, anchor, code in found:
        text = (ROOT / file).read_text(encoding="utf-8").splitlines()
        assert target == file and int(line) == int(anchor) == line_of(file, code), "make map"
        assert re.match(rf"\s*(def|class) {code}\b", text[int(line) - 1])


@pytest.mark.parametrize("name", NAMES)
def test_every_relative_has_a_test_that_comes_to_that_code(name):
    code = {quotation[-1] for quotation in QUOTATION.findall(ROWS[name]["here"])}
    tests = re.findall(r"`(test_\w+)`", ROWS[name]["test"])
    assert tests
    met = set()
    for test in tests:
        (own,) = [found for found in FILES.values() if test in found]
        assert reached(test, own) & code, f"{test} does not come to {' or '.join(code)}"
        met |= reached(test, own)
    assert code <= met, f"no test of this row comes to {', '.join(code - met)}"


def test_every_relative_has_a_paper_and_what_it_regresses_on():
    assert len(ROWS) == len(table(PAGE)) > 15
    for row in ROWS.values():
        assert all(row.values())
        assert re.search(r"\d{4}\.\d{5}|eq\. \d|PR #\d", row["paper"]), row["name"]


def test_a_test_of_something_else_is_found_out():
    """The two mistakes that this page had: a test of another function, and `the same` under the wrong row."""
    (relatives,) = [found for path, found in FILES.items() if path.name == "test_relatives.py"]
    of_growth = reached("test_no_extrapolation_helps_apo", relatives)
    of_half = reached("test_its_minimiser_is_lamberts_w", relatives)
    assert "growth" in of_growth and "looking_back" not in of_growth
    assert "sppo_target" in of_half and "normalized_target" not in of_half


# ------------------------------------------------------------------------ the published schedules


def test_the_published_schedules_are_those_of_the_page():
    """Epochs of the three model cards: what a tenth of warm-up makes of the one epoch that was trained."""
    page = (ROOT / "docs/real-run.md").read_text(encoding="utf-8")
    row = r"^\| (\S+) \| (\d+) \| 1 \| (all of it|\d+ %) \| (\S+) \| (\S+) \|$"
    told = re.findall(row, page, re.M)
    assert [(name, int(epochs)) for name, epochs, *_ in told] == [("Mistral-7B", 18), ("Llama-3-8B", 6), ("Gemma-2-9B", 1)]

    config = parse_config(["--preset", "mistral-7b"])
    steps = 10_000  # of the epoch that was trained
    for name, epochs, warmup, end, mean in told:
        rates = [learning_rate(step, steps * int(epochs), config) for step in range(steps)]
        rising = sum(after > before for before, after in zip(rates, rates[1:]))
        share = 100 if warmup == "all of it" else int(warmup.removesuffix(" %"))
        assert 100 * rising / steps == pytest.approx(share, abs=0.1), name
        assert rates[-1] == pytest.approx(float(end), abs=5e-9)
        assert sum(rates) / steps == pytest.approx(float(mean), abs=5e-9)


@pytest.mark.parametrize(("preset", "epochs"), [("mistral-7b", 18), ("llama-3-8b", 6)])
def test_the_presets_have_the_schedules_of_the_cards(preset, epochs):
    config = parse_config(["--preset", preset])
    assert (config.optimizer, config.lr, config.eta, config.batch, config.warmup) == ("rmsprop", 5e-7, 1000, 64, 0.1)
    assert (config.schedule_epochs, config.epochs) == (epochs, 1)
