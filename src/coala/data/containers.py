"""What one JSON document holds: a list of rows, splits by name, columns, or a wrapper around any of them.

Everything in it is read or named. Values in, records and findings out; knows nothing of files or formats.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from coala.data.findings import Fault, Finding, describe, listed
from coala.data.records import RecordsRead, RowRecord, names

# Names of fields that rows have, by which rows are told from what surrounds them.
FIELDS = names(
    "prompt chosen rejected instruction question query input output text label messages conversations conversation "
    "response completion completions history winner loser better worse preferred answers response_a response_b "
    "rejected_response chosen_response prompt_id human_ref_A human_ref_B output_1 output_2 turns"
)
WRAPPERS = names(
    "data rows train examples instances items records pairs samples preferences comparisons results entries dataset "
    "validation valid dev test eval evaluation split splits train_prefs test_prefs"
)
# Lists that belong to one row, however much they look like rows.
_OF_A_ROW = names("completions answers messages conversations tools functions candidates responses turns")
_MESSAGE = (("role", "from", "user"), ("content", "value", "text"))
_DEPTH = 4


def contents(name: str, value: Any, part: str = "") -> RecordsRead:
    """The records of a document; ``part`` names one of several lists (``FILE.json:part``)."""
    rows, remarks = _rows(name, value, part, "", 0)
    yield from remarks
    for number, row in enumerate(rows, 1):
        yield RowRecord(name, number, row)


def is_message(value: Any) -> bool:
    """Whether a value has a message's speaker and words (or a null or a call in their place)."""
    return (
        isinstance(value, Mapping) and any(who in value for who in _MESSAGE[0]) and any(w in value for w in _MESSAGE[1])
    )


Found = tuple[list[Any], list[Finding]]


def _rows(name: str, value: Any, part: str, inside: str, depth: int) -> Found:
    if isinstance(value, list):
        return _listed(value, part, inside), []
    if not isinstance(value, dict):
        raise Fault("", f"{describe(value)} alone", "a list of objects", "write one object per pair")
    if _is_split_orient(value):
        return _from_split_orient(value), []
    if (columns := _columns(value)) is not None:
        _no_part(part)
        return columns, []
    parts = {} if {"chosen", "rejected"} & set(value) else _parts(value)
    if not parts or depth == _DEPTH:
        _no_part(part)
        return [value], []
    return _from_parts(name, value, parts, part, inside, depth)


def _no_part(part: str) -> None:
    if part:
        raise Fault("", f"the part {part!r}, but no lists by name", "an object of several lists", f"leave :{part} off")


def _listed(value: list[Any], part: str, inside: str) -> list[Any]:
    _no_part(part)
    if value and all(isinstance(one, list) for one in value):
        where = f" under {inside}" if inside else ""
        mend = "write objects with named fields (pandas: to_json(orient='records'))"
        raise Fault("", f"rows without names for their columns{where}", "a list of objects", mend)
    if value and all(isinstance(one, dict) and isinstance(one.get("row"), dict) and "row_idx" in one for one in value):
        cut = [one["row_idx"] for one in value if one.get("truncated_cells")]
        if cut:
            mend = "download the data set's files instead of its preview"
            raise Fault("truncated_cells", f"{len(cut)} rows of a preview with cells cut off", "whole rows", mend)
        return [one["row"] for one in value]
    return value


# --- lists by name -----------------------------------------------------------------------------------------------


def _is_rows(value: Any) -> bool:
    """Whether a value is a list of rows, or columns, or holds such lists: something to read rows from."""
    if isinstance(value, list):
        return bool(value) and all(isinstance(one, dict) for one in value) and not all(is_message(one) for one in value)
    return (
        isinstance(value, dict)
        and bool(value)
        and not is_message(value)
        and (
            bool(FIELDS & set(value) and _columns(value) is not None)
            or all(isinstance(one, list) and _is_rows(one) for one in value.values())
        )
    )


def _parts(value: dict[str, Any]) -> dict[str, Any]:
    """The fields that hold rows, if this is a container of them and no row itself."""
    # What a row's own field holds is rows only if these look like rows themselves.
    parts = {
        key: held
        for key, held in value.items()
        if _is_rows(held) and key not in _OF_A_ROW and (key not in FIELDS or _has_fields(held))
    }
    if set(parts) >= {"features", "rows"}:  # how the hub's server describes columns
        del parts["features"]
    if parts and FIELDS & (set(value) - set(parts)):
        return {}
    known = {key for key in parts if key in WRAPPERS or len(value) == 1 or _has_fields(parts[key])}
    if not known:
        # An empty list under a wrapper's name is a container without rows.
        known = {key for key, held in value.items() if key in WRAPPERS and held == []}
        return {key: [] for key in known} if not FIELDS & set(value) else {}
    return {key: held for key, held in parts.items() if key in known}


def _has_fields(value: Any) -> bool:
    rows = value if isinstance(value, list) else [value]
    return all(isinstance(one, dict) and len(FIELDS & set(one)) >= 2 for one in rows[:10])


