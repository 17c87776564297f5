"""Sampling responses from a transformer: the key/value cache, the pool of rows that decode together, one token at a time.

Read `generate` at the end first. Shapes: R rows of the pool, T tokens, S cached positions, V vocabulary, G key/value
heads, Dh head size.
"""

import itertools
from collections import deque

import torch

from data import pad


class KVCache:
    """Keys and values of R rows with room for S positions; `length` (R,) says how many each row has."""

    def __init__(self, config, rows, size, device, dtype):
        shape = (config.num_hidden_layers, rows, size, config.num_key_value_heads, config.head_dim)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        self.length = torch.zeros(rows, dtype=torch.long, device=device)

    def begin(self, position):
        """Start a forward pass at `position` (B, T); returns S, how far the rows reach after it."""
        self.position, self.row = position, torch.arange(len(position), device=position.device)[:, None]
        self.reach = int(position.max()) + 1
        return self.reach

    def layer(self, index):
        """The cache of one layer: new k, v (B, G, T, Dh) go in, all k, v (B, G, S, Dh) come out."""

        def extend(k, v):
            self.keys[index, self.row, self.position] = k.transpose(1, 2)
            self.values[index, self.row, self.position] = v.transpose(1, 2)
            return self.keys[index, :, : self.reach].transpose(1, 2), self.values[index, :, : self.reach].transpose(1, 2)

        return extend

    def copy_from(self, other, row, slots):
        """Give this cache's rows `slots` the content of the other's one `row`."""
        length = int(other.length[row])
        self.keys[:, slots, :length] = other.keys[:, row, None, :length]
        self.values[:, slots, :length] = other.values[:, row, None, :length]
        self.length[slots] = length

    def keep(self, rows):
        self.keys, self.values, self.length = self.keys[:, rows], self.values[:, rows], self.length[rows]


def sample_token(logits, uniform, temperature, top_p):
    """Next tokens (R,) from logits (R, V), by inverting the cumulative distribution at uniform (R,) in [0, 1).

    Temperature 0 takes the largest logit. top_p keeps the fewest most likely tokens that together reach it.
    """
    if temperature == 0:
        return logits.argmax(-1)
    probability, token = (logits.float() / temperature).softmax(-1), None
    if top_p < 1:
        probability, token = probability.sort(descending=True, stable=True)
        before = probability.cumsum(-1) - probability
        probability = probability.masked_fill(before >= top_p, 0.0)
    cumulative = probability.double().cumsum(-1)  # double: a 32,000-fold sum in float32 would move the tail
    choice = torch.searchsorted(cumulative, uniform[:, None].double() * cumulative[:, -1:], right=True)
    return (choice if token is None else token.gather(1, choice))[:, 0]


def response_noise(seed, length):
    """(length,) uniform numbers of one response: what it draws does not depend on who decodes beside it."""
    return torch.rand(length, generator=torch.Generator().manual_seed(seed))


class Pool:
    """The rows that decode together: what each is writing, its random numbers, its next-token logits, its cache."""

    def __init__(self, model, rows, size, max_new_tokens):
        parameter = next(model.parameters())
        self.model, self.max_new_tokens, self.device = model, max_new_tokens, parameter.device
        self.writing = [None] * rows  # the response (a growing list of tokens) of each row; None: idle
        self.noise = torch.zeros(rows, max_new_tokens, device=self.device)
        self.logits = torch.zeros(rows, model.config.vocab_size, device=self.device, dtype=parameter.dtype)
        self.cache = KVCache(model.config, rows, size, self.device, parameter.dtype)

    def idle(self):
        return [row for row, response in enumerate(self.writing) if response is None]

    def admit(self, rows, responses, seeds, prompt_cache, prompt_row, logits):
        """Let idle rows write these responses of one prompt, whose cache and next-token logits are given."""
        self.cache.copy_from(prompt_cache, prompt_row, rows)
        self.logits[rows] = logits
        self.noise[rows] = torch.stack([response_noise(seed, self.max_new_tokens) for seed in seeds]).to(self.device)
        for row, response in zip(rows, responses):
            self.writing[row] = response

    def shrink(self):
        """Carry on with the living rows only."""
        alive = [row for row, response in enumerate(self.writing) if response is not None]
        self.cache.keep(alive)
        self.writing, self.noise, self.logits = [self.writing[row] for row in alive], self.noise[alive], self.logits[alive]

    def step(self, stop_token, temperature, top_p):
        """Write one more token in every living row; returns how many responses that finished."""
        written = torch.tensor([[len(response or ())] for response in self.writing], device=self.device)
        token = sample_token(self.logits, self.noise.gather(1, written)[:, 0], temperature, top_p)
        finished = 0
        for row, value in enumerate(token.tolist()):
            if (response := self.writing[row]) is not None:
                response.append(value)
                if value == stop_token or len(response) == self.max_new_tokens:
                    self.writing[row] = None
                    finished += 1
        living = torch.tensor([response is not None for response in self.writing], device=self.device)
        self.cache.length = self.cache.length * living  # an idle row stays at its first position
        if living.any():
            self.logits = self.model.head(self.model.model(token[:, None], self.cache)[:, -1])
        return finished


