"""Claims about generate.py that need more than one call of it: exact distributions, the pool, its cache and its graphs.

That its greedy tokens are transformers' stands in test_model.py.
"""

import functools
import itertools

import pytest
import torch
from conftest import tiny_config

import generate as sampling
from engine import cuda_graph
from generate import KVCache, Pool, draw_seeds, generate, invert_cumulative, pool_shape
from generate import position_bytes
from model import Transformer, initialize

PROMPTS = [[1, 2, 3], [4] * 17, [5, 6] * 20, [10], [11, 12], [7, 8, 9] * 15]  # of 1 to 45 tokens
COUNT, STOP = 50_000, 5


def seeded(number):
    return torch.Generator().manual_seed(number)


def build(**changes):
    return initialize(Transformer(tiny_config(**changes)), seeded(0))


@pytest.fixture
def steps(monkeypatch):
    """[(pool, active rows)] of each step that is taken."""
    taken = []
    step = Pool.step

    def counted(self):
        taken.append((self, self.active))
        step(self)

    monkeypatch.setattr(Pool, "step", counted)
    return taken


# ------------------------------------------------------------------------ distributions

SETTINGS = pytest.mark.parametrize(("temperature", "top_p"), [(1.3, 1.0), (0.7, 0.8)])


@functools.cache
def drawn(temperature, top_p):
    """The model, and (COUNT, 3) tokens sampled after [3, 1, 4], with -1 after a stop token."""
    model = build(vocab_size=20)
    responses = generate(model, [[3, 1, 4]], COUNT, 3, STOP, temperature, top_p, seeded(1), rows=1000)[0]
    return model, torch.tensor([response + [-1] * (3 - len(response)) for response in responses])


@torch.no_grad()
def exact(model, tokens, temperature, top_p):
    """Next-token distributions (B, V) after tokens (B, T), whose top_p is transformers'."""
    warpers = pytest.importorskip("transformers.generation.logits_process", reason="transformers computes what is exact")
    logits = model(tokens)[:, -1].double() / temperature
    return (warpers.TopPLogitsWarper(top_p)(None, logits) if top_p < 1 else logits).softmax(-1)


def assert_drawn_from(probability, observed):
    """Chi-square; a false alarm once in a thousand seeds, and the seed is fixed. Rare cells count as one with the next."""
    stats = pytest.importorskip("scipy.stats")
    expected = probability * observed.sum()
    assert (observed[expected == 0] == 0).all()
    merged = expected < 5
    merged |= expected == expected[~merged].min()
    cells = [torch.cat([x[~merged].double(), x[merged].sum(0, keepdim=True).double()]) for x in (observed, expected)]
    assert len(cells[0]) > 2
    assert stats.chisquare(*(x.numpy() for x in cells)).pvalue > 1e-3


@SETTINGS
def test_first_tokens_have_the_frequencies_of_the_exact_distribution(temperature, top_p):
    model, tokens = drawn(temperature, top_p)
    probability = exact(model, torch.tensor([[3, 1, 4]]), temperature, top_p)[0]
    assert (probability > 0).all() == (top_p == 1)
    assert_drawn_from(probability, torch.bincount(tokens[:, 0], minlength=20))


@SETTINGS
def test_second_tokens_are_conditioned_on_the_first(temperature, top_p):
    model, tokens = drawn(temperature, top_p)
    first = torch.bincount(tokens[tokens[:, 0] != STOP, 0]).argmax().item()
    second = tokens[tokens[:, 0] == first, 1]
    assert len(second) > 5000
    assert_drawn_from(exact(model, torch.tensor([[3, 1, 4, first]]), temperature, top_p)[0], torch.bincount(second, minlength=20))


@SETTINGS
def test_responses_stop_with_their_exact_probability(temperature, top_p):
    """P(stop after 1, 2, 3 tokens, or not) is a sum over all the texts that can stand before it."""
    model, tokens = drawn(temperature, top_p)
    alive, stopped, texts = torch.ones(1, dtype=torch.float64), [], torch.tensor([[3, 1, 4]])
    for _ in range(3):
        joint = alive[:, None] * exact(model, texts, temperature, top_p)  # (texts, V)
        stopped.append(joint[:, STOP].sum())
        joint[:, STOP] = 0
        texts = torch.cat([texts.repeat_interleave(20, 0), torch.arange(20).repeat(len(texts))[:, None]], 1)
        alive = joint.flatten()
    observed = (tokens == STOP).sum(0)
    assert (tokens[:, 1:][tokens[:, :-1] == STOP] == -1).all()
    assert_drawn_from(torch.stack([*stopped, alive.sum()]), torch.cat([observed, COUNT - observed.sum(0, keepdim=True)]))


# ------------------------------------------------------------------------ the rest of the batch


