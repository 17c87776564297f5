"""Claims about what a run says of itself: that it learned nothing, or too much; that it was finished; where things are."""

import pytest
from children import content
from conftest import flat, tiny_run, tiny_settings

import train
from engine.advice import advice
from toy.debug import build_debugging


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("advice")
    build_debugging(folder)
    return folder


def same(prompt, responses):
    return flat(prompt, responses)


ODD = {
    "steps": (dict(lr=5e-7, epochs=1), "1 optimizer step of 5e-07 in all train next to nothing"),
    "ties": (dict(judge="test_advice:same"), "the judge calls every pair a tie"),
    "stopped": (dict(max_new_tokens=1), "no response stopped by itself"),
    "loss": (dict(lr=3.0, epochs=8, optimizer="rmsprop"), "the loss grew from"),
    "range": (dict(lr=0.3, epochs=8), "are outside of what the targets ask for"),
}


@pytest.mark.parametrize("kind", ODD)
def test_a_run_that_learns_nothing_or_too_much_says_so_once(kind, world, tmp_path, capsys):
    changes, sentence = ODD[kind]
    tiny_run(world, tmp_path / "run", **changes)
    assert capsys.readouterr().err.count(f"warning: {sentence}" if kind != "range" else sentence) == 1


def test_a_run_that_learns_is_not_warned(world, tmp_path, capsys):
    tiny_run(world, tmp_path / "run", judge="toy.text_game:oracle", lr=5e-4, rounds=1)
    assert "warning" not in capsys.readouterr().err


@pytest.mark.parametrize("preset", ["smollm2"])
def test_three_steps_are_enough_where_the_learning_rate_was_chosen_for_them(preset):
    """The published run: three steps a round, losses that do not fall, and nothing to warn of."""
    step = {"lr": train.PRESETS[preset]["lr"] / 2, "best_log_ratio": 1.0, "worst_log_ratio": -2.0}
    row = dict(best_win_rate=0.8, worst_win_rate=0.2, stopped=0.5, first_loss=20.0, last_loss=22.0, mean_squared_target=20.0)
    assert advice(row, [step] * 3) == {}


def test_thirty_prompts_of_ones_own_are_enough_for_the_small_preset(world, tmp_path, capsys):
    """At least ten optimizer steps a round, with nothing to warn of."""
    (tmp_path / "prompts.jsonl").write_text("".join(f'{{"prompt": "{n}+4="}}\n' for n in range(30)))
    paths = ["--policy", f"{world}/policy", "--prompts", f"{tmp_path}/prompts.jsonl", "--out", f"{tmp_path}/run"]
    short = ["--rounds", "1", "--max-new-tokens", "8", "--template", "plain"]
    assert train.main(["--preset", "small", *paths, "--judge", "conftest:letters", *short]) == 0
    assert "optimizer step" not in capsys.readouterr().err
    assert len((tmp_path / "run/round-01/policy/steps.jsonl").read_text().splitlines()) >= 10


def test_a_finished_run_says_that_it_is_finished_and_where_things_are(world, tmp_path, capsys):
    tiny_run(world, tmp_path / "run")
    told = capsys.readouterr().out
    assert told.endswith(f"curves.png; the last policy is {tmp_path}/run/round-02/policy\n") and "already" not in told

    before = content(tmp_path / "run")
    tiny_run(world, tmp_path / "run")
    told = capsys.readouterr().out
    assert f"finished already, {tmp_path}/run: " in told and told.count("(before)") == 2 and " 0.0 s" not in told
    assert content(tmp_path / "run") == before


def test_a_run_with_the_same_prompts_each_round_can_be_made_longer(world, tmp_path, capsys):
    """To the bytes of one that was as long from the start."""
    tiny_run(world, tmp_path / "long", rounds=3)
    tiny_run(world, tmp_path / "run", rounds=2)
    tiny_run(world, tmp_path / "run", rounds=3)
    assert content(tmp_path / "run") == content(tmp_path / "long")
    with pytest.raises(ValueError, match="started with --rounds 3, now it is 2"):
        tiny_run(world, tmp_path / "run", rounds=2)


def test_where_rounds_share_the_prompts_out_their_number_stays(world, tmp_path):
    settings = dict(reuse_prompts=False)
    train.run(tiny_settings(world, tmp_path / "run", rounds=1, **settings))
    with pytest.raises(ValueError, match="started with --rounds 1, now it is 2"):
        train.run(tiny_settings(world, tmp_path / "run", rounds=2, **settings))


def test_a_longer_run_that_is_refused_for_something_else_is_not_made_longer(world, tmp_path):
    tiny_run(world, tmp_path / "run", rounds=1)
    before = (tmp_path / "run/config.json").read_bytes()
    with pytest.raises(ValueError, match="--eta"):
        tiny_run(world, tmp_path / "run", rounds=2, eta=5.0)
    assert (tmp_path / "run/config.json").read_bytes() == before
