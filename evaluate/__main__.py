"""How good is a policy, and how good is a judge?

    python -m evaluate outputs --policy P --prompts FILE --out FILE.json
        responses in AlpacaEval's format; --best-of 16 --judge SPEC: the judge's favourite of 16
    python -m evaluate winrate --policy P --against Q --prompts FILE --judge SPEC
        how often P's response beats Q's
    python -m evaluate winrate --policy RUN --prompts FILE --judge SPEC --out FILE.json
        every round of a run against every other
    python -m evaluate average RUN --out DIR
        one checkpoint with the mean of the rounds' weights
    python -m evaluate distill RUN --prompts FILE --out DIR
        one checkpoint trained on samples of the rounds' mixture
    python -m evaluate chat --policy P
        talk to a policy; with --against Q to two at once, and pick blind, see chat.py
    python -m evaluate judge --judge SPEC --pairs FILE --out DIR
        what a judge is worth on labelled pairs, see judge_report.py
    python -m evaluate lc --annotations FILE
        AlpacaEval 2's win rates, see length_controlled.py

A policy P or Q is a checkpoint folder; or the folder of a run, which stands for the theorem's
average policy: each response comes from a round drawn at random (theorem 4.1; π_2 to π_{T+1}, the
checkpoints that a run leaves); or, for `winrate`, a file of outputs in AlpacaEval's format, a JSON
list of {instruction, output, generator}.

What `outputs`, `winrate`, `distill` and `judge` have sampled, judged and learned is kept in
OUT.unfinished until OUT is written: the same command continues. What is there already is not
written over, but for what `lc` writes.
"""

import argparse
import os
import sys
import zlib
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data import (
    TEMPLATES,
    Prompt,
    Tokenizer,
    outputs_for,
    prepare_prompts,
    prompt_text,
    read_pairs,
    read_prompts,
)
from engine.checkpoint import DTYPES, check_device, load_weights
from engine.command import Parser, add_flags, check_settings, exit_code
from engine.figures import new_figure, write_figure
from engine.files import (
    atomic_write,
    fingerprint,
    read_json,
    remove,
    require_empty,
    unfinished_folder,
    write_json,
)
from engine.journal import NOTHING, Journal
from engine.progress import tqdm
from engine.run_folder import MADE_FROM, Saver, claim, made_from, round_policies, template_of
from engine.threads import Threads
from evaluate import judge_report
from evaluate.chat import chat
from evaluate.length_controlled import GAMED, lc
from generate import SamplingConfig, generate, response_logps
from judges.base import judge_in_batches
from judges.load import judge_fingerprint, load_judge, probe
from model import Transformer
from sppo import optimizer_step, setting, win_rates

JUDGE = "checkpoint folder of a judge, module:function, ... (judges/load.py)"
JUDGED_TOGETHER = 16  # prompts, each with all responses of all policies that are compared

# ------------------------------------------------------------------------ policies


def checkpoints(folder: str | Path) -> list[Path]:
    """The policies of a run's rounds, in order; or the folder itself, if it is a checkpoint."""
    rounds = round_policies(folder)
    if rounds:
        return rounds
    if (Path(folder) / "config.json").is_file():
        return [Path(folder)]
    raise FileNotFoundError(
        f"{folder}: neither a checkpoint (config.json) nor a run (round-01/policy)"
    )


