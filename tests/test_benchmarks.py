"""Claims about benchmarks/side_by_side.py: both sides do the same work, and what the report holds. Nothing here is timed."""

import argparse
import json
import random
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

pytest.importorskip("transformers")
pytest.importorskip("trl")
sys.path.append(str(ROOT / "benchmarks"))  # last: real/ is a folder of ours, and real.py a file there

import peers
import side_by_side

from data import Prompt, Tokenizer
from generate import generate
from judges.pairrm import PairRM, PairRMConfig
from model import Transformer, initialize

MARKS = ["<|source|>", "<|candidate1|>", "<|candidate2|>"]


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    """A folder with a policy whose mean response is a third of 24 tokens."""
    folder = tmp_path_factory.mktemp("bench") / "policy"
    config = side_by_side.mistral(32, 2, 64, 100)
    side_by_side.ending_policy(config, 24, torch.Generator().manual_seed(0)).save_pretrained(folder)
    side_by_side.stand_in(folder, 100, ["<unk>", "<s>", "</s>"], "<s> $A")
    return folder


@pytest.fixture(scope="module")
def pairs():
    rng = random.Random(0)
    return [[[rng.randrange(3, 100) for _ in range(rng.randint(2, 12))] for _ in range(3)] for _ in range(4)]


def test_both_sides_sample_responses_of_the_same_mean_length(policy):
    """600 responses a side: four standard errors, of 0.45 tokens, would be exceeded once in 16,000 seeds."""
    prompts, generator = [[1, 5], [1, 7, 9, 11, 4]], torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    ours = generate(Transformer.from_pretrained(policy), prompts, 300, 24, 2, generator=generator)
    theirs = peers.sample(peers.load_policy(policy), prompts, 300, 24, 2, 2)
    lengths = [[len(row) for rows in side for row in rows] for side in (ours, theirs)]
    means = side_by_side.compare_means(*lengths)
    assert abs(means["standard_errors"]) < 4 and 6 < means["ours"] < 10
    assert all(row[-1] == 2 or len(row) == 24 for side in (ours, theirs) for rows in side for row in rows)


def test_without_a_stop_token_their_responses_have_full_length(policy):
    responses = peers.sample(peers.load_policy(policy), [[1, 5], [1, 6, 7]], 5, 24, None, 1)
    assert [len(rows) for rows in responses] == [5, 5] and {len(row) for rows in responses for row in rows} == {24}


def test_their_left_padding_changes_no_logit(policy):
    """What `sample` gives generate: a padded prompt continues greedily as it does alone, and as ours does."""
    prompts = [[1, 5], [1, 7, 9, 11, 4, 8]]
    ours = generate(Transformer.from_pretrained(policy), prompts, 1, 8, None, temperature=0)
    model = peers.load_policy(policy)
    tokens = torch.tensor([[0] * 4 + prompts[0], prompts[1]])
    mask = torch.tensor([[0] * 4 + [1] * 2, [1] * 6])
    settings = dict(do_sample=False, max_new_tokens=8, min_new_tokens=8, pad_token_id=0)
    theirs = model.generate(tokens, attention_mask=mask, eos_token_id=None, **settings)[:, 6:]
    assert [rows[0] for rows in ours] == theirs.tolist()


@pytest.mark.parametrize("together", [1, 7])
def test_judges_agree_on_ids_and_logits(tmp_path, together):
    special = ["[UNK]", "[CLS]", "[SEP]", *MARKS]
    tokenizer = side_by_side.stand_in(tmp_path / "words", 60, special, "[CLS] $A [SEP]")
    config = PairRMConfig(60, 32, 48, 2, 2, 64, 128, 1e-7, 3, 4, 5)
    generator = torch.Generator().manual_seed(0)
    side_by_side.save_pairrm(initialize(PairRM(config), generator), tmp_path / "judge", tokenizer)
    ours = PairRM.from_pretrained(tmp_path / "judge")
    theirs = peers.CrossEncoder(tmp_path / "judge")
    prompts = ["w7 w8 w9", "w10"]
    responses = [["w11 w12", "w13", "w14 w15 w16"], ["w20", "w21 w22 w23 w24", "w25"]]
    assert ours.pair_ids(prompts[0], "w11 w12", "") == theirs.pair_ids(prompts[0], "w11 w12", "")
    assert torch.allclose(ours.logits_many(prompts, responses), theirs.logits_many(prompts, responses, together), atol=1e-5)


