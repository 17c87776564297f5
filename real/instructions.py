"""SPPO on a real chat model, with preferences that a program can verify: obey what the prompt says.

    python -m real.smollm2 --out out/smollm2
    python -m real.instructions --policy out/smollm2 --out out/smollm2-instructions

A prompt is a topic with one or two constraints, "Explain how bees make honey. Use at most 20
words." (real/prompts.py, real/constraints.py); the judge is a rule over the texts of prompt and
response (real/rule.py). The loop is train.py's, and so are the flags; their defaults here are a
recipe for a model of 135M parameters. Then the base model, the policy of every round and the
rounds' average are measured (real/measurement.py), on held-out topics, and on held-out kinds of
constraint.

    OUT/prompts.jsonl, round-01/, ...     the training prompts, and the run, as train.py leaves it
    OUT/measure/base.jsonl, ...           what each policy answered
    OUT/measure.json, measure.png         the numbers and the figure
    OUT/samples.md                        ten held-out prompts, with answers before and after

Whenever it is stopped, the same command continues, to the same numbers.
"""

import os
import sys
import time
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from engine.command import Parser, add_flags, check_settings, exit_code
from engine.files import keep_lines, write_json, write_text
from real import measurement
from real.prompts import SPLITS, draw_prompts, shuffled
from real.rule import level, preferences
from sppo import setting
from train import PRESETS, TrainConfig, check, run

RECIPE = PRESETS["smollm2"] | dict(
    policy="out/smollm2", judge="real.instructions:rule", out="out/smollm2-instructions"
)


@dataclass(frozen=True)
class PromptConfig:
    """What is drawn and measured; the flags that train.py does not have."""

    training_prompts: int = setting(96, "prompts of a round", low=1, high=500)
    held_out_prompts: int = setting(96, "of each held-out split", low=1, high=500)
    measured: int = setting(2, "responses of each policy to each prompt", low=1)
    measure_every: int = setting(
        1, "measure each so-many-th round and the last; the average is then of these", low=1
    )


def rule(prompt: str, responses: list[str]) -> Tensor:
    """The judge: `--judge real.instructions:rule`."""
    return preferences([level(prompt, response) for response in responses])


# ------------------------------------------------------------------------ the command


def play(config: TrainConfig, counts: PromptConfig) -> None:
    """The whole command: prompts, rounds, numbers, figure and samples."""
    begun = time.monotonic()
    check(config)
    check_settings(counts, PromptConfig)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError("several processes would measure the same: start it without torchrun")

    # Before anything is written.
    if not (Path(config.policy) / "config.json").is_file():
        makes = "python -m real.smollm2 makes out/smollm2"
        raise FileNotFoundError(f"--policy {config.policy}: not the folder of a model; {makes}")

    # Drawn anew when a run is continued: they are a function of the seed.
    out = Path(config.out)
    drawn = counts.training_prompts * (1 if config.reuse_prompts else config.rounds)
    training = draw_prompts("training", drawn, config.seed)
    # A round takes every T-th prompt, so kinds of constraint must not come in turn.
    training = shuffled(training, torch.Generator().manual_seed(config.seed))
    rows = [{"prompt": prompt} for prompt in training]
    keep_lines(config.prompts, rows, "prompts than --training-prompts and --seed give")
    run(config)

    held_out = [split for split in SPLITS if split != "training"]
    prompts = {
        split: draw_prompts(split, counts.held_out_prompts, config.seed) for split in held_out
    }
    every = counts.measure_every
    rounds = [number for number in range(1, config.rounds + 1) if number % every == 0]
    rounds = sorted({*rounds, config.rounds})
    records = measurement.ask_policies(config, prompts, counts.measured, rounds)
    result = measurement.summarize(records, rounds)
    write_json(out / "measure.json", result)
    measurement.draw(result, out / "measure.png")
    write_text(out / "samples.md", measurement.samples_page(records, config.rounds))
    measurement.print_table(result)
    minutes = (time.monotonic() - begun) / 60
    print(f"\n{out}: measure.json, measure.png, samples.md; {minutes:.1f} minutes")


def parse_arguments(arguments: list[str] | None = None) -> tuple[TrainConfig, PromptConfig]:
    parser = Parser(description=__doc__)

    # Every flag of train.py but --prompts, which this command writes.
    names = [field.name for field in fields(TrainConfig)]
    flags = tuple(name for name in names if name != "prompts")
    add_flags(parser, TrainConfig, flags, **RECIPE)
    add_flags(parser, PromptConfig)

    given = vars(parser.parse_args(arguments))
    given["prompts"] = str(Path(given["out"]) / "prompts.jsonl")
    config = TrainConfig(**{name: given.pop(name) for name in names})
    return config, PromptConfig(**given)


def main(arguments: list[str] | None = None) -> int:
    config, counts = parse_arguments(arguments)
    continues = f"the same command continues in {config.out}"
    inputs = (config.policy, config.judge)
    work = partial(play, config, counts)
    return exit_code("real.instructions", work, f"stopped; {continues}", config.out, inputs)


if __name__ == "__main__":
    sys.exit(main())
