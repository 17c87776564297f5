"""Sampling from a transformer: the key/value cache, and the pool of rows that decode together; and
log π of what was sampled.

Read `generate` at the end first, then `Pool`. Shapes: N prompts, K responses each, R rows of the
pool, T tokens, S cached positions, V vocabulary, G key/value heads, Dh head size.
"""

import copy
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data import TEMPLATES, filled, pack, pad
from engine.cuda_graph import Graph
from engine.journal import NOTHING, Journal
from engine.prepack import prepacked
from sppo import chunked_logps, sequence_logps, setting

PREFILL_TOKENS = 2048  # of prompts that are computed together, padding included

# A step computes multiples of these: then a CPU rounds a row alike, whatever the rest of the batch.
ROWS = 8
POSITIONS = 16

CACHED_NUMBERS = 2**20  # probabilities that a CPU's cache holds: 4 MB

# Here a step is captured as a CUDA graph; each shape is captured anew, so there are fewer of them.
GRAPHED = ("cuda",)
GRAPH_ROWS = 32
GRAPH_POSITIONS = 256


class KVCache:
    """Keys and values of R rows with room for S positions; `length` (R,) is how many a row has."""

    def __init__(self, config, rows: int, size: int, device, dtype: torch.dtype):
        # The positions of a head lie one after the other, as attention reads them.
        shape = (config.num_hidden_layers, rows, config.num_key_value_heads, size, config.head_dim)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        self.length = torch.zeros(rows, dtype=torch.long, device=device)
        self.size = size

    def __repr__(self) -> str:
        layers, rows, _, size, _ = self.keys.shape
        used = self.length.tolist()
        return f"KVCache({layers} layers, {rows} rows of {size} positions, used {used})"

    def part(self, rows: int, size: int) -> "KVCache":
        """The first `rows` rows and `size` positions, in the same memory."""
        part = copy.copy(self)
        part.keys = self.keys[:, :rows, :, :size]
        part.values = self.values[:, :rows, :, :size]
        part.length = self.length[:rows]
        part.size = size
        return part

    def layer(self, index: int, position: Tensor):
        """A function that puts k, v (R, G, T, Dh) at `position` (R, T), and returns all k, v."""
        row = torch.arange(len(self.length), device=position.device)[:, None]

        def extend(k, v):
            self.keys[index, row, :, position] = k.transpose(1, 2)
            self.values[index, row, :, position] = v.transpose(1, 2)
            return self.keys[index], self.values[index]

        return extend

    def copy_from(self, other: "KVCache", rows: list, slots: list, length: int) -> None:
        """Give rows `slots` the first `length` positions of the other's `rows`, as many or one."""
        self.keys[:, slots, :, :length] = other.keys[:, rows, :, :length]
        self.values[:, slots, :, :length] = other.values[:, rows, :, :length]

    def keep(self, rows: Tensor) -> None:
        """Continue with these rows (R',), of which some may be named more than once."""
        self.keys = self.keys[:, rows]
        self.values = self.values[:, rows]
        self.length = self.length[rows]


def position_bytes(config, dtype: torch.dtype) -> int:
    """Keys and values of one position in all layers."""
    heads = config.num_key_value_heads * config.head_dim
    return 2 * config.num_hidden_layers * heads * dtype.itemsize


def round_up(number: int, multiple: int) -> int:
    return math.ceil(number / multiple) * multiple


