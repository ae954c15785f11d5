"""What is asked of a model, one reply at a time, and what comes of it; knows nothing of how replies grow."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from coala.backbone import LanguageModel
from coala.decoding.budget import Account
from coala.decoding.guidance import RANKING, Guidance
from coala.decoding.replies import Decode, OnToken, Reply, Stream
from coala.values import CoalaError, ConvexHead, Generation, Turn, turns


@dataclass(frozen=True)
class Rendered:
    """A prompt as tokens, made before: ``row`` to decode from, ``read`` as features read it.

    ``raw`` if it is a text to be continued as it stands, not a conversation in the model's template.
    """

    row: Sequence[int]
    read: Sequence[int]
    raw: bool = False


@dataclass(frozen=True)
class Request:
    """One reply to ``prompt``; see :func:`coala.decoding.generate` for what the settings mean.

    ``n_top`` alternatives are kept for each token (:attr:`coala.decoding.Job.alternatives`). ``on_text`` is handed
    pieces of text that add up to the reply. ``rendered``, if given, is taken for the prompt's tokens. Raises
    :class:`CoalaError` for settings that no model could carry out.
    """

    prompt: Sequence[Turn]
    guidance: Guidance
    max_new_tokens: int
    seed: int
    temperature: float = 1.0
    stop: Sequence[str] = ()
    prompt_id: str = "0"
    n_top: int = 0
    on_text: Callable[[str], None] | None = None
    rendered: Rendered | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "prompt", turns(self.prompt))
        if self.max_new_tokens < 1:
            raise CoalaError(f"max_new_tokens is {self.max_new_tokens}; expected at least 1.")
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise CoalaError(
                f"temperature is {self.temperature}; expected a finite number of at least 0 (0 is greedy)."
            )
        if self.n_top < 0:
            raise CoalaError(f"n_top is {self.n_top}; expected at least 0 alternatives.")
        if isinstance(self.stop, str):
            raise CoalaError(
                f"stop is the string {self.stop!r}; expected a list of strings, such as stop=[{self.stop!r}]."
            )
        if not all(self.stop):
            raise CoalaError("One of the stop strings is empty, which would end every reply at once. Leave it out.")


@dataclass(frozen=True)
class Prepared:
    """A request as a model takes it: the prompt's tokens, as decoded from and as features read it, and the reply."""

    row: list[int]
    read: list[int]
    reply: Reply


def effective(guidance: Guidance, head: ConvexHead | None, temperature: float) -> Guidance:
    """What ``guidance`` comes to with this head; raises :class:`CoalaError` if that cannot be carried out.

    By the calibrated rule a head whose scores are no evidence guides nothing, and leaves what it would go over.
    """
    tells = head is not None and not (guidance.weighs and head.evidence == 0)
    if not ((tells and guidance.active) or not guidance.samples):
        if guidance.change:
            return Guidance("distilled", guidance.change, top_k=guidance.top_k, top_p=guidance.top_p)
        return guidance.plain
    if guidance.mode in RANKING and temperature == 0:
        raise CoalaError(
            f"Mode {guidance.mode!r} chooses among samples, which are identical at temperature 0. Fix: use a "
            "temperature above 0, or mode 'token' or 'beam'."
        )
    return guidance


def prepare(
    request: Request,
    backbone: LanguageModel,
    head: ConvexHead | None,
    *,
    index: int = 0,
    on_token: OnToken | None = None,
) -> Prepared:
    """The tokens of the prompt, cut to what leaves room for the reply, and its reply to be, named ``index``."""
    context = backbone.max_tokens
    longest = max(context - request.max_new_tokens, context // 2)
    raw = False
    if request.rendered is not None:
        row, read, raw = list(request.rendered.row), list(request.rendered.read), request.rendered.raw
    else:
        row = backbone.render(request.prompt, max_tokens=longest).tokens
        # A long prompt may be cut elsewhere at extraction, which leaves no room for a reply.
        read = row
        if head is not None and head.needs_prompt:
            read = backbone.render(request.prompt, max_tokens=head.spec.max_tokens).tokens
    stop = tuple(request.stop) if raw else (*request.stop, *backbone.stop_texts)
    if on_token is None and request.on_text is not None:
        hear = request.on_text

        def on_token(_: int, piece: str) -> None:
            hear(piece)

    reply = Reply(
        index,
        request.prompt_id,
        min(request.max_new_tokens, context - len(row)),
        _reader(backbone, row, raw=raw),
        seed=request.seed,
        stop=stop,
        stream=None if on_token is None else Stream(on_token, stop),
        n_top=request.n_top,
        account=Account(request.guidance.budget),
    )
    return Prepared(row, read, reply)


def identified(prompts: Sequence[Sequence[Turn]], prompt_ids: Sequence[str] | None, batch_size: int) -> list[str]:
    """The id of each prompt, its place if none are given; refuses what cannot be gone through in batches."""
    if batch_size < 1:
        raise CoalaError(f"batch_size is {batch_size}; expected at least 1.")
    ids = [str(index) for index in range(len(prompts))] if prompt_ids is None else list(prompt_ids)
    if len(ids) != len(prompts):
        raise CoalaError(f"{len(prompts)} prompts need as many prompt ids; found {len(ids)}.")
    return ids


def prepare_all(
    asked: Callable[..., Request],
    prompts: Sequence[Sequence[Turn]],
    ids: Sequence[str],
    backbone: LanguageModel,
    head: ConvexHead | None,
    *,
    first: int = 0,
    on_token: OnToken | None = None,
) -> list[Prepared]:
    """Each prompt from ``first`` on as ``asked`` makes a request of it, replies named by their places."""
    return [
        prepare(asked(prompt=prompt, prompt_id=id), backbone, head, index=index, on_token=on_token)
        for index, (prompt, id) in enumerate(zip(prompts, ids, strict=True))
        if index >= first
    ]


def generation(reply: Reply, head: ConvexHead | None, guidance: Guidance) -> Generation:
    """A finished reply as it is kept; over a distilled policy its ``log_prob`` is not known (nan)."""
    score = math.nan
    if head is not None:
        prompt = None if reply.prompt is None else reply.prompt.cpu().numpy()
        score = float(head.score(reply.features[-1].cpu().numpy(), prompt))
    # Over a distilled policy the base model has not been asked.
    log_prob = math.nan if guidance.change else float(sum(reply.log_probs))
    found = (reply.prompt_id, reply.text, str(guidance), len(reply.tokens), reply.seed, score, log_prob)
    return Generation(*found, reply.account.spent if guidance.mode == "shift" else None)


def _reader(backbone: LanguageModel, prompt: list[int], *, raw: bool) -> Decode:
    """Tokens of a reply to text: what rendering turns into those tokens behind this prompt."""
    kind = "continuation" if raw else backbone.template.partition(":")[0]
    if kind == "dialogue":  # which puts a space before a reply
        return lambda tokens: backbone.decode(tokens).removeprefix(" ")
    if kind != "continuation":
        return backbone.decode
    # Many tokenizers drop the space a text begins with; here it is what parts the reply from the prompt.
    context = prompt[-1:]
    before = backbone.decode(context)

    def read(tokens: list[int]) -> str:
        whole = backbone.decode([*context, *tokens])
        return whole[len(before) :] if whole.startswith(before) else backbone.decode(tokens)

    return read
