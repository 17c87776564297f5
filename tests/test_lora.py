"""Claims about engine/lora.py and --lora: peft's numbers, a fit of low-rank terms alone, plain checkpoints, what it saves."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from children import Child, content
from conftest import ROOT, tiny_config, tiny_run, tiny_settings
from safetensors.torch import load_file
from test_distributed import assert_same_run, play
from test_plan import MISTRAL_7B, PAIRRM
from torch import nn

from engine.files import write_json, write_lines
from engine.lora import ALPHA, LowRank, add_terms, merge_terms
from engine.optim import RoundedSum
from model import Transformer, initialize
from plan import plan
from toy.debug import build_debugging
from train import PRESETS, TrainConfig

RANK = 3
TOKENS = torch.arange(40).view(2, 20) % 50


def generator(seed=1):
    return torch.Generator().manual_seed(seed)


def policy(dtype=torch.float32, **changes):
    return initialize(Transformer(tiny_config(**changes)), generator(0)).to(dtype)


def train_terms(model, steps=3, lr=1e-2):
    """AdamW steps on the tokens' likelihood; the gradients of the first."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=0.0)
    first = None
    for _ in range(steps):
        optimizer.zero_grad()
        likelihood(model).backward()
        first = first or [parameter.grad.clone() for parameter in trained]
        optimizer.step()
    return first


def likelihood(model):
    output = model(TOKENS)
    logits = getattr(output, "logits", output)
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), TOKENS[:, 1:].flatten())


def merged_by_hand(layer):
    return layer.linear.weight + ALPHA / len(layer.A) * (layer.B @ layer.A)


# ------------------------------------------------------------------------------------------------ what others compute


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_logits_gradients_steps_and_merged_weights_are_those_of_peft(family, tmp_path):
    """On the same weights and terms; qwen2 has biases."""
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    ours = policy(model_type=family)
    ours.save_pretrained(tmp_path / "policy")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "policy", attn_implementation="eager")
    settings = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")
    theirs = peft.get_peft_model(theirs, settings)

    add_terms(ours, RANK, generator())
    for term in ours.parameters():
        if term.requires_grad and not term.any():
            nn.init.normal_(term, std=0.01, generator=generator())  # a B, so that all gradients are there
    twins = dict(theirs.named_parameters())
    twins = {name: twin for name, twin in twins.items() if twin.requires_grad}
    pairs = []
    for name, layer in ours.named_modules():
        if isinstance(layer, LowRank):
            place = f"base_model.model.{name}.lora_"
            pairs += [(layer.A, twins[f"{place}A.default.weight"]), (layer.B, twins[f"{place}B.default.weight"])]
    assert len(pairs) == len(twins) == sum(one.requires_grad for one in ours.parameters())
    for term, twin in pairs:
        twin.data.copy_(term)

    def close(a, b):
        assert torch.allclose(a, b, atol=2e-5, rtol=1e-4), (a - b).abs().max()

    close(ours(TOKENS), theirs(TOKENS).logits)
    # Both go through the terms in the order of their parameters, layer by layer, A before B.
    for own, other in zip(train_terms(ours), train_terms(theirs), strict=True):
        close(own, other)
    close(ours(TOKENS), theirs(TOKENS).logits)
    for term, twin in pairs:
        close(term, twin)

    merge_terms(ours, generator())
    plain = theirs.merge_and_unload().state_dict()
    assert ours.state_dict().keys() == plain.keys()
    for name, weight in ours.state_dict().items():
        close(weight, plain[name])


def test_A_is_drawn_as_peft_draws_it():
    """peft calls torch's kaiming_uniform_ with a = √5."""
    layer = LowRank(nn.Linear(32, 20), RANK, generator(7))
    theirs = nn.init.kaiming_uniform_(torch.empty(RANK, 32), a=5**0.5, generator=generator(7))
    assert torch.allclose(layer.A, theirs, rtol=1e-6) and not layer.B.any()


# ------------------------------------------------------------------------------------------------ a fit of the terms


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_starts_at_the_policy_to_the_last_bit(dtype):
    model = policy(dtype)
    before = model(TOKENS)
    add_terms(model, RANK, generator())
    assert torch.equal(model(TOKENS), before)
    merge_terms(model, generator())
    assert torch.equal(model(TOKENS), before)


