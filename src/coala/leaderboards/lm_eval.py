"""Tasks of EleutherAI's lm-evaluation-harness with a run's guided texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from coala.leaderboards.record import Outcome, interval, require_head
from coala.values import CoalaError, Estimate


def run_lm_eval(
    run: Path,
    tasks: Sequence[str],
    *,
    guidance: Mapping[str, Any],
    settings: Mapping[str, Any],
    include_path: Path | None = None,
    batch_size: int = 8,
    seed: int = 0,
    out: Path | None = None,
    command: str = "",
) -> Outcome:
    """Run ``tasks`` with the model of ``run``, guided as it says but for ``guidance``; ``out`` gets the harness's JSON.

    ``settings`` are arguments of ``lm_eval.simple_evaluate``. Likelihoods are the base model's. Raises
    :class:`~coala.values.CoalaError` without the harness (extra ``lm-eval``) and for tasks that it does not know.
    """
    from coala.report import Evaluation, Measure
    from coala.store import save_json

    try:
        from lm_eval import simple_evaluate
        from lm_eval.tasks import TaskManager

        from coala.export.harness import GuidedLM
    except ImportError as error:
        raise CoalaError(f"{error}. Install the harness: pip install 'coala-align[lm-eval]'") from error
    if include_path is not None and not include_path.is_dir():
        raise CoalaError(f"{include_path}: no such folder. --include-path takes a folder with task files (.yaml).")
    known = TaskManager(include_path=str(include_path) if include_path else None)
    missing = [name for name in tasks if name not in known.all_tasks]
    if missing or not tasks:
        raise CoalaError(f"No task {', '.join(missing) or 'was named'}. `lm-eval ls tasks` lists them; --include-path.")
    require_head(run)
    seeds = {f"{kind}_seed": seed for kind in ("random", "numpy_random", "torch_random", "fewshot_random")}
    found = simple_evaluate(
        model=GuidedLM(run, mode=guidance.get("mode"), strength=guidance.get("strength"), batch_size=batch_size),
        tasks=list(tasks),
        task_manager=known,
        **settings,
        **seeds,
    )
    measures = [
        Measure(f"{task} {name.partition(',')[0]}", _estimate(value, name, values, found, task), "plain")
        for task, values in found["results"].items()
        for name, value in values.items()
        if isinstance(value, float) and "_stderr" not in name
    ]
    if out is not None:
        save_json(out, {key: found[key] for key in ("results", "versions", "n-shot", "n-samples") if key in found})
    evaluation = Evaluation(
        kind="lm-eval",
        of=", ".join(tasks),
        title=f"lm-evaluation-harness: {', '.join(tasks)}",
        command=command,
        measures=measures,
        files={},
        settings={**guidance, **settings, "seed": seed, "tasks": list(tasks)},
        facts={f"version of {task}": version for task, version in (found.get("versions") or {}).items()},
    )
    rows = [[one.name, interval(one.estimate, 4), str(one.estimate.n)] for one in measures]
    result = {"run": run, "results": found["results"]}
    return Outcome(evaluation, result, [(rows, ["task and metric", "value [95 %]", "n"])])


def _estimate(value: float, name: str, values: Mapping[str, Any], found: Mapping[str, Any], task: str) -> Estimate:
    """The harness's value with 1.96 of its standard errors to each side, which knows no groups; none if it has none."""
    metric, _, selection = name.partition(",")
    error = values.get(f"{metric}_stderr,{selection}")
    reach = 1.96 * error if isinstance(error, float) else float("nan")
    n = (found.get("n-samples") or {}).get(task, {}).get("effective", 0)
    return Estimate(value, value - reach, value + reach, int(n), "the harness's standard error")
