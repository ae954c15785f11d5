"""The end of `coala align --distil`: the policy on the run's page, beside unguided and guided replies.

RUN/generations-distilled.jsonl  RUN/distilled/side_by_side.json
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coala.alignment import make_report
from coala.alignment.judges import judge_name, judge_stamp
from coala.alignment.parts import guidance_of
from coala.alignment.replies import rows_at_once
from coala.alignment.talking import settled
from coala.callbacks import OnNote, OnProgress, quiet, silent
from coala.costs import Stopwatch, peak_memory
from coala.decoding import Guidance, generate
from coala.distil.measured import keep_measured, wins_of
from coala.distil.stage import NothingToDistil, Work, carry_out, distil
from coala.policies import DistilledPolicy
from coala.recipe import Recipe, recipe_of
from coala.settings import DistilSettings
from coala.statistics.intervals import mean_estimate, paired_difference
from coala.statistics.scores import perplexity_ratio
from coala.store import (
    DISTILLED,
    RunFolder,
    digest,
    file_digest,
    load_generations,
    load_pairs,
    save_generations,
    save_json,
)
from coala.values import Generation, Turn, prompt_id

if TYPE_CHECKING:
    from coala.alignment.parts import LoadParts

STAGE = "distil"
REPLIES = "generations-distilled.jsonl"
TABLE = f"{DISTILLED}/side_by_side.json"


def distil_into_report(
    path: Path | str,
    settings: DistilSettings | None = None,
    *,
    on_progress: OnProgress = silent,
    on_note: OnNote = quiet,
    trust_remote_code: bool = False,
    parts: LoadParts | None = None,
) -> dict[str, Any]:
    """Distil the run, let the policy answer what the run answered, put both on its page; the content of the report.

    ``settings`` are by default those of the run's recipe. Skipped where its inputs and outputs are unchanged. Where the
    head is at chance nothing is distilled, and the page and ``on_note`` say so in a line. ``parts`` are the run's, if
    its model is loaded already.
    """
    run = RunFolder.open(path)
    recipe = recipe_of(run.settings, run.path / "run.json")
    settings = recipe.distil if settings is None else settings
    if not (run.path / "generations-guided.jsonl").exists():
        on_note("the run answers no prompts for its report, so that the policy is not compared: --prompts 0")
        distil(run.path, settings, on_progress=on_progress, on_note=on_note, trust_remote_code=trust_remote_code)
        return make_report(run)
    inputs = _inputs(run, recipe, settings)
    if not run.done(STAGE, inputs):
        with Stopwatch() as watch:
            outputs = _work(run, recipe, settings, on_progress, on_note, trust_remote_code, parts)
        run.finish(STAGE, inputs, outputs, {"seconds": watch.seconds, "peak_bytes": peak_memory()})
    return make_report(run)


def _work(
    run: RunFolder,
    recipe: Recipe,
    settings: DistilSettings,
    on_progress: OnProgress,
    on_note: OnNote,
    trust_remote_code: bool,
    parts: LoadParts | None,
) -> list[str]:
    """What was written."""
    with run.held():
        work = Work.of(run, settings, on_progress, on_note, parts, trust_remote_code=trust_remote_code)
        try:
            policy = carry_out(work)
        except NothingToDistil as why:
            on_note(f"nothing was distilled: {why}")
            save_json(run.path / TABLE, {"nothing": str(why)})
            return [TABLE]
        sides = {name: load_generations(run.path / f"generations-{name}.jsonl") for name in ("unguided", "guided")}
        replies, guidance, temperature = _replies(work, policy, sides["unguided"])
        sampling = {"temperature": temperature, "top_k": guidance.top_k, "top_p": guidance.top_p}
        sides["distilled"] = replies
        rows = _rows(run, recipe, sides, {"guided": guidance}, on_progress, on_note)
        judge = None if recipe.evaluation.judge is None else judge_name(recipe.evaluation.judge)[0]
        wins = next(row["wins"] for row in rows if row["name"] == "distilled")
        file = run.path / DISTILLED / "policy.safetensors"
        keep_measured(file, replies, sides["unguided"], recipe.evaluation.judge, wins, sampling)
        facts = None if policy.certificate is None else policy.certificate.statement
        save_json(
            run.path / TABLE,
            {
                "policy": file_digest(file),
                "judge": judge,
                "rows": rows,
                "summary": policy.summary_rows(),
                "statement": facts,
                "guidance": str(guidance),
            },
        )
    return [*(f"{DISTILLED}/{name}" for name in ("policy.safetensors", "policy.json", "measured.json")), REPLIES, TABLE]


def _inputs(run: RunFolder, recipe: Recipe, settings: DistilSettings) -> dict[str, Any]:
    evaluation = recipe.evaluation
    names = ("head/head.safetensors", "pairs-train.jsonl", "generations-unguided.jsonl", "generations-guided.jsonl")
    return {
        **{name: file_digest(run.path / name) for name in names},
        "settings": asdict(settings),
        "guidance": asdict(recipe.guidance),
        "evaluation": [evaluation.max_new_tokens, evaluation.temperature, recipe.seed],
        "judge": None if evaluation.judge is None else judge_stamp(evaluation.judge),
    }


def _prompts(run: RunFolder) -> dict[str, tuple[Turn, ...]]:
    return {prompt_id(pair.prompt): pair.prompt for pair in load_pairs(run.path / "pairs-eval.jsonl")}


def _replies(
    work: Work, policy: DistilledPolicy, plain: Sequence[Generation]
) -> tuple[list[Generation], Guidance, float]:
    """The policy's reply to each prompt that was answered unguided, with the same noise; what guided the run's, and the
    temperature of all.
    """
    run, recipe, backbone = work.run, work.recipe, work.backbone.with_policy(policy)
    # Top-k, top-p and temperature are those of the run's own replies, which the model may have suggested.
    guidance, temperature = settled(run.path, backbone, guidance_of(recipe), {})
    prompts = _prompts(run)
    ids = [reply.prompt_id for reply in plain]
    decides = digest(ids, policy.change, str(guidance), guidance.top_k, guidance.top_p, temperature)[:12]
    replies = generate(
        [prompts[name] for name in ids],
        backbone,
        work.head,
        guidance.changed(mode="distilled"),
        max_new_tokens=recipe.evaluation.max_new_tokens,
        temperature=temperature,
        seed=recipe.seed,
        prompt_ids=ids,
        batch_size=rows_at_once(backbone),
        kept=run.path / DISTILLED / f"answers-{decides}.jsonl",
        on_reply=lambda n, total: work.on_progress("replies-distilled", n, total, f"{n} of {total} replies"),
        with_base=True,
    )
    save_generations(run.path / REPLIES, replies, prompts)
    return replies, guidance.at(temperature), temperature


def _rows(
    run: RunFolder,
    recipe: Recipe,
    sides: Mapping[str, Sequence[Generation]],
    guidances: Mapping[str, Guidance],
    on_progress: OnProgress,
    on_note: OnNote,
) -> list[dict[str, Any]]:
    """A row for each side: what a table of them holds, against unguided replies to the same prompts."""
    plain, prompts = sides["unguided"], _prompts(run)
    rows = []
    for name, some in sides.items():
        told = partial(on_progress, f"judge, {name}")
        judge = None if name == "unguided" else recipe.evaluation.judge
        wins = wins_of(some, plain, judge, prompts, on_progress=told, on_note=on_note)
        nats = [reply.divergence for reply in some]
        known = name == "unguided" or all(value is not None for value in nats)
        ours, base = (([r.log_prob for r in one], [r.n_tokens for r in one]) for one in (some, plain))
        rows.append(
            {
                "name": name,
                "method": some[0].method if some else name,
                "wins": wins,
                "gain": paired_difference([one.score for one in some], [one.score for one in plain]),
                "perplexity_ratio": perplexity_ratio(*ours, *base),
                "divergence": mean_estimate([value or 0.0 for value in nats]) if known else None,
                "forwards": guidances[name].forwards if name in guidances else 1.0,
            }
        )
    return rows


def table_rows(content: Mapping[str, Any]) -> list[list[str]]:
    """What a terminal shows of the page's section."""
    from coala.pages.words import bracketed

    def told(row: Mapping[str, Any]) -> list[str]:
        if row["name"] == "unguided":
            return ["", "0", "1", "0"]
        return [
            "" if row["wins"] is None else bracketed(row["wins"]),
            bracketed(row["gain"], "+.3g", 1),
            bracketed(row["perplexity_ratio"], ".2f", 1),
            "not known" if row["divergence"] is None else bracketed(row["divergence"], ".1f", 1),
        ]

    rows = (content.get("distilled") or {}).get("rows") or []
    return [[row["name"], *told(row), f"{row['forwards']:g}"] for row in rows]


HEADS = ("against unguided", "wins, %", "head score", "perplexity, times", "KL a reply, nats", "forwards a token")
