"""Claims about families of models: small random checkpoints that transformers makes, computed alike and saved alike."""

import json

import pytest
import torch

from generate import generate
from model import ModelConfig, Transformer, initialize

transformers = pytest.importorskip("transformers")

SIZES = dict(
    vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=256,
)  # fmt: skip
SCALED = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32)
CASES = {
    "mistral": ("mistral", dict(sliding_window=16)),
    "llama": ("llama", dict(tie_word_embeddings=True)),
    "llama, scaled rotary embedding": ("llama", dict(rope_theta=5e5, head_dim=16, rope_scaling=SCALED)),
    "qwen2": ("qwen2", dict(tie_word_embeddings=True)),
    "qwen3": ("qwen3", dict(head_dim=16)),
}


@pytest.fixture(scope="module", params=CASES)
def both(request, tmp_path_factory):
    """Their model with every parameter drawn, its folder, and ours of that folder."""
    kind, changes = CASES[request.param]
    torch.manual_seed(0)
    theirs = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(kind, **(SIZES | changes))).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(0, 0.3) if parameter.dim() > 1 else parameter.add_(0.3 * torch.randn_like(parameter))
    folder = tmp_path_factory.mktemp("family") / "model"
    theirs.save_pretrained(folder)
    return theirs, folder, Transformer.from_pretrained(folder)


TOKENS = torch.randint(60, (2, 100), generator=torch.Generator().manual_seed(1))


def test_logits_and_gradients_are_those_of_transformers(both):
    theirs, _, ours = both
    expected = theirs(TOKENS).logits
    assert torch.allclose(ours(TOKENS), expected, atol=1e-4)
    for module, logits in ((ours, ours(TOKENS)), (theirs, expected)):
        module.zero_grad()
        logits.log_softmax(-1)[..., 7].mean().backward()
    gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    for name, parameter in ours.named_parameters():
        assert torch.allclose(parameter.grad, gradients[name], atol=1e-5), name


def test_greedy_tokens_with_the_cache_are_those_of_transformers(both):
    theirs, _, ours = both
    prompts = [TOKENS[0, :20].tolist(), TOKENS[1, :33].tolist()]
    for prompt, (response,) in zip(prompts, generate(ours, prompts, 1, 40, None, temperature=0)):
        everything = torch.ones(1, len(prompt), dtype=torch.long)  # else token 0 counts as padding
        options = dict(attention_mask=everything, max_new_tokens=40, do_sample=False, eos_token_id=None, pad_token_id=0)
        assert response == theirs.generate(torch.tensor([prompt]), **options)[0, len(prompt) :].tolist()


def test_a_saved_folder_is_loaded_by_transformers_to_the_same_logits(both, tmp_path):
    theirs, _, ours = both
    ours.save_pretrained(tmp_path / "saved")
    again, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not any(report.values())
    assert torch.allclose(again.eval()(TOKENS).logits, theirs(TOKENS).logits, atol=1e-5)
    assert Transformer.from_pretrained(tmp_path / "saved").config == ours.config


def test_a_family_begins_with_biases_of_zero_and_norms_of_one(both):
    _, _, ours = both
    fresh = initialize(Transformer(ours.config), torch.Generator().manual_seed(0))
    for name, parameter in fresh.named_parameters():
        if parameter.dim() == 1:
            assert (parameter == (0 if name.endswith("bias") else 1)).all(), name


# What matters of the published config.json files.
LLAMA = dict(model_type="llama", hidden_act="silu", attention_bias=False, mlp_bias=False)
SMOLLM2 = LLAMA | dict(vocab_size=49152, max_position_embeddings=8192, rms_norm_eps=1e-5, tie_word_embeddings=True)
MISTRAL = dict(
    model_type="mistral",
    hidden_act="silu",
    rms_norm_eps=1e-5,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
)
QWEN = dict(
    hidden_act="silu", vocab_size=151936, rms_norm_eps=1e-6, rope_theta=1e6, use_sliding_window=False, tie_word_embeddings=True
)
LLAMA32 = dict(rope_type="llama3", factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0,
               original_max_position_embeddings=8192)  # fmt: skip