class Sampler:
    """Draws responses from a policy folder: from one checkpoint, or from the rounds of a run.

    Only one checkpoint's weights are in memory at a time.
    """

    def __init__(self, folder: str | Path, args: Namespace):
        self.args = args
        self.folders = checkpoints(folder)

        # All rounds of a run have the tokenizer and the sizes of the first one.
        self.tokenizer = Tokenizer(self.folders[0])
        self.policy = Transformer.from_pretrained(self.folders[0], args.dtype, args.device)
        self.tokenizer.check_vocabulary(self.policy.config.vocab_size)
        self.threads = Threads(args.threads)

    def prompts(self, texts: list) -> list[Prompt]:
        """N prompts as text and token ids. ValueError if one leaves no room for a response."""
        args = self.args
        context = self.policy.config.max_position_embeddings
        room = (args.max_new_tokens, args.prompts, context, f"context of {self.folders[0]},")
        return prepare_prompts(texts, self.tokenizer, args.template, *room)

    def mixture(self, prompts: list, samples: int, generator: torch.Generator) -> list:
        """N lists of `samples` responses as token ids, each from a checkpoint drawn at random."""
        if len(self.folders) == 1:
            return self.sample(0, prompts, samples, generator)

        drawn = torch.randint(len(self.folders), (len(prompts), samples), generator=generator)
        responses = [[None] * samples for _ in prompts]
        with tqdm(total=drawn.numel(), unit="response", desc="sample", leave=False) as progress:
            # By checkpoint and not by prompt, so that each is loaded once.
            for index in drawn.unique().tolist():
                places = (drawn == index).nonzero().tolist()
                asked = [prompts[n] for n, _ in places]
                rows = self.sample(index, asked, 1, generator, progress)
                for (n, k), row in zip(places, rows):
                    responses[n][k] = row[0]
        return responses

    def sample(self, index: int, prompts: list, samples: int, generator, progress=None) -> list:
        """N lists of `samples` responses as token ids, all from checkpoint `index`."""
        args = self.args
        self.threads.adapt()

        # The only checkpoint has been in memory from the start; several take turns there.
        if len(self.folders) > 1:
            load_weights(self.policy, self.folders[index])

        ids = [prompt.ids for prompt in prompts]
        end = (args.max_new_tokens, self.tokenizer.stop)
        how = (args.temperature, args.top_p, generator, args.pool, progress)
        return generate(self.policy, ids, samples, *end, *how, journal=journal_of(args))

    def texts(self, prompts: list[Prompt], responses: list) -> list[list[str]]:
        """N lists of responses, as text instead of token ids."""
        read = self.tokenizer.response_text
        template = self.args.template
        return [
            [read(prompt.ids, ids, template) for ids in row]
            for prompt, row in zip(prompts, responses)
        ]


def responses_of(
    source: str | Path, prompts: list, samples: int, args: Namespace, generator: torch.Generator
) -> list[list[str]]:
    """N lists of response texts: `samples` from a policy folder, or those of an outputs file."""
    if Path(source).is_file():
        return outputs_for(source, [prompt_text(prompt) for prompt in prompts])
    sampler = Sampler(source, args)
    ready = sampler.prompts(prompts)
    return sampler.texts(ready, sampler.mixture(ready, samples, generator))


def judged(judge, prompts: list, responses: list, args: Namespace, generator, reduce) -> Tensor:
    """The judge's tables, (n, K, K) of a few prompts at a time, through `reduce`: (N, ...)."""
    texts = [prompt_text(prompt) for prompt in prompts]

    # In random order, so that a judge that favours the first response, say, favours no policy.
    order = [torch.randperm(len(row), generator=generator) for row in responses]
    order = torch.stack(order)  # (N, K)
    shuffled = [[row[k] for k in ks] for row, ks in zip(responses, order.tolist())]
    place = order.argsort(1)  # (N, K): where each response went

    results = []
    done = 0
    with tqdm(total=len(texts), unit="prompt", desc="judge", leave=False) as progress:
        tables = judge_in_batches(
            judge, texts, shuffled, args.judge, progress, JUDGED_TOGETHER, journal_of(args)
        )
        for table in tables:
            back = place[done : done + len(table)]
            done += len(table)
            n = torch.arange(len(table))[:, None, None]
            table = table[n, back[:, :, None], back[:, None, :]]  # in the order of `responses`

            # At once: the tables of all prompts would take N (A·S)² numbers in a win matrix.
            results.append(reduce(table))
    return torch.cat(results)


