"""What several test files share: where the reference values are, and small models to try things on."""

import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from model import ModelConfig, Transformer, initialize  # noqa: E402

torch.set_num_threads(2)


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
    return initialize(Transformer(tiny_config()), torch.Generator().manual_seed(0), std=0.3)
