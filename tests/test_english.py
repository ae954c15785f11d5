"""The English of help lines, settings and messages, by the word list of `CONTRIBUTING.md`."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import typer

from coala.cli import app
from coala.settings import SECTIONS, told
from tests.conftest import REPOSITORY

SOURCE = REPOSITORY / "src" / "coala"
FIRST = "as the first word of a help line"
# Not our words: turns of a trial conversation, a pattern that finds requests in prompts.
QUOTED = ("Tell me a story.", "Go on", "can you (?:tell|explain)")
# What a number is a number of, or the quantity it is.
UNIT = re.compile(
    r"\b(number|in (tokens|seconds|bytes|nats|rows|replies|pairs|questions|columns|dollars)|seed|rank|temperature|port|"
    r"fraction|factor|weight|strength|layer|scale|scaling|threshold|probability|tokens per|epochs|rate|gap|penalty|"
    r"step size|1 / eta|line of|pairs sampled)\b",
    re.IGNORECASE,
)


@cache
def word_list() -> tuple[re.Pattern[str], tuple[str, ...]]:
    """The left column of the table: a pattern of its phrases, and the words that open no help line."""
    text = (REPOSITORY / "CONTRIBUTING.md").read_text(encoding="utf-8")
    table = text.partition("| instead of | write |\n|---|---|\n")[2].partition("\n\n")[0]
    rows = [row.split("|")[1].strip() for row in table.splitlines()]
    phrases = [phrase.strip() for row in rows if FIRST not in row for phrase in row.split(",")]
    (opening,) = [row.removesuffix(FIRST) for row in rows if FIRST in row]
    # "There is no file" is plain English, and a flag keeps its name.
    found = "|".join(
        r"(?<!there )is no(?! (?:longer|better|worse|more)\b)" if p == "is no" else re.escape(p) for p in phrases
    )
    return re.compile(rf"(?<![\w-])(?:{found})(?![\w-])"), tuple(w.strip() for w in opening.split(","))


def tics(text: str) -> list[str]:
    return word_list()[0].findall(text.lower())


def faults_of_help(text: str | None, *, default_shown: bool, number: bool = False) -> list[str]:
    """What a help line lacks: an object that comes first, a unit, a default that the terminal does not add."""
    if not text:
        return ["no help line"]
    found = [f"{word!r} is on the word list" for word in tics(text)]
    if text.split()[0].lower().rstrip(",") in word_list()[1]:
        found.append(f"begins with {text.split()[0]!r}")
    if not re.match(r"[A-Z0-9`]", text):
        found.append("begins in lower case")
    if not re.search(r"(\.|\])$", text):
        found.append("no full stop at its end")
    if not default_shown and not re.search("default", text, re.IGNORECASE):
        found.append("no default")
    if number and not UNIT.search(text):
        found.append("no unit")
    return found


def commands(command: Any, name: str = "coala") -> Iterator[tuple[str, Any]]:
    yield name, command
    for part, inner in getattr(command, "commands", {}).items():
        yield from commands(inner, f"{name} {part}")


def faults_of_command(name: str, command: Any) -> list[str]:
    texts = {"help": command.help, "short help": command.short_help, "epilog": command.epilog}
    found = [f"{name}: {where}: {word!r}" for where, text in texts.items() for word in tics(text or "")]
    if not command.help:
        found.append(f"{name}: no help")
    for parameter in command.params:
        if parameter.name in ("install_completion", "show_completion"):  # typer's own
            continue
        text, where = parameter.help or "", f"{name} {'/'.join(parameter.opts)}"
        option = parameter.param_type_name == "option"
        flag = option and parameter.is_flag
        added = option and not flag and parameter.default is not None and bool(parameter.show_default)
        # A flag is off, and an option that may be repeated adds nothing, where it is not given.
        plain = not option or added or flag or parameter.required or "Repeatable." in text
        number = option and parameter.bare_type in (int, float)
        found += [f"{where}: {fault}" for fault in faults_of_help(text, default_shown=plain, number=number)]
        if added and "default:" in text:
            found.append(f"{where}: the default twice")
    return found


def test_help_lines() -> None:
    assert not [
        fault for name, command in commands(typer.main.get_command(app)) for fault in faults_of_command(name, command)
    ]


def test_settings() -> None:
    found = []
    for section, kind in SECTIONS.items():
        for field in fields(kind):
            if (setting := told(kind, field.name)) is not None:
                shown = field.default is not None
                found += [
                    f"{section}.{field.name}: {fault}" for fault in faults_of_help(setting.help, default_shown=shown)
                ]
    assert not found


def sentences_of(source: str) -> Iterator[tuple[int, str]]:
    """The literal strings of some words: messages, labels, notes. Docstrings are left to whoever writes them."""
    docstrings: set[int] = set()
    for node in ast.walk(ast.parse(source)):  # a parent comes before its children
        if isinstance(node, ast.Expr):
            docstrings.add(id(node.value))
        elif isinstance(node, ast.Constant) and id(node) not in docstrings and " " in str(node.value).strip():
            yield node.lineno, str(node.value)


def faults_of_source(path: Path) -> list[str]:
    source = path.read_text(encoding="utf-8")
    return [
        f"{path.relative_to(SOURCE)}:{line}: {word!r} in {text[:60]!r}"
        for line, text in (sentences_of(source) if tics(source) else ())
        for word in tics(text)
        if not any(quoted in text for quoted in QUOTED)
    ]


def test_messages() -> None:
    assert not [fault for path in sorted(SOURCE.rglob("*.py")) for fault in faults_of_source(path)]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("Run folder; a session found there goes on.", ["goes on"]),
        ("{path}: is no receipt. Mend it.", ["is no", "mend"]),
        ("There is no file of that name.", []),
        ("found 3, expected 4, fix: use --from-scratch", []),
        ("Systems beside the cues", ["beside"]),
        ("A toll, a bell", []),
    ],
)
def test_the_word_list_finds_what_it_lists(text: str, found: list[str]) -> None:
    assert tics(text) == found


@pytest.mark.parametrize(
    ("text", "options", "fault"),
    [
        (None, {"default_shown": True}, "no help line"),
        ("Of mode beam: hypotheses.", {"default_shown": True}, "begins with 'Of'"),
        ("model of the endpoint.", {"default_shown": True}, "begins in lower case"),
        ("Model of the endpoint", {"default_shown": True}, "no full stop at its end"),
        ("System prompt.", {"default_shown": False}, "no default"),
        ("Concurrent requests.", {"default_shown": True, "number": True}, "no unit"),
        ("Number of likeliest tokens.", {"default_shown": True, "number": True}, "'likeliest' is on the word list"),
        ("Maximum length, in tokens (default: the recipe's).", {"default_shown": False, "number": True}, ""),
    ],
)
def test_what_a_help_line_must_have(text: str | None, options: dict[str, bool], fault: str) -> None:
    assert faults_of_help(text, **options) == ([fault] if fault else [])


def test_planted_faults_are_found(tmp_path: Path) -> None:
    planted = typer.Typer()

    @planted.command()
    def train(
        rate: float = typer.Option(None, help="Rate told by the recipe."),
        seed: int = typer.Option(0, help="Random seed (default: 0)"),
    ) -> None:
        """Trains anew."""

    command = typer.main.get_command(planted)
    assert faults_of_command("planted", command) == [
        "planted: help: 'anew'",
        "planted --rate: 'told' is on the word list",
        "planted --rate: no default",
        "planted --seed: no full stop at its end",
        "planted --seed: the default twice",
    ]
    source = 'def f(x):\n    """Told here only."""\n    raise ValueError(f"{x}: goes on where it was.")\n'
    assert [tics(text) for _, text in sentences_of(source)] == [["goes on", "where it was"]]
