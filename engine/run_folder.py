"""What a run leaves on disk, so that it continues where it was stopped: stages that are finished,
and the one that is not.

    RUN/config.json, metrics.jsonl, timings.jsonl, curves.png
    RUN/round-01/responses.jsonl, preferences.safetensors, logps.safetensors, policy/

A stage is written under a temporary name and renamed when it is whole. Until then sampling and
judging keep each response and each table in a journal, and fitting the policy its state, every
--save-minutes, in a folder fit-STEPS with one file a process. made-from.json has the fingerprints
of what each stage was made from.
"""

import gc
import json
import math
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import fields
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save, save_file
from torch import nn

from engine.checkpoint import DTYPES, load_weights, uninitialized
from engine.command import flag
from engine.distributed import (
    barrier,
    broadcast,
    is_main,
    local_part,
    my_share,
    on_main,
    rank,
    shard,
    world_size,
)
from engine.files import (
    append_line,
    atomic_write,
    fingerprint,
    read_json,
    read_lines,
    remove,
    write_json,
    write_lines,
)
from engine.journal import NOTHING, Journal
from engine.memory import out_of_memory, peak_memory
from engine.optim import load_optimizer_tensors, optimizer_tensors
from engine.progress import tqdm
from engine.stop import Stop
from engine.terminal import visible
from engine.threads import Threads

# ------------------------------------------------------------------------ folders


def round_folder(out: str | Path, number: int) -> Path:
    return Path(out) / f"round-{number:02d}"


def policy_folder(config, number: int) -> Path:
    """The checkpoint of π_t: what the round before left, or --policy."""
    return Path(config.policy) if number == 1 else round_folder(config.out, number - 1) / "policy"


def round_policies(run: str | Path) -> list[Path]:
    """The checkpoints that a run has left, in the order of its rounds."""
    folders = Path(run).glob("round-[0-9]*/policy")
    return sorted(folders, key=lambda path: int(path.parent.name.removeprefix("round-")))


def template_of(folder: str | Path) -> str | None:
    """The template that a run was trained with: its folder, or that of a round's policy. None where
    the folder is of something else.
    """
    for place in (Path(folder), Path(folder, "..", "..")):
        path = place / "config.json"
        settings = read_json(path) if path.is_file() else {}
        if "reuse_prompts" in settings:  # of a run, and not of a model
            return settings.get("template")
    return None


def claim(
    out: str | Path, settings: dict, declared: type, content: dict | None = None,
    grows: tuple = (),
) -> None:  # fmt: skip
    """Write config.json into a new run folder, or compare the settings with those of an old one.

    `declared` is their class. One that was added since the run was started had its default, and
    one that is `free` may differ. `content` are the fingerprints of the files that some settings
    name: these are compared, and not the paths. Numbers named in `grows` may be larger than they
    were. ValueError names the first setting that differs.
    """
    content = content or {}
    known_to_all = [field for field in fields(declared) if field.name in settings]
    defaults = {field.name: field.default for field in known_to_all}
    free = {field.name for field in known_to_all if field.metadata.get("free")} | {"out"}
    path = Path(out) / "config.json"
    if not path.exists():
        if any(Path(out).glob("round-*")):
            raise ValueError(f"{path}: is gone, so nobody knows what the rounds beside it are of")
        write_json(path, settings | {"content": content} if content else settings)

    old = defaults | read_json(path)
    known = old.pop("content", {})
    for name in content.keys() & known.keys():
        if content[name] != known[name]:
            what = f"{flag(name)} {settings[name]} is not what this run was started with"
            remedy = "its content is another; put it back, or choose another --out"
            raise ValueError(f"{path}: {what}: {remedy}")

    for name in settings | old:
        if name in known:
            continue
        before = old.get(name)
        now = settings.get(name)
        larger = name in grows and now > before
        if name not in free and now != before and not larger:
            differs = f"this run was started with {flag(name)} {before}, now it is {now}"
            remedy = "give the same settings to continue it, or another --out"
            raise ValueError(f"{path}: {differs}; {remedy}")

    # Only now: a command that is refused changes nothing.
    grown = {name: settings[name] for name in grows if settings[name] > old[name]}
    if grown:
        write_json(path, read_json(path) | grown)


MADE_FROM = "made-from.json"


