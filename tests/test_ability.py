"""Claims about what is measured beside the preferences: perplexity, sums (real/ability.py), and IFEval's scores."""

import json
import math
import sys
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, tiny_run
from scipy.stats import bootstrap

from data import Tokenizer
from engine.files import write_lines
from model import Transformer
from real import ability, ifeval
from toy.debug import build_debugging

sys.path.append(str(ROOT / "benchmarks"))  # last: real/ is a folder of ours, and real.py a file there

import score_ifeval


@pytest.fixture(scope="module")
def played(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ability")
    build_debugging(folder)
    tiny_run(folder, folder / "run")
    return folder


@pytest.mark.parametrize(
    "answer, right",
    [
        ("42", True),
        ("17 + 25 = 42.", True),
        ("The sum of 17 and 25 is 42", True),
        ("17 plus 25 makes forty-two, 42", True),
        ("It is 1,042", False),
        ("43, or 42", False),
        ("17 + 25 = 17 + 25", False),
        ("forty-two", False),
        ("142", False),
        ("", False),
    ],
)
def test_a_sum_is_right_if_the_first_number_that_is_not_the_question_is_it(answer, right):
    assert ability.is_right(answer, 17, 25) is right


def test_the_sums_are_a_hundred_of_two_digits_and_always_the_same():
    pairs = ability.sums()
    assert len(pairs) == 100 and pairs == ability.sums() and len(set(pairs)) > 90
    assert all(10 <= number <= 99 for pair in pairs for number in pair)


def test_the_texts_likelihood_is_torchs_cross_entropy(tiny_model):
    tokens = torch.randint(50, (60,), generator=torch.Generator().manual_seed(0)).tolist()
    with torch.no_grad():
        logits = tiny_model(torch.tensor([tokens]))[0]
    expected = -F.cross_entropy(logits[:-1], torch.tensor(tokens[1:]), reduction="sum").item()
    assert ability.text_logp(tiny_model, tokens) == pytest.approx(expected, rel=1e-5)


def test_the_average_policys_likelihood_is_the_mean_of_the_rounds(played, monkeypatch, tmp_path, capsys):
    """Of likelihoods, not of their logarithms; and it lies between the worst and the best of the rounds."""
    monkeypatch.setattr(ability, "TEXT", "3+4=7. 5+9=14!")
    monkeypatch.setattr(ability, "right_sums", lambda policy, tokenizer: [True, False, False, False])
    out = tmp_path / "ability.json"
    assert ability.main(["--base", f"{played}/policy", "--run", f"{played}/run", "--out", str(out)]) == 0
    result = json.loads(out.read_text())
    policies, n = result["policies"], result["tokens"] - 1
    assert list(policies) == ["base", "round-01", "round-02", "average"]
    assert ability.main(["--base", f"{played}/policy", "--run", f"{played}/run", "--out", str(out)]) == 2

    chance = [math.exp(-n * policies[name]["nats_per_token"]) for name in ("round-01", "round-02")]
    assert math.exp(-n * policies["average"]["nats_per_token"]) == pytest.approx(sum(chance) / 2, rel=1e-6)
    text = Tokenizer(played / "policy").encode("3+4=7. 5+9=14!")
    base = ability.text_logp(Transformer.from_pretrained(played / "policy"), text)
    assert policies["base"]["perplexity"] == pytest.approx(math.exp(-base / n)) and policies["base"]["sums"] == 0.25
    assert "perplexity" in capsys.readouterr().out


def test_a_run_without_policies_is_refused_before_anything_is_measured(played, tmp_path, capsys):
    given = ["--base", f"{played}/policy", "--run", str(tmp_path), "--out", str(tmp_path / "a.json")]
    assert ability.main(given) == 2 and "no round-NN/policy there" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------ IFEval


def test_ifevals_answers_are_greedy_and_keep_the_lines_that_the_checkers_read(played, tmp_path):
    rows = [{"key": n, "prompt": text, "instruction_id_list": ["a:b"], "kwargs": [{}]} for n, text in enumerate(["3+4=", "5+9="])]
    write_lines(tmp_path / "prompts.jsonl", rows)
    given = ["--prompts", f"{tmp_path}/prompts.jsonl", "--template", "plain", "--max-new-tokens", "4"]
    for name, seed in (("one", "0"), ("two", "7")):
        assert ifeval.main([*given, "--policy", f"{played}/policy", "--out", f"{tmp_path}/{name}.jsonl", "--seed", seed]) == 0
    answered = [json.loads(line) for line in (tmp_path / "one.jsonl").read_text().splitlines()]
    assert [{name: row[name] for name in rows[0]} for row in answered] == rows
    assert all(row["response"] for row in answered)
    assert (tmp_path / "one.jsonl").read_bytes() == (tmp_path / "two.jsonl").read_bytes()  # nothing is drawn


def test_ifevals_rates_are_counted_by_prompt_and_by_instruction():
    """Three prompts with 1, 2 and 3 instructions, of which 1, 1 and 3 are followed: 2/3, and 5/6."""
    rows = score_ifeval.shares([[True], [True, False], [True, True, True]])
    assert score_ifeval.rates(rows).tolist() == pytest.approx([2 / 3, 5 / 6])


def test_ifevals_interval_is_scipys_bootstrap():
    draw = torch.Generator().manual_seed(2)
    rows = score_ifeval.shares([[bool(x)] for x in torch.randint(2, (150,), generator=draw).tolist()])
    resampled = torch.randint(150, (4000, 150), generator=draw)
    ours = score_ifeval.interval(score_ifeval.rates(rows[resampled])[:, 0])
    theirs = bootstrap((rows[:, 0].numpy(),), lambda x, axis: x.mean(axis), n_resamples=4000, method="percentile", random_state=0)
    assert ours == pytest.approx(list(theirs.confidence_interval), abs=0.01)


def test_ifevals_checkers_know_what_was_asked(tmp_path):
    """lm_eval's, where it is installed: no comma; at least two sentences, which are split by a rule of ours."""
    pytest.importorskip("lm_eval")
    ids = ["punctuation:no_comma", "length_constraints:number_sentences"]
    kwargs = [{}, {"relation": "at least", "num_sentences": 2}]
    row = {"key": 1, "prompt": "x", "instruction_id_list": ids, "kwargs": kwargs}
    texts = ["One. Two.", "One, two.", "One, two. Three!"]
    write_lines(tmp_path / "answers.jsonl", [row | {"response": text} for text in texts])
    followed = score_ifeval.follows(score_ifeval.load_checker(), tmp_path / "answers.jsonl")
    assert Counter(map(tuple, followed)) == Counter([(True, True), (False, False), (False, True)])
