"""SPPO on a language model: the settings of a run, the game of texts, the loop over rounds.

    python train.py --policy DIR --judge DIR --prompts FILE --out RUN                your own run
    python train.py --preset mistral-7b --policy DIR --judge DIR --prompts FILE --out RUN

A round is `sppo_round` in sppo.py. This file gives it a `TextGame` made of a policy,
a judge and a tokenizer, inside a `RecordedGame` (engine/run_folder.py) that keeps every finished
stage in RUN/round-01/, ... and inside of a stage each response, table and, now and then, the fit. A
run that was stopped, killed even, continues when the same command is given again, to the same bits.
"""

import engine.quiet  # noqa: F401  first, see there

# isort: split
import argparse
import os
import sys
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import torch

from data import Prompt, Tokenizer, outputs_for, prepare_prompts, read_prompts
from engine import distributed
from engine.advice import advice, written
from engine.checkpoint import DTYPES, check_device, load_weights
from engine.command import Parser, add_flags, check_settings, exit_code
from engine.figures import draw_curves
from engine.files import fingerprint
from engine.journal import NOTHING
from engine.lora import add_terms, merge_terms
from engine.memory import peak_memory
from engine.optim import rounding_optimizer
from engine.run_folder import (
    Metrics,
    RecordedGame,
    claim,
    finished,
    policy_folder,
    read_responses,
    round_folder,
)
from engine.threads import Threads
from engine.trace import TracedGame
from generate import SamplingConfig, draw_seeds, generate, response_logps
from judges.base import judge_in_batches
from judges.budget import compare, draw_pairs
from judges.load import judge_fingerprint, load_judge, probe
from model import ModelConfig, Transformer
from sppo import (
    PAIR_LOSSES,
    Game,
    RoundConfig,
    centred,
    micro_batches,
    row_losses,
    setting,
    sppo_round,
)

# ------------------------------------------------------------------------ settings


@dataclass(frozen=True)
class TrainConfig(RoundConfig, SamplingConfig):
    """Every setting of a run, those of its rounds included. Each is a flag of the command line."""

    policy: str = setting("", "folder of the model to start from, π_1 (required)")
    judge: str = setting("", "folder, module:function, human:{...}, ... (required)")
    prompts: str = setting("", "JSON lines with `prompt` or `messages` (required)")
    out: str = setting("", "run folder, new or to be continued (required)")
    rounds: int = setting(3, "number of rounds T", low=1)
    samples: int = setting(5, "K responses per prompt", low=2)
    lora: int = setting(0, "rank of the terms trained in place of all weights; 0: off", low=0)
    compare: int = setting(0, "opponents that each response meets, at random; 0: all", low=0)
    opponents: str = setting("", "file of outside responses, only compared with")
    reuse_prompts: bool = setting(False, "all prompts in every round, not split over them")
    reference: str = setting("", "folder of μ (target regularized); unset: --policy")
    reference_every: int = setting(0, "rounds between updates of μ; 0: never", low=0)
    cache_gb: float = setting(
        0.0, "GB of the key/value cache; 0: no limit", low=0, high=1e6, free=True
    )
    recompute: bool = setting(False, "recompute activations: less memory, slower", free=True)
    save_minutes: float = setting(
        10.0, "minutes between saves of a fit; inf: never", low=0, free=True
    )
    trace: bool = setting(False, "print each round's first prompt in full", free=True)
    dtype: str = setting("float32", "of the policy's weights", choices=tuple(DTYPES))
    judge_dtype: str | None = setting(None, "unset: that of its checkpoint", choices=tuple(DTYPES))
    judge_retries: int = setting(5, "repeats of a judge that fails for a time", low=0, free=True)

    def __repr__(self) -> str:
        """What differs from the defaults."""
        changed = [one.name for one in fields(self) if getattr(self, one.name) != one.default]
        return f"TrainConfig({', '.join(f'{name}={getattr(self, name)!r}' for name in changed)})"

    @property
    def cache_bytes(self) -> int | None:
        return int(self.cache_gb * 1e9) if self.cache_gb else None


