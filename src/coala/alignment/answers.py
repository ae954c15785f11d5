"""A finished run answers the prompts of a benchmark: reading them, their reference replies, and writing its own.

Replies are kept portion by portion under the digest of all that decides them, so that a killed run goes on where it was
and other settings never meet. Knows nothing of judges or figures.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coala.alignment.parts import guidance_of, load_parts
from coala.alignment.replies import rows_at_once
from coala.data import read_pairs
from coala.evaluation.rows import FileRow, read_rows, shown
from coala.recipe import recipe_of
from coala.store import (
    DISTILLED,
    RunFolder,
    StoreError,
    claim,
    digest,
    file_digest,
    head_stamp,
    load_generations,
    run_policy,
)
from coala.values import CoalaError, Generation, Turn, conversation_text, prompt_id, user

if TYPE_CHECKING:
    from coala.alignment.parts import LoadParts

FOLDER = "replies"
UNGUIDED = "unguided"
_MEND = "correct or delete the row"
OnReply = Callable[[int, int], None]


@dataclass(frozen=True)
class PromptRow:
    """A prompt with its ``id``, which no other has; ``category`` is the benchmark's, or empty.

    ``key`` is what replies of a file are found by: the file's own name of the prompt, else its text.
    """

    id: str
    key: str
    prompt: tuple[Turn, ...]
    category: str = ""

    @property
    def text(self) -> str:
        return conversation_text(self.prompt)


@dataclass(frozen=True)
class ReplySettings:
    """How a run answers: ``None`` is as its recipe says. ``guided`` false is the base model.

    ``guidance`` holds settings of guidance over the recipe's, ``{"mode": "distilled"}`` for instance.
    """

    guided: bool = True
    max_new_tokens: int | None = None
    temperature: float | None = None
    seed: int = 0
    guidance: Mapping[str, Any] = field(default_factory=dict)


def read_prompts(path: Path | str) -> list[PromptRow]:
    """The prompts of a file, in its order.

    Rows of AlpacaEval (``instruction``, perhaps ``dataset``), of Arena-Hard (``uid`` or ``question_id``, ``prompt`` or
    ``turns``, ``category``) or of Vicuna's questions (``question_id``, ``text``); rows of ``prompt`` (a text or
    messages) with perhaps ``prompt_id`` and ``category``; or pairs in any known format, each prompt once. A prompt that
    is there again gets an id of its own, ``-2`` behind it.
    """
    rows = read_rows(path)
    if not rows:
        raise CoalaError(f"{path}: found no prompt; expected at least one. Fix: check that this is the right file.")
    if all(row.get("chosen") is not None and row.get("prompt_id") is None for row in rows):
        found = {prompt_id(pair.prompt): pair.prompt for pair in read_pairs(path)}
        return [PromptRow(name, name, prompt) for name, prompt in found.items()]
    asked = []
    seen: Counter[str] = Counter()
    for row in rows:
        prompt = _prompt(row)
        own = row.name_of("prompt_id", "uid", "question_id")
        name = row.label(own) if own else prompt_id(prompt)
        seen[name] += 1
        unique = name if seen[name] == 1 else f"{name}-{seen[name]}"
        kind = row.name_of("category", "dataset")
        asked.append(PromptRow(unique, name, prompt, row.label(kind) if kind else ""))
    return asked


def read_reference(path: Path | str, asked: Sequence[PromptRow]) -> list[Generation]:
    """A reply to each of ``asked``, in their order, from a file of another model's replies.

    AlpacaEval outputs (``instruction``, ``output``, ``generator``), a run's generations (``prompt_id``, ``text``),
    answers of Arena-Hard or MT-Bench (``uid`` or ``question_id`` with ``messages`` or ``choices``, ``model``), or
    pairs, of which the chosen reply is taken. The side's name is the file's own. CoalaError for a prompt without one.
    """
    given: dict[str, list[str]] = {}
    name = ""
    for row in read_rows(path):
        key, text, said = _reply(row)
        if name and said != name:
            raise row.fault("generator", shown(said), f"{shown(name)} as before", "give one model's replies per file")
        name = said
        given.setdefault(key, []).append(text)
    lacking = [one for one in asked if one.key not in given]
    if lacking:
        raise CoalaError(
            f"{path}: has no reply to {len(lacking)} of {len(asked)} prompts (the first is {shown(lacking[0].text)}). "
            "Fix: pass replies to the same prompts."
        )
    used: Counter[str] = Counter()
    replies = []
    for one in asked:
        texts = given[one.key]
        # The k-th time a prompt is asked it meets the k-th reply to it, or the last there is.
        replies.append(_generation(one.id, texts[min(used[one.key], len(texts) - 1)], name))
        used[one.key] += 1
    return replies


def answer(
    run: RunFolder,
    asked: Sequence[PromptRow],
    manner: ReplySettings,
    *,
    parts: LoadParts | None = None,
    on_reply: OnReply | None = None,
) -> list[Generation]:
    """The run's reply to each prompt, in their order; those that are kept are not made again.

    The model is loaded only if a reply is missing, or then asked for from ``parts`` by who answers more than once.
    Raises :class:`CoalaError` for a run without a head and for one in which another process is answering the same
    prompts.
    """
    from coala.decoding import generate

    if not (run.path / "head" / "head.json").is_file():
        raise StoreError(f"{run.path}: has no fitted head yet. Fix: finish it with `coala align`.")
    recipe = recipe_of(run.settings, run.path / "run.json")
    settings = recipe.evaluation
    length = settings.max_new_tokens if manner.max_new_tokens is None else manner.max_new_tokens
    temperature = settings.temperature if manner.temperature is None else manner.temperature
    rule = guidance_of(recipe).changed(**manner.guidance)
    guidance: Any = asdict(rule) if manner.guided else UNGUIDED
    if manner.guided and rule.change:
        run_policy(run)  # refused where there is none
        guidance["policy"] = file_digest(run.path / DISTILLED / "policy.safetensors")
    head = head_stamp(run.path / "head", rule.rater)
    prompts = [[one.id, [[turn.role, turn.text] for turn in one.prompt]] for one in asked]
    model = asdict(recipe.model)
    key = digest(prompts, model, head, guidance, [length, temperature, manner.seed])[:12]
    path = run.path / FOLDER / f"{key}.jsonl"
    with claim(path.with_suffix(".lock")) as mine:
        if not mine:
            raise StoreError(f"{path}: another process is generating these replies. Fix: wait for it, or stop it.")
        kept = load_generations(path) if path.exists() else []
        if [reply.prompt_id for reply in kept] != [one.id for one in asked[: len(kept)]]:
            raise StoreError(f"{path}: holds replies to other prompts. Fix: delete it and rerun.")
        if len(kept) < len(asked):
            backbone, fitted, _ = load_parts(run.path) if parts is None else parts()
            rule = rule.at(temperature) if manner.guided else rule.plain
            kept = generate(
                [one.prompt for one in asked],
                backbone,
                fitted,
                rule,
                max_new_tokens=length,
                temperature=temperature,
                seed=manner.seed,
                prompt_ids=[one.id for one in asked],
                batch_size=max(1, rows_at_once(backbone) // rule.rows),
                kept=path,
                on_reply=on_reply,
            )
    return kept


def converse(
    run: RunFolder,
    questions: Sequence[tuple[str, Sequence[str]]],
    manner: ReplySettings,
    *,
    on_reply: OnReply | None = None,
) -> list[tuple[str, ...]]:
    """The run's replies to the turns of each question (id, turns), each given with all that was said before it."""
    said: list[tuple[Turn, ...]] = [() for _ in questions]
    in_all = sum(len(turns) for _, turns in questions)
    done = 0
    for number in range(max((len(turns) for _, turns in questions), default=0)):
        here = [i for i, (_, turns) in enumerate(questions) if len(turns) > number]
        asked = []
        for i in here:
            name, turns = questions[i]
            said[i] = (*said[i], Turn("user", turns[number]))
            asked.append(PromptRow(name if number == 0 else f"{name} turn {number + 1}", name, said[i]))

        def tell(n: int, _: int, before: int = done) -> None:
            if on_reply is not None:
                on_reply(before + n, in_all)

        for i, reply in zip(here, answer(run, asked, manner, on_reply=tell), strict=True):
            said[i] = (*said[i], Turn("assistant", reply.text))
        done += len(here)
    return [tuple(turn.text for turn in turns if turn.role == "assistant") for turns in said]


