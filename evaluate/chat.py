"""Talk to a policy in the terminal, or to two of them at once.

    python -m evaluate chat --policy P
    python -m evaluate chat --policy P --against Q --pairs FILE

A line is a message, and the answer appears as it is sampled. Of two policies each answers every
message, in random order: which of them was (1) is told only after the pick. The pick goes on in the
conversation of both, and with --pairs it is kept as a pair, for `python prefmodel.py train`.
"""

import re
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from data import Tokenizer, prompt_text, read_pairs, text_field
from engine.checkpoint import load_weights
from engine.files import read_lines, write_lines
from engine.prepack import prepacked
from engine.run_folder import round_policies
from engine.terminal import visible
from generate import KVCache, Pool, Response, draw_seeds, pool_shape, positions_needed, prefilled
from model import Transformer

HELP = "/new starts again, /quit or Ctrl-D ends, Ctrl-C stops an answer.\n"
QUESTION = "\nWhich is better? 1, 2, 0 for a tie, or Enter for no pick: "

# What a terminal would obey: C0 (ESC begins colours, titles, links; \r goes back over the line) but
# for tab and newline, DEL, C1, and the marks that turn the direction of writing.
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def escaped(text: str) -> str:
    """The text with its control characters spelled out."""
    return CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


# ------------------------------------------------------------------------ answers


@torch.no_grad()
def stream(
    model: nn.Module, prompt: list[int], max_new_tokens: int, stop_tokens: tuple[int, ...],
    temperature: float = 1.0, top_p: float = 1.0, generator=None,
) -> Iterator[int]:  # fmt: skip
    """Yield the tokens that `generate` returns for one response, each as soon as it is sampled."""
    size = positions_needed(model, [prompt], max_new_tokens)
    [[seed]] = draw_seeds(1, 1, generator)
    response = Response(prompt, seed)
    parameter = next(model.parameters())
    shape = pool_shape(model.config, 1, size, None, parameter.dtype)
    cache = KVCache(model.config, *shape, parameter.device, parameter.dtype)
    pool = Pool(model, cache, 1, max_new_tokens, stop_tokens, temperature, top_p, record=False)

    pool.refill(prefilled(model, [[response]]))
    pool.compact()
    yield response.tokens[-1]
    while not pool.finished:
        pool.step()
        yield response.tokens[-1]


@dataclass(frozen=True)
class Answer:
    text: str
    source: Path  # the checkpoint that gave it
    stopped: bool  # by Ctrl-C


class Speaker:
    """A policy that answers: a checkpoint folder, or a run, of which a random round answers."""

    def __init__(self, folder: str | Path, args: Namespace):
        self.args = args
        self.folders = round_policies(folder) or [Path(folder)]
        self.tokenizer = Tokenizer(self.folders[0])
        self.policy = Transformer.from_pretrained(self.folders[0], args.dtype, args.device)
        self.tokenizer.check_vocabulary(self.policy.config.vocab_size)

        # A template that the tokenizer cannot have ends the command here, before anybody types.
        self.tokenizer.prompt_ids("1", args.template)

    def ids(self, prompt: str | list) -> list[int]:
        """Token ids of a prompt. ValueError if it leaves no room for an answer."""
        ids = self.tokenizer.prompt_ids(prompt, self.args.template)
        context = self.policy.config.max_position_embeddings
        if len(ids) >= context:
            tokens = f"this makes {len(ids)} tokens, but the model's context is {context}"
            raise ValueError(f"{tokens}; /new starts again")
        return ids

    def answer(self, ids: list[int], generator: torch.Generator, show: Callable) -> Answer:
        """Sample an answer and show it as it grows; Ctrl-C ends it where it is."""
        args = self.args
        index = int(torch.randint(len(self.folders), (), generator=generator))

        # Here the end of the context cuts an answer, where other commands refuse the prompt.
        limit = min(args.max_new_tokens, self.policy.config.max_position_embeddings - len(ids))
        stop = self.tokenizer.stop
        how = (args.temperature, args.top_p, generator)

        tokens = []
        text = ""
        shown = 0
        stopped = False
        try:
            if len(self.folders) > 1:
                load_weights(self.policy, self.folders[index])
            with prepacked(self.policy):
                for token in stream(self.policy, ids, limit, stop, *how):
                    tokens.append(token)
                    text = self.tokenizer.response_text(ids, tokens, args.template)

                    # A character may take several tokens: until its last they decode as U+FFFD.
                    sure = text.rstrip("\ufffd")
                    piece = sure[shown:]
                    shown = max(shown, len(sure))
                    show(escaped(piece))
        except KeyboardInterrupt:
            stopped = True

        show(escaped(text[shown:]))
        if stopped:
            show(" [stopped]")
        elif tokens[-1] not in stop:
            show(f" [cut after {limit} tokens]")
        show("\n")
        return Answer(text, self.folders[index], stopped)