PRESETS = {
    # The small world of toy/text_game.py: the theory's setting (all K, small η, many rounds).
    "tiny": dict(
        rounds=80, samples=16, select="all", reuse_prompts=True, eta=2.0,
        optimizer="adamw", lr=3e-4, warmup=0.0, epochs=3, batch=25, micro_batch=25,
        max_new_tokens=4, template="plain", pool=1600,
    ),
    # To begin with on 30 to 300 prompts of one's own: a chat model of 100M to 500M parameters on a
    # laptop. With η = 5 no target is further than 2.5 nats, so that several epochs fit it: 30
    # prompts make 12 steps a round, and the loss of SmolLM2-135M falls from 0.8 to 0.3. At 5e-6 its
    # second epoch went past the targets.
    "small": dict(
        rounds=3, samples=4, select="all", reuse_prompts=True, eta=5.0, temperature=0.7,
        optimizer="adamw", lr=3e-6, epochs=3, batch=8, micro_tokens=1024,
        max_new_tokens=96, pool=64, save_minutes=2.0, dtype="bfloat16", threads=0,
    ),
    # A chat model of 135M parameters on two cores (real/instructions.py), with 96 prompts for each
    # round. It sees them once: at this η and learning rate a second epoch would fit samples, not
    # preferences (a step moves the likelihood of what it has seen by nats). A batch is as large as
    # that: in smaller ones, responses only became longer.
    "smollm2": dict(
        rounds=8, samples=8, select="best-worst", eta=15.0, temperature=0.7,
        optimizer="adamw", lr=6e-5, epochs=1, batch=32, micro_tokens=1024,
        max_new_tokens=96, pool=192, save_minutes=2.0, dtype="bfloat16", threads=0,
    ),
    # Mistral-7B-Instruct-v0.2 as in SPPO v5, §5.1. Not in the paper: the optimizer and micro-batch
    # are those of the authors' code (uclaml/SPPO), as are 2048 new tokens (scripts/generate.sh).
    # Sampling is the paper's 1.0 / 1.0. Weights are bfloat16 with stochastic rounding
    # (engine/optim.py): rounded to the nearest, steps of 5e-7 would be lost.
    "mistral-7b": dict(
        rounds=3, samples=5, select="best-worst", eta=1000.0,
        optimizer="rmsprop", lr=5e-7, warmup=0.1, epochs=1, schedule_epochs=18, batch=64,
        micro_batch=1, temperature=1.0, top_p=1.0, max_new_tokens=2048, template="mistral",
        dtype="bfloat16", judge_dtype="bfloat16", recompute=True, cache_gb=48,
    ),
    # Llama-3-8B-Instruct, the paper's second experiment. Its model card says 6 epochs, of which one
    # was trained; 0.9 and 4096 are those of its evaluation (AlpacaEval's configs). The two stop
    # tokens are in generation_config.json.
    "llama-3-8b": dict(
        rounds=3, samples=5, select="best-worst", eta=1000.0,
        optimizer="rmsprop", lr=5e-7, warmup=0.1, epochs=1, schedule_epochs=6, batch=64,
        micro_batch=1, temperature=0.9, top_p=1.0, max_new_tokens=4096, template="chat",
        dtype="bfloat16", judge_dtype="bfloat16", recompute=True, cache_gb=48,
    ),
}  # fmt: skip


def command_line(description: str) -> argparse.ArgumentParser:
    """A parser with a flag for every setting of a run."""
    parser = Parser(
        description=description,
        argument_default=argparse.SUPPRESS,  # what was not given comes from the preset
    )
    parser.add_argument(
        "--preset", choices=PRESETS, help="settings to start from; flags override them"
    )
    add_flags(parser, TrainConfig)
    return parser


