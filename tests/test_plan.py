"""Claims about plan.py: what it counts equals what real modules, caches, files and runs have, and what it adds up scales."""

import dataclasses
import inspect
import json
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, tiny_config, tiny_run, tiny_settings
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import plan as planning
from engine.costs import GPUS, causal_flops, multiplied, on_meta, pairrm_flops, parameters, saved_bytes
from engine.files import write_json, write_lines
from generate import KVCache, pool_shape
from judges.pairrm import PairRM, PairRMConfig
from model import Block, ModelConfig, Transformer, rotary_angles
from plan import describe, plan
from prefmodel import PreferenceModel
from toy.debug import build_debugging
from train import PRESETS, TrainConfig

MISTRAL_7B = ModelConfig(
    vocab_size=32000, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
    num_key_value_heads=8, head_dim=128, max_position_embeddings=32768, rope_theta=1e6, dtype="bfloat16",
)  # fmt: skip
PAIRRM = dict(  # deberta-v3-large, with the vocabulary and markers of the published PairRM
    model_type="deberta-v2", hidden_act="gelu", relative_attention=True, position_biased_input=False, share_att_key=True,
    norm_rel_ebd="layer_norm", type_vocab_size=0, n_tasks=1, pos_att_type=["p2c", "c2p"], vocab_size=128005, hidden_size=1024,
    intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, position_buckets=256, max_position_embeddings=512,
    layer_norm_eps=1e-7, source_prefix_id=128001, cand1_prefix_id=128002, cand2_prefix_id=128003, torch_dtype="float32",
)  # fmt: skip
SMALL_PAIRRM = PAIRRM | dict(
    vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, source_prefix_id=41,
    cand1_prefix_id=42, cand2_prefix_id=43,
)  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Folders with a config.json and nothing else, and a file of 300 prompts."""
    root = tmp_path_factory.mktemp("plan")
    write_json(root / "7b" / "config.json", MISTRAL_7B.to_json())
    write_json(root / "pairrm" / "config.json", PAIRRM)
    head = {"preference_head": {"scalar": True, "cyclic": 2, "template": "mistral"}}
    write_json(root / "judge" / "config.json", tiny_config(max_position_embeddings=4096).to_json() | head)
    write_lines(root / "prompts.jsonl", [{"prompt": "Why is it so? " * (1 + n % 7)} for n in range(300)])
    return root


def settings(folders, **changes):
    paths = dict(policy=f"{folders}/7b", judge=f"{folders}/pairrm", prompts=f"{folders}/prompts.jsonl", out=f"{folders}/run")
    return TrainConfig(**(PRESETS["mistral-7b"] | {"dtype": "bfloat16"} | paths | changes))


# ------------------------------------------------------------------------------------------------ shapes


def by_hand(c):
    layer = c.hidden_size * (2 * c.head_dim * (c.num_attention_heads + c.num_key_value_heads) + 3 * c.intermediate_size + 2)
    return (1 if c.tie_word_embeddings else 2) * c.vocab_size * c.hidden_size + c.num_hidden_layers * layer + c.hidden_size


def test_mistral_7b_has_7_241_732_096_parameters():
    assert parameters(on_meta(Transformer, MISTRAL_7B)) == 7_241_732_096 == by_hand(MISTRAL_7B)


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True}, {"num_key_value_heads": 1}, {"head_dim": 24}])
def test_parameters_equal_those_of_a_real_policy(changes):
    config = tiny_config(**changes)
    real = sum(p.numel() for p in Transformer(config).parameters())
    assert parameters(on_meta(Transformer, config)) == real == by_hand(config)
    norms = 32 * (2 * config.num_hidden_layers + 1)
    matrices = sum(m.weight.numel() for m in Transformer(config).modules() if isinstance(m, torch.nn.Linear))
    assert multiplied(on_meta(Transformer, config)) == matrices + norms + (50 * 32 if config.tie_word_embeddings else 0)


def test_a_judge_with_the_tied_flag_of_its_backbone_only_looks_its_embeddings_up():
    judge = PreferenceModel(tiny_config(tie_word_embeddings=True))
    assert multiplied(judge) == parameters(judge) - 50 * 32


def test_parameters_of_judges(folders):
    D, wide, layers, V = 1024, 4096, 24, 128005
    layer = 4 * (D * D + D) + 2 * D * wide + wide + D + 2 * 2 * D
    encoder = V * D + 512 * D + 2 * 2 * D + layers * layer
    head = 2 * D * D + D + D + 1
    assert parameters(planning.judge_shape(folders / "pairrm")) == encoder + head == 436_014_081
    real = PreferenceModel(tiny_config(), scalar=True, cyclic=2)
    assert parameters(planning.judge_shape(folders / "judge")) == sum(p.numel() for p in real.parameters())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_cache_is_as_large_as_a_real_one(folders, tmp_path, dtype):
    config = tiny_config(num_key_value_heads=1, max_position_embeddings=4096)
    write_json(tmp_path / "config.json", config.to_json())
    result = plan(settings(folders, policy=str(tmp_path), dtype=dtype, pool=7, max_new_tokens=50))
    size = result["prompts"]["longest"] + 50
    real = KVCache(config, *pool_shape(config, 7, size, None, getattr(torch, dtype)), "cpu", getattr(torch, dtype))
    assert result["stages"]["sample"]["memory"]["cache"] == real.keys.nbytes + real.values.nbytes


def test_a_block_saves_for_backward_what_is_counted():
    """Beside it autograd keeps the norms' and the attention's scales: 2 + H numbers a position."""
    config, T, kept = tiny_config(), 10, {}
    block, x = Block(config), torch.randn(1, 10, 32, requires_grad=True)
    angles = rotary_angles(torch.arange(T)[None], config.head_dim, config.rope_theta)
    outside = {tensor.untyped_storage().data_ptr() for tensor in (*block.parameters(), *angles)}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor  # held, so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        block(x, *angles, None, None)
    found = sum(tensor.untyped_storage().nbytes() for place, tensor in kept.items() if place not in outside)
    assert found / T == saved_bytes(config, 4) + 4 * (2 + config.num_attention_heads)


def counted(function):
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        function()
    return counter.get_total_flops()


def test_operations_equal_those_that_torch_counts():
    """torch counts all pairs of positions, of which a causal model needs half; we count the norms' weights too (1 %)."""
    policy, T = Transformer(tiny_config()), 100
    half = 2 * 2 * 4 * 8 * T**2  # 2 a layer, head and channel
    assert counted(lambda: policy(torch.zeros(1, T, dtype=torch.long))) == pytest.approx(causal_flops(policy, T) + half, rel=0.01)
    assert causal_flops(policy, T, 40) + causal_flops(policy, 40) == causal_flops(policy, T)