def _prompt(row: FileRow) -> tuple[Turn, ...]:
    # `text` is a prompt beside the number of a question only: a run's replies have it too.
    known = ("instruction", "prompt", "turns", *(("text",) if row.get("question_id") is not None else ()))
    name = row.name_of(*known)
    if name is None:
        row.text(*known)  # raises: none of them is there
    value = row.get(*known)
    if name == "turns" and isinstance(value, list) and len(value) > 1:
        mend = (
            "have conversations graded with `coala eval mtbench --run RUN --questions FILE`, or keep the first turn "
            "only: a comparison has one prompt and one reply"
        )
        raise row.fault("turns", f"{len(value)} turns", "one text, or messages with role and content", mend)
    if isinstance(value, str):
        if not value.strip():
            raise row.fault(str(name), "an empty text", "a prompt", _MEND)
        return user(value)
    said = value[0] if isinstance(value, list) and len(value) == 1 and name == "turns" else None
    if isinstance(said, dict) and isinstance(said.get("content"), str):
        return user(said["content"])
    if isinstance(said, str):
        return user(said)
    if name == "prompt" and isinstance(value, list) and value and all(_is_message(item) for item in value):
        return tuple(Turn(item["role"], item["content"]) for item in value)
    raise row.fault(str(name), shown(value), "one text, or messages with role and content", _MEND)


