"""Self-play preference optimisation of a language model: the loop over rounds, its settings, stages on disk, resume.

    python train.py --policy DIR --judge DIR --prompts prompts.jsonl --out RUN                   your own run
    python train.py --preset mistral-7b --policy DIR --judge DIR --prompts FILE --out RUN        the paper's recipe
    python train.py --preset debug                                                               for the debugger

What a round does stands in sppo.py, `sppo_round`. This file gives it a `game` made of a policy, a judge and a
tokenizer, and a memo that keeps every finished stage in RUN/round-01/, ... so that a run that was stopped, killed
even, continues behind its last finished stage when the same command is given again, to the same numbers.
"""

import argparse
import dataclasses
import inspect
import math
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import plan
import ranks
from command import exit_code
from data import TEMPLATES, Tokenizer, outputs_for, pad_responses, prepare_prompts, read_json, read_prompts
from data import append_line, new_figure, remove, write_figure, write_json, write_lines
from generate import draw_seeds, generate
from judge_report import checked_tables
from model import DTYPES, ModelConfig, Transformer, check_device, load_weights
from prefmodel import load_judge
from sppo import PAIR_LOSSES, TARGETS, RoundConfig, chunked_logps, score, sequence_logps, sppo_round
from stages import Saver, Stages, peak_memory, policy_folder, read_responses, round_folder

# ------------------------------------------------------------------------------------------------ settings


@dataclass(frozen=True)
class TrainConfig(RoundConfig):
    """Every setting of a run; the fields of RoundConfig too. A field is a flag, its comment the flag's help."""

    policy: str = ""  # checkpoint folder of π_1, Hugging Face layout
    judge: str = ""  # checkpoint folder of a judge, or module:function
    prompts: str = ""  # JSON lines with `prompt` or `messages`
    out: str = ""  # run folder
    rounds: int = 3  # T
    samples: int = 5  # K responses per prompt
    opponents: str = ""  # outputs file of a model or of people; they count in the win rates and are never trained on
    reuse_prompts: bool = False  # every round sees all prompts; otherwise they are split over the rounds, as in the paper
    max_new_tokens: int = 512  # longest response, in tokens
    temperature: float = 1.0  # of sampling; the log-ratios are always of the untempered policy
    top_p: float = 1.0  # nucleus of sampling
    template: str = "mistral"  # mistral: [INST] chat; plain: BOS, then the prompt as text to be continued
    reference: str = ""  # checkpoint folder of μ (target regularized); unset: the policy that the run starts from
    reference_every: int = 0  # every so many rounds μ becomes the current policy (a moving reference); 0: never
    pool: int = 256  # rows that decode together, at most
    cache_gb: float = 0.0  # memory for their keys and values; the pool has as many rows as fit. 0: no limit
    recompute: bool = False  # run each layer again in the backward pass instead of keeping what it computed
    save_minutes: float = 10.0  # how often an unfinished fit keeps its state; a stage that is killed loses no more
    seed: int = 0  # of everything random
    device: str = "cpu"  # a torch device
    dtype: str = "float32"  # of the policy's weights
    judge_dtype: str | None = None  # of the judge's weights; unset: as its checkpoint has them
    plan: bool = False  # only print memory, tokens, operations, hours and disk that the run would take
    gpus: int = 1  # how many the plan is for; a run has as many as torchrun starts processes
    gpu: str = "h100"  # which kind the plan is for

    @property
    def cache_bytes(self):
        return int(self.cache_gb * 1e9) if self.cache_gb else None


JUDGED_TOGETHER = 32  # prompts
SMALL_LOGITS = 2**23  # numbers: a batch whose logits are no more is scored in one piece, a larger one in chunks

CHOICES = {
    "loss": ("sppo", *PAIR_LOSSES), "target": TARGETS, "select": ("best-worst", "all"),
    "optimizer": ("rmsprop", "adamw"), "template": TEMPLATES, "dtype": tuple(DTYPES), "gpu": tuple(plan.GPUS),
    "judge_dtype": tuple(DTYPES),
}  # fmt: skip

