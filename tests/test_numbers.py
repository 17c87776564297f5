"""Claims about published numbers: each has a command and a record, and pages and records agree.

A measured row of a page's table is one of which a cell besides the first begins with a number. A table of something else
stands below a line `<!-- illustration -->`.
"""

import json
import re
import shlex
import subprocess

import pytest
import refresh_numbers
from conftest import ROOT
from refresh_numbers import LIST, RECORDS, SOURCES, Number, Source, listing, missing, pieces, record_of, squeezed

PAGES = [
    ROOT / name for name in ("README.md", *(f"docs/{page}.md" for page in ("laboratory", "evaluation", "judges", "side-by-side")))
]
PAGES += sorted((ROOT / "docs/runs").rglob("README.md"))
ILLUSTRATION = re.compile(r"<!-- illustration -->\s*\n(?:\|.*\n)+")


def measured_rows(text):
    """The rows of a page's tables with a number in a cell besides the first."""
    text = re.sub(r"^```.*?^```$", "", ILLUSTRATION.sub("", text), flags=re.M | re.S)
    tables = re.findall(r"^\|.*\n\|[-| ]+\|\n((?:\|.*\n)+)", text + "\n", re.M)
    for row in "".join(tables).splitlines():
        cells = [cell.strip(" *`") for cell in row.strip("|").split("|")]
        if any(re.match(r"[-−+<≥~]?\.?\d", cell) for cell in cells[1:]):
            yield squeezed(row)


def test_every_number_of_the_list_is_on_its_page():
    assert list(missing()) == []


def test_every_measured_row_of_a_page_is_of_a_recorded_command():
    covered = {squeezed(piece) for _, _, piece in pieces()}
    rows = [(page.relative_to(ROOT), row) for page in PAGES for row in measured_rows(page.read_text(encoding="utf-8"))]
    assert len(rows) > 50
    assert [(str(page), row) for page, row in rows if row not in covered] == [], "a piece in SOURCES, tests/refresh_numbers.py"


def test_every_source_has_a_record_with_its_command_commit_and_machine():
    assert {path.stem for path in RECORDS.glob("*.json")} == set(SOURCES)
    for name, source in SOURCES.items():
        record = record_of(name)
        assert record["command"] == source.command.splitlines(), f"{name}: the command is another one now: run it"
        assert re.fullmatch(r"[0-9a-f]{7,40}", record["commit"]) and record["machine"]


def test_the_list_is_what_the_records_say():
    assert LIST.read_text(encoding="utf-8") == listing(), "python tests/refresh_numbers.py --page"


def test_the_scripts_that_the_commands_name_exist():
    for source in SOURCES.values():
        for line in source.command.replace("\\\n", " ").splitlines():
            words = shlex.split(line)
            if words[:3] == ["python", "-m", "venv"]:
                continue
            if words[:2] == ["python", "-m"]:
                place = ROOT / words[2].replace(".", "/")
                assert place.is_dir() or place.with_suffix(".py").is_file(), line
            elif words[0] == "python":
                assert (ROOT / words[1]).is_file(), line


def test_a_command_runs_in_a_copy_of_the_last_commit_and_is_recorded(tmp_path, monkeypatch):
    main = tmp_path / "main"
    (main / "figures").mkdir(parents=True)
    (main / "figures/old.png").write_text("committed")
    (main / "value.json").write_text('{"value": 1}')
    git = ["git", "-C", str(main), "-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "first"]):
        subprocess.run([*git, *words], check=True)
    (main / "value.json").write_text('{"value": 2}')  # not committed, not measured
    (main / "figures/old.png").write_text("edited")

    command = "mkdir out\ncp value.json out/\necho new > figures/new.png"
    monkeypatch.setattr(refresh_numbers, "ROOT", main)
    monkeypatch.setattr(refresh_numbers, "COPY", main / "out/numbers/main")
    monkeypatch.setattr(refresh_numbers, "RECORDS", main / "docs/numbers")
    monkeypatch.setattr(refresh_numbers, "SOURCES", {"one": Source(command, lambda: refresh_numbers.load("out/value.json"))})
    (main / "docs").mkdir()
    made_from = refresh_numbers.make_copy()
    subprocess.run([*git, "commit", "-aqm", "second"], check=True)  # meanwhile
    refresh_numbers.refresh("one", made_from)

    record = json.loads((main / "docs/numbers/one.json").read_text())
    assert record["commit"] == made_from != refresh_numbers.commit()
    assert record["numbers"] == {"value": 1} and record["command"] == command.splitlines() and "torch" in record["machine"]
    assert (main / "figures/new.png").read_text() == "new\n" and (main / "figures/old.png").read_text() == "edited"


@pytest.mark.parametrize(
    ("value", "form", "text"),
    [(-0.43, "m.2f", "−0.43"), (0.374, "z.3f", ".374"), (0.5, ".2f", "0.50"), (1.2, "m+.1f", "+1.2"), (1234, ",.0f", "1,234")],
)
def test_the_formats_of_a_number(value, form, text):
    assert format(Number(value), form) == text


def test_a_measured_row_is_found_and_an_illustration_is_not():
    table = "| what | how much |\n|---|---|\n| a | 0.25 |\n| b | as much |\n"
    assert list(measured_rows(f"Text.\n\n{table}")) == ["| a | 0.25 |"]
    assert list(measured_rows(f"Text.\n\n<!-- illustration -->\n{table}")) == []
    assert list(measured_rows(f"```text\n{table}```\n")) == []