def make_config(flags: dict) -> TrainConfig:
    """Flags come before the preset, and the preset before the defaults of the dataclass."""
    preset = PRESETS.get(flags.pop("preset", None), {})
    return TrainConfig(**(preset | flags))


def parse_config(arguments: list[str] | None = None) -> TrainConfig:
    return make_config(vars(command_line(__doc__).parse_args(arguments)))


def check(config: TrainConfig) -> None:
    """Reject invalid or contradictory settings before anything is loaded."""
    for name in ("policy", "judge", "prompts", "out"):
        if not getattr(config, name):
            raise ValueError(f"--{name} is missing")
    check_settings(config, TrainConfig)

    # Its numbers end at 65,504, and a gradient of a sum over tokens is often larger.
    if config.dtype == "float16":
        raise ValueError("--dtype float16 is for inference; train in bfloat16 or float32")
    epochs = config.epochs
    if config.schedule_epochs is not None and config.schedule_epochs < epochs:
        found = f"--schedule-epochs is {config.schedule_epochs}"
        raise ValueError(f"{found}, expected at least --epochs {epochs}")
    if config.compare:
        check_compare(config)
    if config.loss in PAIR_LOSSES and (config.select, config.target) != ("best-worst", "sppo"):
        needs = "it goes with --select best-worst and no --target"
        raise ValueError(f"--loss {config.loss} compares winner and loser: {needs}")
    if config.target != "regularized" and (config.reference or config.reference_every):
        raise ValueError("--reference and --reference-every go with --target regularized")
    if config.reference and not Path(config.reference).is_dir():
        raise FileNotFoundError(f"--reference {config.reference}: no such folder")
    check_device(config.device)


def check_compare(config: TrainConfig) -> None:
    """Reject a --compare that cannot be, or that does not go with other settings."""
    K = config.samples
    m = config.compare
    if m >= K or (m % 2 and m < K - 1):
        raise ValueError(f"--compare is {m}, expected an even number below --samples {K}")
    # What is filled in serves the mean over all K, and not that over the K of π_{t-1}.
    if config.opponents or config.target == "optimistic":
        raise ValueError("--compare goes with neither --opponents nor --target optimistic")


# ------------------------------------------------------------------------ the game


