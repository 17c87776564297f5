"""Kills, full and read-only disks, two processes on one folder, and changes between a stop and its continuation."""

import errno
import os
import signal
import time

from attack import damage
from attack.process import at_call, at_change, failing, short_files
from attack.world import COMMANDS, TRAIN, content

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
# Half of all are of the command that takes days.
INTERRUPTED = [*["train", "train, saving each step", "train, all stages", "train, optimistic", "prefmodel"] * 3]
INTERRUPTED += ["outputs", "best of", "versus", "matrix", "average", "distill", "report", "lc", "prefmodel"]


def moment(case, name: str, signals: tuple):
    """A moment of a command, drawn: of its calls of functions, or before one of its changes of files."""
    calls, changes = case.world.reference(name)[1]
    if case.random.random() < 0.6:
        when = case.random.randrange(300, calls)
        case.tell(f"call {when} of {calls}: {signals}")
        return at_call(when, *signals)
    when = case.random.randrange(1, changes + 1)
    case.tell(f"change {when} of {changes}: {signals[0]}")
    return at_change(when, signals[0])


def kills(case) -> None:
    """Stopped one to three times, each time at another moment; then it comes to the bytes of an undisturbed run."""
    name = case.pick(INTERRUPTED)
    known = COMMANDS[name]
    for _ in range(case.pick([1, 1, 1, 2, 3])):
        number = case.pick(SIGNALS)
        twice = number != signal.SIGKILL and case.random.random() < 0.3
        before = content(case.world.inputs)
        result = case.run(known, (0, 2, 130, -number), moment(case, name, (number,) * (1 + twice)))
        case.untouched(before)
        if result.code == 130:
            case.require("stopped" in result.lines[-1], f"the last line does not say so: {result.lines[-1]}")
            case.require(number != signal.SIGKILL, "nobody asked it to stop")
        if result.code == 2:
            case.require(done_already(name, result), f"it did not continue: {result.lines[-1]}")

    finish(case, name)


def finish(case, name: str) -> None:
    """The same command, undisturbed, comes to what it comes to."""
    result = case.run(COMMANDS[name], (0, 2))
    case.require(result.code == 0 or done_already(name, result), f"it did not continue: {result.lines[-1]}")
    case.same_as(case.world.reference(name)[0])
    left = [str(path) for path in case.place.rglob(".*")]
    case.require(not left, f"left behind: {left}")


def done_already(name: str, result) -> bool:
    """Whether a command that writes something new, and nothing over what is old, was stopped after its last step."""
    return not name.startswith(("train", "lc")) and "exists already" in result.lines[-1]


# ------------------------------------------------------------------------------------------------ disks

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EIO)


def disks(case) -> None:
    """A disk that is full, fails, or cannot be written; afterwards the same command comes to the same bytes."""
    name = case.pick(INTERRUPTED)
    kind = case.pick([full, full, failure, failure, no_place])
    case.tell(kind.__name__, name)
    before = content(case.place)
    kind(case, name)
    case.untouched(before)
    finish(case, name)


def full(case, name) -> None:
    sizes = [len(data) for data in case.world.reference(name)[0].values()]
    size = case.pick([1, 100, 1000, max(sizes) - 1, case.random.randrange(max(sizes))])
    case.tell("no file larger than", size)
    case.run(COMMANDS[name], (0, 2), short_files(size))


def failure(case, name) -> None:
    changes = case.world.reference(name)[1][1]
    when = case.random.randrange(1, changes + 1)
    number = case.pick(FULL)
    lasting = case.random.random() < 0.6
    case.tell(f"change {when} of {changes} fails: {errno.errorcode[number]}", "and all after it" * lasting)
    case.excused = True
    case.run(COMMANDS[name], (0, 2), failing(when, number, lasting))


def no_place(case, name) -> None:
    """Where the command would write, there is a file, a device, or nothing that can be made."""
    suffix = ".json" if ".json" in str(dict(COMMANDS[name].flags)["out"]) else ""
    (case.place / "a file").write_text("x")
    (case.place / "full").symlink_to("/dev/full")
    outs = ["a file/new", "a file/deep/new", "/proc/none/new", "/sys/none/new", "x" * 260, "full/new"]
    out = case.pick(outs) + suffix
    case.run(COMMANDS[name].but(out=out), (2,))
    for made in ("a file", "full"):
        (case.place / made).unlink()


# ------------------------------------------------------------------------------------------------ company


def pairs(case) -> None:
    """Two processes on one folder at the same time: one works, the other waits for nothing and spoils nothing."""
    name = case.pick(INTERRUPTED)
    first = COMMANDS[name]
    second = first
    if "seed" in dict(first.flags) or first.program == "train.py":
        second = case.pick([first, first.but(seed=1)])
    elif name in ("matrix", "best of", "average", "distill") and case.random.random() < 0.5:
        second = TRAIN.but(out="run")  # continues, and writes again, what the first one reads
    case.tell("beside:", second)

    # It may come at any moment of the other one.
    one = case.start(first)
    time.sleep(case.random.random() * 0.4)
    other = case.start(second)
    results = [case.settle(first, one.end()), case.settle(second, other.end())]

    codes = [result.code for result in results]
    case.require(0 in codes, f"none of the two did it: {codes}")
    if codes[0] == 0 and (codes[1] == 2 or second in (first, TRAIN.but(out="run"))):
        case.run(first, (0, 2))
        case.same_as(case.world.reference(name)[0])
    for path in case.place.rglob(".*"):
        case.require(False, f"left behind: {path}")


