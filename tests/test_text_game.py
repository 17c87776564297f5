"""Claims about toy/text_game.py: the oracle by hand, exact shares against an enumeration."""

import json
from itertools import product
from pathlib import Path

import pytest
import torch
from conftest import tiny_run
from PIL import Image

from data import Tokenizer, read_pairs
from evaluate.judge_report import report
from judges.load import load_judge
from model import Transformer, initialize
from sppo import win_rates
from toy import text_game
from generate import response_logps
from toy.debug import build_debugging
from toy.text_game import (
    CLASSES, STRENGTHS, SUMS, class_shares, classify, describe, draw_film, draw_pairs, measure,
    model_config, oracle, payoff,
)  # fmt: skip

# ------------------------------------------------------------------------------------------------ the rules


@pytest.mark.parametrize(
    ("response", "kind"),
    [
        ("7.", "right."), ("7!", "right!"), ("7?", "right?"),
        ("8.", "wrong."), ("77?", "wrong?"), ("0!", "wrong!"),
        ("07.", "malformed"), ("7", "malformed"), ("7..", "malformed"), (".7", "malformed"),
        ("", "malformed"), ("777.", "malformed"), ("7.\n", "malformed"), ("٧.", "malformed"),
        ("7 .", "malformed"), ("+7.", "malformed"),
    ],
)  # fmt: skip
def test_responses_are_classified_by_number_and_ending(response, kind):
    assert CLASSES[classify("3+4=", response)] == kind


def test_payoff_is_a_preference():
    table = payoff()
    ones = torch.ones(7, 7, dtype=torch.float64)
    assert torch.allclose(table + table.T, ones, rtol=0, atol=1e-12)
    assert win_rates(table).mean().item() == pytest.approx(0.5)


def test_oracle_by_hand():
    """Right beats wrong and wrong beats malformed, .95; between equals the circle decides."""
    table = oracle("3+4=", ["7.", "7!", "7?", "8.", "8!", "x"])
    expected = [
        [0.50, 0.90, 0.20, 0.95, 0.95, 0.95],
        [0.10, 0.50, 0.90, 0.95, 0.95, 0.95],
        [0.80, 0.10, 0.50, 0.95, 0.95, 0.95],
        [0.05, 0.05, 0.05, 0.50, 0.90, 0.95],
        [0.05, 0.05, 0.05, 0.10, 0.50, 0.95],
        [0.05, 0.05, 0.05, 0.05, 0.05, 0.50],
    ]  # fmt: skip
    assert torch.allclose(table, torch.tensor(expected, dtype=torch.float64))


def test_oracle_takes_other_strengths():
    table = oracle("3+4=", ["7.", "7!"], strengths=[0.6, 0.9, 0.8])
    assert table[0, 1].item() == pytest.approx(0.6)


def test_oracle_judges_by_the_prompt():
    assert oracle("5+9=", ["14.", "7."])[0, 1].item() == pytest.approx(0.95)


def test_there_are_a_hundred_sums():
    assert len(SUMS) == 100 and SUMS["9+9="] == 18 and set(SUMS.values()) == set(range(19))


