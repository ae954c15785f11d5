"""The addresses of the server: replies, scores and rankings, and the playground. Needs the extra `serve`."""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.exceptions import HTTPException as AnyHTTPException

from coala.pages.parts import environment, facts_line, style_sheet
from coala.serve import bodies, schemas, shapes
from coala.serve.answers import Answering, Ask, Gone, Replying
from coala.serve.contract import ANSWERS, contract
from coala.serve.detokenize import PieceReader
from coala.serve.errors import Refusal, failure, too_busy
from coala.serve.gate import CLIENT_GONE, HEADERS, Gate
from coala.serve.limits import Limits
from coala.serve.prompts import Prompt, rendered
from coala.serve.protocol import EventStream, Protocol, events
from coala.serve.reading import TokenReader
from coala.serve.scoring import ScoredReply, read, weigh
from coala.serve.server_metrics import TYPE, Observed
from coala.serve.work import Busy
from coala.serve.worker import Worker
from coala.settings import Mode
from coala.values import CoalaError, ConvexHead, Turn, user

if TYPE_CHECKING:
    from coala.backbone import LanguageModel
    from coala.decoding import Guidance

log = logging.getLogger("coala.serve")
UNGUIDED = "-unguided"
# What /v1/completions takes if nothing is said, as the protocol has it.
SHORT_REPLY = 16
SEEDS = 2**31
# What the playground offers, in this order.
MODES: tuple[Mode, ...] = ("token", "prefix", "shift", "block", "best_of", "beam", "distilled")


@dataclass(frozen=True)
class Served:
    """What a server serves: a run's model, head and guidance under a name, and digests of what it is.

    ``temperature`` is that of requests which name none, ``system`` the first turn of those without such a turn.
    """

    name: str
    backbone: LanguageModel
    head: ConvexHead
    guidance: Guidance
    temperature: float = 1.0
    system: str | None = None

    def __post_init__(self) -> None:
        self.backbone.require_head("Replies")
        self.backbone.require(self.head.spec)
        self.backbone.changed(self.guidance.change)

    @property
    def names(self) -> tuple[str, str]:
        """The guided model and the plain one."""
        return self.name, self.name + UNGUIDED

    @property
    def distilled(self) -> bool:
        """Whether there is a distilled policy that requests can ask for."""
        try:
            self.backbone.changed()
        except CoalaError:
            return False
        return True

    @property
    def fingerprint(self) -> str:
        return f"coala-{self.head.spec.weights[:12]}"


