"""Claims about README.md: what it points at is there."""

import json
import re

import pytest
from conftest import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
MAP = re.findall(r"\[`([\w/]+\.py):(\d+)`\]\(([\w/]+\.py)#L(\d+)\) `([^`]+)`", README)


@pytest.mark.parametrize(("file", "line", "target", "anchor", "code"), MAP)
def test_the_map_of_the_paper_points_at_the_line_it_quotes(file, line, target, anchor, code):
    assert (file, line) == (target, anchor)
    assert code in (ROOT / file).read_text(encoding="utf-8").splitlines()[int(line) - 1]


def test_there_is_a_map_and_every_file_named_in_a_table_exists():
    assert len(MAP) > 10
    named = re.findall(r"^\| `([\w/]+\.py)` \|", README, re.M)
    assert len(named) > 5 and all((ROOT / name).is_file() for name in named)


def test_every_figure_shown_is_there():
    figures = re.findall(r"!\[[^]]*\]\(([^)]+)\)", README)
    assert figures and all((ROOT / figure).is_file() for figure in figures)


def test_the_table_of_the_benchmark_has_the_ratios_of_its_json():
    rows = json.loads((ROOT / "benchmarks/side_by_side.json").read_text())["rows"]
    table = README.split("<!-- bench -->")[1].split("<!-- end of bench -->")[0]
    told = [float(ratio) for ratio in re.findall(r"\*\*([\d.]+)\*\*", table)]
    assert len(told) == 14 and set(told) <= {round(row["ratio"], 2) for row in rows}
