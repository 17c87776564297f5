"""One GPU, the 7B shape: how fast it saves, loads, judges, samples, scores and fits, and the memory that each needs.

    python benchmarks/gpu.py --results                    one GPU of 78 GiB or more, under ten minutes, 15 GB of disk
    python benchmarks/gpu.py --shape tiny --device cpu    the same path in seconds; its numbers say nothing

Weights and tokens are random, so neither a checkpoint nor a tokenizer is needed; shapes, types and settings are those of
train.py --preset mistral-7b. A row goes to --out as soon as it is measured, and one that fails does not cost the others.
--stages measures some again: rows of one machine add up to one table, which --results puts into RESULTS.md.
A time is the median of three after a warm-up, or of fewer once they have taken 40 s. GB are 10^9 bytes, GiB are 2^30.
"""

import gc
import re
import statistics
import sys
import time
import traceback
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import sppo  # noqa: E402
from data import Prompt  # noqa: E402
from engine.checkpoint import check_device, uninitialized  # noqa: E402
from engine.command import Parser, exit_code  # noqa: E402
from engine.costs import GPUS, multiplied, pairrm_flops, parameters  # noqa: E402
from engine.files import read_json, remove, require_empty, write_json, write_text  # noqa: E402
from engine.memory import out_of_memory  # noqa: E402
from engine.progress import tqdm  # noqa: E402
from generate import generate, position_bytes  # noqa: E402
from judges.pairrm import PairRM, PairRMConfig  # noqa: E402
from model import ModelConfig, Transformer, initialize  # noqa: E402
from train import PRESETS, TextGame, TrainConfig  # noqa: E402

RESULTS = ROOT / "benchmarks" / "RESULTS.md"
SHEETS = {"H100": "h100", "H200": "h200", "A100": "a100-80", "cpu": "cpu"}  # part of the device's name -> engine/costs.GPUS
REPEATS, PATIENCE = 3, 40  # measurements, seconds
SAMPLES = 8  # responses a prompt in decoding, whose own pass is not what is measured
PRESET = PRESETS["mistral-7b"]

