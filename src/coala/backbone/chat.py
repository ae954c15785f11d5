"""A model's chat template: examined once over a probe conversation, so that what it does oddly is handled or told.

Writes the text that transformers' ``apply_chat_template`` would; knows nothing of tokens.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from coala.backbone.network import BackboneError
from coala.backbone.sandbox import CLOCK, LONGEST_SOURCE, Sandbox, TooMuch
from coala.values import Turn, conversation_text

# Words that no template holds, strips or changes.
ASKED, ANSWERED, ASKED_AGAIN, REPLIED = "quartz harbour", "juniper lantern", "marble orchard", "velvet compass"
# Stands behind an assistant's turn that goes on, to find its end again whatever a template trims.
_END = "zephyr-marigold-thimble"
_OPEN, _SHUT = re.compile(r"<think>|\[THINK\]|<\|thinking\|>", re.I), re.compile(r"</think>|\[/THINK\]", re.I)


class RefusedChat(BackboneError):
    """A conversation that a chat template does not take, or of which it leaves words out: a row, not the model.

    ``reason`` is short and without the way out.
    """

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


class ChatTemplate:
    """The chat template of ``tokenizer``.

    ``notes`` are the sentences a user should read about it. ``header`` is what stands before a reply where the
    template's own generation prompt is not what it writes there; ``parts``: it reads contents as lists of parts.
    ``clock``: it asks for the time, which is held.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.source = _source(tokenizer)
        self.notes: list[str] = []
        self.header: str | None = None
        self.parts = False
        self.clock = "strftime_now" in self.source
        environment = Sandbox()
        environment.start(len(self.source))
        try:
            self._template = environment.from_string(self.source)
        except Exception as error:  # Jinja, or Python over what Jinja made
            raise BackboneError(
                f"The chat template cannot be read ({_said(error)}). Fix: download the model's chat template again, or "
                "use template 'dialogue'."
            ) from error
        self._environment = environment
        if self.clock:
            self.notes.append(f"The chat template uses the current time; it always gets {CLOCK:%Y-%m-%d} instead.")
        self._examine()

    @property
    def facts(self) -> list[str]:
        """What decides its text beside its source."""
        found = [f"clock {CLOCK.isoformat()}"] if self.clock else []
        found += ["parts"] if self.parts else []
        return found if self.header is None else [*found, f"header {self.header}"]

    def prompt(self, turns: Sequence[Turn]) -> str:
        """What the model reads before a reply, which continues a last turn of the assistant: that is left open."""
        if continues(turns):
            *before, last = turns
            text = self.render([*before, Turn("assistant", last.text + _END)], header=False)
            found, end, _ = text.rpartition(_END)
            if not end:
                raise self._lost(turns, last)
            text = found
        elif self.header is None:
            text = self.render(turns, header=True)
        else:
            text = self.render(turns, header=False) + self.header
        for turn in turns:
            if turn.text.strip() not in text and _squeezed(_spoken(turn)) not in _squeezed(text):
                raise self._lost(turns, turn)
        return text

    def whole(self, turns: Sequence[Turn], reply: str) -> str:
        """The conversation with the reply, closed as the template closes it."""
        if continues(turns):
            return self.render([*turns[:-1], Turn("assistant", turns[-1].text + reply)], header=False)
        return self.render([*turns, Turn("assistant", reply)], header=False)

    def render(self, turns: Sequence[Turn], *, header: bool) -> str:
        """The template's own text; raises :class:`RefusedChat`."""
        messages = [{"role": turn.role, "content": self._content(turn.text)} for turn in turns]
        self._environment.start(sum(len(turn.text) for turn in turns))
        try:
            # Templates of thinking models would open a thought; preference pairs hold none. Others ignore the word.
            return self._template.render(
                **{**self.tokenizer.special_tokens_map, "enable_thinking": False},
                messages=messages,
                tools=None,
                documents=None,
                add_generation_prompt=header,
            )
        except TooMuch as error:
            reason = f"the chat template does not end: {error}"
            raise RefusedChat(f"{reason[0].upper()}{reason[1:]}. Fix: use template 'dialogue'.", reason) from error
        except Exception as error:  # a template raises whatever its author chose
            raise RefusedChat(
                f"The chat template refuses the conversation {conversation_text(turns)[:80]!r}: {_said(error)}. "
                "Use roles in the order it expects, or template 'dialogue'.",
                f"the chat template refuses it: {_said(error)}",
            ) from error

    def _content(self, text: str) -> Any:
        return [{"type": "text", "text": text}] if self.parts else text

    def _lost(self, turns: Sequence[Turn], turn: Turn) -> RefusedChat:
        return RefusedChat(
            f"The chat template leaves out words of the {turn.role} in the conversation "
            f"{conversation_text(turns)[:80]!r} ({turn.text.strip()[:40]!r}). Use template 'dialogue'.",
            f"the chat template leaves out words of the {turn.role} ({turn.text.strip()[:40]!r})",
        )

    # --- the examination -----------------------------------------------------------------------------------------

    def _examine(self) -> None:
        asked, reply = [Turn("user", ASKED)], Turn("assistant", REPLIED)
        if not self._arrives(asked):
            self.parts = True
            if not self._arrives(asked):
                self.parts = False
                try:
                    self.render(asked, header=True)
                except RefusedChat:
                    return  # every row will be refused, with the template's own words
                raise BackboneError(
                    f"The chat template leaves out what the user says: {self.render(asked, header=True)[:80]!r} is "
                    f"made of {ASKED!r}. Fix: correct the template, or use template 'dialogue'."
                )
            self.notes.append("The chat template expects contents as lists of parts, and gets them.")
        try:
            whole, bare, led = (
                self.render([*asked, reply], header=False),
                *(self.render(asked, header=led) for led in (False, True)),
            )
        except RefusedChat as error:
            self.notes.append(f"The chat template refuses a question with its answer: {error}")
            return
        if REPLIED not in whole:
            raise BackboneError(
                f"The chat template leaves out what the assistant says: {whole[:80]!r}. Fix: correct the template, or "
                "use template 'dialogue'."
            )
        self._find_header(whole, bare, led)
        self._look_further(bare)

    def _arrives(self, turns: Sequence[Turn]) -> bool:
        try:
            return all(turn.text in self.render(turns, header=True) for turn in turns)
        except RefusedChat:
            return False

    def _find_header(self, whole: str, bare: str, led: str) -> None:
        """Compare what stands before a reply with the template's own prompt for one."""
        at = whole.rindex(REPLIED)
        if whole.startswith(led) and not whole[len(led) : at].strip():
            return
        own = led.removeprefix(bare)
        thought = bool(_OPEN.search(own)) and not _SHUT.search(own)
        if not whole.startswith(bare):
            if led == bare or thought:
                raise BackboneError(
                    f"The chat template renders a question differently when an answer follows ({bare[-60:]!r}, "
                    f"{whole[:at][-60:]!r}), and does not mark where a reply starts. Fix: correct the template, or "
                    "use template 'dialogue'."
                )
            self.notes.append(
                f"The chat template's prompt for a reply, {own!r}, is not how it writes an answered question; replies "
                "are read after that prompt."
            )
            return
        written = whole[len(bare) : at]
        if _SHUT.search(own) and not _SHUT.search(written):
            self.notes.append(
                f"Replies are read after {own!r}, an empty thought, which the chat template omits from past turns."
            )
            return
        self.header = written
        if thought:
            self.notes.append(
                f"The chat template opens a thought before a reply ({own!r}). Replies are read and written without "
                f"one, after {written!r}."
            )
        elif own:
            self.notes.append(
                f"The chat template's prompt for a reply, {own!r}, is not what it writes before one; replies are read "
                f"after {written!r}."
            )
        else:
            self.notes.append(
                f"The chat template has no prompt for a reply (add_generation_prompt); {written!r} is taken from how "
                "it writes an answer."
            )

    def _look_further(self, bare: str) -> None:
        """What it adds by itself, and what it does with past turns."""
        before = bare.partition(ASKED)[0]
        own = re.search(r"system\W+(.+)", before, re.S | re.I)
        if own and len(re.findall(r"\w+", own[1])) > 3:
            self.notes.append(f"The chat template adds its own system prompt: {' '.join(before.split())!r}.")
        turns = [
            Turn("user", ASKED),
            Turn("assistant", f"<think>{ANSWERED}</think>{REPLIED}"),
            Turn("user", ASKED_AGAIN),
        ]
        try:
            text = self.render(turns, header=True)
            plain = self.render([turns[0], Turn("assistant", ANSWERED), turns[2]], header=True)
        except RefusedChat:
            return
        if not all(word in plain for word in (ASKED, ANSWERED, ASKED_AGAIN)):
            self.notes.append("The chat template omits past turns; rows that have some are rejected.")
        elif ANSWERED not in text:
            self.notes.append("The chat template removes thoughts (<think>) from past turns.")


