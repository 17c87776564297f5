"""Files: JSON and JSON lines, read with a sentence for what is wrong, and written whole or not at
all.
"""

import hashlib
import json
import math
import os
import re
import secrets
import shutil
import socket
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

CHECKPOINT = (".json", ".jinja", ".safetensors")  # of a folder, what a model is made of

SMALL = 2**22  # bytes, written in no time
FLUSH_SECONDS = 5
last_flush = -math.inf

# ------------------------------------------------------------------------ reading


def read_json(path: str | Path, kind: type = dict):
    """A JSON file that holds an object, or (kind=list) a list. FileNotFoundError or ValueError
    names the file.
    """
    path = Path(path)
    if path.exists() and not path.is_file():  # to read a pipe would wait for ever
        raise ValueError(f"{path}: expected a file, found a folder or a device")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file") from None
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is one
        raise ValueError(f"{path}: not valid JSON: {error}") from None

    if not isinstance(value, kind):
        expected = "object" if kind is dict else kind.__name__
        raise ValueError(f"{path}: expected a JSON {expected}, found {type(value).__name__}")
    return value


def read_lines(path: str | Path) -> Iterator[tuple[str, dict]]:
    """Yield (where, object) for each line of a JSON-lines file; `where` is "file, line n". Blank
    lines are skipped.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file")

    # Bytes, so that a line that is not UTF-8 is named by its number.
    empty = True
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            empty = False
            where = f"{path}, line {number}"
            try:
                row = json.loads(line.decode("utf-8"))
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{where}: not valid JSON: {error}") from None
            if not isinstance(row, dict):
                raise ValueError(f"{where}: expected a JSON object, found {type(row).__name__}")
            yield where, row

    if empty:
        raise ValueError(f"{path}: the file is empty, expected one JSON object a line")


def fingerprint(path: str | Path | None) -> str | None:
    """A hash of what is in a file, or in the checkpoint of a folder: 16 digits. None without path.

    The same content has the same one, wherever it lies. FileNotFoundError if nothing lies there.
    """
    if not path:
        return None
    path = Path(path)
    total = hashlib.sha256()
    files = [path]
    if path.is_dir():
        named = [file for file in path.iterdir() if file.suffix in CHECKPOINT]
        files = sorted(file for file in named if file.is_file())  # to read a device has no end
        total.update(json.dumps([file.name for file in files]).encode())
    elif not path.is_file():
        raise FileNotFoundError(f"{path}: neither a file nor a folder")

    for file in files:
        with open(file, "rb") as opened:
            total.update(hashlib.file_digest(opened, "sha256").digest())
    return total.hexdigest()[:16]


# ------------------------------------------------------------------------ writing


def remove(path: Path) -> None:
    """Delete a file or a folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def occupied(path: str | Path) -> bool:
    """Whether it is a file, or a folder with something in it."""
    path = Path(path)
    return path.is_file() or (path.is_dir() and any(path.iterdir()))


def require_empty(path: str | Path, flag: str = "--out") -> Path:
    """The path, if something new may be put there. FileExistsError, with the flag that names
    another place, if it is occupied.
    """
    path = Path(path).absolute()
    if occupied(path):
        remedy = f"choose another {flag}, or delete it"
        raise FileExistsError(f"{path}: exists already, and nothing is written over it; {remedy}")
    return path


def unfinished_folder(out: str | Path) -> Path:
    """Where a command keeps what it has of `out`, which so appears whole, with nothing else."""
    return Path(f"{os.path.normpath(out)}.unfinished")


def temporary_name(path: Path) -> Path:
    """A name beside `path` that nobody has: .HOST-PID-RANDOM.NAME.tmp."""
    # In the same folder, so that a rename crosses no file system.
    maker = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"
    return path.with_name(f".{maker}.{path.name}.tmp")


def remove_leftovers(path: Path) -> None:
    """Delete what processes that were killed here left beside `path`, and inside of it."""
    host = re.escape(socket.gethostname())
    for found in [*path.parent.glob(f".*.{path.name}.tmp"), *path.rglob(".*.tmp")]:
        maker = re.match(rf"\.{host}-(\d+)-[0-9a-f]{{8}}\.", found.name)
        if maker and not alive(int(maker[1])):
            remove(found)


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's
        return True
    return True


def as_others(path: Path) -> None:
    """Give a file the mode that new files have here; safetensors lets only its owner read one."""
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(0o666 & ~mask)


def sync(path: Path) -> None:
    """Flush a file, or a folder and all that is in it, to the disk."""
    global last_flush
    last_flush = time.monotonic()
    for part in [*path.rglob("*"), path]:
        flush(part)


def worth_flushing(path: Path) -> bool:
    """Whether a power cut now would cost much. A disk takes 10 ms for each file, a fifth of a toy's
    time, which writes twenty a second: its small files are flushed every few seconds.
    """
    parts = [path, *path.rglob("*")]
    large = sum(part.stat().st_size for part in parts) > SMALL
    return large or time.monotonic() - last_flush > FLUSH_SECONDS


def flush(path: Path) -> None:
    """Flush a file, or the names in a folder, to the disk."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Yield a temporary name to write a file or a new folder under; it gets its real name only when
    complete.

    A process that is killed inside leaves the old content, or none, but never a part. OSError (disk
    full, say) names the path that could not be written. A file replaces the file of that name; a
    folder replaces nothing.
    """
    path = Path(path).absolute()
    if path.is_dir():
        require_empty(path)
    elif path.exists() and not path.is_file():
        raise OSError(f"{path}: could not be written: it is a device")

    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_name(path)

    try:
        yield temporary
        flushed = worth_flushing(temporary)
        if flushed:  # or a power cut could leave the name without the content
            sync(temporary)
        os.replace(temporary, path)
        if flushed:
            flush(path.parent)
    except OSError as error:
        remove(temporary)
        raise OSError(
            f"{path}: could not be written: {error}; what was there before is untouched"
        ) from error
    except BaseException:
        remove(temporary)
        raise


def write_text(path: str | Path, text: str) -> None:
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | Path, value) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_lines(path: str | Path, rows: Iterable[dict]) -> None:
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def keep_lines(path: str | Path, rows: list[dict], expected: str) -> None:
    """write_lines; ValueError if the file is there and has other rows than `expected` says."""
    if Path(path).exists() and [row for _, row in read_lines(path)] != rows:
        raise ValueError(f"{path}: holds other {expected}; choose another --out")
    write_lines(path, rows)


def append_line(path: str | Path, row: dict) -> None:
    """Add one JSON line to a log that is read while it grows."""
    try:
        with open(path, "a", encoding="utf-8") as file:
            print(json.dumps(row), file=file)
    except OSError as error:
        raise OSError(
            f"{path}: could not be written: {error}; what was written before is untouched"
        ) from error
