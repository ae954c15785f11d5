"""The one way from a command to a person's terminal: text that others wrote cannot steer it.

A reply, a prompt, a file name or an endpoint's answer may hold escape sequences that clear the screen, write to the
clipboard or turn letters around. Here they are shown instead of sent.
"""

from __future__ import annotations

import re
import sys

# Controls except tab and newline (C0, delete, C1), the marks that reorder text, and halves of surrogate pairs, which no
# stream can encode. Joiners and variation selectors stay: scripts and emoji need them.
_STEERING = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufff9-\ufffb\ud800-\udfff]"
)


def visible(text: object) -> str:
    """``text`` with every character that steers a terminal written as an escape, such as ``\\x1b`` or ``\\u202e``.

    A carriage return before a newline is dropped: files of other systems end their lines so.
    """
    return _STEERING.sub(_escaped, str(text).replace("\r\n", "\n"))


def _escaped(match: re.Match[str]) -> str:
    code = ord(match[0])
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


def json_text(text: str) -> str:
    """The same for JSON, in whose strings every such character has an escape that readers turn back."""
    return _STEERING.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def write(*texts: object, end: str = "\n", err: bool = False) -> None:
    """Print ``texts``, made :func:`visible`, with a space between; on stderr with ``err``. Flushed at once."""
    styled(*map(visible, texts), end=end, err=err)


def styled(*texts: str, end: str = "\n", err: bool = False) -> None:
    """Print texts that carry colours of our own; whatever others wrote in them has to be :func:`visible` already."""
    print(*texts, end=end, file=sys.stderr if err else sys.stdout, flush=True)
