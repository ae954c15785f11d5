"""What the OpenAPI document says beyond FastAPI's own, and how a body that does not fit it is told so."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel

from coala.serve import schemas
from coala.serve.errors import Refusal
from coala.serve.limits import Limits

_PROBLEMS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": schemas.ErrorAnswer, "description": "What was wrong with the request"},
    "5XX": {"model": schemas.ErrorAnswer, "description": "What failed here"},
}
# With stream: true.
_STREAMED: dict[str, Any] = {"text/event-stream": {}}


def _answers(model: type[BaseModel]) -> dict[int | str, dict[str, Any]]:
    whole: dict[str, Any] = {"model": model, "description": "The answer"}
    if model in (schemas.ChatAnswer, schemas.CompletionAnswer):
        whole["content"] = dict(_STREAMED)
    found = {200: whole, **_PROBLEMS}
    if model is schemas.Health:
        found[503] = {"model": model, "description": "Not at work"}
    return found


ANSWERS: Mapping[type[BaseModel], dict[int | str, dict[str, Any]]] = {
    model: _answers(model)
    for model in (
        *(schemas.ChatAnswer, schemas.CompletionAnswer, schemas.ScoreAnswer, schemas.RerankAnswer),
        *(schemas.ModelList, schemas.ModelFacts, schemas.Health),
    )
}


def contract(app: FastAPI, limits: Limits, names: Sequence[str], *, keyed: bool) -> None:
    """Let the application's OpenAPI document tell the server's own limits, models and whether it asks for a key.

    The first of ``names`` is the model with the head.
    """
    bounds = {
        ("ChatRequest", "max_tokens"): ("maximum", limits.max_tokens),
        ("ChatRequest", "max_completion_tokens"): ("maximum", limits.max_tokens),
        ("CompletionRequest", "max_tokens"): ("maximum", limits.max_tokens),
        ("CompletionRequest", "prompt"): ("maxItems", limits.prompts),
        ("ScoreRequest", "replies"): ("maxItems", limits.max_texts),
        ("RerankRequest", "documents"): ("maxItems", limits.max_texts),
        ("GuidanceSettings", "candidates"): ("maximum", limits.max_rows),
        ("GuidanceSettings", "width"): ("maximum", limits.max_rows),
        **{
            (kind, field): ("maximum", limits.choices)
            for kind in ("ChatRequest", "CompletionRequest")
            for field in ("n", "best_of")
        },
    }

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            made = get_openapi(title=app.title, version=app.version, routes=app.routes)
            parts = made["components"]["schemas"]
            for (kind, field), (word, bound) in bounds.items():
                for option in _options(parts[kind]["properties"][field]):
                    if option.get("type") == ("array" if word == "maxItems" else "integer"):
                        option[word] = bound
            for kind in ("ChatRequest", "CompletionRequest"):
                parts[kind]["properties"]["model"]["enum"] = list(names)
            for kind in ("ScoreRequest", "RerankRequest"):
                parts[kind]["properties"]["model"]["enum"] = list(names[:1])
            if keyed:
                made["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
                for path, methods in made["paths"].items():
                    if path.startswith("/v1/") or path == "/metrics":
                        for operation in methods.values():
                            operation["security"] = [{"key": []}]
            app.openapi_schema = made
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]


def _options(schema: dict[str, Any]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = schema.get("anyOf", [schema])
    return found


def unreadable(error: RequestValidationError) -> Refusal:
    """What was wrong with a body or parameter: the field and what was expected there, never the program's own words."""
    problems = error.errors()
    # Of the ways in which a field may be given, the one that came furthest is the one that was meant.
    problem = max(problems, key=lambda one: len(one["loc"])) if problems else {"loc": (), "msg": "unreadable"}
    where = [
        str(part) for part in problem["loc"][1:] if isinstance(part, int) or (part.isidentifier() and part.islower())
    ]
    name = ".".join(where)
    found = "" if "input" not in problem or problem.get("type") == "missing" else _short(problem["input"])
    if problem.get("type") == "json_invalid":
        return Refusal(HTTPStatus.BAD_REQUEST, "The body is not JSON.", code="invalid_json")
    what = str(problem["msg"]).removeprefix("Value error, ")
    said = f"{name or 'The body'}: {what}{found}."
    return Refusal(HTTPStatus.BAD_REQUEST, said, code="invalid_value", param=name or None)


def _short(found: Any) -> str:
    try:
        text = repr(found)
    except (RecursionError, ValueError):
        return ""
    return f" (found {text if len(text) <= 60 else text[:57] + '...'})"