class TextGame(Game):
    """Round `number` of a text policy: responses are texts, and the judge reads them.

    It is played by one process, or by several that share the prompts out (engine/distributed.py).
    """

    def __init__(self, config, policy, tokenizer, judge_model, number, opponents=None):
        self.config = config
        self.policy = policy
        self.tokenizer = tokenizer
        self.judge_model = judge_model
        self.number = number  # t, from 1
        self.opponents = opponents or {}  # prompt text -> response texts
        # Of the stage that is being played: its bar, if it has one, and what was done of it before.
        self.progress = None
        self.journal = NOTHING

    def __repr__(self) -> str:
        return f"TextGame(round {self.number} of {self.config.rounds}, {self.config.out})"

    def generator(self, stage: int) -> torch.Generator:
        """One for each stage of each round, so that a resumed run draws the same numbers."""
        sequence = np.random.SeedSequence([self.config.seed, self.number, stage])
        return torch.Generator().manual_seed(int(sequence.generate_state(1)[0]))

    def sample(self, prompts, stage=0):
        """N lists of K responses as token ids."""
        config = self.config
        ids = [prompt.ids for prompt in prompts]

        # Every process draws the seeds of all responses: its share is sampled as one process would.
        seeds = draw_seeds(len(prompts), config.samples, self.generator(stage))
        responses = generate(
            self.policy, distributed.my_share(ids), config.samples, config.max_new_tokens,
            self.tokenizer.stop, config.temperature, config.top_p, rows=config.pool,
            progress=self.progress, cache_bytes=config.cache_bytes,
            seeds=distributed.my_share(seeds), journal=self.journal,
        )  # fmt: skip
        return distributed.all_gather(responses)

    def judge(self, prompts, responses):
        """The judge's tables (N, K, K); with --opponents M outside responses come after the K."""
        pairs = distributed.my_share(self.pairs(len(prompts)))
        prompts = distributed.my_share(prompts)
        responses = distributed.my_share(responses)
        asked = [prompt.text for prompt in prompts]
        shown = [self.texts(*pair) for pair in zip(prompts, responses)]
        shown = [row + self.opponents.get(text, []) for text, row in zip(asked, shown)]

        question = self.judge_model, asked, shown, self.config.judge
        how = dict(progress=self.progress, journal=self.journal)
        if pairs:
            return torch.stack(distributed.all_gather(list(compare(*question, pairs, **how))))
        return torch.cat(distributed.all_gather(list(judge_in_batches(*question, **how))))

    def pairs(self, prompts: int) -> list[list[tuple[int, int]]]:
        """Which pairs the judge sees of each prompt, with --compare; drawn for all prompts, so that
        a process's share is what one process would ask.
        """
        config = self.config
        if not config.compare:
            return []
        generator = self.generator(stage=3)
        return [draw_pairs(config.samples, config.compare, generator) for _ in range(prompts)]

    def texts(self, prompt: Prompt, responses: list) -> list[str]:
        read = self.tokenizer.response_text
        return [read(prompt.ids, response, self.config.template) for response in responses]

    def logps(self, prompts, responses):
        """(b, S) log π(y|x) of b prompts and S responses each, in one forward pass."""
        logps = response_logps(self.policy, [prompt.ids for prompt in prompts], responses)
        if self.progress is not None:
            self.progress.update(len(prompts))
        return logps.view(len(prompts), -1).cpu()

    def tokens(self, prompt, responses):
        return len(prompt.ids) + sum(len(response) - 1 for response in responses)

    def previous(self, prompts, responses, win_rate):
        """Win rates (N, K) against as many responses of π_{t-1}; round 1 has none before it."""
        config = self.config
        if self.number == 1:
            return win_rate
        if config.reuse_prompts:
            path = round_folder(config.out, self.number - 1) / "responses.jsonl"
            vocabulary = self.policy.config.vocab_size
            earlier = read_responses(path, prompts, config.samples, vocabulary)
        else:  # that round saw other prompts, so its policy answers these now
            folder = policy_folder(config, self.number - 1)
            earlier = self.with_weights(folder, lambda: self.sample(prompts, stage=2))

        K = config.samples
        both = [new + old for new, old in zip(responses, earlier, strict=True)]
        rate = self.judge(prompts, both)[:, :K, K:].mean(-1)  # of (N, 2K, 2K), or 2K + M
        return centred(rate) if self.opponents else rate

    def reference(self, prompts, responses):
        """log μ(y|x) (N, S); μ is --reference, the first policy, or that of a later round."""
        config = self.config
        every = config.reference_every
        start = (
            (self.number - 1) // every * every + 1 if every else 1
        )  # the round that began with μ
        folder = policy_folder(config, start)
        if start == 1 and config.reference:
            folder = config.reference
        return self.with_weights(folder, lambda: self.score(prompts, responses, config))

    def with_weights(self, folder, compute):
        """compute() with the weights of another checkpoint: there is never a second model in
        memory.
        """
        load_weights(self.policy, folder)
        try:
            return compute()
        finally:
            load_weights(self.policy, policy_folder(self.config, self.number))

    # How the work is done: by several processes, if torchrun has started them.

    def share(self, indices):
        return distributed.my_share(indices)

    def gather(self, rows):
        return distributed.all_gather(rows)

    def parts(self, batch, data, config):
        # A process without a part of its own repeats the batch's first prompt, with weight 0.
        mine = micro_batches(self, data.prompts, data.responses, self.share(batch), config)
        return distributed.lock_step(mine, spare=batch[:1].tolist())

    def fit(self, data, config, generator, resume=None):
        # The generator is where it was in a fit that was never interrupted: no step draws from it.
        if self.config.lora:
            add_terms(self.policy, self.config.lora, generator)
        yield from super().fit(data, config, generator, resume)
        if self.config.lora:
            merge_terms(self.policy, generator)

    def optimizer(self, config, generator):
        trained = [one for one in self.policy.parameters() if one.requires_grad]
        if trained[0].dtype == torch.bfloat16:
            return rounding_optimizer(config.optimizer, self.policy, config.lr, generator)
        return super().optimizer(config, generator)


