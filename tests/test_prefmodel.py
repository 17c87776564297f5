"""Claims about prefmodel.py: what its scores can and cannot express, what it learns, and what it says when misused.

And about judges/load.py: the judges that a command line can name.
"""

import json
import random
import re
import resource
import signal
import subprocess
import sys
from pathlib import Path

import children
import pytest
import torch
from conftest import ROOT

import prefmodel
from engine.files import write_lines
from judges.base import Rule
from judges.load import load_judge
from prefmodel import PreferenceModel, split_pairs, train_preference_model
from toy.debug import build_debugging

HEADS = {"scalar": (True, 0), "cyclic": (False, 2), "both": (True, 3)}
TEXTS = ["7.", "7!", "8?", "12.", "", "777+=", "7."]


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prefmodel") / "world"
    build_debugging(folder)
    return folder / "policy"


def make(backbone, heads="both", seed=0, spread=0.5):
    """A judge with random heads, large enough that its preferences are far from ½."""
    scalar, cyclic = HEADS[heads]
    generator = torch.Generator().manual_seed(seed)
    judge = PreferenceModel.from_backbone(backbone, generator, scalar=scalar, cyclic=cyclic, template="plain")
    for head in (judge.scalar_head, judge.cyclic_head):
        if head is not None:
            torch.nn.init.normal_(head.weight, 0, spread, generator=generator)
    return judge


def preferences(judge, texts=TEXTS, prompt="3+4="):
    """The table (K, K) of one prompt."""
    return judge.preferences_many([prompt], [texts])[0]


def logits_of(judge):
    return torch.logit(preferences(judge).double())


# ------------------------------------------------------------------------------------------------ what it can express


@pytest.mark.parametrize("heads", HEADS)
def test_preferences_and_their_opposites_sum_to_one(backbone, heads):
    P = preferences(make(backbone, heads))
    assert (P + P.T - 1).abs().max() < 1e-6 and (P.diagonal() == 0.5).all()
    assert P.max() > 0.6


@pytest.mark.parametrize("heads", HEADS)
def test_equal_texts_tie_and_fare_alike(backbone, heads):
    P = preferences(make(backbone, heads))
    assert P[0, 6].item() == pytest.approx(0.5, abs=1e-6) and torch.allclose(P[0], P[6], atol=1e-6)


def test_scalar_head_is_bradley_terry(backbone):
    """logit P(i > k) = logit P(i > j) + logit P(j > k) for all i, j, k."""
    L = logits_of(make(backbone, "scalar"))
    assert (L[:, None, :] - (L[:, :, None] + L[None])).abs().max() < 1e-3


def test_cyclic_head_is_not_transitive(backbone):
    L = logits_of(make(backbone, "cyclic", spread=0.1))
    assert (L[:, None, :] - (L[:, :, None] + L[None])).abs().max() > 0.1


def test_the_heads_add_up(backbone):
    judge = make(backbone, "both")
    whole, scalar, judge.scalar_head = logits_of(judge), judge.scalar_head, None
    cyclic, judge.scalar_head, judge.cyclic_head = logits_of(judge), scalar, None
    assert torch.allclose(whole, logits_of(judge) + cyclic, atol=1e-2)


def test_cyclic_logit_by_hand():
    """v = (1, 0), (0, 1), (-1, -1): each beats the next by a logit of 1, a circle."""
    v = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, -1.0]])
    assert prefmodel.preference_logits(torch.zeros(3), v).tolist() == [[0, 1, -1], [-1, 0, 1], [1, -1, 0]]


def test_a_model_without_heads_is_refused(backbone):
    with pytest.raises(ValueError, match="needs a scalar head or a cyclic head"):
        PreferenceModel.from_backbone(backbone, torch.Generator(), scalar=False, cyclic=0)


# ------------------------------------------------------------------------------------------------ what it learns


def learn(backbone, heads, wins, epochs=60, lr=1e-2):
    judge = make(backbone, heads, spread=0.1)
    pairs = [{"prompt": "3+4=", "chosen": a, "rejected": b, "probability": p} for a, b, p in wins]
    train_preference_model(judge, pairs, epochs, lr, len(pairs), torch.Generator().manual_seed(0))
    return judge


CYCLE = [("7.", "7!", 1.0), ("7!", "7?", 1.0), ("7?", "7.", 1.0)]


