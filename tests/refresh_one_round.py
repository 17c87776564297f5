"""The output on docs/one-round.md. `python tests/refresh_one_round.py` writes it anew; then read the prose, which names rows.

The page's text blocks, one after the other, are what `python -m toy.debug --rounds 1` prints about its round.
"""

import os
import re
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import train  # noqa: E402
from engine.run_folder import Metrics, RecordedGame  # noqa: E402
from engine.trace import TracedGame  # noqa: E402
from sppo import row_losses, sppo_round  # noqa: E402
from toy import debug  # noqa: E402

PAGE = ROOT / "docs/one-round.md"
BLOCK = re.compile(r"^```text\n(.*?)^```$", re.M | re.S)


def traced_round(config: train.TrainConfig) -> tuple:
    """Play the first round of a run. Returns the traced game and what sppo_round returned."""
    policy, tokenizer, judge, prompts = train.load(config)
    metrics = Metrics(Path(config.out) / "metrics.jsonl")
    Path(config.out).mkdir(parents=True, exist_ok=True)
    text_game = train.TextGame(config, policy, tokenizer, judge, 1, train.load_opponents(config, prompts))
    game = TracedGame(RecordedGame(text_game, metrics))
    return game, sppo_round(game, prompts[0], config, text_game.generator(1))


def debugging_round(folder: Path) -> str:
    """The report on the first round of `python -m toy.debug`, played in this folder."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        debug.build_debugging(debug.WORLD)
        game, result = traced_round(train.parse_config(debug.FLAGS))
    finally:
        os.chdir(before)
    return game.report(result, row_losses)


def shown(page: str) -> str:
    """The report, put together from the page's blocks."""
    return "\n".join(BLOCK.findall(page)).rstrip("\n")


def refresh(page: str, report: str) -> str:
    pieces = iter(report.split("\n\n"))
    return BLOCK.sub(lambda match: f"```text\n{next(pieces)}\n```", page)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        report = debugging_round(Path(folder))
    PAGE.write_text(refresh(PAGE.read_text(encoding="utf-8"), report), encoding="utf-8")


if __name__ == "__main__":
    main()
