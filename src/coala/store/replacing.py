"""Many files of a run replaced at once: killed at any moment, the run is the old one or the new one.

New files are written to a folder of their own. One small file, written last and atomically, says that they are all
there and what goes where: from then on the run is the new one. Whoever opens the run finishes what a kill left undone.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from coala.store.files import StoreError, load_object, save_json

PENDING = ".pending"
PLAN = "plan.json"


class Replacement:
    """What will be in the run: files written under :meth:`path`, and names to be deleted."""

    def __init__(self, run: Path) -> None:
        self.run = run
        self.folder = run / PENDING
        self.deleted: list[str] = []
        self.outside: dict[str, str] = {}

    def path(self, name: str) -> Path:
        """Where to write what will be ``name`` in the run."""
        return self.folder / "new" / name

    def elsewhere(self, target: Path) -> Path:
        """Where to write what will be the file ``target`` outside of the run."""
        name = f"outside/{len(self.outside)}-{target.name}"
        self.outside[name] = os.path.abspath(target)
        return self.folder / name

    def delete(self, names: Iterable[str]) -> None:
        self.deleted += names


@contextmanager
def replacing(run: Path) -> Iterator[Replacement]:
    """Replace files of ``run`` by what is written inside; nothing happens to it if that fails."""
    discard_unfinished(run)
    made = Replacement(run)
    try:
        yield made
        new = made.folder / "new"
        moves = {f"new/{p.relative_to(new).as_posix()}": p.relative_to(new).as_posix() for p in _files(new)}
        _sync(made.folder)
        save_json(made.folder / PLAN, {"moves": moves, "outside": made.outside, "deleted": made.deleted})
    except BaseException:
        discard_unfinished(run)
        raise
    settle(run)


def settle(run: Path) -> None:
    """Finish a replacement that was decided on; any number of processes may do so at once."""
    folder = run / PENDING
    if not (folder / PLAN).is_file():
        return
    try:
        plan = load_object(folder / PLAN, "moves", "outside", "deleted")
    except StoreError:
        if (folder / PLAN).exists():
            raise
        return  # somebody else has just finished it
    for name in plan["deleted"]:
        target = run / name
        if target.is_dir():
            shutil.rmtree(target, ignore_errors=True)
        else:
            target.unlink(missing_ok=True)
    for name, there in [*((a, run / b) for a, b in plan["moves"].items()), *plan["outside"].items()]:
        target = Path(there)
        target.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError):  # moved already
            os.replace(folder / name, target)
    _sync(run)
    (folder / PLAN).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def discard_unfinished(run: Path) -> None:
    """Delete what a replacement left that was never decided on; whoever calls holds the run."""
    folder = run / PENDING
    if folder.exists() and not (folder / PLAN).is_file():
        shutil.rmtree(folder, ignore_errors=True)


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _sync(folder: Path) -> None:
    """Names that were given or taken away in ``folder`` and below are on the disk."""
    for path in (folder, *(p for p in folder.rglob("*") if p.is_dir())):
        with suppress(OSError):
            handle = os.open(path, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
