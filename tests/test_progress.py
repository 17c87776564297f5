"""Claims about engine/progress.py: what a terminal shows, and what arrives in a file."""

import io
import os
import pty
import re
import subprocess
import sys
import termios

import pytest
from conftest import ROOT

from engine import progress
from engine.progress import no_bar_left, tqdm


@pytest.fixture
def clock(monkeypatch):
    """A clock that a test sets, for the lines and for tqdm."""
    now = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(tqdm, "said", now[0])
    return now


def test_a_file_gets_a_line_a_minute(clock):
    file = io.StringIO()
    for _ in tqdm(range(36_000), desc="fit", file=file, mininterval=0, leave=False):
        clock[0] += 0.01  # six minutes
    lines = file.getvalue().splitlines()
    assert 5 <= len(lines) <= 6 and all(line.startswith("fit: ") for line in lines)
    assert [int(re.search(r"(\d+)%", line)[1]) for line in lines] == pytest.approx([17, 33, 50, 67, 83, 100][: len(lines)], abs=1)
    assert not re.search(r"[\r\x1b]", file.getvalue())


def test_what_takes_less_than_a_minute_is_not_spoken_of(clock):
    file = io.StringIO()
    for _ in range(50):
        for _ in tqdm(range(3), file=file, mininterval=0, leave=False):
            clock[0] += 0.1
    assert file.getvalue() == ""


def test_bars_inside_of_bars_share_the_minute(clock):
    file = io.StringIO()
    for _ in tqdm(range(10), desc="rounds", file=file, mininterval=0, leave=False):
        for _ in tqdm(range(60), desc="steps", file=file, mininterval=0, leave=False):
            clock[0] += 1
    assert 9 <= len(file.getvalue().splitlines()) <= 10


def test_a_bar_that_stays_leaves_its_last_line(clock):
    file = io.StringIO()
    for _ in tqdm(range(3), desc="base policy", file=file):
        pass
    (line,) = file.getvalue().splitlines()
    assert line.startswith("base policy: 100%") and "3/3" in line


def test_something_written_between_comes_through_alone(clock):
    file = io.StringIO()
    with tqdm(total=10, file=file, mininterval=0, leave=False) as bar:
        bar.update()
        tqdm.write("again in 2 s", file=file)
    assert file.getvalue() == "again in 2 s\n"


def test_bars_of_no_interest_are_silent():
    file = io.StringIO()
    for _ in tqdm(range(3), file=file, disable=True):
        pass
    for _ in tqdm(range(3), file=file, disable=None):  # tqdm's way to say: at a terminal only
        pass
    assert file.getvalue() == ""


# ------------------------------------------------------------------------------------------------ at a terminal


def screen(code):
    """(exit code, the lines of the screen that a program leaves), on a terminal of its own."""
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 100))
    # Other tests import libraries that switch all of tqdm's bars off, by its variables.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TQDM_")}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    child = subprocess.Popen([sys.executable, "-c", code], stdout=theirs, stderr=theirs, env=environment)
    os.close(theirs)
    said = b""
    while True:
        try:
            piece = os.read(ours, 4096)
        except OSError:  # how Linux says that nobody writes any more
            break
        if not piece:
            break
        said += piece
    os.close(ours)
    return child.wait(), drawn(said.decode()), said.decode()


def drawn(text):
    """What carriage returns, line feeds and the key that goes a line up leave on a screen."""
    lines = [""]
    row = column = 0
    for piece in re.findall(r"\x1b\[A|\r|\n|[^\r\n\x1b]+", text):
        if piece == "\x1b[A":
            row -= 1
        elif piece == "\r":
            column = 0
        elif piece == "\n":
            row, column = row + 1, 0
            lines += [""] * (row == len(lines))
        else:
            lines[row] = lines[row][:column].ljust(column) + piece + lines[row][column + len(piece) :]
            column += len(piece)
    return [line.rstrip() for line in lines if line.strip()]


PROGRAM = """
import sys, time
from engine.command import exit_code
from engine.progress import tqdm

def work():
    for _ in tqdm(range(3), desc="outer"):
        for step in tqdm(range(100), desc="inner", leave=False):
            time.sleep(0.002)
            if step == 70:
                {}

sys.exit(exit_code("train.py", work))
"""


@pytest.mark.parametrize(
    ("end", "code", "left"),
    [
        ("raise ValueError('no such file')", 2, ["train.py: no such file"]),
        ("raise KeyboardInterrupt", 130, ["train.py: stopped"]),
        ("raise MemoryError", 2, ["train.py: out of memory:"]),
    ],
)
def test_an_error_is_alone_on_the_screen(end, code, left):
    returned, lines, said = screen(PROGRAM.format(end))
    assert "inner: " in said  # there was a bar
    assert (returned, lines) == (code, left)


def test_a_traceback_is_not_written_into_a_bar():
    returned, lines, said = screen(PROGRAM.format("raise KeyError('ours')"))
    assert returned == 1 and lines[0] == "Traceback (most recent call last):" and "inner: " in said


def test_a_finished_bar_stays_if_it_should_and_a_terminal_sees_it_move():
    returned, lines, said = screen(PROGRAM.format("pass"))
    (line,) = lines
    assert returned == 0 and line.startswith("outer: 100%") and said.count("\r") > 3


def test_bars_that_nobody_closed_are_closed(clock):
    file = io.StringIO()
    bar = tqdm(total=3, file=file)
    with no_bar_left():
        bar.update()
    assert bar.disable and file.getvalue() == ""
