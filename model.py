"""The policy: a Mistral transformer, and checkpoints in Hugging Face layout. Sampling from it stands in generate.py.

Modules are named as the tensors of a Hugging Face checkpoint are (`model.layers.0.self_attn.q_proj.weight`), so
loading is a copy by name. Read it from `Transformer` down to `Attention`.

Shapes: B rows, T tokens, S cached positions, V vocabulary, D width, H query heads, G key/value heads, Dh head size.
"""

import dataclasses
import json
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torch.utils.checkpoint import checkpoint

import ranks
from data import read_json, whole, write_json
from generate import KVCache, generate, prefill  # noqa: F401  what a policy can do, importable with it

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SHARD_BYTES = 5 * 10**9
BLOCK_BYTES = 2**24  # of a tensor, read at a time

# ------------------------------------------------------------------------------------------------ configuration

# What a config.json means by not naming a key: transformers' own defaults for the two architectures.
DEFAULTS = {
    "mistral": {"num_key_value_heads": 8, "sliding_window": 4096, "max_position_embeddings": 4096 * 32},
    "llama": {"num_key_value_heads": None, "sliding_window": None, "max_position_embeddings": 2048},
}
DEFAULTS_OF_BOTH = {"rms_norm_eps": 1e-6, "rope_theta": 1e4, "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2}


@dataclass(frozen=True)
class ModelConfig:
    """Sizes and constants of a checkpoint, under the names that its config.json uses."""

    vocab_size: int
    hidden_size: int  # D
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int  # H
    num_key_value_heads: int  # G, divides H
    head_dim: int  # Dh
    max_position_embeddings: int
    rms_norm_eps: float = 1e-5
    rope_theta: float = 1e4
    sliding_window: int | None = None  # a token sees itself and the window - 1 before it
    tie_word_embeddings: bool = False
    bos_token_id: int | None = 1
    eos_token_id: int | list | None = 2
    dtype: str = "float32"
    model_type: str = "mistral"

    @classmethod
    def from_json(cls, path):
        """Read a config.json, as Mistral-7B-Instruct-v0.2 ships it or as transformers 5 writes it.

        ValueError names the key whose value this implementation does not compute, or that is missing.
        """
        raw = read_json(path)

        def refuse(key, expected, found):
            raise ValueError(f"{path}: {key} is {json.dumps(found)}, expected {expected}")

        if (kind := raw.get("model_type")) not in DEFAULTS:
            refuse("model_type", "mistral or llama", kind)
        ropes = [raw.get(key) or {} for key in ("rope_scaling", "rope_parameters")]  # old and new name
        for rope in ropes:
            if not isinstance(rope, dict):
                refuse("rope_parameters", "an object", rope)
            if (rope_type := rope.get("rope_type", rope.get("type", "default"))) != "default":
                refuse("rope_type", '"default" (scaled rotary embeddings are not implemented)', rope_type)
        theta = [rope["rope_theta"] for rope in ropes if "rope_theta" in rope]
        if raw.get("hidden_act", "silu") != "silu":
            refuse("hidden_act", '"silu"', raw["hidden_act"])
        for key in ("attention_bias", "mlp_bias"):
            if raw.get(key):
                refuse(key, "false (biases are not implemented)", raw[key])

        values = DEFAULTS_OF_BOTH | DEFAULTS[kind] | {"dtype": raw.get("torch_dtype") or "float32"}
        values |= {"rope_theta": theta[-1]} if theta else {}
        values |= {f.name: raw[f.name] for f in dataclasses.fields(cls) if f.name in raw}
        if kind == "llama":
            values["sliding_window"] = None
        if values["dtype"] not in DTYPES:
            refuse("dtype", f"one of {', '.join(DTYPES)}", values["dtype"])

        def require_integers(*keys):
            for key in keys:
                if not isinstance(values.get(key), int) or values[key] < 1:
                    refuse(key, "a positive integer", values.get(key))

        require_integers("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        heads = values["num_attention_heads"]
        values["num_key_value_heads"] = values["num_key_value_heads"] or heads
        values["head_dim"] = values.get("head_dim") or values["hidden_size"] // heads
        require_integers("num_key_value_heads", "head_dim", "max_position_embeddings")
        if heads % values["num_key_value_heads"]:
            refuse("num_key_value_heads", f"a divisor of num_attention_heads = {heads}", values["num_key_value_heads"])
        return cls(**values)

    def to_json(self):
        """The dictionary of a config.json that every version of transformers reads alike."""
        rope = {"rope_theta": self.rope_theta, "rope_type": "default"}
        architecture = {"mistral": "MistralForCausalLM", "llama": "LlamaForCausalLM"}[self.model_type]
        fixed = {"architectures": [architecture], "hidden_act": "silu", "torch_dtype": self.dtype, "rope_parameters": rope}
        return fixed | dataclasses.asdict(self)


# ------------------------------------------------------------------------------------------------ the network


class RMSNorm(nn.Module):
    def __init__(self, size, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x):
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)


def rotary_angles(positions, head_dim, theta):
    """(B, T) positions -> cos, sin (B, 1, T, Dh) of position * theta^(-2i/Dh), float32; the last axis repeats its half."""
    frequency = theta ** -(torch.arange(0, head_dim, 2, device=positions.device).float() / head_dim)  # (Dh/2,)
    angle = positions[..., None].float() * frequency  # (B, T, Dh/2)
    angle = torch.cat([angle, angle], dim=-1)[:, None]  # (B, 1, T, Dh)
    return angle.cos(), angle.sin()


def rotate(x, cos, sin):
    """Turn each pair (x[i], x[i + Dh/2]) by its angle: the half-split pairing of Hugging Face checkpoints."""
    first, second = x.chunk(2, dim=-1)
    turned = torch.cat([-second, first], dim=-1)
    return x * cos.to(x.dtype) + turned * sin.to(x.dtype)


class Attention(nn.Module):
    """Grouped-query attention: H query heads share G key/value heads."""

    def __init__(self, config):
        super().__init__()
        D, Dh, H, G = config.hidden_size, config.head_dim, config.num_attention_heads, config.num_key_value_heads
        self.head_dim = Dh
        self.q_proj = nn.Linear(D, H * Dh, bias=False)
        self.k_proj = nn.Linear(D, G * Dh, bias=False)
        self.v_proj = nn.Linear(D, G * Dh, bias=False)
        self.o_proj = nn.Linear(H * Dh, D, bias=False)

    def forward(self, x, cos, sin, mask, layer_cache):
        B, T, _ = x.shape
        q = self.q_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, H, T, Dh)
        k = self.k_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, G, T, Dh)
        v = self.v_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, G, T, Dh)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if layer_cache is not None:
            k, v = layer_cache(k, v)  # (B, G, S, Dh): this row's past and present
        if T == 1:  # the H/G heads of a group see the same keys: as rows of one matrix, for which no key is read twice
            y = F.scaled_dot_product_attention(q.view(B, k.shape[1], -1, self.head_dim), k, v, attn_mask=mask)
        else:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True).transpose(1, 2)
        return self.o_proj(y.reshape(B, T, -1))


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, config):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x, cos, sin, mask, layer_cache):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, mask, layer_cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """Everything below the vocabulary: tokens (B, T) -> normalised hidden states (B, T, D).

    With a cache (generate.py) a row's tokens stand behind the positions that it has already, and are added to them.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.recompute = False  # keep only each layer's input for the backward pass, which runs the layer again

    def forward(self, tokens, cache=None):
        config, T = self.config, tokens.shape[1]
        S = T if cache is None else cache.size
        window = config.sliding_window or S
        position = torch.arange(T, device=tokens.device)[None]  # (1, T)
        if cache is not None:
            position = position + cache.length[:, None]  # (B, T)
        mask = None  # plain causal attention needs none: as many tokens as positions have no past
        if T < S or window < S:
            distance = position[:, None, :, None] - torch.arange(S, device=tokens.device)  # (B, 1, T, S)
            mask = (0 <= distance) & (distance < window)
        cos, sin = rotary_angles(position, config.head_dim, config.rope_theta)
        x = self.embed_tokens(tokens)  # (B, T, D)
        for index, layer in enumerate(self.layers):
            if self.recompute and torch.is_grad_enabled():
                x = checkpoint(layer, x, cos, sin, mask, None, use_reentrant=False, preserve_rng_state=False)
            else:
                x = layer(x, cos, sin, mask, cache and cache.layer(index, position))
        if cache is not None:
            cache.length = cache.length + T
        return self.norm(x)


class Transformer(nn.Module):
    """Tokens (B, T) -> logits (B, T, V), of every position; the logits at t are for token t + 1.

    Who wants something else of the hidden states (B, T, D) gives `read(hidden, head)`, where head(hidden) are logits.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def head(self, hidden):
        """(..., D) -> logits (..., V)."""
        weight = self.model.embed_tokens.weight if self.config.tie_word_embeddings else self.lm_head.weight
        return F.linear(hidden, weight)

    def forward(self, tokens, read=lambda hidden, head: head(hidden)):
        return read(self.model(tokens), self.head)

    @classmethod
    def from_pretrained(cls, folder, dtype=None, device=None):
        """Read a checkpoint folder. `dtype` is a name or a torch.dtype; None keeps the one in config.json.

        FileNotFoundError or ValueError names the file or tensor that is missing, unexpected, misshapen or truncated.
        """
        config = ModelConfig.from_json(Path(folder) / "config.json")
        return load_pretrained(cls, config, folder, dtype, device)

    def save_pretrained(self, folder, shard_bytes=SHARD_BYTES):
        """Write a new folder in Hugging Face layout, whole or not at all. FileExistsError if something is there."""
        with whole(folder) as temporary:
            self.write_pretrained(temporary, shard_bytes)

    def write_pretrained(self, folder, shard_bytes=SHARD_BYTES):
        save_checkpoint(self, folder, shard_bytes=shard_bytes)


