"""A request's replies: from what is asked to tickets for the worker, and from its news to text, tokens and facts.

Knows the engine's interface and how a request can end early; nothing of how answers are worded.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Generator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from http import HTTPStatus
from typing import TYPE_CHECKING, Literal, TypeVar

from starlette.types import Receive

from coala.serve.detokenize import CONTEXT, UNFINISHED, Growing, PieceReader
from coala.serve.errors import Refusal, failure, too_busy, too_late
from coala.serve.prompts import Prompt, TooLong
from coala.serve.reading import TokenReader
from coala.serve.work import Began, Busy, Ended, Failed, News, Piece, Ticket
from coala.serve.worker import Worker
from coala.values import CoalaError, Generation

if TYPE_CHECKING:
    from coala.decoding import Engine, Guidance, Job, Rendered

T = TypeVar("T")


class Gone(Exception):
    """The client has hung up; nobody waits for an answer."""


@dataclass(frozen=True)
class Ask:
    """What is wanted: for each of ``prompts`` the best ``n`` of ``drawn`` replies.

    ``n_top`` is the number of alternatives to each token, ``None`` if log-probabilities are not wanted.
    """

    prompts: tuple[Prompt, ...]
    guidance: Guidance
    seed: int
    temperature: float
    stop: tuple[str, ...]
    max_tokens: int
    n: int
    drawn: int
    n_top: int | None


@dataclass(frozen=True)
class Other:
    """An alternative to a token: the text it would have added, its log-probability and its own bytes, if known."""

    text: str
    log_prob: float
    spelt: bytes | None


@dataclass(frozen=True)
class Told:
    """A token of a reply: its piece of text, log-probability, and the alternatives to it, likeliest first.

    A token that only begins a character has no text, but bytes; all bytes together are those of the text.
    """

    text: str
    log_prob: float
    alternatives: tuple[Other, ...]
    spelt: bytes = b""


@dataclass
class ReplyChoice:
    """One reply as it comes in. ``told`` are its tokens whose text is out, if they are wanted."""

    prompt: int
    text: str = ""
    told: list[Told] = field(default_factory=list)
    job: Job | None = None
    growing: Growing | None = None
    read: int = 0  # characters of the tokens told
    held: list[Told] = field(default_factory=list)  # tokens whose text is not out

    @property
    def generation(self) -> Generation:
        assert self.job is not None
        assert self.job.generation is not None
        return self.job.generation

    @property
    def finish(self) -> Literal["stop", "length"]:
        assert self.job is not None
        return "length" if self.job.finish == "length" else "stop"


class Answering:
    """One request's work while it is done: an async context, and leaving it cancels what is not done.

    Every wait ends when the client hangs up (:class:`Gone`), at the deadline or when something fails (``Refusal``).
    """

    def __init__(self, receive: Receive, deadline: float) -> None:
        self._receive, self._deadline = receive, deadline
        self._news: asyncio.Queue[tuple[int, News | Exception]] = asyncio.Queue()
        self._tickets: list[Ticket] = []
        self._kept = False

    async def __aenter__(self) -> Answering:
        loop = asyncio.get_running_loop()
        late = (-1, too_late(self._deadline))
        self._timer = loop.call_later(self._deadline, self._news.put_nowait, late)
        self._watch = loop.create_task(self._watching())
        return self

    def keep(self) -> None:
        """Let the context be left once without an end: who goes on (a stream) calls :meth:`close`."""
        self._kept = True

    async def __aexit__(self, *_: object) -> None:
        if not self._kept:
            self.close()

    def close(self) -> None:
        """End the waits, and cancel what is not done."""
        self._timer.cancel()
        self._watch.cancel()
        for ticket in self._tickets:
            ticket.cancel()

    async def _watching(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self._news.put_nowait((-1, Gone()))

    def take(self, tickets: Sequence[Callable[[Callable[[News], None]], Ticket]], to: Worker | TokenReader) -> None:
        """Queue work, once what was queued before is done; each of ``tickets`` makes one from whom to tell.

        Refused if there is too much already.
        """
        made = [make(partial(self._hear, number)) for number, make in enumerate(tickets)]
        try:
            to.take(made)
        except Busy as busy:
            raise too_busy(busy.retry_after) from None
        self._tickets = made

    async def done(self, chore: Generator[None, None, T], by: Worker | TokenReader) -> T:
        """What a chore comes to."""
        self.take([partial(Ticket, chore=chore)], by)
        while True:
            _, news = await self.next()
            if isinstance(news, Ended):
                result: T = news.result
                return result

    def _hear(self, number: int, news: News) -> None:
        self._news.put_nowait((number, news))

    async def next(self) -> tuple[int, Began | Piece | Ended]:
        """The next news and the number of the ticket it is of."""
        which, news = await self._news.get()
        if isinstance(news, Failed):
            if news.refused and isinstance(news.error, CoalaError):
                code = "context_length_exceeded" if isinstance(news.error, TooLong) else "invalid_value"
                raise Refusal(HTTPStatus.BAD_REQUEST, str(news.error), code=code)
            raise failure() from news.error
        if isinstance(news, Exception):
            raise news
        if isinstance(news, Ended) and news.result is None:
            raise failure()  # the worker has ended
        return which, news


class Replying:
    """An :class:`Ask` carried out: pieces as they come, and the choices once all are whole."""

    def __init__(
        self, ask: Ask, prompts: Sequence[Rendered], answering: Answering, worker: Worker, reader: PieceReader
    ) -> None:
        self.ask, self._answering, self._reader = ask, answering, reader
        self.choices = [ReplyChoice(prompt) for prompt in range(len(ask.prompts)) for _ in range(ask.drawn)]
        if ask.n_top is not None:
            for choice in self.choices:
                choice.growing = Growing(reader)
        tickets = []
        for number, choice in enumerate(self.choices):
            submit = partial(_submit, ask, prompts[choice.prompt], str(number))
            tickets.append(partial(Ticket, submit=submit, with_tokens=ask.n_top is not None))
        answering.take(tickets, worker)
        self._begun = 0

    async def begin(self) -> None:
        """Wait until the engine has taken every reply: what is not sound is refused before anything is sent."""
        self._early: list[tuple[int, Piece | Ended]] = []
        while self._begun < len(self.choices):
            which, news = await self._answering.next()
            if isinstance(news, Began):
                self._begun += 1
            else:
                self._early.append((which, news))

    async def grow(self) -> AsyncIterator[tuple[int, str, list[Told], bool]]:
        """The number of a choice, text and tokens it has grown by, and whether it is whole now; until all are."""
        left = len(self.choices)
        early = iter(self._early)
        while left:
            which, news = next(early, None) or await self._answering.next()
            choice = self.choices[which]
            if isinstance(news, Piece):
                choice.text += news.text
                yield which, news.text, [] if news.tokens is None else self._tell(choice, *news.tokens), False
            elif isinstance(news, Ended):
                left -= 1
                choice.job = news.result
                yield which, *self._finish(choice), True

    def _finish(self, choice: ReplyChoice) -> tuple[str, list[Told]]:
        """What the end of a reply adds: text that was held back to it, tokens whose text was not out."""
        job, text = choice.job, choice.generation.text
        assert job is not None
        # Pieces add up to the reply but for tokenizers that take text back; what was sent stands then.
        rest = text[len(choice.text) :] if text.startswith(choice.text) else ""
        choice.text += rest
        if choice.growing is None:
            return rest, []
        return rest, self._tell(choice, job.tokens, job.log_probs, job.alternatives, last=True)

    def _tell(
        self,
        choice: ReplyChoice,
        tokens: Sequence[int],
        log_probs: Sequence[float],
        alternatives: Sequence[Sequence[tuple[int, float]]],
        *,
        last: bool = False,
    ) -> list[Told]:
        """The tokens whose text is out; a stop string may yet take the others back."""
        growing, held = choice.growing, choice.held
        assert growing is not None
        for at in range(len(growing.tokens), len(tokens)):
            before = growing.tokens[-CONTEXT:]
            # A beam keeps no alternatives.
            top = alternatives[at][: self.ask.n_top] if at < len(alternatives) else ()
            others = tuple(self._other(token, log_prob, before) for token, log_prob in top)
            held.append(Told(growing.add(tokens[at]), log_probs[at], others))
        del held[max(len(tokens) - len(choice.told), 0) :]
        ready, read = 0, choice.read
        for place, one in enumerate(held, 1):
            read += len(one.text)
            # A token without text may begin what a later one completes.
            if one.text and read <= len(choice.text):
                ready, choice.read = place, read
        ready = len(held) if last else ready
        found, choice.held = held[:ready], held[ready:]
        if last and found:
            # What a token was to complete may have been taken back: its beginning is text then, such as it is.
            pieces = self._reader.pieces(tokens)[len(choice.told) :]
            found = [replace(one, text=piece) for one, piece in zip(found, pieces, strict=True)]
        ids = tokens[len(choice.told) : len(choice.told) + len(found)]
        spelt = self._reader.spelling.spelt(ids, [one.text for one in found], first=not choice.told)
        found = [replace(one, spelt=own) for one, own in zip(found, spelt, strict=True)]
        choice.told += found
        return found

    def _other(self, token: int, log_prob: float, before: Sequence[int]) -> Other:
        text, own = self._reader.alternative(token, before), self._reader.spelling.own(token)
        if own is None and UNFINISHED not in text:
            own = text.encode()
        return Other(text, log_prob, own)

    def best(self) -> list[ReplyChoice]:
        """The choices that are returned, for each prompt the best first if more were drawn."""
        found: list[ReplyChoice] = []
        for prompt in range(len(self.ask.prompts)):
            drawn = [choice for choice in self.choices if choice.prompt == prompt]
            if self.ask.drawn > self.ask.n:
                drawn.sort(key=lambda choice: -choice.generation.score)
            found += drawn[: self.ask.n]
        return found

    @property
    def usage(self) -> dict[str, int]:
        """Each prompt once; every reply that was drawn, returned or not."""
        firsts = [choice.job for choice in self.choices[:: self.ask.drawn]]
        prompts = sum(job.n_prompt_tokens for job in firsts if job is not None)
        replies = sum(choice.generation.n_tokens for choice in self.choices)
        return {"prompt_tokens": prompts, "completion_tokens": replies, "total_tokens": prompts + replies}


def _submit(ask: Ask, prompt: Rendered, name: str, engine: Engine, on_text: Callable[[str], None]) -> Job:
    """In the worker's thread: a reply ends where the context does."""
    from coala.decoding import Request

    return engine.submit(
        Request(
            prompt=(),
            guidance=ask.guidance,
            max_new_tokens=min(ask.max_tokens, engine.backbone.max_tokens - len(prompt.row)),
            seed=ask.seed,
            temperature=ask.temperature,
            stop=ask.stop,
            prompt_id=name,
            n_top=ask.n_top or 0,
            on_text=on_text,
            rendered=prompt,
        )
    )