def test_only_the_terms_of_the_blocks_have_gradients_and_merged_they_give_the_same_logits():
    model = policy()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    add_terms(model, RANK, generator())
    train_terms(model)
    with_gradient = {name.split(".")[-1] for name, weight in model.named_parameters() if weight.grad is not None}
    assert with_gradient == {"A", "B"}
    assert not any(isinstance(layer, LowRank) for name, layer in model.named_modules() if not name.startswith("model.layers."))
    frozen = {name.replace(".linear.", "."): weight for name, weight in model.state_dict().items()}
    assert all(torch.equal(frozen[name], weight) for name, weight in before.items())

    logits = model(TOKENS)
    merge_terms(model, generator())
    assert (logits - policy()(TOKENS)).abs().max() > 0.1  # it has learned something
    assert torch.allclose(model(TOKENS), logits, atol=1e-5)
    assert model.state_dict().keys() == before.keys() and all(one.requires_grad for one in model.parameters())


def test_terms_too_small_for_a_bfloat16_are_kept_on_average():
    """Rounded to the nearest, a change of 1e-5 of a weight of 0.02, whose neighbours are 1.2e-4 away, would be lost."""
    torch.manual_seed(0)
    linear = nn.Linear(256, 256, bias=False, dtype=torch.bfloat16)
    linear.weight.data.fill_(0.02)
    layer = LowRank(linear, 1, generator())
    assert layer.A.dtype == layer.B.dtype == torch.float32
    layer.A.data.fill_(1.0)
    layer.B.data.fill_(1e-5 / ALPHA)
    before = linear.weight.float()
    assert torch.equal((before + 1e-5).bfloat16().float(), before)

    moved = layer.merge(generator()).weight.float() - before
    assert moved.mean().item() == pytest.approx(1e-5, rel=0.05)  # 65,536 weights: the mean's error is 1.3 %
    assert set(moved.flatten().tolist()) == {0.0, moved.max().item()}  # by whole spacings
    again = LowRank(nn.Linear(2, 2), 1, generator())
    assert torch.equal(again.merge(generator()).weight, merged_by_hand(again))  # float32: nothing is rounded


def test_a_bfloat16_policy_sees_terms_that_are_below_the_spacing_of_its_numbers(monkeypatch):
    """The change of the logits, as a share of that in float32; a sum rounded to the nearest, as peft has it, loses most of it."""
    sizes = dict(hidden_size=256, intermediate_size=512)
    wide, narrow = policy(**sizes), policy(torch.bfloat16, **sizes)
    wide.load_state_dict(narrow.state_dict())
    before = wide(TOKENS), narrow(TOKENS).float()
    for model in (wide, narrow):
        add_terms(model, RANK, generator())
    train_terms(wide, lr=2e-5)
    narrow.load_state_dict(wide.state_dict())
    exact = wide(TOKENS) - before[0]

    def share():
        moved = narrow(TOKENS).float() - before[1]
        return ((moved * exact).sum() / exact.pow(2).sum()).item()

    assert 0.8 < share() < 1.2
    monkeypatch.setattr(RoundedSum, "apply", lambda output, term: output + term)
    assert share() < 0.5


def test_a_rounded_sum_is_the_sum_on_average_and_has_its_gradients():
    x = torch.randn(4, 50, 300, generator=generator()).bfloat16().requires_grad_()
    small = (1e-3 * x.detach().abs()).requires_grad_()  # a quarter of a spacing or less
    total = RoundedSum.apply(x, small)
    assert (total.float() - x.float()).mean().item() == pytest.approx(small.float().mean().item(), rel=0.05)
    assert torch.equal(RoundedSum.apply(x, small), total) and torch.equal(RoundedSum.apply(x, 0 * small), x)
    down = RoundedSum.apply(x, -small)
    assert (down.float() - x.float()).mean().item() == pytest.approx(-small.float().mean().item(), rel=0.05)

    weight = torch.randn(total.shape, generator=generator()).bfloat16()
    gradients = torch.autograd.grad((total * weight).sum(), (x, small))
    assert torch.equal(gradients[0], weight) and torch.equal(gradients[1], weight)


def test_the_size_of_a_first_step_does_not_depend_on_the_rank():
    def moved(rank):
        model = policy()
        before = model(TOKENS)
        add_terms(model, rank, generator())
        train_terms(model, steps=1, lr=1e-3)
        return (model(TOKENS) - before).norm().item()

    assert moved(16) == pytest.approx(moved(2), rel=0.25)


