"""Claims about real/instructions.py and what it is made of: prompts, constraints, the rule, the measurement."""

import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from children import content
from chat_templates import write_letters
from conftest import ROOT, tiny_config

from data import Tokenizer
from engine.files import read_json, read_lines, write_json, write_lines
from judges.load import load_judge
from model import Transformer, initialize
from real import ifeval, measurement, prompts, rule
from real.constraints import HELD_OUT, KINDS, TRAINING, Constraint, constraints_of
from real.instructions import main
from real.prompts import SPLITS, draw_prompts, topic_of, topics
from sppo import sequence_logps, win_rates

# ------------------------------------------------------------------------------------------------ constraints

DEEP = "[" * 99999  # more than Python reads
FIVE = "It is about five words."
CHECKS = {  # arguments, texts that pass, texts that fail
    "at most": ({"n": 3}, ["one two three", "don't stop-gap now", ""], ["one two three four"]),
    "at least": ({"n": 3}, ["one two three", "- one\n- two\n- three"], ["one, two!", "- - -"]),
    "between": ({"low": 2, "high": 3}, ["one two", "one two three"], ["one", "one two three four"]),
    "sentences": (
        {"n": 2},
        ["One. Two!", "It is 3.5 long. Is it?", 'He said "no." She left.', "1. One.\n2. Two.", "One. Two, cut"],
        ["One.", "One. Two. Three.", "No mark, and another line", "One. Two. And then"],
    ),
    "paragraphs": ({"n": 2}, ["One.\n\nTwo.", "\n\nOne\nline.\n \n\nTwo."], ["One.\nTwo.", "One.\n\nTwo.\n\nThree."]),
    "bullets": (
        {"n": 2},
        ["- one\n- two", "Here:\n* one\n\n * two", "• one\n• two"],
        ["- one", "- one\n- two\n- three", "-one\n-two"],
    ),
    "numbered": (
        {"n": 2},
        ["1. one\n2. two", "Here:\n1) one\n\n2) two"],
        ["1. one", "1. one\n3. two", "1. a\n2. b\n3. c", "1.a\n2.b"],
    ),
    "lowercase": ({}, ["all is small, 3 too."], ["No", "iPhone", "123", ""]),
    "capitals": ({}, ["ALL IS LARGE, 3 TOO."], ["No", "NO iPHONE", "123", ""]),
    "no commas": ({}, ["none; at all", ""], ["one, at least"]),
    "keyword": ({"word": "bee", "n": 2}, ["A bee is a Bee.", "bee-bee"], ["bees and a bee", "bee"]),
    "forbidden": ({"word": "bee"}, ["bees", "a wasp"], ["A Bee.", "the bee's"]),
    "start": ({"phrase": "In short"}, ["In short, yes", "\nIn short"], ["in short", "Well. In short", '"In short"']),
    "end": (
        {"phrase": "That is all."},
        ["Yes. That is all.", "That is all.\n"],
        ["That is all", 'That is all."', "That is all. Bye."],
    ),
    "quotes": ({}, ['"Yes."', "“Yes.”\n"], ['"Yes', 'Yes "no"', '"', '""']),
    "title": (
        {},
        [f"<<Bees>>\n{FIVE}", f"{FIVE} <<On a bee>>"],
        [f"{mark} {FIVE}" for mark in ("<Bees>", "<<>>", "<< >>", "<<title>>", "<<Bees\n>>")] + ["<<One two three four five>>"],
    ),
    "json": (
        {"first": "fact", "second": "reason"},
        ['{"fact": "a", "reason": 1}', '```json\n{"reason": [], "fact": null}\n```'],
        ['{"fact": "a"}', '{"fact": 1, "reason": 2, "more": 3}', "[]", '{"fact": "a", "reas', 'So: {"fact": 1}', DEEP],
    ),
    "highlights": ({"n": 2}, ["a *big* and **old** one", "* a *b* *c*"], ["*one*", "* one\n* two", "a * b * c"]),
    "placeholders": ({"n": 2}, ["[name] of [the town]"], ["[name]", "[] [ ]", "(name) (town)"]),
    "postscript": ({}, ["Yes.\nP.S. No.", "Yes.\n\nP.S.: No."], ["Yes. P.S. No.", "Yes.\nP.S.", "Yes.\nPS no"]),
    "question": ({}, ["Is it?", "It is. Is it?\n"], ["Is it? Yes.", "It is"]),
}  # fmt: skip


def test_every_kind_has_texts_that_pass_and_texts_that_fail():
    assert CHECKS.keys() == KINDS.keys() and len(TRAINING) >= 12
    assert all(passing and failing for _, passing, failing in CHECKS.values())


