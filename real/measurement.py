"""What became of a policy: its answers to all prompts, the rule's numbers, a figure, samples.

A *record* is what one policy answered, a line for each prompt: {split, prompt, responses, tokens,
stopped, logps}; all the numbers are computed from it. Records are files of their own, written
whole, so that a command that is killed repeats at most one of them.

    pass             responses that satisfy all constraints of their prompt (share)
    win rate         against the base by the rule, each response against each; ½ is a tie
    log-likelihood   under the base, in nats a token: falls when responses stop being its English
    quality, on topic, ended, degenerate, distinct bigrams: see real/rule.py

Intervals are 95 % bootstrap intervals over prompts. The *average* is the uniform mixture of the
rounds' policies, without the base: draw a round, then its response. So its numbers are means of
theirs.
"""

import time
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from data import Tokenizer, prepare_prompts
from engine.files import append_line, read_lines, write_lines
from engine.figures import BLUE, GREEN, ORANGE, PINK, error_bars, new_figure, write_figure
from engine.memory import peak_memory
from engine.progress import tqdm
from engine.run_folder import policy_folder
from model import Transformer
from real import rule
from real.constraints import constraints_of
from train import TextGame, TrainConfig

STAGE = 3  # the random numbers of measuring; a round of train.py draws those of stages 0 to 2
RESAMPLES = 2000
SAMPLES = 10  # prompts on the page of samples
LABELS = {"topics": "held-out topics", "kinds": "held-out constraints"}

# ------------------------------------------------------------------------ asking the policies


def policy_name(number: int) -> str:
    return f"round-{number:02d}" if number else "base"


def ask_policies(
    config: TrainConfig, prompts: dict, measured: int, rounds: list[int]
) -> list[list[dict]]:
    """The record of the base and of the policies after these rounds, read, or made and written.

    `prompts` are {split: texts}. ValueError if a record that is there is of other prompts.
    """
    folder = Path(config.out) / "measure"
    paths = {number: folder / f"{policy_name(number)}.jsonl" for number in (0, *rounds)}
    missing = [number for number, path in paths.items() if not path.exists()]

    if missing:
        asker = Asker(config, prompts, measured)
        total = len(missing) * asker.items
        with tqdm(total=total, unit="item", desc="measure", leave=False) as bar:
            for number in missing:
                begun = time.perf_counter()
                bar.set_description(f"measure {policy_name(number)}")
                write_lines(paths[number], asker.ask(number, bar))

                row = {"round": number, "stage": "measure"}
                row["seconds"] = time.perf_counter() - begun
                row["peak_gb"] = peak_memory(config.device)
                append_line(Path(config.out) / "timings.jsonl", row)

    asked = [(split, prompt) for split, texts in prompts.items() for prompt in texts]
    return [read_record(path, asked, measured) for path in paths.values()]


def read_record(path: Path, asked: list[tuple], measured: int) -> list[dict]:
    rows = [row for _, row in read_lines(path)]
    same = [(row["split"], row["prompt"]) for row in rows] == asked
    if not same or len(rows[0]["responses"]) != measured:
        differs = "holds answers to other prompts, or another number, than these flags ask for"
        raise ValueError(f"{path}: {differs}; delete the folder to measure again")
    return rows


class Asker:
    """Draws responses from a policy of the run, and scores them under the base."""

    def __init__(self, config: TrainConfig, prompts: dict, measured: int):
        self.config = replace(config, samples=measured)
        self.tokenizer = Tokenizer(config.policy)
        self.base = Transformer.from_pretrained(config.policy, config.dtype, config.device)
        self.splits = [split for split, texts in prompts.items() for _ in texts]

        texts = [prompt for part in prompts.values() for prompt in part]
        context = self.base.config.max_position_embeddings
        room = (config.max_new_tokens, "real/prompts.py", context, "policy's context of")
        self.prompts = prepare_prompts(texts, self.tokenizer, config.template, *room)
        # A response moves the bar when it is written, and a prompt when its responses are scored.
        self.items = (measured + 1) * len(texts)

    def game(self, number: int, policy: Transformer, bar) -> TextGame:
        game = TextGame(self.config, policy, self.tokenizer, None, number)
        game.progress = bar
        return game

    def ask(self, number: int, bar) -> list[dict]:
        """The record of the policy after round `number`; 0 is the base."""
        policy = self.base
        if number:
            folder = policy_folder(self.config, number + 1)
            policy = Transformer.from_pretrained(folder, self.config.dtype, self.config.device)

        # `number` is part of the random seed: two policies' responses are independent.
        game = self.game(number, policy, bar)
        responses = game.sample(self.prompts, STAGE)
        logps = self.game(0, self.base, bar).score(self.prompts, responses, self.config)

        rows = []
        columns = zip(self.splits, self.prompts, responses, logps.tolist(), strict=True)
        for split, prompt, row, logp in columns:
            rows.append({
                "split": split,
                "prompt": prompt.text,
                "responses": game.texts(prompt, row),
                "tokens": [len(response) for response in row],
                "stopped": [response[-1] in self.tokenizer.stop for response in row],
                "logps": logp,
            })  # fmt: skip
        return rows


