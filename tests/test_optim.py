"""Claims about engine/optim.py: torch's numbers in float32, float32's movement in bfloat16, rounding that is right on average."""

from itertools import accumulate

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch.profiler import ProfilerActivity, profile

from engine import optim
from engine.optim import AdamW, RMSProp, stochastic_round

BOTH = pytest.mark.parametrize("ours", [RMSProp, AdamW])
TORCH = {RMSProp: torch.optim.RMSprop, AdamW: torch.optim.AdamW}
SPACING = 2.0**-13  # of bfloat16 from 2^-6 to 2^-5, where trained weights are


def random(seed=0):
    return torch.Generator().manual_seed(seed)


def weights(*shape, seed=0):
    """bfloat16 from 0.0195 to 0.0273: a few hundred steps of 5e-7 do not leave the range in which SPACING is right."""
    return ((1.25 + 0.5 * torch.rand(shape, generator=random(seed))) * 2**-6).bfloat16()


def train(make, tensors, steps, **options):
    """Parameters and their optimizer after `steps` random gradients, the same for every dtype."""
    parameters = [torch.nn.Parameter(tensor.clone()) for tensor in tensors]
    optimizer, generator = make(parameters, **options), random(1)
    proceed(optimizer, parameters, steps, generator)
    return parameters, optimizer


def proceed(optimizer, parameters, steps, generator):
    for _ in range(steps):
        for p in parameters:
            p.grad = torch.randn(p.shape, generator=generator).bfloat16().to(p.dtype)
        optimizer.step()


# ------------------------------------------------------------------------------------------------ float32


@BOTH
def test_float32_equals_torch(ours):
    """50 steps of two groups, a schedule, gradients from 1e-9 (as small as ε) to 1, and one that is missing at first."""
    both = []
    for make, options in ((ours, {}), (TORCH[ours], {"weight_decay": 0.0})):
        generator = random()
        matrix, vector, number = (torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((30, 50), (7,), ()))
        optimizer = make([{"params": [matrix]}, {"params": [vector, number], "lr": 3e-3}], lr=1e-2, **options)
        for step in range(50):
            for p in (matrix, vector, number):
                p.grad = torch.randn(p.shape, generator=generator) * 10 ** (-9 * torch.rand(p.shape, generator=generator))
            if step < 5:
                number.grad = None
            optimizer.step()
            optimizer.param_groups[1]["lr"] *= 0.9
            optimizer.zero_grad(set_to_none=True)
        both.append((matrix, vector, number))
    for mine, theirs in zip(*both):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-7)


@BOTH
def test_shards_of_float32_parameters_move_as_the_whole(ours):
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor, init_device_mesh

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        whole = torch.nn.Parameter(torch.randn(6, 4, generator=random()))
        shards = torch.nn.Parameter(distribute_tensor(whole.detach().clone(), init_device_mesh("cpu", (1,)), [Shard(0)]))
        optimizers = [ours([whole], 1e-2), ours([shards], 1e-2)]
        for seed in range(3):
            whole.grad = torch.randn(6, 4, generator=random(seed))
            shards.grad = distribute_tensor(whole.grad, shards.device_mesh, [Shard(0)])
            for optimizer in optimizers:
                optimizer.step()
        assert isinstance(optimizers[1].state_dict()["0.square"], DTensor)
        assert torch.equal(shards.full_tensor(), whole)
    finally:
        dist.destroy_process_group()


# ------------------------------------------------------------------------------------------------ bfloat16