@pytest.mark.parametrize("name", CHECKS)
def test_a_check_tells_which_texts_obey(name):
    arguments, passing, failing = CHECKS[name]
    constraint = Constraint(name, arguments)
    assert [text for text in passing if not constraint.satisfied(text)] == []
    assert [text for text in failing if not 0 <= constraint.nearness(text) < 1] == []


@pytest.mark.parametrize("name", CHECKS)
def test_a_constraint_is_read_back_from_its_sentence(name):
    constraint = Constraint(name, CHECKS[name][0])
    assert constraints_of(f"Tell me about the moon. {constraint.text}") == [constraint]


# ------------------------------------------------------------------------------------------------ prompts

DRAWN = {split: draw_prompts(split, 200, seed=0) for split in SPLITS}


def names_of(split):
    return {constraint.name for prompt in DRAWN[split] for constraint in constraints_of(prompt)}


def test_what_a_prompt_asks_for_is_all_in_its_text():
    for prompt in sum(DRAWN.values(), []):
        found = constraints_of(prompt)
        assert 1 <= len(found) <= 2 and not any(
            c.kind.takes & other.kind.takes for c in found for other in found if c is not other
        )
        assert prompt == " ".join([topic_of(prompt).task, *(constraint.text for constraint in found)])


def test_splits_share_no_topic_and_no_kind():
    seen = {split: {topic_of(prompt).task for prompt in DRAWN[split]} for split in SPLITS}
    assert seen["training"].isdisjoint(seen["topics"] | seen["kinds"])
    assert names_of("training") == names_of("topics") == set(TRAINING)
    assert names_of("kinds") == set(HELD_OUT) and names_of("kinds").isdisjoint(names_of("training"))


def test_prompts_are_a_function_of_the_seed_and_all_different():
    for split in SPLITS:
        assert draw_prompts(split, 200, seed=0) == DRAWN[split] != draw_prompts(split, 200, seed=1)
        assert len(set(DRAWN[split])) == 200
        assert draw_prompts(split, 40, seed=0) == DRAWN[split][:40]


def test_few_prompts_are_of_many_topics_and_of_every_kind():
    for split, (_, kinds) in SPLITS.items():
        few = draw_prompts(split, len(kinds), seed=3)
        assert len({topic_of(prompt).task for prompt in few}) == len(kinds)
        assert {constraints_of(prompt)[0].name for prompt in few} == set(kinds)


def test_topics_have_enough_words_and_none_twice():
    training, held_out = topics(prompts.TRAINING_TOPICS), topics(prompts.HELD_OUT_TOPICS)
    assert len(training) >= 40 and len(held_out) >= 24 and training.keys().isdisjoint(held_out)
    for topic in (training | held_out).values():
        assert topic.task.endswith(".") and topic.task.count(".") == 1
        assert len(topic.words) == len(set(topic.words)) >= 12


# ------------------------------------------------------------------------------------------------ the rule

PROMPT = "Explain how bees make honey. Use at most 12 words. Do not use any commas."
GOOD = "Bees collect nectar from a flower and keep it in the hive."
CUT = "Bees collect nectar from a flower and keep it in the"
OFF_TOPIC = "It is done in many ways by small friends of ours."
ONE_OF_TWO = "Bees collect nectar, carry it to the hive, and wait."
NONE_OF_TWO = "Well, bees collect nectar from many a flower, then store it in the hive."
LADDER = [GOOD, CUT, OFF_TOPIC, ONE_OF_TWO, NONE_OF_TWO]
DEGENERATE = {
    "empty": "",
    "four words": "Bees bring nectar home.",
    "repetition": "nectar hive nectar hive nectar hive nectar hive.",
    "a copy of the prompt": PROMPT,
    "a copy in other words' company": "I will explain how bees make honey. Use at most 12 words.",
    "a long copy": "Now the nectar " + PROMPT + " of every hive and flower that you can find on earth and so on.",
    "broken characters": "Bees \ufffd\ufffd nectar from the hive.",
}


def test_the_rule_is_a_ladder():
    levels = [rule.level(PROMPT, text) for text in LADDER]
    assert [(level.sound, level.satisfied, level.on_topic, level.ended) for level in levels] == [
        (1, 2, 1, 1),
        (1, 2, 1, 0),
        (1, 2, 0, 1),
        (1, 1, 1, 1),
        (1, 0, 1, 1),
    ]
    table = load_judge("real.instructions:rule").preferences(PROMPT, LADDER)
    assert table[0].tolist() == pytest.approx([0.5, 0.65, 0.7, 0.95, 0.95])  # an end, the topic, constraints
    assert table[3].tolist() == pytest.approx([0.05, 0.05, 0.05, 0.5, 0.95])
    assert torch.allclose(table + table.T, torch.ones(5, 5))


