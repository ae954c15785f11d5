"""`coala eval policy`: how many pairs a policy's log-ratio to its base ranks right."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from coala.cli.flags import Given, Of, with_settings
from coala.cli.options import Download, MaxNewTokens, Temperature, TrustCode
from coala.cli.output import command_line, conclude, progress
from coala.settings import GuidanceSettings


@with_settings
def policy(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Finished run folder of `coala align`.")],
    *,
    pairs: Annotated[
        Path | None, typer.Option(help="File of pairs, in any known format (default: the run's held-out pairs).")
    ] = None,
    trained: Annotated[
        Path | None,
        typer.Option(
            help="Model or adapter trained from the run's model, to measure instead of the guidance (default: none)."
        ),
    ] = None,
    limit: Annotated[
        int, typer.Option(min=1, help="Maximum number of pairs, evenly spaced; each costs forward passes.")
    ] = 100,
    guidance: Annotated[Given, Of(GuidanceSettings, ("mode", "strength", "budget"))],
    temperature: Temperature = None,
    max_new_tokens: MaxNewTokens = None,
    trust_remote_code: TrustCode = False,
    download: Download = False,
) -> None:
    """Share of pairs whose log-ratio to the base the policy ranks right, without a judge; in the run's report too.

    Guidance has likelihoods in mode shift alone, and so has its distilled policy; the other modes are told so.
    """
    from coala.leaderboards.policy import run_policy
    from coala.store import RunFolder

    with progress() as show:
        found = run_policy(
            run,
            pairs=pairs,
            trained=trained,
            limit=limit,
            guidance=guidance,
            temperature=temperature,
            max_new_tokens=max_new_tokens,
            on_progress=show,
            command=command_line(),
        )
    conclude(found, RunFolder.open(run))
