"""Claims about engine/trace.py and docs/one-round.md: printed numbers are the run's, and the page shows what is printed."""

import json
import math
import re

import pytest
import torch
from conftest import tiny_settings
from refresh_one_round import BLOCK, PAGE, debugging_round, refresh, shown, traced_round
from safetensors.torch import load_file

import train
from data import Tokenizer
from engine.trace import OUTSIDE, SHOWN, extremes
from model import Transformer
from sppo import row_losses
from toy import debug
from toy.debug import build_debugging

NUMBER = re.compile(r"(?<![\w'])[+-]?\d+(?:\.\d+)?(?:e[+-]\d+)?(?![\w'])")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trace") / "world"
    build_debugging(folder)
    return folder


def traced(world, out, **changes):
    """The lines of each part of a report, the rows of each as words, and the traced game."""
    game, result = traced_round(tiny_settings(world, out, rounds=1, **changes))
    parts = [part.splitlines() for part in game.report(result, row_losses).split("\n\n")]
    rows = [[line.split() for line in part[2:]] for part in parts]
    return parts, rows, game


def log_probability(folder, prompt, response):
    """log π of one response under a checkpoint: one forward pass, no padding, the sum taken by hand."""
    model = Transformer.from_pretrained(folder)
    ids = Tokenizer(folder).prompt_ids(prompt, "plain")
    with torch.no_grad():
        logits = model(torch.tensor([ids + response]))[0].double().log_softmax(-1)
    return sum(logits[len(ids) + n - 1, token].item() for n, token in enumerate(response))


def close(text, value):
    return float(text) == pytest.approx(value, rel=2e-3, abs=6e-4)


def test_every_number_is_that_of_the_files_of_the_run(world, tmp_path):
    eta = 2.0
    _, (_, sampled, judged, regressed), _ = traced(world, tmp_path / "run", samples=5, select="best-worst", eta=eta)
    folder = tmp_path / "run/round-01"
    row = json.loads((folder / "responses.jsonl").read_text().splitlines()[0])
    table = load_file(folder / "preferences.safetensors")["preferences"][0]
    rate = [sum(line) / 5 for line in table.tolist()]

    before = [log_probability(world / "policy", row["prompt"], y) for y in row["tokens"]]
    after = [log_probability(folder / "policy", row["prompt"], y) for y in row["tokens"]]
    for k, (name, logp, size, text, *ids) in enumerate(sampled):
        assert (name, text, ids) == (f"y{k + 1}", repr(row["responses"][k]), list(map(str, row["tokens"][k])))
        assert close(logp, before[k]) and int(size) == len(ids)

    for k, (_, *entries, win_rate) in enumerate(judged[:5]):
        assert list(map(float, entries)) == pytest.approx(table[k].tolist(), abs=6e-3)  # printed with two digits
        assert close(win_rate, rate[k])
    assert judged[5] == ["mean", "of", "all", "5", "0.500"]
    assert sum(float(line[-1]) for line in judged[:5]) == pytest.approx(5 / 2, abs=3e-3)

    trained = {"winner": max(rate), "loser": min(rate)}
    losses = []
    for k, (_, role, *numbers) in enumerate(regressed[:5]):
        ratio = after[k] - before[k]
        if role == "no":
            assert len(numbers) == 1 and close(numbers[0], ratio)
            continue
        assert rate[k] == trained.pop(role)
        target = eta * (rate[k] - 0.5)
        losses.append((target**2, (ratio - target) ** 2))
        assert all(map(close, numbers, (target, ratio, *losses[-1])))
    assert not trained
    assert all(map(close, regressed[5][-2:], [sum(column) / 2 for column in zip(*losses)]))


def test_the_loss_before_is_that_of_the_first_step(world, tmp_path):
    """One prompt, so that the mean over the batch is the mean over its responses."""
    (tmp_path / "one.jsonl").write_text('{"prompt": "3+4="}\n')
    changes = dict(prompts=str(tmp_path / "one.jsonl"), epochs=1)
    _, (*_, regressed), _ = traced(world, tmp_path / "run", **changes)
    steps = (tmp_path / "run/round-01/policy/steps.jsonl").read_text().splitlines()
    assert close(regressed[-1][-2], json.loads(steps[0])["loss"])


