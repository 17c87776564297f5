"""A language model as judge, behind any server with OpenAI's chat completions.

    export OPENAI_API_KEY=...
    python train.py --judge 'llm:{"url": "https://api.openai.com/v1", "model": "gpt-4.1-mini",
                             "key": "OPENAI_API_KEY", "rubric": "Prefer the kinder one."}' ...

A question shows a prompt and two responses and asks for one letter. Its probability is that of A
against B among the log-probabilities of the first token or, from a server that gives none, the
mean of some votes. Each pair is asked in both orders and averaged, which cancels a liking for the
first place. Every reply is added to a file, the cache, as soon as it is there, and what the file
answers is not asked again: not after a crash, nor in another round, nor in another run.
"""

import atexit
import json
import sys
import threading
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch

from engine.files import append_line
from engine.progress import tqdm
from judges.base import Judge, JudgeError, asked
from judges.budget import circle, fill
from judges.server import RUBRIC, Server, digest, messages

TRIES = 2  # of a question that is answered with neither letter, before it counts as a tie
START = b'{"id": '  # of a line of the cache


class Question(NamedTuple):
    id: str  # a hash of the body
    prompt: str  # for messages
    body: dict  # of the request


class LLM(Judge):
    """See above. `key` is the name of an environment variable; `pairs` the most that are asked of a
    prompt; `votes` those of a question, where there are no log-probabilities; `parallel` the
    questions in flight; `timeout` in seconds; `extra` goes into each request, null takes out.
    """

    def __init__(
        self, url: str, model: str, rubric: str = RUBRIC, key: str | None = None,
        cache: str = "llm-answers.jsonl", pairs: int | None = None, votes: int = 5,
        parallel: int = 8, timeout: float = 60, extra: dict | None = None,
    ):  # fmt: skip
        numbers = {"pairs": 1 if pairs is None else pairs, "votes": votes, "parallel": parallel}
        for name, value in numbers.items():
            if not (isinstance(value, int) and value >= 1):
                raise ValueError(f"llm judge: {name} is {value!r}, expected 1, 2, ...")

        self.server = Server(url, key, timeout)
        self.model = model
        self.rubric = rubric
        self.pairs = pairs
        self.votes = votes
        self.parallel = parallel
        self.extra = dict(extra or {})

        self.lock = threading.Lock()
        self.counts = Counter()
        self.exact = {}  # id of a question: P(A) from log-probabilities
        self.ballots = defaultdict(list)  # id of a question: its votes
        self.cache = Path(cache)
        self.read_cache()
        atexit.register(self.report)

    def preferences_many(self, prompts, responses):
        return self.examine(prompts, responses)[0]

    def examine(self, prompts, responses):
        plans = [self.plan(*row) for row in zip(prompts, responses, strict=True)]
        self.ask([question for _, questions in plans for question in questions.values()])
        tables = [self.table(row, *plan) for row, plan in zip(responses, plans)]
        preference, gap = map(torch.stack, zip(*tables))
        return preference, {"order_inconsistency": gap}

    def plan(self, prompt: str, responses: list[str]) -> tuple[list[str], dict]:
        """The different texts in random order, and {(i, j): the question with i as A}."""
        # By a hash, so that the draw depends on nothing but the texts.
        texts = sorted(set(responses), key=lambda text: digest([prompt, text]))
        questions = {}
        for pair in circle(len(texts), self.pairs):
            for i, j in (pair, pair[::-1]):
                body = self.body(prompt, texts[i], texts[j])
                questions[i, j] = Question(digest(body), prompt, body)
        return texts, questions

    def body(self, prompt: str, first: str, second: str) -> dict:
        """Of the request. At temperature 1 a vote is a draw, and log-probabilities are the model's
        own whether or not the server divides them by the temperature.
        """
        chat = messages(self.rubric, prompt, first, second)
        body = {"model": self.model, "messages": chat, "temperature": 1, "top_p": 1}
        body |= {"max_tokens": 1, "logprobs": True, "top_logprobs": 5} | self.extra
        return {name: value for name, value in body.items() if value is not None}

    def table(self, responses: list[str], texts: list[str], questions: dict) -> tuple:
        """(K, K) preferences, and (K, K) |L_ij + L_ji|, where L_ij is the logit with i as A."""
        first = torch.full((len(texts), len(texts)), 0.5, dtype=torch.float64)  # P(A), A is the row
        known = torch.zeros_like(first, dtype=torch.bool)
        for place, question in questions.items():
            first[place] = self.probability(question.id)
            known[place] = True

        preference = 0.5 + fill((first - first.T) / 2, known)
        logit = torch.logit(first, eps=1e-7)
        gap = (logit + logit.T).abs()
        place = [texts.index(text) for text in responses]
        return tuple(table[place][:, place].float() for table in (preference, gap))

    # -------------------------------------------------------------------- asking

    def ask(self, questions: list[Question]) -> None:
        """Answer what the cache does not, a few at a time. After the first that cannot be answered
        nothing more is asked: JudgeError. Replies that are on their way by then are kept.
        """
        missing = {q.id: q for q in questions if self.probability(q.id) is None}
        self.count(cached=len({q.id for q in questions}) - len(missing))

        stop = threading.Event()
        errors = []

        def work(question: Question) -> None:
            try:
                self.answer(question, stop)
            except JudgeError as error:
                errors.append(error)
                stop.set()

        few = len(missing) < 20
        bar = tqdm(total=len(missing), unit="question", desc="llm", leave=False, disable=few)
        with bar, ThreadPoolExecutor(self.parallel) as pool:
            try:
                for _ in pool.map(work, missing.values()):
                    bar.update()
            finally:
                stop.set()  # after Ctrl-C too; what is on its way is waited for
        if errors:
            raise JudgeError(f"{errors[0]}; what was answered is kept in {self.cache}")

    def answer(self, question: Question, stop: threading.Event) -> None:
        """Ask until there is a probability: one reply with log-probabilities, or enough votes."""
        where = f"judge llm {self.model}, prompt {question.prompt[:40]!r}"

        def post():
            self.count(calls=1)
            return self.server.post(question.body)

        def wait(seconds: float, sentence: str) -> None:
            self.count(repeated=1)
            if seconds > 2:  # not the one failure in a hundred that is over at once
                tqdm.write(f"{sentence}; again in {seconds} s", file=sys.stderr)
            if stop.wait(seconds):
                raise JudgeError(f"{where}: stopped")

        while self.probability(question.id) is None and not stop.is_set():
            for _ in range(TRIES):
                reply = asked(post, where, self.retries, wait)
                self.count(tokens_in=reply["tokens"][0], tokens_out=reply["tokens"][1])
                if reply["probability"] is not None:
                    break
            else:
                self.count(ties=1)
                reply["probability"] = 0.5
            self.keep({"id": question.id, "model": self.model} | reply)

    # -------------------------------------------------------------------- what is known

    def probability(self, id: str) -> float | None:
        """The answer to a question, None as long as there is none."""
        ballots = self.ballots.get(id, [])[: self.votes]
        enough = sum(ballots) / self.votes if len(ballots) == self.votes else None
        return self.exact.get(id, enough)

    def learn(self, row: dict) -> None:
        if row["vote"]:
            self.ballots[row["id"]].append(row["probability"])
        else:
            self.exact[row["id"]] = row["probability"]

    def keep(self, row: dict) -> None:
        with self.lock:
            self.learn(row)
            try:
                append_line(self.cache, row)
            except OSError as error:
                raise JudgeError(f"judge llm: {error}") from error

    def read_cache(self) -> None:
        """Learn what the file has. ValueError names a line that is none of ours."""
        with open(self.cache, "a+b") as file:  # appends: a file that cannot be written is said now
            file.seek(0)
            line = b"\n"
            for number, line in enumerate(file, 1):
                try:
                    self.learn(json.loads(line))
                except (ValueError, LookupError, TypeError):
                    # A kill may have left the beginning of a line: that reply is missing.
                    if not START.startswith(line[: len(START)].rstrip(b"\n")):
                        where = f"{self.cache}, line {number}"
                        raise ValueError(f"{where}: not from a cache of the llm judge") from None
            if not line.endswith(b"\n"):
                file.write(b"\n")

    def count(self, **numbers: int) -> None:
        with self.lock:
            self.counts.update(numbers)

    def report(self) -> None:
        """At the end of the program: calls and tokens, if there were any."""
        n = self.counts
        if n["calls"]:
            text = "{calls} calls, {repeated} of them repeated, {cached} answers from the cache, "
            text += "{tokens_in} + {tokens_out} tokens, {ties} ties for want of an answer"
            print(f"llm judge {self.model}:", text.format_map(n), file=sys.stderr)
