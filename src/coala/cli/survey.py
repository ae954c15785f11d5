"""`coala survey`: a double-blind survey of people over the replies of several methods."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from coala.cli.survey_results import Folder, results

if TYPE_CHECKING:
    from coala.survey import Check, Prompt

app = typer.Typer(no_args_is_help=True, help="Ask people which reply is best, without telling whose it is.")

ADMIN = "COALA_SURVEY_ADMIN_TOKEN"
SHORTEST_TOKEN = 16
GRACE = 5.0  # seconds in which pages at hand are finished


@app.command(
    epilog="Example: `coala survey build coala=a/generations-guided.jsonl sft=a/generations-unguided.jsonl "
    "--out survey`"
)
def build(
    generations: Annotated[
        list[str],
        typer.Argument(metavar="[NAME=]GENERATIONS...", help="One file per method; no rater sees a NAME."),
    ],
    out: Annotated[Path, typer.Option(help="Folder of the survey.")],
    prompts: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[CATEGORY=]FILE",
            help="Texts of the prompts: rows of prompt_id, prompt and perhaps category, or a run's pairs; if not "
            "given the pairs-eval.jsonl beside the generations. Repeat.",
        ),
    ] = None,
    per_category: Annotated[int, typer.Option(min=0, help="Questions per category; 0 for all.")] = 25,
    ask: Annotated[
        list[str] | None, typer.Option(metavar="[CATEGORY=]TEXT", help="The sentence above the answers. Repeat.")
    ] = None,
    title: Annotated[str | None, typer.Option(help="Title of the first page.")] = None,
    consent: Annotated[Path | None, typer.Option(help="Text file: what raters agree to.")] = None,
    field: Annotated[
        list[str] | None, typer.Option(help="Something to ask about the rater, such as a name; nothing by default.")
    ] = None,
    repeats: Annotated[int, typer.Option(min=0, help="Questions per category that each rater sees twice.")] = 0,
    checks: Annotated[int, typer.Option(min=0, help="Attention checks to make.")] = 0,
    check_file: Annotated[
        Path | None, typer.Option(help="Attention checks of your own: rows of prompt, answers, right (from 0).")
    ] = None,
    max_failed_checks: Annotated[int, typer.Option(min=0, help="Who fails more is left out.")] = 0,
    min_seconds: Annotated[float, typer.Option(min=0, help="Whose median per question is less is left out.")] = 0.0,
    seed: Annotated[int, typer.Option(min=0, help="Draws the questions and all orders.")] = 0,
) -> None:
    """Make a survey of replies to the same prompts. The rules for leaving raters out are fixed here, before any answer.

    The same arguments make the same survey. Each rater sees answers in an order of their own, balanced over raters.
    """
    from coala.cli.output import emit, say
    from coala.leaderboards.judges import load_replies
    from coala.survey import build as build_survey
    from coala.survey import save_survey
    from coala.survey.records import FILE
    from coala.values import CoalaError

    methods: dict[str, Any] = {}
    beside: list[Path] = []
    for argument in generations:
        name, file = _named(argument)
        name = name or Path(file).name.partition(".")[0].removeprefix("generations-")
        if name in methods:
            raise CoalaError(f"Two files are of a method {name!r}. Name them: coala survey build one=FILE other=FILE.")
        methods[name] = load_replies(Path(file))
        beside.append(Path(file).parent / "pairs-eval.jsonl")
    found = [prompt for argument in prompts or _beside(beside) for prompt in _read_prompts(*_named(argument))]
    if not prompts:  # runs on the same pairs hold the same prompts
        found = list({prompt.prompt_id: prompt for prompt in found}.values())
    settings: dict[str, Any] = {"fields": tuple(field or ())}
    if title is not None:
        settings["title"] = title
    if consent is not None:
        settings["consent"] = _text(consent)
    survey = build_survey(
        methods,
        found,
        asks=_asks(ask or [], [prompt.category for prompt in found]),
        per_category=per_category,
        repeats=repeats,
        checks=checks,
        own_checks=_read_checks(check_file) if check_file else (),
        seed=seed,
        max_failed_checks=max_failed_checks,
        min_seconds=min_seconds,
        **settings,
    )
    if (out / FILE).exists():
        raise CoalaError(f"{out}: holds answers to a survey already. Give another --out, or move {FILE} away.")
    path = save_survey(out, survey)
    for remark in survey.remarks:
        say(f"note: {remark}")
    pages = len(survey.questions) + repeats * len(survey.categories) + len(survey.checks)
    emit(
        {
            "survey": path,
            "methods": list(survey.methods),
            "questions": {name: len(survey.of_category(name)) for name in survey.categories},
            "checks": len(survey.checks),
            "pages_per_rater": pages,
            "digest": survey.digest,
            "remarks": list(survey.remarks),
        },
        alone=True,
    )


@app.command(epilog=f"Example: `{ADMIN}=... coala survey serve survey --port 8000`")
def serve(
    survey: Folder,
    host: Annotated[str, typer.Option(help="Address to listen on; others than loopback can be reached.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 8000,
    invited_only: Annotated[
        bool, typer.Option("--invited-only", help="Only who has a personal link (made on the organiser's page).")
    ] = False,
    site: Annotated[
        str | None,
        typer.Option(help="Address by which people reach it through a proxy, such as https://survey.example."),
    ] = None,
) -> None:
    """Serve the survey until Ctrl-C; start it again at any time, answers are kept in SURVEY/answers.sqlite.

    The organiser's page is /admin; its password is the environment's COALA_SURVEY_ADMIN_TOKEN, or is made and printed.
    """
    from coala.cli.output import say
    from coala.survey import Records, load_survey
    from coala.values import CoalaError

    try:
        from coala.survey.app import create_app
        from coala.survey.records import new_token
        from coala.web.listening import listen, server
        from coala.web.strangers import LOOPBACK, origin_of
    except ImportError as error:
        raise CoalaError(
            f"Serving needs {error.name or 'a package'}, which is not installed: pip install 'coala-align[serve]'."
        ) from None
    loaded = load_survey(survey)
    token = os.environ.get(ADMIN)
    if token is not None and len(token) < SHORTEST_TOKEN:
        raise CoalaError(f"{ADMIN} has {len(token)} characters; expected at least {SHORTEST_TOKEN}, hard to guess.")
    known = None if site is None else origin_of(site)
    local = host in LOOPBACK
    # Made here: a port that is taken should be told before a password is printed.
    with listen(host, port) as listening:
        records = Records(survey, loaded)
        here = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        say(f"survey: {known or here}/   organiser: {known or here}/admin")
        if token is None:
            token = new_token()
            say(f"password of the organiser's page, shown this once (any user name): {token}")
        if not local:
            say("note: this address can be reached by others, unencrypted; put a proxy with TLS in front of it.")
        app = create_app(
            loaded, records, admin_token=token, invited_only=invited_only, local=local or known is not None, site=known
        )
        try:
            server(app, grace=GRACE).run(sockets=[listening])
        finally:
            records.close()


app.command("results", epilog="Example: `coala survey results survey --of coala`")(results)


def _named(argument: str) -> tuple[str, str]:
    """NAME=FILE, or a file alone; a path that exists is never cut at its equals sign."""
    name, sign, file = argument.partition("=")
    return (name, file) if sign and not Path(argument).exists() else ("", argument)


def _asks(given: Sequence[str], categories: Sequence[str]) -> Mapping[str, str]:
    """The sentence of each category: its own, or the one given without a category."""
    asks: dict[str, str] = {}
    for argument in given:
        name, sign, text = argument.partition("=")
        if sign and name in categories:
            asks[name] = text
        else:
            asks |= {category: argument for category in categories if category not in asks}
    return asks


def _beside(files: Sequence[Path]) -> list[str]:
    """The runs' own pairs, each once."""
    from coala.values import CoalaError

    there = list(dict.fromkeys(str(path) for path in files if path.exists()))
    if not there:
        raise CoalaError(
            f"There is no pairs-eval.jsonl beside the generations ({files[0].parent}). Give the texts of the prompts "
            "with --prompts."
        )
    return there