# ------------------------------------------------------------------------ the run


def load_prompts(config: TrainConfig, tokenizer: Tokenizer, context: int) -> list[list[Prompt]]:
    """The prompts of each round: all of them, or every T-th, so that each sees every kind."""
    T = config.rounds
    texts = read_prompts(config.prompts)
    room = (config.max_new_tokens, config.prompts, context, "policy's context of")
    prompts = prepare_prompts(texts, tokenizer, config.template, *room)
    if config.reuse_prompts:
        return [prompts] * T
    if len(prompts) < T:
        few = f"{len(prompts)} prompts are fewer than --rounds {T}"
        raise ValueError(f"{config.prompts}: {few}; add --reuse-prompts")
    return [prompts[t::T] for t in range(T)]


def load_opponents(config: TrainConfig, prompts: list[list[Prompt]]) -> dict[str, list[str]]:
    """{prompt text: outside responses} from --opponents, for all prompts of the run."""
    if not config.opponents:
        return {}
    texts = list(dict.fromkeys(prompt.text for part in prompts for prompt in part))
    return dict(zip(texts, outputs_for(config.opponents, texts)))


def load(config: TrainConfig) -> tuple:
    """(policy, tokenizer, judge, prompts of each round); refuses what does not fit together."""
    tokenizer = Tokenizer(config.policy)
    sizes = ModelConfig.from_json(Path(config.policy) / "config.json")
    tokenizer.check_vocabulary(sizes.vocab_size)

    # Prompts come before the weights, which take longer to load: what is wrong is said at once.
    prompts = load_prompts(config, tokenizer, sizes.max_position_embeddings)
    fewest = min(map(len, prompts))
    processes = distributed.world_size()
    if fewest < processes:
        few = f"{fewest} prompts a round are fewer than the {processes} processes"
        raise ValueError(f"{config.prompts}: {few}")

    policy = Transformer.from_pretrained(config.policy, config.dtype, config.device)
    policy.model.recompute = config.recompute
    judge = load_judge(config.judge, config.device, config.judge_dtype, config.judge_retries)
    return policy, tokenizer, judge, prompts


def claim_folder(config: TrainConfig) -> None:
    """Write config.json, or report what differs from the run that is there."""
    settings = asdict(config)
    settings.pop("out")  # a run does not say where it is

    def work():
        paths = ("policy", "prompts", "opponents", "reference")
        content = {name: fingerprint(getattr(config, name)) for name in paths}
        content["judge"] = judge_fingerprint(config.judge)
        # Where all rounds see the same prompts there may be more of them than at first.
        grows = ("rounds",) if config.reuse_prompts else ()
        claim(config.out, settings, TrainConfig, content, grows)

    distributed.on_main(work)


