"""What is read: checkpoints and their configs, chat templates, JSON lines, any file with wrong bytes, stages of a run."""

import json
import shutil

import torch
from attack import damage
from attack.world import CHAT, COMMANDS, TRAIN
from safetensors.torch import load_file, save_file

from engine.files import CHECKPOINT

# ------------------------------------------------------------------------------------------------ checkpoints

CONFIGS = (
    dict(hidden_act="gelu"), dict(attention_bias=True), dict(mlp_bias=True), dict(quantization_config={"quant_method": "gptq"}),
    dict(model_type="gemma2"), dict(model_type=["mistral"]), dict(model_type=None), dict(num_hidden_layers=2),
    dict(hidden_size=17), dict(num_attention_heads=3), dict(num_key_value_heads=3), dict(head_dim=7), dict(vocab_size=17),
    dict(rope_scaling={"rope_type": "yarn", "factor": 2.0}), dict(rope_parameters={"rope_type": "dynamic", "factor": 2}),
    dict(rope_parameters={"rope_type": ["default"]}), dict(rope_scaling=[1]), dict(rope_theta=-1.0, rope_parameters=None),
    dict(rms_norm_eps=0), dict(rms_norm_eps="1e-5"), dict(tie_word_embeddings=False), dict(tie_word_embeddings=1),
    dict(dtype="float64"), dict(dtype=["float32"]), dict(dtype={"a": 1}), dict(sliding_window=-4), dict(sliding_window="all"),
    dict(bos_token_id="<s>"), dict(eos_token_id=[-1]), dict(max_position_embeddings=3), dict(max_position_embeddings=1.5),
    dict(use_sliding_window=True), dict(rope_parameters={"rope_type": "llama3", "factor": 0}),
    dict(rope_parameters={"rope_type": "llama3"}), dict(intermediate_size=10**400), dict(vocab_size=10**9),
)  # fmt: skip

WEIGHTS = {  # what is done to one tensor, and must be refused
    "NaN": lambda t, random: damage.with_number(t, random, torch.nan),
    "infinity": lambda t, random: damage.with_number(t, random, -torch.inf),
    "longer": lambda t, random: torch.cat([t, t[:1]]),
    "shorter": lambda t, random: t[:-1],
    "nothing": lambda t, random: t[:0],
    "a dimension more": lambda t, random: t[None],
    "flat": lambda t, random: t.flatten()[:, None],
    "a number": lambda t, random: t.flatten()[0],
    "integers": lambda t, random: t.to(random.choice([torch.int8, torch.int64, torch.bool, torch.uint8])),
    "wide": lambda t, random: t.double(),
    "narrow": lambda t, random: t.to(torch.float8_e5m2),
    "complex": lambda t, random: t.to(torch.complex64),
}


def checkpoints(case) -> None:
    """A policy, a learned judge or a PairRM whose files are not what they should be."""
    folder = case.pick(["policy", "policy", "judge", "pairrm"])
    command = {"policy": COMMANDS["outputs"], "judge": COMMANDS["report"], "pairrm": COMMANDS["pairrm"]}[folder]
    if folder == "policy" and case.random.random() < 0.15:
        command = TRAIN.but(rounds=1)
    if folder == "policy" and case.random.random() < 0.1:
        command = COMMANDS["plan"]
    kinds = [json_of_checkpoint, json_of_checkpoint, weights, header, index, neutral, missing]
    kind = case.pick([*kinds, config] if folder == "policy" else kinds)
    if command.program == "plan.py" and kind in (weights, header, index):
        command = COMMANDS["outputs"]  # a plan reads no weights
    kind(case, case.place / folder, command)


def config(case, folder, command) -> None:
    """What the network does not compute is refused by the name of the file."""
    change = case.pick(CONFIGS)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    case.tell("config", str(change)[:80])
    if command.program == "plan.py":
        case.survive(command, "config.json", "policy")
    else:
        case.refuse(command, "policy")


def json_of_checkpoint(case, folder, command) -> None:
    """One value of one of the JSON files is another."""
    path = case.pick(sorted(folder.glob("*.json")))
    text, done = damage.mutated_json(json.loads(path.read_text()), case.random)
    path.write_text(text)
    case.tell(path.name, done)
    case.survive(command, folder.name)


