"""Claims about sppo.py: numbers worked by hand, the authors' and TRL's losses, and rounds on a game that is a table."""

import math
import os
import subprocess
import sys
from collections import defaultdict
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, tiny_config
from torch import nn

from model import Transformer, initialize
from sppo import (
    LOSSES,
    PAIR_LOSSES,
    TARGETS,
    RoundConfig,
    best_and_worst,
    centred_loss,
    chunked_logps,
    dpo_loss,
    ipo_loss,
    learning_rate,
    micro_batches,
    normalized_target,
    optimistic_target,
    regularized_target,
    row_losses,
    sequence_logps,
    sppo_hard_loss,
    sppo_loss,
    Game,
    Regression,
    sppo_round,
    sppo_target,
    win_rates,
)  # fmt: skip

WORKED = torch.tensor([[0.5, 0.9, 0.6], [0.1, 0.5, 0.7], [0.4, 0.3, 0.5]])


def random_preference(*shape, seed=0):
    table = torch.rand(*shape, shape[-1], generator=torch.Generator().manual_seed(seed)).triu(1)
    upper = torch.ones(shape[-1], shape[-1]).triu(1)
    return table + upper.T - table.transpose(-1, -2) * upper.T + 0.5 * torch.eye(shape[-1])


# ------------------------------------------------------------------------------------------------ win rates


def test_worked_example_of_win_rates():
    """(.5 + .9 + .6)/3 and so on: 2/3, 13/30, 2/5."""
    assert win_rates(WORKED).tolist() == pytest.approx([2 / 3, 13 / 30, 2 / 5])


@pytest.mark.parametrize("K", [2, 3, 5, 8])
def test_win_rates_of_a_prompt_average_to_one_half(K):
    assert torch.allclose(win_rates(random_preference(7, K)).mean(-1), torch.full((7,), 0.5), atol=1e-6)


@pytest.mark.parametrize("K", [2, 5])
def test_unbeaten_response_has_the_win_rate_that_self_comparison_allows(K):
    """K - 1 wins and half a point against itself: 0.75 at K = 2, 0.9 at K = 5."""
    preference = torch.ones(K, K).triu(1) + 0.5 * torch.eye(K)
    assert win_rates(preference)[0].item() == pytest.approx({2: 0.75, 5: 0.9}[K])


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (math.nan, r"prompt 3: P\(1 beats 0\) is nan"),
        (math.inf, r"prompt 3: P\(1 beats 0\) is inf"),
        (1.25, r"prompt 3: P\(1 beats 0\) is 1.25, expected a probability"),
        (-0.5, r"prompt 3: P\(1 beats 0\) is -0.5, expected a probability"),
        (0.875, r"prompt 3: P\(0 beats 1\) and its opposite sum to .*, expected P \+ Pᵀ = 1"),
    ],
)
def test_a_table_that_is_no_preference_is_refused_with_its_prompt(value, message):
    preference = WORKED.repeat(4, 1, 1)
    preference[2, 1, 0] = value
    with pytest.raises(ValueError, match=message):
        win_rates(preference)


def test_a_diagonal_that_is_no_tie_is_refused():
    preference = WORKED.repeat(2, 1, 1)
    preference[1, 2, 2] = 1.0
    with pytest.raises(ValueError, match=r"prompt 2: P\(2 beats 2\) and its opposite sum to 2.0"):
        win_rates(preference)


def test_best_and_worst_are_the_winner_and_the_loser():
    best, worst = best_and_worst(torch.tensor([[0.2, 0.7, 0.6], [0.8, 0.5, 0.2]]))
    assert (best.tolist(), worst.tolist()) == ([1, 0], [0, 2])


# ------------------------------------------------------------------------------------------------ targets

ORDERED = win_rates(torch.ones(5, 5).tril(-1) + 0.5 * torch.eye(5))  # response i beats all before it: .1 .3 .5 .7 .9


