"""Text <-> token ids, the chat template, prompt and pair files, padding, and files that are written whole.

A *prompt* is a string, or a list of chat messages `{"role": "user", "content": ...}`. A *response* is kept as
the token ids that were sampled, stop token included: decoding and encoding again is not the identity.
"""

import json
import os
import shutil
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import tokenizers
import torch

TEMPLATES = ("mistral", "plain")


class Tokenizer:
    """A checkpoint folder's tokenizer.json, with `bos` and `eos` ids from its tokenizer_config.json."""

    def __init__(self, folder):
        self.folder = Path(folder)
        path = self.folder / "tokenizer.json"
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file; a tokenizer is read from tokenizer.json")
        try:
            self.backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise ValueError(f"{path}: not a tokenizer.json that the tokenizers library reads: {error}") from None
        self.backend.encode_special_tokens = True  # a user's literal "</s>" stays text
        self.backend.no_truncation()  # some files keep the settings that they were trained with
        self.backend.no_padding()
        self.bos, self.eos = self._special("bos_token"), self._special("eos_token")
        self.files = {name: (self.folder / name).read_bytes() for name in ("tokenizer.json", "tokenizer_config.json")}

    def _special(self, key):
        path = self.folder / "tokenizer_config.json"
        token = read_json(path).get(key)
        token = token.get("content") if isinstance(token, dict) else token
        if not isinstance(token, str) or (token_id := self.backend.token_to_id(token)) is None:
            raise ValueError(f"{path}: {key} is {token!r}, expected a token of tokenizer.json")
        return token_id

    def check_vocabulary(self, vocab_size):
        """ValueError if there are tokens that a model of this vocab_size has no embedding for."""
        if (count := self.backend.get_vocab_size(with_added_tokens=True)) > vocab_size:
            raise ValueError(f"{self.folder}: tokenizer.json has {count} tokens, but the model's vocab_size is {vocab_size}")

    def encode(self, text):
        """Ids of the text alone: no BOS, no EOS, and no character sequence means a special token."""
        return self.backend.encode(text, add_special_tokens=False).ids

    def decode(self, ids):
        return self.backend.decode(ids, skip_special_tokens=True)

    def chat(self, messages):
        """Ids of a conversation in Mistral's v1 [INST] format, token for token what mistral-common produces.

        BOS once; every user block and every answer is encoded on its own; EOS behind every answer; all system
        messages go in front of the first user message; neighbours of one role are joined, each with a blank line.
        """
        messages = merge_neighbours(messages)
        ids, system = [self.bos], [content for role, content in messages if role == "system"]
        for role, content in messages:
            if role == "user":
                ids += self.encode("[INST] " + "\n\n".join([*system, content]) + " [/INST]")
                system = []
            elif role == "assistant":
                ids += self.encode(content) + [self.eos]
        return ids

    def prompt_ids(self, prompt, template):
        """Ids that a response follows. `mistral`: the chat format; `plain`: BOS and the text, to be continued."""
        if template == "mistral":
            return self.chat([{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt)
        return [self.bos] + self.encode(prompt_text(prompt))

    def response_text(self, prompt_ids, response_ids, template):
        """What was sampled, as text. A plain continuation keeps the space before its first word, an answer does not."""
        if template == "mistral":
            return self.decode(response_ids)
        prefix, whole_text = self.decode(prompt_ids), self.decode(prompt_ids + response_ids)
        return whole_text.removeprefix(prefix)

    def judged_ids(self, prompt, response, template):
        """Ids of prompt and response with both ends marked: what a preference model reads."""
        text = prompt_text(prompt)
        if template == "mistral":
            return self.chat([{"role": "user", "content": text}, {"role": "assistant", "content": response}])
        return [self.bos] + self.encode(text + response) + [self.eos]

    def copy_to(self, folder):
        """Put the tokenizer's files into a checkpoint folder, as they were read."""
        for name, content in self.files.items():
            (Path(folder) / name).write_bytes(content)


@dataclass(frozen=True)
class Prompt:
    """A prompt in the two forms that a round needs: the text that the judge reads, the ids that the policy continues."""

    text: str
    ids: list


def prepare_prompts(prompts, tokenizer, template, max_new_tokens, path, context, whose):
    """Prompts of a file in both forms. ValueError names one that leaves no room for max_new_tokens in the context."""
    ready = [Prompt(prompt_text(prompt), tokenizer.prompt_ids(prompt, template)) for prompt in prompts]
    for prompt in ready:
        if len(prompt.ids) + max_new_tokens > context:
            raise ValueError(
                f"{path}: prompt {prompt.text[:40]!r}... has {len(prompt.ids)} tokens, which with "
                f"--max-new-tokens {max_new_tokens} is more than the {whose} {context}"
            )
    return ready


def merge_neighbours(messages):
    """[(role, content)] with consecutive messages of one role joined by a blank line, as mistral-common does."""
    merged = []
    for message in messages:
        role, content = message["role"], message["content"]
        if role not in ("system", "user", "assistant"):
            raise ValueError(f"chat message has role {role!r}, expected system, user or assistant")
        if merged and merged[-1][0] == role:
            merged[-1] = (role, merged[-1][1] + "\n\n" + content)
        else:
            merged.append((role, content))
    return merged


def prompt_text(prompt):
    """A prompt as the one string that a judge sees: itself, the only user message, or a labelled conversation."""
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1:
        return prompt[0]["content"]
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in prompt)


# ------------------------------------------------------------------------------------------------ reading


def read_json(path, kind=dict):
    """A JSON file that holds an object, or a list."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file") from None
    except ValueError as error:  # UnicodeDecodeError is one
        raise ValueError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(value, kind):
        raise ValueError(f"{path}: expected a JSON {'object' if kind is dict else kind.__name__}, found {type(value).__name__}")
    return value


def read_lines(path):
    """Yield (where, object) for each line of a JSON-lines file; `where` is "file, line n". Blank lines are skipped."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file")
    empty = True
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            where, empty = f"{path}, line {number}", False
            try:
                row = json.loads(line.decode("utf-8"))
            except ValueError as error:
                raise ValueError(f"{where}: not valid JSON: {error}") from None
            if not isinstance(row, dict):
                raise ValueError(f"{where}: expected a JSON object, found {type(row).__name__}")
            yield where, row
    if empty:
        raise ValueError(f"{path}: the file is empty, expected one JSON object a line")


