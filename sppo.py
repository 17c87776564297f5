"""The mathematics of SPPO (Self-Play Preference Optimization, Wu et al., arXiv 2405.00675v5), and its one round.

A round of Algorithm 1, with π_t the policy it starts from:
  1. sample   y_1, ..., y_K ~ π_t(·|x) for every prompt x                                  (line 3)
  2. judge    P(y_i ≻ y_j | x) for all i, j                                                (line 4)
  3. average  each row into the win rate P̂(y_i ≻ π_t | x)                                  (§5.1)
  4. select   the responses to train on, and their targets η(P̂ - ½)                        (line 5)
  5. regress  log π_θ(y|x)/π_t(y|x) on the target                                          (line 6, eq. 4.7)

`sppo_round` at the end of this file is these five steps; everything above it is one formula each. Nothing here
knows of text, files or devices: the round is played on a `game` (see `sppo_round`).

Shapes: N prompts, K responses per prompt, S of them selected, B rows, T tokens, V vocabulary. Log-probabilities
are sums over response tokens, stop token included, in nats. Masks are bool, True on response tokens.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import optim
import ranks

# ------------------------------------------------------------------------------------------------ win rates


def win_rates(preference):
    """(..., K, K) P(y_i beats y_j) -> (..., K) P̂(y_i ≻ π_t), the mean over all K opponents, itself included (§5.1).

    The mean of the K win rates is ½ and each lies in [1/(2K), 1 - 1/(2K)]. Example:
    [[.5, .9, .6], [.1, .5, .7], [.4, .3, .5]] -> [.667, .433, .400].
    ValueError names the first prompt whose table has an entry that is not finite or outside [0, 1], or P + Pᵀ ≠ 1.
    """
    wrong = ~((preference >= 0) & (preference <= 1))  # NaN fails both
    _refuse(wrong, preference, "is {}, expected a probability from 0 to 1")
    total = preference + preference.transpose(-1, -2)
    _refuse((total - 1).abs() > 1e-4, total, "and its opposite sum to {}, expected P + Pᵀ = 1")
    return preference.mean(-1)


def _refuse(wrong, value, message):
    if wrong.any():
        *prompt, i, j = wrong.nonzero()[0].tolist()
        which = f" of prompt {prompt[0] + 1}" if prompt else ""
        raise ValueError(f"preferences{which}: P({i} beats {j}) " + message.format(value[(*prompt, i, j)].item()))


def centred(win_rate):
    """(N, K) moved by a constant a prompt so that their mean is ½."""
    return win_rate - win_rate.mean(-1, keepdim=True) + 0.5


def best_and_worst(win_rate):
    """(N, K) -> indices (N,), (N,) of the winner and the loser: what the paper's experiments train on (§5.1)."""
    return win_rate.argmax(-1), win_rate.argmin(-1)


# ------------------------------------------------------------------------------------------------ targets

# Each returns what log π_θ/π_t is regressed on, in nats, shaped like win_rate.


def sppo_target(win_rate, eta, baseline=0.5):
    """η(P̂ - ½), eq. 4.7: log Z replaced by η/2. Appendix A allows a baseline from ½ (disordered) to 1 (ordered)."""
    return eta * (win_rate - baseline)


def normalized_target(win_rate, eta, log_policy=None):
    """ηP̂ - log Z with Z = Σ_y π_t(y) exp(ηP̂(y)), the exact normaliser; the whole row (..., K) is needed.

    Without log_policy the K samples stand for π_t, 1/K each: eq. 4.5 with Z on the samples themselves. Where all
    responses can be listed, give their log π_t (..., K): eq. 4.3.
    """
    log_policy = -math.log(win_rate.shape[-1]) if log_policy is None else log_policy
    return eta * win_rate - torch.logsumexp(eta * win_rate + log_policy, -1, keepdim=True)


def optimistic_target(win_rate, previous_win_rate, eta):
    """η(2P(y ≻ π_t) - P(y ≻ π_{t-1}) - ½): optimistic multiplicative weights (ONPO, 2502.16852; OMWU, 2512.24818).

    previous_win_rate is of the same responses, against samples of the policy one round earlier.
    """
    return eta * (2 * win_rate - previous_win_rate - 0.5)


