"""Replies from prompts: :func:`generate`, and how guided and unguided sampling are coupled.

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

Mode ``distilled`` is plain sampling of the model as its distilled policy changes it, by the same noise, and the other
modes go over that model instead of the base model where ``Guidance.over`` says so.

A stop token ends the reply and is not part of it: as a candidate it is worth what the reply is worth as it stands
(with ``ends_with_eos`` features, which count the stop token, it is scored like any other).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from coala.backbone import LanguageModel
from coala.decoding.decoder import Decoder
from coala.decoding.distilled import beside_base
from coala.decoding.guidance import Guidance
from coala.decoding.replies import OnToken
from coala.decoding.requests import Prepared, Request, effective, generation, identified, prepare_all
from coala.decoding.search import WAYS, nobody
from coala.policies import DistilledPolicy
from coala.store import load_generations, save_generations
from coala.values import CoalaError, ConvexHead, Generation, Prompt, prompts_of


def generate(
    prompts: Sequence[Prompt],
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
    kept: Path | None = None,
    on_reply: Callable[[int, int], None] | None = None,
    with_base: bool = False,
) -> list[Generation]:
    """One reply per prompt, in their order, guided by ``head`` if there is one.

    A prompt is a text, a conversation of :class:`Turn`, or messages with ``role`` and ``content``. A reply's random
    numbers depend on ``seed`` and its prompt's id (its place in ``prompts`` if ``prompt_ids`` is not given) alone, so
    that batches change nothing beyond floating-point rounding; prompts of one id share their noise. A reply ends at a
    stop token, before the first of the ``stop`` strings and the model's own ``stop_texts``, after ``max_new_tokens`` or
    when the context is full. A prompt longer than the context less ``max_new_tokens`` loses its beginning, but keeps at
    least half the context. ``temperature`` 0 is greedy.

    ``on_token(index, piece)`` is handed pieces of text that add up to the reply: a block at a time in mode ``block``,
    the whole reply in modes ``best_of`` and ``beam``. ``on_reply(done, total)`` is told how many replies there are,
    before the first batch and after each.

    ``kept`` is a file to which the replies are written batch by batch, and from which those that are there are taken,
    if they are to the same ids. Its name should stand for all that decides them. Batches are then always the same
    prompts, so that a resumed call decodes what an unbroken one would have; else prompts of like length share one,
    which saves padding.

    In each :class:`Generation`, ``score`` is the head's score of the reply's pooled feature and ``log_prob`` the sum of
    the unrestricted log-probabilities, at temperature 1, of its ``n_tokens`` tokens; neither counts the stop token (but
    the feature does if it ``ends_with_eos``) or what a stop string cut off. Replies of mode ``shift`` tell their
    divergence. Without a head replies are unguided, but for ``beam``, which then searches by log-probability alone.

    Of a distilled policy, in its own mode or under a head, decoding asks the base model nothing: ``log_prob`` is nan.
    ``with_base`` reads each finished reply once more and fills it in, and in mode ``distilled`` the ``divergence``: the
    sum over the reply's steps of KL(policy || base) over the whole vocabulary at temperature 1, whose mean over replies
    is the divergence between the two distributions of replies, before top-k and top-p.

    A head with gates on the prompt is, for each prompt, the linear head of the gates that its features open; they are
    pooled once, from the prompt as extraction reads it.

    Raises :class:`CoalaError` for settings that cannot be carried out and :class:`SpecMismatch` for a head that was
    fitted on features of another model.
    """
    _check_types(backbone, head, guidance)
    conversations = prompts_of(prompts)
    ids = identified(conversations, prompt_ids, batch_size)
    if head is not None:
        backbone.require(head.spec)
    wanted = effective(guidance, head, temperature)
    done = _kept(kept, ids, batch_size)
    asked = partial(
        Request, guidance=guidance, max_new_tokens=max_new_tokens, seed=seed, temperature=temperature, stop=stop
    )
    parts = prepare_all(asked, conversations, ids, backbone, head, first=len(done), on_token=on_token)
    decoder = Decoder(backbone, head, wanted, temperature=temperature)

    def made(part: Prepared) -> Generation:
        found = generation(part.reply, head, wanted)
        return _beside(found, part, backbone.changed(0), decoder, guidance) if with_base else found

    n_done = len(done)
    if on_reply is not None:
        on_reply(n_done, len(ids))
    for some in decoded(decoder, parts, wanted, batch_size, by_length=kept is None):
        n_done += len(some)
        if kept is not None:
            done += [made(part) for part in some]
            save_generations(kept, done)
        if on_reply is not None:
            on_reply(n_done, len(ids))
    return done if kept is not None else [made(part) for part in parts]


def generate_distilled(
    prompts: Sequence[Prompt],
    backbone: LanguageModel,
    policy: DistilledPolicy,
    *,
    strength: float = 1.0,
    top_k: int = 50,
    top_p: float = 0.9,
    **options: Any,
) -> list[Generation]:
    """:func:`generate` in mode ``distilled`` with a ``policy`` of one's own, beside the base model; no head is needed.

    With the same seed and ids, strength 0 gives the unguided text token for token.
    """
    guidance = Guidance("distilled", strength, top_k=top_k, top_p=top_p)
    return generate(prompts, backbone.with_policy(policy), None, guidance, with_base=True, **options)


def _beside(found: Generation, part: Prepared, base: LanguageModel, decoder: Decoder, guidance: Guidance) -> Generation:
    """``found`` with what the base model says of it, where decoding has not asked."""
    if not decoder.guidance.change:
        return replace(found, divergence=0.0) if guidance.mode == "distilled" else found
    reply = part.reply
    ended = reply.finish == "stop" and reply.cut is None
    read = beside_base(base, decoder.backbone, part.row, reply.tokens, ended=ended)
    # What a head's choices add to the policy's divergence is not known.
    nats = float(read.divergence.sum()) if decoder.guidance.mode == "distilled" else found.divergence
    return replace(found, log_prob=float(read.base.sum()), divergence=nats)


def decoded(
    decoder: Decoder, parts: Sequence[Prepared], guidance: Guidance, batch_size: int, *, by_length: bool = True
) -> Iterator[Sequence[Prepared]]:
    """Decode the replies of ``parts`` to their ends, a batch after the other; prompts of like length share one."""
    order = sorted(parts, key=lambda part: len(part.row)) if by_length else parts
    for first in range(0, len(order), batch_size):
        some = order[first : first + batch_size]
        start = decoder.begin([part.row for part in some], [part.read for part in some], [part.reply for part in some])
        for _ in WAYS[guidance.mode](decoder, start, nobody):
            pass
        yield some


def _kept(path: Path | None, ids: Sequence[str], batch_size: int) -> list[Generation]:
    """The replies there are of whole batches; none of others' ids."""
    found = load_generations(path) if path is not None and path.exists() else []
    if [reply.prompt_id for reply in found] != list(ids[: len(found)]):
        return []
    return found if len(found) == len(ids) else found[: len(found) - len(found) % batch_size]


def _check_types(backbone: object, head: object, guidance: object) -> None:
    if not isinstance(backbone, LanguageModel):
        raise CoalaError(
            f"Found a model of type {type(backbone).__name__}; expected what coala.load_backbone(FOLDER) returns."
        )
    if not isinstance(head, ConvexHead | None):
        raise CoalaError(
            f"Found a head of type {type(head).__name__}; expected what coala.load_head(RUN/head) returns, or None."
        )
    if not isinstance(guidance, Guidance):
        raise CoalaError(f"Found guidance of type {type(guidance).__name__}; expected coala.Guidance(...).")