def generator_of(args: Namespace) -> torch.Generator:
    """Random numbers from a seed *and* a policy: with one seed, two policies are independent."""
    policy = args.policy if "policy" in args else args.run_folder

    # Resolved, so that RUN and RUN/ sample alike; relative, so that a moved project does too.
    path = os.path.relpath(Path(policy).resolve())
    source = zlib.crc32(f"{args.command} {path}".encode())
    state = np.random.SeedSequence([args.seed, source]).generate_state(1)[0]
    return torch.Generator().manual_seed(int(state))


# ------------------------------------------------------------------------ what is unfinished


@contextmanager
def unfinished(args: Namespace) -> Iterator[Path]:
    """OUT.unfinished, with the journal args.journal, until the command has written OUT.

    ValueError names what is not as it was when the command was stopped.
    """
    folder = unfinished_folder(args.out)
    args.journal = Journal(folder / "journal.jsonl")
    if not args.journal.known and not any(folder.glob("fit-*")):
        remove(folder)  # nothing to continue: any settings will do

    claim(folder, *provenance(args))
    yield folder
    remove(folder)


def provenance(args: Namespace) -> tuple[dict, type, dict]:
    """The settings, their class, and the fingerprints of what they name."""
    settings = {name: value for name, value in vars(args).items() if name not in OURS}
    content = {name: content_of(name, settings[name]) for name in INPUTS if settings.get(name)}
    return settings, Sampling, content


def finished_before(args: Namespace) -> bool:
    """Whether this command has written OUT already, which is said. FileExistsError if something
    else is there.
    """
    out = Path(args.out)
    known = out / MADE_FROM
    rest = unfinished_folder(out)
    result = out / "report.json" if args.command == "judge" else out

    # A folder says what it was made from. Beside a file is what a process left that was killed
    # between its last two steps.
    if known.is_file():
        done = read_json(known) == made_from(*provenance(args))
    else:
        done = result.is_file() and rest.exists()

    if not done:
        require_empty(result)
        return False
    remove(rest)
    print(f"{result}: finished already")
    return True


def journal_of(args: Namespace) -> Journal:
    """Where there is one: not without --out."""
    return getattr(args, "journal", NOTHING)


def content_of(name: str, value: str):
    """The fingerprints of what a flag names: of a run those of all its policies."""
    if name == "judge":
        return judge_fingerprint(value)
    if round_policies(value):
        return [fingerprint(policy) for policy in round_policies(value)]
    return fingerprint(value)


# ------------------------------------------------------------------------ outputs


def outputs(args: Namespace) -> None:
    """Write responses in AlpacaEval's format; with --best-of n, the judge's favourites of n."""
    if args.best_of > 1 and not args.judge:
        raise ValueError("--best-of needs a --judge")

    # AlpacaEval finds an output by its instruction, so a repeated prompt is answered once.
    prompts = {prompt_text(prompt): prompt for prompt in read_prompts(args.prompts)}
    prompts = list(prompts.values())
    judge = working_judge(args, prompts) if args.best_of > 1 else None
    generator = generator_of(args)
    with unfinished(args):
        texts = responses_of(args.policy, prompts, args.best_of, args, generator)

        best = [0] * len(prompts)
        if judge is not None:
            rates = judged(judge, prompts, texts, args, generator, win_rates)  # (N, n)
            best = rates.argmax(-1).tolist()

        name = args.name or Path(args.policy).resolve().name
        rows = [
            {"instruction": prompt_text(prompt), "output": row[k], "generator": name}
            for prompt, row, k in zip(prompts, texts, best)
        ]
        write_json(args.out, rows)
    characters = mean([len(row["output"]) for row in rows])
    print(f"{args.out}: {len(rows)} outputs, {characters:.0f} characters on average")


def working_judge(args: Namespace, prompts: list):
    """The judge, which was asked once: before the sampling, which takes long."""
    judge = load_judge(args.judge, args.device)
    probe(judge, args.judge, min(map(prompt_text, prompts), key=len))
    return judge


