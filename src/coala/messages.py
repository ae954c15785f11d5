"""What a validator found wrong with settings, in sentences: what was found, what was expected, what was meant.

Reads the plain list of faults that pydantic's ``ValidationError.errors()`` gives, and the types that were validated for
the names that exist. Knows nothing of any particular setting.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from difflib import get_close_matches
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

_LONGEST = 60
_WHOLE = "a whole number"
_WANTED: Mapping[str, str] = {
    "bool": "true or false",
    "bytes": "bytes",
    "dataclass": "a mapping of settings",
    "date": "a date",
    "datetime": "a date and time",
    "decimal": "a number",
    "dict": "a mapping",
    "finite": "a finite number",
    "float": "a number",
    "frozen": "a list",
    "int": _WHOLE,
    "is": "another kind of value",
    "iterable": "a list",
    "list": "a list",
    "mapping": "a mapping",
    "model": "a mapping of settings",
    "none": "no value (null)",
    "path": "a path",
    "sequence": "a list",
    "set": "a list",
    "string": "a text",
    "tuple": "a list",
    "url": "an address",
    "uuid": "a UUID",
}
_LIMITS: Mapping[str, tuple[str, str]] = {
    "greater_than": ("gt", "more than"),
    "greater_than_equal": ("ge", "at least"),
    "less_than": ("lt", "less than"),
    "less_than_equal": ("le", "at most"),
    "multiple_of": ("multiple_of", "a multiple of"),
}
_SIZES: Mapping[str, tuple[str, str, str]] = {
    "too_short": ("min_length", "at least", "item"),
    "too_long": ("max_length", "at most", "item"),
    "string_too_short": ("min_length", "at least", "character"),
    "string_too_long": ("max_length", "at most", "character"),
    "bytes_too_short": ("min_length", "at least", "byte"),
    "bytes_too_long": ("max_length", "at most", "byte"),
}
Place = tuple[str | int, ...]


class CoalaError(Exception):
    """A mistake the user can mend: the message says what was found, what was expected and what to do."""


def sentences(
    errors: Iterable[Mapping[str, Any]],
    schema: Any = None,
    *,
    name: Callable[[Place], str] | None = None,
    noun: str = "setting",
) -> list[str]:
    """One sentence without a full stop for each place that is at fault, in the order found.

    ``errors`` are pydantic's; ``schema`` is the model or dataclass that was validated, whose names are suggested for
    one that does not exist; ``name`` words a place (default: its parts joined by dots); ``noun`` is what a name is
    called. Where a union tried several forms the place is told once, with all that would have done.
    """
    by_place: dict[Place, list[Mapping[str, Any]]] = {}
    for error in errors:
        by_place.setdefault(_place(error["loc"], schema), []).append(error)
    word = name or _dotted
    return [_sentence(place, found, schema, word, noun) for place, found in by_place.items()]


def joined(faults: Sequence[str]) -> str:
    """Sentences as one text with its full stop."""
    text = "; ".join(faults)
    return text if text.endswith(("?", ".")) else f"{text}."


def suggestion(given: str, known: Sequence[str]) -> str:
    """The name that was probably meant, or nothing."""
    low = given.lower()
    by_case = [one for one in known if one.lower() == low]
    if by_case:
        return by_case[0]
    # Whoever writes less than the whole name means the one that begins so.
    started = [one for one in known if len(low) >= 3 and one.lower().startswith(low)]
    if len(started) == 1:
        return started[0]
    close = get_close_matches(low, [one.lower() for one in known], n=1, cutoff=0.6)
    return next((one for one in known if close and one.lower() == close[0]), "")


def unknown_name(given: str, known: Sequence[str], *, noun: str = "setting", within: str = "") -> str:
    """``unknown setting head.tol; did you mean head.tolerance?``, or the names there are."""
    prefix = f"{within}." if within else ""
    meant = suggestion(given, known)
    if meant:
        return f"unknown {noun} {prefix}{given}; did you mean {prefix}{meant}?"
    there = f"; expected one of {', '.join(sorted(known))}" if known else ""
    return f"unknown {noun} {prefix}{given}{there}"


def shown(value: Any) -> str:
    """A value as it was given, on one line, cut where it is long."""
    text = "null" if value is None else ascii_safe(repr(value))
    return text if len(text) <= _LONGEST else text[: _LONGEST - 3] + "..."


def ascii_safe(text: str) -> str:
    """Without characters that a terminal would act on."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


# --- a place and what is expected there --------------------------------------------------------------------------


def _dotted(place: Place) -> str:
    return ".".join(map(str, place))


def _place(loc: Sequence[str | int], schema: Any) -> Place:
    """``loc`` without the names of the forms of a union that were tried, which are no part of the document."""
    place: list[str | int] = []
    here: list[Any] = [] if schema is None else [schema]
    for part in loc:
        known = [inner for kind in here for inner in _forms(kind)]
        if here and isinstance(part, str) and not _has(known, part) and _is_form(part, known):
            continue
        place.append(part)
        here = [inner for kind in known for inner in _inside(kind, part)]
    return tuple(place)


def _is_form(part: str, forms: Sequence[Any]) -> bool:
    """Whether a part of a location names a form of a union, as ``constrained-int``, ``literal['a']``, ``Model``."""
    if len(forms) < 2:
        return "[" in part or part in ("int", "str", "float", "bool")
    titles = {getattr(form, "__name__", "") for form in forms}
    return "[" in part or "-" in part or part in titles or part in _WANTED or part in ("str", "nullable")