@torch.no_grad()
def generate(
    model, prompts, samples_per_prompt, max_new_tokens, stop_token, temperature=1.0, top_p=1.0, generator=None,
    rows=256, progress=None,
):  # fmt: skip
    """Sample responses: N token lists -> N lists of K token lists, each with the stop token it ended on, if any.

    A pool of at most `rows` rows decodes together. A prompt is computed once and its cache copied to the rows of
    its K samples; a row that has stopped takes the next waiting sample. Each response draws from a seed of its own,
    so in float32 the text does not depend on `rows` (in bfloat16 the logits do, in their last bits). `progress` is a
    tqdm bar, moved once a finished response. A prompt that leaves no room for max_new_tokens in the model's context
    raises ValueError.
    """
    N, K, context = len(prompts), samples_per_prompt, model.config.max_position_embeddings
    longest = max(map(len, prompts))
    if longest + max_new_tokens > context:
        at = next(n for n, prompt in enumerate(prompts) if len(prompt) + max_new_tokens > context)
        raise ValueError(
            f"prompt {at + 1} has {len(prompts[at])} tokens and the response up to {max_new_tokens}, "
            f"together more than the model's context of {context} (max_position_embeddings)"
        )
    seeds = torch.randint(2**62, (N, K), generator=generator).tolist()
    responses = [[[] for _ in range(K)] for _ in range(N)]
    waiting = deque((n, k) for n in range(N) for k in range(K))
    pool = Pool(model, min(rows, N * K), longest + max_new_tokens, max_new_tokens)
    prefix = {}  # prompt n -> (cache, row in it, next-token logits), while samples of it are waiting
    finished = 0

    while finished < N * K:
        idle = pool.idle()
        if waiting and len(idle) * 4 >= len(pool.writing):  # refilling costs a pass over new prompts: not for each single row
            admitted = [waiting.popleft() for _ in idle[: len(waiting)]]
            prefill(model, prompts, {n for n, _ in admitted}, prefix)
            for n, samples in itertools.groupby(admitted, key=lambda sample: sample[0]):
                ks = [k for _, k in samples]
                slots, idle = idle[: len(ks)], idle[len(ks) :]
                pool.admit(slots, [responses[n][k] for k in ks], [seeds[n][k] for k in ks], *prefix[n])
                if ks[-1] == K - 1:
                    del prefix[n]
        elif not waiting and len(idle) * 2 >= len(pool.writing):
            pool.shrink()
        new = pool.step(stop_token, temperature, top_p)
        finished += new
        if progress is not None:
            progress.update(new)
    return responses


def prefill(model, prompts, wanted, prefix):
    """Run the prompts `wanted` that `prefix` lacks, right-padded together, and put their caches and last logits in it."""
    new = sorted(wanted - prefix.keys())
    if not new:
        return
    parameter = next(model.parameters())
    tokens = pad([prompts[n] for n in new], parameter.device)
    cache = KVCache(model.config, *tokens.shape, parameter.device, parameter.dtype)
    hidden = model.model(tokens, cache)
    cache.length = torch.tensor([len(prompts[n]) for n in new], device=parameter.device)  # forget the padding
    logits = model.head(hidden[torch.arange(len(new)), cache.length - 1])
    prefix |= {n: (cache, row, logits[row]) for row, n in enumerate(new)}