def run(config: TrainConfig) -> list[dict]:
    """Play all rounds of a run, or those that are missing. Returns the lines of metrics.jsonl."""
    check(config)
    distributed.start(config.device)
    policy, tokenizer, judge, prompts = load(config)
    opponents = load_opponents(config, prompts)

    # Before anything is sampled. A run that has judged everything can do without its judge.
    if not finished(round_folder(config.out, config.rounds) / "preferences.safetensors"):
        shortest = min(prompts[0], key=lambda prompt: len(prompt.ids))
        distributed.on_main(lambda: probe(judge, config.judge, shortest.text))
    claim_folder(config)

    out = Path(config.out)
    metrics = Metrics(out / "metrics.jsonl")
    threads = Threads(config.threads)
    drawn = time.monotonic()
    said = set()
    for number, part in enumerate(prompts, 1):
        start = time.monotonic()
        old = finished(round_folder(out, number) / "policy")

        # A stage that a stopped run has finished is read by the recorded game, and not played
        # again.
        game = TextGame(config, policy, tokenizer, judge, number, opponents)
        recorded = RecordedGame(game, metrics, threads)
        recorded = TracedGame(recorded) if config.trace else recorded
        result = sppo_round(recorded, part, config, game.generator(1))
        metrics.finish_round(number, result["steps"], summary(number, result, tokenizer.stop))

        if distributed.is_main():
            seconds = time.monotonic() - start
            cost = f"{seconds:.1f} s, {peak_memory(config.device):.2f} GB"
            print(describe(metrics.lines[-1], config), "(before)" if old else cost, flush=True)
            if config.trace:
                print(recorded.report(result, row_losses), end="\n\n", flush=True)
            said |= warn(metrics.lines[-1], result["steps"], said)

            # The rounds of a small world take less time than a figure.
            if number == config.rounds or time.monotonic() - drawn > 60:
                draw_curves(metrics.lines, out / "curves.png")
                drawn = time.monotonic()

    if distributed.is_main():
        print("finished already," if old else "finished,", written(config.out, config.rounds))
    distributed.stop()
    return metrics.lines


def summary(number: int, result: dict, stop: tuple) -> dict:
    """One line a round. The mean of the win rates is ½, so only their spread is informative."""
    responses = [response for row in result["responses"] for response in row]
    stopped = [response[-1] in stop for response in responses]
    return {
        "round": number,
        "best_win_rate": result["win_rate"].amax(-1).mean().item(),
        "worst_win_rate": result["win_rate"].amin(-1).mean().item(),
        "mean_squared_target": result["target"].pow(2).mean().item(),
        "first_loss": result["steps"][0]["loss"],
        "last_loss": result["steps"][-1]["loss"],
        "mean_tokens": sum(map(len, responses)) / len(responses),
        "stopped": sum(stopped) / len(stopped),
    }


def warn(row: dict, steps: list[dict], said: set) -> set:
    """Say what is odd about a round's numbers; returns of which kinds that is."""
    found = advice(row, steps)

    # Each kind once: what is wrong with one round is wrong with the next.
    for kind in found.keys() - said:
        print(f"warning: {found[kind]}", file=sys.stderr, flush=True)
    return set(found)


def describe(row: dict, config: TrainConfig) -> str:
    """The summary as the terminal shows it."""
    rates = f"win rates {row['worst_win_rate']:.3f} to {row['best_win_rate']:.3f}"
    losses = f"loss {row['first_loss']:.4g} -> {row['last_loss']:.4g}"
    tokens = f"{row['mean_tokens']:.1f} tokens"
    return f"round {row['round']}/{config.rounds}  {rates}  {losses}  {tokens} "


def main(arguments: list[str] | None = None) -> int:
    config = parse_config(arguments)
    continues = f"the same command continues after the last finished stage in {config.out}"

    def work():
        try:
            run(config)
        except RuntimeError as error:
            # gloo and NCCL raise this in processes that wait for one that was killed.
            if not distributed.lost(error):
                raise
            raise ConnectionError(f"another process of this run is gone; {continues}") from None

    # Of several processes the first one owns the folder.
    out = config.out if os.environ.get("RANK", "0") == "0" else None
    inputs = (config.policy, config.prompts, config.judge, config.opponents, config.reference)
    return exit_code("train.py", work, f"stopped; {continues}", out, inputs)


if __name__ == "__main__":
    sys.exit(main())
