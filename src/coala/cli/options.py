"""Options that several commands share, and values that are more than a word or a number to Typer."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, get_args

import typer

from coala.choices import DTYPES, Dtype
from coala.permission import CODE_FLAG, DOWNLOAD_FLAG, permitted

if TYPE_CHECKING:
    from coala.leaderboards.judges import Service

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

# --- judges, and runs that answer for a leaderboard

By = Annotated[
    str | None,
    typer.Option(
        "--judge",
        help="pairwise (default), weighted, arena or grade; a folder with judge.yaml; a .jsonl of prompt "
        "templates; head:RUN, rule:NAME[:ARGUMENT], words:FILE or replay:JUDGEMENTS.",
    ),
]
Local = Annotated[
    str | None,
    typer.Option(metavar="MODEL", help="Judge with this model, loaded here, by the log-probabilities of the verdicts."),
]
OneOrder = Annotated[bool, typer.Option("--one-order", help="Ask about each prompt in one order only, at half cost.")]
Model = Annotated[str | None, typer.Option(help="Judge model, as the endpoint names it.")]
BaseUrl = Annotated[
    str | None,
    typer.Option(envvar="OPENAI_BASE_URL", help="Base URL of an OpenAI-compatible endpoint (default: OpenAI)."),
]
KeyEnv = Annotated[str, typer.Option(help="Environment variable with the endpoint's API key.")]
Cache = Annotated[
    Path | None,
    typer.Option(help="Verdict cache, which runs may share (default: verdicts.sqlite next to the replies)."),
]
Concurrency = Annotated[int, typer.Option(min=1, max=256, help="Concurrent requests.")]
MaxCalls = Annotated[int | None, typer.Option(min=0, help="Stop after so many requests.")]
MaxTokens = Annotated[int | None, typer.Option(min=0, help="Stop once so many tokens have been used.")]
Attempts = Annotated[int, typer.Option(min=1, help="Attempts per verdict when the endpoint fails.")]
Timeout = Annotated[float, typer.Option(min=0.1, help="Seconds to wait for one request.")]
AskAgain = Annotated[bool, typer.Option("--ask-again", help="Ask again for cached answers that could not be parsed.")]
Sampling = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME=VALUE", help="Override the judge's sampling; NAME without a value is not sent. Repeatable."
    ),
]
RunOption = Annotated[
    Path | None,
    typer.Option("--run", metavar="RUN", help="Run whose report this belongs to; the one the files lie in if any."),
]
Prompts = Annotated[
    Path | None, typer.Option("--prompts", help="The benchmark's prompts, for --run to answer; else a file is read.")
]
Reference = Annotated[
    str | None,
    typer.Option(
        help="Replies of the baseline to the same prompts: a file, or `unguided` for the run's own model without its "
        "head (default: the outputs in the file of prompts)."
    ),
]
Unguided = Annotated[bool, typer.Option("--unguided", help="Answer without the head: the base model by itself.")]
MaxNewTokens = Annotated[
    int | None, typer.Option(min=1, help="Longest reply, in tokens (default: as in the run's recipe).")
]
Temperature = Annotated[
    float | None, typer.Option(min=0.0, help="Sampling temperature (default: as in the run's recipe).")
]
Limit = Annotated[int | None, typer.Option(min=1, help="Take the first so many prompts only.")]


def service_of(
    model: str | None,
    base_url: str | None,
    key_env: str,
    max_calls: int | None,
    max_tokens: int | None,
    attempts: int,
    timeout: float,
    ask_again: bool,
    sampling: Sequence[str],
) -> Service:
    """What these flags say of the endpoint, the key from the environment with it."""
    from coala.leaderboards.judges import Service

    key = os.environ.get(key_env, "")
    return Service(
        model, base_url, key_env, key, max_calls, max_tokens, attempts, timeout, ask_again, sampling, _headers()
    )


def _headers() -> dict[str, str]:
    """What OpenAI's own client would send besides, as its variables in the environment say."""
    lines = [line.partition(":") for line in os.environ.get("OPENAI_CUSTOM_HEADERS", "").split("\n")]
    named = {"OpenAI-Organization": "OPENAI_ORG_ID", "OpenAI-Project": "OPENAI_PROJECT_ID"}
    accounts = {name: os.environ[variable] for name, variable in named.items() if os.environ.get(variable)}
    return {**accounts, **{name.strip(): value.strip() for name, colon, value in lines if colon}}
