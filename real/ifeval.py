"""A policy's answers to IFEval, a benchmark of other people (Zhou et al., 2311.07911), for scoring.

    python -m real.ifeval --policy DIR --prompts prompts.jsonl --out answers.jsonl

The prompt file has IFEval's lines {key, prompt, instruction_id_list, kwargs}; they are written
again, each with a `response`, for IFEval's checkers (google-research's, lm_eval's), which are not
needed here. DIR is a checkpoint, or a run, which stands for its average policy. Greedy, 256 tokens.
"""

import argparse
import sys

from data import read_prompts
from engine.command import Parser, add_flags, check_settings, exit_code
from engine.files import read_lines, write_lines
from evaluate.__main__ import (
    Sampling,
    finished_before,
    generator_of,
    responses_of,
    settle_template,
    unfinished,
)


def answer(args: argparse.Namespace) -> None:
    """Write the prompt file's lines with a response each."""
    check_settings(args, Sampling)
    settle_template(args)
    if finished_before(args):
        return
    rows = [row for _, row in read_lines(args.prompts)]
    prompts = read_prompts(args.prompts)
    with unfinished(args):
        responses = responses_of(args.policy, prompts, 1, args, generator_of(args))
        answered = [row | {"response": text} for row, (text,) in zip(rows, responses, strict=True)]
        write_lines(args.out, answered)
    print(f"{args.out}: {len(answered)} responses")


def main(arguments: list[str] | None = None) -> int:
    parser = Parser(description=__doc__)
    policy = "checkpoint folder, or the folder of a run"
    parser.add_argument("--policy", required=True, help=policy)
    parser.add_argument("--prompts", required=True, help="IFEval's JSON lines")
    parser.add_argument("--out", required=True, help="JSON lines to write, a new file")
    add_flags(parser, Sampling, temperature=0.0, max_new_tokens=256)
    parser.set_defaults(command="ifeval")  # a part of the random seed
    args = parser.parse_args(arguments)
    inputs = (args.policy, args.prompts)
    return exit_code("real.ifeval", lambda: answer(args), out=args.out, inputs=inputs)


if __name__ == "__main__":
    sys.exit(main())