def _forms(kind: Any) -> list[Any]:
    """The members of a union, without annotations and None; of anything else itself."""
    origin = get_origin(kind)
    if origin is Annotated:
        return _forms(get_args(kind)[0])
    if origin in (Union, UnionType):
        return [form for part in get_args(kind) if part is not type(None) for form in _forms(part)]
    return [kind]


def _names(kind: Any) -> dict[str, Any]:
    """Field names of a pydantic model or dataclass with their annotations."""
    if not isinstance(kind, type):
        return {}
    model: Any = getattr(kind, "model_fields", None)
    if model:
        return {field.alias or name: field.annotation for name, field in model.items()}
    if is_dataclass(kind):
        try:
            hints = get_type_hints(kind, include_extras=True)
        except NameError:
            hints = {}
        return {field.name: hints.get(field.name, Any) for field in fields(kind)}
    return {}


def _has(forms: Sequence[Any], part: str) -> bool:
    return any(part in _names(form) or get_origin(form) in (dict, Mapping) for form in forms)


def _inside(kind: Any, part: str | int) -> list[Any]:
    """The types of what lies at ``part`` of a value of type ``kind``."""
    named = _names(kind)
    if part in named:
        return [named[str(part)]]
    given = get_args(kind)
    origin = get_origin(kind)
    if not given or origin is Literal or named:
        return []
    if isinstance(part, int) and origin in (list, tuple, set, frozenset, Sequence):
        return [given[min(part, len(given) - 1)] if given[-1] is not Ellipsis else given[0]]
    return [given[-1]] if origin in (dict, Mapping) else []


def _at(schema: Any, place: Place) -> list[Any]:
    here = [] if schema is None else _forms(schema)
    for part in place:
        here = [form for kind in here for inner in _inside(kind, part) for form in _forms(inner)]
    return here


def _sentence(
    place: Place, errors: Sequence[Mapping[str, Any]], schema: Any, word: Callable[[Place], str], noun: str
) -> str:
    first = errors[0]
    kind, where = first["type"], word(place)
    if kind in ("extra_forbidden", "unexpected_keyword_argument", "unexpected_positional_argument"):
        above, given = place[:-1], str(place[-1]) if place else ""
        known = [name for form in _at(schema, above) for name in _names(form)]
        inside = [] if above else _elsewhere(given, schema)
        if inside:
            meant = " or ".join(one for one in (suggestion(given, known), *inside) if one)
            return f"unknown {noun} {given}; did you mean {meant}?"
        return unknown_name(given, known, noun=noun, within=_dotted(above))
    if kind in ("missing", "missing_argument", "missing_keyword_only_argument", "missing_positional_only_argument"):
        return f"{where} is missing"
    said = [str(e["msg"]).removeprefix("Value error, ").removeprefix("Assertion failed, ") for e in errors
            if e["type"] in ("value_error", "assertion_error")]  # fmt: skip
    if said:
        return f"{where}: {said[0]}".removeprefix(": ").rstrip(".")
    wanted = list(dict.fromkeys(_wanted(error) for error in errors))
    expected = ", ".join(wanted[:-1]) + (" or " if len(wanted) > 1 else "") + wanted[-1]
    close = suggestion(str(first["input"]), _choices(errors)) if isinstance(first.get("input"), str) else ""
    told = f"found {shown(first.get('input'))}, expected {expected}" + (f"; did you mean {close}?" if close else "")
    return f"{where}: {told}" if where else told


def _elsewhere(given: str, schema: Any) -> list[str]:
    """Where a name exists in a section: ``guidance.strength`` for ``strength``."""
    return [
        f"{section}.{name}"
        for section, kind in (_names(schema) if schema is not None else {}).items()
        for form in _forms(kind)
        for name in _names(form)
        if name == given
    ]


def _choices(errors: Sequence[Mapping[str, Any]]) -> list[str]:
    """The words that would have done, as pydantic lists them: ``'a', 'b' or 'c'``."""
    found = []
    for error in errors:
        listed = str((error.get("ctx") or {}).get("expected", ""))
        if error["type"] in ("literal_error", "enum"):
            found += [part.strip("' ") for part in listed.replace(" or ", ", ").split(", ")]
    return found


def _wanted(error: Mapping[str, Any]) -> str:
    """What one fault says was expected."""
    kind, context = str(error["type"]), error.get("ctx") or {}
    if kind in _LIMITS:
        key, words = _LIMITS[kind]
        limit = context.get(key)
        return f"{words} {limit:g}" if isinstance(limit, float) else f"{words} {limit}"
    if kind in _SIZES:
        key, words, unit = _SIZES[kind]
        number = context.get(key)
        return f"{words} {number} {unit}{'' if number == 1 else 's'}"
    if kind in ("literal_error", "enum"):
        words_there = _choices([error])
        return words_there[0] if len(words_there) == 1 else "one of " + ", ".join(words_there)
    if kind == "string_pattern_mismatch":
        return f"a text that matches {context.get('pattern')}"
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        return f"one of {context.get('expected_tags', 'the known kinds')}"
    if kind == "int_from_float":
        return _WHOLE
    if kind == "recursion_loop":
        return "a value that does not hold itself"
    if kind in ("json_invalid", "json_type"):
        return "JSON"
    return _WANTED.get(kind.partition("_")[0], "another value")
