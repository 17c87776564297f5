"""Symmetric preference games: payoffs P[i, j] = P(i beats j), their equilibria, and how far a policy is from one.

All in float64. P + Pᵀ = 1 with ½ on the diagonal; a policy is a probability vector over the n actions.
"""

import torch

# ------------------------------------------------------------------------------------------------ games


ROCK_PAPER_SCISSORS = (0.9, 0.9, 0.8)  # rock beats scissors, scissors beat paper, paper beats rock: equilibrium (4, 3, 4)/11


def cycle(strengths=ROCK_PAPER_SCISSORS):
    """Three or more actions in a circle: action i beats action i + 1 with probability strengths[i]; others tie."""
    n = len(strengths)
    payoff = torch.full((n, n), 0.5, dtype=torch.float64)
    for i, strength in enumerate(strengths):
        payoff[i, (i + 1) % n] = strength
        payoff[(i + 1) % n, i] = 1 - strength
    return payoff


def comal():
    """COMAL's game (2410.23223): P[b ≻ a] = P[c ≻ b] = 0.9, P[a ≻ c] = 0.8. It is rock–paper–scissors listed backwards."""
    return cycle((0.1, 0.1, 0.2))


def odd_cycle(n, strength=0.9):
    """Rock–paper–scissors of any odd size: action i beats the (n - 1)/2 behind it with probability strength (or strength[i])."""
    if n < 3 or n % 2 == 0:
        raise ValueError(f"odd_cycle: n is {n}, expected an odd number from 3")
    strength = torch.as_tensor(strength, dtype=torch.float64).expand(n)
    distance = (torch.arange(n) - torch.arange(n)[:, None]) % n
    return torch.where(distance <= n // 2, strength[:, None], 1 - strength).fill_diagonal_(0.5)


def bradley_terry(rewards):
    """A transitive game: P(i beats j) = σ(r_i - r_j) (SPPO v5, eq. 3.1); all weight on the largest reward is the equilibrium."""
    rewards = torch.as_tensor(rewards, dtype=torch.float64)
    return torch.sigmoid(rewards[:, None] - rewards)


def dominant_and_cycle(dominance=0.7, strengths=ROCK_PAPER_SCISSORS):
    """Action 0 beats every other with probability `dominance`, and the others beat each other in a circle."""
    payoff = torch.full((len(strengths) + 1,) * 2, 1 - dominance, dtype=torch.float64)
    payoff[0] = dominance
    payoff[0, 0] = 0.5
    payoff[1:, 1:] = cycle(strengths)
    return payoff


def random_game(n, generator):
    """Uniform P(i beats j) for i < j."""
    upper = torch.rand(n, n, generator=generator, dtype=torch.float64).triu(1)
    return upper + (1 - upper.T).tril(-1) + 0.5 * torch.eye(n, dtype=torch.float64)


def every_game(seed=0):
    """One of each kind, by name: what a claim about all games is tried on."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "rock-paper-scissors": cycle(),
        "COMAL's game": comal(),
        "cycle of 7": odd_cycle(7, torch.linspace(0.6, 0.9, 7)),
        "Bradley-Terry": bradley_terry([0.0, 0.5, 1.0, 1.5, 2.0]),
        "dominant + cycle": dominant_and_cycle(),
        "random, 10 actions": random_game(10, generator),
        "random, 30 actions": random_game(30, generator),
    }


# ------------------------------------------------------------------------------------------------ equilibria


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
