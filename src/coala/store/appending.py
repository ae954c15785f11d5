"""A file that is only ever appended to, by one process, each line on disk before it is acknowledged."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from coala.store.files import StoreError, to_json


@contextlib.contextmanager
def appending(path: Path) -> Iterator[int]:
    """A file open for appending, locked against a second run; made if there is none."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
    except OSError as error:
        raise StoreError(f"{path}: cannot be written ({error.strerror}). Choose another --out.") from None
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise StoreError(f"{path}: another run is writing there. Wait for it, or give another --out.") from None
        yield file
    finally:
        os.close(file)


def append_line(path: Path, value: Any) -> None:
    """One line of JSON more at the end of a file, which is made if there is none."""
    with appending(path) as file:
        os.write(file, f"{to_json(value)}\n".encode())


def contents(file: int) -> bytes:
    size = os.fstat(file).st_size
    parts, place = [], 0
    while place < size and (part := os.pread(file, min(2**26, size - place), place)):
        parts.append(part)
        place += len(part)
    return b"".join(parts)


def append(file: int, raw: bytes) -> None:
    """Append ``raw`` and return when it is on the disk; all of it or, with a StoreError, nothing."""
    size = os.fstat(file).st_size
    left = raw
    try:
        while left:
            left = left[os.write(file, left) :]
        os.fsync(file)
    except OSError as trouble:
        with contextlib.suppress(OSError):
            os.ftruncate(file, size)  # half a line would spoil the next
        raise StoreError(
            f"The journal could not be written ({trouble.strerror}). Fix: free some space, then rerun."
        ) from None


class Appender:
    """Appends lines and returns when they are on the disk; lines that wait for the disk at one time share its turn."""

    def __init__(self, file: int) -> None:
        self._file = file
        self._waiting: list[tuple[bytes, asyncio.Future[None]]] = []
        self._flushing: asyncio.Task[None] | None = None

    async def append(self, line: bytes) -> None:
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((line, done))
        if self._flushing is None or self._flushing.done():
            self._flushing = asyncio.create_task(self._flush())
        await done

    async def _flush(self) -> None:
        while self._waiting:
            batch, self._waiting = self._waiting, []
            error: Exception | None = None
            try:
                await asyncio.to_thread(append, self._file, b"".join(line for line, _ in batch))
            except StoreError as trouble:
                error = trouble
            for _, done in batch:
                if done.cancelled():
                    continue
                if error is None:
                    done.set_result(None)
                else:
                    done.set_exception(error)
