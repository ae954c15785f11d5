"""`coala generate`: a guided reply to one or more prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from coala.choices import Mode, Rule
from coala.cli.options import Download, TrustCode
from coala.cli.terminal import write


def generate(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder made by `coala align`.")],
    prompts: Annotated[
        list[str] | None, typer.Argument(metavar="PROMPT...", help="Prompts; none: one per stdin line.")
    ] = None,
    system: Annotated[str | None, typer.Option(help="System prompt, before every prompt.")] = None,
    mode: Annotated[Mode | None, typer.Option(help="How the head guides decoding.")] = None,
    strength: Annotated[float | None, typer.Option(help="Guidance strength; 0 is unguided.")] = None,
    rule: Annotated[Rule | None, typer.Option(help="How scores count; calibrated: by their evidence.")] = None,
    candidates: Annotated[int | None, typer.Option(help="Candidates per guided step.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 100,
    temperature: Annotated[
        float | None, typer.Option(min=0.0, help="0 is greedy. Default: the recipe's, else the model's own.")
    ] = None,
    top_p: Annotated[float | None, typer.Option(help="Likeliest tokens that add up to this probability.")] = None,
    top_k: Annotated[int | None, typer.Option(min=0, help="So many likeliest tokens; 0 is all.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="Text that ends a reply.")] = None,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    cut: Annotated[bool, typer.Option("--cut", help="Cut the beginning of prompts that are too long.")] = False,
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

    from coala.cli.answering import conversation, opened, room
    from coala.cli.output import emit, say, side_by_side
    from coala.decoding import generate as generate_replies
    from coala.values import CoalaError, Generation, Turn

    texts = prompts or [line.rstrip("\n") for line in sys.stdin if line.strip()]
    if not texts or not all(text.strip() for text in texts):
        raise CoalaError('There is no prompt, or an empty one. Give it in quotes: coala generate RUN "prompt".')
    sampling = {"temperature": temperature, "top_p": top_p, "top_k": top_k}
    found = opened(run, sampling, mode, strength=strength, rule=rule, candidates=candidates)
    for line in found.backbone.reads(found.head.spec):
        say(line)
    asked = [conversation(system, Turn("user", text)) for text in texts]
    mend = "Shorten it, or say --cut to lose its beginning."
    lengths = [room(found.backbone, prompt, max_new_tokens, cut=cut, mend=mend) for prompt in asked]
    plain = replace(found.guidance, mode="none", budget=None)
    rules = {"unguided": plain, "guided": found.guidance} if compare else {"guided": found.guidance}
    # One reply streams as it is made; several are printed whole, in order.
    streams = len(texts) == 1 and not compare
    replies = {}
    for name, guidance in rules.items():
        made: dict[int, Generation] = {}
        for length in set(lengths):  # one, unless the context is nearly full
            some = [i for i, own in enumerate(lengths) if own == length]
            several = generate_replies(
                [asked[i] for i in some],
                found.backbone,
                found.head,
                guidance,
                max_new_tokens=length,
                seed=seed,
                temperature=found.temperature,
                stop=tuple(stop or ()),
                prompt_ids=[str(i) for i in some],
                on_token=(lambda _, piece: write(piece, end="")) if streams else None,
            )
            made |= dict(zip(some, several, strict=True))
        replies[name] = [made[i] for i in range(len(texts))]
    if streams:
        write()
    for i, text in enumerate(texts):
        if not streams:
            write(f"{'' if i == 0 else chr(10)}> {text}\n")
        if compare:
            side_by_side(replies["unguided"][i].text, replies["guided"][i].text, ("unguided", "guided"))
        elif not streams:
            write(replies["guided"][i].text)
    emit(replies)