PRESETS = {
    # Two prompts, three samples, a dozen tokens, one layer: every tensor of a round fits on the screen.
    "debug": dict(
        policy="out/debug-world/policy", judge="toy.text_game:oracle", prompts="out/debug-world/prompts.jsonl",
        out="out/debug", rounds=2, samples=3, max_new_tokens=6, template="plain", reuse_prompts=True, eta=2.0,
        optimizer="adamw", lr=1e-3, batch=2, micro_batch=2, epochs=2,
    ),
    # The small world of toy/text_game.py, on a laptop: the theory's setting (all K, small η, many rounds).
    "tiny": dict(
        rounds=80, samples=16, select="all", reuse_prompts=True, eta=2.0, optimizer="adamw", lr=3e-4, warmup=0.0,
        epochs=3, batch=25, micro_batch=25, max_new_tokens=4, template="plain", pool=1600,
    ),
    # Mistral-7B-Instruct-v0.2 as in SPPO v5, §5.1. Not in the paper: the optimiser and micro-batch are those of the
    # authors' code (uclaml/SPPO), as are 2048 new tokens (scripts/generate.sh). Sampling is the paper's 1.0 / 1.0.
    # Weights are bfloat16 with stochastic rounding (optim.py): rounded to the nearest, updates of 5e-7 would be lost.
    "mistral-7b": dict(
        rounds=3, samples=5, select="best-worst", eta=1000.0, lr=5e-7, warmup=0.1, epochs=1, schedule_epochs=18,
        batch=64, micro_batch=1, optimizer="rmsprop", temperature=1.0, top_p=1.0, max_new_tokens=2048,
        template="mistral", dtype="bfloat16", judge_dtype="bfloat16", recompute=True, cache_gb=48,
    ),
}  # fmt: skip


