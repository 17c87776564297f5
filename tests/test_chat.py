"""Claims about evaluate chat: what is shown, what is remembered, and what becomes of a pick. A script plays the person."""

import io
import json
import re
import shutil
import signal
import sys
from argparse import Namespace
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from conftest import tiny_config, tiny_run
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from data import Tokenizer, read_pairs
from engine import prepack
from evaluate import __main__ as evaluate
from evaluate import chat as chatting
from evaluate.chat import Speaker, chat, escaped, stream
from generate import generate
from model import Transformer, initialize
from toy.debug import build_debugging

JOINED = "{{ bos_token }}{% for message in messages %}{{ message['content'] }}{% endfor %}"


def seeded(number):
    return torch.Generator().manual_seed(number)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The debugger's world; `chat` is its policy with a chat template, which joins all messages."""
    folder = tmp_path_factory.mktemp("chat") / "world"
    build_debugging(folder)
    shutil.copytree(folder / "policy", folder / "chat")
    (folder / "chat/chat_template.jinja").write_text(JOINED)
    return folder


class Person:
    """Types these lines, then closes the terminal. An exception among them is raised. `screen` is what was seen."""

    def __init__(self, *lines):
        self.lines = list(lines)
        self.screen = ""

    def ask(self, question):
        self.screen += question
        line = self.lines.pop(0) if self.lines else EOFError
        if not isinstance(line, str):
            raise line
        self.screen += line + "\n"
        return line

    def show(self, text):
        self.screen += text


def settings(**changes):
    values = dict(against=None, pairs=None, max_new_tokens=4, temperature=1.0, top_p=1.0)
    values |= dict(template="plain", seed=0, device="cpu", dtype=None)
    return Namespace(**(values | changes))


def talk(person, policy, against=None, **changes):
    """Let a person chat; returns what was on the screen."""
    chat(settings(policy=policy, against=against, **changes), person.ask, person.show)
    return person.screen


@pytest.fixture
def script(world, monkeypatch):
    """Put texts in place of what is sampled. Returns the list of prompts, as text, that were answered."""
    tokenizer = Tokenizer(world / "policy")
    asked = []

    def write(*answers):
        answers = iter(answers)

        def scripted(model, prompt, *_):
            asked.append(tokenizer.decode(prompt))
            for letter in next(answers):
                if letter == "^":
                    raise KeyboardInterrupt
                yield from tokenizer.encode(letter)
            yield tokenizer.eos

        monkeypatch.setattr(chatting, "stream", scripted)
        return asked

    return write


# ------------------------------------------------------------------------ tokens one by one


@pytest.mark.parametrize(("temperature", "top_p"), [(0.0, 1.0), (1.0, 1.0), (0.7, 0.8)])
@pytest.mark.parametrize("stop", [(), (5,), (7, 11)])
def test_a_stream_has_the_tokens_of_generate(tiny_model, temperature, top_p, stop):
    for seed, prompt in enumerate([[3, 1, 4], [9] * 17, list(range(45))]):
        how = (20, stop, temperature, top_p)
        [[expected]] = generate(tiny_model, [prompt], 1, *how, seeded(seed))
        assert list(stream(tiny_model, prompt, *how, seeded(seed))) == expected


def test_a_stream_may_end_with_its_first_token(tiny_model):
    every = tuple(range(50))
    assert len(list(stream(tiny_model, [3, 1], 20, every))) == 1
    assert len(list(stream(tiny_model, [3, 1], 1, ()))) == 1


def test_a_token_is_there_before_the_next_is_computed(tiny_model):
    calls = []
    tiny_model.model.register_forward_hook(lambda *_: calls.append(1))
    tokens = stream(tiny_model, [3, 1, 4], 20, ())
    for number in (1, 2, 3):
        next(tokens)
        assert len(calls) == number