def mean(values: list) -> float:
    return sum(values) / len(values)


# ------------------------------------------------------------------------ win rate


def winrate(args: Namespace) -> None:
    """One policy against another, or all rounds of a run against each other."""
    prompts = read_prompts(args.prompts)
    one = Path(args.policy).is_file() or len(checkpoints(args.policy)) == 1
    if one and not args.against:
        raise ValueError(
            f"--against is missing: {args.policy} is one policy, with nothing to compare"
        )
    judge = working_judge(args, prompts)
    with unfinished(args) if args.out else nullcontext():
        (versus if args.against else matrix)(judge, prompts, args)


def versus(judge, prompts: list, args: Namespace) -> None:
    """The probability that P's response beats Q's, with a bootstrap interval over prompts."""
    generator = generator_of(args)
    ours = responses_of(args.policy, prompts, args.samples, args, generator)
    theirs = responses_of(args.against, prompts, args.samples, args, generator)
    both = [row + other for row, other in zip(ours, theirs)]
    size = len(ours[0])

    # The judge compares all responses; what counts is the block of ours (rows) against theirs.
    def our_wins(table):  # (n, K, K) -> (n,)
        return table[:, :size, size:].double().mean((1, 2))

    wins = judged(judge, prompts, both, args, generator, our_wins)  # (N,)
    low, high = bootstrap(wins, generator)
    lengths = [mean([len(text) for row in texts for text in row]) for texts in (ours, theirs)]
    rate = wins.mean().item()

    print(f"win rate {rate:.4f}, 95 % interval {low:.4f} to {high:.4f} over {len(prompts)} prompts")
    print(f"characters: {args.policy} {lengths[0]:.0f}, {args.against} {lengths[1]:.0f}")
    if args.out:
        result = {
            "policy": str(args.policy),
            "against": str(args.against),
            "judge": args.judge,
            "prompts": len(prompts),
            "win_rate": rate,
            "interval_95": [low, high],
            "mean_characters": lengths,
            "win_rate_by_prompt": wins.tolist(),
        }
        write_json(args.out, result)


def bootstrap(values: Tensor, generator: torch.Generator, draws: int = 10_000) -> list[float]:
    """Percentile bootstrap: the middle 95 % of the mean of N values drawn with replacement."""
    N = len(values)
    means = [values[torch.randint(N, (N,), generator=generator)].mean() for _ in range(draws)]
    ends = torch.tensor([0.025, 0.975], dtype=values.dtype)
    return torch.stack(means).quantile(ends).tolist()


def matrix(judge, prompts: list, args: Namespace) -> None:
    """Win rates of all pairs among the run's rounds, the policy it began from, and the average.

    A round that --every leaves out is not part of the average either.
    """
    generator = generator_of(args)
    sampler = Sampler(args.policy, args)
    policies = matrix_policies(sampler.folders, args)
    sampler.folders = list(policies.values())
    names = list(policies)
    size = len(names)

    # Side by side in one row for each prompt: S samples of policy 1, then of policy 2, ...
    ready = sampler.prompts(prompts)
    texts = [[] for _ in ready]
    for index in tqdm(range(size), desc="sample", unit="policy", leave=False):
        responses = sampler.sample(index, ready, args.samples, generator)
        for row, new in zip(texts, sampler.texts(ready, responses)):
            row.extend(new)

    # So the tables consist of A × A blocks, one for each pair of policies; each becomes its mean.
    def by_policy(table):  # (n, A·S, A·S) -> (n, A, A)
        return table.unflatten(2, (size, -1)).unflatten(1, (size, -1)).double().mean((2, 4))

    table = judged(judge, prompts, texts, args, generator, by_policy).mean(0)  # (A, A)
    rounds = slice(1 if "base" in policies else 0, size)
    table = with_average(table, rounds)
    names.append("average")

    result = {"run": str(args.policy), "judge": args.judge, "policies": names}
    result["win_rate"] = table.tolist()
    result["least_of_average"] = table[-1].min().item()
    pairs = later_against_earlier(names, table, rounds)
    losing = [pair for pair in pairs if pair[2] < 0.5]
    result["later_loses_to_earlier"] = len(losing)
    result["pairs_of_rounds"] = len(pairs)

    print_matrix(names, table, losing, len(pairs))
    if args.out:
        # The JSON comes last: once it is there the command has finished.
        write_figure(Path(args.out).with_suffix(".png"), draw_matrix(names, table))
        write_json(args.out, result)


