"""What a receipt claims, what it does not, and what is stale: in sentences."""

from __future__ import annotations

import glob
from collections.abc import Sequence
from pathlib import Path

from coala.alignment.changes import DISTILLED_FILES
from coala.receipts.opened import Opened
from coala.store import LIVE, load_json

# What the old head wrote, or what quotes pairs: gone with them.
WRITTEN = (
    *("generations-unguided.jsonl", "generations-guided.jsonl", "portions", "replies"),
    *(f"head/{kind}s.{end}" for kind in ("rater", "source", "group") for end in ("safetensors", "json")),
    *("judgements-judge.jsonl", "judgements-labeller.jsonl", "report.html", "report.json"),
    *(f"stages/{stage}.json" for stage in ("replies-unguided", "replies-guided", "distil")),
    *DISTILLED_FILES,  # states of the pairs' own replies among them
    *(f"stages/judgements-{judge}.json" for judge in ("judge", "labeller")),
    *("features/train/shards", "features/eval/shards"),
)
NOT_CLAIMED = (
    "The model itself is unchanged: its earlier training data is unknown.",
    "The file the pairs were read from is the user's: delete the pairs there too. This run does not read them again.",
    "The disk may keep the bytes of deleted files until it overwrites them; backups and snapshots keep theirs.",
    "Copies of the old head, exports and servers that loaded it elsewhere are unknown here: replace them.",
    "Cached verdicts are kept, by digests of what was judged and with the judge's raw answers.",
)


def claimed(run: Path, refitted: bool, from_scratch: bool) -> list[str]:
    """What holds after forgetting; ``refitted`` if the head saw the pairs, ``from_scratch`` if all was chosen again."""
    held = "No file of this run holds" if not (run / LIVE).is_dir() else f"Outside of {LIVE}, no file of this run holds"
    told = [
        f"{held} the pairs or their features any more; digests of the pairs are kept, so that they are not read again."
    ]
    if refitted and from_scratch:
        told.append("The head is, byte for byte, the one that a fit of the remaining features alone gives.")
    elif refitted:
        told.append(
            "The weights are the optimum of the program on the remaining pairs alone, within the gap after: those of a "
            "fit that never saw the others, at the same ridge and with the same gates. Coordinates and temperature are "
            "computed from the remaining pairs."
        )
    return told


def remnants(run: Opened, refitted: bool, from_scratch: bool) -> list[str]:
    """What still rests on the forgotten pairs."""
    told = []
    if refitted and not from_scratch:
        what = "The ridge, one of 13 on a grid, was" if not run.head.n_neurons else "Ridge, sparsity and gates were"
        told.append(f"{what} chosen with the forgotten pairs; --from-scratch chooses again.")
    if refitted and run.recipe.model.layer == "auto":
        told.append("The layer was chosen with the forgotten pairs.")
    if (run.run.path / LIVE).is_dir():
        told.append(
            f"{LIVE} keeps every click of the session, with its texts and features: delete {run.run.path / LIVE} once "
            "you are done with clicking. Finish does not read the forgotten pairs again."
        )
    return told


def stale(run: Path, refitted: bool) -> list[str]:
    """What the old head wrote and is gone, and what was made from it and is kept."""
    told = [
        f"{name}: deleted; `coala {'distil' if name.startswith('distilled') else 'align'}` writes it again"
        for name in WRITTEN
        if (name.endswith(".jsonl") or name.startswith("distilled")) and (run / name).exists()
    ]
    if (run / "replies").is_dir():
        told.append("replies: deleted; evaluations that are run again write them")
    exported = [path.name for path in sorted(run.parent.glob(f"{glob.escape(run.name)}-served*"))]
    told += [f"../{name}: exported from the old head; distil and export again" for name in exported if refitted]
    if refitted:
        kept = sorted((run / "evaluations").glob("*.json"))
        told += [f"evaluations/{path.name}: {load_json(path).get('title')}; evaluate again" for path in kept]
    return told


def shared(run: Path, entries: Sequence[Path]) -> list[str]:
    """What is said of copies of the features that other folders share with the run."""
    told = []
    for part in ("train", "eval"):
        path = run / "features" / part / "features.safetensors"
        known = sum((entry / path.name).exists() and (entry / path.name).samefile(path) for entry in entries)
        others = path.stat().st_nlink - 1 - known
        if others > 0:
            told.append(
                f"The old features/{part} have {others} more name{'s' if others > 1 else ''} on this disk, in a cache "
                "or in other runs that share them: pass --cache, and forget the pairs in those runs too."
            )
    return told
