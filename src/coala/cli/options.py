"""Options that several commands share, and values that are more than a word or a number to Typer."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from coala.messages import CoalaError
from coala.permission import CODE_FLAG, DOWNLOAD_FLAG, permitted
from coala.settings import Mode, Over

if TYPE_CHECKING:
    from coala.alignment.answers import ReplySettings
    from coala.leaderboards.judges import JudgeSettings

_UNITS = {"": 1, "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}
_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*([kmgt]?)(i?b)?", re.IGNORECASE)


def bytes_of(text: str | None) -> int | None:
    """``24GiB``, ``24GB`` or ``24g``, all in powers of 1024 as cards are sold, or a plain number of bytes."""
    if text is None:
        return None
    match = _SIZE.fullmatch(text.strip())
    if not match:
        raise CoalaError(f"found {text!r}, expected a size such as 24GiB or 800MiB.")
    return int(float(match[1]) * _UNITS[match[2].lower()])


@contextmanager
def needs_extra(extra: str, what: str) -> Iterator[None]:
    """Around imports: says which extra to install if one is missing."""
    try:
        yield
    except ImportError as error:
        raise CoalaError(
            f"{what} needs {error.name or 'a package'}, which is not installed: pip install 'coala-align[{extra}]'."
        ) from None


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
        CODE_FLAG, callback=_allow_code, help="Allow Python code that comes with the model. Read that code first."
    ),
]
Download = Annotated[
    bool,
    typer.Option(DOWNLOAD_FLAG, callback=_allow_download, help="Download the run's hub model if it is not cached."),
]

# --- judges, and runs that answer for a leaderboard

By = Annotated[
    str | None,
    typer.Option(
        "--judge",
        help="Judge: pairwise, weighted, arena or grade; a folder with judge.yaml; a .jsonl of prompt "
        "templates; head:RUN, rule:NAME[:ARGUMENT], words:FILE or replay:JUDGEMENTS (default: pairwise; weighted with "
        "--local and for AlpacaEval).",
    ),
]
Local = Annotated[
    str | None,
    typer.Option(
        metavar="MODEL",
        help="Model to load as the judge, by the log-probabilities of its verdicts (default: an endpoint).",
    ),
]
OneOrder = Annotated[bool, typer.Option("--one-order", help="Judge each prompt in one order only, at half the cost.")]
Model = Annotated[str | None, typer.Option(help="Judge model, as the endpoint names it (default: none).")]
BaseUrl = Annotated[
    str | None,
    typer.Option(envvar="OPENAI_BASE_URL", help="Base URL of an OpenAI-compatible endpoint (default: OpenAI)."),
]
KeyEnv = Annotated[str, typer.Option(help="Environment variable that holds the endpoint's API key.")]
Cache = Annotated[
    Path | None,
    typer.Option(help="Verdict cache; runs can share it (default: verdicts.sqlite next to the replies)."),
]
Concurrency = Annotated[int, typer.Option(min=1, max=256, help="Number of concurrent requests.")]
MaxCalls = Annotated[int | None, typer.Option(min=0, help="Maximum number of requests (default: no limit).")]
MaxTokens = Annotated[
    int | None, typer.Option(min=0, help="Token budget; the judge stops once it is used up (default: no limit).")
]
Attempts = Annotated[int, typer.Option(min=1, help="Maximum number of attempts per verdict, including retries.")]
Timeout = Annotated[float, typer.Option(min=0.1, help="Timeout of a request, in seconds.")]
AskAgain = Annotated[bool, typer.Option("--ask-again", help="Retry verdicts whose cached answer could not be parsed.")]
Sampling = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME=VALUE",
        help="Override a sampling parameter of the judge; NAME without a value is not sent. Repeatable.",
    ),
]
RunOption = Annotated[
    Path | None,
    typer.Option(
        "--run",
        metavar="RUN",
        help="Run whose report the result is added to (default: the run that contains the files).",
    ),
]
Prompts = Annotated[
    Path | None, typer.Option("--prompts", help="File of the benchmark's prompts, for --run to answer (default: none).")
]
Reference = Annotated[
    str | None,
    typer.Option(
        help="Baseline's replies to the same prompts: a file, or `unguided` for the run's own model without its "
        "head (default: the outputs in the prompt file)."
    ),
]
RunName = Annotated[str | None, typer.Option(help="Name of the run in the results (default: its folder's).")]
Unguided = Annotated[bool, typer.Option("--unguided", help="Answer with the base model, without the head.")]
GuidedBy = Annotated[
    Mode | None, typer.Option("--mode", help="How the head guides, or distilled (default: the recipe's).")
]
Strength = Annotated[
    float | None, typer.Option("--strength", min=0.0, help="Guidance strength (default: the recipe's).")
]
GuidedOver = Annotated[
    Over | None,
    typer.Option(
        "--over", help="Which model the head guides: the run's, or its distilled policy (default: the recipe's)."
    ),
]
MaxNewTokens = Annotated[
    int | None, typer.Option(min=1, help="Maximum length of a reply, in tokens (default: the recipe's).")
]
Temperature = Annotated[float | None, typer.Option(min=0.0, help="Sampling temperature (default: the recipe's).")]
Limit = Annotated[int | None, typer.Option(min=1, help="Number of prompts to use, from the first (default: all).")]
OwnTemperature = Annotated[
    float | None,
    typer.Option(
        "--temperature", min=0.0, help="Sampling temperature; 0 is greedy (default: the recipe's, else the model's)."
    ),
]
RecipeFile = Annotated[Path | None, typer.Option(help="YAML file of settings; flags override it (default: none).")]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="Override a setting of the recipe. Repeatable.")
]
Workers = Annotated[
    int,
    typer.Option(
        "--workers", min=1, help="Number of processes that extract in parallel, each with its own copy of the model."
    ),
]


@dataclass(frozen=True, kw_only=True)
class JudgeFlags:
    """The endpoint or model that judges, what it may spend, and where its answers are kept."""

    local: Local = None
    model: Model = None
    base_url: BaseUrl = None
    key_env: KeyEnv = "OPENAI_API_KEY"
    cache: Cache = None
    concurrency: Concurrency = 8
    max_calls: MaxCalls = None
    max_tokens: MaxTokens = None
    attempts: Attempts = 6
    timeout: Timeout = 180.0
    ask_again: AskAgain = False
    sampling: Sampling = None
    trust_remote_code: TrustCode = False
    download: Download = False

    def by(self, name: str) -> JudgeSettings:
        """The judge called ``name``, the key from the environment with it."""
        from coala.leaderboards.judges import JudgeSettings, Service

        service = Service(
            self.model,
            self.base_url,
            self.key_env,
            os.environ.get(self.key_env, ""),
            self.max_calls,
            self.max_tokens,
            self.attempts,
            self.timeout,
            self.ask_again,
            self.sampling or (),
            _headers(),
        )
        return JudgeSettings(name, service, self.local, self.cache, self.concurrency)


@dataclass(frozen=True, kw_only=True)
class ReplyFlags:
    """The run whose report an evaluation goes into, and how it answers prompts."""

    into: RunOption = None
    name: RunName = None
    unguided: Unguided = False
    mode: GuidedBy = None
    strength: Strength = None
    over: GuidedOver = None
    max_new_tokens: MaxNewTokens = None
    temperature: Temperature = None
    limit: Limit = None

    def manner(self, seed: int) -> ReplySettings:
        from coala.alignment.answers import ReplySettings

        given = {"mode": self.mode, "strength": self.strength, "over": self.over}
        given = {name: value for name, value in given.items() if value is not None}
        return ReplySettings(not self.unguided, self.max_new_tokens, self.temperature, seed, given)


def _headers() -> dict[str, str]:
    """The headers OpenAI's own client would add, from its environment variables."""
    lines = [line.partition(":") for line in os.environ.get("OPENAI_CUSTOM_HEADERS", "").split("\n")]
    named = {"OpenAI-Organization": "OPENAI_ORG_ID", "OpenAI-Project": "OPENAI_PROJECT_ID"}
    accounts = {name: os.environ[variable] for name, variable in named.items() if os.environ.get(variable)}
    return {**accounts, **{name.strip(): value.strip() for name, colon, value in lines if colon}}