def continues(turns: Sequence[Turn]) -> bool:
    """Whether a conversation ends in the middle of an assistant's turn."""
    return bool(turns) and turns[-1].role == "assistant" and bool(turns[-1].text.strip())


def _spoken(turn: Turn) -> str:
    """A turn without the thought that templates take out of past turns."""
    return _SHUT.split(turn.text)[-1] if turn.role == "assistant" else turn.text


def _squeezed(text: str) -> str:
    """Without spaces, which templates trim and add."""
    return "".join(text.split())


def _source(tokenizer: Any) -> str:
    stored = tokenizer.chat_template
    if isinstance(stored, dict):
        if "default" not in stored:
            raise BackboneError(
                f"The tokenizer has chat templates named {', '.join(sorted(map(str, stored)))}, and none named "
                "default. Fix: name one of them default in its files, or use template 'dialogue'."
            )
        stored = stored["default"]
    if not isinstance(stored, str):
        raise BackboneError(
            f"The chat template is {type(stored).__name__}; expected a text. Fix: correct tokenizer_config.json, or "
            "use template 'dialogue'."
        )
    if len(stored) > LONGEST_SOURCE:
        raise BackboneError(
            f"The chat template has {len(stored):,} characters; expected at most {LONGEST_SOURCE:,}. Use template "
            "'dialogue'."
        )
    return stored


def _said(error: Exception) -> str:
    text = " ".join(str(error).split())[:200]
    line = getattr(error, "lineno", None)
    return f"{text or type(error).__name__}{f', line {line}' if line else ''}"