def regularized_target(win_rate, reference_log_ratio, eta, tau):
    """(η(P̂ - ½) - ητρ)/(1 + ητ) with ρ = log π_t/μ: the game with payoff P - τ KL(π‖μ).

    The proximal step argmax ⟨π, P⟩ - τ KL(π‖μ) - KL(π‖π_t)/η; equal to RSPO's reverse-KL loss (2503.00030) with
    its coefficient ητ/2. τ is in win-rate units, so τ = 0 gives back sppo_target.
    """
    return (eta * (win_rate - 0.5) - eta * tau * reference_log_ratio) / (1 + eta * tau)


# ------------------------------------------------------------------------------------------------ losses

# Each is per row and unreduced. Log-ratios are log π_θ(y)/π_t(y); beta is 1/η.


def sequence_logps(logits, tokens, mask):
    """Sum of log p(token) over response tokens: (B, T, V), (B, T), (B, T) bool -> (B,), nats, in float32."""
    logits, tokens, mask = logits[:, :-1], tokens[:, 1:], mask[:, 1:]  # position t predicts token t + 1
    logp = torch.log_softmax(logits.float(), dim=-1).gather(-1, tokens[..., None])[..., 0]  # (B, T - 1)
    return logp.masked_fill(~mask, 0.0).sum(-1)


def chunked_logps(hidden, head, tokens, mask, rows=128):
    """sequence_logps(head(hidden), tokens, mask), but logits exist for `rows` response positions at a time only.

    hidden (B, T, D); head (R, D) -> (R, V). The backward pass computes each chunk's logits again instead of keeping them.
    """
    used = mask[:, 1:]  # position t predicts token t + 1
    chunks = zip(hidden[:, :-1][used].split(rows), tokens[:, 1:][used].split(rows))
    plain = dict(use_reentrant=False, preserve_rng_state=False)
    logp = torch.cat([checkpoint(_token_logps, head, *chunk, **plain) for chunk in chunks])  # (R,)
    return torch.zeros(used.shape, device=logp.device).masked_scatter(used, logp).sum(-1)


def _token_logps(head, hidden, tokens):
    return -F.cross_entropy(head(hidden).float(), tokens, reduction="none")


def sppo_loss(log_ratio, target):
    """(log π_θ/π_t - target)², eq. 4.7. The authors' code has a factor ½ in front."""
    return (log_ratio - target) ** 2


def sppo_hard_loss(best_log_ratio, worst_log_ratio, beta):
    """(Δ_w - 1/(2β))² + (Δ_l + 1/(2β))²: eq. 4.12 with the hard label P = 1, TRL's `sppo_hard`."""
    return (best_log_ratio - 0.5 / beta) ** 2 + (worst_log_ratio + 0.5 / beta) ** 2


def dpo_loss(best_log_ratio, worst_log_ratio, beta):
    """-log σ(β(Δ_w - Δ_l)): DPO (2305.18290, eq. 7), eq. 4.13."""
    return -F.logsigmoid(beta * (best_log_ratio - worst_log_ratio))


def ipo_loss(best_log_ratio, worst_log_ratio, beta):
    """(Δ_w - Δ_l - 1/(2β))²: IPO (2310.12036, eq. 17), on sums as in its paper; TRL averages over tokens first."""
    return (best_log_ratio - worst_log_ratio - 0.5 / beta) ** 2


# ------------------------------------------------------------------------------------------------ one round

TARGETS = ("sppo", "normalized", "optimistic", "regularized")
PAIR_LOSSES = {"sppo-hard": sppo_hard_loss, "dpo": dpo_loss, "ipo": ipo_loss}


@dataclass(frozen=True)
class RoundConfig:
    """How a round learns. The defaults are the paper's Mistral-7B experiment (§5.1); help texts are the comments."""

    eta: float = 1000.0  # step size: nats of log-ratio per unit of win rate (beta = 1/eta)
    loss: str = "sppo"  # sppo | sppo-hard | dpo | ipo; the last three are the iterative baselines
    target: str = "sppo"  # sppo | normalized | optimistic | regularized: what sppo regresses on
    tau: float = 0.01  # weight of the KL to the reference policy (target regularized), in win-rate units
    select: str = "best-worst"  # best-worst (the paper's experiments) | all (its theory): responses to train on
    epochs: int = 1  # passes over the round's prompts
    schedule_epochs: int | None = None  # epochs that the learning-rate schedule is laid out for; unset: epochs
    batch: int = 64  # prompts per optimizer step
    micro_batch: int = 8  # prompts per forward pass; the gradients of a batch are accumulated
    micro_tokens: int = 0  # tokens per forward pass, padding included, prompts sorted by length; 0: micro_batch prompts
    optimizer: str = "rmsprop"  # rmsprop (the authors' code) | adamw (no weight decay)
    lr: float = 5e-7  # peak learning rate
    warmup: float = 0.1  # share of the schedule that the learning rate rises linearly; it then falls linearly to 0
    clip: float = 1.0  # largest gradient norm


