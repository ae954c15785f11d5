"""What the reader of a report does next: whether head and guidance are worth it, and the commands of this very run."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from coala.pages.parts import Part, element
from coala.pages.parts import step as step_of_page
from coala.pages.parts import steps as steps_of_page
from coala.pages.words import Interval
from coala.report.content import mapping_of, rows_of

Verdict = Literal["yes", "no", "open"]
FEW = 3  # names of files that a command repeats


@dataclass(frozen=True)
class Step:
    """A question of the reader's, its answer in a word and in a sentence, and commands with what each is for."""

    question: str
    word: str
    answer: str
    commands: tuple[tuple[str, str], ...] = ()
    verdict: Verdict = "open"


def steps(content: Mapping[str, Any]) -> list[Step]:
    """The steps of a plain content; none where nothing was fitted."""
    if not content.get("head"):
        return []
    run = shlex.quote(str(content.get("run") or "RUN"))
    head, guidance = _head(content, run), _guidance(content, run)
    return [head, guidance, _use(content, run, head.verdict, guidance.verdict)]


def shown(content: Mapping[str, Any]) -> Part:
    """The steps as the page sets them."""
    told = []
    for step in steps(content):
        word = element("span", step.word, class_=f"verdict {step.verdict}") if step.word else None
        answer = step.answer.replace(" %", "\N{NO-BREAK SPACE}%")
        told.append(step_of_page(step.question, word, answer, commands=step.commands))
    return steps_of_page(*told)


def _head(content: Mapping[str, Any], run: str) -> Step:
    asked = "Is the head better than chance?"
    accuracy = Interval(mapping_of(content.get("summary")).get("accuracy_eval"))
    if not accuracy:
        return Step(asked, "Not measured.", "No pair was held out.")
    found = f"It ranks {accuracy.percent()} of {accuracy.n:,} held-out pairs right"
    look = f"coala influence {run}", "Which pairs help, and which look swapped."
    if accuracy.above(0.5):
        return Step(asked, "Yes.", f"{found}; chance is 50 %.", verdict="yes")
    if accuracy.below(0.5):
        return Step(asked, "No, worse.", f"{found}. Check for swapped replies first.", (look,), "no")
    files = mapping_of(content.get("settings")).get("pairs") or []
    named = shlex.join(map(str, files)) if 0 < len(files) <= FEW else "PAIRS..."
    more = f"coala align {named} MORE.jsonl --recipe {run}/run.json --out NEW", "The same run with more pairs."
    return Step(asked, "Not shown.", f"{found}, and the interval includes 50 %. Add pairs to decide.", (more, look))


def _guidance(content: Mapping[str, Any], run: str) -> Step:
    asked = "Is guidance worth it?"
    head, settings = mapping_of(content.get("head")), mapping_of(mapping_of(content.get("settings")).get("guidance"))
    if head.get("least_slope") == 0 and settings.get("rule") == "calibrated":
        told = "Cross-validation cannot distinguish the head from chance, so replies stay unguided."
        return Step(asked, "No.", told, verdict="no")
    rates = [(judge, rate) for judge, given in _judged(content) if (rate := Interval(given))]
    if not rates:
        ways = (
            (f"coala eval judge {run} --judge rule:NAME", "A rule, words:FILE, or head:OTHER_RUN judges."),
            (f"coala eval judge {run} --model MODEL", "A chat model at an endpoint judges."),
        )
        return Step(asked, "Not measured.", "No judge compared guided with unguided replies.", ways)
    judge, rate = rates[0]
    found = f"By {judge} the guided reply is preferred in {rate.percent()} of {rate.n:,} comparisons"
    cost = _cost(mapping_of(content.get("perplexity")))
    if rate.above(0.5):
        return Step(asked, "Yes.", f"{found}{cost}.", verdict="yes")
    if rate.below(0.5):
        return Step(asked, "No.", f"{found}{cost}.", verdict="no")
    return Step(asked, "Not shown.", f"{found}; the interval includes 50 %{cost}. Add held-out prompts to decide.")


def _judged(content: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Who compared guided with unguided replies, and how often guided won: in the run itself, then later."""
    for row in rows_of(content.get("win_rates")):
        yield str(row.get("judge") or "the judge"), row.get("estimate")
    for row in reversed(rows_of(content.get("evaluations"))):
        sides, _, judge = str(row.get("title")).partition(", judged by ")
        if sides == "guided against unguided" and not row.get("stale") and not row.get("changed"):
            yield judge, next((one.get("estimate") for one in rows_of(row.get("figures"))), None)


def _cost(both: Mapping[str, Any]) -> str:
    """What it does to perplexity, where the two intervals are apart."""
    before, after = (Interval(both.get(name)) for name in ("unguided", "guided"))
    if not before or not after or not (after.above(before.high) or after.below(before.low)):
        return ""
    return f", at a perplexity {100 * (after.value / before.value - 1):+.0f} %"


def _use(content: Mapping[str, Any], run: str, head: Verdict, guidance: Verdict) -> Step:
    talk = f"coala chat {run}", "Then type /compare on: plain and guided replies side by side."
    if "no" in (head, guidance) or "yes" not in (head, guidance):
        told = "No figure here supports serving it. Chat with it and judge for yourself."
        return Step("How is it served?", "Not yet.", told, (talk,))
    distilled = mapping_of(content.get("distilled"))
    ready = bool(distilled.get("rows")) and not distilled.get("stale")
    fast = []
    if ready:
        fast.append((f"coala serve {run} --mode distilled", "As fast as the plain model."))
    elif guidance == "yes":
        out = shlex.quote(f"{content.get('run') or 'RUN'}-served")
        what = f"coala distil {run} --to checkpoint --out {out}"
        fast.append((what, "Ordinary weights, for vLLM, transformers, llama.cpp."))
    serve = f"coala serve {run}", "The OpenAI protocol, and a playground at its first page."
    told = "Chat with it, or serve it at an address."
    return Step("How is it served?", "", told, (talk, serve, *fast), "yes")