def test_of_two_that_do_not_obey_the_nearer_one_wins_by_a_little():
    prompt = "Explain how bees make honey. Do not use any commas."
    one = "Bees collect nectar from a flower, and keep it in the hive."
    two = "Bees collect nectar from a flower, then carry it, and keep it in the hive."
    assert rule.preferences([rule.level(prompt, text) for text in (one, two)])[0, 1] == pytest.approx(0.7)


@pytest.mark.parametrize("text", DEGENERATE.values(), ids=DEGENERATE)
def test_degenerate_text_loses_to_everything_and_has_no_quality(text):
    assert rule.degenerate(PROMPT, text) and rule.quality(PROMPT, text) == 0
    for other in LADDER:
        assert rule.preferences([rule.level(PROMPT, other), rule.level(PROMPT, text)])[0, 1] == pytest.approx(0.95)


def test_no_response_of_the_ladder_is_degenerate():
    assert not any(rule.degenerate(PROMPT, text) for text in LADDER)


def test_preferences_add_up_to_one_and_equals_tie():
    texts = [*LADDER, *DEGENERATE.values(), GOOD]
    table = load_judge("real.instructions:rule").preferences(PROMPT, texts)
    win_rates(table)  # checks P + Pᵀ = 1 and ½ on the diagonal
    assert table[0, -1] == 0.5 and (table[5:-1, 5:-1] == 0.5).all()


def test_a_topic_needs_two_words_one_of_them_new():
    assert rule.on_topic(PROMPT, "Bees visit flowers.") and rule.on_topic(PROMPT, "Nectar, stored in hives.")
    assert not rule.on_topic(PROMPT, "Bees make honey.")  # both are the prompt's
    assert not rule.on_topic(PROMPT, "Nectar is what they want.")
    assert not rule.on_topic("Tell me about the sun. Do not use any commas.", "On Sunday we start to be hotter.")


def test_words_that_the_prompt_asks_for_are_not_new():
    prompt = 'Explain how bees make honey. Use the word "nectar" at least 2 times.'
    assert not rule.on_topic(prompt, "Nectar and nectar for the bees.")


@pytest.mark.parametrize(
    ("text", "finished"),
    [
        ("It is.", True), ("Is it?\n", True), ('"It is."', True), ("*It is!*", True), ("(It is.)", True),
        ('```json\n{"a": 1}\n```', True), ("- one\n- two.", True), ("[name]", True), ("That is all", False),
        ("It is", False), ("It is,", False), ("- one\n- two", False), ("1. One.\n2.", False), ("One.\n-", False), ("", False),
    ],
)  # fmt: skip
def test_what_looks_finished(text, finished):
    assert rule.ended(PROMPT, text) == finished


def test_an_ending_that_the_prompt_asks_for_is_an_ending():
    prompt = 'Explain how bees make honey. End your answer with the words "and so on"'
    assert rule.ended(prompt, "Nectar and so on") and not rule.ended(PROMPT, "Nectar and so on")


def test_quality_is_between_0_and_1_and_falls_from_rung_to_rung_of_its_own():
    good, cut, off = (rule.quality(PROMPT, text) for text in (GOOD, CUT, OFF_TOPIC))
    assert 1 >= good > 0.95 and cut == pytest.approx(good - 1 / 3, abs=0.01) and off == pytest.approx(good - 1 / 3, abs=0.05)
    assert rule.quality(PROMPT, GOOD + " " + GOOD.replace("keep", "store")) < good  # said twice


def test_a_prompt_of_another_world_is_refused():
    with pytest.raises(ValueError, match="none of the topics"):
        rule.level("What is the capital of France? Use at most 3 words.", GOOD)


# ------------------------------------------------------------------------------------------------ numbers


def record(*responses, prompt=PROMPT, split="topics", logp=-8.0):
    n = len(responses)
    return {
        "split": split,
        "prompt": prompt,
        "responses": list(responses),
        "tokens": [4] * n,
        "stopped": [True] * n,
        "logps": [logp] * n,
    }


LONG = "Tell me about the moon. Use at least 40 words."
BASE = [record(GOOD, OFF_TOPIC), record(NONE_OF_TWO, ""), record(GOOD, GOOD, prompt=LONG, split="kinds")]
FIRST = [record(GOOD, GOOD), record(GOOD, CUT, logp=-16.0), record(GOOD, GOOD, prompt=LONG, split="kinds")]
SECOND = [record("", ""), record("", ""), record(GOOD, GOOD, prompt=LONG, split="kinds")]