def sppo_round(game, prompts, config, generator, memo=lambda name, compute: compute(), log=lambda **step: None, saver=None):
    """One round: play `game` on `prompts`, and leave in it the policy π_{t+1}. Returns what happened, as a dictionary.

    `game` is these functions:
      sample(prompts) -> N lists of K responses from the current policy
      judge(prompts, responses) -> (N, K, K), P(y_i beats y_j); rows and columns behind K are opponents from elsewhere
      logps(prompts, responses) -> (N, S) log-probabilities under the current policy, differentiable
      previous(prompts, responses, win_rate) -> (N, K) win rates against π_{t-1}, if there is one  (target optimistic)
      reference(prompts, responses) -> (N, S) log-probabilities under μ                         (target regularized)
      longest(prompt, responses) -> tokens of the longest of a prompt's S sequences                    (micro_tokens)
    and `policy`, the module whose parameters are trained. `memo(name, compute)` may return what an interrupted run
    already has; by default it computes. `log` is called once an optimizer step with numbers. `saver`, if there is one, keeps
    the state of the fit: load(policy, optimizer) -> numbers of the steps done, save(policy, optimizer, steps).
    """
    # Line 3: y_1, ..., y_K ~ π_t(·|x) for every prompt x.
    responses = memo("responses", lambda: game.sample(prompts))  # N lists of K

    # Line 4: the judge's P(y_i ≻ y_j|x) for all K × K pairs; §5.1: row means are the win rates.
    preference = memo("preferences", lambda: game.judge(prompts, responses))  # (N, K, K)
    win_rate = win_rates(preference)[:, : len(responses[0])]  # (N, K)

    # Line 5: winner and loser, or all K; π_t is the policy before its first step, so no second model is needed.
    everybody = torch.arange(win_rate.shape[1]).expand_as(win_rate)  # (N, K)
    chosen = torch.stack(best_and_worst(win_rate), 1) if config.select == "best-worst" else everybody  # (N, S)
    selected = [[row[k] for k in ks] for row, ks in zip(responses, chosen.tolist())]
    logp = memo("logps", lambda: score(game, prompts, selected, config))  # (N, S): log π_t(y|x)

    # What log π_θ/π_t should become. With opponents from elsewhere the K win rates need not average to ½, as the constant
    # in the target supposes; what is the same for all K belongs to log Z.
    opponents = preference.shape[1] > win_rate.shape[1]
    rate = centred(win_rate) if opponents else win_rate
    if config.target == "sppo":
        target = sppo_target(rate, config.eta).gather(1, chosen)  # (N, S)
    elif config.target == "normalized":
        target = normalized_target(rate, config.eta).gather(1, chosen)
    elif config.target == "optimistic":
        previous = memo("previous", lambda: game.previous(prompts, responses, win_rate))  # (N, K)
        target = optimistic_target(rate, centred(previous) if opponents else previous, config.eta).gather(1, chosen)
    else:
        log_ratio = logp - memo("reference", lambda: game.reference(prompts, selected))  # (N, S): log π_t/μ
        target = regularized_target(rate.gather(1, chosen), log_ratio, config.eta, config.tau)

    # Line 6: minimise eq. 4.7.
    steps = memo("policy", lambda: fit(game, prompts, selected, logp, target, config, generator, log, saver))
    return {"win_rate": win_rate, "responses": responses, "target": target, "steps": steps}


@torch.no_grad()
def score(game, prompts, selected, config):
    """log π(y|x) of the selected responses under the game's current policy, in micro-batches: (N, S)."""
    parts = micro_batches(game, prompts, selected, ranks.share(torch.arange(len(prompts))), config)
    logps = ranks.joined([game.logps([prompts[n] for n in part], [selected[n] for n in part]) for part in parts])
    return torch.cat(logps)[torch.tensor(ranks.joined([n for part in parts for n in part])).argsort()]


