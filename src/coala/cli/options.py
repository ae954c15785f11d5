"""Options that several commands share, and values that are more than a word or a number to Typer."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Annotated, get_args

import typer

from coala.choices import DTYPES, Dtype
from coala.permission import CODE_FLAG, DOWNLOAD_FLAG, permitted

_UNITS = {"": 1, "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}
_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*([kmgt]?)(i?b)?", re.IGNORECASE)


def _dtype(given: str) -> str:
    low = given.lower()
    found = DTYPES.get(low, low)
    if found not in get_args(Dtype):
        raise typer.BadParameter(f"{given!r} is not one of {', '.join(get_args(Dtype))}.")
    return found


def layer_of(given: str) -> int | str:
    """The number of a layer, or ``auto``."""
    if given == "auto":
        return given
    try:
        return int(given)
    except ValueError:
        raise typer.BadParameter(f"{given!r} is neither a number (-1 is the last layer) nor auto.") from None


def _words(*words: str) -> Callable[[str], list[str]]:
    return lambda incomplete: [word for word in words if word.startswith(incomplete)]


DEVICE_HELP = "auto, cpu, cuda, or offload (keep what does not fit in CPU memory or on disk)."
DTYPE_OPTION = typer.Option(
    parser=_dtype,
    metavar=f"[{'|'.join(get_args(Dtype))}]",
    autocompletion=_words(*get_args(Dtype)),
    help="Number format of the weights; bf16, fp16, half and fp32 are understood.",
)
LAYER_OPTION = typer.Option(
    parser=layer_of,
    metavar="[INTEGER|auto]",
    autocompletion=_words("auto", "-1"),
    help="Hidden state to read; -1 is the last, auto the lowest layer within one standard error of the best.",
)


def bytes_of(text: str | None) -> int | None:
    """``24GiB``, ``24GB`` or ``24g``, all in powers of 1024 as cards are sold, or a plain number of bytes."""
    if text is None:
        return None
    from coala.values import CoalaError

    match = _SIZE.fullmatch(text.strip())
    if not match:
        from coala.values import CoalaError

        raise CoalaError(f"found {text!r}, expected a size such as 24GiB or 800MiB.")
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
