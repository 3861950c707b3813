"""A language model as judge: it reads both responses, in an order that it cannot guess, and names the better one."""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from rich.console import Console

from qstar_jax.console import say, track
from qstar_jax.errors import InputError
from qstar_jax.evaluation.judges.base import Comparison, Verdict
from qstar_jax.evaluation.judges.chat import ChatServer
from qstar_jax.evaluation.judges.cost import Budget, Estimate, estimate_tokens
from qstar_jax.evaluation.judges.prompts import Template
from qstar_jax.evaluation.judges.replies import Messages, Reply, ReplyCache, reply_key

Ask = Callable[[Messages], Awaitable[Reply]]


@dataclass(frozen=True)
class Question:
    """A comparison in one order: `answer`, the response that is judged, is shown under the letter `answer_is`."""

    prompt: str
    answer: str
    baseline: str
    answer_is: str


@dataclass(frozen=True)
class Talk:
    """The state of a question.

    Args:
        messages: The conversation that the next call would send.
        attempt: Calls made so far.
        letter: The decision; None if there is none yet.
        text: The last reply.
        over: Whether no further call is made.
    """

    messages: Messages
    attempt: int
    letter: str | None
    text: str
    over: bool


class LlmJudge:
    """Asks a model and keeps its replies on disk; a reply without a decision is never counted as a tie.

    The order of the two responses is a pure function of the seed and the texts, so that the same comparison meets the
    same kept reply in any run. Equal responses tie without a call, and each distinct comparison is asked for once.

    Args:
        server: The model.
        template: The question.
        cache: Folder of kept replies; None keeps them in memory only.
        seed: Seed for the orders.
        both_orders: Ask in both orders; where the letters disagree on the response, it is a tie.
        retries: Further calls for a reply that names no letter; each names the fault of the one before.
        concurrency: Calls in flight at once.
        budget: Prices and the limit.
        console: Where to show the estimate before calls are made, progress, and undecided comparisons; None: nowhere.

    Raises:
        InputError: If a number is out of range.
    """

    def __init__(
        self,
        server: ChatServer,
        template: Template,
        *,
        cache: Path | None = None,
        seed: int = 0,
        both_orders: bool = False,
        retries: int = 2,
        concurrency: int = 8,
        budget: Budget | None = None,
        console: Console | None = None,
    ):
        if retries < 0 or concurrency < 1:
            raise InputError(
                f"judge.retries {retries} is at least 0, and judge.concurrency {concurrency} is at least 1 call at once"
            )
        self.name = f"llm {server.model} ({template.name})"
        self.server, self.template, self.replies = server, template, ReplyCache(cache)
        self.seed, self.both_orders, self.retries, self.concurrency = seed, both_orders, retries, concurrency
        self.budget, self._console = budget or Budget(), console
        self._address, self._parameters = server.address, server.parameters

    def __call__(self, comparisons: Sequence[Comparison]) -> list[Verdict]:
        """See `base.Judge`.

        Raises:
            InputError: If the server cannot be used, or it would cost too much.
            RuntimeError: If the server fails; replies that came before are kept.
        """
        estimate = self.estimate(comparisons)
        say(self._console, f"{self.name}: {estimate}")
        self.budget.check(estimate)
        if estimate.calls:
            questions = [question for question in self._questions(comparisons) if not self._talk(question).over]
            _run(self._answer_all(questions))
        verdicts = [self._verdict(comparison) for comparison in comparisons]
        if undecided := sum(verdict.win is None for verdict in verdicts):
            counts = f"{undecided} of {len(verdicts)} comparisons undecided"
            say(self._console, f"{self.name}: {counts}, as its replies name no letter")
        return verdicts

    def estimate(self, comparisons: Sequence[Comparison]) -> Estimate:
        """Estimates the cost of judging; makes no call."""
        talks = [self._talk(question) for question in self._questions(comparisons)]
        ahead = [talk.messages for talk in talks if not talk.over]
        tokens = sum(map(estimate_tokens, ahead)), len(ahead) * self.server.max_tokens
        dollars = self.budget.dollars(*tokens)
        return Estimate(len(ahead), len(talks) - len(ahead), *tokens, dollars, self.retries)

    def _questions(self, comparisons: Iterable[Comparison]) -> list[Question]:
        """All questions; equal texts are one question, whichever comparison they come from."""
        questions = [question for c in comparisons if not _same(c) for question in self._orders(c)]
        return list({self._render(question): question for question in questions}.values())

    def _orders(self, c: Comparison) -> list[Question]:
        texts = [text.strip() for text in (c.prompt, c.answer, c.baseline)]
        drawn = sha256("\0".join([str(self.seed), *texts]).encode()).digest()[0] % 2
        return [Question(*texts, letter) for letter in ("AB" if self.both_orders else "AB"[drawn])]

    def _render(self, question: Question) -> str:
        shown = (question.answer, question.baseline)
        return self.template.render(question.prompt, *(shown if question.answer_is == "A" else shown[::-1]))

    def _talk(self, question: Question) -> Talk:
        """Follows the kept replies as far as they go."""
        messages, text = [{"role": "user", "content": self._render(question)}], ""
        for attempt in range(self.retries + 1):
            reply = self.replies.get(self._key(messages, attempt))
            if reply is None:
                return Talk(messages, attempt, None, text, over=False)
            text = reply.text
            letter = self.template.parse(text)
            if letter or attempt == self.retries:
                return Talk(messages, attempt + 1, letter, text, over=True)
            again = [("assistant", text.strip() or "(no reply)"), ("user", self.template.reminder)]
            messages = messages + [{"role": role, "content": content} for role, content in again]
        raise AssertionError("the last try is the end")

    def _key(self, messages: Messages, attempt: int) -> str:
        return reply_key(self.server.model, self._address, messages, self._parameters, attempt)

    async def _answer_all(self, questions: list[Question]):
        semaphore, broken = asyncio.Semaphore(self.concurrency), asyncio.Event()

        async def answer(question: Question, ask: Ask):
            async with semaphore:
                try:
                    while not broken.is_set() and not (talk := self._talk(question)).over:
                        await self._call(talk, ask)
                except Exception:
                    broken.set()  # no further call begins; those in flight are paid for, so they are awaited
                    raise

        with self.replies:
            async with self.server.connect() as ask:
                tasks = [asyncio.create_task(answer(question, ask)) for question in questions]
                for finished in track(self._console, asyncio.as_completed(tasks), "judging", len(tasks)):
                    with contextlib.suppress(Exception):
                        await finished
        for task in tasks:
            task.result()  # raises the first error

    async def _call(self, talk: Talk, ask: Ask):
        reserved, reply = self.budget.reserve(estimate_tokens(talk.messages), self.server.max_tokens), None
        try:
            reply = await ask(talk.messages)
            self.replies.put(self._key(talk.messages, talk.attempt), reply, self.server.model)
        finally:
            self.budget.settle(reserved, reply)

    def _verdict(self, comparison: Comparison) -> Verdict:
        if _same(comparison):
            return Verdict(0.5, note="identical answers, not asked")
        talks = [(question.answer_is, self._talk(question)) for question in self._orders(comparison)]
        note = "; ".join(
            f"answer shown as {letter}, reply {talk.attempt}: {talk.text.strip()!r}"
            + ("" if talk.letter else " (undecided: names no letter)")
            for letter, talk in talks
        )
        if any(talk.letter is None for _, talk in talks):
            return Verdict(None, note=note)
        return Verdict(sum(talk.letter == letter for letter, talk in talks) / len(talks), note=note)


def _same(comparison: Comparison) -> bool:
    return comparison.answer.strip() == comparison.baseline.strip()


def _run(coroutine: Awaitable[None]):
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        run = asyncio.run
    else:  # in a notebook, which runs its own loop
        run = lambda coroutine: ThreadPoolExecutor(1).submit(asyncio.run, coroutine).result()  # noqa: E731
    run(coroutine)