def test_a_stream_does_not_go_beyond_the_context():
    model = initialize(Transformer(tiny_config(max_position_embeddings=16)), seeded(0))
    assert len(list(stream(model, [1] * 6, 10, ()))) == 10
    with pytest.raises(ValueError, match="have 17, more than the model's context of 16"):
        list(stream(model, [1] * 6, 11, ()))


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")
def test_an_answer_is_computed_with_prepacked_weights_and_has_the_tokens_of_generate(world, monkeypatch):
    monkeypatch.setattr(prepack, "SMALLEST", 1)
    speaker = Speaker(world / "policy", settings(policy=world / "policy", max_new_tokens=8))
    packed = []
    ids = speaker.ids("3+4=")
    answer = speaker.answer(ids, seeded(0), lambda text: packed.append("head" in vars(speaker.policy)))
    assert packed[0] and "head" not in vars(speaker.policy)

    generator = seeded(0)
    torch.randint(1, (), generator=generator)  # which round answers
    [[expected]] = generate(speaker.policy, [ids], 1, 8, speaker.tokenizer.stop, generator=generator)
    assert answer.text == speaker.tokenizer.response_text(ids, expected, "plain")


# ------------------------------------------------------------------------ what is shown


def byte_level():
    """A token for each byte, as the tokenizers of GPT-2 and SmolLM2 have at the bottom."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Backend(models.BPE({letter: number for number, letter in enumerate(letters)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return backend


def byte_fallback():
    """The same, as Mistral's has: where a run of bytes is broken, all of it decodes as U+FFFD."""
    vocabulary = {f"<0x{number:02X}>": number for number in range(256)}
    backend = Backend(models.BPE(vocabulary, [], byte_fallback=True))
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return backend


def answered(backend, tokens, monkeypatch):
    """The pieces in which a speaker with this tokenizer shows these tokens, and the text of its answer."""
    tokenizer = SimpleNamespace(stop=(999,), response_text=lambda ids, tokens, _: backend.decode(tokens))
    policy = SimpleNamespace(config=tiny_config())
    args = Namespace(max_new_tokens=9, temperature=1.0, top_p=1.0, template="chat")
    monkeypatch.setattr(chatting, "stream", lambda *_: iter([*tokens, 999]))
    monkeypatch.setattr(chatting, "prepacked", lambda policy: nullcontext())
    speaker = SimpleNamespace(args=args, folders=["here"], tokenizer=tokenizer, policy=policy)
    shown = []
    answer = Speaker.answer(speaker, [1], seeded(0), shown.append)
    assert shown.pop() == "\n"
    return shown, answer.text


@pytest.mark.parametrize("backend", [byte_level(), byte_fallback()])
@pytest.mark.parametrize("text", ["né", "a🦉b", "日本", "👩‍🚀!", "🦉🦉"])
def test_no_character_is_shown_before_its_last_byte(backend, text, monkeypatch):
    tokens = backend.encode(text).ids
    assert len(tokens) == len(text.encode())
    shown, whole = answered(backend, tokens, monkeypatch)
    assert "".join(shown) == whole == text
    assert [piece for piece in shown if piece] == list(text)  # each at once, none in parts


def test_bytes_that_become_no_character_are_shown_at_the_end(monkeypatch):
    backend = byte_level()
    shown, whole = answered(backend, backend.encode("a🦉").ids[:-1], monkeypatch)
    assert whole == "a\ufffd" and "".join(shown) == whole


def test_what_a_terminal_would_obey_is_spelled_out():
    assert escaped("\x1b[31mred \x1b]0;title\x07") == r"\x1b[31mred \x1b]0;title\x07"
    assert escaped("a\rb\x08\x7f\x9b2J\u202e") == r"a\rb\x08\x7f\x9b2J\u202e"
    plain = "two\nlines,\ta tab, né 日本 👩‍🚀 \\x1b"
    assert escaped(plain) == plain


