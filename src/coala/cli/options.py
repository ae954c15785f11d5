"""Values of options that are more than a word or a number to Typer."""

from __future__ import annotations

import re

from coala.values import CoalaError

_UNITS = {"": 1, "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}
_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*([kmgt]?)(i?b)?", re.IGNORECASE)


def whole_number(text: str) -> int:
    """The number an option names that also takes a word."""
    try:
        return int(text)
    except ValueError:
        raise CoalaError(f"--layer is {text!r}; expected a number (-1 is the last layer) or auto.") from None


def bytes_of(text: str | None) -> int | None:
    """``24GiB``, ``24GB`` or ``24g``, all in powers of 1024 as cards are sold, or a plain number of bytes."""
    if text is None:
        return None
    match = _SIZE.fullmatch(text.strip())
    if not match:
        raise CoalaError(f"{text!r} is no size; expected one such as 24GiB or 800MiB.")
    return int(float(match[1]) * _UNITS[match[2].lower()])