def test_numbers_of_small_records_are_those_worked_out_by_hand():
    result = measurement.summarize([BASE, FIRST, SECOND], [1, 2])
    base, first, average = result["base"]["topics"], result["rounds"][0]["topics"], result["average"]["topics"]
    assert result["prompts"] == {"topics": 2, "kinds": 1} and result["responses_per_prompt"] == 2
    # The empty response has no comma and few words: it passes, and is degenerate.
    assert (base["pass"], first["pass"], average["pass"]) == (0.75, 1.0, 1.0)
    assert base["degenerate"] == 0.25 and first["degenerate"] == 0 and average["degenerate"] == 0.5
    assert first["gain"] == pytest.approx(0.25) and base["gain"] == 0 and base["gain_interval"] == [0, 0]

    # GOOD against GOOD and OFF_TOPIC: ½ and .7; against NONE_OF_TWO and "": .95, as CUT.
    assert base["win_rate"] == pytest.approx(0.5)
    assert first["win_rate"] == pytest.approx((0.6 + 0.95) / 2)
    assert first["log_likelihood"] == pytest.approx(-(8 + 16) / 8) and base["log_likelihood"] == -2
    assert first["tokens"] == 4 and first["tokens_unless_short"] == 0
    assert result["rounds"][0]["kinds"]["tokens_unless_short"] == 4
    assert result["constraints"]["base"] == {"at least": 0, "at most": 0.75, "no commas": 0.75}


def test_the_average_is_the_mean_of_the_rounds():
    result = measurement.summarize([BASE, FIRST, SECOND], [1, 2])
    for name in measurement.MEANS:
        rounds = [policy["topics"][name] for policy in result["rounds"]]
        assert result["average"]["topics"][name] == pytest.approx(sum(rounds) / 2)


def test_the_interval_covers_the_mean_as_often_as_it_says():
    generator = torch.Generator().manual_seed(0)
    hits = 0
    for _ in range(200):
        low, high = measurement.interval((torch.rand(60, generator=generator) < 0.3).double())
        hits += low <= 0.3 <= high
    assert 180 <= hits <= 199  # 95 % of 200, give or take three standard deviations


# ------------------------------------------------------------------------------------------------ the command

TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
FLAGS = """
    --rounds 2 --samples 3 --epochs 1 --batch 3 --max-new-tokens 10 --pool 16 --lr 1e-3 --micro-tokens 2000
    --training-prompts 4 --held-out-prompts 3 --measured 2 --save-minutes 0
""".split()


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory):
    """A random chat model that reads and writes letters."""
    folder = tmp_path_factory.mktemp("chat")
    tokens = write_letters(folder)
    names = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
    write_json(folder / "tokenizer_config.json", names | {"chat_template": TEMPLATE})
    config = tiny_config(vocab_size=tokens, max_position_embeddings=1024)
    initialize(Transformer(config), torch.Generator().manual_seed(0)).write_pretrained(folder)
    return folder


def command(policy, *more):
    """The flags of a run in the folder `run` of the folder that we are in: its config.json has the path of its prompts."""
    return ["--policy", str(policy), "--out", "run", *FLAGS, *more]