def test_labels_of_pairs_are_coin_flips_of_the_oracle(tmp_path):
    """Of a right and a wrong answer, the right one is chosen in 95 %.

    There are about 1,500 such pairs; their share is within 5 standard errors.
    """
    pairs = draw_pairs(4000, (0.9, 0.9, 0.8), torch.Generator().manual_seed(0))
    quality = [[classify(pair["prompt"], pair[side]) // 3 for side in ("chosen", "rejected")] for pair in pairs]
    unequal = [chosen < rejected for chosen, rejected in quality if {chosen, rejected} == {0, 1}]
    error = (0.95 * 0.05 / len(unequal)) ** 0.5
    assert len(unequal) > 1000 and abs(sum(unequal) / len(unequal) - 0.95) < 5 * error


# ------------------------------------------------------------------------------------------------ exact shares


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text-game") / "world"
    build_debugging(folder)
    return folder


@pytest.fixture(scope="module")
def model():
    """Weights so small that every token is about as likely as every other, and so no class is rare."""
    untrained = Transformer(model_config(layers=1, width=16))
    return initialize(untrained, torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def shares(world, model):
    return class_shares(model, Tokenizer(world / "policy"))


def test_class_shares_sum_to_one(shares):
    assert shares.shape == (100, 7) and shares.min() >= 0
    assert torch.allclose(shares.sum(1), torch.ones(100, dtype=torch.float64), atol=1e-9)


def test_class_shares_equal_the_enumeration_of_all_token_sequences(world, model, shares):
    """Every sequence of up to 3 tokens and the stop token, decoded and classified.

    A response with <unk> or <s> in it, which decoding hides, counts as malformed; so does one that
    has not stopped after four tokens.
    """
    prompt = "3+4="
    tokenizer = Tokenizer(world / "policy")
    others = [token for token in range(18) if token != tokenizer.eos]
    bodies = [list(body) for length in range(4) for body in product(others, repeat=length)]
    assert len(bodies) == 1 + 17 + 17**2 + 17**3

    responses = [body + [tokenizer.eos] for body in bodies]
    with torch.no_grad():
        probability = response_logps(model, [tokenizer.prompt_ids(prompt, "plain")], [responses]).double().exp()

    kinds = [6 if {0, 1} & set(body) else classify(prompt, tokenizer.decode(body)) for body in bodies]
    exact = torch.zeros(7, dtype=torch.float64).index_add_(0, torch.tensor(kinds), probability)
    exact[6] += 1 - probability.sum()

    row = list(SUMS).index(prompt)
    assert torch.allclose(shares[row], exact, rtol=1e-3, atol=1e-9)
    assert exact.min() > 1e-6


def test_describe_by_hand():
    """Two prompts: always `right.`, and always `wrong!`. Best replies win .8 and .95, so the mean over ½ is .375."""
    shares = torch.zeros(2, 7, dtype=torch.float64)
    shares[0, CLASSES.index("right.")] = shares[1, CLASSES.index("wrong!")] = 1
    row = describe(shares, payoff())
    assert row["right"] == 0.5 and row["endings"] == [0.5, 0.5, 0] and row["malformed"] == 0
    assert row["exploitability"] == pytest.approx(0.375)


# ------------------------------------------------------------------------------------------------ measuring a run


@pytest.fixture(scope="module")
def measured(world):
    run = world.parent / "run"
    tiny_run(world, run, rounds=2)
    measure(world, run)
    return run, json.loads((run / "measure.json").read_text())


def test_measure_writes_numbers_and_a_figure(measured):
    run, result = measured
    assert {"base", "last", "average", "rounds", "equilibrium"} <= result.keys()
    for row in (result["base"], result["last"], result["average"], *result["rounds"]):
        assert {"right", "endings", "malformed", "exploitability"} <= row.keys()
    assert (run / "measure.png").stat().st_size > 10_000


def test_the_film_has_a_frame_a_round_and_runs_for_ever(measured, tmp_path):
    _, result = measured
    draw_film(result, tmp_path / "film.gif")
    with Image.open(tmp_path / "film.gif") as film:
        assert film.n_frames == len(result["rounds"]) and film.info["loop"] == 0


def test_last_and_average_are_those_of_the_rounds(measured):
    _, result = measured
    first, last = result["rounds"]
    assert result["last"] == last and first != last != result["base"] != first
    assert result["average"]["right"] == pytest.approx((first["right"] + last["right"]) / 2)
    malformed = (first["malformed"] + last["malformed"]) / 2
    assert result["average"]["malformed"] == pytest.approx(malformed)


def test_equilibrium_is_always_right_with_mixed_endings(measured):
    assert measured[1]["equilibrium"] == pytest.approx([4 / 11, 3 / 11, 4 / 11], abs=1e-9)


def test_a_folder_without_rounds_is_named(world, tmp_path):
    with pytest.raises(FileNotFoundError, match="no round-01/policy"):
        measure(world, tmp_path)


# ------------------------------------------------------------------------------------------------ building


def test_build_writes_the_folders_that_train_takes(tmp_path, monkeypatch, capsys):
    """With two steps of training in place of 600, and 50 pairs: the layout, not the quality."""
    train_base = text_game.train_base

    def hasty(model, tokenizer, steps, batch, generator):
        train_base(model, tokenizer, 2, 8, generator)

    world = tmp_path / "world"
    monkeypatch.setattr(text_game, "train_base", hasty)
    monkeypatch.setattr("sys.argv", ["text_game", "build", str(world), "--pairs", "50"])
    assert text_game.main() == 0
    assert len(read_pairs(world / "pairs.jsonl")) == 50

    result = tiny_run(world, tmp_path / "run", judge=str(world / "judge"), rounds=1)
    assert Path(tmp_path / "run/round-01/policy/model.safetensors").is_file() and result


@pytest.mark.parametrize("name", ["world.json", "policy"])
def test_build_refuses_a_folder_that_holds_something(name, tmp_path, monkeypatch, capsys):
    """A world; or somebody's own policy, which it used to take for its own."""
    (tmp_path / name).touch()
    monkeypatch.setattr("sys.argv", ["text_game", "build", str(tmp_path)])
    assert text_game.main() == 2
    assert "exists already, and nothing is written over it" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_measure_of_a_missing_run_ends_with_one_line(world, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["text_game", "measure", str(world), str(tmp_path / "nowhere")])
    assert text_game.main() == 2
    assert "nowhere" in capsys.readouterr().err.strip().splitlines()[-1]


# ------------------------------------------------------------------------------------------------ a biased oracle


def test_biased_oracle_gives_the_longer_answer_so_many_logits_more():
    responses = ["7.", "7!", "13.", "7.."]
    fair = oracle("3+4=", responses)
    biased = oracle("3+4=", responses, longer=0.3)
    moved = torch.logit(biased) - torch.logit(fair)
    assert moved[2, 0].item() == pytest.approx(0.3) and moved[0, 2].item() == pytest.approx(-0.3)
    assert moved[0, 1].abs() < 1e-9 and moved[3, 2].abs() < 1e-9
    assert torch.allclose(biased + biased.T, torch.ones(4, 4, dtype=torch.float64))


def test_report_shows_the_bias_of_an_oracle_that_likes_length():
    """Labels drawn from the fair oracle: its own length correlation is theirs, the biased one's is larger."""
    pairs = draw_pairs(3000, STRENGTHS, torch.Generator().manual_seed(0))
    pairs = [pair | {"probability": 1.0} for pair in pairs]
    fair = report(load_judge('toy.text_game:oracle:{"longer": 0.0}'), pairs)
    biased = report(load_judge('toy.text_game:oracle:{"longer": 1.0}'), pairs)
    assert biased["length_correlation"] > fair["length_correlation"] + 0.05
    assert fair["expected_calibration_error"] < 0.02
    assert biased["expected_calibration_error"] > fair["expected_calibration_error"]
