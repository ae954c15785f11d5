"""`coala generate`: a guided reply to one or more prompts."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from coala.cli.flags import Given, Of, with_settings
from coala.cli.options import Download, OwnTemperature, TrustCode
from coala.cli.terminal import write
from coala.messages import CoalaError
from coala.settings import GuidanceSettings

if TYPE_CHECKING:
    from coala.values import Generation


@with_settings
def generate(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder made by `coala align`.")],
    prompts: Annotated[
        list[str] | None,
        typer.Argument(metavar="PROMPT...", help="Prompts to answer (default: one per line of stdin)."),
    ] = None,
    *,
    system: Annotated[str | None, typer.Option(help="System prompt for every prompt (default: none).")] = None,
    guidance: Annotated[Given, Of(GuidanceSettings, ("mode", "strength", "over", "rule", "candidates", "rater"))],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Maximum length of a reply, in tokens.")] = 100,
    temperature: OwnTemperature = None,
    sampling: Annotated[Given, Of(GuidanceSettings, ("top_p", "top_k"))],
    stop: Annotated[list[str] | None, typer.Option(help="Text that ends a reply. Repeatable.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Random seed of sampling.")] = 0,
    cut: Annotated[bool, typer.Option("--cut", help="Truncate prompts that are too long, from the start.")] = False,
    compare: Annotated[bool, typer.Option("--compare", help="Also show the unguided reply.")] = False,
    trust_remote_code: TrustCode = False,
    download: Download = False,
) -> None:
    """Answer prompts with the run's model, guided by its head.

    Examples:

    `coala generate runs/demo "This film is about a night nurse. The acting"`

    `coala generate runs/demo --strength 3 --compare "I thought this movie"`
    """
    from coala.alignment.talking import conversation, open_talker
    from coala.cli.output import emit, say
    from coala.values import Turn

    texts = prompts or [line.rstrip("\n") for line in sys.stdin if line.strip()]
    if not texts or not all(text.strip() for text in texts):
        raise CoalaError('Found no prompt, or an empty one. Fix: pass it in quotes: coala generate RUN "prompt".')
    talker = open_talker(run, {"temperature": temperature, **sampling}, guidance, say)
    asked = [conversation(system, Turn("user", text)) for text in texts]
    mend = "Fix: shorten it, or pass --cut to truncate it from the start."
    lengths = [talker.room(prompt, max_new_tokens, cut=cut, mend=mend) for prompt in asked]
    rules = {"unguided": talker.unguided, "guided": talker.guidance} if compare else {"guided": talker.guidance}
    # One reply streams as it is made; several are printed whole, in order.
    streams = len(texts) == 1 and not compare
    hear = partial(write, end="") if streams else None
    replies = {
        name: talker.reply(asked, rule, lengths, seed=seed, stop=stop or (), on_piece=hear)
        for name, rule in rules.items()
    }
    if streams:
        write()
    else:
        _show(texts, replies)
    emit(replies)


def _show(texts: Sequence[str], replies: Mapping[str, Sequence[Generation]]) -> None:
    """Every reply behind its prompt, or both beside each other."""
    from coala.cli.output import side_by_side

    for i, text in enumerate(texts):
        write(f"{'' if i == 0 else chr(10)}> {text}\n")
        if "unguided" in replies:
            side_by_side(replies["unguided"][i].text, replies["guided"][i].text, ("unguided", "guided"))
        else:
            write(replies["guided"][i].text)