@pytest.mark.parametrize(("heads", "low", "high"), [("cyclic", 0.9, 1.0), ("both", 0.9, 1.0), ("scalar", 0.4, 0.6)])
def test_a_cycle_is_learned_with_a_cyclic_head_only(backbone, heads, low, high):
    P = preferences(learn(backbone, heads, CYCLE, epochs=200, lr=3e-3), ["7.", "7!", "7?"])
    assert all(low < p < high for p in (P[0, 1], P[1, 2], P[2, 0]))


@pytest.mark.parametrize("heads", HEADS)
def test_a_soft_label_is_learned_as_a_probability(backbone, heads):
    judge = learn(backbone, heads, [("7.", "7!", 0.7)])
    assert preferences(judge, ["7.", "7!"])[0, 1].item() == pytest.approx(0.7, abs=0.03)


def test_training_reports_loss_and_accuracy_of_each_step(backbone):
    """A pair that is a tie has no right answer."""
    judge = make(backbone)
    pairs = [{"prompt": "3+4=", "chosen": "7.", "rejected": "7!", "probability": p} for p in (0.5, 0.5)]
    steps = train_preference_model(judge, pairs, 3, 1e-3, 1, torch.Generator().manual_seed(0))
    assert [step["step"] for step in steps] == [1, 2, 3, 4, 5, 6]
    assert all(step["accuracy"] is None and step["loss"] > 0 for step in steps)


# ------------------------------------------------------------------------------------------------ batching, saving


def test_padding_and_batching_do_not_change_preferences(backbone):
    judge = make(backbone)
    prompts = ["3+4=", "5+9=5+9=5+9=5+9=", "1"]
    responses = [TEXTS, TEXTS[::-1], ["7", "123456789", "8", ".", "!!", "=", "0"]]
    together = judge.preferences_many(prompts, responses)
    in_twos = judge.preferences_many(prompts, responses, rows=2)
    alone = torch.stack([preferences(judge, row, prompt) for prompt, row in zip(prompts, responses)])
    assert (together - alone).abs().max() < 1e-5 and (together - in_twos).abs().max() < 1e-5


def test_order_of_responses_only_permutes_the_table(backbone):
    judge, order = make(backbone), [3, 1, 0, 2]
    P, texts = preferences(judge, TEXTS[:4]), [TEXTS[i] for i in order]
    assert torch.allclose(preferences(judge, texts), P[order][:, order], atol=1e-6)


def test_texts_of_several_prompts_in_any_order_are_read_as_if_alone(backbone):
    """Those of one prompt are read together; two of them are equal, one is the beginning of another."""
    judge = PreferenceModel.from_backbone(backbone, torch.Generator().manual_seed(0), cyclic=2, template="plain")
    texts = [("3+4=", "7!"), ("5+5=", "10."), ("3+4=", "7!."), ("5+5=", "10."), ("3+4=", "8"), ("3+4=", "")]
    together = torch.cat([part.view(6, -1) for part in judge.read(texts)], 1)
    alone = torch.cat([torch.cat([part.view(1, -1) for part in judge.read([text])], 1) for text in texts])
    assert torch.allclose(together, alone, atol=1e-5)
    assert (together[0] - together[2]).abs().max() > 0.01


@pytest.mark.parametrize("heads", HEADS)
def test_a_saved_judge_has_identical_preferences(backbone, tmp_path, heads):
    judge = make(backbone, heads)
    judge.save_pretrained(tmp_path / "judge")
    loaded = load_judge(str(tmp_path / "judge"))
    assert torch.equal(preferences(loaded), preferences(judge))
    assert loaded.template == "plain"


def test_a_judge_made_of_a_bfloat16_backbone_is_loaded_as_it_was_saved(shared, tmp_path):
    """Training is in float32, and so is the saved judge."""
    judge = PreferenceModel.from_backbone(shared / "tiny-mistral/chat32k", torch.Generator().manual_seed(0), template="mistral")
    judge.save_pretrained(tmp_path / "judge")
    texts = ["Rayleigh scattering.", "It is not blue."]
    loaded = load_judge(str(tmp_path / "judge"))
    assert torch.equal(preferences(loaded, texts, "Why?"), preferences(judge, texts, "Why?"))


