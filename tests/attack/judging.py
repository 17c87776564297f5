"""Judges that are wrong: in what they return, in how they fail, in what they are called."""

from attack.world import COMMANDS, TRAIN, content

# Bodies of `def letters(prompt, responses)`. {name: (body, whether it may be a right judge)}
WRONG = {
    "NaN": "return good(responses) * float('nan')",
    "infinite": "return good(responses) / 0",
    "above one": "return good(responses) + 1",
    "negative": "return good(responses) - 1",
    "one sided": "return good(responses).triu()",
    "no diagonal": "return good(responses) - torch.eye(len(responses)) / 2",
    "wins by itself": "return torch.ones(len(responses), len(responses))",
    "short": "return good(responses)[:-1]",
    "deep": "return good(responses)[None]",
    "flat": "return good(responses).flatten()",
    "a number": "return 0.5",
    "nothing": "return None",
    "text": "return 'x' * len(responses)",
    "ragged": "return [[0.5]] + [[0.5, 0.5]] * (len(responses) - 1)",
    "objects": "return [[object()] * len(responses)] * len(responses)",
    "a table of texts": "return [['0.5'] * len(responses)] * len(responses)",
    "ends the program": "sys.exit(0)",
    "ends it with a word": "raise SystemExit('bye')",
    "no memory": "raise MemoryError()",
    "no end": "return letters(prompt, responses)",
    "zero": "return 1 / 0",
    "key": "return {}['\\x1b[31m']",
    "long": "raise ValueError('x' * 10**6)",
    "lines": "raise RuntimeError('a\\nb\\n\\x1b[2Jc')",
    "surrogate": "raise ValueError('\\ud800')",
    "unprintable": "raise type('E', (Exception,), {'__str__': lambda self: 1 / 0})()",
    "group": "raise ExceptionGroup('several', [ValueError('a'), OSError('b')])",
    "stop": "raise StopIteration",
    "file": "return open('/none/at/all')",
    "passing": "raise ConnectionError('later')",
    "refused": "raise PermissionError('no')",
    "assertion": "assert False, prompt",
    "import": "import nothing_of_that_name",
    "changed texts": "responses.clear(); return good(['a'])",
    "os error": "raise OSError(28, 'No space left on device')",
}
RIGHT = {
    "list": "return good(responses).tolist()",
    "array": "return good(responses).numpy()",
    "wide": "return good(responses).double()",
    "gradient": "return good(responses).requires_grad_()",
    "draws numbers": "torch.rand(9); torch.manual_seed(3); __import__('random').seed(1); return good(responses)",
    "prints": "print('judging \\x1b[31m', prompt, file=sys.stderr); return good(responses)",
}
SOURCES = {
    "no module": None,
    "empty": "",
    "syntax": "def letters(:\n",
    "fails": "1 / 0\n",
    "ends": "import sys\nsys.exit(0)\n",
    "nul": "def letters(a, b):\n    pass\0\n",
    "bytes": "# \udcff\ndef letters(a, b): pass\n",
    "a value": "letters = 3\n",
    "an attribute": "class letters:\n    preferences_many = 3\n",
    "a class that fails": "class letters:\n    preferences_many = 1\n    def __init__(self): raise KeyError('x')\n",
    "other arguments": "def letters(prompt): pass\n",
    "keywords": "def letters(prompt, responses, *, needed): pass\n",
    "late": "def letters(prompt, responses):\n    raise\n",
    "loops": "import my_rule2\n",
}
SPECS = (
    "my_rule", "my_rule:", ":letters", "my_rule:nothing", "my_rule:letters:", "my_rule:letters:[1]", "my_rule:letters:{",
    "nothing:x",
    'my_rule:letters:{"a": 1}', "os:system", "sys:exit", "builtins:print", "ensemble", "ensemble:{}", 'ensemble:{"judges": []}',
    'ensemble:{"judges": "my_rule:letters"}', 'ensemble:{"judges": ["my_rule:letters"], "weights": [NaN]}', "llm:{}", "human:{",
    'ensemble:{"judges": ["my_rule:letters"], "weights": [-1]}', 'ensemble:{"judges": ["my_rule:letters"], "weights": "a"}',
    'ensemble:{"judges": ["my_rule:letters"], "weights": [null]}', 'ensemble:{"judges": ["my_rule:letters"], "weights": [[1]]}',
    'ensemble:{"judges": ["my_rule:letters"], "weights": [Infinity]}', 'ensemble:{"judges": ["my_rule:letters"], "weights": 1}',
    'ensemble:{"judges": ["none"]}', 'transitive:{"judge": "none"}', 'transitive:{"judge": 3}', "transitive:{}",
    'human:{"votes": 3}',
    'human:{"votes": "prompts.jsonl"}', 'human:{"votes": "policy"}', 'human:{"seed": []}', 'human:{"votes": null}', "..:x",
    "a b:c",
    "my_rule:letters.x", ".my_rule:letters", "my_rule:__name__", "my_rule:torch", "x" * 5000, "ensemble:" + "[" * 5000,
    "\x1b[31m:x",
    'human:{"ask": "x"}', 'human:{"votes": "none/none/v.jsonl"}', 'human:{"votes": "prompts.jsonl/v"}', "policy", "run",
    "prompts.jsonl",
    'ensemble:{"judges": ["ensemble:{\\"judges\\": [\\"none\\"]}"]}', "1:2", "my_rule:letters:{}:{}", "\ud800:x",
    'llm:{"url": 3}',
)  # fmt: skip
GOOD = """import sys

import torch


def good(responses):
    score = torch.tensor([sum(map(ord, text)) / 40 for text in responses])
    return torch.sigmoid(score[:, None] - score)


calls = 0


def letters(prompt, responses):
    global calls
    calls += 1
    if calls <= {after}:
        return good(responses)
    {body}
"""