def matrix_policies(folders: list[Path], args: Namespace) -> dict[str, Path]:
    """{name: checkpoint folder} of the policy that the run began from, if there, and its rounds."""
    kept = range(args.every - 1, len(folders), args.every)
    if not kept:
        raise ValueError(f"--every is {args.every}, but the run has {len(folders)} rounds")
    rounds = {f"round {index + 1}": folders[index] for index in kept}

    base = Path(read_json(Path(args.policy) / "config.json").get("policy", ""))
    if (base / "config.json").is_file():
        return {"base": base} | rounds
    print(f"{base}: the policy that the run began from is not there, and not in the matrix")
    return rounds


def with_average(table: Tensor, rounds: slice) -> Tensor:
    """(A, A) win rates -> (A + 1, A + 1): the average policy's are the last row and column."""
    # Each response of the average comes from a random round: its rates are the rounds' mean.
    table = torch.cat([table, table[:, rounds].mean(1, keepdim=True)], 1)
    return torch.cat([table, table[rounds].mean(0, keepdim=True)])


def later_against_earlier(names: list[str], table: Tensor, rounds: slice) -> list[tuple]:
    """(later round, earlier round, win rate of the later one) of each pair of rounds."""
    return [
        (names[i], names[j], table[i, j].item())
        for i in range(rounds.start, rounds.stop)
        for j in range(rounds.start, i)
    ]