def test_a_text_longer_than_the_context_is_judged_by_its_two_ends(backbone):
    """The context of this world is 32 tokens: what differs in the middle cannot count, what differs at either end does."""
    texts = ["1" * 50, "1" * 25 + "2" + "1" * 24, "2" + "1" * 49, "1" * 49 + "2", "1" * 70]
    P = preferences(make(backbone), texts)
    assert P[0, 1] == P[0, 4] == 0.5 and P[0, 2] != 0.5 != P[0, 3] != P[0, 2]


def test_a_cap_keeps_the_beginning_of_the_prompt_and_the_end_of_the_response_with_its_marks(backbone):
    judge = make(backbone)
    whole = judge.judged_ids("3+4=5+9=", "123456789")  # a token a letter, between BOS and EOS
    assert len(whole) == 1 + 8 + 9 + 1
    for cap, first, last in ((6, 3, 3), (7, 3, 4), (19, 9, 10), (2, 1, 1)):
        judge.max_tokens = cap
        kept = judge.judged_ids("3+4=5+9=", "123456789")
        assert kept == (whole if cap == 19 else whole[:first] + whole[-last:])
    judge.max_tokens = 1000  # the context is smaller
    assert len(judge.judged_ids("3+4=" * 40, "7.")) == 32


def test_a_cap_leaves_a_short_response_to_a_long_prompt_whole(backbone):
    judge = make(backbone)
    judge.max_tokens = 12
    ids = judge.judged_ids("3+4=" * 40, "7!")
    assert len(ids) == 12 and ids[-3:] == [*judge.tokenizer.encode("7!"), judge.tokenizer.eos]
    assert preferences(judge, ["7!", "8."], "3+4=" * 40)[0, 1] != 0.5


def test_a_judge_is_loaded_with_its_cap_and_one_without_is_saved_as_before_there_was_one(backbone, tmp_path):
    texts = ["1" * 25 + "2" + "1" * 25, "1" * 51]
    for cap in (None, 20):
        judge = make(backbone)
        judge.max_tokens = cap
        judge.save_pretrained(tmp_path / str(cap))
        head = json.loads((tmp_path / str(cap) / "config.json").read_text())["preference_head"]
        assert head == {"scalar": True, "cyclic": 3, "template": "plain"} | ({"max_tokens": 20} if cap else {})
        loaded = load_judge(str(tmp_path / str(cap)))
        assert loaded.max_tokens == cap and torch.equal(preferences(loaded, texts), preferences(judge, texts))


# ------------------------------------------------------------------------------------------------ rules


def by_length(prompt, responses, scale=1.0):
    length = torch.tensor([float(len(text)) for text in responses])
    return torch.sigmoid(scale * (length[:, None] - length))


def test_a_rule_is_found_by_module_and_function():
    P = load_judge("toy.text_game:oracle").preferences("3+4=", ["7.", "7!", "8."])
    assert torch.allclose(P, torch.tensor([[0.5, 0.9, 0.95], [0.1, 0.5, 0.95], [0.05, 0.05, 0.5]]))


def test_a_rule_takes_json_arguments_after_a_second_colon():
    P = load_judge('toy.text_game:oracle:{"strengths": [0.6, 0.7, 0.8]}').preferences("3+4=", ["7.", "7!", "7?"])
    assert P[0, 1].item() == pytest.approx(0.6) and P[1, 2].item() == pytest.approx(0.7)


def test_a_rule_in_the_current_folder_is_found(tmp_path, monkeypatch):
    (tmp_path / "my_rule_of_thumb.py").write_text("def judge(prompt, responses):\n    return [[0.5, 0.25], [0.75, 0.5]]\n")
    monkeypatch.chdir(tmp_path)
    assert load_judge("my_rule_of_thumb:judge").preferences("p", ["a", "b"]).tolist() == [[0.5, 0.25], [0.75, 0.5]]


def test_rules_judge_many_prompts():
    tables = Rule(by_length, scale=2.0).preferences_many(["p", "q"], [["a", "bb"], ["cc", "d"]])
    assert tables.shape == (2, 2, 2) and tables[0, 1, 0] == tables[1, 0, 1] > 0.8


