"""Claims about what a kill inside sampling or judging costs: only what was open, and no bit of the result.

A child process counts what it does in a file that outlives it, and kills itself at a moment that is drawn.
"""

import os
import random
import shutil
import signal
import sys
from collections import Counter

import pytest
import torch
from children import content, flags, processes
from conftest import letters, tiny_settings

import evaluate.__main__ as evaluate_module
import generate
import train
from engine.files import write_lines
from engine.journal import Journal
from generate import draw_seeds
from judges.base import Judge, judge_in_batches
from toy.debug import build_debugging

evaluate = evaluate_module.main

PROMPTS = [f"{a}+{b}=" for a in range(1, 10) for b in range(1, 10)] + [f"{a}+{b}= " for a in range(1, 10) for b in range(1, 10)]
PROMPTS = (PROMPTS + [f" {a}+{b}=" for a in range(1, 10) for b in range(1, 10)])[:200]
SAMPLES = 3
POOL = 8  # responses that are open at the same time


def flat_by_letters(prompt, responses):
    """A rule that says so in a file each time it is asked."""
    note(f"judged {prompt}")
    return letters(prompt, responses)


def note(event):
    """In the file that counts; at the drawn moment the process dies, before or after it has done what it says."""
    if "EVENTS" not in os.environ:
        return
    with open(os.environ["EVENTS"], "a") as file:
        file.write(event + "\n")
    moment = int(os.environ.get("MOMENT", 0)) - 1
    os.environ["MOMENT"] = str(moment)
    if moment == 0:
        os.kill(os.getpid(), getattr(signal, os.environ["SIGNAL"]))


def counted(command, arguments, environment):
    """The body of a child process: a command that notes every response it begins, and every one that it keeps."""
    os.environ |= environment
    torch.set_num_threads(1)
    sys.stdout = sys.stderr = open(os.devnull, "w")
    train.draw_curves = lambda lines, path: None
    admit, add = generate.Pool.admit, Journal.add

    def noted_admit(self, rows, prefix, responses):
        for response in responses:
            note(f"begun {response.seed}")
        return admit(self, rows, prefix, responses)

    def noted_add(self, key, value):
        add(self, key, value)
        note(f"kept {key}")

    generate.Pool.admit, Journal.add = noted_admit, noted_add
    sys.exit({"train": train.main, "evaluate": evaluate}[command](arguments))


def call(command, arguments, events, moment=0, name="SIGKILL"):
    """The child's exit code; -9 of one that was killed."""
    environment = {"EVENTS": str(events), "MOMENT": str(moment), "SIGNAL": name}
    child = processes().Process(target=counted, args=(command, arguments, environment))
    child.start()
    child.join(120)
    return child.exitcode


def events_of(path):
    """How often each thing was done."""
    return Counter(path.read_text().splitlines())


def repeated(events, kind):
    """How many pieces of work were begun more than once, with every repetition."""
    return sum(count - 1 for event, count in events.items() if event.startswith(kind))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    build_debugging(folder)
    write_lines(folder / "prompts.jsonl", [{"prompt": prompt} for prompt in PROMPTS])
    return folder


SETTINGS = dict(judge="test_journal:flat_by_letters", rounds=1, samples=SAMPLES, epochs=1, batch=100, micro_batch=100, pool=POOL)


def test_25_kills_inside_sampling_and_judging_repeat_only_what_was_open(world, tmp_path):
    """200 prompts. Each start lives for a drawn number of events; of 600 responses and 200 judgements none is done for nothing
    but those that were open, and the run ends as one that was never stopped."""
    whole = flags(tiny_settings(world, tmp_path / "whole", **SETTINGS))
    assert call("train", whole, tmp_path / "whole.txt") == 0

    draw = random.Random(0)
    run = flags(tiny_settings(world, tmp_path / "run", **SETTINGS))
    kills = 0
    while (code := call("train", run, tmp_path / "events.txt", draw.randint(20, 90) if kills < 25 else 0)) != 0:
        assert code == -signal.SIGKILL
        kills += 1
    assert kills == 25, "more moments than events: the test would be weaker than it says"
    assert content(tmp_path / "run") == content(tmp_path / "whole")

    events, all_of = events_of(tmp_path / "events.txt"), events_of(tmp_path / "whole.txt")
    judgements = len(PROMPTS) + 1  # and one before, which finds out whether the judge works
    assert sum(all_of[event] for event in all_of if event.startswith("begun")) == len(PROMPTS) * SAMPLES
    assert 0 < repeated(events, "begun") <= kills * POOL
    starts = kills + 1
    assert sum(events[event] for event in events if event.startswith("judged")) - judgements <= 2 * starts
    assert max(events[event] for event in events if event.startswith("kept")) == 1


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_the_signals_that_ask_politely_keep_as_much(name, world, tmp_path):
    run = flags(tiny_settings(world, tmp_path / "run", **SETTINGS))
    assert call("train", run, tmp_path / "events.txt", 300, name) == 130
    assert call("train", run, tmp_path / "events.txt") == 0
    assert repeated(events_of(tmp_path / "events.txt"), "begun") <= POOL


