"""What guidance did to a finished run's replies: the house style kept, other measures of text, and what it cost.

Each is a record for the run's report, with paired differences over the same prompts. Writes replies to the capability
questions through :mod:`coala.alignment.answers`; judges by rules alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from coala.alignment.answers import PromptRow, ReplySettings, answer
from coala.evaluation.capability import Question, capability_questions
from coala.evaluation.house_style import ABOUT, RULES, rules_kept, words_of
from coala.evaluation.judges import RuleJudge
from coala.evaluation.readability import coleman_liau, grammar_faults, has_grammar_checker
from coala.report import Contrast, Evaluation, Sample
from coala.statistics.intervals import mean_estimate, paired_difference, share_estimate
from coala.store import RunFolder, StoreError, load_generations, load_pairs
from coala.values import prompt_id, user

if TYPE_CHECKING:
    from coala.report.evaluations import MeasureForm
    from coala.values import Generation

SAMPLES = 3


def contrast(name: str, sides: Sequence[Sequence[float]], form: MeasureForm, about: str = "") -> Contrast:
    """Values (n,) before and after, on the same prompts in their order; shares of True and False, or means."""
    before, after = sides
    estimate = share_estimate if form == "share" else mean_estimate
    return Contrast(name, estimate(before), estimate(after), paired_difference(after, before), form, about)


def style_evaluation(run: RunFolder, command: str = "") -> Evaluation:
    """Each rule of the house style in the run's unguided and guided replies to held-out prompts."""
    sides = _replies(run)
    kept = [[rules_kept(reply.text) for reply in side] for side in sides]
    rules = [contrast(rule, [[row[rule] for row in side] for side in kept], "share", ABOUT[rule]) for rule in RULES]
    every = contrast("all five rules", [[all(row.values()) for row in side] for side in kept], "share")
    most = run.settings["evaluation"]["max_new_tokens"]
    cut = [sum(reply.n_tokens >= most for reply in side) for side in sides]
    return Evaluation(
        kind="house style",
        of="guided unguided",
        title="Each rule, before and after",
        command=command,
        measures=(),
        contrasts=(*rules, every),
        files=_files(run),
        judge={"rules": dict(ABOUT)},
        facts={f"replies cut at {most} tokens": f"unguided {cut[0]} of {len(sides[0])}, guided {cut[1]}"},
        remarks=(
            "The pairs were labelled by these very rules: what they count says whether guidance reached its goal, not "
            "whether the replies are better. The next table judges by other means.",
        ),
        samples=_samples(run, sides),
    )


def text_evaluation(run: RunFolder, command: str = "") -> Evaluation:
    """The same replies by measures that the rules have no part in."""
    sides = _replies(run)
    texts = [[reply.text for reply in side] for side in sides]
    graded = [[coleman_liau(text) for text in side] for side in texts]
    both = [i for i in range(len(sides[0])) if all(math.isfinite(side[i]) for side in graded)]
    words = [[len(words_of(text)) for text in side] for side in texts]
    repeated = [[-RuleJudge("varied").score(text) for text in side] for side in texts]
    grades = [[side[i] for i in both] for side in graded]
    found = [
        contrast("Coleman-Liau grade", grades, "plain", "lower is easier to read"),
        contrast("words", words, "plain", "of a reply"),
        contrast("repetition", repeated, "share", "three-word runs that the reply has said before"),
    ]
    remarks = [] if len(both) == len(sides[0]) else [f"{len(sides[0]) - len(both)} prompts got a reply without letters"]
    if has_grammar_checker():
        faults = [
            [100 * n / max(1, k) for n, k in zip(grammar_faults(side), counts, strict=True)]
            for side, counts in zip(texts, words, strict=True)
        ]
        found.append(contrast("faults per 100 words", faults, "plain", "found by Harper, a grammar checker"))
    else:
        remarks.append("Grammar was not checked: harper-py is not installed (pip install 'coala-align[style]').")
    return Evaluation(
        kind="text",
        of="guided unguided",
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
    on_progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
    command: str = "",
) -> Evaluation:
    """The run's answers to the bundled questions, unguided and guided, ``tokens`` long at most.

    Replies are kept in the run, so that a killed evaluation goes on where it was.
    """
    questions = capability_questions()
    asked = [PromptRow(one, one, user(q.prompt), q.topic) for one, q in zip(_names(questions), questions, strict=True)]
    sides = []
    for guided in (False, True):
        stage = f"questions, {'guided' if guided else 'unguided'}"
        manner = ReplySettings(guided=guided, max_new_tokens=tokens, seed=run.settings["seed"])
        sides.append(
            answer(run, asked, manner, on_reply=lambda done, total, stage=stage: on_progress(stage, done, total))  # type: ignore[misc]
        )
    right = [[q.answered_by(reply.text) for q, reply in zip(questions, side, strict=True)] for side in sides]
    lost = [i for i in range(len(questions)) if right[0][i] and not right[1][i]]
    won = [i for i in range(len(questions)) if right[1][i] and not right[0][i]]
    samples = [
        Sample(
            questions[i].prompt,
            {"unguided": sides[0][i].text, "guided": sides[1][i].text},
            f"accepted: {', '.join(questions[i].accepts)}; {'lost' if i in lost else 'won'} by guidance",
        )
        for i in (*lost[:SAMPLES], *won[:SAMPLES])
    ]
    return Evaluation(
        kind="capability",
        of="guided unguided",
        title="100 short questions, before and after",
        command=command,
        measures=(),
        contrasts=[contrast("answered right", right, "share", "the reply names an accepted answer")],
        files={"head": run.path / "head" / "head.safetensors"},
        settings={"questions": len(questions), "max new tokens": tokens},
        facts={"lost by guidance": len(lost), "won by guidance": len(won)},
        remarks=("Replies are sampled, one for each question: some change hands without any guidance.",),
        samples=samples,
    )


def _names(questions: Sequence[Question]) -> list[str]:
    return [f"question-{i:03d}" for i in range(1, len(questions) + 1)]


def _files(run: RunFolder) -> dict[str, Path]:
    return {side: run.path / f"generations-{side}.jsonl" for side in ("unguided", "guided")}


def _replies(run: RunFolder) -> tuple[list[Generation], list[Generation]]:
    """The run's unguided and guided replies to the same prompts."""
    files = _files(run)
    if not all(path.is_file() for path in files.values()):
        raise StoreError(f"{run.path}: has no guided and unguided replies yet. Finish it with `coala align`.")
    before, after = (load_generations(path) for path in files.values())
    return before, after


def _samples(run: RunFolder, sides: tuple[Sequence[Generation], Sequence[Generation]]) -> list[Sample]:
    """The prompts on which guidance gained most rules, and those on which it lost most, if it lost any."""
    prompts = {prompt_id(pair.prompt): pair.prompt for pair in load_pairs(run.path / "pairs-eval.jsonl")}
    rows = []
    for before, after in zip(*sides, strict=True):
        kept = [[name for name, yes in rules_kept(reply.text).items() if yes] for reply in (before, after)]
        said = f"unguided keeps {', '.join(kept[0]) or 'none'}; guided keeps {', '.join(kept[1]) or 'none'}"
        rows.append((len(kept[1]) - len(kept[0]), prompts[before.prompt_id], before.text, after.text, said))
    rows.sort(key=lambda row: -row[0])
    told = rows[:SAMPLES] + [row for row in rows[SAMPLES:][-SAMPLES:] if row[0] < 0]
    return [Sample(prompt, {"unguided": before, "guided": after}, said) for _, prompt, before, after, said in told]
