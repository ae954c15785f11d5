"""An HTTP client for an endpoint that is not trusted: bounded in bytes and time, no redirects, nothing compressed.

Built on whichever HTTP library the `openai` client brings; knows nothing of chat.
"""

from __future__ import annotations

import importlib
import threading
import time
from collections.abc import Iterator
from typing import Any

LARGEST = 16 * 2**20  # bytes of one answer
# What is not compressed cannot unpack into more than was sent.
HEADERS = {"Accept-Encoding": "identity"}


class Unbounded(Exception):
    """An answer that is not read to its end; ``is_late`` if time ran out, else it was too large or compressed."""

    def __init__(self, reason: str, *, is_late: bool = False) -> None:
        super().__init__(reason)
        self.is_late = is_late


class Clock:
    """When the request of this thread has to be answered."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._here = threading.local()

    def start(self) -> None:
        self._here.until = time.monotonic() + self.seconds

    def check(self) -> None:
        if time.monotonic() > getattr(self._here, "until", float("inf")):
            raise Unbounded(f"the answer was still coming after {self.seconds:g} s", is_late=True)


def bounded_client(openai: Any, clock: Clock) -> Any:
    """A client for ``openai.OpenAI(http_client=...)`` whose answers are bounded; it raises :class:`Unbounded`."""

    def on_response(response: Any) -> None:
        coding = response.headers.get("content-encoding", "identity").strip().lower()
        if coding not in ("", "identity"):
            raise Unbounded(f"the answer is compressed ({coding[:20]}) although that was not asked for")
        # A length is a promise; what comes is counted all the same.
        length = response.headers.get("content-length", "")
        if length.isdecimal() and (len(length) > 15 or int(length) > LARGEST):
            raise Unbounded(f"the answer has over {LARGEST >> 20} MiB")
        base = importlib.import_module(type(response).__module__.partition(".")[0]).SyncByteStream

        class Counted(base):  # type: ignore[misc, valid-type]
            def __init__(self, stream: Any) -> None:
                self._stream = stream

            def __iter__(self) -> Iterator[bytes]:
                left = LARGEST
                for chunk in self._stream:
                    clock.check()
                    left -= len(chunk)
                    if left < 0:
                        raise Unbounded(f"the answer has over {LARGEST >> 20} MiB")
                    yield chunk

            def close(self) -> None:
                self._stream.close()

        response.stream = Counted(response.stream)

    return openai.DefaultHttpxClient(
        follow_redirects=False, timeout=clock.seconds, event_hooks={"request": [], "response": [on_response]}
    )