@pytest.mark.parametrize("loss", ["dpo", "ipo", "sppo-hard"])
def test_a_loss_of_pairs_has_one_number_and_no_targets(world, tmp_path, loss):
    _, (*_, regressed), game = traced(world, tmp_path / "run", loss=loss, select="best-worst")
    winner, loser = (game.after[game.chosen] - game.before[game.chosen]).tolist()
    expected = {
        "dpo": math.log1p(math.exp((loser - winner) / 2)),
        "ipo": (winner - loser - 1) ** 2,
        "sppo-hard": (winner - 1) ** 2 + (loser + 1) ** 2,
    }
    assert [len(row) for row in regressed[:3]] == [3, 3, 3]
    assert close(regressed[-1][-1], expected[loss])


def test_a_round_that_is_read_from_its_files_is_told_alike(world, tmp_path):
    assert traced(world, tmp_path / "run")[0] == traced(world, tmp_path / "run")[0]


def test_tracing_changes_no_bit_of_the_run(world, tmp_path):
    traced(world, tmp_path / "traced")
    train.run(tiny_settings(world, tmp_path / "plain", rounds=1))
    weights = [tmp_path / run / "round-01/policy/model.safetensors" for run in ("traced", "plain")]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_it_fits_a_screen_whatever_the_run_is(world, tmp_path):
    rows = [{"instruction": "3+4=", "output": f"{n}."} for n in range(7)]
    rows += [{"instruction": "5+9=", "output": f"{n}."} for n in range(7)]
    (tmp_path / "others.json").write_text(json.dumps(rows))
    changes = dict(samples=40, max_new_tokens=24, temperature=3.0, opponents=str(tmp_path / "others.json"), eta=1000.0)
    parts, rows, _ = traced(world, tmp_path / "run", **changes)
    lines = "\n\n".join(map("\n".join, parts)).splitlines()
    assert len(lines) <= 40 and max(map(len, lines)) <= 100
    assert len(rows[1]) == SHOWN and "40 responses" in parts[1][0] and f"{SHOWN} of them" in parts[1][0]
    assert "7 opponents" in parts[2][0] and parts[2][1].split()[-3 - OUTSIDE : -2] == [rows[2][-2][0], "o1", "o2", "o3", "o4"]


@pytest.mark.parametrize("rates", [[0.5] * 20, [0.9] + [0.4] * 19, [0.1] + [0.6] * 19])
def test_winner_and_loser_are_always_among_those_that_are_shown(rates):
    win_rate = torch.tensor(rates)
    some = extremes(win_rate)
    assert len(some) <= SHOWN and {win_rate.argmax().item(), win_rate.argmin().item()} <= set(some)


def test_what_ties_everywhere_is_winner_and_loser(world, tmp_path):
    _, (*_, regressed), _ = traced(world, tmp_path / "run", judge="conftest:flat", select="best-worst")
    assert [row[1] for row in regressed[:3]] == ["winner,", "no", "no"]
    assert regressed[0][2:4] == ["loser", "+0"]


# ------------------------------------------------------------------------------------------------ the page


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    return debugging_round(tmp_path_factory.mktemp("page"))


def same(page, report):
    """Whether two texts differ in the last digits of numbers only, as those of two kinds of CPU may."""
    numbers = [list(map(float, NUMBER.findall(text))) for text in (page, report)]
    words = [NUMBER.sub("#", text).split() for text in (page, report)]
    return words[0] == words[1] and numbers[0] == pytest.approx(numbers[1], rel=0.02, abs=2e-3)


def test_the_page_shows_what_the_command_prints(report):
    assert same(shown(PAGE.read_text(encoding="utf-8")), report), "python tests/refresh_one_round.py"


def test_another_number_or_word_would_be_noticed(report):
    assert same(report, report)
    assert not same(report.replace("0.800", "0.900"), report)
    assert not same(report.replace("winner", "loser"), report)
    assert not same(report.replace("'7.'", "'8.'"), report)


def test_refreshing_writes_the_report_into_the_page(report):
    page = PAGE.read_text(encoding="utf-8")
    emptied = BLOCK.sub("```text\n```", page)
    assert shown(emptied) == "" and refresh(emptied, shown(page)) == page


def test_the_command_of_the_page_prints_it(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert debug.main(["--rounds", "1"]) == 0
    told = re.search(r"^round 1, prompt .*?(?=\n\nfinished)", capsys.readouterr().out, re.M | re.S)[0]
    assert same(shown(PAGE.read_text(encoding="utf-8")), told.rstrip())
