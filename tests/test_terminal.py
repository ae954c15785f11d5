"""What others wrote reaches a terminal as text, never as an instruction to it."""

from __future__ import annotations

import ast
import json
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coala.cli.output import emit, say, side_by_side, table
from coala.cli.terminal import visible, write

CLI = Path(__file__).resolve().parent.parent / "src" / "coala" / "cli"
ATTACKS = {
    "clipboard": "\x1b]52;c;cm0gLXJmIH4=\x07",
    "clear screen": "\x1b[2J\x1b[H",
    "one byte": "\x9b2J\x9d52;c;eA==\x9c",
    "turned around": "\u202egnp.exe\u202c",
    "isolates": "\u2066a\u2069",
    "overwritten": "good\rbad ",
    "backspaces": "good\b\b\b\bbad",
    "delete": "\x7f",
    "half a character": "\ud83d",
}


def _steers(text: str) -> bool:
    return any(
        (unicodedata.category(c) in ("Cc", "Cs") and c not in "\n\t")
        or unicodedata.bidirectional(c) in ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")
        for c in text
    )


@given(st.text())
def test_nothing_that_steers_is_left_and_the_rest_stays(text: str) -> None:
    shown = visible(text)
    assert not _steers(shown)
    if not _steers(text) and not set(text) & set("\u061c\u200e\u200f\u2028\u2029\ufff9\ufffa\ufffb"):
        assert shown == text


def test_scripts_and_emoji_stay() -> None:
    for text in ("שלום", "नमस्ते", "👩\u200d🔬", "a\u00adb", "tab\tand\nline", "م\u200cن"):
        assert visible(text) == text
    assert visible("line\r\nline") == "line\nline"


@pytest.mark.parametrize("attack", ATTACKS.values(), ids=list(ATTACKS))
def test_every_way_to_the_terminal_makes_it_visible(attack: str, capsys: pytest.CaptureFixture[str]) -> None:
    write(attack, end="")
    write(attack, err=True)
    say(attack)
    table([[attack, "x"], ["y", attack]], [attack, "head"])
    side_by_side(attack, attack, ("left", "right"))
    emit({"text": attack, attack: 1})
    out, err = capsys.readouterr()
    assert not _steers(out)
    assert not _steers(err)


@given(st.dictionaries(st.text(), st.text()))
def test_the_line_for_programs_reads_back_as_it_was(result: dict[str, Any]) -> None:
    import contextlib
    import io

    with contextlib.redirect_stdout(io.StringIO()) as out:
        emit(result)
    line = out.getvalue()
    assert line.count("\n") == 1
    assert not _steers(line)
    assert json.loads(line) == result


def test_commands_print_in_no_other_way() -> None:
    """`print`, `typer.echo` and writes to a stream are for `terminal.py` alone."""
    found = []
    for path in sorted(CLI.glob("**/*.py")):
        if path.name == "terminal.py":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                if called in ("print", "typer.echo", "typer.secho", "click.echo") or called.endswith(
                    ("stdout.write", "stderr.write")
                ):
                    found.append(f"{path.name}:{node.lineno} {called}")
    assert not found