@pytest.mark.parametrize("table", [[[0.5, 0.5]], [0.5, 0.5], [[[0.5]]], 0.5])
def test_a_rule_that_returns_the_wrong_shape_is_named(table):
    def lopsided(prompt, responses):
        return table

    with pytest.raises(ValueError, match=r"lopsided: expected a 2 × 2 table for prompt 'p', found shape"):
        Rule(lopsided).preferences("p", ["a", "b"])


def test_a_rule_that_returns_nothing_is_named():
    def absent_minded(prompt, responses):
        return None

    with pytest.raises(ValueError, match="absent_minded: expected a 2 × 2 table"):
        Rule(absent_minded).preferences("p", ["a", "b"])


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("no/such/folder", "judge no/such/folder: no such folder, and not of the form module:function"),
        ("no_such_module:f", "judge no_such_module:f: No module named 'no_such_module'"),
        ("toy.text_game:no_such_rule", "judge toy.text_game:no_such_rule: .*has no attribute 'no_such_rule'"),
        ("toy.text_game:oracle:{strengths}", "judge toy.text_game:oracle:.*: expected keyword arguments as a JSON object"),
        ("toy.text_game:oracle:[1]", r"judge toy.text_game:oracle:\[1\]: .*JSON"),
        (":oracle", "judge :oracle: .*module:function"),
    ],
)
def test_a_judge_that_is_not_there_is_named(spec, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load_judge(spec)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ('ensemble:{"judges": "toy.text_game:oracle"}', "judges are 'toy.text_game:oracle', expected a list of"),
        ('ensemble:{"judges": [1]}', r"judges are \[1\], expected a list of checkpoint folders and module:function"),
        ('ensemble:{"weights": [1]}', "missing 1 required positional argument: 'judges'"),
        ('transitive:{"judge": ["toy.text_game:oracle"]}', r"judge is \['toy.text_game:oracle'\], expected a string"),
    ],
)
def test_wrong_members_of_a_judge_are_named_in_one_sentence(spec, message):
    with pytest.raises(ValueError, match=message) as error:
        load_judge(spec)
    assert str(error.value).startswith(f"judge {spec}: ") and "\n" not in str(error.value)


def test_an_empty_module_name_is_not_called_broken_json():
    with pytest.raises((ValueError, FileNotFoundError), match="^(?!.*arguments are not JSON)"):
        load_judge(":oracle")


def test_a_checkpoint_without_a_head_is_refused(backbone):
    with pytest.raises(ValueError, match="config.json: preference_head is nothing, expected a judge"):
        load_judge(str(backbone))


def test_an_object_with_preferences_alone_is_a_judge(tmp_path, monkeypatch):
    source = "class Coin:\n    def preferences(self, prompt, responses):\n        return [[0.5, 0.5], [0.5, 0.5]]\n"
    (tmp_path / "my_object.py").write_text(source)
    monkeypatch.chdir(tmp_path)
    assert (load_judge("my_object:Coin").preferences_many(["p"], [["a", "b"]]) == 0.5).all()


# ------------------------------------------------------------------------------------------------ validation


def noisy_pairs(count, seed):
    """Labels are coins, so whatever is learned from them is wrong elsewhere."""
    generator = torch.Generator().manual_seed(seed)
    digits = torch.randint(10, (count, 3), generator=generator).tolist()
    return [{"prompt": f"{a}+{b}=", "chosen": f"{c}.", "rejected": f"{c}!", "probability": float(c % 2)} for a, b, c in digits]


def test_held_out_prompts_are_whole_and_never_trained_on():
    pairs = noisy_pairs(300, 0)
    training, held_out = split_pairs(pairs, 0.2, torch.Generator().manual_seed(0))
    assert len(training) + len(held_out) == 300 and not {p["prompt"] for p in training} & {p["prompt"] for p in held_out}
    assert 0.1 < len({p["prompt"] for p in held_out}) / len({p["prompt"] for p in pairs}) < 0.3
    assert split_pairs(pairs, 0.0, torch.Generator()) == [pairs, []]
    for share, few in ((0.9, pairs[:1]), (0.01, pairs[:2])):
        with pytest.raises(ValueError, match="none would be left"):
            split_pairs(few, share, torch.Generator())


