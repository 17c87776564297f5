"""PairRM: the published cross-encoder judge (LLM-Blender, 2306.02561), a DeBERTa-v3.

It reads a prompt and two responses, each ordered pair on its own, so K responses cost K(K - 1)
forward rows, where a PreferenceModel needs K. The two orders of a pair differ a little; their mean
s = (L_ij - L_ji)/2 is skew-symmetric, and P(i beats j) = σ(s).

    judge = PairRM.from_pretrained(folder)     # config.json and tensors as in llm-blender/PairRM-hf

Modules are named like the tensors of that checkpoint. Read it from `PairRM` up to
`DisentangledAttention`. Shapes: B rows, T tokens, D width, H heads, Dh head size.
"""

import dataclasses
import itertools
import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data import Tokenizer, pad
from engine.checkpoint import DTYPES, load_pretrained
from engine.files import read_json
from engine.progress import tqdm
from engine.schema import check, check_sizes, is_positive
from judges.base import Judge

# What a config.json must say for the architecture to be the one below.
FIXED = {
    "model_type": "deberta-v2", "hidden_act": "gelu", "relative_attention": True,
    "position_biased_input": False, "share_att_key": True, "norm_rel_ebd": "layer_norm",
    "type_vocab_size": 0, "n_tasks": 1,
}  # fmt: skip

SIZES = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "position_buckets", "max_position_embeddings",
)  # fmt: skip
MARKERS = ("source_prefix_id", "cand1_prefix_id", "cand2_prefix_id")

# Tokens in a forward pass. A CPU is faster where more of it stays in its cache.
GPU_TOKENS = 8192
CPU_TOKENS = 2048


@dataclass(frozen=True)
class PairRMConfig:
    """Sizes and token ids of a checkpoint, under the names that its config.json uses."""

    vocab_size: int
    hidden_size: int  # D
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int  # H
    position_buckets: int
    max_position_embeddings: int
    layer_norm_eps: float
    source_prefix_id: int
    cand1_prefix_id: int
    cand2_prefix_id: int
    dtype: str = "float32"
    tie_word_embeddings: bool = False

    @classmethod
    def from_json(cls, path: str | Path) -> "PairRMConfig":
        """ValueError names a key that is missing, or whose value is not computed here."""
        raw = read_json(path)
        like = "as in llm-blender/PairRM-hf"
        for key, expected in FIXED.items():
            if raw.get(key) != expected:
                found = f"{key} is {raw.get(key)!r}"
                raise ValueError(f"{path}: {found}, expected {expected!r}, {like}")

        kinds = raw.get("pos_att_type", [])
        kinds = kinds.split("|") if isinstance(kinds, str) else kinds
        if kinds not in (["c2p", "p2c"], ["p2c", "c2p"]) or raw.get("conv_kernel_size"):
            expected = "pos_att_type c2p and p2c, and no conv_kernel_size"
            raise ValueError(f"{path}: expected {expected}, {like}")

        raw["dtype"] = raw.get("dtype") or raw.get("torch_dtype") or "float32"
        if raw["dtype"] not in tuple(DTYPES):
            expected = f"one of {', '.join(DTYPES)}"
            raise ValueError(f"{path}: dtype is {raw['dtype']!r}, expected {expected}")

        raw["tie_word_embeddings"] = False  # there is no output embedding to tie
        names = [field.name for field in dataclasses.fields(cls)]
        check_sizes(path, raw, *SIZES)
        for name in MARKERS:
            marker = raw.get(name)
            if type(marker) is not int or marker < 0:
                raise ValueError(f"{path}: {name} is {marker!r}, expected the id of a token")
        eps = raw.get("layer_norm_eps")
        check(path, "layer_norm_eps", eps, is_positive(eps), "a positive number")
        heads = raw["num_attention_heads"]
        divides = raw["hidden_size"] % heads == 0
        check(path, "num_attention_heads", heads, divides, "a divisor of hidden_size")
        return cls(**{name: raw[name] for name in names})


# ------------------------------------------------------------------------ the encoder


def relative_index(distance: Tensor, buckets: int, furthest: int) -> Tensor:
    """Rows of the relative embeddings for distances i - j.

    They are exact to ±buckets/2, then logarithmic to ±furthest.
    """
    middle = buckets // 2
    # The logarithm of the near ones is not looked at, but it must exist.
    far = distance.abs().clamp(min=middle).double()
    share = torch.log(far / middle) / math.log((furthest - 1) / middle)
    logarithmic = torch.ceil(share * (middle - 1)) + middle
    bucket = torch.where(distance.abs() <= middle, distance, distance.sign() * logarithmic.long())
    return (bucket + buckets).clamp(0, 2 * buckets - 1)


