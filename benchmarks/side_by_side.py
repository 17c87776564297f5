"""Ours beside transformers and TRL: the same checkpoint, prompts, threads and float32, in one process, the sides in turn.

    python benchmarks/side_by_side.py              all stages, medians of 5: 23 minutes on two cores
    python benchmarks/side_by_side.py --quick      smaller and fewer: 5 minutes
    python benchmarks/side_by_side.py --only sample judge

Writes side_by_side.json and side_by_side.png into --out. ratio = theirs/ours of medians; above 1 is better for us.
The policy is a random Mistral of 55M parameters with the 32,000-token vocabulary, whose end token has a probability that
makes the mean response about a third of the longest. What is compared:

  sample   K = 5 responses to each prompt. Theirs: `generate` with num_return_sequences on left-padded batches of 16
           prompts, which on two cores is faster than all 64 at once, and about as fast as 4. `mixed`: responses end;
           `equal`: all run to the limit; `tiny`: mixed, a model of 0.4M parameters, where all is overhead.
  judge    K = 5 responses, all ordered pairs. Theirs: the same weights in DebertaV2Model, one pair at a time (as the SPPO
           authors' batch_size=1), and 32 at a time in input order. Tokenization is in. `preference-model`: ours is our
           PreferenceModel, and "theirs" is *our own* PairRM with a backbone of the same size.
  fit      One epoch over 64 pairs, most of them short (mean about 90 tokens, both responses) and the longest of 2 × 512;
           sppo_hard, RMSProp, one optimizer step. Theirs: DPOTrainer, 4 pairs at a time, gradient checkpointing off on both
           sides, with the entropies and accuracies that it always computes. Ours: --micro-tokens, with room for 4 pairs of
           average length, or the longest one. log π_t of all pairs is in the time of either side: TRL takes it from a second
           model in memory (`default`) or computes it before the first step (`precomputed`). Building models and trainers,
           and TRL's tokenization, are in neither. `same micro-batch`: ours with 4 pairs at a time, as they come, once,
           against `precomputed`. `memory`: a process each; peak resident memory of scoring and fitting the first 4 pairs
           minus what was resident with the policy loaded; `memory, recomputing`: gradient checkpointing on both sides.
  round    sample, judge, fit one after the other: `sppo_round` against generate, pair by pair and DPOTrainer as above.
  load     from_pretrained against safetensors' load_file and a copy into memory, as load_file alone only maps the file.
  import   `import train` against DPOTrainer and AutoModelForCausalLM, in fresh processes; first-token: up to a token.
  size     lines of Python and installed megabytes, torch and what torch needs left out on both sides.

`floor` is what no program on this machine goes below: counted operations over its measured matrix rate, or bytes of weights
over its measured bandwidth, whichever takes longer. Scaling: time against K, N, T and width; the exponent that is expected
is that of the counted operations over the same points.
"""

import argparse
import gc
import importlib.metadata
import json
import math
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import tokenizers  # noqa: E402
import torch  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

from data import Prompt, Tokenizer  # noqa: E402
from engine.command import Parser, exit_code  # noqa: E402
from engine.costs import causal_flops, multiplied, on_meta, pairrm_flops, parameters  # noqa: E402
from engine.figures import BLUE, GREY, ORANGE, error_bars, new_figure, slope, write_figure  # noqa: E402
from engine.files import write_json  # noqa: E402
from engine.progress import tqdm  # noqa: E402
from generate import generate  # noqa: E402
from judges.pairrm import FIXED, PairRM, PairRMConfig  # noqa: E402
from model import ModelConfig, Transformer, initialize  # noqa: E402
from prefmodel import PreferenceModel  # noqa: E402
from sppo import Regression, best_and_worst, sppo_round, win_rates  # noqa: E402
from train import TextGame, TrainConfig  # noqa: E402

K, BETA, LR, MICRO_BATCH, TOGETHER = 5, 1e-3, 5e-7, 4, 16
FULL = dict(repeats=5, prompts=64, longest=40, equal=16, pairs=64, pair=512, round=8, memory=4)
QUICK = dict(repeats=2, prompts=24, longest=32, equal=12, pairs=16, pair=256, round=4, memory=4)
REQUIRED = {  # ratios on two cores
    ("sample", "mixed"): 2.0, ("sample", "equal"): 1.0, ("sample", "tiny"): 3.0, ("judge", "pair-by-pair"): 1.5,
    ("judge", "batched"): 1.2, ("judge", "preference-model"): 4.0, ("fit", "default"): 1.5, ("fit", "precomputed"): 1.1,
    ("fit", "memory"): 2.0, ("round", "mixed"): 1.7, ("load", "load_file"): 0.83, ("import", "import"): 3.0,
}  # fmt: skip

# ------------------------------------------------------------------------------------------------ a world to measure in