# ------------------------------------------------------------------------ the conversation


class Chat:
    """One or two speakers, what was said, and the person: `ask` reads a line, `show` writes."""

    def __init__(self, speakers: list[Speaker], args: Namespace, ask: Callable, show: Callable):
        self.speakers = speakers
        self.args = args
        self.ask = ask
        self.show = show
        self.generator = torch.Generator().manual_seed(args.seed)
        self.messages = []

    def talk(self) -> None:
        """Answer one message after the other, until /quit; EOFError at the end of the input."""
        while True:
            line = self.line("\n> ")
            if line.strip() == "/quit":
                return
            if line.strip() == "/new":
                self.messages = []
            elif line.strip():
                self.turn(line)

    def line(self, question: str) -> str:
        try:
            return self.ask(question)
        except KeyboardInterrupt:
            self.show("\n")
            return ""

    def turn(self, text: str) -> None:
        """Answer a message; it and an answer become part of the conversation."""
        messages = [*self.messages, {"role": "user", "content": text}]
        prompt = text if self.args.template == "plain" else messages
        try:
            text_field(messages[-1], "content", "the message")  # a terminal may send any bytes
            ids = [speaker.ids(prompt) for speaker in self.speakers]
        except ValueError as error:
            self.show(f"{error}\n")
            return

        # Blind: the order is random, and anew in each turn.
        order = torch.randperm(len(ids), generator=self.generator).tolist()
        answers = []
        for number, k in enumerate(order, 1):
            self.show(f"\n({number}) " if len(order) > 1 else "")
            answers.append(self.speakers[k].answer(ids[k], self.generator, self.show))

        better = answers[0]
        if len(answers) > 1:
            better = self.pick(prompt, *answers)
        self.messages = [*messages, {"role": "assistant", "content": better.text}]

    def pick(self, prompt: str | list, first: Answer, second: Answer) -> Answer:
        """The answer that the person prefers, or else the first; a preference is kept."""
        line = self.line(QUESTION).strip()
        while line not in ("1", "2", "0", ""):
            line = self.line(f"{line!r} is not 1, 2, 0 or Enter: ").strip()
        self.show(f"(1) was {first.source}, (2) was {second.source}\n")

        better, worse = (second, first) if line == "2" else (first, second)
        if self.args.pairs and line:
            self.keep(prompt, better, worse, 0.5 if line == "0" else 1.0)
        return better

    def keep(self, prompt: str | list, better: Answer, worse: Answer, probability: float) -> None:
        """Add a pair to the file of pairs, unless the two answers have nothing to teach."""
        # A policy did not end where it was stopped, and a judge should not learn to dislike halves.
        if better.stopped or worse.stopped:
            self.show("not kept as a pair: an answer was stopped\n")
            return
        if better.text == worse.text:
            self.show("not kept as a pair: the answers are the same\n")
            return

        row = {"prompt": prompt_text(prompt), "chosen": better.text, "rejected": worse.text}
        row["probability"] = probability
        write_lines(self.args.pairs, [*rows_of(self.args.pairs), row])


def rows_of(path: str | Path) -> list[dict]:
    """The rows of a pair file, none if it is new. ValueError if there is one that is no pair."""
    path = Path(path)
    if not path.exists() or not path.stat().st_size:
        return []
    read_pairs(path)
    return [row for _, row in read_lines(path)]  # with columns that are not ours


def print_now(text: str) -> None:
    print(visible(text), end="", flush=True)


def chat(args: Namespace, ask: Callable = input, show: Callable = print_now) -> None:
    """Talk to --policy, and to --against beside it, until the input ends."""
    # Before the policies are loaded, which takes long.
    if args.pairs and not args.against:
        raise ValueError("--pairs needs --against: a pick is one of two answers")
    if args.pairs:
        rows_of(args.pairs)

    folders = [args.policy, args.against] if args.against else [args.policy]
    speakers = [Speaker(folder, args) for folder in folders]
    show(HELP)
    try:
        Chat(speakers, args, ask, show).talk()
    except EOFError:
        show("\n")
