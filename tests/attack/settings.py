"""Flags: values that are none, out of range, of the wrong kind, or contradict each other."""

from attack.world import COMMANDS

VALUES = (
    "", "x", "-1", "0", "nan", "inf", "-inf", "1e999", "1e-999", "0x10", "1_0", "٣", "½", "1.5", "999999999999999999999",
    "None", " 1", "True",
)  # fmt: skip
PATHS = (
    "", " ", ".", "..", "/", "none", "none/none", "policy/config.json", "prompts.jsonl", "/dev/null", "/dev/full",
    "/proc/self/mem",
    "x" * 300, "a/" * 2100 + "b", "日本", "-", "~", "\udcff", "/proc/none/new", "prompts.jsonl/new", "*", "policy", "run",
    "my_rule.py",
)  # fmt: skip
# Never a device: a process of root would put a file in its place.
OUTS = (
    "", " ", "none/none/new", "x" * 300, "a/" * 2100 + "b", "日本", "-", "~", "\udcff", "/proc/none/new", "/sys/new", "*",
    "prompts.jsonl/new", "policy", "judge",
)  # fmt: skip
MORE = ("seed", "temperature", "top-p", "pool", "clip", "tau", "device", "dtype", "cache-gb", "save-minutes", "preset")
# Legitimate, but it would take for ever.
ENDLESS = {("rounds", "999999999999999999999"), ("epochs", "999999999999999999999"), ("samples", "999999999999999999999")}
PATH_FLAGS = (
    "policy", "judge", "prompts", "out", "against", "pairs", "backbone", "annotations", "difficulty", "opponents",
    "reference",
)  # fmt: skip


def flags(case) -> None:
    """One or two flags of one command have a value that is drawn; a machine that has no such device says so."""
    name = case.pick(COMMANDS)
    command = COMMANDS[name]
    given = [flag for flag, value in command.flags if value not in (None, True)]
    choices = [*given, *(MORE if command.program == "train.py" else ())]

    for flag in case.random.sample(choices, min(len(choices), case.pick([1, 1, 2]))):
        value = case.pick(outs(command) if flag == "out" else PATHS if flag in PATH_FLAGS else VALUES)
        if (flag, value) in ENDLESS or (flag == "rounds" and command.program == "plan.py"):
            value = "-5"
        command = command.but(**{flag: value})
    case.survive(command)


def outs(command) -> list[str]:
    """Also what the command reads, by another name too: it must not write over that."""
    read = [value for flag, value in command.flags if flag in PATH_FLAGS and flag != "out" and "." in value]
    return [*OUTS, *read, *(f"{path}/" for path in read), *(f"./{path}" for path in read)]
