"""Text <-> token ids, the chat template, prompt and pair files, padding.

A *prompt* is a string, or a list of chat messages `{"role": "user", "content": ...}`. A *response*
is kept as the token ids that were sampled, stop token included: encoding its text may give others.
"""

import functools
import itertools
import json
from dataclasses import dataclass
from pathlib import Path

import tokenizers
import torch
from torch import Tensor

from engine.files import read_json, read_lines

TEMPLATES = ("chat", "mistral", "plain")
FILES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja")
ROLES = ("system", "user", "assistant")


class Tokenizer:
    """A checkpoint folder's tokenizer.json, and the special tokens that its other files name.

    `bos` may be None. `stop` are the tokens that end a response: `eos`, or the list of the
    generation_config.json.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        path = self.folder / "tokenizer.json"
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file, so there is no tokenizer")
        try:
            self.backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise ValueError(f"{path}: not a tokenizer.json that can be read: {error}") from None

        # A user's literal "</s>" stays text; truncation and padding may be left over from training.
        self.backend.encode_special_tokens = True
        self.backend.no_truncation()
        self.backend.no_padding()

        self.config = read_json(self.folder / "tokenizer_config.json")
        self.bos = self._special("bos_token") if self.config.get("bos_token") else None
        self.eos = self._special("eos_token")
        self.stop = self._stop_tokens()
        paths = [self.folder / name for name in FILES]
        self.files = {path.name: path.read_bytes() for path in paths if path.is_file()}

    def _special(self, key):
        """The id of a special token, which may be written as a string or as an object."""
        token = self.config.get(key)
        token = token.get("content") if isinstance(token, dict) else token
        token_id = self.backend.token_to_id(token) if isinstance(token, str) else None
        if token_id is None:
            path = self.folder / "tokenizer_config.json"
            raise ValueError(f"{path}: {key} is {token!r}, expected a token of tokenizer.json")
        return token_id

    def _stop_tokens(self):
        path = self.folder / "generation_config.json"
        found = read_json(path).get("eos_token_id") if path.is_file() else None
        stop = [self.eos] if found is None else found if isinstance(found, list) else [found]
        for token in stop:
            if type(token) is not int or self.backend.id_to_token(token) is None:
                expected = "expected the id of a token of tokenizer.json"
                raise ValueError(f"{path}: eos_token_id is {token!r}, {expected}")
        return tuple(dict.fromkeys(stop))

    def check_vocabulary(self, vocab_size: int) -> None:
        """ValueError if there are tokens that a model of this vocab_size has no embedding for."""
        ids = self.backend.get_vocab(with_added_tokens=True).values()
        if max(ids, default=-1) >= vocab_size:
            sizes = f"token {max(ids)}, but the model's vocab_size is {vocab_size}"
            raise ValueError(f"{self.folder}: tokenizer.json has {sizes}")

    def encode(self, text: str) -> list[int]:
        """Ids of the text alone: no BOS, no EOS, and nothing in the text is a special token."""
        return self.backend.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        return self.backend.decode(ids, skip_special_tokens=True)

    @functools.cached_property
    def chat_template(self):
        """The checkpoint's own; ValueError if it has none."""
        from engine.chat_template import ChatTemplate  # late: jinja2 takes time to import

        return ChatTemplate(self.folder, self.backend, self.config)

    def conversation_ids(
        self, messages: list[dict], add_generation_prompt: bool = True
    ) -> list[int]:
        """Ids of a conversation in the checkpoint's own template, as transformers gives them.

        Only where a message contains the text of a special token they differ: here it stays text.
        """
        return self.chat_template.ids(messages, add_generation_prompt)

    def chat(self, messages: list[dict]) -> list[int]:
        """Ids of a conversation in Mistral's v1 [INST] format, the same as mistral-common's."""
        # All system messages go in front of the first message of the user.
        self.require_mistral()
        messages = merge_neighbours(messages)
        system = [content for role, content in messages if role == "system"]

        # Each block and each answer is encoded on its own, so that no token spans two of them.
        ids = [self.bos]
        for role, content in messages:
            if role == "user":
                ids += self.encode("[INST] " + "\n\n".join([*system, content]) + " [/INST]")
                system = []
            elif role == "assistant":
                ids += self.encode(content) + [self.eos]
        return ids

    def require_mistral(self) -> None:
        """ValueError where [INST] is no plain text, or BOS and EOS are not <s> and </s>."""
        # Anywhere else the v1 format makes prompts that the model has never seen.
        own = [self.backend.token_to_id(token) for token in ("<s>", "</s>", "[INST]")]
        if own != [self.bos, self.eos, None]:
            differs = "not the tokenizer of a Mistral v1 or v2, which --template mistral is for"
            raise ValueError(f"{self.folder}: {differs}; use --template chat")

    def prompt_ids(self, prompt: str | list, template: str) -> list[int]:
        """Ids that a response follows, in one of TEMPLATES; `plain` is a text to be continued."""
        if template == "plain":
            return self.beginning() + self.encode(prompt_text(prompt))
        is_text = isinstance(prompt, str)
        messages = [{"role": "user", "content": prompt}] if is_text else prompt
        return self.chat(messages) if template == "mistral" else self.conversation_ids(messages)

    def beginning(self) -> list[int]:
        """What a plain text begins with: BOS."""
        if self.bos is None:
            path = self.folder / "tokenizer_config.json"
            raise ValueError(f"{path}: bos_token is null, but --template plain begins with it")
        return [self.bos]

    def response_text(self, prompt_ids: list, response_ids: list, template: str) -> str:
        """The text of a response; a plain continuation keeps the space before its first word."""
        if template != "plain":
            return self.decode(response_ids)

        # Decoding strips a leading space, so the response is decoded together with the prompt.
        prefix = self.decode(prompt_ids)
        return self.decode(prompt_ids + response_ids).removeprefix(prefix)

    def judged_ids(self, prompt: str | list, response: str, template: str) -> list[int]:
        """Ids of prompt and response with both ends marked: what a preference model reads."""
        text = prompt_text(prompt)
        if template == "chat":
            both = [{"role": "user", "content": text}, {"role": "assistant", "content": response}]
            return self.conversation_ids(both, add_generation_prompt=False)
        if template == "mistral":
            return self.prompt_ids(text, template) + self.encode(response) + [self.eos]
        return self.beginning() + self.encode(text + response) + [self.eos]

    def copy_to(self, folder: str | Path) -> None:
        """Put the tokenizer's files into a checkpoint folder, as they were read."""
        for name, content in self.files.items():
            (Path(folder) / name).write_bytes(content)


