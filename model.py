"""The policy: a transformer of the Mistral, Llama or Qwen family. Sampling is in generate.py.

Modules are named like the tensors of a Hugging Face checkpoint, so that loading is a copy by name.
Read the network from `Transformer` up to `Attention`. Shapes: B rows, T tokens, S cached positions,
V vocabulary, D width, H query heads, G key/value heads, Dh head size; in a Pack L lines, N tokens.
"""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from engine.checkpoint import DTYPES, SHARD_BYTES, load_pretrained, save_checkpoint
from engine.files import atomic_write, read_json
from engine.schema import check, check_kinds, check_sizes, is_positive

# What a config.json means by leaving out a key: transformers' own defaults, of all and of each.
DEFAULTS = dict(
    rms_norm_eps=1e-6, rope_theta=1e4, tie_word_embeddings=False, bos_token_id=1, eos_token_id=2
)
MISTRAL = dict(num_key_value_heads=8, sliding_window=4096, max_position_embeddings=4096 * 32)
LLAMA = dict(num_key_value_heads=None, max_position_embeddings=2048)
QWEN2 = dict(num_key_value_heads=32, max_position_embeddings=32768)
QWEN3 = QWEN2 | dict(head_dim=128)


@dataclass(frozen=True)
class Family:
    """What distinguishes a model_type. A new family is a line in FAMILIES."""

    architecture: str  # its name in transformers
    defaults: dict
    windowed: bool = False  # whether sliding_window counts
    biased: bool = False  # queries, keys and values have biases
    normed: bool = False  # queries and keys are normalised, head by head, before they are rotated


FAMILIES = {
    "mistral": Family("MistralForCausalLM", MISTRAL, windowed=True),
    "llama": Family("LlamaForCausalLM", LLAMA),
    "qwen2": Family("Qwen2ForCausalLM", QWEN2, biased=True),
    "qwen3": Family("Qwen3ForCausalLM", QWEN3, normed=True),
}


@dataclass(frozen=True)
class ModelConfig:
    """Sizes and constants of a checkpoint, under the names that its config.json uses."""

    vocab_size: int  # V
    hidden_size: int  # D
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int  # H
    num_key_value_heads: int  # G, divides H
    head_dim: int  # Dh
    max_position_embeddings: int
    rms_norm_eps: float = 1e-5
    rope_theta: float = 1e4
    rope_scaling: dict | None = None  # of type llama3 (see scaled); None: plain rotary embedding
    sliding_window: int | None = None  # a token sees itself and the window - 1 before it
    tie_word_embeddings: bool = False
    bos_token_id: int | None = 1
    eos_token_id: int | list | None = 2
    dtype: str = "float32"
    model_type: str = "mistral"

    @classmethod
    def from_json(cls, path: str | Path) -> "ModelConfig":
        """Read a config.json. ValueError names a key that is missing, or a value not computed."""
        raw = read_json(path)
        rope = check_architecture(path, raw)
        family = FAMILIES[raw["model_type"]]
        names = [field.name for field in dataclasses.fields(cls)]

        # Old and new forms of the file. Later ones win: a plain key over its nested or old form.
        old = {"dtype": raw.get("torch_dtype") or "float32"}
        plain = {name: raw[name] for name in names if name in raw}
        values = DEFAULTS | family.defaults | rope | old | plain
        values["rope_scaling"] = rope["rope_scaling"]
        if not family.windowed:
            values["sliding_window"] = None

        dtype = values["dtype"]
        check(path, "dtype", dtype, dtype in tuple(DTYPES), f"one of {', '.join(DTYPES)}")

        check_kinds(path, values)

        # What follows from other sizes may be left out.
        sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
        check_sizes(path, values, *sizes, "num_attention_heads")
        H = values["num_attention_heads"]
        values["num_key_value_heads"] = values["num_key_value_heads"] or H
        values["head_dim"] = values.get("head_dim") or values["hidden_size"] // H
        check_sizes(path, values, "num_key_value_heads", "head_dim", "max_position_embeddings")
        G = values["num_key_value_heads"]
        check(path, "num_key_value_heads", G, H % G == 0, f"a divisor of num_attention_heads = {H}")
        check(path, "head_dim", values["head_dim"], values["head_dim"] % 2 == 0, "an even number")
        return cls(**values)

    @property
    def family(self) -> Family:
        return FAMILIES[self.model_type]

    def to_json(self) -> dict:
        """The dictionary of a config.json that every version of transformers reads alike."""
        rope = {"rope_theta": self.rope_theta, "rope_type": "default"} | (self.rope_scaling or {})
        fixed = {"architectures": [self.family.architecture], "hidden_act": "silu"}
        fixed |= {"torch_dtype": self.dtype, "rope_parameters": rope}
        return fixed | dataclasses.asdict(self)