def test_the_judge_ends_with_its_best_epoch_and_stops_after_it(backbone):
    """Trained on labels that are the opposite of the held-out ones, it is best early."""
    judge, pairs = make(backbone), noisy_pairs(64, 1)
    opposite = [pair | {"probability": 1 - pair["probability"]} for pair in pairs]
    generator = torch.Generator().manual_seed(0)
    steps = train_preference_model(judge, pairs, 10, 3e-3, 16, generator, held_out=opposite, patience=2)
    epochs = [row for row in steps if "held_out_loss" in row]
    best = min(epochs, key=lambda row: row["held_out_loss"])
    assert len(epochs) == best["epoch"] + 2 < 10
    assert [row["step"] for row in steps if "step" in row] == list(range(1, 4 * len(epochs) + 1))
    again = prefmodel.evaluate_pairs(judge, opposite, 16)
    assert again["held_out_loss"] == pytest.approx(best["held_out_loss"], abs=1e-6)


def test_held_out_accuracy_is_over_all_pairs_with_a_majority_whatever_the_batches(backbone):
    """Three pairs are decided, one of them alone in a batch of ties: each counts a third."""
    judge = make(backbone)
    pairs = [{"prompt": "3+4=", "chosen": "7.", "rejected": "8!", "probability": p} for p in (1.0, 1.0, 0.0, 0.5, 0.5)]
    expected = 2 / 3 if preferences(judge, ["7.", "8!"])[0, 1] > 0.5 else 1 / 3
    for batch in (1, 2, 3, 5):
        assert prefmodel.evaluate_pairs(judge, pairs, batch)["held_out_accuracy"] == pytest.approx(expected)


@pytest.mark.parametrize("micro_batch", [1, 3, 7])
def test_micro_batches_take_the_step_of_the_whole_batch(backbone, micro_batch):
    """7 does not divide 8: parts of 7 and 1, and of 2 in the last batch of 10 pairs. The optimizer is Adam, whose steps
    would hide a gradient of the wrong scale: so the gradient itself is compared, and the numbers of the steps."""
    pairs, judges, rows, gradients = noisy_pairs(10, 3), [], [], []

    def gradient_of(size):
        judge = make(backbone, spread=0.1)
        stopped = torch.optim.SGD(judge.parameters(), lr=0.0)
        stopped.zero_grad = lambda **_: gradients.append([p.grad.clone() for p in judge.parameters()])
        prefmodel.train_step(judge, stopped, pairs[:8], size, 0.0, "step 1")

    for size in (8, micro_batch):
        gradient_of(size)
        judges.append(make(backbone, spread=0.1))
        generator = torch.Generator().manual_seed(0)
        rows.append(train_preference_model(judges[-1], pairs, 2, 1e-3, 8, generator, micro_batch=size))
    for whole, part in zip(*gradients):
        assert torch.allclose(whole, part, rtol=1e-4, atol=1e-6)
    for whole, part in zip(*rows):
        assert whole["loss"] == pytest.approx(part["loss"], abs=1e-4) and whole["accuracy"] == part["accuracy"]


def test_the_learning_rate_rises_and_falls_over_the_training_steps_alone(backbone):
    """Held-out rows between the steps do not count: 30 steps, a tenth of them rising, the last one a thirtieth of the peak."""
    pairs = noisy_pairs(24, 2)
    steps = train_preference_model(make(backbone), pairs, 10, 1e-3, 8, torch.Generator().manual_seed(0), held_out=pairs)
    lr = [row["lr"] for row in steps if "lr" in row]
    assert len(lr) == 30 and lr[:3] == pytest.approx([1e-3 / 3, 2e-3 / 3, 1e-3 * 28 / 30]) and lr[-1] == pytest.approx(1e-3 / 30)


def test_a_judge_can_be_trained_in_bfloat16(backbone, tmp_path):
    generator = torch.Generator().manual_seed(0)
    head = {"scalar": True, "cyclic": 2, "template": "plain"}
    judge = PreferenceModel.from_backbone(backbone, generator, dtype="bfloat16", **head)
    pairs = [{"prompt": "3+4=", "chosen": "7.", "rejected": "8.", "probability": 1.0}] * 16
    steps = train_preference_model(judge, pairs, 10, 1e-3, 8, generator)
    assert steps[-1]["loss"] < 0.5 * steps[0]["loss"]
    judge.save_pretrained(tmp_path / "judge")
    loaded = PreferenceModel.from_pretrained(tmp_path / "judge")
    assert loaded.scalar_head.weight.dtype == torch.bfloat16
    assert torch.equal(preferences(loaded), preferences(judge))