def merge_neighbours(messages: list[dict]) -> list[tuple[str, str]]:
    """[(role, content)]; a blank line joins neighbours of one role, as in mistral-common."""
    merged = []
    for role, group in itertools.groupby(messages, key=lambda message: message["role"]):
        if role not in ROLES:
            raise ValueError(f"chat message has role {role!r}, expected system, user or assistant")
        merged.append((role, "\n\n".join(message["content"] for message in group)))
    return merged


def prompt_text(prompt: str | list) -> str:
    """The prompt as a judge sees it: the text itself, or a conversation with its roles named."""
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1:
        return prompt[0]["content"]
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in prompt)


@dataclass(frozen=True)
class Prompt:
    """A prompt as a round needs it: the text for the judge, the ids for the policy."""

    text: str
    ids: list[int]


def prepare_prompts(
    prompts: list, tokenizer: Tokenizer, template: str, max_new_tokens: int,
    path: str | Path, context: int, whose: str,
) -> list[Prompt]:  # fmt: skip
    """Text and ids of each prompt; ValueError names one that leaves no room in the context."""
    ready = []
    for prompt in prompts:
        text = prompt_text(prompt)
        ids = tokenizer.prompt_ids(prompt, template)
        if len(ids) + max_new_tokens > context:
            tokens = f"{len(ids)} tokens, which with --max-new-tokens {max_new_tokens} is more than"
            raise ValueError(f"{path}: prompt {text[:40]!r}... has {tokens} the {whose} {context}")
        ready.append(Prompt(text, ids))
    return ready


