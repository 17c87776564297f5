"""A checkpoint's own chat template: from messages to the ids that transformers gives for them.

The template, Jinja source in the checkpoint's folder, is rendered with the options, filters and
functions that transformers' documentation of chat templates names, in jinja2's immutable sandbox:
it is code from strangers.

One thing differs on purpose. A special token's characters in a *message*, such as <|im_end|> or
[INST], stay text; only those that the template itself writes become the special token.
"""

import json
import re
from datetime import datetime
from pathlib import Path

import tokenizers
from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from engine.files import read_json

# Around the number of a special token: its text in a message, and its place in the rendered text.
# They are noncharacters of Unicode, which no text for interchange contains.
TEXT = "\ufdd0{}\ufdd1"
PLACE = "\ufdd2{}\ufdd3"
RESERVED = re.compile("[\ufdd0-\ufdd3]")

# What the code of a template may raise beside jinja2's own, when it is compiled or run.
FAILURES = (
    TypeError, ValueError, LookupError, AttributeError, ArithmeticError, SyntaxError, NameError,
    RecursionError, MemoryError,
)  # fmt: skip


class ChatTemplate:
    """The template of a checkpoint folder, with its tokenizer and its tokenizer_config.json."""

    def __init__(self, folder: str | Path, backend: tokenizers.Tokenizer, config: dict):
        self.path, source = read_template(folder)
        try:
            self.template = environment().from_string(source)
        except (TemplateError, *FAILURES) as error:
            raise ValueError(
                f"{self.path}: the chat template is not valid: {said(error)}"
            ) from None

        # Templates may name special tokens: {"bos_token": "<s>", ...}, a string or an object each.
        named = {key: value for key, value in config.items() if key.endswith("_token") and value}
        texts = {key: v.get("content") if isinstance(v, dict) else v for key, v in named.items()}
        self.special_tokens = {key: text for key, text in texts.items() if isinstance(text, str)}

        # Longer ones first: of two that begin alike the longer one is meant.
        added = backend.get_added_tokens_decoder()
        special = {token.content: number for number, token in added.items() if token.special}
        self.number = dict(sorted(special.items(), key=lambda item: -len(item[0])))
        self.pattern = re.compile("|".join(map(re.escape, self.number)) or "(?!)")
        self.mark(backend, added)

    def mark(self, backend: tokenizers.Tokenizer, added: dict) -> None:
        """A tokenizer in which the mark of a special token's place splits a text as the token does.

        It is no special token itself, so it is found where special tokens are read as text.
        """
        self.backend = tokenizers.Tokenizer.from_str(backend.to_str())
        self.backend.encode_special_tokens = True
        self.meant = {}  # id of a mark -> id of the special token
        for number in self.number.values():
            token = added[number]
            flags = dict(lstrip=token.lstrip, rstrip=token.rstrip, normalized=token.normalized)
            place = tokenizers.AddedToken(PLACE.format(number), special=False, **flags)
            self.backend.add_tokens([place])
            self.meant[self.backend.token_to_id(place.content)] = number

    def ids(self, messages: list[dict], add_generation_prompt: bool) -> list[int]:
        """Token ids of a conversation; with add_generation_prompt, up to where an answer begins."""
        text = self.render([self.hidden(message) for message in messages], add_generation_prompt)

        # What is left of special tokens was written by the template.
        text = self.pattern.sub(lambda found: PLACE.format(self.number[found[0]]), text)
        for content, number in self.number.items():
            text = text.replace(TEXT.format(number), content)
        ids = self.backend.encode(text, add_special_tokens=False).ids
        if not ids:
            raise ValueError(f"{self.path}: the chat template makes nothing of the conversation")
        return [self.meant.get(number, number) for number in ids]

    def hidden(self, message: dict) -> dict:
        """A message in which each special token's text has become its mark."""
        content = message["content"]
        if RESERVED.search(content):
            raise ValueError(f"message {content[:40]!r}: U+FDD0 to U+FDD3 are not characters")
        return message | {
            "content": self.pattern.sub(lambda found: TEXT.format(self.number[found[0]]), content)
        }

    def render(self, messages: list[dict], add_generation_prompt: bool) -> str:
        given = dict(messages=messages, add_generation_prompt=add_generation_prompt)
        try:
            made = self.template.render(**given, tools=None, documents=None, **self.special_tokens)
            made.encode()  # no half of a surrogate pair, which no tokenizer takes
            return made
        except (TemplateError, *FAILURES) as error:
            refused = f"the chat template refuses the conversation: {said(error)}"
            raise ValueError(f"{self.path}: {refused}") from None


def said(error: Exception) -> str:
    """Its text; some, such as MemoryError, have only a name."""
    return str(error) or type(error).__name__


def read_template(folder: str | Path) -> tuple[Path, str]:
    """Where the template is, chat_template.jinja or tokenizer_config.json, and its source.

    ValueError if there is none.
    """
    path = Path(folder) / "chat_template.jinja"
    if path.is_file():
        try:
            return path, path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: the chat template is not UTF-8: {error}") from None

    path = Path(folder) / "tokenizer_config.json"
    source = read_json(path).get("chat_template")
    if isinstance(source, list):  # several, each with a name
        named = {row.get("name"): row.get("template") for row in source if isinstance(row, dict)}
        source = named.get("default")
    if not isinstance(source, str):
        remedy = "use --template mistral or plain"
        raise ValueError(
            f"{path}: no chat_template, and no chat_template.jinja beside it; {remedy}"
        )
    return path, source


# ------------------------------------------------------------------------ what templates may use


class Generation(Extension):
    """{% generation %} ... {% endgeneration %} marks what an assistant wrote; here it is text."""

    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
        return nodes.Scope(body, lineno=line)


def raise_exception(message: str):
    raise TemplateError(message)


def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    """json.dumps: jinja2's own filter of this name escapes HTML."""
    form = dict(indent=indent, separators=separators, sort_keys=sort_keys)
    return json.dumps(value, ensure_ascii=ensure_ascii, **form)


def strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def environment() -> ImmutableSandboxedEnvironment:
    extensions = [Generation, loopcontrols]
    made = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=extensions
    )
    made.filters["tojson"] = tojson
    made.globals |= {"raise_exception": raise_exception, "strftime_now": strftime_now}
    return made