def _is_message(item: Any) -> bool:
    return isinstance(item, dict) and isinstance(item.get("role"), str) and isinstance(item.get("content"), str)


def _reply(row: FileRow) -> tuple[str, str, str]:
    """What a row's reply is found by, its text, and whose it is."""
    if row.get("output") is not None:
        named = row.label("generator") if row.get("generator") is not None else Path(row.file).name.partition(".")[0]
        return _key(row), row.text("output"), named
    if row.get("text") is not None:
        return row.label("prompt_id"), row.text("text"), row.label("method")
    if row.get("messages", "choices") is not None:
        return row.label("uid", "question_id"), _last(row), row.label("model", "model_id")
    if row.get("chosen") is not None:
        return _key(row), _last(row, "chosen"), "chosen"
    row.text("output", "text", "messages", "choices", "chosen")
    raise AssertionError("a row without a reply was not refused")


def _key(row: FileRow) -> str:
    own = row.name_of("prompt_id", "uid", "question_id")
    return row.label(own) if own else prompt_id(_prompt(row))


def _last(row: FileRow, *fields: str) -> str:
    """The last reply of messages, or of the turns of the first choice."""
    name = row.name_of(*(fields or ("messages", "choices"))) or ""
    value = row.get(name)
    if name == "choices" and isinstance(value, list) and value and isinstance(value[0], dict):
        value = value[0].get("turns")
    said = value[-1] if isinstance(value, list) and value else value
    if isinstance(said, dict):
        said = said.get("content")
    if isinstance(said, dict):
        said = said.get("answer")
    if not isinstance(said, str):
        raise row.fault(name, shown(row.get(name)), "a reply, or a list that ends in one", _MEND)
    return said


def _generation(name: str, text: str, method: str) -> Generation:
    nan = float("nan")
    return Generation(name, text, method, 0, 0, nan, nan)