def test_target_of_a_strict_order_at_the_papers_eta():
    assert sppo_target(ORDERED, 1e3).tolist() == pytest.approx([-400, -200, 0, 200, 400], abs=1e-3)


def test_normalized_target_of_a_strict_order_at_the_papers_eta():
    """The winner's share tends to 1, so its target is log 5 = 1.6, and each rank below costs 200."""
    assert normalized_target(ORDERED, 1e3).tolist() == pytest.approx([-798.4, -598.4, -398.4, -198.4, 1.6], abs=0.02)


@pytest.mark.parametrize("eta", [0.1, 1.0, 30.0])
def test_normalized_target_makes_the_samples_a_distribution(eta):
    """exp(target) are the new weights of K samples that weighed 1 each, so they average to 1."""
    target = normalized_target(win_rates(random_preference(6, 5)), eta)
    assert torch.allclose(target.exp().mean(-1), torch.ones(6), atol=1e-5)


def test_half_is_the_normalizer_to_second_order_in_eta():
    """0 <= log Z - η/2 <= η²/8 (Jensen, Hoeffding): here a difference of at most 0.00125."""
    win_rate = win_rates(random_preference(6, 5))
    excess = sppo_target(win_rate, 0.1) - normalized_target(win_rate, 0.1)
    assert -1e-6 <= excess.min() and 1e-5 < excess.max() <= 0.1**2 / 8


def test_a_higher_baseline_lowers_every_target_by_eta_times_it():
    assert sppo_target(ORDERED, 10.0, baseline=0.75).tolist() == pytest.approx([-6.5, -4.5, -2.5, -0.5, 1.5])


def test_regularized_without_tau_is_sppo():
    win_rate, log_ratio = win_rates(random_preference(4, 5)), torch.randn(4, 5)
    assert torch.equal(regularized_target(win_rate, log_ratio, 7.0, 0.0), sppo_target(win_rate, 7.0))


def test_regularized_by_hand():
    """η = 2, τ = ½: (2 · .3 - 2 · ½ · .4)/(1 + 2 · ½) = .1."""
    assert regularized_target(torch.tensor(0.8), torch.tensor(0.4), 2.0, 0.5).item() == pytest.approx(0.1)


def test_optimistic_with_an_unchanged_opponent_is_sppo():
    win_rate = win_rates(random_preference(4, 5))
    assert torch.allclose(optimistic_target(win_rate, win_rate, 7.0), sppo_target(win_rate, 7.0), atol=1e-6)


def test_optimistic_by_hand():
    """2 · (2 · .6 - .9 - .5) = -.4: a win rate that is falling counts for less."""
    assert optimistic_target(torch.tensor(0.6), torch.tensor(0.9), 2.0).item() == pytest.approx(-0.4)


# ------------------------------------------------------------------------------------------------ log-probabilities


def uniform_logps(*masks, V=4):
    """Of logits that are all equal: every counted token costs log V."""
    mask = torch.tensor(masks, dtype=torch.bool)
    return (sequence_logps(torch.zeros(*mask.shape, V), torch.ones(mask.shape, dtype=torch.long), mask) / math.log(V)).tolist()


def test_logp_counts_the_stop_token():
    assert uniform_logps([0, 0, 1, 1, 0], [0, 0, 1, 1, 1]) == pytest.approx([-2, -3])


def test_logp_is_a_sum_not_a_mean():
    assert uniform_logps([0, 1, 1, 1, 1, 1, 1]) == pytest.approx([-6])


def test_prompt_and_padding_do_not_count():
    logits, tokens = (torch.randn(1, 6, 9, generator=torch.Generator().manual_seed(0)), torch.arange(6)[None])
    mask = torch.tensor([[0, 0, 1, 1, 0, 0]], dtype=torch.bool)
    changed = logits.clone()
    changed[:, [0, 3, 4, 5]] += torch.randn(9)  # those positions predict prompt, padding, or nothing
    assert torch.equal(sequence_logps(logits, tokens, mask), sequence_logps(changed, tokens, mask))