def made_from(settings: dict, declared: type, content: dict) -> dict:
    """What decides what a command writes: its settings, but for those that are `free`, and the
    fingerprints of what it reads. Kept as MADE_FROM, it tells the same command that it is finished.
    """
    free = {field.name for field in fields(declared) if field.metadata.get("free")}
    names = sorted(settings.keys() - free - content.keys())
    return {name: settings[name] for name in names} | {"content": content}


class Metrics:
    """metrics.jsonl: a line for each optimizer step as it is made, and a line for each round.

    A step that was logged but not saved before a kill appears twice, until the file is written anew
    at the end of its round.
    """

    def __init__(self, path: Path):
        self.path = path
        self.lines = []
        self.played = None  # the round of the last step that was made here, and not read

    def step(self, number: int, step: dict) -> None:
        self.played = number
        if is_main():
            append_line(self.path, {"round": number} | step)

    def finish_round(self, number: int, steps: list[dict], summary: dict) -> None:
        self.lines += [{"round": number} | step for step in steps]
        self.lines.append(summary)
        # A finished round that is read again must not take away what later ones have written.
        if is_main() and (self.played == number or not self.is_followed_by_later(number)):
            write_lines(self.path, self.lines)

    def is_followed_by_later(self, number: int) -> bool:
        """Whether the file has the lines so far, and after them only those of later rounds."""
        try:
            rows = [row for _, row in read_lines(self.path)]
        except (ValueError, FileNotFoundError):  # a kill may have torn the last line
            return False
        done = len(self.lines)
        return rows[:done] == self.lines and all(
            row.get("round", 0) > number for row in rows[done:]
        )


@contextmanager
def together(path: str | Path) -> Iterator[Path]:
    """files.atomic_write for all processes: one temporary name, into which each may write, and the
    main one renames it.
    """
    with atomic_write(path) if is_main() else nullcontext() as temporary:
        yield Path(broadcast(str(temporary)))
        barrier()  # all have written
    barrier()


# ------------------------------------------------------------------------ memory

OOM_ADVICE = {  # the flag to lower, per stage
    "responses": "lower --pool or --cache-gb",
    "preferences": "judge with a smaller model, or lower --max-new-tokens",
    "policy": "lower --micro-tokens or --micro-batch, or add --recompute",
}


# ------------------------------------------------------------------------ finished stages


