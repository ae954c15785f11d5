"""The survey as a value: questions with one answer per method, attention checks, and rules fixed before any answer.

Built from generations of several methods to the same prompts. Knows nothing of raters, pages or statistics.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from coala.store import digest, load_json, save_json
from coala.values import CoalaError, Generation, Turn, conversation_text

FORMAT = 1
FILE = "survey.json"
MOST_METHODS = 26  # an answer is named by one letter
PER_CATEGORY = 25  # as in the COALA paper, Appendix G
TITLE = "Which answer is best?"
ASK = "Which answer is best?"
CONSENT = """You are asked to compare texts written by computer programs.

On each page you read one prompt and several answers to it, and choose the answer you think is best. You can stop at \
any time and come back later by the personal link shown on the next pages.

What is saved: your choices and the time each took. Your answers may be published in summary or row by row, without \
anything that shows who you are beyond what you enter on this page. Taking part is voluntary; each question \
has a link to withdraw, which deletes everything you entered."""
# One word of each kind: of the answers of a check, exactly one is of the kind asked for.
WORDS = {
    "a metal": ("copper", "silver", "iron", "tin"),
    "an animal": ("otter", "camel", "sparrow", "goat"),
    "a fruit": ("pear", "cherry", "mango", "plum"),
    "a colour": ("purple", "yellow", "green", "white"),
    "a month": ("March", "August", "October", "June"),
    "a number": ("seventeen", "forty", "nine", "eleven"),
    "a tool": ("hammer", "saw", "spanner", "chisel"),
    "a musical instrument": ("violin", "trumpet", "drum", "flute"),
}


Said = str | tuple[Turn, ...]  # a prompt: a text, or a conversation of several turns


@dataclass(frozen=True)
class SurveyPrompt:
    """A prompt that generations refer to by ``prompt_id``."""

    prompt_id: str
    said: Said
    category: str


@dataclass(frozen=True)
class SurveyQuestion:
    """A prompt and one answer per method, in the order of the survey's methods."""

    prompt_id: str
    category: str
    prompt: Said
    answers: tuple[str, ...]


@dataclass(frozen=True)
class Check:
    """A question with one right answer, ``answers[right]``: who reads, passes."""

    prompt: str
    answers: tuple[str, ...]
    right: int


@dataclass(frozen=True)
class Survey:
    """All that raters are asked and all that decides whose answers count.

    ``asks`` holds the sentence above the answers for each category, in the order of categories. Each rater sees
    ``repeats`` questions of each category a second time. Who fails more than ``max_failed_checks`` checks, or whose
    median time for a question is below ``min_seconds``, is left out. ``fields`` names what the first page asks about
    a rater (nothing by default).
    """

    title: str
    methods: tuple[str, ...]
    asks: Mapping[str, str]
    questions: tuple[SurveyQuestion, ...]
    checks: tuple[Check, ...] = ()
    repeats: int = 0
    consent: str = CONSENT
    fields: tuple[str, ...] = ()
    max_failed_checks: int = 0
    min_seconds: float = 0.0
    seed: int = 0
    remarks: tuple[str, ...] = field(default=(), compare=False)

    def __post_init__(self) -> None:
        _validate(self)

    @property
    def categories(self) -> tuple[str, ...]:
        return tuple(self.asks)

    @cached_property
    def digest(self) -> str:
        """Names this survey: answers to another are refused. It also keys the order of each ballot."""
        return digest({name: value for name, value in asdict(self).items() if name != "remarks"})

    def of_category(self, category: str) -> list[int]:
        """Numbers of the category's questions."""
        return [i for i, question in enumerate(self.questions) if question.category == category]