def test_position_t_predicts_token_t_plus_one():
    """A model that is sure that 3 follows 2 and 5 follows 3 gives the response 3 5 probability 1."""
    logits = torch.zeros(1, 4, 6)
    logits[0, 1, 3] = logits[0, 2, 5] = 100.0
    mask = torch.tensor([[0, 0, 1, 1]], dtype=torch.bool)
    assert sequence_logps(logits, torch.tensor([[1, 2, 3, 5]]), mask).item() == pytest.approx(0, abs=1e-6)
    assert sequence_logps(logits, torch.tensor([[1, 2, 5, 3]]), mask).item() == pytest.approx(-200)


def language_model(V, D, B, T, seed=0):
    """A random transformer, tokens (B, T), and responses of different lengths, one of them empty."""
    config = tiny_config(vocab_size=V, hidden_size=D, max_position_embeddings=T)
    policy = initialize(Transformer(config), torch.Generator().manual_seed(seed))
    tokens = torch.randint(V, (B, T), generator=torch.Generator().manual_seed(seed))
    position, end = torch.arange(T), torch.arange(B)[:, None] * (T - 3) // max(B - 1, 1) + 3
    return policy, tokens, (position >= 3) & (position < end)


@pytest.mark.parametrize("rows", [1, 7, 1000])
def test_chunked_logps_equal_the_plain_ones_and_so_do_their_gradients(rows):
    policy, tokens, mask = language_model(V=301, D=32, B=5, T=40)
    plain = sequence_logps(policy(tokens), tokens, mask)
    chunked = chunked_logps(policy.model(tokens), policy.head, tokens, mask, rows)
    assert mask[0].sum() == 0 and chunked[0] == 0
    assert torch.allclose(chunked, plain, atol=1e-5, rtol=1e-6)
    weight = torch.tensor([1.0, -2.0, 0.5, 3.0, -1.0])
    expected = torch.autograd.grad((weight * plain).sum(), list(policy.parameters()))
    for ours, theirs in zip(torch.autograd.grad((weight * chunked).sum(), list(policy.parameters())), expected):
        assert torch.allclose(ours, theirs, atol=1e-4 * theirs.abs().max().item() + 1e-7)


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="peak memory is read from Linux's /proc")
def test_chunked_logps_need_a_fifth_of_the_memory_of_full_logits_with_32000_tokens():
    """Peak resident memory above the model's, forward and backward; freed blocks go back to the system at once."""
    script = """
import re, sys
sys.path.insert(0, "tests")
import torch
def status(key):
    return int(re.search(key + r":\\s+(\\d+)", open("/proc/self/status").read())[1])
from test_sppo import chunked_logps, language_model, sequence_logps
torch.set_num_threads(1)
policy, tokens, mask = language_model(V=32_000, D=32, B=8, T=600)
few = tokens[:, :8], mask[:, :8]
chunked_logps(policy.model(few[0]), policy.head, *few).sum().backward()  # imports, gradients
open("/proc/self/clear_refs", "w").write("5")  # the peak begins here
before = status("VmRSS")
if sys.argv[1] == "full":
    logps = sequence_logps(policy(tokens), tokens, mask)
else:
    logps = chunked_logps(policy.model(tokens), policy.head, tokens, mask)
logps.sum().backward()
print(status("VmHWM") - before)
"""
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "1000000"}
    command = [sys.executable, "-c", script]
    peaks = [
        int(subprocess.run([*command, kind], cwd=ROOT, env=environment, capture_output=True, check=True).stdout)
        for kind in ("full", "chunked")
    ]
    assert peaks[0] > 5 * peaks[1] > 0


