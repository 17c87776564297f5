"""What is said at a terminal: of any encoding, to a reader who may have gone, and nothing that a
text from outside could do to it.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress


def visible(text: str) -> str:
    """Text from outside, as it is but for control characters, which are escaped."""
    return escaped(text, "\n\t")


def printable(text: str, longest: int = 300) -> str:
    """Text from outside, cut, as one line."""
    cut = text[:longest] + "…" * (len(text) > longest)
    return escaped(cut)


def escaped(text: str, kept: str = "") -> str:
    return "".join(c if c.isprintable() or c in kept else repr(c)[1:-1] for c in text)


class Stream:
    """stdout or stderr; where nobody reads it (`train.py ... | head`), or its disk is full,
    it falls silent.
    """

    def __init__(self, stream):
        self.stream = stream
        # A letter that the terminal's encoding does not have is escaped. What has no encoding, or
        # cannot change it, stays as it is.
        with suppress(AttributeError, OSError):
            stream.reconfigure(errors="backslashreplace")

    def write(self, text: str) -> int:
        try:
            return self.stream.write(text)
        except OSError:
            self.silence()
            return len(text)

    def flush(self) -> None:
        try:
            self.stream.flush()
        except OSError:
            self.silence()

    def silence(self) -> None:
        """From now on nothing arrives, and nothing fails: not at the end of the program either."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.stream.fileno())
        os.close(nowhere)

    def __getattr__(self, name):
        return getattr(self.stream, name)


@contextmanager
def tolerant() -> Iterator[None]:
    """Inside, whatever is printed makes nothing fail."""
    out = Stream(sys.stdout)
    err = Stream(sys.stderr)
    with redirect_stdout(out), redirect_stderr(err):
        try:
            yield
        finally:
            out.flush()
            err.flush()
