"""Claims about data.py. Expected ids are sentencepiece's and mistral_common's (see ../shared/data/README.md)."""

import json
import shutil

import pytest

from data import Tokenizer, merge_neighbours, prompt_text, read_pairs, read_prompts
from engine.files import read_lines, atomic_write, write_lines
from toy.text_game import write_tokenizer


@pytest.fixture
def small(tmp_path):
    """The folder of the 18-token tokenizer of the small world."""
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    write_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def mistral(shared):
    return Tokenizer(shared / "tokenizer-mistral-v1")


def expected(shared, name):
    return json.loads((shared / name).read_text())


# ------------------------------------------------------------------------------------------------ text <-> ids


@pytest.mark.parametrize("folder", ["tokenizer-mistral-v1", "stories260K"])
def test_encodings_equal_sentencepiece(shared, folder):
    tokenizer, cases = (Tokenizer(shared / folder), expected(shared, f"{folder}/expected_encode.json")["cases"])
    assert len(cases) >= 260
    for case in cases:
        assert tokenizer.encode(case["text"]) == case["ids"], case["text"]


@pytest.mark.parametrize("folder", ["tokenizer-mistral-v1", "stories260K"])
def test_decodings_equal_sentencepiece(shared, folder):
    tokenizer = Tokenizer(shared / folder)
    for case in expected(shared, f"{folder}/expected_encode.json")["cases"]:
        assert tokenizer.decode(case["ids"]) == case["decoded"], case["ids"]


def test_special_markers_in_text_stay_text(shared, mistral):
    for case in expected(shared, "tokenizer-mistral-v1/expected_encode.json")["special_markers_in_text"]:
        assert mistral.encode(case["text"]) == case["plain_text_ids"], case["text"]


def test_bos_eos_and_size_are_those_of_the_model(mistral):
    assert (mistral.bos, mistral.eos) == (1, 2)
    mistral.check_vocabulary(32_000)
    with pytest.raises(ValueError, match="tokenizer.json has token 31999, but the model's vocab_size is 31999"):
        mistral.check_vocabulary(31_999)


def chat_cases(shared):
    cases = expected(shared, "tokenizer-mistral-v1/expected_chat.json")["cases"]
    assert len(cases) == 33
    return cases


def test_conversations_equal_mistral_common(shared, mistral):
    for case in chat_cases(shared):
        assert mistral.chat(case["messages"]) == case["mistral_common_v1"]["ids"], case["name"]


def test_prompt_ids_are_a_prefix_of_the_conversation(shared, mistral):
    conversations = [case for case in chat_cases(shared) if case["kind"] == "conversation"]
    assert conversations
    for case in conversations:
        prompt = mistral.prompt_ids(case["messages"][:-1], "mistral")
        assert prompt == case["mistral_common_v1"]["prompt_ids"], case["name"]
        assert prompt + case["mistral_common_v1"]["response_ids"] == mistral.chat(case["messages"]), case["name"]


CHATS = ["u", "su", "ssu", "uu", "uau", "uaau", "suuaau", "uausu", "usu", "uauau"]


@pytest.mark.parametrize("roles", CHATS)
def test_conversations_equal_mistral_common_run_live(shared, mistral, roles):
    """Messages with spaces and newlines at their edges, in every order of roles that mistral_common takes."""
    pytest.importorskip("sentencepiece", reason="mistral-common reads tokenizer.model only with sentencepiece")
    messages = pytest.importorskip("mistral_common.protocol.instruct.messages")
    from mistral_common.protocol.instruct.request import ChatCompletionRequest
    from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

    kinds = {"s": messages.SystemMessage, "u": messages.UserMessage, "a": messages.AssistantMessage}
    names = {"s": "system", "u": "user", "a": "assistant"}
    texts = [f"{' ' * (i % 3)}Message {i}: «naïve»\n</s>{' ' * (i % 2)}" for i in range(len(roles))]
    theirs = MistralTokenizer.from_file(str(shared / "tokenizer-mistral-v1/tokenizer.model"))
    request = ChatCompletionRequest(messages=[kinds[role](content=text) for role, text in zip(roles, texts)])
    ours = mistral.chat([{"role": names[role], "content": text} for role, text in zip(roles, texts)])
    assert ours == theirs.encode_chat_completion(request).tokens


def test_a_string_prompt_is_one_user_message(mistral):
    assert mistral.prompt_ids("Hi", "mistral") == mistral.chat([{"role": "user", "content": "Hi"}])


def test_neighbours_of_one_role_are_merged_by_a_blank_line():
    turns = (("user", "a"), ("user", "b"), ("assistant", "c"), ("user", "d"))
    messages = [{"role": role, "content": text} for role, text in turns]
    assert merge_neighbours(messages) == [("user", "a\n\nb"), ("assistant", "c"), ("user", "d")]


