"""RMSProp and AdamW in place, with stochastic rounding for bfloat16 weights.

A bfloat16 has 8 significant bits: 0.02 and its neighbour are 1.2e-4 apart, and rounding to the
nearest loses every step of 5e-7. So bfloat16 weights are updated in float32 and rounded at random,
up with the probability of the fraction that would be lost: a weight moves rarely, by whole
spacings, and on average exactly as in float32 (Zamirai et al., Revisiting BFloat16 Training,
2010.06192; with Adam, language models of up to 6.7B parameters: Ozkara et al., 2502.20566).

The price is noise: steps that add up to a distance d leave a weight off by about √(d · spacing),
2.5e-4 for a thousand steps of 5e-7 at 0.02. A weight whose steps are 0 stays as it is.

Bytes per parameter, gradient included: float32 12 (RMSProp) or 16 (AdamW); bfloat16 8 for either,
58 GB for Mistral-7B.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from engine.distributed import local_part

CHUNK = 1 << 22  # numbers of a bfloat16 parameter that are updated at a time


def stochastic_round(value: Tensor, generator: torch.Generator) -> Tensor:
    """float32 -> one of the two bfloat16 around it, with expectation `value`.

    Exact where bfloat16 has the value. Infinities and NaN stay; between the largest bfloat16 and
    infinity, rounding up gives infinity.
    """
    # A bfloat16 is the upper half of a float32. Random 16 bits, added to the lower half, carry into
    # the upper half with probability (lower half)/2^16, the fraction that truncation loses. This
    # holds for both signs, zeros and denormals.
    count = value.numel()
    draws = torch.empty(-(-count // 4), dtype=torch.int64, device=value.device)
    draws.random_(-(2**63), None, generator=generator)  # 64 random bits are those of four numbers
    total = draws.view(torch.uint16)[:count].view(value.shape).to(torch.int32)
    total += value.view(torch.int32)
    upper = total.view(torch.bfloat16).view(*value.shape, 2)[..., 1]

    # The bits of a NaN may truncate to those of infinity, or carry into the sign.
    return torch.where(value.isnan(), torch.nan, upper)


class RoundedSum(torch.autograd.Function):
    """x + small of bfloat16 tensors (..., D), rounded stochastically, the same way each time.

    Rounded to the nearest, whatever is below half a spacing of x would be lost, for x is a bfloat16
    already; here it is kept on average. x + 0 is x.
    """

    @staticmethod
    def forward(ctx, x, small):
        total = x.float().add_(small)
        columns = total.shape[-1]
        rows = total.numel() // columns

        # Each row's random bits are those of the row before, moved on by one: as many as there are
        # sums would take longer to draw than the sums.
        generator = torch.Generator(x.device).manual_seed(0)
        count = (rows + columns,)
        bits = torch.randint(
            1 << 16, count, generator=generator, device=x.device, dtype=torch.int32
        )
        upper = total.view(torch.int32).view(rows, columns)
        upper += bits.unfold(0, columns, 1)[:rows]
        upper >>= 16
        return upper.to(torch.int16).view(torch.bfloat16).view(x.shape)

    @staticmethod
    def backward(ctx, gradient):
        return gradient, gradient


# ------------------------------------------------------------------------ optimizers


class Optimizer:
    """Base class of RMSProp and AdamW.

    `parameters` are tensors, or groups {"params": tensors, "lr": number} as in torch.optim. `seed`
    decides how bfloat16 parameters are rounded; they need one, another in each round of training,
    and must be contiguous and no DTensors. float32 and float64 parameters may be DTensors.

    A subclass has `moments`, the names of its averages, and `update(weight, gradient, *moments, lr,
    step)`, its formula, in place; `step` counts from 1. `moments_in_float32`: its averages are
    float32 for any parameter dtype but float64.
    """

    moments: tuple[str, ...]
    moments_in_float32: bool

    def __init__(self, parameters: Iterable, lr: float, seed: int | None = None):
        groups = list(parameters)
        if not groups or not isinstance(groups[0], dict):
            groups = [{"params": groups}]
        self.param_groups = []
        for group in groups:
            self.param_groups.append({"lr": lr, **group, "params": list(group["params"])})

        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        if not parameters:
            raise ValueError("no parameters to optimise")
        for parameter in parameters:
            if parameter.dtype not in (torch.float32, torch.float64, torch.bfloat16):
                found = f"parameters are {parameter.dtype}"
                raise ValueError(f"{found}, expected float32, float64 or bfloat16")

        rounded = [parameter for parameter in parameters if parameter.dtype == torch.bfloat16]
        if rounded and seed is None:
            raise ValueError("bfloat16 parameters are rounded at random: expected a seed")
        self.generator = torch.Generator(rounded[0].device).manual_seed(seed) if rounded else None
        self.state = {parameter: self.start(parameter) for parameter in parameters}

    def start(self, parameter: Tensor) -> dict[str, Tensor]:
        """The state of a parameter before its first step."""
        dtype = parameter.dtype
        if self.moments_in_float32:
            dtype = torch.promote_types(dtype, torch.float32)

        state = {"step": torch.zeros((), dtype=torch.int64)}
        for name in self.moments:
            state[name] = torch.zeros_like(parameter, dtype=dtype, requires_grad=False)
        return state

    @torch.no_grad()
    def step(self) -> None:
        """One step of every parameter that has a gradient, one after the other."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                step, *moments = self.state[parameter].values()
                step += 1
                update = self.update_rounded if parameter.dtype == torch.bfloat16 else self.update
                update(parameter, parameter.grad, *moments, lr=group["lr"], step=step.item())

    def update_rounded(self, parameter, gradient, *moments, lr, step):
        """`update` in float32, then bfloat16 again by stochastic rounding."""
        # Chunk by chunk, so that no float32 copy is longer than CHUNK. `float` of a float32 moment
        # is the moment itself, which is then updated in place and not rounded.
        chunks = [tensor.view(-1).split(CHUNK) for tensor in (parameter, *moments)]
        for part, *stored in zip(gradient.reshape(-1).split(CHUNK), *chunks):
            weight, *exact = [tensor.float() for tensor in stored]
            self.update(weight, part.float(), *exact, lr=lr, step=step)

            for tensor, value in zip(stored, (weight, *exact)):
                if tensor.dtype == torch.bfloat16:
                    tensor.copy_(stochastic_round(value, self.generator))

    def zero_grad(self, set_to_none: bool = True) -> None:
        for parameter in self.state:
            if set_to_none:
                parameter.grad = None
            elif parameter.grad is not None:
                parameter.grad.zero_()

    def state_dict(self) -> dict[str, Tensor]:
        """{name: tensor}, the tensors themselves and not copies: safetensors stores it as it is.

        0.step, 0.square, ... in the order of the parameters; lr of each group; the generator.
        """
        state = {}
        for number, entries in enumerate(self.state.values()):
            for name, value in entries.items():
                state[f"{number}.{name}"] = value

        rates = [group["lr"] for group in self.param_groups]
        state["lr"] = torch.tensor(rates, dtype=torch.float64)
        if self.generator:
            state["generator"] = self.generator.get_state()
        return state

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue where `state_dict` was taken, to the same bits.

        ValueError names an entry of another optimizer.
        """
        own = self.state_dict()
        for name in sorted(own.keys() | state.keys()):
            found = kind_of(state.get(name))
            expected = kind_of(own.get(name))
            if found != expected:
                raise ValueError(f"optimizer state: {name} is {found}, expected {expected}")

        for name, value in own.items():
            value.copy_(state[name])

        # These two are copies in state_dict, unlike the moments.
        for group, lr in zip(self.param_groups, own["lr"].tolist()):
            group["lr"] = lr
        if self.generator:
            self.generator.set_state(own["generator"])


def kind_of(tensor: Tensor | None):
    return "nothing" if tensor is None else (tensor.dtype, tuple(tensor.shape))


class RMSProp(Optimizer):
    """v ← αv + (1 - α)g²,  w ← w - lr · g/(√v + ε).

    Hinton's lecture 6e (Neural Networks for Machine Learning, 2012) in the form of
    torch.optim.RMSprop, to which float32 weights are equal. v is float32 for bfloat16 weights too.
    """

    moments = ("square",)
    moments_in_float32 = True

    def __init__(self, parameters, lr, seed=None, alpha=0.99, eps=1e-8):
        super().__init__(parameters, lr, seed)
        self.alpha = alpha
        self.eps = eps

    def update(self, weight, gradient, square, *, lr, step):
        square.mul_(self.alpha).addcmul_(gradient, gradient, value=1 - self.alpha)
        weight.addcdiv_(gradient, square.sqrt().add_(self.eps), value=-lr)


class AdamW(Optimizer):
    """m ← β₁m + (1 - β₁)g,  v ← β₂v + (1 - β₂)g²,  w ← w - lr · m̂/(√v̂ + ε).

    m̂ = m/(1 - β₁ᵗ) and v̂ = v/(1 - β₂ᵗ). Loshchilov and Hutter, 1711.05101, algorithm 2, with
    weight decay 0 (so it is Adam, 1412.6980) and torch's defaults; float32 weights are equal to
    those of torch.optim.AdamW.

    For bfloat16 weights m and v are bfloat16 and rounded stochastically too: rounded to the
    nearest, a v that should shrink by 1/1000 a step would stand still. Rounding puts v off by some
    4%, and the step of w by half of that.
    """

    moments = ("mean", "square")
    moments_in_float32 = False

    def __init__(self, parameters, lr, seed=None, betas=(0.9, 0.999), eps=1e-8):
        super().__init__(parameters, lr, seed)
        self.betas = betas
        self.eps = eps

    def update(self, weight, gradient, mean, square, *, lr, step):
        beta1, beta2 = self.betas
        mean.lerp_(gradient, 1 - beta1)
        square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)

        # The bias corrections, applied to the root and to lr: no tensor more is needed for m̂.
        root = square.sqrt().div_((1 - beta2**step) ** 0.5).add_(self.eps)
        weight.addcdiv_(mean, root, value=-lr / (1 - beta1**step))


# ------------------------------------------------------------------------ which one, and its state


def rounding_optimizer(name: str, policy: nn.Module, lr: float, generator: torch.Generator):
    """One of ours for bfloat16 weights, whose small steps plain rounding would lose."""
    seed = int(torch.randint(2**62, (), generator=generator))
    return {"adamw": AdamW, "rmsprop": RMSProp}[name](policy.parameters(), lr, seed)


def optimizer_tensors(optimizer) -> dict[str, Tensor]:
    """The state of one of torch's optimizers, or of ours, as {name: tensor}."""
    if not isinstance(optimizer, torch.optim.Optimizer):
        return optimizer.state_dict()

    tensors = {}
    for number, parameter in enumerate(optimizer.param_groups[0]["params"]):
        for key, value in optimizer.state[parameter].items():
            tensors[f"{number}.{key}"] = value
    return tensors


@torch.no_grad()
def load_optimizer_tensors(optimizer, tensors: dict[str, Tensor]) -> None:
    """Put back what optimizer_tensors gave, into an optimizer of the same parameters.

    If these are sharded, `tensors` has this process's part of them.
    """
    if not isinstance(optimizer, torch.optim.Optimizer):
        optimizer.load_state_dict(tensors)
        return

    parameters = optimizer.param_groups[0]["params"]
    for name, value in tensors.items():
        number, key = name.split(".")
        parameter = parameters[int(number)]
        # A fresh optimizer of torch has no state before its first step: it is made here, for a
        # sharded parameter as shards. The count of steps is a plain tensor in any case.
        state = value if key == "step" else torch.zeros_like(parameter)
        local_part(state)[0].copy_(value)
        optimizer.state[parameter][key] = state
