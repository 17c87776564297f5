"""The command in processes of its own, forked from a server that has imported everything, to be killed or to meet a full disk."""

import builtins
import functools
import multiprocessing
import os
import resource
import signal
import sys
import threading
from dataclasses import asdict
from multiprocessing import forkserver
from pathlib import Path

import torch
import torch._dynamo  # the first optimizer imports it, a second and a half: once here, not in every child
import torch.distributed.fsdp
from conftest import ROOT
from tqdm import tqdm

import train
from engine import checkpoint


def flags(config):
    """The command line that gives these settings."""
    given = []
    for name, value in asdict(config).items():
        flag = "--" + name.replace("_", "-")
        given += [flag if value else "--no-" + flag[2:]] if isinstance(value, bool) else [flag, str(value)] * (value is not None)
    return given


def content(folder):
    """{path: bytes} of what a run must come to whatever stopped it: all but timings and the figure."""
    files = [path for path in sorted(Path(folder).rglob("*")) if path.is_file()]
    return {str(p.relative_to(folder)): p.read_bytes() for p in files if p.name not in ("timings.jsonl", "curves.png")}


def stages(folder):
    """The names of what is finished of a round: not what it was made from, nor the journal of a stage that is not whole."""
    names = {path.name for path in Path(folder).iterdir()}
    return {name for name in names if name != "made-from.json" and ".unfinished-" not in name}


def in_child(arguments, told, moment, limit, environment):
    """The body of a child process: the command, talking into a pipe, to be killed at a moment or with short files."""
    os.dup2(told.fileno(), 1)
    os.dup2(told.fileno(), 2)
    os.environ |= environment
    tqdm.set_lock(threading.RLock())  # the forked one is everybody's, and a killed child may have held it
    torch.set_num_threads(1)
    train.draw_curves = lambda lines, path: None
    if moment:
        arm(*moment)
    if limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    sys.exit(train.main(arguments))


def arm(when, ending, count):
    """Have this process killed at its count-th operation of a kind on a path with this ending."""

    def deadly(operation, kind, path_of):
        def call(*arguments, **options):
            nonlocal count
            hit = when in kind and str(path_of(*arguments)).endswith(ending)
            count -= hit
            if hit and count == 0 and when == "half":
                Path(arguments[1]).write_bytes(b"half of the bytes")
            if when != "after" and hit and count == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            value = operation(*arguments, **options)
            if hit and count == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return value

        return call

    def appended(path, mode="r", *more):
        return path if mode == "a" else ""

    os.replace = deadly(os.replace, ("before", "after"), lambda source, target: target)
    checkpoint.save_file = deadly(checkpoint.save_file, ("half",), lambda tensors, path: path)
    builtins.open = deadly(builtins.open, ("append",), appended)


@functools.cache
def processes():
    """Where children come from: a server that has imported this file, so that each starts at once and without threads."""
    context, before = multiprocessing.get_context("forkserver"), os.environ.get("PYTHONPATH", "")
    context.set_forkserver_preload(["children"])
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests"), before])  # it does not take over sys.path
    forkserver.ensure_running()
    os.environ["PYTHONPATH"] = before
    return context


class Child:
    """The command in a process of its own."""

    def __init__(self, config, moment=None, limit=None, environment=None):
        self.reader, writer = processes().Pipe(duplex=False)
        self.process = processes().Process(target=in_child, args=(flags(config), writer, moment, limit, environment or {}))
        self.process.start()
        writer.close()

    def end(self):
        """(exit code, all it said); the code is -9 of a process that was killed."""
        told = b""
        while part := os.read(self.reader.fileno(), 1 << 16):
            told += part
        self.process.join(60)
        return self.process.exitcode, told.decode()