def mistral(D, layers, wide, V):
    return ModelConfig(V, D, wide, layers, max(1, D // 64), max(1, D // 256), min(D, 64), 4096)


@torch.no_grad()
def ending_policy(config, longest, generator, share=1 / 3):
    """A random policy whose end token is about equally likely everywhere: share × longest tokens a response on average.

    Coordinate 0 of the residual stream is a constant that no layer writes to, and only the end token's logit reads it.
    """
    model = initialize(Transformer(config), generator)
    model.model.embed_tokens.weight[:, 0] = 0.25 * config.hidden_size**0.5
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight[0] = layer.mlp.down_proj.weight[0] = 0
    model.lm_head.weight[:, 0] = model.lm_head.weight[config.eos_token_id] = 0
    hidden = model.model(torch.randint(config.vocab_size, (4, 64), generator=generator))
    low, high = 1e-6, 1.0
    for _ in range(60):  # bisection: with probability p the mean is (1 - (1 - p)^longest)/p tokens
        p = (low * high) ** 0.5
        low, high = (p, high) if (1 - (1 - p) ** longest) / p > share * longest else (low, p)
    others = torch.logsumexp(model.head(hidden), -1).mean()
    model.lm_head.weight[config.eos_token_id, 0] = (others + math.log(p / (1 - p))) / hidden[..., 0].mean()
    return model


def stand_in(folder, size, special, single):
    """A tokenizer of made-up words, where there is no real one to be had; `special` are unknown, begin, end and others."""
    words = {word: i for i, word in enumerate([*special, *(f"w{i}" for i in range(size - len(special)))])}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token=special[0]))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens(special)
    ends = [(name, words[name]) for name in special[1:3]]
    backend.post_processor = tokenizers.processors.TemplateProcessing(single=single, special_tokens=ends)
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    names = dict(zip(("unk_token", "bos_token", "eos_token"), special), pad_token=special[0])
    write_json(folder / "tokenizer_config.json", names | {"tokenizer_class": "PreTrainedTokenizerFast"})
    return Tokenizer(folder)


class World:
    """Checkpoints on disk and what both sides read, all decided by a seed. `real` says which tokenizers are real."""

    def __init__(self, folder, size, args):
        self.folder = Path(folder)
        rng = random.Random(args.seed)
        generator = torch.Generator().manual_seed(args.seed)
        self.real = {name: Path(path).is_dir() for name, path in (("policy", args.tokenizer), ("judge", args.judge_tokenizer))}
        special = ["[UNK]", "[CLS]", "[SEP]", "<|source|>", "<|candidate1|>", "<|candidate2|>"]
        self.tokenizer, judging = (
            Tokenizer(path) if real else stand_in(self.folder / path.name, *parts)
            for path, real, parts in (
                (Path(args.tokenizer), self.real["policy"], (32000, ["<unk>", "<s>", "</s>"], "<s> $A")),
                (Path(args.judge_tokenizer), self.real["judge"], (8000, special, "[CLS] $A [SEP]")),
            )
        )

        def length(low, high, skew=1):
            return round(low * (high / low) ** rng.random() ** skew)

        syllables = [a + b for a in "bdfklmnprst" for b in ("a", "e", "in", "o", "ur")]
        words = ["".join(rng.choices(syllables, k=rng.randint(1, 3))) for _ in range(2000)]
        words = words if all(self.real.values()) else [f"w{i}" for i in range(2000)]
        texts = [" ".join(rng.choices(words, k=length(3, 24))) for _ in range(size["prompts"])]
        self.prompts = [Prompt(text, self.tokenizer.prompt_ids(text, "mistral")) for text in texts]
        self.answers = [[" ".join(rng.choices(words, k=length(2, 12))) for _ in range(K)] for _ in texts]
        half = size["pair"] // 2  # of a sequence: prompt, and response; most are short
        cuts = [[half] * 3] + [[length(4, half, 4) for _ in range(3)] for _ in range(size["pairs"] - 1)]
        self.pairs = [[[rng.randrange(3, 32000) for _ in range(cut)] for cut in lengths] for lengths in cuts]

        self.config, self.tiny_config = mistral(512, 8, 1408, 32000), mistral(64, 2, 192, 2048)
        for name, config in (("policy", self.config), ("tiny", self.tiny_config)):
            if not (self.folder / name).exists():  # a child process finds it there
                ending_policy(config, size["longest"], generator).save_pretrained(self.folder / name)
                self.tokenizer.copy_to(self.folder / name)
        vocabulary = judging.backend.get_vocab_size()
        marks = map(judging.backend.token_to_id, special[3:])
        self.pairrm_config = PairRMConfig(vocabulary, 192, 768, 3, 3, 256, 512, 1e-7, *marks)
        if not (self.folder / "judge").exists():
            save_pairrm(initialize(PairRM(self.pairrm_config), generator), self.folder / "judge", judging)
        self.preference_model = initialize(PreferenceModel(mistral(192, 3, 512, vocabulary)), generator)
        self.preference_model.tokenizer = judging
        tokens = [sum(len(prompt) + len(response) for response in both) for prompt, *both in self.pairs]
        widest = max(2 * (len(prompt) + max(map(len, both))) for prompt, *both in self.pairs)
        self.micro_tokens = max(MICRO_BATCH * sum(tokens) // len(tokens), widest)


def save_pairrm(judge, folder, tokenizer):
    """In the layout of llm-blender/PairRM-hf."""
    folder.mkdir(parents=True)
    save_file(judge.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})
    write_json(folder / "config.json", FIXED | {"pos_att_type": ["p2c", "c2p"]} | vars(judge.config))
    tokenizer.copy_to(folder)


