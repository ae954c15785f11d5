"""What the OpenAPI document says beyond FastAPI's own: bodies, the server's limits, models and key."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from coala.serve import schemas, shapes
from coala.serve.limits import Limits

_PROBLEMS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": shapes.ErrorAnswer, "description": "What was wrong with the request"},
    "5XX": {"model": shapes.ErrorAnswer, "description": "What failed here"},
}
# With stream: true.
_STREAMED: dict[str, Any] = {"text/event-stream": {}}


def _answers(model: type[BaseModel]) -> dict[int | str, dict[str, Any]]:
    whole: dict[str, Any] = {"model": model, "description": "The answer"}
    if model in (shapes.ChatAnswer, shapes.CompletionAnswer):
        whole["content"] = dict(_STREAMED)
    found = {200: whole, **_PROBLEMS}
    if model is shapes.Health:
        found[503] = {"model": model, "description": "Not at work"}
    return found


ANSWERS: Mapping[type[BaseModel], dict[int | str, dict[str, Any]]] = {
    model: _answers(model)
    for model in (
        *(shapes.ChatAnswer, shapes.CompletionAnswer, shapes.ScoreAnswer, shapes.RerankAnswer),
        *(shapes.ModelList, shapes.ModelFacts, shapes.Health),
    )
}


# What each address takes; read by :mod:`coala.serve.bodies`, not by FastAPI, which would do it on the event loop.
TAKEN: Mapping[str, type[BaseModel]] = {
    "/v1/chat/completions": schemas.ChatRequest,
    "/v1/completions": schemas.CompletionRequest,
    "/v1/score": schemas.ScoreRequest,
    "/v1/rerank": schemas.RerankRequest,
}


def contract(app: FastAPI, limits: Limits, names: Sequence[str], *, keyed: bool, distilled: bool) -> None:
    """Let the application's OpenAPI document tell the server's own limits, models and whether it asks for a key.

    The first of ``names`` is the model with the head; ``distilled`` if it has a distilled policy too.
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
            _, taken = models_json_schema(
                [(model, "validation") for model in TAKEN.values()], ref_template="#/components/schemas/{model}"
            )
            parts |= taken["$defs"]
            for path, model in TAKEN.items():
                held = {"schema": {"$ref": f"#/components/schemas/{model.__name__}"}}
                body = {"required": True, "content": {"application/json": held}}
                made["paths"][path]["post"]["requestBody"] = body
            for (kind, field), (word, bound) in bounds.items():
                for option in _options(parts[kind]["properties"][field]):
                    if option.get("type") == ("array" if word == "maxItems" else "integer"):
                        option[word] = bound
            for field in () if distilled else ("mode", "over"):
                for option in _options(parts["GuidanceSettings"]["properties"][field]):
                    if "enum" in option:
                        option["enum"] = [word for word in option["enum"] if word != "distilled"]
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
