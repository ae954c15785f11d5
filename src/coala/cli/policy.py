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
    """Measure the share of pairs the policy ranks right by its log-ratio to the base, without a judge.

    Only mode shift and a distilled policy have likelihoods; other modes are an error. The result is added to the
    report.
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
