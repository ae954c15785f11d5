"""A tokenizer that renders a prompt and its reply as they were when the reward head was fitted, and marks the reply.

    tokenizer(text=prompt, text_pair=reply)        a prompt of one user turn, or a list of messages, and a reply
    tokenizer(text=messages)                       a conversation whose last message is the reply
    tokenizer(text=rendered)                       one text as the template writes it; the reply is what follows the
                                                   last ``reply_marker``

Lists of any of these make a batch. Results are ``input_ids``, ``attention_mask``, ``token_type_ids`` (1 at the reply's
tokens) and, for heads whose gates act on the prompt, ``prompt_ids`` and ``prompt_mask``. Rows longer than
``max_tokens`` lose tokens of the prompt on the left, down to a quarter of it, then of the reply on the right. Special
tokens are added as the template demands, whatever ``add_special_tokens`` says. This file needs transformers alone.
"""

from __future__ import annotations

from typing import Any

from transformers import BatchEncoding, PreTrainedTokenizerFast

SPEAKERS = {"system": "System", "user": "Human", "assistant": "Assistant"}
PROBE = "PROBE"
SEPARATOR = "<|reply|>"


class CoalaTokenizer(PreTrainedTokenizerFast):
    """Settings stand under ``coala`` in tokenizer_config.json."""

    model_input_names = ["input_ids", "attention_mask", "token_type_ids"]  # noqa: RUF012

    @property
    def _about(self) -> dict[str, Any]:
        about = self.init_kwargs.get("coala")
        if not about:
            raise ValueError("tokenizer_config.json has no entry 'coala': load the tokenizer from its whole folder.")
        return dict(about)

    @property
    def reply_marker(self) -> str:
        """What stands between the prompt and the reply in one rendered text."""
        kind = self._about["kind"]
        if kind == "continuation":
            return SEPARATOR
        return self._prompt_text([{"role": "user", "content": PROBE}]).rpartition(PROBE)[2]

    # --- inputs ----------------------------------------------------------------------------------------------------

    def __call__(
        self,
        text: Any = None,
        text_pair: Any = None,
        *,
        padding: Any = False,
        max_length: int | None = None,
        padding_side: str | None = None,
        return_tensors: Any = None,
        **kwargs: Any,
    ) -> BatchEncoding:
        """See the module. ``max_length`` can only lower the limit that the head was fitted with."""
        if text is None:
            raise ValueError("Give text=prompt and text_pair=reply, or text=messages.")
        single = isinstance(text, str) or _is_conversation(text)
        texts = [text] if single else list(text)
        pairs = [text_pair] if single else list(text_pair) if text_pair is not None else [None] * len(texts)
        if len(texts) != len(pairs):
            raise ValueError(f"{len(texts)} prompts and {len(pairs)} replies; expected as many of one as of the other.")
        limit = self._about["max_tokens"]
        limit = limit if max_length is None or padding == "max_length" else min(limit, max_length)
        rows = [self._row(one, reply, limit) for one, reply in zip(texts, pairs, strict=True)]
        groups = [("input_ids", "attention_mask")]
        groups += [("prompt_ids", "prompt_mask")] if self._about["needs_prompt"] else []
        width = max_length if padding == "max_length" else None
        padded: dict[str, Any] = {}
        for ids, mask in groups:
            longest = max(len(row[ids]) for row in rows) if padding or return_tensors else 0
            if return_tensors and not padding and any(len(row[ids]) != longest for row in rows):
                raise ValueError("Rows of different lengths make no tensor: pass padding=True.")
            longest = max(longest, width or 0) if padding else longest
            filler = self.pad_token_id if self.pad_token_id is not None else 0
            left = (padding_side or self.padding_side) == "left"
            for name, value in ((ids, filler), (mask, 0), *((("token_type_ids", 0),) if ids == "input_ids" else ())):
                padded[name] = [_padded(row[name], longest if padding else 0, value, left) for row in rows]
        if single and not return_tensors:
            padded = {name: value[0] for name, value in padded.items()}
        return BatchEncoding(padded, tensor_type=return_tensors)

    def _row(self, text: Any, reply: Any, limit: int) -> dict[str, list[int]]:
        about = self._about
        prompt_text, written, suffix = self._parts(text, reply)
        body = self._ids(prompt_text)
        prompt = [*about["before"], *body] or [about["opening"]]
        answer = self._continue(written, prompt_text, body)
        if about["ends_with_eos"]:
            answer.append(next((t for t in self._ids(suffix) if t in about["stop_tokens"]), about["end"]))
        alone, _ = self._cut(prompt, [], limit)
        kept, answer = self._cut(prompt, answer, limit)
        after = about["after"]
        row = [*kept, *answer, *after]
        types = [0] * len(kept) + [1] * len(answer) + [0] * len(after)
        alone = [*alone, *after]
        return {
            "input_ids": row,
            "attention_mask": [1] * len(row),
            "token_type_ids": types,
            "prompt_ids": alone,
            "prompt_mask": [1] * len(alone),
        }

    def _parts(self, text: Any, reply: Any) -> tuple[str, str, str]:
        """The prompt as a text, the reply as it follows it, and what the template puts behind."""
        if reply is not None:
            turns = [{"role": "user", "content": text}] if isinstance(text, str) else [dict(turn) for turn in text]
            prompt_text = self._prompt_text(turns)
            return prompt_text, *self._reply_text(turns, reply, prompt_text)
        if not isinstance(text, str):
            turns = [dict(turn) for turn in text]
            if len(turns) < 2 or turns[-1].get("role") != "assistant":
                raise ValueError(
                    "The conversation does not end with a reply: its last message must be the assistant's."
                )
            return self._parts(turns[:-1], str(turns[-1]["content"]))
        return self._split(text)

    def _split(self, text: str) -> tuple[str, str, str]:
        """One rendered text at its last reply marker."""
        marker = self.reply_marker
        if self._about["kind"] == "continuation":
            prompt, found, reply = text.rpartition(marker)
            prompt_text = prompt
        else:
            # Templates of thinking models open an empty thought for a reply to come, and some leave it out later.
            plain = marker.partition("<think>")[0]
            prompt, found, reply = text.rpartition(plain) if plain.strip() else text.rpartition(marker)
            reply = reply.removeprefix(marker[len(plain) :])
            prompt_text = prompt + marker
        if not found:
            raise ValueError(
                f"The text has no {marker!r}, after which the reply would start. Pass the prompt as text and the "
                "reply as text_pair."
            )
        suffix = ""
        if self._about["kind"] == "chat":
            probe = [{"role": "user", "content": PROBE}]
            known = self._reply_text(probe, PROBE, self._prompt_text(probe))[1]
            suffix = next((s for s in (known, known.rstrip()) if s and reply.endswith(s)), "")
            reply = reply[: len(reply) - len(suffix)]
        return prompt_text, reply, suffix

    # --- the template ----------------------------------------------------------------------------------------------

    def _prompt_text(self, turns: list[dict[str, Any]]) -> str:
        kind = self._about["kind"]
        if kind == "chat":
            return self._chat(turns, True)
        if kind == "continuation":
            return "".join(turn["content"] for turn in turns)
        return "\n\n".join([*(f"{SPEAKERS[turn['role']]}: {turn['content']}" for turn in turns), "Assistant:"])

    def _reply_text(self, turns: list[dict[str, Any]], reply: str, prompt_text: str) -> tuple[str, str]:
        kind = self._about["kind"]
        if kind != "chat":
            return (f" {reply}" if reply and kind == "dialogue" else reply), ""
        whole = self._chat([*turns, {"role": "assistant", "content": reply}], False)
        rest = whole.removeprefix(prompt_text) if whole.startswith(prompt_text) else ""
        for text in (reply, reply.strip()):
            glue, found, suffix = rest.partition(text) if text else ("", "", "")
            if found and not glue.strip():
                return glue + text, suffix
        return reply, ""

    def _chat(self, turns: list[dict[str, Any]], generation: bool) -> str:
        options: dict[str, Any] = {"tokenize": False, "add_generation_prompt": generation, "enable_thinking": False}
        return str(self.apply_chat_template(turns, **options))

    # --- tokens ----------------------------------------------------------------------------------------------------

    def _ids(self, text: str) -> list[int]:
        return list(self.backend_tokenizer.encode(text, add_special_tokens=False).ids) if text else []

    def _continue(self, text: str, before: str, tokens: list[int]) -> list[int]:
        """Tokens of ``text`` as they follow ``before``, whose own tokens stay what they are."""
        if not text:
            return []
        whole = self._ids(before + text)
        if whole[: len(tokens)] == tokens:
            return whole[len(tokens) :]
        for stand_in in ("\x01", "\n", ".", "|", "0"):
            alone, whole = self._ids(stand_in), self._ids(stand_in + text)
            if alone and whole[: len(alone)] == alone:
                return whole[len(alone) :]
        return self._ids(text)

    def _cut(self, prompt: list[int], reply: list[int], limit: int) -> tuple[list[int], list[int]]:
        budget = limit - len(self._about["after"])
        if len(prompt) + len(reply) > budget:
            kept = max(min(len(prompt), max(limit // 4, 1)), budget - len(reply))
            first = self._about.get("kept") or self._about["before"]
            opening = first[: max(kept - 1, 0)] if prompt[: len(first)] == first else []
            prompt = [*opening, *prompt[len(prompt) - (kept - len(opening)) :]]
            reply = reply[: max(budget - len(prompt), 0)]
        return prompt, reply


def _is_conversation(text: Any) -> bool:
    return isinstance(text, list | tuple) and bool(text) and all(isinstance(turn, dict) for turn in text)


def _padded(row: list[int], width: int, value: int, left: bool) -> list[int]:
    blank = [value] * (width - len(row))
    return [*blank, *row] if left else [*row, *blank]
