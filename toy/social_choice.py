"""Why Nash: the equilibrium of the preference game as a voting rule, beside Borda and a leader.

    python -m toy.social_choice        out/toy/social_choice.png, out/toy/social_choice.json
    python -m toy.social_choice --votes pairs.jsonl        and what real votes say of models

The equilibrium is the maximal lottery of social choice (2501.19266, 2505.20627): its support lies
in the Smith set, a Condorcet winner gets everything, a copy of a response changes nothing. Borda,
the mean win rate, is what mean scores and Bradley–Terry rank by, and breaks all three: in random
games of 5 it passes over 8 % of the Condorcet winners, and a copy moves it in 50 %. In the small
world it names `right.`, which `right?` beats with 0.8. The leader of SLHF finds every Condorcet
winner and ignores copies, but may name a response that all others beat, and is sure of less than ½.

What did not hold: that it matters on the real votes at hand, PandaLM's 999 pairs with three voters.
The pooled table has a Condorcet winner; so do 551 of 619 tables of 3 to 5 models on one prompt, of
whom Borda passes over none, and ties with another in 10. One table is a circle of majorities.
"""

import itertools
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from functools import partial

import torch
from torch import Generator, Tensor

from data import read_pairs
from engine.figures import BLUE, GREEN, GREY, ORANGE, SKY, new_figure
from toy.games import nash, random_game
from toy.lab import script
from toy.text_game import CLASSES, payoff

# ------------------------------------------------------------------------ rules

# Tables are (..., n, n), sets of responses (..., n) bool, what is said of a table (...) bool.


def top(score: Tensor) -> Tensor:
    """Who has the largest score, ties included."""
    return score >= score.amax(-1, keepdim=True) - 1e-9


def borda(table: Tensor) -> Tensor:
    """The largest mean win rate."""
    return top(table.mean(-1))


def leader(table: Tensor) -> Tensor:
    """argmax_i min_j P_ij: the leader of SLHF (2512.16626), whose follower sees i; minimax."""
    return top(table.amin(-1))


def support(table: Tensor) -> Tensor:
    """Who has a share in the equilibrium."""
    n = table.shape[-1]
    return torch.stack([nash(one) > 1e-9 for one in table.reshape(-1, n, n)]).view(table.shape[:-1])


def condorcet(table: Tensor) -> Tensor:
    """Who beats every other with more than ½; often nobody."""
    itself = torch.eye(table.shape[-1], dtype=torch.bool)
    return ((table > 0.5) | itself).all(-1)


def smith(table: Tensor) -> Tensor:
    """The smallest set whose members all beat everybody outside of it.

    They are those from whom a path of pairs that are not lost leads to everybody.
    """
    reach = (table >= 0.5).double()
    for _ in range(table.shape[-1]):
        reach = (reach @ reach > 0).double()
    return (reach > 0).all(-1)


# ------------------------------------------------------------------------ how rules go wrong


def misses(table: Tensor, rule: Callable, right: Callable) -> Tensor:
    """Somebody is right, and the rule names none of those who are, not even in a tie."""
    wanted = right(table)
    return wanted.any(-1) & ~(rule(table) & wanted).any(-1)


def clone(table: Tensor, k: int) -> Tensor:
    """The table with a copy of response k at the end, which ties with it: (..., n + 1, n + 1)."""
    twice = [*range(table.shape[-1]), k]
    return table[..., twice, :][..., twice]


def moved_by_copy(table: Tensor, rule: Callable) -> Tensor:
    """A copy of some response, which counts as that response, turns one winner into another."""
    before = rule(table)
    moved = torch.zeros(table.shape[:-2], dtype=torch.bool)
    for k in range(table.shape[-1]):
        named = rule(clone(table, k))
        after = named[..., :-1].clone()
        after[..., k] |= named[..., -1]
        single = (before.sum(-1) == 1) & (after.sum(-1) == 1)
        moved |= single & (before != after).any(-1)
    return moved


misses_winner = partial(misses, right=condorcet)
misses_smith = partial(misses, right=smith)

# name: (mistake, rule, what its smallest example says)
MISTAKES = {
    "Borda passes over the Condorcet winner": (misses_winner, borda, "C beats both, Borda names A"),
    "Borda is moved by a copy": (moved_by_copy, borda, "a copy of C makes Borda name B, not A"),
    "the leader leaves the Smith set": (misses_smith, leader, "all beat C, the leader is C"),
}