def check_device(device):
    """ValueError if this machine, or this torch, has no such device."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {device}: {str(error).splitlines()[0]}") from None


@torch.no_grad()
def initialize(module, generator):
    """Random weights: matrices normal with variance 1/(columns), norms one. The generator's state decides them all."""
    for parameter in module.parameters():
        parameter.normal_(0, parameter.shape[-1] ** -0.5, generator=generator) if parameter.dim() > 1 else parameter.fill_(1)
    return module


# ------------------------------------------------------------------------------------------------ checkpoints


def load_pretrained(cls, config, folder, dtype=None, device=None, **options):
    """Build cls(config, **options) with memory of the right type and no numbers in it, and read the folder's tensors into it."""
    with uninitialized(DTYPES.get(dtype or config.dtype, dtype), device or "cpu"):
        model = cls(config, **options)
    load_weights(model, folder)
    return model


@contextmanager
def uninitialized(dtype, device):
    """Modules built in here have this dtype and device, and matrices are not drawn: that takes longer than reading them."""
    kinds, before = (nn.Linear, nn.Embedding), torch.get_default_dtype()
    draw = [kind.reset_parameters for kind in kinds]
    try:
        for kind in kinds:
            kind.reset_parameters = lambda module: None
        torch.set_default_dtype(dtype)
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(before)
        for kind, method in zip(kinds, draw):
            kind.reset_parameters = method


