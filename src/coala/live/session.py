"""One session: raters, questions and clicks, kept on disk before anything is told; the head that follows each of them.

    OUT/live/journal.jsonl   every event (:mod:`coala.live.journal`)
    OUT/live/replies.jsonl   replies drawn ahead, with their features

Safe to use from several threads; what takes long (drawing replies, choosing a ridge) is done by threads that take work
from here and bring it back, so that a click never waits for a model.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from coala.convex.questions import Outlook, outlook
from coala.live.journal import (
    Answered,
    Asked,
    LivePrompt,
    Side,
    Verdict,
    answered_event,
    asked_event,
    events_of,
    line,
    read_journal,
    tags_of,
)
from coala.live.learner import Learner, coordinates
from coala.live.pool import Float32, Pool, choose, reply_event, rows_to_come, set_aside, text_event
from coala.live.settings import LiveSettings
from coala.messages import CoalaError
from coala.store import LIVE
from coala.store.appending import append, appending, contents
from coala.values import ConvexHead, FeatureSpec, Turn, prompt_id

FOLDER = LIVE
JOURNAL, REPLIES = "journal.jsonl", "replies.jsonl"
SCALED_BY = 32  # replies whose features settle the coordinates; fewer where there are no more prompts
OWNER = "owner"


class Conflict(CoalaError):
    """What a rater asks for does not fit what has happened meanwhile."""


@dataclass(frozen=True)
class Draw:
    """Replies to be drawn: prompts with the numbers of their replies, in order."""

    prompts: tuple[tuple[LivePrompt, int], ...]


@dataclass(frozen=True)
class Read:
    """Texts whose features are missing: prompts and texts."""

    texts: tuple[tuple[LivePrompt, str], ...]


def _sound(text: str) -> str:
    """Without characters that no file of texts can hold."""
    return text.replace("\0", "").encode("utf-8", "replace").decode()


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


class Session:
    """Opened on a folder; continued where it was, after whatever end. Used as a context manager.

    ``identity`` is what features depend on: a session of another is refused.
    """

    def __init__(
        self, out: Path, settings: LiveSettings, identity: Mapping[str, Any], clock: Callable[[], str] = now
    ) -> None:
        self.settings, self.path = settings, Path(out) / FOLDER
        self.lock = threading.Condition()
        self.pool = Pool()
        self.learner: Learner | None = None
        self.outlook: Outlook | None = None
        self.outlook_of = -1
        self.ended = False
        self.changes = 0
        self._identity, self._clock = dict(identity), clock
        self._files = ExitStack()
        self._typed: set[str] = set()
        self._waiting: list[Answered] = []  # answers whose features are still to come

    def __enter__(self) -> Session:
        try:
            self._journal_file = self._files.enter_context(appending(self.path / JOURNAL))
            self._replies_file = self._files.enter_context(appending(self.path / REPLIES))
            self._open()
        except BaseException:
            self._files.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        with self.lock:
            self.ended = True
            self._tell()
        self._files.close()

    def _open(self) -> None:
        source = str(self.path / JOURNAL)
        self.journal = read_journal(contents(self._journal_file), source)
        os.ftruncate(self._journal_file, self.journal.size)
        if self.journal.identity is None:
            self._keep({"kind": "begun", "version": 1, "identity": self._identity})
        elif self.journal.identity != self._identity:
            kept, given = self.journal.identity, self._identity
            differing = [name for name in {*kept, *given} if kept.get(name) != given.get(name)]
            raise CoalaError(
                f"{self.path}: found a session of another {', '.join(sorted(differing))}, whose features are not those "
                "of this one. Fix: use the old settings, or another --out."
            )
        lines, size = events_of(contents(self._replies_file), str(self.path / REPLIES))
        os.ftruncate(self._replies_file, size)
        for _, event in lines:
            self.pool.apply(event)
        self._scale()
        self._waiting = list(self.journal.answered.values())
        self._teach()

    def _keep(self, *events: Mapping[str, Any]) -> None:
        """Put events on the disk, then take them in."""
        append(self._journal_file, b"".join(map(line, events)))
        for event in events:
            self.journal.apply(event)

    # --- prompts and raters ------------------------------------------------------------------------------------------

    def add_prompts(self, prompts: Sequence[tuple[Turn, ...]], *, typed: bool = False) -> list[str]:
        """Prompts that are not there yet join; ids of all of ``prompts``. Those ``typed`` in are answered first."""
        with self.lock:
            names, new = [], []
            known = set(self.journal.prompts)
            for turns in prompts:
                name = prompt_id(turns)
                names.append(name)
                if name in known:
                    continue
                known.add(name)
                aside = set_aside(len(known) - 1, self.settings.held_out, self.settings.seed)
                said = [[turn.role, _sound(turn.text)] for turn in turns]
                new.append({"kind": "prompt", "id": name, "turns": said, "aside": aside})
            if new:
                self._keep(*new)
                self._typed |= {str(event["id"]) for event in new} if typed else set()
                self._tell()
            return names

    def rater(self, name: str, make_token: Callable[[], str]) -> str:
        """The personal token of the rater of this name, made if there is none."""
        with self.lock:
            known = {who: token for token, who in self.journal.raters.items()}
            if name not in known:
                self._keep({"kind": "rater", "name": name, "token": (token := make_token())})
                return token
            return known[name]

    def name_of(self, token: str) -> str | None:
        with self.lock:
            return self.journal.raters.get(token)

    # --- questions and clicks ----------------------------------------------------------------------------------------

    def question(self, rater: str) -> Asked | None:
        """What this rater is asked now; None while nothing is ready. It is on the disk before it is returned."""
        with self.lock:
            if (found := self.journal.open_question(rater)) is not None:
                return found
            prompts, asked = list(self.journal.prompts.values()), list(self.journal.asked.values())
            following = choose(self.pool, prompts, asked, self.learner, self.settings, rater)
            if following is not None:
                self._keep(asked_event(following))
                self._tell()
            return following

    def answer(
        self,
        rater: str,
        question: str,
        click: str,
        verdict: Verdict,
        *,
        tags: Sequence[str] = (),
        side: Side = "",
        text: str = "",
    ) -> None:
        """Keep what ``rater`` said; of the same ``click`` twice one counts. Returns once it is on the disk.

        Raises:
            Conflict: for a question that is not theirs, or that they have answered by another click.
        """
        with self.lock:
            asked = self.journal.asked.get(question)
            if asked is None or asked.rater != rater:
                raise Conflict("This pair is assigned to another rater; the page shows yours.")
            if click in self.journal.clicks:
                return
            if question in self.journal.answered:
                raise Conflict("This pair was already answered, perhaps in another tab. Undo reverts that.")
            found = Answered(question, click, verdict, self._clock(), tags_of(tags), side, _sound(text))
            self._keep(answered_event(found))
            self._waiting.append(self.journal.answered[question])
            self._teach()
            self._tell()

    def undo(self, rater: str, question: str, click: str) -> None:
        """Take back what ``click`` said of ``question``; nothing happens where that was done already."""
        with self.lock:
            asked = self.journal.asked.get(question)
            if asked is None or asked.rater != rater:
                raise Conflict("This pair is not yours to undo.")
            answer = self.journal.answered.get(question)
            if answer is None or answer.click != click:
                return
            self._keep({"kind": "undone", "id": question, "click": click})
            self._waiting = [one for one in self._waiting if one.id != question]
            if self.learner is not None and question in self.learner:
                self.learner.forget(question)
            self._tell()

    def _teach(self) -> None:
        """Fit what has its features and is not held out."""
        if self.learner is None:
            return
        left, taught = [], []
        for answer in self._waiting:
            asked = self.journal.asked[answer.id]
            both = None if asked.held_out else self.journal.preferred(answer)
            if both is None:
                continue
            found = [self.pool.features.get((asked.prompt, text)) for text in both]
            if found[0] is None or found[1] is None:
                left.append(answer)
            else:
                taught.append((answer.id, answer.order, self.learner.row(found[0], found[1]), asked.prompt))
        self._waiting = left
        if taught:
            self.learner.teach_all(taught)

    # --- for those who do what takes long ----------------------------------------------------------------------------

    def work(self) -> Draw | Read | None:
        """What the model is to do next; None while there is nothing."""
        with self.lock:
            if (missing := self._missing()) or not self.journal.prompts:
                return Read(tuple(missing)) if missing else None
            prompts = list(self.journal.prompts.values())
            asked = list(self.journal.asked.values())
            ready = {aside: len(self.pool.ready(prompts, asked, aside=aside)) for aside in (False, True)}
            most = {False: self.settings.ahead, True: max(1, round(self.settings.ahead * self.settings.held_out))}
            written = {prompt.id: self.pool.written.get(prompt.id, 0) for prompt in prompts}
            first = {name for name in self._typed if written[name] < 2}
            wanting = [
                prompt
                for prompt in prompts
                if prompt.id in first
                or (written[prompt.id] < self.settings.replies and ready[prompt.aside] < most[prompt.aside])
            ]
            if not wanting:
                return None
            # What was typed in first, then prompts with the fewest replies, the oldest of them first.
            wanting.sort(key=lambda prompt: (prompt.id not in first, written[prompt.id]))
            several = self.settings.batch // 2 if ready[False] > 1 else 1
            drawn = []
            for prompt in wanting[:several]:
                count = written[prompt.id]
                drawn += [(prompt, count + k) for k in range(min(2, self.settings.replies - count))]
            return Draw(tuple(drawn))

    def _missing(self) -> list[tuple[LivePrompt, str]]:
        wanted = [
            (asked.prompt, text)
            for answer in self._waiting
            if not (asked := self.journal.asked[answer.id]).held_out
            for text in self.journal.preferred(answer) or ()
        ]
        return [
            (self.journal.prompts[one[0]], one[1]) for one in dict.fromkeys(wanted) if one not in self.pool.features
        ]

    def drawn(
        self, draw: Draw, texts: Sequence[str], policies: Sequence[str], features: Sequence[Float32 | None]
    ) -> None:
        """Replies that were drawn, and their features."""
        events = [
            reply_event(prompt.id, number, text, policy, feature)
            for (prompt, number), text, policy, feature in zip(draw.prompts, texts, policies, features, strict=True)
        ]
        self._deliver(events)

    def read(self, read: Read, features: Sequence[Float32]) -> None:
        """Features of texts that were missing."""
        pairs = zip(read.texts, features, strict=True)
        self._deliver([text_event(prompt.id, text, feature) for (prompt, text), feature in pairs])

    def _deliver(self, events: Sequence[Mapping[str, Any]]) -> None:
        with self.lock:
            if self.ended:
                return
            append(self._replies_file, b"".join(map(line, events)))
            for event in events:
                self.pool.apply(event)
            self._scale()
            self._teach()
            self._tell()

    @property
    def scaled_by(self) -> int:
        """How many replies settle the coordinates of features; no click is fitted before."""
        return max(2, min(SCALED_BY, 2 * len(self.journal.prompts)))

    def _scale(self) -> None:
        """Settle the coordinates once there are replies enough, for good."""
        if self.learner is not None:
            return
        drawn = list(self.pool.replies)
        if not self.journal.scaled:
            if not self.journal.prompts or len(drawn) < self.scaled_by:
                return
            self._keep({"kind": "scaled", "replies": drawn})
        known = [self.pool.replies[name].feature for name in self.journal.scaled if name in self.pool.replies]
        if len(known) < len(self.journal.scaled):
            raise CoalaError(
                f"{self.path / REPLIES}: lacks replies by which features are scaled; it was changed or cut. "
                "Fix: restore a backup, or use another --out."
            )
        self.learner = Learner(coordinates(np.stack(known)), self.settings.seed)

    def current_head(self, spec: FeatureSpec) -> ConvexHead | None:
        """The head that guides new replies; None where they are the model's own, or clicks are too few."""
        with self.lock:
            if self.settings.policy != "current" or self.learner is None or self.learner.ridge_of == 0:
                return None
            return self.learner.head(spec)

    def think(self) -> bool:
        """Choose the ridge, or look ahead, where that is due; whether anything was done. Clicks do not wait for it."""
        with self.lock:
            learner = self.learner
            if learner is None:
                return False
            keys = learner.due
            find = None if keys is None else learner.chooser(keys)
            n = len(learner)
            stale = n != self.outlook_of and (self.outlook is None or abs(n - self.outlook_of) >= max(1, n // 20))
        if find is not None and keys is not None:
            ridge = find()
            with self.lock:
                learner.adopt(keys, ridge)
            return True
        if not stale:
            return False
        with self.lock:
            rows = rows_to_come(self.pool, list(self.journal.prompts.values()), learner, self.settings.seed)
            hessian, weights = learner.program.hessian(), learner.program.weights
        found = outlook(hessian, weights, rows) if len(rows) else None
        with self.lock:
            self.outlook, self.outlook_of = found, n
        return True

    def pause(self, seconds: float) -> None:
        """Wait so long, or until the session ends."""
        with self.lock:
            self.lock.wait_for(lambda: self.ended, seconds)

    def _tell(self) -> None:
        self.changes += 1
        self.lock.notify_all()

    def await_change(self, seen: int, seconds: float | None = None) -> None:
        """Wait until something has happened since ``changes`` was ``seen``, or so many seconds."""
        with self.lock:
            if not self.ended and self.changes == seen:
                self.lock.wait(seconds)