def test_best_of_is_killed_and_goes_on_to_the_same_file(world, tmp_path):
    given = [
        "outputs",
        "--policy",
        f"{world}/policy",
        "--prompts",
        f"{world}/prompts.jsonl",
        "--best-of",
        "3",
        "--pool",
        str(POOL),
    ]
    given += ["--judge", "test_journal:flat_by_letters", "--template", "plain", "--max-new-tokens", "4", "--name", "x"]
    assert call("evaluate", [*given, "--out", str(tmp_path / "whole.json")], tmp_path / "whole.txt") == 0

    moments = [0, 90, 250, 100, 350, 300, 120, 33]
    while (code := call("evaluate", [*given, "--out", str(tmp_path / "some.json")], tmp_path / "events.txt", moments.pop())) != 0:
        assert code == -signal.SIGKILL
    assert not moments
    assert (tmp_path / "some.json").read_bytes() == (tmp_path / "whole.json").read_bytes()
    assert not (tmp_path / "some.json.unfinished").exists()

    events = events_of(tmp_path / "events.txt")
    probes = 8  # each start asks once, to find out whether the judge works
    assert repeated(events, "begun") <= 7 * POOL and repeated(events, "judged") <= 7 + probes
    assert sum(count for event, count in events.items() if event.startswith("judged")) <= len(PROMPTS) + 7 + probes


@pytest.fixture(scope="module")
def played(world, tmp_path_factory):
    folder = tmp_path_factory.mktemp("played") / "run"
    code = call("train", flags(tiny_settings(world, folder, **SETTINGS | dict(rounds=2))), folder.parent / "events.txt")
    assert code == 0
    return folder


def test_distill_goes_on_in_the_middle_of_sampling_and_of_fitting(played, world, tmp_path):
    given = ["distill", str(played), "--prompts", f"{world}/prompts.jsonl", "--samples", "2", "--epochs", "1", "--batch", "20"]
    given += ["--pool", str(POOL), "--template", "plain", "--max-new-tokens", "4", "--save-minutes", "0"]
    assert call("evaluate", [*given, "--out", str(tmp_path / "whole")], tmp_path / "whole.txt") == 0

    # 400 responses are begun and kept, and the 801st event never comes: the last signal arrives in the fit.
    assert call("evaluate", [*given, "--out", str(tmp_path / "some")], tmp_path / "events.txt", 300) == -signal.SIGKILL
    assert call("evaluate", [*given, "--out", str(tmp_path / "some")], tmp_path / "events.txt") == 0
    assert content(tmp_path / "some") == content(tmp_path / "whole")
    assert repeated(events_of(tmp_path / "events.txt"), "begun") <= POOL
    assert not (tmp_path / "some.unfinished").exists()


def test_a_distillation_that_is_stopped_in_its_fit_saves_the_step(played, world, tmp_path, monkeypatch):
    """The same weights as of one that was not: those of the third of ten steps are read back, and the learning rate goes on."""
    given = ["distill", str(played), "--prompts", f"{world}/prompts.jsonl", "--samples", "1", "--epochs", "1", "--batch", "20"]
    given += ["--template", "plain", "--max-new-tokens", "4"]
    assert evaluate([*given, "--out", str(tmp_path / "whole")]) == 0

    step, steps = evaluate_module.optimizer_step, []

    def stopping(*arguments):
        steps.append(arguments[-1])
        if len(steps) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(*arguments)

    monkeypatch.setattr(evaluate_module, "optimizer_step", stopping)
    assert evaluate([*given, "--out", str(tmp_path / "some")]) == 130
    assert [path.name for path in (tmp_path / "some.unfinished").glob("fit-*")] == ["fit-3"]
    assert evaluate([*given, "--out", str(tmp_path / "some")]) == 0
    assert steps == [f"step {n}" for n in range(1, 11)]
    assert content(tmp_path / "some") == content(tmp_path / "whole")