def parse_config(arguments=None):
    """Command line -> TrainConfig. Order of precedence: flags, the preset, the defaults of the dataclass."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, help="settings to start from; flags override them")
    source = inspect.getsource(RoundConfig) + inspect.getsource(TrainConfig)
    for field in dataclasses.fields(TrainConfig):
        text = re.search(rf"\n    {field.name}: [^#]*# (.*)", source)[1].replace("%", "%%")
        kind = field.type if isinstance(field.type, type) else field.type.__args__[0]  # int | None -> int
        form = dict(action=argparse.BooleanOptionalAction) if kind is bool else dict(type=kind, choices=CHOICES.get(field.name))
        flag = "--" + field.name.replace("_", "-")
        parser.add_argument(flag, help=f"{text} [{field.default}]", default=argparse.SUPPRESS, **form)
    flags = vars(parser.parse_args(arguments))
    preset = PRESETS.get(flags.pop("preset", None), {})
    return TrainConfig(**(preset | flags))


COUNTS = ("rounds", "gpus", "epochs", "batch", "micro_batch", "pool", "max_new_tokens")
RANGES = dict.fromkeys(COUNTS, (1, math.inf)) | {  # (smallest, largest) that makes sense, both included
    "samples": (2, math.inf), "seed": (0, math.inf), "reference_every": (0, math.inf), "micro_tokens": (0, math.inf),
    "eta": (1e-9, 1e9), "tau": (0, 1e9), "lr": (1e-12, 1e3), "warmup": (0, 1), "clip": (1e-12, 1e12),
    "cache_gb": (0, 1e6), "temperature": (0, 1e6), "top_p": (1e-9, 1), "save_minutes": (0, math.inf),
}  # fmt: skip


def check(config):
    """Settings that are out of range, contradict each other or say nothing, refused before anything is loaded."""
    for name in ("policy", "judge", "prompts", "out"):
        if not getattr(config, name):
            raise ValueError(f"--{name} is missing (or name a --preset that sets it)")
    for name, (low, high) in RANGES.items():
        if not low <= getattr(config, name) <= high:  # NaN is in no range
            bounds = f"at least {low}" if high == math.inf else f"from {low} to {high}"
            raise ValueError(f"--{name.replace('_', '-')} is {getattr(config, name)}, expected {bounds}")
    if config.schedule_epochs is not None and config.schedule_epochs < config.epochs:
        raise ValueError(f"--schedule-epochs is {config.schedule_epochs}, expected at least --epochs {config.epochs}")
    if config.loss != "sppo" and (config.select, config.target) != ("best-worst", "sppo"):
        raise ValueError(f"--loss {config.loss} compares winner and loser: it goes with --select best-worst and no --target")
    if config.target != "regularized" and (config.reference or config.reference_every):
        raise ValueError("--reference and --reference-every go with --target regularized")
    if config.reference and not Path(config.reference).is_dir():
        raise FileNotFoundError(f"--reference {config.reference}: no such folder")
    check_device(config.device)


# ------------------------------------------------------------------------------------------------ the game


class TextGame:
    """The functions that `sppo_round` plays with, for round `number` of a text policy (see its docstring)."""

    def __init__(self, config, policy, tokenizer, judge_model, number, opponents=None):
        self.config, self.policy, self.tokenizer, self.judge_model = config, policy, tokenizer, judge_model
        self.opponents = opponents or {}  # prompt text -> response texts
        self.number = number  # t, from 1
        self.progress = None  # the bar of the stage that is being computed

    def generator(self, stage):
        """Each stage of each round draws from a generator of its own, so that a resumed run draws the same numbers."""
        state = np.random.SeedSequence([self.config.seed, self.number, stage]).generate_state(1)[0]
        return torch.Generator().manual_seed(int(state))

    def sample(self, prompts, stage=0):
        config = self.config
        seeds = draw_seeds(len(prompts), config.samples, self.generator(stage))
        ids = [prompt.ids for prompt in prompts]
        return ranks.joined(generate(
            self.policy, ranks.share(ids), config.samples, config.max_new_tokens, self.tokenizer.eos, config.temperature,
            config.top_p, rows=config.pool, progress=self.progress, cache_bytes=config.cache_bytes, seeds=ranks.share(seeds),
        ))  # fmt: skip

    def judge(self, prompts, responses):
        """The judge's tables (N, K, K), a few dozen prompts at a time; ValueError names a prompt whose table is none.

        With --opponents K + M rows: each prompt's M outside responses stand behind its own.
        """
        tables, prompts, responses = [], ranks.share(prompts), ranks.share(responses)
        for start in range(0, len(prompts), JUDGED_TOGETHER):
            some = prompts[start : start + JUDGED_TOGETHER]
            outside = [self.opponents.get(prompt.text, []) for prompt in some]
            texts = [self.texts(prompt, row) + others for prompt, row, others in zip(some, responses[start:], outside)]
            table = checked_tables(self.judge_model, [prompt.text for prompt in some], texts, self.config.judge)
            tables.append(table)
            self.progress.update(len(table))
        return torch.cat(ranks.joined(tables))

    def texts(self, prompt, responses):
        return [self.tokenizer.response_text(prompt.ids, response, self.config.template) for response in responses]

    def logps(self, prompts, responses):
        """(b, S) log π(y|x) of b prompts and S responses each, in one padded forward pass."""
        rows = [(prompt.ids, response) for prompt, row in zip(prompts, responses, strict=True) for response in row]
        tokens, mask = pad_responses(*zip(*rows), device=self.config.device)
        if tokens.numel() * self.policy.config.vocab_size <= SMALL_LOGITS:
            logps = sequence_logps(self.policy(tokens), tokens, mask)
        else:
            logps = self.policy(tokens, lambda hidden, head: chunked_logps(hidden, head, tokens, mask))
        logps = logps.view(len(prompts), -1)
        if self.progress is not None:
            self.progress.update(len(prompts))
        return logps.cpu()

    def longest(self, prompt, responses):
        return len(prompt.ids) + max(map(len, responses))

    def log(self, **step):
        """Called after each optimizer step: seen in the bar and in metrics.jsonl, which is rewritten behind the round."""
        self.progress.set_postfix(loss=f"{step['loss']:.4g}", refresh=False)
        if ranks.first():
            append_line(Path(self.config.out) / "metrics.jsonl", {"round": self.number} | step)

    def previous(self, prompts, responses, win_rate):
        """Win rates (N, K) of the responses against as many of π_{t-1}; in round 1, which has none, those against π_1."""
        config, K = self.config, self.config.samples
        if self.number == 1:
            return win_rate
        if config.reuse_prompts:
            earlier = read_responses(round_folder(config, self.number - 1) / "responses.jsonl", prompts)
        else:  # that round saw other prompts
            earlier = self.with_weights(policy_folder(config, self.number - 1), lambda: self.sample(prompts, stage=2))
        both = self.judge(prompts, [new + old for new, old in zip(responses, earlier, strict=True)])  # (N, 2K, 2K)
        return both[:, :K, K:].mean(-1)

    def reference(self, prompts, responses):
        """log μ(y|x) (N, S); μ is --reference, or the policy that the run started from, or a later one of its rounds."""
        config, every = self.config, self.config.reference_every
        start = (self.number - 1) // every * every + 1 if every else 1
        folder = config.reference if config.reference and start == 1 else policy_folder(config, start)
        return self.with_weights(folder, lambda: score(self, prompts, responses, config))

    def with_weights(self, folder, compute):
        """compute() with the weights of another checkpoint in the policy; there is never a second model in memory."""
        load_weights(self.policy, folder)
        try:
            return compute()
        finally:
            load_weights(self.policy, policy_folder(self.config, self.number))


# ------------------------------------------------------------------------------------------------ the run


# Settings that are no part of a run, and those that may change when it is continued: they move numbers by rounding only.
APART = ("out", "plan", "gpus", "gpu")
FREE = ("device", "pool", "cache_gb", "micro_batch", "micro_tokens", "recompute", "save_minutes")


def claim(config):
    """Make the run folder this run's: write config.json, or say in what it differs from that of the run that is continued."""
    path, settings = Path(config.out) / "config.json", dataclasses.asdict(config)
    for name in APART:
        settings.pop(name)
    if not path.exists():
        write_json(path, settings)
    old = read_json(path)
    for name in settings | old:
        old.setdefault(name, getattr(TrainConfig, name, None))  # the run may be older than the setting
        if name not in FREE and settings.get(name) != old[name]:
            return (
                f"{path}: this run was started with --{name.replace('_', '-')} {old.get(name)}, now it is {settings.get(name)}; "
                "give the same settings to continue it, or another --out"
            )