def test_neither_pool_nor_budget_nor_prefill_changes_the_text(tiny_model, monkeypatch):
    block = 8 * 80 * position_bytes(tiny_model.config, torch.float32)

    def run(**options):
        return generate(tiny_model, PROMPTS, 5, 30, 7, 0.8, 0.95, seeded(3), **options)

    responses = run()
    assert len({len(response) for row in responses for response in row}) > 10
    assert all(run(rows=rows) == responses for rows in (1, 4, 64))
    assert run(cache_bytes=block) == run(cache_bytes=3 * block) == responses
    monkeypatch.setattr(sampling, "PREFILL_TOKENS", 50)
    assert run() == run(rows=4) == responses


@pytest.mark.parametrize("top_p", [1.0, 0.8])
def test_text_does_not_depend_on_how_many_rows_a_cache_holds(tiny_model, monkeypatch, top_p):
    how = (4, 20, 7, 0.9, top_p)
    whole = generate(tiny_model, PROMPTS, *how, seeded(3))
    for numbers in (1, 3 * tiny_model.config.vocab_size):
        monkeypatch.setattr(sampling, "CACHED_NUMBERS", numbers)
        assert generate(tiny_model, PROMPTS, *how, seeded(3)) == whole


def test_seeds_drawn_by_the_caller_give_what_the_generator_gives(tiny_model):
    seeds = draw_seeds(len(PROMPTS), 3, seeded(2))
    assert len(set(itertools.chain(*seeds))) == 3 * len(PROMPTS)
    responses = generate(tiny_model, PROMPTS, 3, 12, 7, generator=seeded(2))
    assert responses == generate(tiny_model, PROMPTS, 3, 12, 7, seeds=seeds)


@pytest.mark.parametrize("share", [slice(0, 3), slice(1, None, 2), slice(5, None)])
def test_a_share_of_the_prompts_gets_the_text_that_all_get(tiny_model, share):
    seeds = draw_seeds(len(PROMPTS), 4, seeded(2))
    whole = generate(tiny_model, PROMPTS, 4, 20, 7, 0.9, seeds=seeds)
    assert generate(tiny_model, PROMPTS[share], 4, 20, 7, 0.9, seeds=seeds[share], rows=8) == whole[share]


# ------------------------------------------------------------------------ recorded log-probabilities


@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 0.9), (0, 1.0)])
def test_recorded_logps_are_the_models_own_in_one_full_pass(window, temperature, top_p):
    """Of all tokens, the stop token too; untempered, whatever they were drawn with."""
    model, logps = build(sliding_window=window), []
    responses = generate(model, PROMPTS, 4, 20, 7, temperature, top_p, seeded(0), rows=8, logps=logps)
    assert temperature == 0 or any(response[-1] == 7 for row in responses for response in row)
    for prompt, row, recorded in zip(PROMPTS, responses, logps, strict=True):
        for response, logp in zip(row, recorded, strict=True):
            log_softmax = model(torch.tensor([prompt + response]))[0, len(prompt) - 1 : -1].log_softmax(-1)
            full = log_softmax.gather(1, torch.tensor(response)[:, None])[:, 0]
            assert (full - torch.tensor(logp)).abs().max() < 1e-4


def test_recording_does_not_change_the_text(tiny_model):
    responses = generate(tiny_model, PROMPTS, 3, 12, 7, 0.7, 0.9, seeded(4))
    assert generate(tiny_model, PROMPTS, 3, 12, 7, 0.7, 0.9, seeded(4), logps=[]) == responses


# ------------------------------------------------------------------------ the cache and its budget

BLOCK = 8 * 32 * 256  # bytes: 8 rows of 32 positions, of 2 (keys, values) * 2 layers * 2 heads * 8 numbers * 4 bytes


@pytest.mark.parametrize(
    ("rows", "cache_bytes", "shape"),
    [
        (1, None, (8, 32)),
        (17, None, (24, 32)),
        (100, BLOCK, (8, 32)),
        (100, 3 * BLOCK - 1, (16, 32)),
        (100, 3 * BLOCK, (24, 32)),
        (9, 100 * BLOCK, (16, 32)),
    ],
)
def test_the_cache_has_the_rows_that_its_budget_holds(rows, cache_bytes, shape):
    assert pool_shape(tiny_config(), rows, 20, cache_bytes, torch.float32) == shape


def test_half_as_wide_numbers_make_room_for_twice_the_rows():
    assert pool_shape(tiny_config(), 100, 20, 2 * BLOCK, torch.bfloat16) == (32, 32)


def test_a_budget_without_room_is_refused_with_both_numbers_of_bytes(tiny_model):
    with pytest.raises(ValueError, match=r"need 65,536 bytes of cache, but cache_bytes is 65,535"):
        generate(tiny_model, [[1, 2, 3]], 40, 17, None, cache_bytes=BLOCK - 1)


