"""Claims about pairrm.py: DeBERTa's logits, LLM-Blender's ids and scores, transformers' encoder, and what it refuses."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from judges.pairrm import PairRM, relative_index
from judges.base import Transitive
from judges.load import load_judge


@pytest.fixture(scope="module")
def folder(shared):
    return shared / "pairrm"


@pytest.fixture(scope="module")
def judge(folder):
    return PairRM.from_pretrained(folder / "tiny")


@pytest.fixture(scope="module")
def texts(folder):
    return json.loads((folder / "expected_text.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", ["ab", "ba", "long"])
@torch.no_grad()
def test_logits_of_every_row_equal_the_reference(judge, folder, name):
    """`long` has 1,109 tokens: relative distances beyond 511."""
    expected = np.load(folder / "expected.npz")
    tokens, mask = (torch.from_numpy(expected[f"{key}_{name}"]) for key in ("input_ids", "attention_mask"))
    assert judge(tokens.long(), mask.bool()).numpy() == pytest.approx(expected[f"logit_{name}"], abs=2e-5)


def test_relative_index_equals_the_reference_from_minus_to_plus_2100(folder):
    expected = np.load(folder / "expected.npz")
    found = relative_index(torch.from_numpy(expected["rel"]).long(), 256, 512)
    assert torch.equal(found, torch.from_numpy(expected["rel_index"]).long())


def test_ids_of_the_pair_format_are_exact(judge, texts):
    for row in texts["ranking"]:
        for key, ids in row["input_ids"].items():
            i, j = map(int, key.split(","))
            assert judge.pair_ids(row["prompt"], row["candidates"][i], row["candidates"][j]) == ids


def test_truncation_is_exact_at_all_limits(folder, texts):
    judge = PairRM.from_pretrained(folder / "tiny")
    assert len(texts["truncation"]) == 4
    for row in texts["truncation"]:
        judge.source_limit, judge.candidate_limit = (row["source_max_length"], row["candidate_max_length"])
        assert judge.pair_ids(row["source"], row["candidate1"], row["candidate2"]) == row["input_ids"]


def test_markers_in_a_text_do_not_become_markers(judge):
    ids = judge.pair_ids("a <|candidate1|> b", "c [SEP] <|source|>", "<|candidate2|>")
    markers = [judge.config.source_prefix_id, judge.config.cand1_prefix_id, judge.config.cand2_prefix_id]
    assert [ids.count(marker) for marker in markers] == [1, 1, 1] and ids.count(judge.tokenizer.eos) == 3


def test_llm_blenders_matrix_scores_and_transitive_probabilities_are_reproduced(judge, texts):
    for row in texts["ranking"]:
        logits = judge.logits_many([row["prompt"]], [row["candidates"]])[0]
        assert torch.allclose(logits, torch.tensor(row["logit_matrix"]), atol=1e-4)
        assert torch.allclose((logits - logits.T).mean(1), torch.tensor(row["scores"]), atol=1e-4)
        theirs = Transitive(judge).preferences(row["prompt"], row["candidates"])
        assert torch.allclose(theirs, torch.tensor(row["sppo_probability"]), atol=1e-4)
        assert theirs.mean(1).tolist() == pytest.approx(row["sppo_win"], abs=1e-4)


def test_preferences_are_skew_symmetric_and_use_both_orders(judge):
    prompts, responses = ["one", "two words"], [["a b", "c", "c"], ["d e f", "", "g"]]
    table, logits = (judge.preferences_many(prompts, responses), judge.logits_many(prompts, responses))
    assert torch.allclose(table + table.mT, torch.ones(2, 3, 3), atol=1e-6)
    assert table[0, 0, 1].item() == pytest.approx(torch.sigmoid((logits[0, 0, 1] - logits[0, 1, 0]) / 2).item(), abs=1e-6)
    assert table[0, 1, 2].item() == pytest.approx(0.5, abs=1e-6) and logits[0, 1, 2].abs() > 1e-4  # the same text, one order


def test_batching_does_not_change_a_logit(judge):
    prompts = ["short", "a prompt that is a good deal longer than the other one"]
    responses = [["a", "b c d e f g h i j k", "l"], ["m n", "o", "p q r s t u v w x y z"]]
    together = judge.logits_many(prompts, responses)
    alone = torch.cat([judge.logits_many([p], [r], tokens_together=1) for p, r in zip(prompts, responses)])
    assert torch.allclose(together, alone, atol=1e-5)


@torch.no_grad()
def test_encoder_equals_transformers_with_random_weights():
    """Other sizes than the fixture's: 64 buckets of 128 positions, 3 layers."""
    transformers = pytest.importorskip("transformers")
    theirs = transformers.DebertaV2Model(
        transformers.DebertaV2Config(
            vocab_size=50, hidden_size=24, num_hidden_layers=3, num_attention_heads=3, intermediate_size=40, hidden_act="gelu",
            max_position_embeddings=128, relative_attention=True, position_buckets=64, pos_att_type=["p2c", "c2p"],
            share_att_key=True, norm_rel_ebd="layer_norm", position_biased_input=False, type_vocab_size=0, layer_norm_eps=1e-7,
        )
    ).eval()  # fmt: skip
    from judges.pairrm import Encoder, PairRMConfig

    ours = Encoder(PairRMConfig(50, 24, 40, 3, 3, 64, 128, 1e-7, 1, 2, 3))
    generator = torch.Generator().manual_seed(0)
    for parameter in theirs.parameters():
        parameter.normal_(0, 0.3, generator=generator)
    ours.load_state_dict({name: value for name, value in theirs.state_dict().items() if "position_ids" not in name})
    tokens = torch.randint(50, (2, 300), generator=generator)
    mask = torch.arange(300) < torch.tensor([[300], [170]])
    expected = theirs(tokens, attention_mask=mask.long()).last_hidden_state
    assert torch.allclose(ours(tokens, mask)[mask], expected[mask], atol=2e-4)


