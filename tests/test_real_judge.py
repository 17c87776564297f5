"""Claims about real/judge.py, on the small world for the debugger in place of SmolLM2."""

import json
import math
import signal
import sys

import children
import pytest
import torch

import prefmodel
from data import read_pairs
from engine.files import read_json, write_lines
from judges.load import load_judge
from real import judge as command
from real.judge import HELD_OUT, compare, interval, main
from toy.debug import build_debugging

SETS = {"LLMBar, Natural": "Natural", "LLMBar, Neighbor": "Adversarial/Neighbor"}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A policy, pairs with shares of votes, a few for each of 20 prompts, and pairs in two sets."""
    folder = tmp_path_factory.mktemp("real-judge")
    build_debugging(folder / "world")
    shares = [1.0, 0.6667, 0.5, 1.0, 0.8333]
    pandalm, llmbar = [], []
    for n in range(60):
        ends = {"chosen": f"{n % 10}.", "rejected": "7" * (n % 4) + "!"}
        pandalm.append({"prompt": f"{n % 20 // 10}+{n % 10}=", **ends, "probability": shares[n % 5]})
    for n in range(12):
        kind = list(SETS.values())[n % 2]
        llmbar.append({"prompt": f"9+{n}=", "chosen": "8" * (n % 3), "rejected": "7.", "set": kind})
    write_lines(folder / "pandalm.jsonl", pandalm)
    write_lines(folder / "llmbar.jsonl", llmbar)
    return folder


def arguments(world, out, *more):
    flags = ["--pandalm", world / "pandalm.jsonl", "--llmbar", world / "llmbar.jsonl", "--policy", world / "world/policy"]
    flags += ["--template", "plain", "--save-minutes", 0, "--max-tokens", 24, "--out", out]
    return [str(flag) for flag in [*flags, *more]]


@pytest.fixture(scope="module")
def whole(world, tmp_path_factory):
    """What the command comes to when nothing stops it."""
    out = tmp_path_factory.mktemp("whole") / "run"
    assert main(arguments(world, out)) == 0
    return out


def kept(folder):
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.suffix != ".png"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


# ------------------------------------------------------------------------------------------------ pairs and training


def test_no_prompt_is_both_trained_on_and_held_out_and_no_pair_is_lost(world, whole):
    training, held_out = (read_pairs(whole / f"{name}.jsonl") for name in ("training", "held-out"))
    assert len(training) == 45 and len(held_out) == 15
    assert not {pair["prompt"] for pair in training} & {pair["prompt"] for pair in held_out}
    every = read_pairs(world / "pandalm.jsonl")
    assert all(pair in every for pair in training + held_out)


def test_the_judge_is_that_of_prefmodel_train_on_the_training_pairs(world, whole, tmp_path):
    flags = ["--pairs", whole / "training.jsonl", "--backbone", world / "world/policy", "--out", tmp_path / "judge"]
    recipe = ["--cyclic", 0, "--epochs", 1, "--batch", 8, "--micro-batch", 1, "--lr", 3e-5, "--max-tokens", 24]
    flags = [str(flag) for flag in [*flags, *recipe, "--template", "plain"]]
    assert prefmodel.main(["train", *flags]) == 0
    assert kept(tmp_path / "judge") == kept(whole / "judge")


def test_the_report_has_the_judges_own_preferences_on_every_set(whole):
    """Accuracy and cross-entropy counted anew, from a judge that is loaded anew."""
    result, judge = read_json(whole / "report.json"), load_judge(str(whole / "judge"))
    assert list(result) == [HELD_OUT, *SETS]
    for name, file in zip(result, ("PandaLM-held-out", "LLMBar-Natural", "LLMBar-Neighbor")):
        pairs = read_pairs(whole / "preferences" / f"{file}.jsonl")
        loss, right = 0, []
        for pair in pairs:
            p = judge.preferences_many([pair["prompt"]], [[pair["chosen"], pair["rejected"]]])[0, 0, 1].item()
            share = pair["probability"]
            loss -= share * math.log(p) + (1 - share) * math.log(1 - p)
            right += [(p > 0.5) == (share > 0.5)] if share != 0.5 else []
        row = result[name]["learned"]
        assert row["pairs"] == len(pairs) and row["decided"] == len(right)
        assert row["accuracy"] == pytest.approx(sum(right) / len(right))
        assert row["cross_entropy"] == pytest.approx(loss / len(pairs), abs=1e-5)
    assert (whole / "report.png").exists()


# ------------------------------------------------------------------------------------------------ the trivial judges


def pair(prompt, chosen, rejected, probability=1.0):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, "probability": probability}


def test_longer_wins_with_the_training_pairs_probability_and_a_coin_knows_nothing():
    """In training the longer one has a vote, two thirds of one, and none: 5/9. Of the set, it wins 1 of 2; a tie is a half."""
    training = [pair("a", "xx", "y"), pair("b", "x", "yy", 1 / 3), pair("c", "x", "yy"), pair("d", "x", "y")]
    pairs = [pair("p", "long", "s"), pair("q", "s", "long"), pair("r", "same", "size")]
    sets = compare({"set": pairs}, {"set": torch.tensor([0.9, 0.8, 0.7])}, training)["set"]
    p = (1 + 2 / 3 + 0) / 3
    assert sets["longer wins"]["accuracy"] == pytest.approx(0.5)
    assert sets["longer wins"]["cross_entropy"] == pytest.approx(-(math.log(p) + math.log(1 - p) + math.log(0.5)) / 3)
    assert sets["learned"]["accuracy"] == 1 and sets["learned"]["expected_calibration_error"] == pytest.approx(0.2)
    coin = sets["coin"]
    assert coin["accuracy"] == 0.5 and coin["accuracy_interval"] == [0.5, 0.5]
    assert coin["cross_entropy"] == pytest.approx(math.log(2)) and coin["expected_calibration_error"] == 0


# ------------------------------------------------------------------------------------------------ intervals


def test_the_interval_is_the_normal_one_for_many_prompts_of_one_pair():
    """400 pairs of which 300 are right: .75 ± 1.96 √(.75 · .25/400)."""
    pairs = [pair(str(n), "a", "b") for n in range(400)]
    low, high = interval(pairs, torch.tensor([0.9] * 300 + [0.2] * 100))
    spread = 1.96 * math.sqrt(0.75 * 0.25 / 400)
    assert low == pytest.approx(0.75 - spread, abs=0.006) and high == pytest.approx(0.75 + spread, abs=0.006)


def test_pairs_of_one_prompt_are_drawn_together_and_ties_do_not_count():
    """What is said nine times of each prompt is no more certain than what is said once."""
    pairs, preference = [pair(str(n), "a", "b") for n in range(40)], [0.9] * 30 + [0.2] * 10
    once = interval(pairs, torch.tensor(preference))
    ties = [pair(str(n % 40), "a", "b", 0.5) for n in range(80)]
    assert interval(pairs * 9 + ties, torch.tensor(preference * 9 + [0.9] * 80)) == pytest.approx(once)


# ------------------------------------------------------------------------------------------------ stopped and continued


def played(flags, moment):
    """The body of a child process."""
    torch.set_num_threads(1)
    children.arm(*moment)
    sys.exit(main(flags))


MOMENTS = {  # a process is killed at its n-th write of such a file
    "before the training": ("before", "held-out.jsonl", 1),
    "within the training": ("after", "fit-3", 1),
    "as the judge gets its name": ("after", "run/judge", 1),
    "between two sets": ("before", "LLMBar-Neighbor.jsonl", 1),
    "before the figure": ("after", "report.json", 1),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_and_continued_it_ends_with_the_same_bytes(world, whole, tmp_path, moment):
    flags = arguments(world, tmp_path / "run")
    child = children.processes().Process(target=played, args=(flags, MOMENTS[moment]))
    child.start()
    child.join(60)
    assert child.exitcode == -signal.SIGKILL
    assert main(flags) == 0
    assert kept(tmp_path / "run") == kept(whole)


def test_a_finished_folder_is_read_and_nothing_is_trained_or_asked_again(world, whole, monkeypatch):
    before = kept(whole)
    monkeypatch.setattr(prefmodel, "train_preference_model", None)
    monkeypatch.setattr(command, "load_judge", None)
    assert main(arguments(world, whole)) == 0
    assert kept(whole) == before


def test_control_c_says_where_the_same_command_continues(world, tmp_path, capsys, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(prefmodel, "train_step", interrupted)
    assert main(arguments(world, tmp_path / "run")) == 130
    assert f"the same command continues in {tmp_path / 'run'}" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("flag", "value", "said"),
    [
        ("--seed", 1, "started with --seed 0, now it is 1"),
        ("--lr", 1e-3, "started with --lr 3e-05, now it is 0.001"),
        ("--held-out", 0.5, "started with --held-out 0.25, now it is 0.5"),
        ("--epochs", 0, "--epochs is 0, expected at least 1"),
    ],
)
def test_other_settings_in_an_old_folder_are_refused(world, whole, capsys, flag, value, said):
    before = kept(whole)
    assert main(arguments(world, whole, flag, value)) == 2
    assert said in capsys.readouterr().err and kept(whole) == before


def test_other_pairs_in_an_old_folder_are_refused(world, whole, tmp_path, capsys):
    before = kept(whole)
    other = tmp_path / "other.jsonl"
    other.write_text("".join((world / "pandalm.jsonl").read_text().splitlines(keepends=True)[1:]))
    assert main(arguments(world, whole, "--pandalm", other)) == 2
    assert "jsonl: holds other pairs than --pandalm gives; choose another --out" in capsys.readouterr().err
    assert kept(whole) == before


def test_preferences_of_other_pairs_are_refused(world, whole, tmp_path, capsys):
    lines = (world / "llmbar.jsonl").read_text().splitlines()
    other = tmp_path / "other.jsonl"
    other.write_text("\n".join([lines[0].replace("9+0=", "8+0="), *lines[1:]]) + "\n")
    assert main(arguments(world, whole, "--llmbar", other)) == 2
    assert "LLMBar-Natural.jsonl: not of these pairs; delete the folder" in capsys.readouterr().err


def test_a_pair_without_a_set_is_named_before_the_training(world, tmp_path, capsys):
    rows = [json.loads(line) for line in (world / "llmbar.jsonl").read_text().splitlines()]
    del rows[2]["set"]
    write_lines(tmp_path / "llmbar.jsonl", rows)
    assert main(arguments(world, tmp_path / "run", "--llmbar", tmp_path / "llmbar.jsonl")) == 2
    assert "llmbar.jsonl, line 3: expected a string under 'set', found nothing" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_missing_policy_is_named(world, tmp_path, capsys):
    assert main(arguments(world, tmp_path / "run", "--policy", tmp_path / "none")) == 2
    assert f"{tmp_path / 'none'}" in capsys.readouterr().err
