"""Progress bars: tqdm's at a terminal, and in a file a line a minute.

from engine.progress import tqdm
"""

import math
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from tqdm import std

EVERY = 60  # seconds between two lines, of whichever bars


class tqdm(std.tqdm):
    """tqdm's bar, which becomes lines where there is no terminal to draw it on."""

    said = time.monotonic()  # when any of them wrote its last line

    def __init__(self, *args, **options):
        file = options.get("file") or sys.stderr
        self.lines = not file.isatty()
        super().__init__(*args, **options)

    def display(self, msg=None, pos=None):
        if not self.lines:
            return super().display(msg, pos)
        if time.monotonic() - tqdm.said >= EVERY:
            self.say()

    def say(self) -> None:
        tqdm.said = time.monotonic()
        self.fp.write(f"{self}\n")
        self.fp.flush()

    def clear(self, nolock=False) -> None:
        if not self.lines:
            super().clear(nolock)

    def close(self) -> None:
        if self.total and self.n < self.total:
            self.leave = False  # it was interrupted, by an error perhaps
        if self.lines and not self.disable:
            if self.leave:
                self.say()
            self.delay = math.inf  # a bar whose time has not come has nothing to clear
        super().close()


@contextmanager
def no_bar_left() -> Iterator[None]:
    """Whatever ends what is inside, the screen is without its bars before anything else is said."""
    try:
        yield
    finally:
        for bar in list(tqdm._instances):
            bar.leave = False
            bar.close()
