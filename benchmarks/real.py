"""Ours beside transformers, TRL, peft and llama.cpp on a real chat model, SmolLM2-135M-Instruct, with real instructions.

    python -m real.smollm2 --out out/smollm2
    python benchmarks/real.py                      all stages, medians of 3: 28 minutes on two cores that do nothing else
    python benchmarks/real.py --quick              2 prompts, once: 5 minutes
    python benchmarks/real.py --only sample --prompts 64 --repeats 5    the other stages stay as they are in the files

Writes real.json and real.png into --out. ratio = theirs/ours of medians; above 1 is better for us. All sides have the same
weights, in float32 where nothing else is said, the same token ids of prompts of real/prompts.py in the model's chat template,
K = 5, at most 128 new tokens, one stop token, temperature 0.7 as in real/, and threads; they take turns. The slower sides need
minutes for 64 × 5 responses, so there are 12 prompts, and 8 pairs to fit; --prompts and --pairs change that.

  sample   Milliseconds a token. `generate` of transformers, and llama.cpp's server with a float32 GGUF file of these weights,
           all requests at once, its prompt cache on. The batch of the one and the slots of the other are the fastest of a few,
           tried on half of the prompts (`checks` has them). xllamacpp's wheel is built for AVX2. bfloat16: both are ours.
  fit      One epoch over pairs of responses that were sampled once, one optimizer step of sppo_hard and RMSProp; log π_t is in
           the time. Theirs: DPOTrainer, its reference a second model, as it comes (8 pairs at a time, gradient checkpointing
           on), and with 4 pairs and no checkpointing. Ours: --micro-tokens 1024, as in real/; `same micro-batches`: 4 pairs
           at a time, as they come.
  lora     The same with terms of rank 16 beside all linear layers. Theirs: peft, whose reference is the model without them.
  judge    Those responses, K of a prompt, scored by SmolLM2 with a scalar head. Theirs: AutoModelForSequenceClassification
           with the same head, batches of the fastest of a few sizes. Tokenization is in.
  round    sample, judge, fit one after the other, on 4 prompts: `sppo_round` against the parts above.
  memory   A process each, on 4 prompts: peak resident memory minus what was resident with the models loaded. Of llama.cpp: the
           peak of its server minus the size of the file.

`floor` is what no program on this machine goes below: see side_by_side.py.
"""

import argparse
import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, closing
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import llama  # noqa: E402
import side_by_side  # noqa: E402
import torch  # noqa: E402
from side_by_side import BETA, LR, MICRO_BATCH, Bench, K, compare_means, resident, timed  # noqa: E402

from data import Prompt, Tokenizer  # noqa: E402
from engine.command import Parser, exit_code  # noqa: E402
from engine.costs import causal_flops, on_meta  # noqa: E402
from engine.figures import new_figure, write_figure  # noqa: E402
from engine.files import read_json, write_json  # noqa: E402
from engine.lora import ALPHA  # noqa: E402
from engine.progress import tqdm  # noqa: E402
from generate import generate  # noqa: E402
from model import ModelConfig, Transformer  # noqa: E402
from prefmodel import PreferenceModel  # noqa: E402
from sppo import best_and_worst, sppo_round, win_rates  # noqa: E402
from train import PRESETS, TextGame  # noqa: E402

FULL = dict(repeats=3, prompts=12, longest=128, pairs=8, round=4, memory=4)
QUICK = dict(repeats=1, prompts=2, longest=32, pairs=2, round=2, memory=2)
TEMPERATURE, RANK = 0.7, 16
MICRO_TOKENS = PRESETS["smollm2"]["micro_tokens"]
AS_IT_COMES = dict(micro_batch=8, recompute=True)  # DPOConfig's defaults
BATCHES, SLOTS, READ = (2, 4, 8), (8, 16, 32), (4, 16, 64)  # prompts, requests and texts at a time, of which the fastest is taken

DRAW_PROMPTS = (
    "import json, sys; from real.prompts import draw_prompts; "
    "print(json.dumps(draw_prompts('training', *map(int, sys.argv[1:]))))"
)

# ------------------------------------------------------------------------------------------------ what all sides are given


