"""`coala survey`: a double-blind survey of people over the replies of several methods."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from coala.cli.options import RunOption, needs_extra
from coala.messages import CoalaError

Folder = Annotated[Path, typer.Argument(metavar="SURVEY", help="Survey folder of `coala survey build`.")]

app = typer.Typer(no_args_is_help=True, help="Ask people which reply is best, in a blind survey.")

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
        typer.Argument(metavar="[NAME=]GENERATIONS...", help="One file per method; raters never see a NAME."),
    ],
    out: Annotated[Path, typer.Option(help="Survey folder to write.")],
    prompts: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[CATEGORY=]FILE",
            help="File of prompts: rows of prompt_id, prompt and optionally category, or a run's pairs. Repeatable "
            "(default: pairs-eval.jsonl next to the generations).",
        ),
    ] = None,
    per_category: Annotated[int, typer.Option(min=0, help="Number of questions per category; 0 is all.")] = 25,
    ask: Annotated[
        list[str] | None, typer.Option(metavar="[CATEGORY=]TEXT", help="Sentence above the answers. Repeatable.")
    ] = None,
    title: Annotated[str | None, typer.Option(help="Title of the first page (default: a general one).")] = None,
    consent: Annotated[
        Path | None, typer.Option(help="Text file that raters agree to (default: a general one).")
    ] = None,
    field: Annotated[
        list[str] | None,
        typer.Option(help="Personal detail to ask raters for, such as a name. Repeatable (default: none)."),
    ] = None,
    repeats: Annotated[
        int, typer.Option(min=0, help="Number of questions per category that each rater sees twice.")
    ] = 0,
    checks: Annotated[int, typer.Option(min=0, help="Number of attention checks to generate.")] = 0,
    check_file: Annotated[
        Path | None,
        typer.Option(
            help="File of your own attention checks: rows of prompt, answers, right (from 0) (default: none)."
        ),
    ] = None,
    max_failed_checks: Annotated[
        int, typer.Option(min=0, help="Maximum number of failed checks before a rater is excluded.")
    ] = 0,
    min_seconds: Annotated[
        float, typer.Option(min=0, help="Minimum median time per question, in seconds; faster raters are excluded.")
    ] = 0.0,
    seed: Annotated[int, typer.Option(min=0, help="Random seed of the questions and their order.")] = 0,
) -> None:
    """Build a survey of replies to the same prompts. The rules for excluding raters are fixed here, before any answer.

    The same arguments give the same survey. Each rater sees the answers in a different order, balanced over raters.
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
    host: Annotated[
        str, typer.Option(help="Address to listen on; other machines can reach any but loopback.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 8000,
    invited_only: Annotated[
        bool,
        typer.Option(
            "--invited-only", help="Admit only raters with a personal link (created on the organiser's page)."
        ),
    ] = False,
    site: Annotated[
        str | None,
        typer.Option(
            help="Public address of a proxy in front, such as https://survey.example (default: host and port)."
        ),
    ] = None,
) -> None:
    """Serve the survey until Ctrl-C. Restart it at any time: answers are saved in SURVEY/answers.sqlite.

    The organiser's page is /admin. Its password is COALA_SURVEY_ADMIN_TOKEN in the environment, else it is generated.
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
            say(f"password of the organiser's page, shown only once (any user name): {token}")
        if not local:
            say("note: other machines can reach this address, unencrypted; put a proxy with TLS in front of it.")
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
        raise CoalaError(
            f"{ADMIN} has {len(token)} characters; expected at least {SHORTEST_TOKEN} that are hard to guess."
        )
    return token


@app.command(epilog="Example: `coala survey results survey --of coala`")
def results(
    survey: Folder,
    of: Annotated[
        str | None,
        typer.Option(help="Method to compare with each of the others, question by question (default: all pairs)."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for results.html and results.json (default: SURVEY).")
    ] = None,
    save_votes: Annotated[
        Path | None,
        typer.Option(help="File of the counted votes, one JSON row each, without personal data (default: none)."),
    ] = None,
    draws: Annotated[int, typer.Option(min=1, help="Number of bootstrap draws.")] = 1000,
    seed: Annotated[int, typer.Option(min=0, help="Random seed of the bootstrap.")] = 0,
    into: RunOption = None,
) -> None:
    """Report win rates, differences, agreement and vote quality, as tables and a page."""
    from coala.cli.output import command_line, conclude
    from coala.leaderboards.record import run_of
    from coala.leaderboards.survey import count_survey

    found = count_survey(survey, of=of, out=out, save_votes=save_votes, draws=draws, seed=seed, command=command_line())
    conclude(found, run_of(into, survey))
