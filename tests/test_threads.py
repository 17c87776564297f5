"""Claims about engine/threads.py: with --threads 0 a run leaves the cores alone that other programs keep busy."""

import json
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT

from engine import threads
from engine.threads import STAT, Threads, counters
from toy.debug import build_debugging

sys.path.append(str(ROOT / "benchmarks"))
import neighbour


@pytest.fixture
def four(monkeypatch):
    """As if torch had four threads, on four cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    monkeypatch.setattr(threads, "cores", lambda: 4)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("busy", "own", "expected"),
    [(10.0, 10.0, 4), (40.0, 40.0, 4), (20.0, 10.0, 3), (40.0, 26.7, 3), (40.0, 20.0, 2), (40.0, 0.0, 1), (12.0, 10.0, 4)],
)
def test_threads_are_as_many_as_cores_that_others_leave_idle(monkeypatch, four, busy, own, expected):
    """In ten seconds all four cores were busy for `busy` seconds, with this program for `own` of them."""
    monkeypatch.setattr(threads, "START", (100.0, 50.0, 7.0))
    monkeypatch.setattr(threads, "counters", lambda: (110.0, 50.0 + busy, 7.0 + own))
    Threads(0).adapt()
    assert torch.get_num_threads() == expected


def test_they_come_back_when_the_others_have_gone(monkeypatch, four):
    monkeypatch.setattr(threads, "START", (0.0, 0.0, 0.0))
    clock = iter([(10.0, 40.0, 10.0), (20.0, 80.0, 50.0)])
    monkeypatch.setattr(threads, "counters", lambda: next(clock))
    chosen = Threads(0)
    chosen.adapt()
    assert torch.get_num_threads() == 1
    chosen.adapt()
    assert torch.get_num_threads() == 4


@pytest.mark.parametrize(("wanted", "expected"), [(None, 4), (3, 3)])
def test_a_number_that_was_asked_for_stays(monkeypatch, four, wanted, expected):
    monkeypatch.setattr(threads, "counters", lambda: pytest.fail("nobody should look"))
    Threads(wanted).adapt()
    assert torch.get_num_threads() == expected


def test_short_stages_are_looked_at_together(monkeypatch, four):
    """A stage of half a second says nothing; three of them do."""
    monkeypatch.setattr(threads, "START", (0.0, 0.0, 0.0))
    clock = iter([(0.5, 2.0, 0.0), (1.0, 4.0, 0.0)])
    monkeypatch.setattr(threads, "counters", lambda: next(clock))
    chosen = Threads(0)
    chosen.adapt()
    assert torch.get_num_threads() == 4
    chosen.adapt()
    assert torch.get_num_threads() == 1


def test_where_nothing_is_known_of_other_programs_nothing_changes(monkeypatch, four, tmp_path):
    monkeypatch.setattr(threads, "STAT", tmp_path / "no such file")
    monkeypatch.setattr(threads, "START", threads.counters())
    Threads(0).adapt()
    assert torch.get_num_threads() == 4


@pytest.mark.skipif(not STAT.is_file(), reason="Linux only")
def test_the_counters_see_a_program_that_is_busy():
    """It works for a second, and this one waits."""
    before = counters()
    work = "import time\nend = time.process_time() + 1\nwhile time.process_time() < end: pass"
    subprocess.run([sys.executable, "-c", work], check=True)
    seconds, busy, own = (after - first for after, first in zip(counters(), before))
    assert busy - own > 0.9 and own < 0.5 and seconds > 0.9
    assert time.monotonic() >= before[0]


def test_the_measurement_beside_a_neighbour_runs(tmp_path, monkeypatch, capsys):
    """On a tiny policy, where the numbers mean nothing."""
    monkeypatch.setattr(neighbour, "THREADS", {"all": 1, "idle cores": 0})
    build_debugging(tmp_path)
    flags = ["--policy", tmp_path / "policy", "--template", "plain", "--dtype", "float32", "--prompts", 1, "--max-new-tokens", 2]
    assert neighbour.main([str(word) for word in [*flags, "--stages", 2, "--out", tmp_path]]) == 0
    told = capsys.readouterr().out
    assert told.count("tokens/s") == 4 and "of the quiet speed" in told
    result = json.loads((tmp_path / "neighbour.json").read_text())
    assert all(row["tokens_a_second"] > 0 for rows in result["threads"].values() for row in rows)
    assert [row["threads"] for row in result["threads"]["all"]] == [1, 1]
