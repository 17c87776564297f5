"""Claims about toy/judges.py: what each form of judge learns from coin flips, where SPPO goes with it, what judging costs.

And about judges/base.py: what becomes of a judge that fails.
"""

import json
import os
import sys
from itertools import permutations

import pytest
import torch
from children import content, flags
from conftest import ROOT, letters, tiny_settings

import train
from engine.files import read_json, write_json
from judges import base
from judges.base import Ensemble, Judge, JudgeError, Retry, Rule, Transitive, asked, checked_tables, judge_in_batches
from judges.human import Human
from judges.load import find, is_folder, judge_fingerprint, load_judge, probe
from toy import judges
from toy.debug import build_debugging
from toy.games import bradley_terry, cycle, nash, odd_cycle
from toy.judges import FORMS, GAMES, count_rows, counted, draw_labels, evaluate, learn, make_judge, make_pairrm, words

CYCLE, TRANSITIVE, MIXTURE = GAMES.values()
BOTH = dict(scalar=True, cyclic=2)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def learned(payoff, heads, count, steps):
    """What a judge of these heads is worth after so many labels; `make toys` has several seeds."""
    table = learn(len(payoff), draw_labels(payoff, count, seeded()), heads, 0, steps)
    return evaluate(table[None].double(), payoff)[0]


# ------------------------------------------------------------------------------------------------ what they learn


def test_bradley_terry_stays_at_chance_on_a_cycle():
    row = learned(CYCLE, FORMS["Bradley–Terry"], 5000, 100)
    assert abs(row["confidence"] - 0.5) < 0.05 and row["error"] > 0.35  # all P are 0.1 or 0.9
    assert 0.25 <= row["favourites"] <= 0.75 and row["exploitability"] > 0.08


def test_gpm_learns_a_cycle_to_within_a_twentieth():
    row = learned(CYCLE, FORMS["GPM, k = 2"], 5000, 200)
    assert row["error"] < 0.05 and row["confidence"] > 0.85 and row["favourites"] == 1 and row["exploitability"] < 0.06


@pytest.mark.parametrize(("heads", "error"), [(FORMS["combined, k = 1"], 0.07), (BOTH, 0.05)])
def test_combined_model_learns_a_cycle_and_two_planes_fit_it_better(heads, error):
    row = learned(CYCLE, heads, 5000, 200)
    assert row["error"] < error and row["confidence"] > 0.85 and row["favourites"] == 1


def test_all_forms_learn_transitive_preferences_and_agree():
    labels = draw_labels(TRANSITIVE, 5000, seeded())
    tables = torch.stack([learn(5, labels, heads, 0, 150) for heads in FORMS.values()]).double()
    assert (tables[:, None] - tables).abs().mean((2, 3)).max() < 0.05
    for row in evaluate(tables, TRANSITIVE):
        assert row["error"] < 0.05 and row["favourites"] >= 0.9 and row["exploitability"] < 0.02


def test_mixture_is_learned_by_a_scalar_with_one_plane_or_by_two_planes_not_by_less():
    labels = draw_labels(MIXTURE, 5000, seeded())
    tables = torch.stack([learn(15, labels, heads, 0) for heads in FORMS.values()]).double()
    scalar, one_plane, combined, two_planes = evaluate(tables, MIXTURE)
    for enough in (combined, two_planes):
        assert enough["error"] < 0.06 and enough["exploitability"] < 0.08
    assert scalar["error"] > 0.2 and scalar["exploitability"] > 0.2 and one_plane["error"] > 0.1


def test_logits_of_the_mixture_need_two_planes_or_one_and_a_scalar():
    """A plane is a skew-symmetric matrix of rank 2; so is a scalar's r_i - r_j, which a plane with v = (r, 1) is."""
    logits = torch.logit(MIXTURE)
    scalar = logits.mean(1)[:, None] - logits.mean(1)
    assert torch.linalg.matrix_rank(logits) == 4 and torch.linalg.matrix_rank(logits - scalar, atol=1e-9) == 2
    assert torch.linalg.matrix_rank(torch.logit(CYCLE)) == 4 and torch.linalg.matrix_rank(torch.logit(TRANSITIVE)) == 2


# ------------------------------------------------------------------------------------------------ how it is measured


def test_equilibrium_of_the_mixture_is_the_best_quality_in_every_style():
    assert nash(MIXTURE).tolist() == pytest.approx([0] * 12 + [4 / 11, 3 / 11, 4 / 11])
    assert judges.start_of(15)[-3:].sum() < 0.07