class RecordedGame:
    """A game that remembers: what `sppo_round` asks for is read from disk, or played and written.

    round-01/responses.jsonl, preferences.safetensors, logps.safetensors, policy/ (the weights of
    π_2 in Hugging Face layout, and steps.jsonl, the numbers of each optimizer step);
    previous.safetensors and reference.safetensors where the target needs them. `game` is a
    train.TextGame. With several processes all call the same methods, and the main one writes.
    """

    def __init__(self, game, metrics: Metrics, threads: Threads | None = None):
        self.game = game
        self.threads = threads or Threads()
        self.config = game.config
        self.metrics = metrics
        self.folder = round_folder(game.config.out, game.number)

    def sample(self, prompts):
        path = self.folder / "responses.jsonl"
        if self.finished("responses", path):
            return read_responses(path, prompts, self.config.samples, self.vocab_size())

        with self.stage("responses", len(my_share(prompts)) * self.config.samples, unit="response"):
            responses = self.game.sample(prompts)
            with together(path) as temporary:
                if is_main():
                    pairs = zip(prompts, responses, strict=True)
                    write_lines(temporary, [self.row(*pair) for pair in pairs])
        return responses

    def vocab_size(self) -> int:
        return self.game.policy.config.vocab_size

    def row(self, prompt, responses) -> dict:
        """A line of responses.jsonl."""
        # Texts are for people. Token ids are what is read again: to encode a text gives others.
        texts = self.game.texts(prompt, responses)
        return {"prompt": prompt.text, "responses": texts, "tokens": responses}

    def judge(self, prompts, responses):
        play = partial(self.game.judge, prompts, responses)
        # K, and the opponents from elsewhere, who are as many for each prompt.
        others = next(iter(self.game.opponents.values()), [])
        size = len(responses[0]) + len(others)
        return self.remember("preferences", prompts, (size, size), play)

    def score(self, prompts, responses, config):
        play = partial(self.game.score, prompts, responses, config)
        return self.remember("logps", prompts, (len(responses[0]),), play)

    def previous(self, prompts, responses, win_rate):
        play = partial(self.game.previous, prompts, responses, win_rate)
        return self.remember("previous", prompts, (len(responses[0]),), play)

    def reference(self, prompts, responses):
        play = partial(self.game.reference, prompts, responses)
        return self.remember("reference", prompts, (len(responses[0]),), play)

    def remember(self, name, prompts, shape, play):
        """A stage that is one tensor, of this shape for each prompt: read from NAME.safetensors, or
        played and written there.
        """
        path = self.folder / f"{name}.safetensors"
        if self.finished(name, path):
            return read_tensor(path, name, (len(prompts), *shape))

        with self.stage(name, len(my_share(prompts))):
            tensor = play()
            with together(path) as temporary:
                if is_main():
                    temporary.write_bytes(tensor_file(name, tensor))
        return tensor

    def fit(self, data, config, generator):
        path = self.folder / "policy"
        saver = Saver(self.folder, self.config.save_minutes)
        if self.finished("policy", path):
            if self.game.number == self.config.rounds:
                self.check_policy(path)
            load_weights(self.game.policy, path)
            steps = read_steps(path / "steps.jsonl")
        else:
            # Several processes train the policy in shards. Afterwards each one reloads its whole
            # copy from the new checkpoint.
            with in_shards(self.game, path) if world_size() > 1 else nullcontext():
                steps = self.play_fit(path, saver, data, config, generator)

        # Also where the fit was finished: a process may have died between the two.
        saver.forget()
        return steps

    def check_policy(self, path: Path) -> None:
        """The last policy, of which no later round has the fingerprint, must be whole as well."""
        type(self.game.policy.config).from_json(path / "config.json")
        type(self.game.tokenizer)(path)

    def play_fit(self, path, saver, data, config, generator):
        """Fit, step by step, and write the checkpoint of π_{t+1}."""
        items = len(my_share(data.prompts)) * config.epochs
        kept = next(reversed(saver.kept()), None)
        with self.stage("policy", items, begun=kept) as bar, saver:
            resume = partial(saver.resume, self.game.policy)
            for step in self.game.fit(data, config, generator, resume):
                bar.set_postfix(loss=f"{step['loss']:.4g}", refresh=False)
                self.metrics.step(self.game.number, step)
                saver.after(step)

            with together(path) as temporary:
                self.game.policy.write_pretrained(temporary)  # all processes have a part
                if is_main():
                    self.game.tokenizer.copy_to(temporary)
                    write_lines(temporary / "steps.jsonl", saver.steps)
        return saver.steps

    def sources(self, stage: str) -> dict[str, str]:
        """{file: fingerprint} of what a stage is made from. --policy is in config.json."""
        responses = self.folder / "responses.jsonl"
        paths = [responses]
        if stage == "responses":
            number = self.game.number
            paths = [policy_folder(self.config, number)] if number > 1 else []
        elif stage == "policy":
            paths = [responses, *sorted(self.folder.glob("*.safetensors"))]
        out = Path(self.config.out)
        return {str(path.relative_to(out)): fingerprint(path) for path in paths if path.exists()}

    def keep_sources(self, stage: str, made: Path | None) -> None:
        """Note what a stage is made from or, where something is made already, compare: ValueError
        if a file has changed in between.
        """
        path = self.folder / MADE_FROM

        def work():
            known = read_json(path) if path.exists() else {}
            now = self.sources(stage)
            if made is None:
                return write_json(path, known | {stage: now})

            before = known.get(stage, {})
            for name in before.keys() & now.keys():
                if before[name] != now[name]:
                    differs = f"was made from another {name} than is there now"
                    raise ValueError(f"{made}: {differs}; put that back, or {AGAIN}")

        on_main(work)

    def finished(self, stage: str, path: Path) -> bool:
        """Whether the file or folder of a stage is there. ValueError if it was made from others."""
        if not finished(path):
            return False
        self.keep_sources(stage, path)
        self.journal(stage).forget()  # a process may have died between the two
        return True

    def journal(self, stage: str) -> Journal:
        """Of this process's share of a stage."""
        part = f"{rank() + 1}-of-{world_size()}"
        return Journal(self.folder / f"{stage}.unfinished-{part}.jsonl")

    @contextmanager
    def stage(self, name: str, items: int, unit: str = "prompt", begun: Path | None = None):
        """Show a progress bar, keep a journal, turn running out of memory into advice, and note the
        time. `begun` is what there is of the stage, if it is not in a journal.
        """
        self.threads.adapt()
        start = time.perf_counter()
        journal = self.journal(name)
        self.game.journal = journal
        self.keep_sources(name, journal.path if journal.known else begun)
        title = f"round {self.game.number}/{self.config.rounds} {name}"
        with tqdm(total=items, unit=unit, desc=title, leave=False, disable=not is_main()) as bar:
            self.game.progress = bar
            try:
                yield bar
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error):
                    raise
                advice = OOM_ADVICE.get(name, "lower --micro-tokens or --micro-batch")
                raise ValueError(
                    f"{title}: out of memory; {advice}, the finished stages are kept: {error}"
                ) from None

        # After the file has its name: what is in timings.jsonl is finished.
        journal.forget()
        self.game.journal = NOTHING
        if is_main():
            row = {"round": self.game.number, "stage": name}
            row |= {
                "seconds": time.perf_counter() - start,
                "peak_gb": peak_memory(self.config.device),
            }
            append_line(Path(self.config.out) / "timings.jsonl", row)