def load_prompts(config, tokenizer, context):
    """The prompt file as one list of prompts a round: all of them, or every T-th, so that each round sees each kind."""
    texts = read_prompts(config.prompts)
    room = (config.max_new_tokens, config.prompts, context, "policy's context of")
    prompts = prepare_prompts(texts, tokenizer, config.template, *room)
    if config.reuse_prompts:
        return [prompts] * config.rounds
    if len(prompts) < config.rounds:
        raise ValueError(f"{config.prompts}: {len(prompts)} prompts are fewer than --rounds {config.rounds}; add --reuse-prompts")
    return [prompts[t :: config.rounds] for t in range(config.rounds)]


def load_opponents(config, prompts):
    """{prompt text: outside responses} from --opponents, for all prompts of the run."""
    if not config.opponents:
        return {}
    texts = list(dict.fromkeys(prompt.text for part in prompts for prompt in part))
    return dict(zip(texts, outputs_for(config.opponents, texts)))


def load(config):
    """The policy, tokenizer and judge of a run and its prompts, one list a round; refuses what does not fit together."""
    tokenizer, sizes = Tokenizer(config.policy), ModelConfig.from_json(Path(config.policy) / "config.json")
    tokenizer.check_vocabulary(sizes.vocab_size)
    prompts = load_prompts(config, tokenizer, sizes.max_position_embeddings)  # before the weights, which take longer
    policy = Transformer.from_pretrained(config.policy, config.dtype, config.device)
    policy.model.recompute = config.recompute
    return policy, tokenizer, load_judge(config.judge, config.device, config.judge_dtype), prompts


def run(config):
    """Play all rounds of a run, or those that are missing. Returns the lines of metrics.jsonl."""
    check(config)
    ranks.start(config.device)
    policy, tokenizer, judge, prompts = load(config)
    if (fewest := min(map(len, prompts))) < ranks.count():
        raise ValueError(f"{config.prompts}: {fewest} prompts a round are fewer than the {ranks.count()} processes")
    opponents = load_opponents(config, prompts)
    if refused := ranks.agreed(claim(config) if ranks.first() else None):
        raise ValueError(refused)
    out, lines, drawn = Path(config.out), [], time.monotonic()
    for number, part in enumerate(prompts, 1):
        start, game = time.monotonic(), TextGame(config, policy, tokenizer, judge, number, opponents)
        stages, saver = Stages(config, game, part), Saver(round_folder(config, number), config.save_minutes)
        result = sppo_round(game, part, config, game.generator(1), stages, game.log, saver)
        lines += [{"round": number} | step for step in result["steps"]]
        lines.append(summary(number, result, tokenizer.eos))
        if not ranks.first():
            continue
        saver.done()
        write_lines(out / "metrics.jsonl", lines)
        print(describe(lines[-1], config), f"{time.monotonic() - start:.1f} s, {peak_memory(config):.2f} GB", flush=True)
        if number == config.rounds or time.monotonic() - drawn > 60:
            draw(lines, out / "curves.png")
            drawn = time.monotonic()
    ranks.stop()
    return lines


