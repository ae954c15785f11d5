"""What a model says once its thinking aloud is taken off, however its kind marks thoughts.

Knows the marks that open and close thoughts; nothing of verdicts, replies or where the text came from.
"""

from __future__ import annotations

import re

# Tags as models write them: <think>, </thinking>, <seed:think>, <|thought|>, <reasoning effort="high">, [THINK],
# ◁think▷. A heading such as [Analysis] is none: square brackets count for the one word that models use them for.
_NAMES = "think|thinking|thoughts?|thought_process|reasoning|reflection|scratchpad|analysis"
_TAG = re.compile(
    rf"<\|?(?P<angle>/?)(?:\w{{1,20}}:)?(?:{_NAMES})(?:\s[^<>\n]{{0,80}})?\|?>"
    r"|\[(?P<square>/?)(?-i:THINK)\]"
    r"|\u25c1(?P<triangle>/?)think\u25b7"
    r"|<\|(?P<phase>begin|start|end)_(?:of_)?(?:thought|thinking)\|>"
    r"|(?P<channel><\|channel>|<channel\|>)",
    re.IGNORECASE,
)
# The channels of the harmony format: analysis and commentary are thoughts, final is the answer.
_CHANNEL = re.compile(r"<\|channel\|>\s*(\w+)[^<]{0,200}(?:<\|constrain\|>[^<]{0,80})?<\|message\|>")
_CHANNEL_END = re.compile(r"<\|(?:end|return|call|start)\|>")
_FENCE = re.compile(r"^[ \t]*```.*?^[ \t]*```[ \t]*$", re.DOTALL | re.MULTILINE)
_QUOTES = {"`": "`", '"': '"', "'": "'", "\u201c": "\u201d", "\u2018": "\u2019", "\u00ab": "\u00bb"}


def spoken(text: str) -> str | None:
    """``text`` without the thoughts in it; None if a thought was opened and never closed.

    A closing tag without an opening one ends a thought that the prompt had opened, or a nested one: all before it is
    thought. A tag in quotation marks or backticks is spoken of, not used. A thought that is opened inside a code block
    and not closed ends with the block. A text without marks comes back as it is.
    """
    if "<|channel|>" in text or "<|message|>" in text:
        return _final_channel(text)
    if text.lstrip().startswith("analysis"):
        # The same format after a server has left the special tokens out.
        _, sign, last = text.rpartition("assistantfinal")
        if sign:
            return last
        if re.match(r"analysis[A-Z]", text.lstrip()):
            return None
    pieces: list[str] = []
    start, opened = 0, -1
    for tag in _TAG.finditer(text):
        if _is_quoted(text, tag):
            continue
        if _closes(tag):
            if opened < 0:
                pieces.clear()
            start, opened = tag.end(), -1
        elif opened < 0:
            pieces.append(text[start : tag.start()])
            opened = tag.start()
    if opened < 0:
        return "\n".join([*pieces, text[start:]])
    fence = next((found for found in _FENCE.finditer(text) if found.start() < opened < found.end()), None)
    rest = None if fence is None else spoken(text[fence.end() :])
    return None if rest is None else "\n".join([*pieces, rest])


def opens_thought(text: str) -> bool:
    """Whether ``text`` begins with a thought, closed or not."""
    begun = text.lstrip()
    tag = _TAG.match(begun)
    return begun.startswith("<|channel|>") or (tag is not None and not _closes(tag))


def _closes(tag: re.Match[str]) -> bool:
    marks = tag.group("angle") or tag.group("square") or tag.group("triangle") or tag.group("phase") or ""
    return marks == "/" or marks.lower() == "end" or tag.group("channel") == "<channel|>"


def _is_quoted(text: str, tag: re.Match[str]) -> bool:
    before, after = text[max(0, tag.start() - 1) : tag.start()], text[tag.end() : tag.end() + 1]
    return bool(before) and _QUOTES.get(before) == after


def _final_channel(text: str) -> str | None:
    """What the last message of the channel `final` says."""
    found = None
    for head in _CHANNEL.finditer(text):
        if head[1] == "final":
            end = _CHANNEL_END.search(text, head.end())
            found = text[head.end() : end.start() if end else None]
    return found