def finished(path: Path) -> bool:
    """Whether a stage is on disk, as the main process sees it: all must agree."""
    return broadcast(path.exists())


AGAIN = "delete it to compute it again"


def read_responses(path: Path, prompts: list, samples: int, vocab_size: int) -> list:
    """The token ids of a responses.jsonl: N lists of K. ValueError if it is of other prompts, or
    not what a policy of this vocabulary writes.
    """
    rows = [row for _, row in read_lines(path)]
    if [row["prompt"] for row in rows] != [prompt.text for prompt in prompts]:
        differs = "holds responses to other prompts than this run's"
        raise ValueError(f"{path}: {differs}; was the prompt file changed?")

    for number, row in enumerate(rows, 1):
        tokens = [token for response in row["tokens"] for token in response]
        whole = len(row["tokens"]) == samples and all(row["tokens"])
        if not whole or not all(type(one) is int and 0 <= one < vocab_size for one in tokens):
            expected = f"expected {samples} lists of token ids below {vocab_size}"
            raise ValueError(f"{path}, line {number}: tokens, {expected}; {AGAIN}")
    return [row["tokens"] for row in rows]


STEP = ("loss", "mean_squared_target", "best_log_ratio", "worst_log_ratio", "gradient_norm", "lr")


def read_steps(path: Path) -> list[dict]:
    """The numbers of each optimizer step, as fit has yielded them."""
    rows = []
    for where, row in read_lines(path):
        for name in STEP:
            value = row.get(name)
            if type(value) not in (int, float) or not math.isfinite(value):
                found = f"{name} is {value!r}, expected a number"
                raise ValueError(f"{where}: {found}; delete {path.parent} to compute it again")
        rows.append(row)
    return rows


def read_tensor(path: Path, name: str, shape: tuple) -> torch.Tensor:
    try:
        tensor = load_file(path)[name]
    except (SafetensorError, KeyError) as error:
        raise ValueError(f"{path}: not what this stage writes ({error}); {AGAIN}") from None

    found = tuple(tensor.shape)
    if found != shape or not tensor.isfinite().all():
        raise ValueError(f"{path}: {name} are {found}, expected {shape}, all finite; {AGAIN}")
    return tensor


def tensor_file(name: str, tensor: torch.Tensor) -> bytes:
    tensors = {name: tensor.contiguous()}
    if name == "preferences":
        tensors["win_rates"] = tensor.mean(-1)  # for people; nothing reads them
    return save(tensors)


@contextmanager
def in_shards(game, path: Path):
    """The game's policy as shards of all processes, from its checkpoint; afterwards its whole copy
    again, with what is at path.
    """
    # On the meta device, so that no process holds a second whole copy.
    copy = game.policy
    with uninitialized(torch.float32, "meta"):
        game.policy = type(copy)(copy.config)
    game.policy.model.recompute = copy.model.recompute
    shard(game.policy, DTYPES[game.config.dtype], game.config.device)
    load_weights(game.policy, policy_folder(game.config, game.number))

    yield

    game.policy = copy
    gc.collect()  # the shards, which refer to each other
    load_weights(game.policy, path)


# ------------------------------------------------------------------------ the unfinished fit