def test_logps_of_bfloat16_logits_are_float32():
    """Half a thousand tokens, each -log 50 = -3.912: bfloat16 would say -3.906 each and round the sum to a multiple of 8."""
    tokens, mask = torch.zeros(1, 501, dtype=torch.long), torch.ones(1, 501, dtype=torch.bool)
    logps = sequence_logps(torch.zeros(1, 501, 50, dtype=torch.bfloat16), tokens, mask)
    assert logps.dtype == torch.float32
    assert logps.item() == pytest.approx(-500 * math.log(50), rel=1e-5)


# ------------------------------------------------------------------------------------------------ losses


@pytest.mark.parametrize(("best", "worst", "authors"), [(0.0, 0.0, 122_500.0), (10.0, -20.0, 112_250.0)])
def test_sppo_loss_of_a_pair_is_twice_the_authors(best, worst, authors):
    """½[(Δw - 350)² + (Δl + 350)²], their `sppo` at β = .001 with P̂ = .85 and .15: 122,500 at the start."""
    target = sppo_target(torch.tensor([0.85, 0.15]), 1e3)
    assert sppo_loss(torch.tensor([best, worst]), target).sum().item() == pytest.approx(2 * authors, rel=1e-5)


def trl_loss(name, beta, best, worst, length=1):
    """TRL's own loss of one pair whose log-ratios are given: a stub model hands it log-probabilities, the rest is TRL's."""
    trl = pytest.importorskip("trl.trainer.dpo_trainer")
    trainer, (B, T) = trl.DPOTrainer.__new__(trl.DPOTrainer), (2, length + 1)
    scores = torch.tensor([[best], [worst]]).expand(B, length) / length  # as many equal tokens as the response is long
    zeros = torch.zeros(B, length)
    output = SimpleNamespace(log_probs=scores, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool())

    def model(**inputs):
        return output

    model.training = True
    same = SimpleNamespace(device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x)
    settings = dict(
        model=model, accelerator=same, loss_types=[name], loss_weights=[1.0], beta=beta, f_divergence_type="reverse_kl",
        ld_alpha=None, precompute_ref_logps=True, aux_loss_enabled=False, use_weighting=False, _total_train_tokens=0,
        _tp_size=1, _metrics={"train": defaultdict(list)}, label_smoothing=0.0,
    )  # fmt: skip
    vars(trainer).update(settings)
    completion = torch.ones(B, T, dtype=torch.long)
    completion[:, 0] = 0
    inputs = {"input_ids": torch.ones(B, T, dtype=torch.long), "attention_mask": torch.ones(B, T), "completion_mask": completion}
    zero = {"ref_chosen_logps": torch.zeros(1), "ref_rejected_logps": torch.zeros(1)}
    return trainer._compute_loss(model, inputs | zero, return_outputs=False).item()


NUMBERS = [(0.1, 0.7, -0.4), (0.001, 3.0, 5.0), (2.0, -1.0, -1.5)]


@pytest.mark.parametrize(("ours", "theirs"), [(dpo_loss, "sigmoid"), (sppo_hard_loss, "sppo_hard"), (ipo_loss, "ipo")])
@pytest.mark.parametrize(("beta", "best", "worst"), NUMBERS)
def test_baseline_losses_equal_trl_on_responses_of_one_token(ours, theirs, beta, best, worst):
    value = ours(torch.tensor(best), torch.tensor(worst), beta).item()
    assert value == pytest.approx(trl_loss(theirs, beta, best, worst), rel=1e-5)


@pytest.mark.parametrize(("ours", "theirs"), [(dpo_loss, "sigmoid"), (sppo_hard_loss, "sppo_hard"), (ipo_loss, "ipo")])
def test_only_ipo_departs_from_trl_on_longer_responses(ours, theirs):
    """TRL divides IPO's log-ratios by the number of tokens; the paper's equation 17, and we, take the sums."""
    value = ours(torch.tensor(0.7), torch.tensor(-0.4), 0.1).item()
    assert (value == pytest.approx(trl_loss(theirs, 0.1, 0.7, -0.4, length=4), rel=1e-5)) == (theirs != "ipo")