def shifted(x: Tensor) -> Tensor:
    """From a column for each distance to a column for each position.

    (B, H, T, 2T - 1), distances from T - 1 down to 1 - T -> (B, H, T, T), at (i, j) that of i - j.
    """
    # Row i + 1 begins one column further left than row i, so this is a view with another stride,
    # and nothing is copied.
    B, H, T, columns = x.shape
    strides = (H * T * columns, T * columns, columns - 1, 1)
    return x.contiguous().as_strided((B, H, T, T), strides, T - 1)


class DisentangledAttention(nn.Module):
    """score(i, j) = (Q_i·K_j + Q_i·PK[δ(i, j)] + K_j·PQ[δ(i, j)])/√(3 Dh).

    PK and PQ are projections of the embeddings of relative positions.
    """

    def __init__(self, config: PairRMConfig):
        super().__init__()
        D = config.hidden_size
        self.heads = config.num_attention_heads
        projections = {name: nn.Linear(D, D) for name in ("query_proj", "key_proj", "value_proj")}
        output = {"dense": nn.Linear(D, D), "LayerNorm": nn.LayerNorm(D, config.layer_norm_eps)}
        self.self = nn.ModuleDict(projections)
        self.output = nn.ModuleDict(output)

    def split(self, name: str, x: Tensor) -> Tensor:
        """A projection of x, by heads: (..., T, D) -> (..., H, T, Dh)."""
        return self.self[name](x).unflatten(-1, (self.heads, -1)).transpose(-2, -3)

    def forward(self, x: Tensor, mask: Tensor, relative: Tensor) -> Tensor:
        """x (B, T, D), mask (B, T) True on real tokens -> (B, T, D).

        relative (2T - 1, D) are the embeddings of the distances from T - 1 to 1 - T.
        """
        q = self.split("query_proj", x)  # (B, H, T, Dh)
        k = self.split("key_proj", x)
        v = self.split("value_proj", x)
        pq = self.split("query_proj", relative)  # (H, 2T - 1, Dh)
        pk = self.split("key_proj", relative)

        scale = 1 / math.sqrt(3 * q.shape[-1])
        content_to_position = shifted(q @ (scale * pk).mT)  # (B, H, T, T)
        # At (j, i) the distance is -(j - i), so the columns are turned round.
        position_to_content = shifted(k @ (scale * pq).flip(1).mT).mT
        bias = content_to_position + position_to_content
        bias = bias.masked_fill_(~mask[:, None, None], -math.inf)

        heads = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)
        dense = self.output["dense"](heads.transpose(1, 2).flatten(2))
        return self.output["LayerNorm"](dense + x)


class Layer(nn.Module):
    def __init__(self, config: PairRMConfig):
        super().__init__()
        D = config.hidden_size
        wide = config.intermediate_size
        output = {"dense": nn.Linear(wide, D), "LayerNorm": nn.LayerNorm(D, config.layer_norm_eps)}
        self.attention = DisentangledAttention(config)
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(D, wide)})
        self.output = nn.ModuleDict(output)

    def forward(self, x, mask, relative):
        x = self.attention(x, mask, relative)
        inner = F.gelu(self.intermediate["dense"](x))
        return self.output["LayerNorm"](self.output["dense"](inner) + x)


class Encoder(nn.Module):
    """DeBERTa-v2 as in deberta-v3-large: tokens (B, T), mask (B, T) -> (B, T, D).

    No absolute positions, no token types, and a norm after each block.
    """

    def __init__(self, config: PairRMConfig):
        super().__init__()
        D = config.hidden_size
        self.buckets = config.position_buckets
        self.furthest = config.max_position_embeddings
        self.embeddings = nn.ModuleDict({
            "word_embeddings": nn.Embedding(config.vocab_size, D),
            "LayerNorm": nn.LayerNorm(D, config.layer_norm_eps),
        })  # fmt: skip
        self.encoder = nn.ModuleDict({
            "rel_embeddings": nn.Embedding(2 * config.position_buckets, D),
            "LayerNorm": nn.LayerNorm(D, config.layer_norm_eps),
            "layer": nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers)),
        })  # fmt: skip

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        _, T = tokens.shape
        index = relative_index(torch.arange(T - 1, -T, -1), self.buckets, self.furthest)
        table = self.encoder["LayerNorm"](self.encoder["rel_embeddings"].weight)
        relative = table[index.to(tokens.device)]  # (2T - 1, D)

        x = self.embeddings["LayerNorm"](self.embeddings["word_embeddings"](tokens))
        x = x * mask[..., None]
        for layer in self.encoder["layer"]:
            x = layer(x, mask, relative)
        return x


# ------------------------------------------------------------------------ the judge


