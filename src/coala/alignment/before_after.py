"""What guidance did to a finished run's replies, and what its distilled policy keeps of it, if there is one.

The house style kept, other measures of text, and 100 questions: each is a record for the run's report, with paired
differences from unguided replies to the same prompts. Writes replies to the questions through
:mod:`coala.alignment.answers`; judges by rules alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING

from coala.alignment.answers import PromptRow, ReplySettings, answer
from coala.alignment.parts import load_parts
from coala.alignment.results import distilled_beside
from coala.evaluation.capability import Question, capability_questions
from coala.evaluation.house_style import ABOUT, RULES, rules_kept, words_of
from coala.evaluation.judges import RuleJudge
from coala.evaluation.readability import coleman_liau, grammar_faults, has_grammar_checker
from coala.report import Contrast, Evaluation, Sample, Side
from coala.statistics.intervals import mean_estimate, paired_difference, share_estimate
from coala.store import DISTILLED, RunFolder, StoreError, load_generations, load_pairs
from coala.values import prompt_id, user

if TYPE_CHECKING:
    from coala.alignment.parts import LoadParts
    from coala.report.evaluations import MeasureForm
    from coala.values import Generation

SAMPLES = 3


def contrast(name: str, sides: Mapping[str, Sequence[float]], form: MeasureForm, about: str = "") -> Contrast:
    """Values (n,) of each side on the same prompts in their order; shares of True and False, or means."""
    estimate = share_estimate if form == "share" else mean_estimate
    (first, base), *others = sides.items()
    told = [Side(side, estimate(values), paired_difference(values, base)) for side, values in others]
    return Contrast(name, [Side(first, estimate(base)), *told], form, about)


def style_evaluation(run: RunFolder, command: str = "") -> Evaluation:
    """Each rule of the house style in the run's replies to held-out prompts."""
    sides = _replies(run)
    kept = {side: [rules_kept(reply.text) for reply in some] for side, some in sides.items()}

    def of(name: str, about: str, told: Callable[[dict[str, bool]], bool]) -> Contrast:
        return contrast(name, {side: [told(row) for row in rows] for side, rows in kept.items()}, "share", about)

    most = run.settings["evaluation"]["max_new_tokens"]
    cut = [f"{side} {sum(one.n_tokens >= most for one in some)} of {len(some)}" for side, some in sides.items()]
    return Evaluation(
        kind="house style",
        of=" ".join(sides),
        title="Each rule, before and after",
        command=command,
        measures=(),
        contrasts=(
            *(of(rule, ABOUT[rule], itemgetter(rule)) for rule in RULES),
            of("all five rules", "", lambda row: all(row.values())),
        ),
        files=_files(run),
        judge={"rules": dict(ABOUT)},
        facts={f"replies cut at {most} tokens": ", ".join(cut)},
        remarks=(
            "The pairs were labelled by these same rules, so they show whether guidance reached its goal, not "
            "whether the replies are better. The next table judges by other means.",
        ),
        samples=_samples(run, sides),
    )


def text_evaluation(run: RunFolder, command: str = "") -> Evaluation:
    """The same replies by measures that the rules have no part in."""
    texts = {side: [reply.text for reply in some] for side, some in _replies(run).items()}
    n = len(texts["unguided"])
    graded = {side: [coleman_liau(text) for text in some] for side, some in texts.items()}
    known = [i for i in range(n) if all(math.isfinite(some[i]) for some in graded.values())]
    words = {side: [len(words_of(text)) for text in some] for side, some in texts.items()}
    repeated = {side: [-RuleJudge("varied").score(text) for text in some] for side, some in texts.items()}
    grades = {side: [some[i] for i in known] for side, some in graded.items()}
    found = [
        contrast("Coleman-Liau grade", grades, "plain", "lower is easier to read"),
        contrast("words", words, "plain", "of a reply"),
        contrast("repetition", repeated, "share", "three-word runs that the reply has said before"),
    ]
    remarks = [] if len(known) == n else [f"{n - len(known)} prompts got a reply without letters"]
    if has_grammar_checker():
        faults = {
            side: [100 * k / max(1, length) for k, length in zip(grammar_faults(some), words[side], strict=True)]
            for side, some in texts.items()
        }
        found.append(contrast("faults per 100 words", faults, "plain", "found by Harper, a grammar checker"))
    else:
        remarks.append("Grammar was not checked: harper-py is not installed (pip install 'coala-align[style]').")
    return Evaluation(
        kind="text",
        of=" ".join(texts),
        title="By other measures, before and after",
        command=command,
        measures=(),
        contrasts=found,
        files=_files(run),
        remarks=remarks,
    )


