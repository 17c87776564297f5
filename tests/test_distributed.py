"""Claims about runs in several processes (engine/distributed.py): the numbers are those of one, and the loss of one is survived.

Processes talk through gloo on the CPU, as torchrun would have started them.
"""

import json
import os
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from children import Child
from conftest import ROOT, tiny_settings
from safetensors.torch import load_file

from toy.debug import build_debugging


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    """Seven prompts in batches of three: shares differ in size, and an epoch's last batch is smaller than three processes."""
    folder = tmp_path_factory.mktemp("distributed")
    build_debugging(folder / "world")
    prompts = folder / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"{a}+{b}="}) + "\n" for a, b in zip("1234567", "7654321")))
    return tiny_settings(folder / "world", folder / "one", prompts=str(prompts), batch=3, micro_batch=1)


@pytest.fixture(scope="module")
def one(settings):
    assert Child(settings).end()[0] == 0
    return Path(settings.out)


def team(settings, count, moment=None):
    """The command in so many processes; (exit code, what it said) of each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": str(count)}
    members = []
    for number in range(count):
        place = {"RANK": str(number), "LOCAL_RANK": str(number)}
        members.append(Child(settings, moment if number == 0 else None, environment=meeting | place))
    return members


def play(settings, count):
    ends = [member.end() for member in team(settings, count)]
    assert [code for code, _ in ends] == [0] * count, ends
    return ends


def metrics(folder):
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


def assert_same_run(a, b):
    """Metrics to 5e-5 (relative above 1), the same responses, the same weights to 5e-5.

    A matrix product of other rows is rounded otherwise, and an optimizer makes large steps of tiny gradients.
    """
    for ours, theirs in zip(metrics(a), metrics(b), strict=True):
        assert ours == pytest.approx(theirs, rel=5e-5, abs=5e-5)
    for number in ("round-01", "round-02"):
        assert (Path(a) / number / "responses.jsonl").read_bytes() == (Path(b) / number / "responses.jsonl").read_bytes()
        first, second = (load_file(Path(run) / number / "policy/model.safetensors") for run in (a, b))
        for name in first.keys() | second.keys():
            assert torch.allclose(first[name], second[name], atol=5e-5), name


CASES = {
    "two": (2, {}),
    "three": (3, {}),
    "two by token budget, recomputing": (2, dict(micro_tokens=40, recompute=True)),
    "two, moving reference": (2, dict(target="regularized", tau=0.1, reference_every=1)),
    "two, winner and loser, RMSProp": (2, dict(select="best-worst", loss="sppo-hard", optimizer="rmsprop", lr=1e-3)),
    "two, optimistic": (2, dict(target="optimistic", reuse_prompts=False, rounds=2)),
}


@pytest.mark.parametrize("case", CASES)
def test_several_processes_come_to_the_metrics_and_weights_of_one(settings, one, tmp_path, case):
    count, changes = CASES[case]
    settings = replace(settings, out=str(tmp_path / "run"), **changes)
    ends = play(settings, count)
    assert "round 2/2" in ends[0][1] and all("round 2/2" not in told for _, told in ends[1:])  # one speaks
    if changes:
        one = tmp_path / "alone"
        assert Child(replace(settings, out=str(one))).end()[0] == 0
    assert_same_run(tmp_path / "run", one)


KILLED = {
    "while sampling": ("before", "round-01/responses.jsonl", 1),
    "in the middle of a fit": ("append", "metrics.jsonl", 4),
    "with a policy half written": ("half", "policy.tmp/model.safetensors", 2),
}


@pytest.mark.parametrize("moment", KILLED)
def test_a_process_that_is_killed_ends_the_run_and_the_same_command_finishes_it(settings, one, tmp_path, moment):
    """The first process is killed; the other one says what to do. Fits keep their state after each step."""
    settings = replace(settings, out=str(tmp_path / "run"), save_minutes=0)
    (killed, _), (code, told) = (member.end() for member in team(settings, 2, KILLED[moment]))
    assert killed == -signal.SIGKILL and code == 2
    assert "Traceback" not in told and f"the same command continues after the last finished stage in {settings.out}" in told
    ends = play(settings, 2)
    assert moment == "while sampling" or "responses" not in ends[0][1].split("round 2/2")[0]
    assert_same_run(tmp_path / "run", one)
    assert not list((tmp_path / "run").rglob("fit-*")) and not list((tmp_path / "run").rglob("*.tmp"))


def test_a_fit_that_was_begun_by_other_processes_is_refused(settings, tmp_path):
    settings = replace(settings, out=str(tmp_path / "run"), save_minutes=0)
    for member in team(settings, 2, KILLED["in the middle of a fit"]):
        member.end()
    code, told = Child(settings).end()
    assert code == 2 and "1-of-1.safetensors: no such file, this fit was begun by another number of processes" in told


def test_several_processes_train_float32_weights_for_a_bfloat16_policy(settings, tmp_path):
    """Steps of 1e-6 on weights of .1 are lost in bfloat16, and kept in what each round leaves for the next."""
    play(replace(settings, out=str(tmp_path / "run"), dtype="bfloat16", lr=1e-6), 2)
    folders = [Path(settings.policy), *(tmp_path / f"run/round-0{number}/policy" for number in (1, 2))]
    weights = [load_file(folder / "model.safetensors") for folder in folders]
    for before, after in zip(weights, weights[1:]):
        for name in before:
            moved = (after[name] - before[name]).abs()
            assert after[name].dtype == torch.float32 and 0 < moved.max() < 1e-4, name


SAVE = """
import sys
import torch
from engine import distributed
from engine.checkpoint import load_weights
from engine.run_folder import together
from model import ModelConfig, Transformer
source, target = sys.argv[1:]
distributed.start("cpu")
with torch.device("meta"):
    policy = Transformer(ModelConfig.from_json(source + "/config.json"))
load_weights(distributed.shard(policy, torch.bfloat16, "cpu"), source)
with together(target) as temporary:
    policy.write_pretrained(temporary, shard_bytes=20_000)
del policy
distributed.stop()
"""


def test_torchrun_loads_shards_and_saves_a_checkpoint_of_several_files_that_transformers_loads(tiny_model, tmp_path):
    """Three processes: the 50 rows of the embedding as 17, 17 and 16."""
    transformers = pytest.importorskip("transformers")
    tiny_model.save_pretrained(tmp_path / "source")
    (tmp_path / "save.py").write_text(SAVE)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "3", tmp_path / "save.py"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    subprocess.run([*command, tmp_path / "source", tmp_path / "target"], env=environment, check=True, timeout=120)
    assert len(list((tmp_path / "target").glob("model-*-of-*.safetensors"))) > 1
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "target", output_loading_info=True)
    assert not any(report.values())
    own = tiny_model.state_dict()
    assert all(torch.equal(value, own[name]) for name, value in theirs.state_dict().items())
