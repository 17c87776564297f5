"""Claims about the commands of evaluate: what a run stands for, win rates by hand, bad input."""

import json
import os
import shutil
from argparse import Namespace

import pytest
import torch
from conftest import tiny_run

from data import Prompt, Tokenizer
from engine.files import write_lines
from evaluate import __main__ as evaluate
from evaluate.__main__ import Sampler, bootstrap, checkpoints, generator_of
from model import Transformer
from generate import response_logps
from toy.debug import build_debugging
from toy.text_game import SUMS, class_shares, payoff

stats = pytest.importorskip("scipy.stats")

PLAIN = ["--template", "plain", "--max-new-tokens", "4"]
ORACLE = ["--judge", "toy.text_game:oracle"]


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


@pytest.fixture
def prompts(world):
    return ["--prompts", world / "prompts.jsonl"]


def sampling(**changes):
    values = dict(template="plain", max_new_tokens=4, temperature=1.0, top_p=1.0, pool=64)
    values |= dict(dtype=None, device="cpu", threads=None, prompts="prompts.jsonl")
    return Namespace(**(values | changes))


def call(*arguments):
    return evaluate.main([str(argument) for argument in arguments])


def read(path):
    return json.loads(path.read_text())


# ------------------------------------------------------------------------ the average policy


def test_a_run_folder_stands_for_its_rounds_in_order(played, world):
    rounds = [path.parent.name for path in checkpoints(played)]
    assert rounds == ["round-01", "round-02", "round-03"]
    assert checkpoints(world / "policy") == [world / "policy"]


def test_each_response_of_a_run_comes_from_a_round_drawn_at_random(played, monkeypatch):
    sampler = Sampler(played, sampling())

    def number(index, prompts, samples, *_):
        return [[[index]] for _ in prompts]

    monkeypatch.setattr(sampler, "sample", number)
    drawn = sampler.mixture([Prompt("", [])] * 500, 4, torch.Generator().manual_seed(0))
    counts = [sum(ids == [index] for row in drawn for ids in row) for index in range(3)]
    assert sum(counts) == 2000 and stats.chisquare(counts).pvalue > 0.001
    assert sum(len({row[0][0], row[1][0]}) == 2 for row in drawn) > 200  # also within a prompt


def test_samples_of_a_run_have_the_mean_of_the_rounds_probabilities(played):
    """First tokens of 4,000 responses against the exact mean of the three policies (chi-square)."""
    sampler = Sampler(played, sampling(max_new_tokens=1))
    ready = sampler.prompts(["3+4="])
    exact = torch.zeros(18, dtype=torch.float64)
    for folder in checkpoints(played):
        logits = Transformer.from_pretrained(folder)(torch.tensor([ready[0].ids]))[0, -1]
        exact += logits.detach().double().softmax(-1) / 3
    counts = torch.zeros(18)
    for row in sampler.mixture(ready * 4000, 1, torch.Generator().manual_seed(1)):
        counts[row[0][0]] += 1
    large = exact > 0.01
    seen = torch.cat([counts[large], counts[~large].sum()[None]]).double()
    expected = torch.cat([exact[large], exact[~large].sum()[None]]).double()
    assert stats.chisquare(seen.numpy(), (expected * 4000 / expected.sum()).numpy()).pvalue > 0.001


def test_average_has_the_mean_of_the_rounds_weights(played, tmp_path):
    out = tmp_path / "average"
    assert call("average", played, "--out", out) == 0
    mean = Transformer.from_pretrained(out)
    rounds = [Transformer.from_pretrained(folder) for folder in checkpoints(played)]
    for name, value in mean.named_parameters():
        total = sum(dict(policy.named_parameters())[name] for policy in rounds)
        assert torch.allclose(value, total / 3, atol=1e-6)
    assert Tokenizer(out).encode("3+4=") == Tokenizer(checkpoints(played)[0]).encode("3+4=")


