"""The file form of pairs, heads, replies and judgements: JSON lines for people, safetensors for arrays."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save as save_tensors

from coala.store.files import (
    StoreError,
    digest,
    file_digest,
    load_arrays,
    load_lines,
    load_object,
    read_as,
    save_json,
    save_lines,
    write_atomic,
)
from coala.values import Certificate, ConvexHead, FeatureSpec, Generation, Judgement, Pair, Turn


def save_pairs(path: Path, pairs: Iterable[Pair]) -> None:
    """One JSON object per line, in TRL's conversational preference format, plus group, rater and source."""

    def row(pair: Pair) -> dict[str, Any]:
        return {
            "prompt": [{"role": turn.role, "content": turn.text} for turn in pair.prompt],
            "chosen": [{"role": "assistant", "content": pair.chosen}],
            "rejected": [{"role": "assistant", "content": pair.rejected}],
            "group": pair.group,
            **({"rater": pair.rater} if pair.rater else {}),
            **({"source": pair.source} if pair.source else {}),
        }

    save_lines(path, map(row, pairs))


def pair_digest(pair: Pair) -> str:
    """A SHA-256 of what a pair says, its group, rater and source apart."""
    return digest([[turn.role, turn.text] for turn in pair.prompt], pair.chosen, pair.rejected)


def load_pairs(path: Path) -> list[Pair]:
    """Read back what :func:`save_pairs` wrote; anything else goes through ``coala.data.read_pairs``."""
    with read_as("a file of pairs", path):
        return [
            Pair(
                prompt=tuple(Turn(turn["role"], turn["content"]) for turn in row["prompt"]),
                chosen=row["chosen"][0]["content"],
                rejected=row["rejected"][0]["content"],
                group=row["group"],
                rater=row.get("rater", ""),
                source=row.get("source", ""),
            )
            for row in load_lines(path)
        ]


def save_described(folder: Path, name: str, arrays: Mapping[str, Any], about: Mapping[str, Any]) -> None:
    """``name.safetensors`` (arrays) and ``name.json`` (all else, and the digest of the arrays)."""
    data = save_tensors({key: np.ascontiguousarray(array) for key, array in arrays.items()})
    write_atomic(Path(folder) / f"{name}.safetensors", data)
    save_json(Path(folder) / f"{name}.json", {**about, "sha256": hashlib.sha256(data).hexdigest()})


@contextmanager
def described(folder: Path, name: str, again: str, *needed: str) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """What :func:`save_described` wrote: all else, and the arrays; a folder whose two files do not belong together is
    refused, and so is what the block cannot make of them. ``again`` is the way out."""
    folder = Path(folder)
    about = load_object(folder / f"{name}.json", "sha256", "spec", *needed)
    arrays = folder / f"{name}.safetensors"
    if not arrays.is_file():
        raise StoreError(f"{folder}: {name}.json is there but {name}.safetensors is missing. {again}")
    with read_as(f"the description of a {name}", folder / f"{name}.json"):
        if file_digest(arrays) != about["sha256"]:
            raise StoreError(f"{folder}: {name}.safetensors is not the file {name}.json describes. {again}")
        yield about, load_arrays(arrays)


def save_head(folder: Path, head: ConvexHead) -> None:
    """``head.safetensors`` (gates, weights, linear) and ``head.json`` (all else, and the digest of the arrays)."""
    names = ("spec", "gate_on", "temperature", "least_slope", "certificate")
    arrays = {"gates": head.gates, "weights": head.weights, "linear": head.linear}
    save_described(folder, "head", arrays, {name: getattr(head, name) for name in names})


def load_head(folder: Path) -> ConvexHead:
    """Read a head; a folder whose two files do not belong together is refused.

    Heads written before gates could act on prompts have gates on the reply and temperature 1; older ones have no least
    slope.
    """
    with described(folder, "head", "Fit the head again.") as (about, arrays):
        return ConvexHead(
            **arrays,
            spec=read_spec(about["spec"]),
            gate_on=about.get("gate_on", "reply"),
            temperature=about.get("temperature", 1.0),
            least_slope=about.get("least_slope"),
            certificate=certificate_of(about["certificate"]),
        )


def read_spec(row: Mapping[str, Any]) -> FeatureSpec:
    names = {f.name for f in fields(FeatureSpec)}
    if set(row) != names:
        raise StoreError(f"A feature spec has the fields {sorted(names)}; found {sorted(row)}. Extract features again.")
    return FeatureSpec(**row)


def certificate_of(row: Mapping[str, Any] | None) -> Certificate | None:
    """A certificate as it was saved, by this version or an older one; None for none."""
    if not row:
        return None
    names = {f.name for f in fields(Certificate)}
    facts = {**row.get("facts", {}), **{name: value for name, value in row.items() if name not in names}}
    # Certificates were plain mappings once: what those did not record stays unknown, what has no field is a fact.
    unknown = {"program": facts.get("method"), "n_patterns": facts.get("n_neurons"), "precision": "unknown"}
    known = {name: row[name] for name in names & set(row)}
    try:
        return Certificate(**{**unknown, "violation": 0.0, "versions": {}, **known, "facts": facts})
    except TypeError as error:
        raise StoreError(f"The certificate of the head is not whole ({error}). Fit the head again.") from None


def save_generations(
    path: Path, generations: Iterable[Generation], prompts: Mapping[str, Sequence[Turn]] | None = None
) -> None:
    """One JSON object per line; with ``prompts`` by their id each holds its prompt too, for whoever reads the file."""

    def row(one: Generation) -> dict[str, Any]:
        said = [] if prompts is None else [{"role": turn.role, "content": turn.text} for turn in prompts[one.prompt_id]]
        return {**({"prompt": said} if said else {}), **asdict(one)}

    save_lines(path, map(row, generations))


def load_generations(path: Path) -> list[Generation]:
    with read_as("a file of generations", path):
        rows = [{name: value for name, value in row.items() if name != "prompt"} for row in load_lines(path)]
        unknown = {"score": math.nan, "log_prob": math.nan}
        return [Generation(**{**row, **{k: v for k, v in unknown.items() if row.get(k, v) is None}}) for row in rows]


def save_judgements(path: Path, judgements: Iterable[Judgement]) -> None:
    save_lines(path, judgements)


def load_judgements(path: Path) -> list[Judgement]:
    with read_as("a file of judgements", path):
        return [Judgement(**row) for row in load_lines(path)]
