"""Judges: P(y_i beats y_j | x) for K responses to a prompt.

A judge is anything with `preferences_many(prompts, responses) -> (N, K, K)`: entry [i, j] is
P(response i beats response j), P + Pᵀ = 1, ½ on the diagonal (a response ties with itself). What it
returns is checked by `checked` where it enters, and what it raises becomes one sentence (`asked`).
Here are the judges made of a function or of other judges; judges/load.py finds a judge from the
command line.
"""

import itertools
import sys
import sysconfig
import time
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from engine.journal import NOTHING, Journal
from engine.memory import out_of_memory
from engine.progress import tqdm
from engine.terminal import printable
from sppo import win_rates

BATCH = 32  # prompts that are judged together
RETRIES = 5  # repeats of a judge that fails for a time, where load_judge is given no other number


class Judge:
    """Base class. A subclass has `preferences_many`."""

    retries = RETRIES
    together = BATCH  # prompts that are judged in one call

    def preferences_many(self, prompts: list[str], responses: list[list[str]]) -> Tensor:
        """(N, K, K) float32: a table for each prompt."""
        raise TypeError(f"{type(self).__name__} has no preferences_many")

    def preferences(self, prompt: str, responses: list[str]) -> Tensor:
        """(K, K): the table of one prompt."""
        return self.preferences_many([prompt], [responses])[0]

    def examine(self, prompts: list[str], responses: list[list[str]]) -> tuple[Tensor, dict]:
        """The tables, and what else this kind of judge knows: {name of a number: (N, K, K)}."""
        return self.preferences_many(prompts, responses), {}


class Rule(Judge):
    """A judge from a function (prompt, responses) -> K × K numbers."""

    together = 1  # it gains nothing from more, and what it says of a prompt is kept at once

    def __init__(self, function: Callable, **arguments):
        self.function = function
        self.arguments = arguments

    def preferences_many(self, prompts, responses):
        return torch.stack([self.table(*row) for row in zip(prompts, responses, strict=True)])

    def table(self, prompt: str, responses: list[str]) -> Tensor:
        """What the function returns, as a tensor (K, K). JudgeError if it is none, or raises."""
        # Repeated here and not for a whole batch: what was paid for the other prompts is kept.
        name = getattr(self.function, "__qualname__", type(self.function).__name__)
        where = f"judge {name}, prompt {prompt[:40]!r}"
        table = asked(
            lambda: self.function(prompt, responses, **self.arguments), where, self.retries
        )
        try:
            table = torch.as_tensor(table, dtype=torch.float32).detach().cpu()
        except (TypeError, ValueError, RuntimeError):
            table = torch.empty(0)

        K = len(responses)
        if table.shape != (K, K):
            expected = f"expected a {K} × {K} table for prompt {prompt[:40]!r}"
            raise JudgeError(f"judge {name}: {expected}, found shape {tuple(table.shape)}")
        return table


class Ensemble(Judge):
    """The weighted mean of several judges' probabilities; weights are scaled to sum to 1.

    Also the way to balance several goals: a judge of helpfulness with a rule about length, each
    with its weight. On a command line:
    'ensemble:{"judges": ["DIR", "module:rule"], "weights": [0.8, 0.2]}'.
    """

    def __init__(self, judges: list, weights: list[float] | None = None):
        if weights is None:
            weights = [1.0] * len(judges)

        # Written so that NaN is refused too.
        enough = len(weights) == len(judges) and sum(weights) > 0
        if not enough or not all(weight >= 0 for weight in weights):
            expected = f"expected one of 0 or more for each of {len(judges)} judges"
            raise ValueError(f"ensemble: weights are {weights}, {expected}")

        self.judges = judges
        self.weights = torch.tensor(weights) / sum(weights)

    def mean_and_disagreement(self, prompts, responses) -> tuple[Tensor, Tensor]:
        """(N, K, K) weighted mean of the judges' probabilities, and their standard deviation."""
        name = "of the ensemble"
        tables = [checked_tables(judge, prompts, responses, name) for judge in self.judges]
        members = torch.stack(tables)  # (M, N, K, K)
        mean = torch.einsum("m,mnij->nij", self.weights, members)
        variance = torch.einsum("m,mnij->nij", self.weights, (members - mean) ** 2)
        return mean, variance.sqrt()

    def preferences_many(self, prompts, responses):
        return self.mean_and_disagreement(prompts, responses)[0]

    def disagreement(self, prompts, responses) -> Tensor:
        return self.mean_and_disagreement(prompts, responses)[1]

    def examine(self, prompts, responses):
        mean, disagreement = self.mean_and_disagreement(prompts, responses)
        return mean, {"ensemble_disagreement": disagreement}


class Transitive(Judge):
    """What the authors' code makes of a judge (uclaml/SPPO, rank.py and compute_prob.py).

    P = σ(score_i - score_j) with score_i = mean_j (L_ij - L_ji) over all K, itself included. It
    keeps K numbers of the K × K table, so no circle survives, and it doubles the logits of a
    transitive judge. For comparison: 'transitive:{"judge": "DIR"}'.
    """

    def __init__(self, judge):
        self.judge = judge

    def preferences_many(self, prompts, responses):
        # A cross-encoder has logits of both orders, which need not add up to 0.
        if hasattr(self.judge, "logits_many"):
            return transitive(self.judge.logits_many(prompts, responses))

        tables = checked_tables(self.judge, prompts, responses, "to be made transitive")
        return transitive(torch.logit(tables, eps=1e-7))