@BOTH
def test_bfloat16_moves_as_float32_does_where_torchs_stands_still(ours):
    """400 steps at 5e-7, two spacings in all. A weight that goes a distance d in float32 may be off by √(d · spacing).

    The mean of 20000 weights is then known to 0.5%; the 20000 errors in these units have a mean square of 1, known to
    1.3%; and being rather Poisson than normal none is beyond 8, but for one run in 10^4.
    """
    lr, generator = 5e-7, random(3)
    start, sign = weights(20000), torch.randint(2, (20000,), generator=generator) * 2.0 - 1
    rounded, exact, still = (torch.nn.Parameter(tensor) for tensor in (start.clone(), start.float(), start.clone()))
    optimizers = [ours([rounded], lr, seed=0), ours([exact], lr), TORCH[ours]([still], lr=lr, weight_decay=0.0)]
    distance = torch.zeros(20000)
    for _ in range(400):
        gradient = (sign * (1 + 0.5 * torch.randn(20000, generator=generator))).bfloat16()
        before = exact.detach().clone()
        rounded.grad, exact.grad, still.grad = gradient, gradient.float(), gradient
        for optimizer in optimizers:
            optimizer.step()
        distance += (exact.detach() - before).abs()
    assert torch.equal(still, start)
    moved, expected = (p.detach().float() - start.float() for p in (rounded, exact))
    assert (moved * sign).mean().item() == pytest.approx((expected * sign).mean().item(), rel=0.03)
    error = (moved - expected) / (distance * SPACING).sqrt()
    assert error.square().mean().item() == pytest.approx(1, abs=0.08)
    assert error.abs().max() < 8


@pytest.mark.parametrize(("ours", "stored"), [(RMSProp, torch.float32), (AdamW, torch.bfloat16)])
def test_bytes_per_bfloat16_parameter_are_eight(ours, stored):
    (p,), optimizer = train(ours, [weights(1000)], 1, lr=1e-3, seed=0)
    moments = [value for name, value in optimizer.state[p].items() if name != "step"]
    assert {moment.dtype for moment in moments} == {stored}
    assert p.nbytes + p.grad.nbytes + sum(moment.nbytes for moment in moments) == 8000


def test_second_moment_in_bfloat16_decays_where_torchs_stands_still():
    """Without gradient v falls to .999^1000 = 0.368 of itself; its mean over 20000 is known to 0.05%."""
    left = []
    for make, options, name in ((AdamW, {"seed": 0}, "square"), (torch.optim.AdamW, {}, "exp_avg_sq")):
        (p,), optimizer = train(make, [weights(20000)], 1, lr=0.0, **options)
        second = optimizer.state[p][name].fill_(0.75)
        p.grad.zero_()
        for _ in range(1000):
            optimizer.step()
        left.append(second.double().mean().item() / 0.75)
    assert left[0] == pytest.approx(0.999**1000, rel=3e-3)
    assert left[1] == 1


@BOTH
def test_a_step_that_bfloat16_can_resolve_is_the_float32_step(ours):
    """Large steps: after ten, at most a few spacings of 2^-7 from the float32 weights, though those moved by 1 and more."""
    start = torch.ones(3, 1000).bfloat16()
    (rounded,), _ = train(ours, [start], 10, lr=0.3, seed=0)
    (exact,), _ = train(ours, [start.float()], 10, lr=0.3)
    assert (exact - 1).abs().mean() > 0.5
    assert ((rounded.float() - exact) / exact.abs().clamp(min=1)).abs().max() < 0.1
    assert (rounded.float() - exact).mean().abs() < 4e-3


@BOTH
def test_weights_without_a_gradient_keep_their_bits(ours):
    start = weights(1000)
    start[:500] *= -1
    parameters = [torch.nn.Parameter(start.clone()) for _ in range(2)]
    optimizer = ours(parameters, 1e-3, seed=0)
    parameters[0].grad = torch.zeros_like(start)  # the other's stays None
    for _ in range(5):
        optimizer.step()
    assert all(torch.equal(p, start) for p in parameters)
    assert [state["step"].item() for state in optimizer.state.values()] == [5, 0]


@BOTH
def test_all_chunks_of_a_parameter_are_updated(ours, monkeypatch):
    """Shapes () and (7, 11, 13) in chunks of 100: 1 and 11 of them, the last incomplete. A first step moves every weight
    by lr (AdamW) or 10 lr; below 4, bfloat16 are 1/64 apart."""
    monkeypatch.setattr(optim, "CHUNK", 100)
    tensors = [torch.tensor(1.5).bfloat16(), torch.ones(7, 11, 13).bfloat16()]
    rounded, _ = train(ours, tensors, 1, lr=0.1, seed=0)
    exact, _ = train(ours, [tensor.float() for tensor in tensors], 1, lr=0.1)
    for start, one, other in zip(tensors, rounded, exact):
        assert (other.detach() - start.float()).abs().min() > 0.09
        assert (one.float() - other).abs().max() < 1 / 64


