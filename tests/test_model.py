"""Claims about model.py. The reference values are transformers' (see ../shared/data/README.md), or transformers itself."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, tiny_config
from safetensors.torch import load_file, save_file

from data import Tokenizer
from generate import generate
from model import ModelConfig, Transformer, initialize
from sppo import sequence_logps

CHECKPOINTS = [f"{name}/{dtype}" for name in ("v02", "v01-swa", "tied") for dtype in ("fp32", "bf16")]


def reference(shared, name):
    folder = shared / "tiny-mistral" / name
    return (folder, Transformer.from_pretrained(folder, dtype="float32"), np.load(folder / "expected.npz"))


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_logits_equal_transformers_padded_or_not(shared, name):
    _, model, expected = reference(shared, name)
    tokens = torch.tensor(expected["input_ids"])
    padded = model(tokens).detach().numpy()
    for row, length in enumerate(expected["lengths"]):
        alone = model(tokens[row, None, :length])[0].detach().numpy()
        for logits in (padded[row, :length], alone):
            assert np.abs(logits - expected["logits"][row, :length]).max() < 1e-4


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_summed_logps_of_the_span_equal_transformers_padded_or_not(shared, name):
    _, model, expected = reference(shared, name)
    tokens, length = torch.tensor(expected["input_ids"]), expected["lengths"]
    mask = torch.zeros_like(tokens, dtype=torch.bool)
    for row, (start, end) in enumerate(expected["response_span"]):
        mask[row, start:end] = True
    padded = sequence_logps(model(tokens), tokens, mask)
    alone = [
        sequence_logps(model(tokens[row, None, :n]), tokens[row, None, :n], mask[row, None, :n])[0]
        for row, n in enumerate(length)
    ]
    for logps in (padded, torch.stack(alone)):
        assert np.abs(logps.detach().numpy() - expected["sum_logprob"]).max() < 1e-3


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_gradient_norms_equal_transformers(shared, name):
    _, model, expected = reference(shared, name)
    tokens = torch.tensor(expected["input_ids"])
    mask = torch.zeros_like(tokens, dtype=torch.bool)
    for row, (start, end) in enumerate(expected["response_span"]):
        mask[row, start:end] = True
    sequence_logps(model(tokens), tokens, mask).sum().backward()
    parameters = dict(model.named_parameters())
    assert set(expected["grad_names"]) == set(parameters)
    for parameter, norm in zip(expected["grad_names"], expected["grad_norms"]):
        assert parameters[parameter].grad.norm().item() == pytest.approx(norm, rel=2e-3), parameter


@pytest.mark.parametrize("rows", [1, 256])  # a pool of one row: each prompt alone; of 256: both, right-padded together
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_greedy_tokens_equal_transformers(shared, name, rows):
    _, model, expected = reference(shared, name)
    prompts = [ids[:n].tolist() for ids, n in zip(expected["input_ids"], expected["greedy_prompt_len"])]
    responses = generate(model, prompts, 1, 32, stop_token=None, temperature=0, rows=rows)
    assert [r[0] for r in responses] == expected["greedy_tokens"].tolist()


@pytest.mark.parametrize("form", ["config.v5.json", "config.legacy.json", "config.both.json"])
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_every_form_of_config_means_the_same(shared, name, form):
    folder = shared / "tiny-mistral" / name
    assert ModelConfig.from_json(folder / form) == ModelConfig.from_json(folder / "config.json")


def test_bfloat16_loads_as_bfloat16(shared):
    model = Transformer.from_pretrained(shared / "tiny-mistral/v02/bf16")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_real_tokenizer_and_model_agree_with_transformers_from_text_to_greedy_text(shared):
    folder = shared / "tiny-mistral/chat32k"
    tokenizer, model = Tokenizer(folder), Transformer.from_pretrained(folder, dtype="float32")
    for case in json.loads((folder / "expected.json").read_text())["cases"]:
        tokens = torch.tensor([tokenizer.chat(case["messages"])])
        mask = torch.arange(tokens.shape[1])[None] >= len(case["prompt_ids"])
        assert tokens[0].tolist() == case["ids"]
        assert sequence_logps(model(tokens), tokens, mask).item() == pytest.approx(case["sum_logprob"], abs=1e-3)
        greedy = generate(model, [case["prompt_ids"]], 1, len(case["greedy_ids"]), None, temperature=0)[0][0]
        assert greedy == case["greedy_ids"]


def test_pretrained_stories_continue_as_transformers_continues_them(shared):
    folder = shared / "stories260K"
    tokenizer, model = Tokenizer(folder), Transformer.from_pretrained(folder)
    for case in json.loads((folder / "expected_generate.json").read_text())["cases"]:
        assert tokenizer.prompt_ids(case["prompt"], "plain") == case["prompt_ids"]
        greedy = generate(model, [case["prompt_ids"]], 1, len(case["greedy_ids"]), None, temperature=0)[0][0]
        assert greedy == case["greedy_ids"]


@pytest.mark.parametrize("shard_bytes", [10**9, 20_000])
@pytest.mark.parametrize("name", ["v02/fp32", "v01-swa/bf16", "tied/fp32"])
def test_what_we_save_is_loaded_by_transformers_with_identical_logits(shared, tmp_path, name, shard_bytes):
    transformers = pytest.importorskip("transformers")
    folder = shared / "tiny-mistral" / name
    Transformer.from_pretrained(folder).save_pretrained(tmp_path / "ours", shard_bytes)
    tokens = torch.tensor(np.load(folder / "expected.npz")["input_ids"])
    load = transformers.AutoModelForCausalLM.from_pretrained
    before, after = load(folder), load(tmp_path / "ours")
    assert torch.equal(before(tokens).logits, after(tokens).logits)
    assert after.dtype == before.dtype


def test_llama_with_plain_rotary_embedding_equals_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    theirs = transformers.LlamaForCausalLM(config)
    theirs.save_pretrained(tmp_path / "llama")
    tokens = torch.randint(50, (2, 20))
    ours = Transformer.from_pretrained(tmp_path / "llama")
    assert (ours(tokens) - theirs(tokens).logits).abs().max() < 1e-5
    ours.save_pretrained(tmp_path / "saved")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert isinstance(again, transformers.LlamaForCausalLM)
    assert torch.equal(again(tokens).logits, theirs(tokens).logits)


def test_future_tokens_cannot_change_past_logits(tiny_model):
    tokens = torch.randint(50, (1, 12), generator=torch.Generator().manual_seed(1))
    changed = tokens.clone()
    changed[0, 8:] = (changed[0, 8:] + 1) % 50
    assert torch.allclose(tiny_model(tokens)[:, :8], tiny_model(changed)[:, :8], atol=1e-6)
    assert not torch.allclose(tiny_model(tokens)[:, 8:], tiny_model(changed)[:, 8:], atol=1e-3)


def test_tokens_outside_the_window_are_not_seen():
    """Two layers of window 4 reach back 6 tokens in all."""
    config = tiny_config(sliding_window=4)
    model = initialize(Transformer(config), torch.Generator().manual_seed(0))
    tokens = torch.randint(50, (1, 12), generator=torch.Generator().manual_seed(1))
    changed = tokens.clone()
    changed[0, 0] = (changed[0, 0] + 1) % 50
    moved = (model(tokens) - model(changed)).abs().amax(-1)[0] > 1e-6
    assert moved.tolist() == [True] * 7 + [False] * 5


# ------------------------------------------------------------------------------------------------ bad checkpoints


@pytest.fixture
def checkpoint(tmp_path, tiny_model):
    tiny_model.save_pretrained(tmp_path / "model", shard_bytes=20_000)
    return tmp_path / "model"


def shard_of(folder, tensor):
    return folder / json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"][tensor]


def edit_shard(path, change):
    tensors = load_file(path)
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)


def test_save_and_load_is_exact(checkpoint, tiny_model):
    loaded = dict(Transformer.from_pretrained(checkpoint).named_parameters())
    assert len(list(checkpoint.glob("*.safetensors"))) > 1
    assert all(torch.equal(parameter, loaded[name]) for name, parameter in tiny_model.named_parameters())


def test_missing_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        Transformer.from_pretrained(tmp_path / "nowhere")


def test_missing_tensor_is_named(checkpoint):
    name = "model.layers.1.mlp.up_proj.weight"
    index = checkpoint / "model.safetensors.index.json"
    edit_shard(shard_of(checkpoint, name), lambda tensors: tensors.pop(name))
    with pytest.raises(ValueError, match=f"{name} is missing, but the index"):
        Transformer.from_pretrained(checkpoint)
    weights = json.loads(index.read_text())
    del weights["weight_map"][name]
    index.write_text(json.dumps(weights))
    with pytest.raises(ValueError, match=f"{name} is missing"):
        Transformer.from_pretrained(checkpoint)


def test_misshapen_tensor_is_named_with_both_shapes(checkpoint):
    name = "model.layers.0.self_attn.k_proj.weight"
    edit_shard(shard_of(checkpoint, name), lambda tensors: tensors.update({name: tensors[name][:5]}))
    with pytest.raises(ValueError, match=rf"{name} is \(5, 32\), expected \(16, 32\)"):
        Transformer.from_pretrained(checkpoint)


def test_unexpected_tensor_is_named(tmp_path, tiny_model):
    tiny_model.save_pretrained(tmp_path / "model")
    bias = {"model.layers.0.self_attn.q_proj.bias": torch.zeros(3)}
    edit_shard(tmp_path / "model/model.safetensors", lambda tensors: tensors.update(bias))
    with pytest.raises(ValueError, match="unexpected tensor model.layers.0.self_attn.q_proj.bias"):
        Transformer.from_pretrained(tmp_path / "model")


def test_truncated_file_is_named(checkpoint):
    path = shard_of(checkpoint, "model.norm.weight")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=f"{path.name}: not a whole safetensors file"):
        Transformer.from_pretrained(checkpoint)


def test_shard_that_the_index_names_but_is_absent_is_named(checkpoint):
    path = shard_of(checkpoint, "model.norm.weight")
    path.unlink()
    with pytest.raises(FileNotFoundError, match=f"{path.name}: no such file, but .*index.json names it"):
        Transformer.from_pretrained(checkpoint)


def test_pickled_weights_are_refused(tmp_path, checkpoint):
    shutil.copytree(checkpoint, tmp_path / "pickled", ignore=shutil.ignore_patterns("*safetensors*"))
    (tmp_path / "pickled/pytorch_model.bin").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match="pytorch_model.bin is a pickle"):
        Transformer.from_pretrained(tmp_path / "pickled")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gpt2"}, 'model_type is "gpt2", expected mistral or llama'),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, 'rope_type is "yarn"'),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, 'rope_type is "linear"'),
        ({"attention_bias": True}, "attention_bias is true"),
        ({"hidden_act": "gelu"}, 'hidden_act is "gelu"'),
        ({"hidden_size": None}, "hidden_size is null, expected a positive integer"),
        ({"num_key_value_heads": 3}, "num_key_value_heads is 3, expected a divisor"),
        ({"dtype": "int8"}, 'dtype is "int8"'),
    ],
)
def test_an_architecture_that_is_not_ours_is_refused_by_name(checkpoint, change, message):
    path = checkpoint / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=message):
        Transformer.from_pretrained(checkpoint)


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="peak memory is read from Linux's /proc")
@pytest.mark.parametrize("dtype, share", [("float32", 1.15), ("bfloat16", 0.65)])
def test_loading_peaks_at_little_more_than_the_weights(tmp_path, dtype, share):
    """A 540 MB checkpoint, a quarter of it one tensor; the peak is that of resident memory, mapped pages included."""
    config = tiny_config(vocab_size=32_000, hidden_size=1024, intermediate_size=4096, num_hidden_layers=5, head_dim=64)
    Transformer(config).save_pretrained(tmp_path / "big")
    Transformer(tiny_config()).save_pretrained(tmp_path / "small")
    script = """
import re, sys
import torch
from model import Transformer
def status(key):
    return 1024 * int(re.search(key + r":\\s+(\\d+)", open("/proc/self/status").read())[1])
Transformer.from_pretrained(sys.argv[1] + "/small", sys.argv[2])  # whatever is loaded with the first model
open("/proc/self/clear_refs", "w").write("5")  # the peak begins here
before = status("VmRSS")
model = Transformer.from_pretrained(sys.argv[1] + "/big", sys.argv[2])
print(status("VmHWM") - before)
"""
    command = [sys.executable, "-c", script, str(tmp_path), dtype]
    peak = int(subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout)
    size = (tmp_path / "big/model.safetensors").stat().st_size
    assert size > 5e8 and peak < share * size
    shutil.rmtree(tmp_path / "big")
