"""`coala live`: from no pairs at all to an aligned model, one click at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from coala.cli.flags import Given, Of, every, with_settings
from coala.cli.options import TrustCode, needs_extra
from coala.live.settings import LiveSettings
from coala.settings import ModelSettings

GRACE = 5.0  # seconds in which clicks at hand are kept at the end
MODEL = ("name", "template", "layer", "pooling", "max_tokens", "device", "adapter", "quantise", "dtype")


@with_settings
def live(
    *,
    out: Annotated[Path, typer.Option("--out", "-o", help="Run folder; an existing session is resumed.")],
    prompts: Annotated[
        Path | None,
        typer.Option(
            help="File of prompts (rows of prompt or instruction) or pairs; more can be typed in (default: none)."
        ),
    ] = None,
    model: Annotated[Given, Of(ModelSettings, MODEL)],
    settings: Annotated[LiveSettings, every(LiveSettings)],
    raters: Annotated[int, typer.Option(min=0, help="Number of personal links to print for other raters.")] = 0,
    host: Annotated[
        str, typer.Option(help="Address to listen on; other machines can reach any but loopback.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 8000,
    site: Annotated[
        str | None,
        typer.Option(help="Public address of a proxy in front, such as https://live.example (default: host and port)."),
    ] = None,
    trust_remote_code: TrustCode = False,
) -> None:
    """Compare replies two at a time in a browser; the head is refitted exactly after every click. Ctrl-C stops it.

    Every click is saved before the page continues; rerun the same command to resume. Accuracy is measured on clicks
    that are never fitted. The button Finish turns the session into an ordinary run.

    Examples:

    `coala live --model ./my-model --prompts prompts.jsonl --out runs/mine`   (then open http://127.0.0.1:8000)

    `coala live --model ./my-model --prompts prompts.jsonl --out runs/mine --ask mixed --raters 3`
    """
    with needs_extra("serve", "A session"):
        from coala.live.serving import serve
    from coala.cli.output import emit, say

    given = {**model, "trust_remote_code": trust_remote_code}
    found = serve(
        out, prompts, given, settings, n_raters=raters, host=host, port=port, site=site, grace=GRACE, on_note=say
    )
    emit(found)