# ------------------------------------------------------------------------------------------------ stopped and continued


@pytest.fixture(scope="module")
def training(backbone, tmp_path_factory):
    """The flags of a training of 4 epochs, of which each takes 5 steps and a look at held-out pairs; and what it comes to.

    On labels that are coins its second epoch is the best, so that the best weights are older than the last state."""
    folder = tmp_path_factory.mktemp("training")
    write_lines(folder / "pairs.jsonl", noisy_pairs(50, 6))
    flags = ["--pairs", folder / "pairs.jsonl", "--backbone", backbone, "--template", "plain", "--batch", 8, "--epochs", 4]
    flags = [str(flag) for flag in [*flags, "--held-out", 0.2, "--lr", 1e-2, "--save-minutes", 0]]
    assert prefmodel.main(["train", *flags, "--out", str(folder / "whole")]) == 0
    return flags, files_of(folder / "whole")


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix != ".png"}


def train_and_be_killed(flags, moment, limit=None):
    """The body of a child process."""
    torch.set_num_threads(1)
    if moment:
        children.arm(*moment)
    if limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    sys.exit(prefmodel.main(["train", *flags]))


def end_of(*arguments):
    """The exit code of a training in a process of its own."""
    child = children.processes().Process(target=train_and_be_killed, args=arguments)
    child.start()
    child.join(60)
    return child.exitcode


def test_the_training_that_is_killed_below_is_best_in_the_middle(training):
    """In its second epoch of four, each of which has 5 steps and a held-out loss."""
    rows = [json.loads(line) for line in training[1]["metrics.jsonl"].splitlines()]
    losses = [row["held_out_loss"] for row in rows if "held_out_loss" in row]
    assert len(rows) == 4 * 6 and losses.index(min(losses)) == 1


def test_killed_at_random_steps_again_and_again_it_ends_with_the_same_bytes(training, tmp_path):
    flags, expected = training
    flags = [*flags, "--out", str(tmp_path / "judge")]
    draw = random.Random(5)
    for first in (1, 9, 17):
        step = draw.randrange(first, first + 7)
        when = draw.choice(["before", "after"])  # the state has its name
        assert end_of(flags, (when, f"fit-{step}", 1)) == -signal.SIGKILL
        kept = [path.name for path in (tmp_path / "judge.unfinished").glob("fit-*") if path.suffix != ".tmp"]
        assert f"fit-{step if when == 'after' else step - 1}" in (kept or ["fit-0"])
        assert not (tmp_path / "judge").exists()
    assert prefmodel.main(["train", *flags]) == 0
    assert files_of(tmp_path / "judge") == expected
    assert [path.name for path in tmp_path.iterdir()] == ["judge"]


@pytest.mark.parametrize("when", ["before", "after"])
def test_killed_as_the_judge_gets_its_name_it_is_finished_by_the_same_command(training, tmp_path, when):
    flags, expected = training
    flags = [*flags, "--out", str(tmp_path / "judge")]
    assert end_of(flags, (when, "/judge", 1)) == -signal.SIGKILL
    assert (tmp_path / "judge").exists() == (when == "after")
    assert prefmodel.main(["train", *flags]) == 0
    assert files_of(tmp_path / "judge") == expected and [path.name for path in tmp_path.iterdir()] == ["judge"]


def test_patience_counts_over_a_kill(training, tmp_path):
    """Stopped after the last held-out loss that it looked at: nothing is trained any more."""
    flags = [*training[0], "--patience", "1"]
    assert prefmodel.main(["train", *flags, "--out", str(tmp_path / "whole")]) == 0
    expected = files_of(tmp_path / "whole")
    rows = len(expected["metrics.jsonl"].splitlines())
    assert rows < 4 * 6
    assert end_of([*flags, "--out", str(tmp_path / "judge")], ("after", f"fit-{rows}", 1)) == -signal.SIGKILL
    assert prefmodel.main(["train", *flags, "--out", str(tmp_path / "judge")]) == 0
    assert files_of(tmp_path / "judge") == expected


