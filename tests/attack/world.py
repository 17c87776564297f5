"""The smallest world in which every command has something to do, the commands, and what they come to undisturbed."""

import random
import shutil
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from attack.process import Process, counting

from engine.checkpoint import save_weights
from engine.files import write_json, write_lines
from judges.pairrm import FIXED, PairRM, PairRMConfig
from model import Transformer, initialize
from toy.text_game import model_config, write_tokenizer

RULE = """import torch

def letters(prompt, responses):
    score = torch.tensor([sum(map(ord, text)) / 40 for text in responses])
    return torch.sigmoid(score[:, None] - score)
"""
TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m['content'] + '=' }}{% endfor %}"


@dataclass(frozen=True)
class Command:
    """A program with its first words and its flags, {name: value}; True is a flag alone, None no flag."""

    program: str
    words: tuple = ()
    flags: tuple = ()

    def but(self, **changes) -> "Command":
        names = {name.replace("_", "-"): value for name, value in changes.items()}
        return Command(self.program, self.words, tuple((dict(self.flags) | names).items()))

    def arguments(self) -> list[str]:
        given = list(self.words)
        for name, value in self.flags:
            given += [f"--{name}"] if value is True else [f"--{name}", str(value)] * (value is not None)
        return given

    def __str__(self):
        return " ".join([self.program, *self.arguments()])[:300]


def command(program, *words, **flags) -> Command:
    return Command(program, words).but(**flags)


SAMPLES = dict(prompts="prompts.jsonl", template="plain", max_new_tokens=4)
TRAIN = command(
    "train.py", policy="policy", judge="my_rule:letters", out="new", rounds=2, samples=3, reuse_prompts=True, eta=2,
    optimizer="adamw", lr=1e-2, warmup=0, batch=1, micro_batch=2, epochs=2, select="all", judge_retries=0, **SAMPLES,
)  # fmt: skip
WINRATE = command("evaluate", "winrate", policy="policy", judge="judge", samples=2, out="new.json", **SAMPLES)

COMMANDS = {
    "train": TRAIN,
    "train, saving each step": TRAIN.but(save_minutes=0, select="best-worst", loss="sppo-hard", rounds=1, epochs=3),
    "train, all stages": TRAIN.but(
        target="regularized", opponents="outputs.json", judge="judge", reference="run/round-01/policy", epochs=1
    ),
    "train, optimistic": TRAIN.but(target="optimistic", reuse_prompts=None, rounds=3, epochs=1, batch=2),
    "prefmodel": command(
        "prefmodel.py", "train", pairs="pairs.jsonl", backbone="policy", out="new", template="plain", epochs=2, batch=4,
        held_out=0.5, save_minutes=0,
    ),
    "outputs": command("evaluate", "outputs", policy="policy", out="new.json", **SAMPLES),
    "best of": command("evaluate", "outputs", policy="run", out="new.json", best_of=3, judge="judge", **SAMPLES),
    "versus": WINRATE.but(against="run"),
    "matrix": WINRATE.but(policy="run"),
    "average": command("evaluate", "average", "run", out="new"),
    "distill": command("evaluate", "distill", "run", samples=4, batch=4, epochs=1, out="new", **SAMPLES),
    "report": command("evaluate", "judge", judge="judge", pairs="pairs.jsonl", out="new"),
    "pairrm": command("evaluate", "judge", judge="pairrm", pairs="pairs.jsonl", out="new"),
    "lc": command("evaluate", "lc", annotations="annotations.json", difficulty="difficulty.json", out="new.json"),
    "plan": command("plan.py", **dict(TRAIN.flags)).but(out="new"),
}  # fmt: skip
CHAT = COMMANDS["outputs"].but(policy="chat", template="chat", prompts="chats.jsonl")


