"""`coala export` and `coala bench`: a run's head for other programs, and on published benchmarks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from coala.cli import rewardbench
from coala.cli.options import Download, TrustCode

if TYPE_CHECKING:
    from coala.values import Estimate

app = typer.Typer(no_args_is_help=True, help="Score published benchmarks with a run's head.")
app.command("rewardbench", epilog="Example: `coala bench rewardbench filtered.jsonl --run runs/demo --out bench`")(
    rewardbench.by_head
)


class Form(StrEnum):
    """What kind of folder is written."""

    reward_model = "reward-model"
    linear_head = "linear-head"


def export(
    run: Annotated[
        Path, typer.Argument(metavar="RUN", help="A run folder made by `coala align`; with --verify, an exported one.")
    ],
    to: Annotated[
        Form, typer.Option("--to", help="`reward-model` holds any head; `linear-head` needs no remote code.")
    ] = Form.reward_model,
    out: Annotated[Path | None, typer.Option(help="The folder to write; it must not exist or be empty.")] = None,
    drop_constant: Annotated[
        bool,
        typer.Option("--drop-constant", help="linear-head: leave out the head's constant, which shifts all scores."),
    ] = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="Check an exported folder's files against its coala.json instead.")
    ] = False,
    trust_remote_code: TrustCode = False,
    download: Download = False,
) -> None:
    """Write a run's model and head as one Hugging Face folder, ready to be loaded or published.

    A reward-model folder is loaded with `trust_remote_code=True`: it brings two short files of code, for no stock class
    holds gates or means. Nothing is uploaded.

    Examples:

    `coala export runs/demo --to reward-model --out exported`

    `coala export exported --verify`
    """
    from coala.cli.output import emit, table
    from coala.export import export_linear_head, export_reward_model, facts_of, verify_folder
    from coala.leaderboards.record import fitted
    from coala.values import CoalaError

    if verify:
        manifest = verify_folder(run)
        table([["files", f"{len(manifest['files'])}, all as exported"], ["form", manifest["form"]]])
        emit({"folder": run, "form": manifest["form"], "files": len(manifest["files"]), "verified": True})
        return
    if out is None:
        raise CoalaError("Where should the folder be written? Give --out FOLDER.")
    if drop_constant and to is not Form.linear_head:
        raise CoalaError("--drop-constant belongs to --to linear-head; a reward-model folder keeps the constant.")
    backbone, head = fitted(run)
    facts = facts_of(run, head)
    if to is Form.linear_head:
        made = export_linear_head(head, backbone, out, facts, drop_constant=drop_constant)
    else:
        made = export_reward_model(head, backbone, out, facts)
    needs = "trust_remote_code=True" if to is Form.reward_model else "no remote code"
    table(
        [
            ["folder", str(made.folder)],
            ["size", f"{made.n_bytes / 1e6:.1f} MB"],
            ["loads with", needs],
            ["scores", f"the head's own up to {made.difference:.1e}, on {made.probes} trial conversations"],
        ]
    )
    emit(asdict(made))


@app.command(
    "lm-eval", epilog="Example: `coala bench lm-eval runs/demo --tasks my_task --include-path tasks --out results.json`"
)
def lm_eval(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A finished run folder.")],
    tasks: Annotated[str, typer.Option(help="Names of tasks, separated by commas; `lm-eval ls tasks` lists them.")],
    include_path: Annotated[Path | None, typer.Option(help="A folder with tasks of your own.")] = None,
    mode: Annotated[str | None, typer.Option(help="Mode of guidance (default: the run's own).")] = None,
    strength: Annotated[float | None, typer.Option(help="The guidance's strength; 0 is unguided.")] = None,
    num_fewshot: Annotated[int | None, typer.Option(min=0, help="Examples before each question.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Questions per task, to try.")] = None,
    gen_kwargs: Annotated[
        str | None, typer.Option(help="Sampling, such as `do_sample=true,temperature=0.8` (default: the task's own).")
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Render prompts by the tokenizer's chat template.")] = False,
    batch_size: Annotated[int, typer.Option(min=1)] = 8,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    out: Annotated[Path | None, typer.Option(help="Where to write the harness's results as JSON.")] = None,
    trust_remote_code: TrustCode = False,
    download: Download = False,
) -> None:
    """Tasks of EleutherAI's lm-evaluation-harness with guided texts (needs the extra `lm-eval`).

    Likelihoods are the base model's; where a task asks for them, guidance changes nothing.
    """
    from coala.cli.output import command_line, finish, say, table
    from coala.leaderboards.record import interval, keep, require_head
    from coala.report import Evaluation, Measure
    from coala.store import RunFolder, save_json
    from coala.values import CoalaError

    try:
        from lm_eval import simple_evaluate
        from lm_eval.tasks import TaskManager

        from coala.export.harness import GuidedLM
    except ImportError as error:
        raise CoalaError(f"{error}. Install the harness: pip install 'coala-align[lm-eval]'") from error
    if include_path is not None and not include_path.is_dir():
        raise CoalaError(f"{include_path}: no such folder. --include-path takes a folder with task files (.yaml).")
    names = [name.strip() for name in tasks.split(",") if name.strip()]
    known = TaskManager(include_path=str(include_path) if include_path else None)
    missing = [name for name in names if name not in known.all_tasks]
    if missing or not names:
        raise CoalaError(f"No task {', '.join(missing) or 'was named'}. `lm-eval ls tasks` lists them; --include-path.")
    require_head(run)
    found = simple_evaluate(
        model=GuidedLM(run, mode=mode, strength=strength, batch_size=batch_size),
        tasks=names,
        num_fewshot=num_fewshot,
        limit=limit,
        gen_kwargs=gen_kwargs,
        apply_chat_template=chat,
        task_manager=known,
        random_seed=seed,
        numpy_random_seed=seed,
        torch_random_seed=seed,
        fewshot_random_seed=seed,
    )
    measures = [
        Measure(f"{task} {name.partition(',')[0]}", _estimate(value, name, values, found, task), "plain")
        for task, values in found["results"].items()
        for name, value in values.items()
        if isinstance(value, float) and "_stderr" not in name
    ]
    table(
        [[one.name, interval(one.estimate, 4), str(one.estimate.n)] for one in measures],
        ["task and metric", "value [95 %]", "n"],
    )
    if out is not None:
        save_json(out, {key: found[key] for key in ("results", "versions", "n-shot", "n-samples") if key in found})
        say(f"Written: {out}")
    settings = {"mode": mode, "strength": strength, "num_fewshot": num_fewshot, "limit": limit, "seed": seed}
    evaluation = Evaluation(
        kind="lm-eval",
        of=", ".join(names),
        title=f"lm-evaluation-harness: {', '.join(names)}",
        command=command_line(),
        measures=measures,
        files={},
        settings={**settings, "gen_kwargs": gen_kwargs, "chat": chat, "tasks": names},
        facts={f"version of {task}": version for task, version in (found.get("versions") or {}).items()},
    )
    finish({"run": run, "results": found["results"]} | keep(RunFolder.open(run), evaluation, say), ())


def _estimate(value: float, name: str, values: Mapping[str, Any], found: Mapping[str, Any], task: str) -> Estimate:
    """The harness's value with 1.96 of its standard errors to each side, which knows no groups; none if it has none."""
    from coala.values import Estimate

    metric, _, selection = name.partition(",")
    error = values.get(f"{metric}_stderr,{selection}")
    reach = 1.96 * error if isinstance(error, float) else float("nan")
    n = (found.get("n-samples") or {}).get(task, {}).get("effective", 0)
    return Estimate(value, value - reach, value + reach, int(n), "the harness's standard error")
