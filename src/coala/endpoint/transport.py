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


class Unanswered(Exception):
    """No whole answer came back; ``sent`` says whether the request may have been carried out all the same.

    ``kind`` is "timeout", "connection", or "not read": the answer was too large, or compressed.
    """

    def __init__(self, kind: str, reason: str, *, sent: bool) -> None:
        super().__init__(reason)
        self.kind, self.sent = kind, sent


@dataclass(frozen=True)
class Answer:
    """Status, headers (names in lower case) and body."""

    status: int
    headers: Mapping[str, str]
    body: bytes


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
            raise CoalaError(f"base_url {base_url!r} is no address. Write e.g. http://127.0.0.1:8000/v1.")
        sent = {"Content-Type": "application/json", "Accept": "application/json", "Accept-Encoding": "identity"}
        if key:
            sent["Authorization"] = f"Bearer {key}"
        elif url.user or url.password:
            named = f"{url.user or ''}:{url.password or ''}"
            sent["Authorization"] = f"Basic {base64.b64encode(named.encode()).decode()}"
        path = url.path.rstrip("/") + "/chat/completions"
        there = url.with_user(None).with_path(path, keep_query=True)
        return cls(str(there), {**sent, **(headers or {})}, _proxy(url.scheme, host))


def _proxy(scheme: str, host: str) -> str | None:
    """The environment's proxy (``HTTPS_PROXY``, ``ALL_PROXY``, ``NO_PROXY``); none on the way to this machine."""
    proxies = getproxies()
    proxy = proxies.get(scheme) or proxies.get("all")
    if not proxy or _is_here(host) or proxy_bypass(host):
        return None
    proxy = proxy if "://" in proxy else f"http://{proxy}"
    if not proxy.startswith(("http://", "https://")):
        raise CoalaError(
            f"The environment names the proxy {bare(proxy)} for {host}; expected one of http:// or https://. "
            f"Name such a one, or add {host} to NO_PROXY."
        )
    return proxy


def _is_here(host: str) -> bool:
    host = host.removesuffix(".")
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def is_loopback(url: str) -> bool:
    """Whether a URL leads to this machine: localhost, 127.0.0.0/8 or ::1."""
    return _is_here(urlsplit(url).hostname or "")


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
        response = None
        try:
            async with asyncio.timeout(timeout):
                async with self._session.post(
                    server.url,
                    data=body,
                    headers=server.headers,
                    proxy=server.proxy,
                    allow_redirects=False,
                    trace_request_ctx=sent,
                ) as response:
                    content = await _content(response)
                return Answer(response.status, {k.lower(): v for k, v in response.headers.items()}, content)
        except TimeoutError:
            still = f"the answer was still coming after {timeout:g} s"
            reason = f"no whole answer within {timeout:g} s: {still}" if response else f"no answer within {timeout:g} s"
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
    # Without a limit of its own: how many are under way is the business of who asks. Whole answers are timed above.
    connector = aiohttp.TCPConnector(
        limit=0, keepalive_timeout=IDLE, ssl=truststore.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    )
    return aiohttp.ClientSession(
        connector=connector,
        timeout=aiohttp.ClientTimeout(),
        cookie_jar=aiohttp.DummyCookieJar(),
        auto_decompress=False,
        trace_configs=[trace],
    )


async def _content(response: aiohttp.ClientResponse) -> bytes:
    codings = {response.headers.get(name, "").strip().lower() for name in ("Content-Encoding", "Transfer-Encoding")}
    if codings := codings - {"", "identity", "chunked"}:
        # What is not compressed cannot unpack into more than was sent.
        coding = min(codings)[:20]
        raise Unanswered("not read", f"the answer is compressed ({coding}) although that was not asked for", sent=True)
    content = bytearray()
    # A length is a promise; what comes is counted all the same.
    if (response.content_length or 0) <= LARGEST:
        async for part in response.content.iter_any():
            content += part
            if len(content) > LARGEST:
                break
        else:
            return bytes(content)
    raise Unanswered("not read", f"the answer has over {LARGEST >> 20} MiB", sent=True)
