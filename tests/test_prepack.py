"""Layers with prepacked weights: the same text, and afterwards the same model."""

import pytest
import torch
import transformers
from conftest import tiny_settings

from engine import prepack
from engine.prepack import prepacked
from generate import generate
from model import ModelConfig, Transformer, initialize
from plan import plan
from toy.debug import build_debugging

SIZES = dict(
    vocab_size=512, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=64, max_position_embeddings=128,
)  # fmt: skip
PROMPTS = [[1, 7, 9, 400, 30], [3], [1, 5] * 20]

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")


def seeded(number):
    return torch.Generator().manual_seed(number)


def pair(folder, **changes):
    """One of our models, and the same of transformers: biases are random too."""
    options = transformers.AutoConfig.for_model("qwen2", **(SIZES | changes))
    torch.manual_seed(0)
    theirs = transformers.AutoModelForCausalLM.from_config(options).eval()
    for name, parameter in theirs.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    theirs.save_pretrained(folder)
    return Transformer.from_pretrained(folder), theirs


def build(dtype=torch.float32):
    return initialize(Transformer(ModelConfig(**SIZES)), seeded(0)).to(dtype)


@pytest.mark.parametrize("tied", [False, True])
@torch.no_grad()
def test_prepacked_logits_are_those_of_transformers(tmp_path, tied):
    ours, theirs = pair(tmp_path / "model", tie_word_embeddings=tied)
    tokens = torch.randint(512, (3, 21), generator=seeded(1))
    expected = theirs(tokens).logits
    with prepacked(ours):
        replaced = [layer for layer in ours.modules() if isinstance(layer, torch.nn.Linear) and "forward" in vars(layer)]
        assert "head" in vars(ours) and len(replaced) == 2 * 5  # all of a layer but k_proj and v_proj, which are small
        torch.testing.assert_close(ours(tokens), expected, rtol=0, atol=1e-5)


def test_greedy_text_is_that_of_transformers(tmp_path):
    ours, theirs = pair(tmp_path / "model")
    written = [rows[0] for rows in generate(ours, PROMPTS, 1, 12, None, temperature=0)]
    for prompt, response in zip(PROMPTS, written):
        options = dict(max_new_tokens=12, min_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)
        assert response == theirs.generate(torch.tensor([prompt]), **options)[0, len(prompt) :].tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_text_does_not_depend_on_how_many_rows_decode_together(dtype):
    if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("this processor multiplies no bfloat16")
    model = build(dtype)
    together = generate(model, PROMPTS, 30, 12, 2, generator=seeded(3))
    for rows in (8, 31):
        assert generate(model, PROMPTS, 30, 12, 2, generator=seeded(3), rows=rows) == together


def test_afterwards_the_model_computes_with_its_own_weights_even_if_sampling_failed():
    model = build()
    tokens = torch.tensor([[5, 6, 7]])
    before = model(tokens)
    with pytest.raises(KeyboardInterrupt), prepacked(model):
        raise KeyboardInterrupt
    assert torch.equal(model(tokens), before)

    generate(model, PROMPTS, 2, 4, None, generator=seeded(3))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert not model(tokens).any()
    model(tokens).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_a_plan_counts_the_copies_that_sampling_on_a_cpu_makes(tmp_path, monkeypatch):
    build_debugging(tmp_path)
    config = tiny_settings(tmp_path, tmp_path / "run")
    copies = []
    reorder = torch.ops.mkldnn._reorder_linear_weight

    def copy(weight, rows):
        copies.append(weight.nbytes)
        return reorder(weight, rows)

    # Some of its matrices are large enough, and some are not.
    monkeypatch.setattr(prepack, "SMALLEST", 200)
    monkeypatch.setattr(torch.ops.mkldnn, "_reorder_linear_weight", copy)
    policy = Transformer.from_pretrained(config.policy)
    with prepacked(policy):
        linear = sum(isinstance(layer, torch.nn.Linear) for layer in policy.modules())
        assert 0 < len(copies) < linear + 1
    memory = {gpu: plan(config, gpu=gpu)["stages"]["sample"]["memory"] for gpu in ("cpu", "h100")}
    assert memory["cpu"]["copy"] == sum(copies) and "copy" not in memory["h100"]

    monkeypatch.setattr(prepack, "LARGEST", 1000)
    assert plan(config, gpu="cpu")["stages"]["sample"]["memory"]["copy"] == 0


@pytest.mark.parametrize("reason", ["a dtype of no use", "too large", "private names that are gone"])
def test_where_it_cannot_be_the_layers_stay_as_they_are(monkeypatch, reason):
    model = build(torch.float64 if reason == "a dtype of no use" else torch.float32)
    if reason == "too large":
        monkeypatch.setattr(prepack, "LARGEST", 1000)
    if reason == "private names that are gone":
        monkeypatch.setattr(torch.ops, "mkldnn", object())
    with prepacked(model):
        assert "head" not in vars(model)
        assert not any("forward" in vars(layer) for layer in model.modules())