def test_fits_start_with_the_same_loss_gradient_and_log_probabilities(policy, pairs, tmp_path):
    world = argparse.Namespace(folder=tmp_path, config=None)
    bench = argparse.Namespace(world=world, checks={})
    side_by_side.compare_fits(bench, policy, pairs)
    loss, norm = bench.checks["first loss"], bench.checks["first gradient norm"]
    assert loss["ours"] == pytest.approx(loss["theirs"], rel=1e-5)
    assert norm["ours"] == pytest.approx(norm["theirs"], rel=1e-4)
    assert bench.checks["log π_t, largest difference in nats"] < 1e-4


def test_sorted_micro_batches_and_those_of_trl_take_the_same_step(policy, pairs):
    """What is compared in `fit` differs in its padding, not in what it computes."""
    after = []
    for how in ({}, {"micro_tokens": 50}):
        model = Transformer.from_pretrained(policy)
        (step,), _ = side_by_side.our_fit(model, pairs, **how)
        after.append((step["gradient_norm"], step["loss"]))
    assert after[0] == pytest.approx(after[1], rel=1e-5)


def empty_bench():
    world = argparse.Namespace(micro_tokens=0)
    bench = side_by_side.Bench(world, {"repeats": 3})
    for stage, case in side_by_side.REQUIRED:
        bench.add(stage, case, "s", [2.0, 1.0, 4.0], [8.0, 2.0, 6.0], 0.5)
    bench.curve("K", "K", "work", (1, 2), lambda k: None, lambda k: k)
    return bench


def test_a_ratio_is_theirs_over_ours_of_medians():
    row = empty_bench().rows[0]
    assert (row["ours"], row["theirs"], row["ratio"], row["ours_range"]) == (2.0, 6.0, 3.0, [1.0, 4.0])


def test_the_sides_take_turns_and_a_float_is_what_counts():
    called, bench = [], empty_bench()
    first, second = bench.measure(lambda: called.append("a") or 5.0, lambda: called.append("b"))
    assert called == list("ababab") and first == [5.0] * 3 and all(0 <= seconds < 1 for seconds in second)


def test_every_row_that_is_required_is_printed_and_drawn(capsys):
    bench = empty_bench()
    result = json.loads(json.dumps({"rows": bench.rows, "scaling": bench.curves, "checks": {"loss": 1}}))
    side_by_side.print_table(result)
    output = capsys.readouterr().out
    assert all(f"{stage:12}{case:20}" in output for stage, case in side_by_side.REQUIRED)
    assert side_by_side.draw(result).axes


def test_a_run_writes_its_rows_its_figure_and_that_no_real_tokenizer_was_there(tmp_path, monkeypatch, capsys):
    """The tiny parts of everything: stand-in tokenizers, a small policy, and the stage that needs nothing else."""
    small = side_by_side.mistral(32, 1, 64, 32000)
    monkeypatch.setattr(side_by_side, "mistral", lambda D, layers, wide, V: small if V == 32000 else mistral(D, 1, wide, V))
    monkeypatch.setattr(side_by_side, "machine", lambda: {"flops": 1e11, "bytes_per_second": 1e10})
    monkeypatch.setattr(side_by_side, "QUICK", side_by_side.QUICK | dict(prompts=2, longest=4, equal=3, pairs=2, pair=16))
    flags = ["--quick", "--repeats", "1", "--threads", "1", "--only", "sample", "--out", str(tmp_path)]
    absent = ["--tokenizer", str(tmp_path / "no"), "--judge-tokenizer", str(tmp_path / "none")]
    assert side_by_side.main(flags + absent) == 0
    written = json.loads((tmp_path / "side_by_side.json").read_text())
    assert [row["case"] for row in written["rows"]] == ["mixed", "equal", "tiny"] and (tmp_path / "side_by_side.png").is_file()
    assert written["real_tokenizers"] == {"policy": False, "judge": False} and written["machine"]["flops"] == 1e11
    assert "No tokenizer of the policy was found" in capsys.readouterr().out


mistral = side_by_side.mistral


def test_a_missing_peer_is_one_sentence():
    program = (
        "import sys, importlib.metadata as m; sys.path.insert(0, 'benchmarks'); import side_by_side\n"
        "def gone(name): raise m.PackageNotFoundError(name)\n"
        "m.version = gone; sys.exit(side_by_side.main([]))"
    )
    output = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert output.returncode == 2
    assert output.stderr.strip() == (
        "benchmarks/side_by_side.py: transformers is not installed; pip install -r requirements-dev.txt brings the peers"
    )


def test_stand_in_tokenizers_are_read_alike_on_both_sides(policy):
    from transformers import AutoTokenizer

    text = "w5 w17 w60"
    ours = Tokenizer(policy)
    assert [ours.bos] + ours.encode(text) == AutoTokenizer.from_pretrained(policy).encode(text)
    assert Prompt(text, ours.prompt_ids(text, "plain")).ids[0] == ours.bos
