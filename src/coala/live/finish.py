"""A session as an ordinary run: its recipe from the first moment, its pairs, and the fit that `coala align` makes.

    OUT/run.json                     the recipe: `coala align --recipe OUT/run.json --out OUT` does what finishing does
    OUT/live/pairs.jsonl             pairs to fit, with the click each is of
    OUT/live/pairs-held-out.jsonl    pairs of prompts that were set aside

What takes long is done in a process of its own, which ends with the server.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from coala.alignment import align_recipe
from coala.live.journal import Journal, read_journal
from coala.live.session import FOLDER, JOURNAL
from coala.messages import CoalaError
from coala.processes import Child, Parent
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
    if found[False] < LEAST or found[True] < LEAST:
        raise CoalaError(
            f"found {found[False]} pairs to learn from and {found[True]} held out, expected at least {LEAST} of each, "
            "fix: click more, with enough prompts that some are held out"
        )
    return found[False], found[True]


def _row(pair: Pair) -> dict[str, Any]:
    return {
        "prompt": [{"role": turn.role, "content": turn.text} for turn in pair.prompt],
        "chosen": [{"role": "assistant", "content": pair.chosen}],
        "rejected": [{"role": "assistant", "content": pair.rejected}],
        "group": pair.group,
        "rater": pair.rater,
    }


# --- what takes long, in a process of its own ------------------------------------------------------------------------


def fit_run(parent: Parent, out: Path) -> None:
    """The run of all clicks so far: what `coala align` does."""
    raw = (out / FOLDER / JOURNAL).read_bytes()
    write_pairs(out, read_journal(raw, str(out / FOLDER / JOURNAL)))
    run = RunFolder(out)
    align_recipe(recipe_of(run.settings, out / "run.json"), run, on_progress=_telling(parent))
    parent.tell(f"The run is finished. Its report: {out / 'report.html'}")


def distil_run(parent: Parent, out: Path) -> None:
    """The run's guidance as a change of the model's output layer: what `coala distil` does."""
    from coala.distil.stage import distil

    distil(out, on_progress=_telling(parent))
    parent.tell(f"Distilled: {out / 'distilled'}")


def export_run(parent: Parent, out: Path) -> None:
    """The run as a reward model: what `coala export --to reward-model` does."""
    from coala.alignment import load_parts
    from coala.export import export_reward_model, facts_of

    parent.tell("loading the model")
    backbone, head, _ = load_parts(out)
    made = export_reward_model(head, backbone, out / "exported", facts_of(out, head))
    parent.tell(f"Exported as a reward model: {made.folder}")


JOBS: Mapping[str, Callable[[Parent, Path], None]] = {"fit": fit_run, "distil": distil_run, "export": export_run}


def _telling(parent: Parent) -> Callable[..., None]:
    def show(stage: str, done: float, total: float | None, note: str = "") -> None:
        share = f" {100 * done / total:.0f} %" if total else ""
        parent.tell(f"{stage}{share}{f': {note}' if note else ''}"[:1000])

    return show


class Jobs:
    """One job at a time, in a process of its own; ``said`` is the last that it told."""

    def __init__(self, out: Path) -> None:
        self._out = Path(out).resolve()
        self._child: Child | None = None
        self.running = ""
        self.said: dict[str, str] = {}

    def start(self, name: str) -> None:
        """Begin a job; :class:`CoalaError` where one is at work, or there is no run yet."""
        self.look()
        if self.running:
            raise CoalaError(f"The job {self.running} is at work; wait for it.")
        if name != "fit" and not (self._out / "report.json").exists():
            raise CoalaError("There is no finished run yet. Finish first.")
        self.said[name] = "begun"
        self.running, self._child = name, Child(JOBS[name], self._out)

    def look(self) -> dict[str, str]:
        """What each job told last."""
        child = self._child
        while child is not None:
            try:
                self.said[self.running] = str(child.hear(0.001))
            except TimeoutError:
                break
            except CoalaError as error:
                self.said[self.running] = f"It failed: {error}"
            except EOFError:
                if code := child.join():
                    told = self.said[self.running]
                    self.said[self.running] = told if told.startswith("It failed") else f"It failed with code {code}."
                child.__exit__()
                self.running, self._child = "", None
                break
        return dict(self.said)

    def close(self) -> None:
        """End the job at work, if there is one; what it finished is kept, and it goes on there when begun again."""
        if self._child is not None:
            self._child.__exit__()
            self.running, self._child = "", None
