"""Rows that grow together, token by token: the head's view of candidates, and the choice among them.

Knows the model only through ``LanguageModel`` and ``Prefix``; see :mod:`coala.decoding.generation` for the mathematics.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from coala.backbone import POOLINGS, LanguageModel, Prefix, RunningState
from coala.decoding.budget import STRENGTHS, centred, divergence
from coala.decoding.guidance import Float64, Guidance, reach, reweight, scaled, unit
from coala.decoding.replies import Reply
from coala.decoding.sampling import Nucleus, gumbel, restrict, stream_key
from coala.values import CoalaError, ConvexHead


class Batch:
    """Rows that have not ended, each with as many generated tokens as its reply has.

    With a head, ``pooled`` are their features so far, ``features`` (B, d) their value after the latest token, and
    ``linear`` (B, d + 1) the linear block of each row's head.
    """

    def __init__(
        self, prefix: Prefix, pooled: RunningState | None, linear: torch.Tensor | None, replies: list[Reply]
    ) -> None:
        self.prefix, self.pooled, self.linear, self.replies = prefix, pooled, linear, replies
        self.features: torch.Tensor | None = None

    def select(self, rows: Sequence[int], replies: list[Reply]) -> Batch:
        """These rows, each as often as it is named, as ``replies``."""
        if not rows:
            return Batch(self.prefix, None, None, [])
        if list(rows) == list(range(len(self.replies))):  # nothing to copy
            return Batch(self.prefix, self.pooled, self.linear, replies)
        pooled = None if self.pooled is None else self.pooled.select(rows)
        linear = None if self.linear is None else self.linear[list(rows)]
        return Batch(self.prefix.select(rows), pooled, linear, replies)

    def join(self, others: Sequence[Batch]) -> Batch:
        """The rows of this batch and of ``others``; empty ones leave nothing."""
        parts = [batch for batch in (self, *others) if batch.replies]
        if len(parts) < 2:
            return parts[0] if parts else self
        first, rest = parts[0], parts[1:]
        pooled = None if first.pooled is None else first.pooled.join([part.pooled for part in rest])
        linear = None if first.linear is None else torch.cat([part.linear for part in parts if part.linear is not None])
        replies = [reply for part in parts for reply in part.replies]
        return Batch(Prefix.joined([part.prefix for part in parts]), pooled, linear, replies)


class Decoder:
    """What the steps of replies with the same ``guidance`` and ``temperature`` have in common."""

    def __init__(
        self, backbone: LanguageModel, head: ConvexHead | None, guidance: Guidance, *, temperature: float
    ) -> None:
        self.backbone = backbone.changed(guidance.change)
        self.head, self.guidance, self.temperature = head, guidance, temperature
        # Scores as the rule takes them: log-odds by the calibrated one.
        self.score = None if head is None else _scorer(head, backbone.device, unit(guidance.rule, head.evidence))
        self.counts_stop = head is not None and head.spec.ends_with_eos
        self.stop_tokens = sorted(backbone.stop_tokens)

    def begin(self, rows: list[list[int]], read: list[list[int]], replies: list[Reply]) -> Batch:
        """Empty ``replies`` to the prompts ``rows``, which features are extracted from as ``read``."""
        head = self.head
        if head is None:
            prefix = self.backbone.start(rows)
        else:
            prefix = self.backbone.start(rows, head.spec.layer, scored=POOLINGS[head.spec.pooling].scored)
        batch = Batch(prefix, None, None, replies)
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
        return batch

    def _prompt_features(
        self, head: ConvexHead, prefix: Prefix, rows: list[list[int]], read: list[list[int]]
    ) -> torch.Tensor:
        """Features (B, d) of the prompts: those of ``prefix``, but for the prompts that are read another way."""
        pooling = POOLINGS[head.spec.pooling]
        features = pooling.prompt(prefix)
        other = [row for row in range(len(rows)) if rows[row] != read[row]]
        if other:
            hidden = self.backbone.hidden([read[row] for row in other], head.spec.layer, scored=pooling.scored)
            length = torch.tensor([len(read[row]) for row in other], device=hidden.device)
            features = features.index_copy(
                0, torch.tensor(other, device=hidden.device), pooling.pool(hidden, torch.zeros_like(length), length)
            )
        return features

    # --- one token more ------------------------------------------------------------------------------------------

    def step(self, batch: Batch) -> Batch:
        """Let every row grow by one token; the rows that it has not ended are left."""
        nucleus = self.nucleus(batch)
        ranks = self._choose(batch, nucleus)
        rows = np.arange(len(ranks))
        chosen, log_probs = nucleus.tokens[rows, ranks].tolist(), nucleus.base[rows, ranks].tolist()
        stops = [token in self.backbone.stop_tokens for token in chosen]
        if not all(stops) or self.counts_stop:
            self.push(batch, chosen)
        going = []
        for row, reply in enumerate(batch.replies):
            if reply.n_top and not stops[row]:
                top = nucleus.tokens[row, : reply.n_top].tolist(), nucleus.base[row, : reply.n_top].tolist()
                reply.alternatives.append(list(zip(*top, strict=True)))
            if not self.grow(batch, row, reply, chosen[row], log_probs[row]):
                going.append(row)
            reply.send()
        return batch.select(going, [batch.replies[row] for row in going])

    def push(self, batch: Batch, tokens: list[int]) -> None:
        """Append one token to every row of the model's state."""
        batch.prefix.push(torch.tensor(tokens, device=self.backbone.device))
        if batch.pooled is not None:
            batch.pooled.push(batch.prefix.state())
            batch.features = batch.pooled.value

    def grow(self, batch: Batch, row: int, reply: Reply, token: int, log_prob: float) -> bool:
        """Enter the token that was pushed to ``row`` in its ``reply``; whether that ends it, as it then tells."""
        stops = token in self.backbone.stop_tokens
        if batch.features is not None and (self.counts_stop or not stops):
            if not reply.stop:  # only a stop string may lead back to an earlier feature
                reply.features.clear()
            reply.features.append(batch.features[row])
        if not stops:
            reply.tokens.append(token)
            reply.log_probs.append(log_prob)
        if stops or (reply.stop and reply.cut_at_stop()):
            reply.finish = "stop"
        elif len(reply.tokens) >= reply.room:
            reply.finish = "length"
        elif reply.halt.asked:
            reply.finish = "cancelled"
        return reply.finish != ""

    # --- which token ---------------------------------------------------------------------------------------------

    def nucleus(self, batch: Batch) -> Nucleus:
        return restrict(
            batch.prefix.log_probs(),
            temperature=self.temperature,
            top_k=self.guidance.top_k,
            top_p=self.guidance.top_p,
        )

    def preview(self, batch: Batch, tokens: NDArray[np.int64]) -> Float64:
        """Scores (B, k), as the rule takes them, of the replies extended by each candidate ``tokens`` (B, k)."""
        assert batch.pooled is not None
        assert batch.linear is not None
        assert self.score is not None
        features = batch.pooled.peek(batch.prefix.peek(torch.from_numpy(tokens)))
        if not self.counts_stop:
            stops = np.isin(tokens, self.stop_tokens)
            if stops.any():
                at = torch.from_numpy(stops).to(features.device)
                features = torch.where(at[..., None], batch.pooled.value[:, None], features)
        return self.score(features, batch.linear)

    def _choose(self, batch: Batch, nucleus: Nucleus) -> NDArray[np.intp]:
        """The rank (B,) of every row's next token."""
        steps = np.array([len(reply.tokens) for reply in batch.replies])
        noise = np.zeros_like(nucleus.log_probs)
        if self.temperature > 0:
            keys = [stream_key(r.seed, r.prompt_id, r.branch, len(r.tokens)) for r in batch.replies]
            noise = gumbel(keys, nucleus.tokens)
        guide = {"token": self._resample, "prefix": self._resample, "shift": self._shift}.get(self.guidance.mode)
        due = steps % self.guidance.interval == 0
        if guide is None or not due.any():
            rank: NDArray[np.intp] = (nucleus.log_probs + noise).argmax(1)  # of equals the first, in every mode
            return rank
        return guide(batch, nucleus, noise, due)

    def _resample(self, batch: Batch, nucleus: Nucleus, noise: Float64, due: NDArray[np.bool_]) -> NDArray[np.intp]:
        """Ranks (B,) of the best of the k candidates with the largest log p + noise, once they are reweighted.

        Rows that are not ``due`` (B,) keep the first.
        """
        strength, rule, k = self.guidance.strength, self.guidance.rule, self.guidance.candidates
        perturbed = nucleus.log_probs + noise
        order = np.argsort(-perturbed, axis=1, kind="stable")[:, :k]
        first: NDArray[np.intp] = order[:, 0]
        leading = np.take_along_axis(perturbed, order, 1)
        sizes = np.isfinite(leading).sum(1)
        # Where the first leads by more than the head could make up for, what the head would say changes nothing.
        lead = leading[:, 0] - leading[:, 1] if leading.shape[1] > 1 else np.full(len(leading), np.inf)
        asked = due & (sizes > 1) & (lead <= strength * reach(rule, leading.shape[1]))
        if not asked.any():
            return first
        ranks = order[:, : sizes[asked].max()]
        log_probs = np.take_along_axis(nucleus.log_probs, ranks, 1)
        tokens = np.take_along_axis(nucleus.tokens, ranks, 1)
        tokens = np.where(np.isfinite(log_probs), tokens, tokens[:, :1])
        weights = reweight(log_probs, self.preview(batch, tokens), strength, rule)
        best = (weights + np.take_along_axis(noise, ranks, 1)).argmax(1)
        return np.where(asked, ranks[np.arange(len(ranks)), best], first)

    def _shift(self, batch: Batch, nucleus: Nucleus, noise: Float64, due: NDArray[np.bool_]) -> NDArray[np.intp]:
        """Ranks (B,) of samples of the tilted distribution; what that costs is entered in the replies' accounts.

        The distribution of rows that are not ``due`` (B,) is not tilted.
        """
        perturbed = nucleus.log_probs + noise
        sizes = np.isfinite(nucleus.log_probs).sum(1)
        asked = due & (sizes > 1) & np.array([not reply.account.closed for reply in batch.replies])
        if not asked.any():
            unguided: NDArray[np.intp] = perturbed.argmax(1)
            return unguided
        k = min(self.guidance.candidates, int(sizes[asked].max()))
        log_probs = nucleus.log_probs[:, :k]
        # The others are not shifted, so the choice is among the scored and the first of the others: it is peeked too,
        # and whatever is chosen is then known already.
        unscored = perturbed[:, k:]
        other = unscored.argmax(1) + k if unscored.shape[1] else np.zeros(len(perturbed), dtype=np.intp)
        ranks = np.concatenate([np.tile(np.arange(k), (len(other), 1)), other[:, None]], axis=1)
        if not np.isfinite(unscored).any():
            ranks = ranks[:, :k]
        tokens = np.take_along_axis(nucleus.tokens, ranks, 1)
        tokens = np.where(np.isfinite(np.take_along_axis(nucleus.log_probs, ranks, 1)), tokens, tokens[:, :1])
        tilt = centred(
            log_probs, scaled(self.preview(batch, tokens)[:, :k], np.isfinite(log_probs), self.guidance.rule)
        )
        strengths = self._strengths(batch, log_probs, tilt, asked)
        costs = divergence(log_probs, tilt, strengths[:, None])[:, 0]
        for row in np.nonzero(asked)[0]:
            batch.replies[row].account.spent += float(costs[row])
        perturbed[:, :k] += strengths[:, None] * tilt
        rank: NDArray[np.intp] = perturbed.argmax(1)
        return rank

    def _strengths(self, batch: Batch, log_probs: Float64, tilt: Float64, asked: NDArray[np.bool_]) -> Float64:
        """The strength (B,) each row's tilt has at this step: the one that is set, or what its account allows."""
        strengths = np.where(asked, self.guidance.strength, 0.0)
        if self.guidance.budget is None:
            return strengths
        costs = divergence(log_probs, tilt, STRENGTHS)
        for row in np.nonzero(asked)[0]:
            reply = batch.replies[row]
            steps_left = -(-(reply.room - len(reply.tokens)) // self.guidance.interval)
            within = reply.account.strength(costs[row], steps_left)
            # A budget bounds what guidance may cost; it is no evidence that would call for it.
            strengths[row] = min(within, self.guidance.strength) if self.guidance.weighs else within
        return strengths


def _scorer(head: ConvexHead, device: torch.device, unit: float) -> Callable[[torch.Tensor, torch.Tensor], Float64]:
    """``head.score`` times ``unit`` on the model's device: only scores leave it, not hidden states."""
    gates, weights = (torch.from_numpy(part).to(device) for part in (head.gates, head.weights))

    def score(h: torch.Tensor, linear: torch.Tensor) -> Float64:
        """Scores (B, k) of features h (B, k, d), row b by the head with the linear block ``linear[b]`` (d + 1,)."""
        scores = torch.einsum("bkd,bd->bk", h, linear[:, :-1]) + linear[:, -1:]
        if head.n_neurons and not head.needs_prompt:  # gates on the prompt are in the linear block
            is_open = h @ gates[:, :-1].T + gates[:, -1] >= 0
            scores = scores + torch.where(is_open, h @ weights[:, :-1].T + weights[:, -1], 0.0).sum(-1)
        found: Float64 = scores.double().cpu().numpy()
        if not np.isfinite(found).all():
            raise CoalaError(
                "The head's scores are not finite (nan or inf): the model's hidden states overflow. "
                "Load the model with dtype float32 or bfloat16."
            )
        return found * unit

    return score
