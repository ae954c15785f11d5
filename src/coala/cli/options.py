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
    """Around imports: says which extra to install where one is missing."""
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
RunName = Annotated[str | None, typer.Option(help="The run's name in results (default: its folder's).")]
Unguided = Annotated[bool, typer.Option("--unguided", help="Answer without the head: the base model by itself.")]
GuidedBy = Annotated[
    Mode | None, typer.Option("--mode", help="How the head guides, or distilled (default: as in the run's recipe).")
]
Strength = Annotated[float | None, typer.Option("--strength", min=0.0, help="Guidance strength.")]
GuidedOver = Annotated[Over | None, typer.Option("--over", help="Guide the model, or its distilled policy.")]
MaxNewTokens = Annotated[
    int | None, typer.Option(min=1, help="Longest reply, in tokens (default: as in the run's recipe).")
]
Temperature = Annotated[
    float | None, typer.Option(min=0.0, help="Sampling temperature (default: as in the run's recipe).")
]
Limit = Annotated[int | None, typer.Option(min=1, help="Take the first so many prompts only.")]
OwnTemperature = Annotated[
    float | None,
    typer.Option("--temperature", min=0.0, help="0 is greedy (default: the recipe's, else the model's own)."),
]
RecipeFile = Annotated[Path | None, typer.Option(help="YAML file with any of the settings; flags win.")]
SetOption = Annotated[list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="Any setting of the recipe.")]
Workers = Annotated[
    int, typer.Option("--workers", min=1, help="Processes that share the extraction, each with the model.")
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
    """What OpenAI's own client would send besides, as its variables in the environment say."""
    lines = [line.partition(":") for line in os.environ.get("OPENAI_CUSTOM_HEADERS", "").split("\n")]
    named = {"OpenAI-Organization": "OPENAI_ORG_ID", "OpenAI-Project": "OPENAI_PROJECT_ID"}
    accounts = {name: os.environ[variable] for name, variable in named.items() if os.environ.get(variable)}
    return {**accounts, **{name.strip(): value.strip() for name, colon, value in lines if colon}}