def test_an_unknown_role_is_named():
    with pytest.raises(ValueError, match="role 'tool', expected system, user or assistant"):
        merge_neighbours([{"role": "tool", "content": "x"}])


def test_a_judge_sees_one_user_message_bare_and_a_conversation_with_its_roles():
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}, {"role": "user", "content": "Why?"}]
    assert prompt_text("Hi") == prompt_text(chat[:1]) == "Hi"
    assert prompt_text(chat) == "user: Hi\n\nassistant: Yes?\n\nuser: Why?"


# ------------------------------------------------------------------------------------------------ templates


def test_plain_prompt_is_bos_and_the_text(small):
    assert Tokenizer(small).prompt_ids("3+4=", "plain") == [1, 6, 13, 7, 14]


def test_plain_continuation_keeps_the_space_before_its_first_word(shared):
    tokenizer = Tokenizer(shared / "stories260K")
    prompt = tokenizer.prompt_ids("Once upon a", "plain")
    response = tokenizer.encode("time")  # begins with ▁, the space
    assert tokenizer.response_text(prompt, [*response, tokenizer.eos], "plain") == " time"
    assert tokenizer.response_text(prompt, [*response, tokenizer.eos], "mistral") == "time"


def test_plain_continuation_inside_a_word_has_no_space(shared):
    tokenizer = Tokenizer(shared / "stories260K")
    prompt, letter = (tokenizer.prompt_ids("Once upon a tim", "plain"), tokenizer.backend.token_to_id("e"))
    assert tokenizer.response_text(prompt, [letter], "plain") == "e"


def test_judged_ids_mark_both_ends(small):
    assert Tokenizer(small).judged_ids("3+4=", "7.", "plain") == [1, 6, 13, 7, 14, 10, 15, 2]


def test_judged_ids_of_the_chat_template_are_the_conversation(mistral):
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    assert mistral.judged_ids("Hi", "Hello", "mistral") == mistral.chat(chat)


# ------------------------------------------------------------------------------------------------ bad tokenizers


def test_missing_tokenizer_is_named(small):
    (small / "tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError, match="tokenizer/tokenizer.json: no such file"):
        Tokenizer(small)


def test_broken_tokenizer_is_named(small):
    (small / "tokenizer.json").write_text('{"model": 3}')
    with pytest.raises(ValueError, match="tokenizer/tokenizer.json: not a tokenizer.json"):
        Tokenizer(small)


def test_missing_tokenizer_config_is_named(small):
    (small / "tokenizer_config.json").unlink()
    with pytest.raises(FileNotFoundError, match="tokenizer/tokenizer_config.json: no such file"):
        Tokenizer(small)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"bos_token": "<s>"}, "eos_token is None, expected a token of tokenizer.json"),
        ({"bos_token": "<s>", "eos_token": "<|im_end|>"}, r"eos_token is '<\|im_end\|>', expected a token"),
        ({"bos_token": "<bos>", "eos_token": "</s>"}, "bos_token is '<bos>', expected a token"),
    ],
)
def test_a_special_token_that_the_tokenizer_lacks_is_named(small, config, message):
    (small / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="tokenizer_config.json: " + message):
        Tokenizer(small)


def test_special_tokens_may_be_written_as_objects(small):
    (small / "tokenizer_config.json").write_text(json.dumps({"bos_token": {"content": "<s>"}, "eos_token": {"content": "</s>"}}))
    assert (Tokenizer(small).bos, Tokenizer(small).eos) == (1, 2)


def test_copied_tokenizer_reads_the_same(small, tmp_path):
    copy = tmp_path / "copy"
    copy.mkdir()
    Tokenizer(small).copy_to(copy)
    shutil.rmtree(small)
    assert Tokenizer(copy).encode("3+4=") == [6, 13, 7, 14]


# ------------------------------------------------------------------------------------------------ prompt and pair files


def lines(tmp_path, *rows):
    path = tmp_path / "file.jsonl"
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def test_prompts_are_strings_or_conversations(tmp_path):
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    assert read_prompts(lines(tmp_path, {"prompt": "a", "more": 1}, "", {"messages": chat})) == ["a", chat]


def test_real_prompts_are_read(shared):
    assert len(read_prompts(shared / "alpaca_eval/prompts.jsonl")) == 805


USER = {"role": "user", "content": "Hi"}
BAD_PROMPTS = {
    "broken JSON": ('{"prompt": "a"', "not valid JSON"),
    "no object": ([1, 2], "expected a JSON object, found list"),
    "no prompt": ({"text": "a"}, "expected a string under 'prompt', found nothing"),
    "number": ({"prompt": 3}, "expected a string under 'prompt', found 3"),
    "null": ({"prompt": None}, "expected a string under 'prompt', found null"),
    "empty": ({"prompt": ""}, "the prompt is empty"),
    "messages no list": ({"messages": "Hi"}, "expected a list of chat messages"),
    "no messages": ({"messages": []}, "expected a list of chat messages"),
    "message no object": ({"messages": ["Hi"]}, "expected a list of chat messages"),
    "no content": ({"messages": [{"role": "user"}]}, "expected a string under 'content', found nothing"),
    "unknown role": ({"messages": [{"role": "tool", "content": "x"}, USER]}, "message role 'tool', expected"),
    "ends with assistant": ({"messages": [USER, {"role": "assistant", "content": "x"}]}, "the last message is from 'assistant'"),
}


