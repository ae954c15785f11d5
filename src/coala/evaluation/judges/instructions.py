"""What a judge is told and how its answer is read: a folder of data, or a published file of prompt templates.

A folder holds `judge.yaml` and the templates it names. Knows nothing of endpoints.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, cast, get_args

from coala.documents import DocumentError, parse_yaml
from coala.evaluation.judges.protocol import JudgeStopped
from coala.evaluation.rows import FileRow, read_rows, shown
from coala.values import CoalaError

JudgeMode = Literal["pairwise", "weighted", "grade", "arena"]
Parser = Literal["brackets", "json", "token"]
SHIPPED = ("pairwise", "weighted", "grade", "arena")
ARENA_LABELS = ("A>>B", "A>B", "A=B", "B>A", "B>>A")
_PARSERS: Mapping[JudgeMode, tuple[Parser, ...]] = {
    "pairwise": ("brackets", "json"),
    "weighted": ("token",),
    "grade": ("brackets", "json"),
    "arena": ("brackets", "json"),
}
_LABELS: Mapping[JudgeMode, tuple[str, ...]] = {
    "pairwise": ("A", "B", "C"),
    "weighted": ("m", "M"),
    "grade": (),
    "arena": ARENA_LABELS,
}
_SAMPLING = {
    "temperature": (int, float),
    "top_p": (int, float),
    "max_tokens": (int,),
    "max_completion_tokens": (int,),
    "seed": (int,),
    "top_logprobs": (int,),
    "reasoning_effort": (str,),
}
_PLACE = re.compile(r"\{([a-z_0-9]+)\}")
_PLACES = {
    *("question", "question_1", "question_2", "ref_answer_1", "ref_answer_2"),
    *("answer", "answer_1", "answer_2"),
    *(f"answer_{side}{turn}" for side in "ab" for turn in ("", "_1", "_2")),
}


@dataclass(frozen=True)
class Exchange:
    """What a judge is shown: one or two ``questions``, the ``answers`` of one or two sides to each, and ``references``.

    ``answers[side][turn]``; ``references`` by turn, empty where there are none.
    """

    questions: tuple[str, ...]
    answers: tuple[tuple[str, ...], ...]
    references: tuple[str, ...] = ()

    def places(self) -> dict[str, str]:
        """Text by placeholder; a side's name is part of it only where there are two sides."""
        many = len(self.questions) > 1
        found = {f"question_{i}" if many else "question": text for i, text in enumerate(self.questions, 1)}
        found |= {f"ref_answer_{i}": text for i, text in enumerate(self.references, 1)}
        for side, texts in zip(("_a", "_b") if len(self.answers) > 1 else ("",), self.answers, strict=True):
            found |= {f"answer{side}_{i}" if many else f"answer{side}": text for i, text in enumerate(texts, 1)}
        return found


@dataclass(frozen=True)
class JudgePrompt:
    """Templates for exchanges of ``turns`` questions, with reference answers or without; ``name`` is told in results.

    Placeholders are ``{question}``, ``{answer_a}`` and ``{answer_b}`` (``{answer}`` when grading), and for two turns
    the same with ``_1`` and ``_2``; ``{ref_answer_1}``, ``{ref_answer_2}``. Other braces are text.
    """

    name: str
    system: str
    user: str
    turns: int = 1
    reference: bool = False

    def fill(self, exchange: Exchange) -> list[dict[str, str]]:
        """The messages. All places are filled in one pass, so that a reply that holds ``{answer_b}`` stays itself."""
        places = exchange.places()

        def text(match: re.Match[str]) -> str:
            return places.get(match[1], match[0])

        messages = [{"role": "system", "content": _PLACE.sub(text, self.system)}] if self.system.strip() else []
        return [*messages, {"role": "user", "content": _PLACE.sub(text, self.user)}]