def test_any_order_of_five_words_has_3_to_7_of_10_pairs_of_the_cycle_right():
    rewards = torch.tensor(list(permutations(range(5)))).double()
    rows = evaluate(torch.stack([bradley_terry(0.01 * some) for some in rewards]), CYCLE)
    assert {round(10 * row["favourites"]) for row in rows} == {3, 4, 5, 6, 7}
    assert all(abs(row["confidence"] - 0.5) < 0.001 for row in rows)


@pytest.mark.parametrize("game", GAMES)
def test_truth_is_the_best_judge_and_the_reversed_truth_the_worst(game):
    payoff = GAMES[game]
    best, worst = evaluate(torch.stack([payoff, payoff.T]), payoff)
    assert best["error"] == 0 and best["favourites"] == 1 and best["exploitability"] < 0.01 and best["distance"] < 0.03
    assert worst["favourites"] == 0 and best["confidence"] + worst["confidence"] == pytest.approx(1)


def test_evaluation_by_hand():
    table = torch.tensor([[0.5, 0.8, 0.3], [0.2, 0.5, 0.9], [0.6, 0.1, 0.5]]).double()
    (row,) = evaluate(table[None], cycle((0.9, 0.9, 0.9)))  # P01 = .9, P02 = .1, P12 = .9
    assert row["error"] == pytest.approx((0.1 + 0.2 + 0) / 3) and row["favourites"] == 1
    assert row["confidence"] == pytest.approx((0.8 + 0.7 + 0.9) / 3) and row["asymmetry"] == pytest.approx(0.1)


def test_labels_are_coin_flips_with_the_true_probabilities():
    """40,000 labels on each pair; a share is off by 0.0125 (five standard errors) once in a million."""
    shares = counted(3, draw_labels(cycle((0.9, 0.7, 0.6)), 120_000, seeded()))
    assert (shares - cycle((0.9, 0.7, 0.6))).abs().max() < 0.0125


def test_counted_shares_by_hand():
    labels = torch.tensor([[0, 1], [0, 1], [1, 0], [2, 0]])
    assert counted(3, labels).tolist() == [[0.5, pytest.approx(2 / 3), 0], [pytest.approx(1 / 3), 0.5, 0.5], [1, 0.5, 0.5]]


# ------------------------------------------------------------------------------------------------ cost, symmetry


@pytest.mark.parametrize("K", range(2, 17))
def test_judging_takes_k_rows_with_a_preference_model_and_k_times_k_minus_1_with_pairrm(K):
    assert count_rows(make_judge(16, BOTH, seeded()), "", words(K)) == K
    assert count_rows(make_pairrm(16, seeded()), "", words(K)) == K * (K - 1)


def decided_pairrm(seed=0):
    """A random PairRM whose preferences are far from ½."""
    judge = make_pairrm(6, seeded(seed))
    judge.head_layer[4].weight.data.mul_(50)
    return judge


JUDGES = {form: lambda heads=heads: make_judge(6, heads, seeded()) for form, heads in FORMS.items()} | {
    "PairRM": decided_pairrm,
    "ensemble": lambda: Ensemble([make_judge(6, BOTH, seeded()), decided_pairrm(1)], weights=[3, 1]),
    "mean scores of a model": lambda: Transitive(make_judge(6, BOTH, seeded())),
    "mean scores of PairRM": lambda: Transitive(decided_pairrm()),
}


@pytest.mark.parametrize("name", JUDGES)
def test_preferences_and_their_opposites_sum_to_one(name):
    tables = JUDGES[name]().preferences_many(["word5 ", "word2 word3 "], [words(5), words(6)[1:]])
    assert (tables + tables.mT - 1).abs().max() < 1e-6
    assert ((tables - 0.5).abs().amax((1, 2)) > 0.1).all()


# ------------------------------------------------------------------------------------------------ what it shows


def test_a_counterweight_repairs_the_equilibrium_of_a_judge_that_likes_length():
    result = judges.counterweight(seeded())
    assert result["fair"]["exploitability"] == pytest.approx(0, abs=1e-6)
    assert result["biased"]["exploitability"] > 0.02 > 2 * result["repaired"]["exploitability"]
    assert result["biased"]["length_surplus"] > 0.02 and abs(result["repaired"]["length_surplus"]) < 1e-3


