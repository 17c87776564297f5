"""Claims about toy/stories.py: what its rule says of a text, and that rule and measurement use one payoff."""

import pytest
import torch

from data import Tokenizer
from generate import generate
from judges.load import load_judge
from model import Transformer
from sppo import win_rates
from toy.games import exploitability, nash
from toy.stories import CATEGORIES, MAX_NEW_TOKENS, PROMPTS, THEMES, classify, log_likelihood, main, payoff, rule

ANIMALS = " big dog who ran to the cake"
FOOD = " cakes for the dog and his friend"
PLAY = " red toys that were under a tree"
NONE = " walk to the park with her mom"
MALFORMED = "\ufffd\ufffd"


def category(text):
    return CATEGORIES[classify(text)]


def test_first_theme_word_decides_singular_or_plural():
    found = [category(text) for text in (ANIMALS, FOOD, PLAY, NONE)]
    assert found == ["animals", "food", "play", "none"]


def test_a_theme_word_inside_another_word_does_not_count():
    assert category(" education is a scary carpet to them") == "none"


@pytest.mark.parametrize("text", ["", " dog", "!! ?? ...", MALFORMED, 5 * " cake", " a dog ran to the \ufffd tree"])
def test_empty_short_broken_or_repetitive_text_is_malformed(text):
    assert category(text) == "malformed"


def test_no_word_belongs_to_two_themes():
    words = " ".join(THEMES.values()).split()
    assert len(words) == len(set(words))


def test_payoff_is_a_preference_whose_equilibrium_is_a_third_of_each_theme():
    win_rates(payoff())  # checks P + Pᵀ = 1
    assert torch.allclose(nash(payoff()), torch.tensor([1, 1, 1, 0, 0], dtype=torch.float64) / 3)


def test_a_policy_of_one_theme_is_fully_exploitable():
    assert exploitability(payoff(), torch.eye(5, dtype=torch.float64)).tolist() == [0.5] * 5


def test_rule_as_a_judge_runs_in_a_circle_over_none_over_malformed():
    texts = [ANIMALS, FOOD, PLAY, NONE, MALFORMED]
    table = load_judge("toy.stories:rule").preferences(PROMPTS[0], texts)
    expected = [[0.5, 1, 0, 1, 1], [0, 0.5, 1, 1, 1], [1, 0, 0.5, 1, 1], [0, 0, 0, 0.5, 1], [0, 0, 0, 0, 0.5]]
    assert table.tolist() == expected
    assert (rule("", [FOOD, FOOD]) == 0.5).all()


def test_prompts_are_forty_different_ones():
    assert len(PROMPTS) == len(set(PROMPTS)) == 40


def test_pretrained_model_writes_every_theme_and_hardly_anything_malformed(shared):
    """100 texts; the shares are about .14 .13 .23 .50 .00, so a theme is missing by chance with
    odds below 1e-5."""
    tokenizer = Tokenizer(shared / "stories260K")
    policy = Transformer.from_pretrained(shared / "stories260K")
    prompts = [tokenizer.prompt_ids(prompt, "plain") for prompt in PROMPTS[::2]]
    generator = torch.Generator().manual_seed(0)
    responses = generate(policy, prompts, 5, MAX_NEW_TOKENS, tokenizer.eos, generator=generator)

    texts = [tokenizer.response_text(x, y, "plain") for x, row in zip(prompts, responses) for y in row]
    counts = {name: sum(category(text) == name for text in texts) for name in CATEGORIES}
    assert min(counts[name] for name in THEMES) > 0 and counts["malformed"] < 5
    assert -1.7 < log_likelihood(policy, prompts, responses) < -1.1


def test_missing_policy_is_one_sentence_and_exit_code_2(tmp_path, monkeypatch, capsys):
    flags = ["--policy", str(tmp_path / "nowhere"), "--out", str(tmp_path / "out")]
    monkeypatch.setattr("sys.argv", ["stories", *flags])
    assert main() == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "nowhere" in error and not (tmp_path / "out").exists()
