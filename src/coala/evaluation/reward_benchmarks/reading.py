"""Readers of the benchmarks' files: JSON Lines, one list, CSV or Parquet, plain or gzipped.

Equal replies and empty ones are the file's affair: they are scored like any other. Every fault is a ``CoalaError`` with
file, row and field.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from coala.evaluation.reward_benchmarks.benchmark import Item, Ranking, RewardBenchmark, Scored
from coala.evaluation.reward_benchmarks.judgebench import rank_judgebench
from coala.evaluation.reward_benchmarks.rewardbench import rank_rewardbench
from coala.evaluation.reward_benchmarks.rewardbench2 import rank_rewardbench2, require_form
from coala.evaluation.reward_benchmarks.rm_bench import FILES, STYLES, rank_rm_bench
from coala.evaluation.rows import FileRow, read_rows, shown, shown_path
from coala.values import ROLES, CoalaError, Role, Turn

Paths = Path | str | Sequence[Path | str]
_MEND = "correct or delete the row"


def read_rewardbench(path: Paths) -> RewardBenchmark:
    """Rows with ``prompt``, ``chosen``, ``rejected`` and ``subset``, as published in version 1.

    ``prompt`` is a text or a list of messages; ``chosen`` and ``rejected`` are texts, or lists of messages that end
    with the reply and may begin with the prompt. ``id`` is kept if there.
    """

    def item(row: FileRow, place: int) -> Item:
        _require(row, "prompt", "chosen", "rejected")
        for field in ("chosen", "rejected"):
            if _is_texts(row.get(field)):
                raise row.fault(field, f"{len(row.get(field))} texts", "one reply", _of_another(row, "give version 1"))
        prompt = _conversation(row, "prompt", "user")
        chosen, rejected = (_last_reply(row, field, prompt) for field in ("chosen", "rejected"))
        return Item(_id(row, place), row.label("subset"), prompt, (chosen,), (rejected,))

    return _read(path, item, rank_rewardbench)


def read_rewardbench2(path: Paths) -> RewardBenchmark:
    """Rows with ``id``, ``prompt``, ``subset`` and lists of texts ``chosen`` and ``rejected``, as published.

    One right reply outside of Ties; there ``id`` is ref:N or tied:N. ``num_correct``, if there, is held against
    ``chosen``.
    """

    def item(row: FileRow, place: int) -> Item:
        _require(row, "prompt", "chosen", "rejected")
        chosen, rejected = (_texts(row, field, "a list of replies") for field in ("chosen", "rejected"))
        subset, id = row.label("subset"), _id(row, place)
        if row.name_of("num_correct") and row.value("num_correct") != len(chosen):
            raise row.fault("num_correct", shown(row.get("num_correct")), f"{len(chosen)}, as many as chosen", _MEND)
        refuse_form(row, subset, id, len(chosen))
        return Item(id, subset, _conversation(row, "prompt", "user"), chosen, rejected)

    return _read(path, item, rank_rewardbench2)


def read_rm_bench(path: Paths) -> RewardBenchmark:
    """Rows with ``prompt`` and three replies each in ``chosen`` and ``rejected``: concise, long plain, long markdown.

    The domain of a row is its ``domain``, else the file's name (``chat``, ``code``, ``math``, ``safety-refuse``,
    ``safety-response``, perhaps with ``_filtered``). Several files, or a folder of them, are one benchmark.
    """

    def item(row: FileRow, place: int) -> Item:
        _require(row, "prompt", "chosen", "rejected")
        chosen, rejected = (_texts(row, field, "three replies by style", n=3) for field in ("chosen", "rejected"))
        domain = domain_of(row)
        prompt = _conversation(row, "prompt", "user")
        return Item(f"{domain}:{_id(row, place)}", domain, prompt, chosen, rejected)

    return _read(path, item, rank_rm_bench)


def read_judgebench(path: Paths) -> RewardBenchmark:
    """Rows with ``pair_id``, ``question``, ``response_A``, ``response_B``, ``source`` and ``label`` (A>B or B>A)."""

    def item(row: FileRow, place: int) -> Item:
        _require(row, "question", "response_A", "response_B", "label")
        texts = row.text("response_A"), row.text("response_B")
        return Item.of_two(row.label("pair_id"), row.label("source"), row.text("question"), texts, label_of(row))

    return _read(path, item, rank_judgebench)


def files_of(path: Paths) -> list[Path | str]:
    """The files that ``path`` names: itself, those of a folder that RM-Bench has, or each of several."""
    if isinstance(path, Path | str):
        if not Path(path).is_dir():
            return [path]
        inside = [one for one in sorted(Path(path).iterdir()) if file_domain(one) in FILES and one.is_file()]
        if not inside:
            raise CoalaError(
                f"{shown_path(path)}: found a folder without files called {', '.join(FILES)}, expected some of them. "
                "Fix: name the files."
            )
        return list(inside)
    if not path:
        raise CoalaError("Found no file, expected at least one. Fix: name a file of the benchmark.")
    return [file for one in path for file in files_of(one)]


def file_domain(path: Path | str) -> str:
    """The domain that a file's name says."""
    return Path(path).name.partition(".")[0].removesuffix("_filtered")


