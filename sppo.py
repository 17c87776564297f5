"""The mathematics of SPPO (Self-Play Preference Optimization, Wu et al., arXiv 2405.00675v5).

A round of Algorithm 1, with π_t the policy it starts from:
  1. sample   y_1, ..., y_K ~ π_t(·|x) for every prompt x                     (line 3)
  2. judge    P(y_i ≻ y_j | x) for all i, j                                   (line 4)
  3. average  each row into the win rate P̂(y_i ≻ π_t | x)                     (§5.1)
  4. select   the responses to train on, and their targets η(P̂ - ½)           (line 5)
  5. regress  log π_θ(y|x)/π_t(y|x) on the target                             (line 6, eq. 4.7)

`sppo_round` at the end of this file is these five steps; everything above it is one formula each.
Nothing here knows of text, files, devices or processes: the round is played on a `Game`, which says
what a policy, a response and a judge are.

Shapes: N prompts, K responses per prompt, S of them selected, B rows, T tokens, V vocabulary.
Log-probabilities are sums over response tokens, stop token included, in nats. Masks are bool, True
on response tokens.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn
from torch.utils.checkpoint import checkpoint

# ------------------------------------------------------------------------ win rates


def win_rates(preference: Tensor) -> Tensor:
    """(..., K, K) P(y_i beats y_j) -> (..., K) P̂(y_i ≻ π_t), the mean over all K, itself included.

    SPPO v5, §5.1. The mean of the K win rates is ½, each lies in [1/(2K), 1 - 1/(2K)]. Example:
    [[.5, .9, .6], [.1, .5, .7], [.4, .3, .5]] -> [.667, .433, .400]. ValueError names the first
    prompt whose table has an entry that is not finite or outside [0, 1], or P + Pᵀ ≠ 1.
    """
    wrong = ~((preference >= 0) & (preference <= 1))  # NaN fails both
    _refuse(wrong, preference, "is {}, expected a probability from 0 to 1")

    total = preference + preference.transpose(-1, -2)
    _refuse((total - 1).abs() > 1e-4, total, "and its opposite sum to {}, expected P + Pᵀ = 1")
    return preference.mean(-1)


def _refuse(wrong: Tensor, value: Tensor, message: str) -> None:
    if wrong.any():
        *prompt, i, j = wrong.nonzero()[0].tolist()
        which = f" of prompt {prompt[0] + 1}" if prompt else ""
        raise ValueError(
            f"preferences{which}: P({i} beats {j}) " + message.format(value[(*prompt, i, j)].item())
        )


def centred(win_rate: Tensor) -> Tensor:
    """(N, K) shifted, prompt by prompt, so that the mean is ½."""
    return win_rate - win_rate.mean(-1, keepdim=True) + 0.5


def best_and_worst(win_rate: Tensor) -> tuple[Tensor, Tensor]:
    """(N, K) -> indices (N,), (N,) of winner and loser: what the paper trains on (§5.1)."""
    return win_rate.argmax(-1), win_rate.argmin(-1)


# ------------------------------------------------------------------------ targets

# Each returns what log π_θ/π_t is regressed on, in nats, shaped like win_rate.


def sppo_target(win_rate: Tensor, eta: float, baseline: float = 0.5) -> Tensor:
    """η(P̂ - ½), eq. 4.7: log Z replaced by η/2.

    Appendix A allows a baseline from ½ (disordered preferences) to 1 (ordered).
    """
    return eta * (win_rate - baseline)


def normalized_target(win_rate: Tensor, eta: float, log_policy: Tensor | None = None) -> Tensor:
    """ηP̂ - log Z with Z = Σ_y π_t(y) exp(ηP̂(y)), the exact normaliser.

    The whole row (..., K) is needed. Without log_policy the K samples stand for π_t, 1/K each:
    eq. 4.5 with Z on the samples themselves. Where all responses can be listed, give their
    log π_t (..., K): eq. 4.3.
    """
    if log_policy is None:
        log_policy = -math.log(win_rate.shape[-1])
    return eta * win_rate - torch.logsumexp(eta * win_rate + log_policy, -1, keepdim=True)


def optimistic_target(win_rate: Tensor, previous_win_rate: Tensor, eta: float) -> Tensor:
    """η(2P(y ≻ π_t) - P(y ≻ π_{t-1}) - ½): optimistic multiplicative weights.

    ONPO (2502.16852), OMWU (2512.24818). previous_win_rate is of the same responses, against
    samples of the policy one round earlier.
    """
    return eta * (2 * win_rate - previous_win_rate - 0.5)


def regularized_target(
    win_rate: Tensor, reference_log_ratio: Tensor, eta: float, tau: float
) -> Tensor:
    """(η(P̂ - ½) - ητρ)/(1 + ητ) with ρ = log π_t/μ: the game with payoff P - τ KL(π‖μ).

    The proximal step argmax ⟨π, P⟩ - τ KL(π‖μ) - KL(π‖π_t)/η; equal to RSPO's reverse-KL loss
    (2503.00030) with its coefficient ητ/2. τ is in win-rate units, so τ = 0 gives back sppo_target.
    """
    return (eta * (win_rate - 0.5) - eta * tau * reference_log_ratio) / (1 + eta * tau)


# ------------------------------------------------------------------------ log-probabilities


def sequence_logps(logits: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
    """Sum of log p over response tokens: (B, T, V), (B, T), (B, T) bool -> (B,) float32, nats."""
    # The logits at position t predict token t + 1.
    logits = logits[:, :-1]
    tokens = tokens[:, 1:]
    mask = mask[:, 1:]

    every = torch.log_softmax(logits.float(), dim=-1)  # (B, T - 1, V)
    logp = every.gather(-1, tokens[..., None]).squeeze(-1)  # (B, T - 1)
    return logp.masked_fill(~mask, 0.0).sum(-1)


def chunked_logps(
    hidden: Tensor, head: Callable, tokens: Tensor, mask: Tensor, rows: int = 512
) -> Tensor:
    """sequence_logps(head(hidden), tokens, mask), with logits of `rows` positions at a time.

    hidden (B, T, D); head (R, D) -> (R, V). The backward pass computes each chunk's logits again
    instead of keeping them: with 32,000 tokens in the vocabulary they would be most of the memory.
    """
    used = mask[:, 1:]
    hidden_chunks = hidden[:, :-1][used].split(rows)
    token_chunks = tokens[:, 1:][used].split(rows)

    # A head draws no random numbers, so there is no generator state to keep.
    options = dict(use_reentrant=False, preserve_rng_state=False)
    chunks = zip(hidden_chunks, token_chunks)
    logps = [checkpoint(_token_logps, head, *chunk, **options) for chunk in chunks]

    logp = torch.cat(logps)  # (R,), of all response tokens
    return torch.zeros(used.shape, device=logp.device).masked_scatter(used, logp).sum(-1)


def _token_logps(head: Callable, hidden: Tensor, tokens: Tensor) -> Tensor:
    return -F.cross_entropy(head(hidden).float(), tokens, reduction="none")


# ------------------------------------------------------------------------ losses

# Each is per row and unreduced. Log-ratios are log π_θ(y)/π_t(y); beta is 1/η.


def sppo_loss(log_ratio: Tensor, target: Tensor) -> Tensor:
    """(log π_θ/π_t - target)², eq. 4.7. The authors' code has a factor ½ in front."""
    return (log_ratio - target) ** 2