def build(
    generations: Mapping[str, Sequence[Generation]],
    prompts: Sequence[SurveyPrompt],
    *,
    asks: Mapping[str, str] | None = None,
    per_category: int = PER_CATEGORY,
    repeats: int = 0,
    checks: int = 0,
    own_checks: Sequence[Check] = (),
    seed: int = 0,
    **settings: Any,
) -> Survey:
    """A survey of ``per_category`` questions per category that every method of ``generations`` answered.

    Drawn at random by ``seed`` among the prompts that all methods answered; 0 takes all of them. A prompt to which two
    methods gave the same text is left out, as a choice between the two says nothing; ``remarks`` counts them.
    ``checks`` attention checks are made, beside ``own_checks``. ``settings`` are fields of :class:`Survey`.

    Raises:
        CoalaError: for too few methods or matching prompts, a prompt answered twice, unknown categories.
    """
    texts = {method: _by_prompt(method, replies) for method, replies in generations.items()}
    if len(texts) < 2:
        raise CoalaError(f"Found generations of {len(texts)} method; a survey compares at least two.")
    known = {prompt.prompt_id: prompt for prompt in prompts}
    if len(known) < len(prompts):
        twice = next(p.prompt_id for i, p in enumerate(prompts) if p.prompt_id in {q.prompt_id for q in prompts[:i]})
        raise CoalaError(f"The prompts hold id {twice!r} twice; expected each once. Remove one of the rows.")
    remarks = []
    everywhere = set.intersection(*(set(some) for some in texts.values()))
    lacking = {method: len(set.union(*(set(s) for s in texts.values())) - set(some)) for method, some in texts.items()}
    if any(lacking.values()):
        missed = ", ".join(f"{method} lacks {count}" for method, count in lacking.items() if count)
        remarks.append(f"prompts that not all methods answered are left out ({missed})")
    if unknown := sorted(everywhere - set(known)):
        raise CoalaError(
            f"{len(unknown)} of {len(everywhere)} prompts that all methods answered have no text, the first "
            f"{unknown[0]!r}; expected a row of the prompts file for each. Give the file the replies were made from."
        )
    alike = {i for i in everywhere if len({some[i] for some in texts.values()}) < len(texts)}
    if alike:
        remarks.append(f"{len(alike)} prompts to which two methods gave the same text are left out")
    usable = [prompt for prompt in prompts if prompt.prompt_id in everywhere - alike]
    categories = list(dict.fromkeys(prompt.category for prompt in prompts))
    if stray := sorted(set(asks or {}) - set(categories)):
        raise CoalaError(f"A sentence is given for category {stray[0]!r}; the prompts are of {_listed(categories)}.")
    rng = np.random.default_rng(seed)
    chosen: list[SurveyQuestion] = []
    for category in categories:
        some = [prompt for prompt in usable if prompt.category == category]
        if len(some) < max(per_category, 1):
            raise CoalaError(
                f"Category {category!r} has {len(some)} prompts that all of {_listed(list(texts))} answered, each "
                f"differently; expected {max(per_category, 1)}. Generate more replies, check that the files are of the "
                "same prompts, or ask for fewer questions per category."
            )
        drawn = sorted(rng.permutation(len(some))[: per_category or len(some)].tolist())
        for prompt in (some[i] for i in drawn):
            answers = tuple(texts[method][prompt.prompt_id] for method in texts)
            chosen.append(SurveyQuestion(prompt.prompt_id, category, _clean_prompt(prompt.said), answers))
    made = tuple(make_checks(checks, len(texts), rng))
    return Survey(
        methods=tuple(texts),
        asks={category: (asks or {}).get(category, ASK) for category in categories},
        questions=tuple(chosen),
        checks=made + tuple(own_checks),
        repeats=repeats,
        seed=seed,
        remarks=tuple(remarks),
        **({"title": TITLE} | settings),
    )


def make_checks(n: int, n_answers: int, rng: np.random.Generator) -> list[Check]:
    """``n`` attention checks of at most ``n_answers`` answers, each of which names a word of another kind."""
    kinds = list(WORDS)
    most = len(kinds) * len(WORDS[kinds[0]])
    if n < 0 or n > most:
        raise CoalaError(f"Found {n} attention checks; expected from 0 to {most}.")
    made = []
    for number in range(n):
        asked = kinds[number % len(kinds)]
        others = [kind for kind in kinds if kind != asked]
        drawn = [others[i] for i in rng.permutation(len(others))[: n_answers - 1]]
        round_ = number // len(kinds)  # later rounds use other words
        words = [WORDS[kind][(round_ + int(rng.integers(2))) % 4] for kind in (asked, *drawn)]
        order = rng.permutation(len(words)).tolist()
        made.append(
            Check(
                f"This page checks that answers are read. Please choose the answer that names {asked}.",
                tuple(f"Only one word of this answer matters, and that word is {words[i]}." for i in order),
                order.index(0),
            )
        )
    return made


def clean(text: str) -> str:
    """``text`` as shown: no white space around it or at the ends of lines, no control characters.

    What cannot be seen must not tell methods apart; joiners of letters and of emoji stay, as they change what is seen.
    """
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    return "\n".join("".join(filter(_is_shown, line)).rstrip() for line in lines).strip()


def _clean_prompt(said: Said) -> Said:
    return clean(said) if isinstance(said, str) else tuple(Turn(turn.role, clean(turn.text)) for turn in said)


