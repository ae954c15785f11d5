"""What every request passes before it reaches its address: who asks, from where, how much and how slowly.

Plain ASGI, so that streams pass through untouched. Knows nothing of models.
"""

from __future__ import annotations

import hmac
import time
from collections.abc import Callable
from http import HTTPStatus

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from coala.serve.errors import Refusal
from coala.serve.limits import Limits
from coala.web.bodies import TooLarge, TooSlow, replay, whole_body
from coala.web.strangers import LOOPBACK, foreign, headed, known_host, security_headers

HEADERS = security_headers(connect_src="'self'")
# Addresses that take a body; others know nothing of POST.
POSTED = ("/v1/chat/completions", "/v1/completions", "/v1/score", "/v1/rerank")
# Whose client has gone: nothing is sent, the count shows it (the number is nginx's).
CLIENT_GONE = 499


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
        status, answering = CLIENT_GONE, headed(send, HEADERS)

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await answering(message)

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
            self._who(scope["method"], scope["path"], headers)
            if scope["method"] == "POST" and scope["path"] in POSTED:
                if self._ending():
                    raise Refusal(
                        HTTPStatus.SERVICE_UNAVAILABLE,
                        "The server is shutting down and takes no new requests.",
                        code="ending",
                        headers={"Retry-After": "5", "Connection": "close"},
                    )
                self._what(headers)
                body = await self._body(headers, receive)
                if body is None:
                    return
                receive = replay(body, receive)
        except Refusal as refusal:
            await refusal.response()(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _who(self, method: str, path: str, headers: Headers) -> None:
        if self._local and not known_host(headers, LOOPBACK):
            raise Refusal(
                HTTPStatus.FORBIDDEN,
                f"This server answers to names of its own machine alone ({', '.join(LOOPBACK)}) unless it has a key.",
                code="unknown_host",
            )
        if not path.startswith("/v1/") and path != "/metrics":
            return
        # A page elsewhere may send requests that a browser takes for harmless; it says where they come from.
        # (OPTIONS, by which it asks first, is answered by nothing that allows it.)
        if method != "OPTIONS" and foreign(headers):
            raise Refusal(HTTPStatus.FORBIDDEN, "Pages of other sites may not use this server.", code="other_site")
        if self._key is None:
            return
        scheme, _, given = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), self._key):
            found = "another one" if given else "none"
            raise Refusal(
                HTTPStatus.UNAUTHORIZED,
                f"This server needs a key and got {found}. Fix: send the header Authorization: Bearer KEY.",
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
        try:
            body = await whole_body(headers, receive, most=self._limits.max_body, seconds=self._limits.body_time)
        except TooLarge:
            raise Refusal(
                HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
                f"The body is larger than the {self._limits.max_body} bytes that this server takes.",
                code="body_too_large",
                headers={"Connection": "close"},
            ) from None
        except TooSlow:
            raise Refusal(
                HTTPStatus.REQUEST_TIMEOUT,
                f"The body did not arrive within {self._limits.body_time:g} s.",
                code="body_too_slow",
                headers={"Connection": "close"},
            ) from None
        if body is None:
            return None
        try:
            body.decode("utf-8")
        except UnicodeDecodeError as error:
            raise Refusal(
                HTTPStatus.BAD_REQUEST, f"The body is not UTF-8 (byte {error.start}).", code="invalid_encoding"
            ) from None
        return body
