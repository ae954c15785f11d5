"""How likely given texts are: under the base model, under a trained one, and under guidance that samples exactly.

Of the modes that a head guides ``shift`` alone draws every token from a distribution that depends on no noise, so that
a text has a likelihood; the decoder's own arithmetic gives it, fed with the text's tokens instead of its choices.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from coala.backbone import LanguageModel
from coala.decoding.decoder import Batch, Decoder
from coala.decoding.guidance import Float64, Guidance
from coala.decoding.requests import Rendered, Request, effective, prepare
from coala.decoding.sampling import Nucleus, restrict
from coala.values import CoalaError, ConvexHead, Prompt, SpecMismatch, Turn, prompts_of

OnTexts = Callable[[int, int], None]


def log_likelihood(
    prompts: Sequence[Prompt], texts: Sequence[str], backbone: LanguageModel, *, batch_size: int = 16
) -> list[tuple[float, int]]:
    """Log-probability of each text as a reply to its prompt under the base model, and how many tokens it has.

    The text is tokenised as the backbone renders it; the end of the reply is not counted, and prompt and text are cut
    to the context as features are. Perplexity is ``exp(-sum of log-probabilities / sum of tokens)``.
    """
    _check_counts(prompts, texts, batch_size)
    rows = [backbone.render(prompt, text) for prompt, text in zip(prompts_of(prompts), texts, strict=True)]
    replies = [row.tokens[row.start :] for row in rows]
    totals = [0.0] * len(rows)
    # Texts of like length share a batch, so that few rows wait for the longest.
    order = sorted((index for index, reply in enumerate(replies) if reply), key=lambda index: len(replies[index]))
    for first in range(0, len(order), batch_size):
        batch = order[first : first + batch_size]
        prefix = backbone.start([rows[index].tokens[: rows[index].start] for index in batch])
        step = 0
        while True:
            tokens = torch.tensor([replies[index][step] for index in batch], device=backbone.device)
            for index, value in zip(batch, _pick(prefix.log_probs(), tokens), strict=True):
                totals[index] += value
            step += 1
            going = [row for row, index in enumerate(batch) if len(replies[index]) > step]
            if not going:
                break
            if len(going) < len(batch):
                batch, prefix, tokens = [batch[row] for row in going], prefix.select(going), tokens[going]
            prefix.push(tokens)
    return [(total, len(reply)) for total, reply in zip(totals, replies, strict=True)]


def model_log_ratios(
    prompts: Sequence[Prompt],
    texts: Sequence[str],
    policy: LanguageModel,
    base: LanguageModel,
    *,
    batch_size: int = 16,
    on_texts: OnTexts | None = None,
) -> Float64:
    """log pi(text | prompt) - log pi_0(text | prompt) in nats (n,) of a trained model and its base, over all tokens.

    ``on_texts(done, total)`` hears of both models' readings. Raises ``SpecMismatch`` if the two do not render alike.
    """
    if policy.template != base.template:
        raise SpecMismatch(
            f"{policy.name} renders as {policy.template}, {base.name} as {base.template}; a log-ratio compares a model "
            "with its own base. Load both with one template."
        )
    read: list[list[tuple[float, int]]] = []
    for model in (policy, base):
        if on_texts is not None:
            on_texts(len(read) * len(texts), 2 * len(texts))
        read.append(log_likelihood(prompts, texts, model, batch_size=batch_size))
    if on_texts is not None:
        on_texts(2 * len(texts), 2 * len(texts))
    return np.array([ours - theirs for (ours, _), (theirs, _) in zip(*read, strict=True)], dtype=np.float64)


@dataclass(frozen=True)
class TextLikelihood:
    """One text under guidance and without it, in nats: sums over its tokens, whose end is not counted.

    ``guided`` and ``unguided`` are of the distributions that decoding samples from, restricted by top-k and top-p: both
    -inf for a text that has a token outside of these, which decoding never writes. ``divergence`` is what guidance
    spends along the text, as :attr:`coala.values.Generation.divergence` is; nan for a text outside.
    """

    guided: float
    unguided: float
    divergence: float
    n_tokens: int

    @property
    def inside(self) -> bool:
        """Whether decoding could write the text."""
        return bool(np.isfinite(self.unguided))

    @property
    def log_ratio(self) -> float:
        """log q(text) - log p(text), guided to unguided; -inf outside of what decoding writes."""
        return self.guided - self.unguided if self.inside else -np.inf


def unknown_likelihood(guidance: Guidance, head: ConvexHead | None = None, temperature: float = 1.0) -> str:
    """Why a text has no likelihood by this guidance, in a few words; "" where it has one."""
    if head is not None and guidance.samples:
        guidance = effective(guidance.at(temperature), head, temperature)
    if guidance.mode == "distilled":
        return ""
    if guidance.change:
        return "likelihood not known of a head over the distilled policy"
    if guidance.samples and temperature == 0:
        return "likelihood not known at temperature 0, where nothing is sampled"
    known = guidance.mode in ("shift", "none") or (guidance.samples and not guidance.active)
    return "" if known else f"likelihood not known in mode {guidance.mode}"


def guided_likelihoods(
    prompts: Sequence[Prompt],
    replies: Sequence[str | Sequence[int]],
    backbone: LanguageModel,
    head: ConvexHead,
    guidance: Guidance,
    *,
    temperature: float = 1.0,
    max_new_tokens: int | None = None,
    batch_size: int = 16,
    on_texts: OnTexts | None = None,
) -> list[TextLikelihood]:
    """Each reply to its prompt under guided decoding in mode ``shift``, exactly, token by token.

    A reply is a text, tokenised and cut as :func:`log_likelihood` does it, or the tokens that decoding wrote.
    ``max_new_tokens``, which a ``budget`` needs, cuts them as it cuts replies. Reading ends at the first token outside
    of what is sampled. ``on_texts(done, total)`` is told after each batch. Raises :class:`CoalaError` where no
    likelihood is known (:func:`unknown_likelihood`) and ``SpecMismatch`` for a head of another model.
    """
    if why := unknown_likelihood(guidance, head, temperature):
        raise CoalaError(f"Found guidance {guidance}: {why}. Fix: use mode shift, whose distribution is exact.")
    wanted = effective(guidance, head, temperature)
    if wanted.change:
        raise CoalaError(f"Found guidance {guidance}; expected a head that guides. Fix: use policy_likelihood.")
    if wanted.budget is not None and max_new_tokens is None:
        raise CoalaError("Found a budget without max_new_tokens, which its strength depends on. Fix: give both.")
    backbone.require(head.spec)
    _check_counts(prompts, replies, batch_size)
    asked = [
        _asked(prompt, reply, backbone, head, wanted, max_new_tokens)
        for prompt, reply in zip(prompts_of(prompts), replies, strict=True)
    ]
    decoder = _Reader(backbone, head, wanted, temperature=temperature)
    found: list[TextLikelihood | None] = [None] * len(asked)
    order = sorted(range(len(asked)), key=lambda index: len(asked[index][1]))
    for first in range(0, len(order), batch_size):
        some = order[first : first + batch_size]
        read = decoder.read([asked[index][0] for index in some], [asked[index][1] for index in some])
        for index, one in zip(some, read, strict=True):
            found[index] = one
        if on_texts is not None:
            on_texts(first + len(some), len(asked))
    return [one for one in found if one is not None]


def lifted(guidance: Guidance) -> Guidance:
    """The same guidance of the whole distribution, by which every text has a likelihood above 0."""
    return replace(guidance, top_k=0, top_p=1.0)


class _Reader(Decoder):
    """A decoder whose tokens are given, and which tells how likely each was."""

    _given: list[int]  # the next token of every row
    _tilts: list[tuple[Float64, Float64]]  # of the step that is being read, with their strengths

    def read(self, requests: Sequence[Request], replies: Sequence[Sequence[int]]) -> list[TextLikelihood]:
        """The likelihood of each of ``replies``, tokens, to the prompt of its request."""
        parts = [prepare(one, self.backbone, self.head, index=index) for index, one in enumerate(requests)]
        sums = np.zeros((len(parts), 2))
        live = [part for part, reply in zip(parts, replies, strict=True) if reply]
        if live:
            rows, read = [part.row for part in live], [part.read for part in live]
            batch = self.begin(rows, read, [part.reply for part in live])
            while batch.replies:
                batch = self._step(batch, replies, sums)
        return [
            TextLikelihood(
                float(guided),
                float(unguided),
                part.reply.account.spent if np.isfinite(unguided) else np.nan,
                len(reply),
            )
            for part, reply, (guided, unguided) in zip(parts, replies, sums, strict=True)
        ]

    def nucleus(self, batch: Batch) -> Nucleus:
        """That of decoding; of the whole vocabulary only the tokens that count: the likeliest ones and the given one.

        The others have no tilt, so that their sum is known without sorting them.
        """
        if self.guidance.top_k or self.guidance.top_p < 1:
            return super().nucleus(batch)
        log_probs = batch.prefix.log_probs()
        leading = restrict(log_probs, temperature=self.temperature, top_k=self.guidance.candidates + 1, top_p=1.0)
        tokens = np.concatenate([leading.tokens, np.array(self._given)[:, None]], axis=1)
        at = torch.from_numpy(tokens).to(log_probs.device)
        found = torch.log_softmax(log_probs.double() / self.temperature, -1).gather(1, at).cpu().numpy()
        found[(leading.tokens == tokens[:, -1:]).any(1), -1] = -np.inf  # the given one is among them already
        return Nucleus(tokens, found, log_probs.gather(1, at).cpu().double().numpy())

    def _step(self, batch: Batch, replies: Sequence[Sequence[int]], sums: Float64) -> Batch:
        """Enter the next token of every row in ``sums`` (n, 2): guided, unguided; the rows that go on are left."""
        tokens = self._given = [int(replies[reply.index][len(reply.tokens)]) for reply in batch.replies]
        nucleus = self.nucleus(batch)
        guided = self.distribution(batch, nucleus)
        going = []
        for row, (reply, token) in enumerate(zip(batch.replies, tokens, strict=True)):
            place = np.flatnonzero(nucleus.tokens[row] == token)
            inside = len(place) > 0 and np.isfinite(nucleus.log_probs[row, place[0]])
            if not inside:
                sums[reply.index] = -np.inf
                continue
            sums[reply.index] += guided[row, place[0]], nucleus.log_probs[row, place[0]]
            reply.tokens.append(token)
            if len(reply.tokens) < len(replies[reply.index]):
                going.append(row)
        if going:
            self.push(batch, tokens)
        return batch.select(going, [batch.replies[row] for row in going])

    def distribution(self, batch: Batch, nucleus: Nucleus) -> Float64:
        """Log-probabilities (B, K) by which guided decoding draws the next token of each row; their cost is entered."""
        self._tilts = []
        self._choose(batch, nucleus)
        found = nucleus.log_probs.copy()
        for tilt, strengths in self._tilts:
            # Rows without strength keep their distribution to the last bit.
            rows = np.flatnonzero(strengths)
            weights = found[rows]
            rest = np.maximum(1 - np.exp(weights).sum(-1, keepdims=True), 0.0)
            weights[:, : tilt.shape[1]] += strengths[rows, None] * tilt[rows]
            top = np.maximum(weights.max(-1, keepdims=True), 0.0)
            total = np.exp(weights - top).sum(-1, keepdims=True) + rest * np.exp(-top)
            found[rows] = weights - top - np.log(total)
        return found

    def _strengths(self, batch: Batch, log_probs: Float64, tilt: Float64, asked: NDArray[np.bool_]) -> Float64:
        """Those of decoding, kept with the tilt that they multiply."""
        found = super()._strengths(batch, log_probs, tilt, asked)
        self._tilts.append((tilt, found))
        return found


def _asked(
    prompt: Sequence[Turn],
    reply: str | Sequence[int],
    backbone: LanguageModel,
    head: ConvexHead,
    guidance: Guidance,
    max_new_tokens: int | None,
) -> tuple[Request, list[int]]:
    """What decoding would be asked for to write ``reply``, and its tokens."""
    if not isinstance(reply, str):
        tokens = list(reply)[:max_new_tokens]
        return Request(prompt, guidance, max_new_tokens or max(1, len(tokens)), 0), tokens
    row = backbone.render(prompt, reply)
    before, tokens = row.tokens[: row.start], row.tokens[row.start :][:max_new_tokens]
    read = before
    if head.needs_prompt:
        read = backbone.render(prompt, max_tokens=head.spec.max_tokens).tokens
    room = max_new_tokens or max(1, len(tokens))
    return Request(prompt, guidance, room, 0, rendered=Rendered(before, read)), tokens


def _check_counts(prompts: Sequence[Prompt], texts: Sequence[object], batch_size: int) -> None:
    if len(texts) != len(prompts):
        raise CoalaError(f"{len(prompts)} prompts need as many texts; found {len(texts)}.")
    if batch_size < 1:
        raise CoalaError(f"batch_size is {batch_size}; expected at least 1.")


def _pick(log_probs: torch.Tensor, tokens: torch.Tensor) -> list[float]:
    return [float(value) for value in log_probs.gather(1, tokens[:, None])[:, 0].cpu()]
