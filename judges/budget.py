"""A judge's budget: some of the pairs are judged, and stand for the others.

K responses make K (K - 1)/2 pairs, and each costs a call of an LLM or a minute of a person. On a
circle in random order everyone meets the m nearest, K m/2 pairs in all: no win rate is estimated
worse than another, and each without bias.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from engine.journal import NOTHING, Journal
from judges.base import judge_in_batches


def circle(U: int, most: int | None = None) -> list[tuple[int, int]]:
    """The first `most` pairs (i < j) of U places on a circle: neighbours, then next but one, ..."""
    pairs = {}  # a dictionary keeps their order
    for step in range(1, U // 2 + 1):
        for i in range(U):
            j = (i + step) % U
            pairs[min(i, j), max(i, j)] = None
    return list(pairs)[:most]


def fill(margin: Tensor, known: Tensor) -> Tensor:
    """(U, U) P - ½ of all pairs from that of the `known` ones: the others become s_i - s_j.

    s are the least-squares scores of the known pairs: in each row Σ (s_i - s_j) over them is the
    sum of their margins. So a row's mean is s_i, and on a circle in random order that is an
    unbiased estimate of the mean of its whole row (a test enumerates the orders), as long as no
    s_i - s_j is cut to ±½.
    """
    links = known.double()
    laplacian = links.sum(1).diag() - links
    score = torch.linalg.pinv(laplacian, hermitian=True) @ margin.sum(1)
    return torch.where(known, margin, (score[:, None] - score).clamp(-0.5, 0.5))


def draw_pairs(K: int, m: int, generator: torch.Generator) -> list[tuple[int, int]]:
    """Pairs (i < j) of K responses of which each is in m; m is even, or all K - 1."""
    seat = torch.randperm(K, generator=generator).tolist()
    return [tuple(sorted((seat[i], seat[j]))) for i, j in circle(K, K * m // 2)]


def compare(
    judge, prompts: list[str], responses: list[list[str]], name: str,
    pairs: list[list[tuple[int, int]]], progress=None, journal: Journal = NOTHING,
) -> Iterator[Tensor]:  # fmt: skip
    """Yield a table (K, K) for each prompt, of which the judge sees only `pairs`, as many of each
    prompt: every pair is put to it by itself, as two responses. The others are filled in.
    """
    asked = [prompt for prompt, row in zip(prompts, pairs) for _ in row]
    shown = [[texts[i], texts[j]] for texts, row in zip(responses, pairs) for i, j in row]
    each = len(pairs[0])
    batches = judge_in_batches(
        judge, asked, shown, name, progress, journal=journal, weight=1 / each
    )
    wins = (table[0, 1].item() for tables in batches for table in tables)

    for texts, row in zip(responses, pairs):
        margin = torch.zeros(len(texts), len(texts), dtype=torch.float64)
        known = torch.zeros_like(margin, dtype=torch.bool)
        for (i, j), win in zip(row, wins):
            margin[i, j] = win - 0.5
            margin[j, i] = 0.5 - win
            known[i, j] = known[j, i] = True
        yield (0.5 + fill(margin, known)).float()