def text_field(row, key, where, scalars=False):
    """row[key] as a string; with `scalars` a number or truth value too, as its JSON text."""
    value = row.get(key)
    if scalars and isinstance(value, (bool, int, float)):
        return json.dumps(value)
    if not isinstance(value, str):
        found = "nothing" if key not in row else json.dumps(value)[:60]
        raise ValueError(f"{where}: expected a string under {key!r}, found {found}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{where}: the text under {key!r} is not valid Unicode: {error}") from None
    return value


def read_prompts(path):
    """A JSON-lines file with `prompt` (a string) or `messages` (a chat that ends with the user) -> list of prompts.

    ValueError names file and line of a row that has neither.
    """
    prompts = []
    for where, row in read_lines(path):
        if "messages" not in row:
            prompt = text_field(row, "prompt", where)
        else:
            prompt = row["messages"]
            if not isinstance(prompt, list) or not prompt or not all(isinstance(m, dict) for m in prompt):
                raise ValueError(f"{where}: expected a list of chat messages under 'messages'")
            for message in prompt:
                text_field(message, "content", where)
                if message.get("role") not in ("system", "user", "assistant"):
                    raise ValueError(f"{where}: message role is {message.get('role')!r}, expected system, user or assistant")
            if prompt[-1]["role"] != "user":
                raise ValueError(f"{where}: the last message is from {prompt[-1]['role']!r}, expected 'user'")
        if not prompt_text(prompt):
            raise ValueError(f"{where}: the prompt is empty")
        prompts.append(prompt)
    return prompts


