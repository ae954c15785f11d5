"""Options that several commands share, and values that are more than a word or a number to Typer."""

from __future__ import annotations

import re
from typing import Annotated

import typer

from coala.permission import CODE_FLAG, DOWNLOAD_FLAG, permitted

_UNITS = {"": 1, "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}
_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*([kmgt]?)(i?b)?", re.IGNORECASE)


def whole_number(text: str) -> int:
    """The number an option names that also takes a word."""
    from coala.values import CoalaError

    try:
        return int(text)
    except ValueError:
        raise CoalaError(f"--layer is {text!r}; expected a number (-1 is the last layer) or auto.") from None


def bytes_of(text: str | None) -> int | None:
    """``24GiB``, ``24GB`` or ``24g``, all in powers of 1024 as cards are sold, or a plain number of bytes."""
    if text is None:
        return None
    from coala.values import CoalaError

    match = _SIZE.fullmatch(text.strip())
    if not match:
        raise CoalaError(f"{text!r} is no size; expected one such as 24GiB or 800MiB.")
    return int(float(match[1]) * _UNITS[match[2].lower()])


def _allow_code(context: typer.Context, wanted: bool) -> bool:
    if wanted:
        context.with_resource(permitted(code=True))
    return wanted


def _allow_download(context: typer.Context, wanted: bool) -> bool:
    if wanted:
        context.with_resource(permitted(download=True))
    return wanted


# Both act for the whole command, however deep in it a model is loaded; the values themselves need not be passed on.
TrustCode = Annotated[
    bool,
    typer.Option(
        CODE_FLAG, callback=_allow_code, help="Run Python code that comes with the model. Read that code first."
    ),
]
Download = Annotated[
    bool,
    typer.Option(
        DOWNLOAD_FLAG, callback=_allow_download, help="Fetch a hub model that the run names and that is not cached."
    ),
]
