"""Symmetric preference games: payoffs P[i, j] = P(i beats j), their equilibria, and how far a policy is from one.

All in float64. P + Pᵀ = 1 with ½ on the diagonal; a policy is a probability vector over the n actions.
"""

import torch


def cycle(strengths):
    """Three or more actions in a circle: action i beats action i + 1 with probability strengths[i]; others tie."""
    n = len(strengths)
    payoff = torch.full((n, n), 0.5, dtype=torch.float64)
    for i, strength in enumerate(strengths):
        payoff[i, (i + 1) % n] = strength
        payoff[(i + 1) % n, i] = 1 - strength
    return payoff


def exploitability(payoff, policy):
    """max_i P(i ≻ π) - ½: what the best reply gains over a tie. 0 exactly at a von Neumann winner (SPPO v5, eq. 3.3).

    The duality gap max_π' P(π' ≻ π) - min_π' P(π ≻ π') of the symmetric game is twice this. policy (..., n) -> (...).
    """
    return (policy @ payoff.T).amax(-1) - 0.5


def nash(payoff):
    """An exact symmetric equilibrium (n,) by the simplex method: max Σx subject to (P + 1)x ≤ 1, x ≥ 0; π = x/Σx.

    The game P has value ½, so P + 1 has 3/2 = 1/Σx, and P π ≤ ½ in every row. The 1 makes all payoffs positive, so
    x = 0 is a feasible start and the optimum is bounded. Bland's rule: it ends on every game, ties included.
    """
    n = len(payoff)
    # Rows (P + 1)x + s = 1; the slacks s are the first basis.
    table = torch.cat([payoff.double() + 1, torch.eye(n, dtype=torch.float64), torch.ones(n, 1, dtype=torch.float64)], 1)
    gain = torch.cat([torch.ones(n), torch.zeros(n + 1)]).double()
    basis = list(range(n, 2 * n))
    while (improving := (gain[:-1] > 1e-12).nonzero()).numel():
        column = int(improving[0])
        rate = table[:, column]
        ratio = torch.where(rate > 1e-12, table[:, -1] / rate, torch.inf)
        ties = (ratio <= ratio.min() + 1e-14).nonzero()[:, 0].tolist()
        row = min(ties, key=lambda r: basis[r])
        table[row] = table[row] / table[row, column]
        others = torch.arange(n) != row
        table[others] = table[others] - table[others, column, None] * table[row]
        gain = gain - gain[column] * table[row]
        basis[row] = column
    x = torch.zeros(2 * n, dtype=torch.float64)
    x[basis] = table[:, -1]
    policy = x[:n].clamp(min=0)
    return policy / policy.sum()
