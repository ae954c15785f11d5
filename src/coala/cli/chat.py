"""`coala chat`: talk to the guided model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

COMMANDS = """/guide on|off   guided or plain replies
/strength X     how strongly the head guides
/seed N         fix the next reply
/new            forget the conversation
/quit           leave (or Ctrl-D)"""


def chat(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder made by `coala align`.")],
    mode: Annotated[str | None, typer.Option(help="token, block, prefix or none (unguided).")] = None,
    strength: Annotated[float | None, typer.Option(help="Guidance strength.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 200,
    temperature: Annotated[float, typer.Option(min=0.0)] = 1.0,
    seed: Annotated[int, typer.Option(min=0)] = 0,
) -> None:
    """Talk to the run's model, guided by its head; replies appear as they are made.

    Example: `coala chat runs/demo`   (then /help)
    """
    import sys
    from dataclasses import replace

    from coala.align import load_run
    from coala.cli.screen import emit, say
    from coala.decoding import generate
    from coala.values import CoalaError, Turn

    backbone, head, guidance = load_run(run)
    changes: dict[str, Any] = {"mode": mode, "strength": strength}
    guidance = replace(guidance, **{name: value for name, value in changes.items() if value is not None})
    guided, replies = guidance.mode != "none", 0
    turns: list[Turn] = []
    say("Type a message; /help lists commands, Ctrl-D ends.")
    while True:
        try:
            line = input("you> " if sys.stdin.isatty() else "").strip()
        except (EOFError, KeyboardInterrupt):
            break
        if not line:
            continue
        if line.startswith("/"):
            command, _, value = line[1:].partition(" ")
            if command in ("quit", "exit"):
                break
            try:
                if command == "guide" and value in ("on", "off"):
                    guided = value == "on"
                elif command == "strength":
                    guidance = replace(guidance, strength=float(value))
                elif command == "seed":
                    seed = int(value)
                elif command == "new":
                    turns = []
                else:
                    say(COMMANDS)
            except (ValueError, CoalaError) as error:
                say(f"{line}: {error}")
            continue
        turns.append(Turn("user", line))
        try:
            reply = generate(
                [turns],
                backbone,
                head,
                guidance if guided else replace(guidance, mode="none"),
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                seed=seed,
                on_token=lambda _, piece: print(piece, end="", flush=True),
            )[0]
        except KeyboardInterrupt:
            print(flush=True)
            turns.pop()
            continue
        print(flush=True)
        turns.append(Turn("assistant", reply.text))
        replies, seed = replies + 1, seed + 1
    emit({"replies": replies})