def test_operations_of_pairrm_equal_those_that_torch_counts(tmp_path):
    """torch counts the projections of the relative positions too, once a forward pass; ours has norms, biases, head (3 %)."""
    write_json(tmp_path / "config.json", SMALL_PAIRRM)
    judge, T = PairRM(PairRMConfig.from_json(tmp_path / "config.json")), 200
    tokens = torch.full((1, T), 3)
    tokens[0, :3] = torch.tensor([41, 42, 43])
    found = counted(lambda: judge(tokens, torch.ones(1, T, dtype=torch.bool)))
    assert found == pytest.approx(pairrm_flops(judge, T) + 2 * 2 * 2 * (2 * T - 1) * 32 * 32, rel=0.03)


def test_judges_read_as_many_rows_at_a_time_as_is_assumed():
    assert inspect.signature(PreferenceModel.preferences_many).parameters["rows"].default == planning.PREFERENCE_ROWS


# ------------------------------------------------------------------------------------------------ costs


def test_doubling_the_prompts_doubles_tokens_operations_and_hours(folders, tmp_path):
    lines = (folders / "prompts.jsonl").read_text()
    (tmp_path / "prompts.jsonl").write_text(lines * 2)
    once = plan(settings(folders))
    twice = plan(settings(folders, prompts=f"{tmp_path}/prompts.jsonl"))
    assert twice["prompts"]["a_round"] == 2 * once["prompts"]["a_round"] == 200
    for name, stage in once["stages"].items():
        for key in ("tokens", "flops", "seconds"):
            assert twice["stages"][name][key] == pytest.approx(2 * stage[key])
            assert stage["in_all"][key] == pytest.approx(3 * stage[key])
        assert twice["stages"][name]["memory"] == stage["memory"]