def test_figure_and_table_hold_what_was_measured(capsys):
    halves = {game: evaluate(torch.full_like(payoff, 0.5)[None], payoff) for game, payoff in GAMES.items()}
    learned = {game: {form: dict.fromkeys(judges.SIZES, rows) for form in judges.STYLES} for game, rows in halves.items()}
    learned["cycle of 5 words"]["GPM, k = 2"][500] = evaluate(odd_cycle(5, 0.777)[None], CYCLE)
    truth = {game: rows[0] for game, rows in halves.items()}
    bias = judges.counterweight(seeded(), labels=500)
    result = {"learned": learned, "truth": truth, "bias": bias, "cost": judges.cost(seeded(), counts=(2, 3), length=2, repeats=1)}
    judges.print_table(result)
    printed = capsys.readouterr().out
    assert "0.123" in printed and "0.777" in printed and "6 rows" in printed
    panel = judges.draw(result).axes[0]
    lines = {line.get_color(): line.get_ydata()[0] for line in panel.lines}
    assert lines[judges.STYLES["GPM, k = 2"][0]] == pytest.approx(0.123)


# ------------------------------------------------------------------------------------------------ a judge that fails


class Failing:
    """Raises what it is given, one after the other, and then judges like `letters`; counts the prompts it was asked about."""

    def __init__(self, *errors):
        self.errors, self.prompts = list(errors), []

    def __call__(self, prompt, responses):
        self.prompts.append(prompt)
        if self.errors and (error := self.errors.pop(0)) is not None:
            raise error
        return letters(prompt, responses)


class Whole(Judge):
    """The same, of several prompts at a time."""

    def __init__(self, *errors):
        self.rule = Failing(*errors)

    def preferences_many(self, prompts, responses):
        return torch.stack([self.rule(*row) for row in zip(prompts, responses)])


@pytest.fixture
def waits(monkeypatch):
    """The pauses that were made, none of which is waited for."""
    seconds = []
    monkeypatch.setattr(base.time, "sleep", seconds.append)
    return seconds


@pytest.mark.parametrize("kind", [Rule, Whole])
@pytest.mark.parametrize("error", [KeyError("model"), ValueError("a\nb\x1b[31m"), SystemExit(0), SystemExit(), RuntimeError("")])
def test_an_exception_of_a_judge_becomes_one_sentence(kind, error, waits):
    judge = Rule(Failing(error)) if kind is Rule else Whole(error)
    with pytest.raises(JudgeError) as raised:
        checked_tables(judge, ["why is it so?"], [["a", "b"]], "mine:judge")
    sentence = str(raised.value)
    assert sentence.startswith("judge ") and "prompt 'why is it so?'" in sentence and sentence.isprintable()
    assert f": {type(error).__name__}" in sentence and "(test_judges.py:" in sentence and "in __call__)" in sentence
    assert raised.value.__cause__ is error and waits == []


def test_the_line_that_is_named_is_the_judges_own_and_not_a_packages(waits):
    def judge(prompt, responses):
        return json.loads("{")

    with pytest.raises(JudgeError, match=rf"JSONDecodeError: .*\(test_judges.py:{judge.__code__.co_firstlineno + 1} in judge\)"):
        Rule(judge).preferences("p", ["a", "b"])


@pytest.mark.parametrize("error", [OSError("reset"), TimeoutError(), ConnectionError(), Retry("rate limit")])
def test_what_may_pass_is_repeated_with_growing_waits_one_prompt_at_a_time(error, waits, capsys):
    rule = Failing(None, error, error, error)
    tables = Rule(rule).preferences_many(["p", "q", "r"], [["a", "b"]] * 3)
    assert rule.prompts == ["p", "q", "q", "q", "q", "r"] and waits == [1, 2, 4]
    assert torch.equal(tables[1], letters("q", ["a", "b"]))
    assert f"prompt 'q': {type(error).__name__}" in capsys.readouterr().err


def test_no_wait_is_longer_than_a_minute_and_after_the_last_attempt_it_is_an_error(waits):
    judge = Rule(Failing(*[TimeoutError("no reply")] * 20))
    judge.retries = 9
    with pytest.raises(JudgeError, match=r"TimeoutError: no reply \(.*\), after 10 attempts"):
        judge.preferences("p", ["a", "b"])
    assert waits == [1, 2, 4, 8, 16, 32, 60, 60, 60]


@pytest.mark.parametrize("error", [FileNotFoundError("key.txt"), PermissionError("key.txt"), ValueError("no")])
def test_what_cannot_pass_is_not_repeated(error, waits):
    rule = Failing(error)
    with pytest.raises(JudgeError, match=type(error).__name__):
        Rule(rule).preferences("p", ["a", "b"])
    assert rule.prompts == ["p"] and waits == []


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory"), KeyboardInterrupt()])
def test_running_out_of_memory_and_control_c_stay_what_they_are(error, waits):
    with pytest.raises(type(error)):
        checked_tables(Whole(error), ["p"], [["a", "b"]], "mine")


