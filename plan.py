"""What a run will need, before anything is loaded: memory of each stage, tokens, operations, hours and disk.

    python train.py --plan --preset mistral-7b --policy DIR --judge DIR --prompts FILE --out RUN

Weights are counted on the meta device, which has shapes and no memory. Of the policy and the judge config.json is read, and the
tokenizers where they are there. What cannot be known beforehand stands in ASSUMED and is printed with the plan.

One GPU trains the weights that it holds, in --dtype, bfloat16 with stochastic rounding. Of several, each holds a copy to sample,
judge and score with; to fit, also its shard of float32 weights, gradients and optimizer state (FSDP2), computing in --dtype.

N prompts a round, K responses each, S of them trained on, T tokens in a row, P parameters. GB are 10^9 bytes. Costs are those of
rows of mean length, memory is that of the longest rows that can happen.
"""

import heapq
import math
from pathlib import Path

import torch
from torch import nn

from data import Tokenizer, prompt_text, read_json, read_outputs, read_prompts
from generate import PREFILL_TOKENS, pool_shape, position_bytes
from model import DTYPES, ModelConfig, Transformer, uninitialized
from pairrm import GPU_TOKENS, PairRM, PairRMConfig
from prefmodel import PreferenceModel, split_spec

# Bytes a second, and dense operations a second with 2- and 4-byte numbers, from NVIDIA's data sheets of H100, H200 and A100 80GB,
# SXM (half of what they give with sparsity; float32 without TF32).
# cpu: 4 cores × 3 GHz × 32 operations (AVX2), DDR4-3200 × 2 channels.
GPUS = {
    "h100": dict(memory_gb=80, bandwidth=3.35e12, flops={2: 9.9e14, 4: 6.7e13}),
    "h200": dict(memory_gb=141, bandwidth=4.8e12, flops={2: 9.9e14, 4: 6.7e13}),
    "a100-80": dict(memory_gb=80, bandwidth=2.04e12, flops={2: 3.12e14, 4: 1.95e13}),
    "cpu": dict(memory_gb=16, bandwidth=5.1e10, flops={2: 3.8e11, 4: 3.8e11}),
}

ASSUMED = {
    "response": 1 / 3,  # mean response, as a share of --max-new-tokens
    "bandwidth": 0.5,  # share of the memory bandwidth that decoding reaches
    "living": 0.85,  # share of the pool's rows that write; the others wait for the next refill
    "launch": 1.2e-4,  # seconds for the 50 kernels or so of one layer, one token, however little they do
    "prefill": 0.4, "judge": 0.25, "score": 0.4, "fit": 0.35,  # share of the peak operations, padding and communication included
    "chunk": 128,  # positions whose logits exist at a time in score and fit (sppo.chunked_logps)
    "json": 11.5,  # bytes of a token in responses.jsonl: its text, the digits of its id, a comma
}  # fmt: skip

SAMPLED = 500  # prompts that are tokenised; up to twice as many are tokenised all
PREFERENCE_ROWS = 64  # that a PreferenceModel reads at a time

# ------------------------------------------------------------------------------------------------ shapes


def on_meta(cls, config, **options):
    with uninitialized(torch.float32, "meta"):
        return cls(config, **options)


def parameters(module):
    return sum(parameter.numel() for parameter in module.parameters())


def multiplied(module):
    """Parameters that a token is multiplied by: all but embeddings that are only looked up."""
    lookups = sum(part.weight.numel() for part in module.modules() if isinstance(part, nn.Embedding))
    return parameters(module) - (0 if isinstance(module, Transformer) and module.config.tie_word_embeddings else lookups)


def saved_bytes(config, width):
    """What a Block keeps of one position for its backward pass: norms, also in float32, q, k, v, heads, 4 rows of the MLP."""
    D, heads = config.hidden_size, (config.num_attention_heads + config.num_key_value_heads) * config.head_dim
    return 8 * D + width * (4 * D + 2 * heads + 4 * config.intermediate_size)


def causal_flops(module, end, begin=0):
    """Forward over positions begin to end of a row: 2 per parameter and token, 4 per head entry and pair of positions."""
    config = module.config
    entries = config.num_hidden_layers * config.num_attention_heads * config.head_dim
    return 2 * multiplied(module) * (end - begin) + 2 * entries * (end**2 - begin**2)