def test_tokens_by_hand(folders):
    result = plan(settings(folders, rounds=1, samples=4, epochs=2), mean_response_tokens=100)
    p, N = result["prompts"]["mean"], 300
    stages = result["stages"]
    assert stages["sample"]["tokens"] == pytest.approx(N * (p + 4 * 100))
    assert stages["judge"]["tokens"] == pytest.approx(N * 4 * 3 * (p + 3 + 2 * 103))
    assert stages["score"]["tokens"] == pytest.approx(N * (p + 2 * 100))  # a prompt once
    assert stages["fit"]["tokens"] == pytest.approx(2 * stages["score"]["tokens"])
    assert stages["fit"]["flops"] == pytest.approx(2 * 4 * stages["score"]["flops"])
    weights = multiplied(on_meta(Transformer, MISTRAL_7B))
    assert stages["fit"]["flops"] == pytest.approx(8 * weights * stages["fit"]["tokens"], rel=0.01)  # attention: under 1 % here


def test_judges_cost_pairs_or_rows_or_nothing(folders):
    def cost(judge, K):
        return plan(settings(folders, judge=judge, samples=K))["stages"]["judge"]["flops"]

    assert cost(f"{folders}/pairrm", 5) == pytest.approx(10 * cost(f"{folders}/pairrm", 2))
    two, five, eight = (cost(f"{folders}/judge", K) for K in (2, 5, 8))
    assert eight - five == pytest.approx(five - two) and five < 2.5 * two  # a prompt is read once
    assert cost("conftest:letters", 5) == 0
    both = "ensemble:" + json.dumps({"judges": [f"{folders}/pairrm", f"{folders}/judge", "conftest:letters"]})
    assert cost(both, 5) == pytest.approx(cost(f"{folders}/pairrm", 5) + cost(f"{folders}/judge", 5))


def test_other_targets_have_their_extra_stage(folders):
    assert plan(settings(folders, target="regularized"))["stages"]["reference"]["tokens"] > 0
    optimistic = plan(settings(folders, target="optimistic"))["stages"]
    assert optimistic["previous"]["tokens"] > optimistic["judge"]["tokens"] + optimistic["sample"]["tokens"]
    assert optimistic["previous"]["in_all"]["tokens"] == pytest.approx(2 * optimistic["previous"]["tokens"])  # not in round 1


def test_gpus_share_the_work(folders):
    one, eight = plan(settings(folders, pool=8)), plan(settings(folders, pool=8), gpus=8)
    for name, stage in eight["stages"].items():
        assert stage["seconds"] == pytest.approx(one["stages"][name]["seconds"] / 8)


def test_the_plan_of_a_run_is_what_the_run_does(tmp_path):
    """Given the responses' mean length, tokens, the checkpoint's size and the tables' sizes are those of the files."""
    build_debugging(tmp_path)
    config = tiny_settings(tmp_path, tmp_path / "run")
    tiny_run(tmp_path, tmp_path / "run")
    responses = [json.loads(line)["tokens"] for line in (tmp_path / "run/round-01/responses.jsonl").read_text().splitlines()]
    written = sum(len(tokens) for row in responses for tokens in row)
    result = plan(config, gpu="cpu", mean_response_tokens=written / 6)
    assert result["stages"]["sample"]["tokens"] == pytest.approx(written + 2 * result["prompts"]["mean"])
    for name in ("policy/model", "preferences", "logps"):
        size = (tmp_path / "run" / "round-01" / f"{name}.safetensors").stat().st_size
        assert 0 <= size - result["disk"][name.split("/")[0]] < 3000  # the header
    assert result["fits"] and len(describe(result)) <= 25