def test_distilled_model_gives_the_mixtures_samples_more_probability_than_the_last_round(played, prompts, tmp_path):
    flags = ["--samples", 64, "--epochs", 4, "--lr", "1e-3", *prompts, *PLAIN]
    assert call("distill", played, "--out", tmp_path / "one", *flags) == 0
    sampler = Sampler(played, sampling())
    ready = sampler.prompts(["3+4=", "5+9="])
    fresh = sampler.mixture(ready, 200, torch.Generator().manual_seed(7))

    def log_likelihood(folder):
        policy = Transformer.from_pretrained(folder)
        total = 0.0
        for prompt, row in zip(ready, fresh):
            total += response_logps(policy, [prompt.ids], [row]).sum().item()
        return total / 400

    assert log_likelihood(tmp_path / "one") > log_likelihood(checkpoints(played)[-1])


# ------------------------------------------------------------------------ outputs


def test_outputs_are_alpaca_evals_and_repeat_with_the_seed(played, prompts, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        flags = ["--out", tmp_path / f"{name}.json", "--seed", seed, "--name", "me", *PLAIN]
        assert call("outputs", "--policy", played, *prompts, *flags) == 0
    a, b, c = (read(tmp_path / f"{name}.json") for name in "abc")
    assert [row["instruction"] for row in a] == ["3+4=", "5+9="]
    assert {row["generator"] for row in a} == {"me"}
    assert a == b and a != c


def test_best_of_n_is_what_the_judge_likes_best(world, prompts, tmp_path):
    """Under the oracle, best of 16 by the oracle beats one sample nearly always."""
    base = world / "policy"
    best = tmp_path / "best.json"
    flags = [*prompts, *ORACLE, *PLAIN]
    assert call("outputs", "--policy", base, "--best-of", 16, "--out", best, *flags) == 0

    out = tmp_path / "rate.json"
    flags += ["--samples", 50, "--out", out]
    assert call("winrate", "--policy", best, "--against", base, *flags) == 0
    result = read(out)
    assert result["win_rate"] > 0.6
    assert result["interval_95"][0] <= result["win_rate"] <= result["interval_95"][1]


@pytest.mark.parametrize("policy", [".", "round-02/policy"])
def test_a_run_is_asked_with_the_template_that_it_was_trained_with(policy, played, prompts, tmp_path, capsys):
    """It says so in its config.json; no flag is needed, and one that contradicts is refused."""
    given = ["outputs", "--policy", played / policy, *prompts, "--max-new-tokens", 4, "--name", "x", "--out"]
    assert call(*given, tmp_path / "unset.json") == 0
    assert call(*given, tmp_path / "plain.json", "--template", "plain") == 0
    assert read(tmp_path / "unset.json") == read(tmp_path / "plain.json")
    assert call(*given, tmp_path / "chat.json", "--template", "chat") == 2
    assert "was trained with --template plain, and is not asked with chat" in capsys.readouterr().err
    assert not (tmp_path / "chat.json").exists()


def test_without_a_run_the_template_is_the_checkpoints_own(world, prompts, tmp_path, capsys):
    """This one has none, and that is said."""
    assert call("outputs", "--policy", world / "policy", *prompts, "--out", tmp_path / "a.json") == 2
    assert "chat_template" in capsys.readouterr().err


def broken(prompt, responses):
    return {}["key"]


@pytest.mark.parametrize("command", ["outputs", "winrate"])
def test_a_judge_that_fails_is_known_before_anything_is_sampled(command, world, prompts, tmp_path, capsys, monkeypatch):
    """One sentence, with the line of the rule."""
    monkeypatch.setattr(Sampler, "sample", None)
    words = [
        command,
        "--policy",
        world / "policy",
        *prompts,
        *PLAIN,
        "--judge",
        "test_evaluate:broken",
        "--out",
        tmp_path / "a.json",
    ]
    words += ["--best-of", 2] if command == "outputs" else ["--against", world / "policy"]
    assert call(*words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert (
        line.startswith("evaluate: before the first response: judge broken, prompt '")
        and "KeyError: 'key' (test_evaluate.py:" in line
    )
    assert not (tmp_path / "a.json").exists()


# ------------------------------------------------------------------------ win rate


def by_first_letter(prompt, responses):
    """'a' beats 'b' beats 'c' with probability .75."""
    rank = torch.tensor([ord(text[0]) for text in responses])
    return 0.5 + 0.25 * torch.sign(rank - rank[:, None])


def test_win_rate_of_two_outputs_files_by_hand(prompts, tmp_path, capsys):
    p, q, out = (tmp_path / f"{name}.json" for name in "pqr")
    for path, texts in ((p, ("a", "b")), (q, ("b", "bbbb"))):
        answers = zip(("3+4=", "5+9="), texts)
        rows = [{"instruction": prompt, "output": text} for prompt, text in answers]
        path.write_text(json.dumps(rows))
    flags = [*prompts, "--judge", "test_evaluate:by_first_letter", "--out", out]
    assert call("winrate", "--policy", p, "--against", q, *flags) == 0
    result = read(out)
    assert result["win_rate_by_prompt"] == [0.75, 0.5] and result["win_rate"] == 0.625
    assert result["interval_95"] == [0.5, 0.75] and result["mean_characters"] == [1, 2.5]
    assert "win rate 0.6250" in capsys.readouterr().out


def test_bootstrap_interval_is_the_normal_one_for_many_values():
    values = torch.rand(2000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    low, high = bootstrap(values, torch.Generator().manual_seed(1))
    half = 1.96 * values.std().item() / 2000**0.5
    assert low == pytest.approx(values.mean().item() - half, abs=0.1 * half)
    assert high == pytest.approx(values.mean().item() + half, abs=0.1 * half)


def test_win_rates_are_near_the_exact_ones_of_the_small_world(played, world, prompts, tmp_path):
    places = [list(SUMS).index(prompt) for prompt in ("3+4=", "5+9=")]
    base = world / "policy"
    last = checkpoints(played)[-1]
    shares = [class_shares(Transformer.from_pretrained(folder), Tokenizer(folder))[places] for folder in (base, last)]
    exact = (shares[1] @ payoff() * shares[0]).sum(1).mean().item()
    flags = [*prompts, *ORACLE, *PLAIN, "--samples", 400, "--out", tmp_path / "r.json"]
    assert call("winrate", "--policy", last, "--against", base, *flags) == 0
    assert read(tmp_path / "r.json")["win_rate"] == pytest.approx(exact, abs=0.05)


def test_win_matrix_is_skew_symmetric_and_its_average_is_the_mean_of_the_rounds(played, prompts, tmp_path):
    flags = ["--policy", played, *prompts, *ORACLE, "--samples", 8, *PLAIN]
    assert call("winrate", *flags, "--out", tmp_path / "m.json") == 0
    result = read(tmp_path / "m.json")
    table = torch.tensor(result["win_rate"])
    assert result["policies"] == ["base", "round 1", "round 2", "round 3", "average"]
    assert torch.allclose(table + table.T, torch.ones(5, 5), atol=1e-6)
    assert torch.allclose(table[-1], table[1:4].mean(0), atol=1e-6)
    assert (tmp_path / "m.png").read_bytes().startswith(b"\x89PNG")
    assert call("winrate", *flags, "--out", tmp_path / "e.json", "--every", 2) == 0
    assert read(tmp_path / "e.json")["policies"] == ["base", "round 2", "average"]


def test_win_matrix_counts_every_pair_of_rounds_in_which_the_later_one_loses(world, prompts, tmp_path, monkeypatch):
    """Policies that say only their own number: to the judge the smaller one is better."""
    run = tmp_path / "run"
    for number in range(1, 4):
        shutil.copytree(world / "policy", run / f"round-0{number}/policy")
    (run / "config.json").write_text(json.dumps({"policy": str(world / "policy")}))

    def number(self, index, prompts, samples, *_):
        return [[[index]] * samples for _ in prompts]

    def letters(self, prompts, rows):
        return [["abcd"[ids[0]] for ids in row] for row in rows]

    monkeypatch.setattr(Sampler, "sample", number)
    monkeypatch.setattr(Sampler, "texts", letters)
    flags = [*prompts, "--judge", "test_evaluate:by_first_letter", *PLAIN]
    assert call("winrate", "--policy", run, "--out", tmp_path / "m.json", *flags) == 0
    result = read(tmp_path / "m.json")
    assert result["later_loses_to_earlier"] == 3  # the base, which beats all, apart
    assert result["pairs_of_rounds"] == 3
    assert result["win_rate"][1][:4] == [0.25, 0.5, 0.75, 0.75]


def write_sums(path):
    path.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in SUMS))
    return path


def test_two_policies_sampled_with_one_seed_are_independent(world, tmp_path):
    """The same weights under two names: with one seed for both, every response would be equal."""
    shutil.copytree(world / "policy", tmp_path / "copy")
    flags = ["--prompts", write_sums(tmp_path / "all.jsonl"), *PLAIN]
    for name, policy in (("a", world / "policy"), ("b", tmp_path / "copy")):
        out = tmp_path / f"{name}.json"
        assert call("outputs", "--policy", policy, "--out", out, *flags) == 0
    a, b = ([row["output"] for row in read(tmp_path / f"{name}.json")] for name in "ab")
    assert sum(x == y for x, y in zip(a, b)) < 60


def test_one_policy_samples_alike_however_its_path_is_spelled(world, tmp_path):
    policy = world / "policy"
    flags = ["--prompts", write_sums(tmp_path / "all.jsonl"), *PLAIN]
    spellings = [policy, f"{policy}/", f"{world}/./policy", os.path.relpath(policy)]
    written = []
    for number, spelling in enumerate(spellings):
        out = tmp_path / f"{number}.json"
        assert call("outputs", "--policy", spelling, "--out", out, *flags) == 0
        written.append(read(out))
    assert all(rows == written[0] for rows in written)


def test_the_seed_of_a_relative_path_is_that_of_its_spelling(tmp_path, monkeypatch):
    """Nothing of the machine enters: the same project in two places samples the same numbers."""
    seeds = set()
    for place in ("one", "two"):
        (tmp_path / place / "out/run").mkdir(parents=True)
        monkeypatch.chdir(tmp_path / place)
        for spelling in ("out/run", "out/run/", "./out/run", tmp_path / place / "out/run"):
            args = Namespace(command="average", run_folder=spelling, seed=0)
            seeds.add(generator_of(args).initial_seed())
    assert len(seeds) == 1
    args = Namespace(command="average", run_folder="out/walk", seed=0)
    assert generator_of(args).initial_seed() not in seeds


def test_a_judge_of_places_finds_a_file_equal_to_itself(tmp_path):
    rows = [{"instruction": prompt, "output": "7."} for prompt in SUMS]
    same = tmp_path / "o.json"
    same.write_text(json.dumps(rows))
    flags = ["--prompts", write_sums(tmp_path / "all.jsonl"), "--judge", "test_evaluate:by_place"]
    flags += ["--out", tmp_path / "r.json"]
    assert call("winrate", "--policy", same, "--against", same, *flags) == 0
    assert 0.35 < read(tmp_path / "r.json")["win_rate"] < 0.65


def by_place(prompt, responses):
    place = torch.arange(len(responses))
    return 0.5 + 0.4 * torch.sign(place - place[:, None])


# ------------------------------------------------------------------------ bad input


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
def test_an_outputs_file_that_does_not_fit_is_one_sentence(world, prompts, tmp_path, capsys, content, words):
    path = tmp_path / "o.json"
    path.write_text(content)
    flags = ["--against", world / "policy", *prompts, *ORACLE, *PLAIN]
    assert call("winrate", "--policy", path, *flags) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert words in error[-1] and error[-1].startswith("evaluate: ")
    assert "Traceback" not in "".join(error)


def test_nothing_is_written_over_a_result(played, world, prompts, tmp_path, capsys):
    """Before anything is loaded, by a sentence with the flag; what the same command has finished it says."""
    write_lines(tmp_path / "pairs.jsonl", [{"prompt": "3+4=", "chosen": "7.", "rejected": "8."}])
    asked = [*prompts, *PLAIN]
    commands = {
        "outputs.json": ["outputs", "--policy", world / "policy", *asked],
        "matrix.json": ["winrate", "--policy", played, *ORACLE, *asked],
        "versus.json": ["winrate", "--policy", world / "policy", "--against", played, *ORACLE, *asked],
        "distilled": ["distill", played, *asked, "--samples", 2, "--epochs", 1],
        "average": ["average", played],
        "report/report.json": ["judge", "--pairs", tmp_path / "pairs.jsonl", *ORACLE],
    }
    for name, words in commands.items():
        mine = tmp_path / "mine" / name
        mine.parent.mkdir(parents=True, exist_ok=True)
        if "." in name:
            mine.write_text("mine")
        else:
            (mine / "file").mkdir(parents=True)
        assert call(*words, "--out", tmp_path / "mine" / name.split("/")[0]) == 2
        assert f"{mine}: exists already, and nothing is written over it; choose another --out" in capsys.readouterr().err

        out = tmp_path / "new" / name.split("/")[0]
        assert call(*words, "--out", out) == 0
        before = {path: path.read_bytes() for path in (tmp_path / "new").rglob("*") if path.is_file()}
        again = call(*words, "--out", out)
        told = capsys.readouterr()
        # Only a folder has room for what it was made from.
        assert again == (0 if name == "distilled" else 2), told.err
        assert ("distilled: finished already" if name == "distilled" else "exists already") in told.out + told.err
        assert before == {path: path.read_bytes() for path in (tmp_path / "new").rglob("*") if path.is_file()}
    assert call(*commands["distilled"], "--out", tmp_path / "new/distilled", "--seed", 1) == 2


@pytest.mark.parametrize("name", ["outputs", "judge"])
def test_what_was_killed_after_its_last_step_is_finished(name, world, prompts, tmp_path, capsys, monkeypatch):
    write_lines(tmp_path / "pairs.jsonl", [{"prompt": "3+4=", "chosen": "7.", "rejected": "8."}])
    words = ["judge", "--pairs", tmp_path / "pairs.jsonl", *ORACLE]
    if name == "outputs":
        words = ["outputs", "--policy", world / "policy", *prompts, *PLAIN]
    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "remove", lambda path: None)
        assert call(*words, "--out", tmp_path / "new.json") == 0
    assert (tmp_path / "new.json.unfinished").exists()
    assert call(*words, "--out", tmp_path / "new.json") == 0
    assert "finished already" in capsys.readouterr().out and not (tmp_path / "new.json.unfinished").exists()