# ------------------------------------------------------------------------------------------------ rounding


def test_rounding_is_unbiased_and_goes_to_a_neighbour():
    """2000 values of all magnitudes, denormals too, 4000 roundings each; z has deviation 1 ± 0.016 and mean 0 ± 0.022."""
    generator, repeats = random(), 4000
    upper = torch.randint(0x7F7F, (2000,), generator=generator) - 0x8000 * torch.randint(2, (2000,), generator=generator)
    lower = torch.randint(0x1000, 0xF000, (2000,), generator=generator)  # a fraction of 1/16 to 15/16
    value = (upper * 0x10000 + lower).to(torch.int32).view(torch.float32)
    assert (value < 0).float().mean() > 0.4 and ((value.abs() < 1.1e-38) & (value != 0)).any()

    low, high = (bits.to(torch.int16).view(torch.bfloat16).double() for bits in (upper, upper + 1))  # towards zero, away
    rounded = stochastic_round(value.expand(repeats, -1).contiguous(), generator)
    assert rounded.dtype == torch.bfloat16
    rounded = rounded.double()
    assert ((rounded == low) | (rounded == high)).all()
    fraction = (value.double() - low) / (high - low)
    error = ((rounded - value.double()) / (high - low)).mean(0)
    z = error / (fraction * (1 - fraction) / repeats).sqrt()
    assert z.mean().abs() < 0.12
    assert z.std().item() == pytest.approx(1, abs=0.08)
    assert z.abs().max() < 5.5


def test_the_last_of_the_sixteen_bits_counts():
    """The float32 after 1 rounds up once in 65536 times: in 2^20 roundings 16 ± 4 times; its mirror image, too."""
    value = torch.tensor([1 + 2**-23, 1 + 2**-7 - 2**-23]).repeat(1 << 20, 1)
    rounded = stochastic_round(value, random())
    assert 1 <= (rounded[:, 0] != 1).sum() <= 40
    assert 1 <= (rounded[:, 1] == 1).sum() <= 40


def test_rounding_keeps_the_bits_of_all_that_bfloat16_has():
    """All 65536 of them: both zeros, denormals, infinities; a NaN stays one."""
    everything = torch.arange(1 << 16).to(torch.int16).view(torch.bfloat16)
    rounded, number = stochastic_round(everything.float(), random()), ~everything.isnan()
    assert torch.equal(rounded.view(torch.int16)[number], everything.view(torch.int16)[number])
    assert rounded[~number].isnan().all()


@pytest.mark.parametrize("bits", [0x7F800001, 0x7FFFFFFF, -1, -0x7FFFFF, 0x7FC00000])
def test_no_nan_becomes_a_number(bits):
    value = torch.full((10000,), bits, dtype=torch.int32).view(torch.float32)
    assert value.isnan().all() and stochastic_round(value, random()).isnan().all()


@pytest.mark.parametrize("sign", [1, -1])
def test_the_ends_of_the_range_round_to_their_neighbours(sign):
    """Half of the smallest denormal: itself or zero. Above the largest bfloat16, 3.39e38: that or infinity."""
    value = sign * torch.tensor([2.0**-134, 3.396e38]).repeat(1000, 1)
    small, large = stochastic_round(value, random()).T
    assert {abs(number) for number in small.tolist()} == {0, 2.0**-133}
    assert (small.view(torch.int16) < 0).all() == (sign < 0)  # the sign of zero, too
    assert {number * sign for number in large.tolist()} == {torch.finfo(torch.bfloat16).max, torch.inf}


@BOTH
def test_the_seed_decides_the_roundings(ours):
    same, again, other = (train(ours, [weights(1000)] * 2, 20, lr=1e-5, seed=seed)[0] for seed in (0, 0, 1))
    assert all(torch.equal(one, two) for one, two in zip(same, again))
    assert not any(torch.equal(one, two) for one, two in zip(same, other))


@BOTH
def test_equal_parameters_are_rounded_independently(ours):
    parameters = [torch.nn.Parameter(weights(1000)) for _ in range(2)]
    optimizer = ours(parameters, 1e-5, seed=0)
    for p in parameters:
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert not torch.equal(*parameters)