@pytest.mark.parametrize("blocks", [1, 2.9])
def test_the_memory_of_the_cache_stays_within_the_budget_and_is_used(tiny_model, steps, blocks):
    responses = generate(tiny_model, [[1, 2, 3]], 40, 17, None, generator=seeded(0), cache_bytes=int(blocks * BLOCK))[0]
    cache = steps[0][0].cache
    assert isinstance(cache, KVCache) and all(pool.cache is cache for pool, _ in steps)
    assert cache.keys.untyped_storage().nbytes() + cache.values.untyped_storage().nbytes() == int(blocks) * BLOCK
    assert max(active for _, active in steps) == 8 * int(blocks)
    assert [len(response) for response in responses] == [17] * 40


def test_a_finished_response_makes_room_for_a_waiting_one(tiny_model, steps):
    """Greedy scheduling's bound: no row is idle while one waits, so steps <= tokens / rows + the longest response."""
    responses = generate(tiny_model, PROMPTS, 20, 60, 7, generator=seeded(0), rows=6)
    lengths = [len(response) for row in responses for response in row]
    batches = sum(max(lengths[i : i + 6]) for i in range(0, len(lengths), 6))  # if rows waited for each other
    assert len(steps) <= sum(lengths) / 6 + 60 < batches
    assert max(active for _, active in steps) == 6
    assert sum(active for _, active in steps) == sum(lengths) - len(lengths)  # a row in a step writes a token; prompts the first


# ------------------------------------------------------------------------ graphs


def addresses(pool):
    return [state.data_ptr() for state in (pool.token, pool.noise, pool.cache.keys, pool.cache.values, pool.cache.length)]


class FakeGraph:
    """What a CUDA graph does: calls the function as at its capture, on the same memory, into the same results."""

    def __init__(self, function, arguments, memory):
        self.function, self.arguments, self.memory, self.replays = function, arguments, memory, 0
        self.addresses, self.result = addresses(function.__self__), function(*arguments)

    def pool(self):
        return self

    def replay(self):
        assert addresses(self.function.__self__) == self.addresses
        self.replays += 1
        for static, fresh in zip(self.result, self.function(*self.arguments)):
            assert (static is None) == (fresh is None)
            if static is not None:
                static.copy_(fresh)


@pytest.fixture
def graphs(monkeypatch):
    """Let the CPU be a device with graphs; they are collected here."""
    captured = []

    def capture(function, arguments, device, memory):
        for _ in range(3):
            function(*arguments)
        captured.append(FakeGraph(function, arguments, memory))
        return captured[-1], captured[-1].result

    monkeypatch.setattr(cuda_graph, "capture", capture)
    monkeypatch.setattr(sampling, "GRAPHED", ("cpu",))
    return captured


@pytest.mark.parametrize("multiples", [(32, 256), (8, 16)])
def test_replayed_steps_write_the_same_text_and_logps(tiny_model, graphs, monkeypatch, multiples):
    def run():
        logps = []
        return generate(tiny_model, PROMPTS, 8, 30, 7, 0.8, 0.95, seeded(3), rows=40, logps=logps), logps

    monkeypatch.setattr(sampling, "GRAPH_ROWS", multiples[0])
    monkeypatch.setattr(sampling, "GRAPH_POSITIONS", multiples[1])
    responses, logps = run()
    assert graphs
    monkeypatch.setattr(sampling, "GRAPHED", ())
    plain, plain_logps = run()
    assert responses == plain
    logps, plain_logps = (torch.tensor([x for row in rows for one in row for x in one]) for rows in (logps, plain_logps))
    assert (logps - plain_logps).abs().max() < 1e-4


def test_a_step_is_captured_anew_only_when_its_shape_changes(tiny_model, graphs, steps, monkeypatch):
    monkeypatch.setattr(sampling, "GRAPH_ROWS", 8)
    monkeypatch.setattr(sampling, "GRAPH_POSITIONS", 16)
    generate(tiny_model, [[1, 2, 3]], 40, 60, 7, generator=seeded(3), rows=40)
    shapes = [graph.arguments for graph in graphs]
    assert all(before != after for before, after in itertools.pairwise(shapes))
    assert len({rows for rows, _ in shapes}) > 2 and len({reach for _, reach in shapes}) > 2
    assert sum(graph.replays for graph in graphs) == len(steps) > 3 * len(graphs)
    assert [graph.memory for graph in graphs] == [None, *graphs[:-1]]  # each captured into the memory of the one before


def test_a_long_run_in_a_full_pool_is_captured_once(tiny_model, graphs, steps):
    generate(tiny_model, [[1, 2, 3], [4, 5]], 40, 30, None, generator=seeded(3), rows=32)
    assert [graph.arguments for graph in graphs] == [(32, 48)] and len(steps) > 60