def said_text(said: Said) -> str:
    """A prompt as one text."""
    return said if isinstance(said, str) else conversation_text(said)


def _is_shown(character: str) -> bool:
    return character.isprintable() or character in "\t\u200c\u200d" or unicodedata.category(character) == "Zs"


def save_survey(folder: Path, survey: Survey) -> Path:
    """Write ``survey.json`` into ``folder`` and return its path."""
    path = Path(folder) / FILE
    # A list of pairs keeps the order of categories, which a JSON object with sorted keys would lose.
    content = asdict(survey) | {"asks": list(survey.asks.items()), "format": FORMAT, "digest": survey.digest}
    save_json(path, content)
    return path


def load_survey(folder: Path) -> Survey:
    """Read what :func:`save_survey` wrote; a file that was changed by hand since is refused."""
    path = Path(folder) / FILE
    if not path.exists():
        raise CoalaError(f"{folder}: is not a survey (it has no {FILE}). Make one with `coala survey build`.")
    row = load_json(path)
    if not isinstance(row, dict) or row.get("format") != FORMAT:
        raise CoalaError(f"{path}: is not a survey of format {FORMAT}. Build it again.")
    recorded = row.pop("digest", None)
    row.pop("format")
    try:
        survey = Survey(
            **row
            | {
                "asks": dict(row["asks"]),
                "methods": tuple(row["methods"]),
                "fields": tuple(row["fields"]),
                "remarks": tuple(row["remarks"]),
                "questions": tuple(
                    SurveyQuestion(**q | {"answers": tuple(q["answers"]), "prompt": _read_prompt(q["prompt"])})
                    for q in row["questions"]
                ),
                "checks": tuple(Check(**c | {"answers": tuple(c["answers"])}) for c in row["checks"]),
            }
        )
    except (KeyError, TypeError, ValueError) as error:
        raise CoalaError(f"{path}: is not a whole survey ({error}). Build it again.") from None
    if survey.digest != recorded:
        raise CoalaError(
            f"{path}: was changed after it was built; answers given to the one would be counted for the other. "
            "Put the old file back, or build another survey."
        )
    return survey


def _read_prompt(found: Any) -> Said:
    return found if isinstance(found, str) else tuple(Turn(**turn) for turn in found)


def _by_prompt(method: str, replies: Sequence[Generation]) -> dict[str, str]:
    found: dict[str, str] = {}
    for reply in replies:
        if reply.prompt_id in found:
            raise CoalaError(
                f"Method {method!r} answers prompt {reply.prompt_id!r} twice; expected one reply per prompt. "
                "Give one file per method and seed."
            )
        found[reply.prompt_id] = clean(reply.text)
    return found


def _validate(survey: Survey) -> None:
    m = len(survey.methods)
    if not 2 <= m <= MOST_METHODS or len(set(survey.methods)) < m or not all(survey.methods):
        raise CoalaError(
            f"Found methods {_listed(survey.methods)}; expected 2 to {MOST_METHODS} different names that are not empty."
        )
    if not survey.questions or not survey.asks:
        raise CoalaError("A survey needs at least one question.")
    for question in survey.questions:
        if len(question.answers) != m or question.category not in survey.asks:
            raise CoalaError(
                f"Question {question.prompt_id!r} has {len(question.answers)} answers and category "
                f"{question.category!r}; expected {m} answers and one of {_listed(survey.categories)}."
            )
    for check in survey.checks:
        if not 2 <= len(check.answers) <= MOST_METHODS or not 0 <= check.right < len(check.answers):
            raise CoalaError(
                f"The check {check.prompt[:60]!r} has {len(check.answers)} answers of which number {check.right} is "
                f"right; expected 2 to {MOST_METHODS}, the right one among them (counted from 0)."
            )
    most = min(len(survey.of_category(category)) // 2 for category in survey.categories)
    if not 0 <= survey.repeats <= most:
        raise CoalaError(
            f"Found {survey.repeats} repeated questions per category; expected 0 to {most}, half of the smallest "
            "category, so that a repeat never follows close upon the first time."
        )
    if survey.max_failed_checks < 0 or not 0 <= survey.min_seconds < float("inf"):
        raise CoalaError(
            f"Found at most {survey.max_failed_checks} failed checks and at least {survey.min_seconds} seconds; "
            "expected numbers from 0."
        )
    if not survey.consent.strip() or not survey.title.strip():
        raise CoalaError("The title or the consent text is empty; raters must know what they agree to.")


def _listed(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names)) or "none"
