"""Ctrl-C and SIGTERM, put off to a moment at which nothing is lost."""

import signal
import sys
import threading

from engine.progress import tqdm

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stop:
    """Inside, the first signal is only noted: `asked` becomes true. A second one acts at once."""

    def __init__(self):
        self.asked = False
        self.before = {}

    def __enter__(self) -> "Stop":
        self.asked = False
        # Handlers can be changed in the main thread only; a signal that is ignored stays so.
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                if signal.getsignal(number) != signal.SIG_IGN:
                    self.before[number] = signal.signal(number, self.note)
        return self

    def __exit__(self, *error) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
        self.before = {}

    def note(self, number, frame) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        tqdm.write("stopping after this step; once more, and at once", file=sys.stderr)


def as_interrupt() -> None:
    """From now on SIGTERM ends the program as Ctrl-C does, with what that says."""

    def interrupt(number, frame):
        raise KeyboardInterrupt

    if threading.current_thread() is threading.main_thread():
        if signal.getsignal(signal.SIGTERM) == signal.SIG_DFL:
            signal.signal(signal.SIGTERM, interrupt)