# ------------------------------------------------------------------------------------------------ runs


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lora") / "world"
    build_debugging(folder)
    return folder


def checkpoints(world, run):
    return [load_file(Path(folder) / "model.safetensors") for folder in (world / "policy", run / "round-01/policy")]


def test_a_run_learns_and_each_round_moves_the_matrices_of_blocks_by_their_rank(world, tmp_path):
    lines = tiny_run(world, tmp_path / "run", lora=2, epochs=8, eta=10.0, samples=6)
    steps = [line for line in lines if "loss" in line]
    assert all(step["best_log_ratio"] == 0 for step in steps if step["lr"] == 1e-2)  # the first of a round
    rounds = [line for line in lines if "first_loss" in line]
    assert len(rounds) == 2 and all(line["last_loss"] < 0.5 * line["first_loss"] for line in rounds)

    before, after = checkpoints(world, tmp_path / "run")
    assert before.keys() == after.keys()
    for name, weight in before.items():
        values = torch.linalg.svdvals(after[name] - weight) if weight.dim() == 2 else (after[name] - weight).abs()
        if "_proj" in name:
            assert values[1] > 1e-3 and values[2] < 1e-5, name
        else:
            assert not values.any(), name


def test_transformers_loads_what_a_round_leaves(world, tmp_path):
    transformers = pytest.importorskip("transformers")
    tiny_run(world, tmp_path / "run", lora=2, rounds=1)
    folder = tmp_path / "run/round-01/policy"
    _, report = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values())


@pytest.mark.parametrize(
    "changes",
    [{}, dict(dtype="bfloat16", recompute=True), dict(optimizer="rmsprop", lr=1e-3, target="regularized", tau=0.1)],
    ids=["float32", "bfloat16, recomputing", "RMSProp, regularized"],
)
def test_a_killed_fit_continues_to_the_same_bytes(world, tmp_path, changes):
    """Its state is the terms and their averages alone."""
    settings = tiny_settings(world, tmp_path / "run", lora=2, save_minutes=0, **changes)
    whole = replace(settings, out=str(tmp_path / "whole"))
    assert Child(whole).end()[0] == 0
    assert Child(settings, ("append", "metrics.jsonl", 2)).end()[0] == -signal.SIGKILL
    (state,) = (tmp_path / "run").rglob("fit-*/1-of-1.safetensors")
    kept = load_file(state)
    assert {name.split(".")[-1] for name in kept if name.startswith("weights.")} == {"A", "B"}
    assert Child(settings).end()[0] == 0
    assert content(settings.out) == content(whole.out)


def test_two_processes_come_to_the_metrics_and_weights_of_one(world, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    write_lines(prompts, [{"prompt": f"{a}+{10 - a}="} for a in range(1, 6)])
    settings = tiny_settings(world, tmp_path / "one", lora=2, prompts=str(prompts), batch=3, micro_batch=1)
    assert Child(settings).end()[0] == 0
    play(replace(settings, out=str(tmp_path / "two")), 2)
    assert_same_run(tmp_path / "one", tmp_path / "two")


# ------------------------------------------------------------------------------------------------ what it costs

SIZES = dict(hidden_size=512, intermediate_size=2048, num_hidden_layers=8, num_attention_heads=8, head_dim=64)
COST = """
import json, sys
import torch
from torch.utils.flop_counter import FlopCounterMode
from data import Prompt
from model import ModelConfig, Transformer, initialize
from sppo import Regression
from train import TextGame, TrainConfig
config = TrainConfig(**json.loads(sys.argv[1]))
torch.set_num_threads(1)

def fit(sizes, counter):
    policy = initialize(Transformer(sizes), torch.Generator().manual_seed(0))
    policy.model.recompute = True
    game = TextGame(config, policy, None, None, 1)
    prompts = [Prompt("", list(range(10)))] * 2
    data = Regression(prompts, [[[1] * 10, [2] * 10]] * 2, torch.zeros(2, 2), torch.ones(2, 2))
    with counter:
        list(game.fit(data, config, torch.Generator().manual_seed(0)))

def resident(name):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name)) * 1024

fit(ModelConfig.from_json(sys.argv[2]), FlopCounterMode(display=False))  # what is loaded at the first step
sizes = ModelConfig.from_json(config.policy + "/config.json")
before = resident("VmRSS")
open("/proc/self/clear_refs", "w").write("5")
counter = FlopCounterMode(display=False)
fit(sizes, counter)
print(resident("VmHWM") - before, counter.get_total_flops())
"""


@pytest.fixture(scope="module")
def costs(tmp_path_factory):
    """{rank: (plan of the fit, measured peak bytes, measured operations)} of 35M parameters and four rows of 20 tokens."""
    if sys.platform != "linux":
        pytest.skip("memory is read from /proc")
    folder = tmp_path_factory.mktemp("costs")
    write_json(folder / "tiny.json", tiny_config().to_json())
    write_json(folder / "policy/config.json", tiny_config(**SIZES).to_json())
    write_lines(folder / "prompts.jsonl", [{"prompt": "x" * 40}] * 2)  # 10 tokens, as plan counts without a tokenizer
    settings = tiny_settings(folder, folder / "run", max_new_tokens=10, epochs=1, rounds=1, samples=2, judge="conftest:flat")
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}  # what is freed is given back
    found = {}
    for rank in (0, 4):
        config = replace(settings, lora=rank)
        command = [sys.executable, "-c", COST, json.dumps(asdict(config)), folder / "tiny.json"]
        measured = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, check=True).stdout.split()
        found[rank] = plan(config, gpu="cpu", mean_response_tokens=10)["stages"]["fit"], *map(int, measured)
    return found


