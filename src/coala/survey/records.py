"""Raters and their answers in one SQLite file; what a method returns was on disk before it returned.

Every change is one transaction with a full sync, so that a kill at any moment loses nothing that was acknowledged.
There is one row per rater and page: an answer sent twice is one answer, a changed one replaces the old, which is kept
aside. Positions are stored, not methods.
"""

from __future__ import annotations

import base64
import hmac
import json
import re
import secrets
import sqlite3
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from coala.survey.ballot import Item, ballot
from coala.survey.form import Survey
from coala.values import CoalaError

FILE = "answers.sqlite"
# How many changes have been acknowledged, beside the file that holds them: SQLite takes a log that is damaged or gone
# for one that ends earlier, without a word.
COUNT = "answers.count"
TOKEN = re.compile(r"[A-Za-z0-9_-]{22}")
# Bytes of a token: drawn, and made of them with a key of the file's own.
RANDOM, MARK = 10, 6
SCHEMA = """
CREATE TABLE IF NOT EXISTS about (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS raters (
    id INTEGER PRIMARY KEY, token TEXT UNIQUE NOT NULL, place INTEGER UNIQUE, ballot TEXT, entered TEXT,
    began REAL, withdrew REAL
);
CREATE TABLE IF NOT EXISTS views (
    rater INTEGER NOT NULL, page INTEGER NOT NULL, at REAL NOT NULL, PRIMARY KEY (rater, page)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS answers (
    rater INTEGER NOT NULL, page INTEGER NOT NULL, choice INTEGER NOT NULL, at REAL NOT NULL, changed REAL,
    PRIMARY KEY (rater, page)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS replaced (rater INTEGER, page INTEGER, choice INTEGER, at REAL);
"""


@dataclass(frozen=True)
class Rater:
    """One rater: the pages dealt, ``choices`` (page to position), and for each page the seconds until its answer."""

    id: int
    token: str
    pages: tuple[Item, ...]
    choices: Mapping[int, int]
    seconds: Mapping[int, float]
    entered: Mapping[str, str]
    began: bool
    withdrawn: bool

    @property
    def next_page(self) -> int | None:
        """The first page without an answer; ``None`` when all have one."""
        return next((page for page in range(len(self.pages)) if page not in self.choices), None)