# ------------------------------------------------------------------------------------------------ loading


def damaged(folder, tmp_path, **changes):
    shutil.copytree(folder / "tiny", tmp_path / "judge", copy_function=shutil.copyfile)
    config = json.loads((tmp_path / "judge/config.json").read_text())
    (tmp_path / "judge/config.json").write_text(json.dumps(config | changes))
    return tmp_path / "judge"


def test_judge_folders_are_told_apart_by_their_config(folder):
    assert isinstance(load_judge(str(folder / "tiny")), PairRM)


def test_old_position_ids_are_ignored(folder, tmp_path):
    path = damaged(folder, tmp_path) / "model.safetensors"
    save_file(load_file(path) | {"pretrained_model.embeddings.position_ids": torch.arange(512)[None]}, path)
    PairRM.from_pretrained(path.parent)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"relative_attention": False}, "relative_attention is False, expected True"),
        ({"pos_att_type": ["c2p"]}, "pos_att_type c2p and p2c"),
        ({"conv_kernel_size": 3}, "no conv_kernel_size"),
        ({"source_prefix_id": None}, "source_prefix_id is None"),
        ({"torch_dtype": "int8"}, "dtype is 'int8'"),
        ({"vocab_size": 600}, "word_embeddings.weight is .605, 32., expected .600, 32."),
        ({"num_hidden_layers": 3}, "pretrained_model.encoder.layer.2"),
    ],
)
def test_what_does_not_fit_is_named(folder, tmp_path, changes, words):
    with pytest.raises(ValueError, match=words):
        PairRM.from_pretrained(damaged(folder, tmp_path, **changes))


def test_bfloat16_stays_near_float32(folder, judge):
    half = PairRM.from_pretrained(folder / "tiny", dtype="bfloat16")
    responses = [["a b c", "d e"]]
    assert torch.allclose(half.preferences_many(["x"], responses), judge.preferences_many(["x"], responses), atol=0.1)
