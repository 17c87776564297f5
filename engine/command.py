"""Commands: flags from a settings class, one check of their ranges, errors in one sentence.

A settings class is a dataclass whose fields are made by `setting`: name, type, default, help,
choices and range of a flag are declared on that one line, and nowhere else. Which part of --help a
flag belongs to is a matter of its name: GROUPS.
"""

import argparse
import math
import platform
import shutil
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import Field, fields

import torch

from engine.lock import owned
from engine.memory import out_of_memory
from engine.progress import no_bar_left
from engine.stop import as_interrupt
from engine.terminal import Stream, tolerant, escaped, visible

VERSION = "0.1.0"

# The parts of every command's help, and the flags in them; any other flag is among the options.
GROUPS = {
    "files": """prompts pairs out name save_minutes trace annotations difficulty gamed pandalm
        llmbar votes""",
    "model": """policy against backbone base run dtype template reference from_scratch scalar
        cyclic max_tokens""",
    "sampling": """samples best_of max_new_tokens temperature top_p opponents seed
        training_prompts held_out_prompts measured measure_every""",
    "judging": "judge judge_dtype judge_retries compare every",
    "learning": """rounds reuse_prompts eta loss target tau reference_every select epochs
        schedule_epochs batch optimizer lr lora warmup clip held_out patience""",
    "machine": "device threads pool cache_gb micro_batch micro_tokens recompute gpu gpus",
}
GROUP = {name: title for title, names in GROUPS.items() for name in names.split()}

# What stands for a flag's value.
METAVARS = {int: "INT", float: "NUMBER", str: "TEXT"}


class Layout(argparse.RawDescriptionHelpFormatter):
    """Help of at most 100 columns, whose first line has only what must be given."""

    def __init__(self, prog: str):
        width = min(100, shutil.get_terminal_size().columns)
        super().__init__(prog, max_help_position=32, width=width)

    def add_usage(self, usage, actions, groups, prefix=None) -> None:
        needed = [action for action in actions if action.required or not action.option_strings]
        if prefix is None:  # with one, argparse makes the name of a subcommand from this line
            needed.append(argparse.Action((), "flags", metavar="[flags]"))
        super().add_usage(usage, needed, (), prefix)


class Parser(argparse.ArgumentParser):
    """A parser whose help looks like that of every other command; its subcommands' as well."""

    def __init__(self, *args, **options):
        super().__init__(*args, **{"formatter_class": Layout} | options)
        version = f"SPPO {VERSION}, Python {platform.python_version()}, torch {torch.__version__}"
        self.add_argument("--version", action="version", version=version)
        self.groups = {title: self.add_argument_group(title) for title in GROUPS}

    def add_argument(self, *names, **options):
        title = GROUP.get(names[0].removeprefix("--").replace("-", "_"))
        if title is None or not names[0].startswith("--"):
            return super().add_argument(*names, **options)
        return self.groups[title].add_argument(*names, **options)

    def _print_message(self, message, file=None) -> None:
        # Said before a command begins, but to the same terminals.
        if message:
            Stream(file or sys.stderr).write(message)


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
            options["metavar"] = None if options["choices"] else METAVARS[kind_of(field)]
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
            with owned(out, *inputs) if out else nullcontext(), no_bar_left():
                work()
        except (ValueError, OSError) as error:
            print(f"{name}: {escaped(str(error))}", file=sys.stderr)  # in one line
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
