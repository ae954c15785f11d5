"""Answers that were paid for, kept in one SQLite file: a key gives the text it was put with.

Made for kills and for company: every answer is committed on its own, in a write-ahead log that several threads and
processes share. SQLite takes a log that is damaged or gone for one that ends sooner; so the number of answers is kept
beside the file too, and what is missing is told. Knows nothing of what keys and answers mean.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

from coala.values import CoalaError

_MARK = 0x434F414C  # SQLite's application id: "COAL"
_PATIENCE = 60.0  # seconds to wait for another process to finish its write


class VerdictCache:
    """Texts by key in the file ``path``, which is made if its folder exists; safe for threads and processes.

    ``damage`` says, in a sentence, that answers which were kept are gone; empty if none are. Raises
    :class:`CoalaError` for a file that is something else, damaged, or cannot be written.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self._lock = threading.Lock()
        if not self.path.parent.is_dir():
            raise CoalaError(f"{self.path.parent}: there is no such folder to keep verdicts in. Make it first.")
        was_there = self.path.exists()
        self._count: int | None = None  # the file beside, open
        try:
            # One connection behind a lock: a verdict takes seconds to buy and a millisecond to keep.
            self._connection = sqlite3.connect(
                self.path, timeout=_PATIENCE, isolation_level=None, check_same_thread=False
            )
        except sqlite3.Error as error:
            raise self._fault(error) from None
        try:
            self._prepare()
            self.damage = self._missing(was_there)
        except sqlite3.Error as error:
            self._connection.close()
            raise self._fault(error) from None
        except BaseException:
            self._connection.close()
            raise

    def get(self, key: str) -> str | None:
        """What was put under ``key``; None if nothing was."""
        rows = self._run("SELECT answer FROM verdicts WHERE key = ?", key)
        return str(rows[0][0]) if rows else None

    def put(self, key: str, answer: str) -> None:
        """Keep ``answer``; on return it is on disk. An earlier one under the same key is replaced."""
        self._run("INSERT OR REPLACE INTO verdicts (key, answer) VALUES (?, ?)", key, answer)
        # After the answer: a kill in between leaves a count that is too low, which is no damage.
        self._write_count(self._counted())

    def __bool__(self) -> bool:
        """An empty cache is one all the same: without this, `if cache` would tell it from a full one."""
        return True

    def __len__(self) -> int:
        return int(self._run("SELECT count(*) FROM verdicts")[0][0])

    def close(self) -> None:
        with self._lock:
            self._connection.close()
            if self._count is not None:
                os.close(self._count)
                self._count = None

    def __enter__(self) -> VerdictCache:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _prepare(self) -> None:
        mark = self._run("PRAGMA application_id")[0][0]
        tables = self._run("SELECT count(*) FROM sqlite_master")[0][0]
        if mark not in (0, _MARK) or (mark == 0 and tables):
            raise CoalaError(f"{self.path}: is a SQLite file but not a COALA verdict cache. Choose another file.")
        # Two processes that open a new file at once may refuse each other this one change whatever the timeout.
        until = time.monotonic() + _PATIENCE
        while True:
            try:
                self._connection.execute("PRAGMA journal_mode = WAL")
                break
            except sqlite3.OperationalError as error:
                if "locked" not in str(error) or time.monotonic() > until:
                    raise
                time.sleep(0.02)
        # FULL: in this mode a lost power supply costs no verdict either.
        self._connection.execute("PRAGMA synchronous = FULL")
        self._connection.execute("BEGIN IMMEDIATE")
        self._connection.execute(f"PRAGMA application_id = {_MARK}")
        self._connection.execute(
            "CREATE TABLE IF NOT EXISTS verdicts (key TEXT PRIMARY KEY, answer TEXT NOT NULL) WITHOUT ROWID"
        )
        # Counted in the same transaction as the answer, so that a lost part of the log takes the count back with it.
        self._connection.execute("CREATE TABLE IF NOT EXISTS puts (n INTEGER NOT NULL)")
        self._connection.execute("INSERT INTO puts SELECT count(*) FROM verdicts WHERE NOT EXISTS (SELECT 1 FROM puts)")
        self._connection.execute(
            "CREATE TRIGGER IF NOT EXISTS counted AFTER INSERT ON verdicts BEGIN UPDATE puts SET n = n + 1; END"
        )
        self._connection.execute("COMMIT")

    def _counted(self) -> int:
        """How often an answer was put, by the database."""
        return int(self._run("SELECT n FROM puts")[0][0])

    def _write_count(self, n: int) -> None:
        if self._count is not None:
            # Always of one length: a reader never finds half a number.
            os.pwrite(self._count, b"%020d\n" % n, 0)

    def _missing(self, was_there: bool) -> str:
        """What is said of answers that were put and are gone; said once."""
        # Whoever cannot write the count loses the check, not the answers.
        with contextlib.suppress(OSError):
            beside = self.path.with_name(f"{self.path.name}-count")
            self._count = os.open(beside, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        if self._count is None:
            return ""
        now, written = self._counted(), os.pread(self._count, 32, 0)
        before = int(written) if written.strip().isdigit() else 0
        if before <= now:
            return ""
        self._write_count(now)
        return (
            f"{self.path}: {before - now} of {before} answers that were kept here are gone: its write-ahead log "
            f"({self.path.name}-wal) was damaged or deleted, or the file is an older copy. They will be asked for "
            "again."
            if was_there
            else ""
        )

    def _run(self, statement: str, *values: str) -> list[Any]:
        try:
            with self._lock:
                return self._connection.execute(statement, values).fetchall()
        except sqlite3.Error as error:
            raise self._fault(error) from None

    def _fault(self, error: sqlite3.Error) -> CoalaError:
        said = str(error)
        if "full" in said:
            mend = "Free some space and run the same command again; paid verdicts are saved."
        elif "locked" in said:
            mend = "Another process locked it for a minute. Fix: rerun the same command."
        else:
            mend = "Fix: check that it is a writable file of verdicts, or name another."
        return CoalaError(f"{self.path}: the verdicts could not be saved or read ({said}). {mend}")


def open_cache(path: Path, on_note: Callable[[str], None]) -> VerdictCache:
    """The cache at ``path``, its folder made if need be; ``on_note`` is told if verdicts that were kept are lost."""
    path.parent.mkdir(parents=True, exist_ok=True)
    cache = VerdictCache(path)
    if cache.damage:
        on_note(f"warning: {cache.damage}")
    return cache
