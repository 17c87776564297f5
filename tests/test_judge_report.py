"""Claims about judge_report.py, its command and ensembles: known answers, made-up judges, votes."""

import itertools
import json
import math

import pytest
import torch

from data import read_pairs
from engine.files import write_lines
from evaluate import __main__ as evaluate
from evaluate import judge_report
from evaluate.judge_report import agreement, calibration, circles_of, decompose, label_tables, length_effect, report, triples
from judges.base import Ensemble, Rule, Transitive, transitive
from judges.load import load_judge
from toy.games import bradley_terry, cycle, odd_cycle, random_game


def coin(seed, n=20_000):
    """Two independent uniform draws, n of each."""
    generator = torch.Generator().manual_seed(seed)
    first = torch.rand(n, generator=generator, dtype=torch.float64)
    return first, torch.rand(n, generator=generator, dtype=torch.float64)


# ------------------------------------------------------------------------ numbers


def test_a_judge_whose_probabilities_come_true_is_calibrated():
    probability, draw = coin(0)
    label = (draw < probability).double()
    assert calibration(probability, label)["expected_calibration_error"] < 0.02
    sharp = torch.sigmoid(3 * torch.logit(probability))  # the same order, too sure of itself
    assert calibration(sharp, label)["expected_calibration_error"] > 0.08


def test_calibration_error_by_hand():
    """All four are lost: two at .9, and two at .3, a confidence of .7 in the other side."""
    result = calibration(torch.tensor([0.9, 0.9, 0.3, 0.3]), torch.tensor([0.0, 0.0, 0.0, 0.0]))
    assert result["expected_calibration_error"] == pytest.approx((0.9 + 0.3) / 2)


def test_confidence_at_the_edge_of_a_bin_is_not_split_by_rounding():
    """Eight of ten right at .8, in either order: float32's 1 - .2 is a little less than its .8."""
    preference = torch.tensor([0.8] * 5 + [0.2] * 5)
    result = calibration(preference, torch.tensor([1.0] * 4 + [0.0] + [0.0] * 4 + [1.0]))
    assert len(result["bins"]) == 1 and result["expected_calibration_error"] < 1e-6


def test_a_judge_that_calls_every_pair_a_tie_is_calibrated():
    assert calibration(torch.full((4,), 0.5), torch.ones(4))["expected_calibration_error"] == 0


def test_turning_pairs_around_changes_no_number():
    probability, draw = coin(1, 500)
    label = (draw < probability).double()
    difference = (draw - 0.3) * 100
    turn = torch.rand(500, generator=torch.Generator().manual_seed(2)) < 0.5
    turned = [torch.where(turn, 1 - value, value) for value in (probability, label)]
    assert agreement(*turned) == pytest.approx(agreement(probability, label))

    error = calibration(probability, label)["expected_calibration_error"]
    assert calibration(*turned)["expected_calibration_error"] == pytest.approx(error)

    effect = length_effect(torch.logit(probability), difference)
    difference = torch.where(turn, -difference, difference)
    assert length_effect(torch.logit(turned[0]), difference) == pytest.approx(effect)


def test_agreement_ignores_ties_of_the_labels_and_halves_those_of_the_judge():
    result = agreement(torch.tensor([0.9, 0.2, 0.5, 0.9]), torch.tensor([1.0, 1.0, 0.0, 0.5]))
    assert (result["pairs"], result["decided"]) == (4, 3)
    assert result["accuracy"] == pytest.approx(1.5 / 3)