# ------------------------------------------------------------------------------------------------ resumes

OTHER = dict(
    seed=1, samples=2, eta=3, lr=1e-3, epochs=3, batch=2, rounds=1, select="best-worst", loss="centred", max_new_tokens=3,
    temperature=0.5,
    top_p=0.9, optimizer="rmsprop", clip=0.5, warmup=0.5, target="normalized", judge="judge", template="chat", dtype="bfloat16",
)  # fmt: skip
FREE = dict(pool=3, micro_batch=1, save_minutes=5, judge_retries=2, recompute=True, cache_gb=1)


def resumes(case) -> None:
    """A run is stopped, something changes, and the same command is given: refused by name, or the same numbers."""
    name = case.pick(["train", "train, saving each step"])
    known = COMMANDS[name]
    if case.random.random() < 0.8:
        case.run(known, (0, 130, -9), moment(case, name, (case.pick(SIGNALS),)))
    else:
        case.run(known, (0,))
    begun = (case.place / "new/config.json").exists()
    case.pick([another_setting, another_setting, free_setting, another_input, another_name, put_back])(case, name, begun)


def another_setting(case, name, begun) -> None:
    known = COMMANDS[name]
    flag = case.pick([flag for flag in OTHER if dict(known.flags).get(flag.replace("_", "-")) != OTHER[flag]])
    changed = known.but(**{flag: OTHER[flag]})
    if begun:
        before = content(case.place)
        case.run(changed, (2,))
        case.untouched(before, but="nothing")
        finish(case, name)


def free_setting(case, name, begun) -> None:
    flag = case.pick([flag for flag in FREE if dict(COMMANDS[name].flags).get(flag.replace("_", "-")) != FREE[flag]])
    case.run(COMMANDS[name].but(**{flag: FREE[flag]}), (0,))
    # Another size of forward passes may round another way.
    if flag not in ("micro_batch", "recompute", "pool"):
        case.same_as(case.world.reference(name)[0], () if begun else ("new/config.json",))


def edits(case) -> tuple:
    """(path that is changed, function that changes it)."""
    policy = case.place / "policy"
    prompts = case.place / "prompts.jsonl"
    return case.pick(
        [
            (prompts, lambda: prompts.write_text(prompts.read_text().replace("3+4", "4+4"))),
            (prompts, lambda: prompts.write_text(prompts.read_text() + '{"prompt": "2+2="}\n')),
            (
                policy / "model.safetensors",
                lambda: damage.one_tensor(policy / "model.safetensors", case.random, lambda t: t * 1.01),
            ),
            (
                policy / "tokenizer.json",
                lambda: (policy / "tokenizer.json").write_text((policy / "tokenizer.json").read_text() + "\n"),
            ),
            (policy / "config.json", lambda: (policy / "config.json").write_text((policy / "config.json").read_text() + "\n")),
            (
                case.place / "my_rule.py",
                lambda: (case.place / "my_rule.py").write_text((case.place / "my_rule.py").read_text() + "#"),
            ),
        ]
    )


def another_input(case, name, begun) -> None:
    path, edit = edits(case)
    edit()
    case.tell("edited:", path.name)
    if begun:
        case.refuse(COMMANDS[name], "new/config.json", "its content is another")


def put_back(case, name, begun) -> None:
    """Refused while something is another, and as good as ever when it is put back."""
    path, edit = edits(case)
    kept = path.read_bytes()
    edit()
    case.tell("edited and put back:", path.name)
    if begun:
        case.refuse(COMMANDS[name])
    path.write_bytes(kept)
    finish(case, name)


def another_name(case, name, begun) -> None:
    """The same files by other names give the same numbers."""
    known = COMMANDS[name]
    kind = case.pick(["moved", "absolute", "dotted", "linked"])
    case.tell(kind)
    if kind == "moved":
        (case.place / "policy").rename(case.place / "elsewhere")
        result = case.run(known.but(policy="elsewhere"), (0,))
        (case.place / "elsewhere").rename(case.place / "policy")
    elif kind == "absolute":
        result = case.run(known.but(policy=case.place / "policy", out=case.place / "new"), (0,))
    elif kind == "dotted":
        result = case.run(known.but(policy="./policy/", out="new/../new", prompts="./prompts.jsonl"), (0,))
    else:
        os.symlink("policy", case.place / "link")
        result = case.run(known.but(policy="link"), (0,))
        (case.place / "link").unlink()
    assert result.code == 0
    case.same_as(case.world.reference(name)[0], () if begun else ("new/config.json",))
