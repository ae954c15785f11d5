"""What a run tells a tracker of experiments: its settings, numbers while it goes on, and a summary at its end.

A tracker is told and never asked: one that fails is told of in one line, and the run goes on without it. Nothing is
sent anywhere unless the caller says so. Knows what no number means.

Files lie beside the run's folder, where runs share them: RUN.tracking.jsonl, wandb/, mlruns/; trackio has a place of
its own for all projects.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any, Protocol

from coala.callbacks import OnNote, OnProgress, quiet, silent
from coala.messages import CoalaError
from coala.settings import TrackerName
from coala.store import append_line, plain

PROJECT = "coala"
_SEPARATOR = "/"


class Tracker(Protocol):
    """One run as a tracker has it; every method may raise whatever the tracker's library raises."""

    def log(self, numbers: Mapping[str, float], step: int) -> None: ...

    def end(self, summary: Mapping[str, float], finished: bool) -> str:
        """Close the run; in a few words where it is kept."""


class Tracking:
    """Numbers on their way to a tracker, or to nobody; a tracker that fails once is not told again."""

    def __init__(self, name: str, tracker: Tracker | None, on_note: OnNote) -> None:
        self._name, self._tracker, self._note = name, tracker, on_note
        self._step = 0
        self._summary: dict[str, float] = {}
        self._shares: dict[str, int] = {}

    def log(self, values: Mapping[str, Any]) -> None:
        """The numbers of ``values``, one step further."""
        if numbers := numbers_of(values):
            step = self._step
            self._step += 1
            self._guarded(lambda tracker: tracker.log(numbers, step))

    def summarise(self, values: Mapping[str, Any]) -> None:
        """What the run found; told when it ends."""
        self._summary |= numbers_of(values)

    def following(self, show: OnProgress = silent) -> OnProgress:
        """``show``, and the percent of each stage in whole numbers as it grows."""

        def showing(stage: str, done: float, total: float | None, note: str = "") -> None:
            show(stage, done, total, note)
            percent = int(100 * done / total) if stage and total else 0
            if percent > self._shares.get(stage, 0):
                self._shares[stage] = percent
                self.log({"percent": {stage: percent}})

        return showing

    def end(self, finished: bool) -> None:
        self._guarded(lambda tracker: self._note(f"{self._name}: {tracker.end(self._summary, finished)}"))
        self._tracker = None

    def _guarded(self, tell: Callable[[Tracker], None]) -> None:
        if self._tracker is None:
            return
        try:
            with redirect_stdout(io.StringIO()):  # stdout is the results'
                tell(self._tracker)
        except Exception as error:  # noqa: BLE001 - each library raises its own; the run matters more
            self._tracker = None
            self._note(_lost(self._name, error))


@contextmanager
def tracking(
    name: TrackerName | None,
    run: Path,
    settings: Mapping[str, Any],
    *,
    online: bool = False,
    on_note: OnNote = quiet,
) -> Iterator[Tracking]:
    """A run in the folder ``run``, told to the tracker ``name``; to nobody without one.

    ``online`` lets wandb reach its server, and mlflow the one that its own settings name. CoalaError, before anything
    is done, if the tracker's package is not installed.
    """
    tracker: Tracker | None = None
    if name is not None:
        try:
            with redirect_stdout(io.StringIO()):
                tracker = _TRACKERS[name](run.absolute(), plain(settings), online)
        except ImportError as error:
            raise CoalaError(
                f"Found no {error.name or name}, which --track {name} needs. Fix: pip install 'coala-align[{name}]'."
            ) from None
        except Exception as error:  # noqa: BLE001 - as above
            on_note(_lost(name, error))
    tracked = Tracking(str(name), tracker, on_note)
    try:
        yield tracked
    except BaseException:
        tracked.end(finished=False)
        raise
    tracked.end(finished=True)


def numbers_of(values: Mapping[str, Any]) -> dict[str, float]:
    """The finite numbers among ``values``, those within mappings and values under ``outer/inner``; lists hold none."""
    return dict(_numbers("", plain(values)))


