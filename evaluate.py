"""How good is a policy? Its responses to a file of prompts, its win rate against another one, AlpacaEval's metrics.

    python evaluate.py outputs --policy P --prompts FILE --out outputs.json [--best-of 16 --judge SPEC]
    python evaluate.py winrate --policy P --against Q --prompts FILE --judge SPEC [--out FILE.json]
    python evaluate.py winrate --policy RUN --prompts FILE --judge SPEC --out FILE.json     every round against every other
    python evaluate.py average RUN --out DIR       one checkpoint with the mean of the rounds' weights
    python evaluate.py distill RUN --prompts FILE --out DIR     one checkpoint trained on samples of the rounds' mixture
    python evaluate.py lc --annotations FILE       AlpacaEval 2's win rates, see length_controlled.py

A policy P or Q is a checkpoint folder; or the folder of a run, which stands for the theorem's average policy: each response
comes from a round drawn at random (theorem 4.1; π_2 to π_{T+1}, the checkpoints that a run leaves); or, as Q or P of
`winrate`, a file of outputs in AlpacaEval's format, a JSON list of {instruction, output, generator}.
"""

import argparse
import sys
import zlib
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from command import exit_code
from data import TEMPLATES, Tokenizer, outputs_for, pad_responses, prepare_prompts, prompt_text, read_json, read_prompts
from data import new_figure, vacant, whole, write_figure, write_json
from judge_report import checked_tables
from length_controlled import GAMED, lc, length_controlled_from_weights, length_controlled_win_rate  # noqa: F401
from model import DTYPES, Transformer, check_device, generate, load_weights
from prefmodel import load_judge
from sppo import sequence_logps, win_rates
from stages import round_policies
from train import RANGES

JUDGED_TOGETHER = 16  # prompts

# ------------------------------------------------------------------------------------------------ policies


def checkpoints(folder):
    """The checkpoint folders of a policy: the rounds' policies of a run in their order, or the one folder itself."""
    folder, rounds = Path(folder), round_policies(folder)
    if not rounds and not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder}: neither a checkpoint (config.json) nor a run (round-01/policy)")
    return rounds or [folder]


class Sampler:
    """Draws responses from a policy folder, one of several checkpoints a response; one set of weights is in memory."""

    def __init__(self, folder, args):
        self.folders, self.args = checkpoints(folder), args
        self.tokenizer = Tokenizer(self.folders[0])
        self.policy = Transformer.from_pretrained(self.folders[0], args.dtype, args.device)
        self.tokenizer.check_vocabulary(self.policy.config.vocab_size)

    def prompts(self, texts):
        args, context = self.args, self.policy.config.max_position_embeddings
        room = (args.max_new_tokens, args.prompts, context, f"context of {self.folders[0]},")
        return prepare_prompts(texts, self.tokenizer, args.template, *room)

    def mixture(self, prompts, samples, generator):
        """N lists of `samples` responses as token ids; each is of a checkpoint drawn at random."""
        if len(self.folders) == 1:
            return self.sample(0, prompts, samples, generator)
        drawn = torch.randint(len(self.folders), (len(prompts), samples), generator=generator)
        responses = [[None] * samples for _ in prompts]
        with tqdm(total=drawn.numel(), unit="response", desc="sample", leave=False) as progress:
            for index in drawn.unique().tolist():
                places = (drawn == index).nonzero().tolist()
                rows = self.sample(index, [prompts[n] for n, _ in places], 1, generator, progress)
                for (n, k), row in zip(places, rows):
                    responses[n][k] = row[0]
        return responses

    def sample(self, index, prompts, samples, generator, progress=None):
        """N lists of `samples` responses of checkpoint `index` alone."""
        args = self.args
        if len(self.folders) > 1:
            load_weights(self.policy, self.folders[index])
        return generate(
            self.policy, [prompt.ids for prompt in prompts], samples, args.max_new_tokens, self.tokenizer.eos,
            args.temperature, args.top_p, generator, args.pool, progress,
        )  # fmt: skip

    def texts(self, prompts, responses):
        read = self.tokenizer.response_text
        return [[read(prompt.ids, ids, self.args.template) for ids in row] for prompt, row in zip(prompts, responses)]


