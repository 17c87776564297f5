"""Constraints that a program can check: the sentence that asks for one, and the test of a response.

A kind of constraint is a sentence with blanks, `Use at most {n} words.`, the values that may fill
them, and a function that says how nearly a response obeys. What a prompt asks for is read from its
text (`constraints_of`), so a judge needs nothing but prompt and response.

To add one, write its check and a line in KINDS; a line in HELD_OUT keeps it out of the training
prompts. Checks are strict, and they see the text only: a sentence is what ends with . ! or ?, so
an abbreviation counts as one.
"""

import functools
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field

WORD = re.compile(r"[^\W_]+(?:['’-][^\W_]+)*")


def words(text: str) -> list[str]:
    return WORD.findall(text)


# ------------------------------------------------------------------------ the checks

# Each returns how nearly a text obeys, from 0 to 1; only 1 is obeying.


def near(found: int, wanted: int) -> float:
    return 1 / (1 + abs(found - wanted))


def at_most(text: str, n: int) -> float:
    return min(1.0, n / max(1, len(words(text))))


def at_least(text: str, n: int) -> float:
    return min(1.0, len(words(text)) / n)


def between(text: str, low: int, high: int) -> float:
    return min(at_least(text, low), at_most(text, high))


def sentences(text: str, n: int) -> float:
    # A number at the start of a line belongs to a list, and ends no sentence.
    text = re.sub(r"(?m)^\s*\d+[.)]\s", "", text)

    # What comes after the last mark is one more, unfinished.
    *finished, rest = re.split(r"""[.!?]+["'”’)*]*(?=\s|$)""", text)
    return near(len(finished) + bool(words(rest)), n)


def paragraphs(text: str, n: int) -> float:
    return near(len(re.split(r"\n\s*\n", text.strip())), n)


def bullets(text: str, n: int) -> float:
    return near(len(re.findall(r"(?m)^\s*[-*•] +\S", text)), n)


def numbered(text: str, n: int) -> float:
    found = re.findall(r"(?m)^\s*(\d+)[.)] +\S", text)
    if found == [str(number) for number in range(1, n + 1)]:
        return 1.0
    return near(len(found), n) / 2


def letters(text: str) -> list[str]:
    return [letter for letter in text if letter.lower() != letter.upper()]


def lowercase(text: str) -> float:
    wrong = [letter for letter in letters(text) if letter != letter.lower()]
    return near(len(wrong), 0) if letters(text) else 0.0


def capitals(text: str) -> float:
    wrong = [letter for letter in letters(text) if letter != letter.upper()]
    return near(len(wrong), 0) if letters(text) else 0.0


def no_commas(text: str) -> float:
    return near(text.count(","), 0)


def occurrences(text: str, word: str) -> int:
    """How often a word stands in a text, as a whole word, in any case."""
    return len(re.findall(rf"\b{re.escape(word)}\b", text, re.IGNORECASE))


def keyword(text: str, word: str, n: int) -> float:
    return min(1.0, occurrences(text, word) / n)


def forbidden(text: str, word: str) -> float:
    return near(occurrences(text, word), 0)


def start(text: str, phrase: str) -> float:
    return 1.0 if text.lstrip().startswith(phrase) else (phrase in text) / 2


def end(text: str, phrase: str) -> float:
    return 1.0 if text.rstrip().endswith(phrase) else (phrase in text) / 2


def quotes(text: str) -> float:
    text = text.strip()
    if len(text) <= 2:
        return 0.0
    return ((text[0] in '"“') + (text[-1] in '"”')) / 2


def title(text: str) -> float:
    # <<title>> itself only repeats the prompt, and a title alone is no answer.
    answer, found = re.subn(r"<<(?!title>)[^<>\n]*\w[^<>\n]*>>", "", text)
    return ((found > 0) + (found > 0 and len(words(answer)) >= 5)) / 2


def json_object(text: str, first: str, second: str) -> float:
    # Models put JSON between ```json and ```, as in a page of documentation.
    text = re.sub(r"^```(?:json|JSON)?\s*\n|\n```$", "", text.strip())
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text.startswith("{") / 4
    if not isinstance(value, dict):
        return 0.0
    return 1.0 if value.keys() == {first, second} else 0.5


def highlights(text: str, n: int) -> float:
    # A bullet's asterisk is followed by a space, which a highlight does not begin with.
    return min(1.0, len(re.findall(r"\*+[^\s*][^*\n]*\*+", text)) / n)


def placeholders(text: str, n: int) -> float:
    return min(1.0, len(re.findall(r"\[[^\[\]\n]*\w[^\[\]\n]*\]", text)) / n)


def postscript(text: str) -> float:
    return 1.0 if re.search(r"(?m)^\s*P\.S\.,?:? *\w", text) else ("P.S." in text) / 2


def question(text: str) -> float:
    return 1.0 if text.rstrip().endswith("?") else ("?" in text) / 2


# ------------------------------------------------------------------------ the kinds