def create_app(
    served: Served,
    limits: Limits = Limits(),  # noqa: B008 - frozen
    *,
    key: str | None = None,
    local: bool = True,
) -> FastAPI:
    """The application; its lifespan runs the model's thread.

    ``key`` is what `/v1` and `/metrics` ask for. ``local``: answer to this machine's own names alone, for servers
    without a key that listen on loopback.
    """
    from coala.decoding import Engine

    worker = Worker(partial(Engine, served.backbone, served.head, max_rows=limits.max_rows), limits.capacity)
    reading = TokenReader(limits.capacity)
    readers = {raw: PieceReader(served.backbone, raw=raw) for raw in (False, True)}
    observed = Observed(worker, limits)
    began = int(time.time())

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        worker.start()
        reading.start()
        yield
        await reading.close()
        await worker.close()

    # No generated pages: they fetch scripts from elsewhere. No redirects made of a request's Host.
    app = FastAPI(
        title=f"COALA: {served.name}",
        version="1",
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        lifespan=lifespan,
    )
    app.state.ending = False
    app.state.observed = observed
    app.add_middleware(
        Gate,
        limits=limits,
        key=key,
        local=local,
        report=observed.request,
        ending=lambda: bool(app.state.ending),
    )
    contract(app, limits, served.names, keyed=key is not None, distilled=served.distilled)

    def model_of(name: str, param: str = "model") -> str:
        if name not in served.names:
            raise Refusal(
                HTTPStatus.NOT_FOUND,
                f"There is no model {name[:80]!r}; expected one of {', '.join(served.names)}.",
                code="model_not_found",
                param=param,
            )
        return name

    def told(prompt: tuple[Turn, ...]) -> tuple[Turn, ...]:
        """The prompt behind the server's system prompt, unless it brings one."""
        if not served.system or prompt[0].role == "system":
            return prompt
        return (Turn("system", served.system), *prompt)

    def warmth(body: schemas.ChatRequest | schemas.CompletionRequest) -> float:
        return served.temperature if body.temperature is None else body.temperature

    def asked(body: schemas.ChatRequest | schemas.CompletionRequest) -> Ask:
        guided = model_of(body.model) == served.name
        if isinstance(body, schemas.ChatRequest):
            prompts: tuple[Prompt, ...] = (told(turns(body.messages)),)
            within("max_completion_tokens", body.max_completion_tokens or 1, limits.max_tokens, "tokens a reply")
            wanted = body.max_completion_tokens or body.max_tokens
            top = body.top_logprobs or 0
            n_top = top if body.logprobs or top else None
        else:
            texts = body.prompt if isinstance(body.prompt, list) else [body.prompt or ""]
            prompts = tuple(told(user(text)) if body.render == "turn" else text for text in texts)
            wanted = body.max_tokens or min(SHORT_REPLY, limits.max_tokens)
            n_top = body.logprobs
        n = body.n or 1
        drawn = max(n, body.best_of or n)
        within("max_tokens", body.max_tokens or 1, limits.max_tokens, "tokens a reply")
        within("n" if drawn == n else "best_of", drawn, limits.choices, "replies to a prompt")
        within("prompt", len(prompts), limits.prompts, "prompts a request")
        stop = body.stop or ()
        return Ask(
            prompts=prompts,
            guidance=guidance_of(body, guided),
            seed=secrets.randbelow(SEEDS) if body.seed is None else body.seed,
            temperature=warmth(body),
            stop=(stop,) if isinstance(stop, str) else tuple(stop),
            max_tokens=wanted or limits.max_tokens,
            n=n,
            drawn=drawn,
            n_top=n_top,
        )

    def guidance_of(body: schemas.ChatRequest | schemas.CompletionRequest, guided: bool) -> Guidance:
        """The request's guidance: the run's own, with what the request changes."""
        wanted = body.guidance
        found = served.guidance
        if isinstance(wanted, schemas.GuidanceSettings):
            changes = wanted.model_dump()
            for name in ("candidates", "width"):
                within(f"guidance.{name}", changes[name] or 1, limits.max_rows, "rows of the model")
            try:
                found = found.changed(**changes)
            except CoalaError as error:  # what does not go with the run's own
                raise Refusal(HTTPStatus.BAD_REQUEST, str(error), param="guidance") from None
        if not (isinstance(wanted, schemas.GuidanceSettings) and wanted.mode):
            # Clients ask for temperature 0 without knowing of modes.
            found = found.at(warmth(body))
        found = found.changed(top_p=body.top_p, top_k=body.top_k)
        return found.plain if wanted == "none" or not guided else found

    async def replying(
        kind: Literal["chat", "text"], body: schemas.ChatRequest | schemas.CompletionRequest, request: Request
    ) -> Response:
        ask = asked(body)
        protocol = Protocol(kind, body.model, served.fingerprint, ask, note_of(ask))
        require_places(len(ask.prompts) * ask.drawn)
        async with Answering(request.receive, limits.deadline) as answering:
            prompts = await answering.done(rendered(ask.prompts, served.head, served.backbone), reading)
            made = Replying(ask, prompts, answering, worker, readers[prompts[0].raw])
            await made.begin()
            if not body.stream:
                async for _ in observed.growth(made.grow()):
                    pass
                observed.usage(made.usage)
                return JSONResponse(protocol.whole(made.best(), made.usage))
            answering.keep()
        with_usage = bool(body.stream_options and body.stream_options.include_usage)
        stream = observed.stream(events(made, protocol, with_usage), made)
        return EventStream(stream, answering)

    def require_places(places: int) -> None:
        """Refuse what would find no place now, before its prompt is read."""
        try:
            worker.require(places)
        except Busy as busy:
            raise too_busy(busy.retry_after) from None

    def note_of(ask: Ask) -> str | None:
        """What a client should know of guidance by a head that was fitted on other renderings."""
        template = served.backbone.template.partition(":")[0]
        raw = any(isinstance(prompt, str) for prompt in ask.prompts)
        if not raw or not ask.guidance.active or template == "continuation":
            return None
        return (
            f"The prompt was continued without a template, but the head was fitted on replies in the model's "
            f"{template} "
            'template: its scores and guidance are less sure here. Fix: send "render": "turn", or ask '
            "/v1/chat/completions."
        )

    async def scored(
        prompts: Sequence[Sequence[Turn]], replies: Sequence[str], positions: bool, request: Request
    ) -> tuple[list[ScoredReply], dict[str, int]]:
        require_places(1)
        head, backbone = served.head, served.backbone
        async with Answering(request.receive, limits.deadline) as answering:
            texts = await answering.done(
                read(prompts, replies, head, backbone, positions=positions, cut=False), reading
            )
            found = await answering.done(weigh(texts, head, backbone), worker)
        tokens = sum(one.n_tokens for one in found)
        usage = {"prompt_tokens": tokens, "completion_tokens": 0, "total_tokens": tokens}
        observed.usage(usage)
        return found, usage

    def with_head(name: str) -> None:
        if model_of(name) != served.name:
            raise Refusal(
                HTTPStatus.BAD_REQUEST, f"{name} has no head to score with. Ask {served.name}.", param="model"
            )

    @app.post("/v1/chat/completions", responses=ANSWERS[shapes.ChatAnswer], response_model=None)
    async def chat(request: Request) -> Response:
        """A reply to a conversation, guided by the head."""
        return await replying("chat", await bodies.read(request, schemas.ChatRequest), request)

    @app.post("/v1/completions", responses=ANSWERS[shapes.CompletionAnswer], response_model=None)
    async def completions(request: Request) -> Response:
        """Replies to texts, guided by the head."""
        return await replying("text", await bodies.read(request, schemas.CompletionRequest), request)

    @app.post("/v1/score", responses=ANSWERS[shapes.ScoreAnswer], response_model=None)
    async def score_replies(request: Request) -> Response:
        """The head's scores of replies to one prompt, higher is preferred."""
        body = await bodies.read(request, schemas.ScoreRequest)
        with_head(body.model)
        within("replies", len(body.replies), limits.max_texts, "replies a request")
        prompt = user(body.prompt) if isinstance(body.prompt, str) else turns(body.prompt)
        prompts = [prompt] * len(body.replies)
        found, usage = await scored(prompts, body.replies, bool(body.positions), request)
        data = [
            {
                "object": "score",
                "index": index,
                "score": one.score,
                "dropped_tokens": one.dropped,
                "positions": [
                    {"text": text, "score": value} for text, value in zip(one.pieces, one.scores, strict=True)
                ]
                if body.positions
                else None,
            }
            for index, one in enumerate(found)
        ]
        return JSONResponse({"object": "list", "model": body.model, "data": data, "usage": usage})

    @app.post("/v1/rerank", responses=ANSWERS[shapes.RerankAnswer], response_model=None)
    async def rerank(request: Request) -> Response:
        """Documents by the head's score of each as a reply to the query, best first."""
        body = await bodies.read(request, schemas.RerankRequest)
        with_head(body.model)
        within("documents", len(body.documents), limits.max_texts, "documents a request")
        texts = [one if isinstance(one, str) else one.text for one in body.documents]
        query = user(body.query) if isinstance(body.query, str) else turns(body.query)
        found, usage = await scored([query] * len(texts), texts, False, request)
        order = sorted(range(len(texts)), key=lambda at: -found[at].score)[: body.top_n]
        results = [
            {
                "index": at,
                "relevance_score": found[at].score,
                "document": {"text": texts[at]} if body.return_documents else None,
            }
            for at in order
        ]
        name = f"rerank-{secrets.token_hex(12)}"
        return JSONResponse({"id": name, "model": body.model, "results": results, "usage": usage})

    def about(name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": began, "owned_by": "coala"}

    @app.get("/v1/models", responses=ANSWERS[shapes.ModelList], response_model=None)
    async def models() -> Response:
        """The guided model and the plain one."""
        return JSONResponse({"object": "list", "data": [about(name) for name in served.names]})

    @app.get("/v1/models/{model}", responses=ANSWERS[shapes.ModelFacts], response_model=None)
    async def model(model: str) -> Response:
        """One of them."""
        return JSONResponse(about(model_of(model)))

    @app.get("/healthz", responses=ANSWERS[shapes.Health], response_model=None)
    async def health() -> Response:
        """Whether the server does its work; 503 once it does not."""
        status = "ending" if app.state.ending else "ok" if worker.alive else "broken"
        return JSONResponse({"status": status, "model": served.name}, 200 if status == "ok" else 503)

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        """Counts and times for Prometheus."""
        return PlainTextResponse(observed.exposition(), media_type=TYPE)

    pages = Path(__file__).parent / "pages"
    shown = playground(pages, served, limits, keyed=key is not None)
    look = style_sheet(pages / "playground.css")
    script = (pages / "playground.js").read_text("utf-8")

    @app.get("/", include_in_schema=False)
    async def first() -> Response:
        return HTMLResponse(shown)

    @app.get("/page.css", include_in_schema=False)
    async def style() -> Response:
        return Response(look, media_type="text/css")

    @app.get("/playground.js", include_in_schema=False)
    async def code() -> Response:
        return Response(script, media_type="text/javascript")

    @app.exception_handler(Refusal)
    async def refused(_: Request, refusal: Refusal) -> Response:
        return refusal.response()

    @app.exception_handler(Gone)
    async def gone(_: Request, __: Gone) -> Response:
        return Response(status_code=CLIENT_GONE)  # to nobody

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, __: RequestValidationError) -> Response:
        return Refusal(HTTPStatus.BAD_REQUEST, "A parameter of the address is invalid.").response()

    @app.exception_handler(AnyHTTPException)
    async def other(_: Request, error: AnyHTTPException) -> Response:
        known = {
            404: "No such address.",
            405: "This address takes another method.",
        }
        said = known.get(error.status_code, str(error.detail))
        return Refusal(error.status_code, said, headers=error.headers).response()

    @app.exception_handler(Exception)
    async def broken(_: Request, __: Exception) -> Response:
        answer = failure().response()
        answer.headers.update(HEADERS)  # made outside of the layer that adds them
        return answer

    return app


def turns(messages: Sequence[schemas.Message]) -> tuple[Turn, ...]:
    return tuple(Turn("system" if one.role == "developer" else one.role, one.text) for one in messages)


def within(param: str, found: int, most: int, what: str) -> None:
    """Refuse more than the server's own limit."""
    if found > most:
        raise Refusal(
            HTTPStatus.BAD_REQUEST, f"{param} comes to {found}; this server takes at most {most} {what}.", param=param
        )


def playground(folder: Path, served: Served, limits: Limits, *, keyed: bool) -> str:
    """The page, with what its script has to know in the attributes of its body."""
    facts = ["the same prompt and seed, with the head and without", f"the run's own guidance: {served.guidance}"]
    return (
        environment(folder)
        .get_template("playground.html")
        .render(
            title=served.name,
            tab=f"{served.name}: playground",
            brand="COALA",
            facts=facts_line(facts),
            footer="Scores have no absolute meaning: higher is preferred to lower, for replies to one prompt.",
            unguided=served.names[1],
            guidance=served.guidance,
            modes=MODES if served.distilled else MODES[:-1],
            most_tokens=limits.max_tokens,
            most_choices=limits.choices,
            keyed=keyed,
        )
    )