class PairRM(nn.Module, Judge):
    """A judge (see judges/base.py) from a PairRM checkpoint.

    A prompt that is longer than source_limit tokens is cut at its end, and so is a response that is
    longer than candidate_limit and half of what the prompt has left over.
    """

    def __init__(self, config: PairRMConfig):
        super().__init__()
        self.config = config
        self.pretrained_model = Encoder(config)
        self.tokenizer = None

        # The published names count dropouts and tanh too.
        D = config.hidden_size
        self.head_layer = nn.Sequential(
            nn.Identity(), nn.Linear(2 * D, D), nn.Tanh(), nn.Identity(), nn.Linear(D, 1)
        )

        # Those of the published PairRM.
        self.source_limit = 1224
        self.candidate_limit = 412

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """(B, T) ids, (B, T) bool -> L (B,) float32, the logit of "the first one is better"."""
        config = self.config
        hidden = self.pretrained_model(tokens, mask)

        # Each row has one of each marker: (B, D).
        source = hidden[tokens == config.source_prefix_id]
        first = hidden[tokens == config.cand1_prefix_id]
        second = hidden[tokens == config.cand2_prefix_id]
        first = self.head_layer(torch.cat([source, first], -1))
        second = self.head_layer(torch.cat([source, second], -1))
        return (first - second)[:, 0].float()

    def part(self, marker: int, text: str, limit: int) -> list[int]:
        """[CLS] marker text [SEP], cut at the end of the text to `limit` ids."""
        config = self.config
        bos = self.tokenizer.bos
        eos = self.tokenizer.eos

        # Markers and [SEP] in the text become spaces. Those that only the tokenizer recognises, in
        # full-width letters, say, are dropped.
        for name in ("[SEP]", "<|source|>", "<|candidate1|>", "<|candidate2|>", "<|candidate|>"):
            text = text.replace(name, " ")
        special = (config.source_prefix_id, config.cand1_prefix_id, config.cand2_prefix_id)
        special += (bos, eos)
        words = [word for word in self.tokenizer.encode(text) if word not in special]
        return [bos, marker, *words][: limit - 1] + [eos]

    def pair_ids(self, prompt: str, first: str, second: str) -> list[int]:
        """The ids of one comparison: three parts, each with its own [CLS] and [SEP]."""
        config = self.config
        source = self.part(config.source_prefix_id, prompt, self.source_limit)
        room = self.candidate_limit + (self.source_limit - len(source)) // 2
        candidate1 = self.part(config.cand1_prefix_id, first, room)
        return source + candidate1 + self.part(config.cand2_prefix_id, second, room)

    @torch.no_grad()
    def logits_many(
        self, prompts: list[str], responses: list[list[str]], tokens_together: int | None = None
    ) -> Tensor:
        """L (N, K, K) float32, both orders of each pair, 0 on the diagonal.

        N × K(K - 1) forward rows, sorted by length.
        """
        N = len(prompts)
        K = len(responses[0])
        places = [(n, *pair) for n in range(N) for pair in itertools.permutations(range(K), 2)]
        rows = [self.pair_ids(prompts[n], responses[n][i], responses[n][j]) for n, i, j in places]
        order = sorted(range(len(rows)), key=lambda r: -len(rows[r]))

        device = self.head_layer[1].weight.device
        if tokens_together is None:
            tokens_together = CPU_TOKENS if device.type == "cpu" else GPU_TOKENS
        logits = torch.zeros(N, K, K)
        few = len(rows) < 1000
        with tqdm(total=len(rows), unit="pair", desc="PairRM", leave=False, disable=few) as bar:
            while order:
                count = max(1, tokens_together // len(rows[order[0]]))
                chunk = order[:count]
                order = order[count:]
                lengths = torch.tensor([len(rows[r]) for r in chunk], device=device)[:, None]
                tokens = pad([rows[r] for r in chunk], device)
                mask = torch.arange(tokens.shape[1], device=device) < lengths
                for r, logit in zip(chunk, self(tokens, mask).tolist()):
                    logits[places[r]] = logit
                bar.update(len(chunk))
        return logits

    def preferences_many(self, prompts, responses):
        return self.both_orders(self.logits_many(prompts, responses))

    def examine(self, prompts, responses):
        logits = self.logits_many(prompts, responses)
        return self.both_orders(logits), {"order_inconsistency": (logits + logits.mT).abs()}

    @staticmethod
    def both_orders(logits: Tensor) -> Tensor:
        """(..., K, K) L of either order -> preferences."""
        return torch.sigmoid((logits - logits.mT) / 2)

    @classmethod
    def from_pretrained(cls, folder: str | Path, dtype=None, device=None) -> "PairRM":
        """Read a checkpoint folder with config.json, safetensors and tokenizer.json."""
        config = PairRMConfig.from_json(Path(folder) / "config.json")
        judge = load_pretrained(cls, config, folder, dtype, device)
        judge.tokenizer = Tokenizer(folder)
        judge.tokenizer.check_vocabulary(config.vocab_size)
        last = max(getattr(config, name) for name in MARKERS)
        if last >= config.vocab_size:
            raise ValueError(f"{folder}: token {last} is beyond vocab_size {config.vocab_size}")
        return judge