def pairrm_flops(module, T):
    """A row of T tokens: content with content, and with 2T - 1 relative positions both ways."""
    config = module.config
    return 2 * multiplied(module) * T + 4 * config.num_hidden_layers * config.hidden_size * T * (3 * T - 1)


# ------------------------------------------------------------------------------------------------ what is there


def judge_folders(spec):
    """Checkpoint folders in a --judge: itself, or those that a rule's arguments name (Ensemble, Transitive)."""
    if Path(spec).is_dir():
        return [spec]
    *_, arguments = split_spec(spec)
    inner = [arguments["judge"]] if "judge" in arguments else arguments.get("judges", [])
    return [folder for one in inner for folder in judge_folders(one)]


def judge_shape(folder):
    raw = read_json(path := Path(folder) / "config.json")
    if raw.get("model_type") == "deberta-v2":
        return on_meta(PairRM, PairRMConfig.from_json(path))
    return on_meta(PreferenceModel, ModelConfig.from_json(path), **(raw.get("preference_head") or {}))


def tokenizer_in(folder):
    return Tokenizer(folder) if (Path(folder) / "tokenizer.json").is_file() else None


def measure_prompts(config, judge_tokenizers):
    """How many prompts, how long in tokens, and each judge's tokens per token of the policy.

    Of a large file an even sample is tokenised, and the prompts with most bytes. Without a tokenizer: 4 bytes a token.
    """
    prompts, tokenizer = read_prompts(config.prompts), tokenizer_in(config.policy)
    some = prompts[:: max(1, len(prompts) // SAMPLED)]
    texts = [prompt_text(prompt) for prompt in some]

    def size(prompt):
        return len(prompt_text(prompt).encode())

    def length(prompt):
        return len(tokenizer.prompt_ids(prompt, config.template)) if tokenizer else size(prompt) / 4

    def tokens(reader):
        return max(1, sum(len(reader.encode(text)) for text in texts))

    return {
        "count": len(prompts),
        "tokenised": len(some) if tokenizer else 0,
        "mean": sum(map(length, some)) / len(some),
        "longest": math.ceil(max(map(length, some + heapq.nlargest(20, prompts, key=size)))),
        "bytes": sum(map(size, some)) / len(some),
        "judge_tokens": [tokens(reader) / tokens(tokenizer) if reader and tokenizer else 1.0 for reader in judge_tokenizers],
    }


# ------------------------------------------------------------------------------------------------ stages


def add(*costs):
    return {key: sum(cost[key] for cost in costs) for key in ("tokens", "flops", "seconds")}


class Work:
    """A run in numbers. The method of a stage says what N prompts cost on all GPUs together: {tokens, flops, seconds}."""

    def __init__(self, config, gpus, gpu, response):
        self.config, self.gpus, self.gpu, self.response = config, gpus, gpu, response  # response: mean tokens
        self.policy = on_meta(Transformer, ModelConfig.from_json(Path(config.policy) / "config.json"))
        folders = judge_folders(config.judge)
        self.judges = [judge_shape(folder) for folder in folders]
        self.prompts = measure_prompts(config, [tokenizer_in(folder) for folder in folders])
        self.opponents = len(next(iter(read_outputs(config.opponents).values()))) if config.opponents else 0
        self.width = DTYPES[config.dtype].itemsize  # bytes of a number that the policy computes with
        self.held = 4 if gpus > 1 else self.width  # bytes of a trained weight
        self.selected = 2 if config.select == "best-worst" else config.samples  # S
        self.positions = self.prompts["longest"] + config.max_new_tokens  # of the longest row
        self.total = self.prompts["count"] * (config.rounds if config.reuse_prompts else 1)  # prompts of all rounds
        self.N = math.ceil(self.total / config.rounds)
        self.position = position_bytes(self.policy.config, DTYPES[config.dtype])  # of the cache
        rows = min(config.pool, math.ceil(self.N / gpus) * config.samples)
        self.shape = pool_shape(self.policy.config, rows, self.positions, config.cache_bytes, DTYPES[config.dtype])
        self.rows = min(rows, self.shape[0])  # of a GPU's pool

    def judge_width(self, judge):
        return DTYPES[self.config.judge_dtype or judge.config.dtype].itemsize

    def computed(self, stage, tokens, flops, width):
        return {"tokens": tokens, "flops": flops, "seconds": flops / (self.gpus * self.gpu["flops"][width] * ASSUMED[stage])}

    def sample(self, N):
        """A pass over each prompt, then a token a row and step: as slow as memory, arithmetic or launching allow."""
        sizes, width, p, r = self.policy.config, self.width, self.prompts["mean"], self.response
        prefill = self.computed("prefill", N * p, N * causal_flops(self.policy, p), width)
        written, row = N * self.config.samples * r, causal_flops(self.policy, p + r, p)
        reach = p + min(3 * r, self.config.max_new_tokens)  # all caches are read as far as the furthest row is
        step = max(
            (parameters(self.policy) * width + self.rows * reach * self.position)
            / (self.gpu["bandwidth"] * ASSUMED["bandwidth"]),
            self.rows * row / r / (self.gpu["flops"][width] * ASSUMED["prefill"]),
            sizes.num_hidden_layers * ASSUMED["launch"],
        )
        steps = written / (self.gpus * self.rows * ASSUMED["living"])
        return add(prefill, {"tokens": written, "flops": N * self.config.samples * row, "seconds": steps * step})

    def judge(self, N, responses=None):
        """PairRM reads K(K - 1) rows of prompt and two responses, a PreferenceModel K rows of prompt and response."""
        K, costs = responses or self.config.samples + self.opponents, []
        for judge, ratio in zip(self.judges, self.prompts["judge_tokens"]):
            T = self.judged(judge, self.prompts["mean"] * ratio, self.response * ratio)
            rows, flops = (K * (K - 1), pairrm_flops) if isinstance(judge, PairRM) else (K, causal_flops)
            width = self.judge_width(judge)
            costs.append(self.computed("judge", N * rows * T, N * rows * flops(judge, T), width))
        return add(*costs)

    def judged(self, judge, prompt, response):
        """Tokens of the judge's row, cut as it cuts them."""
        if not isinstance(judge, PairRM):
            return min(prompt + response, judge.config.max_position_embeddings)
        source = min(prompt + 3, judge.source_limit)  # 3: [CLS], marker, [SEP]
        return source + 2 * min(response + 3, judge.candidate_limit + (judge.source_limit - source) // 2)

    def score(self, N):
        rows, T = N * self.selected, self.prompts["mean"] + self.response
        return self.computed("score", rows * T, rows * causal_flops(self.policy, T), self.width)

    def fit(self, N):
        """Per epoch four times score: forward, forward again from the checkpointed activations, and twice that backward."""
        once, epochs = self.score(N), self.config.epochs
        return self.computed("fit", epochs * once["tokens"], 4 * epochs * once["flops"], self.width)

    def previous(self, N):
        """Target optimistic: as many responses of π_{t-1} join the table. Where the rounds' prompts differ, they are sampled."""
        table = self.judge(N, 2 * self.config.samples)
        return table if self.config.reuse_prompts else add(table, self.sample(N))

    def memory(self):
        """{stage: {part: bytes on one GPU}} at the peak. Policy and judge stay on the GPU through all stages."""
        config, sizes, P, width = self.config, self.policy.config, parameters(self.policy), self.width
        V, layers = sizes.vocab_size, sizes.num_hidden_layers
        judge = sum(parameters(judge) * self.judge_width(judge) for judge in self.judges)
        fixed = {"weights": width * P, "judge": judge}
        shard = self.held * P / self.gpus
        # A block, embedding and head are whole on each GPU while they are computed with, and then their gradients.
        gathered = width * (P - (layers - 1) * parameters(self.policy.model.layers[0])) if self.gpus > 1 else 0

        together = max(PREFILL_TOKENS, self.prompts["longest"])  # tokens of the prompts that are computed at a time
        sample = fixed | {"cache": math.prod(self.shape) * self.position}
        sample["workspace"] = together * (self.position + saved_bytes(sizes, width)) + 16 * self.rows * V  # probabilities

        tokens = config.micro_batch * self.selected * self.positions  # of a forward pass
        block, chunk = tokens * saved_bytes(sizes, width), min(tokens, ASSUMED["chunk"]) * V
        inputs = tokens * layers * sizes.hidden_size * width  # of all blocks: the checkpoints
        score = fixed | {"activations": block, "logits": chunk * (width + 8)}
        fit = fixed | {
            "shard": shard if self.gpus > 1 else 0,
            "gradients": shard,
            "optimizer": (4 if config.optimizer == "rmsprop" else 2 * self.held) * P / self.gpus,
            "gathered": 2 * gathered,
            "activations": inputs + block + 3 * tokens * sizes.intermediate_size * width,  # of one block, with its gradients
            "logits": chunk * (2 * width + 12),
        }
        reading = [self.reading(*pair) for pair in zip(self.judges, self.prompts["judge_tokens"])]
        return {"sample": sample, "judge": fixed | {"workspace": max([0, *reading])}, "score": score, "fit": fit}

    def reading(self, judge, ratio):
        """Bytes of a judge's largest forward pass."""
        sizes, width = judge.config, self.judge_width(judge)
        T = math.ceil(self.judged(judge, self.prompts["longest"] * ratio, self.config.max_new_tokens * ratio))
        if not isinstance(judge, PairRM):
            return PREFERENCE_ROWS * T * saved_bytes(sizes, width)
        rows = max(1, GPU_TOKENS // T)
        tables = 5 * rows * sizes.num_attention_heads * T * T  # two position terms of 2T - 1 columns, and their sum
        return width * (tables + rows * T * (2 * sizes.intermediate_size + 6 * sizes.hidden_size))

    def advice(self, stage, parts, room):
        """What makes a stage smaller that does not fit."""
        if sum(size for part, size in parts.items() if part not in ("cache", "workspace", "activations", "logits")) >= room:
            return "--dtype bfloat16 or more GPUs" if self.width == 4 else "more GPUs" if stage == "fit" else "a smaller model"
        flag = {"sample": "cache_gb" if self.config.cache_gb else "pool", "judge": "max_new_tokens"}.get(stage, "micro_batch")
        return "lower --" + ("max_new_tokens" if getattr(self.config, flag) == 1 else flag).replace("_", "-")

    def disk(self, N):
        """Bytes that N prompts leave, and a round's checkpoint."""
        K = self.config.samples + self.opponents
        return {
            "policy": parameters(self.policy) * self.held,
            "responses": N * (self.prompts["bytes"] + self.config.samples * self.response * ASSUMED["json"]),
            "preferences": 4 * N * K * (K + 1),
            "logps": 4 * N * self.selected,
        }

    def unfinished(self):
        """Bytes on disk while a fit is unfinished: weights and optimizer state, and their successors until those are whole."""
        state = 4 if self.config.optimizer == "rmsprop" else 2 * self.held
        return 2 * parameters(self.policy) * (self.held + state) if self.config.save_minutes < math.inf else 0


# ------------------------------------------------------------------------------------------------ the plan


def plan(config, gpus=1, gpu="h100", mean_response_tokens=None):
    """What a run with these settings (a TrainConfig) would take on so many GPUs: a dictionary of plain numbers."""
    if gpu not in GPUS or gpus < 1:
        raise ValueError(f"plan: {gpus} × {gpu!r}, expected one or more of {', '.join(GPUS)}")
    response = ASSUMED["response"] * config.max_new_tokens if mean_response_tokens is None else mean_response_tokens
    if not 0 < response <= config.max_new_tokens:
        raise ValueError(f"plan: {response} tokens in the mean response, expected up to --max-new-tokens {config.max_new_tokens}")
    work = Work(config, gpus, GPUS[gpu], response)
    policy, N, total, context = work.policy, work.N, work.total, work.policy.config.max_position_embeddings
    costs, memory = {"sample": work.sample, "judge": work.judge, "score": work.score}, work.memory()
    if config.target == "optimistic":
        costs["previous"], memory["previous"] = work.previous, memory["sample"]
    if config.target == "regularized":
        costs["reference"], memory["reference"] = work.score, memory["score"]
    costs["fit"], room, stages = work.fit, GPUS[gpu]["memory_gb"] * 1e9, {}
    for name, cost in costs.items():
        parts, size = memory[name], sum(memory[name].values())
        advice = None if size <= room else work.advice(name, parts, room)
        in_all = cost(total - N if name == "previous" else total)  # the first round has none before it
        stages[name] = cost(N) | {"in_all": in_all, "memory": parts, "memory_total": size, "fits": size <= room, "advice": advice}
    return {
        "gpus": gpus, "gpu": gpu, "memory_gb": GPUS[gpu]["memory_gb"], "rounds": config.rounds, "samples": config.samples,
        "policy": {"parameters": parameters(policy), "dtype": config.dtype, "context": context},
        "judges": [
            {"kind": type(judge).__name__, "parameters": parameters(judge), "dtype": config.judge_dtype or judge.config.dtype}
            for judge in work.judges
        ],
        "prompts": work.prompts | {"a_round": N}, "response": {"mean": response, "longest": config.max_new_tokens},
        "fits": work.positions <= context and all(stage["fits"] for stage in stages.values()), "stages": stages,
        "in_all": add(*(stage["in_all"] for stage in stages.values())), "disk": work.disk(N),
        "disk_in_all": sum(work.disk(total).values()) + (config.rounds - 1) * work.disk(0)["policy"],
        "disk_unfinished": work.unfinished(), "pool": work.rows, "assumed": dict(ASSUMED),
    }  # fmt: skip


def print_plan(result):
    print("\n".join(describe(result)))


def describe(result):
    """The lines of a plan."""
    prompts, response, policy, a, rounds = (result[key] for key in ("prompts", "response", "policy", "assumed", "rounds"))
    judges = [f"{judge['kind']}, {judge['parameters']:,} parameters in {judge['dtype']}" for judge in result["judges"]]
    how = f"{prompts['tokenised']:,} were tokenised" if prompts["tokenised"] else "no tokenizer: 4 bytes a token"
    mean = "{:.0f} tokens in the mean{}, {:,} at most".format
    lines = [
        f"plan for {result['gpus']} × {result['gpu']} of {result['memory_gb']} GB: sizes are counted, times estimated",
        f"policy     {policy['parameters']:,} parameters in {policy['dtype']}",
        f"judge      {'; '.join(judges) or 'a rule, not counted'}",
        f"prompts    {prompts['a_round']:,} a round, {mean(prompts['mean'], '', prompts['longest'])} ({how})",
        f"responses  {result['samples']} a prompt, {mean(response['mean'], ' (assumed)', response['longest'])}; "
        f"{result['pool']} decode together",
    ]
    if (longest := prompts["longest"] + response["longest"]) > policy["context"]:
        lines.append(f"does not fit: {longest:,} tokens in the policy's context of {policy['context']:,}; lower --max-new-tokens")
    lines += ["", f"{'a round':10}{'Mtokens':>9}{'PFLOP':>9}{'hours':>9}{'GB':>8}   at the peak, each GPU"]
    for name, stage in result["stages"].items():
        parts = ", ".join(f"{part} {size / 1e9:.1f}" for part, size in stage["memory"].items() if size >= 5e7)
        lines.append(f"{name:10}{columns(stage)}{stage['memory_total'] / 1e9:8.1f}   {parts}".rstrip())
        if not stage["fits"]:
            lines.append(f"  does not fit: {stage['memory_total'] / 1e9:.0f} GB of {result['memory_gb']} GB; {stage['advice']}")
    lines += [f"{f'{rounds} rounds' if rounds > 1 else 'in all':10}{columns(result['in_all'])}", ""]
    disk = ", ".join(f"{name} {size / 1e9:.3f}" for name, size in result["disk"].items())
    of_peak = ", ".join(f"{stage} {a[stage]:.0%}" for stage in ("prefill", "judge", "score", "fit"))
    return lines + [
        f"disk       {sum(result['disk'].values()) / 1e9:.1f} GB a round ({disk}), {result['disk_in_all'] / 1e9:.1f} GB in all;",
        f"           besides, while a fit is unfinished, up to {result['disk_unfinished'] / 1e9:.1f} GB",
        f"assumed, not measured: decoding at {a['bandwidth']:.0%} of the bandwidth, {a['living']:.0%} of the pool alive, "
        f"{a['launch'] * 1e3:.1f} ms a layer and step at least;",
        f"    of the peak operations {of_peak}; logits of {a['chunk']:,} positions and activations of one layer at a time;",
        "    an optimizer that needs no memory beside its state, and communication that hides behind computing",
    ]


def columns(cost):
    """Millions of tokens, 10^15 operations, hours: as whole numbers from 100 on."""
    values = cost["tokens"] / 1e6, cost["flops"] / 1e15, cost["seconds"] / 3600
    return "".join(f"{f'{value:,.0f}' if value >= 100 else f'{value:.3g}':>9}" for value in values)
