"""`coala export` and `coala bench`: a run's head for other programs, and on published benchmarks."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import typer

from coala.cli import reward_benchmarks
from coala.cli.flags import Given, Of, with_settings
from coala.cli.options import Download, TrustCode
from coala.cli.output import command_line, conclude, say
from coala.leaderboards.record import run_of
from coala.messages import CoalaError
from coala.settings import GuidanceSettings

app = typer.Typer(no_args_is_help=True, help="Score published benchmarks with a run's head.")
app.command("rewardbench", epilog="Example: `coala bench rewardbench filtered.jsonl --run runs/demo --out bench`")(
    reward_benchmarks.by_head
)


def export(
    run: Annotated[
        Path,
        typer.Argument(
            metavar="RUN",
            help="Run folder of `coala align`; with --verify, an exported folder; with --to merged, an adapter.",
        ),
    ],
    to: Annotated[
        Literal["reward-model", "linear-head", "merged"],
        typer.Option(
            "--to",
            help="Kind of export: `reward-model` (any head), `linear-head` (no remote code) or `merged` "
            "(adapter and base).",
        ),
    ] = "reward-model",
    out: Annotated[Path | None, typer.Option(help="Folder to write; must be new or empty (default: none).")] = None,
    drop_constant: Annotated[
        bool,
        typer.Option("--drop-constant", help="Drop the constant of a linear-head, which shifts all scores."),
    ] = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="Check an exported folder's files against its coala.json instead.")
    ] = False,
    trust_remote_code: TrustCode = False,
    download: Download = False,
) -> None:
    """Export a run's model and head as one Hugging Face folder, ready to load or publish.

    A reward-model folder loads with `trust_remote_code=True`: it contains two short files of code, because no stock
    class has gates or means. Nothing is uploaded.

    Examples:

    `coala export runs/demo --to reward-model --out exported`

    `coala export exported --verify`
    """
    from coala.cli.output import emit, table
    from coala.export import export_linear_head, export_reward_model, facts_of, verify_folder
    from coala.leaderboards.record import fitted

    if verify:
        manifest = verify_folder(run)
        table([["files", f"{len(manifest['files'])}, all as exported"], ["form", manifest["form"]]])
        emit({"folder": run, "form": manifest["form"], "files": len(manifest["files"]), "verified": True})
        return
    if out is None:
        raise CoalaError("Found no --out, expected a folder to write. Fix: pass --out FOLDER.")
    if to == "merged":
        merged(run, out, trust_remote_code, download)
        return
    if drop_constant and to != "linear-head":
        raise CoalaError("--drop-constant needs --to linear-head; a reward-model folder keeps the constant.")
    backbone, head = fitted(run)
    facts = facts_of(run, head)
    if to == "linear-head":
        made = export_linear_head(head, backbone, out, facts, drop_constant=drop_constant)
    else:
        made = export_reward_model(head, backbone, out, facts)
    rows = [["folder", str(made.folder)], ["size", f"{made.n_bytes / 1e6:.1f} MB"]]
    rows += [["loads with", "trust_remote_code=True" if to == "reward-model" else "no remote code"]]
    rows += [["scores", f"the head's own up to {made.difference:.1e}, on {made.probes} trial conversations"]]
    table(rows)
    emit(asdict(made))


def merged(adapter: Path, out: Path, trust_remote_code: bool, download: bool) -> None:
    """An adapter in its base, as a folder."""
    from coala.cli.output import emit, table
    from coala.export.merged import export_merged

    made = export_merged(adapter, out, trust_remote_code=trust_remote_code, download=download)
    table(made.summary_rows())
    emit(asdict(made))


@app.command(
    "lm-eval", epilog="Example: `coala bench lm-eval runs/demo --tasks my_task --include-path tasks --out results.json`"
)
@with_settings
def lm_eval(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Finished run folder.")],
    tasks: Annotated[str, typer.Option(help="Names of tasks, comma-separated; `lm-eval ls tasks` lists them.")],
    *,
    include_path: Annotated[Path | None, typer.Option(help="Folder with your own tasks (default: none).")] = None,
    guidance: Annotated[Given, Of(GuidanceSettings, ("mode", "strength"))],
    num_fewshot: Annotated[
        int | None, typer.Option(min=0, help="Number of examples before each question (default: the task's).")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Maximum number of questions per task, for a quick test (default: all).")
    ] = None,
    gen_kwargs: Annotated[
        str | None,
        typer.Option(help="Sampling parameters, such as `do_sample=true,temperature=0.8` (default: the task's)."),
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Render prompts with the tokenizer's chat template.")] = False,
    batch_size: Annotated[int, typer.Option(min=1, help="Batch size, in questions.")] = 8,
    seed: Annotated[int, typer.Option(min=0, help="Random seed of sampling.")] = 0,
    out: Annotated[
        Path | None, typer.Option(help="File to write the harness's results to, as JSON (default: none).")
    ] = None,
    trust_remote_code: TrustCode = False,
    download: Download = False,
) -> None:
    """Run tasks of EleutherAI's lm-evaluation-harness on guided text (needs the extra `lm-eval`).

    Likelihoods are the base model's, so guidance does not affect tasks that use them.
    """
    from coala.leaderboards.lm_eval import run_lm_eval

    sampling = {"gen_kwargs": gen_kwargs, "apply_chat_template": chat, "num_fewshot": num_fewshot, "limit": limit}
    found = run_lm_eval(
        run,
        [name.strip() for name in tasks.split(",") if name.strip()],
        guidance=guidance,
        settings=sampling,
        include_path=include_path,
        batch_size=batch_size,
        seed=seed,
        out=out,
        command=command_line(),
    )
    if out is not None:
        say(f"Written: {out}")
    conclude(found, run_of(run))
