"""Claims about evaluate.py: what a run folder stands for, win rates by hand, one checkpoint for the average, bad input."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from conftest import tiny_run

import evaluate
from data import Prompt, Tokenizer
from evaluate import Sampler, bootstrap, checkpoints
from model import Transformer
from toy.text_game import SUMS, build_debugging, class_shares, payoff

stats = pytest.importorskip("scipy.stats")

PLAIN = ["--template", "plain", "--max-new-tokens", "4"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluate") / "world"
    build_debugging(folder)
    return folder


@pytest.fixture(scope="module")
def played(world, tmp_path_factory):
    """A run of three rounds that learn much, so that its policies differ."""
    folder = tmp_path_factory.mktemp("evaluate") / "run"
    tiny_run(world, folder, rounds=3, judge="toy.text_game:oracle", epochs=8)
    return folder


def sampling(**changes):
    values = dict(template="plain", max_new_tokens=4, temperature=1.0, top_p=1.0, pool=64, dtype=None, device="cpu", samples=1)
    values |= {"prompts": "prompts.jsonl"}
    return SimpleNamespace(**(values | changes))


def call(*arguments):
    return evaluate.main([str(argument) for argument in arguments])


# ------------------------------------------------------------------------------------------------ the average policy


def test_a_run_folder_stands_for_its_rounds_in_order(played, world):
    assert [path.parent.name for path in checkpoints(played)] == ["round-01", "round-02", "round-03"]
    assert checkpoints(world / "policy") == [world / "policy"]


def test_each_response_of_a_run_comes_from_a_round_drawn_at_random(played, monkeypatch):
    sampler = Sampler(played, sampling())
    monkeypatch.setattr(sampler, "sample", lambda index, prompts, samples, *_: [[[index]] for _ in prompts])
    drawn = sampler.mixture([Prompt("", [])] * 500, 4, torch.Generator().manual_seed(0))
    counts = [sum(ids == [index] for row in drawn for ids in row) for index in range(3)]
    assert sum(counts) == 2000 and stats.chisquare(counts).pvalue > 0.001
    assert sum(len({row[0][0], row[1][0]}) == 2 for row in drawn) > 200  # also within a prompt


def test_samples_of_a_run_have_the_mean_of_the_rounds_probabilities(played):
    """First tokens of 4,000 responses against the exact mean of the three policies (chi-square)."""
    sampler, counts = Sampler(played, sampling(max_new_tokens=1)), torch.zeros(18)
    prompts = sampler.prompts(["3+4="])
    exact = torch.zeros(18, dtype=torch.float64)
    for folder in checkpoints(played):
        logits = Transformer.from_pretrained(folder)(torch.tensor([prompts[0].ids]))[0, -1]
        exact += logits.detach().double().softmax(-1) / 3
    for row in sampler.mixture(prompts * 4000, 1, torch.Generator().manual_seed(1)):
        counts[row[0][0]] += 1
    large = exact > 0.01
    seen = torch.cat([counts[large], counts[~large].sum()[None]]).double()
    expected = torch.cat([exact[large], exact[~large].sum()[None]]).double()
    assert stats.chisquare(seen.numpy(), (expected * 4000 / expected.sum()).numpy()).pvalue > 0.001


def test_average_has_the_mean_of_the_rounds_weights(played, tmp_path):
    assert call("average", played, "--out", tmp_path / "average") == 0
    mean, *rounds = (Transformer.from_pretrained(folder) for folder in (tmp_path / "average", *checkpoints(played)))
    for name, value in mean.named_parameters():
        assert torch.allclose(value, sum(dict(r.named_parameters())[name] for r in rounds) / 3, atol=1e-6)
    assert Tokenizer(tmp_path / "average").encode("3+4=") == Tokenizer(checkpoints(played)[0]).encode("3+4=")


def test_distilled_model_gives_the_mixtures_samples_more_probability_than_the_last_round(played, world, tmp_path):
    flags = ["--samples", 64, "--epochs", 4, "--lr", "1e-3", "--prompts", world / "prompts.jsonl", *PLAIN]
    assert call("distill", played, "--out", tmp_path / "one", *flags) == 0
    sampler = Sampler(played, sampling())
    prompts = sampler.prompts(["3+4=", "5+9="])
    fresh = sampler.mixture(prompts, 200, torch.Generator().manual_seed(7))

    def log_likelihood(folder):
        policy, total = Transformer.from_pretrained(folder), 0.0
        for prompt, row in zip(prompts, fresh):
            tokens, mask = evaluate.pad_responses([prompt.ids] * len(row), row)
            total += evaluate.sequence_logps(policy(tokens), tokens, mask).sum().item()
        return total / 400

    assert log_likelihood(tmp_path / "one") > log_likelihood(checkpoints(played)[-1])


# ------------------------------------------------------------------------------------------------ outputs


def test_outputs_are_alpaca_evals_and_repeat_with_the_seed(played, world, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        flags = ["--prompts", world / "prompts.jsonl", "--out", tmp_path / f"{name}.json", "--seed", seed, "--name", "me", *PLAIN]
        assert call("outputs", "--policy", played, *flags) == 0
    a, b, c = (json.loads((tmp_path / f"{name}.json").read_text()) for name in "abc")
    assert [row["instruction"] for row in a] == ["3+4=", "5+9="] and {row["generator"] for row in a} == {"me"}
    assert a == b and a != c


def test_best_of_n_is_what_the_judge_likes_best(world, tmp_path):
    """Under the oracle, best of 16 by the oracle beats one sample nearly always."""
    flags = ["--policy", world / "policy", "--prompts", world / "prompts.jsonl", *PLAIN]
    judged = ["--judge", "toy.text_game:oracle"]
    assert call("outputs", *flags, *judged, "--best-of", 16, "--out", tmp_path / "best.json") == 0
    out = tmp_path / "rate.json"
    one = ["--policy", tmp_path / "best.json", "--against", world / "policy", "--prompts", world / "prompts.jsonl"]
    assert call("winrate", *one, *judged, "--samples", 50, "--out", out, *PLAIN) == 0
    result = json.loads(out.read_text())
    assert result["win_rate"] > 0.6 and result["interval_95"][0] <= result["win_rate"] <= result["interval_95"][1]


# ------------------------------------------------------------------------------------------------ win rate


def by_first_letter(prompt, responses):
    """'a' beats 'b' beats 'c' with probability .75."""
    rank = torch.tensor([ord(text[0]) for text in responses])
    return 0.5 + 0.25 * torch.sign(rank - rank[:, None])


def test_win_rate_of_two_outputs_files_by_hand(world, tmp_path, capsys):
    for name, texts in (("p", ("a", "b")), ("q", ("b", "bbbb"))):
        rows = [{"instruction": prompt, "output": text} for prompt, text in zip(("3+4=", "5+9="), texts)]
        (tmp_path / f"{name}.json").write_text(json.dumps(rows))
    flags = ["--prompts", world / "prompts.jsonl", "--judge", "test_evaluate:by_first_letter", "--out", tmp_path / "r.json"]
    assert call("winrate", "--policy", tmp_path / "p.json", "--against", tmp_path / "q.json", *flags) == 0
    result = json.loads((tmp_path / "r.json").read_text())
    assert result["win_rate_by_prompt"] == [0.75, 0.5] and result["win_rate"] == 0.625
    assert result["interval_95"] == [0.5, 0.75] and result["mean_characters"] == [1, 2.5]
    assert "win rate 0.6250" in capsys.readouterr().out


def test_bootstrap_interval_is_the_normal_one_for_many_values():
    values = torch.rand(2000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    low, high = bootstrap(values, torch.Generator().manual_seed(1))
    half = 1.96 * values.std().item() / 2000**0.5
    assert low == pytest.approx(values.mean().item() - half, abs=0.1 * half)
    assert high == pytest.approx(values.mean().item() + half, abs=0.1 * half)


def test_win_rates_are_near_the_exact_ones_of_the_small_world(played, world, tmp_path):
    places = [list(SUMS).index(prompt) for prompt in ("3+4=", "5+9=")]
    folders = [world / "policy", checkpoints(played)[-1]]
    base, last = (class_shares(Transformer.from_pretrained(f), Tokenizer(f))[places] for f in folders)
    exact = (last @ payoff() * base).sum(1).mean().item()
    flags = ["--prompts", world / "prompts.jsonl", "--judge", "toy.text_game:oracle", "--samples", 400, *PLAIN]
    assert call("winrate", "--policy", folders[1], "--against", folders[0], *flags, "--out", tmp_path / "r.json") == 0
    assert json.loads((tmp_path / "r.json").read_text())["win_rate"] == pytest.approx(exact, abs=0.05)


def test_win_matrix_is_skew_symmetric_and_its_average_is_the_mean_of_the_rounds(played, world, tmp_path):
    flags = ["--prompts", world / "prompts.jsonl", "--judge", "toy.text_game:oracle", "--samples", 8, *PLAIN]
    assert call("winrate", "--policy", played, *flags, "--out", tmp_path / "m.json") == 0
    result = json.loads((tmp_path / "m.json").read_text())
    table = torch.tensor(result["win_rate"])
    assert result["policies"] == ["base", "round 1", "round 2", "round 3", "average"]
    assert torch.allclose(table + table.T, torch.ones(5, 5), atol=1e-6)
    assert torch.allclose(table[-1], table[1:4].mean(0), atol=1e-6)
    assert (tmp_path / "m.png").read_bytes().startswith(b"\x89PNG")
    assert call("winrate", "--policy", played, *flags, "--out", tmp_path / "e.json", "--every", 2) == 0
    assert json.loads((tmp_path / "e.json").read_text())["policies"] == ["base", "round 2", "average"]


def test_win_matrix_counts_every_pair_of_rounds_in_which_the_later_one_loses(world, tmp_path, monkeypatch):
    """Policies that say only their own number; to the judge the smaller one is better, so every later round loses."""
    for number in range(1, 4):
        shutil.copytree(world / "policy", tmp_path / f"run/round-0{number}/policy")
    (tmp_path / "run/config.json").write_text(json.dumps({"policy": str(world / "policy")}))
    monkeypatch.setattr(Sampler, "sample", lambda self, index, prompts, samples, *_: [[[index]] * samples for _ in prompts])
    monkeypatch.setattr(Sampler, "texts", lambda self, prompts, rows: [["abcd"[ids[0]] for ids in row] for row in rows])
    flags = ["--prompts", world / "prompts.jsonl", "--judge", "test_evaluate:by_first_letter", *PLAIN]
    assert call("winrate", "--policy", tmp_path / "run", "--out", tmp_path / "m.json", *flags) == 0
    result = json.loads((tmp_path / "m.json").read_text())
    assert (result["later_loses_to_earlier"], result["pairs_of_rounds"]) == (3, 3)  # the base, which beats all, apart
    assert result["win_rate"][1][:4] == [0.25, 0.5, 0.75, 0.75]


def test_two_policies_sampled_with_one_seed_are_independent(world, tmp_path):
    """The same weights under two names: with common random numbers every response would be the same."""
    shutil.copytree(world / "policy", tmp_path / "copy")
    rows = [{"prompt": prompt} for prompt in SUMS]
    (tmp_path / "all.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, policy in (("a", world / "policy"), ("b", tmp_path / "copy")):
        flags = ["--prompts", tmp_path / "all.jsonl", "--out", tmp_path / f"{name}.json", *PLAIN]
        assert call("outputs", "--policy", policy, *flags) == 0
    a, b = ([row["output"] for row in json.loads((tmp_path / f"{name}.json").read_text())] for name in "ab")
    assert sum(x == y for x, y in zip(a, b)) < 60


def test_a_judge_of_places_finds_a_file_equal_to_itself(world, tmp_path):
    (tmp_path / "all.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in SUMS))
    (tmp_path / "o.json").write_text(json.dumps([{"instruction": prompt, "output": "7."} for prompt in SUMS]))
    flags = ["--prompts", tmp_path / "all.jsonl", "--judge", "test_evaluate:by_place", "--out", tmp_path / "r.json"]
    assert call("winrate", "--policy", tmp_path / "o.json", "--against", tmp_path / "o.json", *flags) == 0
    assert 0.35 < json.loads((tmp_path / "r.json").read_text())["win_rate"] < 0.65


def by_place(prompt, responses):
    place = torch.arange(len(responses))
    return 0.5 + 0.4 * torch.sign(place - place[:, None])


# ------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    "content, words",
    [
        ("{}", "expected a JSON list, found dict"),
        ('[{"instruction": "3+4="}]', "row 1: expected a string under 'output', found nothing"),
        ('[{"instruction": "3+4=", "output": "7."}, 5]', "row 2: expected a JSON object, found int"),
        (
            '[{"instruction": "3+4=", "output": "7."}, {"instruction": "5+9=", "output": "1."}, '
            '{"instruction": "5+9=", "output": "2."}]',
            "instruction '5+9=' has 2 outputs, expected 1",
        ),
        ('[{"instruction": "1+1=", "output": "2."}]', "no output for 2 of the 2 prompts, the first is '3+4='"),
        ("[", "not valid JSON"),
    ],
)
def test_an_outputs_file_that_does_not_fit_is_one_sentence(world, tmp_path, capsys, content, words):
    (tmp_path / "o.json").write_text(content)
    flags = ["--prompts", world / "prompts.jsonl", "--judge", "toy.text_game:oracle", *PLAIN]
    assert call("winrate", "--policy", tmp_path / "o.json", "--against", world / "policy", *flags) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert words in error[-1] and error[-1].startswith("evaluate.py: ") and "Traceback" not in "".join(error)


def test_other_mistakes_are_one_sentence(world, played, tmp_path, capsys):
    prompts, oracle = ["--prompts", world / "prompts.jsonl"], ["--judge", "toy.text_game:oracle"]
    (tmp_path / "there").mkdir()
    (tmp_path / "there/file").write_text("")
    mistakes = {
        ("winrate", "--policy", world / "policy", *prompts, *oracle): "--against is missing",
        ("winrate", "--policy", tmp_path, "--against", played, *prompts, *oracle): "neither a checkpoint (config.json) nor a run",
        ("outputs", "--policy", played, *prompts, "--best-of", 4, "--out", tmp_path / "o"): "--best-of needs a --judge",
        ("outputs", "--policy", played, *prompts, "--best-of", 0, "--out", tmp_path / "o"): "--best-of is 0, expected at least 1",
        ("outputs", "--policy", played, *prompts, "--out", tmp_path): "expected the name of a JSON file",
        ("winrate", "--policy", played, *prompts, *oracle, "--every", 9, *PLAIN): "--every is 9, but the run has 3 rounds",
        ("winrate", "--policy", played, *prompts, *oracle, "--out", tmp_path / "m.png"): "expected the name of a JSON file",
        ("winrate", "--policy", played, *prompts, *oracle, "--temperature", -1): "--temperature is -1.0, expected from 0",
        ("winrate", "--policy", played, *prompts, *oracle, "--top-p", "nan"): "--top-p is nan, expected from",
        ("winrate", "--policy", played, *prompts, "--judge", ".nowhere:rule"): "judge .nowhere:rule",
        ("outputs", "--policy", played, *prompts, "--out", tmp_path / "o", "--template", "plain"): "more than the context",
        ("average", played, "--out", tmp_path / "there"): "exists already",
        ("average", tmp_path, "--out", tmp_path / "new"): "neither a checkpoint",
    }
    for arguments, words in mistakes.items():
        assert call(*arguments) == 2
        assert words in capsys.readouterr().err