def domain_of(row: FileRow) -> str:
    """RM-Bench's domain of a row: its own (in rows of scores also as subset), else its file's."""
    if not row.name_of("domain") and row.get("subset") in FILES:
        return row.label("subset")
    domain = row.label("domain") if row.name_of("domain") else file_domain(row.file)
    if domain not in FILES:
        found = shown(domain) if row.name_of("domain") else f"none, in a file called {shown(domain)}"
        raise row.fault("domain", found, f"one of {', '.join(FILES)}", "add the field, or name the file so")
    return domain


def label_of(row: FileRow) -> bool:
    """Whether JudgeBench's right reply is A."""
    label = row.text("label").strip()
    if label not in ("A>B", "B>A"):
        raise row.fault("label", shown(label), "A>B or B>A", _MEND)
    return label == "A>B"


def refuse_form(row: FileRow, subset: str, id: str, n_right: int) -> None:
    """The row's fault if it is none of RewardBench 2."""
    if lacking := require_form(subset, id, n_right):
        raise CoalaError(f"{row.file}:{row.number}: {lacking}. Fix: {_MEND}.")


def _read(path: Paths, item: Callable[[FileRow, int], Item], rank: Callable[[Scored], Ranking]) -> RewardBenchmark:
    items, seen = [], dict[tuple[str, str], int]()
    for file in files_of(path):
        for place, row in enumerate(read_rows(file)):
            one = item(row, place)
            if (one.subset, one.id) in seen and rank is not rank_rewardbench:
                first = seen[one.subset, one.id]
                raise row.fault("id", f"{shown(one.id)} again, first in row {first}", "each once", "delete one of them")
            seen[one.subset, one.id] = row.number
            items.append(one)
    return RewardBenchmark(tuple(items), rank)


def _id(row: FileRow, place: int) -> str:
    return row.label("id") if row.name_of("id") else str(place)


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _texts(row: FileRow, field: str, expected: str, n: int | None = None) -> tuple[str, ...]:
    value = row.get(field)
    if value is None or not _is_texts(value) or not value or n not in (None, len(value)):
        found = f"{len(value)} texts" if _is_texts(value) else "one text" if isinstance(value, str) else shown(value)
        mend = f"give them in the order {', '.join(STYLES)}" if n else "give right and wrong replies as lists of texts"
        raise row.fault(field, found, expected, _of_another(row, mend))
    return tuple(value)


def _require(row: FileRow, *fields: str) -> None:
    """The row's fault if a field is not there at all."""
    if lacking := [field for field in fields if field not in row.fields]:
        there = ", ".join(shown(key) for key in list(row.fields)[:12]) or "no field at all"
        raise row.fault(lacking[0], f"no such field among {there}", "a field", _of_another(row, "add the field"))


def _of_another(row: FileRow, mend: str) -> str:
    """How to mend a row of another form; says whose rows these look like."""
    chosen, rejected = row.get("chosen"), row.get("rejected")
    if row.name_of("response_A") and row.name_of("response_B"):
        looks = ("JudgeBench", "judgebench")
    elif isinstance(chosen, str) and isinstance(rejected, str):
        looks = ("RewardBench", "rewardbench")
    elif _is_texts(chosen) and _is_texts(rejected) and len(chosen) == len(rejected) == 3:
        looks = ("RM-Bench", "rmbench")
    elif _is_texts(chosen) and _is_texts(rejected) and (len(chosen) != len(rejected)):
        looks = ("RewardBench 2", "rewardbench2")
    else:
        return mend
    return f"{mend}, or use `coala eval {looks[1]}`: the row looks like {looks[0]}"


def _last_reply(row: FileRow, field: str, prompt: tuple[Turn, ...]) -> str:
    turns = _conversation(row, field, "assistant")
    if turns[-1].role != "assistant":
        raise row.fault(field, f"a last turn of {turns[-1].role!r}", "the assistant's reply", _MEND)
    before = turns[:-1]
    if before and before != prompt:
        raise row.fault(field, "other turns than the prompt's", "the prompt's turns and a reply", _MEND)
    return turns[-1].text


def _conversation(row: FileRow, field: str, speaker: Role) -> tuple[Turn, ...]:
    value = row.get(field)
    if isinstance(value, list):
        if not value:
            raise row.fault(field, "an empty list", "messages with role and content", _MEND)
        return tuple(_turn(row, field, item) for item in value)
    return (Turn(speaker, row.text(field)),)


def _turn(row: FileRow, field: str, item: Any) -> Turn:
    good = isinstance(item, Mapping) and item.get("role") in ROLES and isinstance(item.get("content"), str)
    if not good:
        raise row.fault(field, shown(item), f"a message with content and a role of {', '.join(ROLES)}", _MEND)
    return Turn(item["role"], item["content"])