def build(folder: Path) -> None:
    """Files for all commands. Nothing in it is trained: wrong weights are as good a world as right ones."""
    generator = torch.Generator().manual_seed(0)
    for name in ("policy", "chat"):
        model = initialize(Transformer(model_config(layers=1, width=16)), generator)
        model.save_pretrained(folder / name)
        write_tokenizer(folder / name)
    (folder / "chat/chat_template.jinja").write_text(TEMPLATE)
    write_json(folder / "chat/generation_config.json", {"eos_token_id": [2, 17]})
    build_pairrm(folder / "pairrm", generator)

    prompts = ["3+4=", "5+9=", "1+1="]
    write_lines(folder / "prompts.jsonl", [{"prompt": prompt} for prompt in prompts])
    write_lines(folder / "chats.jsonl", [{"messages": [{"role": "user", "content": text}]} for text in ("3+4", "8+1")])
    (folder / "my_rule.py").write_text(RULE)

    rows = [(prompt, f"{n}.", f"{n}{n}!") for prompt in prompts for n in range(3)]
    pairs = [{"prompt": x, "chosen": y, "rejected": z, "probability": 0.75, "votes": [1, 1, 2]} for x, y, z in rows]
    write_lines(folder / "pairs.jsonl", pairs)
    write_json(folder / "outputs.json", [{"instruction": x, "output": "7.", "generator": "a"} for x in prompts])

    draw = random.Random(0)
    judged = {"generator_1": "base", "generator_2": "ours", "output_1": "1" * 40}
    long = [{"instruction": f"i{k}", "output_2": "2" * draw.randrange(90), "preference": 1 + draw.random()} for k in range(40)]
    write_json(folder / "annotations.json", [judged | row for row in long])
    write_json(folder / "difficulty.json", [draw.gauss(0, 1) for _ in long])


def build_pairrm(folder: Path, generator) -> None:
    marks = dict(source_prefix_id=18, cand1_prefix_id=19, cand2_prefix_id=20)
    sizes = dict(vocab_size=24, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    sizes |= dict(position_buckets=8, max_position_embeddings=16, layer_norm_eps=1e-7)
    config = PairRMConfig(**sizes, **marks)
    folder.mkdir()
    save_weights(initialize(PairRM(config), generator), folder)
    write_json(folder / "config.json", FIXED | sizes | marks | {"pos_att_type": ["c2p", "p2c"]})
    write_tokenizer(folder)


class World:
    """A folder with the inputs of all commands, and what each command makes of them."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.inputs = folder / "inputs"

    def build(self) -> None:
        self.inputs.mkdir(parents=True)
        build(self.inputs)

        # A judge and a run, made by the commands themselves.
        for known in (COMMANDS["prefmodel"].but(out="judge"), TRAIN.but(out="run", judge="my_rule:letters")):
            result = Process(known.program, known.arguments(), self.inputs).end()
            assert result.code == 0, result.said

    def copy_to(self, place: Path) -> None:
        shutil.copytree(self.inputs, place)

    def reference(self, name: str) -> tuple[dict, list[int]]:
        """What a command adds to the inputs when nobody disturbs it, {path: bytes}, and its calls and changes of files."""
        kept = self.folder / "reference" / name
        if not (kept / "counts").exists():
            made = self.folder / "making" / f"{name} {random.random()}"
            self.copy_to(made / "place")
            known = COMMANDS[name]
            result = Process(known.program, known.arguments(), made / "place", counting(made / "counts")).end()
            assert result.code == 0, f"{known}: {result.said}"
            kept.parent.mkdir(exist_ok=True)
            if not kept.exists():
                made.rename(kept)
        counts = [int(word) for word in (kept / "counts").read_text().split()]
        return self.added(kept / "place"), counts

    def added(self, place: Path) -> dict:
        """{path: bytes} of what is in a place and not, or not so, among the inputs; without clocks and figures."""
        before = content(self.inputs)
        return {path: data for path, data in content(place).items() if before.get(path) != data}


def content(folder: Path) -> dict:
    """{path: bytes} of all files below a folder but clocks, figures, what is hidden, and what is gone when it is read."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and not path.is_symlink()]
    files = [path for path in files if not path.name.startswith(".")]  # locks
    plain = [path for path in files if path.name != "timings.jsonl" and path.suffix != ".png"]
    found = {}
    for path in plain:
        with suppress(FileNotFoundError):  # another process may be at work here, and done with it
            found[str(path.relative_to(folder))] = path.read_bytes()
    return found
