"""A session as an ordinary run: its recipe from the first moment, its pairs, and the fit that `coala align` makes.

    OUT/run.json                     the recipe: `coala align --recipe OUT/run.json --out OUT` does what finishing does
    OUT/live/pairs.jsonl             pairs to fit, with the click each is of
    OUT/live/pairs-held-out.jsonl    pairs of prompts that were set aside
    OUT/distilled                    the guidance of these pairs as a change of weights; gone when the pairs change
    OUT-served, OUT-served.gguf      the model with that change, for other programs
    OUT/exported                     the head as a reward model

What takes long is done in a process of its own, which ends with the server.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coala.alignment import align_recipe, evidence_notes
from coala.alignment.parts import guidance_of
from coala.live.journal import Journal, read_journal
from coala.live.session import FOLDER, JOURNAL
from coala.messages import CoalaError
from coala.pages.words import Interval
from coala.processes import Child, Parent
from coala.recipe import Recipe, recipe_of
from coala.store import DISTILLED, RunFolder, discard, load_head, load_lines, load_object, save_lines
from coala.values import Pair

PAIRS, HELD_OUT = "pairs.jsonl", "pairs-held-out.jsonl"
LEAST = 2  # pairs to fit, and held out, without which there is no run
LONGEST = 1000  # characters of what a job tells: a pipe takes them whole


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
    rows = _rows(journal)
    for name, some in rows.items():
        save_lines(Path(out) / FOLDER / name, some)
    n_fitted, n_held_out = len(rows[PAIRS]), len(rows[HELD_OUT])
    if n_fitted < LEAST or n_held_out < LEAST:
        raise CoalaError(
            f"found {n_fitted} pairs to learn from and {n_held_out} held out, expected at least {LEAST} of each, "
            "fix: click more, with enough prompts that some are held out"
        )
    return n_fitted, n_held_out


def discard_stale(out: Path, journal: Journal) -> bool:
    """Delete what was distilled from other pairs than those of ``journal``; whether there was any.

    Called before the pairs are written: a kill in between leaves no policy that is of other pairs than the files'.
    """
    from coala.distil.side_by_side import REPLIES

    rows = _rows(journal)
    files = {name: Path(out) / FOLDER / name for name in rows}
    if all(file.is_file() and list(load_lines(file)) == rows[name] for name, file in files.items()):
        return False
    found = (Path(out) / DISTILLED).exists()
    for name in (DISTILLED, REPLIES):
        discard(Path(out) / name)
    return found


def _rows(journal: Journal) -> dict[str, list[dict[str, Any]]]:
    """The lines of both files, each pair with the click it is of."""
    return {
        name: [
            {
                **_row(pair),
                "click": answer.click,
                "question": answer.id,
                "at": answer.at,
                "edited": answer.verdict == "edited",
                "tags": list(answer.tags),
            }
            for pair, answer in journal.pairs(held_out=held_out)
        ]
        for name, held_out in ((PAIRS, False), (HELD_OUT, True))
    }


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
    journal = read_journal(raw, str(out / FOLDER / JOURNAL))
    stale = discard_stale(out, journal)
    write_pairs(out, journal)
    run = RunFolder(out)
    recipe = recipe_of(run.settings, out / "run.json")
    content = align_recipe(recipe, run, on_progress=_telling(parent))
    doubts = evidence_notes(out, load_head(out / "head"), guidance_of(recipe))
    accuracy = Interval(content["summary"]["accuracy_eval"])
    found = f"The head ranks {accuracy.percent()} of {accuracy.n:,} held-out pairs right: better than chance."
    more = "Click more, and finish again." if doubts else ""
    again = "Distil again: what was distilled was of fewer clicks." if stale else ""
    _say(parent, "The run is finished.", *(doubts or [found]), more, again, f"Its report: {out / 'report.html'}")


def distil_run(parent: Parent, out: Path) -> None:
    """The run's guidance as a change of the model's output layer: what `coala distil` does."""
    from coala.distil.stage import NothingToDistil, distil

    notes: list[str] = []
    try:
        distil(out, on_progress=_telling(parent), on_note=notes.append)
    except NothingToDistil:
        raise CoalaError(
            "found a head that cross-validation cannot distinguish from chance, so that it guides nothing, expected "
            "one with evidence, fix: click more, and finish again"
        ) from None
    _say(parent, f"Distilled: {out / DISTILLED}. Export writes the model with it.", *(f"Note: {one}." for one in notes))


def export_model(parent: Parent, out: Path) -> None:
    """The model with its distilled guidance, beside the run: a GGUF file if it is one, else a checkpoint."""
    from coala.backbone.files import find
    from coala.backbone.gguf_header import is_gguf
    from coala.export.policy import export_beside

    parent.tell("loading the model")
    run = RunFolder.open(out)
    notes: list[str] = []
    model = recipe_of(run.settings, out / "run.json").model
    place = find(model.name, model.revision, download=False)[0]
    made = export_beside(run, "gguf" if is_gguf(place) else "checkpoint", on_note=notes.append)
    if made is None:
        raise CoalaError("; ".join(notes))
    _say(parent, f"Exported: {made.path}. Serve it: {' or: '.join(made.commands)}")


def export_head(parent: Parent, out: Path) -> None:
    """The run as a reward model: what `coala export --to reward-model` does."""
    from coala.alignment import load_parts
    from coala.export import export_reward_model, facts_of

    parent.tell("loading the model")
    backbone, head, _ = load_parts(out)
    made = export_reward_model(head, backbone, out / "exported", facts_of(out, head))
    _say(parent, f"Exported as a reward model: {made.folder}")


@dataclass(frozen=True)
class JobKind:
    """A button of the page: its label, what it does, and the file without which ``first`` has to be pressed."""

    label: str
    does: str
    work: Callable[[Parent, Path], None]
    needs: str = ""
    first: str = ""


JOBS: Mapping[str, JobKind] = {
    "fit": JobKind(
        "Finish",
        "makes an ordinary run of the clicks so far: pairs, features, a head chosen by validation, guided replies, a "
        "report. You can continue to click, and finish again.",
        fit_run,
    ),
    "distil": JobKind(
        "Distil",
        "puts the guidance of the finished run into the model's output layer.",
        distil_run,
        "report.json",
        "There is no finished run yet. Finish first.",
    ),
    "export": JobKind(
        "Export",
        "writes the model with the distilled guidance as a file that other programs serve, next to the run.",
        export_model,
        f"{DISTILLED}/policy.json",
        "Nothing has been distilled from these clicks yet. Distil first.",
    ),
    "reward-model": JobKind(
        "Reward model",
        "writes the head as a Hugging Face reward model.",
        export_head,
        "report.json",
        "There is no finished run yet. Finish first.",
    ),
}


def _say(parent: Parent, *sentences: str) -> None:
    parent.tell(" ".join(filter(None, sentences))[:LONGEST])


def _telling(parent: Parent) -> Callable[..., None]:
    def show(stage: str, done: float, total: float | None, note: str = "") -> None:
        share = f" {100 * done / total:.0f} %" if total else ""
        parent.tell(f"{stage}{share}{f': {note}' if note else ''}"[:LONGEST])

    return show


class Jobs:
    """One job at a time, in a process of its own; ``said`` is the last that it told."""

    def __init__(self, out: Path) -> None:
        self._out = Path(out).resolve()
        self._child: Child | None = None
        self.running = ""
        self.said: dict[str, str] = {}

    def start(self, name: str) -> None:
        """Begin a job; :class:`CoalaError` where one is at work, or what it needs is not there yet."""
        self.look()
        if self.running:
            raise CoalaError(f"{JOBS[self.running].label} is running; wait for it.")
        job = JOBS[name]
        if job.needs and not (self._out / job.needs).exists():
            raise CoalaError(job.first)
        self.said[name] = "begun"
        self.running, self._child = name, Child(job.work, self._out)

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
                    failed = f"It failed with code {code}; the terminal of `coala live` shows why."
                    self.said[self.running] = told if told.startswith("It failed") else failed
                child.__exit__()
                self.running, self._child = "", None
                break
        return dict(self.said)

    def close(self) -> None:
        """End the job at work, if there is one; what it finished is kept, and it goes on there when begun again."""
        if self._child is not None:
            self._child.__exit__()
            self.running, self._child = "", None