def vote_tables(n: int, voters: int) -> Tensor:
    """All tables (M, n, n) of n responses whose pairs are each put to so many voters."""
    pairs = list(itertools.combinations(range(n), 2))
    shares = torch.arange(voters + 1, dtype=torch.float64) / voters
    choices = torch.cartesian_prod(*[shares] * len(pairs)).reshape(-1, len(pairs))
    table = torch.full((len(choices), n, n), 0.5, dtype=torch.float64)
    for (i, j), share in zip(pairs, choices.T):
        table[:, i, j] = share
        table[:, j, i] = 1 - share
    return table


def smallest(mistake: Callable, rule: Callable, responses=4, voters=5) -> dict | None:
    """The example with the fewest responses, and then the fewest voters; None if there is none."""
    for n, v in itertools.product(range(2, responses + 1), range(1, voters + 1)):
        tables = vote_tables(n, v)
        found = mistake(tables, rule).nonzero()
        if len(found):
            return {"voters": v, "table": tables[found[-1, 0]].tolist()}
    return None


SIZES = (3, 4, 5, 6, 7, 8)  # of random games
GAMES = 2000  # of each size


def rates(generator: Generator, sizes: tuple, games: int) -> dict:
    """Share of random games with each mistake, of those in which it is possible, by size.

    "Nash" is the share with any of the three, of a 20th of the games: an equilibrium takes longer.
    """
    result = {name: [] for name in (*MISTAKES, "Nash")}
    for n in sizes:
        tables = torch.stack([random_game(n, generator) for _ in range(games)])
        for name, (mistake, rule, _) in MISTAKES.items():
            possible = condorcet(tables).any(-1).sum() if mistake is misses_winner else games
            result[name].append((mistake(tables, rule).sum() / possible).item())

        few = tables[: games // 20]
        wrong = [mistake(few, support) for mistake, _, _ in MISTAKES.values()]
        result["Nash"].append(torch.stack(wrong).any(0).double().mean().item())
    return {"sizes": list(sizes), **result}


# ------------------------------------------------------------------------ real votes


def read_votes(path: str) -> tuple[list[str], Tensor, list[Tensor]]:
    """Models, their win rates over all prompts, and tables of single prompts.

    A prompt gives a table for every set of 3 or more models of which all pairs were judged.
    ValueError if a line names no models.
    """
    shares = {}
    for pair in read_pairs(path):
        if "chosen_model" not in pair or "rejected_model" not in pair:
            raise ValueError(f"{path}: expected chosen_model and rejected_model in every line")
        a, b = pair["chosen_model"], pair["rejected_model"]

        # The votes say exactly what `probability` may have rounded: 1 for chosen, 0 for a tie.
        votes = [{1: 1.0, 2: 0.0, 0: 0.5}[vote] for vote in pair["votes"]]
        share = sum(votes) / len(votes) if votes else pair["probability"]
        for prompt in ("all", pair["prompt"]):
            shares.setdefault(prompt, {}).setdefault((a, b), []).append(share)
            shares[prompt].setdefault((b, a), []).append(1 - share)

    def table(votes, models):
        rows = [[votes.get((a, b), [0.5]) for b in models] for a in models]
        return torch.tensor([[sum(p) / len(p) for p in row] for row in rows], dtype=torch.float64)

    pooled = shares.pop("all")
    models = sorted({a for a, _ in pooled})
    single = []
    for votes, n in itertools.product(shares.values(), range(3, len(models) + 1)):
        for some in itertools.combinations(models, n):
            if all(pair in votes for pair in itertools.combinations(some, 2)):
                single.append(table(votes, some))
    return models, table(pooled, models), single


def count(tables: list[Tensor]) -> dict[str, int]:
    """How often the choice of a rule would matter in tables of real votes, of any sizes."""
    winners = [condorcet(table) for table in tables]
    bordas = [borda(table) for table in tables]
    tied = [(a & b).any() and a.sum() > 1 for a, b in zip(bordas, winners)]
    return {
        "tables": len(tables),
        "with a Condorcet winner": sum(int(winner.any()) for winner in winners),
        "Borda passes over it": sum(int(misses_winner(table, borda)) for table in tables),
        "Borda ties it with another": sum(map(int, tied)),
        "everybody is beaten": sum(int((table < 0.5).any(-1).all()) for table in tables),
    }


# ------------------------------------------------------------------------ what it shows


def measure(args: Namespace) -> dict:
    """Everything. The seed is for the random games."""
    tables = {"the small world": (CLASSES, payoff())}
    counts = {}
    if args.votes:
        models, pooled, single = read_votes(args.votes)
        tables["real votes"] = (models, pooled)
        counts = count(single)

    generator = Generator().manual_seed(args.seed)
    examples = {name: smallest(*which[:2]) for name, which in MISTAKES.items()}
    result = {
        "examples": examples,
        "rates": rates(generator, SIZES, GAMES),
        "votes": counts,
        "tables": {},
    }
    for name, (names, table) in tables.items():
        numbers = {"mean win rate": table.mean(-1).tolist(), "Nash": nash(table).tolist()}
        result["tables"][name] = {"names": names, **numbers}
    return result


def print_table(result: dict) -> None:
    sizes = result["rates"]["sizes"]
    print(f"{'% of random games of':40}" + "".join(f"{n:6}" for n in sizes) + " responses")
    for name in (*MISTAKES, "Nash"):
        cells = "".join(f"{100 * value:6.1f}" for value in result["rates"][name])
        print(f"  {name:38}{cells}")

    for name, table in result["tables"].items():
        print(f"\n{name:20}" + "".join(f"{title:>15}" for title in list(table)[1:]))
        for model, *numbers in zip(*table.values()):
            print(f"  {model:18}" + "".join(f"{number:15.3f}" for number in numbers))
    if result["votes"]:
        print("\nmodels on one prompt")
        for name, count in result["votes"].items():
            print(f"  {name:38}{count:6}")


def draw(result: dict):
    """The smallest example of each mistake, and how often they are made in random games."""
    figure = new_figure(12, 10)
    *graphs, axes = figure.subplots(2, 2).flat
    for graph, (name, example) in zip(graphs, result["examples"].items()):
        draw_example(graph, name, example)

    rates = result["rates"]
    for name, colour in zip((*MISTAKES, "Nash"), (ORANGE, GREEN, SKY, BLUE)):
        axes.plot(rates["sizes"], [100 * v for v in rates[name]], "o-", color=colour, label=name)
    axes.set(xlabel="responses", ylabel="% of the games in which it is possible")
    axes.set_title("How often, in random games")
    axes.legend(frameon=False, loc=(0.2, 0.25))
    return figure


def draw_example(axes, name: str, example: dict) -> None:
    """Arrows go from the winner of a pair to its loser; the rule's choice is filled."""
    table = torch.tensor(example["table"], dtype=torch.float64)
    _, rule, says = MISTAKES[name]
    angle = torch.pi * (0.5 - 2 * torch.arange(len(table)) / len(table))
    places = torch.stack([angle.cos(), angle.sin()], -1).tolist()

    for i, j in (table > 0.5).nonzero().tolist():
        arrow = dict(arrowstyle="-|>", color=GREY, shrinkA=24, shrinkB=24, mutation_scale=20)
        axes.annotate("", places[j], places[i], arrowprops=arrow)
        won = round(table[i, j].item() * example["voters"])
        middle = [0.6 * a + 0.4 * b for a, b in zip(places[i], places[j])]
        box = dict(color="white", pad=1)
        axes.text(*middle, f"{won} : {example['voters'] - won}", ha="center", va="center", bbox=box)

    for letter, (x, y), named, share in zip("ABCD", places, rule(table), nash(table)):
        colour = ORANGE if named else "white"
        axes.plot(x, y, "o", markersize=38, color=colour, markeredgecolor=GREY)
        axes.text(x, y, letter, ha="center", va="center", fontsize=15)
        axes.text(1.5 * x, 1.35 * y, f"Nash {share:.2f}", ha="center", va="center", color=BLUE)

    axes.set(xlim=(-2, 2), ylim=(-1.6, 1.6), aspect="equal")
    axes.axis("off")
    axes.set_title(f"{name[0].upper()}{name[1:]}:\n{says}")


def add_flags(parser: ArgumentParser) -> None:
    help = "JSON lines of judged pairs with chosen_model and rejected_model"
    parser.add_argument("--votes", default="", help=help)


if __name__ == "__main__":
    sys.exit(script("social_choice", __doc__, measure, print_table, draw, flags=add_flags))