def test_other_mistakes_are_one_sentence(world, played, prompts, tmp_path, capsys):
    there = tmp_path / "there"
    there.mkdir()
    (there / "file").write_text("")
    policy = world / "policy"
    out = ["--out", tmp_path / "o"]
    rates = ["winrate", "--policy", played, *prompts, *ORACLE]
    texts = ["outputs", "--policy", played, *prompts]
    both = ["winrate", "--policy", tmp_path, "--against", played, *prompts, *ORACLE]
    nowhere = "neither a checkpoint (config.json) nor a run"
    one_file = "expected the name of a JSON file"
    mistakes = [
        (["winrate", "--policy", policy, *prompts, *ORACLE], "--against is missing"),
        (both, nowhere),
        ([*texts, "--best-of", 4, *out], "--best-of needs a --judge"),
        ([*texts, "--best-of", 0, *out], "--best-of is 0, expected at least 1"),
        ([*texts, "--out", tmp_path], one_file),
        ([*rates, "--every", 9, *PLAIN], "--every is 9, but the run has 3 rounds"),
        ([*rates, "--out", tmp_path / "m.png"], one_file),
        ([*rates, "--temperature", -1], "--temperature is -1.0, expected from 0"),
        ([*rates, "--top-p", "nan"], "--top-p is nan, expected from"),
        ([*rates, "--judge", ".nowhere:rule"], "judge .nowhere:rule"),
        ([*texts, *out, "--template", "plain"], "more than the context"),
        (["average", played, "--out", there], "exists already"),
        (["average", tmp_path, "--out", tmp_path / "new"], "neither a checkpoint"),
    ]
    for arguments, words in mistakes:
        assert call(*arguments) == 2
        assert words in capsys.readouterr().err
