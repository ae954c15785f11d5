"""What stands around the prompt in columns of its own: a system text, earlier turns, an input to an instruction.

Every reader of rows goes through here, so that no format drops them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from typing import Any

from coala.data.findings import Fault, describe
from coala.data.turns import Row, is_messages, is_transcript, sound_text, text, transcript, turns
from coala.data.unread import is_empty
from coala.values import Turn

SYSTEM = ("system", "system_prompt", "system_message", "system_instruction", "sys_prompt", "sys")
HISTORY = ("history", "chat_history", "conversation_history", "dialogue_history", "dialog_history", "previous_turns")
MORE = ("input", "context")


PARTS = ("system", "history", "more")
Around = tuple[str, ...]


def beside(row: Row, used: Set[str], around: Around = PARTS) -> dict[str, str]:
    """The columns that belong around the prompt and that the reader does not take itself, each with its part."""
    known = {str(key).strip().lower().replace(" ", "_").replace("-", "_"): key for key in row}
    found: dict[str, str] = {}
    for names, part in ((SYSTEM, "system"), (HISTORY, "history"), (MORE, "more")):
        for name in names if part in around else ():
            key = known.get(name)
            if key is None or key in used or is_empty(row[key]):
                continue
            if part == "more" and isinstance(row[key], list | Mapping):
                if not is_messages(row[key]):
                    continue
                found[key] = "history"
            elif part != "more" or isinstance(row[key], str):
                found[key] = part
    return found


def in_context(row: Row, prompt: Sequence[Turn], used: Set[str], around: Around = PARTS) -> list[Turn]:
    """The prompt with the system text first, earlier turns before it, and an input behind the last question.

    What the prompt holds already is not said twice. Raises :class:`Fault` for what cannot be placed.
    """
    made = list(prompt)
    places = beside(row, used, around)
    for key, part in places.items():
        if part == "more":
            made = _continued(made, text(row, key), key)
    for key, part in places.items():
        if part == "history":
            before = earlier(row[key], key)
            spoken = [turn for turn in made if turn.role != "system"]
            if spoken[: len(before)] != before:
                system = [turn for turn in made if turn.role == "system"]
                made = [*system, *before, *spoken] if system else [*before, *spoken]
    for key in [key for key, part in places.items() if part == "system"]:
        said = _system(row[key], key)
        there = [turn.text.strip() for turn in made if turn.role == "system"]
        if any(said.strip() in one for one in there):
            continue
        if there:
            found = "another system text than the prompt's own"
            raise Fault(key, found, "one system text", f"keep one of the two, or join them and drop {key}")
        made.insert(0, Turn("system", said))
    return made


def _continued(made: list[Turn], more: str, key: str) -> list[Turn]:
    said, longish = more.strip(), len(more.split()) > 3
    if any(turn.text.rstrip().endswith(said) or (longish and said in turn.text) for turn in made):
        return made
    if not made or made[-1].role != "user":
        found = "text that belongs after a question, but the prompt does not end with one"
        raise Fault(key, found, "a prompt that ends with the user", "write it into the prompt, or drop the column")
    return [*made[:-1], Turn("user", f"{made[-1].text}\n\n{more}")]


def _system(value: Any, key: str) -> str:
    if isinstance(value, list):
        said = turns(value, key)
        if any(turn.role != "system" for turn in said):
            raise Fault(key, "turns of other speakers", "a system text", "move them to the prompt")
        return "\n\n".join(turn.text for turn in said)
    return sound_text(value, key)


def earlier(value: Any, key: str) -> list[Turn]:
    """Turns before the prompt: messages, a transcript, or LLaMA-Factory's ``[[question, answer], ...]``."""
    if is_transcript(value):
        return transcript(value, key)
    if is_messages(value):
        return turns(value, key)
    if not isinstance(value, list) or not all(isinstance(one, list) and len(one) == 2 for one in value):
        mend = "write [[question, answer], ...] or messages, or write the earlier turns into the prompt"
        raise Fault(key, describe(value), "a list of [question, answer], or messages", mend)
    made = []
    for k, (question, answer) in enumerate(value):
        made.append(Turn("user", sound_text(question, f"{key}[{k}][0]")))
        made.append(Turn("assistant", sound_text(answer, f"{key}[{k}][1]")))
    return made