def test_the_memory_of_a_small_fit_is_what_plan_says(costs):
    """Beside it there are a few matrices of 4 MB, of the optimizer or the merging."""
    for rank in (0, 4):
        planned, peak, _ = costs[rank]
        assert 0 < peak - planned["memory_total"] < 32e6, rank
    assert costs[4][1] < 0.35 * costs[0][1]  # no gradients, no optimizer state


def test_the_operations_of_a_fit_are_what_plan_says(costs):
    """With recomputing a quarter less. plan counts the last token of a response and of a recomputed block the last product."""
    for rank in (0, 4):
        planned, _, operations = costs[rank]
        assert 0.85 < operations / planned["flops"] < 1, rank
    assert costs[4][2] / costs[0][2] == pytest.approx(3 / 4, abs=0.02)


def test_a_7b_fits_on_24_gb_with_terms_and_not_without(tmp_path):
    """The numbers of docs/runs.md, with the lengths of UltraFeedback's prompts (4 bytes a token)."""
    write_json(tmp_path / "policy/config.json", MISTRAL_7B.to_json())
    write_json(tmp_path / "pairrm/config.json", PAIRRM)
    write_lines(tmp_path / "prompts.jsonl", [{"prompt": "x" * 4 * length} for length in (2645, *[200] * 300)])
    paths = {name: f"{tmp_path}/{name}" for name in ("policy", "out")}
    paths |= dict(judge=f"{tmp_path}/pairrm", prompts=f"{tmp_path}/prompts.jsonl")
    settings = TrainConfig(**(PRESETS["mistral-7b"] | paths | dict(cache_gb=5, lora=16)))
    result = plan(settings, gpu="rtx-4090")
    fit = result["stages"]["fit"]
    terms = 32 * 16 * (2 * (4096 + 4096) + 2 * (4096 + 1024) + 3 * (4096 + 14336))
    assert [fit["memory"][part] for part in ("terms", "gradients", "optimizer")] == [4 * terms] * 3
    assert result["fits"] and result["disk_unfinished"] == 2 * 8 * terms

    whole = plan(replace(settings, lora=0), gpu="rtx-4090")["stages"]
    assert [name for name, stage in whole.items() if not stage["fits"]] == ["fit"]
    assert whole["fit"]["advice"] == "more GPUs or --lora"

    page = " ".join((ROOT / "docs/runs.md").read_text(encoding="utf-8").split())
    assert f"takes {fit['memory_total'] / 1e9:.1f} GB of 24 to fit" in page
    assert f"{fit['memory']['weights'] / 1e9:.1f} of them the weights, and {12 * terms / 1e9:.1f} the terms" in page
    assert f"{whole['fit']['memory_total'] / 1e9:.1f} GB without `--lora`" in page
    assert f"Sampling takes {result['stages']['sample']['memory_total'] / 1e9:.1f} GB" in page
