"""Low-rank terms beside the linear layers of a policy, trained in their place: LoRA (2106.09685).

A layer computes W x + (α/r) B A x; only A (r, columns) and B (rows, r) are trained, so there are no
gradients and no optimizer state of the weights. At the end of a fit the terms are added to the
weights and taken away: every checkpoint is a plain one, and every fit begins with fresh terms.

A is drawn as peft draws it and B is 0: a fit begins at its policy to the last bit. α is 32, and
with α/r the size of a step, so the best learning rate, hardly depends on the rank; it is about ten
times that of training all weights (Schulman et al., LoRA Without Regret, 2025). Terms are float32.
They change a bfloat16, of an output or a weight, by less than its spacing: both sums are rounded
stochastically, so that fit and checkpoint have on average what the terms say, not exactly.
"""

import torch
import torch.nn.functional as F
from torch import Generator, nn

from engine.distributed import local_part, mean_of_all
from engine.optim import RoundedSum, stochastic_round

ALPHA = 32


class LowRank(nn.Module):
    """A linear layer and its term."""

    def __init__(self, linear: nn.Linear, rank: int, generator: Generator):
        super().__init__()
        self.linear = linear
        self.scale = ALPHA / rank

        bound = linear.in_features**-0.5
        A = torch.empty(rank, linear.in_features).uniform_(-bound, bound, generator=generator)
        B = torch.zeros(linear.out_features, rank)
        dtype = torch.promote_types(linear.weight.dtype, torch.float32)
        self.A = nn.Parameter(A.to(linear.weight.device, dtype))
        self.B = nn.Parameter(B.to(linear.weight.device, dtype))

        # Several processes have the same terms, whole, and each a part of the batch.
        for term in (self.A, self.B):
            term.register_hook(mean_of_all)

    def forward(self, x):
        low = F.linear(x, self.A.to(x.dtype)) * self.scale  # (..., r)
        term = F.linear(low, self.B.to(x.dtype))
        # W x comes last: of a block's last layer --recompute need not do it again.
        output = self.linear(x)
        return RoundedSum.apply(output, term) if x.dtype == torch.bfloat16 else output + term

    @torch.no_grad()
    def merge(self, generator: Generator) -> nn.Linear:
        """The layer with its term in the weights; of several processes each has some rows."""
        weight, first = local_part(self.linear.weight)
        B = self.B[first : first + len(weight)]
        merged = torch.addmm(weight.to(B.dtype), B, self.A, alpha=self.scale)
        rounded = weight.dtype == torch.bfloat16
        weight.copy_(stochastic_round(merged, generator) if rounded else merged)
        return self.linear


def add_terms(policy: nn.Module, rank: int, generator: Generator) -> None:
    """Freeze the policy, and put a trained term beside each linear layer of its blocks."""
    policy.requires_grad_(False)
    replace(policy, nn.Linear, lambda linear: LowRank(linear, rank, generator))


def merge_terms(policy: nn.Module, generator: Generator) -> None:
    """Add all terms to their weights, and leave the policy as `add_terms` found it."""
    seed = int(torch.randint(2**62, (), generator=generator))
    rounding = Generator(next(policy.parameters()).device).manual_seed(seed)
    replace(policy, LowRank, lambda layer: layer.merge(rounding))
    policy.requires_grad_(True)


def replace(policy: nn.Module, kind: type, change) -> None:
    """change(layer) in the place of every layer of this kind in the blocks."""
    for parent in list(policy.model.layers.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, kind):
                setattr(parent, name, change(child))
