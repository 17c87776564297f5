"""Claims about chat templates: transformers gives the same ids, and characters in a message never become a special token."""

import json
import random
import re
from pathlib import Path

import pytest
from chat_templates import LLAMA3, MISTRAL_V2, MISTRAL_V3, QWEN2, SMOLLM2, TEMPLATES
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from data import Tokenizer

SPECIAL = {
    SMOLLM2: ["<|im_start|>", "<|im_end|>"],
    QWEN2: ["<|endoftext|>", "<|im_end|>", "<|im_start|>"],
    LLAMA3: ["<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"],
    MISTRAL_V2: ["<s>", "</s>"],
    MISTRAL_V3: ["<s>", "</s>", "[INST]", "[/INST]"],
}
CORPUS = ["The cat sat on the mat, and the dog on the log.\n\n1. one 2. two\n", "Wie heißt du? 日本語 naïve <b>12 345</b>"] * 4
WORDS = ["cat", "  the dog", "\n\n1.", " naïve", "12 345", "<b>", "日本", "{x}", "\t", " ", "mat.\n", "im_end", "[INST", "é"]


def byte_level(special):
    """As in GPT-2, Llama 3 and Qwen: bytes, digits one by one."""
    backend = Backend(models.BPE())
    digits = pre_tokenizers.Digits(individual_digits=True)
    backend.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, special_tokens=special))
    return backend


def sentencepiece(special, first_only):
    """As in Llama 2 and Mistral: ▁ for a space, before each piece (old files) or before the first one only (new files)."""
    backend = Backend(models.BPE(unk_token="<unk>"))
    if first_only:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        backend.pre_tokenizer = pre_tokenizers.Split(Regex("(?=▁)"), "isolated")
    backend.decoder = decoders.Metaspace()
    backend.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=400, special_tokens=["<unk>", *special]))
    return backend


KINDS = {
    "byte-level": byte_level,
    "sentencepiece": lambda special: sentencepiece(special, first_only=False),
    "sentencepiece, first piece only": lambda special: sentencepiece(special, first_only=True),
}


def write(folder, kind, template, **changes):
    """A tokenizer folder: trained on a few sentences, with the special tokens that the template writes."""
    folder.mkdir()
    special = SPECIAL.get(template, ["<s>", "</s>"])
    backend = KINDS[kind]([AddedToken(token, special=True, normalized=False) for token in special])
    backend.save(str(folder / "tokenizer.json"))
    eos = next(token for token in special if token in ("<|im_end|>", "<|eot_id|>", "</s>"))
    config = {"bos_token": special[0], "eos_token": eos, "tokenizer_class": "PreTrainedTokenizerFast", "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(config | changes))
    return folder


def conversations(count, seed=0):
    """Of one to three turns, some with a system message, some that end with an answer."""
    draw = random.Random(seed)

    def text():
        return "".join(draw.choices(WORDS, k=draw.randint(1, 6)))

    for _ in range(count):
        messages = [{"role": "system", "content": text()}] if draw.random() < 0.4 else []
        for _ in range(draw.randint(1, 3)):
            messages += [{"role": "user", "content": text()}, {"role": "assistant", "content": text()}]
        yield messages[: -1 if draw.random() < 0.6 else None], draw.random() < 0.7


def theirs(folder, messages, add_generation_prompt):
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=add_generation_prompt, return_dict=False)
    return ids, tokenizer


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_ids_of_a_conversation_are_those_of_transformers(tmp_path, kind, name):
    transformers = pytest.importorskip("transformers")
    folder = write(tmp_path / "t", kind, TEMPLATES[name])
    ours, tokenizer = Tokenizer(folder).conversation_ids, transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    for messages, prompt in conversations(40):
        expected = tokenizer.apply_chat_template(messages, add_generation_prompt=prompt, return_dict=False)
        assert ours(messages, prompt) == expected, messages


def test_a_template_of_a_file_of_its_own_is_the_one_that_counts(tmp_path):
    folder = write(tmp_path / "t", "byte-level", SMOLLM2)
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}!")
    assert Tokenizer(folder).conversation_ids([{"role": "user", "content": "cat"}]) == Tokenizer(folder).encode("cat!")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_a_special_token_in_a_message_stays_text_where_transformers_makes_it_one(tmp_path, kind, name):
    """Each special token's text inside a user's message: the ids have as many special ones as without it."""
    folder = write(tmp_path / "t", kind, TEMPLATES[name])
    tokenizer = Tokenizer(folder)
    special = {tokenizer.backend.token_to_id(token) for token in SPECIAL[TEMPLATES[name]]}

    def count(ids):
        return sum(number in special for number in ids)

    plain = count(tokenizer.conversation_ids([{"role": "user", "content": "say now"}]))
    for token in SPECIAL[TEMPLATES[name]]:
        messages = [{"role": "user", "content": f"say {token} now"}]
        ours = tokenizer.conversation_ids(messages)
        assert count(ours) == plain
        assert count(theirs(folder, messages, True)[0]) == plain + 1
        if kind == "byte-level":  # whose vocabulary has every byte
            assert f"say {token} now" in tokenizer.backend.decode(ours, skip_special_tokens=False)


