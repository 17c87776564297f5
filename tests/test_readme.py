"""Claims about README.md and the pages it leads to: what they point at is there, and what they copy is true."""

import json
import re
import subprocess

import pytest
import torch
from conftest import ROOT
from refresh_map import PAGES, QUOTATION, line_of

from sppo import sppo_target, win_rates

TEXT = {str(page.relative_to(ROOT)): page.read_text(encoding="utf-8") for page in PAGES}
README = TEXT["README.md"]
QUOTED = [(page, *quotation) for page, text in TEXT.items() for quotation in QUOTATION.findall(text)]


@pytest.mark.parametrize(("page", "file", "line", "up", "target", "anchor", "code"), QUOTED)
def test_the_map_of_the_paper_points_at_the_line_it_quotes(page, file, line, up, target, anchor, code):
    found = line_of(file, code)
    assert int(line) == int(anchor) == found, f"`{code}` is at line {found}: make map"
    assert target == file and ((ROOT / page).parent / (up + target)).resolve() == ROOT / file


def test_every_link_to_a_line_is_in_the_form_that_is_tested():
    assert len(QUOTED) == sum(text.count(".py#L") for text in TEXT.values())
    assert len([page for page, *_ in QUOTED if page == "docs/equations.md"]) > 20


def test_the_readme_is_short():
    assert len(README.split()) <= 1800


def test_the_tree_of_files_is_the_tree_of_files():
    block = TEXT["docs/files.md"].split("```text\n")[1].split("```")[0]
    told, room = set(), ""
    for line in block.splitlines():
        name = (line.split() or [""])[0]
        if name.endswith("/"):
            room = name
        elif name.endswith(".py"):
            told.add(room * line.startswith(" ") + name)

    rooms = (".", "judges", "evaluate", "engine", "toy", "real", "benchmarks")
    files = {file for room in rooms for file in (ROOT / room).glob("*.py")}
    assert told == {str(f.relative_to(ROOT)) for f in files if f.name != "__init__.py"}


def test_the_readme_names_the_files_at_the_top_and_every_room():
    block = README.split("## The files")[1].split("```text\n")[1].split("```")[0]
    told = {line.split()[0] for line in block.splitlines() if line.strip()}
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    top = {path for path in tracked if path.endswith(".py") and "/" not in path} or {path.name for path in ROOT.glob("*.py")}
    assert top <= told and {"judges/", "evaluate/", "engine/", "toy/", "real/", "benchmarks/"} <= told


def test_the_numbers_of_the_pictured_round():
    picture = README.split("```text\n")[1].split("```")[0]
    rows = re.findall(r"y\d +(\.\d+) +(\.\d+) +(\.\d+) +──▶ +(\.\d+) +──▶ +([+−])(\.\d+)", picture)
    preference = torch.tensor([[float(number) for number in row[:3]] for row in rows])
    rate = win_rates(preference)
    assert [float(row[3]) for row in rows] == pytest.approx(rate.tolist(), abs=5e-4)
    target = [float(row[5]) * (1 if row[4] == "+" else -1) for row in rows]
    assert target == pytest.approx(sppo_target(rate, 2.0).tolist(), abs=5e-4)


def test_the_table_of_the_benchmark_has_the_ratios_of_its_json():
    rows = json.loads((ROOT / "benchmarks/side_by_side.json").read_text())["rows"]
    table = TEXT["docs/side-by-side.md"].split("<!-- bench -->")[1].split("<!-- end of bench -->")[0]
    told = [float(ratio) for ratio in re.findall(r"\*\*([\d.]+)\*\*", table)]
    assert len(told) == 14 and set(told) <= {round(row["ratio"], 2) for row in rows}