def micro_batches(game, prompts, selected, batch, config):
    """Split a batch, a tensor of indices, into lists of indices that go through the network together."""
    if not config.micro_tokens:
        return [micro.tolist() for micro in batch.split(config.micro_batch)]
    longest = {n: game.longest(prompts[n], selected[n]) for n in batch.tolist()}
    parts = [[]]
    for n in sorted(longest, key=longest.get):
        if parts[-1] and (len(parts[-1]) + 1) * len(selected[n]) * longest[n] > config.micro_tokens:
            parts.append([])
        parts[-1].append(n)
    return parts


def fit(game, prompts, selected, old_logp, target, config, generator, log, saver=None):
    """Regress log π_θ/π_t on target: `epochs` passes over shuffled prompts. Returns a dictionary of numbers a step."""
    N = len(prompts)
    batches = [batch for _ in range(config.epochs) for batch in torch.randperm(N, generator=generator).split(config.batch)]
    per_epoch = len(batches) // config.epochs
    schedule = per_epoch * (config.schedule_epochs or config.epochs)
    optimizer = make_optimizer(game.policy, config, generator)
    steps = saver.load(game.policy, optimizer) if saver else []
    for batch in batches[len(steps) :]:
        order, losses, ratios = [], [], []
        parts = micro_batches(game, prompts, selected, ranks.share(batch), config)
        for micro, weight in ranks.in_step(parts, spare=batch[:1].tolist()):
            logp = game.logps([prompts[n] for n in micro], [selected[n] for n in micro])  # (b, S)
            log_ratio = logp - old_logp[micro]
            loss = row_losses(log_ratio, target[micro], config)
            (weight * loss.mean() * len(micro) / len(batch)).backward()
            if weight:
                order += micro
                losses.append(loss.detach())
                ratios.append(log_ratio.detach())
        lr = learning_rate(len(steps), schedule, config)
        for group in optimizer.param_groups:
            group["lr"] = lr
        norm = ranks.full(torch.nn.utils.clip_grad_norm_(game.policy.parameters(), config.clip))
        if not torch.isfinite(norm):
            raise ValueError(f"optimizer step {len(steps) + 1}: the gradient norm is {norm.item()}; lower --lr or --eta")
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        order, losses, ratios = (ranks.joined(own) for own in (order, losses, ratios))
        epoch = len(steps) // per_epoch
        steps.append(step_numbers(epoch, torch.cat(losses), torch.cat(ratios), target[order], norm, lr))
        log(**steps[-1])
        if saver:
            saver.save(game.policy, optimizer, steps)
    return steps


def make_optimizer(policy, config, generator):
    """torch's own; for bfloat16 weights, whose small steps plain rounding would lose, those that round at random."""
    parameters = list(policy.parameters())
    if parameters[0].dtype == torch.bfloat16:
        seed = int(torch.randint(2**62, (), generator=generator))
        return {"adamw": optim.AdamW, "rmsprop": optim.RMSProp}[config.optimizer](parameters, config.lr, seed)
    make = {"adamw": torch.optim.AdamW, "rmsprop": torch.optim.RMSprop}[config.optimizer]
    return make(parameters, lr=config.lr, weight_decay=0.0)


def row_losses(log_ratio, target, config):
    """(b, S), (b, S) -> (b, S) for sppo, (b,) for the losses that compare a winner with a loser."""
    if config.loss == "sppo":
        return sppo_loss(log_ratio, target)
    best, worst = log_ratio.unbind(1)
    return PAIR_LOSSES[config.loss](best, worst, 1 / config.eta)


def learning_rate(step, steps, config):
    """Of step 0, 1, ...: linear warm-up over the first `warmup` of the schedule, then linearly to zero behind its end."""
    rising = math.ceil(config.warmup * steps)
    return config.lr * ((step + 1) / rising if step < rising else (steps - step) / (steps - rising))


def step_numbers(epoch, loss, log_ratio, target, norm, lr):
    """One line of the log: mean loss, and the mean log-ratio of the responses with largest and smallest target."""
    best, worst = best_and_worst(target)
    return {
        "epoch": epoch,
        "loss": loss.mean().item(),
        "mean_squared_target": target.pow(2).mean().item(),  # the loss of --loss sppo where log π_θ/π_t is still 0
        "best_log_ratio": log_ratio.gather(1, best[:, None]).mean().item(),
        "worst_log_ratio": log_ratio.gather(1, worst[:, None]).mean().item(),
        "gradient_norm": norm.item(),
        "lr": lr,
    }
