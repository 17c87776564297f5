"""Claims about benchmarks/real.py and benchmarks/llama.py on a tiny random chat model. Nothing here is timed."""

import importlib.util
import json
import shutil
import sys

import pytest
import torch
from chat_templates import SMOLLM2, write_letters
from conftest import ROOT, tiny_config

from engine.files import write_json
from model import Transformer, initialize
from real import smollm2

pytest.importorskip("transformers")
pytest.importorskip("trl")
pytest.importorskip("peft")
sys.path.append(str(ROOT / "benchmarks"))  # last: real/ is a folder, and a file there

import llama


def load_benchmark():
    """benchmarks/real.py by its path, as the name `real` is that of the folder."""
    spec = importlib.util.spec_from_file_location("real_benchmark", ROOT / "benchmarks/real.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


bench = load_benchmark()


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory):
    """A random chat model that reads and writes letters."""
    folder = tmp_path_factory.mktemp("chat")
    tokens = write_letters(folder)
    names = {"unk_token": "<|endoftext|>", "bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>"}
    names |= {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": SMOLLM2}
    write_json(folder / "tokenizer_config.json", names)
    sizes = dict(vocab_size=tokens, max_position_embeddings=1024, tie_word_embeddings=True, model_type="llama")
    config = tiny_config(**sizes, bos_token_id=1, eos_token_id=2)
    initialize(Transformer(config), torch.Generator().manual_seed(0)).bfloat16().write_pretrained(folder)
    return folder


def machine():
    """In place of a second of measuring what this machine can do."""
    return {"flops": 1e11, "bytes_per_second": 1e10, "packages": {}}


@pytest.fixture(scope="module")
def measured(chat_model, tmp_path_factory):
    """A whole run without llama.cpp: the JSON file and the folder."""
    out = tmp_path_factory.mktemp("real")
    flags = ["--quick", "--threads", "1", "--policy", str(chat_model), "--llama", sys.executable, "--out", str(out)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench, "no_llama", lambda python: "it was not looked for")
        patch.setattr(bench, "MEMORY", {"fit": bench.MEMORY["fit"]})  # the others would take half a minute
        patch.setattr(bench.side_by_side, "machine", machine)
        assert bench.main(flags) == 0
    return json.loads((out / "real.json").read_text()), out


def test_every_row_but_that_of_llama_cpp_is_measured(measured):
    result, out = measured
    rows = {(row["stage"], row["case"]): row for row in result["rows"]}
    expected = {(stage, row[0]) for stage, rows in bench.ROWS.items() for row in rows} - {("sample", "llama")}
    assert expected | {("memory", "fit")} == rows.keys() and (out / "real.png").read_bytes().startswith(b"\x89PNG")
    assert result["not_measured"] == {"sample, against llama.cpp": "it was not looked for"}
    assert all(row["ours"] > 0 and row["theirs"] > 0 for row in rows.values())


def test_a_stage_that_is_measured_again_leaves_the_others_as_they_are(chat_model, measured, tmp_path, monkeypatch):
    first, out = measured
    monkeypatch.setattr(bench.side_by_side, "machine", machine)
    shutil.copy(out / "real.json", tmp_path)
    flags = ["--quick", "--threads", "1", "--policy", str(chat_model), "--only", "judge", "--prompts", "1"]
    assert bench.main([*flags, "--out", str(tmp_path)]) == 0
    second = json.loads((tmp_path / "real.json").read_text())
    assert [row["name"] for row in second["rows"]] == [row["name"] for row in first["rows"]]
    changed = [row["stage"] for row, before in zip(second["rows"], first["rows"]) if row != before]
    assert changed == ["judge"] and first["checks"].keys() == second["checks"].keys()
    assert first["not_measured"] == second["not_measured"]


def test_both_sides_sample_responses_of_the_same_lengths(measured):
    """10 a side: five standard errors."""
    means = [check for name, check in measured[0]["checks"].items() if name.startswith("mean tokens")]
    assert len(means) == 2 and all(abs(mean["standard_errors"]) < 5 for mean in means)


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_memory_is_that_of_a_process_each(measured):
    (row,) = [row for row in measured[0]["rows"] if row["unit"] == "GB"]
    assert row["case"] == "fit" and row["ours"] > 0 and row["theirs"] > 0


def test_both_sides_of_a_fit_start_alike(measured):
    checks = measured[0]["checks"]
    for name, tolerance in (("first loss", 1e-5), ("first gradient norm", 1e-3), ("LoRA, first loss", 1e-5)):
        assert checks[name]["ours"] == pytest.approx(checks[name]["theirs"], rel=tolerance), name
    assert checks["log π_t, largest difference in nats"] < 1e-3


def test_both_judges_say_the_same(measured):
    assert measured[0]["checks"]["preferences, largest difference"] < 1e-4


def test_a_gguf_file_has_the_weights_of_its_checkpoint(chat_model, tmp_path):
    """Read back by real/smollm2.py, whose reading of the published file was compared with others' software."""
    gguf = pytest.importorskip("gguf")
    llama.write_gguf(chat_model, tmp_path / "model.gguf")
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    config = smollm2.read_config(lambda key: reader.get_field(key).contents())
    model = smollm2.build_model(((t.name, gguf.dequantize(t.data, t.tensor_type)) for t in reader.tensors), config)
    expected = Transformer.from_pretrained(chat_model).state_dict()
    assert expected.keys() == model.state_dict().keys()
    assert all(torch.equal(weight, expected[name]) for name, weight in model.state_dict().items())


def test_without_xllamacpp_the_reason_is_one_sentence():
    pytest.importorskip("gguf")
    if importlib.util.find_spec("xllamacpp"):
        pytest.skip("it is installed here")
    assert bench.no_llama(sys.executable) == f"{sys.executable} has no package xllamacpp"


def test_a_missing_model_is_one_sentence(tmp_path, capsys):
    assert bench.main(["--policy", str(tmp_path)]) == 2
    assert capsys.readouterr().err.strip() == (
        f"benchmarks/real.py: --policy {tmp_path}: not the folder of a model; python -m real.smollm2 makes out/smollm2"
    )
