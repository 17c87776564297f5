"""Claims about train.py: what a run leaves on disk, that nothing which stops it changes its numbers, and what it says.

Runs are of the small world for the debugger, a fraction of a second long. Those that are to be killed, or to meet a full disk,
are played in processes forked from a server that has imported everything.
"""

import json
import re
import shutil
import signal
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from children import Child, content, flags, stages
from conftest import letters, tiny_run, tiny_settings
from safetensors.torch import load_file

import train
from data import Tokenizer
from engine.run_folder import Metrics
from generate import generate
from model import Transformer, initialize
from prefmodel import PreferenceModel
from sppo import TARGETS
from toy.debug import build_debugging
from toy.text_game import model_config


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("train") / "world"
    build_debugging(folder)
    return folder


@pytest.fixture(autouse=True)
def draw(monkeypatch):
    """No figure, which takes half a second; the function that draws it, for the one test that wants it."""
    draw = train.draw_curves
    monkeypatch.setattr(train, "draw_curves", lambda lines, path: None)
    return draw


def run(world, out, **changes):
    return train.run(tiny_settings(world, out, **changes))


def refused(capsys, world, out, *more, **changes):
    """The one line with which the command ends, exit code 2."""
    assert train.main([*flags(tiny_settings(world, out, **changes)), *more]) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    (line,) = [line for line in re.split("[\r\n]", error) if line.startswith("train.py: ")]
    return line


