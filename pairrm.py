"""PairRM: the published cross-encoder judge (LLM-Blender, 2306.02561), a DeBERTa-v3 that reads a prompt and two responses.

It reads every ordered pair on its own, so K responses cost K(K - 1) forward rows, where a PreferenceModel needs K.
The two orders of a pair differ a little; their mean s = (L_ij - L_ji)/2 is skew-symmetric, and P(i beats j) = σ(s).

    judge = PairRM.from_pretrained(folder)        # config.json and tensors as in llm-blender/PairRM-hf

Modules are named as the tensors of that checkpoint are. Read it from `PairRM` up to `DisentangledAttention`.
Shapes: B rows, T tokens, D width, H heads, Dh head size.
"""

import dataclasses
import itertools
import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from data import Tokenizer, pad, read_json
from model import DTYPES, load_pretrained

# What a config.json must say for the architecture to be the one below.
FIXED = {
    "model_type": "deberta-v2", "hidden_act": "gelu", "relative_attention": True, "position_biased_input": False,
    "share_att_key": True, "norm_rel_ebd": "layer_norm", "type_vocab_size": 0, "n_tasks": 1,
}  # fmt: skip


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
    def from_json(cls, path):
        """ValueError names the key that is missing, or whose value this implementation does not compute."""
        raw = read_json(path)
        raw["dtype"] = raw.get("dtype") or raw.get("torch_dtype") or "float32"
        for key, expected in FIXED.items():
            if raw.get(key) != expected:
                raise ValueError(f"{path}: {key} is {raw.get(key)!r}, expected {expected!r}, as in llm-blender/PairRM-hf")
        kinds = raw.get("pos_att_type", [])
        if set(kinds.split("|") if isinstance(kinds, str) else kinds) != {"c2p", "p2c"} or raw.get("conv_kernel_size"):
            raise ValueError(f"{path}: expected pos_att_type c2p and p2c, and no conv_kernel_size, as in deberta-v3-large")
        if raw["dtype"] not in DTYPES:
            raise ValueError(f"{path}: dtype is {raw['dtype']!r}, expected one of {', '.join(DTYPES)}")
        raw["tie_word_embeddings"] = False  # there is no output embedding to tie
        names = [field.name for field in dataclasses.fields(cls)]
        for name in names:
            if not isinstance(raw.get(name), (int, float, str)):
                raise ValueError(f"{path}: {name} is {raw.get(name)!r}, expected a value")
        return cls(**{name: raw[name] for name in names})


GPU_TOKENS, CPU_TOKENS = 8192, 2048  # in a forward pass; a CPU is faster where more of it stays in its cache

# ------------------------------------------------------------------------------------------------ the encoder


def relative_index(distance, buckets, furthest):
    """Rows of the relative embeddings for distances i - j: exact to ±buckets/2, then logarithmic to ±furthest."""
    middle = buckets // 2
    far = distance.abs().clamp(min=middle).double()  # of the near ones, the logarithm is not looked at
    logarithmic = torch.ceil(torch.log(far / middle) / math.log((furthest - 1) / middle) * (middle - 1)) + middle
    bucket = torch.where(distance.abs() <= middle, distance, distance.sign() * logarithmic.long())
    return (bucket + buckets).clamp(0, 2 * buckets - 1)


def shifted(x):
    """(B, H, T, 2T - 1), a column for each distance from T - 1 down to 1 - T -> (B, H, T, T), at (i, j) that of i - j.

    Row i + 1 begins one column further left than row i, so this is a view with another stride, and nothing is copied.
    """
    B, H, T, columns = x.shape
    return x.contiguous().as_strided((B, H, T, T), (H * T * columns, T * columns, columns - 1, 1), T - 1)


