"""Claims about who may write where: locks, temporary names, outputs that are no inputs."""

import math
import multiprocessing
import os
import re
import subprocess
import sys

import pytest
from conftest import ROOT

from engine import files
from engine.command import exit_code
from engine.files import atomic_write, remove_leftovers, temporary_name, write_text
from engine.lock import HELD, hold, lock_file, owned, release

HOLDER = """
import sys, time
from engine.lock import hold
hold(sys.argv[1])
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds tmp_path / "run"."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", HOLDER, str(tmp_path / "run")]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_a_second_process_is_refused_by_name_and_nothing_is_advised_to_be_deleted(holder, tmp_path):
    with pytest.raises(OSError, match=rf"run: process {holder.pid} writes there, since 20.*; let it end") as refused:
        hold(tmp_path / "run")
    assert "delete" not in str(refused.value)


def test_a_command_on_a_folder_of_another_process_ends_with_2_before_it_works(holder, tmp_path, capsys):
    assert exit_code("name", lambda: pytest.fail("worked"), out=tmp_path / "run") == 2
    assert f"process {holder.pid}" in capsys.readouterr().err


def test_the_lock_of_a_killed_process_is_taken_over(holder, tmp_path):
    holder.kill()
    holder.wait()
    assert lock_file(tmp_path / "run").exists()
    with owned(tmp_path / "run"):
        assert (tmp_path / "run").resolve() in HELD
    assert not list(tmp_path.iterdir())


def count_alone(path, barrier, places):
    """How often this process had the lock while another said that it had it, too."""
    barrier.wait()
    wrong = 0
    for _ in range(300):
        try:
            hold(path)
        except OSError:
            continue
        wrong += places.value
        places.value = 1
        places.value = 0
        release(path)
    sys.exit(wrong)


def test_of_four_processes_at_most_one_has_the_lock_at_any_time(tmp_path):
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(4)
    places = context.Value("i", 0, lock=False)
    several = [context.Process(target=count_alone, args=(tmp_path / "run", barrier, places)) for _ in range(4)]
    for process in several:
        process.start()
    for process in several:
        process.join()
    assert [process.exitcode for process in several] == [0, 0, 0, 0]


def test_within_a_process_the_outer_owner_releases(tmp_path):
    with owned(tmp_path / "run"):
        with owned(tmp_path / "run"):
            pass
        assert lock_file(tmp_path / "run").exists()
    assert not lock_file(tmp_path / "run").exists()


def test_it_is_the_same_folder_by_any_name(tmp_path, monkeypatch):
    (tmp_path / "run").mkdir()
    (tmp_path / "link").symlink_to("run")
    monkeypatch.chdir(tmp_path)
    with owned("run/"):
        for name in ("run", "./run", tmp_path / "run", "link"):
            assert not hold(name)


@pytest.mark.parametrize("name", ["a.json", "./a.json", "a.json/", "link.json"])
def test_an_output_that_is_an_input_is_refused(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_text("a.json", "[]")
    os.link("a.json", "link.json")
    with pytest.raises(ValueError, match="would write over it"), owned(name, None, "absent", "a.json"):
        pass
    assert open("a.json").read() == "[]"


def test_paid_annotations_are_not_replaced_by_their_own_win_rates(tmp_path, capsys):
    from evaluate.__main__ import main

    path = tmp_path / "a.json"
    path.write_text("[]")
    assert main(["lc", "--annotations", str(path), "--out", str(path)]) == 2
    assert "would write over it" in capsys.readouterr().err and path.read_text() == "[]"


def test_what_cannot_be_written_is_said_before_the_work(capsys):
    assert exit_code("name", lambda: pytest.fail("worked"), out="/proc/x") == 2
    assert "/proc/x: cannot be written" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------ temporary names


def test_a_file_of_the_users_with_a_temporary_name_is_left_alone(tmp_path):
    (tmp_path / "precious").write_text("mine")
    (tmp_path / "x.json.tmp").write_text("mine too")
    (tmp_path / "y.json.tmp").symlink_to("precious")
    for name in ("x.json", "y.json"):
        write_text(tmp_path / name, "new")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {
        "precious": "mine", "x.json.tmp": "mine too", "y.json.tmp": "mine", "x.json": "new", "y.json": "new"
    }  # fmt: skip


def test_two_writers_of_one_name_have_two_temporary_names(tmp_path):
    with atomic_write(tmp_path / "x") as first, atomic_write(tmp_path / "x") as second:
        first.write_text("first")
        second.write_text("second")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["first"]  # whole, of whoever was last


def test_what_a_killed_process_left_is_removed_and_nothing_else(tmp_path):
    dead = subprocess.Popen(["true"])
    dead.wait()
    run = tmp_path / "run"
    run.mkdir()
    ours = temporary_name(run / "policy")
    left = [path.with_name(re.sub(r"-\d+-", f"-{dead.pid}-", path.name)) for path in (ours, temporary_name(run))]
    others = [run / "x.tmp", run / f".elsewhere-{dead.pid}-00000000.policy.tmp", ours]
    for path in (*left, *others):
        path.mkdir()
    remove_leftovers(run)
    assert [path.exists() for path in left] == [False, False] and all(path.exists() for path in others)


def test_files_and_the_names_in_their_folder_are_flushed_before_and_after_the_rename(tmp_path, monkeypatch):
    done = []
    monkeypatch.setattr(files, "last_flush", -math.inf)
    flushed, replaced = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda number: (done.append(os.readlink(f"/proc/self/fd/{number}")), flushed(number)))
    monkeypatch.setattr(os, "replace", lambda *names: (done.append("rename"), replaced(*names)))
    with atomic_write(tmp_path / "policy") as temporary:
        temporary.mkdir()
        (temporary / "weights").write_text("w")
    assert done == [str(temporary / "weights"), str(temporary), "rename", str(tmp_path)]


def test_small_files_are_flushed_every_few_seconds_and_large_ones_always(tmp_path, monkeypatch):
    clock, done = [100.0], []
    monkeypatch.setattr(files, "last_flush", -math.inf)
    monkeypatch.setattr(files.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(os, "fsync", lambda number: done.append(os.readlink(f"/proc/self/fd/{number}")))
    for name, size, second in (("a", 10, 100), ("b", 10, 104), ("c", files.SMALL + 1, 104.5), ("d", 10, 109), ("e", 10, 110)):
        clock[0] = second
        with atomic_write(tmp_path / name) as temporary:
            temporary.write_bytes(bytes(size))
    assert [path.split(".")[-2] for path in done if path.endswith(".tmp")] == ["a", "c", "e"]