def _numbers(name: str, value: Any) -> Iterator[tuple[str, float]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _numbers(f"{name}{_SEPARATOR if name else ''}{key}", inner)
    elif isinstance(value, bool | int | float) and math.isfinite(value):
        yield name, float(value)


def _lost(name: str, error: Exception) -> str:
    told = " ".join(str(error).split())[:200] or type(error).__name__
    return f"{name} failed ({told}); the run continues without it"


# --- the trackers ------------------------------------------------------------------------------------------------


class Lines:
    """One line of JSON for the settings, for each step, and for the summary."""

    def __init__(self, run: Path, settings: Mapping[str, Any], online: bool) -> None:
        self._file = run.with_name(f"{run.name}.tracking.jsonl")
        append_line(self._file, {"settings": settings})

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        append_line(self._file, {"step": step, **numbers})

    def end(self, summary: Mapping[str, float], finished: bool) -> str:
        append_line(self._file, {"summary": summary, "finished": finished})
        return f"kept in {self._file}"


class Wandb:
    """Weights & Biases, offline unless allowed: no code, no system metrics, no console."""

    def __init__(self, run: Path, settings: Mapping[str, Any], online: bool) -> None:
        import wandb

        own = wandb.Settings(
            silent=True, console="off", disable_code=True, disable_git=True, x_disable_stats=True, x_disable_meta=True
        )
        mode: Any = "online" if online else "offline"
        self._run = wandb.init(
            project=PROJECT, name=run.name, dir=run.parent, config=dict(settings), mode=mode, settings=own
        )
        self._told = "sent to its server" if online else f"kept offline; `wandb sync {self._run.settings.sync_dir}`"

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        self._run.log(dict(numbers), step=step)

    def end(self, summary: Mapping[str, float], finished: bool) -> str:
        self._run.summary.update(dict(summary))
        self._run.finish(exit_code=0 if finished else 1)
        return self._told


class Trackio:
    """Trackio, in its own place on this machine; its dashboard is ``trackio show``."""

    def __init__(self, run: Path, settings: Mapping[str, Any], online: bool) -> None:
        import trackio

        self._library = trackio
        trackio.init(project=PROJECT, name=run.name, config=dict(settings), embed=False)
        self._next = 0

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        self._next = step + 1
        self._library.log(dict(numbers), step=step)

    def end(self, summary: Mapping[str, float], finished: bool) -> str:
        if summary:
            self._library.log({f"summary{_SEPARATOR}{name}": one for name, one in summary.items()}, step=self._next)
        self._library.finish()
        return f"kept; `trackio show --project {PROJECT}`"


class MLflow:
    """MLflow, as files beside the run unless the tracking server of its own settings is allowed."""

    def __init__(self, run: Path, settings: Mapping[str, Any], online: bool) -> None:
        from mlflow import MlflowClient

        self._store = None if online else (run.parent / "mlruns").as_uri()
        self._client = MlflowClient(tracking_uri=self._store)
        found = self._client.get_experiment_by_name(PROJECT)
        experiment = self._client.create_experiment(PROJECT) if found is None else found.experiment_id
        self._run = self._client.create_run(experiment, run_name=run.name).info.run_id
        for name, value in _texts("", settings):
            self._client.log_param(self._run, name, value)

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        for name, value in numbers.items():
            self._client.log_metric(self._run, _plain_name(name), value, step=step)

    def end(self, summary: Mapping[str, float], finished: bool) -> str:
        self.log({f"summary{_SEPARATOR}{name}": value for name, value in summary.items()}, 0)
        self._client.set_terminated(self._run, "FINISHED" if finished else "FAILED")
        where = "the server of its own settings" if self._store is None else self._store
        return f"kept by {where}" if self._store is None else f"kept; `mlflow ui --backend-store-uri {where}`"


def _texts(name: str, value: Any) -> Iterator[tuple[str, str]]:
    """Settings as MLflow takes them: a text for each, at most 500 characters."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _texts(f"{name}.{key}" if name else str(key), inner)
    else:
        yield _plain_name(name), str(value)[:500]


def _plain_name(name: str) -> str:
    """A name MLflow allows: letters, digits, spaces and ``_-./:``."""
    return "".join(letter if letter.isalnum() or letter in " _-./:" else "_" for letter in name)


_TRACKERS: Mapping[str, Callable[[Path, Mapping[str, Any], bool], Tracker]] = {
    "jsonl": Lines,
    "mlflow": MLflow,
    "trackio": Trackio,
    "wandb": Wandb,
}