@pytest.mark.parametrize("n", [3, 5, 7])
def test_triples_of_a_regular_cycle_are_counted_as_in_the_closed_form(n):
    """A regular tournament has n(n² - 1)/24 circular triads (Kendall and Babington Smith, 1940)."""
    assert triples(odd_cycle(n)) == (math.comb(n, 3), n * (n * n - 1) // 24)


def test_a_transitive_game_has_no_circles_and_no_cyclic_share():
    result = circles_of([bradley_terry([0.0, 1.0, -2.0, 0.5])])
    assert result["intransitive_triples"] == 0
    assert result["cyclic_share"] == pytest.approx(0, abs=1e-12)
    assert circles_of([odd_cycle(5)])["cyclic_share"] == pytest.approx(1)


def test_a_triple_that_nobody_judged_whole_is_not_counted():
    table = cycle()
    table[0, 1] = table[1, 0] = float("nan")
    assert triples(table) == (0, 0)


def test_scalar_and_cyclic_parts_add_up_and_are_orthogonal():
    table = random_game(7, torch.Generator().manual_seed(0))
    scalar, cyclic = decompose(table)
    assert torch.allclose(scalar + cyclic, torch.logit(table), atol=1e-6)
    assert cyclic.sum(-1).abs().max() < 1e-9 and (scalar * cyclic).sum().abs() < 1e-9


# ------------------------------------------------------------------------ human votes


def test_the_report_finds_the_cycles_of_the_human_votes(shared):
    """467 full triangles; one strict cycle by mean vote, 4, 4 and 1 by single annotator."""
    pairs = read_pairs(shared / "pandalm" / "pairs.jsonl")
    result = circles_of(label_tables(pairs, [pair["probability"] for pair in pairs]))
    assert (result["triples"], result["intransitive_triples"]) == (467, 1)
    single = [circles_of(label_tables(pairs, vote)) for vote in judge_report.voters(pairs)]
    assert [row["intransitive_triples"] for row in single] == [4, 4, 1]


# ------------------------------------------------------------------------ judges


def by_length(prompt, responses, strength=0.1):
    size = torch.tensor([float(len(text)) for text in responses])
    return torch.sigmoid(strength * (size[:, None] - size))


def in_circle(prompt, responses):
    place = [len(text) % 3 for text in responses]
    return cycle((0.9, 0.9, 0.8))[place][:, place]


def texts(count=40):
    """Pairs of different lengths, the first the better where it is shorter."""
    words = ["a" * (1 + n * 7 % 30) for n in range(count + 1)]
    rows = []
    for n, pair in enumerate(itertools.pairwise(words)):
        row = {"prompt": f"{n // 3}", "chosen": min(pair, key=len), "rejected": max(pair, key=len)}
        rows.append(row | {"probability": 1.0})
    return rows


def test_the_report_shows_a_judge_that_likes_length():
    result = report(Rule(by_length), texts())
    assert result["length_correlation"] == pytest.approx(1)
    assert result["length_correlation_of_labels"] < -0.8
    assert result["longer_rate"] > 0.55 and result["longer_rate_of_labels"] == 0
    assert result["accuracy"] == 0 and result["judge"]["intransitive_triples"] == 0
    assert all(row["preference"] >= 0.5 for row in result["longer_wins"])


def test_a_judge_of_another_class_gets_the_same_report():
    """Anything with preferences_many is a judge: it need not know the class Judge."""

    class Other:
        def preferences_many(self, prompts, responses):
            return Rule(by_length).preferences_many(prompts, responses)

    assert report(Other(), texts()) == report(Rule(by_length), texts())


def test_length_surplus_is_what_was_added_and_nothing_for_a_right_judge_of_any_sharpness():
    generator = torch.Generator().manual_seed(0)
    probability = 0.1 + 0.8 * torch.rand(50_000, generator=generator)
    difference = torch.randn(50_000, generator=generator)
    label = (torch.rand(50_000, generator=generator) < probability).float()

    def surplus(preference):
        return judge_report.length_surplus(preference, label, difference)

    assert surplus(probability) == pytest.approx(0, abs=0.01)
    assert surplus(0.5 + 0.5 * (probability - 0.5)) == pytest.approx(0, abs=0.01)
    assert surplus(probability + 0.1 * difference.sign()) == pytest.approx(0.1, abs=0.01)


def test_the_report_finds_the_circle_of_a_judge():
    pairs = [{"prompt": "p", "chosen": "a", "rejected": "bb", "probability": 1.0}] * 2
    pairs.append({"prompt": "p", "chosen": "bb", "rejected": "ccc", "probability": 1.0})
    result = report(Rule(in_circle), pairs)
    assert (result["judge"]["triples"], result["judge"]["intransitive_triples"]) == (1, 1)
    assert result["judge"]["cyclic_share"] > 0.9 and result["labels"]["triples"] == 0


def test_ensemble_is_the_weighted_mean_and_reports_disagreement():
    long, short = Rule(by_length), Rule(by_length, strength=-0.1)
    balanced = Ensemble([long, short])
    assert torch.allclose(balanced.preferences("p", ["a", "bbbb"]), torch.full((2, 2), 0.5))
    one_sided = Ensemble([long, short], [3, 1]).preferences("p", ["a", "bbbb"])
    wins = 1 / (1 + math.exp(-0.3))
    assert one_sided[1, 0].item() == pytest.approx(0.75 * wins + 0.25 * (1 - wins))
    spread = balanced.disagreement(["p"], [["a", "bbbb"]])[0]
    assert spread[0, 1].item() == pytest.approx(wins - 0.5, abs=1e-6) and spread[0, 0] == 0
    assert report(balanced, texts())["ensemble_disagreement"] > 0.1


def test_ensemble_from_a_command_line():
    judges = ["test_judge_report:by_length", "test_judge_report:in_circle"]
    judge = load_judge("ensemble:" + json.dumps({"judges": judges, "weights": [1, 0]}))
    table = judge.preferences("p", ["a", "bb"])
    assert torch.allclose(table, by_length("p", ["a", "bb"]))


@pytest.mark.parametrize("weights", [[1.0], [1.0, -1.0], [0.0, 0.0], [float("nan"), 1.0]])
def test_ensemble_refuses_weights_that_are_no_shares(weights):
    with pytest.raises(ValueError, match="weights are"):
        Ensemble([Rule(by_length), Rule(in_circle)], weights)


def test_transitive_makes_ties_of_a_pure_circle_and_doubles_a_transitive_judges_logits():
    circle = torch.logit(odd_cycle(5))
    assert torch.allclose(transitive(circle), torch.full((5, 5), 0.5).double())
    rewards = torch.tensor([0.3, -0.2, 1.0])
    logits = rewards[:, None] - rewards
    assert torch.allclose(torch.logit(transitive(logits)), 2 * logits, atol=1e-5)
    two = Transitive(Rule(in_circle)).preferences("p", ["a", "bb"])  # .9 truly
    assert two[0, 1].item() == pytest.approx(0.9**2 / (0.9**2 + 0.1**2), abs=1e-5)


def test_transitive_from_a_command_line():
    judge = load_judge('transitive:{"judge": "test_judge_report:in_circle"}')
    table = Transitive(Rule(in_circle)).preferences("p", ["a", "bb"])
    assert torch.equal(judge.preferences("p", ["a", "bb"]), table)


def test_the_figure_shows_eight_parts_of_the_pairs_by_length():
    pairs = [row | {"rejected": row["chosen"] + "a" * (n + 1)} for n, row in enumerate(texts())]
    line = judge_report.draw(report(Rule(by_length), pairs)).axes[1].lines[1]
    difference, wins = line.get_xdata(), line.get_ydata()
    assert len(difference) == 8 and list(difference) == sorted(difference)
    assert all(a <= b + 1e-6 for a, b in itertools.pairwise(wins)) and wins[0] < wins[-1] - 0.1


def test_pairs_of_one_difference_are_one_point_of_the_figure():
    """All of `texts` differ by 7 or by 23 characters."""
    line = judge_report.draw(report(Rule(by_length), texts())).axes[1].lines[1]
    assert line.get_xdata().tolist() == [7, 23]


def test_a_judge_that_likes_what_stands_first_gains_nothing_by_it():
    """A valid table, P + Pᵀ = 1, but of places and not of texts; sides are drawn at random."""

    def first(prompt, responses):
        place = torch.arange(len(responses))
        return 0.5 + 0.4 * torch.sign(place - place[:, None])

    assert 0.3 < report(Rule(first), texts(200))["accuracy"] < 0.7


@pytest.mark.parametrize(
    "number, words", [(7.0, "judge odd, prompt '0': .* is 7.0, expected"), (float("nan"), "judge odd, prompt '0'")]
)
def test_the_report_refuses_tables_that_are_no_preferences(number, words):
    judge = Rule(lambda prompt, responses: [[number] * len(responses)] * len(responses))
    with pytest.raises(ValueError, match=words):
        report(judge, texts(), "odd")


def test_length_surplus_of_a_judge_that_knows_nothing_but_length_is_not_given():
    assert report(Rule(by_length, strength=0.001), texts())["length_surplus"] is None
    same = [pair | {"rejected": pair["chosen"][::-1]} for pair in texts()]
    assert report(Rule(by_length), same)["length_surplus"] is None


def test_triples_equal_a_count_by_hand_with_gaps():
    table = random_game(9, torch.Generator().manual_seed(3))
    gaps = torch.rand(9, 9, generator=torch.Generator().manual_seed(4)).triu(1)
    table[(gaps + gaps.T) > 0.8] = float("nan")
    full = circles = 0
    for i, j, k in itertools.combinations(range(9), 3):
        around = torch.stack([table[i, j], table[j, k], table[k, i]])
        full += not around.isnan().any()
        circles += bool((around > 0.5).all() or (around < 0.5).all())
    assert triples(table) == (full, circles) and 0 < circles < full < 84


def test_responses_of_one_model_are_told_apart_by_their_text():
    name = {"chosen_model": "m", "rejected_model": "m"}
    pairs = [{"prompt": "p", "chosen": a, "rejected": b, **name} for a, b in ("ab", "bc", "ca")]
    assert circles_of(label_tables(pairs, [1.0, 1.0, 1.0]))["intransitive_triples"] == 1


# ------------------------------------------------------------------------ the command


def command(judge, folder, out):
    pairs = folder / "pairs.jsonl"
    return evaluate.main(["judge", "--judge", str(judge), "--pairs", str(pairs), "--out", str(out)])


def test_report_command_writes_numbers_and_figure(tmp_path, capsys):
    write_lines(tmp_path / "pairs.jsonl", texts())
    assert command("test_judge_report:by_length", tmp_path, tmp_path / "out") == 0
    assert json.loads((tmp_path / "out/report.json").read_text())["accuracy"] == 0
    assert (tmp_path / "out/report.png").read_bytes().startswith(b"\x89PNG")
    assert "correlation of its logit with length" in capsys.readouterr().out


def test_report_command_names_what_is_missing(tmp_path, capsys):
    row = {"prompt": "p", "chosen": "a", "rejected": "b", "votes": [1, 3]}
    write_lines(tmp_path / "pairs.jsonl", [row])
    wrong = {"nowhere": "judge nowhere: no such folder", "test_judge_report:in_circle": "line 1: votes are [1, 3]"}
    for judge, words in wrong.items():
        assert command(judge, tmp_path, tmp_path) == 2
        assert words in capsys.readouterr().err


def test_a_judge_folder_without_its_head_is_named(shared, capsys, tmp_path):
    folder = shared / "tiny-mistral" / "v02" / "fp32"
    write_lines(tmp_path / "pairs.jsonl", texts(3))
    assert command(folder, tmp_path, tmp_path) == 2
    assert "preference_head is nothing" in capsys.readouterr().err
