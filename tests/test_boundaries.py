"""Claims about nonsense: numbers that are not finite, configs that say what cannot be, files that are none."""

import json
import os
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from children import content
from conftest import tiny_config, tiny_run
from safetensors.torch import load_file, save_file

from engine.files import read_json, read_lines, write_lines
from generate import generate, sample_token
from model import ModelConfig, Transformer, initialize
from sppo import RoundConfig
from toy.debug import build_debugging


@pytest.fixture
def checkpoint(tmp_path):
    folder = tmp_path / "model"
    initialize(Transformer(tiny_config()), torch.Generator().manual_seed(0)).save_pretrained(folder)
    return folder


def changed(folder, **weights):
    """The checkpoint with some tensors replaced by a function of them."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    for name, change in weights.items():
        full = next(key for key in tensors if key.endswith(name))
        tensors[full] = change(tensors[full])
    save_file(tensors, path, metadata={"format": "pt"})
    return folder


# ------------------------------------------------------------------------------------------------ weights


def with_nan(tensor):
    tensor = tensor.clone()
    tensor.view(-1)[-1] = torch.nan
    return tensor


WEIGHTS = {
    "NaN": (dict(weight=with_nan), "has 1 numbers that are not finite"),
    "infinity": (dict(weight=lambda t: t / 0), r"has \d+ numbers that are not finite"),
    "int8": (dict(weight=lambda t: t.to(torch.int8)), "is I8, expected F32 or BF16 or F16"),
    "int64": (dict(weight=lambda t: t.to(torch.int64)), "is I64, expected"),
    "bool": (dict(weight=lambda t: t > 0), "is BOOL, expected"),
    "float64": (dict(weight=lambda t: t.double()), "is F64, expected"),
    "float8": (dict(weight=lambda t: t.to(torch.float8_e4m3fn)), "is F8_E4M3, expected"),
}


@pytest.mark.parametrize("case", WEIGHTS)
def test_weights_that_are_no_numbers_of_a_model_are_refused_by_tensor(case, checkpoint):
    change, said = WEIGHTS[case]
    with pytest.raises(ValueError, match=rf"model.safetensors: tensor \S*weight {said}"):
        Transformer.from_pretrained(changed(checkpoint, **change))


def test_a_weight_that_overflows_in_the_wanted_dtype_is_refused(checkpoint):
    changed(checkpoint, **{"embed_tokens.weight": lambda t: t * 1e30})
    Transformer.from_pretrained(checkpoint, "bfloat16")
    with pytest.raises(ValueError, match="embed_tokens.weight .* not finite .as float16"):
        Transformer.from_pretrained(checkpoint, "float16")


def test_weights_that_are_finite_are_read_even_if_their_sum_is_not(checkpoint):
    changed(checkpoint, **{"embed_tokens.weight": lambda t: torch.full_like(t, 3e38)})
    policy = Transformer.from_pretrained(checkpoint)
    assert policy.model.embed_tokens.weight.sum().isinf() and (policy.model.embed_tokens.weight == 3e38).all()


def test_a_policy_that_is_not_finite_is_not_saved(tmp_path):
    policy = initialize(Transformer(tiny_config()), torch.Generator().manual_seed(0))
    with torch.no_grad():
        policy.model.norm.weight[0] = torch.inf
    with pytest.raises(ValueError, match="tensor model.norm.weight has 1 numbers that are not finite"):
        policy.save_pretrained(tmp_path / "out")
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------------ sampling


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("top_p", [0.5, 1.0])
@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
def test_a_row_of_logits_that_is_not_finite_gives_no_token_and_spoils_no_other(temperature, top_p, wrong):
    logits = torch.randn(3, 256, generator=torch.Generator().manual_seed(0))
    uniform = torch.tensor([0.1, 0.5, 0.9])
    good = sample_token(logits, uniform, temperature, top_p)
    logits[1, 7] = wrong
    token = sample_token(logits, uniform, temperature, top_p)
    assert token[1] == -1 and token[[0, 2]].tolist() == good[[0, 2]].tolist()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_sampling_from_broken_weights_is_refused(temperature):
    policy = initialize(Transformer(tiny_config()), torch.Generator().manual_seed(0))
    with torch.no_grad():
        policy.model.norm.weight[0] = torch.nan
    for logps in (None, []):
        with pytest.raises(ValueError, match="logits are not finite, after 2 tokens"):
            generate(policy, [[1, 2]], 2, 4, None, temperature, logps=logps)


def test_a_temperature_that_is_next_to_nothing_is_refused_in_words():
    policy = initialize(Transformer(tiny_config()), torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match="or --temperature"):
        generate(policy, [[1, 2]], 2, 4, None, 1e-40)


# ------------------------------------------------------------------------------------------------ configs

CONFIGS = {
    "a word for a truth value": dict(tie_word_embeddings="false"),
    "a window of -1": dict(sliding_window=-1),
    "a window of 2.5": dict(sliding_window=2.5),
    "true as a size": dict(num_hidden_layers=True),
    "a size of a billion billions": dict(vocab_size=10**18),
    "an odd head": dict(head_dim=7),
    "a base of 0": dict(rope_theta=0),
    "a base that is a word": dict(rope_theta="1e6"),
    "an infinite base": dict(rope_theta=float("inf")),
    "a negative epsilon": dict(rms_norm_eps=-1e-5),
    "a stop token that is a word": dict(eos_token_id="</s>"),
    "a stop token of -1": dict(eos_token_id=[2, -1]),
    "quantized weights": dict(quantization_config={"quant_method": "gptq"}),
    "angles by layer": dict(rope_parameters={"full_attention": {"rope_theta": 1e6, "rope_type": "default"}}),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_a_config_that_says_what_cannot_be_is_refused_by_key(case, tmp_path):
    path = tmp_path / "config.json"
    config = tiny_config().to_json() | CONFIGS[case]
    if "rope_theta" in CONFIGS[case]:
        del config["rope_parameters"]
    path.write_text(json.dumps(config))
    (key,) = CONFIGS[case]
    with pytest.raises(ValueError, match=rf"config.json: {key} is .*, expected "):
        ModelConfig.from_json(path)


# ------------------------------------------------------------------------------------------------ files


def test_nesting_without_end_is_not_json(tmp_path):
    path = tmp_path / "deep.json"
    path.write_text("[" * 10**5)
    with pytest.raises(ValueError, match="deep.json: not valid JSON"):
        read_json(path, list)
    with pytest.raises(ValueError, match="deep.json, line 1: not valid JSON"):
        list(read_lines(path))


def test_a_pipe_or_a_device_is_no_file_and_nobody_waits_for_it(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", "/dev/zero", tmp_path):
        with pytest.raises(ValueError, match="expected a file, found a folder or a device"):
            read_json(path)
        with pytest.raises(FileNotFoundError):
            list(read_lines(path))


def test_settings_have_no_infinite_learning_rate():
    from engine.command import check_settings

    for lr in (float("inf"), float("nan"), 0.0):
        with pytest.raises(ValueError, match="--lr is"):
            check_settings(RoundConfig(lr=lr), RoundConfig)


# ------------------------------------------------------------------------------------------------ what a run continues from


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    build_debugging(folder)
    return folder


@pytest.fixture
def began(world, tmp_path, monkeypatch):
    """A finished run whose inputs lie in a folder of their own, and its settings, ready to be changed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "rule_of_mine", raising=False)  # another folder's
    shutil.copytree(world, "world")
    Path("rule_of_mine.py").write_text("from conftest import letters\n")
    tiny_run("world", "run", judge="rule_of_mine:letters")
    return tmp_path