class World:
    """The checkpoint in float32 as `policy` in a folder, prompts, and responses that were sampled once; a child finds them."""

    def __init__(self, folder, checkpoint, size, args):
        self.folder, self.policy = Path(folder), Path(folder) / "policy"
        self.size, self.args = size, args
        self.fastest = {}
        self.lengths = {}
        self.tokenizer = Tokenizer(checkpoint)
        if not self.policy.exists():
            self.write(checkpoint)
        given = read_json(self.folder / "given.json")
        self.texts, self.responses = given["texts"], given["responses"]
        self.ids = [self.tokenizer.prompt_ids(text, "chat") for text in self.texts]
        self.config = ModelConfig.from_json(self.policy / "config.json")
        self.pairs = [[ids, *rows[:2]] for ids, rows in zip(self.ids, self.responses)][: size["pairs"]]
        D = self.config.hidden_size
        self.head = torch.randn(1, D, generator=torch.Generator().manual_seed(1)) * D**-0.5

    def write(self, checkpoint):
        model = Transformer.from_pretrained(checkpoint, "float32")
        model.save_pretrained(self.policy)
        self.tokenizer.copy_to(self.policy)

        # In a process: benchmarks/ and real/ do not import each other.
        count = max(self.size["prompts"], self.size["pairs"])
        command = [sys.executable, "-c", DRAW_PROMPTS, str(count), str(self.args.seed)]
        texts = json.loads(subprocess.run(command, check=True, cwd=ROOT, capture_output=True).stdout)
        ids = [self.tokenizer.prompt_ids(text, "chat") for text in texts]
        how = dict(temperature=TEMPERATURE, generator=torch.Generator().manual_seed(self.args.seed))
        responses = generate(model, ids, K, self.size["longest"], self.tokenizer.eos, **how)
        write_json(self.folder / "given.json", {"texts": texts, "responses": responses})

    def cut(self, prompts):
        """Only so many prompts."""
        self.texts, self.ids, self.responses = (part[:prompts] for part in (self.texts, self.ids, self.responses))
        self.pairs = self.pairs[:prompts]
        return self

    def ours(self, dtype="float32"):
        return resident_copy(Transformer.from_pretrained(self.policy, dtype))

    def theirs(self):
        import peers

        return resident_copy(peers.load_policy(self.policy))

    def shown(self, responses):
        """Texts of N lists of responses."""
        return [[self.tokenizer.decode(row) for row in rows] for rows in responses]


def resident_copy(model):
    """Weights in memory, and not pages of a mapped file."""
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model


# ------------------------------------------------------------------------------------------------ sample


def sampling(world, name, work):
    """A side: milliseconds a token of work(prompts)."""

    def side(ids=world.ids[: world.size["prompts"]]):
        start = time.perf_counter()
        rows = [row for rows in work(ids) for row in rows]
        milliseconds = 1000 * (time.perf_counter() - start)
        world.lengths.setdefault(name, []).extend(map(len, rows))
        return milliseconds / sum(map(len, rows))

    return side


def our_sample(world, dtype="float32"):
    model, longest, stop = world.ours(dtype), world.size["longest"], world.tokenizer.eos
    how = dict(temperature=TEMPERATURE, generator=torch.Generator().manual_seed(1))
    return sampling(world, f"ours, {dtype}", lambda ids: generate(model, ids, K, longest, stop, **how))


def their_sample(world):
    import peers

    model, longest, stop = world.theirs(), world.size["longest"], world.tokenizer.eos
    torch.manual_seed(1)

    def work(together):
        return sampling(world, "transformers", lambda ids: peers.sample(model, ids, K, longest, stop, together, TEMPERATURE))

    name = "transformers, ms a token with so many prompts together"
    return work(fastest(world, name, BATCHES, lambda together: work(together)(half(world.ids))))


def llama_sample(world, stack):
    """As above, of a server that runs until the stack is closed."""
    path = world.folder / "policy.gguf"
    llama.write_gguf(world.policy, path)
    longest = world.size["longest"]
    positions = max(map(len, world.ids)) + longest

    def server(slots):
        return llama.Server(world.args.llama, path, slots, world.args.threads, positions)

    def side(running):
        return sampling(world, "llama.cpp", lambda ids: running.sample(ids, K, longest, TEMPERATURE))

    def tried(slots):
        with closing(server(slots)) as running:
            return side(running)(half(world.ids))

    slots = fastest(world, "llama.cpp, ms a token with so many slots", SLOTS, tried)
    running = stack.enter_context(closing(server(slots)))
    return side(running), lambda: (running.peak() - path.stat().st_size) / 1e9


