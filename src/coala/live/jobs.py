"""What takes long: finish, distil, export; one at a time, in a process of its own that ends with the server.

    OUT/live/job-NAME.json   what the last job of this name came to

The record is kept by the job itself, so that it holds whoever looks, and says the truth after a kill: one that was at
work when its server ended was interrupted.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import shlex
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

from coala.alignment import align_recipe
from coala.live.finish import journal_of, require_enough, write_pairs
from coala.live.session import FOLDER
from coala.messages import CoalaError
from coala.pages.words import Interval
from coala.processes import Child, Parent
from coala.recipe import recipe_of
from coala.store import DISTILLED, RunFolder, StoreError, digest, file_digest, load_object, save_json

log = logging.getLogger("coala.live")
LONGEST = 1000  # characters of a sentence: with the commands it fits into what a pipe takes whole
HEAD = ("head.json", "head.safetensors")  # how it is calibrated, and its weights
DETAILS = "the server's terminal has the details"


State = Literal["running", "done", "failed", "interrupted"]


@dataclass(frozen=True)
class Told:
    """How a job stands, in a sentence; what to type next, each with what it is for.

    ``made`` is what it left, ``head`` the digest of the head it is of, ``clicks`` how many there were.
    """

    state: State
    said: str
    commands: tuple[tuple[str, str], ...] = ()
    made: str = ""
    head: str = ""
    clicks: int = 0


@dataclass(frozen=True)
class Job:
    """A button of the page: its label, what it does, and the work itself, which returns what it came to."""

    label: str
    about: str
    work: Callable[[Parent, Path], Told]


# --- in the process of the job ---------------------------------------------------------------------------------------


def fit_run(parent: Parent, out: Path) -> Told:
    """The run of all clicks so far: what `coala align` does."""
    journal = journal_of(out)
    n_fitted, n_held_out = write_pairs(out, journal)
    run = RunFolder(out)
    content = align_recipe(recipe_of(run.settings, out / "run.json"), run, on_progress=_telling(parent))
    rate = Interval(content["summary"]["accuracy_eval"])
    found = f"its head ranks {rate.percent()} of {rate.n} held-out pairs right"
    if not rate.above(0.5):
        found += ", which does not show that it is better than chance; more clicks may"
    name, report = shlex.quote(str(out)), out / "report.html"
    commands = [(f"coala chat {name}", "Talk to it; /compare on sets plain and guided replies side by side.")]
    if rate.above(0.5):
        commands.append((f"coala serve {name}", "The OpenAI protocol, and a playground at its first page."))
    said = f"The run is finished, of {n_fitted} pairs and {n_held_out} held out: {found}. Its report is {report}."
    return Told("done", said, tuple(commands), str(report), clicks=len(journal.answered))


def distil_run(parent: Parent, out: Path) -> Told:
    """The run's guidance as a change of the model's output layer: what `coala distil` does."""
    from coala.distil.stage import distil
    from coala.store import load_head

    if load_head(out / "head").evidence == 0:
        raise CoalaError(
            "There is nothing to distil: on held-out pairs the head is not shown to be better than chance, so it "
            "guides nothing. Click more and finish again."
        )
    notes: list[str] = []
    distil(out, on_progress=_telling(parent), on_note=notes.append)
    made, name = out / DISTILLED, shlex.quote(str(out))
    said = f"The guidance is distilled into {made}. Export writes the model with it."
    said = " ".join([said, *(f"{note[:1].upper()}{note[1:]}." for note in notes)])
    served = f"coala serve {name} --mode distilled"
    commands = ((served, "As fast as the plain model; the OpenAI protocol, and a playground."),)
    return Told("done", said, commands, str(made))


def export_model(parent: Parent, out: Path) -> Told:
    """The model with its distilled guidance, next to the run: a GGUF file if it is one, else a checkpoint."""
    from coala.backbone.files import find
    from coala.backbone.gguf_header import is_gguf
    from coala.export.policy import export_beside

    parent.tell("loading the model")
    run, notes = RunFolder.open(out), list[str]()
    model = recipe_of(run.settings, out / "run.json").model
    place = find(model.name, model.revision, download=False)[0]
    made = export_beside(run, "gguf" if is_gguf(place) else "checkpoint", on_note=notes.append)
    if made is None:
        raise CoalaError(f"{'; '.join(notes)}.")
    said = f"The model with its guidance is {made.path}; read back, it has the policy's probabilities."
    commands = tuple((command, "Serves it, one forward pass a token.") for command in made.commands)
    return Told("done", said, commands, str(made.path))


def export_head(parent: Parent, out: Path) -> Told:
    """The run as a reward model: what `coala export --to reward-model` does; every export has a folder of its own."""
    from coala.alignment import load_parts
    from coala.export import export_reward_model, facts_of

    parent.tell("loading the model")
    backbone, head, _ = load_parts(out)
    number = 1
    while (folder := out / ("exported" if number == 1 else f"exported-{number}")).exists():
        number += 1
    made = export_reward_model(head, backbone, folder, facts_of(out, head))
    loaded = f'pipeline("text-classification", model={str(made.folder)!r}, trust_remote_code=True)'
    commands = (
        (f"from transformers import pipeline; score = {loaded}", "Scores replies in Python; its README.md says how."),
        (f"coala serve {shlex.quote(str(out))}", "Serves guided replies, and this head's scores of any reply."),
    )
    return Told("done", f"The head is exported as a reward model, a folder: {made.folder}.", commands, str(made.folder))


JOBS: Mapping[str, Job] = {
    "fit": Job(
        "Finish",
        "Makes an ordinary run of all clicks so far: a head chosen by validation, guided replies, a report. Clicks "
        "continue meanwhile, and you can finish again.",
        fit_run,
    ),
    "distil": Job(
        "Distil",
        "Puts the guidance of the finished run into the model itself, which then needs no extra work per token.",
        distil_run,
    ),
    "export": Job(
        "Export",
        "Writes the model with the distilled guidance as ordinary weights, which other programs serve at full speed.",
        export_model,
    ),
    "reward-model": Job(
        "Reward model",
        "Writes the head of the finished run as a reward model, which scores replies in other programs.",
        export_head,
    ),
}


def carry_out(parent: Parent, name: str, out: Path) -> None:
    """Do the job, keep what it came to, and tell it; whatever fails is told in a sentence."""
    head = head_of(out)
    try:
        told = replace(JOBS[name].work(parent, out), head=head_of(out) if name == "fit" else head)
    except CoalaError as error:
        told = Told("failed", str(error))
    except Exception as error:
        if why := _no_room(error):
            space = f"Free some space on the disk and press {JOBS[name].label} again."
            told = Told("failed", f"The files could not be written ({why}). {space}")
        else:
            log.exception("the job %s failed", name)
            told = Told("failed", f"{type(error).__name__}: {error}; {DETAILS}.")
    told = replace(told, said=told.said[:LONGEST])
    with suppress(StoreError):  # a full disk: then the server's page alone has it
        save_json(_record(out, name), asdict(told))
    parent.tell(asdict(told))


def _no_room(error: Exception) -> str:
    """That there is no room for a file, if that is what failed; whoever writes weights raises errors of its own."""
    known = [os.strerror(number) for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)]
    found = re.search("|".join(map(re.escape, known)), str(error))
    return found[0] if found else ""


def head_of(out: Path) -> str:
    """The digest of the run's head; empty where there is none."""
    files = [out / "head" / name for name in HEAD]
    return digest(*map(file_digest, files)) if all(file.is_file() for file in files) else ""


