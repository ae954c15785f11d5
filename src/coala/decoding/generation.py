"""Replies from prompts: :func:`generate`, and how guided choices hang together with unguided ones.

Every sampled choice is coupled to unguided decoding. A step draws one Gumbel variable g(c) per token c of the
restricted base distribution p, a function of (seed, prompt, step, c) alone. The unguided token is
``argmax log p(c) + g(c)``, an exact sample of p (the Gumbel-max trick). Modes ``token`` and ``prefix`` ask the head
about the k tokens with the largest ``log p + g``, k distinct samples of p without replacement, and take

    argmax over these k of  log p(c) + strength * score(c) + g(c),

with the scores normalised over the k (App. H.3). So strength 0 gives the unguided text token for token, a guided text
leaves the unguided one only where the head outweighs chance, and as k grows to the whole nucleus the choice becomes an
exact sample of ``p exp(strength * score)``. Sampling once more among k candidates, as App. H.3 describes, sharpens the
distribution even at strength 0, for the likely tokens are among the candidates more often: a lower perplexity that the
head has no part in. Mode ``shift`` asks about the k likeliest tokens instead, which no noise decides, so that the
distribution it samples is known, and with it what a reply spends in nats (:mod:`coala.decoding.budget`). Temperature 0
leaves the noise out. Mode ``beam`` has none (:mod:`coala.decoding.search`).

A stop token ends the reply and is not part of it: as a candidate it is worth what the reply is worth as it stands
(with ``ends_with_eos`` features, which count the stop token, it is scored like any other).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from coala.backbone import LanguageModel
from coala.decoding.budget import Account
from coala.decoding.decoder import Decoder
from coala.decoding.guidance import RANKING, Guidance
from coala.decoding.replies import Decode, OnToken, Reply, Stream
from coala.decoding.search import WAYS
from coala.values import CoalaError, ConvexHead, Generation, Turn


def generate(
    prompts: Sequence[Sequence[Turn]],
    backbone: LanguageModel,
    head: ConvexHead | None = None,
    guidance: Guidance = Guidance(),  # noqa: B008 - frozen
    *,
    max_new_tokens: int,
    seed: int,
    temperature: float = 1.0,
    stop: Sequence[str] = (),
    prompt_ids: Sequence[str] | None = None,
    batch_size: int = 16,
    on_token: OnToken | None = None,
) -> list[Generation]:
    """One reply per prompt, in their order, guided by ``head`` if there is one.

    A reply's random numbers depend on ``seed`` and its prompt's id (its place in ``prompts`` if ``prompt_ids`` is not
    given) alone, so that batches change nothing beyond floating-point rounding; prompts of one id share their noise.
    A reply ends at a stop token, before the first of the ``stop`` strings and the model's own ``stop_texts``,
    after ``max_new_tokens`` or when the context is full. A prompt longer than the context less
    ``max_new_tokens`` loses its beginning, but keeps at least half the context. ``temperature`` 0 is greedy.

    ``on_token(index, piece)`` is handed pieces of text that add up to the reply: a block at a time in mode ``block``,
    the whole reply in modes ``best_of`` and ``beam``.

    In each :class:`Generation`, ``score`` is the head's score of the reply's pooled feature and ``log_prob`` the sum of
    the unrestricted log-probabilities, at temperature 1, of its ``n_tokens`` tokens; neither counts the stop token (but
    the feature does if it ``ends_with_eos``) or what a stop string cut off. Replies of mode ``shift`` tell their
    divergence. Without a head replies are unguided, but for ``beam``, which then searches by log-probability alone.

    A head with gates on the prompt is, for each prompt, the linear head of the gates that its features open; they are
    pooled once, from the prompt as extraction reads it.

    Raises :class:`CoalaError` for settings that cannot be carried out and :class:`SpecMismatch` for a head that was
    fitted on features of another model.
    """
    _check(max_new_tokens, temperature, stop, batch_size)
    ids = [str(index) for index in range(len(prompts))] if prompt_ids is None else list(prompt_ids)
    if len(ids) != len(prompts):
        raise CoalaError(f"{len(prompts)} prompts need as many prompt ids; found {len(ids)}.")
    if head is not None:
        backbone.require(head.spec)
    guided = (head is not None and guidance.active) or not guidance.samples
    if guided and guidance.mode in RANKING and temperature == 0:
        raise CoalaError(
            f"Mode {guidance.mode!r} chooses among samples, which temperature 0 makes all the same. "
            "Give a temperature above 0, or mode 'token' or 'beam'."
        )
    context = backbone.max_tokens
    longest_prompt = max(context - max_new_tokens, context // 2)
    rows = [backbone.render(prompt, max_tokens=longest_prompt).tokens for prompt in prompts]
    # A long prompt may be cut elsewhere at extraction, which leaves no room for a reply.
    read = rows
    if head is not None and head.needs_prompt:
        read = [backbone.render(prompt, max_tokens=head.spec.max_tokens).tokens for prompt in prompts]
    replies = [
        Reply(
            index,
            ids[index],
            min(max_new_tokens, context - len(row)),
            _reader(backbone, row),
            account=Account(guidance.budget),
        )
        for index, row in enumerate(rows)
    ]
    stops = (*stop, *backbone.stop_texts)
    decoder = Decoder(
        backbone,
        head,
        guidance if guided else Guidance("none", top_k=guidance.top_k, top_p=guidance.top_p),
        seed=seed,
        temperature=temperature,
        stop=stops,
        stream=None if on_token is None else Stream(on_token, stops),
    )
    # Prompts of like length share a batch, which saves padding.
    order = sorted(range(len(rows)), key=lambda index: len(rows[index]))
    for first in range(0, len(order), batch_size):
        batch = order[first : first + batch_size]
        start = decoder.begin(
            [rows[index] for index in batch], [read[index] for index in batch], [replies[index] for index in batch]
        )
        WAYS[decoder.guidance.mode](decoder, start)
    return [_generation(reply, head, decoder.guidance, seed) for reply in replies]


def _generation(reply: Reply, head: ConvexHead | None, guidance: Guidance, seed: int) -> Generation:
    score = math.nan if head is None else _final_score(head, reply)
    log_prob = float(sum(reply.log_probs))
    found = (reply.prompt_id, reply.text, str(guidance), len(reply.tokens), seed, score, log_prob)
    return Generation(*found, reply.account.spent if guidance.mode == "shift" else None)


def _final_score(head: ConvexHead, reply: Reply) -> float:
    prompt = None if reply.prompt is None else reply.prompt.cpu().numpy()
    return float(head.score(reply.features[-1].cpu().numpy(), prompt))


def _reader(backbone: LanguageModel, prompt: list[int]) -> Decode:
    """Tokens of a reply to text: what rendering turns into those tokens behind this prompt."""
    kind = backbone.template.partition(":")[0]
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


def _check(max_new_tokens: int, temperature: float, stop: Sequence[str], batch_size: int) -> None:
    if max_new_tokens < 1:
        raise CoalaError(f"max_new_tokens is {max_new_tokens}; expected at least 1.")
    if not (math.isfinite(temperature) and temperature >= 0):
        raise CoalaError(f"temperature is {temperature}; expected a finite number of at least 0 (0 is greedy).")
    if batch_size < 1:
        raise CoalaError(f"batch_size is {batch_size}; expected at least 1.")
    if isinstance(stop, str):
        raise CoalaError(f"stop is the string {stop!r}; expected a list of strings, such as stop=[{stop!r}].")
    if not all(stop):
        raise CoalaError("One of the stop strings is empty, which would end every reply at once. Leave it out.")
