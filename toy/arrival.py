"""What keeps the *last* policy of the small world from its equilibrium: samples, judge or fit.

    python -m toy.arrival [WORLD RUN ...]      without WORLD: tables alone, seconds
    python -m toy.arrival WORLD --soft FILE    only writes WORLD/pairs.jsonl with probabilities

Tables, with exact or sampled win rates, meet their targets exactly, or as a network does: in part,
and with errors that fall with the learning rate. Of a world: the learned judge's own equilibrium,
prompt by prompt, and the base policy and the last ones of runs, in the judge's game and in the true
one, and how far they are from the true equilibrium. Of runs of plain SPPO also how the network met
its targets.
"""

import sys
from pathlib import Path

import torch
from torch import Generator, Tensor

from data import Tokenizer, read_pairs
from engine.command import Parser, exit_code
from engine.files import read_json, write_lines
from engine.progress import tqdm
from engine.run_folder import round_policies
from judges.load import load_judge
from model import Transformer
from sppo import optimistic_target, regularized_target
from toy.games import cycle, nash
from toy.tabular import normalized
from toy.text_game import ENDINGS, SUMS, oracle, probabilities

# (rounds, η, rounds between updates of the reference or 0: optimistic, learning rate over 3e-4).
SCHEDULES = {
    "optimistic": [(80, 2.0, 0, 1.0)],
    "optimistic, then η/2": [(40, 2.0, 0, 1.0), (40, 1.0, 0, 1.0)],
    "optimistic, then lr/3": [(40, 2.0, 0, 1.0), (40, 2.0, 0, 1 / 3)],
    "moving reference": [(80, 2.0, 10, 1.0)],
    "moving reference, then η/2": [(40, 2.0, 10, 1.0), (40, 1.0, 20, 1.0)],
    "moving reference, then lr/3": [(40, 2.0, 10, 1.0), (40, 2.0, 10, 1 / 3)],
    "moving reference, then lr/10": [(40, 2.0, 10, 1.0), (40, 2.0, 10, 1 / 10)],
}
EXACT = (1.0, 0.0, 0.0)
ERROR = (0.75, 0.023, 0.054)  # what `met` finds in the demo's run
SIZES = (0, 16, 400, 1600, 6400)
TABLES = cycle().expand(20 * len(SUMS), 3, 3)  # the game of endings, played by twenty worlds
START = torch.tensor([[0.72, 0.14, 0.14]]).double().expand(len(TABLES), 3)  # of the base policy
TAUGHT = [f"{number}{ending}" for number in range(19) for ending in ENDINGS]  # in the judge's pairs
RIGHT = torch.tensor([[TAUGHT.index(f"{n}{ending}") for ending in ENDINGS] for n in SUMS.values()])


def gain(game: Tensor, policy: Tensor) -> Tensor:
    """Exploitability (N,) of policies (N, n), each in a game of its own (N, n, n)."""
    return ((game @ policy[..., None])[..., 0].amax(-1) - 0.5).clamp(min=0)


