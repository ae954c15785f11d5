"""Planted and real raters: who is found reversed or random, with which recall, and what a head of their own is worth.

    python benchmarks/raters.py --data ../shared/data                # all sets, 20 draws each
    python benchmarks/raters.py --sets film --seeds 5
    python benchmarks/raters.py --part real --data ../shared/data

``planted`` gives real pairs to ten raters of 20 to 200 pairs, two of whom have their choices reversed and one of whom
throws a coin. ``real`` compares the judges, data sets and domains that public pairs name. Features of small models;
linear heads. Prints tables; the last line is JSON.
"""

from __future__ import annotations

import argparse
import gzip
import json
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from coala.backbone import load_backbone
from coala.convex import fit
from coala.convex.held import HeldProgram
from coala.convex.raters import Raters
from coala.convex.raters_agreement import agreements
from coala.data import check
from coala.features import extract
from coala.statistics.intervals import wilson
from coala.values import FeatureSet

ASSETS = Path(__file__).resolve().parent.parent / "src" / "coala" / "assets"
SMALL = "models/stories260K-hf"
SIZES = np.linspace(20, 200, 10).astype(int)
PLANTED = ("reversed", "reversed", "random")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path(__file__).resolve().parents[2] / "shared" / "data")
    parser.add_argument("--part", choices=("planted", "real"), nargs="+", default=["planted", "real"])
    parser.add_argument("--sets", choices=("film", "harmless", "tutors"), nargs="+", help="of the part planted")
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--most", type=int, default=1500, help="pairs of a set, of the part real")
    args = parser.parse_args()
    found: dict[str, Any] = {}
    if "planted" in args.part:
        pairs = int(SIZES.sum())
        found["planted"] = {name: planted(name, train, args.seeds) for name, train in sets(args.data, pairs, args.sets)}
    if "real" in args.part:
        found["real"] = {name: compared(name, *named) for name, named in real(args.data, args.most)}
    print(json.dumps(found))


# --- planted -----------------------------------------------------------------------------------------------------


def sets(data: Path, most: int, wanted: Sequence[str] | None) -> Iterator[tuple[str, FeatureSet]]:
    """Features of the first pairs of the sets that are there, or of those ``wanted``."""
    named = {"film": (ASSETS / "film-lm", ASSETS / "film_pairs.jsonl.gz")}
    for name, file in (("harmless", "hh_rlhf_harmless/train"), ("tutors", "mrbench/pairs_train")):
        if (data / f"{file}.jsonl.gz").is_file():
            named[name] = (data / SMALL, data / f"{file}.jsonl.gz")
    for name, (model, path) in named.items():
        if name in (wanted or named):
            backbone = load_backbone(str(model), device="cpu")
            pairs = list(check([str(path)]).pairs)[:most]
            yield name, extract(pairs, backbone, backbone.spec(-1, "mean", True, None))


def planted(name: str, train: FeatureSet, seeds: int) -> dict[str, Any]:
    """Verdicts by what was planted, over draws of who has which pairs and who is faulty."""
    sizes = SIZES * len(train) // int(SIZES.sum())
    n = int(sizes.sum())
    train = train.take(np.arange(n))
    head = fit(train, method="linear").head
    assert head.certificate is not None
    relative = float(head.certificate.facts["ridge_relative"])
    clean = float((head.margins(train) > 0).mean())
    print(f"\n{name}: {n} pairs, width {train.width}, ridge {relative:.2g}, {clean:.3f} of those fitted on")
    counts: dict[str, dict[str, int]] = {}
    deviating: dict[str, list[int]] = {}
    large: dict[str, list[int]] = {}
    gains: list[tuple[int, int, int]] = []
    for seed in range(seeds):
        rng = np.random.default_rng(seed)
        member = rng.permutation(np.repeat(np.arange(len(sizes)), sizes))
        kinds = rng.permutation([*PLANTED, *["sound"] * (len(sizes) - len(PLANTED))])
        flipped = (kinds[member] == "reversed") | ((kinds[member] == "random") & (rng.random(n) < 0.5))
        chosen = np.where(flipped[:, None], train.rejected, train.chosen)
        rejected = np.where(flipped[:, None], train.chosen, train.rejected)
        faulty = replace(train, chosen=chosen, rejected=rejected)
        task = Raters.of(HeldProgram.of(faulty, head, ridge_relative=relative), member, len(sizes))
        level, _ = task.null_level(np.unique(faulty.group, return_inverse=True)[1], seed=seed)
        own = task.fit(level)
        weighed, margins = task.relaxed(own, faulty.group, seed)
        for rater, one in enumerate(agreements(task, faulty.group, seed=seed)):
            kind = str(kinds[rater])
            tally = counts.setdefault(kind, {})
            tally[one.verdict] = tally.get(one.verdict, 0) + 1
            deviating.setdefault(kind, []).append(int(rater in own.own))
            if one.n >= np.median(sizes):
                large.setdefault(kind, []).append(int(one.verdict == ("consistent" if kind == "sound" else kind)))
            if margins is not None and kind == "reversed" and rater in weighed.own:
                mine = member == rater
                gains.append((int((margins[0, mine] > 0).sum()), int((margins[1, mine] > 0).sum()), int(mine.sum())))
    verdicts = ("consistent", "random", "reversed", "undecided")
    print(f"  {'planted':<10}{'n':>5}" + "".join(f"{verdict:>12}" for verdict in verdicts) + "  called so")
    told: dict[str, Any] = {"pairs": n, "seeds": seeds, "ridge_relative": relative}
    for kind in ("sound", "random", "reversed"):
        tally = counts.get(kind, {})
        right = tally.get("consistent" if kind == "sound" else kind, 0)
        total = sum(tally.values())
        line = f"  {kind:<10}{total:>5}" + "".join(f"{tally.get(verdict, 0):>12}" for verdict in verdicts)
        print(
            f"{line}  {_share(right, total)}; with {int(np.median(sizes))} pairs or more "
            f"{_share(sum(large.get(kind, [])), len(large.get(kind, [])))}; deviates "
            f"{_share(sum(deviating.get(kind, [])), len(deviating.get(kind, [])))}"
        )
        told[kind] = {"verdicts": tally, "large": large.get(kind, []), "deviating": deviating.get(kind, [])}
    if gains:
        shared, own_right, pairs = (sum(part) for part in zip(*gains, strict=True))
        print(
            f"  reversed with a head of their own: right of {pairs} pairs, shared {_share(shared, pairs)}, "
            f"own {_share(own_right, pairs)}"
        )
        told["own_heads"] = {"raters": len(gains), "pairs": pairs, "shared": shared, "own": own_right}
    return told