def pad(rows: list[list[int]], device=None) -> Tensor:
    """Token lists -> (B, T) ids, padded with 0 on the right, where a causal model never looks."""
    width = max(map(len, rows))
    padded = [row + [0] * (width - len(row)) for row in rows]
    return torch.tensor(padded, dtype=torch.long, device=device)


@dataclass(frozen=True)
class Pack:
    """Sequences that share beginnings, as one row of N tokens in which a beginning stands once.

    All of a transformer but attention works token by token, so it needs neither copies of a prompt
    nor padding. In attention, line l of `queries` (L, T) attends to line l of `keys` (L, S); both
    are places in the row.
    """

    tokens: Tensor  # (1, N)
    position: Tensor  # (1, N), each in its own sequence
    queries: Tensor  # (L, T): a line for each prompt and continuation, padded with 0
    keys: Tensor  # (L, S): the same, a continuation after its prompt
    query_position: Tensor  # (L, T)
    key_position: Tensor  # (L, S); in padding after all queries
    place: Tensor  # (N,): where in the queries, line after line, a token is


def pack(prompts: list, continuations: list, device=None) -> tuple[Pack, Tensor]:
    """b prompts, each with any number of continuations, all as ids -> a Pack of them, and places.

    places (C, 1 + R) has a line for each of the C continuations: where in the Pack the prompt's
    last token is, and then its own. 0 is padding. A prompt has tokens, a continuation may be empty.
    """
    tokens, position, queries, keys, places = [], [], [], [], []
    for prompt, row in zip(prompts, continuations, strict=True):
        shared = list(range(len(tokens), len(tokens) + len(prompt)))
        tokens += prompt
        position += range(len(prompt))
        queries.append(shared)
        keys.append(shared)

        for continuation in row:
            own = list(range(len(tokens), len(tokens) + len(continuation)))
            tokens += continuation
            position += range(len(prompt), len(prompt) + len(own))
            places.append([shared[-1], *own])
            if own:
                queries.append(own)
                keys.append(shared + own)

    tokens = torch.tensor([tokens])
    position = torch.tensor([position])
    query = pad(queries)
    key = pad(keys)
    key_position = position[0, key].masked_fill(~filled(keys), tokens.shape[1])
    # The lines hold every place once, in order: filled ones are those of tokens 0, 1, 2, ...
    place = filled(queries).flatten().nonzero().flatten()

    table = (tokens, position, query, key, position[0, query], key_position, place)
    return Pack(*(part.to(device) for part in table)), pad(places, device)


def filled(rows: list[list[int]]) -> Tensor:
    """(B, T) bool, False where pad would pad."""
    lengths = torch.tensor([len(row) for row in rows])
    return torch.arange(max(map(len, rows))) < lengths[:, None]


# ------------------------------------------------------------------------ files
# A ValueError names the file, and the line or row, of the first thing that is wrong.


def text_field(row: dict, key: str, where: str, scalars: bool = False) -> str:
    """row[key], a string; with `scalars` a number or truth value too, as its JSON text."""
    value = row.get(key)
    # NaN and infinity, which Python reads, are not JSON.
    if scalars and isinstance(value, (bool, int, float)) and value - value == 0:
        return json.dumps(value)
    if not isinstance(value, str):
        found = json.dumps(value)[:60] if key in row else "nothing"
        raise ValueError(f"{where}: expected a string under {key!r}, found {found}")

    # JSON can escape half of a surrogate pair, which no file and no tokenizer takes.
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{where}: the text under {key!r} is not valid Unicode: {error}") from None
    return value


