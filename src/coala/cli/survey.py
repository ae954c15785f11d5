"""`coala survey`: a double-blind survey of people over the replies of several methods."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from coala.cli.options import RunOption, needs_extra
from coala.messages import CoalaError

Folder = Annotated[Path, typer.Argument(metavar="SURVEY", help="A folder made by `coala survey build`.")]

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
    from coala.leaderboards.survey import build_survey, survey_summary

    path, survey = build_survey(
        generations,
        out,
        prompts=prompts or (),
        asks=ask or (),
        consent=consent,
        check_file=check_file,
        title=title,
        fields=tuple(field or ()),
        per_category=per_category,
        repeats=repeats,
        checks=checks,
        seed=seed,
        max_failed_checks=max_failed_checks,
        min_seconds=min_seconds,
    )
    for remark in survey.remarks:
        say(f"note: {remark}")
    emit(survey_summary(path, survey, repeats), alone=True)


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

    with needs_extra("serve", "Serving"):
        from coala.survey.app import create_app
        from coala.survey.records import new_token
        from coala.web.listening import listen, server
        from coala.web.strangers import LOOPBACK, origin_of
    loaded = load_survey(survey)
    token = _token()
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
        safe = local or known is not None
        app = create_app(loaded, records, admin_token=token, invited_only=invited_only, local=safe, site=known)
        try:
            server(app, grace=GRACE).run(sockets=[listening])
        finally:
            records.close()


def _token() -> str | None:
    """The organiser's password, if the environment holds one."""
    token = os.environ.get(ADMIN)
    if token is not None and len(token) < SHORTEST_TOKEN:
        raise CoalaError(f"{ADMIN} has {len(token)} characters; expected at least {SHORTEST_TOKEN}, hard to guess.")
    return token


@app.command(epilog="Example: `coala survey results survey --of coala`")
def results(
    survey: Folder,
    of: Annotated[str | None, typer.Option(help="Method compared with the others question by question.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for results.html and results.json; SURVEY.")] = None,
    save_votes: Annotated[
        Path | None, typer.Option(help="File for the counted votes, one JSON row each, without personal data.")
    ] = None,
    draws: Annotated[int, typer.Option(min=1, help="Bootstrap draws.")] = 1000,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the bootstraps.")] = 0,
    into: RunOption = None,
) -> None:
    """Win rates, differences, agreement and the quality of the votes: tables, a page, one JSON line."""
    from coala.cli.output import command_line, conclude
    from coala.leaderboards.record import run_of
    from coala.leaderboards.survey import count_survey

    found = count_survey(survey, of=of, out=out, save_votes=save_votes, draws=draws, seed=seed, command=command_line())
    conclude(found, run_of(into, survey))
