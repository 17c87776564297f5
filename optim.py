"""RMSProp and AdamW in place, for float32 and for bfloat16 weights, which are written back with stochastic rounding.

A bfloat16 has 8 significant bits: 0.02 and its neighbour are 1.2e-4 apart, and rounding to the nearest loses every step
of 5e-7. So bfloat16 weights are updated in float32 and rounded at random, up with the probability of the fraction that
would be lost: a weight moves rarely, by whole spacings, and on average exactly as in float32 (Zamirai et al., Revisiting
BFloat16 Training, 2010.06192; with Adam, language models of up to 6.7B parameters: Ozkara et al., 2502.20566).

The price is noise: steps that add up to a distance d leave a weight off by about √(d · spacing), 2.5e-4 for a thousand
steps of 5e-7 at 0.02. A weight whose steps are 0 stays as it is.

Bytes per parameter, gradient included: float32 12 (RMSProp) or 16 (AdamW); bfloat16 8 for either, 58 GB for Mistral-7B.
"""

import torch

CHUNK = 1 << 22  # numbers of a bfloat16 parameter that are updated at a time


def stochastic_round(value, generator):
    """float32 -> one of the two bfloat16 around it, with expectation `value`; exact where bfloat16 has the value.

    A bfloat16 is the upper half of a float32. Random 16 bits, added to the lower half, carry into the upper half with
    probability (lower half)/2^16, the fraction that truncation loses; this holds for both signs, zeros and denormals.
    Infinities and NaN stay; between the largest bfloat16 and infinity, rounding up gives infinity.
    """
    noise = torch.randint(1 << 16, value.shape, generator=generator, device=value.device, dtype=torch.int32)
    upper = (value.view(torch.int32) + noise) >> 16
    rounded = upper.to(torch.int16).view(torch.bfloat16)
    return rounded.masked_fill_(value.isnan(), torch.nan)  # whose bits truncate to infinity, or carry into the sign


class Optimizer:
    """What both share. `parameters` are tensors, or groups {"params": tensors, "lr": number} as in torch.optim.

    `seed` decides how bfloat16 parameters are rounded and must be given with them, to each round of training another.
    They must be contiguous and no DTensors. float32 and float64 parameters need no seed, and may be DTensors.

    A subclass has `moments`, the names of its averages, `moments_in_float32`, if they are so whatever the parameters
    are, and `update(weight, gradient, *moments, lr, step)`: its formula, in place; `step` counts from 1.
    """

    def __init__(self, parameters, lr, seed=None):
        groups = list(parameters)
        if not groups or not isinstance(groups[0], dict):
            groups = [{"params": groups}]
        self.param_groups = [{"lr": lr, **group, "params": list(group["params"])} for group in groups]
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        if not parameters:
            raise ValueError("no parameters to optimise")
        for parameter in parameters:
            if parameter.dtype not in (torch.float32, torch.float64, torch.bfloat16):
                raise ValueError(f"parameters are {parameter.dtype}, expected float32, float64 or bfloat16")
        rounded = [parameter for parameter in parameters if parameter.dtype == torch.bfloat16]
        if rounded and seed is None:
            raise ValueError("bfloat16 parameters are rounded at random: expected a seed")
        self.generator = torch.Generator(rounded[0].device).manual_seed(seed) if rounded else None
        self.state = {parameter: self.start(parameter) for parameter in parameters}

    def start(self, parameter):
        dtype = torch.promote_types(parameter.dtype, torch.float32) if self.moments_in_float32 else parameter.dtype
        moments = {name: torch.zeros_like(parameter, dtype=dtype, requires_grad=False) for name in self.moments}
        return {"step": torch.zeros((), dtype=torch.int64)} | moments

    @torch.no_grad()
    def step(self):
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
        """`update` in float32, chunk by chunk, so that no float32 copy is longer than CHUNK; then round what is bfloat16."""
        flat = [tensor.view(-1).split(CHUNK) for tensor in (parameter, *moments)]
        for part, *stored in zip(gradient.reshape(-1).split(CHUNK), *flat):
            exact = [tensor.float() for tensor in stored]  # of a float32 moment the tensor itself
            self.update(exact[0], part.float(), *exact[1:], lr=lr, step=step)
            for tensor, value in zip(stored, exact):
                if tensor.dtype == torch.bfloat16:
                    tensor.copy_(stochastic_round(value, self.generator))

    def zero_grad(self, set_to_none=True):
        for parameter in self.state:
            if set_to_none:
                parameter.grad = None
            elif parameter.grad is not None:
                parameter.grad.zero_()

    def state_dict(self):
        """{name: tensor}, the tensors themselves and not copies: safetensors stores it as it is.

        0.step, 0.square, ... in the order of the parameters; lr of each group; where the random numbers are.
        """
        state = {f"{n}.{name}": value for n, one in enumerate(self.state.values()) for name, value in one.items()}
        state["lr"] = torch.tensor([group["lr"] for group in self.param_groups], dtype=torch.float64)
        return state | ({"generator": self.generator.get_state()} if self.generator else {})

    @torch.no_grad()
    def load_state_dict(self, state):
        """Continue where `state_dict` was taken, to the same bits. ValueError names an entry of another optimizer."""
        own = self.state_dict()
        for name in sorted(own.keys() | state.keys()):
            found, expected = ((t[name].dtype, tuple(t[name].shape)) if name in t else "nothing" for t in (state, own))
            if found != expected:
                raise ValueError(f"optimizer state: {name} is {found}, expected {expected}")
        for name, value in own.items():
            value.copy_(state[name])
        for group, lr in zip(self.param_groups, own["lr"].tolist()):
            group["lr"] = lr
        if self.generator:
            self.generator.set_state(own["generator"])