def test_a_step_that_is_computed_again_is_the_same(tiny_model, monkeypatch):
    """What capturing does: it calls a step several times before the first that counts."""
    compared, step = [], Pool.step

    def checked(pool):
        state = [x.clone() for x in (pool.token, pool.noise, pool.cache.length)]
        once, written = (pool.next_tokens(8, pool.cache.size), (pool.cache.keys.clone(), pool.cache.values.clone()))
        again = pool.next_tokens(8, pool.cache.size)
        assert all(torch.equal(*pair) for pair in zip(once, again))
        assert all(torch.equal(*pair) for pair in zip(written, (pool.cache.keys, pool.cache.values)))
        assert all(torch.equal(*pair) for pair in zip(state, (pool.token, pool.noise, pool.cache.length)))
        compared.append(pool.active)
        step(pool)

    plain = generate(tiny_model, PROMPTS, 2, 20, 7, generator=seeded(3), rows=5)
    monkeypatch.setattr(Pool, "step", checked)
    assert generate(tiny_model, PROMPTS, 2, 20, 7, generator=seeded(3), rows=5, logps=[]) == plain
    assert len(set(compared)) > 2


# ------------------------------------------------------------------------ edges


@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_a_bfloat16_model_samples_in_a_bfloat16_cache(steps, top_p):
    model, logps = build().bfloat16(), []
    responses = generate(model, PROMPTS, 3, 12, 7, 0.8, top_p, seeded(0), rows=5, logps=logps)
    assert steps[0][0].cache.keys.dtype == torch.bfloat16
    assert all(len(response) == 12 or response[-1] == 7 for row in responses for response in row)
    for prompt, (response, *_), (logp, *_) in zip(PROMPTS, responses, logps):
        full = model(torch.tensor([prompt + response]))[0, len(prompt) - 1 : -1].float().log_softmax(-1)
        assert (full.gather(1, torch.tensor(response)[:, None])[:, 0] - torch.tensor(logp)).abs().max() < 0.1


def test_no_prompts_get_no_responses(tiny_model):
    logps = []
    assert generate(tiny_model, [], 5, 12, 7, generator=seeded(0), logps=logps) == [] == logps


def test_no_samples_are_an_empty_list_for_each_prompt(tiny_model):
    assert generate(tiny_model, [[1], [2]], 0, 12, 7, generator=seeded(0)) == [[], []]


# ------------------------------------------------------------------------ inverting a distribution

SIZES = pytest.mark.parametrize("size", [32_000, 50, 257])


def uniforms(rows):
    """Random ones, with the least and the largest that torch.rand gives."""
    uniform = torch.rand(rows, generator=seeded(0))
    uniform[:4], uniform[4:8] = 0, 1 - 2**-24
    return uniform


def sparse_weights(rows, size):
    """(rows, V) integers, most of them 0, of which float32 sums are exact; the first and last two are 0, or all but one."""
    weight = torch.randint(1, 200, (rows, size), generator=seeded(1)).float()
    weight *= torch.rand(rows, size, generator=seeded(2)) < torch.linspace(0.02, 1, rows)[:, None]
    weight[:, :2] = weight[:, -2:] = 0
    weight[[0, 4]] = 0
    weight[[0, 4], [7, size // 2]] = 1.0
    weight[:, size // 3] += 1
    return weight


@SIZES
def test_inverting_in_blocks_equals_a_plain_search_of_the_cumulative_sum(size):
    weight, uniform = sparse_weights(200, size), uniforms(200)
    cumulative = weight.double().cumsum(-1)
    plain = torch.searchsorted(cumulative, uniform[:, None].double() * cumulative[:, -1:], right=True)[:, 0]
    assert torch.equal(invert_cumulative(weight, uniform), plain)


@SIZES
def test_inverting_a_softmax_errs_by_no_more_than_its_rounding(size):
    weight, uniform = (3 * torch.randn(500, size, generator=seeded(3))).softmax(-1), uniforms(500)
    index = invert_cumulative(weight, uniform)[:, None]
    after = weight.double().cumsum(-1).gather(1, index)[:, 0]
    before = after - weight.double().gather(1, index)[:, 0]
    target = uniform.double() * weight.double().sum(-1)
    assert (before - 1e-6 < target).all() and (target < after + 1e-6).all()


@SIZES
@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-24, 1 - 2**-53])
def test_no_token_of_weight_zero_is_ever_drawn(size, uniform):
    """Sums that are exact and sums that are rounded."""
    uniform = torch.full((200,), uniform, dtype=torch.float64)
    exact_weight = sparse_weights(200, size)
    for weight in (exact_weight, (exact_weight + exact_weight.sqrt()) / exact_weight.sum(-1, keepdim=True)):
        assert (weight.gather(1, invert_cumulative(weight, uniform)[:, None]) > 0).all()
