"""The decoding loop: which token comes next. Knows the model only through ``LanguageModel`` and ``Prefix``.

Every choice is coupled to unguided decoding. A step draws one Gumbel variable g(c) per token c of the restricted base
distribution p, a function of (seed, prompt, step, c) alone. The unguided token is ``argmax log p(c) + g(c)``, an exact
sample of p (the Gumbel-max trick). Guided decoding asks the head about the k tokens with the largest ``log p + g``, k
distinct samples of p without replacement, and takes

    argmax over these k of  log p(c) + strength * score(c) + g(c),

with the scores normalised over the k (App. H.3). So strength 0 gives the unguided text token for token, a guided text
leaves the unguided one only where the head outweighs chance, and as k grows to the whole nucleus the choice becomes an
exact sample of ``p exp(strength * score)``. Sampling once more among k candidates, as App. H.3 describes, sharpens the
distribution even at strength 0, for the likely tokens are among the candidates more often: a lower perplexity that the
head has no part in. Temperature 0 leaves the noise out.

A stop token ends the reply and is not part of it: as a candidate it is worth what the reply is worth as it stands
(with ``ends_with_eos`` features, which count the stop token, it is scored like any other).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from coala.backbone import POOLINGS, LanguageModel, Prefix, RunningState
from coala.decoding.guidance import Guidance, reweight
from coala.decoding.replies import Decode, OnToken, Reply, Stream
from coala.decoding.sampling import gumbel, restrict, stream_key
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

    ``on_token(index, piece)`` is handed pieces of text that add up to the reply; in block mode a block at a time.

    In each :class:`Generation`, ``score`` is the head's score of the reply's pooled feature and ``log_prob`` the sum of
    the unrestricted log-probabilities, at temperature 1, of its ``n_tokens`` tokens; neither counts the stop token (but
    the feature does if it ``ends_with_eos``) or what a stop string cut off.

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
    guided = head is not None and guidance.active
    if guided and guidance.mode == "block" and temperature == 0:
        raise CoalaError(
            "Block guidance chooses among sampled blocks, which temperature 0 makes all the same. "
            "Give a temperature above 0, or mode 'token'."
        )
    context = backbone.max_tokens
    longest_prompt = max(context - max_new_tokens, context // 2)
    rows = [backbone.render(prompt, max_tokens=longest_prompt).tokens for prompt in prompts]
    # A long prompt may be cut elsewhere at extraction, which leaves no room for a reply.
    read = rows
    if head is not None and head.needs_prompt:
        read = [backbone.render(prompt, max_tokens=head.spec.max_tokens).tokens for prompt in prompts]
    replies = [
        Reply(index, ids[index], min(max_new_tokens, context - len(row)), _reader(backbone, row))
        for index, row in enumerate(rows)
    ]
    stops = (*stop, *backbone.stop_texts)
    decoder = _Decoder(
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
        decoder.decode(
            [rows[index] for index in batch], [read[index] for index in batch], [replies[index] for index in batch]
        )
    return [
        Generation(
            prompt_id=reply.prompt_id,
            text=reply.text,
            method=str(decoder.guidance),
            n_tokens=len(reply.tokens),
            seed=seed,
            score=math.nan if head is None else _final_score(head, reply),
            log_prob=float(sum(reply.log_probs)),
        )
        for reply in replies
    ]


def _final_score(head: ConvexHead, reply: Reply) -> float:
    prompt = None if reply.prompt is None else reply.prompt.cpu().numpy()
    return float(head.score(reply.features[-1].cpu().numpy(), prompt))


def log_likelihood(
    prompts: Sequence[Sequence[Turn]], texts: Sequence[str], backbone: LanguageModel, *, batch_size: int = 16
) -> list[tuple[float, int]]:
    """Log-probability of each text as a reply to its prompt under the base model, and how many tokens it has.

    The text is tokenised as the backbone renders it; the end of the reply is not counted, and prompt and text are cut
    to the context as features are. Perplexity is ``exp(-sum of log-probabilities / sum of tokens)``.
    """
    if len(texts) != len(prompts):
        raise CoalaError(f"{len(prompts)} prompts need as many texts; found {len(texts)}.")
    if batch_size < 1:
        raise CoalaError(f"batch_size is {batch_size}; expected at least 1.")
    rows = [backbone.render(prompt, text) for prompt, text in zip(prompts, texts, strict=True)]
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


def _pick(log_probs: torch.Tensor, tokens: torch.Tensor) -> list[float]:
    return [float(value) for value in log_probs.gather(1, tokens[:, None])[:, 0].cpu()]


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


class _Batch:
    """Rows that have not ended, all with the same number of generated tokens.

    With a head, ``pooled`` are their features so far and ``linear`` (B, d + 1) the linear block of each row's head.
    """

    def __init__(
        self, prefix: Prefix, pooled: RunningState | None, linear: torch.Tensor | None, replies: list[Reply]
    ) -> None:
        self.prefix, self.pooled, self.linear, self.replies = prefix, pooled, linear, replies

    def select(self, rows: list[int], replies: list[Reply]) -> _Batch:
        """These rows, each as often as it is named, as ``replies``."""
        pooled = None if self.pooled is None else self.pooled.select(rows)
        linear = None if self.linear is None else self.linear[rows]
        return _Batch(self.prefix.select(rows), pooled, linear, replies)

    def ended(self) -> _Batch:
        """No rows at all."""
        return _Batch(self.prefix, None, None, [])


class _Decoder:
    """What all steps of a :func:`generate` call share."""

    def __init__(
        self,
        backbone: LanguageModel,
        head: ConvexHead | None,
        guidance: Guidance,
        *,
        seed: int,
        temperature: float,
        stop: tuple[str, ...],
        stream: Stream | None,
    ) -> None:
        self.backbone, self.head, self.guidance = backbone, head, guidance
        self.seed, self.temperature, self.stop, self.stream = seed, temperature, stop, stream
        self.score = None if head is None else _scorer(head, backbone.device)
        self.counts_stop = head is not None and head.spec.ends_with_eos
        self.stop_tokens = sorted(backbone.stop_tokens)

    def decode(self, rows: list[list[int]], read: list[list[int]], replies: list[Reply]) -> None:
        """Complete ``replies`` to the prompts ``rows``, which features are extracted from as ``read``."""
        head = self.head
        prefix = self.backbone.start(rows, -1 if head is None else head.spec.layer)
        batch = _Batch(prefix, None, None, replies)
        if head is not None:
            batch.pooled = POOLINGS[head.spec.pooling].begin(prefix)
            for reply, feature in zip(replies, batch.pooled.value, strict=True):
                reply.features = [feature]
            linear = np.broadcast_to(head.linear, (len(rows), len(head.linear)))
            if head.needs_prompt:
                prompts = self._prompt_features(head, prefix, rows, read)
                for reply, feature in zip(replies, prompts, strict=True):
                    reply.prompt = feature
                linear = np.stack([head.given(feature).linear for feature in prompts.cpu().numpy()])
            batch.linear = torch.tensor(linear, device=self.backbone.device)
        while batch.replies:
            batch = self._best_block(batch) if self.guidance.mode == "block" else self._step(batch, self.stream)

    def _prompt_features(
        self, head: ConvexHead, prefix: Prefix, rows: list[list[int]], read: list[list[int]]
    ) -> torch.Tensor:
        """Features (B, d) of the prompts: those of ``prefix``, but for the prompts that are read another way."""
        pooling = POOLINGS[head.spec.pooling]
        features = pooling.prompt(prefix)
        other = [row for row in range(len(rows)) if rows[row] != read[row]]
        if other:
            hidden = self.backbone.hidden([read[row] for row in other], head.spec.layer)
            length = torch.tensor([len(read[row]) for row in other], device=hidden.device)
            features = features.index_copy(
                0, torch.tensor(other, device=hidden.device), pooling.pool(hidden, torch.zeros_like(length), length)
            )
        return features

    def _step(self, batch: _Batch, stream: Stream | None) -> _Batch:
        """Let every row grow by one token; the rows that it has not ended are left."""
        chosen, log_probs = self._choose(batch)
        stops = [token in self.backbone.stop_tokens for token in chosen]
        if not all(stops) or self.counts_stop:
            batch.prefix.push(torch.tensor(chosen, device=self.backbone.device))
            if batch.pooled is not None:
                batch.pooled.push(batch.prefix.state())
        features = None if batch.pooled is None else batch.pooled.value
        going = []
        for row, reply in enumerate(batch.replies):
            if features is not None and (self.counts_stop or not stops[row]):
                if not self.stop:  # only a stop string may lead back to an earlier feature
                    reply.features.clear()
                reply.features.append(features[row])
            ended = stops[row]
            if not ended:
                reply.tokens.append(chosen[row])
                reply.log_probs.append(log_probs[row])
                ended = bool(self.stop) and reply.cut_at(self.stop)
                ended = ended or len(reply.tokens) >= reply.room
            if not ended:
                going.append(row)
            if stream is not None:
                stream.send(reply, last=ended)
        if len(going) == len(batch.replies):
            return batch
        return batch.select(going, [batch.replies[row] for row in going]) if going else batch.ended()

    def _choose(self, batch: _Batch) -> tuple[list[int], list[float]]:
        """The next token of every row and its log-probability under the base model."""
        nucleus = restrict(
            batch.prefix.log_probs(),
            temperature=self.temperature,
            top_k=self.guidance.top_k,
            top_p=self.guidance.top_p,
        )
        step = len(batch.replies[0].tokens)
        noise = np.zeros_like(nucleus.log_probs)
        if self.temperature > 0:
            keys = [stream_key(self.seed, reply.prompt_id, reply.branch, step) for reply in batch.replies]
            noise = gumbel(keys, nucleus.tokens)
        # Stable, so that greedy ties go to the same token in every mode.
        order = np.argsort(-(nucleus.log_probs + noise), axis=1, kind="stable")
        rank = order[:, 0]
        # In a nucleus of one token there is nothing to choose.
        wide = min(self.guidance.candidates, int(np.isfinite(nucleus.log_probs).sum(1).max()))
        if self.guidance.mode in ("token", "prefix") and step % self.guidance.interval == 0 and wide > 1:
            ranks = order[:, :wide]
            log_probs = np.take_along_axis(nucleus.log_probs, ranks, 1)
            tokens = np.take_along_axis(nucleus.tokens, ranks, 1)
            tokens = np.where(np.isfinite(log_probs), tokens, tokens[:, :1])
            weights = reweight(log_probs, self._preview(batch, tokens), self.guidance.strength, self.guidance.rule)
            best = (weights + np.take_along_axis(noise, ranks, 1)).argmax(1)
            rank = ranks[np.arange(len(ranks)), best]
        rows = np.arange(len(rank))
        return nucleus.tokens[rows, rank].tolist(), nucleus.base[rows, rank].tolist()

    def _preview(self, batch: _Batch, tokens: NDArray[np.int64]) -> NDArray[np.float32]:
        """Head scores (B, k) of the replies extended by each candidate ``tokens`` (B, k)."""
        assert batch.pooled is not None
        assert batch.linear is not None
        assert self.score is not None
        features = batch.pooled.peek(batch.prefix.peek(torch.from_numpy(tokens)))
        if not self.counts_stop:
            stops = torch.from_numpy(np.isin(tokens, self.stop_tokens)).to(features.device)
            features = torch.where(stops[..., None], batch.pooled.value[:, None], features)
        return self.score(features, batch.linear)

    def _best_block(self, batch: _Batch) -> _Batch:
        """Let every row grow by the best of several blocks, the first of which is the unguided one."""
        assert batch.linear is not None
        assert self.score is not None
        n = self.guidance.candidates
        branches = [reply.branched(branch) for reply in batch.replies for branch in range(n)]
        wide = batch.select([row for row in range(len(batch.replies)) for _ in range(n)], branches)
        for _ in range(self.guidance.block_tokens):
            if not wide.replies:
                break
            wide = self._step(wide, None)
        features = torch.stack([branch.features[-1] for branch in branches])
        best = self.score(features.reshape(-1, n, features.shape[-1]), batch.linear).argmax(1)
        place = {id(branch): row for row, branch in enumerate(wide.replies)}
        going, replies = [], []
        for row, reply in enumerate(batch.replies):
            winner = branches[row * n + int(best[row])]
            reply.become(winner)
            if id(winner) in place:
                going.append(place[id(winner)])
                replies.append(reply)
            if self.stream is not None:
                self.stream.send(reply, last=id(winner) not in place)
        return wide.select(going, replies) if going else batch.ended()


def _scorer(head: ConvexHead, device: torch.device) -> Callable[[torch.Tensor, torch.Tensor], NDArray[np.float32]]:
    """``head.score`` on the model's device: only scores leave it, not hidden states."""
    gates, weights = (torch.from_numpy(part).to(device) for part in (head.gates, head.weights))

    def score(h: torch.Tensor, linear: torch.Tensor) -> NDArray[np.float32]:
        """Scores (B, k) of features h (B, k, d), row b by the head with the linear block ``linear[b]`` (d + 1,)."""
        scores = torch.einsum("bkd,bd->bk", h, linear[:, :-1]) + linear[:, -1:]
        if head.n_neurons and not head.needs_prompt:  # gates on the prompt are in the linear block
            is_open = h @ gates[:, :-1].T + gates[:, -1] >= 0
            scores = scores + torch.where(is_open, h @ weights[:, :-1].T + weights[:, -1], 0.0).sum(-1)
        found: NDArray[np.float32] = scores.cpu().numpy()
        if not np.isfinite(found).all():
            raise CoalaError(
                "The head's scores are not finite (nan or inf): the model's hidden states overflow. "
                "Load the model with dtype float32 or bfloat16."
            )
        return found

    return score