def responses_of(source, prompts, args, generator):
    """N lists of response texts of a policy folder (args.samples each), or of an outputs file."""
    if Path(source).is_file():
        return outputs_for(source, [prompt_text(prompt) for prompt in prompts])
    sampler = Sampler(source, args)
    ready = sampler.prompts(prompts)
    return sampler.texts(ready, sampler.mixture(ready, args.samples, generator))


def judged(judge, args, prompts, responses, generator, reduce=lambda table: table):
    """(N, K, K) tables of the judge, or what `reduce` makes of them, a few prompts at a time; each row in random order."""
    texts, results = [prompt_text(prompt) for prompt in prompts], []
    with tqdm(total=len(texts), unit="prompt", desc="judge", leave=False) as progress:
        for start in range(0, len(texts), JUDGED_TOGETHER):
            part, some = texts[start : start + JUDGED_TOGETHER], responses[start : start + JUDGED_TOGETHER]
            order = torch.stack([torch.randperm(len(row), generator=generator) for row in some])  # (n, K)
            shuffled = [[row[k] for k in ks] for row, ks in zip(some, order.tolist())]
            place = order.argsort(1)  # where each response went
            table = checked_tables(judge, part, shuffled, args.judge)
            rows = torch.arange(len(part))[:, None, None]
            results.append(reduce(table[rows, place[:, :, None], place[:, None, :]]))
            progress.update(len(part))
    return torch.cat(results)


def generator_of(args):
    """Random numbers of a seed *and* a policy, so that two policies sampled with one seed are independent."""
    source = zlib.crc32(f"{args.command} {args.policy if 'policy' in args else args.run_folder}".encode())
    return torch.Generator().manual_seed(int(np.random.SeedSequence([args.seed, source]).generate_state(1)[0]))


# ------------------------------------------------------------------------------------------------ outputs


def outputs(args):
    """Responses in AlpacaEval's format; with --best-of n the one of n that wins most against the others, by the judge."""
    if args.best_of > 1 and not args.judge:
        raise ValueError("--best-of needs a --judge")
    judge = load_judge(args.judge, args.device) if args.best_of > 1 else None  # what is wrong with it is said before the work
    prompts, generator = list({prompt_text(p): p for p in read_prompts(args.prompts)}.values()), generator_of(args)
    args.samples = args.best_of
    texts = responses_of(args.policy, prompts, args, generator)
    best = [0] * len(prompts)
    if args.best_of > 1:
        best = judged(judge, args, prompts, texts, generator, win_rates).argmax(-1).tolist()
    name = args.name or Path(args.policy).resolve().name
    rows = [{"instruction": prompt_text(p), "output": row[k], "generator": name} for p, row, k in zip(prompts, texts, best)]
    write_json(args.out, rows)
    print(f"{args.out}: {len(rows)} outputs, {mean([len(row['output']) for row in rows]):.0f} characters on average")


def mean(values):
    return sum(values) / len(values)


# ------------------------------------------------------------------------------------------------ win rate


def winrate(args):
    prompts, generator = read_prompts(args.prompts), generator_of(args)
    judge = load_judge(args.judge, args.device)
    if args.against:
        return versus(judge, args, prompts, generator)
    if Path(args.policy).is_file() or len(checkpoints(args.policy)) == 1:
        raise ValueError(f"--against is missing: {args.policy} is one policy, with nothing to compare")
    return matrix(judge, args, prompts, generator)


