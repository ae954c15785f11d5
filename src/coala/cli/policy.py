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
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A finished run folder of `coala align`.")],
    *,
    pairs: Annotated[
        Path | None, typer.Option(help="Pairs in any format that is read (default: those that the run holds out).")
    ] = None,
    trained: Annotated[
        Path | None,
        typer.Option(help="Measure this model, trained from the run's, or an adapter of it, instead of the guidance."),
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="At most so many pairs, spread evenly: each costs forwards.")] = 100,
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
