"""The pairs of a study: read once, split once, the same files for every method.

OUT/data/<dataset>/train.jsonl       training pairs
OUT/data/<dataset>/fit.jsonl         those of them that rates are tried on
OUT/data/<dataset>/validation.jsonl  the others, on which a rate is chosen; never a test pair
OUT/data/<dataset>/test.jsonl        held out of everything
OUT/data/<dataset>/about.json        digests of the sources and counts
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from coala.compare.progress import OnStage, unheard
from coala.compare.study import Dataset, Study
from coala.store import digest, file_digest, load_json, load_object, load_pairs, save_json, save_pairs
from coala.values import CoalaError, Pair

PARTS = ("train", "fit", "validation", "test")


def prepare(study: Study, out: Path, tell: OnStage = unheard) -> dict[str, str]:
    """Write every dataset's parts into ``out`` unless they are there; a digest of each dataset's parts.

    ``tell`` hears how far the sampling of pairs is, which takes minutes.

    Raises :class:`CoalaError` for pairs that cannot be read, and if the sources of a finished split have changed.
    """
    found: dict[str, str] = {}
    read: _Read = {}
    # Those that join others come after what they join.
    for name in sorted(study.datasets, key=lambda name: bool(study.datasets[name].joins)):
        folder = out / "data" / name
        if joins := study.datasets[name].joins:
            found[name] = _join(out, folder, {one: found[one] for one in joins})
        else:
            found[name] = _prepare(study, name, folder, tell, read)
    return found


def part(out: Path, dataset: str, name: str) -> list[Pair]:
    """``train``, ``fit``, ``validation`` or ``test`` of a dataset."""
    return load_pairs(out / "data" / dataset / f"{name}.jsonl")


# Pairs of files by what decides them: datasets of one study often differ in their labeller alone.
_Read = dict[tuple[Any, ...], list[Pair]]


def _prepare(study: Study, name: str, folder: Path, tell: OnStage, read: _Read) -> str:
    from coala.data import source_digest, split

    dataset = study.datasets[name]
    if dataset.sampled is not None:
        from coala.compare.sampling import sampled_pairs

        dataset = dataset.model_copy(update={"pairs": (str(sampled_pairs(study, name, folder, tell)),)})
    if not dataset.pairs:
        raise CoalaError(f"Dataset {name!r} names no file of pairs, so it can be planned (--dry-run) but not run.")
    gone = [
        source for source in (*dataset.pairs, *dataset.test) if Path(source).is_absolute() and not Path(source).exists()
    ]
    if gone:
        raise CoalaError(
            f"Dataset {name!r}: {gone[0]} is missing. Fix: name its files with --set 'datasets.{name}.pairs=[FILE]', "
            "or the folder of data: paths with --data."
        )
    wanted = {
        "sources": [source_digest(source) for source in (*dataset.pairs, *dataset.test)],
        "settings": [
            dataset.model_dump(mode="json", include={"format", "skip_bad", "train_pairs", "test_pairs", "per_group"}),
            study.split.model_dump(),
        ],
    }
    if dataset.labeller:
        wanted["labeller"] = dataset.labeller
    about = folder / "about.json"
    if about.is_file():
        found = load_object(about, *wanted, "parts", "counts")
        if any(found.get(key) != wanted.get(key) for key in (*wanted, "labeller")):
            raise CoalaError(
                f"{folder}: holds the pairs of another study: {found['settings']} there, {wanted['settings']} now, or "
                "the files have changed. Give another --out."
            )
        if all(file_digest(folder / f"{p}.jsonl") == found["parts"][p] for p in PARTS):
            return digest(found["parts"])
    everything = _read(read, dataset, dataset.pairs, against=dataset.test)
    if dataset.test:
        train, test = everything, _read(read, dataset, dataset.test)
    else:
        train, test = split(everything, study.split.test, seed=study.split.seed)
    if dataset.labeller:
        train, test = (labelled(pairs, dataset.labeller) for pairs in (train, test))
    seed = study.split.seed
    train = limited(train, dataset.train_pairs, seed, per_group=dataset.per_group)
    test = limited(test, dataset.test_pairs, seed, per_group=dataset.per_group)
    fit, validation = split(train, study.split.validation, seed=seed)
    for part_name, pairs in zip(PARTS, (train, fit, validation, test), strict=True):
        save_pairs(folder / f"{part_name}.jsonl", pairs)
    counts: dict[str, Any] = {
        p: {"pairs": len(pairs), "groups": len({pair.group for pair in pairs})}
        for p, pairs in zip(PARTS, (train, fit, validation, test), strict=True)
    }
    parts = {p: file_digest(folder / f"{p}.jsonl") for p in PARTS}
    save_json(about, {**wanted, "parts": parts, "counts": counts})
    return digest(parts)


def _join(out: Path, folder: Path, of: dict[str, str]) -> str:
    """The parts of several datasets as those of one, groups named after the dataset each is of."""
    parts = {}
    about: dict[str, Any] = {}
    for name in PARTS:
        pairs = [replace(pair, group=f"{one}:{pair.group}") for one in of for pair in part(out, one, name)]
        save_pairs(folder / f"{name}.jsonl", pairs)
        parts[name] = file_digest(folder / f"{name}.jsonl")
        about[name] = {"pairs": len(pairs), "groups": len({pair.group for pair in pairs})}
    save_json(folder / "about.json", {"sources": of, "settings": list(of), "parts": parts, "counts": about})
    return digest(parts)


def counts(out: Path, dataset: str) -> dict[str, Any]:
    """Pairs and groups of every part."""
    found: dict[str, Any] = load_json(out / "data" / dataset / "about.json")["counts"]
    return found


def _read(read: _Read, dataset: Dataset, sources: Sequence[str], against: Sequence[str] = ()) -> list[Pair]:
    from coala.data import check

    key = (dataset.format, dataset.skip_bad, tuple(sources), tuple(against))
    if key not in read:
        found = check(sources, dataset.format, against=against or None)
        if not (dataset.skip_bad and found.pairs):
            found.raise_for_errors()
        read[key] = list(found.pairs)
    return read[key]


def labelled(pairs: Sequence[Pair], labeller: str) -> list[Pair]:
    """The pairs with the reply first that ``labeller`` scores higher; those it finds alike are left out."""
    from coala.evaluation.judges.named import local_judge

    score = local_judge(labeller).scorer().score
    found = []
    for pair in pairs:
        ahead = score(pair.chosen) - score(pair.rejected)
        if ahead:
            found.append(pair if ahead > 0 else replace(pair, chosen=pair.rejected, rejected=pair.chosen))
    if not found:
        raise CoalaError(
            f"The labeller {labeller} scores all replies alike. Fix: use another labeller, or other pairs."
        )
    return found


def limited(pairs: Sequence[Pair], most: int | None, seed: int, *, per_group: int | None = None) -> list[Pair]:
    """At most ``most`` pairs of whole groups (each cut to ``per_group``), in the order of a hash of ``seed`` and name.

    A last group that does not fit is cut, so that the number is met.
    """
    by_group: dict[str, list[int]] = defaultdict(list)
    for i, pair in enumerate(pairs):
        by_group[pair.group].append(i)
    order = sorted(by_group, key=lambda g: hashlib.sha256(f"{seed}\0{g}".encode("utf-8", "surrogatepass")).digest())
    kept: list[int] = []
    sizes: Counter[str] = Counter()
    for group in order:
        for i in by_group[group]:
            if (most is None or len(kept) < most) and (per_group is None or sizes[group] < per_group):
                kept.append(i)
                sizes[group] += 1
    return [pairs[i] for i in sorted(kept)]