def versus(judge, args, prompts, generator):
    """P(P's response beats Q's) over prompts, samples of both and the judge, with a bootstrap interval over prompts."""
    both = [responses_of(source, prompts, args, generator) for source in (args.policy, args.against)]
    size = len(both[0][0])
    responses = [ours + theirs for ours, theirs in zip(*both)]
    wins = judged(judge, args, prompts, responses, generator, lambda table: table[:, :size, size:].double().mean((1, 2)))  # (N,)
    low, high = bootstrap(wins, generator)
    lengths = [mean([len(text) for row in texts for text in row]) for texts in both]
    result = {
        "policy": str(args.policy), "against": str(args.against), "judge": args.judge, "prompts": len(prompts),
        "win_rate": wins.mean().item(), "interval_95": [low, high], "mean_characters": lengths,
        "win_rate_by_prompt": wins.tolist(),
    }  # fmt: skip
    print(f"win rate {result['win_rate']:.4f}, 95 % interval {low:.4f} to {high:.4f} over {len(prompts)} prompts")
    print(f"characters: {args.policy} {lengths[0]:.0f}, {args.against} {lengths[1]:.0f}")
    if args.out:
        write_json(args.out, result)
    return result


def bootstrap(values, generator, draws=10_000):
    """The middle 95 % of the mean of N values drawn again with replacement (percentile bootstrap)."""
    means = torch.stack([values[torch.randint(len(values), (len(values),), generator=generator)].mean() for _ in range(draws)])
    return means.quantile(torch.tensor([0.025, 0.975], dtype=means.dtype)).tolist()


