"""Claims about docs/change-one-thing.md: its diffs apply to this tree, are short, and what they add works."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file

PAGE = (ROOT / "docs/change-one-thing.md").read_text(encoding="utf-8")
SECTIONS = dict(section.split("\n", 1) for section in re.split(r"^## ", PAGE, flags=re.M)[1:])
LEFT_OUT = ("*.md", "*.png", "*.gif", "out", ".*", "__pycache__", "tests", "docs", "figures", "shared")


def block(title, kind):
    return re.search(rf"^```{kind}\n(.*?)^```$", SECTIONS[title], re.M | re.S)[1]


def apply(diff, root):
    """Change files below a folder as a diff without line numbers says: what a hunk replaces must be there once."""
    for part in re.split(r"^--- ", diff, flags=re.M)[1:]:
        name, *hunks = re.split(r"^@@\n", part, flags=re.M)
        path = Path(root) / name.split()[0]
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        for hunk in hunks:
            lines = hunk.splitlines()
            old = "".join(line[1:] + "\n" for line in lines if line[:1] != "+")
            new = "".join(line[1:] + "\n" for line in lines if line[:1] != "-")
            found = text.count(old) if text else 1  # a new file
            assert found == 1, f"{path.name}: expected once, found {found} times:\n{old}"
            text = text.replace(old, new) if text else new
        path.write_text(text, encoding="utf-8")


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A copy of the code with all four changes in it."""
    copy = tmp_path_factory.mktemp("changed") / "tree"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(*LEFT_OUT))
    for title in SECTIONS:
        apply(block(title, "diff"), copy)
    return copy


def run(tree, title):
    """What the section's commands print."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(tree)}
    command = ["bash", "-ec", block(title, "sh")]
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_page_has_the_four():
    assert list(SECTIONS) == ["A loss", "A judge", "A game", "A model family"]


@pytest.mark.parametrize("title", SECTIONS)
def test_a_diff_is_short(title):
    changed = [line for line in block(title, "diff").splitlines() if re.match(r"[+-](?![+-]{2} )\s*\S", line)]
    assert 0 < len(changed) <= 15 and max(map(len, changed)) <= 101


def test_the_new_loss_is_trained_on(tree):
    run(tree, "A loss")
    rows = [json.loads(line) for line in (tree / "out/debug/metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row]
    assert losses[0] == pytest.approx(1, abs=1e-5) and losses[-1] < losses[0]


def test_the_new_judge_judges(tree):
    run(tree, "A judge")
    folder = tree / "out/debug/round-01"
    row = json.loads((folder / "responses.jsonl").read_text().splitlines()[0])
    table = load_file(folder / "preferences.safetensors")["preferences"][0]
    sizes = [len(text) for text in row["responses"]]
    expected = [[torch.tensor(0.5 * (other - mine)).sigmoid().item() for other in sizes] for mine in sizes]
    assert torch.allclose(table, torch.tensor(expected))


def test_the_new_game_is_played_to_its_equilibrium(tree):
    assert float(run(tree, "A game").split()[-1]) > 0.8


def test_the_new_family_is_computed_as_transformers_does(tree):
    pytest.importorskip("transformers")
    assert float(run(tree, "A model family").split()[-1]) < 1e-4


def test_a_diff_that_no_longer_fits_is_noticed(tmp_path):
    (tmp_path / "a.py").write_text("one\ntwo\n")
    apply("--- a.py\n+++ a.py\n@@\n one\n-two\n+three\n", tmp_path)
    assert (tmp_path / "a.py").read_text() == "one\nthree\n"
    with pytest.raises(AssertionError, match="expected once, found 0 times"):
        apply("--- a.py\n+++ a.py\n@@\n one\n-two\n", tmp_path)