def judges(case) -> None:
    """A judge that is wrong, from the start or after some tables; as a judge of a run or of pairs."""
    kind = case.pick(["wrong", "wrong", "right", "source", "spec"])
    command = case.pick([TRAIN, TRAIN, COMMANDS["report"], COMMANDS["versus"], COMMANDS["best of"]])
    command = command.but(judge="my_rule:letters")
    path = case.place / "my_rule.py"

    if kind == "right":
        name = case.pick(RIGHT)
        case.tell("right:", name)
        right(case, path, RIGHT[name])
    elif kind == "wrong":
        name = case.pick(WRONG)
        after = case.pick([0, 0, 2, 4])
        case.tell("wrong:", name, "after", after)
        path.write_text(GOOD.format(after=after, body=WRONG[name]))
        fails(case, command, after)
    elif kind == "source":
        name = case.pick(SOURCES)
        case.tell("source:", name)
        path.unlink()
        if SOURCES[name] is not None:
            path.write_bytes(SOURCES[name].encode("utf-8", "surrogateescape"))
        case.refuse(command, "judge")
    else:
        spec = case.pick(SPECS)
        case.tell("spec:", ascii(spec)[:100])
        case.survive(command.but(judge=spec))


def right(case, path, body: str) -> None:
    """The same tables in another form: the same bytes of everything but the fingerprint of the judge's source."""
    path.write_text(GOOD.format(after=0, body=body))
    case.run(TRAIN, (0,))
    case.same_as(case.world.reference("train")[0], ("my_rule.py", "new/config.json"))


def fails(case, command, after: int) -> None:
    """Refused; and what a run had by then stays, so that the same command comes further each time."""
    result = case.survive(command)
    case.require(result.code == 2 or after, "a wrong judge was believed")
    if command.program != "train.py":
        return

    # A module that counts its calls begins again in each process.
    for _ in range(9 * bool(after)):
        if result.code == 0:
            break
        result = case.survive(command)
    if result.code == 0:
        case.same_as(case.world.reference("train")[0], ("my_rule.py", "new/config.json"))
    if not (case.place / "new/config.json").exists():
        return

    # Its source is another now, which is refused as well, whatever the run has.
    before = content(case.place / "new")
    (case.place / "my_rule.py").write_text(GOOD.format(after=10**9, body="pass"))
    case.refuse(command, "--judge")
    case.require(content(case.place / "new") == before, "what the run had is another now")