def matrix(judge, args, prompts, generator):
    """Win rate of each round's policy against each other, of the policy that the run began from, and of the average.

    The average's rows and columns are means over the rounds' (--every leaves out rounds, also of the average).
    """
    sampler = Sampler(args.policy, args)
    base = Path(read_json(Path(args.policy) / "config.json").get("policy", ""))
    kept = range(args.every - 1, len(sampler.folders), args.every)
    if not kept:
        raise ValueError(f"--every is {args.every}, but the run has {len(sampler.folders)} rounds")
    names, folders = [f"round {index + 1}" for index in kept], [sampler.folders[index] for index in kept]
    if (base / "config.json").is_file():
        names, folders = ["base", *names], [base, *folders]
    else:
        print(f"{base}: the policy that the run began from is not there, and not in the matrix")
    sampler.folders, ready = folders, sampler.prompts(prompts)
    texts = [[] for _ in ready]
    for index in tqdm(range(len(folders)), desc="sample", unit="policy", leave=False):
        for row, new in zip(texts, sampler.texts(ready, sampler.sample(index, ready, args.samples, generator))):
            row.extend(new)
    size = len(names)

    def by_policy(table):  # (n, A·S, A·S) -> (n, A, A)
        return table.unflatten(2, (size, -1)).unflatten(1, (size, -1)).double().mean((2, 4))

    table = judged(judge, args, prompts, texts, generator, by_policy).mean(0)  # (A, A)
    rounds = slice(size - len(kept), None)
    against = torch.cat([table, table[:, rounds].mean(1, keepdim=True)], 1)  # the average as opponent
    table = torch.cat([against, against[rounds].mean(0, keepdim=True)])
    names.append("average")
    result = {"run": str(args.policy), "judge": args.judge, "policies": names, "win_rate": table.tolist()}
    result["least_of_average"] = table[-1].min().item()
    first, last = size - len(kept), size  # the rounds' places, base and average apart
    both = [(i, j) for i in range(first, last) for j in range(first, i)]
    losing = [(names[i], names[j], table[i, j].item()) for i, j in both if table[i, j] < 0.5]
    result["later_loses_to_earlier"], result["pairs_of_rounds"] = len(losing), len(both)
    print(f"{'':10}" + "".join(f"{name.removeprefix('round '):>9}" for name in names[:: max(1, len(names) // 10)]))
    for i in range(0, len(names), max(1, len(names) // 10)):
        print(f"{names[i]:10}" + "".join(f"{table[i, j]:9.3f}" for j in range(0, len(names), max(1, len(names) // 10))))
    print(f"in {len(losing)} of {len(both)} pairs of rounds the later policy loses to the earlier one", end="")
    if losing:
        i, j, rate = min(losing, key=lambda row: row[2])
        print(f", most clearly {i} to {j}: {rate:.3f}", end="")
    print(f"\nthe average wins at least {result['least_of_average']:.3f} against each")
    if args.out:
        write_json(args.out, result)
        write_figure(Path(args.out).with_suffix(".png"), draw_matrix(names, table))
    return result


def draw_matrix(names, table):
    figure = new_figure(7.2, 6)
    axes = figure.subplots()
    image = axes.imshow(table, cmap="PuOr", vmin=0, vmax=1)
    places = range(0, len(names), max(1, len(names) // 12))
    if (len(names) - 1) % max(1, len(names) // 12):
        places = [*places][:-1] + [len(names) - 1]
    axes.set_xticks(places, [names[i] for i in places], rotation=90)
    axes.set_yticks(places, [names[i] for i in places])
    axes.set(xlabel="opponent", ylabel="policy", title="Win rate of the row's policy")
    figure.colorbar(image, label="win rate (½: a tie)")
    return figure


# ------------------------------------------------------------------------------------------------ one checkpoint for the average


@torch.no_grad()
def average(args):
    """The mean of the rounds' weights: not the mixture of their policies, but one model, and often near it."""
    vacant(args.out)
    folders = checkpoints(args.run_folder)
    policy = Transformer.from_pretrained(folders[0], "float32")
    total = {name: torch.zeros_like(value) for name, value in policy.named_parameters()}
    for folder in tqdm(folders, desc="average", unit="checkpoint", leave=False):
        load_weights(policy, folder)
        for name, value in policy.named_parameters():
            total[name] += value / len(folders)
    for name, value in policy.named_parameters():
        value.copy_(total[name])
    save(policy.to(DTYPES[policy.config.dtype]), folders[0], args.out)
    print(f"{args.out}: mean of the weights of {len(folders)} checkpoints")


def distill(args):
    """Fit one model to samples of the mixture by maximum likelihood, from the last round's weights on."""
    vacant(args.out)
    prompts, generator = read_prompts(args.prompts), generator_of(args)
    sampler = Sampler(args.run_folder, args)
    ready, policy = sampler.prompts(prompts), sampler.policy
    responses = sampler.mixture(ready, args.samples, generator)
    load_weights(policy, sampler.folders[-1])
    rows = [(prompt.ids, response) for prompt, some in zip(ready, responses) for response in some]
    optimizer = torch.optim.AdamW(policy.parameters(), lr=args.lr, weight_decay=0.0)
    batches = [batch for _ in range(args.epochs) for batch in torch.randperm(len(rows), generator=generator).split(args.batch)]
    for step, batch in enumerate(tqdm(batches, unit="step", desc="distill", leave=False)):
        tokens, mask = pad_responses(*zip(*[rows[i] for i in batch.tolist()]), device=args.device)
        (-sequence_logps(policy(tokens), tokens, mask).mean()).backward()
        for group in optimizer.param_groups:
            group["lr"] = args.lr * (1 - step / len(batches))
        norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        if not torch.isfinite(norm):
            raise ValueError(f"step {step + 1}: the gradient norm is {norm.item()}; lower --lr")
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    save(policy, sampler.folders[-1], args.out)
    print(f"{args.out}: fitted to {len(rows)} responses of {len(sampler.folders)} checkpoints")


def save(policy, folder, out):
    """Write a new checkpoint folder with the tokenizer of an old one."""
    with whole(out) as temporary:
        temporary.mkdir()
        policy.write_pretrained(temporary)
        Tokenizer(folder).copy_to(temporary)


# ------------------------------------------------------------------------------------------------ command line


def add_sampling(command, samples=None):
    command.add_argument("--prompts", required=True, help="JSON lines with `prompt` or `messages`")
    if samples:
        command.add_argument("--samples", type=int, default=samples, help="responses per prompt [%(default)s]")
    command.add_argument("--max-new-tokens", type=int, default=512, help="longest response [%(default)s]")
    command.add_argument("--temperature", type=float, default=1.0, help="of sampling; 0 is greedy [%(default)s]")
    command.add_argument("--top-p", type=float, default=1.0, help="nucleus of sampling [%(default)s]")
    command.add_argument("--template", choices=TEMPLATES, default="mistral", help="[%(default)s]")
    command.add_argument("--pool", type=int, default=256, help="rows that decode together [%(default)s]")
    command.add_argument("--seed", type=int, default=0, help="of everything random [%(default)s]")
    command.add_argument("--device", default="cpu", help="a torch device [%(default)s]")
    command.add_argument("--dtype", choices=DTYPES, help="of the policy's weights [as in its checkpoint]")


def command_line():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)

    command = commands.add_parser("outputs", help="responses to a prompt file, in AlpacaEval's format")
    command.set_defaults(run=outputs)
    command.add_argument("--policy", required=True, help="checkpoint folder, or the folder of a run: its average policy")
    command.add_argument("--best-of", type=int, default=1, metavar="n", help="sample n and keep what the judge likes best")
    command.add_argument("--judge", help="checkpoint folder, or module:function")
    command.add_argument("--name", help="the outputs' `generator` [name of the policy's folder]")
    command.add_argument("--out", required=True, help="JSON file")
    add_sampling(command)

    command = commands.add_parser("winrate", help="win rate of a policy against another, or of all rounds of a run")
    command.set_defaults(run=winrate)
    command.add_argument("--policy", required=True, help="checkpoint folder, folder of a run, or outputs file")
    command.add_argument("--against", help="the same; without it, the win matrix of the rounds of the run")
    command.add_argument("--judge", required=True, help="checkpoint folder, or module:function")
    command.add_argument("--every", type=int, default=1, metavar="n", help="every n-th round of the matrix [%(default)s]")
    command.add_argument("--out", help="JSON file; the matrix is drawn beside it")
    add_sampling(command, 4)

    command = commands.add_parser("average", help="a checkpoint with the mean of the rounds' weights")
    command.set_defaults(run=average)
    command.add_argument("run_folder", metavar="RUN")
    command.add_argument("--out", required=True, help="folder for the checkpoint")

    command = commands.add_parser("distill", help="a checkpoint trained on samples of the rounds' mixture")
    command.set_defaults(run=distill)
    command.add_argument("run_folder", metavar="RUN")
    command.add_argument("--out", required=True, help="folder for the checkpoint")
    command.add_argument("--epochs", type=int, default=3, help="passes over the samples [%(default)s]")
    command.add_argument("--batch", type=int, default=64, help="responses per optimizer step [%(default)s]")
    command.add_argument("--lr", type=float, default=1e-4, help="at the first step, falls to zero [%(default)s]")
    add_sampling(command, 64)

    command = commands.add_parser("lc", help="win rate and length-controlled win rate as AlpacaEval 2 defines them")
    command.set_defaults(run=lc)
    command.add_argument("--annotations", required=True, help="judged rows of one or more models: AlpacaEval's annotations.json")
    command.add_argument("--difficulty", help="JSON list of instruction difficulties; the k-th goes with a model's k-th row")
    command.add_argument("--gamed", help=f"JSON object with the lists {', '.join(GAMED)}")
    command.add_argument("--c", type=float, help="inverse strength of the L1 penalty [chosen by cross-validation]")
    command.add_argument("--out", help="JSON file for all numbers")
    return parser


def check(args):
    """Flags that are out of range, refused before anything is loaded."""
    for name in ("samples", "best_of", "every", "epochs", "batch", "max_new_tokens", "pool"):
        if getattr(args, name, 1) < 1:
            raise ValueError(f"--{name.replace('_', '-')} is {getattr(args, name)}, expected at least 1")
    for name in ("temperature", "top_p"):
        low, high = RANGES[name]
        if not low <= getattr(args, name, 1) <= high:
            raise ValueError(f"--{name.replace('_', '-')} is {getattr(args, name)}, expected from {low} to {high}")
    if args.command in ("outputs", "winrate") and args.out and (Path(args.out).is_dir() or Path(args.out).suffix == ".png"):
        raise ValueError(f"--out {args.out}: expected the name of a JSON file")
    check_device(getattr(args, "device", "cpu"))


def main(arguments=None):
    args = command_line().parse_args(arguments)

    def work():
        check(args)
        args.run(args)

    return exit_code("evaluate.py", work)


if __name__ == "__main__":
    sys.exit(main())
