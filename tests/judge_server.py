"""A scripted endpoint on the loopback: answers, delays, fails and lies as a test says, and counts what reached it."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from .waiting import PATIENCE, linger

Reply = dict[str, Any]
Script = Callable[[dict[str, Any], int], Reply]  # the request's body and how often this very body came before


def say(
    text: str, *, finish: str = "stop", tokens: tuple[int, int] | None = (10, 5), top: Any = None, **more: Any
) -> Reply:
    """A chat completion."""
    choice: dict[str, Any] = {"index": 0, "finish_reason": finish, "message": {"role": "assistant", "content": text}}
    if top is not None:
        first = {"token": top[0][0], "logprob": top[0][1], "bytes": None}
        first["top_logprobs"] = [{"token": token, "logprob": value, "bytes": None} for token, value in top]
        choice["logprobs"] = {"content": [first]}
    usage = {} if tokens is None else {"usage": {"prompt_tokens": tokens[0], "completion_tokens": tokens[1]}}
    body = {"id": "x", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice], **usage}
    return {"body": json.dumps(body).encode(), **more}


def fail(status: int, headers: dict[str, str] | None = None, code: str = "") -> Reply:
    error = {"error": {"message": f"scripted {status}", "code": code or None}}
    return {"status": status, "headers": headers or {}, "body": json.dumps(error).encode()}


HANG_UP: Reply = {"hang_up": True}


def user_text(body: dict[str, Any]) -> str:
    return str(body["messages"][-1]["content"])


class JudgeServer:
    """``requests`` holds every body that arrived; ``most`` is how many were answered at a time."""

    def __init__(self, script: Script) -> None:
        self.script = script
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.most = self._now = 0
        self._lock, self._closed = threading.Lock(), threading.Event()
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            wbufsize = -1  # headers and body in one packet, or every answer waits for an acknowledgement

            def do_POST(self) -> None:
                server._answer(self)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_port}/v1"
        threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def _answer(self, handler: BaseHTTPRequestHandler) -> None:
        raw = handler.rfile.read(int(handler.headers["Content-Length"]))
        body = json.loads(raw)
        with self._lock:
            before = self.requests.count(body)
            self.requests.append(body)
            self.headers.append({name.lower(): value for name, value in handler.headers.items()})
            self._now += 1
            self.most = max(self.most, self._now)
        try:
            reply = self.script(body, before)
            linger(reply.get("delay", 0))
            if reply.get("silent"):
                self._closed.wait(PATIENCE)
            if reply.get("hang_up"):
                handler.close_connection = True
                return
            payload = reply["body"]
            handler.send_response(reply.get("status", 200))
            for name, value in {"Content-Type": "application/json", **reply.get("headers", {})}.items():
                handler.send_header(name, value)
            # A body cut short on the way: fewer bytes than announced.
            handler.send_header("Content-Length", str(len(payload) + reply.get("missing", 0)))
            handler.end_headers()
            handler.wfile.write(payload)
            handler.close_connection = bool(reply.get("missing"))
        except (BrokenPipeError, ConnectionResetError):
            handler.close_connection = True
        finally:
            with self._lock:
                self._now -= 1

    @property
    def distinct(self) -> int:
        return len({json.dumps(body, sort_keys=True) for body in self.requests})

    def close(self) -> None:
        self._closed.set()
        self._http.shutdown()
        self._http.server_close()
