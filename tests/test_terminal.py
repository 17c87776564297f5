"""Claims about what is said: no terminal, no reader and no text from outside makes a command fail, or does harm."""

import os
import stat
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, tiny_config

from engine.command import exit_code
from engine.memory import out_of_memory
from engine.terminal import printable, visible
from evaluate.chat import print_now
from model import Transformer, initialize

ESCAPES = {
    "colour": "\x1b[31mred",
    "clipboard": "\x1b]52;c;ZXZpbA==\x07",
    "title": "\x1b]0;root@host\x07",
    "one byte": "\x9b2J",
    "delete": "a\x7fb",
    "back over the line": "all is well\rbad",
    "right to left": "abc\u202ecba",
}


def run(script, shell=None, **environment):
    """A command of ours in a process, perhaps with a shell around it."""
    words = [sys.executable, "-c", script]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | environment
    if shell:
        words = ["bash", "-o", "pipefail", "-c", shell, *words]
    return subprocess.run(words, env=environment, capture_output=True)


TALKS = """
import sys
from tqdm import tqdm
from engine.command import exit_code
def work():
    for _ in tqdm(range(20000)):
        print("a line")
    print("done", file=open(sys.argv[1] if len(sys.argv) > 1 else "/dev/stderr", "w"))
sys.exit(exit_code("name", work))
"""


def test_a_reader_who_leaves_ends_the_output_and_not_the_work(tmp_path):
    result = run(TALKS, f'"$0" "$@" {tmp_path}/file | head -1')
    assert result.returncode == 0 and result.stdout == b"a line\n"
    assert (tmp_path / "file").read_text() == "done\n"
    assert b"BrokenPipe" not in result.stderr and b"Exception" not in result.stderr


def test_the_bar_may_lose_its_reader_too(tmp_path):
    result = run(TALKS, f'"$0" "$@" {tmp_path}/file 2>&1 >/dev/null | head -c 1')
    assert result.returncode == 0 and (tmp_path / "file").read_text() == "done\n"


SAYS = """
import sys
from engine.command import exit_code
def work():
    print("η = ½ 日本")
    raise ValueError("π ≻ μ")
sys.exit(exit_code("name", work))
"""


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp437"])
def test_letters_that_a_terminal_does_not_have_are_escaped(encoding):
    result = run(SAYS, PYTHONIOENCODING=encoding, PYTHONUTF8="0")
    assert result.returncode == 2 and rb"\u65e5\u672c" in result.stdout
    assert b"name: " in result.stderr and rb"\u227b" in result.stderr and b"Traceback" not in result.stderr


@pytest.mark.parametrize("case", ESCAPES)
def test_control_characters_of_a_text_from_outside_are_shown_and_not_obeyed(case, capsys):
    text = ESCAPES[case]

    def work():
        raise ValueError(f"policy {text}")

    assert exit_code("name", work) == 2
    print_now(f"{text}\n")
    shown = capsys.readouterr()
    for said in (shown.err, shown.out, visible(text), printable(text)):
        assert all(letter.isprintable() for letter in said.rstrip("\n")) and "\\" in said


def test_text_keeps_its_lines_and_its_letters():
    text = "- η = ½\n\t日本 🙂 don't"
    assert visible(text) == text


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory."),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:124] data. DefaultCPUAllocator: can't allocate memory: you tried to allocate"
        ),
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 400 bytes."),
    ],
)
def test_running_out_of_memory_is_a_sentence(error, capsys):
    def work():
        raise error

    assert exit_code("name", work) == 2 and capsys.readouterr().err.startswith("name: out of memory")


def test_memory_that_this_machine_does_not_have_is_called_so():
    with pytest.raises(RuntimeError) as error:
        torch.empty(2**60, dtype=torch.int8)
    assert out_of_memory(error.value)


def test_a_checkpoint_has_the_mode_that_the_umask_gives(tmp_path):
    before = os.umask(0o027)
    try:
        initialize(Transformer(tiny_config()), torch.Generator().manual_seed(0)).save_pretrained(tmp_path / "policy")
    finally:
        os.umask(before)
    for path in (tmp_path / "policy").iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o640, path
