"""What a run leaves on disk, so that it continues where it was stopped: stages that are finished, and the one that is not.

    RUN/round-01/responses.jsonl, preferences.safetensors, logps.safetensors, policy/

A stage is written under a temporary name and renamed when it is whole. The long one, fitting the policy, also keeps its
state every --save-minutes, in a folder fit-STEPS with one file a process, until it is done.
"""

import gc
import json
import resource
import time
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save, save_file
from tqdm import tqdm

import ranks
from data import append_line, read_lines, remove, write_lines
from model import DTYPES, Transformer, load_weights, uninitialized
from sppo import win_rates


def round_folder(config, number):
    return Path(config.out) / f"round-{number:02d}"


def policy_folder(config, number):
    """The checkpoint of π_t: what the round before left, or --policy."""
    return Path(config.policy) if number == 1 else round_folder(config, number - 1) / "policy"


def round_policies(run):
    """The checkpoints that a run has left, in the order of its rounds."""
    return sorted(Path(run).glob("round-[0-9]*/policy"), key=lambda path: int(path.parent.name.removeprefix("round-")))


LOWER = {  # what takes less memory in which stage
    "responses": "lower --pool or --cache-gb",
    "preferences": "judge with a smaller model, or on another --device",
    "policy": "lower --micro-tokens or --micro-batch, or add --recompute",
}


def out_of_memory(error):
    """Whether an error of torch, on a GPU or the CPU, or of Python says that memory ran out."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "not enough memory" in str(error)


class Stages:
    """The memo of one round: a finished stage is read from its file, any other is computed and written whole.

    round-01/responses.jsonl, preferences.safetensors, logps.safetensors, policy/ (the weights of π_2 in Hugging
    Face layout, and steps.jsonl, the numbers of each optimizer step). previous.safetensors and
    reference.safetensors where the target needs them.
    """

    def __init__(self, config, game, prompts):
        self.config, self.game, self.prompts = config, game, prompts
        self.folder = round_folder(config, game.number)

    def __call__(self, name, compute):
        path = self.folder / {"responses": "responses.jsonl", "policy": "policy"}.get(name, f"{name}.safetensors")
        if ranks.agreed(path.exists()):
            return self.read(name, path)
        start, config = time.perf_counter(), self.config
        items = len(ranks.share(self.prompts)) * {"responses": config.samples, "policy": config.epochs}.get(name, 1)
        title, unit = f"round {self.game.number}/{config.rounds} {name}", {"responses": "response"}.get(name, "prompt")
        with self.sharded() if name == "policy" and ranks.count() > 1 else nullcontext():
            with tqdm(total=items, unit=unit, desc=title, leave=False, disable=not ranks.first()) as self.game.progress:
                try:
                    value = compute()
                except (RuntimeError, MemoryError) as error:
                    if not out_of_memory(error):
                        raise
                    what = LOWER.get(name, "lower --micro-tokens or --micro-batch")
                    raise ValueError(f"{title}: out of memory; {what}, the finished stages are kept: {error}") from None
            with ranks.together(path) as temporary:
                self.write(name, temporary, value)
        row = {"round": self.game.number, "stage": name, "seconds": time.perf_counter() - start, "peak_gb": peak_memory(config)}
        if ranks.first():
            append_line(Path(config.out) / "timings.jsonl", row)
        return value

    @contextmanager
    def sharded(self):
        """Several processes train the policy in parts; with what they leave, each one's whole copy goes on."""
        game, copy = self.game, self.game.policy
        with uninitialized(torch.float32, "meta"):
            game.policy = Transformer(copy.config)
        game.policy.model.recompute = copy.model.recompute
        ranks.sharded(game.policy, DTYPES[self.config.dtype], self.config.device)
        load_weights(game.policy, policy_folder(self.config, game.number))
        yield
        game.policy = copy
        gc.collect()  # the shards, which refer to each other
        load_weights(game.policy, policy_folder(self.config, game.number + 1))

    def read(self, name, path):
        if name == "responses":
            return read_responses(path, self.prompts)
        if name == "policy":
            load_weights(self.game.policy, path)
            return [row for _, row in read_lines(path / "steps.jsonl")]
        try:
            return load_file(path)[name]
        except (SafetensorError, KeyError) as error:
            raise ValueError(f"{path}: not what this stage writes ({error}); delete it to compute it again") from None

    def write(self, name, path, value):
        if name == "policy":
            self.game.policy.write_pretrained(path)  # all processes have a part
        if not ranks.first():
            return
        if name == "responses":
            rows = zip(self.prompts, value, strict=True)
            rows = [{"prompt": p.text, "responses": self.game.texts(p, row), "tokens": row} for p, row in rows]
            write_lines(path, rows)
        elif name == "policy":
            self.game.tokenizer.copy_to(path)
            write_lines(path / "steps.jsonl", value)
        else:
            extra = {"win_rates": win_rates(value)} if name == "preferences" else {}
            path.write_bytes(save({name: value.contiguous()} | extra))


