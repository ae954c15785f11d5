"""JSON, YAML and safetensors that somebody else wrote, parsed within bounds: size, depth, aliases, digits.

A file of a kilobyte can stand for gigabytes once its aliases are followed, and a line of brackets can overflow the
stack. Knows nothing of what documents mean.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from coala.messages import CoalaError

MOST_CHARACTERS = 2**20  # of YAML; recipes have a few thousand
MOST_HEADER = 32 * 2**20  # bytes of a safetensors header: about 300,000 tensors; the format allows 100 MB
MOST_DEPTH = 64
MOST_NODES = 200_000  # counted as if every alias were written out


class DocumentError(CoalaError):
    """A document that is not well formed or exceeds a bound; the message is a phrase without the file's name."""


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text.

    Raises:
        DocumentError: for text that is not JSON or UTF-8, is nested too deeply, or holds a number of over 4,300 digits.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise DocumentError("nested too deeply to be read") from None
    except UnicodeDecodeError as error:
        raise DocumentError(f"not UTF-8 ({error.reason} at byte {error.start})") from None
    except ValueError as error:  # json.JSONDecodeError among them; a plain one for an integer of over 4,300 digits
        raise DocumentError(f"not JSON ({error})") from None


def parse_yaml(text: str) -> Any:
    """The value of one YAML document in the safe subset; ``None`` for an empty one.

    Raises:
        DocumentError: for text that is not YAML, is longer than a million characters, nested more than 64 deep, or
            stands for more than 200,000 values once its aliases are written out.
    """
    import yaml

    if len(text) > MOST_CHARACTERS:
        raise DocumentError(f"{len(text):,} characters long; at most {MOST_CHARACTERS:,} are read")
    try:
        _bound(text)
        return yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except yaml.YAMLError as error:
        raise DocumentError(f"not YAML ({_where(error)})") from None
    # Dates such as 2026-99-99 and integers of over 4,300 digits are plain ValueErrors; a mapping as a key a TypeError.
    except (ValueError, TypeError, OverflowError) as error:
        raise DocumentError(f"not YAML ({error})") from None


def tensors_header(path: Path) -> tuple[dict[str, Any], int]:
    """The header of a safetensors file, tensors by name with ``dtype``, ``shape`` and ``data_offsets``, and its end.

    Raises:
        DocumentError: for a file whose header breaks off, is longer than 32 MiB, is not JSON of that form, or names
            bytes that the file does not have.
        OSError: for a file that cannot be read.
    """
    with path.open("rb") as file:
        whole = file.seek(0, 2)
        file.seek(0)
        size = int.from_bytes(file.read(8), "little")
        if whole < 8 or size > whole - 8:
            raise DocumentError("not a safetensors file, or truncated in its header")
        if size > MOST_HEADER:
            raise DocumentError(f"a safetensors file with a header of {size:,} bytes; at most {MOST_HEADER:,} are read")
        header = parse_json(file.read(size))
    if not isinstance(header, dict):
        raise DocumentError("a safetensors file whose header is not an object")
    header.pop("__metadata__", None)
    for name, about in header.items():
        _check_tensor(name, about, whole - 8 - size)
    return header, 8 + size


def _check_tensor(name: str, about: Any, room: int) -> None:
    """Refuse an entry of the header that is no tensor within the ``room`` bytes behind it."""
    try:
        begin, end = about["data_offsets"]
        shape, kind = list(about["shape"]), str(about["dtype"])
        plain = all(type(n) is int and n >= 0 for n in (begin, end, *shape))
    except (KeyError, TypeError, ValueError):
        plain = False
    if not plain:
        raise DocumentError(f"a safetensors file whose header does not describe {name!r} as a tensor")
    if not begin <= end <= room:
        raise DocumentError(f"a safetensors file truncated in {name!r}")
    # Bits, for some formats pack two values in a byte.
    digits = "".join(c for c in kind.partition("_")[0] if c.isdigit())
    bits = {"BOOL": 8}.get(kind, int(digits) if digits else 0)
    if bits and math.prod(shape) * bits > (end - begin) * 8:
        raise DocumentError(f"a safetensors file whose {name!r} has fewer bytes than its shape needs")


def _bound(text: str) -> None:
    """Refuse depth and the size that aliases stand for, from the events alone, before any value is built."""
    import yaml

    sizes: dict[str, int] = {}
    open_nodes: list[list[Any]] = []  # [anchor, values inside so far] of every collection that is open
    total = 0

    def add(count: int) -> None:
        nonlocal total
        if open_nodes:
            open_nodes[-1][1] += count
        else:
            total += count
        if total > MOST_NODES or (open_nodes and open_nodes[-1][1] > MOST_NODES):
            raise DocumentError(f"more than {MOST_NODES:,} values once its aliases are written out")

    for event in yaml.parse(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
        if isinstance(event, yaml.AliasEvent):
            if any(anchor == event.anchor for anchor, _ in open_nodes):
                raise DocumentError(f"a value that contains itself (alias *{event.anchor})")
            add(sizes.get(str(event.anchor), 1))
        elif isinstance(event, yaml.ScalarEvent):
            if event.anchor:
                sizes[event.anchor] = 1
            add(1)
        elif isinstance(event, yaml.CollectionStartEvent):
            open_nodes.append([event.anchor, 1])
            if len(open_nodes) > MOST_DEPTH:
                raise DocumentError(f"nested more than {MOST_DEPTH} deep")
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, size = open_nodes.pop()
            if anchor:
                sizes[anchor] = size
            add(size)


def _where(error: Exception) -> str:
    """The parser's complaint with line and column, on one line."""
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
    if mark is None or problem is None:
        return " ".join(str(error).split())
    return f"line {mark.line + 1}, column {mark.column + 1}: {problem}"