def test_sppo_hard_is_sppo_with_certain_labels():
    """P = 1 for the winner and 0 for the loser, one opponent, itself not counted (eq. 4.12)."""
    ratio = torch.tensor([0.3, -1.2])
    soft = sppo_loss(ratio, sppo_target(torch.tensor([1.0, 0.0]), 10.0)).sum()
    assert sppo_hard_loss(*ratio, beta=0.1).item() == pytest.approx(soft.item(), rel=1e-6)


def test_centred_loss_by_hand():
    """Errors Δ - z of 1, 0 and -4 have the mean -1: 2², 1², 3²; shifting all targets by log Z, say, changes nothing."""
    ratio, target = torch.tensor([[2.0, 0.0, -1.0]]), torch.tensor([[1.0, 0.0, 3.0]])
    assert centred_loss(ratio, target).tolist() == [[4, 1, 9]]
    assert torch.allclose(centred_loss(ratio, target - 7.25), centred_loss(ratio, target))


@pytest.mark.parametrize(("beta", "best", "worst"), NUMBERS)
def test_centred_loss_of_a_pair_is_a_quarter_of_ipo(beta, best, worst):
    """Each of the two is half the error of the difference; IPO's margin is 1/(2β)."""
    value = centred_loss(torch.tensor([best, worst]), torch.tensor([0.25, -0.25]) / beta).mean()
    assert 4 * value.item() == pytest.approx(ipo_loss(torch.tensor(best), torch.tensor(worst), beta).item(), rel=1e-5)


# ------------------------------------------------------------------------------------------------ rounds on a table


class TabularPolicy(nn.Module):
    def __init__(self, prompts, actions):
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(prompts, actions, dtype=torch.float64))


class TabularGame(Game):
    """Prompts are numbers, responses are [action] lists, and P(a beats b) is a table per prompt."""

    def __init__(self, prompts, actions, K):
        self.policy, self.K = TabularPolicy(prompts, actions), K
        self.payoff = random_preference(prompts, actions, seed=1)
        self.generator = torch.Generator().manual_seed(2)

    def sample(self, prompts):
        share = self.policy.logits.detach().softmax(-1)[prompts]
        return [[[a] for a in row] for row in torch.multinomial(share, self.K, True, generator=self.generator).tolist()]

    def judge(self, prompts, responses):
        actions = torch.tensor(responses)[..., 0]  # (N, K)
        return torch.stack([self.payoff[n][row][:, row] for n, row in zip(prompts, actions)])

    def logps(self, prompts, responses):
        return self.policy.logits.log_softmax(-1)[prompts].gather(1, torch.tensor(responses)[..., 0])

    def previous(self, prompts, responses, win_rate):
        return win_rates(self.judge(prompts, responses)).flip(-1)

    def reference(self, prompts, responses):
        return torch.full((len(prompts), len(responses[0])), -math.log(3.0), dtype=torch.float64)


def play(N=6, actions=4, K=5, given=None, uniform=True, **settings):
    """One round from a policy that is uniform, or random: the game, and its result. `given`: {method: what it returns}."""
    defaults = dict(eta=2.0, batch=64, micro_batch=64, optimizer="adamw", lr=0.05, warmup=0.0)
    game = TabularGame(N, actions, K)
    if not uniform:
        game.policy.logits.data.normal_(generator=torch.Generator().manual_seed(4))
    for name, value in (given or {}).items():
        setattr(game, name, lambda *arguments, value=value: value)
    result = sppo_round(game, list(range(N)), RoundConfig(**(defaults | settings)), torch.Generator().manual_seed(3))
    return game, result


@pytest.mark.parametrize("select", ["best-worst", "all"])
@pytest.mark.parametrize("target", TARGETS)
def test_first_loss_of_a_round_is_the_mean_squared_target(select, target):
    _, result = play(select=select, target=target, uniform=False, micro_batch=2)
    assert result["steps"][0]["loss"] == pytest.approx(result["target"].pow(2).mean().item(), rel=1e-6)
    assert result["steps"][0]["best_log_ratio"] == result["steps"][0]["worst_log_ratio"] == 0