def _read_prompts(category: str, file: str) -> list[Prompt]:
    from coala.alignment.answers import read_prompts
    from coala.survey import Prompt

    return [Prompt(one.id, one.text, one.category or category or "questions") for one in read_prompts(file)]


def _read_checks(file: Path) -> list[Check]:
    from coala.evaluation.rows import read_rows
    from coala.survey import Check
    from coala.survey.form import clean

    found = []
    for row in read_rows(file):
        answers, right = row.get("answers"), row.get("right")
        if not isinstance(answers, list) or not all(isinstance(answer, str) for answer in answers):
            raise row.fault("answers", "something else", "a list of texts", "mend or delete the row")
        if isinstance(right, bool) or not isinstance(right, int):
            raise row.fault("right", "something else", "the number of an answer, from 0", "mend or delete the row")
        found.append(Check(clean(row.text("prompt")), tuple(map(clean, answers)), right))
    return found


def _text(file: Path) -> str:
    from coala.values import CoalaError

    try:
        return file.read_text(encoding="utf-8")
    except OSError as error:
        raise CoalaError(f"{file}: cannot be read ({error.strerror}). Check the path.") from None
    except UnicodeDecodeError:
        raise CoalaError(f"{file}: is not UTF-8 text. Save it as UTF-8.") from None
