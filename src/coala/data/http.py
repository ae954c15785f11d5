"""HTTP/1.1 POST over kept-open connections on asyncio streams: what a chat endpoint needs, at thousands a second.

The standard library alone; no proxies, no redirects. Knows nothing of what is sent.
"""

from __future__ import annotations

import asyncio
import ipaddress
import ssl
import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

from coala.data.agents import SynthesisError

MOST_INTERIM = 16  # answers of status 1xx before the one that counts
LARGEST = 16 * 2**20  # bytes of one answer
IDLE = 4.0  # seconds after which a connection is not used again: servers close theirs after five


class Unanswered(Exception):
    """No whole answer came back. ``sent`` says whether the request may have been carried out all the same."""

    def __init__(self, reason: str, *, sent: bool) -> None:
        super().__init__(reason)
        self.sent = sent


@dataclass(frozen=True)
class Answer:
    """Status, headers (names in lower case) and body."""

    status: int
    headers: Mapping[str, str]
    body: bytes


@dataclass(frozen=True)
class Address:
    """Where a URL leads; raises :class:`SynthesisError` for one that leads nowhere."""

    host: str
    port: int
    path: str
    is_tls: bool

    @classmethod
    def of(cls, url: str) -> Address:
        try:
            parts = urlsplit(url)
            host, port = parts.hostname or "", parts.port
        except ValueError as error:
            raise SynthesisError(
                f"base_url {url!r} is no address ({error}). Write e.g. http://127.0.0.1:8000/v1."
            ) from None
        path = parts.path or "/"
        sound = parts.scheme in ("http", "https") and host and (path + parts.query + host).isascii()
        if not sound or any(c <= " " for c in url):
            raise SynthesisError(f"base_url {url!r} is no address. Write e.g. http://127.0.0.1:8000/v1.")
        is_tls = parts.scheme == "https"
        query = f"?{parts.query}" if parts.query else ""
        return cls(host, port or (443 if is_tls else 80), path + query, is_tls)


def is_loopback(url: str) -> bool:
    """Whether a URL leads to this machine: localhost, 127.0.0.0/8 or ::1."""
    host = (urlsplit(url).hostname or "").removesuffix(".")
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class Connections:
    """Connections to any number of hosts, reused; ``close`` when done."""

    def __init__(self) -> None:
        self._idle: dict[Address, list[tuple[float, Connection]]] = defaultdict(list)
        self._context: ssl.SSLContext | None = None

    async def post(self, address: Address, headers: Mapping[str, str], body: bytes, timeout: float) -> Answer:
        """Send ``body`` and return the answer, whatever its status; raises :class:`Unanswered`."""
        connection: Connection | None = None
        sent = False
        try:
            async with asyncio.timeout(timeout):
                connection = self._reused(address) or await self._opened(address)
                sent = True
                answer, reusable = await _exchange(connection, address, headers, body)
        except TimeoutError:
            _drop(connection)
            raise Unanswered(f"no answer within {timeout:g} s", sent=sent) from None
        except (OSError, EOFError, ValueError, asyncio.LimitOverrunError) as error:
            _drop(connection)
            raise Unanswered(str(error) or type(error).__name__, sent=sent) from None
        except BaseException:
            _drop(connection)
            raise
        if reusable:
            self._idle[address].append((time.monotonic(), connection))
        else:
            _drop(connection)
        return answer

    async def close(self) -> None:
        for kept in self._idle.values():
            for _, connection in kept:
                _drop(connection)
        self._idle.clear()

    def _reused(self, address: Address) -> Connection | None:
        kept = self._idle[address]
        while kept:
            since, (reader, writer) = kept.pop()
            if time.monotonic() - since < IDLE and not reader.at_eof() and not writer.is_closing():
                return reader, writer
            _drop((reader, writer))
        return None

    async def _opened(self, address: Address) -> Connection:
        if address.is_tls and self._context is None:
            self._context = ssl.create_default_context()
        context = self._context if address.is_tls else None
        return await asyncio.open_connection(address.host, address.port, ssl=context, limit=2**20)


def _drop(connection: Connection | None) -> None:
    if connection:
        connection[1].close()


async def _exchange(
    connection: Connection, address: Address, headers: Mapping[str, str], body: bytes
) -> tuple[Answer, bool]:
    reader, writer = connection
    host = f"[{address.host}]" if ":" in address.host else address.host
    lines = [f"POST {address.path} HTTP/1.1", f"Host: {host}:{address.port}", f"Content-Length: {len(body)}"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    writer.write("\r\n".join([*lines, "", ""]).encode("latin-1") + body)
    await writer.drain()
    status, found = await _head(reader)
    interim = 0
    while 100 <= status < 200:
        interim += 1
        if interim > MOST_INTERIM:
            raise ValueError(f"over {MOST_INTERIM} answers of status 1xx")
        status, found = await _head(reader)
    coding = found.get("transfer-encoding", "").lower()
    reusable = found.get("connection", "").lower() != "close"
    # What is not compressed cannot unpack into more than was sent.
    if found.get("content-encoding", "identity").strip().lower() not in ("", "identity"):
        raise ValueError(f"a compressed answer ({found['content-encoding'][:40]!r}), which was not asked for")
    if status in (204, 304):
        return Answer(status, found, b""), reusable
    if coding == "chunked":
        return Answer(status, found, await _chunks(reader)), reusable
    if coding:
        raise ValueError(f"an answer coded as {coding[:40]!r}")
    if "content-length" in found:
        return Answer(status, found, await reader.readexactly(_size(found["content-length"], 10))), reusable
    content = await reader.read(LARGEST + 1)
    while len(content) <= LARGEST and (more := await reader.read(LARGEST + 1 - len(content))):
        content += more
    _size(str(len(content)), 10)
    return Answer(status, found, content), False


async def _head(reader: asyncio.StreamReader) -> tuple[int, dict[str, str]]:
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
    first, *rest = head.split("\r\n")
    words = first.split(" ", 2)
    if len(words) < 2 or not words[0].startswith("HTTP/1.") or not words[1].isdecimal():
        raise ValueError(f"not an HTTP/1.1 answer: {first[:60]!r}")
    found = {}
    for row in rest:
        name, colon, value = row.partition(":")
        if colon:
            found[name.strip().lower()] = value.strip()
    return int(words[1]), found


async def _chunks(reader: asyncio.StreamReader) -> bytes:
    content = bytearray()  # not a list: chunks may be of one byte each
    while size := _size((await reader.readuntil(b"\r\n")).decode("latin-1").split(";")[0].strip(), 16):
        _size(str(len(content) + size), 10)
        content += await reader.readexactly(size)
        await reader.readexactly(2)
    trailers = 0
    while (last := await reader.readuntil(b"\r\n")) != b"\r\n":
        trailers += len(last)
        _size(str(trailers), 10)
    return bytes(content)


def _size(written: str, base: int) -> int:
    if not written.isalnum() or not written.isascii():
        raise ValueError(f"a length of {written[:40]!r}")
    size = int(written, base)
    if size > LARGEST:
        raise ValueError(f"an answer of over {LARGEST >> 20} MiB")
    return size