def summary(number, result, stop_token):
    """One line a round. Without --opponents win rates are against the own samples: their mean is ½, their spread is the news."""
    lengths = [len(response) for row in result["responses"] for response in row]
    stopped = [response[-1] == stop_token for row in result["responses"] for response in row]
    return {
        "round": number,
        "best_win_rate": result["win_rate"].amax(-1).mean().item(),
        "worst_win_rate": result["win_rate"].amin(-1).mean().item(),
        "mean_squared_target": result["target"].pow(2).mean().item(),
        "first_loss": result["steps"][0]["loss"],
        "last_loss": result["steps"][-1]["loss"],
        "mean_tokens": sum(lengths) / len(lengths),
        "stopped": sum(stopped) / len(stopped),
    }


def describe(row, config):
    return (
        f"round {row['round']}/{config.rounds}  win rates {row['worst_win_rate']:.3f} to {row['best_win_rate']:.3f}  "
        f"loss {row['first_loss']:.4g} -> {row['last_loss']:.4g}  {row['mean_tokens']:.1f} tokens a response "
    )


def draw(lines, path):
    """curves.png: what each optimizer step and each round did."""
    steps = [row for row in lines if "loss" in row]
    rounds = [row for row in lines if "loss" not in row]
    figure = new_figure(11, 6.5)
    axes = figure.subplots(2, 2)
    position, number = range(1, len(steps) + 1), [row["round"] for row in rounds]
    blue, orange, grey = "#0072B2", "#D55E00", "#777777"
    axes[0, 0].plot(position, [row["loss"] for row in steps], color=blue)
    axes[0, 0].set(xlabel="optimizer step", ylabel="loss", yscale="log" if steps[0]["loss"] > 0 else "linear", title="Loss")
    axes[0, 1].plot(position, [row["best_log_ratio"] for row in steps], color=blue, linewidth=0.8, label="highest target")
    axes[0, 1].plot(position, [row["worst_log_ratio"] for row in steps], color=orange, linewidth=0.8, label="lowest target")
    axes[0, 1].set(xlabel="optimizer step", ylabel="log π_θ/π_t (nats)", title="Log-ratio of trained responses")
    axes[0, 1].margins(y=0.25)
    axes[1, 0].plot(number, [row["best_win_rate"] for row in rounds], ".-", color=blue, label="best of K")
    axes[1, 0].plot(number, [row["worst_win_rate"] for row in rounds], ".-", color=orange, label="worst of K")
    axes[1, 0].axhline(0.5, color=grey, linewidth=0.8)
    axes[1, 0].set(xlabel="round", ylabel="win rate against π_t", title="Spread of win rates", ylim=(0, 1.1))
    axes[1, 1].plot(number, [row["mean_tokens"] for row in rounds], ".-", color=blue)
    axes[1, 1].set(xlabel="round", ylabel="tokens", title="Mean length of a response")
    axes[1, 1].set_ylim(0, 1.2 * max(row["mean_tokens"] for row in rounds))
    for axis in axes[1]:
        axis.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    for axis in (axes[0, 1], axes[1, 0]):
        axis.legend(frameon=False, loc="upper center", ncols=2)
    write_figure(path, figure)


def prepare_debugging(config):
    """The debug preset brings a world of its own, and its run starts afresh every time."""
    from toy.text_game import build_debugging  # the only thing here that knows a toy

    if not Path(config.policy).is_dir():
        build_debugging(Path(config.policy).parent)
    if config.out == PRESETS["debug"]["out"]:
        remove(Path(config.out))


def main(arguments=None):
    config = parse_config(arguments)

    continues = f"the same command continues behind the last finished stage in {config.out}"

    def work():
        if config.policy == PRESETS["debug"]["policy"]:
            prepare_debugging(config)
        if config.plan:
            check(config)
            return plan.print_plan(plan.plan(config, config.gpus, config.gpu))
        try:
            run(config)
        except RuntimeError as error:
            if not ranks.lost(error):
                raise
            raise ConnectionError(f"another process of this run is gone; {continues}") from None

    return exit_code("train.py", work, f"stopped; {continues}")


if __name__ == "__main__":
    sys.exit(main())
