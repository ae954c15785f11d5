"""Pages of the documentation that are made of the code: every command from its parser, every public name.

A hook of MkDocs (mkdocs.yml names it), which adds the pages while the site is built; nothing is written to docs/.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib import import_module
from typing import Any

import click
from mkdocs.structure.files import File, Files

PACKAGES = ("coala.convex", "coala.nash")  # whose own public names are documented beside the top's
_ROLE = re.compile(r":(?:class|func|meth|data|mod|attr|exc):<code>~?([^<]*)</code>")


def on_files(files: Files, config: Any) -> Files:
    """MkDocs calls this once it has listed the pages under docs/."""
    for place, text in (("reference/commands.md", commands_page()), ("reference/python.md", python_page())):
        files.append(File.generated(config, place, content=text))
    return files


def on_page_content(html: str, **_: Any) -> str:
    """Docstrings name things by Sphinx's roles; here a name in the font of code says the same."""
    return _ROLE.sub(r"<code>\1</code>", html)


def commands_page() -> str:
    """Every command with its help, arguments and options, as its parser has them."""
    from typer.main import get_command

    from coala.cli import app

    root = get_command(app)
    lines = ["# Commands", "", "As `coala COMMAND --help` says them. Every command takes `--json`.", ""]
    for name, command in walked(root, "coala"):
        lines += [f"## {name}", "", *_paragraphs(command.help), *_options(command), *_paragraphs(command.epilog)]
    return "\n".join(lines)


def walked(command: Any, name: str) -> Iterator[tuple[str, Any]]:
    """All commands below ``command`` that do something, under the words they are called by."""
    below = getattr(command, "commands", None)
    if below is None or command.invoke_without_command:
        yield name, command
    for word in sorted(below or {}):
        yield from walked(below[word], f"{name} {word}")


def _options(command: Any) -> list[str]:
    rows = []
    for one in command.params:
        if getattr(one, "hidden", False) or one.name in ("json", "help"):
            continue
        # A click of its own comes with typer: names are looked up, types are not asked for.
        names = ", ".join(f"`{word}`" for word in (*one.opts, *one.secondary_opts))
        if one.param_type_name == "argument":
            names = f"`{one.metavar or one.name.upper()}`"
        shown = "" if one.required or one.default in (None, (), [], False) or callable(one.default) else one.default
        told = _plain(" ".join((getattr(one, "help", None) or "").split())).replace("|", "\\|")
        rows.append(f"| {names} | {told} | {'required' if one.required else f'`{shown}`' if shown != '' else ''} |")
    return ["| | | default |", "|---|---|---|", *rows, ""] if rows else []


def _paragraphs(said: str | None) -> list[str]:
    """Help as Markdown; what the terminal keeps as it stands stands in a block."""
    lines: list[str] = []
    for part in click.unstyle(said or "").split("\n\n"):
        if part.startswith("\b"):
            lines += ["```text", part.removeprefix("\b").strip("\n"), "```", ""]
        elif part.strip():
            lines += [_plain(" ".join(part.split())), ""]
    return lines


def _plain(said: str) -> str:
    """Text in which no bracket is taken for a link or a tag; what stands between backticks stays."""
    parts = said.split("`")
    parts[::2] = [re.sub(r"([\[\]<>*])", r"\\\1", part) for part in parts[::2]]
    return "`".join(parts)


def python_page() -> str:
    """Every public name under the package it lives in."""
    import coala

    lines = ["# Python", "", (coala.__doc__ or "").partition("\n\n")[2].strip(), ""]
    lines += ["## coala", ""]
    for name in coala.__all__:
        lines += [f"::: coala.{name}", ""]
    for package in PACKAGES:
        lines += [f"## {package}", ""]
        for name in import_module(package).__all__:
            lines += [f"::: {package}.{name}", ""]
    return "\n".join(lines)