def read_responses(path, prompts):
    """The sampled token ids of a responses.jsonl: N lists of K. ValueError if it was written for other prompts."""
    rows = list(read_lines(path))
    if [row["prompt"] for _, row in rows] != [prompt.text for prompt in prompts]:
        raise ValueError(f"{path}: holds responses to other prompts than this run's; was the prompt file changed?")
    return [row["tokens"] for _, row in rows]


def peak_memory(config):
    """Largest memory of this process so far, in GB: of the GPU where there is one, else resident."""
    if config.device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(config.device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


class Saver:
    """Keeps the state of an unfinished fit: weights, optimizer state and the numbers of each step, in FOLDER/fit-STEPS.

    One safetensors file a process, with its part of everything. The older state goes when the newer one is whole.
    """

    def __init__(self, folder, minutes):
        self.folder, self.seconds, self.last = Path(folder), 60 * minutes, time.monotonic()

    def kept(self):
        """Folders of this kind, the latest last."""
        found = [path for path in self.folder.glob("fit-*") if path.name.removeprefix("fit-").isdecimal()]
        return sorted(found, key=lambda path: int(path.name.removeprefix("fit-")))

    def load(self, policy, optimizer):
        """Put weights and optimizer state where they were; returns the numbers of the steps done, none if nothing was kept."""
        if not (found := ranks.agreed(self.kept())):
            return []
        if not (path := part_of(found[-1])).exists():
            raise ValueError(
                f"{path}: no such file, this fit was begun by another number of processes; start as many, "
                "or delete the folder to begin the stage again"
            )
        try:
            with safe_open(path, framework="pt") as file:
                steps = json.loads(file.metadata()["steps"])
            kept = load_file(path)
            with torch.no_grad():
                for name, parameter in policy.named_parameters():
                    ranks.local(parameter)[0].copy_(kept[f"weights.{name}"])
            load_optimizer(optimizer, {key.removeprefix("optimizer."): kept[key] for key in kept if key.startswith("optimizer.")})
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            again = f"delete {path.parent} to begin the stage again"
            raise ValueError(f"{path}: not the state of this fit ({error}); {again}") from None
        return steps

    def save(self, policy, optimizer, steps):
        """Called behind every step; writes when it is time."""
        if not ranks.agreed(time.monotonic() - self.last >= self.seconds):
            return
        tensors = {f"weights.{name}": parameter.detach() for name, parameter in policy.named_parameters()}
        tensors |= {f"optimizer.{name}": value for name, value in optimizer_tensors(optimizer).items()}
        tensors = {name: ranks.local(tensor)[0] for name, tensor in tensors.items()}
        older = ranks.agreed(self.kept())
        with ranks.together(self.folder / f"fit-{len(steps)}") as temporary:
            temporary.mkdir(exist_ok=True)
            save_file(tensors, part_of(temporary), metadata={"steps": json.dumps(steps)})
        self.forget(older)
        self.last = time.monotonic()

    def forget(self, folders):
        if ranks.first():
            for folder in folders:
                remove(folder)

    def done(self):
        self.forget(self.kept())


def part_of(folder):
    return folder / f"{ranks.number() + 1}-of-{ranks.count()}.safetensors"


def optimizer_tensors(optimizer):
    """The state of one of torch's optimizers, or of optim.py's, as {name: tensor}."""
    if not isinstance(optimizer, torch.optim.Optimizer):
        return optimizer.state_dict()
    states = enumerate(optimizer.state[parameter] for parameter in optimizer.param_groups[0]["params"])
    return {f"{number}.{key}": value for number, state in states for key, value in state.items()}


@torch.no_grad()
def load_optimizer(optimizer, tensors):
    """What optimizer_tensors gave, back into an optimizer of the same parameters."""
    if not isinstance(optimizer, torch.optim.Optimizer):
        return optimizer.load_state_dict(tensors)
    parameters = optimizer.param_groups[0]["params"]
    for name, value in tensors.items():
        number, key = name.split(".")
        parameter = parameters[int(number)]
        state = value if key == "step" else torch.zeros_like(parameter)
        ranks.local(state)[0].copy_(value)
        optimizer.state[parameter][key] = state
