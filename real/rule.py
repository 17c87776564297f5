"""What is the better of two responses? A rule over the text of prompt and response.

    1. degenerate text loses to everything: next to no words, repetition, a copy of the prompt
    2. more of the prompt's constraints satisfied
    3. nearer to the constraints that are not satisfied: one comma, not five
    4. on the topic
    5. ended, not cut

The first line on which two responses differ decides. The higher the line, the surer the win: 0.95
where one is degenerate or obeys more, 0.7 if it is nearer or on the topic, 0.65 if it ended; they
tie if nothing differs. Preferences are transitive, but a response may win by more or by less, which
soft win rates can tell. Nothing here knows whether what a response says is true.
"""

import functools
import re
from typing import NamedTuple

import torch
from torch import Tensor

from real.constraints import constraints_of, words
from real.prompts import topic_of

FEWEST_WORDS = 5
DISTINCT = 0.7  # the least share of distinct bigrams
COPIED = 0.4  # the largest share of trigrams that stand in the prompt
COPIED_WORDS = 8  # in a row


class Level(NamedTuple):
    """A response's place; the larger tuple is better. All are 0 of a degenerate one."""

    sound: int
    satisfied: int  # constraints
    near: float  # summed over the constraints
    on_topic: int
    ended: int


SURE = Level(sound=0.95, satisfied=0.95, near=0.7, on_topic=0.7, ended=0.65)


def ngrams(tokens: list[str], n: int) -> list[tuple]:
    return [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]


def share(flags: list) -> float:
    """The share of true ones; 0 of none."""
    return sum(map(bool, flags)) / max(1, len(flags))


def lower_words(text: str) -> list[str]:
    return [word.lower() for word in words(text)]


def distinct_bigrams(text: str) -> float:
    """Distinct pairs of neighbouring words, as a share of all; 1 for a text that has none."""
    pairs = ngrams(lower_words(text), 2)
    return len(set(pairs)) / len(pairs) if pairs else 1.0


def copied(prompt: str, response: str) -> bool:
    """Whether much of a response, or a long part of it, stands in the prompt word for word."""
    asked = lower_words(prompt)
    said = lower_words(response)

    # Three words in a row may be needed to answer; two fifths of all, or eight in a row, are not.
    known = set(ngrams(asked, 3))
    runs = set(ngrams(asked, COPIED_WORDS))
    often = share([trigram in known for trigram in ngrams(said, 3)]) > COPIED
    return often or not runs.isdisjoint(ngrams(said, COPIED_WORDS))


def degenerate(prompt: str, response: str) -> bool:
    # A response that was cut may end inside a character of several bytes.
    broken = "\ufffd" in response.rstrip("\ufffd")
    short = len(words(response)) < FEWEST_WORDS
    repeats = distinct_bigrams(response) < DISTINCT
    return broken or short or repeats or copied(prompt, response)


@functools.cache
def forms(word: str) -> frozenset[str]:
    """A word with the endings of regular plurals and verbs: bake, bakes, baked, baking."""
    endings = [word + ending for ending in ("", "s", "es", "'s", "’s", "d", "ed", "ing")]
    if word[-1] in "ey":
        endings += [word[:-1] + ending for ending in ("ing", "ies", "ied")]
    return frozenset(endings)


def on_topic(prompt: str, response: str) -> bool:
    """Two words of the topic, in any of their forms, one of which the prompt does not have."""
    asked = lower_words(prompt)
    said = lower_words(response)

    # A word that the prompt gives away, or even asks for, is no sign that the topic was understood.
    found = [word for word in topic_of(prompt).words if not forms(word).isdisjoint(said)]
    new = [word for word in found if forms(word).isdisjoint(asked)]
    return len(found) >= 2 and len(new) >= 1


def ended(prompt: str, response: str) -> bool:
    """Whether a response looks finished: text cannot show the stop token.

    It is, if its last sentence has its mark, if a bracket, a brace or a quotation is closed, or if
    it ends as the prompt says. A response that was cut just after a sentence is taken for finished,
    and a list without full stops for cut.
    """
    text = response.rstrip()
    if any(c.name == "end" and c.satisfied(text) for c in constraints_of(prompt)):
        return True

    # "2." alone on a line is the beginning of an item.
    last_line = text.rsplit("\n", 1)[-1].strip()
    if re.fullmatch(r"\d+[.)]|[-*•]", last_line):
        return False
    text = re.sub(r"(```|[*_)\s])+$", "", text)
    return text.endswith(tuple('.!?…}]>"”'))


def satisfied(prompt: str, response: str) -> list[bool]:
    """Of each constraint of the prompt, in the order of its text, whether it is satisfied."""
    return [constraint.satisfied(response) for constraint in constraints_of(prompt)]


def level(prompt: str, response: str) -> Level:
    if degenerate(prompt, response):
        return Level(0, 0, 0, 0, 0)
    near = [constraint.nearness(response) for constraint in constraints_of(prompt)]
    kept = near.count(1)
    topic = int(on_topic(prompt, response))
    return Level(1, kept, sum(near), topic, int(ended(prompt, response)))


def preferences(levels: list[Level]) -> Tensor:
    """(K, K) P(i beats j)."""
    return torch.tensor([[probability(one, other) for other in levels] for one in levels])


def probability(one: Level, other: Level) -> float:
    """P(one beats other), decided by the first difference."""
    for mine, yours, sure in zip(one, other, SURE):
        if mine != yours:
            return sure if mine > yours else 1 - sure
    return 0.5


def quality(prompt: str, response: str) -> float:
    """In [0, 1], whatever the constraints: the mean of on topic, ended and fresh; 0 if degenerate.

    `fresh` is the share of bigrams that neither the prompt has, nor the response has twice.
    """
    if degenerate(prompt, response):
        return 0.0

    pairs = ngrams(lower_words(response), 2)
    new = set(pairs).difference(ngrams(lower_words(prompt), 2))
    fresh = len(new) / len(pairs)
    return (on_topic(prompt, response) + ended(prompt, response) + fresh) / 3
