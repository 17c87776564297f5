"""What a run will need, before anything is loaded: memory, tokens, operations, hours and disk.

    python plan.py --preset mistral-7b --policy DIR --judge DIR --prompts FILE --out RUN \\
        --gpus 8 --gpu h200

It takes the flags of train.py, and --gpus and --gpu. Weights are counted on the meta device, which
has shapes and no memory: of policy and judge only config.json is read, and the tokenizers if they
are there. What cannot be known beforehand is listed in ASSUMED and is printed with the plan.

One GPU trains the weights that it holds, in --dtype, bfloat16 with stochastic rounding. Of several,
each holds a copy to sample, judge and score with, and to fit also its shard of float32 weights,
gradients and optimizer state (FSDP2), computing in --dtype.

N prompts a round, K responses each, S of them trained on, T tokens in a row, P parameters. GB are
10^9 bytes. Costs are those of rows of mean length; memory is that of the longest possible rows.
"""

import engine.quiet  # noqa: F401  first, see there

# isort: split
import heapq
import math
import sys
from pathlib import Path

from torch import nn

from data import Tokenizer, prompt_text, read_outputs, read_prompts
from engine.checkpoint import DTYPES
from engine.command import exit_code, flag
from engine.costs import GPUS, attended, causal_flops, low_rank, multiplied, on_meta, pairrm_bytes
from engine.costs import pairrm_flops, parameters, recomputing_bytes, saved_bytes, shared_cost
from engine.costs import training_bytes
from engine.files import read_json
from engine.prepack import copied_bytes
from generate import PREFILL_TOKENS, pool_shape, position_bytes
from judges.load import is_folder, split_spec
from judges.pairrm import GPU_TOKENS, PairRM, PairRMConfig
from model import ModelConfig, Transformer
from prefmodel import PreferenceModel
from train import TrainConfig, check, command_line, make_config

ASSUMED = {
    "response": 1 / 3,  # mean response, as a share of --max-new-tokens
    "bandwidth": 0.5,  # share of the memory bandwidth that decoding reaches
    "active": 0.85,  # share of the pool's rows that write; the others wait for the next refill
    "launch": 1.2e-4,  # seconds for the 50 or so kernels of a layer and token, however small
    # Shares of the peak operations, padding and communication included:
    "prefill": 0.4,
    "judge": 0.25,
    "score": 0.4,
    "fit": 0.35,
    "chunk": 512,  # positions whose logits exist at a time in score and fit (sppo.chunked_logps)
    "json": 11.5,  # bytes of a token in responses.jsonl: its text, the digits of its id, a comma
}

SAMPLED = 500  # prompts that are tokenised; a file of up to twice as many is tokenised whole
PREFERENCE_ROWS = 64  # that a PreferenceModel reads at a time
FLEXIBLE = ("cache", "workspace", "activations", "logits")  # memory that a flag can make smaller

# ------------------------------------------------------------------------ what is there


def judge_folders(spec: str) -> list[str]:
    """Checkpoint folders in a --judge: itself, or those that its arguments name (an ensemble's)."""
    if is_folder(spec):
        return [spec]

    _, _, arguments = split_spec(spec)
    members = [arguments["judge"]] if "judge" in arguments else arguments.get("judges", [])
    return [folder for member in members for folder in judge_folders(member)]


def judge_shape(folder: str | Path) -> nn.Module:
    """A judge on the meta device."""
    path = Path(folder) / "config.json"
    raw = read_json(path)
    if raw.get("model_type") == "deberta-v2":
        return on_meta(PairRM, PairRMConfig.from_json(path))

    head = raw.get("preference_head") or {}
    return on_meta(PreferenceModel, ModelConfig.from_json(path), **head)


def tokenizer_in(folder: str | Path) -> Tokenizer | None:
    return Tokenizer(folder) if (Path(folder) / "tokenizer.json").is_file() else None


