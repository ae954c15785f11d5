"""What every request passes before it reaches its address: who asks, from where, how much and how slowly.

Plain ASGI, so that streams pass through untouched. Knows nothing of models.
"""

from __future__ import annotations

import asyncio
import hmac
import time
from collections.abc import Callable
from http import HTTPStatus

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from coala.serve.errors import Refusal
from coala.serve.limits import Limits

HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'self'; script-src 'self'; connect-src 'self'; "
    "img-src data:; form-action 'none'; base-uri 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
    "X-Robots-Tag": "noindex",
    "Cache-Control": "no-store",
}
LOOPBACK = ("127.0.0.1", "localhost", "::1")
# Addresses that take a body; others know nothing of POST.
POSTED = ("/v1/chat/completions", "/v1/completions", "/v1/score", "/v1/rerank")
# Whose client has gone: nothing is sent, the count shows it (the number is nginx's).
CLIENT_GONE = 499
# A body that is too large is read up to so many times the limit: a connection that is closed on unread data is reset,
# and the client never sees why.
PATIENCE = 8


class Gate:
    """Refuses what must not reach ``app``, adds the security headers, and reports every answer.

    ``key``: what `/v1` and `/metrics` ask for, if anything. ``local``: whether only names of this machine are answered
    to, which keeps pages of other sites from reaching a server that asks for no key under a name of their own (DNS
    rebinding). ``report`` is told of method, path, status and seconds; ``ending`` tells whether new work is refused.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        limits: Limits,
        key: str | None,
        local: bool,
        report: Callable[[str, int, float], None],
        ending: Callable[[], bool],
    ) -> None:
        self._app, self._limits, self._local, self._ending, self._report = app, limits, local, ending, report
        self._key = None if key is None else key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began = time.monotonic()
        status = CLIENT_GONE

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers[name] = value
            await send(message)

        try:
            await self._answer(scope, receive, sending)
        except Exception:
            status = HTTPStatus.INTERNAL_SERVER_ERROR
            raise
        finally:
            self._report(scope["path"], int(status), time.monotonic() - began)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope)
        try:
            self._who(scope["path"], headers)
            if scope["method"] == "POST" and scope["path"] in POSTED:
                if self._ending():
                    raise Refusal(
                        HTTPStatus.SERVICE_UNAVAILABLE,
                        "The server is ending; it takes no new work.",
                        code="ending",
                        headers={"Retry-After": "5", "Connection": "close"},
                    )
                self._what(headers)
                body = await self._body(headers, receive)
                if body is None:
                    return
                receive = _replay(body, receive)
        except Refusal as refusal:
            await refusal.response()(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _who(self, path: str, headers: Headers) -> None:
        if self._local and _name(headers.get("host", "localhost")) not in LOOPBACK:
            raise Refusal(
                HTTPStatus.FORBIDDEN,
                f"This server answers to names of its own machine alone ({', '.join(LOOPBACK)}) unless it has a key.",
                code="unknown_host",
            )
        if not path.startswith("/v1/") and path != "/metrics":
            return
        # A page elsewhere may send requests that a browser takes for harmless; it says where they come from.
        if headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none"):
            raise Refusal(HTTPStatus.FORBIDDEN, "Pages of other sites may not use this server.", code="other_site")
        if self._key is None:
            return
        scheme, _, given = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), self._key):
            found = "another one" if given else "none"
            raise Refusal(
                HTTPStatus.UNAUTHORIZED,
                f"This server asks for a key and was given {found}. Send the header Authorization: Bearer KEY.",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )

    def _what(self, headers: Headers) -> None:
        # Any other type could be sent by a page of another site without asking first.
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise Refusal(
                HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
                f"The body is {kind[:60] or 'of no type'}; expected application/json.",
                code="unsupported_media_type",
            )
        if headers.get("content-encoding", "identity").lower() != "identity":
            raise Refusal(
                HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "The body is compressed; send it plain.", code="unsupported_encoding"
            )

    async def _body(self, headers: Headers, receive: Receive) -> bytes | None:
        """The whole body, or ``None`` if the client has gone."""
        most = self._limits.max_body
        declared = headers.get("content-length", "0")
        # A client that asks before it sends need not send.
        large = declared.isdigit() and int(declared[:18]) > most
        if large and headers.get("expect", "").lower() == "100-continue":
            raise self._too_large()
        parts: list[bytes] = []
        size = 0
        try:
            async with asyncio.timeout(self._limits.body_time):
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
            raise Refusal(
                HTTPStatus.REQUEST_TIMEOUT,
                f"The body was not here after {self._limits.body_time:g} s.",
                code="body_too_slow",
                headers={"Connection": "close"},
            ) from None
        if large or size > most:
            raise self._too_large()
        body = b"".join(parts)
        try:
            body.decode("utf-8")
        except UnicodeDecodeError as error:
            raise Refusal(
                HTTPStatus.BAD_REQUEST, f"The body is not UTF-8 (byte {error.start}).", code="invalid_encoding"
            ) from None
        return body

    def _too_large(self) -> Refusal:
        return Refusal(
            HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
            f"The body is larger than the {self._limits.max_body} bytes that this server takes.",
            code="body_too_large",
            headers={"Connection": "close"},
        )


def _name(host: str) -> str:
    """The name in a Host header, without port and brackets."""
    if host.startswith("["):
        return host[1:].partition("]")[0].lower()
    return host.partition(":")[0].lower()


def _replay(body: bytes, receive: Receive) -> Receive:
    """A receive that hands the body over once more, then tells what the connection tells."""
    told = False

    async def receiving() -> Message:
        nonlocal told
        if not told:
            told = True
            return {"type": "http.request", "body": body, "more_body": False}
        return await receive()

    return receiving
