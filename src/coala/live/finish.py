"""A session as an ordinary run: its recipe from the first moment, its pairs, and the fit that `coala align` makes.

OUT/run.json                     the recipe: `coala align --recipe OUT/run.json --out OUT` does what finishing does
OUT/live/pairs.jsonl             pairs to fit, with the click each is of
OUT/live/pairs-held-out.jsonl    pairs of prompts that were set aside
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from coala.live.journal import Journal, read_journal
from coala.live.session import FOLDER, JOURNAL
from coala.messages import CoalaError
from coala.recipe import Recipe, recipe_of
from coala.store import RunFolder, load_object, save_lines
from coala.values import Pair

PAIRS, HELD_OUT = "pairs.jsonl", "pairs-held-out.jsonl"
LEAST = 2  # pairs to fit, and held out, without which there is no run


def recipe_in(out: Path, model: Mapping[str, Any], max_new_tokens: int, seed: int) -> Recipe:
    """The recipe of the run that is in ``out`` or may be begun there; nothing is written.

    Raises :class:`CoalaError` for a folder that is something else, or a session of other settings of the model.
    """
    folder = Path(out).resolve()
    wanted = recipe_of(
        {
            "pairs": [str(folder / FOLDER / PAIRS)],
            "eval_pairs": [str(folder / FOLDER / HELD_OUT)],
            "model": dict(model),
            "evaluation": {"max_new_tokens": max_new_tokens},
            # The pairs are the model's own replies, which teach more than as many guided ones and cost no writing
            # (docs/results/distil.md, house style); the strength is that of `coala demo chat`.
            "distil": {"teacher": "weighted", "beta": 0.5, "rank": "full", "strength": 1.5},
            "seed": seed,
        }
    ).located()
    run = RunFolder(folder)
    recorded = folder / "run.json"
    if recorded.exists():
        if not (folder / FOLDER / JOURNAL).exists():
            raise CoalaError(f"{out}: found a run that was not started by `coala live`. Fix: use another --out.")
        kept = recipe_of(load_object(recorded), recorded)
        if kept.model != wanted.model:
            run.start({**kept.plain(), "model": wanted.plain()["model"]})  # raises, and names what differs
        return kept
    run.require_free()
    return wanted


def begin(out: Path, recipe: Recipe) -> None:
    """Begin the run in ``out``, if it is not there yet."""
    RunFolder(Path(out).resolve()).start(recipe.plain())


def write_pairs(out: Path, journal: Journal) -> tuple[int, int]:
    """Write the pairs of all clicks so far, and say how many are to fit and how many held out.

    Raises :class:`CoalaError` where there are too few for a run.
    """
    require_enough(journal)
    found = {}
    for name, held_out in ((PAIRS, False), (HELD_OUT, True)):
        pairs = journal.pairs(held_out=held_out)
        found[held_out] = len(pairs)
        rows = [
            {
                **_row(pair),
                "click": answer.click,
                "question": answer.id,
                "at": answer.at,
                "edited": answer.verdict == "edited",
                "tags": list(answer.tags),
            }
            for pair, answer in pairs
        ]
        save_lines(Path(out) / FOLDER / name, rows)
    return found[False], found[True]


def journal_of(out: Path) -> Journal:
    """The journal of the session in ``out`` as it is on the disk."""
    path = Path(out) / FOLDER / JOURNAL
    return read_journal(path.read_bytes(), str(path))


def require_enough(journal: Journal) -> None:
    """Raise :class:`CoalaError` where there are too few pairs for a run."""
    fitted, held_out = (len(journal.pairs(held_out=aside)) for aside in (False, True))
    if fitted < LEAST or held_out < LEAST:
        raise CoalaError(
            f"Found {fitted} pairs to learn from and {held_out} held out, expected at least {LEAST} of each, "
            "fix: click more, with enough prompts that some are held out."
        )


def _row(pair: Pair) -> dict[str, Any]:
    return {
        "prompt": [{"role": turn.role, "content": turn.text} for turn in pair.prompt],
        "chosen": [{"role": "assistant", "content": pair.chosen}],
        "rejected": [{"role": "assistant", "content": pair.rejected}],
        "group": pair.group,
        "rater": pair.rater,
    }
