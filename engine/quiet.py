"""Imported before torch, which takes a second or more: Ctrl-C in that time ends with a word."""

import sys


def show(kind, error, trace) -> None:
    """In place of Python's own way to show what nobody has caught."""
    if issubclass(kind, KeyboardInterrupt):
        print("stopped", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


sys.excepthook = show
