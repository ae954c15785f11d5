"""Conversations to tokens: the only place that calls a tokenizer or a chat template. Knows nothing of weights."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, get_args

from coala.backbone.chat import ANSWERED, ASKED, ASKED_AGAIN, ChatTemplate, RefusedChat, continues
from coala.backbone.network import BackboneError
from coala.values import Pair, Turn

Template = Literal["chat", "dialogue", "continuation"]
# Special tokens that open or close a turn, not a text.
_OF_A_TURN = re.compile(r"system|user|human|assistant|role|turn|header|inst|im_", re.I)
# Characters that stand for special tokens written out in a text, until it is encoded.
_HIDDEN = 0x10F000
SPEAKERS = {"system": "System", "user": "Human", "assistant": "Assistant"}


@dataclass(frozen=True)
class RenderedRow:
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
        self.chat: ChatTemplate | None = None
        self._hidden: dict[str, str] = {}
        plain = self._encode("a")
        whole = [int(token) for token in tokenizer.encode("a", add_special_tokens=True)]
        at = next((i for i in range(len(whole)) if whole[i : i + len(plain)] == plain), len(whole))
        # What the tokenizer puts before and after a text by itself; a decoder's reply goes where the latter would be.
        self.before, self.after = whole[:at], whole[at + len(plain) :] if encoder else []
        self.opening: list[int] = self.before
        if self.kind == "chat":
            self.before = self.after = []  # the template writes them out
            self.chat = ChatTemplate(tokenizer)
            self._hidden = {token: chr(_HIDDEN + i) for i, token in enumerate(self._special())}
            self.opening = self._find_opening()

    @property
    def notes(self) -> tuple[str, ...]:
        """What a user should know of how this model's conversations are written."""
        if self.chat is not None:
            return tuple(self.chat.notes)
        has_chat = bool(getattr(self.tokenizer, "chat_template", None))
        if self.kind == "dialogue" and not has_chat:
            return ("The model has no chat template; conversations are written as 'Human: ...' and 'Assistant: ...'.",)
        return ()

    def _choose(self, template: str, encoder: bool) -> Template:
        has_chat = bool(getattr(self.tokenizer, "chat_template", None))
        if template == "auto":
            return "continuation" if encoder else "chat" if has_chat else "dialogue"
        for kind in get_args(Template):
            if template == kind:
                if kind == "chat" and not has_chat:
                    raise BackboneError(
                        "Found template 'chat', but the tokenizer has no chat template. Fix: use template 'dialogue' "
                        "or 'continuation', or add a chat_template.jinja next to the weights."
                    )
                return kind  # type: ignore[no-any-return]
        raise BackboneError(f"Template {template!r}; expected auto, {', '.join(get_args(Template))}.")

    # --- text ----------------------------------------------------------------------------------------------------

    def prompt_text(self, prompt: Sequence[Turn]) -> str:
        """What the model reads before the reply."""
        if self.chat is not None:
            return self.chat.prompt(self._guarded(prompt))
        if self.kind == "continuation":
            return "".join(turn.text for turn in prompt)
        lines = [f"{SPEAKERS[turn.role]}: {turn.text}" for turn in prompt]
        return "\n\n".join(lines if continues(prompt) else [*lines, f"{SPEAKERS['assistant']}:"])

    def reply_text(self, prompt: Sequence[Turn], reply: str, prompt_text: str) -> tuple[str, str]:
        """The reply as it follows ``prompt_text``, and what the template puts behind it."""
        if self.kind == "continuation" or (self.kind == "dialogue" and continues(prompt)):
            return reply, ""
        if self.chat is None:
            return f" {reply}" if reply else "", ""
        whole = self.chat.whole(self._guarded(prompt), reply)
        rest = whole.removeprefix(prompt_text) if whole.startswith(prompt_text) else ""
        # Templates may put a space before a reply, or strip it.
        for text in (reply, reply.strip()):
            glue, found, suffix = rest.partition(text) if text else ("", "", "")
            if found and not glue.strip():
                return glue + text, suffix
        return reply, ""

    def refusal(self, prompt: Sequence[Turn], reply: str) -> str:
        """Why the chat template does not take a row; empty if it does."""
        if self.chat is None:
            return ""
        try:
            self.prompt_text(prompt)
            self.chat.whole(self._guarded(prompt), reply)
        except RefusedChat as error:
            return error.reason
        return ""

    def refusal_of(self, pair: Pair) -> str:
        """Why the chat template does not take a pair; empty if it does."""
        return self.refusal(pair.prompt, pair.chosen) or self.refusal(pair.prompt, pair.rejected)

    def specials(self, text: str) -> list[str]:
        """The special tokens that are written out in a text."""
        return [token for token in self._special() if token in text]

    def _special(self) -> list[str]:
        added = getattr(self.tokenizer, "added_tokens_decoder", {}).values()
        found = {str(token.content) for token in added if getattr(token, "special", False)}
        found |= {str(token) for token in self.tokenizer.all_special_tokens}
        # The longest first, for one may begin like another.
        return sorted((token for token in found if len(token) > 1), key=lambda token: (-len(token), token))

    def _guarded(self, turns: Sequence[Turn]) -> list[Turn]:
        """Turns whose users cannot open another one: their special tokens are hidden, to be encoded as plain text."""
        return [Turn(t.role, self._hide(t.text)) if t.role == "user" else t for t in turns]

    def _hide(self, text: str) -> str:
        for token, mark in self._hidden.items():
            text = text.replace(token, mark)
        return text

    def bare_reply(self, reply: str) -> str:
        """A reply without the stop token that some data write out at its end; one is added where it is asked for."""
        for token in self._stop_texts:
            text = reply.rstrip()
            if text.endswith(token):
                return text.removesuffix(token)
        return reply

    @cached_property
    def _stop_texts(self) -> list[str]:
        if self.chat is None:
            return []
        texts = (str(self.tokenizer.convert_ids_to_tokens(token)) for token in sorted(self.stop_tokens))
        return [text for text in texts if text in self._special()]

    # --- tokens --------------------------------------------------------------------------------------------------

    def _encode(self, text: str) -> list[int]:
        if not self._hidden or not any(mark in text for mark in self._hidden.values()):
            return self._plain(text)
        names = {mark: token for token, mark in self._hidden.items()}
        found: list[int] = []
        for piece in re.split(f"([{re.escape(''.join(names))}])", text):
            if piece in names:
                found += self._spelt(names[piece])
            elif piece:
                found += self._plain(piece)
        return found

    def _plain(self, text: str) -> list[int]:
        # verbose: that a text is longer than the model takes is not transformers' to say; rows are cut, and counted.
        return [int(token) for token in self.tokenizer.encode(text, add_special_tokens=False, verbose=False)]

    def _spelt(self, token: str) -> list[int]:
        """A special token as the text that it is written in."""
        tokens = self.tokenizer.encode(token, add_special_tokens=False, split_special_tokens=True)
        if self.tokenizer.convert_tokens_to_ids(token) not in tokens:
            return [int(one) for one in tokens]
        return [one for part in (token[:1], token[1:]) for one in self._plain(part)]

    def _find_opening(self) -> list[int]:
        """The special tokens that a template writes once, before everything: a cut row keeps them."""
        assert self.chat is not None
        asked = Turn("user", ASKED)
        for turns in ([asked, Turn("assistant", ANSWERED), Turn("user", ASKED_AGAIN)], [asked]):
            try:
                tokens = self._encode(self.chat.prompt(turns))
            except RefusedChat:
                continue
            special = {self.tokenizer.convert_tokens_to_ids(token) for token in self._special()}
            found: list[int] = []
            for token in tokens:
                name = str(self.tokenizer.convert_ids_to_tokens(token))
                begins = token == self.tokenizer.bos_token_id and not found
                once = token in special and tokens.count(token) == 1 and len(turns) > 1
                if _OF_A_TURN.search(name) or not (begins or once):
                    break
                found.append(token)
            return found
        return []

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

    def render(
        self, prompt: Sequence[Turn], reply: str | None, *, max_tokens: int, ends_with_eos: bool = False
    ) -> RenderedRow:
        """See :meth:`coala.backbone.LanguageModel.render`."""
        text = self.prompt_text(prompt)
        body = self._encode(text)
        prompt_tokens = [*self.before, *body]
        reply_tokens: list[int] = []
        if reply is not None:
            reply = self.bare_reply(reply)
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
        return RenderedRow([*prompt_tokens, *reply_tokens, *self.after], start, dropped, len(self.after))

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
        """The last ``kept`` tokens, behind what every text begins with."""
        opening = self.opening[: max(kept - 1, 0)] if tokens[: len(self.opening)] == self.opening else []
        return [*opening, *tokens[len(tokens) - (kept - len(opening)) :]]

    def _opening(self) -> list[int]:
        for token in (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id):
            if token is not None:
                return [int(token)]
        raise BackboneError(
            "The prompt has no tokens and the tokenizer no opening token. Fix: give a prompt with text."
        )

    def _end(self, suffix: str) -> int:
        """The stop token that closes a reply: the template's own, else the tokenizer's."""
        for token in self._encode(suffix) if suffix else []:
            if token in self.stop_tokens:
                return token
        if self.tokenizer.eos_token_id is not None:
            return int(self.tokenizer.eos_token_id)
        if self.stop_tokens:
            return min(self.stop_tokens)
        raise BackboneError("ends_with_eos needs a stop token, and this tokenizer has none. Fix: turn it off.")

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
        if self.chat is not None:
            parts += self.chat.facts
            parts += [f"opening {self.opening}"] if self.opening else []
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:12]