def test_a_judge_reads_the_conversation_with_its_answer_and_the_policy_continues_the_prompt(tmp_path):
    tokenizer = Tokenizer(write(tmp_path / "t", "byte-level", SMOLLM2))
    user, answer = {"role": "user", "content": "the cat"}, {"role": "assistant", "content": "mat"}
    assert tokenizer.prompt_ids("the cat", "chat") == tokenizer.conversation_ids([user], True)
    assert tokenizer.prompt_ids([user], "chat") == tokenizer.conversation_ids([user], True)
    assert tokenizer.judged_ids("the cat", "mat", "chat") == tokenizer.conversation_ids([user, answer], False)
    ids = tokenizer.prompt_ids("the cat", "chat")
    response = tokenizer.encode(" on the mat") + [tokenizer.eos]
    assert tokenizer.response_text(ids, response, "chat") == " on the mat"


@pytest.mark.parametrize("kind", KINDS)
def test_every_stop_token_of_the_generation_config_ends_a_response(tmp_path, kind):
    folder = write(tmp_path / "t", kind, LLAMA3)
    first, second = (Tokenizer(folder).backend.token_to_id(token) for token in ("<|begin_of_text|>", "<|eot_id|>"))
    assert Tokenizer(folder).stop == (second,)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [first, second]}))
    tokenizer = Tokenizer(folder)
    assert tokenizer.stop == (first, second) and tokenizer.eos == second
    (tmp_path / "copy").mkdir()
    tokenizer.copy_to(tmp_path / "copy")
    assert Tokenizer(tmp_path / "copy").stop == (first, second)


def refused(call, *words):
    with pytest.raises(ValueError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message and all(word in message for word in words), message


def test_what_would_be_wrong_in_silence_is_refused_with_one_sentence(tmp_path):
    none = write(tmp_path / "none", "byte-level", None)
    refused(lambda: Tokenizer(none).prompt_ids("x", "chat"), "none/tokenizer_config.json: no chat_template", "--template mistral")

    for name in ("smollm2", "qwen2", "llama-3", "mistral v0.3"):
        folder = write(tmp_path / re.sub(r"\W", "", name), "byte-level", TEMPLATES[name])
        refused(lambda folder=folder: Tokenizer(folder).prompt_ids("x", "mistral"), "--template mistral", "--template chat")

    chat = write(tmp_path / "null", "byte-level", SMOLLM2, bos_token=None)
    assert Tokenizer(chat).prompt_ids("x", "chat")
    refused(lambda: Tokenizer(chat).prompt_ids("x", "plain"), "bos_token is null", "--template plain")

    broken = write(tmp_path / "broken", "byte-level", "{% if %}")
    refused(lambda: Tokenizer(broken).prompt_ids("x", "chat"), "broken/tokenizer_config.json: the chat template is not valid")

    alternating = Tokenizer(write(tmp_path / "turns", "byte-level", MISTRAL_V2))
    two = [{"role": "user", "content": "x"}] * 2
    refused(lambda: alternating.prompt_ids(two, "chat"), "the chat template refuses the conversation: roles must alternate")

    far = write(tmp_path / "far", "byte-level", SMOLLM2)
    (far / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 99_999]}))
    refused(lambda: Tokenizer(far), "far/generation_config.json: eos_token_id is 99999", "a token of tokenizer.json")


def test_a_template_cannot_reach_out_of_its_sandbox_or_change_the_messages(tmp_path):
    attacks = ["{{ ''.__class__.__mro__ }}", "{{ messages.append(1) }}", "{{ cycler.__init__.__globals__ }}"]
    for number, attack in enumerate(attacks):
        tokenizer = Tokenizer(write(tmp_path / str(number), "byte-level", attack))
        refused(lambda tokenizer=tokenizer: tokenizer.prompt_ids("x", "chat"), "the chat template refuses the conversation")


def test_the_real_tokenizer_of_smollm2_gives_the_ids_of_transformers():
    transformers = pytest.importorskip("transformers")
    folder = Path(__file__).parents[1] / "out" / "smollm2"
    if not folder.is_dir():
        pytest.skip("out/smollm2 is not here; python -m real.smollm2 makes it")
    ours, tokenizer = Tokenizer(folder).conversation_ids, transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    for messages, prompt in conversations(20):
        assert ours(messages, prompt) == tokenizer.apply_chat_template(messages, add_generation_prompt=prompt, return_dict=False)
