"""`coala data`: look at, check, audit, convert and make preference pairs, and the conversations they come from."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator, Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

import typer

from coala.cli.options import TrustCode
from coala.cli.terminal import write

if TYPE_CHECKING:
    import asyncio

    from coala.data.agents import SynthesisRecipe
    from coala.values import Pair

app = typer.Typer(no_args_is_help=True, help="Look at, check, convert and make preference pairs.")

Sources = Annotated[
    list[str],
    typer.Argument(metavar="PAIRS...", help="jsonl, json, csv, tsv or parquet, plain or .gz; or a hub dataset"),
]


class Role(StrEnum):
    """The speakers whose replies can be compared."""

    assistant = "assistant"
    user = "user"


Format = Annotated[str, typer.Option(help="Name of the format; `auto` recognises it (see `coala data formats`).")]


@app.command(epilog="Example: `coala data check train.jsonl --against test.jsonl`")
def check(
    pairs: Sources,
    format: Format = "auto",
    against: Annotated[
        list[str] | None, typer.Option(help="Test file(s) that must share no prompt with PAIRS.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="Model whose context the pairs have to fit.")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Longest prompt plus reply; the model's context.")] = None,
    trust_remote_code: TrustCode = False,
) -> None:
    """Read every row and list what is wrong: FILE:ROW: FIELD: found X, expected Y. Fix: Z. Exit code 2 on errors."""
    from coala.cli.output import emit, say
    from coala.data import check as check_pairs
    from coala.data.findings import few

    count_tokens = None
    as_read: dict[str, Any] = {}
    if model is not None:
        from coala.backbone import load_backbone

        backbone = load_backbone(model)
        as_read = {"refusal": backbone.refusal, "specials": backbone.specials}
        max_tokens = max_tokens or backbone.max_tokens

        def count_tokens(pair: Pair) -> int:
            return backbone.count_tokens(pair)

    findings = check_pairs(pairs, format, against=against, count_tokens=count_tokens, max_tokens=max_tokens, **as_read)
    for line in (*few(findings.errors), *findings.warnings, *findings.notes):
        write(line)
    if findings.way_on:
        say(findings.way_on)
    emit({"pairs": findings.n_pairs, "errors": len(findings.errors), "warnings": len(findings.warnings)})
    if findings.errors:
        raise typer.Exit(2)


@app.command(epilog="Example: `coala data convert hh.jsonl.gz --out pairs.jsonl`")
def convert(
    pairs: Sources,
    out: Annotated[Path, typer.Option(help="File to write: one pair per line, TRL's conversational format.")],
    format: Format = "auto",
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Leave out rows with errors, and say so.")] = False,
) -> None:
    """Write pairs of any known format in one plain form. What is not read is named."""
    from coala.cli.output import emit
    from coala.store import save_pairs

    found = _sound(pairs, format, skip_bad)
    save_pairs(out, found)
    emit({"pairs": len(found), "out": out}, alone=True)


@app.command(epilog="Example: `coala data alternate dialogues.jsonl --out pairs.jsonl`")
def alternate(
    conversations: Sources,
    out: Annotated[Path, typer.Option(help="File to write.")],
    role: Annotated[Role, typer.Option(help="Whose replies are compared.")] = Role.assistant,
    context: Annotated[
        str, typer.Option(help="The prompt: `all` that came before, the `first` utterance only, or the last N turns.")
    ] = "all",
) -> None:
    """Pairs from conversations: the reply that follows is chosen, the same speaker's next reply is rejected.

    Prints how well position cues alone (length, question marks) tell the two apart: what is learnt may be position.
    """
    from coala.cli.output import emit, say
    from coala.data import position_cues, read_pairs
    from coala.store import save_pairs

    kept: Literal["all", "first"] | int
    kept = int(context) if context.isdecimal() else cast(Literal["all", "first"], context)
    pairs = list(read_pairs(conversations, "conversations", role=role.value, context=kept))
    save_pairs(out, pairs)
    cues = position_cues(pairs)
    for cue, accuracy in cues.items():
        say(f"{cue} alone tells chosen from rejected: {accuracy}")
    emit({"pairs": len(pairs), "conversations": len({p.group for p in pairs}), "cues": cues, "out": out}, alone=True)


@app.command(epilog="Example: `coala data audit pairs.jsonl --out audit.html --against test.jsonl`")
def audit(
    pairs: Sources,
    out: Annotated[Path | None, typer.Option(help="Page to write (HTML, needs nothing else).")] = None,
    format: Format = "auto",
    features: Annotated[
        Path | None, typer.Option(help="Folder of features of exactly these pairs, judged beside the cues.")
    ] = None,
    against: Annotated[list[str] | None, typer.Option(help="The other side of the split: look for leaks.")] = None,
    balance: Annotated[
        str | None, typer.Option(help="Cue to take out, e.g. `length` or `surface`; needs --balanced.")
    ] = None,
    balanced: Annotated[Path | None, typer.Option(help="File to write what is left to.")] = None,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Leave out rows with errors, and say so.")] = False,
    repeats: Annotated[int | None, typer.Option(min=1, help="Deals of the folds; 3, above 2,000 pairs 1.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of folds, shuffles and thinning.")] = 0,
) -> None:
    """Preference or position? What cues alone (length, place words, style, bag of words) tell of the pairs.

    Prints a table of cue-only accuracies, biases, repeats and leaks. `--balance CUE` writes a part of the pairs on
    which that cue says nothing. Conversations: `--format conversations` audits their alternating pairs.
    """
    from coala.cli.output import emit, progress, say, table
    from coala.data.audit import audit as look
    from coala.data.audit import balance as take_out
    from coala.data.audit_page import render
    from coala.store import load_features, save_pairs, write_atomic
    from coala.values import CoalaError

    if (balance is None) != (balanced is None):
        raise CoalaError("--balance CUE and --balanced FILE go together: the cue to take out, and where to write.")
    found = _sound(pairs, format, skip_bad)
    extracted = load_features(features) if features is not None else None
    with progress() as show:
        result = look(
            found,
            seed=seed,
            features=None if extracted is None else extracted.chosen - extracted.rejected,
            against=None if against is None else _sound(against, format, skip_bad),
            repeats=repeats,
            on_progress=lambda name, done, total: show("audit", done, total, name),
        )
    for sentence in result.verdicts:
        say(sentence)
    table(
        [
            [
                cue.name,
                f"{cue.accuracy.value:.3f}",
                f"[{cue.accuracy.low:.3f}, {cue.accuracy.high:.3f}]",
                f"{cue.tied:.3f}",
            ]
            for cue in result.cues
        ],
        ["sees only", "ranked right", "95 % interval", "ties"],
    )
    for name, n in result.counts.items():
        write(f"{name}: {n}")
    summary: dict[str, object] = {
        "pairs": result.n_pairs,
        "groups": result.n_groups,
        "cues": {cue.name: cue.accuracy for cue in result.cues},
        "ties": {cue.name: cue.tied for cue in result.cues},
        "context_gain": result.context_gain,
        "features_gain": result.features_gain,
        "chosen_longer": next(one.chosen_has_more for one in result.styles if one.name == "characters"),
        "counts": dict(result.counts),
    }
    if out is not None:
        write_atomic(out, render(result, f"Audit of {', '.join(Path(name).name for name in pairs)}"))
        summary["out"] = out
    if balance is not None and balanced is not None:
        rest = take_out(found, balance.replace("-", " "), seed=seed)
        save_pairs(balanced, rest.pairs)
        say(f"{rest.cue}: {rest.before} before, {rest.after} after; {len(rest.pairs)} of {len(found)} pairs are left.")
        summary |= {"balanced": balanced, "pairs_left": len(rest.pairs), "before": rest.before, "after": rest.after}
    emit(summary)


def _sound(names: list[str], format: str, skip_bad: bool) -> list[Pair]:
    """The pairs that can be read. Warnings are said aloud; bad rows end it, or are left out and counted."""
    from coala.cli.output import say
    from coala.data.doctor import gather

    findings = gather(names, format)
    if not (skip_bad and findings.pairs):
        findings.raise_for_errors()
    elif findings.errors:
        say(f"{len(findings.errors)} findings left out, the first: {findings.errors[0]}")
    for warning in findings.warnings:
        say(str(warning))
    return list(findings.pairs)


@app.command(epilog="Example: `coala data synthesize src/coala/recipes/edufeedback.yaml --out conversations.jsonl`")
def synthesize(
    recipe: Annotated[Path, typer.Argument(help="YAML: two agents, fields, moods, lengths, limits.")],
    out: Annotated[Path, typer.Option(help="File to write: one conversation per line, in the order drawn.")],
    conversations: Annotated[int | None, typer.Option(min=1, help="How many (default: the recipe's number).")] = None,
    tokens: Annotated[int | None, typer.Option(min=1, help="Spend no more tokens than this, over all runs.")] = None,
    dollars: Annotated[float | None, typer.Option(min=0, help="Spend no more dollars, at the recipe's prices.")] = None,
    concurrency: Annotated[int | None, typer.Option(min=1, help="Conversations held at a time.")] = None,
    requests_per_minute: Annotated[float | None, typer.Option(min=0, help="Requests sent per minute at most.")] = None,
    send_key: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="Send this environment variable as the recipe asks, although it is not named as a key or goes out "
            "unencrypted; repeat.",
        ),
    ] = None,
) -> None:
    """Let a student and a tutor talk through any OpenAI-compatible endpoint, and keep what they say.

    Every finished conversation is written down at once in OUT.journal: after a kill the same command goes on where it
    was. OUT is written when the run is finished or the budget spent (exit code 3).
    """
    import asyncio
    from dataclasses import asdict

    from coala.cli.output import emit, progress, say
    from coala.data.agents import SynthesisError, read_recipe
    from coala.data.journal import conversation_of, read_journal
    from coala.data.synthesis import Progress
    from coala.data.synthesis import synthesize as hold
    from coala.store import write_atomic

    try:
        document = recipe.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SynthesisError(f"{recipe}: cannot be read ({error}). Give the path of a YAML recipe.") from None
    settings = read_recipe(
        document,
        str(recipe),
        conversations,
        tokens=tokens,
        dollars=dollars,
        concurrency=concurrency,
        requests_per_minute=requests_per_minute,
    )
    keys = _keys(settings, send_key or (), str(recipe))
    path = out.with_name(out.name + ".journal")
    with _opened(path) as file, progress() as show:
        journal = read_journal(_contents(file), str(path))
        if journal.identity is not None:
            say(f"{path}: {journal.finished} conversations are there; going on.")
        os.ftruncate(file, journal.size)

        def on_progress(now: Progress) -> None:
            show("conversations", now.done, now.total, str(now))

        # An error of the endpoint still leaves a file of all that is finished.
        try:
            summary = asyncio.run(hold(settings, journal, _Appender(file).append, keys=keys, on_progress=on_progress))
        finally:
            raw = _contents(file)
            lines = sorted(read_journal(raw, str(path)).kept.items())
            rows = [raw[place : place + length] for k, (place, length) in lines if k < settings.conversations]
            if rows:
                write_atomic(out, b"".join(_row(conversation_of(row)) for row in rows))
    emit({**asdict(summary), "dollars": summary.dollars, "out": out, "journal": path}, alone=True)
    if summary.stopped:
        say(
            f"{summary.stopped}: {summary.kept} of {summary.wanted} conversations. Rerun with a higher limit to resume."
        )
        raise typer.Exit(3)


def _row(conversation: dict[str, object]) -> bytes:
    import json

    return (json.dumps(conversation, ensure_ascii=False) + "\n").encode()


def _keys(settings: SynthesisRecipe, confirmed: Sequence[str], file: str) -> dict[str, str]:
    """The secrets that the agents name, from the environment; says which of them goes where.

    A recipe may be a stranger's: it names variables and hosts, so it could have any secret sent anywhere. What leaves
    this machine and is not named as an API key, or would go out unencrypted, is sent only if ``confirmed``.
    """
    from coala.cli.output import say
    from coala.data.agents import SynthesisError
    from coala.endpoint import bare, is_loopback

    keys: dict[str, str] = {}
    places = dict.fromkeys((agent.key, agent.base_url) for agent in (settings.student, settings.tutor) if agent.key)
    for name, address in places:
        if not (value := os.environ.get(name, "").strip()):
            raise SynthesisError(
                f"The recipe takes an API key from the environment variable {name}, which is not set. "
                'Set it, or write `key: ""` for an endpoint without one.'
            )
        asks, anyway = f"{file}: asks to send the value of ${name} to {bare(address)}", f"add --send-key {name}"
        if name not in confirmed and not is_loopback(address):
            if not re.fullmatch(r"\w*API_?(KEY|TOKEN)\w*", name, re.IGNORECASE | re.ASCII):
                expected = "expected a variable named as an API key, such as OPENAI_API_KEY"
                raise SynthesisError(f"{asks}; {expected}. Fix: name the right variable, or {anyway}.")
            if not address.startswith("https://"):
                raise SynthesisError(f'{asks} unencrypted; expected https. Fix: write https, `key: ""`, or {anyway}.')
        keys[name] = value
    for name, address in places:
        say(f"sends the value of ${name} to {bare(address)} (named in {file})")
    return keys


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[int]:
    """The journal, open for appending and locked against a second run."""
    import fcntl

    from coala.data.agents import SynthesisError

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
    except OSError as error:
        raise SynthesisError(f"{path}: cannot be written ({error.strerror}). Choose another --out.") from None
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise SynthesisError(f"{path}: another run is writing there. Wait for it, or give another --out.") from None
        yield file
    finally:
        os.close(file)


def _contents(file: int) -> bytes:
    size = os.fstat(file).st_size
    parts, place = [], 0
    while place < size and (part := os.pread(file, min(2**26, size - place), place)):
        parts.append(part)
        place += len(part)
    return b"".join(parts)


class _Appender:
    """Appends lines and returns when they are on the disk; lines that wait for the disk at one time share its turn."""

    def __init__(self, file: int) -> None:
        self._file = file
        self._waiting: list[tuple[bytes, asyncio.Future[None]]] = []
        self._flushing: asyncio.Task[None] | None = None

    async def append(self, line: bytes) -> None:
        import asyncio

        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((line, done))
        if self._flushing is None or self._flushing.done():
            self._flushing = asyncio.create_task(self._flush())
        await done

    async def _flush(self) -> None:
        import asyncio

        while self._waiting:
            batch, self._waiting = self._waiting, []
            error: Exception | None = None
            try:
                await asyncio.to_thread(self._write, b"".join(line for line, _ in batch))
            except OSError as trouble:
                from coala.store import StoreError

                error = StoreError(
                    f"The journal could not be written ({trouble.strerror}). Free some space; go on then."
                )
            for _, done in batch:
                if done.cancelled():
                    continue
                if error is None:
                    done.set_result(None)
                else:
                    done.set_exception(error)

    def _write(self, raw: bytes) -> None:
        while raw:
            raw = raw[os.write(self._file, raw) :]
        os.fsync(self._file)


@app.command(epilog="Example: `coala data show pairs.jsonl --n 3`")
def show(
    pairs: Sources,
    format: Format = "auto",
    n: Annotated[int, typer.Option(min=1, help="How many pairs.")] = 3,
    width: Annotated[int, typer.Option(min=40, help="Columns.")] = 100,
) -> None:
    """Print a few pairs, chosen and rejected side by side."""
    from itertools import islice

    from coala.cli.output import emit, side_by_side
    from coala.data import read_pairs
    from coala.values import conversation_text

    shown = list(islice(read_pairs(pairs, format), n))
    for pair in shown:
        write(f"\n{conversation_text(pair.prompt)}\n")
        side_by_side(pair.chosen, pair.rejected, ("chosen", "rejected"), width)
    emit({"shown": len(shown)})


@app.command()
def formats() -> None:
    """List the formats that are recognised."""
    from coala.cli.output import emit, table
    from coala.data import READERS

    table([[name, reader.about] for name, reader in READERS.items()], ["format", "rows look like"])
    emit({"formats": list(READERS)})