class DisentangledAttention(nn.Module):
    """score(i, j) = (Q_i·K_j + Q_i·PK[δ(i,j)] + K_j·PQ[δ(i,j)])/√(3 Dh); PK, PQ are projections of relative positions."""

    def __init__(self, config):
        super().__init__()
        D, self.heads = config.hidden_size, config.num_attention_heads
        projections = {name: nn.Linear(D, D) for name in ("query_proj", "key_proj", "value_proj")}
        output = {"dense": nn.Linear(D, D), "LayerNorm": nn.LayerNorm(D, config.layer_norm_eps)}
        self.self, self.output = nn.ModuleDict(projections), nn.ModuleDict(output)

    def split(self, x):
        return x.unflatten(-1, (self.heads, -1)).transpose(-2, -3)  # (..., T, D) -> (..., H, T, Dh)

    def forward(self, x, mask, relative):
        """x (B, T, D), mask (B, T) True on real tokens, relative (2T - 1, D) embeddings of the distances from T - 1 to 1 - T."""
        q, k, v = (self.split(self.self[name](x)) for name in ("query_proj", "key_proj", "value_proj"))  # (B, H, T, Dh)
        pq, pk = self.split(self.self["query_proj"](relative)), self.split(self.self["key_proj"](relative))  # (H, 2T - 1, Dh)
        scale = 1 / math.sqrt(3 * q.shape[-1])
        content_to_position = shifted(q @ (scale * pk).mT)  # (B, H, T, T)
        position_to_content = shifted(k @ (scale * pq).flip(1).mT).mT  # at (j, i) the distance is -(j - i)
        bias = (content_to_position + position_to_content).masked_fill_(~mask[:, None, None], -math.inf)
        heads = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)
        return self.output["LayerNorm"](self.output["dense"](heads.transpose(1, 2).flatten(2)) + x)


class Layer(nn.Module):
    def __init__(self, config):
        super().__init__()
        D, wide = config.hidden_size, config.intermediate_size
        self.attention = DisentangledAttention(config)
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(D, wide)})
        self.output = nn.ModuleDict({"dense": nn.Linear(wide, D), "LayerNorm": nn.LayerNorm(D, config.layer_norm_eps)})

    def forward(self, x, mask, relative):
        x = self.attention(x, mask, relative)
        return self.output["LayerNorm"](self.output["dense"](F.gelu(self.intermediate["dense"](x))) + x)


class Encoder(nn.Module):
    """DeBERTa-v2 as in deberta-v3-large: no absolute positions, no token types; norms behind each block."""

    def __init__(self, config):
        super().__init__()
        D, eps = config.hidden_size, config.layer_norm_eps
        self.buckets, self.furthest = config.position_buckets, config.max_position_embeddings
        embeddings = {"word_embeddings": nn.Embedding(config.vocab_size, D), "LayerNorm": nn.LayerNorm(D, eps)}
        self.embeddings = nn.ModuleDict(embeddings)
        self.encoder = nn.ModuleDict({
            "rel_embeddings": nn.Embedding(2 * config.position_buckets, D), "LayerNorm": nn.LayerNorm(D, eps),
            "layer": nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers)),
        })  # fmt: skip

    def forward(self, tokens, mask):
        T = tokens.shape[1]
        index = relative_index(torch.arange(T - 1, -T, -1), self.buckets, self.furthest).to(tokens.device)
        relative = self.encoder["LayerNorm"](self.encoder["rel_embeddings"].weight)[index]
        x = self.embeddings["LayerNorm"](self.embeddings["word_embeddings"](tokens)) * mask[..., None]
        for layer in self.encoder["layer"]:
            x = layer(x, mask, relative)
        return x


# ------------------------------------------------------------------------------------------------ the judge


