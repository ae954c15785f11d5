"""What a command shows: progress with remaining time on stderr, tables and one JSON line on stdout."""

from __future__ import annotations

import json
import shlex
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from time import monotonic
from types import FrameType
from typing import TYPE_CHECKING, Any

import typer

from coala.cli.terminal import json_text, visible, write

NOT_ALL = 1  # exit code: there are results, but the judge stopped before the end

if TYPE_CHECKING:
    from rich.progress import ProgressColumn

    from coala.callbacks import OnProgress
    from coala.cli.pace import Pace
    from coala.leaderboards.record import Outcome
    from coala.store import RunFolder

EVERY = 5.0  # seconds between two lines of progress


# Whether the command at hand was given --json.
wants_json: ContextVar[bool] = ContextVar("wants_json", default=False)


def emit(result: dict[str, Any], *, alone: bool = False) -> None:
    """The last line on stdout: one JSON object for programs, who pipe stdout or say ``--json``; not finite is null.

    People at a terminal have seen what it holds; if nothing else was shown (``alone``), they get its short values.
    """
    if sys.stdout.isatty() and not wants_json.get():
        short = {name: value for name, value in result.items() if isinstance(value, str | int | float | Path)}
        table([[name.replace("_", " "), str(value)] for name, value in short.items()] if alone else [])
        return
    from coala.store import plain

    sys.stdout.flush()
    write(json_text(json.dumps(plain(result), ensure_ascii=False)))


def say(message: str) -> None:
    """A remark for people; on stderr, so that stdout stays for results."""
    write(message, err=True)


@contextmanager
def progress() -> Iterator[OnProgress]:
    """One bar per stage with elapsed and remaining time; plain lines now and then when stderr is not a terminal."""
    if sys.stderr.isatty():
        with _bars() as show:
            yield show
    else:
        yield progress_lines(say)


@contextmanager
def _bars() -> Iterator[OnProgress]:
    from rich.console import Console
    from rich.progress import Progress

    from coala.cli.pace import Pace

    pace = Pace()
    with Progress(*_columns(pace), console=Console(stderr=True)) as bars:
        tasks: dict[str, Any] = {}

        def show(stage: str, done: float, total: float | None, note: str = "") -> None:
            if not stage:
                say(note)
                return
            pace.report(stage, done, total)
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total, stage=stage, note=visible(note))
            bars.update(tasks[stage], completed=done, total=total, note=visible(note))

        yield show


def _columns(pace: Pace) -> Sequence[ProgressColumn]:
    from rich.progress import BarColumn, ProgressColumn, TextColumn
    from rich.text import Text

    class Left(ProgressColumn):
        def render(self, task: Any) -> Text:
            return Text(pace.told(task.fields["stage"]))

    return (
        TextColumn("{task.description:<10}", markup=False),
        BarColumn(bar_width=30),
        TextColumn("{task.percentage:>3.0f}%"),
        Left(),
        TextColumn("{task.fields[note]}", markup=False),
    )


@contextmanager
def insistent(show: OnProgress) -> Iterator[OnProgress]:
    """``show``, which raises a Ctrl-C again that was lost.

    Python drops exceptions of finalisers and of callbacks of its garbage collector, KeyboardInterrupt among them: who
    presses Ctrl-C at such a moment would be ignored.
    """
    here = threading.current_thread() is threading.main_thread()
    if not here or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield show
        return
    pressed = False

    def press(signum: int, frame: FrameType | None) -> None:
        nonlocal pressed
        pressed = True
        raise KeyboardInterrupt

    def showing(stage: str, done: float, total: float | None, note: str = "") -> None:
        if pressed:
            raise KeyboardInterrupt
        show(stage, done, total, note)

    signal.signal(signal.SIGINT, press)
    try:
        yield showing
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def progress_lines(write_line: Callable[[str], None], clock: Callable[[], float] = monotonic) -> OnProgress:
    """A line per stage at its start and end, and one in between when ``EVERY`` seconds have passed."""
    from coala.cli.pace import Pace

    pace = Pace(clock)
    last: dict[str, float] = {}
    ended: set[str] = set()

    def show(stage: str, done: float, total: float | None, note: str = "") -> None:
        if not stage:
            write_line(note)
            return
        pace.report(stage, done, total)
        now, finished = clock(), total is not None and done >= total
        if finished:
            if stage in ended:
                return
            ended.add(stage)
        elif stage in last and now - last[stage] < EVERY:
            return
        else:
            ended.discard(stage)
        last[stage] = now
        share = f"{100 * done / total:3.0f}%" if total else ("" if total is None and not done else f"{done:g}")
        write_line(f"{stage:<16} {share:>4} {pace.told(stage)} {note}".rstrip())

    return show


def table(rows: Sequence[Sequence[str]], head: Sequence[str] | None = None) -> None:
    """A small table on stdout, columns aligned, no lines longer than their content."""
    everything = [list(head)] if head else []
    everything += [list(map(visible, row)) for row in rows]
    if not everything:
        return
    widths = [max(len(row[i]) for row in everything) for i in range(len(everything[0]))]
    for number, row in enumerate(everything):
        write("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
        if head and number == 0:
            write("  ".join("-" * width for width in widths))


def side_by_side(left: str, right: str, titles: tuple[str, str], width: int = 100) -> None:
    """Two texts in two columns."""
    from itertools import zip_longest
    from textwrap import wrap

    column = (width - 3) // 2
    pairs = zip_longest(
        [titles[0], "-" * column, *wrap(visible(left), column)],
        [titles[1], "-" * column, *wrap(visible(right), column)],
        fillvalue="",
    )
    for a, b in pairs:
        write(f"{a:<{column}} | {b}".rstrip())


def finish(result: Mapping[str, Any], remarks: Sequence[str]) -> None:
    """Remarks on stderr, then the JSON line."""
    for remark in remarks:
        say(f"note: {remark}")
    emit({**result, "remarks": list(remarks)})


def tell_failures() -> Any:
    """Says the first failures, and that there are more."""
    n = 0

    def tell(name: str, error: Exception) -> None:
        nonlocal n
        n += 1
        if n <= 5:
            say(f"failed: {name}: {error}")
        elif n == 6:
            say("failed: more; counted below")

    return tell


def command_line() -> str:
    """The command line, without names and passwords in addresses."""
    from coala.endpoint import bare

    return bare(shlex.join(["coala", *sys.argv[1:]]))


def conclude(found: Outcome, run: RunFolder | None) -> None:
    """Tables, the record into the run's report, remarks and JSON; exit code 1 for a judge that stopped."""
    from coala.leaderboards.record import keep

    for rows, headers in found.tables:
        if headers:
            table(rows, headers)
        else:  # lines of text between tables
            write("\n".join("  ".join(row) for row in rows))
    if found.stopped:
        say(f"stopped: {found.stopped}")
    kept = {} if found.evaluation is None else keep(run, found.evaluation, say)
    finish({**found.result, **kept}, found.remarks)
    if found.stopped:
        raise typer.Exit(NOT_ALL)
