"""Claims about benchmarks/gpu.py: each row is measured, kept and printed, and what it is divided by is counted right."""

import json

import pytest
import torch

from benchmarks import gpu
from engine.costs import on_meta, parameters
from judges.pairrm import PairRM
from model import Transformer


@pytest.fixture(autouse=True)
def out(tmp_path, monkeypatch):
    """Not the repository's own results, whatever a test does."""
    (tmp_path / "RESULTS.md").write_text("before\n<!-- gpu -->\nold\n<!-- end of gpu -->\nafter\n", encoding="utf-8")
    monkeypatch.setattr(gpu, "RESULTS", tmp_path / "RESULTS.md")
    monkeypatch.setattr(gpu, "REPEATS", 1)
    return tmp_path


def bench(out, *flags):
    return gpu.main(["--shape", "tiny", "--device", "cpu", "--folder", f"{out}/policy", "--out", f"{out}/gpu.json", *flags])


def rows(out):
    return json.loads((out / "gpu.json").read_text(encoding="utf-8"))["rows"]


def test_every_row_is_measured_and_printed_and_the_checkpoint_is_removed(out, capsys):
    assert bench(out) == 0
    measured, printed = rows(out), capsys.readouterr().out
    assert list(measured) == list(gpu.ROWS)
    for name, row in measured.items():
        assert "error" not in row and f"| {name} |" in printed
        assert row.keys() & {"gb_s", "pairs_s", "tokens_s"}
    assert printed.startswith("cpu, torch ") and "peak_gib" not in measured["fit"]
    assert not (out / "policy").exists()


def test_stages_add_up_and_another_shape_is_refused(out, capsys):
    assert bench(out, "--stages", "copy") == 0 and bench(out, "--stages", "save", "--keep") == 0
    assert list(rows(out)) == ["copy", "save"]
    assert (out / "policy" / "config.json").is_file()
    assert bench(out, "--stages", "copy") == 2 and "nothing is written over it" in capsys.readouterr().err
    path = out / "gpu.json"
    path.write_text(path.read_text(encoding="utf-8").replace("tiny", "7b"), encoding="utf-8")
    assert bench(out, "--stages", "copy", "--folder", f"{out}/other") == 2 and "choose another --out" in capsys.readouterr().err


def test_a_row_that_fails_costs_no_other(out, monkeypatch, capsys):
    def fail(error):
        raise error

    monkeypatch.setitem(gpu.ROWS, "copy", (lambda bench: fail(torch.OutOfMemoryError("no")), "", ""))
    monkeypatch.setitem(gpu.ROWS, "save", (lambda bench: fail(TypeError("no")), "", ""))
    assert bench(out, "--stages", "copy", "save", "load") == 2
    found = rows(out)
    assert found["copy"] == {"error": "out of memory"} and found["save"] == {"error": "failed: TypeError"}
    assert found["load"]["gb_s"] > 0
    assert "not measured: copy; save" in capsys.readouterr().err


def test_numbers_of_a_cpu_are_no_results(out, capsys):
    before = gpu.RESULTS.read_bytes()
    assert bench(out, "--results") == 2 and "on a GPU" in capsys.readouterr().err
    assert gpu.RESULTS.read_bytes() == before and not (out / "gpu.json").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_in_one_sentence(out, capsys):
    assert gpu.main(["--folder", f"{out}/policy", "--out", f"{out}/gpu.json"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_the_table_replaces_what_stands_between_the_marks():
    gpu.write_results(gpu.RESULTS, ["new", r"\1"])
    assert gpu.RESULTS.read_text(encoding="utf-8") == "before\n<!-- gpu -->\nnew\n\\1\n<!-- end of gpu -->\nafter\n"


def test_results_hold_the_table_of_the_measured_rows_or_say_that_there_are_none():
    text = (gpu.ROOT / "benchmarks" / "RESULTS.md").read_text(encoding="utf-8")
    numbers = gpu.ROOT / "benchmarks" / "gpu.json"
    measured = json.loads(numbers.read_text(encoding="utf-8")) if numbers.exists() else {"rows": {}}
    assert measured.get("device") != "cpu"
    assert "\n".join(gpu.table(**measured)) in text
    assert all(f"| {name} |" in text for name in gpu.ROWS)


# By hand: a layer of Mistral-7B has q and o, 4096 × 4096 each, k and v, 4096 × 1024 each, three matrices of 4096 × 14336,
# and two norms of 4096; embedding and head are 32000 × 4096 each, and there is one more norm.
LAYER = 2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336 + 2 * 4096
TABLE = 32000 * 4096


@pytest.fixture(scope="module")
def policy():
    return on_meta(Transformer, gpu.MISTRAL)


def test_the_shapes_are_those_of_mistral_7b_and_pairrm(policy):
    assert parameters(policy) == 32 * LAYER + 2 * TABLE + 4096 == 7_241_732_096
    assert parameters(on_meta(PairRM, gpu.PAIRRM)) == 436_014_081


def test_a_step_reads_the_weights_once_and_the_cache_once(policy):
    """A position has keys and values of 8 heads of 128 in 32 layers, 2 bytes each: 131,072 bytes."""
    weights, position = 2 * (32 * LAYER + TABLE + 4096), 2 * 32 * 8 * 128 * 2
    assert (round(weights / 1e9, 2), position) == (14.22, 131_072)
    steps = [weights + 64 * (256 + n) * position for n in range(32, 256)]  # the one that follows n tokens
    assert gpu.step_bytes(policy, 64, 256, 32, 256) == pytest.approx(sum(steps) / len(steps), rel=1e-12)


def test_fitting_is_six_operations_a_token_and_parameter(policy):
    assert gpu.model_flops(policy, 1000, 6) == 6 * 1000 * (32 * LAYER + TABLE + 4096)
    assert gpu.model_flops(policy, 1000, 2) == 2 * 1000 * (32 * LAYER + TABLE + 4096)


def test_generate_gives_all_responses_the_length_asked_for():
    """So the number of steps that a time is divided by is the number that were made."""
    tiny = gpu.Bench("tiny", "cpu", None)
    prompts = [tiny.ids(8), tiny.ids(8)]
    responses = gpu.generate(tiny.policy, prompts, 3, max_new_tokens=5, stop_token=None, generator=tiny.generator, rows=6)
    assert [len(response) for row in responses for response in row] == [5] * 6