def capability_evaluation(
    run: RunFolder,
    *,
    tokens: int = 24,
    parts: LoadParts | None = None,
    on_progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
    command: str = "",
) -> Evaluation:
    """The run's answers to the bundled questions, unguided, guided and distilled, ``tokens`` long at most.

    Replies are kept in the run, so that a killed evaluation goes on where it was. ``parts`` are the run's, if its model
    is loaded already.
    """
    questions = capability_questions()
    asked = [PromptRow(one, one, user(q.prompt), q.topic) for one, q in zip(_names(questions), questions, strict=True)]
    parts = parts or cache(lambda: load_parts(run.path))
    sides = {}
    for side in _files(run):
        stage, guidance = f"questions, {side}", {"mode": "distilled"} if side == "distilled" else {}
        manner = ReplySettings(side != "unguided", tokens, seed=run.settings["seed"], guidance=guidance)
        sides[side] = answer(run, asked, manner, parts=parts, on_reply=partial(on_progress, stage))
    right = {
        side: [q.answered_by(reply.text) for q, reply in zip(questions, some, strict=True)]
        for side, some in sides.items()
    }
    first, shown = right["unguided"], []
    facts: dict[str, int] = {}
    for side, some in list(right.items())[1:]:
        lost = [i for i, now in enumerate(some) if first[i] and not now]
        won = [i for i, now in enumerate(some) if now and not first[i]]
        facts |= {f"lost, {side}": len(lost), f"won, {side}": len(won)}
        shown += [*lost[:SAMPLES], *won[:SAMPLES]]
    samples = [
        Sample(
            questions[i].prompt,
            {side: some[i].text for side, some in sides.items()},
            f"accepted: {', '.join(questions[i].accepts)}; "
            f"right: {', '.join(side for side, some in right.items() if some[i]) or 'none'}",
        )
        for i in dict.fromkeys(shown)
    ]
    files = {"head": run.path / "head" / "head.safetensors"}
    if "distilled" in sides:
        files["policy"] = run.path / DISTILLED / "policy.safetensors"
    return Evaluation(
        kind="capability",
        of=" ".join(sides),
        title="100 short questions, before and after",
        command=command,
        measures=(),
        contrasts=[contrast("answered right", right, "share", "the reply names an accepted answer")],
        files=files,
        settings={"questions": len(questions), "max new tokens": tokens},
        facts=facts,
        remarks=("Replies are sampled, one for each question: some change hands without any guidance.",),
        samples=samples,
    )


def _names(questions: Sequence[Question]) -> list[str]:
    return [f"question-{i:03d}" for i in range(1, len(questions) + 1)]


def _files(run: RunFolder) -> dict[str, Path]:
    """The run's replies by side, those of a distilled policy if they are of the one that is there now."""
    policy = distilled_beside(run)
    names = ["unguided", "guided", *(["distilled"] if policy.get("rows") and not policy["stale"] else [])]
    return {side: run.path / f"generations-{side}.jsonl" for side in names}


def _replies(run: RunFolder) -> dict[str, list[Generation]]:
    """The run's replies to the same prompts, by side."""
    files = _files(run)
    if not all(path.is_file() for path in files.values()):
        raise StoreError(f"{run.path}: has no guided and unguided replies yet. Fix: finish it with `coala align`.")
    sides = {side: load_generations(path) for side, path in files.items()}
    if len({tuple(reply.prompt_id for reply in some) for some in sides.values()}) > 1:
        raise StoreError(
            f"{run.path}: its files of generations answer different prompts. Fix: delete them and align again."
        )
    return sides


def _samples(run: RunFolder, sides: Mapping[str, Sequence[Generation]]) -> list[Sample]:
    """The prompts on which guidance gained most rules, and those on which it lost most, if it lost any."""
    prompts = {prompt_id(pair.prompt): pair.prompt for pair in load_pairs(run.path / "pairs-eval.jsonl")}
    rows = []
    for replies in zip(*sides.values(), strict=True):
        kept = [[name for name, yes in rules_kept(reply.text).items() if yes] for reply in replies]
        said = "; ".join(f"{side} keeps {', '.join(some) or 'none'}" for side, some in zip(sides, kept, strict=True))
        texts = {side: reply.text for side, reply in zip(sides, replies, strict=True)}
        rows.append((len(kept[1]) - len(kept[0]), Sample(prompts[replies[0].prompt_id], texts, said)))
    rows.sort(key=lambda row: -row[0])
    told = rows[:SAMPLES] + [row for row in rows[SAMPLES:][-SAMPLES:] if row[0] < 0]
    return [sample for _, sample in told]
