"""RewardBench: its file of pairs to ours, and the scores of a head in the form in which its results are published."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from coala.evaluation.rewardbench import Ranking, ScoredRows
from coala.evaluation.rows import FileRow, read_rows, shown
from coala.values import ROLES, FeatureSpec, Pair, Role, Turn

_MEND = "mend or delete the row"


@dataclass(frozen=True)
class Benchmark:
    """Pairs of a file with the ``subset`` and ``id`` of each."""

    pairs: tuple[Pair, ...]
    subset: tuple[str, ...]
    id: tuple[str, ...]

    def scored(self, chosen: NDArray[np.floating[Any]], rejected: NDArray[np.floating[Any]]) -> ScoredRows:
        """Scores (n,) of both replies for ``coala.evaluation.rewardbench.ranking``; rows of one prompt are a group."""
        margin = np.asarray(chosen, dtype=np.float64) - np.asarray(rejected, dtype=np.float64)
        return ScoredRows(margin, self.subset, tuple(pair.group for pair in self.pairs))


def read_benchmark(path: Path | str) -> Benchmark:
    """Rows with ``prompt``, ``chosen``, ``rejected`` and ``subset``: JSON Lines, one list, or CSV, plain or gzipped.

    ``prompt`` is a text or a list of messages; ``chosen`` and ``rejected`` are texts, or lists of messages that end
    with the reply and may begin with the prompt. ``id`` is kept if there. Equal replies and empty ones are the file's
    affair: they are scored like any other. Raises ``CoalaError`` with file, row and field.
    """
    pairs, subsets, ids = [], [], []
    for place, row in enumerate(read_rows(path)):
        for field in ("chosen", "rejected"):
            if isinstance(row.get(field), list) and all(isinstance(item, str) for item in row.get(field)):
                raise row.fault(
                    field,
                    f"{len(row.get(field))} texts",
                    "one reply",
                    "give version 1; lists of replies are of RewardBench 2",
                )
        prompt = _conversation(row, "prompt", "user")
        replies = []
        for field in ("chosen", "rejected"):
            turns = _conversation(row, field, "assistant")
            if turns[-1].role != "assistant":
                raise row.fault(field, f"a last turn of {turns[-1].role!r}", "the assistant's reply", _MEND)
            before = turns[:-1]
            if before and before != prompt:
                raise row.fault(field, "other turns than the prompt's", "the prompt's turns and a reply", _MEND)
            replies.append(turns[-1].text)
        group = "\n".join(f"{turn.role}: {turn.text}" for turn in prompt)
        pairs.append(Pair(prompt, replies[0], replies[1], group))
        subsets.append(row.label("subset"))
        ids.append(row.label("id") if row.name_of("id") else str(place))
    return Benchmark(tuple(pairs), tuple(subsets), tuple(ids))


def results(found: Ranking, name: str, spec: FeatureSpec) -> dict[str, Any]:
    """The flat form in which results are published: accuracy by subset beside ``model`` and how it was run."""
    kind = spec.template.partition(":")[0]
    about = {"model": name, "model_type": "Seq. Classifier", "chat_template": "tokenizer" if kind == "chat" else kind}
    return {**about, **{subset: accuracy.value for subset, accuracy in found.subsets.items()}}


def score_rows(benchmark: Benchmark, chosen: Sequence[float], rejected: Sequence[float]) -> list[dict[str, Any]]:
    """One row per pair with both scores, as upstream names them; texts stay in the benchmark's file."""
    return [
        {"id": i, "subset": s, "results": int(a > b), "scores_chosen": float(a), "scores_rejected": float(b)}
        for i, s, a, b in zip(benchmark.id, benchmark.subset, chosen, rejected, strict=True)
    ]


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
