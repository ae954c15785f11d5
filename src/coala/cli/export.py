"""`coala export` and `coala bench`: a run's head for other programs, and on published benchmarks."""

from __future__ import annotations

from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from coala.backbone import LanguageModel
    from coala.values import ConvexHead

app = typer.Typer(no_args_is_help=True, help="Score published benchmarks with a run's head.")


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
) -> None:
    """Write a run's model and head as one Hugging Face folder, ready to be loaded or published.

    A reward-model folder is loaded with `trust_remote_code=True`: it brings two short files of code, for no stock class
    holds gates or means. Nothing is uploaded.

    Examples:

    `coala export runs/demo --to reward-model --out exported`

    `coala export exported --verify`
    """
    from coala.cli.screen import emit, table
    from coala.export import export_linear_head, export_reward_model, facts_of, verify_folder
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
    backbone, head = _opened(run)
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


@app.command(epilog="Example: `coala bench rewardbench filtered.jsonl --run runs/demo --out bench`")
def rewardbench(
    file: Annotated[
        Path, typer.Argument(help="Rows with prompt, chosen, rejected and subset: JSON Lines or CSV, plain or .gz.")
    ],
    run: Annotated[Path, typer.Option(help="The run whose head scores the replies.")],
    out: Annotated[
        Path | None, typer.Option(help="Folder for results.json (upstream's form), scores.json and ranking.json.")
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="The model's name in the results; the run folder's if not given.")
    ] = None,
    batch_tokens: Annotated[int, typer.Option(min=1, help="Tokens of one forward pass.")] = 4096,
) -> None:
    """RewardBench with a run's head, on any device: accuracy by subset and section, with intervals.

    A tie counts as wrong, as upstream. Replies to one prompt share its forward pass.
    """
    from coala.cli.screen import finish, interval, progress, table
    from coala.evaluation.rewardbench import ranking
    from coala.export.rewardbench import read_benchmark, results, score_rows
    from coala.features import extract
    from coala.store import save_json

    benchmark = read_benchmark(file)
    backbone, head = _opened(run)
    with progress() as show:
        features = extract(
            benchmark.pairs,
            backbone,
            head.spec,
            prompt_features=head.needs_prompt,
            batch_tokens=batch_tokens,
            on_batch=lambda done, total, tokens: show("replies", done, total),
        )
    chosen = head.score(features.chosen, features.prompt)
    rejected = head.score(features.rejected, features.prompt)
    found = ranking(benchmark.scored(chosen, rejected))
    named = {**found.sections, "all rows": found.rows}
    table(
        [[name, interval(value, 4), str(value.n)] for name, value in (*found.subsets.items(), *named.items())]
        + [["mean of sections", f"{found.overall:.4f}", ""], ["share of ties", f"{found.ties:.4f}", ""]],
        ["subset or section", "accuracy", "n"],
    )
    if out is not None:
        sections = {key: value.value for key, value in found.sections.items()}
        save_json(out / "results.json", results(found, name or run.resolve().name, head.spec))
        save_json(out / "scores.json", score_rows(benchmark, chosen.tolist(), rejected.tolist()))
        save_json(out / "ranking.json", {"by_section": sections, **asdict(found), "overall": _finite(found.overall)})
    finish(asdict(found), found.remarks)


@app.command(
    "lm-eval", epilog="Example: `coala bench lm-eval runs/demo --tasks my_task --include-path tasks --out results.json`"
)
def lm_eval(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A finished run folder.")],
    tasks: Annotated[str, typer.Option(help="Names of tasks, separated by commas; `lm-eval ls tasks` lists them.")],
    include_path: Annotated[Path | None, typer.Option(help="A folder with tasks of your own.")] = None,
    mode: Annotated[str | None, typer.Option(help="The guidance's mode; the run's own if not given.")] = None,
    strength: Annotated[float | None, typer.Option(help="The guidance's strength; 0 is unguided.")] = None,
    num_fewshot: Annotated[int | None, typer.Option(min=0, help="Examples before each question.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Questions per task, to try.")] = None,
    gen_kwargs: Annotated[
        str | None, typer.Option(help="Sampling, such as `do_sample=true,temperature=0.8`; a task's own if not given.")
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Render prompts by the tokenizer's chat template.")] = False,
    batch_size: Annotated[int, typer.Option(min=1)] = 8,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    out: Annotated[Path | None, typer.Option(help="Where to write the harness's results as JSON.")] = None,
) -> None:
    """Tasks of EleutherAI's lm-evaluation-harness with guided texts (needs the extra `lm-eval`).

    Likelihoods are the base model's; where a task asks for them, guidance changes nothing.
    """
    from coala.cli.screen import emit, say, table
    from coala.store import save_json
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
    _opened(run)
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
    rows = []
    for task, values in found["results"].items():
        for name, value in values.items():
            deviation = values.get(f"{name.partition(',')[0]}_stderr,{name.partition(',')[2]}")
            if isinstance(value, float) and "_stderr" not in name:
                spread = f"{deviation:.4f}" if isinstance(deviation, float) else ""
                rows.append([task, name.partition(",")[0], f"{value:.4f}", spread])
    table(rows, ["task", "metric", "value", "standard error"])
    if out is not None:
        save_json(out, {key: found[key] for key in ("results", "versions", "n-shot", "n-samples") if key in found})
        say(f"Written: {out}")
    emit({"run": run, "results": found["results"]})


def _finite(value: float) -> float | None:
    return value if value == value else None  # JSON has no nan


def _opened(run: Path) -> tuple[LanguageModel, ConvexHead]:
    """Model and head of a run; says so if it has none."""
    from coala.align import load_run
    from coala.store import Run, StoreError

    if not (Run.open(run).path / "head" / "head.json").is_file():
        raise StoreError(f"{run}: has no fitted head yet. Finish it with `coala align`, and try again.")
    backbone, head, _ = load_run(run)
    return backbone, head
