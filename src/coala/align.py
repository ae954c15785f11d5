"""The stages of one alignment in their order, each skipped when what it reads and wrote is unchanged.

    pairs -> features -> head -> generations -> judgements -> report

Knows which stage feeds which and where its values lie in the run folder; every computation is a call to the part that
owns it. On a machine with a GPU each stage runs in a process of its own, so that torch and JAX never share the card.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import shlex
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from coala.costs import Stopwatch, extraction_flops, peak_memory
from coala.recipe import Recipe
from coala.store import (
    FeatureStore,
    Run,
    digest,
    file_digest,
    load_features,
    load_generations,
    load_head,
    load_json,
    load_judgements,
    load_pairs,
    save_features,
    save_generations,
    save_head,
    save_json,
    save_judgements,
    save_pairs,
)
from coala.values import CoalaError, Pair, conversation_text

if TYPE_CHECKING:
    from coala.backbone import LanguageModel
    from coala.decoding import Guidance
    from coala.values import ConvexHead


class OnProgress(Protocol):
    """Called with a stage, units done, units in all (``None``: unknown) and a note."""

    def __call__(self, stage: str, done: float, total: float | None, note: str = "") -> None: ...


def _silent(stage: str, done: float, total: float | None, note: str = "") -> None:
    pass


@dataclass
class _Job:
    """A recipe on its way through a run folder; the backbone is loaded when first needed and kept."""

    recipe: Recipe
    run: Run
    show: OnProgress = _silent
    loaded: dict[str, Any] = field(default_factory=dict)

    def path(self, name: str) -> Path:
        return self.run.path / name

    def backbone(self) -> LanguageModel:
        if "backbone" not in self.loaded:
            from coala.backbone import load_backbone

            model = self.recipe.model
            self.loaded["backbone"] = load_backbone(
                model.name,
                revision=model.revision,
                template=model.template,
                device=model.device,
                dtype=model.dtype,
                trust_remote_code=model.trust_remote_code,
            )
        return self.loaded["backbone"]

    def once(self, stage: str, inputs: dict[str, Any], outputs: list[str], work: Callable[[], Any]) -> None:
        """Do ``work`` unless this stage is done on these inputs; record seconds, memory and the facts it returns."""
        if self.run.done(stage, inputs):
            self.show(stage, 1, 1, "already done")
            return
        with Stopwatch() as watch:
            facts = work() or {}
        facts |= {"seconds": watch.seconds, "peak_bytes": peak_memory()}
        self.run.finish(stage, inputs, outputs, facts)
        self.show(stage, 1, 1)


# --- the stages --------------------------------------------------------------------------------------------------


def _pairs(job: _Job) -> None:
    from coala.data import check, source_digest, split

    recipe = job.recipe
    inputs = {
        "pairs": [source_digest(s) for s in recipe.pairs],
        "eval_pairs": [source_digest(s) for s in recipe.eval_pairs],
        "settings": [recipe.format, recipe.eval_fraction, recipe.seed],
    }

    def work() -> dict[str, Any]:
        job.show("pairs", 0, None)
        findings = check(recipe.pairs, recipe.format, against=recipe.eval_pairs or None)
        findings.raise_for_errors()
        if recipe.eval_pairs:
            held_out = check(recipe.eval_pairs, recipe.format)
            held_out.raise_for_errors()
            train, evaluation = list(findings.pairs), list(held_out.pairs)
        else:
            train, evaluation = split(findings.pairs, recipe.eval_fraction, seed=recipe.seed)
        save_pairs(job.path("pairs-train.jsonl"), train)
        save_pairs(job.path("pairs-eval.jsonl"), evaluation)
        return {
            "n_train": len(train),
            "n_eval": len(evaluation),
            "findings": [{"severity": "warning", "text": str(finding)} for finding in findings.warnings],
        }

    job.once("pairs", inputs, ["pairs-train.jsonl", "pairs-eval.jsonl"], work)


def _features(job: _Job) -> None:
    from coala.features import extract

    model = job.recipe.model
    for part in ("train", "eval"):
        stage = f"features-{part}"
        source = job.path(f"pairs-{part}.jsonl")
        inputs = {"pairs": file_digest(source), "model": model.model_dump(), "weights": job.backbone().weights}

        def work(part: str = part, stage: str = stage, source: Path = source) -> dict[str, Any]:
            backbone = job.backbone()
            pairs = load_pairs(source)
            spec = backbone.spec(model.layer, model.pooling, model.ends_with_eos, model.max_tokens)
            shards = FeatureStore(job.path(f"features/{part}/shards"))
            features = extract(
                pairs,
                backbone,
                spec,
                batch_tokens=model.batch_tokens,
                store=shards,
                on_batch=lambda done, total, tokens: job.show(stage, done, total, f"{tokens:,} tokens"),
            )
            save_features(job.path(f"features/{part}"), features)
            return {}

        job.once(stage, inputs, [f"features/{part}/features.safetensors", f"features/{part}/features.json"], work)


def _head(job: _Job) -> None:
    from coala.convex import fit

    settings = job.recipe.head
    inputs = {
        "features": file_digest(job.path("features/train/features.safetensors")),
        "settings": settings.model_dump(),
        "seed": job.recipe.seed,
    }

    def work() -> None:
        fitted = fit(
            load_features(job.path("features/train")),
            **settings.model_dump(),
            seed=job.recipe.seed,
            on_step=lambda stage, step, total, info: job.show("head", step, total, stage),
        )
        save_head(job.path("head"), fitted.head)
        save_json(job.path("head/fit.json"), {"path": fitted.path, "history": fitted.history})

    job.once("head", inputs, ["head/head.safetensors", "head/head.json", "head/fit.json"], work)


def _replies(job: _Job) -> None:
    settings = job.recipe.evaluation
    pairs = load_pairs(job.path("pairs-eval.jsonl"))
    chosen = list({conversation_text(pair.prompt): pair for pair in pairs}.values())[: settings.prompts]
    for method in ("unguided", "guided"):
        stage = f"replies-{method}"
        inputs = {
            "prompts": digest([asdict(pair)["prompt"] for pair in chosen]),
            "head": file_digest(job.path("head/head.safetensors")),
            "weights": job.backbone().weights,
            "guidance": job.recipe.guidance.model_dump(),
            "settings": [settings.max_new_tokens, settings.temperature, job.recipe.seed],
        }

        def work(method: str = method, stage: str = stage) -> dict[str, Any]:
            from coala.decoding import generate

            replies = generate(
                [pair.prompt for pair in chosen],
                job.backbone(),
                load_head(job.path("head")),
                replace(_guidance(job.recipe), mode="none") if method == "unguided" else _guidance(job.recipe),
                max_new_tokens=settings.max_new_tokens,
                temperature=settings.temperature,
                seed=job.recipe.seed,
                prompt_ids=[prompt_id(pair) for pair in chosen],
            )
            save_generations(job.path(f"generations-{method}.jsonl"), replies)
            return {"n": len(replies)}

        job.once(stage, inputs, [f"generations-{method}.jsonl"], work)


def _judgements(job: _Job) -> None:
    from coala.evaluation import WordJudge, judge

    settings = job.recipe.evaluation
    for name, file in (("judge", settings.judge), ("labeller", settings.labeller)):
        if file is None:
            continue
        inputs = {
            "judge": file_digest(Path(file)),
            "guided": file_digest(job.path("generations-guided.jsonl")),
            "unguided": file_digest(job.path("generations-unguided.jsonl")),
        }

        def work(name: str = name, file: str = file) -> None:
            guided = load_generations(job.path("generations-guided.jsonl"))
            unguided = load_generations(job.path("generations-unguided.jsonl"))
            save_judgements(job.path(f"judgements-{name}.jsonl"), judge(guided, unguided, WordJudge.load(Path(file))))

        job.once(f"judgements-{name}", inputs, [f"judgements-{name}.jsonl"], work)


def prompt_id(pair: Pair) -> str:
    """A short stable name for a prompt."""
    return hashlib.sha256(conversation_text(pair.prompt).encode()).hexdigest()[:12]


def _guidance(recipe: Recipe) -> Guidance:
    from coala.decoding import Guidance

    return Guidance(**recipe.guidance.model_dump())


STAGES: dict[str, Callable[[_Job], None]] = {
    "pairs": _pairs,
    "features": _features,
    "head": _head,
    "replies": _replies,
    "judgements": _judgements,
}


def align(
    recipe: Recipe, run: Run, *, on_progress: OnProgress = _silent, separate: bool | None = None
) -> dict[str, Any]:
    """Carry out ``recipe`` in ``run`` and return the report's content; finished stages are skipped.

    ``separate`` runs every stage in a process of its own (default: when the machine has an NVIDIA GPU).
    """
    recipe = recipe.located()
    run.start(recipe.model_dump(mode="json"))
    if separate is None:
        separate = Path("/proc/driver/nvidia/version").exists()
    if separate:
        for stage in STAGES:
            _in_a_process(stage, recipe, run, on_progress)
    else:
        job = _Job(recipe, run, on_progress)
        for work in STAGES.values():
            work(job)
    return make_report(run)


def _in_a_process(stage: str, recipe: Recipe, run: Run, show: OnProgress) -> None:
    context = multiprocessing.get_context("spawn")
    mine, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_work_and_tell, args=(stage, recipe, run.path, theirs))
    process.start()
    theirs.close()
    try:
        while True:
            message = mine.recv()
            if isinstance(message, CoalaError):
                raise message
            show(*message)
    except EOFError:
        process.join()
    finally:
        if process.is_alive():
            process.terminate()
            process.join()
    if process.exitcode:
        raise CoalaError(
            f"The stage {stage!r} ended with exit code {process.exitcode}"
            f"{' (killed, perhaps for lack of memory)' if process.exitcode == -9 else ''}. "
            "Finished work is kept; run the same command again to go on."
        )


def _work_and_tell(stage: str, recipe: Recipe, path: Path, pipe: Connection) -> None:
    def show(stage: str, done: float, total: float | None, note: str = "") -> None:
        pipe.send((stage, done, total, note))

    try:
        STAGES[stage](_Job(recipe, Run(path), show))
    except CoalaError as error:
        pipe.send(CoalaError(str(error)))
    finally:
        pipe.close()


# --- reading a run -----------------------------------------------------------------------------------------------


def load_run(path: Path | str) -> tuple[LanguageModel, ConvexHead, Guidance]:
    """Model, head and guidance of a finished run; refuses a model that is not the one the head was fitted on."""
    from coala.backbone import load_backbone

    run = Run.open(path)
    recipe = Recipe.model_validate(run.settings)
    head = load_head(run.path / "head")
    model = recipe.model
    backbone = load_backbone(
        model.name,
        revision=model.revision,
        template=model.template,
        device=model.device,
        dtype=model.dtype,
        trust_remote_code=model.trust_remote_code,
    )
    return backbone, head, _guidance(recipe)


def make_report(run: Run) -> dict[str, Any]:
    """Put the run's saved values together as a report, write it, and return its content (see ``coala.report``)."""
    from coala.report import write_report

    recipe = Recipe.model_validate(run.settings)
    train, held_out = load_features(run.path / "features/train"), load_features(run.path / "features/eval")
    head, fitted = load_head(run.path / "head"), load_json(run.path / "head/fit.json")
    pairs = load_pairs(run.path / "pairs-eval.jsonl")
    margins = head.score(held_out.chosen) - head.score(held_out.rejected)
    linear = np.asarray(fitted["linear"], np.float32)
    linear_margins = (held_out.chosen - held_out.rejected) @ linear[:-1]
    facts = {stage: run.facts(stage) for stage in _recorded(run)}
    lengths = [len(pair.chosen) - len(pair.rejected) for pair in pairs]
    accuracy = evaluation.accuracy_of_margins
    seconds = sum(fact["seconds"] for fact in facts.values())
    summary: dict[str, Any] = {
        "n_train": len(train),
        "n_eval": len(held_out),
        "accuracy_eval": accuracy(margins, held_out.group),
        "accuracy_train": accuracy(head.score(train.chosen) - head.score(train.rejected), train.group),
        "linear_accuracy_eval": accuracy(linear_margins, held_out.group),
        "gain_over_linear": evaluation.accuracy_difference(margins, linear_margins, held_out.group),
        "nll_eval": evaluation.pairwise_nll(margins, held_out.group),
        "certified_gap": head.certificate.get("relative_gap"),
        "statement": head.certificate.get("statement"),
        "seconds": seconds,
        "gflops": sum(fact.get("flops", 0) for fact in facts.values()) / 1e9,
    }
    content: dict[str, Any] = {
        "title": f"{Path(recipe.model.name).name}: {len(train)} pairs",
        "command": f"coala align --recipe {run.path / 'run.json'} --out NEW",
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "settings": run.settings,
        "summary": summary,
        "data_findings": facts["pairs"]["findings"],
        "head": {"certificate": head.certificate, "n_neurons": head.n_neurons, "spec": asdict(head.spec)},
        "curves": fitted["curves"],
        "path": fitted["path"],
        "scores": {"chosen": head.score(held_out.chosen), "rejected": head.score(held_out.rejected)},
        "by_length": evaluation.by_length_difference(margins, lengths, held_out.group),
        "costs": [
            {"stage": stage, **{k: fact[k] for k in ("seconds", "flops", "peak_bytes") if k in fact}}
            for stage, fact in facts.items()
        ],
    }
    replies = {name: run.path / f"generations-{name}.jsonl" for name in ("unguided", "guided")}
    if all(path.exists() for path in replies.values()):
        texts = {name: load_generations(path) for name, path in replies.items()}
        content["perplexity"] = {name: evaluation.perplexity(some) for name, some in texts.items() if some}
        prompts = {prompt_id(pair): conversation_text(pair.prompt) for pair in pairs}
        content["samples"] = [
            {
                "prompt": prompts[plain.prompt_id],
                "unguided": plain.text,
                "guided": guided.text,
                "scores": {"unguided": plain.score, "guided": guided.score},
            }
            for plain, guided in zip(texts["unguided"], texts["guided"], strict=True)
        ][:10]
    rates = []
    for name, comment in JUDGES.items():
        if (path := run.path / f"judgements-{name}.jsonl").exists():
            judgements = load_judgements(path)
            rate = evaluation.win_rate(judgements)
            rates.append({"judge": judgements[0].judge if judgements else name, "estimate": rate, "comment": comment})
            summary.setdefault("win_rate", rate) if name == "judge" else None
    content["win_rates"] = rates
    write_report(run, content)
    return content


JUDGES = {
    "judge": "an independent judge, named before any guided text was seen",
    "labeller": "the scorer that labelled the training pairs: tells whether guidance reached its goal, not more",
    "head": "the head itself: tells whether guidance reached its goal, not whether the text is better",
}


def _recorded(run: Run) -> list[str]:
    order = ("pairs", "features-train", "features-eval", "head", "replies-unguided", "replies-guided")
    return [stage for stage in order if (run.path / "stages" / f"{stage}.json").exists()]