def lines(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def write_prompts(path, *prompts):
    path.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    return str(path)


# ------------------------------------------------------------------------------------------------ what a run leaves


def test_a_run_writes_every_file_of_the_design(world, tmp_path, draw, monkeypatch):
    monkeypatch.setattr(train, "draw_curves", draw)
    run(world, tmp_path / "run")
    stages = ["responses.jsonl", "preferences.safetensors", "logps.safetensors"]
    checkpoint = ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    for number in ("round-01", "round-02"):
        for name in (*stages, *(f"policy/{name}" for name in checkpoint)):
            assert (tmp_path / "run" / number / name).is_file(), name
    assert (tmp_path / "run/curves.png").stat().st_size > 10_000
    assert not [*(tmp_path / "run").rglob("*.tmp"), *(tmp_path / "run").rglob("*.old")]


def test_config_json_holds_every_setting(world, tmp_path):
    settings = tiny_settings(world, tmp_path / "run", eta=3.0)
    train.run(settings)
    expected = {name: value for name, value in asdict(settings).items() if name != "out"}
    written = json.loads((tmp_path / "run/config.json").read_text())
    assert written.pop("content").keys() == {"policy", "prompts", "opponents", "reference", "judge"}
    assert written == expected


def test_metrics_have_a_line_for_each_step_and_each_round(world, tmp_path):
    """Two prompts in batches of 1, two epochs: four steps a round, then the round's own line."""
    told = run(world, tmp_path / "run", batch=1)
    written = lines(tmp_path / "run/metrics.jsonl")
    assert written == told
    assert [(row["round"], "loss" in row) for row in written] == [(t, i < 4) for t in (1, 2) for i in range(5)]
    assert written[4]["first_loss"] == written[0]["loss"] and written[4]["last_loss"] == written[3]["loss"]


def test_responses_hold_prompt_texts_and_the_sampled_tokens(world, tmp_path):
    run(world, tmp_path / "run")
    tokenizer, rows = Tokenizer(world / "policy"), lines(tmp_path / "run/round-01/responses.jsonl")
    assert [row["prompt"] for row in rows] == ["3+4=", "5+9="]
    assert all([tokenizer.decode(ids) for ids in row["tokens"]] == row["responses"] and len(row["tokens"]) == 3 for row in rows)


def test_preferences_are_the_judges_with_their_win_rates(world, tmp_path):
    run(world, tmp_path / "run")
    stored = load_file(tmp_path / "run/round-01/preferences.safetensors")
    expected = torch.stack([letters(None, row["responses"]) for row in lines(tmp_path / "run/round-01/responses.jsonl")])
    assert stored["preferences"].dtype == torch.float32 and torch.allclose(stored["preferences"], expected)
    assert torch.allclose(stored["win_rates"].mean(-1), torch.full((2,), 0.5), atol=1e-6)


def test_each_round_starts_from_the_policy_of_the_round_before(world, tmp_path):
    """Greedy decoding by the stored π_2 gives round 2's responses, all K alike."""
    run(world, tmp_path / "run", temperature=0.0)
    policy, tokenizer = (Transformer.from_pretrained(tmp_path / "run/round-01/policy"), Tokenizer(world / "policy"))
    for row in lines(tmp_path / "run/round-02/responses.jsonl"):
        greedy = generate(policy, [tokenizer.prompt_ids(row["prompt"], "plain")], 3, 4, tokenizer.eos, 0.0)[0]
        assert row["tokens"] == greedy


def test_one_seed_gives_one_run_and_another_seed_another(world, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        run(world, tmp_path / name, seed=seed)
    a, b, c = (content(tmp_path / name) for name in "abc")
    assert a == b and a["round-01/responses.jsonl"] != c["round-01/responses.jsonl"]


# ------------------------------------------------------------------------------------------------ every kind of run


KINDS = {
    "sppo": {}, "normalized": {"target": "normalized"}, "optimistic": {"target": "optimistic"},
    "optimistic on new prompts": {"target": "optimistic", "reuse_prompts": False},
    "regularized": {"target": "regularized", "tau": 0.5}, "best-worst": {"select": "best-worst"},
    "moving reference": {"target": "regularized", "tau": 0.5, "reference_every": 2},
    "rmsprop": {"optimizer": "rmsprop"}, "bfloat16": {"dtype": "bfloat16"}, "nucleus": {"top_p": 0.9, "temperature": 0.7},
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_first_loss_of_every_round_is_its_mean_squared_target(world, tmp_path, kind):
    """All prompts in one batch: before the first step log π_θ/π_t is 0, so the right weights are in place again."""
    told = run(world, tmp_path / "run", **({"rounds": 3} | KINDS[kind] | ({"rounds": 2} if "new" in kind else {})))
    for row in told:
        if "loss" not in row:
            assert row["first_loss"] == pytest.approx(row["mean_squared_target"], rel=1e-4) and row["first_loss"] > 1e-4


@pytest.mark.parametrize("loss", ["sppo-hard", "dpo", "ipo"])
def test_the_baselines_run_in_the_same_loop(world, tmp_path, loss):
    told = run(world, tmp_path / "run", loss=loss, select="best-worst")
    first = {"sppo-hard": 2.0, "dpo": 0.693147, "ipo": 1.0}[loss]  # at log-ratios of 0, η = 2
    assert [row["first_loss"] for row in told if "first_loss" in row] == pytest.approx([first] * 2, rel=1e-5)


@pytest.mark.parametrize("select", ["best-worst", "all"])
def test_the_centred_loss_trains_and_does_not_feel_log_z(world, tmp_path, select):
    """With exact log Z in the target and with η/2: the same losses and gradients in both rounds."""
    keys = ("loss", "gradient_norm", "best_log_ratio")
    runs = [run(world, tmp_path / target, loss="centred", target=target, select=select) for target in ("sppo", "normalized")]
    half, exact = ([row[key] for row in told if "loss" in row for key in keys] for told in runs)
    assert half == pytest.approx(exact, rel=1e-3, abs=1e-5) and min(half[0::3]) > 0 and len(half) == 3 * 4


@pytest.mark.parametrize("K", [2, 3, 5, 8])
def test_every_number_of_samples_runs(world, tmp_path, K):
    run(world, tmp_path / "run", samples=K, rounds=1)
    assert load_file(tmp_path / "run/round-01/preferences.safetensors")["preferences"].shape == (2, K, K)


def test_learning_raises_what_the_judge_prefers(world, tmp_path):
    """By round 8 the sum of character codes, which is this judge's taste, has grown from that of round 1."""
    run(world, tmp_path / "run", rounds=8, samples=8, epochs=8, lr=2e-2)

    def taste(number):
        rows = lines(tmp_path / f"run/round-0{number}/responses.jsonl")
        return sum(sum(map(ord, text)) for row in rows for text in row["responses"])

    assert taste(8) > 1.2 * taste(1)


@pytest.mark.parametrize(("every", "moved"), [(0, [False, True, True]), (1, [False] * 3), (2, [False, True, False])])
def test_the_reference_is_the_first_policy_or_a_later_one(world, tmp_path, every, moved):
    """log μ equals log π_t in the rounds that begin with μ = π_t: the first, and every so many after it."""
    run(world, tmp_path / "run", target="regularized", rounds=3, reference_every=every)
    folders = [tmp_path / f"run/round-0{number}" for number in (1, 2, 3)]
    pairs = [[load_file(folder / f"{name}.safetensors")[name] for name in ("logps", "reference")] for folder in folders]
    assert [not torch.allclose(logps, reference, atol=1e-5) for logps, reference in pairs] == moved


def test_a_reference_of_its_own_is_used(world, tmp_path):
    other = initialize(Transformer(model_config(layers=1, width=16)), torch.Generator().manual_seed(9))
    other.save_pretrained(tmp_path / "other")
    run(world, tmp_path / "run", target="regularized", rounds=1, reference=str(tmp_path / "other"))
    stored = [load_file(tmp_path / f"run/round-01/{name}.safetensors")[name] for name in ("logps", "reference")]
    assert (stored[0] - stored[1]).abs().max() > 0.1


def test_opponents_of_the_first_round_are_the_policys_own(world, tmp_path):
    run(world, tmp_path / "run", target="optimistic", rounds=1)
    previous = load_file(tmp_path / "run/round-01/previous.safetensors")["previous"]
    assert torch.equal(previous, load_file(tmp_path / "run/round-01/preferences.safetensors")["win_rates"])


def test_earlier_opponents_are_the_responses_of_the_round_before(world, tmp_path):
    run(world, tmp_path / "run", target="optimistic")
    new, old = (lines(tmp_path / f"run/round-0{number}/responses.jsonl") for number in (2, 1))
    expected = [letters(None, a["responses"] + b["responses"])[:3, 3:].mean(-1) for a, b in zip(new, old)]
    assert torch.allclose(load_file(tmp_path / "run/round-02/previous.safetensors")["previous"], torch.stack(expected))


def test_prompts_are_split_over_the_rounds(world, tmp_path):
    prompts = write_prompts(tmp_path / "p.jsonl", "1+1=", "1+2=", "1+3=", "1+4=", "1+5=")
    run(world, tmp_path / "run", prompts=prompts, reuse_prompts=False)
    seen = [[row["prompt"] for row in lines(tmp_path / f"run/round-0{number}/responses.jsonl")] for number in (1, 2)]
    assert seen == [["1+1=", "1+3=", "1+5="], ["1+2=", "1+4="]]


def test_a_model_of_the_real_vocabulary_learns_from_real_prompts(shared, tmp_path):
    """The paper's settings but for the length, on Mistral's tokenizer; transformers loads what comes out."""
    transformers = pytest.importorskip("transformers")
    base = shared / "tiny-mistral/chat32k"
    PreferenceModel.from_backbone(base, torch.Generator().manual_seed(0), template="mistral").save_pretrained(tmp_path / "judge")
    rows = (shared / "alpaca_eval/prompts.jsonl").read_text(encoding="utf-8").splitlines()[:4]
    (tmp_path / "prompts.jsonl").write_text("\n".join(rows), encoding="utf-8")
    names = dict(policy=base, judge=tmp_path / "judge", prompts=tmp_path / "prompts.jsonl", out=tmp_path / "run")
    more = ["--preset", "mistral-7b", "--rounds", "1", "--max-new-tokens", "8", "--dtype", "float32"]
    assert train.main(more + [part for name, value in names.items() for part in (f"--{name}", str(value))]) == 0
    after, tokens = tmp_path / "run/round-01/policy", torch.tensor([[1, 733, 16289, 28793]])
    theirs = transformers.AutoModelForCausalLM.from_pretrained(after)(tokens).logits
    assert torch.allclose(Transformer.from_pretrained(after)(tokens), theirs, atol=1e-4)
    assert not torch.equal(theirs, Transformer.from_pretrained(base, "float32")(tokens))


# ------------------------------------------------------------------------------------------------ starting again


def test_a_finished_run_is_left_as_it_is(world, tmp_path):
    told = run(world, tmp_path / "run")
    before, timings = content(tmp_path / "run"), (tmp_path / "run/timings.jsonl").read_text()
    assert run(world, tmp_path / "run") == told
    assert content(tmp_path / "run") == before and (tmp_path / "run/timings.jsonl").read_text() == timings


OTHER = {"eta": 3.0, "seed": 7, "samples": 4, "reuse_prompts": False, "judge": "toy.text_game:oracle"}


@pytest.mark.parametrize(("name", "value"), OTHER.items())
def test_other_settings_are_refused_and_the_setting_is_named(world, tmp_path, capsys, name, value):
    run(world, tmp_path / "run")
    before = content(tmp_path / "run")
    line = refused(capsys, world, tmp_path / "run", **{name: value})
    before_it_was = f"{getattr(tiny_settings(world, 'run'), name)}, now it is {value}"
    said = f"{value} is not what this run was started with" if name == "judge" else before_it_was
    assert f"--{name.replace('_', '-')} {said}" in line
    assert content(tmp_path / "run") == before


def test_a_run_folder_may_be_moved(world, tmp_path):
    told = run(world, tmp_path / "run")
    (tmp_path / "run").rename(tmp_path / "moved")
    assert run(world, tmp_path / "moved") == told


def test_a_prompt_file_that_changed_under_a_run_is_noticed(world, tmp_path, capsys):
    prompts = write_prompts(tmp_path / "p.jsonl", "1+1=", "1+2=")
    run(world, tmp_path / "run", prompts=prompts)
    write_prompts(tmp_path / "p.jsonl", "1+1=", "1+3=")
    line = refused(capsys, world, tmp_path / "run", prompts=prompts)
    assert f"--prompts {prompts} is not what this run was started with: its content is another" in line


def test_a_stage_that_is_deleted_is_computed_again_to_the_same_numbers(world, tmp_path):
    run(world, tmp_path / "run")
    before = content(tmp_path / "run")
    shutil.rmtree(tmp_path / "run/round-02/policy")
    (tmp_path / "run/round-02/logps.safetensors").unlink()
    run(world, tmp_path / "run")
    assert content(tmp_path / "run") == before


def test_a_stage_file_that_is_damaged_is_named(world, tmp_path, capsys):
    run(world, tmp_path / "run")
    (tmp_path / "run/round-01/logps.safetensors").write_bytes(b"half")
    assert "round-01/logps.safetensors: not what this stage writes" in refused(capsys, world, tmp_path / "run")


def test_control_c_says_how_to_go_on(world, tmp_path, capsys, monkeypatch):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "sppo_round", interrupted)
    assert train.main(flags(tiny_settings(world, tmp_path / "run"))) == 130
    assert "the same command continues after the last finished stage" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------ killed and full disk


@pytest.fixture(scope="module")
def long_run(world, tmp_path_factory):
    """Settings of a run with all kinds of stages, and what it comes to when nothing stops it."""
    folder = tmp_path_factory.mktemp("killed")
    prompts = write_prompts(folder / "prompts.jsonl", *(f"{a}+{b}=" for a in (1, 2, 3) for b in (4, 5, 6, 7)))
    settings = tiny_settings(world, folder / "whole", prompts=prompts, rounds=3, target="optimistic", batch=4)
    assert Child(settings).end()[0] == 0
    return settings, content(folder / "whole")


MOMENTS = {
    "responses written, not renamed": ("before", "round-01/responses.jsonl", 1),
    "responses renamed": ("after", "round-01/responses.jsonl", 1),
    "preferences written, not renamed": ("before", "round-02/preferences.safetensors", 1),
    "log-probabilities renamed": ("after", "round-01/logps.safetensors", 1),
    "other opponents judged": ("after", "round-02/previous.safetensors", 1),
    "first step logged": ("append", "metrics.jsonl", 1),
    "in the middle of a fit": ("append", "metrics.jsonl", 9),
    "half the weights written": ("half", "policy.tmp/model.safetensors", 2),
    "policy written, not renamed": ("before", "round-01/policy", 1),
    "policy renamed, round not reported": ("after", "round-02/policy", 1),
    "metrics written, not renamed": ("before", "metrics.jsonl", 2),
    "last policy renamed": ("after", "round-03/policy", 1),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_run_killed_at_any_moment_continues_to_the_same_bytes(long_run, tmp_path, moment):
    settings, expected = long_run
    settings = replace(settings, out=str(tmp_path / "run"))
    assert Child(settings, MOMENTS[moment]).end()[0] == -signal.SIGKILL
    assert content(tmp_path / "run") != expected
    assert Child(settings).end()[0] == 0
    assert content(tmp_path / "run") == expected


def test_a_run_killed_again_and_again_continues_to_the_same_bytes(long_run, tmp_path):
    settings, expected = long_run
    settings, killed = replace(settings, out=str(tmp_path / "run")), 0
    for delay in (0, 0.03, 0.06, 0.1, 0.15, 0.1):
        child = Child(settings)
        while not (tmp_path / "run/config.json").exists() and child.process.is_alive():
            time.sleep(0.001)
        time.sleep(delay)
        child.process.kill()
        killed += child.end()[0] == -signal.SIGKILL
    assert killed and Child(settings).end()[0] == 0
    assert content(tmp_path / "run") == expected


FULL = {
    "preferences": (dict(samples=40), 8_000, {"responses.jsonl"}),
    "policy": (dict(), 10_000, {"responses.jsonl", "preferences.safetensors", "logps.safetensors"}),
    "metrics.jsonl": (dict(epochs=40), 3_000, {"responses.jsonl", "preferences.safetensors", "logps.safetensors"}),
}


@pytest.mark.parametrize("stage", FULL)
def test_a_full_disk_ends_a_run_with_one_line_and_leaves_what_is_finished(world, tmp_path, stage):
    """A process whose files cannot grow beyond a limit; the file of this stage is the first that wants to."""
    changes, limit, finished = FULL[stage]
    settings = tiny_settings(world, tmp_path / "run", **changes)
    code, told = Child(settings, limit=limit).end()
    (line,) = [line for line in re.split("[\r\n]", told) if line.strip() and not re.match(r"round \d|the work goes on", line)]
    assert code == 2 and line.startswith("train.py: ") and stage in line and "too large" in line
    assert stages(tmp_path / "run/round-01") == finished
    assert Child(settings).end()[0] == 0
    assert Child(replace(settings, out=str(tmp_path / "whole"))).end()[0] == 0
    assert content(tmp_path / "run") == content(tmp_path / "whole")


# ------------------------------------------------------------------------------------------------ judges that err


def fickle(prompt, responses, path):
    """A rule in the mood that a file says, wrong about the second prompt only."""
    table, mood = letters(prompt, responses), Path(path).read_text()
    if prompt == "5+9=" and mood != "good":
        if mood == "shape":
            return table[:, 1:]
        table[0, 1] = {"NaN": float("nan"), "above one": 1.5, "no opposite": table[0, 1] + 0.25}[mood]
    return table


class Flat:
    """A judge that gives a score for each response where a table is expected."""

    def preferences_many(self, prompts, responses):
        return torch.full((len(responses), len(responses[0])), 0.5)


flat = Flat()


@pytest.mark.parametrize("mood", ["NaN", "above one", "no opposite", "shape"])
def test_a_judge_that_errs_is_reported_with_the_prompt_and_may_be_repaired(world, tmp_path, capsys, mood):
    spec = f"test_train:fickle:{json.dumps({'path': str(tmp_path / 'mood')})}"
    (tmp_path / "mood").write_text(mood)
    line = refused(capsys, world, tmp_path / "run", judge=spec)
    assert re.search(r"prompt 2|5\+9=", line)
    assert stages(tmp_path / "run/round-01") == {"responses.jsonl"}
    sampled = (tmp_path / "run/round-01/responses.jsonl").stat().st_mtime_ns
    (tmp_path / "mood").write_text("good")
    run(world, tmp_path / "run", judge=spec)
    run(world, tmp_path / "sound", judge=spec)
    assert (tmp_path / "run/round-01/responses.jsonl").stat().st_mtime_ns == sampled
    assert content(tmp_path / "run") == content(tmp_path / "sound")


def test_a_judge_object_that_returns_the_wrong_shape_is_reported(world, tmp_path, capsys):
    line = refused(capsys, world, tmp_path / "run", judge="test_train:flat")
    assert "(1, 2)" in line


# ------------------------------------------------------------------------------------------------ what is refused


REFUSED = {
    "one sample": (dict(samples=1), "--samples is 1, expected at least 2"),
    "no rounds": (dict(rounds=0), "--rounds is 0, expected at least 1"),
    "no step size": (dict(eta=0.0), "--eta is 0.0, expected from"),
    "eta that is no number": (dict(eta=float("nan")), "--eta is nan"),
    "negative clip": (dict(clip=-1.0), "--clip is -1.0"),
    "schedule shorter than the epochs": (dict(epochs=3, schedule_epochs=1), "--schedule-epochs is 1, expected at least"),
    "no such device": (dict(device="nowhere"), "--device nowhere"),
    "reference without regularized": (dict(reference_every=2), "--reference-every go with --target regularized"),
    "reference that is absent": (dict(target="regularized", reference="nowhere"), "--reference nowhere: no such folder"),
    "top-p of 0": (dict(top_p=0.0), "--top-p is 0.0, expected from"),
    "baseline on all": (dict(loss="dpo"), "--loss dpo compares winner and loser"),
    "baseline with target": (dict(loss="ipo", select="best-worst", target="normalized"), "--loss ipo compares"),
    "no policy": (dict(policy="nowhere/policy"), "nowhere/policy"),
    "no prompts": (dict(prompts="nowhere/prompts.jsonl"), "nowhere/prompts.jsonl: no such file"),
    "no judge": (dict(judge="nowhere/judge"), "judge nowhere/judge: no such folder"),
    "unset": (dict(policy=""), "--policy is missing"),
    "too few prompts": (dict(reuse_prompts=False, rounds=3), "2 prompts are fewer than --rounds 3"),
    "long answers": (dict(max_new_tokens=40), "more than the policy's context of 32"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_wrong_setting_is_refused_before_anything_is_written(world, tmp_path, capsys, case):
    changes, message = REFUSED[case]
    assert message in refused(capsys, world, tmp_path / "run", **changes)
    assert not (tmp_path / "run").exists()


def test_a_prompt_longer_than_the_context_is_named(world, tmp_path, capsys):
    prompts = write_prompts(tmp_path / "p.jsonl", "1+1=", "9+" * 15 + "=")
    line = refused(capsys, world, tmp_path / "run", prompts=prompts)
    assert "'9+9+9+" in line and "has 32 tokens" in line and "context of 32" in line


def test_a_broken_prompt_line_is_named(world, tmp_path, capsys):
    (tmp_path / "p.jsonl").write_text('{"prompt": "1+1="}\n{"prompt" "1+2="}\n')
    assert "p.jsonl, line 2: not valid JSON" in refused(capsys, world, tmp_path / "run", prompts=str(tmp_path / "p.jsonl"))


def test_a_tokenizer_larger_than_the_models_vocabulary_is_refused(world, tmp_path, capsys):
    small = initialize(Transformer(replace(model_config(layers=1, width=16), vocab_size=17)), torch.Generator())
    small.save_pretrained(tmp_path / "policy")
    Tokenizer(world / "policy").copy_to(tmp_path / "policy")
    line = refused(capsys, world, tmp_path / "run", policy=str(tmp_path / "policy"))
    assert "tokenizer.json has token 17, but the model's vocab_size is 17" in line


@pytest.mark.parametrize("wrong", [["--no-such-flag", "1"], ["--loss", "ppo"], ["--preset", "huge"], ["--eta", "much"]])
def test_a_flag_that_is_not_understood_ends_with_code_2(capsys, wrong):
    with pytest.raises(SystemExit) as stopped:
        train.main(wrong)
    assert stopped.value.code == 2 and wrong[0] in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------ presets


@pytest.mark.parametrize("preset", train.PRESETS)
def test_every_preset_is_a_valid_run(preset):
    config = train.parse_config(["--preset", preset, "--policy", "p", "--judge", "j", "--prompts", "f", "--out", "o"])
    train.check(config)
    assert (config.policy, config.out) == ("p", "o") and config.target in TARGETS


def test_the_mistral_preset_is_the_papers_experiment():
    """SPPO v5, §5.1: three iterations, K = 5, winner and loser, η = 1e3, 5e-7, batches of 64, one of 18 epochs."""
    config = train.parse_config(["--preset", "mistral-7b"])
    assert (config.rounds, config.samples, config.select, config.temperature, config.top_p) == (3, 5, "best-worst", 1.0, 1.0)
    assert (config.eta, config.lr, config.batch, config.warmup, config.epochs, config.schedule_epochs) == (
        1e3,
        5e-7,
        64,
        0.1,
        1,
        18,
    )


def test_flags_override_a_preset():
    assert train.parse_config(["--preset", "mistral-7b", "--samples", "8"]).samples == 8


def test_every_flag_has_its_help(capsys):
    with pytest.raises(SystemExit):
        train.parse_config(["--help"])
    shown = capsys.readouterr().out
    assert all("--" + name.replace("_", "-") in shown for name in asdict(train.TrainConfig()))


def test_a_run_that_diverges_stops_before_its_weights_are_kept(world, tmp_path, capsys):
    line = refused(capsys, world, tmp_path / "run", lr=999.0, epochs=50)
    assert "the gradient norm is" in line and "lower --lr or --eta" in line
    assert not list((tmp_path / "run").glob("round-02/policy"))


# ------------------------------------------------------------------------------------------------ opponents


def write_opponents(path, *texts, prompts=("3+4=", "5+9=")):
    path.write_text(json.dumps([{"instruction": prompt, "output": text} for prompt in prompts for text in texts]))
    return str(path)


def test_opponents_count_in_the_win_rates_and_are_never_trained_on(world, tmp_path):
    """Two strong opponents lower every win rate; what is sampled in round 1 and trained on stays the policy's own."""
    strong = write_opponents(tmp_path / "strong.json", "zzzz", "zzzz")  # to `letters` the later letter is the better
    tiny_run(world, tmp_path / "alone")
    tiny_run(world, tmp_path / "against", opponents=strong)
    rounds = [tmp_path / name / "round-01" for name in ("alone", "against")]
    sampled = [(folder / "responses.jsonl").read_text() for folder in rounds]
    assert sampled[0] == sampled[1] and len(json.loads(sampled[1].splitlines()[0])["responses"]) == 3
    alone, against = (load_file(folder / "preferences.safetensors") for folder in rounds)
    assert against["preferences"].shape == (2, 5, 5) and torch.equal(against["preferences"][:, :3, :3], alone["preferences"])
    mine = against["win_rates"][:, :3]
    assert (mine < alone["win_rates"]).all() and (mine.mean(1) < 0.5).all()
    expected = (3 * alone["win_rates"] + against["preferences"][:, :3, 3:].sum(-1)) / 5
    assert torch.allclose(mine, expected, atol=1e-6)


@pytest.mark.parametrize("changes", [{"target": "optimistic"}, {"select": "best-worst"}, {"target": "normalized"}])
def test_opponents_go_with_every_target_and_selection(world, tmp_path, changes):
    lines = tiny_run(world, tmp_path / "run", opponents=write_opponents(tmp_path / "o.json", "7."), **changes)
    assert [row["round"] for row in lines if "best_win_rate" in row] == [1, 2]


def test_opponents_that_lack_a_prompt_or_differ_in_number_are_named(world, tmp_path):
    with pytest.raises(ValueError, match="no output for 1 of the 2 prompts, the first is '5.9='"):
        tiny_run(world, tmp_path / "run", opponents=write_opponents(tmp_path / "o.json", "7.", prompts=("3+4=",)))
    rows = [{"instruction": prompt, "output": "7."} for prompt in ("3+4=", "5+9=", "5+9=")]
    (tmp_path / "o.json").write_text(json.dumps(rows))
    with pytest.raises(ValueError, match="'5.9=' has 2 outputs, expected 1"):
        tiny_run(world, tmp_path / "run", opponents=str(tmp_path / "o.json"))
    assert not (tmp_path / "run").exists()


def test_a_pairrm_checkpoint_judges_a_run(world, tmp_path, shared):
    tiny_run(world, tmp_path / "run", judge=str(shared / "pairrm/tiny"), rounds=1)
    table = load_file(tmp_path / "run/round-01/preferences.safetensors")["preferences"]
    assert table.shape == (2, 3, 3) and torch.allclose(table + table.mT, torch.ones(2, 3, 3), atol=1e-6)


# ------------------------------------------------------------------------------------------------ memory


def numbers(lines):
    keys = ("loss", "best_log_ratio", "worst_log_ratio", "gradient_norm")
    return torch.tensor([[row[key] for key in keys] for row in lines if "loss" in row])


@pytest.mark.parametrize("changes", [{"micro_tokens": 30}, {"micro_tokens": 1}, {"micro_tokens": 10_000}, {"recompute": True}])
def test_what_saves_memory_changes_no_number(world, tmp_path, changes):
    plain, saving = (tiny_run(world, tmp_path / name, **flags) for name, flags in (("a", {}), ("b", changes)))
    assert torch.allclose(numbers(saving), numbers(plain), rtol=1e-4, atol=1e-6)


def test_large_vocabularies_are_scored_in_chunks_with_the_same_numbers(world, tmp_path, monkeypatch):
    plain = tiny_run(world, tmp_path / "plain")
    monkeypatch.setattr("generate.SMALL_LOGITS", 0)
    chunked = tiny_run(world, tmp_path / "chunked")
    assert torch.allclose(numbers(chunked), numbers(plain), rtol=1e-4, atol=1e-6)


# ------------------------------------------------------------------------------------------------ inside a fit


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("optimizer", ["adamw", "rmsprop"])
def test_a_fit_that_is_stopped_continues_after_its_last_saved_step_to_the_same_bytes(
    world, tmp_path, monkeypatch, optimizer, dtype
):
    settings = dict(epochs=4, batch=1, optimizer=optimizer, dtype=dtype, save_minutes=0)
    log = Metrics.step
    calls = []

    def stopped(metrics, number, step):
        calls.append(step)
        if len(calls) == 4:
            raise KeyboardInterrupt
        log(metrics, number, step)

    whole_run = tiny_run(world, tmp_path / "whole", **settings)
    monkeypatch.setattr(Metrics, "step", stopped)
    with pytest.raises(KeyboardInterrupt):
        tiny_run(world, tmp_path / "stopped", **settings)
    assert [path.name for path in (tmp_path / "stopped/round-01").glob("fit-*")] == ["fit-3"]
    assert not (tmp_path / "stopped/round-01/policy").exists()
    assert tiny_run(world, tmp_path / "stopped", **settings) == whole_run
    assert len(calls) == 1 + 2 * 4 * 2  # the step that was lost, and every other one once
    for name in ("round-01", "round-02"):
        a, b = (tmp_path / run / name / "policy/model.safetensors" for run in ("whole", "stopped"))
        assert a.read_bytes() == b.read_bytes()
    assert not list((tmp_path / "stopped").rglob("fit-*"))


def test_a_fit_is_not_saved_before_it_is_time_and_a_damaged_state_is_named(world, tmp_path, monkeypatch):
    monkeypatch.setattr(Metrics, "step", lambda metrics, *step: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        tiny_run(world, tmp_path / "run")
    state = tmp_path / "run/round-01/fit-1"
    assert not state.exists()
    state.mkdir()
    (state / "1-of-1.safetensors").write_bytes(b"not a tensor")
    with pytest.raises(ValueError, match="1-of-1.safetensors: not the state of this fit .*delete .*fit-1 to begin"):
        tiny_run(world, tmp_path / "run", save_minutes=5)


@pytest.mark.parametrize(
    "owner, method, error, words",
    [
        (
            train.TextGame,
            "sample",
            torch.OutOfMemoryError("CUDA out of memory. Tried ..."),
            "round 1/2 responses: out of memory; lower --pool",
        ),
        (train.TextGame, "judge", MemoryError("no more"), "round 1/2 preferences: out of memory; judge with a smaller model"),
        (
            Metrics,
            "step",
            RuntimeError("not enough memory: you tried to allocate 9 bytes"),
            "policy: out of memory; lower --micro-tokens",
        ),
    ],
)
def test_running_out_of_memory_names_the_flag_to_lower_and_keeps_the_finished_stages(
    world, tmp_path, monkeypatch, owner, method, error, words
):
    def fail(*arguments, **named):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(owner, method, fail)
        with pytest.raises(ValueError, match=words):
            tiny_run(world, tmp_path / "run", micro_batch=2)
    less = dict(micro_batch=1, pool=2, recompute=True)  # as advised, in the same folder
    assert tiny_run(world, tmp_path / "run", **less) == tiny_run(world, tmp_path / "other", micro_batch=1)


def test_other_runtime_errors_are_not_called_out_of_memory(world, tmp_path, monkeypatch):
    monkeypatch.setattr(train.TextGame, "sample", lambda game, prompts: torch.zeros(2) @ torch.zeros(3))
    with pytest.raises(RuntimeError, match="size"):
        tiny_run(world, tmp_path / "run")


# ------------------------------------------------------------------------------------------------ bfloat16


@pytest.mark.parametrize("optimizer", ["adamw", "rmsprop"])
def test_bfloat16_weights_move_with_small_steps_where_plain_rounding_would_lose_them(world, tmp_path, optimizer):
    """At 1e-5 a step hardly any weight could change by rounding to the nearest; the mean movement is float32's."""
    settings = dict(optimizer=optimizer, lr=1e-5, rounds=1, epochs=8)
    start = Transformer.from_pretrained(f"{world}/policy", "bfloat16").float()
    moved = {}
    for dtype in ("float32", "bfloat16"):
        tiny_run(world, tmp_path / dtype, dtype=dtype, **settings)
        end = Transformer.from_pretrained(tmp_path / dtype / "round-01/policy", "float32")
        reference = start if dtype == "bfloat16" else Transformer.from_pretrained(f"{world}/policy", "float32")
        pairs = zip(end.parameters(), reference.parameters())
        moved[dtype] = torch.cat([(a - b).flatten() for a, b in pairs]).detach().norm().item()
    saved = json.loads((tmp_path / "bfloat16/round-01/policy/config.json").read_text())
    assert saved["dtype"] == "bfloat16" and moved["bfloat16"] > moved["float32"] > 0