@pytest.fixture(scope="module")
def whole(chat_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(command(chat_model)) == 0
    return folder / "run"


def kept(folder):
    """What must be the same however often it was stopped: all but clocks and pictures."""
    return {name: data for name, data in content(folder).items() if not name.endswith(".png")}


def test_the_command_leaves_what_it_says(whole):
    for name in ("prompts.jsonl", "round-02/policy/model.safetensors", "measure/base.jsonl", "measure/round-02.jsonl"):
        assert (whole / name).is_file(), name
    assert (whole / "measure.png").read_bytes().startswith(b"\x89PNG")

    result = read_json(whole / "measure.json")
    assert result["prompts"] == {"topics": 3, "kinds": 3} and len(result["rounds"]) == 2
    assert result["base"]["topics"]["win_rate"] == pytest.approx(0.5)
    assert -8 < result["base"]["topics"]["log_likelihood"] < -3  # log 99 = 4.6
    page = (whole / "samples.md").read_text()
    assert page.count("\n## ") == 6 and page.count("**Base**") == page.count("**After round 2**") == 6


def test_fewer_rounds_measured_are_the_same_numbers_of_these(whole, chat_model, tmp_path, monkeypatch):
    shutil.copytree(whole, tmp_path / "run", ignore=shutil.ignore_patterns("measure*"))
    monkeypatch.chdir(tmp_path)
    assert main(command(chat_model, "--measure-every", "2")) == 0
    assert sorted(path.name for path in (tmp_path / "run/measure").iterdir()) == ["base.jsonl", "round-02.jsonl"]
    few, all_ = read_json(tmp_path / "run/measure.json"), read_json(whole / "measure.json")
    assert few["measured_rounds"] == [2] and all_["measured_rounds"] == [1, 2]
    assert few["rounds"] == all_["rounds"][1:] and few["base"] == all_["base"]


def test_the_record_has_the_log_likelihood_of_the_base(whole, chat_model):
    """Computed anew, a response at a time, from its text: here each token is a letter."""
    tokenizer, base = Tokenizer(chat_model), Transformer.from_pretrained(chat_model, "bfloat16")
    compared = 0
    for _, row in read_lines(whole / "measure/round-02.jsonl"):
        prompt = tokenizer.prompt_ids(row["prompt"], "chat")
        for text, count, stopped, logp in zip(row["responses"], row["tokens"], row["stopped"], row["logps"]):
            ids = tokenizer.encode(text) + [tokenizer.eos] * stopped
            if len(ids) == count:  # no other special token, which has no text
                tokens = torch.tensor([prompt + ids])
                mask = torch.arange(tokens.shape[1])[None] >= len(prompt)
                assert sequence_logps(base(tokens), tokens, mask).item() == pytest.approx(logp, rel=0.01)
                compared += 1
    assert compared > 6


MOMENTS = {  # a process is killed at its n-th write of such a file
    "within the second fit": ("after", "fit-2", 2),
    "before the base is measured": ("before", "measure/base.jsonl", 1),
    "after a round is measured": ("after", "measure/round-01.jsonl", 1),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_and_continued_it_ends_with_the_same_bytes(moment, whole, chat_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = command(chat_model)
    script = f"""
import torch, children, real.instructions
torch.set_num_threads(1)
children.arm(*{MOMENTS[moment]})
real.instructions.main({arguments})
"""
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    killed = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not (tmp_path / "run/measure.json").exists()

    assert main(arguments) == 0
    assert kept(tmp_path / "run") == kept(whole)


def test_a_finished_run_is_read_and_not_played_again(whole, chat_model, monkeypatch):
    before = kept(whole)
    monkeypatch.chdir(whole.parent)
    monkeypatch.setattr(measurement.Asker, "ask", None)
    monkeypatch.setattr("train.generate", None)
    assert main(command(chat_model)) == 0
    assert kept(whole) == before


@pytest.mark.parametrize(
    ("flag", "value", "said"),
    [
        ("--seed", "1", "holds other prompts"),
        ("--training-prompts", "5", "holds other prompts"),
        ("--held-out-prompts", "2", "delete the folder to measure again"),
        ("--measured", "1", "delete the folder to measure again"),
        ("--eta", "2", "started with --eta 15.0, now it is 2.0"),
        ("--measured", "0", "--measured is 0, expected at least 1"),
    ],
)
def test_other_settings_in_an_old_folder_get_a_sentence(flag, value, said, whole, chat_model, capsys, monkeypatch):
    monkeypatch.chdir(whole.parent)
    assert main(command(chat_model, flag, value)) == 2
    assert said in capsys.readouterr().err


def test_without_the_model_nothing_is_written_and_its_maker_is_named(tmp_path, capsys):
    assert main(["--policy", str(tmp_path / "none"), "--out", str(tmp_path / "run")]) == 2
    assert "python -m real.smollm2" in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_several_processes_are_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["--policy", str(tmp_path), "--out", str(tmp_path / "run")]) == 2
    assert "without torchrun" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------ IFEval


def test_ifeval_gets_its_lines_back_with_greedy_responses(chat_model, tmp_path):
    lines = [{"key": n, "prompt": f"Say {n}.", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]} for n in (1, 2)]
    write_lines(tmp_path / "prompts.jsonl", lines)
    flags = ["--policy", str(chat_model), "--prompts", f"{tmp_path}/prompts.jsonl", "--max-new-tokens", "5"]
    for name in ("first", "second"):
        assert ifeval.main([*flags, "--out", str(tmp_path / name), "--seed", str(len(name))]) == 0
    first, second = [[row for _, row in read_lines(tmp_path / name)] for name in ("first", "second")]
    assert first == second and [row.pop("response") != "" for row in first] == [True, True] and first == lines