class RMSProp(Optimizer):
    """v ← αv + (1 - α)g²,  w ← w - lr · g/(√v + ε).

    Hinton's lecture 6e (Neural Networks for Machine Learning, 2012) in the form of torch.optim.RMSprop, to which
    float32 weights are equal. v is float32 beside bfloat16 weights too.
    """

    moments, moments_in_float32 = ("square",), True

    def __init__(self, parameters, lr, seed=None, alpha=0.99, eps=1e-8):
        super().__init__(parameters, lr, seed)
        self.alpha, self.eps = alpha, eps

    def update(self, weight, gradient, square, *, lr, step):
        square.mul_(self.alpha).addcmul_(gradient, gradient, value=1 - self.alpha)
        weight.addcdiv_(gradient, square.sqrt().add_(self.eps), value=-lr)


class AdamW(Optimizer):
    """m ← β₁m + (1 - β₁)g,  v ← β₂v + (1 - β₂)g²,  w ← w - lr · m̂/(√v̂ + ε) with m̂ = m/(1 - β₁ᵗ), v̂ = v/(1 - β₂ᵗ).

    Loshchilov and Hutter, 1711.05101, algorithm 2, with weight decay 0 (so it is Adam, 1412.6980) and torch's defaults;
    float32 weights are equal to those of torch.optim.AdamW. Beside bfloat16 weights m and v are bfloat16 and rounded
    stochastically too: rounded to the nearest, a v that should shrink by 1/1000 a step would stand still. Rounding puts
    v off by some 4%, and w's step by half of that.
    """

    moments, moments_in_float32 = ("mean", "square"), False

    def __init__(self, parameters, lr, seed=None, betas=(0.9, 0.999), eps=1e-8):
        super().__init__(parameters, lr, seed)
        self.betas, self.eps = betas, eps

    def update(self, weight, gradient, mean, square, *, lr, step):
        beta1, beta2 = self.betas
        mean.lerp_(gradient, 1 - beta1)
        square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        root = square.sqrt().div_((1 - beta2**step) ** 0.5).add_(self.eps)
        weight.addcdiv_(mean, root, value=-lr / (1 - beta1**step))
