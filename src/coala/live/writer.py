"""The two threads behind a session: one owns the model and draws replies ahead, one thinks about what was clicked.

What fails is told in a sentence and tried again later; a click never waits for either.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import monotonic
from typing import TYPE_CHECKING, Protocol

import numpy as np

from coala.live.journal import LivePrompt
from coala.live.pool import Float32
from coala.live.session import Draw, Read, Session
from coala.messages import CoalaError
from coala.values import ConvexHead, FeatureSpec, Pair

if TYPE_CHECKING:
    from coala.backbone import LanguageModel

log = logging.getLogger("coala.live")
REMEMBERED = 20  # pieces of work by which the next are timed
AGAIN = 10.0  # seconds after which what failed is tried again


class _Ended(Exception):
    """The session has ended in the middle of a reply."""


class Model(Protocol):
    """What draws replies and reads texts."""

    @property
    def spec(self) -> FeatureSpec: ...

    def write(
        self, draws: Sequence[tuple[LivePrompt, int]], head: ConvexHead | None, on_token: Callable[[], None]
    ) -> list[tuple[str, str]]:
        """A reply for each prompt and number, with the policy it was drawn from: guided, for odd numbers, by a head.

        What ``on_token``, called now and then, raises ends it.
        """

    def features(self, texts: Sequence[tuple[LivePrompt, str]]) -> list[Float32]:
        """The feature vector (d,) of each text as a reply to its prompt."""


@dataclass(frozen=True)
class Backbone:
    """A language model as a session uses it."""

    backbone: LanguageModel
    spec: FeatureSpec
    max_new_tokens: int
    temperature: float
    seed: int

    def write(
        self, draws: Sequence[tuple[LivePrompt, int]], head: ConvexHead | None, on_token: Callable[[], None]
    ) -> list[tuple[str, str]]:
        from coala.decoding import Guidance, generate

        texts: dict[int, tuple[str, str]] = {}
        for guided in (False, True):
            places = [i for i, (_, number) in enumerate(draws) if (head is not None and number % 2 == 1) == guided]
            if not places:
                continue
            made = generate(
                [draws[i][0].turns for i in places],
                self.backbone,
                head if guided else None,
                Guidance() if guided else Guidance.unguided(),
                max_new_tokens=self.max_new_tokens,
                temperature=self.temperature,
                seed=self.seed,
                prompt_ids=[f"{draws[i][0].id}-{draws[i][1]}" for i in places],
                on_token=lambda *_: on_token(),
            )
            policy = "guided" if guided else "unguided"
            texts |= {i: (one.text, policy) for i, one in zip(places, made, strict=True)}
        return [texts[i] for i in range(len(draws))]

    def features(self, texts: Sequence[tuple[LivePrompt, str]]) -> list[Float32]:
        from coala.features import extract

        pairs = [Pair(prompt.turns, text, text, prompt.id) for prompt, text in texts]
        return list(extract(pairs, self.backbone, self.spec).chosen)


def carry_out(work: Draw | Read, session: Session, model: Model, on_token: Callable[[], None]) -> None:
    """Do what the session wants of its model, and bring it back."""
    if isinstance(work, Read):
        session.read(work, model.features(work.texts))
        return
    written = model.write(work.prompts, session.current_head(model.spec), on_token)
    # No pair can hold a reply without a word, or a character that no file of texts has.
    places = [i for i, (text, _) in enumerate(written) if text.strip() and "\0" not in text]
    read = model.features([(work.prompts[i][0], written[i][0]) for i in places]) if places else []
    features: list[Float32 | None] = [None] * len(written)
    for i, feature in zip(places, read, strict=True):
        features[i] = np.asarray(feature)
    session.drawn(work, [text for text, _ in written], [policy for _, policy in written], features)


class Threads:
    """Runs both for as long as the session is open. ``trouble`` says what keeps replies from coming, if anything."""

    def __init__(self, session: Session, model: Model, clock: Callable[[], float] = monotonic) -> None:
        self.trouble = ""
        self._session, self._model, self._clock = session, model, clock
        self._paces: deque[tuple[int, float]] = deque(maxlen=REMEMBERED)
        self._began: float | None = None
        self._size = 0
        self._threads = [
            threading.Thread(target=work, name=f"coala-live-{name}", daemon=True)
            for name, work in (("model", self._write), ("thinking", self._think))
        ]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def join(self) -> None:
        """Wait for both to end, which they do soon after the session's end."""
        for thread in self._threads:
            thread.join()

    @property
    def seconds_each(self) -> float | None:
        """Seconds that a reply took of late; None before the first."""
        replies = sum(count for count, _ in self._paces)
        return sum(seconds for _, seconds in self._paces) / replies if replies else None

    @property
    def wait(self) -> tuple[float, float | None] | None:
        """Seconds for which replies are being drawn now, and those that are likely to be left, if that is known.

        Below 0 where it takes longer than it did. None while nothing is drawn.
        """
        began, each = self._began, self.seconds_each
        if began is None:
            return None
        so_far = self._clock() - began
        return so_far, None if each is None else each * self._size - so_far

    def _write(self) -> None:
        session = self._session
        while not session.ended:
            seen = session.changes
            work = session.work()
            if work is None:
                session.await_change(seen)
                continue
            try:
                self._do(work)
                self.trouble = ""
            except _Ended:
                return
            except Exception as error:
                if not isinstance(error, CoalaError):
                    log.exception("replies could not be drawn")
                self.trouble = str(error) if isinstance(error, CoalaError) else f"{type(error).__name__}: {error}"
                self._began = None
                session.pause(AGAIN)

    def _do(self, work: Draw | Read) -> None:
        if isinstance(work, Draw):
            self._size, self._began = len(work.prompts), self._clock()
        carry_out(work, self._session, self._model, self._go_on)
        if self._began is not None:
            self._paces.append((self._size, self._clock() - self._began))
            self._began = None

    def _go_on(self) -> None:
        if self._session.ended:
            raise _Ended

    def _think(self) -> None:
        session = self._session
        while not session.ended:
            seen = session.changes
            if not session.think():
                session.await_change(seen)