def centred_loss(log_ratio: Tensor, target: Tensor) -> Tensor:
    """((Δ - Δ̄) - (z - z̄))² with the means over a prompt's S responses: GVPO (2504.19599).

    What all S share, log Z for one, cancels; with --select best-worst it is IPO with soft labels.
    """
    error = log_ratio - target
    return (error - error.mean(-1, keepdim=True)) ** 2


def sppo_hard_loss(best_log_ratio: Tensor, worst_log_ratio: Tensor, beta: float) -> Tensor:
    """(Δ_w - 1/(2β))² + (Δ_l + 1/(2β))²: eq. 4.12 with the hard label P = 1, TRL's `sppo_hard`."""
    return (best_log_ratio - 0.5 / beta) ** 2 + (worst_log_ratio + 0.5 / beta) ** 2


def dpo_loss(best_log_ratio: Tensor, worst_log_ratio: Tensor, beta: float) -> Tensor:
    """-log σ(β(Δ_w - Δ_l)): DPO (2305.18290, eq. 7), eq. 4.13."""
    return -F.logsigmoid(beta * (best_log_ratio - worst_log_ratio))


def ipo_loss(best_log_ratio: Tensor, worst_log_ratio: Tensor, beta: float) -> Tensor:
    """(Δ_w - Δ_l - 1/(2β))²: IPO (2310.12036, eq. 17).

    On sums, as in its paper; TRL averages over tokens first.
    """
    return (best_log_ratio - worst_log_ratio - 0.5 / beta) ** 2