def play(
    game: Tensor, start: Tensor, stages: list, samples: int, error: tuple, generator: Generator
) -> Tensor:
    """The last policies (N, n) of tables; 0 samples: exact win rates.

    error: the part of a target that is met, and the standard deviations of what is added, in nats:
    the same for the 100 tables of a world, and each table's own.
    """
    part, common, each = error
    log_policy = start.log()
    for rounds, eta, every, lr in stages:
        path, rates = [log_policy], []
        for number in range(rounds):
            seen = path[-1].exp()
            if samples:
                drawn = torch.multinomial(seen, samples, replacement=True, generator=generator)
                seen = torch.eye(seen.shape[-1]).double()[drawn].mean(1)
            rates.append((game @ seen[..., None])[..., 0])

            if every:
                log_ratio = path[-1] - path[number // every * every]
                target = regularized_target(rates[-1], log_ratio, eta, tau=0.1)
            else:
                target = optimistic_target(rates[-1], rates[max(number - 1, 0)], eta)
            size = len(start) // len(SUMS), len(SUMS), start.shape[1]
            noise = each * torch.randn(size, generator=generator)
            noise += common * torch.randn(size, generator=generator)[:, :1]
            target = part * target + lr * noise.double().view_as(start)
            path.append(normalized(path[-1] + target))
        log_policy = path[-1]
    return log_policy.exp()


def equilibrium(game: Tensor, support: list[int]) -> Tensor:
    """Equilibrium (n,) of a large game: the best reply joins the support until it is inside."""
    policy = torch.zeros(len(game), dtype=torch.float64)
    policy[support] = nash(game[support][:, support])
    best = int((game @ policy).argmax())
    return policy if best in support else equilibrium(game, [*support, best])


def met(own: Tensor, eta: float, policies: list[Path]) -> list[float]:
    """[part, common, each], an `error` of `play`: means of every tenth round of plain SPPO.

    The log-ratios of the right responses are regressed on what exact win rates make of them.
    """
    rows = []
    pairs = list(zip(policies, policies[1:]))
    for pair in tqdm(pairs[9::10] or pairs, desc="targets", leave=False):
        old, new = (normalized(shares(folder).gather(1, RIGHT).log()).exp() for folder in pair)
        game = torch.stack([table[rows][:, rows] for table, rows in zip(own, RIGHT)])
        pair = eta * (game @ old[..., None])[..., 0], (new / old).log()
        target, change = (z - (old * z).sum(1, keepdim=True) for z in pair)

        part = (old * target * change).sum() / (old * target**2).sum()
        rest = change - part * target
        errors = rest.mean(0), rest - rest.mean(0)
        rows.append([part, *[(old * error**2).sum(1).mean().sqrt() for error in errors]])
    return torch.tensor(rows).mean(0).tolist()


@torch.no_grad()
def shares(folder: Path) -> Tensor:
    """(100, n) a policy's probabilities of the taught responses, scaled to sum to 1."""
    policy, tokenizer = Transformer.from_pretrained(folder), Tokenizer(folder)
    prompts = torch.tensor([tokenizer.prompt_ids(prompt, "plain") for prompt in SUMS])
    responses = [(*tokenizer.encode(text), tokenizer.eos) for text in TAUGHT]
    found = torch.cat([probabilities(policy, part, responses) for part in prompts.split(25)])
    return found / found.sum(-1, keepdim=True)


def judged(own: Tensor, policies: dict) -> dict:
    """{policy: exploitability in the judge's own game, and truly} over the taught responses."""
    true = torch.stack([oracle(prompt, TAUGHT) for prompt in SUMS]).double()
    # Where all others lose, no other response is a best reply.
    only = torch.zeros(own.shape[:2]).double().scatter(1, RIGHT, 1)[..., None]
    policies |= {"equilibrium": torch.stack(list(map(equilibrium, own, RIGHT.tolist())))}
    policies |= {"… of right sums": torch.stack(list(map(equilibrium, own * only, RIGHT.tolist())))}
    return {k: [gain(game, p).mean().item() for game in (own, true)] for k, p in policies.items()}


def deviations(policy: Tensor, strengths: tuple) -> tuple[float, float]:
    """How far the endings of right responses are from their equilibrium, as log-ratios in nats:
    root mean squares of what all prompts have in common, and of each prompt's own.
    """
    aim = nash(cycle(strengths))
    ratio = normalized(policy.gather(1, RIGHT).log()) - aim.log()
    ratio = ratio - (aim * ratio).sum(1, keepdim=True)
    common = ratio.mean(0)
    return tuple((aim * part**2).sum(-1).mean().sqrt().item() for part in (common, ratio - common))


def soften(world: Path, out: Path) -> None:
    """Write a world's pairs with the oracle's probability of each, where one vote is the label."""
    strengths = read_json(world / "world.json")["strengths"]
    rows = []
    for pair in read_pairs(world / "pairs.jsonl"):
        row = {key: pair[key] for key in ("prompt", "chosen", "rejected")}
        table = oracle(row["prompt"], [row["chosen"], row["rejected"]], strengths)
        rows.append(row | {"probability": table[0, 1].item()})
    write_lines(out, rows)


def main(arguments: list[str] | None = None) -> int:
    parser = Parser(description=__doc__)
    parser.add_argument("world", type=Path, nargs="?", help="folder of toy.text_game build")
    parser.add_argument("runs", type=Path, nargs="*", help="runs of train.py in that world")
    parser.add_argument("--judge", help="the judge that is measured [WORLD/judge]")
    parser.add_argument("--soft", type=Path, metavar="FILE", help="write softened pairs, and end")
    args = parser.parse_args(arguments)

    def work():
        if (args.soft or args.judge) and not args.world:
            raise ValueError("--soft and --judge are about a world, expected its folder as WORLD")
        if args.soft:
            soften(args.world, args.soft)
            return

        torch.set_num_threads(1)
        generator = torch.Generator().manual_seed(0)
        print(f"{'samples (0: exact); network':34}" + "".join(f"{size:9}" for size in SIZES))
        for name, stages in SCHEDULES.items():
            one = TABLES[: len(SUMS)], START[: len(SUMS)], stages
            last = [play(*one, size, EXACT, generator) for size in SIZES]
            last += [play(TABLES, START, stages, 0, ERROR, generator)]
            gains = [gain(TABLES[: len(row)], row).mean() for row in last]
            print(f"{name:34}" + "".join(f"{value:9.5f}" for value in gains))
        if args.world is None:
            return

        judge = load_judge(args.judge or str(args.world / "judge"))
        with torch.no_grad():
            own = torch.cat([judge.preferences_many([p], [TAUGHT]) for p in SUMS]).double()
        last = {"base policy": shares(args.world / "policy")}
        last |= {str(run): shares(round_policies(run)[-1]) for run in args.runs}
        for name, gains in judged(own, dict(last)).items():
            print(f"{name:34} in the judge's game {gains[0]:.4f}, truly {gains[1]:.4f}")
        for name, policy in last.items():
            common, own_part = deviations(policy, read_json(args.world / "world.json")["strengths"])
            print(f"{name:34} deviates by {common:.3f} in all prompts, {own_part:.3f} in each")
        for run in args.runs:
            config = read_json(run / "config.json")
            if config["target"] == "sppo":
                part, common, each = met(own, config["eta"], round_policies(run))
                print(f"{run}: meets {part:.2f} of its targets, errors {common:.3f}, {each:.3f}")

    return exit_code("toy.arrival", work)


if __name__ == "__main__":
    sys.exit(main())
