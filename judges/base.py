"""Judges: P(y_i beats y_j | x) for K responses to a prompt.

A judge is anything with `preferences_many(prompts, responses) -> (N, K, K)`: entry [i, j] is
P(response i beats response j), P + Pᵀ = 1, ½ on the diagonal (a response ties with itself). What it
returns is checked by `checked` where it enters. Here are the judges made of a function or of other
judges; judges/load.py finds a judge from the command line.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from sppo import win_rates

BATCH = 32  # prompts that are judged together


class Judge:
    """Base class. A subclass has `preferences_many`."""

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

    def __init__(self, function: Callable, **arguments):
        self.function = function
        self.arguments = arguments

    def preferences_many(self, prompts, responses):
        return torch.stack([self.table(*row) for row in zip(prompts, responses, strict=True)])

    def table(self, prompt: str, responses: list[str]) -> Tensor:
        """What the function returns, as a tensor (K, K). ValueError if it is none."""
        table = self.function(prompt, responses, **self.arguments)
        try:
            table = torch.as_tensor(table, dtype=torch.float32).detach().cpu()
        except (TypeError, ValueError):
            table = torch.empty(0)

        K = len(responses)
        if table.shape != (K, K):
            name = getattr(self.function, "__qualname__", self.function)
            expected = f"expected a {K} × {K} table for prompt {prompt[:40]!r}"
            raise ValueError(f"judge {name}: {expected}, found shape {tuple(table.shape)}")
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


# ------------------------------------------------------------------------ asking a judge


def judge_in_batches(
    judge, prompts: list[str], responses: list[list[str]], name: str, progress=None,
    size: int = BATCH,
) -> Iterator[Tensor]:  # fmt: skip
    """Yield the judge's tables (n, K, K), `size` prompts at a time; see `checked`."""
    for start in range(0, len(prompts), size):
        batch = slice(start, start + size)
        tables = checked_tables(judge, prompts[batch], responses[batch], name)
        yield tables
        if progress is not None:
            progress.update(len(tables))


def checked_tables(judge, prompts: list[str], responses: list[list[str]], name: str) -> Tensor:
    """The judge's tables, (N, K, K) float32 on the CPU; see `checked`."""
    return checked(judge.preferences_many(prompts, responses), prompts, len(responses[0]), name)


def checked(tables, prompts: list[str], K: int, name: str) -> Tensor:
    """Tables of any judge as (N, K, K) float32 on the CPU.

    ValueError names the judge, and the first prompt whose table holds no preferences.
    """
    shape = (len(prompts), K, K)

    # A judge may be anybody's code: what it returned may not even be numbers.
    try:
        tables = torch.as_tensor(tables, dtype=torch.float32).detach().cpu()
    except (TypeError, ValueError, RuntimeError):
        found = type(tables).__name__
        raise ValueError(f"judge {name}: expected a tensor of preferences, found {found}") from None
    if tables.shape != shape:
        found = tuple(tables.shape)
        raise ValueError(f"judge {name}: expected preferences {shape}, found {found}")

    # One by one, so that the message can name the prompt.
    for prompt, table in zip(prompts, tables):
        try:
            win_rates(table)
        except ValueError as error:
            raise ValueError(f"judge {name}, prompt {prompt[:40]!r}: {error}") from None
    return tables
