"""`coala survey`: a double-blind survey of people over the replies of several methods."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from coala.survey import Check, Prompt, Results, Survey, Votes

app = typer.Typer(no_args_is_help=True, help="Ask people which reply is best, without telling whose it is.")

ADMIN = "COALA_SURVEY_ADMIN_TOKEN"
SHORTEST_TOKEN = 16
Folder = Annotated[Path, typer.Argument(metavar="SURVEY", help="A folder made by `coala survey build`.")]


@app.command(
    epilog="Example: `coala survey build coala=a/generations-guided.jsonl sft=a/generations-unguided.jsonl "
    "--prompts a/pairs-eval.jsonl --out survey`"
)
def build(
    generations: Annotated[
        list[str],
        typer.Argument(metavar="[NAME=]GENERATIONS...", help="One file per method; no rater sees a NAME."),
    ],
    prompts: Annotated[
        list[str],
        typer.Option(
            metavar="[CATEGORY=]FILE",
            help="Texts of the prompts: rows of prompt_id, prompt and perhaps category, or a run's pairs. Repeat.",
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder of the survey.")],
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
    from coala.cli.screen import emit, say
    from coala.store import load_generations
    from coala.survey import build as build_survey
    from coala.survey import save_survey
    from coala.survey.records import FILE
    from coala.values import CoalaError

    methods: dict[str, Any] = {}
    for argument in generations:
        name, file = _named(argument)
        name = name or Path(file).name.partition(".")[0].removeprefix("generations-")
        if name in methods:
            raise CoalaError(f"Two files are of a method {name!r}. Name them: coala survey build one=FILE other=FILE.")
        try:
            methods[name] = load_generations(Path(file))
        except TypeError as error:
            raise CoalaError(
                f"{file}: is no file of generations ({error}). Give generations-*.jsonl of a run."
            ) from None
    found = [prompt for argument in prompts for prompt in _read_prompts(*_named(argument))]
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
        }
    )


@app.command(epilog=f"Example: `{ADMIN}=... coala survey serve survey --port 8000`")
def serve(
    survey: Folder,
    host: Annotated[str, typer.Option(help="Address to listen on; others than loopback can be reached.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 8000,
    invited_only: Annotated[
        bool, typer.Option("--invited-only", help="Only who has a personal link (made on the organiser's page).")
    ] = False,
) -> None:
    """Serve the survey until Ctrl-C; start it again at any time, answers are kept in SURVEY/answers.sqlite.

    The organiser's page is /admin; its password is the environment's COALA_SURVEY_ADMIN_TOKEN, or is made and printed.
    """
    import socket

    from coala.cli.screen import say
    from coala.survey import Records, load_survey
    from coala.survey.records import new_token
    from coala.values import CoalaError

    try:
        import uvicorn

        from coala.survey.app import create_app
    except ImportError as error:
        raise CoalaError(
            f"Serving needs {error.name or 'a package'}, which is not installed: pip install 'coala-align[serve]'."
        ) from None
    loaded = load_survey(survey)
    token = os.environ.get(ADMIN)
    if token is not None and len(token) < SHORTEST_TOKEN:
        raise CoalaError(f"{ADMIN} has {len(token)} characters; expected at least {SHORTEST_TOKEN}, hard to guess.")
    # Made here: a port that is taken should be told before a password is printed. Named as TCP, for asyncio sends small
    # packets at once only on sockets that say so; pages would take 40 ms longer.
    listening = socket.socket(
        socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP
    )
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((host, port))
    except OSError as error:
        listening.close()
        raise CoalaError(
            f"Cannot listen on {host}, port {port} ({error.strerror}). Give another --port or --host, or end the "
            "program that uses it."
        ) from None
    with listening:
        records = Records(survey, loaded)
        site = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        say(f"survey: {site}/   organiser: {site}/admin")
        if token is None:
            token = new_token()
            say(f"password of the organiser's page, shown this once (any user name): {token}")
        if host not in ("127.0.0.1", "::1", "localhost"):
            say("note: this address can be reached by others, unencrypted; put a proxy with TLS in front of it.")
        # No access log: it would hold personal links. No server header: it tells a reader nothing they need.
        config = uvicorn.Config(
            create_app(loaded, records, admin_token=token, invited_only=invited_only),
            access_log=False,
            server_header=False,
            proxy_headers=False,
            log_level="warning",
        )
        try:
            uvicorn.Server(config).run(sockets=[listening])
        finally:
            records.close()


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
) -> None:
    """Win rates, differences, agreement and the quality of the votes: tables, a page, one JSON line."""
    from coala.cli.screen import emit, say
    from coala.store import save_json, write_atomic
    from coala.survey import Records, analyse, load_survey, read_votes
    from coala.survey.page import results_page
    from coala.survey.records import FILE
    from coala.survey.results import plain
    from coala.values import CoalaError

    loaded = load_survey(survey)
    if not (survey / FILE).exists():
        raise CoalaError(f"{survey}: has no answers yet. Serve it with `coala survey serve {survey}`.")
    records = Records(survey, loaded)
    try:
        votes, changed = read_votes(loaded, records.raters()), records.n_changed
    finally:
        records.close()
    found = analyse(loaded, votes, of=of, draws=draws, seed=seed, n_changed=changed)
    page = (out or survey) / "results.html"
    write_atomic(page, results_page(found))
    save_json(page.with_suffix(".json"), plain(found))
    if save_votes is not None:
        write_atomic(save_votes, "".join(json.dumps(row) + "\n" for row in _vote_rows(loaded, votes)))
    _show(found)
    for remark in found.remarks:
        say(f"note: {remark}")
    summary = plain(found) | {"page": str(page)}
    del summary["everybody"]
    emit(summary)


def _vote_rows(survey: Survey, votes: Votes) -> Iterator[dict[str, Any]]:
    """Rows of the counted votes; raters are numbers in the order in which they came."""
    for vote in votes.counted():
        question = survey.questions[vote.question]
        yield {
            "rater": vote.rater,
            "prompt_id": question.prompt_id,
            "category": question.category,
            "method": survey.methods[vote.method],
            "position": vote.position,
            "seconds": vote.seconds,
        }


def _show(found: Results) -> None:
    """The tables on stdout."""
    from coala.cli.screen import table
    from coala.survey.page import p_value, percent, points, seconds

    def ends(low: float, high: float) -> str:
        return f"{100 * low:.1f} to {100 * high:.1f}"

    for part in found.parts:
        print(f"\n{part.name}: {part.n_votes} votes, {part.n_raters} raters, {part.n_questions} questions")
        rows = [
            [
                rate.method,
                str(rate.votes),
                f"{100 * rate.over_both.value:.1f}",
                *(
                    ends(one.low, one.high)
                    for one in (rate.over_both, rate.over_raters, rate.over_questions, rate.published)
                ),
            ]
            for rate in part.rates
        ]
        table(rows, ["method", "votes", "share %", "over both", "over raters", "over questions", "as published"])
        print()
        table(
            [
                [
                    f"{one.over_both.first} - {one.over_both.second}",
                    points(one.over_both.difference),
                    p_value(one.over_both.adjusted),
                    points(one.over_raters.difference),
                    p_value(one.over_raters.adjusted),
                ]
                for one in part.differences
            ],
            ["difference", "over both", "Holm", "over raters", "Holm"],
        )
        for name, agreement in (("Krippendorff's alpha", part.alpha), ("Fleiss' kappa", part.kappa)):
            if agreement is not None:
                print(f"{name}: {agreement}")
    print()
    short = [
        [
            " ".join(question.prompt.split())[:40],
            question.category,
            *(f"{100 * share.value:.0f}" for share in question.shares.values()),
            str(question.n),
            "-" if question.seconds is None else f"{question.seconds.value:.1f}",
        ]
        for question in found.questions
    ]
    table(short, ["question", "category", *(f"{method} %" for method in found.methods), "votes", "median s"])
    here = found.attendance
    print(f"\nraters: {here.began} began, {here.finished} finished, {here.withdrawn} withdrew, {here.invited} invited")
    for reason, n in found.excluded.items():
        print(f"left out: {n}, {reason}")
    if found.checks_passed is not None:
        print(f"attention checks passed, all raters: {percent(found.checks_passed)}, n = {found.checks_passed.n}")
    if found.repeats_same is not None and found.repeats_by_chance is not None:
        chance = f"{100 * found.repeats_by_chance:.1f} % between raters"
        print(f"repeats answered alike: {percent(found.repeats_same)}, n = {found.repeats_same.n} ({chance})")
    if found.seconds is not None:
        print(f"median time per question: {seconds(found.seconds)}, n = {found.seconds.n}")
    places = ", ".join(percent(place) for place in found.positions)
    print(f"votes by place on the page: {places}\n")


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


def _read_prompts(category: str, file: str) -> list[Prompt]:
    from coala.align.stages import prompt_id
    from coala.store import load_pairs
    from coala.survey import Prompt
    from coala.values import CoalaError, conversation_text

    rows = _rows(Path(file))
    if rows and all("chosen" in row and "prompt_id" not in row for row in rows):
        try:
            texts = {prompt_id(pair): conversation_text(pair.prompt) for pair in load_pairs(Path(file))}
        except (KeyError, TypeError, IndexError):
            raise CoalaError(
                f"{file}: holds pairs in another form than a run's; give RUN/pairs-eval.jsonl, or rows of prompt_id "
                "and prompt."
            ) from None
        return [Prompt(name, text, category or "questions") for name, text in texts.items()]
    found = []
    for number, row in enumerate(rows, 1):
        name, text = row.get("prompt_id"), row.get("prompt")
        kind = row.get("category") or category or "questions"
        if not isinstance(name, str) or not isinstance(text, str) or not text.strip() or not isinstance(kind, str):
            raise CoalaError(
                f"{file}:{number}: has the fields {', '.join(map(repr, row)) or 'none'}; expected texts prompt_id and "
                "prompt, and perhaps category."
            )
        found.append(Prompt(name, text, kind))
    return found


def _read_checks(file: Path) -> list[Check]:
    from coala.survey import Check
    from coala.survey.form import clean
    from coala.values import CoalaError

    found = []
    for number, row in enumerate(_rows(file), 1):
        prompt, answers, right = row.get("prompt"), row.get("answers"), row.get("right")
        texts = isinstance(answers, list) and all(isinstance(answer, str) for answer in answers)
        if not isinstance(prompt, str) or not texts or not isinstance(right, int):
            raise CoalaError(
                f"{file}:{number}: expected prompt (text), answers (a list of texts) and right (a number)."
            )
        found.append(Check(clean(prompt), tuple(map(clean, answers or [])), right))
    return found


def _rows(file: Path) -> list[dict[str, Any]]:
    from coala.values import CoalaError

    rows = []
    for number, line in enumerate(_text(file).split("\n"), 1):
        if line.strip():
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise CoalaError(f"{file}:{number}: is not JSON ({error}). Expected one object per line.") from None
            if not isinstance(row, dict):
                raise CoalaError(f"{file}:{number}: holds {line.strip()[:40]}; expected an object.")
            rows.append(row)
    return rows


def _text(file: Path) -> str:
    from coala.values import CoalaError

    try:
        return file.read_text(encoding="utf-8")
    except OSError as error:
        raise CoalaError(f"{file}: cannot be read ({error.strerror}). Check the path.") from None
    except UnicodeDecodeError:
        raise CoalaError(f"{file}: is not UTF-8 text. Save it as UTF-8.") from None
