"""Answers that were paid for, kept in one SQLite file: a key gives the text it was put with.

Made for kills and for company: every answer is committed on its own, in a write-ahead log that several threads and
processes share. Knows nothing of what keys and answers mean.
"""

from __future__ import annotations

import sqlite3
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from coala.values import CoalaError

_MARK = 0x434F414C  # SQLite's application id: "COAL"
_PATIENCE = 60.0  # seconds to wait for another process to finish its write


class VerdictCache:
    """Texts by key in the file ``path``, which is made if its folder exists; safe for threads and processes.

    Raises :class:`CoalaError` for a file that is something else, damaged, or cannot be written.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self._lock = threading.Lock()
        if not self.path.parent.is_dir():
            raise CoalaError(f"{self.path.parent}: there is no such folder to keep verdicts in. Make it first.")
        try:
            # One connection behind a lock: a verdict takes seconds to buy and a millisecond to keep.
            self._connection = sqlite3.connect(
                self.path, timeout=_PATIENCE, isolation_level=None, check_same_thread=False
            )
        except sqlite3.Error as error:
            raise self._fault(error) from None
        try:
            self._prepare()
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

    def __bool__(self) -> bool:
        """An empty cache is one all the same: without this, `if cache` would tell it from a full one."""
        return True

    def __len__(self) -> int:
        return int(self._run("SELECT count(*) FROM verdicts")[0][0])

    def close(self) -> None:
        with self._lock:
            self._connection.close()

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
            raise CoalaError(f"{self.path}: is a database, but not one of verdicts. Name another file.")
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
        self._connection.execute("COMMIT")

    def _run(self, statement: str, *values: str) -> list[Any]:
        try:
            with self._lock:
                return self._connection.execute(statement, values).fetchall()
        except sqlite3.Error as error:
            raise self._fault(error) from None

    def _fault(self, error: sqlite3.Error) -> CoalaError:
        said = str(error)
        if "full" in said:
            mend = "Free some space and run the same command again; what was bought is kept."
        elif "locked" in said:
            mend = "Another process held it for a minute: run the same command again."
        else:
            mend = "Check that it is a file of verdicts that you may write, or name another."
        return CoalaError(f"{self.path}: the verdicts could not be kept or read ({said}). {mend}")