def test_first_loss_of_the_worked_example():
    """η = 2: targets 1/3 and -1/5 for winner and loser, so (1/9 + 1/25)/2 = 17/225."""
    given = {"sample": [[[0], [1], [2]]], "judge": WORKED[None]}
    _, result = play(N=1, K=3, given=given)
    assert result["steps"][0]["loss"] == pytest.approx(17 / 225, rel=1e-6)


def test_gradient_raises_best_and_lowers_worst():
    logp = torch.tensor([-5.0, -3.0, -4.0], requires_grad=True)
    sppo_loss(logp - logp.detach(), sppo_target(win_rates(WORKED), 2.0)).sum().backward()
    best, worst = best_and_worst(win_rates(WORKED))
    assert logp.grad[best] < 0 < logp.grad[worst]


@pytest.mark.parametrize("loss", LOSSES)
def test_a_round_raises_the_best_and_lowers_the_worst(loss):
    """On a policy that knows only these two actions, what the one gains the other loses."""
    given = {"sample": [[[0], [1]]] * 3, "judge": torch.tensor([[0.5, 0.8], [0.2, 0.5]]).expand(3, 2, 2)}
    game, _ = play(N=3, actions=2, K=2, loss=loss, given=given)
    assert (game.policy.logits[:, 0] > game.policy.logits[:, 1]).all()


def test_a_regularized_round_of_ties_moves_towards_the_reference():
    """Nothing to win, so all that is left of the target is -ητ log π_t/μ: down where the policy is above μ."""
    game, config = (TabularGame(1, 2, 2), RoundConfig(eta=2.0, target="regularized", tau=0.5, select="all", lr=0.05, warmup=0.0))
    game.policy.logits.data[0] = torch.tensor([2.0, 0.0])
    game.sample = lambda prompts: [[[0], [1]]]
    game.judge = lambda prompts, responses: torch.full((1, 2, 2), 0.5)
    sppo_round(game, [0], config, torch.Generator())
    assert game.policy.logits[0, 0] < 2 and game.policy.logits[0, 1] > 0


@pytest.mark.parametrize("K", [2, 3, 5, 8])
@pytest.mark.parametrize("how", [dict(target="normalized"), dict(loss="centred")], ids=["log Z", "centred"])
def test_enough_steps_on_all_responses_reach_multiplicative_weights(K, how):
    """All K actions seen once, log Z exact or cancelled: the regression has a solution, eq. 4.3."""
    given = {"sample": [[[k] for k in range(K)]]}
    game, result = play(N=1, actions=K, K=K, select="all", epochs=400, given=given, **how)
    share = (2.0 * result["win_rate"][0].double()).exp()
    assert torch.allclose(game.policy.logits[0].softmax(-1), share / share.sum(), atol=1e-3)


@pytest.mark.parametrize("K", [2, 3, 5, 8])
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("select", "trained"), [("best-worst", 2), ("all", None)])
def test_every_number_of_samples_plays_with_every_target_and_selection(K, target, select, trained):
    _, result = play(K=K, target=target, select=select, epochs=3)
    assert result["target"].shape == (6, trained or K)
    assert all(math.isfinite(step["loss"]) for step in result["steps"])
    assert result["steps"][0]["loss"] > result["steps"][-1]["loss"]


def test_a_round_asks_its_game_for_each_stage_once_in_order():
    asked = []

    class Asked(TabularGame):
        def __getattribute__(self, name):
            if name in ("sample", "judge", "score", "previous", "reference", "fit"):
                asked.append(name)
            return super().__getattribute__(name)

    config = RoundConfig(target="regularized")
    sppo_round(Asked(6, 4, 5), list(range(6)), config, torch.Generator())
    assert asked == ["sample", "judge", "score", "reference", "fit"]