# ------------------------------------------------------------------------------------------------ measuring


def timed(work):
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def machine():
    """What this machine can do, all threads: the best of a few matrix products and copies."""
    a, x = torch.randn(2048, 2048), torch.randn(2**26)
    y = torch.empty_like(x)
    return {
        "cores": os.cpu_count(), "threads": torch.get_num_threads(), "system": platform.platform(), "dtype": "float32",
        "flops": 2 * 2048**3 / min(timed(lambda: a @ a) for _ in range(10)),
        "bytes_per_second": 2 * x.nbytes / min(timed(lambda: y.copy_(x)) for _ in range(10)),
        "python": platform.python_version(),
        "packages": {name: importlib.metadata.version(name) for name in ("torch", "transformers", "trl", "safetensors")},
    }  # fmt: skip


class Bench:
    """What has been measured: `rows` of the table, `checks` that both sides do the same work, `curves` of scaling."""

    def __init__(self, world, size, progress=None, flags=()):
        self.world = world
        self.size = size
        self.machine = machine()
        self.flags = flags
        self.rows = []
        self.checks = {}
        self.curves = []
        self.progress = progress or tqdm(disable=True)

    def measure(self, *sides, repeats=None):
        """Each side so many times, in turn: a list of measurements a side. One is seconds, or the float that a side returns."""
        results = [[] for _ in sides]
        for _ in range(repeats or self.size["repeats"]):
            for side, result in zip(sides, results):
                gc.collect()
                start = time.perf_counter()
                output = side()
                result.append(output if isinstance(output, float) else time.perf_counter() - start)
                self.progress.update()
        return results

    def add(self, stage, case, unit, ours, theirs, floor=None):
        """A row, from two lists of measurements of which less is better."""
        mine = statistics.median(ours)
        other = statistics.median(theirs)
        required = REQUIRED.get((stage, case))
        spans = {"ours_range": [min(ours), max(ours)], "theirs_range": [min(theirs), max(theirs)], "repeats": len(ours)}
        row = dict(stage=stage, case=case, unit=unit, ours=mine, theirs=other, ratio=other / mine, required=required, floor=floor)
        self.rows.append(row | spans)

    def floor(self, flops, size=0):
        """Seconds that so many operations, or bytes, take at least."""
        return max(flops / self.machine["flops"], size / self.machine["bytes_per_second"])

    def curve(self, letter, label, what, points, work, operations):
        """Seconds of work(point), the least of three, and their exponent next to that of the counted operations."""
        points = list(points)
        seconds = [min(timed(lambda: work(point)) for _ in range(3)) for point in points]  # noqa: B023  called at once
        self.progress.update(len(points))
        exponents = {"exponent": slope(points, seconds), "expected": slope(points, [operations(point) for point in points])}
        self.curves.append(dict(against=letter, label=label, what=what, points=points, seconds=seconds) | exponents)


# ------------------------------------------------------------------------------------------------ sample


def sample(bench):
    longest, stop = bench.size["longest"], bench.world.tokenizer.eos
    sample_case(bench, "mixed", "policy", longest, stop)
    sample_case(bench, "equal", "policy", bench.size["equal"], None)
    sample_case(bench, "tiny", "tiny", longest, stop)


def sample_case(bench, case, name, longest, stop):
    import peers

    folder = bench.world.folder / name
    ours, theirs = Transformer.from_pretrained(folder), peers.load_policy(folder)
    prompts = [[token % ours.config.vocab_size for token in prompt.ids] for prompt in bench.world.prompts]
    generator, lengths, last = torch.Generator().manual_seed(1), ([], []), []

    def side(which, work):
        """Milliseconds per sampled token."""
        start = time.perf_counter()
        last[:] = work()
        seconds, tokens = time.perf_counter() - start, [len(row) for rows in last for row in rows]
        lengths[which].extend(tokens)
        return 1000 * seconds / sum(tokens)

    times = bench.measure(
        lambda: side(0, lambda: generate(ours, prompts, K, longest, stop, generator=generator)),
        lambda: side(1, lambda: peers.sample(theirs, prompts, K, longest, stop, TOGETHER)),
    )
    tokens = sum(len(row) for rows in last for row in rows)
    bench.add("sample", case, "ms/token", *times, 1000 * sample_floor(bench, ours, prompts, last) / tokens)
    bench.checks[f"mean tokens, {case}"] = compare_means(*lengths)