# The losses that compare a winner with a loser, by the name that --loss takes.
PAIR_LOSSES = {"sppo-hard": sppo_hard_loss, "dpo": dpo_loss, "ipo": ipo_loss}
LOSSES = ("sppo", "centred", *PAIR_LOSSES)


def row_losses(log_ratio: Tensor, target: Tensor, config: "RoundConfig") -> Tensor:
    """(b, S), (b, S) -> (b, S); (b,) for the losses that compare a winner with a loser."""
    if config.loss == "sppo":
        return sppo_loss(log_ratio, target)
    if config.loss == "centred":
        return centred_loss(log_ratio, target)
    best, worst = log_ratio.unbind(1)
    return PAIR_LOSSES[config.loss](best, worst, 1 / config.eta)


# ------------------------------------------------------------------------ settings

TARGETS = ("sppo", "normalized", "optimistic", "regularized")


def setting(default, help: str, **limits):
    """A field of a settings class: its default, its help text, and limits.

    `low` and `high` are the range, `choices` the allowed values; `free`: it may change when a run
    is continued.
    """
    return field(default=default, metadata={"help": help} | limits)


@dataclass(frozen=True)
class RoundConfig:
    """How a round learns; η, batch and learning rate default to the paper's Mistral-7B (§5.1)."""

    eta: float = setting(1000.0, "step size η: log-ratio per unit of win rate", low=1e-9, high=1e9)
    loss: str = setting("sppo", "sppo, centred, or an iterative baseline", choices=LOSSES)
    target: str = setting("sppo", "of the regression; see docs/runs.md", choices=TARGETS)
    tau: float = setting(0.01, "KL weight τ (only --target regularized)", low=0, high=1e9)
    select: str = setting("best-worst", "winner and loser, or all K", choices=("best-worst", "all"))
    epochs: int = setting(1, "passes over the round's prompts", low=1)
    schedule_epochs: int | None = setting(
        None, "that the lr schedule spans; unset: --epochs", low=1
    )
    batch: int = setting(64, "prompts per optimizer step", low=1)
    micro_batch: int = setting(8, "prompts per forward pass; saves memory", low=1, free=True)
    micro_tokens: int = setting(0, "token limit per pass, not prompts; 0: off", low=0, free=True)
    optimizer: str = setting("rmsprop", "without weight decay", choices=("rmsprop", "adamw"))
    lr: float = setting(5e-7, "peak learning rate", low=1e-12, high=1e3)
    warmup: float = setting(0.1, "fraction of the schedule in which lr rises", low=0, high=1)
    clip: float = setting(1.0, "clip gradients to this norm", low=1e-12, high=1e12)


# ------------------------------------------------------------------------ the game


@dataclass(frozen=True)
class Regression:
    """What line 6 fits: log π_θ(y|x)/π_t(y|x) to a target, for N prompts and S responses each."""

    prompts: list
    responses: list  # N lists of S
    logp: Tensor  # (N, S): log π_t(y|x)
    target: Tensor  # (N, S): what log π_θ/π_t should become