def test_a_game_that_remembers_its_stages_is_played_from_them():
    """What a game returns is all that a round knows: here nothing is sampled, judged, scored or trained."""
    given = {"sample": [[[0], [1]]], "judge": torch.tensor([[[0.5, 0.9], [0.1, 0.5]]]),
             "score": torch.tensor([[-7.0, -8.0]]), "fit": [{"loss": 1.5}]}  # fmt: skip
    game, result = play(N=1, K=2, given=given)
    assert result["responses"] == [[[0], [1]]] and result["steps"] == [{"loss": 1.5}]
    assert torch.equal(game.policy.logits, torch.zeros_like(game.policy.logits))


@pytest.mark.parametrize("target", ["optimistic", "regularized"])
def test_a_game_without_a_previous_policy_or_a_reference_refuses_the_targets_that_need_them(target):
    class Forgetful(TabularGame):
        previous = Game.previous
        reference = Game.reference

    with pytest.raises(ValueError, match=f"--target {target}: this game"):
        sppo_round(Forgetful(6, 4, 5), list(range(6)), RoundConfig(target=target), torch.Generator())


@pytest.mark.parametrize("micro_batch", [1, 2, 3])
@pytest.mark.parametrize("loss", ["sppo", "dpo"])
def test_accumulated_gradients_give_the_weights_of_whole_batches(loss, micro_batch):
    """Seven prompts in batches of 5: the last micro-batch of a batch, and the last batch, are smaller."""
    whole, parts = [play(N=7, loss=loss, batch=5, micro_batch=m, epochs=4)[0] for m in (5, micro_batch)]
    assert torch.allclose(whole.policy.logits, parts.policy.logits, atol=1e-6)
    assert whole.policy.logits.abs().max() > 0.01


@pytest.mark.parametrize("optimizer", ["rmsprop", "adamw"])
def test_both_optimizers_fit_the_target(optimizer):
    game, result = play(optimizer=optimizer, epochs=10)
    assert game.policy.logits.abs().max() > 0.01
    assert result["steps"][-1]["loss"] < 0.5 * result["steps"][0]["loss"]


def regression(game, N, K=5):
    """Data to fit: the round's own, without a round."""
    prompts = list(range(N))
    responses = game.sample(prompts)
    config = RoundConfig(eta=2.0, batch=2, micro_batch=2, epochs=2, lr=0.01)
    target = sppo_target(win_rates(game.judge(prompts, responses)), config.eta)
    return Regression(prompts, responses, game.score(prompts, responses, config), target), config


def test_a_fit_yields_the_numbers_of_a_step_when_it_is_made():
    game = TabularGame(6, 4, 5)
    data, config = regression(game, 6)
    before = game.policy.logits.detach().clone()
    steps = game.fit(data, config, torch.Generator().manual_seed(0))
    first = next(steps)
    assert first["epoch"] == 0 and not torch.equal(game.policy.logits, before)
    assert [step["epoch"] for step in [first, *steps]] == [0, 0, 0, 1, 1, 1]


@pytest.mark.parametrize("done", [1, 3, 4])
def test_a_fit_that_is_resumed_takes_the_steps_that_are_missing_to_the_same_bits(done):
    """The state after `done` steps, put into a fresh game and its optimizer."""
    whole, part, rest = (TabularGame(6, 4, 5) for _ in range(3))
    data, config = regression(whole, 6)
    expected = list(whole.fit(data, config, torch.Generator().manual_seed(0)))
    kept = {}

    def watch(optimizer):
        kept["optimizer"] = optimizer
        return 0

    steps = part.fit(data, config, torch.Generator().manual_seed(0), watch)
    for _ in range(done):
        next(steps)

    def resume(optimizer):
        rest.policy.load_state_dict(part.policy.state_dict())
        optimizer.load_state_dict(kept["optimizer"].state_dict())
        return done

    assert list(rest.fit(data, config, torch.Generator().manual_seed(0), resume)) == expected[done:]
    assert torch.equal(rest.policy.logits, whole.policy.logits)