def test_a_judge_of_several_prompts_names_the_first_and_the_stage(waits):
    class Bar:
        desc = "round 2/3 preferences"

    with pytest.raises(JudgeError, match=r"^round 2/3 preferences: judge mine, one of 2 prompts from 'p': KeyError: 1"):
        list(judge_in_batches(Whole(KeyError(1)), ["p", "q"], [["a", "b"]] * 2, "mine", Bar()))


def test_members_of_an_ensemble_are_named_and_repeated_on_their_own(waits):
    sound, weak = Failing(), Failing(None, Retry("again"), Retry("again"))
    ensemble = Ensemble([Rule(sound), Rule(weak)])
    assert torch.allclose(ensemble.preferences_many(["p", "q"], [["a", "b"]] * 2)[1], letters("q", ["a", "b"]))
    assert sound.prompts == ["p", "q"] and weak.prompts == ["p", "q", "q", "q"]
    weak.errors = [KeyError("end")]
    with pytest.raises(JudgeError, match=r"prompt 'r': KeyError: 'end'"):
        checked_tables(ensemble, ["r"], [["a", "b"]], "both")


def test_the_number_of_repeats_reaches_every_judge_that_is_loaded():
    spec = {"judges": ["conftest:letters", 'transitive:{"judge": "toy.text_game:oracle"}']}
    judge = load_judge("ensemble:" + json.dumps(spec), retries=2)
    assert {judge.retries, *(one.retries for one in judge.judges), judge.judges[1].judge.retries} == {2}
    assert load_judge("conftest:letters").retries == base.RETRIES == train.TrainConfig().judge_retries


def test_the_last_attempt_is_the_one_that_counts():
    answers = iter([OSError(), OSError(), 7])

    def question():
        answer = next(answers)
        if isinstance(answer, OSError):
            raise answer
        return answer

    assert asked(question, "judge", 2, wait=lambda seconds, sentence: None) == 7


MODULES = {
    "ends": "import sys\nsys.exit()\n",
    "breaks": "client = {}['key']\n",
    "class that ends": "class judge:\n    def __init__(self):\n        raise SystemExit\n",
    "class that breaks": "class judge:\n    def __init__(self):\n        {}['key']\n",
}


@pytest.mark.parametrize("case", MODULES)
def test_a_judge_that_ends_or_breaks_while_it_is_loaded_is_one_sentence(case, tmp_path, monkeypatch):
    name = "module_that_" + case.replace(" ", "_")
    (tmp_path / f"{name}.py").write_text(MODULES[case])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=rf"^judge {name}:judge: (SystemExit|KeyError: 'key') \({name}.py:\d in "):
        load_judge(f"{name}:judge")
    sys.modules.pop(name, None)


SCORE = "import torch\n\nfrom helper import better\n\ndef score(prompt, responses):\n    return better(responses)\n"
HELPER = "import torch\n\ndef better(responses):\n    return torch.full((len(responses),) * 2, 0.5)\n"


@pytest.mark.parametrize("name", ["data", "model", "judges", "evaluate", "sppo", "random"])
def test_a_rule_may_be_in_a_file_that_is_called_as_one_of_ours(name, tmp_path, monkeypatch):
    """Or as one of Python's; ours stays what `import` finds, and the run knows what the rule's file was."""
    import data

    (tmp_path / f"{name}.py").write_text(SCORE)
    (tmp_path / "helper.py").write_text(HELPER)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "helper", raising=False)
    before = sys.modules.get(name)
    assert load_judge(f"{name}:score").preferences("p", ["a", "b"]).tolist() == [[0.5, 0.5]] * 2
    assert sys.modules.get(name) is before and sys.modules["data"] is data

    # Another file by that name, in another folder, is another judge.
    known = judge_fingerprint(f"{name}:score")
    (tmp_path / "other").mkdir()
    (tmp_path / f"other/{name}.py").write_text(SCORE + "#")
    monkeypatch.chdir(tmp_path / "other")
    load_judge(f"{name}:score")
    assert judge_fingerprint(f"{name}:score") != known


@pytest.mark.parametrize("spec", ["rules/mine:score", "rules/mine.py:score", "./rules/mine.py:score"])
def test_a_rule_may_be_named_by_its_path(spec, tmp_path, monkeypatch):
    (tmp_path / "rules").mkdir()
    (tmp_path / "rules/mine.py").write_text(SCORE)
    (tmp_path / "helper.py").write_text(HELPER)
    monkeypatch.chdir(tmp_path)
    assert load_judge(spec).preferences("p", ["a", "b"]).shape == (2, 2)


