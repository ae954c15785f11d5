"""COMAL as run folders: a training from a model and its prompts, and a matrix of who beats whom; both resumable."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coala.callbacks import OnNote, OnProgress
from coala.comal.entrants import AnswerSampling
from coala.comal.held_out import rank_held_out
from coala.comal.inputs import examples_of, start_of
from coala.comal.named_oracles import check_oracle, oracle_of
from coala.comal.oracles import prompt_of
from coala.settings import Win
from coala.store import RunFolder, digest, discard, load_generations, save_generations, save_json, write_atomic
from coala.store.verdict_cache import open_cache
from coala.values import CoalaError, prompt_id

if TYPE_CHECKING:
    from coala.comal.entrants import Entrant
    from coala.comal.llm import LowRank
    from coala.comal.matrix import EmpiricalNash, WinRates
    from coala.comal.settings import COMALSettings

VERDICTS = "verdicts.sqlite"
PORTIONS = "portions"  # folder of answers that are not all written yet


@dataclass(frozen=True)
class ModelOptions:
    """How the model that is trained is loaded; what is None or ``auto`` is as the start says."""

    revision: str | None = None
    template: str = "auto"
    dtype: str = "float32"
    device: str = "auto"
    lora: LowRank | None = None


def train_run(
    model: str,
    prompts: Path | None,
    out: Path,
    settings: COMALSettings,
    *,
    oracle: str,
    options: ModelOptions = ModelOptions(),
    cache: Path | None = None,
    keep_policies: bool = False,
    restart: bool = False,
    on_progress: OnProgress,
    on_note: OnNote,
    on_step: Callable[[Mapping[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Train ``model`` (a folder, a hub name, or a run) towards the Nash policy of ``oracle``; what its report holds.

    ``prompts`` may be None for a COALA run, which has its own. The policy is OUT/model, the report OUT/report.html.
    Called again it resumes; verdicts are cached in ``cache``, beside OUT unless given. ``on_step`` hears the numbers of
    each step that is done, as ``log.json`` has them.
    """
    from coala.comal.llm import load_policy, require_training
    from coala.comal.loop import run_comal
    from coala.comal.report import run_page, summarise

    require_training()
    for note in settings.notes():
        on_note(str(note))
    start = start_of(model)
    if prompts is None:
        if start.run is None:
            raise CoalaError(
                "Found no prompts. Fix: pass a file of prompts after the model; only a COALA run has its own."
            )
        prompts = start.run / "pairs-train.jsonl"
    examples = examples_of(prompts)
    run = RunFolder(out)
    named = oracle_of(oracle, start.run, device=options.device)
    for remark in named.remarks:
        on_note(remark)
    template = options.template if options.template != "auto" else start.template
    revision = options.revision or start.revision
    policy = load_policy(
        start.model,
        revision=revision,
        lora=options.lora,
        device=options.device,
        template=template,
        dtype=options.dtype,
    )
    about = {
        "model": start.model,
        "revision": revision,
        "template": template,
        "dtype": options.dtype,
        "lora": None if options.lora is None else asdict(options.lora),
    }
    if restart:
        run.restart()
    with open_cache(cache or run.path.parent / VERDICTS, on_note) if named.kept else nullcontext() as keeper:
        run_comal(
            policy,
            examples,
            named.oracle,
            settings,
            run.path,
            keeper=keeper,
            on_work=lambda done, total, note: on_progress("comal", done, total, note),
            on_step=None if on_step is None else lambda step: on_step(step.log),
            about=about,
            keep_policies=keep_policies,
        )
    del policy  # its weights, of which the folder of the model holds a copy
    rank_held_out(run, start, options, [prompt_id(prompt_of(example)) for example in examples], on_progress)
    summary = {"prompts": len(examples), **named.facts, **summarise(run.path)}
    save_json(run.path / "report.json", summary)
    write_atomic(run.path / "report.html", run_page(summary, f"COMAL: {Path(start.model).name}", str(out)))
    return summary


