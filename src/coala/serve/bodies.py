"""From a body's bytes to a request, bounded before it is looked at closely; and what is wrong with one, in plain words.

A body is bounded in bytes before it comes here. What is left to bound is how much of a program's time and memory its
bytes can ask for: values, depth, digits, and errors told.
"""

from __future__ import annotations

import asyncio
import difflib
import json
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails
from starlette.requests import Request

from coala.serve.errors import Refusal

M = TypeVar("M", bound=BaseModel)
# Values and names in one body, far more than a conversation of a thousand turns has.
MOST_VALUES = 20_000
MOST_NAMES = 1000
DEEPEST = 32
# Bytes that are read on the event loop itself, in less time than a thread takes to be asked.
SMALL = 16 * 1024
LONGEST_NAME = 64

# What is expected where pydantic finds another type.
TYPES: Mapping[str, str] = {
    "string_type": "text",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "list_type": "a list",
    "dict_type": "an object",
    "model_type": "an object",
    "model_attributes_type": "an object",
}
# What is expected where a value is beyond a bound, which the error's context names.
BOUNDS: Mapping[str, str] = {
    "greater_than": "more than {gt}",
    "greater_than_equal": "at least {ge}",
    "less_than": "less than {lt}",
    "less_than_equal": "at most {le}",
    "too_short": "at least {min_length} entry",
    "too_long": "at most {max_length} entries",
    "string_too_short": "at least {min_length} character",
    "string_too_long": "at most {max_length} characters",
    "literal_error": "{expected}",
}


async def read(request: Request, model: type[M]) -> M:
    """The request that a body holds; raises :class:`Refusal` for one that does not fit ``model``."""
    body = await request.body()
    if len(body) <= SMALL:
        return parse(body, model)
    return await asyncio.to_thread(parse, body, model)


def parse(body: bytes, model: type[M]) -> M:
    """As :func:`read`, of UTF-8 bytes."""
    try:
        found = json.loads(body.decode())
    except json.JSONDecodeError as error:
        raise _unreadable(f"The body is not JSON: it goes wrong at character {error.pos}.") from None
    except RecursionError:
        raise _unreadable(f"The body is too deep; expected at most {DEEPEST} levels.") from None
    except ValueError:  # more digits than Python makes a number of
        raise _unreadable("The body holds a number of too many digits.") from None
    if not isinstance(found, dict):
        raise _refused("", f": found {_brief(found)}, expected an object")
    _bound(found)
    try:
        return model.model_validate(found)
    except ValidationError as error:
        raise refusal(error, model) from None


def _bound(found: Mapping[str, Any]) -> None:
    """Refuse what would cost more to check than any request that makes sense."""
    values = 0
    if len(found) > MOST_NAMES:
        raise _refused("", f": found {_brief(found)}, expected at most {MOST_NAMES}")
    for name, value in found.items():
        where = _name((name,))
        level, depth = [value], 1
        while level:
            if depth > DEEPEST:
                raise _refused(where, f": found more than {DEEPEST} levels, expected at most {DEEPEST}")
            below: list[Any] = []
            for one in level:
                if not isinstance(one, list | dict):
                    continue
                values += len(one)
                if values > MOST_VALUES:
                    raise _refused(where, f": found {_brief(one)}, expected at most {MOST_VALUES} values in a body")
                if isinstance(one, dict) and len(one) > MOST_NAMES:
                    raise _refused(where, f": found {_brief(one)}, expected at most {MOST_NAMES}")
                below += one if isinstance(one, list) else one.values()
            level, depth = below, depth + 1


def _unreadable(said: str) -> Refusal:
    return Refusal(HTTPStatus.BAD_REQUEST, said, code="invalid_json")


def _refused(name: str, said: str) -> Refusal:
    return Refusal(HTTPStatus.BAD_REQUEST, f"{name or 'The body'}{said}.", code="invalid_value", param=name or None)


def refusal(error: ValidationError, model: type[BaseModel] | None = None) -> Refusal:
    """What was wrong with a body or parameter: the field, what was found and what was expected there."""
    problems = error.errors(include_url=False)

    # Of the ways in which a field may be given, the one that came furthest is the one that was meant.
    def weight(one: ErrorDetails) -> tuple[int, bool, bool]:
        return len(one["loc"]), one["type"] == "value_error", one["type"] != "missing"

    problem = max(problems, key=weight)
    return _refused(_name(problem["loc"]), _words(problem, problems, model))


def _words(problem: ErrorDetails, problems: list[ErrorDetails], model: type[BaseModel] | None) -> str:
    kind, found = problem["type"], _brief(problem["input"])
    if kind == "missing":
        return " is missing"
    if kind == "extra_forbidden":
        name = str(problem["loc"][-1])
        near = difflib.get_close_matches(name, model.model_fields, 1) if model and len(problem["loc"]) == 1 else []
        return f": this server knows no such field. Fix: {f'{near[0]}, or leave' if near else 'leave'} it out"
    if kind == "value_error":
        said = str(problem["msg"]).removeprefix("Value error, ")
        whole = "Fix: " in said or isinstance(problem["input"], dict)
        return f": {said}" if whole else f": {said} (found {found})"
    # Other ways to give the same field are expected as well.
    ways = [one for one in problems if one["input"] is problem["input"]]
    expected = dict.fromkeys(filter(None, map(_expected, ways)))
    return f": found {found}, expected {' or '.join(expected) or 'another value'}"


def _expected(problem: ErrorDetails) -> str:
    kind = problem["type"]
    bounds = {name: f"{one:g}" if isinstance(one, float) else one for name, one in problem.get("ctx", {}).items()}
    return TYPES.get(kind) or BOUNDS.get(kind, "").format_map(bounds)


def _name(where: tuple[int | str, ...]) -> str:
    """A field as people write it, without the words that the program has for the ways to give it."""
    return ".".join(
        str(part)
        for part in where
        if isinstance(part, int) or (len(part) <= LONGEST_NAME and part.isidentifier() and part.islower())
    )


def _brief(found: Any) -> str:
    """A value in few words; never all of it."""
    if isinstance(found, str):
        shown = json.dumps(found if len(found) <= 40 else found[:37] + "...", ensure_ascii=False)
        return shown.encode("utf-8", "backslashreplace").decode()
    if isinstance(found, list):
        return f"a list of {len(found)}" if found else "an empty list"
    if isinstance(found, dict):
        return f"an object of {len(found)} names" if len(found) > 1 else "an object"
    if isinstance(found, float) or (isinstance(found, int) and abs(found) >= 10**30):
        return f"the number {float(found):g}" if abs(found) < 1e308 else "a number beyond all bounds"
    return json.dumps(found)