def test_every_prompt_is_seen_once_an_epoch():
    game, seen = TabularGame(7, 4, 5), []
    logps = game.logps
    game.logps = lambda prompts, responses: seen.extend(prompts * torch.is_grad_enabled()) or logps(prompts, responses)
    sppo_round(game, list(range(7)), RoundConfig(batch=3, micro_batch=2, epochs=2), torch.Generator().manual_seed(0))
    assert sorted(seen[:7]) == sorted(seen[7:]) == list(range(7)) and seen[:7] != seen[7:]


def test_identical_responses_leave_the_policy_where_it_is():
    given = {"sample": [[[1], [1], [1]]] * 2, "judge": torch.full((2, 3, 3), 0.5)}
    game, result = play(N=2, K=3, given=given)
    assert torch.equal(game.policy.logits, torch.zeros_like(game.policy.logits)) and result["steps"][0]["loss"] == 0


# ------------------------------------------------------------------------------------------------ learning rate


def test_learning_rate_rises_over_the_warm_up_then_falls_linearly():
    config = RoundConfig(lr=8.0, warmup=0.2)
    assert [learning_rate(step, 10, config) for step in range(10)] == [4, 8, 8, 7, 6, 5, 4, 3, 2, 1]


def test_learning_rate_without_warm_up_starts_at_its_peak():
    assert [learning_rate(step, 4, RoundConfig(lr=4.0, warmup=0.0)) for step in range(4)] == [4, 3, 2, 1]


def test_first_epoch_of_the_papers_schedule_is_all_warm_up():
    """18 epochs of 312 steps, a tenth of them rising: epoch 1 ends at 2.8e-7, with a mean of 1.4e-7."""
    rates = [learning_rate(step, 18 * 312, replace(RoundConfig(), lr=5e-7, warmup=0.1)) for step in range(312)]
    assert rates == sorted(rates)
    assert rates[-1] == pytest.approx(2.8e-7, rel=0.01) and sum(rates) / 312 == pytest.approx(1.4e-7, rel=0.01)


def test_the_schedule_may_be_laid_out_for_more_epochs_than_are_run():
    _, result = play(N=4, batch=2, epochs=1, schedule_epochs=4, lr=8.0)
    assert [step["lr"] for step in result["steps"]] == [8, 7]


@pytest.mark.parametrize("loss", PAIR_LOSSES)
def test_pair_losses_take_the_first_column_for_the_winner(loss):
    """A winner that gained and a loser that lost is better than the reverse, by every one of them."""
    config, ratio = RoundConfig(eta=10.0, loss=loss), torch.tensor([[1.0, -1.0], [-1.0, 1.0]])
    good, bad = row_losses(ratio, None, config)
    assert good < bad


# ------------------------------------------------------------------------------------------------ micro-batches


def test_micro_batches_hold_every_prompt_once_and_no_more_tokens_than_allowed():
    """One prompt alone may be over the budget."""
    counts = [5, 90, 7, 30, 31, 8, 200, 6]
    game = SimpleNamespace(tokens=lambda prompt, responses: counts[prompt])
    selected, batch = [[None, None]] * 8, torch.tensor([7, 6, 5, 4, 3, 2, 1, 0])
    parts = micro_batches(game, list(range(8)), selected, batch, RoundConfig(micro_tokens=65))
    assert sorted(n for part in parts for n in part) == list(range(8))
    costs = [sum(counts[n] for n in part) for part in parts]
    assert all(cost <= 65 or len(part) == 1 for cost, part in zip(costs, parts)) and len(parts) < 8
    assert [len(part) for part in micro_batches(game, list(range(8)), selected, batch, RoundConfig(micro_batch=3))] == [3, 3, 2]
