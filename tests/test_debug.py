"""Claims about toy/debug.py: it runs from nothing, and a round can be stepped through as it says."""

import json
import os
import subprocess
import sys
import textwrap
import traceback

import pytest
import torch
from conftest import ROOT, tiny_config

import train
from generate import KVCache
from toy import debug


def run_python(folder, *arguments, typed=""):
    """`python ...` in a folder, with some lines typed into it."""
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    streams = dict(input=typed, capture_output=True, text=True)
    return subprocess.run([sys.executable, *arguments], cwd=folder, env=env, **streams)


@pytest.fixture(scope="module")
def debug_run(tmp_path_factory):
    """`python -m toy.debug` in an empty folder."""
    folder = tmp_path_factory.mktemp("debug")
    return folder, run_python(folder, "-m", "toy.debug")


def test_the_debugging_run_runs_from_nothing(debug_run):
    folder, done = debug_run
    assert done.returncode == 0, done.stderr
    assert (folder / "out/debug/round-02/policy/model.safetensors").is_file()
    assert (folder / "out/debug/curves.png").is_file()
    assert "Warning" not in done.stderr


def test_the_debugging_run_has_something_to_learn(debug_run):
    """Else every target, gradient and log-ratio in the debugger is 0."""
    text = (debug_run[0] / "out/debug/metrics.jsonl").read_text()
    rows = [json.loads(line) for line in text.splitlines()]
    rounds = [row for row in rows if "loss" not in row]
    assert len(rounds) == 2 and all(row["first_loss"] > 0 for row in rounds)


def test_what_the_docstring_tells_to_type_and_to_look_at_is_there(debug_run):
    """Stop in the first round, play it to its end, and print each of its variables by name."""
    typed = """
        b sppo.sppo_round
        c
        r
        p len(responses), [len(row) for row in responses]
        p preference.shape, (preference + preference.mT == 1).all().item()
        p win_rate.shape, chosen.shape, logp.shape, target.shape
        p (target - 2 * (win_rate.gather(1, chosen) - 0.5)).abs().max().item() < 1e-6
        p steps[0]["best_log_ratio"], steps[0]["worst_log_ratio"]
        p steps[0]["loss"] == steps[0]["mean_squared_target"]
        p steps[-1]["best_log_ratio"] > 0 > steps[-1]["worst_log_ratio"]
    """
    typed = textwrap.dedent(typed).strip() + "\n"  # an empty line would repeat the last command
    shown = run_python(debug_run[0], "-m", "pdb", "-m", "toy.debug", typed=typed).stdout

    answers = [line.removeprefix("(Pdb) ") for line in shown.splitlines() if "(Pdb) " in line]
    size = "torch.Size([2, {}])".format
    assert answers[3:-1] == [
        "(2, [3, 3])",
        f"({size('3, 3')}, True)",
        f"({size(3)}, {size(2)}, {size(2)}, {size(2)})",
        "True",
        "(0.0, 0.0)",
        "True",
        "True",
    ], shown


def test_the_debugging_run_starts_afresh_but_not_for_a_wrong_flag(debug_run, monkeypatch, capsys):
    folder, _ = debug_run
    monkeypatch.chdir(folder)
    (folder / "out/debug/note").touch()
    with pytest.raises(SystemExit):
        debug.main(["--no-such-flag"])
    assert (folder / "out/debug/note").exists()

    assert debug.main(["--rounds", "1"]) == 0
    assert not (folder / "out/debug/note").exists()
    assert [path.name for path in (folder / "out/debug").glob("round-*")] == ["round-01"]


def test_it_prints_all_numbers_of_each_rounds_first_prompt(debug_run):
    """As docs/one-round.md has them, where tests/test_trace.py compares each number."""
    told = debug_run[1].stdout
    assert told.count("judge: P(row beats column)") == 2
    assert "log π_2/π_1" in told and "log π_3/π_2" in told


def test_the_debugger_can_stop_where_a_round_begins(debug_run):
    shown = run_python(debug_run[0], "-m", "toy.debug", "--stop", typed="s\ns\np len(prompts)\nq\n").stdout
    assert "sppo_round(" in shown and "(Pdb) 2" in shown, shown


def test_the_way_down_is_short(debug_run, monkeypatch):
    """From train.py to the algorithm at most six frames; a step into its line 3 reaches `generate` after two."""
    frames = {}

    def watch(name):
        function = getattr(train, name)

        def watched(*arguments, **options):
            frames.setdefault(name, [frame.name for frame in traceback.extract_stack()[:-1]])
            return function(*arguments, **options)

        monkeypatch.setattr(train, name, watched)

    watch("sppo_round")
    watch("generate")
    monkeypatch.chdir(debug_run[0])
    assert debug.main(["--rounds", "1"]) == 0
    way = frames["sppo_round"]
    way = way[len(way) - way[::-1].index("main") - 1 :]
    assert way[0] == "main" and way[-1] == "run" and len([*way, "sppo_round"]) <= 6
    way = frames["generate"]
    assert way[way.index("sppo_round") + 1 :] == ["sample", "sample"]  # the recorded game's, the text game's


def test_what_vs_code_launches_exists():
    settings = json.loads((ROOT / ".vscode/launch.json").read_text())
    toys, *others = settings["inputs"]
    modules = [launch["module"] for launch in settings["configurations"] if "module" in launch]
    modules += [f"toy.{name}" for name in toys["options"]]
    own = [name for name in modules if name != "pytest" and "$" not in name]
    assert len(own) > 8 and all((ROOT / f"{name.replace('.', '/')}.py").is_file() for name in own)


def test_the_variables_of_a_debugger_read_at_a_glance(tmp_path):
    """What is set and not what is not; the place in the run; a cache's shape and not its numbers."""
    config = train.TrainConfig(policy="DIR", eta=2.0, out="RUN")
    assert repr(config) == "TrainConfig(eta=2.0, policy='DIR', out='RUN')"
    assert repr(train.TextGame(config, None, None, None, 2)) == "TextGame(round 2 of 3, RUN)"
    cache = KVCache(tiny_config(), 3, 16, "cpu", torch.float32)
    assert repr(cache) == "KVCache(2 layers, 3 rows of 16 positions, used [0, 0, 0])"