def _from_parts(name: str, value: dict[str, Any], parts: dict[str, Any], part: str, inside: str, depth: int) -> Found:
    remarks: list[Finding] = []
    taken, _, deeper = part.partition("/")
    if part and len(parts) > 1 and taken not in parts:
        raise Fault("", f"no part {taken!r}", f"one of {listed(parts)}", f"name it as {name}:{next(iter(parts))}")
    if len(parts) == 1:
        (key,) = parts
        deeper = deeper if taken == key else part
    elif part:
        key = taken
    elif "train" in parts:
        key = "train"
    else:
        held = ", ".join(f"{key} ({_size(one)})" for key, one in parts.items())
        mend = f"say which: {name}:{next(iter(parts))}"
        raise Fault("", f"{len(parts)} lists of rows: {held}", "one", mend)
    left = {other: held for other, held in parts.items() if other != key}
    if left:
        found = f"read {key} ({_size(parts[key])}); left out " + ", ".join(f"{k} ({_size(v)})" for k, v in left.items())
        others = " ".join(f"{name}:{other}" for other in left)
        # Whoever names the part has chosen.
        severity = "note" if part else "warning"
        remarks.append(Finding(name, None, "", found, "", f"name them to read them: {others}", severity))  # type: ignore[arg-type]
    beside = [k for k, v in value.items() if k not in parts and _says(v)]
    if beside:
        found = f"text next to the rows of {key} that is not read: {listed(beside)}"
        mend = "write into every row what it needs of it, or drop it"
        remarks.append(Finding(name, None, "", found, "rows alone", mend, "warning"))
    rows, more = _rows(name, parts[key], deeper, key, depth + 1)
    return rows, remarks + more


def _size(value: Any) -> str:
    if isinstance(value, list):
        return f"{len(value)} row{'s' * (len(value) != 1)}"
    columns = _columns(value) if isinstance(value, dict) else None
    return _size(columns) if columns is not None else f"{len(value)} lists"


def _says(value: Any) -> bool:
    """Whether a value beside the rows holds words."""
    return isinstance(value, str) and len(value.split()) > 3


# --- columns -----------------------------------------------------------------------------------------------------


def _is_split_orient(value: dict[str, Any]) -> bool:
    names, rows = value.get("columns"), value.get("data")
    return (
        isinstance(names, list)
        and isinstance(rows, list)
        and all(isinstance(one, str) for one in names)
        and all(isinstance(one, list) for one in rows)
        and set(value) <= {"columns", "data", "index"}
    )


def _from_split_orient(value: dict[str, Any]) -> list[Any]:
    names = value["columns"]
    for number, row in enumerate(value["data"], 1):
        if len(row) != len(names):
            found = f"{len(row)} values under {len(names)} columns in row {number}"
            raise Fault("data", found, "as many values as columns", "write it again with orient='records'")
    return [dict(zip(names, row, strict=True)) for row in value["data"]]


def _columns(value: dict[str, Any]) -> list[Any] | None:
    """The rows of what is written column by column (lists, or objects by index) or row by index; else ``None``."""
    held = list(value.values())
    if all(isinstance(one, list) for one in held) and held:
        return _from_lists(value)
    if all(isinstance(one, dict) and one for one in held) and held:
        return _from_objects(value)
    return None


def _from_lists(value: dict[str, list[Any]]) -> list[Any] | None:
    held = list(value.values())
    if all(_are_messages(one) for one in held) or not FIELDS & set(value):
        return None  # a lone row of messages, or splits
    if len(value) == 1 and (
        all(isinstance(one, dict) for one in held[0])
        or (set(value) <= _OF_A_ROW and not all(isinstance(one, list) for one in held[0]))
    ):
        return None
    sizes = {key: len(one) for key, one in value.items()}
    if len(set(sizes.values())) != 1:
        if len(FIELDS & set(value)) < 2 or any(_are_messages(one) for one in held):
            return None
        shown = ", ".join(f"{key} {size}" for key, size in sizes.items())
        mend = "write it again row by row (pandas: to_json(orient='records'); datasets: to_json())"
        raise Fault("", f"columns of different lengths ({shown})", "as many values in each", mend)
    return [dict(zip(value, row, strict=True)) for row in zip(*held, strict=True)]


def _are_messages(value: list[Any]) -> bool:
    return bool(value) and all(is_message(one) for one in value)


def _from_objects(value: dict[str, dict[str, Any]]) -> list[Any] | None:
    first, *rest = value.values()
    if any(is_message(one) for one in value.values()):
        return None
    outer, inner = set(value), set(first)
    if all(key.isdecimal() for key in inner) or (FIELDS & outer and not FIELDS & inner):
        if any(set(one) != inner for one in rest):
            mend = "write it again row by row (pandas: to_json(orient='records'))"
            raise Fault("", "columns with different row numbers", "the same rows in each", mend)
        return [{key: column[k] for key, column in value.items()} for k in first]
    if all(key.isdecimal() for key in outer) or (FIELDS & inner and not _holds_lists(value)):
        return list(value.values())
    return None


def _holds_lists(value: dict[str, dict[str, Any]]) -> bool:
    """Whether the objects are themselves columns: then their names are those of splits."""
    return any(_columns(one) is not None for one in value.values())


def leaves(value: Any) -> Iterator[str]:
    """All texts within a value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for one in value.values():
            yield from leaves(one)
    elif isinstance(value, list | tuple):
        for one in value:
            yield from leaves(one)