class Game(ABC):
    """What a round is played on: a policy, its responses, a judge.

    A subclass says what these are. The lower half says how the work is done, here by one process
    that forgets; a game of several processes, or one that keeps every stage on disk, does that
    around the same calls.
    """

    policy: nn.Module  # the module whose parameters are trained

    @abstractmethod
    def sample(self, prompts: list) -> list:
        """N lists of K responses from the current policy."""

    @abstractmethod
    def judge(self, prompts: list, responses: list) -> Tensor:
        """(N, K, K): P(y_i beats y_j); after the K-th row and column, opponents from elsewhere."""

    @abstractmethod
    def logps(self, prompts: list, responses: list) -> Tensor:
        """(n, S) log π(y|x) under the current policy, differentiable."""

    def previous(self, prompts: list, responses: list, win_rate: Tensor) -> Tensor:
        """(N, K) win rates against π_{t-1}; in the first round win_rate (target optimistic)."""
        raise ValueError("--target optimistic: this game does not know its previous policy")

    def reference(self, prompts: list, responses: list) -> Tensor:
        """(N, S) log μ(y|x) of the responses under the reference policy (target regularized)."""
        raise ValueError("--target regularized: this game has no reference policy")

    def tokens(self, prompt, responses: list) -> int:
        """How many go through the network for a prompt and its S responses (micro_tokens)."""
        raise ValueError("--micro-tokens: this game does not know how long its responses are")

    def share(self, indices: Tensor) -> Tensor:
        """Which of these prompts this process works on: all."""
        return indices

    def gather(self, rows: list) -> list:
        """What all processes have found, in the order of their shares: the rows themselves."""
        return rows

    def parts(self, batch: Tensor, data: Regression, config: RoundConfig) -> Iterator:
        """The forward passes of a batch: (indices of prompts, weight of their gradient)."""
        for part in micro_batches(self, data.prompts, data.responses, batch, config):
            yield part, 1

    def optimizer(self, config: RoundConfig, generator: Generator):
        """A fresh optimizer of the policy's parameters; each round begins with one."""
        make = {"adamw": torch.optim.AdamW, "rmsprop": torch.optim.RMSprop}[config.optimizer]
        return make(self.policy.parameters(), lr=config.lr, weight_decay=0.0)

    @torch.no_grad()
    def score(self, prompts: list, responses: list, config: RoundConfig) -> Tensor:
        """(N, S) log π(y|x) under the current policy, in micro-batches."""
        mine = self.share(torch.arange(len(prompts)))
        parts = micro_batches(self, prompts, responses, mine, config)
        logps = [self.logps(*take(part, prompts, responses)) for part in parts]

        # Micro-batches may be sorted by length: back into the order of the prompts.
        logps = torch.cat(self.gather(logps))
        order = self.gather([n for part in parts for n in part])
        scores = torch.empty_like(logps)
        scores[order] = logps
        return scores

    def fit(self, data: Regression, config: RoundConfig, generator: Generator, resume=None):
        """Train the policy on data, and yield the numbers of each step: `fit` below."""
        return fit(self, data, config, generator, resume)


# ------------------------------------------------------------------------ line 6: the fit