def test_what_a_stopped_evaluation_was_begun_with_must_be_the_same(played, world, tmp_path, capsys):
    out = str(tmp_path / "some.json")
    prompts = tmp_path / "prompts.jsonl"
    shutil.copy(world / "prompts.jsonl", prompts)
    given = [
        "winrate",
        "--policy",
        str(played),
        "--prompts",
        str(prompts),
        "--judge",
        "test_journal:flat_by_letters",
        "--out",
        out,
    ]
    given += ["--template", "plain", "--max-new-tokens", "4", "--samples", "1"]
    assert call("evaluate", given, tmp_path / "events.txt", 500) == -signal.SIGKILL

    assert evaluate([*given, "--seed", "1"]) == 2
    assert "started with --seed 0, now it is 1" in capsys.readouterr().err
    prompts.write_text(prompts.read_text().replace("1+1=", "1+2="))
    assert evaluate(given) == 2
    assert "--prompts" in capsys.readouterr().err
    shutil.copy(world / "prompts.jsonl", prompts)
    assert call("evaluate", [*given, "--pool", "9"], tmp_path / "events.txt") == 0  # how much at a time is free


def test_a_judge_that_fails_at_call_500_of_805_is_asked_305_times_after_that(tmp_path, monkeypatch, capsys):
    pairs = [{"prompt": f"p{n}", "chosen": "yes", "rejected": "no"} for n in range(805)]
    write_lines(tmp_path / "pairs.jsonl", pairs)
    calls = []

    def judge(prompt, responses):
        calls.append(prompt)
        if len(calls) == broken:
            raise ValueError("no more money")
        return letters(prompt, responses)

    monkeypatch.setattr(sys.modules[__name__], "flat_by_letters", judge)
    given = [
        "judge",
        "--judge",
        "test_journal:flat_by_letters",
        "--pairs",
        str(tmp_path / "pairs.jsonl"),
        "--out",
        str(tmp_path / "it"),
    ]
    broken = 500
    assert evaluate(given) == 2
    assert "no more money" in capsys.readouterr().err and len(calls) == 500
    broken = 0
    calls.clear()
    assert evaluate(given) == 0
    assert len(calls) == 306  # call 500 gave no answer


# ------------------------------------------------------------------------------------------------ the file


def test_a_float_comes_back_with_the_same_bits(tmp_path):
    table = torch.rand(7, 7, generator=torch.Generator().manual_seed(0))
    Journal(tmp_path / "j").add("a", table.tolist())
    assert torch.equal(torch.tensor(Journal(tmp_path / "j").get("a")), table)


@pytest.mark.parametrize("cut", range(0, 120, 7))
def test_a_torn_file_gives_back_the_whole_lines_before_and_is_written_on(tmp_path, cut):
    journal = Journal(tmp_path / "j")
    for n in range(4):
        journal.add(str(n), [n])
    text = (tmp_path / "j").read_bytes()
    (tmp_path / "j").write_bytes(text[:cut])

    torn = Journal(tmp_path / "j")
    assert list(torn.known) == [str(n) for n in range(text[:cut].count(b"\n"))]
    torn.add("new", 5)
    assert Journal(tmp_path / "j").known == torn.known | {"new": 5}


@pytest.mark.parametrize("harm", [("[2]", "[7]"), ('"1"', '"9"'), ("\n", "\0"), ("[", " [")])
def test_a_line_that_was_changed_counts_for_nothing(tmp_path, harm):
    journal = Journal(tmp_path / "j")
    for n in range(4):
        journal.add(str(n), [n])
    lines = (tmp_path / "j").read_text().splitlines(keepends=True)
    place = 2 if harm[0] == "[2]" else 1
    lines[place] = lines[place].replace(*harm)
    (tmp_path / "j").write_text("".join(lines))
    assert list(Journal(tmp_path / "j").known) == ["0", "1"][:place]


