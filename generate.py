"""Sampling responses from a transformer: the key/value cache, the pool of rows that decode together, one token at a time.

Read `generate` at the end first, then `Pool.step`. Shapes: N prompts, K responses each, R rows of the pool, T tokens,
S cached positions, V vocabulary, G key/value heads, Dh head size.
"""

import copy
import itertools
import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from data import pad

PREFILL_TOKENS = 2048  # of prompts that are computed together, padding included; a longer prompt is computed alone
ROWS, POSITIONS = 8, 16  # a step computes multiples of them: then a CPU rounds a row's numbers alike whoever is beside it
GRAPHED = ("cuda",)  # device types on which a step is captured and replayed
GRAPH_ROWS, GRAPH_POSITIONS = 32, 256  # and of these there, since each shape is captured anew

# ------------------------------------------------------------------------------------------------ the cache


class KVCache:
    """Keys and values of R rows with room for S positions. `length` (R,), how many each row has, is where new ones go."""

    def __init__(self, config, rows, size, device, dtype):
        shape = (config.num_hidden_layers, rows, size, config.num_key_value_heads, config.head_dim)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        self.length = torch.zeros(rows, dtype=torch.long, device=device)

    @property
    def rows(self):
        return self.keys.shape[1]

    @property
    def size(self):
        return self.keys.shape[2]

    def part(self, rows, size):
        """The first `rows` rows and `size` positions, in the same memory."""
        part = copy.copy(self)
        part.keys, part.values, part.length = self.keys[:, :rows, :size], self.values[:, :rows, :size], self.length[:rows]
        return part

    def layer(self, index, position):
        """The cache of one layer: k, v (R, G, T, Dh) of `position` (R, T) go in, all k, v (R, G, S, Dh) come out."""
        row = torch.arange(self.rows, device=position.device)[:, None]

        def extend(k, v):
            self.keys[index, row, position] = k.transpose(1, 2)
            self.values[index, row, position] = v.transpose(1, 2)
            return self.keys[index].transpose(1, 2), self.values[index].transpose(1, 2)

        return extend

    def copy_from(self, other, rows, slots, length):
        """Give rows `slots` the first `length` positions of the other's rows `rows`: as many, or one for all."""
        self.keys[:, slots, :length] = other.keys[:, rows, :length]
        self.values[:, slots, :length] = other.values[:, rows, :length]

    def keep(self, rows):
        self.keys, self.values, self.length = self.keys[:, rows], self.values[:, rows], self.length[rows]


def position_bytes(config, dtype):
    """Keys and values of one position in all layers."""
    return 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * dtype.itemsize


def round_up(number, multiple):
    return math.ceil(number / multiple) * multiple