def sample_floor(bench, model, prompts, responses):
    """Seconds: prompts once, responses token by token, the weights read once for each token of the longest response."""
    flops = sum(causal_flops(model, len(prompt)) for prompt in prompts)
    flops += sum(causal_flops(model, len(p) + len(r), len(p)) for p, rows in zip(prompts, responses) for r in rows)
    return bench.floor(flops, 4 * multiplied(model) * max(len(r) for rows in responses for r in rows))


def compare_means(ours, theirs):
    """Means of two samples, and how many standard errors they are apart."""
    a, b = (torch.tensor(numbers, dtype=torch.float64) for numbers in (ours, theirs))
    error = (a.var() / len(a) + b.var() / len(b)).sqrt().item()
    return {"ours": a.mean().item(), "theirs": b.mean().item(), "standard_errors": (a.mean() - b.mean()).item() / (error or 1)}


# ------------------------------------------------------------------------------------------------ judge


def judge(bench):
    import peers

    world, reader = bench.world, bench.world.preference_model
    prompts, answers = [prompt.text for prompt in world.prompts], world.answers
    ours = PairRM.from_pretrained(world.folder / "judge")
    theirs = peers.CrossEncoder(world.folder / "judge")
    difference = ours.logits_many(prompts[:8], answers[:8]) - theirs.logits_many(prompts[:8], answers[:8], 32)
    bench.checks["PairRM logits, largest difference"] = difference.abs().max().item()
    read, pairs, single, batched = bench.measure(
        lambda: reader.preferences_many(prompts, answers),
        lambda: ours.preferences_many(prompts, answers),
        lambda: theirs.logits_many(prompts, answers, 1),
        lambda: theirs.logits_many(prompts, answers, 32),
    )
    floor = judge_floor(bench, ours, prompts, answers)
    bench.add("judge", "pair-by-pair", "s", pairs, single, floor)
    bench.add("judge", "batched", "s", pairs, batched, floor)
    lengths = [len(reader.tokenizer.judged_ids(p, a, "plain")) for p, row in zip(prompts, answers) for a in row]
    bench.add("judge", "preference-model", "s", read, pairs, bench.floor(sum(causal_flops(reader, T) for T in lengths)))


def judge_floor(bench, pairrm, prompts, answers):
    lengths = [len(pairrm.pair_ids(p, a, b)) for p, row in zip(prompts, answers) for a in row for b in row if a is not b]
    return bench.floor(sum(pairrm_flops(pairrm, T) for T in lengths))


# ------------------------------------------------------------------------------------------------ fit


def settings(**changes):
    """Ours as TRL is set: hard labels, no warm-up."""
    return TrainConfig(loss="sppo-hard", eta=1 / BETA, lr=LR, warmup=0.0, samples=K, micro_batch=MICRO_BATCH, **changes)


def our_fit(policy, pairs, **changes):
    """Score, then fit: the numbers of the optimizer steps, and log π_t (N, 2)."""
    config = settings(batch=len(pairs), **changes)
    game = TextGame(config, policy, None, None, 1)
    prompts = [Prompt("", prompt) for prompt, *_ in pairs]
    responses = [both for _, *both in pairs]
    logp = game.score(prompts, responses, config)
    data = Regression(prompts, responses, logp, torch.zeros_like(logp))
    return list(game.fit(data, config, torch.Generator().manual_seed(0))), logp


def their_trainer(bench, model, pairs, **how):
    import peers

    return peers.make_trainer(model, bench.world.folder / "trl", pairs, BETA, LR, MICRO_BATCH, **how)


def fit_floor(bench, pairs):
    """Seconds: a scoring pass, a forward and twice a forward backwards, a prompt once for both responses, the head on responses
    only; weights once a pass.
    """
    config, model = bench.world.config, on_meta(Transformer, bench.world.config)
    head = 2 * config.hidden_size * config.vocab_size
    prompts = sum(causal_flops(model, len(p)) - head * len(p) for p, *_ in pairs)
    flops = prompts + sum(causal_flops(model, len(p) + len(r), len(p)) for p, *both in pairs for r in both)
    return bench.floor(4 * flops, 4 * 4 * parameters(model))


