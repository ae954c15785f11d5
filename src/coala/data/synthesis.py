"""Conversations between two agents, many at a time: held, screened, recorded, and continued after any stop.

Talks through :class:`~coala.data.endpoint.Endpoint` and writes through a callback; knows nothing of files.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from coala.data.agents import ROLE_OF, Draw, Speaker, SynthesisError, SynthesisRecipe, draw, messages
from coala.data.endpoint import Endpoint, most
from coala.data.journal import VERSION, Journal, line, text_digest
from coala.data.reasoning import spoken
from coala.data.screening import cleaned, fault
from coala.endpoint import Ledger, OutOfBudget, Post, Usage

Record = Callable[[bytes], Awaitable[None]]
SPEAKERS: tuple[Speaker, Speaker] = ("student", "tutor")
MARGIN = 1.25  # a conversation is begun if this much more than the usual cost of one is left for each that is open


@dataclass(frozen=True)
class Summary:
    """How a run ended. ``stopped`` is empty, or says why it is not finished; counts are of the whole data set."""

    kept: int
    given_up: int
    wanted: int
    dropped: Mapping[str, int]
    spent: Usage
    requests: int
    retries: int
    seconds: float
    stopped: str = ""

    @property
    def dollars(self) -> float:
        return self.spent.nanodollars / 1e9


@dataclass(frozen=True)
class SynthesisProgress:
    """How far a run is: finished conversations of all, what they cost, and what all of them would."""

    done: int
    total: int
    spent: Usage
    expected: Usage | None

    def __str__(self) -> str:
        said = f"{self.spent.tokens:,} tokens, ${self.spent.nanodollars / 1e9:,.2f}"
        if self.expected is None:
            return said
        return f"{said}; all of it about {self.expected.tokens:,} tokens, ${self.expected.nanodollars / 1e9:,.2f}"


async def synthesize(
    recipe: SynthesisRecipe,
    journal: Journal,
    record: Record,
    *,
    keys: Mapping[str, str] | None = None,
    post: Post | None = None,
    on_progress: Callable[[SynthesisProgress], None] | None = None,
) -> Summary:
    """Hold the conversations of ``recipe`` that ``journal`` does not have yet.

    ``record`` makes one line durable before it returns; ``journal`` is kept up to date, except for the places of its
    lines. ``keys`` maps the agents' ``key`` to secrets. ``post`` replaces the network. Which utterances are asked for
    depends on the recipe and the index alone; of two equal conversations under way the first to finish stays.

    Raises :class:`SynthesisError` when the endpoint refuses or stays silent, or the journal is of another recipe;
    whatever was finished is recorded then.
    """
    _same_recipe(recipe, journal)
    run = _Run(recipe, journal, record, keys or {}, post, on_progress)
    try:
        return await run.all()
    finally:
        await run.endpoint.client.close()


def _same_recipe(recipe: SynthesisRecipe, journal: Journal) -> None:
    if journal.identity is None or journal.identity == recipe.identity:
        return
    before, now = dict(_flat(journal.identity)), dict(_flat(recipe.identity))
    differing = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    sides = "; ".join(f"{name} was {before.get(name)!r}, now {now.get(name)!r}" for name in differing[:3])
    raise SynthesisError(
        f"The conversations there use another recipe ({sides}{'; ...' if len(differing) > 3 else ''}). Give another "
        "--out, or the old recipe."
    )


def _flat(tree: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{above}{name}.")
        else:
            yield above + name, value


@dataclass
class _Attempt:
    """One attempt under way."""

    drawn: Draw
    said: list[str] = field(default_factory=list)
    models: dict[str, str] = field(default_factory=dict)
    usage: Usage = field(default_factory=Usage)

    def count(self, used: Usage) -> None:
        self.usage += used


class _Forecast:
    """What the utterance at each place of a conversation costs: a high guess, then the mean of what was seen.

    By place, since a request carries all that was said before it; and since short conversations finish first, a mean
    over finished ones would be too low.
    """

    def __init__(self, recipe: SynthesisRecipe) -> None:
        self.longest = max(recipe.lengths)
        drawn = replace(draw(recipe, 0), turns=self.longest)
        said: list[str] = []
        self.guess: list[Usage] = []
        for place in range(self.longest):
            agent = recipe.agent(SPEAKERS[place % 2])
            chat = messages(recipe, drawn, SPEAKERS[place % 2], said)
            self.guess.append(most(agent, chat, bytes_per_token=3))
            self.bound = most(agent, chat)
            said.append(" " * 4 * agent.max_tokens)
        self.seen = [(Usage(), 0)] * self.longest

    def count(self, place: int, before: Usage, after: Usage) -> None:
        total, n = self.seen[place]
        used = Usage(0, 0, after.tokens - before.tokens, after.nanodollars - before.nanodollars)
        self.seen[place] = (total + used, n + 1)

    def cost(self, start: int, end: int) -> Usage:
        """The utterances from place ``start`` up to ``end``."""
        total = Usage()
        for (seen, n), guess in zip(self.seen[start:end], self.guess[start:end], strict=True):
            total += Usage(0, 0, seen.tokens // n, seen.nanodollars // n) if n else guess
        return total


class _Run:
    def __init__(
        self,
        recipe: SynthesisRecipe,
        journal: Journal,
        record: Record,
        keys: Mapping[str, str],
        post: Post | None,
        on_progress: Callable[[SynthesisProgress], None] | None,
    ) -> None:
        self.recipe, self.journal, self.record = recipe, journal, record
        self.on_progress = on_progress
        limits = recipe.limits
        money = None if limits.dollars is None else int(limits.dollars * 1e9)
        self.lost = journal.lost()
        journal.spent += self.lost
        self.budget = Ledger((None, limits.tokens, money), journal.spent, self.lease)
        self.endpoint = Endpoint(recipe, self.budget, keys, post)
        self.open: list[_Attempt] = []
        self.forecast = _Forecast(recipe)
        self.failure: SynthesisError | None = None
        self.out_of_budget = False
        done = journal.kept.keys() | journal.given_up
        self.left = (k for k in range(recipe.conversations) if k not in done)

    async def all(self) -> Summary:
        began = time.monotonic()
        if self.journal.identity is None:
            identity = self.recipe.identity
            await self.record(line("begun", version=VERSION, identity=identity, prompts=self.recipe.prompts_digest))
            self.journal.identity = identity
        if self.lost.tokens or self.lost.nanodollars:
            await self.record(line("resumed", usage=asdict(self.lost)))
        workers = min(self.recipe.limits.concurrency, self.recipe.conversations)
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(workers):
                    group.create_task(self.work())
        except BaseExceptionGroup as several:
            # The journal could not be written, or a fault of ours: the first of them says what happened.
            raise several.exceptions[0] from None
        await self.record(line("ended"))
        self.journal.leased = None
        if self.failure:
            raise self.failure
        return Summary(
            kept=len(self.journal.kept),
            given_up=len(self.journal.given_up),
            wanted=self.recipe.conversations,
            dropped=dict(self.journal.dropped),
            spent=self.journal.spent,
            requests=self.endpoint.client.requests,
            retries=self.endpoint.client.retries,
            seconds=time.monotonic() - began,
            stopped="the budget is spent" if self.out_of_budget else "",
        )

    async def lease(self, tokens: int, nanodollars: int) -> None:
        await self.record(line("lease", tokens=tokens, nanodollars=nanodollars))

    async def work(self) -> None:
        """Take conversations until there are none, the budget is spent, or an endpoint fails."""
        while not self.failure and await self.affordable():
            index = next(self.left, None)
            if index is None:
                return
            try:
                await self.conversation(index)
            except SynthesisError as error:
                # The others finish what they have begun: it is paid for.
                self.failure = self.failure or error
            except OutOfBudget:
                self.out_of_budget = True

    async def affordable(self) -> bool:
        """Whether what is left finishes all that is open and one conversation more; waits for the open ones to tell."""
        if not self.budget.is_limited:
            return True
        while not self.out_of_budget and not self.failure:
            longest = self.forecast.longest
            ahead = self.forecast.cost(0, longest)
            for attempt in self.open:
                ahead += self.forecast.cost(len(attempt.said), attempt.drawn.turns)
            # Dropped attempts cost too: as often as so far.
            again = self.journal.spent.tokens / max(1, self.journal.spent_on_kept.tokens) if self.journal.kept else 1.0
            last = self.forecast.bound
            more = MARGIN * again
            if self.budget.covers(more * ahead.tokens + last.tokens, more * ahead.nanodollars + last.nanodollars):
                return True
            if not self.open:
                # The guess at a first conversation is a high one: there the budget itself decides.
                self.out_of_budget = bool(self.journal.kept)
                return not self.out_of_budget
            await asyncio.sleep(0.02)
        return False

    async def conversation(self, index: int) -> None:
        """Attempt conversation ``index`` until one is kept or it is given up."""
        for number in range(self.journal.attempts[index], self.recipe.limits.attempts):
            attempt = _Attempt(draw(self.recipe, index, number))
            self.open.append(attempt)
            try:
                reason = await self.held(attempt)
            except (OutOfBudget, SynthesisError) as error:
                why = "budget" if isinstance(error, OutOfBudget) else "endpoint"
                await self.drop(attempt, why, counts=False)
                raise
            finally:
                self.open.remove(attempt)
            if reason is None and await self.keep(attempt):
                return
            await self.drop(attempt, reason or "duplicate", counts=True)
        self.journal.given_up.add(index)
        await self.record(line("given up", index=index, usage=asdict(Usage())))
        self.progress()

    async def held(self, attempt: _Attempt) -> str | None:
        """Hold the conversation; the reason to drop it, if there is one."""
        drawn = attempt.drawn
        for place in range(drawn.turns):
            speaker = SPEAKERS[place % 2]
            agent = self.recipe.agent(speaker)
            chat = messages(self.recipe, drawn, speaker, attempt.said)
            seed = (drawn.seed + place) % 2**31 if self.recipe.send_seed else None
            before = attempt.usage
            reply = await self.endpoint.ask(agent, chat, drawn.temperature, seed, attempt.count)
            self.forecast.count(place, before, attempt.usage)
            said = spoken(reply.text)
            text = cleaned(said or "", speaker)
            # A thought without an end was cut, whatever the endpoint says of it.
            finish = "length" if said is None else "content_filter" if reply.refusal else reply.finish
            finish = "stop" if agent.keep_cut and finish == "length" else finish
            if reason := fault(text, finish, speaker, attempt.said):
                return f"{speaker}: {reason}"
            attempt.said.append(text)
            attempt.models[speaker] = reply.model or agent.model
            if place == 0 and self.recipe.distinct == "opening" and text_digest([text]) in self.journal.digests:
                return "duplicate"
        return None

    async def keep(self, attempt: _Attempt) -> bool:
        """Record a finished conversation, unless there is its equal."""
        said = attempt.said[:1] if self.recipe.distinct == "opening" else attempt.said
        digest = text_digest(said)
        if digest in self.journal.digests:
            return False
        index = attempt.drawn.index
        self.journal.digests[digest] = index
        held = _finished(self.recipe, attempt)
        await self.record(
            line("kept", index=index, digest=digest.hex(), usage=asdict(attempt.usage), conversation=held)
        )
        self.journal.kept[index] = (-1, -1)
        self.journal.spent += attempt.usage
        self.journal.spent_on_kept += attempt.usage
        self.progress()
        return True

    async def drop(self, attempt: _Attempt, reason: str, *, counts: bool) -> None:
        drawn = attempt.drawn
        self.journal.spent += attempt.usage
        self.journal.dropped[reason] += 1
        self.journal.attempts[drawn.index] += counts
        number = drawn.attempt if counts else None
        await self.record(
            line("dropped", index=drawn.index, attempt=number, reason=reason, usage=asdict(attempt.usage))
        )

    def progress(self) -> None:
        if self.on_progress is None:
            return
        done, total, spent = self.journal.finished, self.recipe.conversations, self.journal.spent
        expected = None
        if done:
            expected = Usage(spent.tokens * total // done, 0, 0, spent.nanodollars * total // done)
        self.on_progress(SynthesisProgress(done, total, spent, expected))


def _finished(recipe: SynthesisRecipe, attempt: _Attempt) -> dict[str, Any]:
    """A conversation as it is written: its turns, and where each of its words came from."""
    drawn = attempt.drawn
    name = f"{recipe.seed}-{drawn.index:06d}"
    return {
        "id": name,
        "group": name,
        "field": drawn.field,
        "mood": drawn.mood,
        "language": drawn.language,
        "turns": [{"role": ROLE_OF[SPEAKERS[k % 2]], "text": text} for k, text in enumerate(attempt.said)],
        "provenance": {
            "recipe_seed": recipe.seed,
            **{name: value for name, value in asdict(drawn).items() if name not in ("field", "mood", "language")},
            "asked": {speaker: recipe.agent(speaker).model for speaker in SPEAKERS},
            "answered": attempt.models,
            "prompts": recipe.prompts_digest,
            "usage": asdict(attempt.usage),
        },
    }