# ------------------------------------------------------------------------------------------------ memory


def test_one_80_gb_gpu_trains_a_7b_in_bfloat16_and_not_in_float32(folders):
    narrow, wide = (plan(settings(folders, dtype=dtype)) for dtype in ("bfloat16", "float32"))
    P = 7_241_732_096
    held = ("weights", "gradients", "optimizer")
    assert [narrow["stages"]["fit"]["memory"][part] for part in held] == [2 * P, 2 * P, 4 * P]
    assert [wide["stages"]["fit"]["memory"][part] for part in held] == [4 * P, 4 * P, 4 * P]
    assert narrow["fits"] and not wide["fits"] and wide["stages"]["sample"]["fits"]
    line = next(line for line in describe(wide) if "does not fit" in line)
    assert "GB of 80 GB" in line and "--dtype bfloat16" in line
    assert plan(settings(folders, dtype="float32"), gpu="h200")["fits"]


def test_eight_gpus_hold_an_eighth_of_float32_masters_each(folders):
    for optimizer, state in (("rmsprop", 4), ("adamw", 8)):
        memory = plan(settings(folders, optimizer=optimizer), gpus=8)["stages"]["fit"]["memory"]
        shard = 7_241_732_096 / 8
        assert [memory[part] for part in ("shard", "gradients", "optimizer")] == [4 * shard, 4 * shard, state * shard]
        assert memory["weights"] == 16 * shard  # a bfloat16 copy of all of them


def test_advice_names_the_flag_that_is_too_large(folders):
    def advice(stage, **changes):
        return plan(settings(folders, **changes))["stages"][stage]["advice"]

    assert advice("sample") is None
    assert advice("sample", pool=1000, cache_gb=0) == "lower --pool"
    assert advice("sample", pool=1000, cache_gb=70) == "lower --cache-gb"
    assert advice("previous", pool=1000, cache_gb=70, target="optimistic") == "lower --cache-gb"
    assert advice("fit", micro_batch=64) == "lower --micro-batch"
    assert advice("fit", max_new_tokens=31000) == "lower --max-new-tokens"
    lines = describe(plan(settings(folders, max_new_tokens=32768)))
    assert any("context of 32,768" in line for line in lines)


# ------------------------------------------------------------------------------------------------ prompts and the table


@pytest.fixture
def real_tokenizer(folders, shared, tmp_path):
    shutil.copytree(folders / "7b", tmp_path / "policy")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "policy" / name).write_bytes((shared / "tokenizer-mistral-v1" / name).read_bytes())
    return tmp_path / "policy"