def fit_stage(bench):
    import peers

    folder, pairs = bench.world.folder / "policy", bench.world.pairs
    policy, tokens = Transformer.from_pretrained(folder), bench.world.micro_tokens
    compare_fits(bench, folder, pairs[: 2 * MICRO_BATCH])

    def theirs(**how):
        return peers.train(their_trainer(bench, peers.load_policy(folder), pairs, **how))

    times = bench.measure(lambda: our_fit(policy, pairs, micro_tokens=tokens), theirs, lambda: theirs(precompute=True))
    times += bench.measure(lambda: our_fit(policy, pairs), repeats=1)
    ours, default, precomputed, same = ([1000 * seconds / len(pairs) for seconds in side] for side in times)
    floor = 1000 * fit_floor(bench, pairs) / len(pairs)
    bench.add("fit", "default", "ms/pair", ours, default, floor)
    bench.add("fit", "precomputed", "ms/pair", ours, precomputed, floor)
    bench.add("fit", "same micro-batch", "ms/pair", same, precomputed, floor)
    if Path("/proc/self/clear_refs").exists():  # Linux
        memory(bench, "memory")
        memory(bench, "memory, recomputing", "--recompute")


def compare_fits(bench, folder, pairs):
    """First loss, first gradient norm and log π_t of a few pairs on both sides."""
    import peers

    (step, *_), logp = our_fit(Transformer.from_pretrained(folder), pairs)
    trainer = their_trainer(bench, peers.load_policy(folder), pairs, precompute=True)
    reference = [[row["ref_chosen_logps"], row["ref_rejected_logps"]] for row in trainer.train_dataset]
    peers.train(trainer)
    line = next(line for line in trainer.state.log_history if "grad_norm" in line)
    bench.checks["log π_t, largest difference in nats"] = (logp - torch.tensor(reference)).abs().max().item()
    bench.checks["first loss"] = {"ours": step["loss"], "theirs": line["loss"]}
    bench.checks["first gradient norm"] = {"ours": step["gradient_norm"], "theirs": float(line["grad_norm"])}


def memory(bench, case, *flags):
    """Gigabytes above the loaded policy, each side in a process of its own; once, as it hardly varies."""

    def peak(side):
        command = [sys.executable, __file__, "--memory-of", side, str(bench.world.folder), *bench.flags, *flags]
        output = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        if output.returncode:
            raise OSError(f"the process that measures memory failed: {output.stderr[-500:]}")
        return float(output.stdout.split()[-1])

    bench.add("fit", case, "GB", *bench.measure(lambda: peak("ours"), lambda: peak("theirs"), repeats=1))


def memory_of(side, world, size, recompute):
    """Print the peak of one side's fit, in gigabytes above what is resident with the policy loaded."""
    pairs, folder = world.pairs[: size["memory"]], world.folder / "policy"
    if side == "ours":
        policy = Transformer.from_pretrained(folder)
        policy.model.recompute = recompute
    else:
        import peers

        policy = peers.load_policy(folder)
    for parameter in policy.parameters():
        parameter.data = parameter.data.clone()  # resident, and no page of a mapped file
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
    if side == "ours":
        our_fit(policy, pairs, micro_tokens=world.micro_tokens)
    else:
        peers.train(peers.make_trainer(policy, world.folder / "trl", pairs, BETA, LR, MICRO_BATCH, recompute=recompute))
    print((resident("VmHWM") - before) / 1e9)