@dataclass(frozen=True)
class Instructions:
    """All that makes two judges of one model differ: templates, sampling, and how the answer is read.

    ``mode``: ``pairwise`` (A, B or a tie), ``weighted`` (one token, its log-probabilities), ``grade`` (1 to 10) or
    ``arena`` (five steps). ``parser``: ``brackets``, ``json`` (a JSON schema is sent, the answer is one object) or
    ``token``. ``labels``: what stands for first, second and tie; for the five steps; for grades nothing. ``model`` is
    the one the folder was written for, if any.
    """

    name: str
    mode: JudgeMode
    prompts: tuple[JudgePrompt, ...]
    parser: Parser = "brackets"
    labels: tuple[str, ...] = ()
    sampling: Mapping[str, Any] = field(default_factory=dict)
    model: str = ""

    def __post_init__(self) -> None:
        if self.mode not in _PARSERS:
            raise self._fault(f"mode is {shown(self.mode)}; expected one of {', '.join(_PARSERS)}")
        if self.parser not in _PARSERS[self.mode]:
            raise self._fault(
                f"parser is {shown(self.parser)}; mode {self.mode} can be read by {' or '.join(_PARSERS[self.mode])}"
            )
        usual = _LABELS[self.mode]
        labels = tuple(self.labels) or usual
        if len(labels) != len(usual) or len(set(labels)) < len(labels) or not all(labels):
            raise self._fault(f"labels are {list(labels)}; mode {self.mode} needs {len(usual)} different ones")
        if self.parser == "brackets" and labels != usual:
            raise self._fault(f"labels are {list(labels)}; in brackets they are {', '.join(usual) or 'none'}")
        object.__setattr__(self, "labels", labels)
        for name, value in self.sampling.items():
            kinds = _SAMPLING.get(name)
            if kinds is None:
                raise self._fault(f"sampling has {shown(name)}; expected some of {', '.join(_SAMPLING)}")
            if isinstance(value, bool) or not isinstance(value, kinds):
                raise self._fault(f"sampling has {name}: {shown(value)}; expected {kinds[-1].__name__}")
        self._check_prompts()

    def _check_prompts(self) -> None:
        if not self.prompts:
            raise self._fault("there is no prompt; expected one at least")
        seen: dict[tuple[int, bool], str] = {}
        sides = ("",) if self.mode == "grade" else ("_a", "_b")
        for prompt in self.prompts:
            other = seen.setdefault((prompt.turns, prompt.reference), prompt.name)
            if other != prompt.name or prompt.turns not in (1, 2):
                raise self._fault(
                    f"prompts {other!r} and {prompt.name!r} are both for {prompt.turns} turns "
                    f"{'with' if prompt.reference else 'without'} reference; expected one of each kind, of 1 or 2 turns"
                )
            there = set(_PLACE.findall(prompt.system + prompt.user)) & _PLACES
            turns = ("",) if prompt.turns == 1 else ("_1", "_2")
            needed = {f"{name}{turn}" for turn in turns for name in ("question", *(f"answer{s}" for s in sides))}
            needed |= {"ref_answer_1"} if prompt.reference else set()
            allowed = needed | ({"ref_answer_2"} if prompt.reference and prompt.turns == 2 else set())
            if missing := sorted(needed - there):
                raise self._fault(f"prompt {prompt.name!r} lacks {{{missing[0]}}}; expected every part of the exchange")
            if surplus := sorted(there - allowed):
                raise self._fault(f"prompt {prompt.name!r} has {{{surplus[0]}}}, for which this mode has no text")

    def _fault(self, said: str) -> CoalaError:
        return CoalaError(f"Judge {self.name!r}: {said}. Fix the judge's file.")

    @property
    def digest(self) -> str:
        """SHA-256 of everything but the name."""
        parts = {
            item.name: [vars(p) for p in self.prompts] if item.name == "prompts" else getattr(self, item.name)
            for item in fields(self)
            if item.name != "name"
        }
        plain = json.dumps(parts, sort_keys=True, default=dict)
        return hashlib.sha256(plain.encode("utf-8", "surrogatepass")).hexdigest()

    def prompt_for(self, exchange: Exchange) -> JudgePrompt:
        """The template for this many turns, the one with references if the exchange has them and there is one."""
        turns = len(exchange.questions)
        full = len(exchange.references) >= turns
        fitting = [p for p in self.prompts if p.turns == turns and (full or not p.reference)]
        if not fitting:
            raise JudgeStopped(
                f"Judge {self.name!r} has no prompt for {turns} turns "
                f"{'with' if full else 'without'} reference answers. Add one to the folder, or name another judge."
            )
        return max(fitting, key=lambda p: p.reference)

    def schema(self) -> dict[str, Any] | None:
        """The JSON schema of the answer, for endpoints that hold a model to one; None for the other parsers."""
        if self.parser != "json":
            return None
        verdict = (
            {"rating": {"type": "number", "minimum": 1, "maximum": 10}}
            if self.mode == "grade"
            else {"verdict": {"type": "string", "enum": list(self.labels)}}
        )
        properties = {"reason": {"type": "string"}, **verdict}
        return {
            "type": "object",
            "properties": properties,
            "required": list(properties),
            "additionalProperties": False,
        }


