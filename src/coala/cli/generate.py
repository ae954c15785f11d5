"""`coala generate`: a guided reply to one or more prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from coala.cli.options import Download, TrustCode


def generate(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder made by `coala align`.")],
    prompts: Annotated[
        list[str] | None, typer.Argument(metavar="PROMPT...", help="Prompts; none: one per stdin line.")
    ] = None,
    mode: Annotated[str | None, typer.Option(help="block, token, prefix, shift, best_of, beam or none.")] = None,
    strength: Annotated[
        float | None, typer.Option(help="Guidance strength, in mode token if no other is given; 0 is unguided.")
    ] = None,
    candidates: Annotated[int | None, typer.Option(help="Candidates per guided step.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 100,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 1.0,
    stop: Annotated[list[str] | None, typer.Option(help="Text that ends a reply.")] = None,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    compare: Annotated[bool, typer.Option("--compare", help="Show the unguided reply beside the guided one.")] = False,
    trust_remote_code: TrustCode = False,
    download: Download = False,
) -> None:
    """Answer prompts with the run's model, guided by its head.

    Examples:

    `coala generate runs/demo "This film is about a night nurse. The acting"`

    `coala generate runs/demo --strength 3 --compare "I thought this movie"`
    """
    import sys
    from dataclasses import replace

    from coala.align import load_run
    from coala.cli.screen import emit, say, side_by_side
    from coala.decoding import generate as generate_replies
    from coala.values import CoalaError, user

    texts = prompts or [line.rstrip("\n") for line in sys.stdin if line.strip()]
    if not texts or not all(text.strip() for text in texts):
        raise CoalaError('There is no prompt, or an empty one. Give it in quotes: coala generate RUN "prompt".')
    backbone, head, guidance = load_run(run)
    for line in backbone.reads(head.spec):
        say(line)
    guidance = guidance.changed(mode=mode, strength=strength, candidates=candidates)
    if mode is None:
        guidance = guidance.at(temperature)
    rules = {"unguided": replace(guidance, mode="none"), "guided": guidance} if compare else {"guided": guidance}
    # One reply streams as it is made; several are printed whole, in order.
    streams = len(texts) == 1 and not compare
    replies = {
        name: generate_replies(
            [user(text) for text in texts],
            backbone,
            head,
            rule,
            max_new_tokens=max_new_tokens,
            seed=seed,
            temperature=temperature,
            stop=tuple(stop or ()),
            on_token=(lambda _, piece: print(piece, end="", flush=True)) if streams else None,
        )
        for name, rule in rules.items()
    }
    if streams:
        print()
    for i, text in enumerate(texts):
        if compare:
            print(f"{text}\n")
            side_by_side(replies["unguided"][i].text, replies["guided"][i].text, ("unguided", "guided"))
        elif not streams:
            print(replies["guided"][i].text)
    emit(replies)