class PairRM(nn.Module):
    """A judge (see prefmodel.py) from a PairRM checkpoint. A prompt that is longer than source_limit tokens is cut at its
    end, and so is a response longer than candidate_limit and the half of what the prompt has left over."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.pretrained_model = Encoder(config)
        D = config.hidden_size  # the published names count dropouts and tanh too
        self.head_layer = nn.Sequential(nn.Identity(), nn.Linear(2 * D, D), nn.Tanh(), nn.Identity(), nn.Linear(D, 1))
        self.tokenizer = None
        self.source_limit, self.candidate_limit = 1224, 412  # those of the published PairRM

    def forward(self, tokens, mask):
        """(B, T) ids, (B, T) bool -> L (B,) float32, the logit of "the first response is better" in this order."""
        hidden, config = self.pretrained_model(tokens, mask), self.config
        markers = (config.source_prefix_id, config.cand1_prefix_id, config.cand2_prefix_id)
        source, first, second = (hidden[tokens == marker] for marker in markers)  # one of each a row: (B, D)
        first, second = (self.head_layer(torch.cat([source, candidate], -1)) for candidate in (first, second))
        return (first - second)[:, 0].float()

    def part(self, marker, text, limit):
        """[CLS] marker text [SEP], cut at the end of the text to `limit` ids. Markers and [SEP] in the text become spaces."""
        for name in ("[SEP]", "<|source|>", "<|candidate1|>", "<|candidate2|>", "<|candidate|>"):
            text = text.replace(name, " ")
        config, special = self.config, (self.tokenizer.bos, self.tokenizer.eos)
        special += (config.source_prefix_id, config.cand1_prefix_id, config.cand2_prefix_id)
        words = [word for word in self.tokenizer.encode(text) if word not in special]  # in full-width letters, say
        ids = [self.tokenizer.bos, marker] + words
        return ids[: limit - 1] + [self.tokenizer.eos]

    def pair_ids(self, prompt, first, second):
        """The ids of one comparison: three parts, each with its own [CLS] and [SEP]."""
        config = self.config
        source = self.part(config.source_prefix_id, prompt, self.source_limit)
        room = self.candidate_limit + (self.source_limit - len(source)) // 2
        return source + self.part(config.cand1_prefix_id, first, room) + self.part(config.cand2_prefix_id, second, room)

    @torch.no_grad()
    def logits_many(self, prompts, responses, tokens_together=None):
        """L (N, K, K) float32, both orders of each pair, 0 on the diagonal. N × K(K - 1) forward rows, sorted by length."""
        N, K = len(prompts), len(responses[0])
        places = [(n, *pair) for n in range(N) for pair in itertools.permutations(range(K), 2)]
        rows = [self.pair_ids(prompts[n], responses[n][i], responses[n][j]) for n, i, j in places]
        order = sorted(range(len(rows)), key=lambda r: -len(rows[r]))
        device, logits = self.head_layer[1].weight.device, torch.zeros(N, K, K)
        tokens_together = tokens_together or (CPU_TOKENS if device.type == "cpu" else GPU_TOKENS)
        with tqdm(total=len(rows), unit="pair", desc="PairRM", leave=False, disable=len(rows) < 1000) as progress:
            while order:
                together = max(1, tokens_together // len(rows[order[0]]))
                chunk, order = order[:together], order[together:]
                lengths = torch.tensor([len(rows[r]) for r in chunk], device=device)[:, None]
                tokens = pad([rows[r] for r in chunk], device)
                mask = torch.arange(tokens.shape[1], device=device) < lengths
                for r, logit in zip(chunk, self(tokens, mask).tolist()):
                    logits[places[r]] = logit
                progress.update(len(chunk))
        return logits

    def preferences_many(self, prompts, responses):
        return self.both_orders(self.logits_many(prompts, responses))

    @staticmethod
    def both_orders(logits):
        """(..., K, K) L of either order -> preferences."""
        return torch.sigmoid((logits - logits.mT) / 2)

    def preferences(self, prompt, responses):
        return self.preferences_many([prompt], [responses])[0]

    @classmethod
    def from_pretrained(cls, folder, dtype=None, device=None):
        """Read a checkpoint folder with config.json, safetensors and tokenizer.json. ValueError names what does not fit."""
        judge = load_pretrained(cls, PairRMConfig.from_json(Path(folder) / "config.json"), folder, dtype, device)
        judge.tokenizer = Tokenizer(folder)
        judge.tokenizer.check_vocabulary(judge.config.vocab_size)
        return judge
