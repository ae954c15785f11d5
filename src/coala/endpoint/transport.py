"""One POST to a chat server that is not trusted: bounded in bytes and time, no redirects, nothing compressed.

On `aiohttp`, imported at the first request; proxies are those of the environment. Knows nothing of what is sent.
"""

from __future__ import annotations

import asyncio
import base64
import ipaddress
import re
import ssl
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from coala.values import CoalaError

if TYPE_CHECKING:
    import aiohttp

LARGEST = 16 * 2**20  # bytes of one answer
IDLE = 4.0  # seconds after which a connection is not used again: servers close theirs after five


@dataclass(frozen=True)
class Answer:
    """Status, headers (names in lower case) and body."""

    status: int
    headers: Mapping[str, str]
    body: bytes


class Unanswered(Exception):
    """No whole answer came back; ``sent`` says whether the request may have been carried out all the same.

    ``kind`` is "timeout", "connection", or "not read": the answer was too large, or compressed.
    """

    def __init__(self, kind: str, reason: str, *, sent: bool = True) -> None:
        super().__init__(reason)
        self.kind, self.sent = kind, sent


@dataclass(frozen=True)
class Server:
    """Where chat requests go, by which proxy (None: by none), and the headers sent along."""

    url: str
    headers: Mapping[str, str]
    proxy: str | None = None

    @classmethod
    def of(cls, base_url: str, key: str = "", headers: Mapping[str, str] | None = None) -> Server:
        """A name and password in ``base_url`` are sent where there is no ``key``; ``headers`` are sent besides.

        Raises :class:`CoalaError` for a URL that leads nowhere, or through a proxy that cannot be used.
        """
        from yarl import URL

        try:
            url = URL(base_url)
            host = url.host if url.scheme in ("http", "https") and url.port and min(base_url) > " " else None
        except ValueError:
            host = None
        if not host:
            raise CoalaError(f"base_url {base_url!r} is not an address. Fix: write e.g. http://127.0.0.1:8000/v1.")
        sent = {"Content-Type": "application/json", "Accept": "application/json", "Accept-Encoding": "identity"}
        if key:
            sent["Authorization"] = f"Bearer {key}"
        elif url.user or url.password:
            named = f"{url.user or ''}:{url.password or ''}"
            sent["Authorization"] = f"Basic {base64.b64encode(named.encode()).decode()}"
        there = str(url.with_user(None).with_path(url.path.rstrip("/") + "/chat/completions", keep_query=True))
        return cls(there, {**sent, **(headers or {})}, _proxy(there, url.scheme, host))


def _proxy(url: str, scheme: str, host: str) -> str | None:
    """The environment's proxy (``HTTPS_PROXY``, ``ALL_PROXY``, ``NO_PROXY``); none on the way to this machine."""
    proxy = getproxies().get(scheme) or getproxies().get("all")
    if not proxy or is_loopback(url) or proxy_bypass(host):
        return None
    proxy = proxy if "://" in proxy else f"http://{proxy}"
    if not proxy.startswith(("http://", "https://")):
        raise CoalaError(
            f"The environment names the proxy {bare(proxy)} for {host}; expected one of http:// or https://. "
            f"Name such a one, or add {host} to NO_PROXY."
        )
    return proxy


def is_loopback(url: str) -> bool:
    """Whether a URL leads to this machine: localhost, 127.0.0.0/8 or ::1."""
    host = (urlsplit(url).hostname or "").removesuffix(".")
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def bare(url: str) -> str:
    """A URL without the name and password that it may hold."""
    return re.sub(r"(?<=://)[^/@\s]*@", "", url)


Post = Callable[[Server, bytes, float], Awaitable[Answer]]


class Connections:
    """Connections to any number of hosts, reused; ``close`` when done. For one event loop."""

    def __init__(self) -> None:
        self._session: aiohttp.ClientSession | None = None

    async def post(self, server: Server, body: bytes, timeout: float) -> Answer:
        """Send ``body`` and return the answer, whatever its status; raises :class:`Unanswered`."""
        import aiohttp

        self._session = self._session or _opened()
        sent: list[bool] = []
        begun = ""
        try:
            async with (
                asyncio.timeout(timeout),
                self._session.post(
                    server.url,
                    data=body,
                    headers=server.headers,
                    proxy=server.proxy,
                    allow_redirects=False,
                    trace_request_ctx=sent,
                ) as response,
            ):
                begun = f": the answer was still coming after {timeout:g} s"
                content = await _content(response)
                return Answer(response.status, {k.lower(): v for k, v in response.headers.items()}, content)
        except TimeoutError:
            reason = f"no {'whole ' * bool(begun)}answer within {timeout:g} s{begun}"
            raise Unanswered("timeout", reason, sent=bool(sent)) from None
        except (aiohttp.ClientError, OSError, ValueError) as error:
            error = getattr(error, "os_error", error)
            raise Unanswered("connection", str(error) or type(error).__name__, sent=bool(sent)) from None

    async def close(self) -> None:
        if self._session:
            await self._session.close()


def _opened() -> aiohttp.ClientSession:
    import aiohttp
    import truststore

    async def sent(session: aiohttp.ClientSession, context: Any, about: Any) -> None:
        context.trace_request_ctx.append(True)

    trace = aiohttp.TraceConfig()
    trace.on_request_headers_sent.append(sent)
    context = truststore.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    return aiohttp.ClientSession(
        # How many are under way is the business of who asks, and whole answers are timed above.
        connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=IDLE, ssl=context),
        timeout=aiohttp.ClientTimeout(),
        cookie_jar=aiohttp.DummyCookieJar(),
        auto_decompress=False,
        trace_configs=[trace],
    )


async def _content(response: aiohttp.ClientResponse) -> bytes:
    codings = {response.headers.get(name, "").strip().lower() for name in ("Content-Encoding", "Transfer-Encoding")}
    if codings := codings - {"", "identity", "chunked"}:
        # What is not compressed cannot unpack into more than was sent.
        raise Unanswered("not read", f"the answer is compressed ({min(codings)[:20]}) although that was not asked for")
    content = bytearray()
    # A length is a promise; what comes is counted all the same.
    too_large = (response.content_length or 0) > LARGEST
    while not too_large and (part := await response.content.readany()):
        content += part
        too_large = len(content) > LARGEST
    if too_large:
        raise Unanswered("not read", f"the answer has over {LARGEST >> 20} MiB")
    return bytes(content)
