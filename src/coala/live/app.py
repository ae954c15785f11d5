"""The page of a session: a pair, keys, what is known so far. Needs the extra `serve`.

A rater comes by a personal link; the owner's may also type in prompts and finish. Every click is on the disk before its
answer is sent; a page that does not hear may send it again.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from http import HTTPStatus
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, RedirectResponse, Response
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator
from starlette.exceptions import HTTPException as AnyHTTPException

from coala.live.figures import figures, waiting_for
from coala.live.jobs import JOBS, Jobs
from coala.live.journal import Asked, Side, Verdict
from coala.live.session import OWNER, Conflict, Session
from coala.live.writer import Threads
from coala.messages import CoalaError
from coala.pages.parts import environment, style_sheet
from coala.serve.bodies import read
from coala.serve.errors import Refusal
from coala.store import StoreError
from coala.survey.app import Gate
from coala.values import user
from coala.web.strangers import names_of, security_headers

log = logging.getLogger("coala.live")
HEADERS = security_headers(connect_src="'self'")
LARGEST_BODY = 64 * 1024
LONGEST_TEXT = 20_000
Named = Annotated[str, StringConstraints(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9_-]+$")]
Text = Annotated[str, StringConstraints(max_length=LONGEST_TEXT)]
M = TypeVar("M", bound=BaseModel)


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Click(_Body):
    """What a rater says of a pair; ``text`` is ``side`` as they would have it."""

    question: Named
    click: Named
    verdict: Verdict
    tags: Annotated[list[Annotated[str, StringConstraints(max_length=40)]], Field(max_length=10)] = []
    side: Side = ""
    text: Text = ""

    @model_validator(mode="after")
    def _whole(self) -> Click:
        if (self.verdict == "edited") != bool(self.side) or (self.verdict == "edited") != bool(self.text.strip()):
            raise ValueError("an edit has a side and a text that is not empty, and nothing else has")
        return self


class Undo(_Body):
    question: Named
    click: Named


class NewPrompt(_Body):
    text: Text

    @model_validator(mode="after")
    def _says(self) -> NewPrompt:
        if not self.text.strip():
            raise ValueError("a prompt is not empty")
        return self


class Job(_Body):
    name: Literal["fit", "distil", "export", "reward-model"]


def create_app(
    session: Session, threads: Threads, jobs: Jobs, *, title: str, local: bool = True, site: str | None = None
) -> FastAPI:
    """The application; it starts and ends neither the session nor its threads.

    ``local``: answer to this machine's own names alone, and that of ``site``; and lead who opens the first page there
    to the owner's page.
    """
    app = FastAPI(title=title, docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)
    app.state.ending = False
    here = Path(__file__).parent / "pages"
    pages, look = environment(here), style_sheet(here / "live.css")
    script = (here / "live.js").read_text("utf-8")

    def refuse(status: int, *paragraphs: str) -> Response:
        return Refusal(status, " ".join(paragraphs)).response()

    app.add_middleware(
        Gate,
        names=names_of(site) if local else None,
        site=site,
        refuse=refuse,
        headers=HEADERS,
        largest=LARGEST_BODY,
    )

    def rater(token: str) -> str:
        name = session.name_of(token)
        if name is None:
            raise Refusal(HTTPStatus.NOT_FOUND, "This link is unknown. Check that it was copied completely.")
        return name

    def owner(token: str) -> None:
        if rater(token) != OWNER:
            raise Refusal(HTTPStatus.FORBIDDEN, "Only the owner's link may do that.")

    def state(name: str) -> dict[str, Any]:
        question = session.question(name)
        waits = "" if question is not None else waiting_for(session, threads.trouble, threads.wait)
        with session.lock:
            last = session.journal.last_answer(name)
            mine = sum(session.journal.asked[one].rater == name for one in session.journal.answered)
            clicks = len(session.journal.answered)
            shown = None if question is None else _shown(question, session)
        return {
            "question": shown,
            "waiting": waits,
            "trouble": threads.trouble,
            "answered": mine,
            "last": None if last is None else {"question": last.id, "click": last.click, "verdict": last.verdict},
            "figures": [vars(one) for one in figures(session)],
            "jobs": jobs.look(clicks) if name == OWNER else {},
            "running": jobs.running if name == OWNER else "",
        }

    @app.get("/")
    def first() -> Response:
        if not local or site is not None:
            raise Refusal(HTTPStatus.FORBIDDEN, "This page is by invitation: open the personal link you were given.")
        tokens = {who: token for token, who in session.journal.raters.items()}
        return RedirectResponse(f"/r/{tokens[OWNER]}", HTTPStatus.SEE_OTHER)

    @app.get("/page.css")
    def style() -> Response:
        return Response(look, media_type="text/css")

    @app.get("/live.js")
    def code() -> Response:
        return Response(script, media_type="text/javascript")

    @app.get("/r/{token}")
    def page(token: str) -> Response:
        name = rater(token)
        shown = {"title": title, "brand": "COALA", "token": token, "owner": name == OWNER, "rater": name, "jobs": JOBS}
        return HTMLResponse(pages.get_template("live.html").render(shown))

    @app.get("/r/{token}/state")
    def look_at(token: str) -> Response:
        return JSONResponse(state(rater(token)))

    @app.post("/r/{token}/answer")
    async def answer(token: str, request: Request) -> Response:
        said = await body(request, Click)
        return await apart(lambda: answered(rater(token), said))

    def answered(name: str, said: Click) -> dict[str, Any]:
        session.answer(name, said.question, said.click, said.verdict, tags=said.tags, side=said.side, text=said.text)
        return state(name)

    @app.post("/r/{token}/undo")
    async def undo(token: str, request: Request) -> Response:
        said = await body(request, Undo)

        def undone() -> dict[str, Any]:
            name = rater(token)
            session.undo(name, said.question, said.click)
            return state(name)

        return await apart(undone)

    @app.post("/r/{token}/prompt")
    async def prompt(token: str, request: Request) -> Response:
        said = await body(request, NewPrompt)

        def added() -> dict[str, Any]:
            owner(token)
            session.add_prompts([user(said.text.strip())], typed=True)
            return state(OWNER)

        return await apart(added)

    @app.post("/r/{token}/job")
    async def job(token: str, request: Request) -> Response:
        said = await body(request, Job)

        def begun() -> dict[str, Any]:
            owner(token)
            jobs.start(said.name)
            return state(OWNER)

        return await apart(begun)

    @app.exception_handler(Refusal)
    def refused(_: Request, refusal: Refusal) -> Response:
        return refusal.response()

    @app.exception_handler(CoalaError)
    def unfit(_: Request, error: CoalaError) -> Response:
        full = isinstance(error, StoreError)
        said = f"Not saved: {error} Everything before it is safe." if full else str(error)
        status = HTTPStatus.INSUFFICIENT_STORAGE if full else HTTPStatus.CONFLICT
        return Refusal(status, said, code="conflict" if isinstance(error, Conflict) else None).response()

    @app.exception_handler(RequestValidationError)
    def unreadable(_: Request, __: RequestValidationError) -> Response:
        return Refusal(HTTPStatus.NOT_FOUND, "This page does not exist.").response()

    @app.exception_handler(AnyHTTPException)
    def other(_: Request, error: AnyHTTPException) -> Response:
        known = {404: "This page does not exist.", 405: "This address takes another method."}
        return Refusal(error.status_code, known.get(error.status_code, str(error.detail))).response()

    @app.exception_handler(Exception)
    def broken(_: Request, error: Exception) -> Response:
        log.exception("a request failed", exc_info=error)
        answer = Refusal(500, "Something went wrong on our side; saved clicks are safe. Try again.").response()
        answer.headers.update(HEADERS)  # made outside of the layer that adds them
        return answer

    return app


async def body(request: Request, model: type[M]) -> M:
    """The request's JSON; :class:`Refusal` for another type or what does not fit."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise Refusal(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "This address takes application/json.")
    try:
        return await read(request, model)
    except UnicodeDecodeError:
        raise Refusal(HTTPStatus.BAD_REQUEST, "The body is not UTF-8.") from None


async def apart(work: Any) -> Response:
    """What ``work`` returns, made in a thread: the disk is waited for there."""
    from starlette.concurrency import run_in_threadpool

    found: Mapping[str, Any] = await run_in_threadpool(work)
    return JSONResponse(dict(found))


def _shown(question: Asked, session: Session) -> dict[str, Any]:
    """A question as a rater sees it: nothing of whether it is held out, nor of what the head thinks."""
    turns = session.journal.prompts[question.prompt].turns
    return {
        "id": question.id,
        "prompt": [{"role": turn.role, "text": turn.text} for turn in turns],
        "first": question.first.text,
        "second": question.second.text,
    }
