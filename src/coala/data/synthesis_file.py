"""A synthesis from a recipe's file to a file of conversations, by way of a journal on disk that survives a kill."""

from __future__ import annotations

import asyncio
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from coala.data.agents import SynthesisError, SynthesisRecipe, read_recipe
from coala.data.journal import conversation_of, read_journal
from coala.data.synthesis import Summary, SynthesisProgress, synthesize
from coala.endpoint import bare, is_loopback
from coala.store import write_atomic
from coala.store.appending import Appender, appending, contents


def synthesize_file(
    recipe: Path,
    out: Path,
    conversations: int | None = None,
    *,
    limits: Mapping[str, Any],
    environment: Mapping[str, str],
    confirmed: Sequence[str] = (),
    on_progress: Callable[[SynthesisProgress], None],
    on_note: Callable[[str], None],
) -> tuple[Summary, Path]:
    """Hold the conversations of ``recipe`` and write them to ``out``; what was done, and the journal beside it.

    ``limits`` are laid over the recipe's where they are not None; keys come from ``environment``. Called again it
    resumes. Raises :class:`SynthesisError` for a recipe that cannot be used, and for a journal another run writes.
    """
    try:
        document = recipe.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SynthesisError(f"{recipe}: cannot be read ({error}). Give the path of a YAML recipe.") from None
    settings = read_recipe(document, str(recipe), conversations, **limits)
    keys = keys_of(settings, environment, confirmed, str(recipe), on_note)
    path = out.with_name(out.name + ".journal")
    with appending(path) as file:
        journal = read_journal(contents(file), str(path))
        if journal.identity is not None:
            on_note(f"{path}: {journal.finished} conversations are there; going on.")
        os.ftruncate(file, journal.size)
        # An error of the endpoint still leaves a file of all that is finished.
        try:
            summary = asyncio.run(
                synthesize(settings, journal, Appender(file).append, keys=keys, on_progress=on_progress)
            )
        finally:
            raw = contents(file)
            lines = sorted(read_journal(raw, str(path)).kept.items())
            rows = [raw[place : place + length] for k, (place, length) in lines if k < settings.conversations]
            if rows:
                write_atomic(out, b"".join(_row(conversation_of(row)) for row in rows))
    return summary, path


def _row(conversation: dict[str, object]) -> bytes:
    return (json.dumps(conversation, ensure_ascii=False) + "\n").encode()


def keys_of(
    settings: SynthesisRecipe,
    environment: Mapping[str, str],
    confirmed: Sequence[str],
    file: str,
    on_note: Callable[[str], None],
) -> dict[str, str]:
    """The secrets that the agents name, from ``environment``; says which of them goes where.

    A recipe may be a stranger's: it names variables and hosts, so it could have any secret sent anywhere. What leaves
    this machine and is not named as an API key, or would go out unencrypted, is sent only if ``confirmed``.
    """
    keys: dict[str, str] = {}
    places = dict.fromkeys((agent.key, agent.base_url) for agent in (settings.student, settings.tutor) if agent.key)
    for name, address in places:
        if not (value := environment.get(name, "").strip()):
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
        on_note(f"sends the value of ${name} to {bare(address)} (named in {file})")
    return keys