def resident(key):
    """Bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(key)).split()[1])


# ------------------------------------------------------------------------------------------------ round


def round_stage(bench):
    import peers

    world, longest, folder = bench.world, bench.size["longest"], bench.world.folder
    prompts, stop = world.prompts[: bench.size["round"]], world.tokenizer.eos
    ids, asked = [prompt.ids for prompt in prompts], [prompt.text for prompt in prompts]
    policy = Transformer.from_pretrained(folder / "policy")
    pairrm = PairRM.from_pretrained(folder / "judge")
    cross_encoder, last = peers.CrossEncoder(folder / "judge"), {}

    def texts(responses):
        return [[world.tokenizer.response_text(p, row, "mistral") for row in rows] for p, rows in zip(ids, responses)]

    def ours():
        config = settings(batch=len(prompts), micro_tokens=world.micro_tokens, max_new_tokens=longest)
        game = TextGame(config, policy, world.tokenizer, pairrm, 1)
        last["responses"] = sppo_round(game, prompts, config, torch.Generator().manual_seed(0))["responses"]

    def theirs():
        """Seconds; building the trainer, which loads the reference model, is left out."""
        model = peers.load_policy(folder / "policy")
        start = time.perf_counter()
        responses = peers.sample(model, ids, K, longest, stop, TOGETHER)
        rate = win_rates(PairRM.both_orders(cross_encoder.logits_many(asked, texts(responses), 1)))
        chosen = zip(*(indices.tolist() for indices in best_and_worst(rate)))
        last["pairs"] = [[p, rows[best], rows[worst]] for p, rows, (best, worst) in zip(ids, responses, chosen)]
        seconds = time.perf_counter() - start
        return seconds + peers.train(their_trainer(bench, model, last["pairs"]))

    times = bench.measure(ours, theirs)
    floor = sample_floor(bench, policy, ids, last["responses"])
    floor += judge_floor(bench, pairrm, asked, texts(last["responses"]))
    bench.add("round", "mixed", "s", *times, floor + fit_floor(bench, last["pairs"]))


# ------------------------------------------------------------------------------------------------ start-up and size

PROGRAMS = {  # ours, theirs
    "import": ("import train", "from transformers import AutoModelForCausalLM; from trl import DPOTrainer"),
    "first-token": (
        "from generate import generate; from model import Transformer; "
        "generate(Transformer.from_pretrained({!r}), [[1, 5]], 1, 1, None)",
        "import torch; from transformers import AutoModelForCausalLM as A; "
        "A.from_pretrained({!r}).generate(torch.tensor([[1, 5]]), max_new_tokens=1, do_sample=True)",
    ),
}  # fmt: skip


def start_up(bench):
    folder, environment = bench.world.folder, os.environ | {"HF_HUB_OFFLINE": "1"}

    def fresh(program):
        command = [sys.executable, "-c", program.format(str(folder / "tiny"))]
        return lambda: subprocess.run(command, check=True, cwd=ROOT, env=environment, capture_output=True)

    for stage, programs in PROGRAMS.items():
        bench.add(stage, stage, "s", *bench.measure(*map(fresh, programs)))
    path = folder / "policy/model.safetensors"
    times = bench.measure(
        lambda: Transformer.from_pretrained(path.parent), lambda: [tensor.clone() for tensor in load_file(path).values()]
    )
    bench.add("load", "load_file", "s", *times, bench.floor(0, 2 * path.stat().st_size))
    theirs = [file.locate() for name in ("transformers", "trl", "accelerate", "datasets")
              for file in importlib.metadata.files(name) if file.suffix == ".py"]  # fmt: skip
    ours = [path for room in (".", "engine", "judges", "evaluate") for path in (ROOT / room).glob("*.py")]
    lines = ([sum(path.read_bytes().count(b"\n") for path in paths)] for paths in (ours, theirs))
    bench.add("size", "lines of Python", "lines", *lines)
    bench.add("size", "installed", "MB", *([size] for size in installed()))


def installed():
    """Megabytes of the packages that either stack needs and torch alone would not: ours, theirs."""
    from packaging.requirements import Requirement

    def closure(names):
        found, todo = set(), list(names)
        while todo:
            if (name := todo.pop().lower().replace("_", "-")) not in found:
                found.add(name)
                needs = map(Requirement, importlib.metadata.requires(name) or ())
                todo += [need.name for need in needs if need.marker is None or need.marker.evaluate({"extra": ""})]
        return found

    lines = (ROOT / "requirements.txt").read_text().splitlines()
    ours = [Requirement(line).name for line in lines if line[:1].isalpha()]
    theirs = ["transformers", "trl"]
    return [sum(file.size or 0 for name in closure(names) - closure(["torch"]) for file in importlib.metadata.files(name)) / 1e6
            for names in (ours, theirs)]  # fmt: skip


# ------------------------------------------------------------------------------------------------ scaling


def scaling(bench):
    """Time against K, N, T and width, of small models."""
    world, generator = bench.world, torch.Generator().manual_seed(0)
    prompts, answers = [p.text for p in world.prompts[:4]], [rows[0] for rows in world.answers[:4]]
    pairrm = PairRM.from_pretrained(world.folder / "judge")
    tiny = Transformer.from_pretrained(world.folder / "tiny")
    ids = [[token % 2048 for token in prompt.ids] for prompt in world.prompts] * 4

    def judged(judge):
        return lambda k: judge.preferences_many(prompts, [[answer] * k for answer in answers])

    def backward(model, T):
        model.model(torch.ones(1, T, dtype=torch.long)).pow(2).mean().backward()

    wide = {D: initialize(Transformer(mistral(D, 2, 3 * D, 64)), generator) for D in (256, 512, 1024, 2048)}
    curve, network = bench.curve, "forward and backward"
    curve("K", "responses per prompt K", "PairRM", (2, 4, 8, 16), judged(pairrm), lambda k: k * (k - 1))
    curve("K", "responses per prompt K", "PreferenceModel", (4, 8, 16, 32), judged(world.preference_model), lambda k: k)
    curve("N", "prompts N", "generate, 64 rows at a time", (16, 32, 64, 128),
          lambda n: generate(tiny, ids[:n], K, 16, None, generator=generator, rows=64), lambda n: n)  # fmt: skip
    curve("T", "tokens T", network, (512, 1024, 2048, 4096), lambda T: backward(wide[256], T),
          lambda T: causal_flops(wide[256], T))  # fmt: skip
    curve("width", "width D", network, wide, lambda D: backward(wide[D], 256), lambda D: causal_flops(wide[D], 256))


# ------------------------------------------------------------------------------------------------ the report

# The functions, and how many measurements a repeat has, for the bar.
STAGES = {"start": (start_up, 6), "sample": (sample, 6), "judge": (judge, 4), "fit": (fit_stage, 3), "round": (round_stage, 2),
          "scaling": (scaling, 0)}  # fmt: skip


def print_table(result):
    head = ("stage", "case", "unit", "ours", "theirs", "ratio", "required", "floor")
    line = "{:12}{:20}{:9}{:>29}{:>29}{:>8}{:>11}{:>9}".format
    print("\n" + line(*head))
    for row in result["rows"]:
        spans = [f"{row[side]:.3g} [{row[f'{side}_range'][0]:.3g}, {row[f'{side}_range'][1]:.3g}]" for side in ("ours", "theirs")]
        required, floor = row["required"], "" if row["floor"] is None else f"{row['floor']:.3g}"
        mark = "" if required is None else f"{required} {'yes' if row['ratio'] >= required else 'NO'}"
        print(line(row["stage"], row["case"], row["unit"], *spans, f"{row['ratio']:.2f}", mark, floor))
    for curve in result["scaling"]:
        title = f"time against {curve['against']}, {curve['what']}"
        print(f"{title}: exponent {curve['exponent']:.2f}, expected {curve['expected']:.2f}")
    for name, value in result["checks"].items():
        print(f"check: {name}: {json.dumps(value)}")


NAMES = {  # of the rows, here and in docs/side-by-side.md
    ("import", "import"): "import, a fresh process",
    ("first-token", "first-token"): "a fresh process up to its first token",
    ("load", "load_file"): "load, against load_file of safetensors",
    ("sample", "mixed"): "sample, responses of mixed lengths",
    ("sample", "equal"): "sample, responses of equal lengths",
    ("sample", "tiny"): "sample, mixed lengths, a tiny model",
    ("judge", "pair-by-pair"): "judge, PairRM pair by pair, K = 5",
    ("judge", "batched"): "judge, PairRM in batches of 32",
    ("judge", "preference-model"): "judge, PreferenceModel against our PairRM",
    ("fit", "default"): "fit, against DPOTrainer",
    ("fit", "precomputed"): "fit, with precomputed reference",
    ("fit", "same micro-batch"): "fit, and the same micro-batches",
    ("fit", "memory"): "fit, peak memory above the weights",
    ("fit", "memory, recomputing"): "fit, peak memory, recomputing",
    ("round", "mixed"): "a round",
}
UNITS = {"s": "seconds", "ms/token": "ms a token", "ms/pair": "ms a pair", "GB": "GB"}


def draw(result):
    """Above: ratios beside what was measured, a pair of panels for each unit; below: how ours grow."""
    figure = new_figure(13, 14)
    top, bottom = figure.subfigures(2, 1, height_ratios=(2.6, 1))
    groups = {unit: [row for row in result["rows"] if row["unit"] == unit][::-1] for unit in UNITS}
    groups = {unit: rows for unit, rows in groups.items() if rows}

    if groups:
        # As much height as its rows need, and the same for the axis of each.
        heights = [len(rows) + 1 for rows in groups.values()]
        panels = top.subplots(len(groups), 2, squeeze=False, sharey="row", height_ratios=heights)
        widest = max(row["ratio"] for rows in groups.values() for row in rows)
        for (ratio, times), (unit, rows) in zip(panels, groups.items()):
            draw_ratios(ratio, rows, 1.15 * widest)
            draw_times(times, rows, UNITS[unit])
        panels[0, 0].set_title("theirs / ours: ours is better above 1")
        panels[0, 1].set_title("measured: medians, and their ranges")
        panels[0, 0].legend(*labelled(panels[:, 0]), frameon=False, fontsize="small")
        panels[0, 1].legend(*labelled(panels[:, 1]), frameon=False, fontsize="small")

    for axis, letter in zip(bottom.subplots(1, 4), ("K", "N", "T", "width")):
        draw_scaling(axis, letter, [curve for curve in result["scaling"] if curve["against"] == letter])
    return figure


def draw_ratios(axis, rows, widest):
    places = range(len(rows))
    axis.barh(places, [row["ratio"] for row in rows], color=BLUE, height=0.6)
    for place, row in zip(places, rows):
        axis.text(row["ratio"], place, f" {row['ratio']:.2f}", va="center", fontsize="small")
    required = [(row["required"], place) for place, row in zip(places, rows) if row["required"]]
    if required:
        axis.plot(*zip(*required), "|", color=ORANGE, markersize=16, markeredgewidth=3, label="required")
    axis.axvline(1, color=GREY, linewidth=0.8)
    axis.set(xlim=(0, widest), xlabel="theirs / ours")
    axis.set_yticks(places, [NAMES.get((row["stage"], row["case"]), row["case"]) for row in rows])


def draw_times(axis, rows, unit):
    """Bars from 0, in one unit; the floor is what counted operations or bytes take at the machine's measured rate."""
    widest = max(row[side] for row in rows for side in ("ours", "theirs"))
    for side, color, shift in (("ours", BLUE, 0.2), ("theirs", ORANGE, -0.2)):
        places = [place + shift for place in range(len(rows))]
        middle = [row[side] for row in rows]
        reach = error_bars(middle, [row[f"{side}_range"] for row in rows])
        axis.barh(places, middle, xerr=reach, color=color, height=0.38, label=side, error_kw=dict(ecolor=GREY))
        for place, row, far in zip(places, rows, reach[1]):
            axis.text(row[side] + far, place, f" {row[side]:.3g}", va="center", fontsize="small")
    floors = [(row["floor"], place) for place, row in enumerate(rows) if row["floor"]]
    if floors:
        axis.plot(*zip(*floors), "|", color="black", markersize=16, markeredgewidth=2, label="floor of this machine")
    axis.set(xlim=(0, 1.2 * widest), xlabel=unit)