class Records:
    """The answers to one survey; safe to use from several threads."""

    def __init__(self, folder: Path, survey: Survey) -> None:
        """Open ``answers.sqlite`` in ``folder``, or begin it. CoalaError if it is damaged or of another survey."""
        self._survey = survey
        self._lock = threading.RLock()
        self._count: BinaryIO | None = None
        path = Path(folder) / FILE
        # Read before the answers, which are never behind it.
        acknowledged = _count(Path(folder) / COUNT)
        try:
            # Autocommit mode: transactions begin and end where `_change` says, nowhere else.
            self._db = sqlite3.connect(path, timeout=30, isolation_level=None, check_same_thread=False)
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute("PRAGMA synchronous = FULL")
            self._db.execute("PRAGMA secure_delete = ON")  # who withdraws is gone from the file, too
            with self._change() as db:
                for statement in SCHEMA.split(";\n"):
                    db.execute(statement)
                db.execute("INSERT OR IGNORE INTO about VALUES ('survey', ?)", (survey.digest,))
                db.execute("INSERT OR IGNORE INTO about VALUES ('key', ?)", (secrets.token_hex(32),))
                db.execute("INSERT OR IGNORE INTO about VALUES ('changes', '0')")
            (changes,) = self._db.execute("SELECT value FROM about WHERE name = 'changes'").fetchone()
            (found,) = self._db.execute("SELECT value FROM about WHERE name = 'survey'").fetchone()
            (key,) = self._db.execute("SELECT value FROM about WHERE name = 'key'").fetchone()
            self._key = bytes.fromhex(key)
        except sqlite3.Error as error:
            raise CoalaError(
                f"{path}: cannot be used as the survey's answers ({error}). "
                "Fix: check that the file is writable; if it is damaged, restore a backup."
            ) from None
        if found != survey.digest:
            raise CoalaError(
                f"{path}: holds answers to another survey than the {len(survey.questions)} questions in this folder. "
                "Fix: restore the survey's file, or serve the other survey from another folder."
            )
        if int(changes) < acknowledged:
            raise CoalaError(
                f"{path}: holds {changes} changes, and {acknowledged} were acknowledged: answers are missing, for its "
                f"log ({FILE}-wal) was damaged or deleted. Fix: restore a backup; to continue without them delete "
                f"{COUNT}."
            )
        try:
            self._count = _opened(Path(folder) / COUNT)
        except OSError as error:
            raise CoalaError(f"{path.with_name(COUNT)}: cannot be written ({error.strerror}).") from None

    def close(self) -> None:
        with self._lock:
            self._db.close()
            if self._count is not None:
                self._count.close()

    def invite(self, n: int) -> list[str]:
        """``n`` new personal tokens, for raters who have not begun."""
        tokens = [new_token() for _ in range(n)]
        with self._change() as db:
            db.executemany("INSERT INTO raters (token) VALUES (?)", [(token,) for token in tokens])
        return tokens

    def open_token(self) -> str:
        """A token for whoever comes: 80 random bits and 48 by which :meth:`made` knows it. Nothing is kept of it."""
        drawn = secrets.token_bytes(RANDOM)
        return base64.urlsafe_b64encode(drawn + self._mark(drawn)).decode().rstrip("=")

    def made(self, token: str) -> bool:
        """Whether :meth:`open_token` made it, on these records, now or before."""
        if not TOKEN.fullmatch(token):
            return False
        found = base64.urlsafe_b64decode(token + "==")
        return hmac.compare_digest(found[RANDOM:], self._mark(found[:RANDOM]))

    def _mark(self, drawn: bytes) -> bytes:
        return hmac.digest(self._key, drawn, "sha256")[:MARK]

    def begin(self, token: str, entered: Mapping[str, str], *, invited_only: bool = False) -> bool:
        """Deal a ballot to the rater of ``token``; nothing changes for one who has begun. False: not invited.

        The place is the smallest that is free, so that one who withdraws makes no hole in the balance.
        """
        with self._change() as db:
            row = db.execute("SELECT id, began FROM raters WHERE token = ?", (token,)).fetchone()
            if row is None:
                if invited_only or not TOKEN.fullmatch(token):
                    return False
                number = db.execute("INSERT INTO raters (token) VALUES (?)", (token,)).lastrowid
            elif row[1] is not None:
                return True
            else:
                number = row[0]
            taken = {place for (place,) in db.execute("SELECT place FROM raters WHERE place IS NOT NULL")}
            place = next(i for i in range(len(taken) + 1) if i not in taken)
            # The ballot is kept, not made again: another version of NumPy may shuffle in another way.
            dealt = json.dumps([[item.kind, item.index, item.order] for item in ballot(self._survey, place)])
            db.execute(
                "UPDATE raters SET place = ?, ballot = ?, entered = ?, began = ? WHERE id = ?",
                (place, dealt, json.dumps(dict(entered)), time.time(), number),
            )
        return True

    def rater(self, token: str) -> Rater | None:
        """The rater of a token; ``None`` for a token that was never given."""
        with self._lock:
            row = self._db.execute("SELECT * FROM raters WHERE token = ?", (token,)).fetchone()
            return None if row is None else self._rater(row)

    def raters(self) -> list[Rater]:
        """All raters, invited ones who never began among them, as of one moment."""
        with self._change() as db:
            return [self._rater(row) for row in db.execute("SELECT * FROM raters ORDER BY id").fetchall()]

    def view(self, rater: Rater, page: int) -> None:
        """Note when a page was first shown."""
        with self._change() as db:
            db.execute("INSERT OR IGNORE INTO views VALUES (?, ?, ?)", (rater.id, page, time.time()))

    def answer(self, rater: Rater, page: int, choice: int) -> None:
        """Keep ``choice`` (a position) as the one answer of this rater to ``page``.

        Raises:
            LookupError: the page comes after one that has no answer yet, or the rater has withdrawn meanwhile.
        """
        with self._change() as db:
            now = time.time()
            gone = db.execute("SELECT withdrew FROM raters WHERE id = ?", (rater.id,)).fetchone()[0]
            (before,) = db.execute(
                "SELECT count(*) FROM answers WHERE rater = ? AND page < ?", (rater.id, page)
            ).fetchone()
            if gone is not None or before < page:
                raise LookupError(page)
            old = db.execute("SELECT choice FROM answers WHERE rater = ? AND page = ?", (rater.id, page)).fetchone()
            if old is None:
                db.execute("INSERT INTO answers VALUES (?, ?, ?, ?, NULL)", (rater.id, page, choice, now))
            elif old[0] != choice:
                db.execute("INSERT INTO replaced VALUES (?, ?, ?, ?)", (rater.id, page, old[0], now))
                db.execute(
                    "UPDATE answers SET choice = ?, changed = ? WHERE rater = ? AND page = ?",
                    (choice, now, rater.id, page),
                )

    def withdraw(self, rater: Rater) -> None:
        """Delete all that this rater entered; that somebody withdrew stays on record, and the token opens nothing."""
        with self._change() as db:
            for table in ("answers", "views", "replaced"):
                db.execute(f"DELETE FROM {table} WHERE rater = ?", (rater.id,))
            db.execute(
                "UPDATE raters SET place = NULL, ballot = NULL, entered = NULL, withdrew = ? WHERE id = ?",
                (time.time(), rater.id),
            )
        with self._lock:
            # What was deleted is still in the write-ahead log until that is folded into the file.
            self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()

    @property
    def n_answers(self) -> int:
        with self._lock:
            return int(self._db.execute("SELECT count(*) FROM answers").fetchone()[0])

    @property
    def n_changed(self) -> int:
        """How many times an answer was replaced by another."""
        with self._lock:
            return int(self._db.execute("SELECT count(*) FROM replaced").fetchone()[0])

    @contextmanager
    def _change(self) -> Iterator[sqlite3.Connection]:
        with self._lock:
            self._db.execute("BEGIN IMMEDIATE")
            before = self._db.total_changes
            try:
                yield self._db
                counting = self._count if self._db.total_changes > before else None
                if counting is not None:
                    self._db.execute("UPDATE about SET value = CAST(value AS INTEGER) + 1 WHERE name = 'changes'")
                    (count,) = self._db.execute("SELECT value FROM about WHERE name = 'changes'").fetchone()
                self._db.execute("COMMIT")
                if counting is not None:
                    counting.seek(0)
                    counting.write(f"{int(count):020d}\n".encode())
            except BaseException:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise

    def _rater(self, row: tuple[Any, ...]) -> Rater:
        number, token, _, dealt, entered, began, withdrew = row
        answered = self._db.execute(
            "SELECT a.page, a.choice, a.at - v.at FROM answers a LEFT JOIN views v USING (rater, page) "
            "WHERE a.rater = ?",
            (number,),
        ).fetchall()
        return Rater(
            id=number,
            token=token,
            pages=tuple(Item(kind, index, tuple(order)) for kind, index, order in json.loads(dealt or "[]")),
            choices={page: choice for page, choice, _ in answered},
            # A clock that was set back would give a negative time.
            seconds={page: max(0.0, spent) for page, _, spent in answered if spent is not None},
            entered=json.loads(entered or "{}"),
            began=began is not None,
            withdrawn=withdrew is not None,
        )


def new_token() -> str:
    """128 random bits as 22 characters that a link may hold."""
    return secrets.token_urlsafe(16)


def _opened(path: Path) -> BinaryIO:
    """A file to be written in place, at once; what is there stays."""
    path.touch()
    return path.open("r+b", buffering=0)


def _count(path: Path) -> int:
    """The number of changes acknowledged; 0 where nobody counted, or the count itself is damaged."""
    try:
        return int(path.read_bytes()[:20])
    except (OSError, ValueError):
        return 0