def test_control_characters_of_an_answer_are_kept_but_not_shown(monkeypatch):
    backend = byte_level()
    shown, whole = answered(backend, backend.encode("a\x1b]8;;").ids, monkeypatch)
    assert whole == "a\x1b]8;;" and "".join(shown) == r"a\x1b]8;;"


def test_a_seed_repeats_the_answers_of_generate(world):
    """The screen of a real conversation, told from the two functions below it."""
    tokenizer = Tokenizer(world / "policy")
    model = Transformer.from_pretrained(world / "policy")
    generator = seeded(3)
    expected = chatting.HELP
    for line in ("3+4=", "5+9="):
        torch.randperm(1, generator=generator)
        torch.randint(1, (), generator=generator)
        ids = tokenizer.prompt_ids(line, "plain")
        [[tokens]] = generate(model, [ids], 1, 4, tokenizer.stop, generator=generator)
        cut = "" if tokens[-1] in tokenizer.stop else " [cut after 4 tokens]"
        expected += f"\n> {line}\n" + tokenizer.response_text(ids, tokens, "plain") + cut + "\n"
    assert talk(Person("3+4=", "5+9="), world / "policy", seed=3) == expected + "\n> \n"


# ------------------------------------------------------------------------ the conversation


def test_the_answers_and_messages_before_are_part_of_the_prompt(world, script):
    asked = script("7.", "14.", "2!")
    talk(Person("3+4=", "5+9=", "/new", "1+1="), world / "chat", template="chat")
    assert asked == ["3+4=", "3+4=7.5+9=", "1+1="]


def test_a_plain_prompt_is_the_last_text_alone(world, script):
    asked = script("7.", "14.")
    talk(Person("3+4=", "5+9="), world / "policy")
    assert asked == ["3+4=", "5+9="]


def test_quit_and_ctrl_d_end_and_empty_lines_are_no_messages(world, script):
    asked = script("7.")
    person = Person("", "  ", "/quit", "3+4=")
    talk(person, world / "policy")
    assert person.lines == ["3+4="] and asked == []
    assert talk(Person(), world / "policy").endswith("> \n")


def test_ctrl_c_stops_the_answer_and_not_the_program(world, script):
    asked = script("12^34", "7.")
    screen = talk(Person("3+4=", KeyboardInterrupt, "5+9="), world / "chat", template="chat")
    assert "12 [stopped]\n" in screen and "34" not in screen
    assert asked == ["3+4=", "3+4=125+9="]  # what was written stays; at the prompt nothing happens


def test_a_signal_while_an_answer_is_shown_stops_it(world, monkeypatch):
    person = Person("3+4=", "5+9=")
    monkeypatch.setattr(chatting, "stream", lambda *_: iter([5, 5, 5, 5]))

    def show(text):
        Person.show(person, text)
        if text and "3+4=" in person.screen and "stopped" not in person.screen:
            signal.raise_signal(signal.SIGINT)

    person.show = show
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
    try:
        screen = talk(person, world / "policy")
    finally:
        signal.signal(signal.SIGINT, before)
    assert re.search(r"3\+4=\n\S \[stopped\]\n\n> 5\+9=\n\S{4} \[cut after 4 tokens\]\n", screen)


def test_an_answer_ends_with_the_context(world):
    screen = talk(Person("1" * 26, "1" * 31, "3+4="), world / "policy", max_new_tokens=512)
    assert "32 tokens, but the model's context is 32; /new starts again\n" in screen
    assert screen.count("\n> ") == 4
    shown = screen.split("1" * 26 + "\n")[1].split("\n")[0]
    assert "[cut after 5 tokens]" in shown or len(shown) < 5


def test_a_message_that_no_template_takes_is_dropped(world, script):
    asked = script("7.", "7.")
    for wrong, reason in (("a\ufdd0b", "not characters"), ("a\udcffb", "not valid Unicode")):
        screen = talk(Person(wrong, "3+4="), world / "chat", template="chat")
        assert reason in screen and screen.endswith("7.\n\n> \n")
    assert asked == ["3+4="] * 2


