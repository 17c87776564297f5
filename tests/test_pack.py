"""Prompts that are computed once for all their responses: as if each sequence had been computed alone."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from data import Prompt, pack
from model import ModelConfig, Transformer, initialize

from train import TextGame, TrainConfig

SIZES = dict(
    vocab_size=50, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16, max_position_embeddings=64,
)  # fmt: skip

PROMPTS = [[1, 7, 9, 4, 30], [1], [1, 5, 5, 8, 41, 42, 3, 6, 11]]
RESPONSES = [
    [[4, 5, 9, 9, 2], [2], [7, 2]],
    [[3, 3, 3, 3, 3, 3, 3, 3, 8], [2], [2]],
    [[10, 11, 12, 2], [44, 45, 46, 47, 48, 49, 3, 4, 2], [9, 2]],
]


def alone(folder):
    """log π of each response by transformers, which sees one sequence at a time; the model, with gradients of their sum."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    logps = []
    for prompt, row in zip(PROMPTS, RESPONSES):
        for response in row:
            tokens = torch.tensor([prompt + response])
            every = model(tokens).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            logps.append(every.gather(1, tokens[0, len(prompt) :, None]).sum())
    torch.stack(logps).sum().backward()
    return torch.stack(logps).view(3, 3).detach(), model


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("limit", [0, 2**23], ids=["chunked head", "plain head"])
@pytest.mark.parametrize("window", [None, 1, 4])
def test_a_shared_prompt_gives_the_log_probs_and_gradients_of_sequences_computed_alone(
    tmp_path, monkeypatch, window, limit, recompute
):
    config = ModelConfig(**SIZES, sliding_window=window)
    policy = initialize(Transformer(config), torch.Generator().manual_seed(0))
    policy.save_pretrained(tmp_path / "policy")
    expected, theirs = alone(tmp_path / "policy")

    monkeypatch.setattr("generate.SMALL_LOGITS", limit)
    policy.model.recompute = recompute
    game = TextGame(TrainConfig(), policy, None, None, 1)
    logps = game.logps([Prompt("", ids) for ids in PROMPTS], RESPONSES)
    torch.testing.assert_close(logps, expected, rtol=0, atol=1e-5)

    logps.sum().backward()
    gradients = dict(theirs.named_parameters())
    for name, parameter in policy.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name].grad, rtol=1e-4, atol=1e-5)


def test_a_pack_has_a_prompt_once_and_no_last_tokens():
    """So many tokens, P + Σ (R - 1), go through the network, and --micro-tokens counts them so."""
    packed, _ = pack(PROMPTS, [[response[:-1] for response in row] for row in RESPONSES])
    expected = sum(map(len, PROMPTS)) + sum(len(response) - 1 for row in RESPONSES for response in row)
    assert packed.tokens.shape == packed.position.shape == (1, expected)

    game = TextGame(TrainConfig(), None, None, None, 1)
    prompts = [Prompt("", ids) for ids in PROMPTS]
    assert sum(game.tokens(*pair) for pair in zip(prompts, RESPONSES)) == expected


@pytest.mark.parametrize("size", [1, 2])
def test_the_shortest_prompt_and_response_that_can_be(size):
    """One token each: one token goes through the network, and attends to itself."""
    policy = initialize(Transformer(ModelConfig(**SIZES)), torch.Generator().manual_seed(0))
    prompts, responses = [[1]] * size, [[[2]]] * size
    game = TextGame(TrainConfig(), policy, None, None, 1)
    logps = game.logps([Prompt("", ids) for ids in prompts], responses)
    expected = policy(torch.tensor([[1]])).log_softmax(-1)[0, 0, 2]
    assert torch.allclose(logps, expected.expand(size, 1))


def test_what_one_response_says_changes_no_other():
    policy = initialize(Transformer(ModelConfig(**SIZES)), torch.Generator().manual_seed(0))
    game = TextGame(TrainConfig(), policy, None, None, 1)
    prompts = [Prompt("", ids) for ids in PROMPTS]
    changed = [[list(response) for response in row] for row in RESPONSES]
    changed[2][1] = [20, 21, 22, 23, 24, 25, 26, 27, 2]
    with torch.no_grad():
        before, after = game.logps(prompts, RESPONSES), game.logps(prompts, changed)
    same = torch.ones(3, 3, dtype=torch.bool)
    same[2, 1] = False
    assert torch.equal(before[same], after[same])
    assert before[2, 1] != after[2, 1]


def test_a_pack_by_hand():
    """Two prompts, with two continuations and an empty one: nine tokens, no copy, no padding."""
    packed, places = pack([[1, 5], [7]], [[[8, 9], [4]], [[]]])
    assert packed.tokens.tolist() == [[1, 5, 8, 9, 4, 7]]
    assert packed.position.tolist() == [[0, 1, 2, 3, 2, 0]]
    assert packed.queries.tolist() == [[0, 1], [2, 3], [4, 0], [5, 0]]
    assert packed.keys.tolist() == [[0, 1, 0, 0], [0, 1, 2, 3], [0, 1, 4, 0], [5, 0, 0, 0]]
    assert places.tolist() == [[1, 2, 3], [1, 4, 0], [5, 0, 0]]
    assert packed.place.tolist() == [0, 1, 2, 3, 4, 6]