def print_matrix(names: list[str], table: Tensor, losing: list[tuple], pairs: int) -> None:
    """The table, thinned to at most ten rows and columns, and sentences about it."""
    shown = range(0, len(names), -(-len(names) // 10))
    heads = [names[i].removeprefix("round ") for i in shown]
    print(f"{'':10}" + "".join(f"{head:>9}" for head in heads))
    for i in shown:
        print(f"{names[i]:10}" + "".join(f"{table[i, j]:9.3f}" for j in shown))

    print(f"in {len(losing)} of {pairs} pairs of rounds the later policy loses to the earlier one")
    if losing:
        later, earlier, rate = min(losing, key=lambda pair: pair[2])
        print(f"most clearly {later} to {earlier}: {rate:.3f}")
    print(f"the average wins at least {table[-1].min().item():.3f} against each")


def draw_matrix(names: list[str], table: Tensor):
    """The table as an image, with about twelve labels on each axis."""
    figure = new_figure(7.2, 6)
    axes = figure.subplots()
    # White at ½; in tenths, as much on either side as all but a few win rates need.
    reach = np.ceil(10 * np.quantile((table - 0.5).abs(), 0.98) - 1e-9) / 10
    limits = dict(vmin=0.5 - max(0.1, reach), vmax=0.5 + max(0.1, reach))
    image = axes.imshow(table, cmap="PuOr", **limits)

    # The average, which is last, always has a label, in place of the one before if need be.
    last = len(names) - 1
    step = max(1, len(names) // 12)
    places = list(range(0, len(names), step))
    if last % step:
        places[-1] = last
    labels = [names[i] for i in places]

    axes.set_xticks(places, labels, rotation=90)
    axes.set_yticks(places, labels)
    axes.set(xlabel="opponent", ylabel="policy", title="Win rate of the row's policy")
    figure.colorbar(image, label="win rate (½: a tie)", extend="both")
    return figure


# ------------------------------------------------------------------------ one checkpoint


@torch.no_grad()
def average(args: Namespace) -> None:
    """The mean of the rounds' weights: not the mixture of their policies, but often near it."""
    folders = checkpoints(args.run_folder)
    policy = Transformer.from_pretrained(folders[0], "float32")

    # In float32 whatever the checkpoints are in: sums of bfloat16 round small differences away.
    total = {name: torch.zeros_like(value) for name, value in policy.named_parameters()}
    for folder in tqdm(folders, desc="average", unit="checkpoint", leave=False):
        load_weights(policy, folder)
        for name, value in policy.named_parameters():
            total[name] += value / len(folders)

    for name, value in policy.named_parameters():
        value.copy_(total[name])
    save(policy.to(DTYPES[policy.config.dtype]), folders[0], args.out)
    print(f"{args.out}: mean of the weights of {len(folders)} checkpoints")


def distill(args: Namespace) -> None:
    """Fit one model to samples of the mixture by maximum likelihood, starting from the last round's
    weights.
    """
    prompts = read_prompts(args.prompts)
    generator = generator_of(args)
    sampler = Sampler(args.run_folder, args)
    ready = sampler.prompts(prompts)
    with unfinished(args) as folder:
        responses = sampler.mixture(ready, args.samples, generator)
        saver = Saver(folder, args.save_minutes)
        count = fit_to(sampler, ready, responses, args, generator, saver)
        made = made_from(*provenance(args))
        save(sampler.policy, sampler.folders[-1], args.out, made)
    print(f"{args.out}: fitted to {count} responses of {len(sampler.folders)} checkpoints")


def fit_to(
    sampler: Sampler, prompts: list, responses: list, args: Namespace, generator, saver: Saver
) -> int:
    """Maximum likelihood of N lists of responses, from the last round's weights on; how many."""
    rows = [(prompt.ids, response) for prompt, row in zip(prompts, responses) for response in row]

    # The sampler leaves in memory whichever round it used last.
    policy = sampler.policy
    load_weights(policy, sampler.folders[-1])
    optimizer = torch.optim.AdamW(policy.parameters(), lr=args.lr, weight_decay=0.0)
    batches = []
    for _ in range(args.epochs):  # all at once: the learning rate falls to 0 at the last
        batches += torch.randperm(len(rows), generator=generator).split(args.batch)

    done = saver.resume(policy, optimizer)
    bar = tqdm(total=len(batches), initial=done, unit="step", desc="distill", leave=False)
    with saver, bar:
        for step in range(done, len(batches)):
            texts = [rows[i] for i in batches[step].tolist()]
            prompts = [prompt for prompt, _ in texts]
            responses = [[response] for _, response in texts]
            loss = -response_logps(policy, prompts, responses).mean()
            loss.backward()

            # The log-probability of a response is a sum over its tokens, so the gradients are
            # large: they are clipped to norm 1.
            lr = args.lr * (1 - step / len(batches))
            optimizer_step(optimizer, policy, lr, 1.0, f"step {step + 1}")
            bar.update()
            saver.after({"step": step + 1, "loss": loss.item()})
    return len(rows)


def save(policy: Transformer, source: Path, out: str | Path, made: dict | None = None) -> None:
    """Write a new checkpoint folder, with the tokenizer of the checkpoint `source`, and what it was
    made from.
    """
    with atomic_write(out) as temporary:
        temporary.mkdir()
        policy.write_pretrained(temporary)
        Tokenizer(source).copy_to(temporary)
        if made:
            write_json(temporary / MADE_FROM, made)


# ------------------------------------------------------------------------ a judge


def report(args: Namespace) -> None:
    """Write and print what a judge is worth: see judge_report.py."""
    out = Path(args.out)
    if out.is_file():
        raise ValueError(
            f"--out {args.out}: is a file, expected a folder for report.json and report.png"
        )
    judge = load_judge(args.judge, args.device)
    pairs = read_pairs(args.pairs)
    with unfinished(args):
        result = judge_report.report(judge, pairs, args.judge, journal=args.journal)
        source = {"judge_spec": args.judge, "pairs_file": args.pairs}
        write_figure(out / "report.png", judge_report.draw(result))
        write_json(out / "report.json", source | result)
    judge_report.print_report(result)
    print(f"\n{out / 'report.json'}, {out / 'report.png'}")


# ------------------------------------------------------------------------ command line


@dataclass(frozen=True)
class Sampling(SamplingConfig):
    """Flags of every command that samples."""

    template: str | None = setting(
        None, "of prompts; unset: what the run was trained with, else chat", choices=TEMPLATES
    )
    dtype: str | None = setting(
        None, "of the policy's weights; unset: as in its checkpoint", choices=tuple(DTYPES)
    )


@dataclass(frozen=True)
class Outputs:
    """Flags of `outputs` alone."""

    best_of: int = setting(1, "sample so many and keep what the judge likes best", low=1)


@dataclass(frozen=True)
class WinRate:
    """Flags of `winrate` alone."""

    samples: int = setting(4, "responses per prompt", low=1)
    every: int = setting(1, "only each so-many-th round of the matrix", low=1)


@dataclass(frozen=True)
class Distill:
    """Flags of `distill` alone."""

    samples: int = setting(64, "responses per prompt", low=1)
    epochs: int = setting(3, "passes over the samples", low=1)
    batch: int = setting(64, "responses per optimizer step", low=1)
    lr: float = setting(1e-4, "at the first step, falls to zero", low=1e-12, high=1e3)
    save_minutes: float = setting(10.0, "minutes between saves; inf: never", low=0, free=True)


INPUTS = (
    "policy", "against", "run_folder", "prompts", "judge", "pairs", "annotations", "difficulty",
    "gamed",
)  # fmt: skip
OURS = ("out", "run", "journal", "save_minutes")  # arguments that a stopped command may differ in


def command_line() -> argparse.ArgumentParser:
    parser = Parser("python -m evaluate", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    add_outputs(commands)
    add_winrate(commands)
    add_average(commands)
    add_distill(commands)
    add_chat(commands)
    add_judge(commands)
    add_lc(commands)
    return parser


def add_outputs(commands) -> None:
    command = commands.add_parser("outputs", help="responses to prompts, in AlpacaEval's format")
    command.set_defaults(run=outputs)
    policy = "checkpoint folder, or the folder of a run: its average policy"
    command.add_argument("--policy", required=True, help=policy)
    command.add_argument("--judge", help=JUDGE)
    command.add_argument("--name", help="the outputs' `generator` [name of the policy's folder]")
    command.add_argument("--out", required=True, help="new JSON file")
    add_sampling(command, Outputs)


def add_winrate(commands) -> None:
    purpose = "win rate of a policy against another, or of all rounds of a run"
    command = commands.add_parser("winrate", help=purpose)
    command.set_defaults(run=winrate)
    policy = "checkpoint folder, folder of a run, or outputs file"
    command.add_argument("--policy", required=True, help=policy)
    against = "the same; without it, the win matrix of the rounds of the run"
    command.add_argument("--against", help=against)
    command.add_argument("--judge", required=True, help=JUDGE)
    command.add_argument("--out", help="new JSON file; the matrix is drawn beside it")
    add_sampling(command, WinRate)


def add_average(commands) -> None:
    purpose = "a checkpoint with the mean of the rounds' weights"
    command = commands.add_parser("average", help=purpose)
    command.set_defaults(run=average)
    command.add_argument("run_folder", metavar="RUN")
    command.add_argument("--out", required=True, help="new folder for the checkpoint")


def add_distill(commands) -> None:
    purpose = "a checkpoint trained on samples of the rounds' mixture"
    command = commands.add_parser("distill", help=purpose)
    command.set_defaults(run=distill)
    command.add_argument("run_folder", metavar="RUN")
    command.add_argument("--out", required=True, help="new folder for the checkpoint")
    add_sampling(command, Distill)


def add_chat(commands) -> None:
    command = commands.add_parser("chat", help="talk to a policy, or to two at once")
    command.set_defaults(run=chat)
    policy = "checkpoint folder, or the folder of a run: each answer is a random round's"
    command.add_argument("--policy", required=True, help=policy)
    command.add_argument("--against", help="a second policy, which answers every message too")
    pairs = "JSON lines to which each pick is added: prompt, chosen, rejected, probability"
    command.add_argument("--pairs", help=pairs)

    # One answer at a time needs no pool.
    spoken = ("max_new_tokens", "temperature", "top_p", "template", "seed", "device", "dtype")
    add_flags(command, Sampling, spoken)


def add_judge(commands) -> None:
    command = commands.add_parser("judge", help="what a judge is worth on labelled pairs")
    command.set_defaults(run=report)
    command.add_argument("--judge", required=True, help=JUDGE)
    pairs = "JSON lines: prompt, chosen, rejected, optional probability and votes"
    command.add_argument("--pairs", required=True, help=pairs)
    command.add_argument("--out", required=True, help="folder for report.json and report.png")

    # It samples nothing, but the judge too may be a network.
    add_flags(command, Sampling, ("device",))


def add_lc(commands) -> None:
    purpose = "win rate and length-controlled win rate as AlpacaEval 2 defines them"
    command = commands.add_parser("lc", help=purpose)
    command.set_defaults(run=lc)
    annotations = "judged rows of one or more models: AlpacaEval's annotations.json"
    command.add_argument("--annotations", required=True, help=annotations)
    difficulty = "JSON list of instruction difficulties; the k-th goes with a model's k-th row"
    command.add_argument("--difficulty", help=difficulty)
    command.add_argument("--gamed", help=f"JSON object with the lists {', '.join(GAMED)}")
    strength = "inverse strength of the L1 penalty [chosen by cross-validation]"
    command.add_argument("--c", type=float, help=strength)
    command.add_argument("--out", help="JSON file for all numbers, which is replaced")


def add_sampling(command: argparse.ArgumentParser, settings: type) -> None:
    """The prompts, a command's own flags and those of every command that samples."""
    command.add_argument("--prompts", required=True, help="JSON lines with `prompt` or `messages`")
    add_flags(command, settings)
    add_flags(command, Sampling)


def check(args: Namespace) -> None:
    """ValueError for flags that are out of range, before anything is loaded."""
    # Settings that a command does not have are skipped.
    for settings in (Outputs, WinRate, Distill, Sampling):
        check_settings(args, settings)

    # The figure of a win matrix is FILE.png beside FILE.json, so the two names must differ.
    if args.command in ("outputs", "winrate") and args.out:
        out = Path(args.out)
        if out.is_dir() or out.suffix == ".png":
            raise ValueError(f"--out {args.out}: expected the name of a JSON file")
    check_device(getattr(args, "device", "cpu"))
    if "template" in args:
        settle_template(args)


def settle_template(args: Namespace) -> None:
    """A run is asked as it was trained. ValueError where --template or another run contradicts."""
    for name in ("policy", "against", "run_folder"):
        source = getattr(args, name, None)
        trained = template_of(source) if source else None
        if trained and args.template not in (None, trained):
            differs = f"{source} was trained with --template {trained}"
            raise ValueError(f"{differs}, and is not asked with {args.template}")
        args.template = trained or args.template
    args.template = args.template or "chat"


def main(arguments: list[str] | None = None) -> int:
    args = command_line().parse_args(arguments)

    def work():
        check(args)
        # What `lc` says of a file takes no time, and is replaced.
        if not out or args.command == "lc" or not finished_before(args):
            args.run(args)

    # `chat` has no --out, and the pairs that it adds to are its output.
    out = getattr(args, "out", None)
    inputs = [getattr(args, name, None) for name in INPUTS] if out else []
    stopped = "stopped; the same command continues" if out else "stopped"
    return exit_code("evaluate", work, stopped, out, inputs)


if __name__ == "__main__":
    sys.exit(main())