def weight_files(folder):
    """{tensor name: path of the safetensors file that holds it}, from the index or from the single file."""
    folder, single = Path(folder), Path(folder) / "model.safetensors"
    index = folder / "model.safetensors.index.json"
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder, expected a checkpoint in Hugging Face layout")
    if index.is_file():
        files = read_json(index).get("weight_map")
        if not isinstance(files, dict) or not all(isinstance(name, str) for name in files.values()):
            raise ValueError(f"{index}: expected a weight_map from tensor names to file names")
        for name in sorted(set(files.values())):
            if not (folder / name).is_file():
                raise FileNotFoundError(f"{folder / name}: no such file, but {index.name} names it")
        return {tensor: folder / name for tensor, name in files.items()}
    if not single.is_file():
        pickled = sorted(path.name for path in folder.glob("*.bin"))
        hint = f" ({pickled[0]} is a pickle, which is never read: convert it)" if pickled else ""
        raise FileNotFoundError(f"{single}: no such file, and no {index.name}{hint}")
    with open_weights(single) as file:
        return dict.fromkeys(file.keys(), single)


def open_weights(path):
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{path}: not a whole safetensors file (truncated?): {error}") from None


@torch.no_grad()
def load_weights(module, folder, prefix="", unused=()):
    """Copy the folder's tensors into the module's parameters by name (behind `prefix`), casting to their dtype.

    Each tensor is mapped, copied and let go in blocks, so the peak is one copy of the weights and a few blocks; of sharded
    parameters each process reads its rows. Names that begin with one of `unused` may be there; old checkpoints' tables of
    positions and a tied lm_head always may.
    """
    parameters, files = {prefix + name: p for name, p in module.named_parameters()}, weight_files(folder)
    if missing := sorted(parameters.keys() - files.keys()):
        raise ValueError(f"{folder}: tensor {missing[0]} is missing ({len(missing)} of {len(parameters)} are)")
    tied = ("lm_head.",) if getattr(module.config, "tie_word_embeddings", False) else ()
    for name in files.keys() - parameters.keys():
        if not name.startswith((*unused, *tied)) and not name.endswith(("rotary_emb.inv_freq", "position_ids")):
            raise ValueError(f"{files[name]}: unexpected tensor {name}, which this architecture does not have")
    path, read = None, 0
    for name, parameter in parameters.items():
        rows, (own, begin) = max(1, BLOCK_BYTES * len(parameter) // parameter.nbytes), ranks.local(parameter)
        for part, start in zip(own.split(rows), range(begin, begin + len(own), rows)):
            if path != files[name] or read > BLOCK_BYTES:
                path, file, read = files[name], open_weights(files[name]), 0  # the one before goes, with what it has mapped
            tensor = find_tensor(file, path, name, tuple(parameter.shape))
            part.copy_(tensor[start : start + len(part)])
            read += part.nbytes


def find_tensor(file, path, name, shape):
    """A tensor of an open file, not read yet. ValueError if it is not there, or has another shape."""
    try:
        tensor = file.get_slice(name)
    except SafetensorError:
        raise ValueError(f"{path}: tensor {name} is missing, but the index places it here") from None
    if (found := tuple(tensor.get_shape())) != shape:
        raise ValueError(f"{path}: tensor {name} is {found}, expected {shape}")
    return tensor


def save_checkpoint(module, folder, extra=None, shard_bytes=SHARD_BYTES):
    """Write weights and config.json, which gets the dtype that the weights have, and `extra` keys.

    Sharded weights are put together tensor by tensor, by all processes; the first one writes, a file at a time.
    """
    save_weights(module, folder, shard_bytes)
    if not ranks.first():
        return
    dtype = str(next(module.parameters()).dtype).removeprefix("torch.")
    config = dataclasses.replace(module.config, dtype=dtype).to_json()
    write_json(Path(folder) / "config.json", config | (extra or {}))


def save_weights(module, folder, shard_bytes=SHARD_BYTES):
    """Write the parameters as model.safetensors, or as numbered shards with an index when they are larger."""
    folder, shards, room = Path(folder), [], 0
    folder.mkdir(parents=True, exist_ok=True)
    for name, parameter in module.named_parameters():
        if not shards or room + parameter.nbytes > shard_bytes:
            shards.append({})
            room = 0
        shards[-1][name] = parameter.detach()
        room += parameter.nbytes
    count = len(shards)
    names = [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)] if count > 1 else ["model.safetensors"]
    for name, shard in zip(names, shards):
        tensors = ranks.gathered(shard)
        try:
            if ranks.first():
                save_file(tensors, folder / name, metadata={"format": "pt"})
        except SafetensorError as error:  # the library's own class for a full disk
            raise OSError(f"{name}: {error}") from None
    if count > 1 and ranks.first():
        weight_map = {tensor: name for name, shard in zip(names, shards) for tensor in shard}
        total = sum(parameter.nbytes for parameter in module.parameters())
        write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})