def test_a_training_that_patience_ends_says_so_and_a_finished_one_that_it_is(training, tmp_path, capsys):
    """A training of all its epochs does not; other settings, and what somebody else has there, are refused."""
    flags = [*training[0], "--patience", "1", "--out", str(tmp_path / "judge")]
    assert prefmodel.main(["train", *flags]) == 0
    said = capsys.readouterr().out.splitlines()
    assert "stopped after epoch 3 of 4: no better held-out loss for --patience 1" in said
    assert said[-1] == f"{tmp_path}/judge: the judge, metrics.jsonl and learning.png are there"

    before = files_of(tmp_path / "judge")
    assert prefmodel.main(["train", *flags, "--save-minutes", "3"]) == 0
    assert capsys.readouterr().out.startswith(f"{tmp_path}/judge: finished already; the judge, metrics.jsonl")
    assert prefmodel.main(["train", *flags, "--seed", "7"]) == 2
    assert "exists already, and nothing is written over it; choose another --out" in capsys.readouterr().err
    assert files_of(tmp_path / "judge") == before

    assert prefmodel.main(["train", *training[0], "--out", str(tmp_path / "all")]) == 0
    assert "stopped after" not in capsys.readouterr().out


def test_a_full_disk_ends_a_training_with_code_2_and_the_same_command_continues(training, tmp_path):
    flags, expected = training
    flags = [*flags, "--out", str(tmp_path / "judge")]
    assert end_of(flags, None, 20_000) == 2
    assert not (tmp_path / "judge").exists()
    assert prefmodel.main(["train", *flags]) == 0
    assert files_of(tmp_path / "judge") == expected


def interrupt(monkeypatch, step):
    """Ctrl-C before a step."""
    take = prefmodel.train_step

    def interrupted(*arguments):
        if arguments[-1] == f"step {step}":
            raise KeyboardInterrupt
        return take(*arguments)

    monkeypatch.setattr(prefmodel, "train_step", interrupted)


def test_control_c_says_that_the_same_command_continues_and_other_settings_are_refused(training, tmp_path, capsys, monkeypatch):
    flags, expected = training
    flags = ["train", *flags, "--out", str(tmp_path / "judge")]
    with monkeypatch.context() as patch:
        interrupt(patch, 7)
        assert prefmodel.main(flags) == 130
    assert "the same command continues" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "judge.unfinished").glob("fit-*")] == ["fit-7"]  # 6 steps, and a held-out loss

    other = tmp_path / "other.jsonl"
    write_lines(other, noisy_pairs(50, 5))
    for changed, named in (
        (["--lr", "2"], "this run was started with --lr 0.01, now it is 2.0"),
        (["--pairs", str(other)], f"--pairs {other} is not what this run was started with"),
    ):
        assert prefmodel.main([*flags, *changed]) == 2
        error = capsys.readouterr().err.strip()
        assert re.search(f"judge.unfinished/config.json: {named}", error.splitlines()[-1])

    # A file with the same bytes may lie elsewhere, and what does not change the judge is free.
    other.write_bytes(Path(flags[flags.index("--pairs") + 1]).read_bytes())
    assert prefmodel.main([*flags, "--pairs", str(other), "--save-minutes", "inf"]) == 0
    assert files_of(tmp_path / "judge") == expected


def test_micro_batches_may_change_on_the_way(training, tmp_path, monkeypatch):
    flags = ["train", *training[0], "--out", str(tmp_path / "judge")]
    with monkeypatch.context() as patch:
        interrupt(patch, 7)
        assert prefmodel.main(flags) == 130
    assert prefmodel.main([*flags, "--micro-batch", "3"]) == 0
    lines = [files["metrics.jsonl"].splitlines() for files in (training[1], files_of(tmp_path / "judge"))]
    for whole, part in zip(*map(lambda rows: map(json.loads, rows), lines), strict=True):
        key = "loss" if "loss" in whole else "held_out_loss"
        assert whole[key] == pytest.approx(part[key], abs=0.01)


def test_before_anything_is_saved_a_training_may_begin_again_with_other_settings(training, tmp_path, monkeypatch):
    flags = ["train", *training[0], "--out", str(tmp_path / "judge"), "--save-minutes", "inf"]
    with monkeypatch.context() as patch:
        interrupt(patch, 7)
        assert prefmodel.main(flags) == 130
    assert [path.name for path in (tmp_path / "judge.unfinished").iterdir()] == ["config.json"]
    assert prefmodel.main([*flags, "--epochs", "1"]) == 0 and [path.name for path in tmp_path.iterdir()] == ["judge"]