# Mistral-7B-Instruct-v0.2, and llm-blender/PairRM-hf: a deberta-v3-large with the vocabulary of its tokenizer and markers.
MISTRAL = ModelConfig(
    vocab_size=32000, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
    num_key_value_heads=8, head_dim=128, max_position_embeddings=32768, rope_theta=1e6, dtype="bfloat16",
)  # fmt: skip
PAIRRM = PairRMConfig(
    vocab_size=128005, hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16,
    layer_norm_eps=1e-7, position_buckets=256, max_position_embeddings=512, source_prefix_id=128001, cand1_prefix_id=128002,
    cand2_prefix_id=128003,
)  # fmt: skip
SMALL = dict(vocab_size=128, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
SHAPES = {  # bytes of the copy; tokens of prompts, of responses at both ends of decoding, of a judged row, of fitted responses
    "7b": SimpleNamespace(
        policy=MISTRAL, judge=PAIRRM, copied=2**32, prompt=256, short=32, long=256, pair=600, pairs=8192 // 600,
        response=768, longest=PRESET["max_new_tokens"], batch=PRESET["batch"],
    ),
    "tiny": SimpleNamespace(
        policy=replace(MISTRAL, **SMALL, num_key_value_heads=2, head_dim=8),
        judge=replace(PAIRRM, **SMALL, source_prefix_id=121, cand1_prefix_id=122, cand2_prefix_id=123),
        copied=2**20, prompt=8, short=2, long=6, pair=24, pairs=4, response=8, longest=16, batch=4,
    ),
}  # fmt: skip


def step_bytes(policy, rows, prompt, short, long):
    """Bytes that the mean step between responses of two lengths must read: bfloat16 weights, but no embedding table; caches."""
    return 2 * multiplied(policy) + rows * (prompt + (short + long - 1) / 2) * position_bytes(policy.config, torch.bfloat16)


def model_flops(policy, tokens, per_parameter):
    """2 (forward) or 6 (and backward) per token and parameter; embedding table, attention and recomputation do not count."""
    return per_parameter * multiplied(policy) * tokens


class Bench:
    """A policy and a judge on one device, where both stay through all rows, as in train.py; and a method for each row."""

    def __init__(self, shape, device, folder):
        self.shape = SHAPES[shape]
        self.device = torch.device(device)
        self.folder = folder
        self.rows = {}
        self.cuda = self.device.type == "cuda"
        self.name = torch.cuda.get_device_name(self.device) if self.cuda else "cpu"
        sheet = next((sheet for part, sheet in SHEETS.items() if part in self.name), None)
        if sheet is None:
            raise ValueError(f"{self.name}: add its data sheet to engine/costs.py, GPUS, and its name to SHEETS")
        self.bandwidth = GPUS[sheet]["bandwidth"]  # bytes a second
        self.flops = GPUS[sheet]["flops"]  # operations a second, by bytes of a number
        self.policy = self.random(Transformer, self.shape.policy, torch.bfloat16)
        self.judge = self.random(PairRM, self.shape.judge, torch.bfloat16)
        self.generator = torch.Generator().manual_seed(0)  # of what is not weights

    def random(self, cls, config, dtype):
        with uninitialized(dtype, self.device):
            module = cls(config)
        return initialize(module, torch.Generator(self.device).manual_seed(0))

    def ids(self, count, vocabulary=None):
        return torch.randint(3, vocabulary or self.shape.policy.vocab_size, (count,), generator=self.generator).tolist()

    def now(self):
        """Seconds, once all that the device was given is done."""
        if self.cuda:
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def seconds(self, work, prepare=lambda: None):
        times = []
        while len(times) <= REPEATS and sum(times[1:]) < PATIENCE:  # the first is the warm-up
            prepare()
            start = self.now()
            work()
            times.append(self.now() - start)
        return statistics.median(times[1:])

    def measure(self, name):
        """The numbers of one row, or how it failed."""
        gc.collect()  # what a row that failed has left
        if self.cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)
        try:
            numbers = ROWS[name][0](self)
            return numbers | ({"peak_gib": torch.cuda.max_memory_allocated(self.device) / 2**30} if self.cuda else {})
        except Exception as error:  # whatever it is, it must not cost the other rows on a machine rented by the hour
            traceback.print_exc()
            return {"error": "out of memory" if out_of_memory(error) else f"failed: {type(error).__name__}"}

    def copying(self):
        source = torch.zeros(self.shape.copied, dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        rate = 10 * 2 * source.nbytes / self.seconds(lambda: [target.copy_(source) for _ in range(10)])
        return {"gb_s": rate / 1e9, "bandwidth_share": rate / self.bandwidth}

    def saving(self):
        seconds = self.seconds(lambda: self.policy.save_pretrained(self.folder), lambda: remove(self.folder))
        return {"gb_s": 2 * parameters(self.policy) / seconds / 1e9}

    def loading(self):
        if not self.folder.is_dir():
            self.policy.save_pretrained(self.folder)
        seconds = self.seconds(lambda: Transformer.from_pretrained(self.folder, device=self.device))
        return {"gb_s": 2 * parameters(self.policy) / seconds / 1e9}

    @torch.no_grad()
    def judging(self, dtype):
        config, rows, T = self.shape.judge, self.shape.pairs, self.shape.pair
        judge = self.judge if dtype == torch.bfloat16 else self.random(PairRM, config, dtype)
        tokens = torch.tensor([self.ids(T, config.source_prefix_id) for _ in range(rows)])  # (B, T)
        tokens[:, :3] = torch.tensor([config.source_prefix_id, config.cand1_prefix_id, config.cand2_prefix_id])
        tokens = tokens.to(self.device)
        mask = torch.ones(rows, T, dtype=torch.bool, device=self.device)
        rate = 10 * rows / self.seconds(lambda: [judge(tokens, mask).tolist() for _ in range(10)])
        return {"pairs_s": rate, "mfu": rate * pairrm_flops(judge, T) / self.flops[dtype.itemsize]}

    def decoding(self, rows):
        short, long = self.shape.short, self.shape.long
        prompts = [self.ids(self.shape.prompt) for _ in range(rows // SAMPLES)]
        sample = partial(generate, self.policy, prompts, SAMPLES, stop_token=None, generator=self.generator, rows=rows)
        begin, whole = (self.seconds(partial(sample, max_new_tokens=length)) for length in (short, long))
        step = (whole - begin) / (long - short)
        rate = step_bytes(self.policy, rows, self.shape.prompt, short, long) / step
        of_copy = {"copy_share": rate / 1e9 / self.rows["copy"]["gb_s"]} if "gb_s" in self.rows.get("copy", {}) else {}
        return {"step_ms": 1e3 * step, "tokens_s": rows / step, "bandwidth_share": rate / self.bandwidth} | of_copy

    def batch(self):
        """A game, the prompts and the pairs of responses of one optimizer step, and how many tokens these are."""
        shape = self.shape
        config = TrainConfig(**PRESET | dict(device=str(self.device), batch=shape.batch, epochs=1 + REPEATS))
        self.policy.model.recompute = config.recompute
        prompts = [Prompt("", self.ids(shape.prompt)) for _ in range(shape.batch)]
        lengths = [shape.longest] + [shape.response] * (shape.batch - 1)
        responses = [[self.ids(length), self.ids(length)] for length in lengths]
        game = TextGame(config, self.policy, tokenizer=None, judge_model=None, number=1)
        return game, prompts, responses, 2 * (shape.batch * shape.prompt + sum(lengths))

    def scoring(self):
        game, prompts, responses, tokens = self.batch()
        rate = tokens / self.seconds(lambda: game.score(prompts, responses, game.config))
        return {"tokens_s": rate, "mfu": model_flops(self.policy, rate, 2) / self.flops[2]}

    def fitting(self):
        """The first step, before which the optimizer gets its memory, is the warm-up of the others."""
        game, prompts, responses, tokens = self.batch()
        logp = game.score(prompts, responses, game.config)
        target = sppo.sppo_target(torch.tensor([[0.9, 0.1]]), game.config.eta).repeat(len(prompts), 1)
        data = sppo.Regression(prompts, responses, logp, target)
        done = []  # when each step was
        with tqdm(total=len(prompts) * game.config.epochs, desc="fit", leave=False, disable=None) as game.progress:
            for _ in game.fit(data, game.config, self.generator):
                done.append(self.now())
        step = statistics.median(end - start for start, end in zip(done, done[1:]))
        mfu = model_flops(self.policy, tokens / step, 6) / self.flops[2]
        return {"step_ms": 1e3 * step, "tokens_s": tokens / step, "mfu": mfu}


ROWS = {  # name, up to a comma the stage: how, what (fields of a shape), aim
    "copy": (Bench.copying, "{copied:.1e} bytes on the device, read + write", ""),
    "save": (Bench.saving, "`save_pretrained` into the page cache", ""),
    "load": (Bench.loading, "`from_pretrained` out of the page cache, beside the policy", ""),
    "judge, bfloat16": (partial(Bench.judging, dtype=torch.bfloat16), "{pairs} ordered pairs together, {pair} tokens each", ""),
    "judge, float32": (partial(Bench.judging, dtype=torch.float32), "the same", ""),
    "decode, 64 rows": (partial(Bench.decoding, rows=64), "prompts of {prompt} tokens, responses of {short} to {long}", "≥ 0.6"),
    "decode, 256 rows": (partial(Bench.decoding, rows=256), "the same", "≥ 0.6"),
    "score": (Bench.scoring, "{batch} prompts, 2 × ({prompt} + {response}) tokens, one 2 × ({prompt} + {longest})", ""),
    "fit": (Bench.fitting, "the same, forward, recomputing, backward, and a step of RMSProp", "≥ 0.45"),
}  # fmt: skip
STAGES = list(dict.fromkeys(name.split(",")[0] for name in ROWS))
FORMATS = {  # number -> how it reads in the table
    "gb_s": "{:,.1f} GB/s", "pairs_s": "{:,.0f} pairs/s", "step_ms": "{:,.1f} ms a step", "tokens_s": "{:,.0f} tokens/s",
    "bandwidth_share": "**{:.2f}** of the bandwidth", "copy_share": "{:.2f} of the copy's", "mfu": "**{:.2f}** of the peak",
    "error": "{}",
}  # fmt: skip


def table(rows, device="Not measured: no GPU was at hand", torch="", shape="7b"):
    """The lines of a Markdown table of all rows that there are or could be."""
    lines = [f"{device}, torch {torch}, shape {shape}." if torch else f"{device}.", ""]
    lines += ["| | what | measured | aim | peak, GiB (< 78) |", "|---|---|---|---|---|"]
    for name, (_, what, aim) in ROWS.items():
        row = rows.get(name, {"error": "not measured"})
        cells = ", ".join(form.format(row[key]) for key, form in FORMATS.items() if key in row)
        peak = f"{row['peak_gib']:.1f}" if "peak_gib" in row else ""
        lines.append(f"| {name} | {what.format(**vars(SHAPES[shape]))} | {cells} | {aim} | {peak} |")
    return lines


def write_results(path, lines):
    """Put the table between its marks, and leave everything else as it is."""
    text = path.read_text(encoding="utf-8")
    marked = "\n".join(["<!-- gpu -->", *lines, "<!-- end of gpu -->"])
    write_text(path, re.sub(r"<!-- gpu -->.*<!-- end of gpu -->", lambda _: marked, text, flags=re.DOTALL))


def run(args):
    check_device(args.device)
    if args.results and (args.shape, args.device[:4]) != ("7b", "cuda"):
        raise ValueError(f"--results is for the 7b shape on a GPU, this is {args.shape} on {args.device}")
    bench = Bench(args.shape, args.device, require_empty(args.folder, "--folder"))
    out = Path(args.out or ROOT / ("benchmarks/gpu.json" if bench.cuda else "out/gpu-on-cpu.json"))
    machine = {"device": bench.name, "torch": str(torch.__version__), "shape": args.shape}
    found = read_json(out) if out.exists() else dict(machine)
    bench.rows = found.pop("rows", {})
    if found != machine:
        raise ValueError(f"{out}: has numbers of {found}, this is {machine}; choose another --out")
    chosen = [name for name in ROWS if name.split(",")[0] in args.stages]
    try:
        for name in tqdm(chosen, unit="row", disable=None):
            bench.rows[name] = bench.measure(name)
            write_json(out, machine | {"rows": bench.rows})
            tqdm.write(f"{name}: {bench.rows[name]}", sys.stderr)
    finally:
        if not args.keep:
            remove(bench.folder)
    lines = table(bench.rows, **machine)
    print("\n".join(lines))
    if args.results:
        write_results(RESULTS, lines)
    if failed := [name for name in chosen if "error" in bench.rows[name]]:
        raise ValueError(f"not measured: {'; '.join(failed)}")


def main(arguments=None):
    parser = Parser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="7b", help="sizes of policy and judge, and of what goes through them")
    parser.add_argument("--device", default="cuda", help="a torch device")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES, help="what to measure")
    parser.add_argument("--folder", default=ROOT / "out" / "gpu", help="new folder for the checkpoint of 14.5 GB")
    parser.add_argument("--keep", action="store_true", help="do not delete the checkpoint")
    parser.add_argument("--out", help="JSON file of all numbers; unset: benchmarks/gpu.json, or on a CPU out/gpu-on-cpu.json")
    parser.add_argument("--results", action="store_true", help="also put the table into benchmarks/RESULTS.md")
    return exit_code("benchmarks/gpu.py", partial(run, parser.parse_args(arguments)), "stopped; rows that are done are in --out")


if __name__ == "__main__":
    sys.exit(main())