def pool_shape(config, rows, positions, cache_bytes, dtype):
    """(R, S) of the cache for `rows` responses of so many positions, or for those that cache_bytes hold.

    ValueError if they do not hold the smallest pool, of ROWS rows.
    """
    size = round_up(positions, POSITIONS)
    block = ROWS * size * position_bytes(config, dtype)
    blocks = math.ceil(rows / ROWS)
    if cache_bytes is not None:
        if cache_bytes < block:
            raise ValueError(f"{ROWS} rows of {size} positions need {block:,} bytes of cache, but cache_bytes is {cache_bytes:,}")
        blocks = min(blocks, cache_bytes // block)
    return blocks * ROWS, size


# ------------------------------------------------------------------------------------------------ one token


def sample_token(logits, uniform, temperature, top_p):
    """Next tokens (R,) from logits (R, V), by inverting the cumulative distribution at uniform (R,) in [0, 1).

    Temperature 0 takes the largest logit. top_p keeps the fewest most likely tokens that together reach it.
    """
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits.float() if temperature == 1 else logits.float() / temperature
    probability = logits.softmax(-1)
    if top_p == 1:
        return invert_cumulative(probability, uniform)
    probability, token = probability.sort(descending=True, stable=True)
    before = probability.cumsum(-1) - probability
    choice = invert_cumulative(probability.masked_fill(before >= top_p, 0.0), uniform)
    return token.gather(1, choice[:, None])[:, 0]


def invert_cumulative(weight, uniform):
    """The first index (R,) at which the cumulative sum of weight (R, V) exceeds uniform (R,) times the whole sum.

    First the block of indices, then the index in it: of 32,000 numbers 125 + 256 are summed up in float64.
    """
    R, V = weight.shape
    blocks = weight.view(R, -1, math.gcd(V, 256))
    cumulative = F.pad(blocks.sum(-1).double().cumsum(-1), (1, 0))  # (R, 1 + blocks): the mass before each block, and all
    target = uniform[:, None].double() * cumulative[:, -1:]
    block = torch.searchsorted(cumulative, target, right=True) - 1  # (R, 1)
    inside = blocks[torch.arange(R, device=weight.device), block[:, 0]].double().cumsum(-1)
    index = torch.searchsorted(inside, target - cumulative.gather(1, block), right=True)
    last = torch.searchsorted(inside, inside[:, -1:].contiguous())  # with a weight: rounding must not lead past it
    return (block * blocks.shape[2] + index.minimum(last))[:, 0]


def token_logps(logits, token):
    """log π (R,) of token (R,) under logits (R, V): of the model itself, without temperature and top_p."""
    logits = logits.float()
    return logits.gather(1, token[:, None])[:, 0] - logits.logsumexp(-1)


def draw_seeds(prompts, samples, generator=None):
    """`prompts` lists of `samples` integers, one for each response."""
    return torch.randint(2**62, (prompts, samples), generator=generator).tolist()


def response_noise(seed, length):
    """(length,) uniform numbers of one response: what it draws does not depend on who decodes beside it."""
    return torch.rand(length, generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------------------------------------ the pool


@dataclass
class Response:
    prompt: list  # token ids
    seed: int
    tokens: list = field(default_factory=list)  # written so far
    logps: list = field(default_factory=list)  # of the tokens, where they are recorded


@dataclass(eq=False)
class Prefix:
    """A prompt that has been computed: a row of a cache, and the logits (V,) of the token behind it."""

    cache: KVCache
    row: int
    logits: torch.Tensor


class Pool:
    """At most `rows` responses that decode together. Living rows stand first; the last token of each is not in the cache yet."""

    def __init__(self, model, cache, rows, max_new_tokens, stop_token, temperature, top_p, record):
        self.model, self.cache, self.device, self.record = model, cache, cache.keys.device, record
        self.max_new_tokens, self.stop_token, self.temperature, self.top_p = max_new_tokens, stop_token, temperature, top_p
        self.writing = [None] * min(rows, cache.rows)  # the response of each row; None: idle
        self.token = torch.zeros(cache.rows, dtype=torch.long, device=self.device)  # the last one of each row
        self.noise = torch.zeros(cache.rows, cache.size, device=self.device)  # at a position: for the token behind it
        self.living = self.finished = 0  # rows, responses
        graphed = self.device.type in GRAPHED
        self.decode = Graph(self.next_tokens, self.device) if graphed else self.next_tokens
        self.multiples = (GRAPH_ROWS, GRAPH_POSITIONS) if graphed else (ROWS, POSITIONS)

    def refill(self, waiting):
        """Let idle rows write waiting responses, an iterator of (prefix, response)."""
        idle = [row for row, response in enumerate(self.writing) if response is None]
        admitted = ((row, *one) for row, one in zip(idle, waiting))  # rows first: no response is taken without one
        for prefix, group in itertools.groupby(admitted, key=lambda place: place[1]):
            rows, _, responses = zip(*group)
            self.admit(list(rows), prefix, responses)

    def admit(self, rows, prefix, responses):
        """Copy the prompt that these responses share into their rows, and write their first tokens."""
        length = len(responses[0].prompt)
        self.cache.copy_from(prefix.cache, [prefix.row], rows, length)
        self.cache.length[rows] = length
        noise = torch.stack([response_noise(response.seed, self.max_new_tokens) for response in responses])
        self.noise[rows, length - 1 : length - 1 + self.max_new_tokens] = noise.to(self.device)
        token, logps = self.sample(prefix.logits.expand(len(rows), -1), self.noise[rows, length - 1])
        self.token[rows] = token
        for row, response in zip(rows, responses):
            self.writing[row] = response
        self.write(rows, token, logps)

    def compact(self):
        """Move living rows to the front, into the places of finished ones, so that a step computes no others."""
        alive = [row for row, response in enumerate(self.writing) if response is not None]
        self.living = len(alive)
        holes = [row for row in range(self.living) if self.writing[row] is None]
        if holes:
            moved = alive[-len(holes) :]
            self.cache.copy_from(self.cache, moved, holes, self.reach(moved))
            for state in (self.cache.length, self.token, self.noise):
                state[holes] = state[moved]
            for row, hole in zip(moved, holes):
                self.writing[hole], self.writing[row] = self.writing[row], None
        self.cache.length[self.living :] = 0  # an idle row in a step stays at its first position

    def step(self):
        """Write one more token in every living row."""
        living, (rows, positions) = self.living, self.multiples
        width = min(round_up(living, rows), self.cache.rows)
        size = min(round_up(self.reach(range(living)), positions), self.cache.size)
        token, logps = self.decode(width, size)
        self.token[:living] = token[:living]
        self.cache.length[:living] += 1
        self.write(range(living), token, logps)

    def next_tokens(self, width, size):
        """The token behind the last one of each of `width` rows, which reach over `size` positions, and its log-probability.

        Shapes depend on nothing else, no number is waited for, and a second call does the same: it changes no state but the
        cache, where it writes what is there. So a CUDA graph can hold it.
        """
        hidden = self.model.model(self.token[:width, None], self.cache.part(width, size))[:, -1]
        uniform = self.noise[:width].gather(1, self.cache.length[:width, None])[:, 0]
        return self.sample(self.model.head(hidden), uniform)

    def sample(self, logits, uniform):
        token = sample_token(logits, uniform, self.temperature, self.top_p)
        return token, token_logps(logits, token) if self.record else None

    def reach(self, rows):
        """How many positions these rows need, with their last tokens."""
        return max(len(self.writing[row].prompt) + len(self.writing[row].tokens) for row in rows)

    def write(self, rows, token, logps):
        """Append a token to the response of each of these rows; where that finishes it, the row becomes idle."""
        logps = logps.tolist() if self.record else itertools.repeat(None)
        for row, value, logp in zip(rows, token.tolist(), logps):
            response = self.writing[row]
            response.tokens.append(value)
            if self.record:
                response.logps.append(logp)
            if value == self.stop_token or len(response.tokens) == self.max_new_tokens:
                self.writing[row] = None
                self.finished += 1


class Graph:
    """A function of integers whose kernels are captured once, and launched together until the integers change."""

    def __init__(self, function, device):
        self.function, self.device, self.arguments, self.graph = function, device, None, None

    def __call__(self, *arguments):
        if arguments != self.arguments:
            memory = self.graph and self.graph.pool()  # of the last graph, which is done with it
            self.graph, self.result = capture(self.function, arguments, self.device, memory)
            self.arguments = arguments
        self.graph.replay()
        return self.result


def capture(function, arguments, device, memory):
    """A CUDA graph of the call, and the tensors that each replay returns into."""
    with torch.cuda.device(device):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # what libraries do at their first calls cannot be captured
            for _ in range(3):
                function(*arguments)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=memory):
            result = function(*arguments)
    return graph, result


# ------------------------------------------------------------------------------------------------ prompts


def prefill(model, prompts):
    """Run some prompts (token lists), right-padded together: a cache with a row of each, and next-token logits (n, V)."""
    parameter = next(model.parameters())
    tokens = pad(prompts, parameter.device)
    cache = KVCache(model.config, *tokens.shape, parameter.device, parameter.dtype)
    last = torch.tensor([len(prompt) - 1 for prompt in prompts], device=parameter.device)
    hidden = model.model(tokens, cache)
    return cache, model.head(hidden[torch.arange(len(prompts), device=parameter.device), last])


def prefilled(model, responses):
    """Yield (prefix, response) of N lists of responses. Prompts are computed when the first of them is asked for, several
    together: the longest first, so that neighbours are of like length and little is padding."""
    order = sorted(responses, key=lambda row: len(row[0].prompt), reverse=True)
    while order:
        count = max(1, PREFILL_TOKENS // len(order[0][0].prompt))
        some, order = order[:count], order[count:]
        cache, logits = prefill(model, [row[0].prompt for row in some])
        for index, row in enumerate(some):
            prefix = Prefix(cache, index, logits[index])
            for response in row:
                yield prefix, response


@torch.no_grad()
def generate(
    model, prompts, samples_per_prompt, max_new_tokens, stop_token, temperature=1.0, top_p=1.0, generator=None,
    rows=256, progress=None, *, cache_bytes=None, seeds=None, logps=None,
):  # fmt: skip
    """Sample responses: N token lists -> N lists of K token lists, each with the stop token it ended on, if any.

    A pool of `rows` rows decodes together, or of as many as have room in `cache_bytes` of keys and values. A prompt is
    computed once and its cache copied to the rows of its K samples; a row that has stopped takes the next waiting one.
    Each response draws from a seed of its own, of `seeds` (N, K) or else of `generator`, so in float32 the text does not
    depend on who decodes beside it (in bfloat16 the logits do, in their last bits).

    `logps`, a list, gets N lists of K lists: log π of each token, untempered. `progress` is a tqdm bar, moved once a
    finished response. ValueError: a prompt leaves no room for max_new_tokens in the model's context, or the cache for
    the smallest pool; or seeds are not K for a prompt.
    """
    N, K, context = len(prompts), samples_per_prompt, model.config.max_position_embeddings
    size = max(map(len, prompts), default=0) + max_new_tokens
    if size > context:
        at = next(n for n, prompt in enumerate(prompts) if len(prompt) + max_new_tokens > context)
        raise ValueError(
            f"prompt {at + 1} has {len(prompts[at])} tokens and the response up to {max_new_tokens}, "
            f"together more than the model's context of {context} (max_position_embeddings)"
        )
    seeds = draw_seeds(N, K, generator) if seeds is None else seeds
    if any(len(row) != K for row in seeds):
        raise ValueError(f"seeds are {[len(row) for row in seeds]} for the prompts, expected {K} for each")
    responses = [[Response(prompt, seed) for seed in row] for prompt, row in zip(prompts, seeds, strict=True)]
    parameter = next(model.parameters())
    shape = pool_shape(model.config, min(rows, N * K), size, cache_bytes, parameter.dtype)
    cache = KVCache(model.config, *shape, parameter.device, parameter.dtype)
    pool = Pool(model, cache, rows, max_new_tokens, stop_token, temperature, top_p, record=logps is not None)
    waiting = prefilled(model, responses)
    while (before := pool.finished) < N * K:
        pool.refill(waiting)
        pool.compact()
        if pool.living:
            pool.step()
        if progress is not None:
            progress.update(pool.finished - before)
    if logps is not None:
        logps += [[response.logps for response in row] for row in responses]
    return [[response.tokens for response in row] for row in responses]
