"""`--track`: report a command to an experiment tracker; :mod:`coala.trackers` says what it sends."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from coala.settings import TrackerName

if TYPE_CHECKING:
    from coala.trackers import Tracking

Track = Annotated[
    TrackerName | None,
    typer.Option(
        "--track",
        help="Experiment tracker to log to: jsonl (no extra), trackio, wandb (offline unless WANDB_MODE=online) "
        "or mlflow "
        "(local files unless MLFLOW_TRACKING_URI is set). Default: none.",
    ),
]
_ASKED_ONLINE = {"wandb": ("WANDB_MODE", "online"), "mlflow": ("MLFLOW_TRACKING_URI", None)}


@contextmanager
def tracked(name: TrackerName | None, run: Path, settings: Mapping[str, Any]) -> Iterator[Tracking]:
    """A command's run in ``run``, logged to the tracker ``name``; the environment decides where that is."""
    from coala.cli.output import say
    from coala.trackers import tracking

    # Reports of errors and of use, which the libraries would send by themselves.
    for variable in ("WANDB_ERROR_REPORTING", "GRADIO_ANALYTICS_ENABLED"):
        os.environ.setdefault(variable, "false")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # it refuses plain files unless told
    variable, wanted = _ASKED_ONLINE.get(str(name), ("", None))
    given = os.environ.get(variable)
    online = given == wanted if wanted else bool(given)
    with tracking(name, run, settings, online=online, on_note=say) as found:
        yield found
