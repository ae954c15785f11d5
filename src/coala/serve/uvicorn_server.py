"""The server's sockets, and how its limits bear on connections."""

from __future__ import annotations

import uvicorn
from fastapi import FastAPI

from coala.serve.limits import Limits
from coala.web.listening import listen
from coala.web.listening import server as serving

__all__ = ["listen", "server"]


def server(app: FastAPI, limits: Limits) -> uvicorn.Server:
    """What serves ``app`` by ``run(sockets=[...])`` until SIGINT, SIGTERM, SIGHUP or ``should_exit``; what is at hand
    then has ``limits.grace`` seconds to end."""
    return serving(app, head_time=limits.head_time, read_time=limits.read_time, grace=limits.grace)
