"""Who may write where: one process at a time, and never over what it reads.

A lock is a file beside what it protects, `.run.lock` beside `run`, held with flock: the system lets
go of it when its process ends, however that ends, so no lock is ever stale.
"""

import atexit
import fcntl
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from engine.files import remove_leftovers

HELD = {}  # path -> the open lock file, of this process


def hold(path: str | Path) -> bool:
    """Lock a path until release(path), or until the process ends; False if it is locked already.

    OSError if another process has it, or if nothing can be written there.
    """
    path = Path(path).resolve()
    if path in HELD:
        return False

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and not os.access(path, os.W_OK):
            raise PermissionError("no permission")
        HELD[path] = take(path)
    except BlockingIOError as error:
        raise OSError(f"{path}: {error}") from None
    except OSError as error:
        raise OSError(f"{path}: cannot be written: {error.strerror or error}") from None

    remove_leftovers(path)
    return True


def take(path: Path):
    """The locked file. BlockingIOError says which process has it."""
    lock = lock_file(path)
    file = open(lock, "a+", encoding="utf-8")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise BlockingIOError(f"{owner(file)}; let it end, or choose another name") from None

    # Whoever had it may have deleted the file between the two calls: then this is not the file.
    if not lock.exists() or not os.path.samestat(os.fstat(file.fileno()), lock.stat()):
        file.close()
        return take(path)

    # For the sentence that another process gets; a full disk is no reason to stop.
    said = json.dumps({"pid": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S")})
    with suppress(OSError):
        file.truncate(0)
        os.write(file.fileno(), said.encode())
    return file


def owner(file) -> str:
    with file:
        file.seek(0)
        found = file.read()
    if not found.endswith("}"):  # it has just taken it, or the disk is full
        return "another process writes there"
    return "process {pid} writes there, since {since}".format_map(json.loads(found))


def lock_file(path: Path) -> Path:
    return path.with_name(f".{path.name}.lock")


def release(path: str | Path) -> None:
    path = Path(path).resolve()
    with suppress(OSError):  # a disk that can be read only, by now
        lock_file(path).unlink(missing_ok=True)  # before another process may take it
    HELD.pop(path).close()


@atexit.register
def release_all() -> None:
    """What was held to the end of the process, such as a file of votes."""
    for path in list(HELD):
        release(path)


@contextmanager
def owned(path: str | Path, *inputs: str | Path | None) -> Iterator[None]:
    """Inside, `path` is locked, and can be written.

    `inputs` are what the command reads; None and words that are no file are skipped. ValueError if
    `path` is one of them.
    """
    target = Path(path)  # without a slash at the end, with which a file would not seem to exist
    for source in map(Path, filter(None, inputs)):
        if os.path.exists(source) and os.path.exists(target) and source.samefile(target):
            raise ValueError(f"{path}: this command reads it, and would write over it")

    taken = hold(path)
    try:
        yield
    finally:
        if taken:
            release(path)
