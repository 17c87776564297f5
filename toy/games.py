"""Symmetric preference games: payoffs P[i, j] = P(i beats j), equilibria, the distance from one.

All in float64. P + Pᵀ = 1 with ½ on the diagonal; a policy is a probability vector over the n
actions.
"""

import torch
from torch import Tensor

# ------------------------------------------------------------------------ games

# Rock beats scissors, scissors beat paper, paper beats rock: equilibrium (4, 3, 4)/11.
ROCK_PAPER_SCISSORS = (0.9, 0.9, 0.8)


def cycle(strengths=ROCK_PAPER_SCISSORS) -> Tensor:
    """Three or more actions in a circle: i beats i + 1 with probability strengths[i].

    Actions that are not neighbours tie.
    """
    n = len(strengths)
    payoff = torch.full((n, n), 0.5, dtype=torch.float64)
    for i, strength in enumerate(strengths):
        payoff[i, (i + 1) % n] = strength
        payoff[(i + 1) % n, i] = 1 - strength
    return payoff


def comal() -> Tensor:
    """COMAL's game (2410.23223): P[b ≻ a] = P[c ≻ b] = 0.9, P[a ≻ c] = 0.8.

    It is rock–paper–scissors, listed backwards.
    """
    return cycle((0.1, 0.1, 0.2))


def odd_cycle(n: int, strength=0.9) -> Tensor:
    """Rock–paper–scissors of any odd size: action i beats the (n - 1)/2 actions after it.

    It does so with probability `strength`, or strength[i]. ValueError if n is even or below 3.
    """
    if n < 3 or n % 2 == 0:
        raise ValueError(f"odd_cycle: n is {n}, expected an odd number from 3")

    strength = torch.as_tensor(strength, dtype=torch.float64).expand(n)
    # Steps from i around the circle to j.
    distance = (torch.arange(n) - torch.arange(n)[:, None]) % n
    payoff = torch.where(distance <= n // 2, strength[:, None], 1 - strength)
    return payoff.fill_diagonal_(0.5)


def bradley_terry(rewards) -> Tensor:
    """A transitive game: P(i beats j) = σ(r_i - r_j) (SPPO v5, eq. 3.1).

    Its equilibrium plays the action of the largest reward alone.
    """
    rewards = torch.as_tensor(rewards, dtype=torch.float64)
    return torch.sigmoid(rewards[:, None] - rewards)


def dominant_and_cycle(dominance: float = 0.7, strengths=ROCK_PAPER_SCISSORS) -> Tensor:
    """Action 0 beats every other with probability `dominance`; the others form a circle."""
    n = len(strengths) + 1
    payoff = torch.full((n, n), 1 - dominance, dtype=torch.float64)
    payoff[0] = dominance
    payoff[0, 0] = 0.5
    payoff[1:, 1:] = cycle(strengths)
    return payoff


def random_game(n: int, generator: torch.Generator) -> Tensor:
    """Uniform P(i beats j) for i < j."""
    upper = torch.rand(n, n, generator=generator, dtype=torch.float64).triu(1)
    return upper + (1 - upper.T).tril(-1) + 0.5 * torch.eye(n, dtype=torch.float64)


def every_game(seed: int = 0) -> dict[str, Tensor]:
    """One of each kind, by name: what a claim about all games is tested on."""
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


# ------------------------------------------------------------------------ equilibria


def exploitability(payoff: Tensor, policy: Tensor) -> Tensor:
    """max_i P(i ≻ π) - ½: what the best reply to a policy gains over a tie, (..., n) -> (...).

    0 exactly at a von Neumann winner (SPPO v5, eq. 3.3). The duality gap
    max_π' P(π' ≻ π) - min_π' P(π ≻ π') of the symmetric game is twice this.
    """
    return (policy @ payoff.T).amax(-1) - 0.5


def nash(payoff: Tensor) -> Tensor:
    """An exact symmetric equilibrium (n,), found by the simplex method.

    It solves max Σx subject to (P + 1)x ≤ 1, x ≥ 0; then π = x/Σx. The game P has value ½, so P + 1
    has 3/2 = 1/Σx, and Pπ ≤ ½ in every row. The 1 makes all payoffs positive, so x = 0 is a
    feasible start and the optimum is bounded.
    """
    # Rows (P + 1)x + s = 1; the slacks s are the first basis.
    n = len(payoff)
    ones = torch.ones(n, 1, dtype=torch.float64)
    table = torch.cat([payoff.double() + 1, torch.eye(n, dtype=torch.float64), ones], 1)
    gain = torch.cat([torch.ones(n), torch.zeros(n + 1)]).double()
    basis = list(range(n, 2 * n))

    # Bland's rule: of columns that improve, and of variables whose ratios tie, the first. It ends
    # on every game; the steepest column could go round in circles where payoffs tie.
    while (improving := (gain[:-1] > 1e-12).nonzero()).numel():
        column = int(improving[0])
        rate = table[:, column]
        ratio = torch.where(rate > 1e-12, table[:, -1] / rate, torch.inf)
        ties = (ratio <= ratio.min() + 1e-14).nonzero()[:, 0].tolist()
        row = min(ties, key=lambda r: basis[r])

        # The pivot: `column` enters the basis in place of that row's variable.
        table[row] = table[row] / table[row, column]
        others = torch.arange(n) != row
        table[others] = table[others] - table[others, column, None] * table[row]
        gain = gain - gain[column] * table[row]
        basis[row] = column

    x = torch.zeros(2 * n, dtype=torch.float64)
    x[basis] = table[:, -1]
    policy = x[:n].clamp(min=0)  # rounding may leave -1e-17
    return policy / policy.sum()
