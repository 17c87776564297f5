"""Claims about toy/rps.py: a sampled transformer follows the exact path; about toy/lab.py: what each script does."""

import json
import math

import pytest
import torch
from matplotlib.figure import Figure

from engine.figures import slope
from model import Transformer, initialize
from toy import rps
from toy.games import cycle, every_game, nash
from toy.lab import script

START = (0.6, 0.3, 0.1)


def test_average_of_a_sampled_transformer_is_hardly_exploitable_and_near_the_exact_one():
    result = rps.compare(cycle(), START, eta=0.4, rounds=100, samples=512, seeds=[0])  # `make toys` plays three seeds
    row = result["neural"][0]
    assert row["average"][-1] <= 0.03
    distance = (torch.tensor(row["averages"]) - torch.tensor(result["exact"]["averages"])).abs().sum(-1) / 2
    assert distance.max() < 0.15 and max(row["last"][50:]) > 0.15  # while the last policy goes on circling


def test_same_seed_same_path():
    one, two, other = (rps.neural(cycle(), START, 0.4, 3, 32, seed) for seed in (0, 0, 1))
    assert torch.equal(one, two) and not torch.equal(one, other)


def test_word_game_scores_a_word_with_the_policys_probability():
    generator = torch.Generator().manual_seed(0)
    policy = initialize(Transformer(rps.model_config()), generator)
    rps.teach(policy, START)
    game = rps.WordGame(policy, cycle(), 8, generator)
    assert game.log_policy().exp().tolist() == pytest.approx(START, abs=1e-3)
    words = [[[0], [2], [1], [2]]]
    assert game.logps([rps.PROMPT], words)[0].tolist() == pytest.approx(game.log_policy()[[0, 2, 1, 2]].tolist(), abs=1e-5)
    assert game.judge([rps.PROMPT], words)[0, 0].tolist() == pytest.approx([0.5, 0.2, 0.9, 0.2])  # rock against each


def test_bound_of_exact_play_holds_in_every_round_from_any_start():
    for start in (START, (0.01, 0.01, 0.98)):
        rows = rps.exact(cycle(), start, eta=0.2, rounds=2000)
        assert all(gap <= bound for gap, bound in zip(rows["average"], rows["bound"]))


def test_horizons_report_their_slope_and_stay_below_the_bound():
    games = {name: every_game()[name] for name in ("Bradley-Terry", "random, 10 actions")}
    rows = rps.horizons(games, (1, 10, 100, 1000))
    assert all(row["largest_share_of_bound"] < 1 for row in rows.values())
    assert -0.6 < rows["Bradley-Terry"]["slope"] < -0.4  # where the best action is sure, η/8 is a half of the whole


def test_slope_of_a_power_law():
    x = [1.0, 2.0, 5.0, 30.0]
    assert slope(x, [3 * v**-0.7 for v in x]) == pytest.approx(-0.7)


def test_rps_figure_and_table_hold_what_was_measured(capsys):
    result = {
        "equilibrium": nash(cycle()).tolist(),
        "exact": rps.exact(cycle(), START, eta=0.3, rounds=3000),
        "horizons": rps.horizons({"COMAL's game": every_game()["COMAL's game"]}, (1, 10, 100)),
        "sampled": rps.compare(cycle(), START, eta=0.4, rounds=3, samples=16, seeds=[7]),
    }
    assert len(rps.draw(result).axes) == 6
    rps.print_table(result)
    assert "seed 7" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------ every script


def run(folder, measure, *flags):
    return script("name", "What it does.", measure, print, lambda result: Figure(), ["--out", str(folder), *flags])


def test_script_writes_numbers_and_figure_for_its_seed(tmp_path, capsys):
    assert run(tmp_path / "new", lambda args: {"value": math.pi * args.seed}, "--seed", "3") == 0
    assert json.loads((tmp_path / "new/name.json").read_text()) == {"value": 3 * math.pi}
    assert (tmp_path / "new/name.png").read_bytes().startswith(b"\x89PNG")
    assert "name.png" in capsys.readouterr().out


def test_script_says_in_one_sentence_what_is_wrong(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert run(tmp_path / "file", lambda args: pytest.fail("measured for nothing")) == 2
    assert run(tmp_path, lambda args: {}, "--seed", "-1") == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 2 and "file: not a folder" in errors[0] and "--seed is -1, expected" in errors[1]