PUBLISHED = {  # config.json -> what we must read: (head_dim, rope_theta, sliding_window, key/value heads)
    "Llama-3-8B-Instruct": (
        LLAMA | dict(vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
                     num_key_value_heads=8, max_position_embeddings=8192, rope_theta=500000.0, rms_norm_eps=1e-5,
                     rope_scaling=None),
        (128, 5e5, None, 8),
    ),
    "Llama-3.2-1B-Instruct": (
        LLAMA | dict(vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
                     num_key_value_heads=8, head_dim=64, max_position_embeddings=131072, rope_theta=500000.0, rms_norm_eps=1e-5,
                     tie_word_embeddings=True, rope_scaling=LLAMA32, eos_token_id=[128001, 128008, 128009]),
        (64, 5e5, None, 8),
    ),
    "Qwen2.5-0.5B-Instruct": (
        QWEN | dict(model_type="qwen2", hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14,
                    num_key_value_heads=2, max_position_embeddings=32768, max_window_layers=21, sliding_window=32768),
        (64, 1e6, None, 2),
    ),
    "Qwen3-0.6B": (
        QWEN | dict(model_type="qwen3", hidden_size=1024, intermediate_size=3072, num_hidden_layers=28, num_attention_heads=16,
                    num_key_value_heads=8, head_dim=128, max_position_embeddings=40960, attention_bias=False,
                    sliding_window=None),
        (128, 1e6, None, 8),
    ),
    "Mistral-7B-Instruct-v0.3": (
        MISTRAL | dict(vocab_size=32768, hidden_size=4096, intermediate_size=14336, max_position_embeddings=32768,
                       rope_theta=1e6, sliding_window=None),
        (128, 1e6, None, 8),
    ),
    "Mistral-Nemo-Instruct-2407": (
        MISTRAL | dict(vocab_size=131072, hidden_size=5120, intermediate_size=14336, num_hidden_layers=40, head_dim=128,
                       max_position_embeddings=131072, rope_theta=1e6, sliding_window=None),
        (128, 1e6, None, 8),
    ),
    "Ministral-8B-Instruct-2410": (
        MISTRAL | dict(vocab_size=131072, hidden_size=4096, intermediate_size=12288, num_hidden_layers=36, head_dim=128,
                       max_position_embeddings=32768, rope_theta=1e8, sliding_window=32768),
        (128, 1e8, 32768, 8),
    ),
    "SmolLM2-135M-Instruct": (
        SMOLLM2 | dict(hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
                       num_key_value_heads=3, rope_theta=100000),
        (64, 1e5, None, 3),
    ),
    "SmolLM2-360M-Instruct": (
        SMOLLM2 | dict(hidden_size=960, intermediate_size=2560, num_hidden_layers=32, num_attention_heads=15,
                       num_key_value_heads=5, rope_theta=100000),
        (64, 1e5, None, 5),
    ),
    "SmolLM2-1.7B-Instruct": (
        SMOLLM2 | dict(hidden_size=2048, intermediate_size=8192, num_hidden_layers=24, num_attention_heads=32,
                       num_key_value_heads=32, rope_theta=130000),
        (64, 1.3e5, None, 32),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configurations_are_read_as_transformers_reads_them(tmp_path, name):
    raw, expected = PUBLISHED[name]
    (tmp_path / "config.json").write_text(json.dumps(raw))
    config = ModelConfig.from_json(tmp_path / "config.json")
    assert (config.head_dim, config.rope_theta, config.sliding_window, config.num_key_value_heads) == expected
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    assert config.tie_word_embeddings == theirs.tie_word_embeddings and config.rms_norm_eps == theirs.rms_norm_eps
    assert config.max_position_embeddings == theirs.max_position_embeddings
    assert config.rope_theta == theirs.rope_parameters["rope_theta"]
    assert (config.rope_scaling or {"rope_type": "default"})["rope_type"] == theirs.rope_parameters["rope_type"]


WRONG = {
    "another family": (dict(model_type="gpt2"), 'model_type is "gpt2", expected mistral or llama or qwen2 or qwen3'),
    "another scaling": (dict(rope_scaling={"rope_type": "yarn", "factor": 4.0}), 'rope_type is "yarn", expected'),
    "half a scaling": (dict(rope_scaling={"rope_type": "llama3", "factor": 8.0}), "low_freq_factor is null, expected a positive"),
    "a window in some layers": (dict(model_type="qwen2", use_sliding_window=True), "use_sliding_window is true, expected false"),
    "biases of a Llama": (dict(attention_bias=True), "attention_bias is true, expected false"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_a_family_does_not_compute_is_refused_by_the_name_of_its_key(tmp_path, case):
    changes, words = WRONG[case]
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED["Llama-3-8B-Instruct"][0] | changes))
    with pytest.raises(ValueError, match="config.json: ") as caught:
        ModelConfig.from_json(tmp_path / "config.json")
    assert words in str(caught.value) and "\n" not in str(caught.value)