def check_architecture(path, raw: dict) -> dict:
    """rope_theta, if it is nested, and rope_scaling. ValueError names what cannot be computed."""
    kind = raw.get("model_type")
    check(path, "model_type", kind, kind in tuple(FAMILIES), " or ".join(FAMILIES))
    quantized = raw.get("quantization_config")
    check(path, "quantization_config", quantized, not quantized, "none: convert the weights")
    activation = raw.get("hidden_act", "silu")
    check(path, "hidden_act", activation, activation == "silu", '"silu"')
    for key in ("attention_bias", "mlp_bias", "use_sliding_window"):
        check(path, key, raw.get(key), not raw.get(key), f"false ({kind} is computed without)")

    found = {"rope_scaling": None}
    for key in ("rope_scaling", "rope_parameters"):  # the old and the new name
        rope = raw.get(key) or {}
        check(path, key, rope, isinstance(rope, dict), "an object")
        layered = any(isinstance(value, dict) for value in rope.values())
        check(path, key, rope, not layered, "one for all layers")
        if "rope_theta" in rope:
            found["rope_theta"] = rope["rope_theta"]
        kind = rope.get("rope_type", rope.get("type", "default"))
        check(path, "rope_type", kind, kind in ("default", "llama3"), '"default" or "llama3"')
        if kind == "llama3":
            found["rope_scaling"] = {"rope_type": kind} | {name: rope.get(name) for name in LLAMA3}
    for name in LLAMA3 if found["rope_scaling"] else ():
        value = found["rope_scaling"][name]
        check(path, name, value, is_positive(value), "a positive number")
    return found


# ------------------------------------------------------------------------ the network


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x):
        # The mean square is taken in float32, whatever the weights are.
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)


def rotary_angles(positions: Tensor, head_dim: int, theta: float, scaling: dict | None = None):
    """(B, T) -> cos, sin (B, 1, T, Dh) of position * theta^(-2i/Dh), float32, the half repeated."""
    exponent = torch.arange(0, head_dim, 2, device=positions.device).float() / head_dim  # (Dh/2,)
    frequency = theta**-exponent
    if scaling is not None:
        frequency = scaled(frequency, *(scaling[name] for name in LLAMA3))

    angle = positions[..., None].float() * frequency  # (B, T, Dh/2)
    angle = torch.cat([angle, angle], dim=-1)[:, None]  # (B, 1, T, Dh)
    return angle.cos(), angle.sin()


LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