def _record(out: Path, name: str) -> Path:
    return out / FOLDER / f"job-{name}.json"


def _telling(parent: Parent) -> Callable[..., None]:
    def show(stage: str, done: float, total: float | None, note: str = "") -> None:
        share = f" {100 * done / total:.0f} %" if total else ""
        parent.tell(f"{stage}{share}{f': {note}' if note else ''}"[:LONGEST])

    return show


# --- in the server ---------------------------------------------------------------------------------------------------


class Jobs:
    """The jobs of a session's folder: begun from here, one at a time, and looked at by any number of pages at once."""

    def __init__(self, out: Path) -> None:
        self._out = Path(out).resolve()
        self._lock = threading.Lock()
        self._child: Child | None = None
        self.running = ""
        self._told = {name: told for name in JOBS if (told := self._kept(name)) is not None}

    def _kept(self, name: str) -> Told | None:
        """What an earlier server's job came to."""
        path = _record(self._out, name)
        if not path.exists():
            report = self._out / "report.html"
            there = name == "fit" and report.exists()
            return Told("done", f"The run is finished. Its report is {report}.", made=str(report)) if there else None
        try:
            found = load_object(path, "state", "said", "commands")
            told = Told(**{**found, "commands": tuple((str(a), str(b)) for a, b in found["commands"])})
            if told.state not in get_args(State):
                raise ValueError(f"{path}: found the state {str(told.state)[:20]!r}")
        except (StoreError, TypeError, ValueError) as error:
            return Told("failed", f"What it came to cannot be read: {error}")
        if told.state != "running":
            return told
        again = f"Press {JOBS[name].label} again; finished parts are kept."
        return Told("interrupted", f"The server ended while it was at work. {again}")

    def start(self, name: str) -> None:
        """Begin a job; :class:`CoalaError` where one is at work, there is nothing to work on, or a full disk."""
        with self._lock:
            self._hear()
            if self.running:
                raise CoalaError(f"{JOBS[self.running].label} is at work; wait until it is done.")
            if name == "fit":
                require_enough(journal_of(self._out))
            elif not (self._out / "report.json").exists():
                raise CoalaError("There is no finished run yet. Press Finish first.")
            if name == "export":
                self._require_policy()
            told = self._told.get(name)
            there = told is not None and told.state == "done" and told.made and Path(told.made).exists()
            if name == "reward-model" and told is not None and there and told.head == head_of(self._out):
                raise CoalaError(f"This head is exported already: {told.made}.")
            begun = Told("running", "It has begun.")
            save_json(_record(self._out, name), asdict(begun))
            self._told[name] = begun
            self.running, self._child = name, Child(carry_out, name, self._out)

    def _require_policy(self) -> None:
        if not (self._out / DISTILLED / "policy.json").exists():
            raise CoalaError("Nothing has been distilled yet. Press Distil first.")
        if (told := self._told.get("distil")) is not None and told.head != head_of(self._out):
            raise CoalaError("The run has another head than the one that was distilled. Press Distil again.")

    def look(self, clicks: int) -> dict[str, dict[str, Any]]:
        """How each job stands that was ever begun: ``state``, ``said``, ``commands`` and what has changed ``since``.

        ``clicks`` is how many there are now.
        """
        with self._lock:
            self._hear()
            shown = dict(self._told)
        return {
            name: {
                "state": told.state,
                "said": told.said,
                "commands": [list(command) for command in told.commands],
                "since": self._since(name, told, clicks) if told.state == "done" else "",
            }
            for name, told in shown.items()
        }

    def _since(self, name: str, told: Told, clicks: int) -> str:
        if told.made and not Path(told.made).exists():
            return f"It is no longer there. Press {JOBS[name].label} to make it again."
        if name == "fit":
            changed = told.clicks and clicks != told.clicks
            return f"There were {told.clicks} clicks then and are {clicks} now: finish again." if changed else ""
        if told.head == head_of(self._out):
            return ""
        return f"The run has another head by now. Press {JOBS[name].label} again."

    def _hear(self) -> None:
        """Take in what the job at work has told."""
        while self._child is not None:
            try:
                said = self._child.hear(0.001)
            except TimeoutError:
                return
            except (EOFError, CoalaError):
                self._ended(self._child.join())
                return
            known = self._told[self.running]
            if isinstance(said, str):
                self._told[self.running] = replace(known, said=said)
            else:
                self._told[self.running] = Told(**{**said, "commands": tuple(map(tuple, said["commands"]))})

    def _ended(self, code: int) -> None:
        name, self.running = self.running, ""
        if self._told[name].state == "running":
            how = f"by signal {-code}, perhaps for want of memory" if code < 0 else f"with code {code}"
            self._told[name] = Told("failed", f"Its process ended {how}; {DETAILS}.")
            with suppress(StoreError):
                save_json(_record(self._out, name), asdict(self._told[name]))
        self.close()

    def close(self) -> None:
        """End the job at work, if there is one; what it finished is kept, and it goes on there when begun again."""
        if self._child is not None:
            self._child.__exit__()
            self.running, self._child = "", None
