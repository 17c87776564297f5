"""What several test files share: where the reference values are, and small models to try things on."""

import builtins
import re
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import train  # noqa: E402
from model import ModelConfig, Transformer, initialize  # noqa: E402

torch.set_num_threads(1)  # small models: a second thread only waits when the cores are shared


@pytest.fixture(scope="session")
def shared():
    """The folder of reference values made by other software; a user's clone does not have it."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("the folder of reference values, ../shared/data, is not here")
    return folder


def tiny_config(**changes):
    sizes = dict(
        vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=128,
    )  # fmt: skip
    return ModelConfig(**(sizes | changes))


@pytest.fixture
def tiny_model():
    return initialize(Transformer(tiny_config()), torch.Generator().manual_seed(0))


def letters(prompt, responses):
    """A judge to whom every difference in text matters, so that a round of any policy has something to learn."""
    score = torch.tensor([sum(map(ord, text)) / 40 for text in responses])
    return torch.sigmoid(score[:, None] - score)


def flat(prompt, responses):
    """A judge to whom all responses are alike."""
    return torch.full((len(responses), len(responses)), 0.5)


def tiny_settings(world, run, **changes):
    """Settings of a run on the small world for the debugger (toy.debug.build_debugging); it takes a fraction of a second."""
    settings = dict(
        policy=f"{world}/policy", judge="conftest:letters", prompts=f"{world}/prompts.jsonl", out=str(run), rounds=2,
        samples=3, max_new_tokens=4, template="plain", reuse_prompts=True, eta=2.0, optimizer="adamw", lr=1e-2, warmup=0.0,
        batch=2, micro_batch=2, epochs=2, select="all",
    )  # fmt: skip
    return train.TrainConfig(**(settings | changes))


def tiny_run(world, run, **changes):
    """Play it; returns the lines of its metrics."""
    return train.run(tiny_settings(world, run, **changes))


PRINTING = tuple(str(ROOT / place) for place in ("train.py", "prefmodel.py", "evaluate", "engine", "toy", "real"))
WIDEST = 100  # columns


@pytest.fixture(autouse=True)
def narrow_prints(monkeypatch):
    """Whatever a test makes a command print fits into 100 columns; paths, which are a test's own, apart."""
    kept = builtins.print

    def narrow(*words, **options):
        caller = sys._getframe(1).f_code.co_filename
        if caller.startswith(PRINTING) and "file" not in options:
            for line in " ".join(map(str, words)).splitlines():
                found = re.sub(r"\S*/\S+", "", line)
                assert len(found) <= WIDEST, f"{len(found)} columns: {found}"
        kept(*words, **options)

    monkeypatch.setattr(builtins, "print", narrow)