@dataclass(frozen=True)
class Kind:
    """A sentence with blanks, what it lays down, its check, and the values of each blank.

    Two constraints of a prompt lay down different things, for example not both the `length`. The
    values `TOPIC` are words that belong to the prompt's topic.
    """

    form: str
    takes: frozenset
    check: Callable[..., float]
    values: dict = field(default_factory=dict)
    short: bool = False  # it asks for a short response

    @functools.cached_property
    def pattern(self) -> re.Pattern:
        """Finds the sentence in a prompt; a group for each blank."""
        pattern = re.escape(self.form)
        for blank, values in self.values.items():
            content = r"\d+" if isinstance(values[0], int) else '[^"]+'
            pattern = pattern.replace(rf"\{{{blank}\}}", f"(?P<{blank}>{content})")
        return re.compile(pattern)


TOPIC = ("topic",)


def kind(form: str, takes: str, check: Callable, short: bool = False, **values) -> Kind:
    return Kind(form, frozenset(takes.split()), check, values, short)


KINDS = {
    "at most": kind(
        "Use at most {n} words.", "length", at_most, short=True, n=(15, 20, 25, 30, 40)
    ),
    "at least": kind("Use at least {n} words.", "length", at_least, n=(40, 50, 60)),
    "between": kind(
        "Use between {low} and {high} words.", "length", between, short=True,
        low=(15, 20, 25), high=(30, 35, 40),
    ),
    "sentences": kind(
        "Write exactly {n} sentences.", "length layout", sentences, short=True, n=(2, 3)
    ),
    "paragraphs": kind(
        "Write exactly {n} paragraphs, with a blank line between them.", "layout", paragraphs,
        n=(2, 3),
    ),
    "bullets": kind(
        "Answer with exactly {n} bullet points, each on a line of its own that begins with a dash.",
        "layout first", bullets, n=(2, 3, 4),
    ),
    "numbered": kind(
        "Answer with a numbered list of exactly {n} items, each on a line of its own.",
        "layout first", numbered, n=(2, 3, 4),
    ),
    "lowercase": kind("Write everything in lowercase letters.", "case", lowercase),
    "capitals": kind("Write everything in capital letters.", "case", capitals),
    "no commas": kind("Do not use any commas.", "comma", no_commas),
    "keyword": kind(
        'Use the word "{word}" at least {n} times.', "word", keyword, word=TOPIC, n=(2, 3)
    ),
    "forbidden": kind('Do not use the word "{word}".', "word", forbidden, word=TOPIC),
    "start": kind(
        'Begin your answer with the words "{phrase}".', "first case", start,
        phrase=("In short", "Let me explain", "As we all know", "I think that"),
    ),
    "end": kind(
        'End your answer with the words "{phrase}"', "last case", end,
        phrase=("That is all.", "I hope this helps.", "Now you know.", "Isn't that nice?"),
    ),
    "quotes": kind(
        "Put your whole answer in double quotation marks.", "first last layout", quotes
    ),
    "title": kind(
        "Give your answer a title in double angle brackets, such as <<title>>.", "first mark", title
    ),
    "json": kind(
        'Answer with nothing but a JSON object that has the two keys "{first}" and "{second}".',
        "layout first last case comma length mark", json_object,
        first=("title", "answer", "fact"), second=("text", "reason", "example"),
    ),
    "highlights": kind(
        "Highlight at least {n} words with asterisks, such as *word*.", "mark", highlights,
        n=(2, 3),
    ),
    "placeholders": kind(
        "Use at least {n} placeholders in square brackets, such as [name].", "mark", placeholders,
        n=(2, 3),
    ),
    "postscript": kind(
        "Close with a postscript that begins with P.S. on a line of its own.", "last layout case",
        postscript,
    ),
    "question": kind("Let your last sentence be a question.", "last", question),
}  # fmt: skip

# No training prompt has one of these. Three of them, `lowercase`, `end` and `quotes`, the base
# obeys in 2 % of its samples: where no two samples differ, there is nothing to prefer.
HELD_OUT = (
    "between", "lowercase", "capitals", "end", "quotes", "highlights", "placeholders", "postscript",
    "question",
)  # fmt: skip
TRAINING = tuple(name for name in KINDS if name not in HELD_OUT)


@dataclass(frozen=True)
class Constraint:
    """A kind with its blanks filled in."""

    name: str
    arguments: dict

    @property
    def kind(self) -> Kind:
        return KINDS[self.name]

    @property
    def text(self) -> str:
        return self.kind.form.format(**self.arguments)

    def nearness(self, response: str) -> float:
        """How nearly a response obeys, from 0 to 1."""
        return self.kind.check(response, **self.arguments)

    def satisfied(self, response: str) -> bool:
        return self.nearness(response) == 1


def constraints_of(prompt: str) -> list[Constraint]:
    """What a prompt asks for, read from its text, in the order of the text."""
    found = []
    for name, one in KINDS.items():
        for match in one.pattern.finditer(prompt):
            arguments = {key: number(value) for key, value in match.groupdict().items()}
            found.append((match.start(), Constraint(name, arguments)))
    return [constraint for _, constraint in sorted(found, key=lambda pair: pair[0])]


def number(text: str) -> int | str:
    return int(text) if text.isdecimal() else text
