"""Refusals as the OpenAI protocol words them: a status and one object that says what was wrong."""

from __future__ import annotations

from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from fastapi.responses import JSONResponse

KINDS: Mapping[int, str] = {
    HTTPStatus.UNAUTHORIZED: "authentication_error",
    HTTPStatus.FORBIDDEN: "permission_error",
    HTTPStatus.NOT_FOUND: "not_found_error",
    HTTPStatus.REQUEST_TIMEOUT: "timeout_error",
    HTTPStatus.TOO_MANY_REQUESTS: "rate_limit_error",
}


class Refusal(Exception):
    """A request that is answered with an error: an HTTP status, a message for people, a code for programs."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = int(status), message, code, param
        self.headers = dict(headers or {})

    @property
    def body(self) -> dict[str, Any]:
        """``{"error": {"message", "type", "param", "code"}}``."""
        kind = KINDS.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        return JSONResponse(self.body, self.status, self.headers)


def failure() -> Refusal:
    """What a client learns of a failure of ours; the log has the rest."""
    return Refusal(
        HTTPStatus.INTERNAL_SERVER_ERROR,
        "The server failed on this request; its log says why. Other requests continue.",
        code="internal_error",
    )


def too_late(seconds: float) -> Refusal:
    """The request's deadline has passed. Clients that would ask again by themselves are told not to."""
    return Refusal(
        HTTPStatus.REQUEST_TIMEOUT,
        f"The reply was not finished after {seconds:g} s, the server's deadline. Ask for less, or retry later.",
        code="deadline_exceeded",
        headers={"x-should-retry": "false"},
    )


def too_busy(retry_after: int) -> Refusal:
    return Refusal(
        HTTPStatus.TOO_MANY_REQUESTS,
        f"The server is at capacity. Retry in {retry_after} s.",
        code="queue_full",
        headers={"Retry-After": str(retry_after)},
    )