def _share(k: int, n: int) -> str:
    if not n:
        return "none"
    low, high = wilson(k / n, n)
    return f"{100 * k / n:.0f} % [{100 * low:.0f}, {100 * high:.0f}] of {n}"


# --- real --------------------------------------------------------------------------------------------------------


def real(data: Path, most: int) -> Iterator[tuple[str, tuple[FeatureSet, list[str]]]]:
    """Features of pairs that say who chose or where they are from, and these names."""
    backbone = None
    for name, file, column in (
        ("alpaca_eval, judges", "alpaca_eval_pairs/train", "annotator"),
        ("alpaca_eval, data sets", "alpaca_eval_pairs/train", "dataset"),
        ("SHP, domains", "shp/test", "domain"),
        ("tutors, data sets", "mrbench/pairs_train", "Data"),
    ):
        path = data / f"{file}.jsonl.gz"
        if not path.is_file():
            continue
        backbone = load_backbone(str(data / SMALL), device="cpu") if backbone is None else backbone
        lines = gzip.decompress(path.read_bytes()).decode().splitlines()
        order = np.random.default_rng(0).permutation(len(lines))[:most]
        names, pairs = [], []
        with tempfile.TemporaryDirectory() as folder:
            some = Path(folder) / "some.jsonl"
            some.write_text(
                "\n".join(json.dumps({**json.loads(lines[i]), "rater": _named(lines[i], column)}) for i in order)
            )
            for pair in check([str(some)]).pairs:
                names.append(pair.rater)
                pairs.append(pair)
        yield name, (extract(pairs, backbone, backbone.spec(-1, "mean", True, 256)), names)


def _named(line: str, column: str) -> str:
    return str(json.loads(line)[column])


def compared(name: str, features: FeatureSet, names: Sequence[str]) -> dict[str, Any]:
    head = fit(features, method="linear").head
    listed = sorted(set(names))
    member = np.array([listed.index(one) for one in names])
    task = Raters.of(HeldProgram.of(features, head), member, len(listed))
    level, within = task.null_level(np.unique(features.group, return_inverse=True)[1])
    own = task.fit(level)
    judged = agreements(task, features.group)
    print(f"\n{name}: {len(features)} pairs, {len(listed)} names, {len(own.own)} deviate")
    rows = []
    for rater, one in enumerate(judged):
        share = f"{100 * one.share.value:.0f} % [{100 * one.share.low:.0f}, {100 * one.share.high:.0f}]"
        slope = f"{one.slope:.2f} [{one.low:.2f}, {one.high:.2f}]"
        flag = "deviates" if rater in own.own else ""
        print(f"  {listed[rater]:<34}{one.n:>6}  {share:<18}{slope:<24}{one.verdict:<12}{flag}")
        rows.append({"name": listed[rater], "n": one.n, "verdict": one.verdict, "deviates": bool(flag)})
    return {"pairs": len(features), "rows": rows, "level": level, "within": within}


if __name__ == "__main__":
    main()
