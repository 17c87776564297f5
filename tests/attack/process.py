"""One command in a process of its own, forked from this one: it starts at once, talks into a file, and may be interrupted.

What is forked must not have run a backward pass before (torch refuses another one then), so nothing here does.
"""

import atexit
import errno
import os
import re
import resource
import signal
import sys
import tempfile
import threading
import time
import traceback
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import matplotlib.figure
import torch
import torch._dynamo  # the first optimizer imports it, seconds: once here, not in every child
import torch.distributed.fsdp
from tqdm import tqdm

import engine.command
import evaluate.__main__
import plan
import prefmodel
import train
from engine.lock import release_all

torch.set_num_threads(1)

MAINS = {"train.py": train.main, "prefmodel.py": prefmodel.main, "evaluate": evaluate.__main__.main, "plan.py": plan.main}
LONGEST = 60  # seconds of a command that takes less than one
MEMORY = 6 * 2**30  # bytes that a child may ask for: what is absurd is refused here as it is on a small machine


@dataclass
class Result:
    """How a command ended: its exit code, negative for a signal, None if it did not end; and all it said."""

    code: int | None
    said: str

    @property
    def lines(self) -> list[str]:
        return [line for line in re.split(r"[\r\n]+", self.said) if line.strip()]


class Process:
    """A command that was started in a folder; `arm` is called in the child first, and may do it harm."""

    def __init__(self, program: str, arguments: list[str], folder: Path, arm=None, typed: str = ""):
        self.heard, self.log = os.pipe()
        os.set_blocking(self.heard, False)
        self.said = b""
        self.typed = tempfile.TemporaryFile()
        self.typed.write(typed.encode())
        self.typed.seek(0)
        self.pid = os.fork()
        if self.pid == 0:
            self.live(program, arguments, folder, arm)
        os.close(self.log)

    def live(self, program, arguments, folder, arm):
        """The child. It never returns."""
        try:
            code = self.work(program, arguments, folder, arm)
            os._exit(code)
        finally:
            os._exit(1)

    def work(self, program, arguments, folder, arm) -> int:
        """What the child does; its exit code."""
        code = 1
        try:
            self.settle(program, folder)
            if arm:
                arm()
            code = MAINS[program](arguments)
        except SystemExit as error:  # argparse
            code = error.code if isinstance(error.code, int) else 1
        except BaseException:
            sys.setprofile(None)
            traceback.print_exc()
        finally:
            sys.setprofile(None)
            atexit._run_exitfuncs()
            sys.stdout.flush()
            sys.stderr.flush()
        return code

    def settle(self, program, folder):
        """A child begins as a fresh process does, but for what would only cost time."""
        os.chdir(folder)
        os.dup2(self.typed.fileno(), 0)
        for number in (1, 2):
            os.dup2(self.log, number)
        sys.stdin = open(0, encoding="utf-8", closefd=False)
        sys.stdout = open(1, "w", encoding="utf-8", closefd=False, buffering=1)
        sys.stderr = open(2, "w", encoding="utf-8", errors="backslashreplace", closefd=False, buffering=1)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

        atexit._clear()  # what was registered is the parent's
        atexit.register(release_all)
        tqdm.set_lock(threading.RLock())  # its own is shared by all processes, and stays locked by one that is killed
        sys.argv = [program]
        sys.dont_write_bytecode = True
        time.sleep = lambda seconds: None  # between the attempts of a judge that fails
        matplotlib.figure.Figure.savefig = save_nothing
        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, size + MEMORY))

    def end(self, longest: float = LONGEST) -> Result:
        """Wait for it; what takes longer is killed, and has no exit code."""
        late = time.monotonic() + longest
        pid = 0
        while not pid and time.monotonic() < late:
            self.listen()
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if not pid:
                time.sleep(0.002)
        if not pid:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)

        self.listen()
        os.close(self.heard)
        self.typed.close()
        said = self.said.decode("utf-8", "backslashreplace")
        return Result(os.waitstatus_to_exitcode(status) if pid else None, said)

    def listen(self) -> None:
        """Take what it has said so far: a pipe, since a file would be as short as the others on a disk that is full."""
        with suppress(BlockingIOError):
            while part := os.read(self.heard, 1 << 16):
                self.said += part


def save_nothing(figure, path, **options):
    Path(path).write_bytes(b"a figure")


# ------------------------------------------------------------------------------------------------ doing harm

# Each returns a function to be called in the child. Moments are counted and not timed, so that they come again.


def when_begun(begin) -> None:
    """Call begin() when the command has read its flags, and a signal means something to it."""
    kept = engine.command.as_interrupt

    def begun():
        kept()
        begin()

    engine.command.as_interrupt = begun


def counting(path: Path):
    """At the end of the process, write how many calls and how many changes of files there were."""

    def arm():
        counts = [0, 0]

        def called(frame, event, argument):
            counts[0] += 1

        def changed(event):
            counts[1] += 1

        watch_files(changed)
        leave = os._exit

        def exit_counted(code):
            Path(path).write_text(f"{counts[0]} {counts[1]}")
            leave(code)

        os._exit = exit_counted
        when_begun(lambda: sys.setprofile(called))

    return arm


def at_call(moment: int, *signals: int):
    """Signals sent to the process itself at its moment-th call of a function, the next one after another 50 calls."""

    def arm():
        left = list(signals)
        count = 0

        def called(frame, event, argument):
            nonlocal count
            count += 1
            if left and count >= moment + 50 * (len(signals) - len(left)):
                os.kill(os.getpid(), left.pop(0))

        when_begun(lambda: sys.setprofile(called))

    return arm


def at_change(moment: int, number: int):
    """A signal before the moment-th change of a file."""

    def arm():
        count = 0

        def changed(event):
            nonlocal count
            count += 1
            if count == moment:
                os.kill(os.getpid(), number)

        watch_files(changed)

    return arm


def failing(moment: int, number: int, lasting: bool):
    """Changes of files fail with this errno, the moment-th alone or all from there on."""

    def arm():
        count = 0

        def changed(event):
            nonlocal count
            count += 1
            # What is full can still be emptied.
            deletes = event in ("os.remove", "os.rmdir")
            spared = deletes and number in (errno.ENOSPC, errno.EDQUOT)
            if not spared and (count == moment or lasting and count > moment):
                raise OSError(number, os.strerror(number))

        watch_files(changed)

    return arm


def short_files(size: int):
    """No file can grow beyond this size, as on a disk that is full: also those that other libraries write."""
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.chmod", "os.truncate", "os.link", "os.symlink")
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_TRUNC


def watch_files(changed) -> None:
    """Call changed(event) before each change of a file below the folder that we are in, until the process ends."""
    here = os.getcwd()

    def hook(event, arguments):
        opened = event == "open" and isinstance(arguments[0], str | Path) and arguments[2] & WRITES
        if not (opened or event in CHANGES):
            return
        path = str(arguments[0])
        if path.startswith(here) or not path.startswith("/"):
            changed(event)

    sys.addaudithook(hook)