def half(rows):
    return rows[: -(-len(rows) // 2)]


def fastest(world, name, candidates, cost):
    """The candidate of least cost; where memory is measured, and all prompts fit into one batch, the last."""
    if world.args.memory_of:
        return candidates[-1]
    world.fastest[name] = {candidate: cost(candidate) for candidate in candidates}
    return min(candidates, key=world.fastest[name].get)


def sample_floor(bench, ids, responses):
    seconds = side_by_side.sample_floor(bench, on_meta(Transformer, bench.world.config), ids, responses)
    return 1000 * seconds / sum(len(row) for rows in responses for row in rows)


# ------------------------------------------------------------------------------------------------ fit


def our_fit(world, **how):
    policy = world.ours()
    return lambda: timed(lambda: side_by_side.our_fit(policy, world.pairs, **how)) / len(world.pairs)


def trainer_of(world, model, pairs, micro_batch=MICRO_BATCH, **how):
    import peers

    return peers.make_trainer(model, world.folder / "trl", pairs, BETA, LR, micro_batch, **how)


def their_fit(world, rank=0, **how):
    import peers

    model = peers.with_terms(world.theirs(), rank, ALPHA) if rank else world.theirs()

    def work():
        trainer = trainer_of(world, model, world.pairs, **how)
        seconds = peers.train(trainer)
        if rank:
            model.delete_adapter("ref")  # DPOTrainer's copy of the first terms, which the next one makes anew
        return seconds / len(world.pairs)

    return work


def compare_lora(bench):
    """First loss, with terms that add nothing yet; each side draws its own, so gradients are only similar."""
    import peers

    world, pairs = bench.world, bench.world.pairs[:MICRO_BATCH]
    (step, *_), _ = side_by_side.our_fit(world.ours(), pairs, lora=RANK)
    model = peers.with_terms(world.theirs(), RANK, ALPHA)
    trainer = trainer_of(world, model, pairs)
    peers.train(trainer)
    line = next(line for line in trainer.state.log_history if "grad_norm" in line)
    bench.checks["LoRA, first loss"] = {"ours": step["loss"], "theirs": line["loss"]}
    bench.checks["LoRA, first gradient norm"] = {"ours": step["gradient_norm"], "theirs": float(line["grad_norm"])}


# ------------------------------------------------------------------------------------------------ judge and round


def our_judge(world):
    """SmolLM2 with a scalar head."""
    judge = PreferenceModel.from_backbone(world.policy, torch.Generator().manual_seed(0), template="chat", scalar=True, cyclic=0)
    judge.scalar_head.weight.data = world.head.clone()
    return resident_copy(judge)


def their_judge(world):
    import peers

    judge = peers.Classifier(world.policy, world.head.clone())
    resident_copy(judge.model)
    return judge


def our_reading(world):
    judge, texts, answers = our_judge(world), world.texts, world.shown(world.responses)
    return lambda: judge.preferences_many(texts, answers)


def their_reading(world):
    judge, texts, answers = their_judge(world), world.texts, world.shown(world.responses)

    def work(together):
        return lambda ids=world.ids: timed(lambda: judge.preferences_many(texts[: len(ids)], answers[: len(ids)], together))

    name = "judge of transformers, s with so many texts together"
    return work(fastest(world, name, READ, lambda together: work(together)(half(world.ids))))


def compare_judges(bench):
    world = bench.world
    texts, answers = world.texts[:2], world.shown(world.responses[:2])
    apart = our_judge(world).preferences_many(texts, answers) - their_judge(world).preferences_many(texts, answers, 4)
    bench.checks["preferences, largest difference"] = apart.abs().max().item()


def judge_floor(bench, ids, responses):
    """Seconds: a prompt once, its responses after it, and no logits."""
    model, config = on_meta(Transformer, bench.world.config), bench.world.config
    flops = sum(causal_flops(model, len(p)) for p in ids)
    flops += sum(causal_flops(model, len(p) + len(r), len(p)) for p, rows in zip(ids, responses) for r in rows)
    tokens = sum(map(len, ids)) + sum(len(r) for rows in responses for r in rows)
    return bench.floor(flops - 2 * config.hidden_size * config.vocab_size * tokens)


def our_round(world):
    N, policy, judge = world.size["round"], world.ours(), our_judge(world)
    prompts = [Prompt(*both) for both in zip(world.texts[:N], world.ids)]
    how = dict(batch=N, micro_tokens=MICRO_TOKENS, max_new_tokens=world.size["longest"], temperature=TEMPERATURE)
    config = side_by_side.settings(**how)

    def play():
        sppo_round(TextGame(config, policy, world.tokenizer, judge, 1), prompts, config, torch.Generator().manual_seed(0))

    return play


def their_round(world):
    """Building the trainer, which loads the reference model, is left out."""
    import peers

    N, model, judge = world.size["round"], world.theirs(), their_judge(world)
    texts, ids, stop = world.texts[:N], world.ids[:N], world.tokenizer.eos

    def play():
        start = time.perf_counter()
        responses = peers.sample(model, ids, K, world.size["longest"], stop, N, TEMPERATURE)
        rate = win_rates(judge.preferences_many(texts, world.shown(responses), 4))
        chosen = zip(*(indices.tolist() for indices in best_and_worst(rate)))
        pairs = [[p, rows[best], rows[worst]] for p, rows, (best, worst) in zip(ids, responses, chosen)]
        seconds = time.perf_counter() - start
        return seconds + peers.train(trainer_of(world, model, pairs))

    return play


# ------------------------------------------------------------------------------------------------ stages

# Of a stage: its sides, and its rows: (case, its name in the figure and in docs/benchmarks.md, ours, theirs, least ratio).
SIDES = {
    "sample": {"ours": our_sample, "bfloat16": lambda world: our_sample(world, "bfloat16"), "transformers": their_sample},
    "fit": {"ours": lambda world: our_fit(world, micro_tokens=MICRO_TOKENS), "as they come": our_fit,
            "TRL": their_fit, "TRL as it comes": lambda world: their_fit(world, **AS_IT_COMES)},
    "lora": {"ours": lambda world: our_fit(world, micro_tokens=MICRO_TOKENS, lora=RANK),
             "peft": lambda world: their_fit(world, RANK)},
    "judge": {"ours": our_reading, "transformers": their_reading},
    "round": {"ours": our_round, "theirs": their_round},
}  # fmt: skip
ROWS = {
    "sample": [
        ("transformers", "sample, against transformers", "ours", "transformers", 2.5),
        ("llama", "sample, against llama.cpp", "ours", "llama.cpp", 2.5),
        ("bfloat16", "sample, bfloat16 against our float32", "bfloat16", "ours", 1.4),
    ],
    "fit": [
        ("default", "fit, against DPOTrainer as it comes", "ours", "TRL as it comes", 2.5),
        ("DPOTrainer", "fit, 4 pairs at a time, no checkpointing", "ours", "TRL", None),
        ("same micro-batch", "fit, and the same micro-batches", "as they come", "TRL", 2.0),
    ],
    "lora": [("peft", "LoRA, against DPOTrainer and peft", "ours", "peft", 1.5)],
    "judge": [("transformers", "judge, against transformers", "ours", "transformers", None)],
    "round": [("round", "a round", "ours", "theirs", 2.5)],
}
MEMORY = {
    "sample": ("transformers", None), "fit": ("TRL", 3.0), "lora": ("peft", None), "judge": ("transformers", None),
    "round": ("theirs", None),
}  # fmt: skip
STAGES = [*ROWS, "memory"] if Path("/proc/self/clear_refs").exists() else list(ROWS)  # of Linux
UNITS = side_by_side.UNITS | {"s/pair": "seconds a pair"}
STAGE_UNITS = {"sample": "ms/token", "fit": "s/pair", "lora": "s/pair", "judge": "s", "round": "s"}


def floor_of(bench, stage):
    world = bench.world
    N = world.size["prompts"]
    if stage == "sample":
        return sample_floor(bench, world.ids[:N], world.responses[:N])
    if stage == "judge":
        return judge_floor(bench, world.ids, world.responses)
    if stage in ("fit", "lora"):  # without the gradients of the weights: three forward passes of four
        share = 1 if stage == "fit" else 3 / 4
        return share * side_by_side.fit_floor(bench, world.pairs) / len(world.pairs)

    ids, responses = world.ids[: world.size["round"]], world.responses[: world.size["round"]]
    sampled = sample_floor(bench, ids, responses) * sum(len(row) for rows in responses for row in rows) / 1000
    fitted = side_by_side.fit_floor(bench, [[p, *rows[:2]] for p, rows in zip(ids, responses)])
    return sampled + judge_floor(bench, ids, responses) + fitted


def play(bench, stage):
    """All rows of a stage, its sides in turn."""
    world = bench.world
    if stage == "fit":
        side_by_side.compare_fits(bench, world.policy, world.pairs[:MICRO_BATCH])
    elif stage == "lora":
        compare_lora(bench)
    elif stage == "judge":
        compare_judges(bench)

    with ExitStack() as stack:
        sides = {name: build(world) for name, build in SIDES[stage].items()}
        if stage == "sample":
            reason = no_llama(world.args.llama)
            if reason:
                bench.missing["sample, against llama.cpp"] = reason
            else:
                sides["llama.cpp"], llama_memory = llama_sample(world, stack)
        measured = dict(zip(sides, bench.measure(*sides.values())))
        floor = floor_of(bench, stage)
        for case, name, ours, theirs, required in ROWS[stage]:
            if theirs in measured:
                lowest = None if case == "bfloat16" else floor  # the machine's rate was measured in float32
                bench.add(stage, case, STAGE_UNITS[stage], measured[ours], measured[theirs], lowest)
                bench.rows[-1] |= {"name": name, "required": required, "prompts": world.size["prompts"]}
        if "llama.cpp" in sides:
            bench.checks["llama.cpp, peak memory beside the weights, GB"] = llama_memory()
    bench.checks |= world.fastest
    if stage == "sample":
        ours = world.lengths.pop("ours, float32")
        bench.checks |= {f"mean tokens, {name}": compare_means(ours, theirs) for name, theirs in world.lengths.items()}


def no_llama(python):
    """Why there is no llama.cpp; None if there is."""
    if find_spec("gguf") is None:
        return "the package gguf is missing"
    found = subprocess.run([python, "-c", "import xllamacpp"], capture_output=True)
    return f"{python} has no package xllamacpp" if found.returncode else None


def memory(bench):
    """Gigabytes above the loaded models, each side in a process of its own; once, as it hardly varies."""
    args = vars(bench.world.args)
    flags = [part for name in ("policy", "threads", "seed") for part in (f"--{name}", str(args[name]))]
    flags += [part for name in ("prompts", "pairs") for part in (f"--{name}", str(bench.size[name]))]

    def peak(stage, side):
        command = [sys.executable, __file__, "--memory-of", stage, side, str(bench.world.folder), *flags]
        output = subprocess.run(command + ["--quick"] * args["quick"], capture_output=True, text=True, cwd=ROOT)
        if output.returncode:
            raise OSError(f"the process that measures memory failed: {output.stderr[-500:]}")
        return float(output.stdout.split()[-1])

    for stage, (theirs, required) in MEMORY.items():
        peaks = bench.measure(lambda: peak(stage, "ours"), lambda: peak(stage, theirs), repeats=1)  # noqa: B023  called at once
        bench.add("memory", stage, "GB", *peaks)
        bench.rows[-1] |= {"name": f"peak memory, {stage}", "required": required}


def print_peak(args, size):
    stage, side, folder = args.memory_of
    world = World(folder, args.policy, size, args).cut(size["memory"])
    work = SIDES[stage][side](world)
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
    work()
    print((resident("VmHWM") - before) / 1e9)


# ------------------------------------------------------------------------------------------------ the report


def draw(result):
    """Ratios beside what was measured, a pair of panels for each unit."""
    named = [row | {"case": row["name"]} for row in result["rows"]]
    groups = {unit: [row for row in named if row["unit"] == unit][::-1] for unit in UNITS}
    groups = {unit: rows for unit, rows in groups.items() if rows}
    figure = new_figure(13, 1.5 + 0.8 * len(result["rows"]))
    heights = [len(rows) + 1 for rows in groups.values()]
    panels = figure.subplots(len(groups), 2, squeeze=False, sharey="row", height_ratios=heights)
    widest = max(row["ratio"] for row in result["rows"])
    for (ratio, times), (unit, rows) in zip(panels, groups.items()):
        side_by_side.draw_ratios(ratio, rows, 1.15 * widest)
        side_by_side.draw_times(times, rows, UNITS[unit])
    panels[0, 0].set_title("theirs / ours: ours is better above 1")
    panels[0, 1].set_title("measured: medians, and their ranges")
    for column in (0, 1):
        handles = side_by_side.labelled(panels[:, column])
        panels[0, column].legend(*handles, frameon=False, fontsize="small")
    return figure


def parse(arguments):
    parser = Parser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="2 prompts, one repeat")
    parser.add_argument("--only", nargs="+", choices=STAGES, default=list(STAGES), help="stages to run [all]")
    parser.add_argument("--policy", default="out/smollm2", help="folder of the chat model [out/smollm2]")
    parser.add_argument("--llama", default=sys.executable, help="python that has the package xllamacpp [this one]")
    parser.add_argument("--repeats", type=int, help="of each measurement [3; --quick: 1]")
    parser.add_argument("--prompts", type=int, help="to sample from [12; --quick: 2]")
    parser.add_argument("--pairs", type=int, help="to fit [8; --quick: 2]")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of all sides [all cores]")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default=ROOT / "benchmarks", help="folder for real.json and .png [benchmarks]")
    parser.add_argument("--memory-of", nargs=3, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def run(args):
    start = time.monotonic()
    size = QUICK if args.quick else FULL
    size = size | {name: getattr(args, name) or size[name] for name in ("repeats", "prompts", "pairs")}
    torch.set_num_threads(args.threads)
    if args.memory_of:
        return print_peak(args, size)
    if not (Path(args.policy) / "config.json").is_file():
        raise FileNotFoundError(f"--policy {args.policy}: not the folder of a model; python -m real.smollm2 makes out/smollm2")
    for name in ("transformers", "trl", "peft"):
        if find_spec(name) is None:
            raise ValueError(f"{name} is not installed; pip install -r requirements-dev.txt brings the peers")

    path = Path(args.out) / "real.json"
    kept = read_json(path) if path.is_file() and set(args.only) < set(STAGES) else {}  # what is not measured again stays
    others = [row for row in kept.get("rows", ()) if row["stage"] not in args.only]
    calls = sum(size["repeats"] * len(SIDES[name]) if name in SIDES else 2 * len(MEMORY) for name in args.only)
    with tempfile.TemporaryDirectory() as folder, tqdm(total=calls, unit="run") as progress:
        bench = Bench(World(folder, args.policy, size, args), size, progress)
        bench.missing = {} if "sample" in args.only else kept.get("not_measured", {})
        bench.machine["packages"]["peft"] = importlib.metadata.version("peft")
        for name in args.only:
            progress.set_description(name)
            memory(bench) if name == "memory" else play(bench, name)
            minutes = (time.monotonic() - start) / 60
            rows = sorted(others + bench.rows, key=lambda row: STAGES.index(row["stage"]))
            checks = kept.get("checks", {}) | bench.checks
            result = {
                "rows": rows, "not_measured": bench.missing, "machine": bench.machine, "checks": checks,
                "sizes": size, "temperature": TEMPERATURE, "scaling": [], "minutes": minutes,
            }  # fmt: skip
            write_json(path, result)  # after each stage, so that little is lost if it is stopped

    write_figure(Path(args.out) / "real.png", draw(result))
    side_by_side.print_table(result)
    for name, reason in bench.missing.items():
        print(f"{name}: not measured, {reason}")
    print(f"{args.threads} threads: {path}, .png, {minutes:.1f} minutes")


def main(arguments=None):
    args = parse(arguments)
    return exit_code("benchmarks/real.py", lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