def scaled(frequency: Tensor, factor: float, low: float, high: float, context: int) -> Tensor:
    """Llama 3.1's frequencies for a context longer than the one that was trained on first.

    A frequency that turns fewer than `low` times in that context is divided by factor, one that
    turns more than `high` times stays; between the two the share of either is linear in the turns.
    """
    turns = context * frequency / (2 * math.pi)
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return frequency * (kept + (1 - kept) / factor)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (x[i], x[i + Dh/2]) by its angle: the half-split pairing of Hugging Face."""
    first, second = x.chunk(2, dim=-1)
    turned = torch.cat([-second, first], dim=-1)
    return x * cos.to(x.dtype) + turned * sin.to(x.dtype)


def lines(x: Tensor, places: Tensor) -> Tensor:
    """(1, heads, N, Dh) -> (L, heads, T, Dh), the tokens at `places` (L, T)."""
    _, heads, N, size = x.shape
    # A look-up in a table, because its gradient adds up in the same order on every device.
    found = F.embedding(places, x.transpose(1, 2).reshape(N, -1))  # (L, T, heads * Dh)

    # A CPU attends in float32 faster than in bfloat16, backwards above all.
    if x.dtype == torch.bfloat16 and x.device.type == "cpu":
        found = found.float()
    return found.unflatten(-1, (heads, size)).transpose(1, 2)


def seen(query: Tensor, key: Tensor, window: int | None) -> Tensor:
    """Positions (B, T) and (B, S) -> bool (B, 1, T, S): which keys a query attends to."""
    distance = query[:, None, :, None] - key[:, None, None, :]
    return (0 <= distance) if window is None else (0 <= distance) & (distance < window)


class Attention(nn.Module):
    """Grouped-query attention: H query heads share G key/value heads."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        D = config.hidden_size
        queries = config.num_attention_heads * config.head_dim
        keys = config.num_key_value_heads * config.head_dim
        biased = config.family.biased
        self.head_dim = config.head_dim
        self.q_proj = nn.Linear(D, queries, bias=biased)
        self.k_proj = nn.Linear(D, keys, bias=biased)
        self.v_proj = nn.Linear(D, keys, bias=biased)
        self.o_proj = nn.Linear(queries, D, bias=False)
        self.normed = config.family.normed
        if self.normed:
            self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
            self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps)

    def forward(self, x, cos, sin, mask, layer_cache, pack=None):
        B, T, _ = x.shape
        q = self.q_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, H, T, Dh)
        k = self.k_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, G, T, Dh)
        v = self.v_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, G, T, Dh)

        if self.normed:
            q = self.q_norm(q)
            k = self.k_norm(k)
        q = rotate(q, cos, sin)
        k = rotate(k, cos, sin)
        if layer_cache is not None:
            k, v = layer_cache(k, v)  # (B, G, S, Dh): this row's past and present
        if pack is not None:
            q = lines(q, pack.queries)  # (L, H, T, Dh)
            k = lines(k, pack.keys)  # (L, G, S, Dh)
            v = lines(v, pack.keys)

        if T == 1:
            # The H/G heads of a group see the same keys. As the rows of one matrix they read each
            # key once, where enable_gqa would read it for every head.
            grouped = q.view(B, k.shape[1], -1, self.head_dim)  # (B, G, H/G, Dh)
            y = F.scaled_dot_product_attention(grouped, k, v, attn_mask=mask)
        else:
            y = F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True
            ).transpose(1, 2)  # (B, T, H, Dh)

        if pack is not None:
            y = y.reshape(pack.queries.numel(), -1).to(x.dtype)
            y = F.embedding(pack.place, y)  # (N, H * Dh)
        return self.o_proj(y.reshape(B, T, -1))


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x, cos, sin, mask, layer_cache, pack=None):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, mask, layer_cache, pack)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """Everything below the vocabulary: tokens (B, T) -> normalised hidden states (B, T, D).

    With a KVCache (generate.py) the tokens of a row come after those it has there, and are added.
    A Pack (data.py) of N tokens gives hidden states (1, N, D).
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

        # If set, only each layer's input is kept for the backward pass, which runs it again.
        self.recompute = False

    def forward(self, tokens, cache=None) -> Tensor:
        config = self.config
        pack = None
        if isinstance(tokens, Tensor):
            position, mask = self.positions(tokens, cache)
        else:
            pack = tokens
            tokens = pack.tokens
            position = pack.position
            mask = seen(pack.query_position, pack.key_position, config.sliding_window)
        rope = (config.head_dim, config.rope_theta, config.rope_scaling)
        cos, sin = rotary_angles(position, *rope)

        x = self.embed_tokens(tokens)  # (B, T, D)
        for index, layer in enumerate(self.layers):
            if self.recompute and torch.is_grad_enabled():
                plain = dict(use_reentrant=False, preserve_rng_state=False)
                x = checkpoint(layer, x, cos, sin, mask, None, pack, **plain)
            else:
                layer_cache = None if cache is None else cache.layer(index, position)
                x = layer(x, cos, sin, mask, layer_cache, pack)
        if cache is not None:
            cache.length = cache.length + tokens.shape[1]
        return self.norm(x)

    def positions(self, tokens: Tensor, cache) -> tuple[Tensor, Tensor | None]:
        """Positions of tokens (B, T), those of all rows or (1, T), and the mask of attention."""
        _, T = tokens.shape
        S = T if cache is None else cache.size
        position = torch.arange(T, device=tokens.device)[None]  # (1, T)
        if cache is not None:
            position = position + cache.length[:, None]  # (B, T)

        # Plain causal attention needs no mask: as many tokens as positions have no past.
        window = self.config.sliding_window
        if T == S and (window or S) >= S:
            return position, None
        return position, seen(position, torch.arange(S, device=tokens.device)[None], window)


class Transformer(nn.Module):
    """Tokens (B, T) -> logits (B, T, V) of every position; the logits at t are for token t + 1.

    `output(hidden, head)` replaces the plain logits, head(hidden) of the hidden states (B, T, D).
    A Pack of N tokens (data.py) counts as one row.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    @property
    def head_weight(self) -> Tensor:
        """(V, D)."""
        tied = self.config.tie_word_embeddings
        return self.model.embed_tokens.weight if tied else self.lm_head.weight

    def head(self, hidden: Tensor) -> Tensor:
        """(..., D) -> logits (..., V)."""
        return F.linear(hidden, self.head_weight)

    def forward(self, tokens, output: Callable | None = None) -> Tensor:
        hidden = self.model(tokens)
        return self.head(hidden) if output is None else output(hidden, self.head)

    @classmethod
    def from_pretrained(cls, folder: str | Path, dtype=None, device=None) -> "Transformer":
        """Read a checkpoint folder, in its own dtype or in `dtype`, a name or a torch.dtype."""
        config = ModelConfig.from_json(Path(folder) / "config.json")
        return load_pretrained(cls, config, folder, dtype, device)

    def save_pretrained(self, folder: str | Path, shard_bytes: int = SHARD_BYTES) -> None:
        """Write a new folder, whole or not at all; FileExistsError if something is there."""
        with atomic_write(folder) as temporary:
            self.write_pretrained(temporary, shard_bytes)

    def write_pretrained(self, folder: str | Path, shard_bytes: int = SHARD_BYTES) -> None:
        save_checkpoint(self, folder, shard_bytes=shard_bytes)


@torch.no_grad()
def initialize(module: nn.Module, generator: torch.Generator) -> nn.Module:
    """Random weights by the generator alone: matrices of variance 1/columns, norms 1, biases 0."""
    for name, parameter in module.named_parameters():
        if parameter.dim() > 1:
            parameter.normal_(0, parameter.shape[-1] ** -0.5, generator=generator)
        else:
            parameter.fill_(0 if name.endswith(".bias") else 1)
    return module
