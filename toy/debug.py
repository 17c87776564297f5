"""A tiny run for the debugger: two prompts, three samples, one layer; every tensor fits the screen.

    python -m pdb -m toy.debug
    (Pdb) b sppo.sppo_round      stop at the first line of a round
    (Pdb) c                      play up to it
    (Pdb) n                      go one line on; after each one print what it made: p win_rate
    (Pdb) s                      step into a call: game.sample, game.judge, game.fit

The code path is that of every other run, on a world that is built in a second; the run starts
afresh each time. Flags are those of train.py, for instance `--rounds 1 --select all`. What to look
at in a round, with N = 2 prompts and K = 3 samples:

    responses    N lists of K lists of token ids; game.game.texts(prompts[0], responses[0])
    preference   (N, K, K): ½ on each diagonal; preference + preference.mT is 1 everywhere
    win_rate     (N, K): the mean of each row of preference; each prompt's mean is ½
    chosen       (N, 2): which of the K are best and worst
    logp         (N, 2): log π_t of these two, in nats
    target       (N, 2): eta (win rate - ½), with eta = 2
    steps        in the first, log-ratios are exactly 0, so the loss is the mean squared target;
                 in the next ones best_log_ratio should rise and worst_log_ratio fall
"""

import sys
from pathlib import Path

import torch

import train
from engine.files import remove, write_json, write_lines
from model import Transformer, initialize
from toy.text_game import QUALITY, STRENGTHS, model_config, write_base_policy

WORLD = Path("out/debug-world")
RUN = Path("out/debug")
FLAGS = f"""
    --policy {WORLD}/policy --judge toy.text_game:oracle --prompts {WORLD}/prompts.jsonl
    --out {RUN} --rounds 2 --samples 3 --max-new-tokens 6 --template plain --reuse-prompts
    --eta 2 --optimizer adamw --lr 1e-3 --batch 2 --micro-batch 2 --epochs 2 --trace
""".split()


def build_debugging(world: str | Path) -> None:
    """A world of two prompts, whose policy has just learned to write a number and an ending."""
    world = Path(world)
    generator = torch.Generator().manual_seed(0)
    model = initialize(Transformer(model_config(layers=1, width=16)), generator)
    write_base_policy(world / "policy", model, 150, 64, generator)

    write_lines(world / "prompts.jsonl", [{"prompt": "3+4="}, {"prompt": "5+9="}])
    # Last, as in the small world: a folder with it is complete.
    write_json(world / "world.json", {"seed": 0, "strengths": list(STRENGTHS), "quality": QUALITY})


def stop_at_rounds() -> None:
    """From now on the debugger stops where a round begins; a step into the next line enters it."""
    play = train.sppo_round

    def stopping(*arguments):
        breakpoint()
        return play(*arguments)

    train.sppo_round = stopping


def main(arguments: list[str] | None = None) -> int:
    """Play the run from its start, in a world that is built if it is not there; the exit code."""
    flags = FLAGS + (sys.argv[1:] if arguments is None else arguments)
    if "--stop" in flags:
        flags.remove("--stop")
        stop_at_rounds()
    config = train.parse_config(flags)  # a wrong flag ends here, before anything is removed

    if not (WORLD / "world.json").is_file():
        remove(WORLD)
        build_debugging(WORLD)

    # A finished run would be read from its files, and no line of a round be played.
    if Path(config.out) == RUN:
        remove(RUN)
    return train.main(flags)


if __name__ == "__main__":
    sys.exit(main())