def test_a_full_disk_is_said_once_and_the_work_goes_on(tmp_path, capsys):
    (tmp_path / "full").symlink_to("/dev/full")
    journal = Journal(tmp_path / "none" / "j")
    journal.path = tmp_path / "full"
    for n in range(3):
        journal.add(str(n), n)
    assert capsys.readouterr().err.count("could not be kept") == 1


def test_in_bfloat16_too_the_rest_is_sampled_to_the_same_tokens(tmp_path, tiny_model):
    """Prompts of many lengths: computed together with others, a prompt's logits differ in their last bits."""
    model = tiny_model.to(torch.bfloat16)
    draw = random.Random(1)
    prompts = [[draw.randrange(50) for _ in range(draw.randrange(3, 60))] for _ in range(40)]
    seeds = draw_seeds(40, 4, torch.Generator().manual_seed(3))
    generate.PREFILL_TOKENS, before = 300, generate.PREFILL_TOKENS
    try:
        whole = generate.generate(model, prompts, 4, 12, 0, rows=16, seeds=seeds)
        journal = Journal(tmp_path / "j")
        for n, row in enumerate(whole):
            for k in range(4):
                if draw.random() < 0.6:
                    journal.add(str(seeds[n][k]), row[k])
        rest = generate.generate(model, prompts, 4, 12, 0, rows=16, seeds=seeds, journal=journal)
    finally:
        generate.PREFILL_TOKENS = before
    assert rest == whole


def test_a_judge_of_many_prompts_at_a_time_keeps_its_batches(tmp_path):
    """Its tables may depend, in their last bits, on what is judged together: a restart makes the same batches."""
    seen = []

    class Network(Judge):
        def preferences_many(self, prompts, responses):
            seen.append(len(prompts))
            if len(seen) == 3:
                raise ValueError("away")
            return torch.full((len(prompts), 2, 2), 0.5)

    rows = [f"p{n}" for n in range(70)], [["a", "b"]] * 70
    with pytest.raises(ValueError, match="away"):
        list(judge_in_batches(Network(), *rows, "n", journal=Journal(tmp_path / "j")))
    tables = list(judge_in_batches(Network(), *rows, "n", journal=Journal(tmp_path / "j")))
    assert seen == [32, 32, 6, 6] and sum(map(len, tables)) == 70


# ------------------------------------------------------------------------------------------------ what a stage was made from


@pytest.mark.parametrize(
    "edited, made",
    [
        ("round-01/responses.jsonl", "round-01/preferences.safetensors"),
        ("round-01/preferences.safetensors", "round-01/policy"),
        ("round-01/logps.safetensors", "round-01/policy"),
        ("round-01/policy/model.safetensors", "round-02/responses.jsonl"),
    ],
)
def test_a_stage_whose_source_was_edited_is_refused_by_name(played, world, tmp_path, edited, made, capsys):
    run = tmp_path / "run"
    shutil.copytree(played, run)
    path = run / edited
    if path.suffix == ".jsonl":
        path.write_text(path.read_text().replace('"responses": ["', '"responses": ["x', 1))
    else:
        content = bytearray(path.read_bytes())
        content[-3] ^= 1  # a bit of the last number
        path.write_bytes(bytes(content))
    assert train.main(flags(tiny_settings(world, run, **SETTINGS | dict(rounds=2)))) == 2
    error = capsys.readouterr().err
    assert f"{run / made}: was made from another {edited.removesuffix('/model.safetensors')} than is there now" in error


def test_a_fit_that_was_begun_with_other_preferences_is_refused(world, tmp_path, capsys):
    settings = tiny_settings(world, tmp_path / "run", **SETTINGS | dict(save_minutes=0.0, batch=20))
    assert train.main(flags(settings)) == 0
    fit = tmp_path / "run/round-01/fit-2"
    (tmp_path / "run/round-01/policy").rename(fit)
    path = tmp_path / "run/round-01/preferences.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\0")
    assert train.main(flags(settings)) == 2
    assert f"{fit}: was made from another round-01/preferences.safetensors" in capsys.readouterr().err