def test_the_longest_prompt_is_found_outside_the_sample(folders, real_tokenizer, tmp_path):
    write_lines(tmp_path / "prompts.jsonl", [{"prompt": "word " * (900 if n == 1801 else n % 7 + 1)} for n in range(5000)])
    prompts = plan(settings(folders, policy=str(real_tokenizer), prompts=f"{tmp_path}/prompts.jsonl"))["prompts"]
    assert prompts["count"] == 5000 and prompts["tokenised"] == 500 and 900 < prompts["longest"] < 920
    assert prompts["mean"] < 20


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_60000_prompts_and_a_7b_take_seconds_and_little_memory(folders, real_tokenizer, shared, tmp_path):
    lines = (shared / "alpaca_eval" / "prompts.jsonl").read_text(encoding="utf-8").splitlines()
    (tmp_path / "prompts.jsonl").write_text("\n".join((lines * 75)[:60000]), encoding="utf-8")
    config = settings(folders, policy=str(real_tokenizer), prompts=f"{tmp_path}/prompts.jsonl", out=str(tmp_path / "run"))
    write_json(tmp_path / "settings.json", dataclasses.asdict(config))
    code = (
        "import json, sys, time; from plan import plan; from train import TrainConfig; start = time.process_time();"
        "result = plan(TrainConfig(**json.load(open(sys.argv[1]))), gpus=8); seconds = time.process_time() - start;"
        "peak = next(int(line.split()[1]) for line in open('/proc/self/status') if line.startswith('VmHWM')) * 1024 / 1e9;"
        "print(json.dumps([seconds, peak, result['prompts']['count'], result['policy']['parameters']]))"
    )
    command = [sys.executable, "-c", code, tmp_path / "settings.json"]
    seconds, gb, count, size = json.loads(subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, check=True).stdout)
    assert (count, size) == (60000, 7_241_732_096)
    assert seconds < 5 and gb < 1


@pytest.mark.parametrize("gpu", GPUS)
def test_the_result_is_json_and_its_table_fits_on_the_screen(folders, gpu):
    result = plan(settings(folders, dtype="float32", pool=512, target="optimistic"), gpu=gpu)
    assert json.loads(json.dumps(result)) == result
    lines = describe(result)
    assert len(lines) <= 25 and max(map(len, lines)) <= 160
    assert any("assumed, not measured" in line for line in lines)


def test_what_makes_no_sense_is_refused(folders):
    for arguments, message in (
        (dict(gpu="h1000"), "--gpu is 'h1000', expected one of h100, h200, a100-80, rtx-4090, cpu"),
        (dict(gpus=0), "--gpus is 0, expected at least 1"),
        (dict(mean_response_tokens=0), "has 0 tokens, expected up to 2048"),
        (dict(mean_response_tokens=2049), "has 2049 tokens, expected up to 2048"),
    ):
        with pytest.raises(ValueError, match=message):
            plan(settings(folders), **arguments)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        plan(settings(folders, judge="nowhere"))
    with pytest.raises(FileNotFoundError, match="config.json"):
        plan(settings(folders, policy="nowhere"))


# ------------------------------------------------------------------------------------------------ the command


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plan") / "world"
    build_debugging(folder)
    return folder


def command(world, run, *flags):
    """`python plan.py` of the small world for the debugger."""
    paths = ["--policy", f"{world}/policy", "--prompts", f"{world}/prompts.jsonl", "--out", str(run)]
    return planning.main([*paths, "--judge", "conftest:letters", "--template", "plain", "--max-new-tokens", "4", *flags])


def test_the_command_prints_the_plan_and_writes_nothing(world, tmp_path, capsys):
    before = sorted(world.rglob("*"))
    assert command(world, tmp_path / "run", "--gpu", "a100-80") == 0
    assert "plan for 1 × a100-80 of 80 GB" in capsys.readouterr().out
    assert sorted(world.rglob("*")) == before and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--gpus", "0"), "--gpus is 0, expected at least 1"),
        (("--samples", "1"), "--samples is 1, expected at least 2"),
        (("--policy", "nowhere"), "nowhere/config.json: no such file"),
    ],
)
def test_the_command_refuses_in_one_sentence(world, tmp_path, capsys, flags, message):
    assert command(world, tmp_path / "run", *flags) == 2
    assert capsys.readouterr().err == f"plan.py: {message}\n"


def test_its_flags_are_no_settings_of_a_run(world, tmp_path):
    """So a run that has begun can be planned for other GPUs; that changes nothing in its folder, and it continues."""
    run = tmp_path / "run"
    tiny_run(world, run, rounds=1)
    assert {"plan", "gpus", "gpu"}.isdisjoint(json.loads((run / "config.json").read_text()))
    files = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert command(world, run, "--gpus", "8", "--gpu", "h200") == 0
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == files
    tiny_run(world, run, rounds=1)