def again(**changes):
    """Give the command again; the sentence that it ends with."""
    settings = dict(judge="rule_of_mine:letters") | changes
    with pytest.raises(ValueError) as refused:
        tiny_run(settings.pop("world", "world"), settings.pop("run", "run"), **settings)
    return str(refused.value)


def test_a_run_continues_by_other_names_of_the_same_files(began, monkeypatch):
    told = (began / "run/metrics.jsonl").read_bytes()
    tiny_run("./world/", "run/", judge="rule_of_mine:letters")
    Path("world").rename("elsewhere")
    Path("run").rename("moved")
    Path("below").mkdir()
    monkeypatch.chdir("below")
    tiny_run("../elsewhere", "../moved", judge="rule_of_mine:letters")
    assert Path("../moved/metrics.jsonl").read_bytes() == told


def edit_prompts():
    write_lines("world/prompts.jsonl", [{"prompt": "1+1="}, {"prompt": "5+9="}])


def edit_policy():
    changed(Path("world/policy"), **{"norm.weight": lambda t: t * 1.01})


def edit_tokenizer():
    path = Path("world/policy/tokenizer.json")
    path.write_text(path.read_text() + " ")


def edit_judge():
    Path("rule_of_mine.py").write_text("from conftest import letters  # and more\n")


@pytest.mark.parametrize(
    ("edit", "flag"), [(edit_prompts, "prompts"), (edit_policy, "policy"), (edit_tokenizer, "policy"), (edit_judge, "judge")]
)
def test_an_input_that_was_edited_between_stop_and_resume_is_refused_by_name(edit, flag, began):
    before = content("run")
    edit()
    assert f"--{flag} " in again() and "its content is another" in again()
    assert content("run") == before


def test_another_judge_is_refused_even_where_everything_is_judged(began):
    assert "--judge conftest:flat is not what this run was started with" in again(judge="conftest:flat")


def test_a_run_without_its_settings_is_refused(began):
    Path("run/config.json").unlink()
    assert "run/config.json: is gone" in again() and not Path("run/config.json").exists()


def tensors(name, change):
    path = Path(f"run/round-02/{name}.safetensors")
    save_file({key: change(value).contiguous() for key, value in load_file(path).items()}, path)
    shutil.rmtree("run/round-02/policy")


def responses(change):
    rows = [row for _, row in read_lines("run/round-02/responses.jsonl")]
    change(rows[-1]["tokens"])
    write_lines("run/round-02/responses.jsonl", rows)


STAGES = {
    "K - 1 preferences": (lambda: tensors("preferences", lambda t: t[:, :-1]), r"preferences are \(2, 2, 3\), expected"),
    "a column of log-probabilities": (lambda: tensors("logps", lambda t: t[:, :1]), r"logps are \(2, 1\), expected \(2, 3\)"),
    "a log-probability of NaN": (lambda: tensors("logps", lambda t: t * torch.nan), "all finite"),
    "a token beyond the vocabulary": (lambda: responses(lambda t: t[0].append(99)), "line 2: tokens, expected 3 lists of token"),
    "a token that is half": (lambda: responses(lambda t: t[0].append(0.5)), "line 2: tokens, expected"),
    "K - 1 responses": (lambda: responses(lambda t: t.pop()), "line 2: tokens, expected 3 lists"),
    "a response of nothing": (lambda: responses(lambda t: t[0].clear()), "line 2: tokens, expected"),
}


@pytest.mark.parametrize("case", STAGES)
def test_a_stage_that_was_edited_into_another_shape_is_refused(case, began):
    damage, said = STAGES[case]
    damage()
    sentence = again()
    assert re.search(said, sentence) and "delete it to compute it again" in sentence
