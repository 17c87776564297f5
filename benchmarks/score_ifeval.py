"""IFEval's own checkers, as lm-evaluation-harness has them, on the answers that real.ifeval wrote.

    pip install --no-deps lm_eval==0.4.13
    pip install langdetect immutabledict nltk
    python benchmarks/score_ifeval.py base.jsonl last.jsonl --out ifeval.json

Strict accuracy: by prompt, where all of its instructions must be followed, and by instruction. 95 % bootstrap intervals over
prompts; the difference is to the first file, of the same prompts. NLTK's data of sentence ends is not installed by pip, so
sentences and words are split by rule here, in every file alike.
"""

import importlib.util
import random
import re
import sys
from pathlib import Path
from types import ModuleType

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from engine.command import Parser, exit_code
from engine.files import read_lines, write_json

RESAMPLES = 2000


def load_checker():
    """lm_eval's strict test of a response, with rules in place of NLTK's data."""
    import langdetect
    import nltk

    # Both draw, and without seeds their verdicts change.
    random.seed(0)
    langdetect.DetectorFactory.seed = 0

    # Of the package only the checkers: all of it needs a dozen others.
    folder = Path(importlib.util.find_spec("lm_eval").origin).parent
    for name, path in (("lm_eval", folder), ("lm_eval.tasks", folder / "tasks")):
        sys.modules[name] = ModuleType(name)
        sys.modules[name].__path__ = [str(path)]

    nltk.data.find = lambda *_: None  # lm_eval downloads what is not found
    from lm_eval.tasks.ifeval import instructions_util, utils

    instructions_util.count_sentences = lambda text: len(re.findall(r"[^.!?]*\w[^.!?]*(?:[.!?]+|$)", text))
    instructions_util.nltk.word_tokenize = lambda text: re.findall(r"\w+|[^\w\s]", text)
    return utils


def follows(utils, path: str) -> list[list[bool]]:
    """Of each prompt of a file, which of its instructions the response follows."""
    results = []
    for _, row in read_lines(path):
        example = utils.InputExample(row["key"], row["instruction_id_list"], row["prompt"], row["kwargs"])
        followed = utils.test_instruction_following_strict(example, row["response"]).follow_instruction_list
        results.append([bool(one) for one in followed])
    return results


def shares(results: list[list[bool]]) -> torch.Tensor:
    """(N, 3): all followed, number followed, number of instructions."""
    rows = [[all(one), sum(one), len(one)] for one in results]
    return torch.tensor(rows, dtype=torch.float64)


def rates(rows: torch.Tensor) -> torch.Tensor:
    """(..., N, 3) -> (..., 2): accuracy by prompt, and by instruction."""
    total = rows.sum(-2)
    return torch.stack([total[..., 0] / rows.shape[-2], total[..., 1] / total[..., 2]], -1)


def interval(values: torch.Tensor) -> list[float]:
    return values.quantile(torch.tensor([0.025, 0.975], dtype=values.dtype)).tolist()


def score(paths: list[str], out: str | None) -> None:
    utils = load_checker()
    counts = [shares(follows(utils, path)) for path in paths]
    if len({len(rows) for rows in counts}) > 1:
        raise ValueError("the files have different numbers of prompts")

    # The same prompts are drawn for every file, so that differences are of pairs.
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(len(counts[0]), (RESAMPLES, len(counts[0])), generator=generator)
    first = rates(counts[0]), rates(counts[0][drawn])
    result = {}
    for path, rows in zip(paths, counts):
        now, resampled = rates(rows), rates(rows[drawn])
        result[path] = {}
        for place, level in enumerate(("prompt", "instruction")):
            result[path][level] = {
                "strict": now[place].item(),
                "interval": interval(resampled[:, place]),
                "difference": (now - first[0])[place].item(),
                "difference_interval": interval((resampled - first[1])[:, place]),
            }
            numbers = [100 * now[place].item(), *(100 * end for end in result[path][level]["difference_interval"])]
            print(f"{path:40} by {level:12} {numbers[0]:5.1f} %   against the first: {numbers[1]:+.1f} to {numbers[2]:+.1f}")
    if out:
        write_json(out, result)


def main() -> int:
    parser = Parser(description=__doc__)
    parser.add_argument("answers", nargs="+", help="files that real.ifeval wrote, the base's first")
    parser.add_argument("--out", help="JSON to write")
    args = parser.parse_args()
    return exit_code("score_ifeval", lambda: score(args.answers, args.out), out=args.out, inputs=args.answers)


if __name__ == "__main__":
    sys.exit(main())
