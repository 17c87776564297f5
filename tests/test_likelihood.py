"""Claims about toy/likelihood.py: where four losses agree and where they cannot, and that the script repeats itself."""

import json
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from sppo import PAIR_LOSSES, best_and_worst, row_losses, sppo_target
from toy import likelihood
from toy.likelihood import LOSSES, build_world, draw_pairs, first_gradients, follow, main, settings
from toy.text_game import classify, model_config
from train import TrainConfig

# ------------------------------------------------------------------------------------------------ the losses


def slopes(best, worst, loss, eta=2.0):
    """Loss of one pair at these log-ratios, and its slopes in them; the win rates are .8 and .3."""
    log_ratio = torch.tensor([[best, worst]], requires_grad=True)
    target = sppo_target(torch.tensor([[0.8, 0.3]]), eta)
    value = row_losses(log_ratio, target, TrainConfig(loss=loss, eta=eta)).sum()
    return value.item(), torch.autograd.grad(value, log_ratio)[0][0]


@pytest.mark.parametrize("loss", ["dpo", "ipo"])
def test_pairwise_losses_do_not_notice_both_falling_together(loss):
    assert slopes(-5.0, -6.0, loss)[0] == pytest.approx(slopes(0.0, -1.0, loss)[0])
    assert slopes(-5.0, -6.0, loss)[1].sum().item() == pytest.approx(0, abs=1e-6)  # and nothing pulls the two back


@pytest.mark.parametrize("loss", ["sppo", "sppo-hard"])
def test_sppo_pulls_both_ends_back_when_both_have_fallen(loss):
    """Below its target even the rejected response is pushed up: at -6 the slope is negative for both."""
    value, slope = slopes(-5.0, -6.0, loss)
    assert value > 10 * slopes(0.0, -1.0, loss)[0] and (slope < 0).all()


def test_far_below_a_large_target_sppo_hard_pulls_no_more_than_dpo():
    """η = 1000 puts the targets at ±500: after both fell by 5, the two slopes still point where DPO's do."""
    hard, dpo = (slopes(-5.0, -6.0, loss, eta=1000.0)[1] for loss in ("sppo-hard", "dpo"))
    assert torch.cosine_similarity(hard, dpo, dim=0) > 0.999


# ------------------------------------------------------------------------------------------------ the pairs


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A base policy trained so little that it writes numbers and endings but seldom the right number."""
    folder = tmp_path_factory.mktemp("likelihood")
    build_world(folder, seed=0, steps=60)
    return folder


@pytest.mark.parametrize("kind", likelihood.PAIRS)
def test_first_gradients_of_the_pairwise_losses_are_parallel_and_soft_sppo_is_close(world, kind):
    result = first_gradients((settings(world), kind))
    assert [result["cosines"][loss] for loss in PAIR_LOSSES] == pytest.approx([1, 1, 1], abs=1e-4)
    assert 0.8 < result["cosines"]["sppo"] < 0.9999


def test_every_winner_has_the_higher_win_rate(world):
    _, prompts, selected, win_rate = draw_pairs(settings(world), "any")
    assert len(prompts) == len(selected) == len(win_rate) > 50
    assert (win_rate[:, 0] > win_rate[:, 1]).all() and (best_and_worst(win_rate)[0] == 0).all()


def test_pairs_of_right_responses_differ_in_the_ending_only(world):
    game, prompts, selected, _ = draw_pairs(settings(world), "right")
    assert len(prompts) > 10
    for prompt, pair in zip(prompts, selected):
        winner, loser = game.texts(prompt, pair)
        assert winner[:-1] == loser[:-1] and winner[-1] != loser[-1] and classify(prompt.text, winner) < 3


def test_all_losses_see_the_same_pairs_and_another_seed_sees_others(world):
    drawn = {loss: draw_pairs(settings(world, loss=loss), "any")[2] for loss in LOSSES}
    assert all(pairs == drawn["sppo"] for pairs in drawn.values())
    assert draw_pairs(settings(world, seed=1), "any")[2] != drawn["sppo"]


def test_a_policy_without_better_and_worse_responses_is_refused(world, monkeypatch):
    monkeypatch.setattr(likelihood, "classify", lambda prompt, text: 6)  # as if none were right
    with pytest.raises(ValueError, match="seed 0: no prompt has"):
        draw_pairs(settings(world), "right")


def test_targets_in_reach_are_reached_by_sppo_but_left_behind_by_dpo(world):
    """η = 2: the mean of sppo-hard's two ends comes near ±1 while DPO's gap grows beyond twice theirs."""
    hard, dpo = (follow((settings(world, eta=2.0, loss=loss, lr=1e-3), "any")) for loss in ("sppo-hard", "dpo"))
    assert hard["chosen"][0] == hard["rejected"][0] == 0
    assert 0.5 < hard["chosen"][-1] < 1.1 and -1.2 < hard["rejected"][-1] < -0.8
    assert dpo["chosen"][-1] - dpo["rejected"][-1] > 2 * (hard["chosen"][-1] - hard["rejected"][-1])


# ------------------------------------------------------------------------------------------------ the script


@pytest.fixture
def small(monkeypatch):
    """Everything as small as it gets, and in this process."""
    sizes = dict(LOSSES=("sppo", "dpo"), ETAS=(2.0,), REPEATS=1, EPOCHS=1, EVERY=2, BASE_STEPS=150)
    for name, value in sizes.items():
        monkeypatch.setattr(likelihood, name, value)
    monkeypatch.setattr(likelihood, "LOOP", likelihood.LOOP | dict(rounds=2, samples=3, epochs=1))
    monkeypatch.setattr(likelihood, "model_config", lambda: model_config(layers=1, width=16))
    monkeypatch.setattr(likelihood, "ProcessPoolExecutor", lambda *args, **options: ThreadPoolExecutor(1))


def numbers(folder):
    return json.loads((folder / "likelihood.json").read_text())


def test_same_seed_gives_the_same_numbers_also_into_a_folder_that_was_used(small, tmp_path, capsys):
    results = []
    for seed in ("3", "4", "3"):
        assert main(["--seed", seed, "--out", str(tmp_path)]) == 0
        results.append(numbers(tmp_path))
    assert results[0] == results[2]
    for part in ("likelihoods", "exploitability"):
        assert results[0][part] != results[1][part]
    assert results[0]["steps"] == [0, 2, 4]
    assert {len(run[side]) for row in results[0]["likelihoods"] for run in row["runs"] for side in ("chosen", "rejected")} == {3}
    assert (tmp_path / "likelihood.png").stat().st_size > 10_000

    table = capsys.readouterr().out
    assert "share of chosen that fell" in table
    assert "round 2/2" not in table and "round 2/2" in (tmp_path / "likelihood/dpo/log.txt").read_text()


def test_a_negative_seed_is_one_sentence_and_exit_code_2(small, tmp_path, capsys):
    assert main(["--seed", "-1", "--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err.strip().splitlines()[-1].startswith("toy.likelihood: ")
    assert not (tmp_path / "likelihood.json").exists()


def test_a_file_in_the_place_of_the_folder_is_named(small, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["--out", str(tmp_path / "file")]) == 2
    assert str(tmp_path / "file") in capsys.readouterr().err.strip().splitlines()[-1]