def read_instructions(source: Path | str, *, kind: Literal["pairwise", "single"] = "pairwise") -> Instructions:
    """A judge by the name of a shipped one, its folder, or a file of templates in the form MT-Bench published.

    Such a file (JSON Lines, plain or .gz) has rows with ``name``, ``type``, ``system_prompt``, ``prompt_template``;
    ``kind`` says which of its types is wanted.
    """
    folder = Path(__file__).parent / source if str(source) in SHIPPED and not Path(source).exists() else Path(source)
    if folder.is_dir():
        return _from_folder(folder)
    if folder.name.removesuffix(".gz").endswith((".jsonl", ".json")):
        return _from_templates(folder, kind)
    raise CoalaError(
        f"There is no judge {str(source)!r}; expected one of {', '.join(SHIPPED)}, a folder with judge.yaml, or a "
        ".jsonl file of prompt templates."
    )


def _from_folder(folder: Path) -> Instructions:
    path = folder / "judge.yaml"
    try:
        document = parse_yaml(_read(path))
    except DocumentError as error:
        raise CoalaError(f"{path}: is {error}. Fix it.") from None
    if not isinstance(document, dict):
        raise CoalaError(f"{path}: found {shown(document)}; expected the fields mode, prompts, sampling. Fix it.")
    known = {"mode", "prompts", "parser", "labels", "sampling", "model"}
    if extra := sorted(set(map(str, document)) - known):
        raise CoalaError(f"{path}: has {shown(extra[0])}; expected some of {', '.join(sorted(known))}. Fix it.")
    listed, sampling = document.get("prompts"), document.get("sampling") or {}
    labels, mode = document.get("labels") or (), document.get("mode")
    if not isinstance(listed, list) or not all(isinstance(one, dict) for one in listed):
        raise CoalaError(f"{path}: prompts: found {shown(listed)}; expected a list of user, system, turns, reference.")
    if not isinstance(sampling, dict) or not isinstance(labels, list | tuple):
        raise CoalaError(f"{path}: sampling must be fields and labels a list. Fix it.")
    return Instructions(
        name=folder.resolve().name,
        mode=cast(JudgeMode, mode),
        prompts=tuple(_prompt(path, one) for one in listed),
        parser=cast(Parser, document.get("parser") or _PARSERS.get(cast(JudgeMode, mode), get_args(Parser))[0]),
        labels=tuple(map(str, labels)),
        sampling=sampling,
        model=str(document.get("model") or ""),
    )


def _prompt(path: Path, listed: Mapping[str, Any]) -> JudgePrompt:
    if extra := sorted(set(map(str, listed)) - {"user", "system", "turns", "reference"}):
        raise CoalaError(f"{path}: a prompt has {shown(extra[0])}; expected user, system, turns, reference. Fix it.")
    user, system = listed.get("user"), listed.get("system")
    if not isinstance(user, str) or not isinstance(system, str | None):
        raise CoalaError(f"{path}: a prompt's user and system are names of files in the folder. Fix it.")
    turns, reference = listed.get("turns", 1), listed.get("reference", False)
    if not isinstance(reference, bool) or turns not in (1, 2):
        raise CoalaError(f"{path}: a prompt is for 1 or 2 turns, with reference true or false. Fix it.")
    texts = [_read(path.parent / name) if name else "" for name in (system, user)]
    return JudgePrompt(Path(user).stem, texts[0].strip(), texts[1].strip(), int(turns), reference)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise CoalaError(f"{path}: could not be read ({error.strerror}). A judge's folder needs it.") from None
    except UnicodeDecodeError:
        raise CoalaError(f"{path}: is not UTF-8. Save it as UTF-8.") from None


def _from_templates(path: Path, kind: Literal["pairwise", "single"]) -> Instructions:
    rows = [row for row in read_rows(path) if row.text("type") == kind]
    if not rows:
        raise CoalaError(f"{path}: has no template of type {kind!r}; expected one at least. Name another file.")
    return Instructions(
        name=path.name.partition(".")[0],
        mode="pairwise" if kind == "pairwise" else "grade",
        prompts=tuple(map(_template, rows)),
        sampling={"temperature": 0, "max_tokens": 2048},
    )


def _template(row: FileRow) -> JudgePrompt:
    user, system = row.text("prompt_template"), row.text("system_prompt")
    there = set(_PLACE.findall(user))
    reference = bool(there & {"ref_answer_1", "ref_answer_2"})
    return JudgePrompt(row.label("name"), system, user, 2 if "question_2" in there else 1, reference)


def asked(turns: Sequence[str], answers: Sequence[Sequence[str]], references: Sequence[str] = ()) -> Exchange:
    """An :class:`Exchange` whose answers are as many as its questions, one or two; CoalaError otherwise."""
    if len(turns) not in (1, 2) or any(len(side) != len(turns) for side in answers) or len(answers) not in (1, 2):
        raise CoalaError(
            f"Found {len(turns)} questions and {[len(side) for side in answers]} answers; expected 1 or 2 questions "
            "and as many answers from one or two sides."
        )
    return Exchange(tuple(turns), tuple(map(tuple, answers)), tuple(references))