# ------------------------------------------------------------------------------------------------ state


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_run_continues_from_safetensors_to_the_same_bits(ours, dtype, tmp_path):
    """The new optimizer has another seed and learning rate: the state brings its own."""
    parameters, optimizer = train(ours, [weights(40, 50).to(dtype), weights(3).to(dtype)], 3, lr=1e-2, seed=0)
    optimizer.param_groups[0]["lr"] = 1 / 300
    save_file(optimizer.state_dict(), tmp_path / "state.safetensors")
    copies = [torch.nn.Parameter(p.detach().clone()) for p in parameters]
    resumed = ours(copies, 1.0, seed=5)
    resumed.load_state_dict(load_file(tmp_path / "state.safetensors"))
    at_save = [p.detach().clone() for p in parameters]
    for one, tensors in ((optimizer, parameters), (resumed, copies)):
        proceed(one, tensors, 3, random(9))
    assert all(torch.equal(p, copy) for p, copy in zip(parameters, copies))
    assert not any(torch.equal(p, old) for p, old in zip(parameters, at_save))
    assert resumed.param_groups[0]["lr"] == 1 / 300


def test_the_state_of_another_optimizer_is_refused():
    def state(ours, dtype=torch.bfloat16, size=3):
        return ours([torch.nn.Parameter(torch.ones(size, dtype=dtype))], 1.0, seed=0).state_dict()

    own = torch.nn.Parameter(torch.ones(3).bfloat16())
    optimizer = RMSProp([own], 1.0, seed=0)
    optimizer.load_state_dict(state(RMSProp))
    for other, message in (
        (state(AdamW), "0.mean is .*bfloat16.*, expected nothing"),
        (state(RMSProp, size=4), r"0.square is .*\(4,\)\), expected .*\(3,\)\)"),
        (state(RMSProp, dtype=torch.float32), "generator is nothing, expected"),
    ):
        with pytest.raises(ValueError, match=message):
            optimizer.load_state_dict(other)


def test_gradients_are_removed_or_zeroed():
    (p,), optimizer = train(RMSProp, [weights(3)], 1, lr=1e-3, seed=0)
    assert p.grad.any()
    optimizer.zero_grad(set_to_none=False)
    assert not p.grad.any()
    optimizer.zero_grad(set_to_none=True)
    assert p.grad is None


@BOTH
def test_parameters_that_cannot_be_trained_are_refused(ours):
    bfloat16, float16 = (torch.nn.Parameter(torch.ones(3, dtype=dtype)) for dtype in (torch.bfloat16, torch.float16))
    with pytest.raises(ValueError, match="expected a seed"):
        ours([bfloat16], 1e-3)
    with pytest.raises(ValueError, match="parameters are torch.float16, expected"):
        ours([float16], 1e-3)
    with pytest.raises(ValueError, match="no parameters"):
        ours(iter(()), 1e-3)


# ------------------------------------------------------------------------------------------------ memory


def temporary_bytes(step):
    """The most memory that `step` had allocated at once, by the allocator's own record."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        step()
    events = [event for event in record.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))


@BOTH
def test_a_float32_step_needs_one_parameter_of_temporary_memory(ours):
    parameters, optimizer = train(ours, [torch.ones(1 << 18)] * 4, 1, lr=1e-3)
    largest = parameters[0].nbytes
    assert largest <= temporary_bytes(optimizer.step) < 1.01 * largest


@BOTH
def test_a_bfloat16_step_needs_a_few_chunks_of_temporary_memory(ours, monkeypatch):
    """However large the parameter: 28 bytes for each of CHUNK numbers. That is less than a parameter of 7B models
    in float32 (Mistral's embedding has 32000 × 4096 numbers), and Mistral's 58 GB and this fit an 80 GB card."""
    assert 28 * optim.CHUNK < 4 * 32000 * 4096
    monkeypatch.setattr(optim, "CHUNK", 1 << 16)
    for chunks in (8, 32):
        _, optimizer = train(ours, [weights(chunks << 16)], 1, lr=1e-3, seed=0)
        assert 8 << 16 < temporary_bytes(optimizer.step) < 28 << 16
