"""Conversations to tokens: the only place that calls a tokenizer or a chat template. Knows nothing of weights."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from coala.backbone.network import BackboneError
from coala.values import Turn, conversation_text

Template = Literal["chat", "dialogue", "continuation"]
SPEAKERS = {"system": "System", "user": "Human", "assistant": "Assistant"}


@dataclass(frozen=True)
class Row:
    """``tokens`` of a prompt and perhaps a reply; ``start`` is the index of the reply's first token.

    ``dropped`` counts tokens cut off, prompt and reply together; ``tail`` counts tokens after the reply that are not
    part of it (an encoder's closing token).
    """

    tokens: list[int]
    start: int
    dropped: int
    tail: int = 0

    @property
    def stop(self) -> int:
        """Index behind the reply's last token."""
        return len(self.tokens) - self.tail


class Renderer:
    """Renders conversations for one tokenizer in one template."""

    def __init__(self, tokenizer: Any, template: str, *, stop_tokens: frozenset[int], encoder: bool = False) -> None:
        self.tokenizer = tokenizer
        self.stop_tokens = stop_tokens
        self.kind = self._choose(template, encoder)
        plain = self._encode("a")
        whole = [int(token) for token in tokenizer.encode("a", add_special_tokens=True)]
        at = next((i for i in range(len(whole)) if whole[i : i + len(plain)] == plain), len(whole))
        # What the tokenizer puts before and after a text by itself; a decoder's reply goes where the latter would be.
        self.before, self.after = whole[:at], whole[at + len(plain) :] if encoder else []
        if self.kind == "chat":
            self.before = self.after = []  # the template writes them out

    def _choose(self, template: str, encoder: bool) -> Template:
        has_chat = bool(getattr(self.tokenizer, "chat_template", None))
        if template == "auto":
            return "continuation" if encoder else "chat" if has_chat else "dialogue"
        for kind in get_args(Template):
            if template == kind:
                if kind == "chat" and not has_chat:
                    raise BackboneError(
                        "Template 'chat' was asked for, but the tokenizer has no chat template. "
                        "Use template 'dialogue' or 'continuation', or put a chat_template.jinja beside the weights."
                    )
                return kind  # type: ignore[no-any-return]
        raise BackboneError(f"Template {template!r}; expected auto, {', '.join(get_args(Template))}.")

    # --- text ----------------------------------------------------------------------------------------------------

    def prompt_text(self, prompt: Sequence[Turn]) -> str:
        """What the model reads before the reply."""
        if self.kind == "chat":
            return self._chat(prompt, add_generation_prompt=True)
        if self.kind == "continuation":
            return "".join(turn.text for turn in prompt)
        lines = [f"{SPEAKERS[turn.role]}: {turn.text}" for turn in prompt]
        return "\n\n".join([*lines, f"{SPEAKERS['assistant']}:"])

    def reply_text(self, prompt: Sequence[Turn], reply: str, prompt_text: str) -> tuple[str, str]:
        """The reply as it follows ``prompt_text``, and what the template puts behind it."""
        if self.kind == "continuation":
            return reply, ""
        if self.kind == "dialogue":
            return f" {reply}" if reply else "", ""
        whole = self._chat([*prompt, Turn("assistant", reply)], add_generation_prompt=False)
        rest = whole.removeprefix(prompt_text) if whole.startswith(prompt_text) else ""
        # Templates may put a space before a reply, or strip it.
        for text in (reply, reply.strip()):
            glue, found, suffix = rest.partition(text) if text else ("", "", "")
            if found and not glue.strip():
                return glue + text, suffix
        return reply, ""

    def _chat(self, turns: Sequence[Turn], *, add_generation_prompt: bool) -> str:
        messages = [{"role": turn.role, "content": turn.text} for turn in turns]
        try:
            # Templates of thinking models would open a thought; preference pairs hold none. Others ignore the word.
            text = self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=add_generation_prompt, enable_thinking=False
            )
        except Exception as error:  # a template raises whatever its author chose
            raise BackboneError(
                f"The chat template refuses the conversation {conversation_text(turns)[:80]!r}: {error}. "
                "Use roles in the order it expects, or template 'dialogue'."
            ) from error
        return str(text)

    # --- tokens --------------------------------------------------------------------------------------------------

    def _encode(self, text: str) -> list[int]:
        return [int(token) for token in self.tokenizer.encode(text, add_special_tokens=False)]

    def _continue(self, text: str, before: str, before_tokens: list[int]) -> list[int]:
        """Tokens of ``text`` as they follow ``before``, whose own tokens stay what they are."""
        if not text:
            return []
        # What follows a special token is tokenised like a beginning; what follows a word is not. The tokenizer knows.
        whole = self._encode(before + text)
        if whole[: len(before_tokens)] == before_tokens:
            return whole[len(before_tokens) :]
        # The border was merged away. A character that merges with nothing stands in for the prompt.
        for sentinel in ("\x01", "\n", ".", "|", "0"):
            alone = self._encode(sentinel)
            whole = self._encode(sentinel + text)
            if alone and whole[: len(alone)] == alone:
                return whole[len(alone) :]
        return self._encode(text)

    def render(self, prompt: Sequence[Turn], reply: str | None, *, max_tokens: int, ends_with_eos: bool = False) -> Row:
        """See :meth:`coala.backbone.LanguageModel.render`."""
        text = self.prompt_text(prompt)
        body = self._encode(text)
        prompt_tokens = [*self.before, *body]
        reply_tokens: list[int] = []
        if reply is not None:
            written, suffix = self.reply_text(prompt, reply, text)
            reply_tokens = self._continue(written, text, body)
            if ends_with_eos:
                reply_tokens.append(self._end(suffix))
        if not prompt_tokens:
            prompt_tokens = self._opening()
        budget = max_tokens - len(self.after)
        total = len(prompt_tokens) + len(reply_tokens)
        if total > budget:
            kept = max(min(len(prompt_tokens), max(max_tokens // 4, 1)), budget - len(reply_tokens))
            prompt_tokens = self._cut(prompt_tokens, kept)
            reply_tokens = reply_tokens[: max(budget - len(prompt_tokens), 0)]
        start = len(prompt_tokens)
        dropped = total - start - len(reply_tokens)
        return Row([*prompt_tokens, *reply_tokens, *self.after], start, dropped, len(self.after))

    def surplus(self, text: str, most: int) -> int:
        """Tokens that ``text`` has at least, if these are clearly over ``most``, else 0.

        Found from its beginning, so that a text of millions of characters costs little more than one that fits.
        """
        size = 8 * most
        while size < len(text):
            found = len(self._encode(text[:size]))
            # A cut text may end in other tokens than the whole one has there.
            if found > most + most // 4 + 64:
                return found
            size *= 4
        return 0

    def _cut(self, tokens: list[int], kept: int) -> list[int]:
        """The last ``kept`` tokens, behind what the tokenizer begins every text with."""
        opening = self.before[: max(kept - 1, 0)]
        return [*opening, *tokens[len(tokens) - (kept - len(opening)) :]]

    def _opening(self) -> list[int]:
        for token in (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id):
            if token is not None:
                return [int(token)]
        raise BackboneError("The prompt has no tokens and the tokenizer no opening token. Give a prompt with text.")

    def _end(self, suffix: str) -> int:
        """The stop token that closes a reply: the template's own, else the tokenizer's."""
        for token in self._encode(suffix) if suffix else []:
            if token in self.stop_tokens:
                return token
        if self.tokenizer.eos_token_id is not None:
            return int(self.tokenizer.eos_token_id)
        if self.stop_tokens:
            return min(self.stop_tokens)
        raise BackboneError("ends_with_eos needs a stop token, and this tokenizer has none. Leave it off.")

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of a reply's tokens, special tokens left out."""
        return str(self.tokenizer.decode(list(tokens), skip_special_tokens=True))

    @property
    def digest(self) -> str:
        """12 hex digits over everything that decides which tokens a conversation becomes."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        content = backend.to_str() if backend is not None else json.dumps(self.tokenizer.get_vocab(), sort_keys=True)
        template = getattr(self.tokenizer, "chat_template", None) if self.kind == "chat" else None
        parts = [self.kind, json.dumps(template, sort_keys=True), content, str(self.before), str(self.after)]
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:12]