def pool_shape(config, rows: int, positions: int, cache_bytes: int | None, dtype) -> tuple:
    """(R, S) of a cache for so many rows, or for those that cache_bytes hold; at least ROWS."""
    size = round_up(positions, POSITIONS)
    blocks = math.ceil(rows / ROWS)
    block = ROWS * size * position_bytes(config, dtype)
    if cache_bytes is not None:
        if cache_bytes < block:
            needed = f"{ROWS} rows of {size} positions need {block:,} bytes of cache"
            raise ValueError(f"{needed}, but cache_bytes is {cache_bytes:,}")
        blocks = min(blocks, cache_bytes // block)
    return blocks * ROWS, size


def sample_token(logits: Tensor, uniform: Tensor, temperature: float, top_p: float) -> Tensor:
    """Next tokens (R,) from logits (R, V) and uniform numbers (R,) in [0, 1).

    -1 in a row whose logits are not finite: a comparison here would wait for the device.
    """
    if temperature == 0:
        best, token = logits.max(-1)
        return token.masked_fill(~best.isfinite(), -1)
    logits = logits.float() if temperature == 1 else logits.float() / temperature
    probability = logits.softmax(-1)
    if top_p == 1:
        return invert_cumulative(probability, uniform)

    # Keep the fewest most likely tokens that together reach top_p.
    probability, token = probability.sort(descending=True, stable=True)
    before = probability.cumsum(-1) - probability
    choice = invert_cumulative(probability.masked_fill(before >= top_p, 0.0), uniform)
    return token.gather(1, choice.clamp(min=0)[:, None])[:, 0].masked_fill(choice < 0, -1)


def invert_cumulative(weight: Tensor, uniform: Tensor) -> Tensor:
    """The first index (R,) at which the cumulative share of weight (R, V) exceeds uniform (R,)."""
    # First a block of indices, then the index in it: of 32,000 numbers float64 sums up 125 + 256.
    R, V = weight.shape
    blocks = weight.view(R, -1, math.gcd(V, 256))
    # The mass before each block, and all of it: (R, 1 + blocks).
    cumulative = F.pad(blocks.sum(-1).double().cumsum(-1), (1, 0))
    target = uniform[:, None].double() * cumulative[:, -1:]
    block = torch.searchsorted(cumulative, target, right=True) - 1  # (R, 1)
    block = block.clamp(max=blocks.shape[1] - 1)  # a NaN is found after everything

    inside = blocks[torch.arange(R, device=weight.device), block[:, 0]].double().cumsum(-1)
    index = torch.searchsorted(inside, target - cumulative.gather(1, block), right=True)
    # Rounding must not lead past the last index that has a weight.
    last = torch.searchsorted(inside, inside[:, -1:].contiguous())
    index = (block * blocks.shape[2] + index.minimum(last))[:, 0]
    return index.masked_fill(~cumulative[:, -1].isfinite(), -1)


def draw_seeds(prompts: int, samples: int, generator=None) -> list[list[int]]:
    """`prompts` lists of `samples` integers, one for each response."""
    return torch.randint(2**62, (prompts, samples), generator=generator).tolist()


@dataclass(frozen=True)
class SamplingConfig:
    """The settings of everything that samples: of a run, and of the commands that evaluate one."""

    max_new_tokens: int = setting(512, "longest response, in tokens", low=1)
    temperature: float = setting(1.0, "of sampling; 0: greedy", low=0, high=1e6)
    top_p: float = setting(1.0, "nucleus sampling: probability mass kept", low=1e-9, high=1)
    template: str = setting(
        "chat", "chat: the model's own; mistral: v1; plain: none", choices=TEMPLATES
    )
    pool: int = setting(256, "responses sampled at the same time, at most", low=1, free=True)
    seed: int = setting(0, "random seed", low=0)
    device: str = setting("cpu", "torch device, cuda for example", free=True)
    threads: int | None = setting(
        None, "of torch; 0: as many as cores are idle; unset: all cores", low=0, free=True
    )


# ------------------------------------------------------------------------ the pool


@dataclass
class Response:
    prompt: list[int]
    seed: int
    tokens: list[int] = field(default_factory=list)  # written so far
    logps: list[float | None] = field(default_factory=list)  # of the tokens, where recorded


@dataclass(eq=False)
class Prefix:
    """A prompt that has been computed: a row of a cache, and the logits (V,) of the next token."""

    cache: KVCache
    row: int
    logits: Tensor


@dataclass(eq=False)
class Pool:
    """Rows that decode together, active ones first. A row's last token is not in the cache yet."""

    model: nn.Module
    cache: KVCache
    rows: int
    max_new_tokens: int
    stop_tokens: tuple[int, ...]
    temperature: float
    top_p: float
    record: bool  # the log-probability of each token, too
    journal: Journal = NOTHING

    def __post_init__(self):
        rows = len(self.cache.length)
        device = self.cache.keys.device
        self.active = 0  # rows
        self.finished = 0  # responses
        self.writing = [None] * min(self.rows, rows)  # the response of each row; None: idle
        self.token = torch.zeros(rows, dtype=torch.long, device=device)  # the last one of each row
        self.noise = torch.zeros(rows, self.cache.size, device=device)  # for the next token

        self.decode = self.next_tokens
        self.multiples = (ROWS, POSITIONS)
        if device.type in GRAPHED:
            self.decode = Graph(self.next_tokens, device)
            self.multiples = (GRAPH_ROWS, GRAPH_POSITIONS)

    def refill(self, waiting: Iterator[tuple[Prefix, Response]]) -> None:
        """Let idle rows write waiting responses."""
        idle = [row for row, response in enumerate(self.writing) if response is None]
        # Rows first: zip must take no response, and so compute no prompt, for which there is none.
        admitted = ((row, *pair) for row, pair in zip(idle, waiting))
        for prefix, group in itertools.groupby(admitted, key=lambda place: place[1]):
            rows, _, responses = zip(*group)
            self.admit(list(rows), prefix, responses)

    def admit(self, rows: list[int], prefix: Prefix, responses: tuple) -> None:
        """Copy the prompt that these responses share into their rows, and write first tokens."""
        length = len(responses[0].prompt)
        self.cache.copy_from(prefix.cache, [prefix.row], rows, length)
        self.cache.length[rows] = length

        # A generator for each response: what it draws does not depend on the rest of the batch.
        draws = [torch.Generator().manual_seed(response.seed) for response in responses]
        noise = torch.stack([torch.rand(self.max_new_tokens, generator=draw) for draw in draws])
        start = length - 1
        self.noise[rows, start : start + self.max_new_tokens] = noise.to(self.noise.device)

        logits = prefix.logits.expand(len(rows), -1)
        token, logps = self.sample(logits, self.noise[rows, start])
        self.token[rows] = token
        for row, response in zip(rows, responses):
            self.writing[row] = response
        self.write(rows, token, logps)

    def compact(self) -> None:
        """Move active rows into the places of finished ones, so that a step computes no others."""
        rows = [row for row, response in enumerate(self.writing) if response is not None]
        self.active = len(rows)
        holes = [row for row in range(self.active) if self.writing[row] is None]
        if holes:
            moved = rows[-len(holes) :]
            self.cache.copy_from(self.cache, moved, holes, self.reach(moved))
            for state in (self.cache.length, self.token, self.noise):
                state[holes] = state[moved]
            for row, hole in zip(moved, holes):
                self.writing[hole] = self.writing[row]
                self.writing[row] = None

        # An idle row that a step computes stays at its first position.
        self.cache.length[self.active :] = 0

    def step(self) -> None:
        """Write one more token in every active row."""
        active = self.active
        rows, positions = self.multiples
        width = min(round_up(active, rows), len(self.token))
        size = min(round_up(self.reach(range(active)), positions), self.cache.size)
        token, logps = self.decode(width, size)
        self.token[:active] = token[:active]
        self.cache.length[:active] += 1
        self.write(range(active), token, logps)

    def next_tokens(self, width: int, size: int) -> tuple[Tensor, Tensor | None]:
        """The next token of the first `width` rows, over `size` positions, and its log π."""
        # A CUDA graph can hold this: shapes depend on nothing else, no number is waited for, and it
        # changes only the cache, where a second call writes the same again.
        hidden = self.model.model(self.token[:width, None], self.cache.part(width, size))[:, -1]
        uniform = self.noise[:width].gather(1, self.cache.length[:width, None])[:, 0]
        return self.sample(self.model.head(hidden), uniform)

    def sample(self, logits: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor | None]:
        """Tokens (R,), and log π of each, without temperature and top_p, if it is recorded."""
        # A CPU does a few rows at a time, whose probabilities stay in its cache.
        few = len(logits)
        if logits.device.type == "cpu":
            few = max(1, CACHED_NUMBERS // logits.shape[1])
        parts = zip(logits.split(few), uniform.split(few))
        how = (self.temperature, self.top_p)
        token = torch.cat([sample_token(*part, *how) for part in parts])

        if not self.record:
            return token, None
        logits = logits.float()
        chosen = logits.gather(1, token.clamp(min=0)[:, None])[:, 0]
        return token, chosen - logits.logsumexp(-1)

    def reach(self, rows) -> int:
        """How many positions these rows need, with their last tokens."""
        return max(len(self.writing[row].prompt) + len(self.writing[row].tokens) for row in rows)

    def write(self, rows, token: Tensor, logps: Tensor | None) -> None:
        """Append a token to the response of each row; a row whose response it ends becomes idle."""
        # Here the CPU waits for the device: the next step depends on which rows have finished.
        logps = logps.tolist() if self.record else itertools.repeat(None)
        for row, value, logp in zip(rows, token.tolist(), logps):
            response = self.writing[row]
            if value < 0:
                place = f"after {len(response.prompt) + len(response.tokens)} tokens"
                cause = "its weights, or --temperature, are out of bounds"
                raise ValueError(f"the policy's logits are not finite, {place}: {cause}")
            response.tokens.append(value)
            response.logps.append(logp)
            if value in self.stop_tokens or len(response.tokens) == self.max_new_tokens:
                self.writing[row] = None
                self.finished += 1
                self.journal.add(str(response.seed), response.tokens)


def prefill(model: nn.Module, prompts: list[list[int]]) -> tuple[KVCache, Tensor]:
    """Run prompts, right-padded together: a cache with a row of each, next-token logits (n, V)."""
    parameter = next(model.parameters())
    tokens = pad(prompts, parameter.device)  # (n, T)
    cache = KVCache(model.config, *tokens.shape, tokens.device, parameter.dtype)
    hidden = model.model(tokens, cache)  # (n, T, D)
    last = torch.tensor([len(prompt) - 1 for prompt in prompts], device=tokens.device)
    return cache, model.head(hidden[torch.arange(len(last), device=tokens.device), last])


def prefilled(model: nn.Module, responses: list[list[Response]]):
    """Yield (prefix, response) of those of N lists of responses that are not written yet; prompts
    are computed when needed.
    """
    # The longest first: neighbours are of similar length, so little is padding. Written ones count
    # too: in bfloat16 the padding shows in the last bits, which so are those of an unbroken run.
    order = sorted(responses, key=lambda row: len(row[0].prompt), reverse=True)
    while order:
        count = max(1, PREFILL_TOKENS // len(order[0][0].prompt))
        batch = order[:count]
        order = order[count:]
        if all(response.tokens for row in batch for response in row):
            continue
        cache, logits = prefill(model, [row[0].prompt for row in batch])
        for index, row in enumerate(batch):
            prefix = Prefix(cache, index, logits[index])
            for response in row:
                if not response.tokens:
                    yield prefix, response


def positions_needed(model: nn.Module, prompts: list[list[int]], max_new_tokens: int) -> int:
    """Of the longest row. ValueError names a prompt that is too long for the model's context."""
    lengths = [len(prompt) for prompt in prompts]
    size = max(lengths, default=0) + max_new_tokens
    context = model.config.max_position_embeddings
    if size > context:
        number = lengths.index(max(lengths)) + 1
        both = f"prompt {number} and a response of up to {max_new_tokens} tokens have {size}"
        raise ValueError(f"{both}, more than the model's context of {context}")
    return size


@torch.no_grad()
def generate(
    model: nn.Module, prompts: list[list[int]], samples_per_prompt: int, max_new_tokens: int,
    stop_token: int | tuple | None, temperature: float = 1.0, top_p: float = 1.0, generator=None,
    rows: int = 256, progress=None, *, cache_bytes: int | None = None,
    seeds: list[list[int]] | None = None, logps: list | None = None, journal: Journal = NOTHING,
) -> list[list[list[int]]]:  # fmt: skip
    """Sample responses: N token lists -> N lists of K token lists, with the stop token, if any.

    There may be several stop tokens, or None: every response then has max_new_tokens tokens.
    `rows` of them decode together, or as many as have room in `cache_bytes`. A prompt is computed
    once and its cache copied to the rows of its K samples. Each response draws from a seed of its
    own, of `seeds` (N, K) or else of `generator`: the text does not depend on which rows decode
    beside it (in bfloat16, on which prompts are computed together, in the last bits of logits).

    `logps`, a list, gets N lists of K lists: log π of each token, untempered. `progress` is a tqdm
    bar. `journal` keeps what is written, and has what a stopped run wrote: there are no logps of
    that. ValueError if the model's context or cache_bytes is too small, or seeds are not (N, K).
    """
    N = len(prompts)
    K = samples_per_prompt
    size = positions_needed(model, prompts, max_new_tokens)
    if seeds is None:
        seeds = draw_seeds(N, K, generator)
    if any(len(row) != K for row in seeds):
        raise ValueError(f"seeds are {[len(row) for row in seeds]} for the prompts, expected {K}")
    pairs = zip(prompts, seeds, strict=True)
    responses = [
        [Response(prompt, seed, journal.get(str(seed)) or []) for seed in row]
        for prompt, row in pairs
    ]

    parameter = next(model.parameters())
    shape = pool_shape(model.config, min(rows, N * K), size, cache_bytes, parameter.dtype)
    cache = KVCache(model.config, *shape, parameter.device, parameter.dtype)
    record = logps is not None
    stop = (stop_token,) if isinstance(stop_token, int) else stop_token or ()
    pool = Pool(model, cache, rows, max_new_tokens, stop, temperature, top_p, record, journal)

    pool.finished = sum(bool(response.tokens) for row in responses for response in row)
    if progress is not None:
        progress.update(pool.finished)
    waiting = prefilled(model, responses)
    with prepacked(model):
        while pool.finished < N * K:
            before = pool.finished
            pool.refill(waiting)
            pool.compact()
            if pool.active:
                pool.step()
            if progress is not None:
                progress.update(pool.finished - before)

    if record:
        logps += [[response.logps for response in row] for row in responses]
    return [[response.tokens for response in row] for row in responses]


# ------------------------------------------------------------------------ log-probabilities

# Logits that are no more numbers than this exist all at once, others in chunks.
SMALL_LOGITS = 2**23


def response_logps(model: nn.Module, prompts: list, responses: list) -> Tensor:
    """log π(y|x), with gradients, of b prompts with S responses each, as ids -> (b * S,) float32.

    A prompt is computed once for all of its responses (data.pack).
    """
    device = next(model.parameters()).device
    # A response's last token predicts nothing, so it is not computed.
    packed, places = pack(prompts, [[y[:-1] for y in row] for row in responses], device)
    places = F.pad(places, (0, 1))

    # Before each response a place for the prompt's last token, which predicts the first one.
    written = [[0, *response] for row in responses for response in row]
    tokens = pad(written, device)
    mask = filled(written).to(device)
    mask[:, 0] = False

    def output(hidden, head):
        rows = F.embedding(places, hidden[0])  # (b * S, 1 + R, D)
        # 32,000 logits a token are most of the memory; of a small vocabulary chunks would only be
        # slower.
        if tokens.numel() * model.config.vocab_size <= SMALL_LOGITS:
            return sequence_logps(head(rows), tokens, mask)
        return chunked_logps(rows, head, tokens, mask)

    return model(packed, output)