def test_a_damaged_state_is_named(training, tmp_path, capsys, monkeypatch):
    flags = ["train", *training[0], "--out", str(tmp_path / "judge")]
    with monkeypatch.context() as patch:
        interrupt(patch, 3)
        assert prefmodel.main(flags) == 130
    (tmp_path / "judge.unfinished/fit-2/1-of-1.safetensors").write_bytes(b"half")
    assert prefmodel.main(flags) == 2
    assert "judge.unfinished/fit-2/1-of-1.safetensors: not the state of this fit" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------ command line


def command(monkeypatch, capsys, *arguments):
    """Exit code and standard error of `python prefmodel.py train ...`, without a new process."""
    monkeypatch.setattr("sys.argv", ["prefmodel.py", "train", *map(str, arguments)])
    code = prefmodel.main()
    return code, capsys.readouterr().err.strip()


def test_train_writes_a_judge_from_real_pairs(shared, tmp_path, capsys):
    with open(shared / "pandalm/pairs.jsonl", encoding="utf-8") as file:
        (tmp_path / "pairs.jsonl").write_text("".join(file.readlines()[:40]), encoding="utf-8")
    folder = shared / "tiny-mistral/chat32k"
    flags = ["--pairs", tmp_path / "pairs.jsonl", "--backbone", folder, "--out", tmp_path / "judge", "--epochs", 1, "--batch", 10]
    assert prefmodel.main(["train", *map(str, flags), "--held-out", "0.25"]) == 0
    assert "held-out pairs: loss" in capsys.readouterr().out and (tmp_path / "judge/learning.png").exists()
    P = preferences(load_judge(str(tmp_path / "judge")), ["Rayleigh.", "It is not."], "Why is the sky blue?")
    assert P[0, 1] != 0.5 and (P[0, 1] + P[1, 0]).item() == pytest.approx(1, abs=1e-6)
    rows = [json.loads(line) for line in (tmp_path / "judge/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows[:-1]] == list(range(1, len(rows))) and "held_out_loss" in rows[-1]


def test_training_twice_from_one_seed_gives_one_judge(backbone, tmp_path, monkeypatch, capsys):
    row = {"prompt": "3+4=", "chosen": "7.", "rejected": "8."}
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row | {"probability": p}) + "\n" for p in (1, 0.5, 0.7)))
    for name in "ab":
        flags = ["--pairs", tmp_path / "pairs.jsonl", "--backbone", backbone, "--out", tmp_path / name, "--template", "plain"]
        assert command(monkeypatch, capsys, *flags, "--seed", 3, "--batch", 2)[0] == 0
    a, b = ((tmp_path / name / "model.safetensors").read_bytes() for name in "ab")
    assert a == b


def test_a_missing_pairs_file_ends_the_command_with_one_line(backbone, tmp_path):
    flags = ["--pairs", tmp_path / "none.jsonl", "--backbone", backbone, "--out", tmp_path / "judge"]
    done = subprocess.run([sys.executable, ROOT / "prefmodel.py", "train", *flags], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr == f"prefmodel.py: {tmp_path}/none.jsonl: no such file\n"


def test_a_broken_pairs_line_ends_the_command_with_one_line(backbone, tmp_path, monkeypatch, capsys):
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "p", "chosen": "a", "rejected": "b"}\n{"prompt": \n')
    flags = ["--pairs", tmp_path / "pairs.jsonl", "--backbone", backbone, "--out", tmp_path / "judge"]
    code, error = command(monkeypatch, capsys, *flags)
    assert code == 2 and error.startswith(f"prefmodel.py: {tmp_path}/pairs.jsonl, line 2: not valid JSON")
    assert len(error.splitlines()) == 1 and not (tmp_path / "judge").exists()


def test_a_missing_backbone_ends_the_command_with_one_line(tmp_path, monkeypatch, capsys):
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "p", "chosen": "a", "rejected": "b"}\n')
    flags = ["--pairs", tmp_path / "pairs.jsonl", "--backbone", tmp_path / "no", "--out", tmp_path / "judge"]
    code, error = command(monkeypatch, capsys, *flags)
    assert code == 2 and f"{tmp_path}/no" in error and len(error.splitlines()) == 1