def play_matrix(
    entrants: Sequence[str],
    prompts: Path,
    out: Path,
    *,
    oracle: str,
    sampling: AnswerSampling | None = None,
    template: str = "auto",
    mode: Win = "hard",
    device: str = "auto",
    seed: int = 0,
    cache: Path | None = None,
    restart: bool = False,
    on_progress: OnProgress,
    on_note: OnNote,
) -> tuple[WinRates, EmpiricalNash, dict[str, Any]]:
    """Every entrant's answers against every other's: win rates, the mixture that none beats, and what is saved of both.

    Writes OUT/matrix.json and OUT/matrix.html. Answers and verdicts are kept, so that entrants can be added.
    """
    from coala.comal.matrix import win_rate_matrix
    from coala.comal.report import matrix_page

    sampling = sampling or AnswerSampling()
    check_oracle(oracle)
    found = _entrants(entrants, template, device)
    examples = examples_of(prompts)
    run = RunFolder(out)
    if restart:
        run.restart()
    with run.held():
        answers = _answers(run, found, examples, sampling, seed, on_progress)
        named = oracle_of(oracle, device=device)
        for remark in named.remarks:
            on_note(remark)
        rows = [example for example in examples for _ in range(sampling.samples)]
        group = [number for number in range(len(examples)) for _ in range(sampling.samples)]
        with open_cache(cache or run.path.parent / VERDICTS, on_note) if named.kept else nullcontext() as keeper:
            rates = win_rate_matrix(
                answers,
                rows,
                named.oracle,
                mode=mode,
                group=group,
                keeper=keeper,
                tell=lambda share: on_progress("judge", share, 1.0),
            )
    nash = rates.nash()
    result: dict[str, Any] = {
        "out": str(run.path),
        "oracle": named.oracle.name,
        "mode": rates.mode,
        "prompts": len(examples),
        "samples": sampling.samples,
        "names": list(rates.names),
        "percent": rates.percent.tolist(),
        "intervals": [list(row) for row in rates.intervals],
        "average": list(rates.averages),
        "average_with_self": rates.average(include_self=True).tolist(),
        "nash": nash.mixture,
        "nash_unique": nash.unique,
        "gap": nash.gap,
        "failures": rates.failures,
        "disagreement": rates.disagreement,
        "characters": rates.characters.tolist(),
    }
    save_json(run.path / "matrix.json", result)
    each = f"{sampling.samples} answer{'s' * (sampling.samples > 1)} each"
    sentences = [
        f"{len(examples)} prompts, {each}, oracle {named.oracle.name}. Row beats column, in %, with 95 % "
        f"intervals over prompts; the mean is over the others. {rates.failures} pairs without a verdict "
        f"were left out; the oracle's two orders disagree by {rates.disagreement:.3f} on average.",
    ]
    known = [(entrant.name, entrant.how) for entrant in found]
    write_atomic(run.path / "matrix.html", matrix_page(rates, nash, "Win rates", sentences, known))
    return rates, nash, result


def _entrants(named: Sequence[str], template: str, device: str) -> list[Entrant]:
    from coala.comal.entrants import entrants_of

    found = [entrant for text in named for entrant in entrants_of(text, template, device)]
    names = [entrant.name for entrant in found]
    twice = sorted({name for name in names if names.count(name) > 1})
    if len(found) < 2 or twice:
        what = f"the name {twice[0]!r} twice" if twice else f"{len(found)} entrant"
        raise CoalaError(f"Found {what}; expected two entrants at least, by different names (NAME=ENTRANT).")
    return found


def _answers(
    run: RunFolder,
    entrants: Sequence[Entrant],
    examples: Sequence[Any],
    sampling: AnswerSampling,
    seed: int,
    on_progress: OnProgress,
) -> dict[str, list[str]]:
    """The answers of each entrant by its name; those that are kept are not drawn again."""
    from coala.comal.entrants import texts_of

    rules = {"prompts": digest([prompt_id(prompt_of(example)) for example in examples]), **asdict(sampling)}
    rules |= {"seed": seed}
    run.start({"command": "comal matrix", **rules})
    answers: dict[str, list[str]] = {}
    for number, entrant in enumerate(entrants):
        on_progress("answers", number, len(entrants), entrant.name)

        def on_reply(done: int, total: int, number: int = number, name: str = entrant.name) -> None:
            on_progress("answers", number + done / total, len(entrants), f"{name}: {done} of {total}")

        stage, file = f"answers-{entrant.name}", f"answers-{entrant.name}.jsonl"
        made = {"entrant": entrant.identity, **rules}
        if not run.done(stage, made):
            kept = run.path / PORTIONS / digest(made)[:12]
            save_generations(run.path / file, entrant.answer(examples, sampling, seed, kept, on_reply))
            run.finish(stage, made, [file])
        answers[entrant.name] = texts_of(load_generations(run.path / file), examples, sampling.samples, entrant.name)
    discard(run.path / PORTIONS)
    on_progress("answers", len(entrants), len(entrants))
    return answers
