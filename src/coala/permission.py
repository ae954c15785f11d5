"""What the person at the keyboard allowed for this invocation: running a model's own code, fetching what a file names.

Files ask for either (a run, a recipe, an adapter); only a flag or an argument of the call grants it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

CODE_FLAG = "--trust-remote-code"
DOWNLOAD_FLAG = "--download"


@dataclass(frozen=True)
class Permission:
    """``code``: Python that comes with a model may run; ``download``: hub models that only a file names are fetched."""

    code: bool = False
    download: bool = False


_GRANTED: ContextVar[Permission] = ContextVar("permission")


def permission() -> Permission:
    """What is allowed here and now; nothing unless :func:`permitted` says so."""
    return _GRANTED.get(Permission())


@contextmanager
def permitted(*, code: bool = False, download: bool = False) -> Iterator[None]:
    """While it lasts, these are allowed besides what already is."""
    before = permission()
    _GRANTED.set(Permission(before.code or code, before.download or download))
    try:
        yield
    finally:
        # Not by token: a command line opens it in one context and closes it in another.
        _GRANTED.set(before)
