"""Commands: flags from a settings class, one check of their ranges, errors in one sentence.

A settings class is a dataclass whose fields are made by `setting`: name, type, default, help,
choices and range of a flag are declared on that one line, and nowhere else.
"""

import argparse
import math
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import Field, fields

from engine.lock import owned
from engine.memory import out_of_memory
from engine.stop import as_interrupt
from engine.terminal import tolerant, visible


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def kind_of(field: Field) -> type:
    """The type of a field's values: of `int | None` it is int."""
    return field.type if isinstance(field.type, type) else field.type.__args__[0]


def add_flags(
    parser: argparse.ArgumentParser, settings: type, only: tuple = (), **defaults
) -> None:
    """A flag for every field of a settings class, or for those named in `only`; `defaults` replace
    the fields' own.

    A parser made with argument_default=SUPPRESS keeps them out of its namespace: there only the
    given flags appear.
    """
    for field in fields(settings):
        if only and field.name not in only:
            continue

        # Where only given flags count, argparse must not fill in defaults: a preset may set them.
        default = defaults.get(field.name, field.default)
        options = {"help": described(field, default)}
        if parser.argument_default is not argparse.SUPPRESS:
            options["default"] = default

        # --flag and --no-flag: a preset that sets it can be overridden either way.
        if kind_of(field) is bool:
            options["action"] = argparse.BooleanOptionalAction
        else:
            options["type"] = kind_of(field)
            options["choices"] = field.metadata.get("choices")
        parser.add_argument(flag(field.name), **options)


def described(field: Field, default) -> str:
    """The help text of a flag, with its default."""
    text = field.metadata["help"].replace("%", "%%")
    return text if default in ("", None) else f"{text} [{default}]"


def check_settings(values, settings: type) -> None:
    """ValueError names the first setting that is out of its range; `values` has the fields of
    `settings`, or some of them.
    """
    for field in fields(settings):
        value = getattr(values, field.name, None)
        low = field.metadata.get("low")
        if value is None or low is None:
            continue
        high = field.metadata.get("high", math.inf)
        if not low <= value <= high:  # NaN is in no range
            expected = f"at least {low}" if high == math.inf else f"from {low} to {high}"
            raise ValueError(f"{flag(field.name)} is {value}, expected {expected}")


def exit_code(
    name: str, work: Callable[[], object], stopped: str = "stopped", out=None, inputs: tuple = ()
) -> int:
    """Call `work`. 0; or 2 where the user's input was wrong or a file could not be read or written;
    or 130 after Ctrl-C.

    `out`, where the command writes, is its own for so long, and none of its `inputs` (lock.owned).
    """
    as_interrupt()
    with tolerant():
        try:
            with owned(out, *inputs) if out else nullcontext():
                work()
        except (ValueError, OSError) as error:
            print(f"{name}: {visible(str(error))}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            print(f"{name}: {stopped}", file=sys.stderr)
            return 130
        except (RuntimeError, MemoryError) as error:
            # Anything else is a mistake of ours, and keeps its traceback.
            if not out_of_memory(error):
                raise
            print(f"{name}: out of memory: {visible(str(error))}", file=sys.stderr)
            return 2
        return 0