def test_our_own_modules_are_loaded_once(monkeypatch):
    """From the project's own folder, `data` is its data.py."""
    import data

    monkeypatch.chdir(ROOT)
    assert find("data", "read_prompts", "data:read_prompts") is data.read_prompts


def test_long_arguments_are_no_folder_and_cut_in_messages(tmp_path):
    spec = "conftest:letters:" + json.dumps({"rubric": "x" * 5000})
    assert not is_folder(spec) and is_folder(str(tmp_path))
    with pytest.raises(ValueError, match="cannot be called with") as error:
        load_judge(spec)
    assert str(error.value).startswith(f"judge {spec[:80]}…: ")


# ------------------------------------------------------------------------------------------------ in a run


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("judges") / "world"
    build_debugging(folder)
    return folder


def moody(prompt, responses, path):
    """A rule that ends, breaks, draws or judges, as a file says; writes down the prompts it is asked about."""
    with open(path + ".asked", "a") as file:
        print(prompt, len(responses), file=file)
    mood = open(path).read()
    if mood == "ends":
        sys.exit(0)
    if mood == "breaks":
        raise KeyError("mood")
    noise = torch.rand(len(responses)) if mood == "draws" else 0
    return torch.sigmoid(torch.logit(letters(prompt, responses)) + noise - (noise[:, None] if mood == "draws" else 0))


def moody_settings(world, tmp_path, mood, run="run", **changes):
    (tmp_path / "mood").write_text(mood)
    judge = "test_judges:moody:" + json.dumps({"path": str(tmp_path / "mood")})
    return tiny_settings(world, tmp_path / run, judge=judge, **changes)


@pytest.fixture(autouse=True)
def no_figure(monkeypatch):
    monkeypatch.setattr(train, "draw_curves", lambda lines, path: None)


@pytest.mark.parametrize("mood", ["ends", "breaks"])
def test_a_judge_that_cannot_judge_is_known_before_anything_is_sampled(world, tmp_path, capsys, mood):
    """The probe: one prompt of the run, two responses. Exit code 2, also for sys.exit(0)."""
    assert train.main(flags(moody_settings(world, tmp_path, mood))) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("train.py: before the first response: judge moody, prompt '") and "in moody)" in line
    assert not (tmp_path / "run").exists()
    (asked_about,) = (tmp_path / "mood.asked").read_text().splitlines()
    assert asked_about.split()[0] in (world / "prompts.jsonl").read_text() and asked_about.endswith("= 2")


def test_sys_exit_in_a_judge_is_no_success_in_a_later_round_either(world, tmp_path, capsys, monkeypatch):
    settings = moody_settings(world, tmp_path, "good")
    judge = train.TextGame.judge

    def worse(game, *arguments):
        (tmp_path / "mood").write_text("ends" if game.number == 2 else "good")
        return judge(game, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(train.TextGame, "judge", worse)
        assert train.main(flags(settings)) == 2
    assert "round 2/2 preferences: judge moody, prompt" in capsys.readouterr().err
    (tmp_path / "mood").write_text("good")
    assert train.main(flags(settings)) == 0


@pytest.mark.parametrize("mood", ["good", "draws"])
def test_the_probe_changes_no_number_of_a_run(world, tmp_path, monkeypatch, mood):
    """Also of a run whose judge draws from torch's own generator."""
    torch.manual_seed(1)
    train.run(moody_settings(world, tmp_path, mood, "with"))
    monkeypatch.setattr(train, "probe", lambda *arguments: None)
    torch.manual_seed(1)
    train.run(moody_settings(world, tmp_path, mood, "without"))
    assert content(tmp_path / "with") == content(tmp_path / "without")


def test_a_run_that_has_judged_everything_needs_its_judge_no_more(world, tmp_path):
    train.run(moody_settings(world, tmp_path, "good"))
    os.remove(tmp_path / "run/round-02/logps.safetensors")
    assert train.main(flags(moody_settings(world, tmp_path, "breaks"))) == 0


def test_a_run_that_was_started_before_there_were_repeats_goes_on_with_any_number(world, tmp_path):
    told = train.run(moody_settings(world, tmp_path, "good"))
    settings = read_json(tmp_path / "run/config.json")
    del settings["judge_retries"]
    write_json(tmp_path / "run/config.json", settings)
    assert train.run(moody_settings(world, tmp_path, "good", judge_retries=0)) == told


def test_a_person_is_not_asked_by_the_probe(tmp_path):
    def ask(question):
        raise AssertionError(question)

    person = Human(tmp_path / "votes.jsonl", ask=ask)
    for judge in (person, Transitive(person), Ensemble([person, Rule(letters)])):
        probe(judge, "human", "p")
    assert not (tmp_path / "votes.jsonl").exists()
