"""Where an export is written: free and writable before any work, after it whole or not there."""

from __future__ import annotations

import contextlib
import errno
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from coala.export.network import ExportError
from coala.store import working_folder, write_error


def check_free(out: Path, run: Path | None = None) -> None:
    """Refuse a place that is taken, inside the run, or where nothing may be written."""
    try:
        taken = os.path.lexists(out) or bool(out.stat())
    except FileNotFoundError:
        taken = False
    except OSError as error:
        raise write_error(out, error) from error
    if taken:
        raise ExportError(f"{out}: found something of that name, expected a free one, fix: another --out.")
    if run is not None and out.resolve().is_relative_to(run.resolve()):
        raise ExportError(
            f"{out}: found a place inside the run, which is the run's own, expected one outside, fix: another --out."
        )
    there = next(path for path in out.absolute().parents if path.exists())
    if not os.access(there, os.W_OK, effective_ids=os.access in os.supports_effective_ids):
        raise write_error(out, OSError(errno.EACCES, os.strerror(errno.EACCES)))


@contextlib.contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A folder to fill that ``path`` is made of; a fault of the disk, whoever meets it, is one sentence."""
    from safetensors import SafetensorError

    with working_folder(path) as work:
        try:
            yield work
        except SafetensorError as error:
            number = re.search(r"os error (\d+)", str(error))
            if number is None:
                raise
            raise write_error(path, OSError(int(number[1]), os.strerror(int(number[1])))) from error
        except OSError as error:
            raise write_error(path, error) from error


def settle(work: Path) -> None:
    """Have what was written on the disk before it gets its name."""
    for path in [*work.rglob("*"), work]:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def older_names(config: dict[str, Any]) -> dict[str, Any]:
    """Rotary positions under the names from before transformers 5, which some engines read alone, and then guess."""
    rope = config.get("rope_parameters")
    if not isinstance(rope, dict) or "rope_theta" not in rope:
        return {}  # none, or different ones for different layers, which had no older name
    scaling = {name: value for name, value in rope.items() if name not in ("rope_theta", "partial_rotary_factor")}
    return {
        **{name: rope[name] for name in ("rope_theta", "partial_rotary_factor") if name in rope},
        "rope_scaling": None if rope.get("rope_type", "default") == "default" else scaling,
    }