def labelled(panels):
    """Handles and labels of the first of each name."""
    found = {label: handle for axis in panels for handle, label in zip(*axis.get_legend_handles_labels())}
    return found.values(), found.keys()


def draw_scaling(axis, letter, curves):
    for curve, color in zip(curves, (BLUE, ORANGE)):
        points, seconds = curve["points"], curve["seconds"]
        label = f"{curve['what']}\nexponent {curve['exponent']:.2f}, expected {curve['expected']:.2f} (dashes)"
        axis.loglog(points, seconds, "o-", color=color, label=label)
        axis.loglog(points, [seconds[-1] * (x / points[-1]) ** curve["expected"] for x in points], "--", color=color, lw=0.8)
        axis.set(xlabel=curve["label"], ylabel="seconds", title=f"Our time against {letter}")
        axis.legend(frameon=False, fontsize="x-small", loc="upper left")
    ticks = sorted({point for curve in curves for point in curve["points"]})
    axis.set_xticks(ticks, map(str, ticks))
    axis.minorticks_off()
    axis.margins(y=0.4)


def parse(arguments):
    parser = Parser(description=__doc__)
    shared = ROOT.parent / "shared/data"
    parser.add_argument("--quick", action="store_true", help="smaller sizes and two repeats, 5 minutes")
    parser.add_argument("--only", nargs="+", choices=STAGES, default=list(STAGES), help="stages to run [all]")
    parser.add_argument("--repeats", type=int, help="of each measurement [5; --quick: 2]")
    parser.add_argument("--tokenizer", default=shared / "tokenizer-mistral-v1", help="32,000 tokens; absent: made-up words")
    parser.add_argument("--judge-tokenizer", default=shared / "pairrm/tiny", help="of a PairRM; absent: made-up words")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of torch, on both sides [all cores]")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default=ROOT / "benchmarks", help="folder for side_by_side.json and .png [benchmarks]")
    parser.add_argument("--memory-of", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--recompute", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def run(args):
    start, size = time.monotonic(), QUICK if args.quick else FULL
    size = size | {"repeats": args.repeats or size["repeats"]}
    torch.set_num_threads(args.threads)
    if args.memory_of:
        return memory_of(args.memory_of[0], World(args.memory_of[1], size, args), size, args.recompute)
    for name in ("transformers", "trl"):
        try:
            importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            raise ValueError(f"{name} is not installed; pip install -r requirements-dev.txt brings the peers") from None
    calls = sum(size["repeats"] * STAGES[name][1] + 20 * (name == "scaling") + 5 * (name == "fit") for name in args.only)
    flags = [*["--quick"] * args.quick, *(part for name in ("seed", "threads", "tokenizer", "judge_tokenizer")
                                          for part in (f"--{name.replace('_', '-')}", str(vars(args)[name])))]  # fmt: skip
    with tempfile.TemporaryDirectory() as folder, tqdm(total=calls, unit="run") as progress:
        world = World(folder, size, args)
        bench = Bench(world, size, progress, flags)
        out = Path(args.out)
        shapes = {"policy": world.config, "tiny": world.tiny_config}
        counts = {name: parameters(on_meta(Transformer, config)) for name, config in shapes.items()}
        for name in args.only:
            progress.set_description(name)
            STAGES[name][0](bench)
            minutes = (time.monotonic() - start) / 60
            result = {
                "rows": bench.rows, "machine": bench.machine, "checks": bench.checks, "scaling": bench.curves,
                "parameters": counts, "sizes": size | {"micro_tokens": world.micro_tokens}, "real_tokenizers": world.real,
                "minutes": minutes,
            }  # fmt: skip
            write_json(out / "side_by_side.json", result)  # after each stage, so that little is lost if it is stopped
    write_figure(out / "side_by_side.png", draw(result))
    print_table(result)
    for name, real in world.real.items():
        print("" if real else f"No tokenizer of the {name} was found: random ids and made-up words were used. ", end="")
    print(f"\n{args.threads} threads, {counts['policy']:,} parameters: {out / 'side_by_side.json'}, .png, {minutes:.1f} minutes")


def main(arguments=None):
    args = parse(arguments)
    return exit_code("benchmarks/side_by_side.py", lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