def measure_prompts(config: TrainConfig, judge_tokenizers: list[Tokenizer | None]) -> dict:
    """How many prompts, how long in tokens, and each judge's tokens per token of the policy.

    Of a large file an even sample is tokenised. Without a tokenizer, 4 bytes are a token.
    """
    tokenizer = tokenizer_in(config.policy)
    prompts = read_prompts(config.prompts)
    sample = prompts[:: max(1, len(prompts) // SAMPLED)]
    texts = [prompt_text(prompt) for prompt in sample]

    def size(prompt):
        return len(prompt_text(prompt).encode())

    def length(prompt):
        return len(tokenizer.prompt_ids(prompt, config.template)) if tokenizer else size(prompt) / 4

    def tokens(reader):
        return max(1, sum(len(reader.encode(text)) for text in texts))

    # The longest prompt decides how much memory is needed. It may be outside the sample, but is
    # most probably one of those with the most bytes.
    lengths = [length(prompt) for prompt in sample]
    largest = [length(prompt) for prompt in heapq.nlargest(20, prompts, key=size)]
    return {
        "count": len(prompts),
        "tokenised": len(sample) if tokenizer else 0,
        "mean": sum(lengths) / len(sample),
        "longest": math.ceil(max(lengths + largest)),
        "bytes": sum(map(size, sample)) / len(sample),
        "judge_tokens": [
            tokens(reader) / tokens(tokenizer) if reader and tokenizer else 1.0
            for reader in judge_tokenizers
        ],
    }


# ------------------------------------------------------------------------ stages


def add(*costs: dict) -> dict:
    return {key: sum(cost[key] for cost in costs) for key in ("tokens", "flops", "seconds")}


class Work:
    """A run in numbers.

    The method of a stage says what N prompts cost on all GPUs together: {tokens, flops, seconds}.
    """

    def __init__(self, config: TrainConfig, gpus: int, gpu: dict, response: float):
        self.config = config
        self.gpus = gpus
        self.gpu = gpu  # a value of GPUS
        sizes = ModelConfig.from_json(Path(config.policy) / "config.json")
        self.policy = on_meta(Transformer, sizes)
        folders = judge_folders(config.judge)
        self.judges = [judge_shape(folder) for folder in folders]

        self.prompts = measure_prompts(config, [tokenizer_in(folder) for folder in folders])
        self.total = self.prompts["count"] * (config.rounds if config.reuse_prompts else 1)
        self.N = math.ceil(self.total / config.rounds)
        self.response = response  # mean tokens
        self.selected = 2 if config.select == "best-worst" else config.samples  # S
        self.opponents = 0
        if config.opponents:
            self.opponents = len(next(iter(read_outputs(config.opponents).values())))

        # Bytes of a number that the policy computes with, of a trained weight, and of its averages:
        # RMSProp has one, always in float32; AdamW has two, of the weight's own dtype.
        dtype = DTYPES[config.dtype]
        self.width = dtype.itemsize
        self.held = 4 if gpus > 1 else self.width
        self.terms = low_rank(self.policy, config.lora)  # in float32, and trained alone
        trained = 4 if self.terms else self.held
        self.state = 4 if config.optimizer == "rmsprop" else 2 * trained

        # A GPU's pool: bytes of a cached position, positions of the longest row, the cache's shape.
        rows = min(config.pool, math.ceil(self.N / gpus) * config.samples)
        self.position = position_bytes(sizes, dtype)
        self.positions = self.prompts["longest"] + config.max_new_tokens
        self.shape = pool_shape(sizes, rows, self.positions, config.cache_bytes, dtype)
        self.rows = min(rows, self.shape[0])

    def computed(self, stage: str, tokens: float, flops: float, width: int) -> dict:
        """The cost of operations on numbers of `width` bytes, at the stage's share of the peak."""
        rate = self.gpus * self.gpu["flops"][width] * ASSUMED[stage]
        return {"tokens": tokens, "flops": flops, "seconds": flops / rate}

    def sample(self, N: int) -> dict:
        """A pass over each prompt, then the rows of the pool write token after token."""
        prompt = self.prompts["mean"]
        flops = N * causal_flops(self.policy, prompt)
        prefill = self.computed("prefill", N * prompt, flops, self.width)

        # `flops` of one response from now on; all responses are written in steps of the pool.
        flops = causal_flops(self.policy, prompt + self.response, prompt)
        responses = N * self.config.samples
        written = responses * self.response
        steps = written / (self.gpus * self.rows * ASSUMED["active"])
        seconds = steps * self.step_seconds(flops)
        return add(prefill, {"tokens": written, "flops": responses * flops, "seconds": seconds})

    def step_seconds(self, flops: float) -> float:
        """A token in each row of the pool: as slow as memory, arithmetic or launching allow."""
        # All caches are read as far as the furthest row is, here three responses of mean length.
        reach = self.prompts["mean"] + min(3 * self.response, self.config.max_new_tokens)
        read = parameters(self.policy) * self.width + self.rows * reach * self.position
        rate = self.gpu["flops"][self.width] * ASSUMED["prefill"]
        return max(
            read / (self.gpu["bandwidth"] * ASSUMED["bandwidth"]),
            self.rows * flops / self.response / rate,
            self.policy.config.num_hidden_layers * ASSUMED["launch"],
        )

    def judge(self, N: int, responses: int | None = None) -> dict:
        """K(K - 1) rows with two responses each for PairRM; K of one for a PreferenceModel."""
        K = responses or self.config.samples + self.opponents
        m = self.config.compare
        costs = []
        for judge, ratio in zip(self.judges, self.prompts["judge_tokens"]):
            T = self.judged(judge, self.prompts["mean"] * ratio, self.response * ratio)
            pairs = isinstance(judge, PairRM)
            if pairs:
                rows = N * K * (m or K - 1)
                tokens = rows * T
                flops = rows * pairrm_flops(judge, T)
            else:
                # A prompt is read once for the responses that are asked about together.
                rows = N * K * (m or 1)
                asked = rows / (2 if m else K)
                prompt = min(self.prompts["mean"] * ratio, T)
                tokens, flops = shared_cost(judge, prompt, T, asked, rows)
            costs.append(self.computed("judge", tokens, flops, self.judge_width(judge)))
        return add(*costs)

    def judged(self, judge: nn.Module, prompt: float, response: float) -> float:
        """Tokens of the judge's row, cut as it cuts them."""
        if not isinstance(judge, PairRM):
            return min(prompt + response, judge.config.max_position_embeddings)

        # Each part has three tokens more: [CLS], its marker, [SEP].
        source = min(prompt + 3, judge.source_limit)
        room = judge.candidate_limit + (judge.source_limit - source) // 2
        return source + 2 * min(response + 3, room)

    def judge_width(self, judge: nn.Module) -> int:
        return DTYPES[self.config.judge_dtype or judge.config.dtype].itemsize

    def score(self, N: int) -> dict:
        # A prompt is computed once for all of its responses.
        prompt = self.prompts["mean"]
        T = prompt + self.response
        tokens, flops = shared_cost(self.policy, prompt, T, N, N * self.selected)
        return self.computed("score", tokens, flops, self.width)

    def fit(self, N: int) -> dict:
        # Forward as in score, forward once more to recompute, and backward, which is twice that.
        once = self.score(N)
        flops = 4 * once["flops"]

        # Frozen weights have no gradients, which are half of the backward pass.
        if self.terms:
            flops += (8 * self.terms - 2 * multiplied(self.policy)) * once["tokens"]
        epochs = self.config.epochs
        return self.computed("fit", epochs * once["tokens"], epochs * flops, self.width)

    def previous(self, N: int) -> dict:
        """Target optimistic: as many responses of π_{t-1} join the table."""
        table = self.judge(N, 2 * self.config.samples)
        # If the round before had the same prompts, its responses are there.
        return table if self.config.reuse_prompts else add(table, self.sample(N))

    def memory(self) -> dict:
        """{stage: {part: bytes on each GPU}} at the peak."""
        sizes = self.policy.config
        # Policy and judge stay on the GPU through all stages.
        judge = sum(parameters(judge) * self.judge_width(judge) for judge in self.judges)
        fixed = {"weights": self.width * parameters(self.policy), "judge": judge}

        # Sampling: prompts that are computed together, and the probabilities of a step.
        prefill = max(PREFILL_TOKENS, self.prompts["longest"])
        hidden = prefill * (self.position + saved_bytes(sizes, self.width))
        probabilities = 16 * self.rows * sizes.vocab_size
        sampling = {"cache": math.prod(self.shape) * self.position}
        if self.gpu is GPUS["cpu"]:
            sampling["copy"] = copied_bytes(self.policy, self.width)
        sampling["workspace"] = hidden + probabilities

        passes = map(self.judge_pass, self.judges, self.prompts["judge_tokens"])

        # Scoring and fitting: a forward pass. Logits exist in float32 too, and so do the
        # log-probabilities that they become; in the fit the logits' gradients in both dtypes.
        written = self.selected * self.config.max_new_tokens
        tokens = self.config.micro_batch * (self.prompts["longest"] + written)
        lines = self.config.micro_batch * (self.selected + 1) * self.positions
        lines *= self.width * attended(sizes)
        block = tokens * saved_bytes(sizes, self.width) + lines
        kept = recomputing_bytes(sizes, tokens, self.width) + lines
        logits = min(self.config.micro_batch * written, ASSUMED["chunk"]) * sizes.vocab_size
        kinds = (self.width, self.held, self.state)
        trained = training_bytes(self.policy, self.gpus, *kinds, self.terms)
        fit = {"activations": kept, "logits": logits * (2 * self.width + 12)}
        return {
            "sample": fixed | sampling,
            "judge": fixed | {"workspace": max([0, *passes])},
            "score": fixed | {"activations": block, "logits": logits * (self.width + 8)},
            "fit": fixed | trained | fit,
        }

    def judge_pass(self, judge: nn.Module, ratio: float) -> int:
        """Bytes of a judge's largest forward pass."""
        width = self.judge_width(judge)
        prompt = self.prompts["longest"] * ratio
        T = math.ceil(self.judged(judge, prompt, self.config.max_new_tokens * ratio))
        if not isinstance(judge, PairRM):
            return PREFERENCE_ROWS * T * saved_bytes(judge.config, width)
        return pairrm_bytes(judge.config, max(1, GPU_TOKENS // T), T, width)

    def advice(self, stage: str, memory: dict) -> str:
        """What makes a stage smaller that does not fit."""
        # What no flag can make smaller has to fit on its own.
        fixed = sum(size for part, size in memory.items() if part not in FLEXIBLE)
        if fixed >= self.gpu["memory_gb"] * 1e9:
            if self.width == 4:
                return "--dtype bfloat16 or more GPUs"
            if stage == "fit":
                return "more GPUs" if self.terms else "more GPUs or --lora"
            return "a smaller model"

        setting = "micro_batch"
        if stage in ("sample", "previous"):
            setting = "cache_gb" if self.config.cache_gb else "pool"
        # A setting of 1 cannot be lowered, and the judge has none: then rows must be shorter.
        if stage == "judge" or getattr(self.config, setting) == 1:
            setting = "max_new_tokens"
        return f"lower {flag(setting)}"

    def disk(self, N: int) -> dict:
        """Bytes that N prompts leave, and a round's checkpoint."""
        samples = self.config.samples
        K = samples + self.opponents
        responses = self.prompts["bytes"] + samples * self.response * ASSUMED["json"]
        # Each table is written with its K win rates, in float32.
        return {
            "policy": parameters(self.policy) * self.held,
            "responses": N * responses,
            "preferences": 4 * N * K * (K + 1),
            "logps": 4 * N * self.selected,
        }

    def disk_unfinished(self) -> int:
        """Bytes while a fit is unfinished: weights and optimizer state, and their successors."""
        if self.config.save_minutes == math.inf:
            return 0
        if self.terms:
            return 2 * self.terms * (4 + self.state)
        return 2 * parameters(self.policy) * (self.held + self.state)


# ------------------------------------------------------------------------ the plan


def plan(
    config: TrainConfig, gpus: int = 1, gpu: str = "h100", mean_response_tokens: float | None = None
) -> dict:
    """What a run with these settings would take on so many GPUs: a dictionary of plain numbers.

    ValueError or FileNotFoundError for what cannot be planned, as a run would say it.
    """
    if gpus < 1:
        raise ValueError(f"--gpus is {gpus}, expected at least 1")
    if gpu not in GPUS:
        raise ValueError(f"--gpu is {gpu!r}, expected one of {', '.join(GPUS)}")

    longest = config.max_new_tokens
    mean = mean_response_tokens
    if mean is None:
        mean = ASSUMED["response"] * longest
    if not 0 < mean <= longest:
        raise ValueError(f"the mean response has {mean} tokens, expected up to {longest}")

    work = Work(config, gpus, GPUS[gpu], mean)
    context = work.policy.config.max_position_embeddings
    stages = plan_stages(work)

    # Prompts are spread over the rounds, but each round leaves a policy.
    policies = (config.rounds - 1) * work.disk(0)["policy"]
    return {
        "gpus": gpus,
        "gpu": gpu,
        "memory_gb": GPUS[gpu]["memory_gb"],
        "rounds": config.rounds,
        "samples": config.samples,
        "policy": sizes(work.policy, config.dtype) | {"context": context},
        "judges": [sizes(judge, config.judge_dtype) for judge in work.judges],
        "prompts": work.prompts | {"a_round": work.N},
        "response": {"mean": mean, "longest": longest},
        "pool": work.rows,
        "fits": work.positions <= context and all(stage["fits"] for stage in stages.values()),
        "stages": stages,
        "in_all": add(*(stage["in_all"] for stage in stages.values())),
        "disk": work.disk(work.N),
        "disk_in_all": sum(work.disk(work.total).values()) + policies,
        "disk_unfinished": work.disk_unfinished(),
        "assumed": dict(ASSUMED),
    }


def sizes(module: nn.Module, dtype: str | None) -> dict:
    """What a plan says about a policy or a judge."""
    kind = type(module).__name__
    dtype = dtype or module.config.dtype
    return {"kind": kind, "parameters": parameters(module), "dtype": dtype}


def plan_stages(work: Work) -> dict:
    """{stage: its cost in a round and in all, its memory, and whether that fits} in their order."""
    costs = {"sample": work.sample, "judge": work.judge, "score": work.score}
    memory = work.memory()
    if work.config.target == "optimistic":
        costs["previous"] = work.previous
        memory["previous"] = memory["sample"]
    if work.config.target == "regularized":
        costs["reference"] = work.score
        memory["reference"] = memory["score"]
    costs["fit"] = work.fit

    stages = {}
    for name, cost in costs.items():
        size = sum(memory[name].values())
        fits = size <= work.gpu["memory_gb"] * 1e9

        # The first round has no previous policy.
        prompts = work.total - work.N if name == "previous" else work.total
        stages[name] = cost(work.N) | {
            "in_all": cost(prompts),
            "memory": memory[name],
            "memory_total": size,
            "fits": fits,
            "advice": None if fits else work.advice(name, memory[name]),
        }
    return stages


# ------------------------------------------------------------------------ in words

# A backslash joins a line to the next.
HEAD = """\
plan for {gpus} × {gpu} of {memory_gb} GB: sizes are counted, times estimated
policy     {policy[parameters]:,} parameters in {policy[dtype]}
judge      {judge}
prompts    {prompts[a_round]:,} a round, {prompts[mean]:.0f} tokens on average, \
{prompts[longest]:,} at most ({how})
responses  {samples} a prompt, {response[mean]:.0f} tokens on average (assumed), \
{response[longest]:,} at most; {pool} decode together"""

FOOT = """\
disk       {disk:.1f} GB a round ({parts}), {disk_in_all:.1f} GB in all;
           plus up to {disk_unfinished:.1f} GB while a fit is unfinished
assumed, not measured: decoding at {bandwidth:.0%} of the bandwidth, \
{active:.0%} of the pool active, at least {launch_ms:.1f} ms a layer and step;
    of the peak operations prefill {prefill:.0%}, judge {judge:.0%}, score {score:.0%}, \
fit {fit:.0%}; logits of {chunk:,} positions and activations of one layer at a time;
    an optimizer that needs no memory beyond its state, \
and communication that overlaps with computing"""


def describe(result: dict) -> list[str]:
    """The lines of a plan."""
    judges = [
        f"{judge['kind']}, {judge['parameters']:,} parameters in {judge['dtype']}"
        for judge in result["judges"]
    ]
    judge = "; ".join(judges) or "a rule, not counted"
    tokenised = result["prompts"]["tokenised"]
    how = f"{tokenised:,} were tokenised" if tokenised else "no tokenizer: 4 bytes a token"
    lines = HEAD.format(**result, judge=judge, how=how).splitlines()

    longest = result["prompts"]["longest"] + result["response"]["longest"]
    context = result["policy"]["context"]
    if longest > context:
        too_long = f"{longest:,} tokens in the policy's context of {context:,}"
        lines.append(f"does not fit: {too_long}; lower --max-new-tokens")

    foot = FOOT.format(
        **result["assumed"],
        launch_ms=result["assumed"]["launch"] * 1e3,
        parts=", ".join(f"{name} {size / 1e9:.3f}" for name, size in result["disk"].items()),
        disk=sum(result["disk"].values()) / 1e9,
        disk_in_all=result["disk_in_all"] / 1e9,
        disk_unfinished=result["disk_unfinished"] / 1e9,
    )
    return [*lines, "", *table(result), "", *foot.splitlines()]


def table(result: dict) -> list[str]:
    """A line for each stage: its cost in a round and its memory; another if that does not fit."""
    titles = f"{'a round':10}{'Mtokens':>9}{'PFLOP':>9}{'hours':>9}{'GB':>8}"
    lines = [f"{titles}   at the peak, each GPU"]
    for name, stage in result["stages"].items():
        gb = stage["memory_total"] / 1e9
        large = {part: size for part, size in stage["memory"].items() if size >= 5e7}
        parts = ", ".join(f"{part} {size / 1e9:.1f}" for part, size in large.items())
        lines.append(f"{name:10}{columns(stage)}{gb:8.1f}   {parts}".rstrip())
        if not stage["fits"]:
            room = result["memory_gb"]
            lines.append(f"  does not fit: {gb:.0f} GB of {room} GB; {stage['advice']}")

    rounds = f"{result['rounds']} rounds" if result["rounds"] > 1 else "in all"
    return [*lines, f"{rounds:10}{columns(result['in_all'])}"]


def columns(cost: dict) -> str:
    """Millions of tokens, 10^15 operations, hours: as whole numbers from 100 on."""
    values = (cost["tokens"] / 1e6, cost["flops"] / 1e15, cost["seconds"] / 3600)
    words = [f"{value:,.0f}" if value >= 100 else f"{value:.3g}" for value in values]
    return "".join(f"{word:>9}" for word in words)


def main(arguments: list[str] | None = None) -> int:
    parser = command_line(__doc__)
    parser.add_argument("--gpus", type=int, default=1, help="how many the plan is for [1]")
    parser.add_argument("--gpu", choices=GPUS, default="h100", help="which kind [h100]")
    flags = vars(parser.parse_args(arguments))
    gpus = flags.pop("gpus")
    gpu = flags.pop("gpu")

    def work():
        config = make_config(flags)
        check(config)
        print("\n".join(describe(plan(config, gpus, gpu))))

    return exit_code("plan.py", work)


if __name__ == "__main__":
    sys.exit(main())