def fit(game: Game, data: Regression, config: RoundConfig, generator: Generator, resume=None):
    """Regress log π_θ/π_t on the target: `epochs` passes over shuffled prompts.

    Yields the numbers of each optimizer step. resume(optimizer), if there is one, may put the state
    of an interrupted fit back into the policy and the optimizer, and returns how many steps that
    fit had taken. ValueError if a gradient is not finite.
    """
    batches = []
    for _ in range(config.epochs):
        shuffled = torch.randperm(len(data.prompts), generator=generator)
        batches += shuffled.split(config.batch)
    per_epoch = len(batches) // config.epochs
    schedule = per_epoch * (config.schedule_epochs or config.epochs)

    optimizer = game.optimizer(config, generator)
    done = resume(optimizer) if resume else 0
    for step, batch in enumerate(batches[done:], done):
        order, losses, log_ratios = [], [], []
        for part, weight in game.parts(batch, data, config):
            logp = game.logps(*take(part, data.prompts, data.responses))  # (b, S)
            log_ratio = logp - data.logp[part]
            loss = row_losses(log_ratio, data.target[part], config)
            (weight * loss.mean() * len(part) / len(batch)).backward()
            if weight:  # 0: a repeated part that only keeps several processes in step
                order += part
                losses.append(loss.detach())
                log_ratios.append(log_ratio.detach())

        lr = learning_rate(step, schedule, config)
        name = f"optimizer step {step + 1}"
        norm = optimizer_step(optimizer, game.policy, lr, config.clip, name, "--lr or --eta")

        target = data.target[game.gather(order)]
        loss = torch.cat(game.gather(losses))
        log_ratio = torch.cat(game.gather(log_ratios))
        yield step_numbers(step // per_epoch, loss, log_ratio, target, norm, lr)


def take(part: list[int], prompts: list, responses: list) -> tuple[list, list]:
    """The prompts and responses of some indices."""
    return [prompts[n] for n in part], [responses[n] for n in part]


def micro_batches(game, prompts: list, responses: list, batch: Tensor, config) -> list[list[int]]:
    """Split a batch, a tensor of indices, into lists that go through the network together."""
    if not config.micro_tokens:
        return [part.tolist() for part in batch.split(config.micro_batch)]

    # Sorted by length, so that little is padding; a single prompt may be over the budget.
    tokens = {n: game.tokens(prompts[n], responses[n]) for n in batch.tolist()}
    parts = [[]]
    used = 0
    for n in sorted(tokens, key=tokens.get):
        if parts[-1] and used + tokens[n] > config.micro_tokens:
            parts.append([])
            used = 0
        parts[-1].append(n)
        used += tokens[n]
    return parts


def learning_rate(step: int, steps: int, config: RoundConfig) -> float:
    """Learning rate at `step` of `steps`: linear warm-up, then linear decay to 0."""
    rising = math.ceil(config.warmup * steps)
    if step < rising:
        return config.lr * ((step + 1) / rising)
    return config.lr * ((steps - step) / (steps - rising))


def optimizer_step(
    optimizer, module: nn.Module, lr: float, clip: float, name, remedy="--lr"
) -> Tensor:
    """Take a step with gradients clipped to the norm `clip`, and clear them; returns their norm.

    ValueError, before anything is changed, if it is not finite: `name` says at which step, and
    `remedy` which flags to lower.
    """
    for group in optimizer.param_groups:
        group["lr"] = lr
    norm = torch.nn.utils.clip_grad_norm_(module.parameters(), clip)
    if hasattr(norm, "full_tensor"):  # of parameters that several processes share
        norm = norm.full_tensor()
    if not torch.isfinite(norm):
        raise ValueError(f"{name}: the gradient norm is {norm.item()}; lower {remedy}")

    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm


def step_numbers(epoch: int, loss, log_ratio, target, norm: Tensor, lr: float) -> dict:
    """One line of the log; best and worst are the responses with largest and smallest target."""
    best, worst = best_and_worst(target)
    return {
        "epoch": epoch,
        "loss": loss.mean().item(),
        "mean_squared_target": target.pow(2).mean().item(),  # the loss of sppo at θ = θ_t
        "best_log_ratio": log_ratio.gather(1, best[:, None]).mean().item(),
        "worst_log_ratio": log_ratio.gather(1, worst[:, None]).mean().item(),
        "gradient_norm": norm.item(),
        "lr": lr,
    }


# ------------------------------------------------------------------------ one round


def sppo_round(game: Game, prompts: list, config: RoundConfig, generator: Generator) -> dict:
    """One round: play `game` on `prompts`, and leave in it the policy π_{t+1}.

    Returns win rates (N, K), responses, targets (N, S) and step metrics.
    """
    # Line 3: y_1, ..., y_K ~ π_t(·|x) for every prompt x.
    responses = game.sample(prompts)  # N lists of K
    K = len(responses[0])

    # Line 4: the judge's P(y_i ≻ y_j|x) for all pairs.
    preference = game.judge(prompts, responses)  # (N, K, K), or more with outside opponents

    # §5.1: the mean of each row is the win rate.
    win_rate = win_rates(preference)[:, :K]  # (N, K)

    # Line 5: winner and loser, or all K.
    chosen = select(win_rate, config)  # (N, S)
    selected = [[row[k] for k in ks] for row, ks in zip(responses, chosen.tolist())]

    # π_t is the policy before its first step: scored now, it needs no second model.
    logp = game.score(prompts, selected, config)  # (N, S)

    # Against outside opponents the K win rates need not average to ½, as the constant in the target
    # supposes; what is the same for all K belongs to log Z.
    rate = centred(win_rate) if preference.shape[1] > K else win_rate

    # What log π_θ/π_t should become.
    if config.target == "sppo":
        target = sppo_target(rate, config.eta).gather(1, chosen)  # (N, S)
    elif config.target == "normalized":
        target = normalized_target(rate, config.eta).gather(1, chosen)
    elif config.target == "optimistic":
        previous = game.previous(prompts, responses, rate)  # (N, K)
        target = optimistic_target(rate, previous, config.eta).gather(1, chosen)
    else:
        log_ratio = logp - game.reference(prompts, selected)  # (N, S): log π_t/μ
        target = regularized_target(rate.gather(1, chosen), log_ratio, config.eta, config.tau)

    # Line 6: minimise eq. 4.7.
    steps = list(game.fit(Regression(prompts, selected, logp, target), config, generator))
    return {"win_rate": win_rate, "responses": responses, "target": target, "steps": steps}


def select(win_rate: Tensor, config: RoundConfig) -> Tensor:
    """(N, K) -> (N, S) indices of the responses to train on: winner and loser, or all."""
    if config.select == "best-worst":
        return torch.stack(best_and_worst(win_rate), 1)
    return torch.arange(win_rate.shape[1]).expand_as(win_rate)