@pytest.mark.parametrize("case", BAD_PROMPTS)
def test_a_bad_prompt_is_named_with_file_and_line(tmp_path, case):
    row, message = BAD_PROMPTS[case]
    with pytest.raises(ValueError, match=rf"file.jsonl, line 3: .*{message}"):
        read_prompts(lines(tmp_path, {"prompt": "good"}, "", row))


def test_pairs_without_probability_are_certain(tmp_path):
    row = {"prompt": "p", "chosen": "a", "rejected": "b"}
    pairs = read_pairs(lines(tmp_path, row, row | {"probability": 0.7}, row | {"probability": 0}))
    assert [pair["probability"] for pair in pairs] == [1.0, 0.7, 0.0]


def test_real_pairs_are_read_and_a_bare_truth_value_is_its_text(shared):
    """Six answers of the PandaLM file are the JSON value true, the first in line 158."""
    pairs = read_pairs(shared / "pandalm/pairs.jsonl")
    assert len(pairs) == 999 and 0.5 in {pair["probability"] for pair in pairs}
    assert pairs[157]["chosen"] == "true" and sum(pair["chosen"] == "true" for pair in pairs) == 6


BAD_PAIRS = {
    "broken JSON": ("{", "not valid JSON"),
    "no chosen": ({"chosen": None, "probability": 0.5}, "expected a string under 'chosen', found null"),
    "above one": ({"probability": 1.1}, "probability is 1.1, expected a number from 0 to 1"),
    "below zero": ({"probability": -0.1}, "probability is -0.1, expected a number"),
    "NaN": ({"probability": float("nan")}, "probability is nan, expected a number"),
    "string": ({"probability": "0.7"}, "probability is '0.7', expected a number"),
    "bool": ({"probability": True}, "probability is True, expected a number"),
}


@pytest.mark.parametrize("case", BAD_PAIRS)
def test_a_bad_pair_is_named_with_file_and_line(tmp_path, case):
    change, message = BAD_PAIRS[case]
    good = {"prompt": "p", "chosen": "a", "rejected": "b"}
    with pytest.raises(ValueError, match=rf"file.jsonl, line 2: .*{message}"):
        read_pairs(lines(tmp_path, good, change if isinstance(change, str) else good | change))


@pytest.mark.parametrize("read", [read_prompts, read_pairs])
def test_an_empty_file_is_named(tmp_path, read):
    with pytest.raises(ValueError, match="file.jsonl: the file is empty"):
        read(lines(tmp_path, "", ""))


@pytest.mark.parametrize("read", [read_prompts, read_pairs])
def test_a_missing_file_is_named(tmp_path, read):
    with pytest.raises(FileNotFoundError, match="nothing.jsonl: no such file"):
        read(tmp_path / "nothing.jsonl")


def test_a_file_that_is_not_utf8_is_named(tmp_path):
    path = tmp_path / "latin.jsonl"
    path.write_bytes('{"prompt": "a"}\n{"prompt": "é"}\n'.encode("latin-1"))
    with pytest.raises(ValueError, match="latin.jsonl"):
        read_prompts(path)


def test_lines_survive_writing_and_reading(tmp_path):
    rows = [{"text": "naïve \u2028 «»\n", "tokens": [1, 2]}, {"text": "😀", "tokens": []}]
    write_lines(tmp_path / "rows.jsonl", rows)
    assert [row for _, row in read_lines(tmp_path / "rows.jsonl")] == rows


# ------------------------------------------------------------------------------------------------ writing whole


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(KeyError), atomic_write(path) as temporary:
        temporary.write_text("half")
        raise KeyError
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_a_folder_is_written_over_an_empty_one_but_never_over_a_full_one(tmp_path):
    path = tmp_path / "folder"
    path.mkdir()
    with atomic_write(path) as temporary:
        temporary.mkdir()
        (temporary / "a").write_text("a")
    with pytest.raises(FileExistsError, match="folder: exists already, and nothing is written over it"), atomic_write(path):
        pass
    assert [p.name for p in path.iterdir()] == ["a"] and list(tmp_path.iterdir()) == [path]


def test_folders_above_a_file_are_made(tmp_path):
    write_lines(tmp_path / "a/b/c.jsonl", [{"x": 1}])
    assert (tmp_path / "a/b/c.jsonl").read_text() == '{"x": 1}\n'