def weights(case, folder, command) -> None:
    path = folder / "model.safetensors"
    kind = case.pick([*WEIGHTS, "gone", "another name", "one more"])
    names = sorted(load_file(path))
    name = case.pick(names)
    case.tell(kind, name)
    if kind == "gone":
        damage.with_tensors(path, lambda tensors: {key: t for key, t in tensors.items() if key != name})
    elif kind == "another name":
        damage.with_tensors(path, lambda tensors: {key + "x" * (key == name): t for key, t in tensors.items()})
    elif kind == "one more":
        name = case.pick(["model.layers.1.mlp.up_proj.weight", "score.weight", "x\x1b[31m", "日本"])
        damage.with_tensors(path, lambda tensors: tensors | {name: torch.ones(2)})
    else:
        damage.with_tensors(path, lambda tensors: tensors | {name: WEIGHTS[kind](tensors[name], case.random)})
    case.refuse(command, folder.name)


def header(case, folder, command) -> None:
    """The description of the tensors lies about them."""
    path = folder / "model.safetensors"
    head, numbers = damage.read_header(path)
    name = case.pick([key for key in head if key != "__metadata__"])
    kind = case.pick(["length", "offsets", "shape", "dtype", "cut", "more", "text", "no offsets", "metadata"])
    case.tell(kind, name)
    length = None
    if kind == "length":
        length = case.pick([0, 1, 7, 10**6, 2**40, 2**63, 2**64 - 1])
    elif kind == "offsets":
        head[name]["data_offsets"] = case.pick([[0, 1], [4, 0], [-4, 0], [0, 2**62], ["0", "4"], [0], None])
    elif kind == "shape":
        head[name]["shape"] = case.pick([[], [0], [-1], [2**32, 2**32], ["3"], None, [1.5], [1] * 80])
    elif kind == "dtype":
        head[name]["dtype"] = case.pick(["F99", "f32", 3, None, "I32", "BF16"])
    elif kind == "cut":
        numbers = numbers[: case.random.randrange(len(numbers))]
    elif kind == "more":
        numbers += bytes(case.pick([1, 4, 4096]))
    elif kind == "no offsets":
        del head[name]["data_offsets"]
    elif kind == "metadata":
        head["__metadata__"] = case.pick([[], {"a": 1}, "x", {"a": {"b": "c"}}])
    text = json.dumps(head)
    if kind == "text":
        text = case.pick(["", "{", "[]", "null", "\ud800", "[" * 9999, text[:-9]])
    damage.write_header(path, text, numbers, length)
    case.refuse(command, folder.name)


def index(case, folder, command) -> None:
    """Weights in two files, and an index that does not say where."""
    damage.in_two_files(folder / "model.safetensors")
    path = folder / "model.safetensors.index.json"
    files = json.loads(path.read_text())["weight_map"]
    name = case.pick(sorted(files))
    kind = case.pick(["another file", "no such file", "outside", "not a name", "gone", "no map", "list", "swapped"])
    case.tell(kind, name)
    if kind == "another file":
        files[name] = "model-1.safetensors" if files[name] == "model-2.safetensors" else "model-2.safetensors"
    elif kind == "no such file":
        files[name] = "model-3.safetensors"
    elif kind == "outside":
        files[name] = case.pick(["../prompts.jsonl", "/etc/passwd", "config.json", "..", "", "/dev/null"])
    elif kind == "not a name":
        files[name] = case.pick([None, 3, [], {}, True])
    elif kind == "gone":
        del files[name]
    elif kind == "swapped":
        files = {key: "model-2.safetensors" for key in files}
    given = {"no map": {}, "list": {"weight_map": sorted(files)}}.get(kind, {"weight_map": files})
    path.write_text(json.dumps(given))
    case.refuse(command, folder.name)