# ------------------------------------------------------------------------ numbers


def mean(numbers: list) -> float:
    return sum(numbers) / max(1, len(numbers))


def interval(values: Tensor) -> list[float]:
    """The 95 % bootstrap interval of the mean of (N,) values, one for each prompt."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(len(values), (RESAMPLES, len(values)), generator=generator)
    means = values[drawn].mean(-1)
    return means.quantile(torch.tensor([0.025, 0.975], dtype=means.dtype)).tolist()


def judged(row: dict, base: dict) -> dict:
    """The numbers of one prompt: means over its responses, and sums of tokens and log π."""
    prompt = row["prompt"]
    responses = row["responses"]

    # One table of all, of which the block of the policy's rows and the base's columns counts.
    against = [rule.level(prompt, response) for response in base["responses"]]
    levels = [rule.level(prompt, response) for response in responses]
    table = rule.preferences(levels + against)
    K = len(levels)

    numbers = {
        "pass": mean([all(rule.satisfied(prompt, response)) for response in responses]),
        "win_rate": table[:K, K:].mean().item(),
        "stopped": mean(row["stopped"]),
        "tokens": mean(row["tokens"]),
        "logp": mean(row["logps"]),
        "distinct_bigrams": mean([rule.distinct_bigrams(response) for response in responses]),
    }
    for name in ("quality", "on_topic", "ended", "degenerate"):
        number = getattr(rule, name)
        numbers[name] = mean([number(prompt, response) for response in responses])
    return numbers


def mixture(policies: list[list[dict]]) -> list[dict]:
    """Numbers of each prompt under the uniform mixture of policies."""
    rows = zip(*policies, strict=True)
    return [{name: mean([one[name] for one in row]) for name in row[0]} for row in rows]


MEANS = (
    "pass", "quality", "win_rate", "on_topic", "ended", "stopped", "degenerate",
    "distinct_bigrams", "tokens",
)  # fmt: skip


def describe(numbers: list[dict], base: list[dict], long: list[bool]) -> dict:
    """One policy on one split: N prompts' numbers, the base's, and which do not ask for short."""
    result = {name: mean([one[name] for one in numbers]) for name in MEANS}

    passed = torch.tensor([one["pass"] for one in numbers], dtype=torch.float64)
    before = torch.tensor([one["pass"] for one in base], dtype=torch.float64)
    quality = torch.tensor([one["quality"] for one in numbers], dtype=torch.float64)
    result["pass_interval"] = interval(passed)
    result["gain"] = (passed - before).mean().item()
    result["gain_interval"] = interval(passed - before)  # of the same prompts, so it is narrower
    result["quality_interval"] = interval(quality)

    # Pooled over all tokens, so a long response weighs more than a short one.
    tokens = sum(one["tokens"] for one in numbers)
    result["log_likelihood"] = sum(one["logp"] for one in numbers) / tokens
    result["tokens_unless_short"] = mean([one["tokens"] for one, yes in zip(numbers, long) if yes])
    return result


def by_kind(record: list[dict]) -> dict[str, float]:
    """The share of responses that satisfy a constraint, by its kind, over all splits."""
    kept = {}
    for row in record:
        for constraint in constraints_of(row["prompt"]):
            answers = [constraint.satisfied(response) for response in row["responses"]]
            kept.setdefault(constraint.name, []).extend(answers)
    return {name: mean(kept[name]) for name in sorted(kept)}


def summarize(records: list[list[dict]], rounds: list[int]) -> dict:
    """The numbers of all policies from their records, the base's first: what measure.json holds."""
    base = records[0]
    numbers = [[judged(*pair) for pair in zip(record, base, strict=True)] for record in records]
    numbers.append(mixture(numbers[1:]))
    splits = list(dict.fromkeys(row["split"] for row in base))
    short = [any(c.kind.short for c in constraints_of(row["prompt"])) for row in base]

    # Prompts that ask for few words say nothing about whether a policy has become terse.
    described = []
    for policy in numbers:
        rows = {}
        for split in splits:
            places = [n for n, row in enumerate(base) if row["split"] == split]
            of_split = [[part[n] for n in places] for part in (policy, numbers[0])]
            rows[split] = describe(*of_split, [not short[n] for n in places])
        described.append(rows)

    return {
        "prompts": {split: sum(row["split"] == split for row in base) for split in splits},
        "responses_per_prompt": len(base[0]["responses"]),
        "measured_rounds": rounds,
        "base": described[0],
        "rounds": described[1:-1],
        "average": described[-1],
        "constraints": {"base": by_kind(base), "last": by_kind(records[-1])},
    }


# ------------------------------------------------------------------------ showing


TITLES = {
    "pass": "pass", "win_rate": "win rate", "quality": "quality", "on_topic": "on topic",
    "distinct_bigrams": "bigrams", "tokens": "tokens", "log_likelihood": "nats",
}  # fmt: skip


