"""The pages of the survey: plain HTML from the server, one form per page, nothing that a method could show through.

Every page is a function of the rater's token and the page's number; the answers of a question travel together in one
document of one size whatever their order. A choice is on disk before the browser is sent on. Needs the extra `serve`.
"""

from __future__ import annotations

import base64
import binascii
import hmac
import sqlite3
import string
from collections.abc import Callable, Collection, Mapping
from http import HTTPStatus
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import parse_qs

from fastapi import Depends, FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, RedirectResponse, Response
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException as AnyHTTPException
from starlette.types import ASGIApp, Receive, Scope, Send

from coala.pages.parts import environment, style_sheet
from coala.survey.form import Survey
from coala.survey.records import Rater, Records
from coala.web.bodies import TooLarge, TooSlow, replay, whole_body
from coala.web.strangers import foreign, headed, known_host, names_of, security_headers

LARGEST_BODY = 16 * 1024
LONGEST_FIELD = 200
MOST_INVITATIONS = 1000
NOT_YET = "Please answer the pages before this one first."
BODY_TIME = 20.0
HEADERS = security_headers(form_action="'self'")
Fields = Mapping[str, list[str]]


async def form_fields(request: Request) -> Fields:
    """The fields of a form; HTTPException for a body of another type, or not text."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/x-www-form-urlencoded":
        raise HTTPException(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "This address takes the form of its page, nothing else.")
    body = await request.body()
    try:
        return parse_qs(body.decode("ascii"), keep_blank_values=True, errors="strict", max_num_fields=50)
    except (UnicodeDecodeError, ValueError):
        raise HTTPException(HTTPStatus.BAD_REQUEST, "The form could not be read.") from None


Form = Annotated[Fields, Depends(form_fields)]


def create_app(
    survey: Survey,
    records: Records,
    *,
    admin_token: str,
    invited_only: bool = False,
    local: bool = False,
    site: str | None = None,
) -> FastAPI:
    """The application. Pages for the organiser ask for ``admin_token`` as the password of HTTP Basic authentication.

    ``local``: answer to this machine's own names alone, and that of ``site``, the origin by which others know the
    server if a proxy stands before it.
    """
    # No generated documentation: its pages fetch scripts from elsewhere. No redirects made of a request's Host.
    app = FastAPI(title=survey.title, docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)
    here = Path(__file__).parent / "pages"
    pages, look = environment(here), style_sheet(here / "survey.css")
    keys = (here / "keys.js").read_text("utf-8")

    def page(name: str, status: int = 200, **values: Any) -> HTMLResponse:
        shown = {"problem": "", "link": "", "link_text": "", "alarm": False} | values
        return HTMLResponse(pages.get_template(name).render(shown), status)

    def message(heading: str, *paragraphs: str, status: int = 200, link: str = "", link_text: str = "") -> HTMLResponse:
        values = {"title": heading, "paragraphs": paragraphs, "link": link, "link_text": link_text}
        return page("message.html", status, alarm=status >= 400, **values)

    def no_page(status: int, *paragraphs: str) -> Response:
        return message("That did not work", *paragraphs, status=status)

    app.add_middleware(Gate, names=names_of(site) if local else None, site=site, refuse=no_page)

    def taking_part(token: str) -> Rater:
        rater = records.rater(token)
        if rater is None:
            raise HTTPException(HTTPStatus.NOT_FOUND, "This link is unknown. Check that it was copied completely.")
        if rater.withdrawn:
            raise HTTPException(HTTPStatus.GONE, "You have withdrawn; everything you entered was deleted.")
        return rater

    def welcome(token: str, status: int = 200, problem: str = "", entered: list[str] | None = None) -> HTMLResponse:
        return page(
            "welcome.html",
            status,
            title=survey.title,
            n_pages=len(survey.questions) + survey.repeats * len(survey.categories) + len(survey.checks),
            consent=[part for part in survey.consent.split("\n\n") if part.strip()],
            fields=survey.fields,
            entered=entered or [""] * len(survey.fields),
            token=token,
            problem=problem,
        )

    def question(rater: Rater, number: int, status: int = 200, problem: str = "") -> HTMLResponse:
        item = rater.pages[number - 1]
        asked = survey.checks[item.index] if item.kind == "check" else survey.questions[item.index]
        ask = "Choose one answer." if item.kind == "check" else survey.asks[survey.questions[item.index].category]
        chosen = rater.choices.get(number - 1)
        letters = string.ascii_uppercase
        return page(
            "question.html",
            status,
            title=f"Question {number} of {len(rater.pages)}",
            number=number,
            n_pages=len(rater.pages),
            prompt=asked.prompt if isinstance(asked.prompt, str) else [vars(turn) for turn in asked.prompt],
            ask=ask,
            answers=[(letters[place], asked.answers[i]) for place, i in enumerate(item.order)],
            chosen=None if chosen is None else letters[chosen],
            token=rater.token,
            problem=problem,
        )

    def onward(rater: Rater) -> RedirectResponse:
        following = rater.next_page
        return _to(f"/s/{rater.token}/" + ("done" if following is None else str(following + 1)))

    @app.get("/")
    def first() -> Response:
        if invited_only:
            return message(survey.title, "This survey is by invitation: open the personal link you were given.")
        return welcome(records.open_token())

    @app.get("/page.css")
    def style() -> Response:
        return Response(look, media_type="text/css")

    @app.get("/keys.js")
    def script() -> Response:
        return Response(keys, media_type="text/javascript")

    @app.get("/s/{token}")
    @app.get("/s/{token}/")
    def resume(token: str) -> Response:
        rater = taking_part(token)
        return onward(rater) if rater.began else welcome(token)

    @app.post("/s/{token}/begin")
    def begin(token: str, fields: Form) -> Response:
        # Nobody takes part by a link that a page elsewhere made up.
        if records.rater(token) is None and not records.made(token):
            raise HTTPException(HTTPStatus.NOT_FOUND, "This link is unknown. Check that it was copied completely.")
        entered = [_one(fields, f"field{i + 1}")[:LONGEST_FIELD] for i in range(len(survey.fields))]
        if _one(fields, "agree") != "yes":
            return welcome(token, HTTPStatus.UNPROCESSABLE_ENTITY, "Please tick the box if you take part.", entered)
        if not records.begin(token, dict(zip(survey.fields, entered, strict=True)), invited_only=invited_only):
            raise HTTPException(HTTPStatus.NOT_FOUND, "This link is unknown. Check that it was copied completely.")
        return onward(taking_part(token))

    @app.get("/s/{token}/done")
    def done(token: str) -> Response:
        rater = taking_part(token)
        if not rater.began or rater.next_page is not None:
            return _to(f"/s/{token}")
        last = f"/s/{token}/{len(rater.pages)}"
        words = f"All {len(rater.pages)} answers are saved. You can close this page."
        return message("Thank you", words, link=last, link_text="Show the last page again")

    @app.get("/s/{token}/withdraw")
    def leave(token: str) -> Response:
        rater = taking_part(token)
        return page("withdraw.html", title="Withdraw", token=rater.token)

    @app.post("/s/{token}/withdraw")
    def withdraw(token: str, fields: Form) -> Response:
        rater = taking_part(token)
        if _one(fields, "sure") != "yes":
            problem = "Nothing was deleted: please tick the box if you want that."
            status = HTTPStatus.UNPROCESSABLE_ENTITY
            return page("withdraw.html", status, title="Withdraw", token=token, problem=problem)
        records.withdraw(rater)
        return message("You have withdrawn", "Everything you entered was deleted. Thank you for your time.")

    @app.get("/s/{token}/{number}")
    def show(token: str, number: int) -> Response:
        rater = taking_part(token)
        reached = len(rater.choices) + 1
        if not rater.began or not 1 <= number <= min(reached, len(rater.pages)):
            if number < 1 or (rater.began and number > len(rater.pages)):
                raise HTTPException(HTTPStatus.NOT_FOUND, "This page does not exist.")
            return _to(f"/s/{token}")
        records.view(rater, number - 1)
        return question(rater, number)

    @app.post("/s/{token}/{number}")
    def submit(token: str, number: int, fields: Form) -> Response:
        rater = taking_part(token)
        if not rater.began or not 1 <= number <= len(rater.pages):
            raise HTTPException(HTTPStatus.NOT_FOUND, "This page does not exist.")
        if number > len(rater.choices) + 1:
            raise HTTPException(HTTPStatus.CONFLICT, NOT_YET)
        letter = _one(fields, "choice")
        options = string.ascii_uppercase[: len(rater.pages[number - 1].order)]
        if len(letter) != 1 or letter not in options:
            problem = "Please choose one of the answers."
            return question(rater, number, HTTPStatus.UNPROCESSABLE_ENTITY, problem)
        try:
            records.answer(rater, number - 1, options.index(letter))
        except LookupError:
            raise HTTPException(HTTPStatus.CONFLICT, NOT_YET) from None
        return _to(f"/s/{token}/" + (str(number + 1) if number < len(rater.pages) else "done"))

    def organiser(request: Request) -> None:
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        try:
            password = base64.b64decode(given, validate=True).partition(b":")[2]
        except (binascii.Error, ValueError):
            password = b""
        if scheme.lower() != "basic" or not hmac.compare_digest(password, admin_token.encode()):
            raise HTTPException(
                HTTPStatus.UNAUTHORIZED,
                "This page is for the organiser of the survey.",
                headers={"WWW-Authenticate": 'Basic realm="survey", charset="UTF-8"'},
            )
        # A browser sends a password it knows along with requests that other sites begin.
        if foreign(request.headers, site):
            raise HTTPException(HTTPStatus.FORBIDDEN, "Open this page by its own address.")

    def overview(links: list[str]) -> HTMLResponse:
        raters = records.raters()
        begun = [rater for rater in raters if rater.began and not rater.withdrawn]
        rows = [
            ("Questions", len(survey.questions)),
            ("Invited who have not started", sum(not r.began and not r.withdrawn for r in raters)),
            ("Taking part", len(begun)),
            ("Finished", sum(r.next_page is None for r in begun)),
            ("Withdrawn", sum(r.withdrawn for r in raters)),
            ("Answers", records.n_answers),
            ("Answers that were changed", records.n_changed),
        ]
        return page("admin.html", title=survey.title, rows=rows, links=links, invited_only=invited_only)

    @app.get("/admin", dependencies=[Depends(organiser)])
    def admin() -> Response:
        return overview([])

    @app.post("/admin/invitations", dependencies=[Depends(organiser)])
    def invitations(request: Request, fields: Form) -> Response:
        wanted = _one(fields, "n")
        if not wanted.isascii() or not wanted.isdigit() or not 1 <= int(wanted[:9]) <= MOST_INVITATIONS:
            raise HTTPException(
                HTTPStatus.UNPROCESSABLE_ENTITY, f"Give a number of links from 1 to {MOST_INVITATIONS}."
            )
        # A Host can be made up by who asks; the site is the organiser's own word.
        start = f"{site}/" if site else str(request.base_url)
        return overview([f"{start}s/{token}" for token in records.invite(int(wanted))])

    @app.exception_handler(AnyHTTPException)
    def refused(_: Request, error: AnyHTTPException) -> Response:
        known = {404: "Not found", 405: "Not allowed", 401: "Organiser only", 410: "Withdrawn", 409: "Not yet"}
        plain = error.detail if isinstance(error, HTTPException) else "This page does not exist."
        answer = message(known.get(error.status_code, "That did not work"), plain, status=error.status_code)
        answer.headers.update(error.headers or {})
        return answer

    @app.exception_handler(RequestValidationError)
    def unreadable(_: Request, __: RequestValidationError) -> Response:
        return message("Not found", "This page does not exist.", status=HTTPStatus.NOT_FOUND)

    @app.exception_handler(sqlite3.Error)
    def unsaved(_: Request, __: sqlite3.Error) -> Response:
        words = (
            "Your last answer could not be saved. Earlier ones are safe. Please go back and send it again in a minute."
        )
        return message("Not saved", words, status=HTTPStatus.SERVICE_UNAVAILABLE)

    @app.exception_handler(Exception)
    def broken(_: Request, __: Exception) -> Response:
        words = "Something went wrong on our side. Earlier answers are safe. Please go back and try again."
        answer = message("Not saved", words, status=HTTPStatus.INTERNAL_SERVER_ERROR)
        answer.headers.update(HEADERS)  # made outside of the layer that adds them
        return answer

    return app


class Gate:
    """Refuses what must not reach ``app``, and adds the security headers to every response, those of errors among them.

    ``names``, unless ``None``, are those that the server answers to. Forms are taken from the server's own pages alone,
    whole within a time and of ``largest`` bytes at most; links may be anywhere.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        names: Collection[str] | None,
        site: str | None,
        refuse: Callable[..., Response],
        headers: Mapping[str, str] = HEADERS,
        largest: int = LARGEST_BODY,
    ) -> None:
        self._app, self._names, self._site, self._refuse = app, names, site, refuse
        self._headers, self._largest = headers, largest

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        sending = headed(send, self._headers)
        found = await self._passed(scope, receive)
        if isinstance(found, Response):
            await found(scope, receive, sending)
        elif found is not None:
            await self._app(scope, found, sending)

    async def _passed(self, scope: Scope, receive: Receive) -> Receive | Response | None:
        """What to read the request from, or the answer to it; ``None`` if the client has gone."""
        headers = Headers(scope=scope)
        if self._names is not None and not known_host(headers, self._names):
            return self._refuse(
                HTTPStatus.FORBIDDEN,
                f"This server answers to these names alone: {', '.join(self._names)}.",
                "If a proxy passes on another name, start the survey with --site https://NAME.",
            )
        if scope["method"] in ("GET", "HEAD"):
            return receive
        if foreign(headers, self._site):
            return self._refuse(HTTPStatus.FORBIDDEN, "Open the survey by its own address and answer there.")
        try:
            body = await whole_body(headers, receive, most=self._largest, seconds=BODY_TIME)
        except TooLarge:
            return self._refuse(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "That is too long for this form.")
        except TooSlow:
            return self._refuse(HTTPStatus.REQUEST_TIMEOUT, "The form timed out. Please send it again.")
        return None if body is None else replay(body, receive)


def _one(fields: Fields, name: str) -> str:
    """The field's only value; nothing for a field that is absent or sent twice."""
    values = fields.get(name, [])
    return values[0].strip() if len(values) == 1 else ""


def _to(path: str) -> RedirectResponse:
    return RedirectResponse(path, HTTPStatus.SEE_OTHER)