class Saver:
    """Keeps the state of an unfinished fit: weights, optimizer state, the numbers of each step, and
    other tensors in `extra`, in FOLDER/fit-STEPS. Without a folder it keeps nothing.

    One safetensors file a process, with its part of everything. The older state goes when the newer
    one is whole. Inside `with saver:` Ctrl-C and SIGTERM wait for the end of a step, and save.
    """

    def __init__(self, folder: Path | None, minutes: float):
        self.folder = folder
        self.seconds = 60 * minutes
        self.last = time.monotonic()
        self.module = None  # it and the optimizer are set by resume, which a fit begins with
        self.optimizer = None
        self.steps = []  # the numbers of the steps done
        self.extra = {}
        self.stop = Stop()

    def __enter__(self) -> "Saver":
        # Of several processes each would stop after a step of its own, and wait for the others.
        if world_size() == 1:
            self.stop.__enter__()
        return self

    def __exit__(self, *error) -> None:
        self.stop.__exit__(*error)

    def kept(self) -> list[Path]:
        """Folders of this kind, the latest last."""
        found = self.folder.glob("fit-*") if self.folder else ()
        found = [path for path in found if path.name.removeprefix("fit-").isdecimal()]
        return sorted(found, key=lambda path: int(path.name.removeprefix("fit-")))

    def resume(self, module: nn.Module, optimizer) -> int:
        """Put weights and optimizer state where they were; the number of steps done, 0 if nothing
        was kept.
        """
        self.module = module
        self.optimizer = optimizer
        found = broadcast(self.kept())
        if not found:
            return 0
        path = part_of(found[-1])
        if not path.exists():
            begun = "this fit was begun by another number of processes"
            remedy = "start as many, or delete the folder to begin the stage again"
            raise ValueError(f"{path}: no such file, {begun}; {remedy}")
        try:
            self.load(path)
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            again = f"delete {path.parent} to begin the stage again"
            raise ValueError(f"{path}: not the state of this fit ({error}); {again}") from None
        return len(self.steps)

    @torch.no_grad()
    def load(self, path: Path) -> None:
        with safe_open(path, framework="pt") as file:
            self.steps = json.loads(file.metadata()["steps"])
        kept = load_file(path)

        for name, parameter in self.trained().items():
            local_part(parameter)[0].copy_(kept[f"weights.{name}"])
        load_optimizer_tensors(self.optimizer, without_prefix(kept, "optimizer."))
        self.extra = without_prefix(kept, "extra.")

    def trained(self) -> dict[str, nn.Parameter]:
        """What a fit changes; the rest (with --lora) is what its round began with."""
        named = self.module.named_parameters()
        return {name: parameter for name, parameter in named if parameter.requires_grad}

    def after(self, step: dict) -> None:
        """Call after each step; saves at most every `minutes`, and before it stops the program."""
        self.steps.append(step)
        stopped = self.stop.asked
        due = time.monotonic() - self.last >= self.seconds
        due = due or (stopped and self.seconds < math.inf)
        if broadcast(due):  # the main process's clock decides
            self.try_to_save()
        if stopped:
            raise KeyboardInterrupt

    def try_to_save(self) -> None:
        """A disk that is full is no reason to end a fit, which may still be finished."""
        try:
            self.save()
        except OSError as error:
            if world_size() > 1:  # the others wait for this one
                raise
            said = f"the fit goes on, but its state could not be saved: {visible(str(error))}"
            tqdm.write(said, file=sys.stderr)
        self.last = time.monotonic()

    def save(self) -> None:
        weights = {name: value.detach() for name, value in self.trained().items()}
        tensors = with_prefix(weights, "weights.")
        tensors |= with_prefix(optimizer_tensors(self.optimizer), "optimizer.")
        tensors |= with_prefix(self.extra, "extra.")
        tensors = {name: local_part(tensor)[0] for name, tensor in tensors.items()}

        # The older state goes only when the newer one is whole: a kill leaves one of them.
        older = broadcast(self.kept())
        with together(self.folder / f"fit-{len(self.steps)}") as temporary:
            temporary.mkdir(exist_ok=True)
            try:
                save_file(tensors, part_of(temporary), metadata={"steps": json.dumps(self.steps)})
            except SafetensorError as error:  # the library's own class for a full disk
                raise OSError(str(error)) from None
        delete(older)

    def forget(self) -> None:
        """Delete the saved state of a finished fit."""
        delete(self.kept())


def with_prefix(tensors: dict, prefix: str) -> dict:
    return {prefix + name: tensor for name, tensor in tensors.items()}


def without_prefix(tensors: dict, prefix: str) -> dict:
    """Those whose names begin with it."""
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }


def delete(folders: list[Path]) -> None:
    if is_main():
        for folder in folders:
            remove(folder)


def part_of(folder: Path) -> Path:
    """This process's file."""
    return folder / f"{rank() + 1}-of-{world_size()}.safetensors"
