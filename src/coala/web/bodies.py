"""A request's body, bounded in size and time, and handed over once more to whoever reads it next."""

from __future__ import annotations

import asyncio

from starlette.datastructures import Headers
from starlette.types import Message, Receive

# A body that is too large is read up to so many times the limit: a connection that is closed on unread data is reset,
# and the client never sees why.
PATIENCE = 8


class TooLarge(Exception):
    """The body has more bytes than are taken."""


class TooSlow(Exception):
    """The body was not whole in time."""


async def whole_body(headers: Headers, receive: Receive, *, most: int, seconds: float) -> bytes | None:
    """The whole body, at most ``most`` bytes in ``seconds``; ``None`` if the client has gone.

    Raises :class:`TooLarge` or :class:`TooSlow`. Counted as it comes: a declared length may be absent or wrong.
    """
    declared = headers.get("content-length", "0")
    large = declared.isdigit() and int(declared[:18]) > most
    # A client that asks before it sends need not send.
    if large and headers.get("expect", "").lower() == "100-continue":
        raise TooLarge
    parts: list[bytes] = []
    size = 0
    try:
        async with asyncio.timeout(seconds):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    return None
                part = message.get("body", b"")
                size += len(part)
                if size <= most and not large:
                    parts.append(part)
                if not message.get("more_body", False) or size > PATIENCE * most:
                    break
    except TimeoutError:
        raise TooSlow from None
    if large or size > most:
        raise TooLarge
    return b"".join(parts)


def replay(body: bytes, receive: Receive) -> Receive:
    """A receive that hands the body over once more, then tells what the connection tells."""
    told = False

    async def receiving() -> Message:
        nonlocal told
        if not told:
            told = True
            return {"type": "http.request", "body": body, "more_body": False}
        return await receive()

    return receiving
