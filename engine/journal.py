"""What an unfinished stage has got so far, so that a kill loses only what was open.

A file of lines, each a checksum and [key, value] as JSON, one for each piece of work as it is
finished. What a kill has left of the last line is dropped, and so is everything from a line on
whose sum is wrong: it is computed again.
"""

import json
import os
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

from engine.files import remove
from engine.progress import tqdm
from engine.terminal import visible


class Journal:
    """{key: value} that outlives the process; without a path it keeps nothing.

    A key is a string, a value anything that JSON writes: a float comes back with the same bits.
    """

    def __init__(self, path: str | Path | None = None):
        self.path = path and Path(path)
        self.file = None
        self.full = False  # the disk
        self.known = {}
        if self.path and self.path.exists():
            self.read()

    def read(self) -> None:
        whole = 0  # bytes
        with open(self.path, "rb") as file:
            for line in file:
                sum_, _, text = line.rstrip(b"\n").partition(b" ")
                if not line.endswith(b"\n") or sum_ != checksum(text):
                    break
                key, value = json.loads(text)
                self.known[key] = value
                whole += len(line)
        os.truncate(self.path, whole)

    def get(self, key: str):
        """The value, None if there is none yet."""
        return self.known.get(key)

    def add(self, key: str, value) -> None:
        """Keep a value. A disk that is full is said once: the work itself goes on."""
        if self.path is None or self.full:
            return
        text = json.dumps([key, value]).encode()
        try:
            if self.file is None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self.file = open(self.path, "ab", buffering=0)
            self.file.write(checksum(text) + b" " + text + b"\n")
        except OSError as error:
            self.close()
            said = f"the work goes on, but what is done could not be kept: {visible(str(error))}"
            tqdm.write(said, file=sys.stderr)
            self.full = True

    def keep(self, key: str, make: Callable):
        """The value; what `make` returns, if there was none."""
        value = self.get(key)
        if value is None:
            value = make()
            self.add(key, value)
        return value

    def close(self) -> None:
        if self.file is not None:
            self.file.close()
            self.file = None

    def forget(self) -> None:
        """Delete the file: the stage has its own now."""
        self.close()
        if self.path is not None:
            remove(self.path)


def checksum(text: bytes) -> bytes:
    return b"%08x" % zlib.crc32(text)


NOTHING = Journal()  # for work that is not kept