def test_each_answer_of_a_run_comes_from_a_round_drawn_at_random(world, tmp_path, monkeypatch):
    tiny_run(world, tmp_path / "run")
    loaded = []
    monkeypatch.setattr(chatting, "load_weights", lambda policy, folder: loaded.append(folder.parent.name))
    lines = ["3+4=", ""] * 40
    screen = talk(Person(*lines), tmp_path / "run", world / "policy")
    rounds = re.findall(r"round-0\d", screen)
    assert (
        len(rounds) == 40 and rounds == loaded and 8 < rounds.count("round-01") < 32
    )  # a fair coin leaves this 1 time in 10,000


# ------------------------------------------------------------------------ two policies


@pytest.fixture
def other(world, tmp_path):
    return shutil.copytree(world / "chat", tmp_path / "other")


def test_the_order_is_random_but_repeats_with_the_seed_and_is_told_after_the_pick(world, other):
    screens = []
    for seed in (0, 0, 1):
        lines = ["3+4=", "1"] * 40
        screens.append(talk(Person(*lines), world / "policy", other, seed=seed))
    assert screens[0] == screens[1] != screens[2]
    first = re.findall(r"\(1\) was (\S+), \(2\) was (\S+)\n", screens[0])
    assert len(first) == 40 and set(first) == {(f"{world}/policy", f"{other}"), (f"{other}", f"{world}/policy")}
    assert 8 < sum(one == str(other) for one, _ in first) < 32
    for turn in screens[0].split("\n> ")[1:-1]:
        assert str(world) not in turn.split("Which is better?")[0]
        assert str(other) not in turn.split("Which is better?")[0]


def test_each_policy_answers_its_own_prompt_under_its_own_name(world, other, monkeypatch):
    """The other policy's template begins with a 9, and both give their prompt back."""
    (other / "chat_template.jinja").write_text(JOINED.replace("}}{%", "}}9{%", 1))
    monkeypatch.setattr(chatting, "stream", lambda model, prompt, *_: iter(prompt))
    lines = ["3+4=", "", "/new"] * 20
    screen = talk(Person(*lines), world / "chat", other, template="chat")
    names = {"3+4=": str(world / "chat"), "93+4=": str(other)}
    turns = re.findall(r"\(1\) (\S+) .*?\(2\) (\S+) .*?\(1\) was (\S+), \(2\) was (\S+)\n", screen, re.S)
    assert len(turns) == 20
    assert all(names[one] == first and names[two] == second for one, two, first, second in turns)


@pytest.mark.parametrize(
    ("line", "chosen", "rejected", "probability", "goes_on"),
    [("1", "7.", "8!", 1.0, "7."), ("2", "8!", "7.", 1.0, "8!"), ("0", "7.", "8!", 0.5, "7.")],
)
def test_a_pick_is_kept_as_a_pair_and_goes_on(world, other, script, tmp_path, line, chosen, rejected, probability, goes_on):
    asked = script("7.", "8!", "14.", "13?")
    pairs = tmp_path / "new/pairs.jsonl"
    person = Person("3+4=", line, "5+9=", "1")
    talk(person, world / "chat", other, template="chat", pairs=str(pairs))
    assert asked == ["3+4=", "3+4=", *[f"3+4={goes_on}5+9="] * 2]

    first, second = read_pairs(pairs)
    assert first == {"prompt": "3+4=", "chosen": chosen, "rejected": rejected, "probability": probability, "votes": []}
    assert second["prompt"] == f"user: 3+4=\n\nassistant: {goes_on}\n\nuser: 5+9="
    assert set(json.loads(pairs.read_text().splitlines()[0])) == {"prompt", "chosen", "rejected", "probability"}


