"""Claims about being asked to stop: what was computed in a fit is kept, and said."""

import os
import signal
import subprocess
import sys

import pytest
from children import content, flags
from conftest import ROOT, tiny_run, tiny_settings

from engine.run_folder import Saver
from engine.stop import Stop
from toy.debug import build_debugging

# The command, with a signal sent to itself inside the n-th optimizer step of a run.
SCRIPT = """
import os, signal, sys
sys.path[:0] = ["{root}", "{root}/tests"]
import torch
torch.set_num_threads(1)
import sppo, train
step = sppo.optimizer_step
count = 0
def deadly(*arguments, **options):
    global count
    count += 1
    if count == {step}:
        for _ in range({times}):
            os.kill(os.getpid(), signal.{name})
    return step(*arguments, **options)
sppo.optimizer_step = deadly
sys.exit(train.main({arguments}))
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    build_debugging(folder)
    return folder


def stopped(config, name="SIGTERM", step=7, times=1):
    """The command's result, after a signal in its step-th step; a round has 2 × 2 of them."""
    script = SCRIPT.format(root=ROOT, step=step, times=times, name=name, arguments=flags(config))
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_stopped_in_a_fit_it_saves_says_so_and_continues_to_the_same_bytes(name, world, tmp_path):
    settings = dict(batch=1, judge="conftest:letters")
    tiny_run(world, tmp_path / "whole", **settings)
    config = tiny_settings(world, tmp_path / "run", **settings)
    result = stopped(config, name)
    assert result.returncode == 130, result.stderr
    assert "stopping after this step" in result.stderr and "the same command continues" in result.stderr
    assert [path.name for path in (tmp_path / "run/round-02").glob("fit-*")] == ["fit-3"]

    tiny_run(world, tmp_path / "run", **settings)
    assert content(tmp_path / "run") == content(tmp_path / "whole")


def test_a_second_signal_stops_at_once_and_saves_nothing(world, tmp_path):
    result = stopped(tiny_settings(world, tmp_path / "run", batch=1), times=2)
    assert result.returncode == 130 and not list((tmp_path / "run/round-02").glob("fit-*"))


def test_who_wants_no_state_on_disk_gets_none(world, tmp_path):
    result = stopped(tiny_settings(world, tmp_path / "run", batch=1, save_minutes=float("inf")))
    assert result.returncode == 130 and not list((tmp_path / "run/round-02").glob("fit-*"))


def test_afterwards_the_signals_mean_what_they_meant():
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with Stop() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.asked
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_a_state_that_cannot_be_written_is_told_and_the_fit_goes_on(world, tmp_path, monkeypatch, capfd):
    tiny_run(world, tmp_path / "whole")

    def full(self):
        raise OSError("No space left on device")

    monkeypatch.setattr(Saver, "save", full)
    tiny_run(world, tmp_path / "run", save_minutes=0.0)
    assert "the fit goes on, but its state could not be saved: No space left" in capfd.readouterr().err
    differ = {name for name, data in content(tmp_path / "whole").items() if content(tmp_path / "run")[name] != data}
    assert differ == {"config.json"}  # --save-minutes


COMMANDS = [["train.py"], ["prefmodel.py", "train"], ["plan.py"], ["-m", "evaluate", "lc"], ["-m", "real.ability"]]

# A command, and the signal at the moment when it begins to import torch.
IMPORTING = """
import importlib.abc, os, runpy, signal, sys

class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, *more):
        if name == "torch":
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Finder())
sys.path.insert(0, {root!r})
sys.argv = ["x"]
{run}
"""


@pytest.mark.parametrize("command", COMMANDS)
def test_control_c_while_torch_is_being_imported_ends_with_one_word(command):
    run = f"runpy.run_path({str(ROOT / command[0])!r}, run_name='__main__')"
    if command[0] == "-m":
        run = f"runpy.run_module({command[1]!r}, run_name='__main__', alter_sys=True)"
    script = IMPORTING.format(root=str(ROOT), run=run)
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert result.stderr == "stopped\n" and result.returncode in (130, -signal.SIGINT)