def transitive(logits: Tensor, policy: Tensor | None = None) -> Tensor:
    """(..., K, K) logits of P(i beats j) in either order -> probabilities from mean scores alone.

    The mean is over opponents from policy (..., K); without one, over the K samples.
    """
    both = logits - logits.mT
    score = both.mean(-1) if policy is None else (both * policy[..., None, :]).sum(-1)
    return torch.sigmoid(score[..., :, None] - score[..., None, :])


# ------------------------------------------------------------------------ a judge that fails


class JudgeError(ValueError):
    """A judge failed for good; its text is the sentence that the user reads."""


class Retry(Exception):
    """For a judge to raise that wants to be asked again: a rate limit, a garbled reply."""


# Errors that may pass by themselves. What FileNotFoundError misses will not come by waiting.
TRANSIENT = (OSError, Retry)
LASTING = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)
LONGEST_WAIT = 60  # seconds; the waits are 1, 2, 4, ...


def announce(seconds: float, sentence: str) -> None:
    """Say why there is a pause, above the progress bar, and wait."""
    tqdm.write(f"{sentence}; again in {seconds} s", file=sys.stderr)
    time.sleep(seconds)


def asked(question: Callable, where: str, retries: int, wait: Callable = announce):
    """question(), again after an error that may pass; JudgeError for any other, or after `retries`.

    The sentence begins with `where` and ends with the line of code that failed. SystemExit is an
    error too: a judge cannot end a run as if it were finished.
    """
    for attempt in itertools.count():
        try:
            return question()
        except JudgeError:
            raise
        except (Exception, SystemExit) as error:
            if out_of_memory(error):  # a run has advice for it
                raise
            sentence = f"{where}: {described(error)}"
            passes = isinstance(error, TRANSIENT) and not isinstance(error, LASTING)
            if not passes:
                raise JudgeError(sentence) from error
            if attempt == retries:
                raise JudgeError(f"{sentence}, after {attempt + 1} attempts") from error
        wait(min(2**attempt, LONGEST_WAIT), sentence)


def described(error: BaseException) -> str:
    """Kind and text of an error, in one line, and where in the judge's code it arose."""
    # The last frame is often deep inside a package, which tells a user little.
    frames = traceback.extract_tb(error.__traceback__)
    library = tuple(sysconfig.get_path(kind) for kind in ("stdlib", "purelib", "platlib"))
    own = [frame for frame in frames if not frame.filename.startswith(library)]
    frame = (own or frames)[-1]

    text = f"{type(error).__name__}: {printable(str(error))}".removesuffix(": ")
    return f"{text} ({Path(frame.filename).name}:{frame.lineno} in {frame.name})"


# ------------------------------------------------------------------------ asking a judge


def judge_in_batches(
    judge, prompts: list[str], responses: list[list[str]], name: str, progress=None,
    size: int = BATCH, journal: Journal = NOTHING, weight: float = 1,
) -> Iterator[Tensor]:  # fmt: skip
    """Yield the judge's tables (n, K, K), of `size` prompts or fewer; see `checked_tables`.

    `journal` keeps them, and has those of a stopped run; `weight` is what a table moves the bar.
    """
    # The title of the bar is the stage of the run, which an error should name.
    stage = getattr(progress, "desc", None)

    size = min(size, getattr(judge, "together", size))

    for start in range(0, len(prompts), size):
        batch = slice(start, start + size)
        ask = partial(listed_tables, judge, prompts[batch], responses[batch], name)
        try:
            kept = journal.keep(f"tables from {start}", ask)
        except JudgeError as error:
            raise JudgeError(f"{stage}: {error}" if stage else str(error)) from error
        tables = torch.tensor(kept)
        yield tables
        if progress is not None:
            progress.update(len(tables) * weight)


def checked_tables(judge, prompts: list[str], responses: list[list[str]], name: str) -> Tensor:
    """The judge's tables, (N, K, K) float32 on the CPU; see `asked` and `checked`."""
    tables = put(judge, lambda: judge.preferences_many(prompts, responses), prompts, name)
    return checked(tables, prompts, len(responses[0]), name)


def listed_tables(judge, prompts: list[str], responses: list[list[str]], name: str) -> list:
    """`checked_tables` as lists, which a journal can keep."""
    return checked_tables(judge, prompts, responses, name).tolist()


def put(judge, question: Callable, prompts: list[str], name: str):
    """The answer to a question to a judge about these prompts; see `asked`."""
    which = "prompt" if len(prompts) == 1 else f"one of {len(prompts)} prompts from"
    where = f"judge {printable(name, 80)}, {which} {prompts[0][:40]!r}"
    return asked(question, where, getattr(judge, "retries", RETRIES))


def checked(tables, prompts: list[str], K: int, name: str) -> Tensor:
    """Tables of any judge as (N, K, K) float32 on the CPU.

    JudgeError names the judge, and the first prompt whose table holds no preferences.
    """
    shape = (len(prompts), K, K)
    name = printable(name, 80)

    # A judge may be anybody's code: what it returned may not even be numbers.
    try:
        tables = torch.as_tensor(tables)
        if tables.is_complex():  # of which torch would take the real part
            raise TypeError
        tables = tables.detach().to("cpu", torch.float32)
    except (TypeError, ValueError, RuntimeError):
        found = type(tables).__name__
        raise JudgeError(f"judge {name}: expected a tensor of preferences, found {found}") from None
    if tables.shape != shape:
        found = tuple(tables.shape)
        raise JudgeError(f"judge {name}: expected preferences {shape}, found {found}")

    # One by one, so that the message can name the prompt.
    for prompt, table in zip(prompts, tables):
        try:
            win_rates(table)
        except ValueError as error:
            raise JudgeError(f"judge {name}, prompt {prompt[:40]!r}: {error}") from None
    return tables