def print_table(result: dict) -> None:
    shown = {"base": result["base"], "last": result["rounds"][-1], "average": result["average"]}
    titles = "".join(f"{title:>9}" for title in TITLES.values())
    for split, label in LABELS.items():
        print(f"\n{label:20}{titles}   95 % of pass")
        for name, rows in shown.items():
            numbers = "".join(f"{rows[split][key]:9.3f}" for key in TITLES)
            low, high = rows[split]["pass_interval"]
            print(f"{name:20}{numbers}   {low:.3f} to {high:.3f}")


def draw(result: dict, path: Path) -> None:
    """Left: what was trained. Middle: whether answers stay answers. Right: the base's view."""
    figure = new_figure(13, 4.4)
    left, middle, right = figure.subplots(1, 3)
    policies = [result["base"], *result["rounds"]]
    rounds = [0, *result["measured_rounds"]]
    aside = rounds[-1] + 1.5  # where the average stands
    looks = dict(zip(LABELS, ((BLUE, "o"), (ORANGE, "s"))))

    for index, (split, (colour, marker)) in enumerate(looks.items()):
        rows = [policy[split] for policy in policies]
        mixed = [result["average"][split]]
        style = dict(color=colour, marker=marker, markersize=5)
        hollow = style | dict(markerfacecolor="none")

        # Side by side, so that no interval hides another.
        shift = 0.1 * (index - 0.5)
        places = [number + shift for number in rounds]
        whiskers(left, places, rows, "pass", capsize=3, label=LABELS[split], **style)
        whiskers(left, [aside + shift], mixed, "pass", capsize=3, **hollow)
        likelihood = [row["log_likelihood"] for row in rows]
        right.plot(rounds, likelihood, label=LABELS[split], **style)
        right.plot([aside], [mixed[0]["log_likelihood"]], **hollow)

    topics = [policy["topics"] for policy in [*policies, result["average"]]]
    shares = {"quality": BLUE, "on_topic": GREEN, "distinct_bigrams": PINK, "win_rate": ORANGE}
    for (name, colour), marker in zip(shares.items(), "o^vs"):
        values = [row[name] for row in topics]
        style = dict(color=colour, marker=marker, markersize=5)
        label = "win rate against the base" if name == "win_rate" else name.replace("_", " ")
        middle.plot(rounds, values[:-1], label=label, **style)
        middle.plot([aside], values[-1:], markerfacecolor="none", **style)

    left.set(title="Constraints obeyed", ylabel="share of responses that pass, 95 %")
    middle.set(title="Held-out topics: are they still answers?", ylabel="share")
    right.set(title="Likelihood under the base", ylabel="nats a token")
    for axes in (left, middle):
        axes.set_ylim(0, 1.3)
        axes.set_yticks([0, 0.25, 0.5, 0.75, 1])
    right.margins(y=0.3)
    for axes in (left, middle, right):
        axes.set_xticks([*rounds, aside], [*("base", *map(str, rounds[1:])), "average"])
        axes.set_xlabel("after round")
        axes.legend(frameon=False, fontsize=9, loc="upper left")
    write_figure(path, figure)


def whiskers(axes, places: list, rows: list[dict], name: str, **style) -> None:
    """A curve with its 95 % intervals."""
    values = [row[name] for row in rows]
    error = error_bars(values, [row[f"{name}_interval"] for row in rows])
    axes.errorbar(places, values, error, **style)


def samples_page(records: list[list[dict]], rounds: int) -> str:
    """Markdown: the first held-out prompts of either split, and each one's first responses."""
    before = records[0]
    after = records[-1]
    chosen = []
    for split in ("topics", "kinds"):
        places = [n for n, row in enumerate(before) if row["split"] == split]
        chosen += places[: SAMPLES // 2]

    parts = ["# Ten held-out prompts, before and after\n\nNot picked: the first ones, and of each"]
    parts[0] += " policy the first response.\n"
    for number, n in enumerate(chosen, 1):
        parts.append(f"## {number}. {before[n]['prompt']}\n")
        for name, record in (("Base", before), (f"After round {rounds}", after)):
            parts.append(sample(name, before[n]["prompt"], record[n]["responses"][0]))
    return "\n".join(parts)


def sample(name: str, prompt: str, response: str) -> str:
    """One response as a quotation, with what the rule says of it."""
    kept = rule.satisfied(prompt, response)
    said = [f"{sum(kept)} of {len(kept)} constraints"]
    said.append("on topic" if rule.on_topic(prompt, response) else "off topic")
    said.append("ended" if rule.ended(prompt, response) else "cut")
    if rule.degenerate(prompt, response):
        said.append("degenerate")

    # Indented: as code, so that no asterisk or bracket of a response is taken for markup.
    lines = [f"    {line}".rstrip() for line in response.splitlines()] or ["    (nothing)"]
    return f"**{name}** ({', '.join(said)})\n\n" + "\n".join(lines) + "\n"