def test_enter_keeps_no_pair_and_the_first_answer_goes_on(world, other, script, tmp_path):
    asked = script("7.", "8!", "14.", "13?", "1.", "2.")
    person = Person("3+4=", "", "5+9=", KeyboardInterrupt, "1+1=")
    screen = talk(person, world / "chat", other, template="chat", pairs=str(tmp_path / "pairs.jsonl"))
    assert asked[2] == "3+4=7.5+9=" and asked[4] == "3+4=7.5+9=14.1+1="
    assert not (tmp_path / "pairs.jsonl").exists()
    assert screen.count(" was ") == 4 and screen.endswith("Enter for no pick: \n")


def test_other_picks_are_asked_for_again(world, other, script, tmp_path):
    script("7.", "8!")
    person = Person("3+4=", "yes", "3", " 2 ")
    screen = talk(person, world / "policy", other, pairs=str(tmp_path / "pairs.jsonl"))
    assert "'yes' is not 1, 2, 0 or Enter: 3\n'3' is not 1, 2, 0 or Enter:  2 \n" in screen
    assert read_pairs(tmp_path / "pairs.jsonl")[0]["chosen"] == "8!"


def test_pairs_are_added_to_those_that_are_there(world, other, script, tmp_path):
    script("7.", "8!")
    old = {"prompt": "p", "chosen": "a", "rejected": "b", "note": "mine"}
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text(json.dumps(old))  # whose last line does not end
    talk(Person("3+4=", "1"), world / "policy", other, pairs=str(pairs))
    rows = [json.loads(line) for line in pairs.read_text().splitlines()]
    assert rows[0] == old and rows[1]["prompt"] == "3+4=" and len(rows) == 2


@pytest.mark.parametrize(
    ("answers", "reason"), [(("1^", "7."), "an answer was stopped"), (("7.", "7."), "the answers are the same")]
)
def test_what_says_nothing_about_two_answers_is_no_pair(world, other, script, tmp_path, answers, reason):
    script(*answers)
    screen = talk(Person("3+4=", "2"), world / "policy", other, pairs=str(tmp_path / "pairs.jsonl"))
    assert f"not kept as a pair: {reason}\n" in screen
    assert not (tmp_path / "pairs.jsonl").exists()


# ------------------------------------------------------------------------ the command


def call(*arguments):
    return evaluate.main(["chat", *map(str, arguments)])


def test_the_command_talks_through_the_terminal(world, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO("3+4=\n2\n/quit\nnever read\n"))
    flags = ["--template", "plain", "--max-new-tokens", "4", "--pairs", tmp_path / "pairs.jsonl", "--seed", "1"]
    assert call("--policy", world / "policy", "--against", world / "chat", *flags) == 0
    screen = capsys.readouterr().out
    assert screen.startswith(chatting.HELP) and f"was {world}/chat" in screen
    assert len(read_pairs(tmp_path / "pairs.jsonl")) == 1


def test_wrong_inputs_are_one_sentence(world, tmp_path, capsys):
    plain = ["--policy", world / "policy", "--template", "plain"]
    text = tmp_path / "notes.txt"
    text.write_text("no pairs\n")
    for flags, reason in [
        (["--policy", tmp_path / "none"], "no such file"),
        (["--policy", world / "policy"], "no chat_template"),
        ([*plain, "--pairs", tmp_path / "new.jsonl"], "--pairs needs --against"),
        ([*plain, "--against", world / "chat", "--pairs", text], "notes.txt, line 1: not valid JSON"),
        ([*plain, "--against", tmp_path / "none"], "no such file"),
        ([*plain, "--max-new-tokens", "0"], "--max-new-tokens is 0, expected at least 1"),
        ([*plain, "--temperature", "-1"], "--temperature is -1.0, expected"),
        ([*plain, "--device", "nothing"], "nothing"),
    ]:
        assert call(*flags) == 2
        error = capsys.readouterr().err
        assert reason in error and error.count("\n") == 1, error
    assert text.read_text() == "no pairs\n"