def read_pairs(path):
    """A JSON-lines file of judged pairs -> list of {prompt, chosen, rejected, probability}.

    `probability` is P(chosen beats rejected), a share of votes for example; 1 where a row has none. A response that
    some tool wrote as a bare JSON number or truth value is read as its text. `chosen_model`, `rejected_model` and `votes`,
    one a voter, 1 for chosen, 2 for rejected, 0 for a tie, are kept where a row has them: a judge's report reads them.
    """
    pairs = []
    for where, row in read_lines(path):
        pair = {key: text_field(row, key, where, scalars=key != "prompt") for key in ("prompt", "chosen", "rejected")}
        probability = row.get("probability", 1.0)
        number = isinstance(probability, (int, float)) and not isinstance(probability, bool)
        if not number or not 0 <= probability <= 1:
            raise ValueError(f"{where}: probability is {probability!r}, expected a number from 0 to 1")
        votes = row.get("votes", [])
        if not isinstance(votes, list) or not all(type(vote) is int and vote in (0, 1, 2) for vote in votes):
            raise ValueError(f"{where}: votes are {votes!r}, expected a list of 1 (chosen), 2 (rejected) or 0 (tie)")
        names = {key: text_field(row, key, where) for key in ("chosen_model", "rejected_model") if key in row}
        pairs.append(pair | {"probability": float(probability), "votes": votes} | names)
    return pairs


def read_outputs(path):
    """AlpacaEval's outputs, a JSON list of {instruction, output} -> {instruction: [its outputs]}. ValueError names a bad row."""
    outputs = {}
    for number, row in enumerate(read_json(path, list), 1):
        where = f"{path}, row {number}"
        if not isinstance(row, dict):
            raise ValueError(f"{where}: expected a JSON object, found {type(row).__name__}")
        outputs.setdefault(text_field(row, "instruction", where), []).append(text_field(row, "output", where))
    return outputs


def outputs_for(path, prompts):
    """The outputs of a file for each of these prompt texts: N lists. ValueError if a prompt has none, or more than another."""
    outputs = read_outputs(path)
    if missing := [prompt for prompt in prompts if prompt not in outputs]:
        raise ValueError(f"{path}: no output for {len(missing)} of the {len(prompts)} prompts, the first is {missing[0][:40]!r}")
    counts = [len(outputs[prompt]) for prompt in prompts]
    for prompt, count in zip(prompts, counts):
        if count != counts[0]:
            raise ValueError(f"{path}: instruction {prompt[:40]!r} has {count} outputs, expected {counts[0]}, as the first has")
    return [outputs[prompt] for prompt in prompts]


# ------------------------------------------------------------------------------------------------ padding


def pad(rows, device=None):
    """Token lists -> (B, T) ids, padded with 0 on the right, where a causal model never looks back at it."""
    tokens = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = torch.tensor(row)
    return tokens.to(device)


def pad_responses(prompts, responses, device=None):
    """B prompts and B responses (token lists) -> tokens (B, T), mask (B, T) bool, True on response tokens."""
    tokens = pad([prompt + response for prompt, response in zip(prompts, responses, strict=True)])
    start = torch.tensor([len(prompt) for prompt in prompts])[:, None]
    end = start + torch.tensor([len(response) for response in responses])[:, None]
    position = torch.arange(tokens.shape[1])
    return tokens.to(device), ((start <= position) & (position < end)).to(device)


# ------------------------------------------------------------------------------------------------ writing


def remove(path):
    """Delete a file or a folder, if it is there."""
    shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def vacant(path):
    """The path, if a new folder may be put there. FileExistsError if it is a file or a folder with something in it."""
    path = Path(path).absolute()
    if path.is_file() or (path.is_dir() and any(path.iterdir())):
        raise FileExistsError(f"{path}: exists already, and nothing is written over it; choose another folder, or delete it")
    return path


@contextmanager
def whole(path):
    """Yield a temporary name to write a file or a new folder under; it gets its real name only when complete.

    Whoever is killed inside leaves the old content, or none, but never a part. OSError (disk full, say) names
    the path that could not be written. A file replaces the file of that name; a folder replaces nothing.
    """
    path = Path(path).absolute()
    path = vacant(path) if path.is_dir() else path
    temporary = path.with_name(path.name + ".tmp")
    remove(temporary)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        remove(temporary)
        raise OSError(f"{path}: could not be written: {error}; what was there before is untouched") from error
    except BaseException:
        remove(temporary)
        raise


def write_text(path, text):
    with whole(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path, value):
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_lines(path, rows):
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def new_figure(width, height):
    """An empty figure of so many inches. Imported late: a quarter of the start-up, and few commands draw."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def write_figure(path, figure):
    with whole(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def append_line(path, row):
    """Add one JSON line to a log that is read while it grows."""
    try:
        with open(path, "a", encoding="utf-8") as file:
            print(json.dumps(row), file=file)
    except OSError as error:
        raise OSError(f"{path}: could not be written: {error}; finished stages are untouched") from error