def read_prompts(path: str | Path) -> list:
    """JSON lines with a string `prompt`, or with `messages` that end with the user's -> prompts."""
    prompts = []
    for where, row in read_lines(path):
        if "messages" in row:
            prompt = checked_messages(row["messages"], where)
        else:
            prompt = text_field(row, "prompt", where)
        if not prompt_text(prompt):
            raise ValueError(f"{where}: the prompt is empty")
        prompts.append(prompt)
    return prompts


def checked_messages(messages, where: str) -> list[dict]:
    """The messages, if they are a conversation that the user has ended."""
    is_chat = isinstance(messages, list) and all(isinstance(one, dict) for one in messages)
    if not is_chat or not messages:
        raise ValueError(f"{where}: expected a list of chat messages under 'messages'")

    for message in messages:
        text_field(message, "content", where)
        role = message.get("role")
        if role not in ROLES:
            raise ValueError(f"{where}: message role {role!r}, expected system, user or assistant")
    if role != "user":
        raise ValueError(f"{where}: the last message is from {role!r}, expected 'user'")
    return messages


def read_pairs(path: str | Path) -> list[dict]:
    """Judged pairs from JSON lines -> [{prompt, chosen, rejected, probability, votes}].

    `probability` is P(chosen beats rejected), a share of votes for example; 1 where a row has none.
    """
    pairs = []
    for where, row in read_lines(path):
        pair = {"prompt": text_field(row, "prompt", where)}

        # Some tools write a response that is a number or a truth value without quotes.
        for key in ("chosen", "rejected"):
            pair[key] = text_field(row, key, where, scalars=True)

        value = row.get("probability", 1.0)
        if type(value) not in (int, float) or not 0 <= value <= 1:  # True is no number here
            raise ValueError(f"{where}: probability is {value!r}, expected a number from 0 to 1")
        pair["probability"] = float(value)

        # One for each voter: 1 for chosen, 2 for rejected, 0 for a tie.
        votes = row.get("votes", [])
        is_list = isinstance(votes, list) and all(type(vote) is int for vote in votes)
        if not is_list or not set(votes) <= {0, 1, 2}:
            expected = "a list of 1 (chosen), 2 (rejected) or 0 (tie)"
            raise ValueError(f"{where}: votes are {votes!r}, expected {expected}")
        pair["votes"] = votes

        # Like the votes, these are for the report on a judge.
        for key in ("chosen_model", "rejected_model"):
            if key in row:
                pair[key] = text_field(row, key, where)
        pairs.append(pair)
    return pairs


def read_outputs(path: str | Path) -> dict[str, list[str]]:
    """AlpacaEval's JSON list of {instruction, output} -> {instruction: [its outputs]}."""
    outputs = {}
    for number, row in enumerate(read_json(path, list), 1):
        where = f"{path}, row {number}"
        if not isinstance(row, dict):
            raise ValueError(f"{where}: expected a JSON object, found {type(row).__name__}")
        instruction = text_field(row, "instruction", where)
        outputs.setdefault(instruction, []).append(text_field(row, "output", where))
    return outputs


def outputs_for(path: str | Path, prompts: list[str]) -> list[list[str]]:
    """N lists of a file's outputs for these prompts; ValueError if they are not equally many."""
    outputs = read_outputs(path)
    missing = [prompt for prompt in prompts if prompt not in outputs]
    if missing:
        which = f"{len(missing)} of the {len(prompts)} prompts, the first is {missing[0][:40]!r}"
        raise ValueError(f"{path}: no output for {which}")

    rows = [outputs[prompt] for prompt in prompts]
    for prompt, row in zip(prompts, rows):
        if len(row) != len(rows[0]):
            counts = f"has {len(row)} outputs, expected {len(rows[0])}, as the first has"
            raise ValueError(f"{path}: instruction {prompt[:40]!r} {counts}")
    return rows