def neutral(case, folder, command) -> None:
    """What means the same gives the same bytes."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    kinds = ["order", "metadata", "two files", "layout", "unknown key", "positions", "line ends"]
    kind = case.pick(kinds)
    case.tell("neutral:", kind)
    config = json.loads((folder / "config.json").read_text())
    if kind == "order":
        head, numbers = damage.read_header(path)
        damage.write_header(path, dict(reversed(head.items())), numbers)
    elif kind == "metadata":
        save_file(tensors, path, metadata={"format": "pt", "a": "b"})
    elif kind == "two files":
        damage.in_two_files(path)
    elif kind == "layout":
        (folder / "config.json").write_text(json.dumps(dict(reversed(config.items())), indent=7))
    elif kind == "unknown key":
        (folder / "config.json").write_text(json.dumps(config | {"a key of tomorrow": [1], "transformers_version": "9"}))
    elif kind == "positions":
        save_file(tensors | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)}, path)
    elif kind == "line ends":
        text = (folder / "config.json").read_bytes()
        (folder / "config.json").write_bytes(text.replace(b"\n", b"\r\n"))

    name = {"policy": "outputs", "judge": "report", "pairrm": "pairrm"}[folder.name]
    before = case.world.added(case.place)
    case.run(COMMANDS[name], (0,))
    case.same_as(before | case.world.reference(name)[0])


def missing(case, folder, command) -> None:
    """Something that is no file, or cannot be read, in the place of one."""
    path = case.pick(sorted(path for path in folder.iterdir() if path.suffix in CHECKPOINT))
    kind = damage.no_file(path, case.random)
    case.tell(path.name, "is", kind)
    if path.name == "made-from.json":
        case.survive(command)  # a note of what a judge was made from, which it does not need
    elif kind in ("gone", "nowhere", "loop") and path.name in ("generation_config.json", "config.json"):
        case.survive(command)
    elif command.program == "plan.py":
        case.survive(command, folder.name)
    else:
        case.refuse(command, folder.name)


# ------------------------------------------------------------------------------------------------ chat templates

TEMPLATES = (
    "{{ 1 / 0 }}", "{{ messages[9].content }}", "{{ messages[0].nothing.more }}", "{% for i in range(10**9) %}x{% endfor %}",
    "{{ 'a' * 10**11 }}", "{{ 10 ** 10 ** 3 }}", "{{ ''.__class__.__mro__ }}", "{{ cycler.__init__.__globals__ }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "{% include 'x' %}", "{% import 'os' as os %}", "{% extends 'x' %}",
    "{{ raise_exception('no \x1b[31m') }}", "{{ raise_exception(3) }}", "{{ nothing() }}", "{{ messages | nothing }}",
    "{{ messages | tojson(indent='x') }}", "{{ strftime_now(3) }}", "{{ strftime_now('%Q\ud800') }}", "{{", "{% if %}",
    "{% endfor %}", "{% for m in messages %}", "{{ messages.append(3) }}", "{{ messages[0].update(a=1) }}", "\ufdd0",
    "\ufdd23\ufdd1",
    "{{ '%s %s' % (1,) }}", "{{ '{0.__class__}'.format(1) }}", "{{ 'x'.encode('nothing') }}", "{{ ('9' * 5000) | int }}",
    "{{ messages | sum }}", "{{ messages | sort }}", "{{ [1, 'a'] | max }}", "{{ messages | join(messages) }}",
    "{{ '\ud800' }}", "{{ 'abc' | batch(0) | list }}", "{{ 'x' | wordwrap(0) }}", "{{ 3 | center(10**12) }}", "", "   ",
    "{{ '' }}",
    "{% generation %}x", "{% break %}", "{{ namespace(a=1).b.c }}", "{{ loop.index }}", "{{ self.x() }}", "{{ caller() }}",
    "{{ dict(messages) }}", "{{ range(100000) | list | length }}", "{{ messages | map(attribute='x.y') | list }}",
    "{{ lipsum(2) }}", "{{ messages[0]['content'].format_map(messages) }}", "{% set x = x.y.z %}", "{{ (1).__add__(2) }}",
)  # fmt: skip
TEMPLATE_VALUES = (None, 3, [], {}, [{"name": "default"}], [{"name": "default", "template": 3}], [3], "", True, [None])


def templates(case) -> None:
    """A chat template that fails, does not end well or asks for what it must not have."""
    command = case.pick([CHAT, CHAT, TRAIN.but(policy="chat", template="chat", prompts="chats.jsonl", rounds=1)])
    path = case.place / "chat/chat_template.jinja"
    if case.number < len(TEMPLATES):
        source = TEMPLATES[case.number]
        path.write_bytes(source.encode("utf-8", "surrogatepass"))
        case.tell("template", ascii(source))
    else:
        path.unlink()
        value = TEMPLATE_VALUES[case.number % len(TEMPLATE_VALUES)]
        config = json.loads((case.place / "chat/tokenizer_config.json").read_text()) | {"chat_template": value}
        (case.place / "chat/tokenizer_config.json").write_text(json.dumps(config))
        case.tell("chat_template", value)
    case.survive(command, "chat")


# ------------------------------------------------------------------------------------------------ JSON lines

# {file: a command that reads it}
READERS = {
    "prompts.jsonl": ("outputs", "train", "versus", "plan"),
    "chats.jsonl": ("chats",),
    "pairs.jsonl": ("report", "prefmodel"),
    "outputs.json": ("outputs file", "train, all stages"),
    "annotations.json": ("lc",),
    "difficulty.json": ("lc",),
    "votes.jsonl": ("human",),
}
OTHERS = {
    "chats": CHAT,
    "outputs file": COMMANDS["versus"].but(policy="outputs.json", against="policy"),
    "human": COMMANDS["report"].but(judge='human:{"votes": "votes.jsonl"}'),
}


def lines(case) -> None:
    """A file of prompts, conversations, pairs, outputs, votes or annotations with something wrong in it."""
    name = case.pick(READERS)
    path = case.place / name
    if name == "votes.jsonl":
        shutil.copy(case.place / "pairs.jsonl", path)
    reader = case.pick(READERS[name])
    command = OTHERS.get(reader) or COMMANDS[reader]
    text = path.read_text()
    rows = [json.loads(line) for line in text.splitlines()] if name.endswith("jsonl") else json.loads(text)
    kind = case.pick([one_line, one_line, one_line, encoding, no_list, layout])
    case.tell(kind.__name__, "of", name)
    kind(case, path, rows)
    votes = "1\n2\n0\n" * 99 if reader == "human" else ""
    if kind is layout:
        case.run(command, (0,), typed=votes)
    else:
        # Of difficulties that no fit can do with, the rows that they go with are named.
        case.survive(command, name, path.stem, *(["annotations.json"] if reader == "lc" else []), typed=votes)


def written(path, rows: list[str]) -> str:
    return "\n".join(rows) + "\n" if path.suffix == ".jsonl" else "[" + ", ".join(rows) + "]"


def one_line(case, path, rows) -> None:
    """One row is another, or is there twice."""
    place = case.random.randrange(len(rows))
    text, done = damage.mutated_json(rows[place], case.random)
    case.tell("line", place + 1, done)
    texts = [json.dumps(row) for row in rows]
    texts[place] = text
    if case.random.random() < 0.2:
        texts.insert(place, texts[-1])
    path.write_text(written(path, texts))


def encoding(case, path, rows) -> None:
    text = written(path, [json.dumps(row, ensure_ascii=False) for row in rows]).replace("=", "é=", 1)
    kind = case.pick(["utf-16", "latin-1", "utf-8-sig", "utf-32", "cut", "nul"])
    case.tell(kind)
    data = text.encode("utf-8" if kind in ("cut", "nul") else kind)
    if kind == "cut":
        data = data[: case.random.randrange(len(data))]
    if kind == "nul":
        data = data.replace(b"\n", b"\0\n", 1).replace(b", ", b"\0, ", 1)
    path.write_bytes(data)


def no_list(case, path, rows) -> None:
    kind = damage.no_file(path, case.random)
    case.tell(kind)


def layout(case, path, rows) -> None:
    """What means the same."""
    text = written(path, [json.dumps(row) for row in rows])
    kind = case.pick(["\r\n", "blank lines", "no end", "spaces", "more keys"])
    case.tell(kind)
    if kind == "\r\n":
        text = text.replace("\n", "\r\n")
    elif kind == "blank lines" and path.suffix == ".jsonl":
        text = "\n \n" + text.replace("\n", "\n\n")
    elif kind == "no end":
        text = text.strip()
    elif kind == "spaces":
        text = text.replace(": ", " :\t")
    elif isinstance(rows[0], dict):
        text = written(path, [json.dumps(row | {"a key of tomorrow": [None]}) for row in rows])
    path.write_bytes(text.encode())


# ------------------------------------------------------------------------------------------------ any byte

# {pattern of files: the commands that read them}
TARGETS = {
    "policy/*": ("outputs", "train", "plan", "prefmodel"),
    "chat/*": ("chats",),
    "judge/*": ("report", "versus"),
    "pairrm/*": ("pairrm",),
    "*.jsonl": ("outputs", "report", "prefmodel", "chats"),
    "*.json": ("lc", "outputs file", "train, all stages"),
    "run/**/*": ("matrix", "best of", "average", "distill", "continue"),
    "my_rule.py": ("train",),
}


def mutants(case) -> None:
    """Wrong bytes anywhere in any file that a command reads."""
    pattern = case.pick(TARGETS)
    files = [path for path in case.place.glob(pattern) if path.is_file()]
    files = [path for path in files if path.suffix != ".png"]
    path = case.pick(sorted(files))
    data, done = damage.mutated_bytes(path.read_bytes(), case.random)
    path.write_bytes(data)
    name = case.pick(TARGETS[pattern])
    case.tell(path.relative_to(case.place), done)
    if name == "continue":
        continued(case)
    else:
        case.survive(OTHERS.get(name) or COMMANDS[name])


def continued(case) -> None:
    """The command that made the run again: what is on disk and does not fit is refused."""
    before = content_of_stages(case)
    case.run(TRAIN.but(out="run"))
    now = content_of_stages(case)
    changed = [path for path, data in before.items() if now.get(path) != data]
    case.require(not changed, f"changed or gone: {changed}")


def content_of_stages(case) -> dict:
    files = [path for path in case.place.glob("run/round-*/**/*") if path.is_file()]
    return {str(path.relative_to(case.place)): path.read_bytes() for path in files}


# ------------------------------------------------------------------------------------------------ stages of a run


def stages(case) -> None:
    """A finished stage of a run becomes another or none, and the run is continued, or measured."""
    run = case.place / "run"
    number = case.pick([1, 2])
    folder = run / f"round-0{number}"
    kind = case.pick([stage_gone, stage_tensor, stage_row, stage_no_file, stage_foreign])
    case.tell(kind.__name__, folder.name)
    kind(case, folder)


def stage_gone(case, folder) -> None:
    """A stage that is gone is played again, to the same bytes."""
    name = case.pick(["responses.jsonl", "preferences.safetensors", "logps.safetensors", "policy"])
    case.tell("without", name)
    target = folder / name
    shutil.rmtree(target) if target.is_dir() else target.unlink()
    # What came after it would not follow from it.
    result = case.run(TRAIN.but(out="run"))
    if result.code == 0:
        case.same_as({})


def stage_tensor(case, folder) -> None:
    path = folder / f"{case.pick(['preferences', 'logps'])}.safetensors"
    damages = {
        "NaN": lambda t: damage.with_number(t, case.random, torch.nan),
        "shorter": lambda t: t[:-1],
        "narrower": lambda t: t[..., :-1],
        "integers": lambda t: t.long(),
        "nothing": lambda t: t[:0],
        "flat": lambda t: t.flatten(),
    }
    kind = case.pick(damages)
    case.tell(path.name, kind)
    tensors = {name: damages[kind](tensor).contiguous() for name, tensor in load_file(path).items()}
    save_file(tensors, path)
    if case.random.random() < 0.5:
        shutil.rmtree(folder / "policy")
    case.refuse(TRAIN.but(out="run"), path.name)


def stage_row(case, folder) -> None:
    path = folder / case.pick(["responses.jsonl", "policy/steps.jsonl"])
    rows = path.read_text().splitlines()
    place = case.random.randrange(len(rows))
    rows[place], done = damage.mutated_json(json.loads(rows[place]), case.random)
    path.write_text("\n".join(rows) + "\n")
    case.tell(path.name, place + 1, done)
    continued(case)


def stage_no_file(case, folder) -> None:
    path = case.pick([path for path in sorted(folder.rglob("*")) if path.is_file()])
    kind = damage.no_file(path, case.random)
    case.tell(path.name, "is", kind)
    if kind in ("gone", "nowhere", "loop"):
        case.run(TRAIN.but(out="run"))
    else:
        case.run(TRAIN.but(out="run"), (2,) if path.suffix != ".jinja" else (0, 2))


def stage_foreign(case, folder) -> None:
    """A stage of another round, or something that belongs to nobody."""
    kind = case.pick(["other round", "files", "names"])
    case.tell(kind)
    if kind == "other round":
        other = folder.with_name("round-02" if folder.name == "round-01" else "round-01")
        shutil.copy(other / "logps.safetensors", folder / "logps.safetensors")
        case.run(TRAIN.but(out="run"))
        return
    for name in {"files": ["a.txt", "b"], "names": ["fit-x", "fit-", "round-1x", "fit-03"]}[kind]:
        (folder / name).write_text("x")
    result = case.run(TRAIN.but(out="run"))
    if kind == "files":
        case.require(result.code == 0, "a file that belongs to nobody is in the way")
