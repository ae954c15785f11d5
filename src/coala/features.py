"""Pairs to features: render, batch by length, encode with the frozen model, pool; shard by shard, a kill costs little.

Knows which rows share a forward pass and a shard; nothing of models beyond ``hidden`` and of files beyond the store.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from coala.backbone import POOLINGS, LanguageModel
from coala.store import FeatureStore, save_json
from coala.values import CoalaError, FeatureSet, FeatureSpec, Float32, Pair

OnBatch = Callable[[int, int, int], None]
# By name, one entry per row: "features" (rows, d) float32 and, where asked for, "log_probs" (rows,) float64.
_Encoded = dict[str, NDArray[Any]]

# A shard is closed after this many rows or padded tokens: seconds of work, on whatever machine suits the model.
SHARD_ROWS = 2048
SHARD_TOKENS = 65_536


@dataclass(frozen=True, eq=False)
class Survey:
    """What an extraction will read, known before any of it is done.

    ``tokens``, ``start`` and ``stop`` hold the distinct rows, longest first: the reply of row r is tokens
    ``start[r]`` to ``stop[r]``. ``index`` (n, 2) names the rows of each pair's chosen and rejected reply, ``prompt``
    (n,), if prompts are encoded too, that of its prompt alone, pooled from token 0 on. ``dropped`` counts what
    truncation took from each row.
    """

    tokens: list[NDArray[np.int32]]
    start: NDArray[np.int64]
    stop: NDArray[np.int64]
    dropped: NDArray[np.int64]
    index: NDArray[np.int64]
    prompt: NDArray[np.int64] | None = None

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each distinct row, longest first."""
        return np.array([len(row) for row in self.tokens], dtype=np.int64)

    @property
    def reply_lengths(self) -> NDArray[np.int64]:
        """Tokens of the reply in each distinct row that has one."""
        return (self.stop - self.start)[self.start > 0]

    @property
    def facts(self) -> dict[str, int]:
        """Counts for reports: the same for every extraction of these pairs with this model and spec.

        ``rows`` and ``tokens`` count what is encoded, each distinct row once, ``prompts`` those of them that are
        prompts by themselves; the other counts are over all replies.
        """
        replies = self.index.reshape(-1)
        prompts = {} if self.prompt is None else {"prompts": len(np.unique(self.prompt))}
        return {
            "pairs": len(self.index),
            "replies": len(replies),
            "rows": len(self.tokens),
            "tokens": int(self.lengths.sum()),
            "longest_row": int(self.lengths.max(initial=0)),
            "truncated_replies": int((self.dropped[replies] > 0).sum()),
            "dropped_tokens": int(self.dropped[replies].sum()),
            "empty_replies": int((self.start >= self.stop)[replies].sum()),
            **prompts,
        }

    @property
    def digest(self) -> str:
        """SHA-256 of the rows in their order."""
        total = hashlib.sha256()
        for tokens, start, stop in zip(self.tokens, self.start, self.stop, strict=True):
            total.update(np.array([len(tokens), start, stop], dtype="<i8").tobytes())
            total.update(tokens.astype("<i4").tobytes())
        return total.hexdigest()

    def batches(self, batch_tokens: int) -> list[range]:
        """Consecutive rows of at most ``batch_tokens`` tokens, padding counted; a longer row is a batch of its own."""
        batches: list[range] = []
        first = 0
        lengths = self.lengths
        for row in range(1, len(lengths) + 1):
            if row == len(lengths) or (row + 1 - first) * lengths[first] > batch_tokens:
                batches.append(range(first, row))
                first = row
        return batches

    def shards(self, batch_tokens: int) -> list[list[range]]:
        """Whole batches, grouped as they are written."""
        shards: list[list[range]] = []
        rows = tokens = 0
        for batch in self.batches(batch_tokens):
            if not shards or rows >= SHARD_ROWS or tokens >= SHARD_TOKENS:
                shards.append([])
                rows = tokens = 0
            shards[-1].append(batch)
            rows += len(batch)
            tokens += len(batch) * len(self.tokens[batch.start])
        return shards


def survey(
    pairs: Sequence[Pair], backbone: LanguageModel, spec: FeatureSpec, *, prompt_features: bool = False
) -> Survey:
    """Render every row as :func:`extract` would, and count; raises ``SpecMismatch`` for another model's spec."""
    backbone.require(spec)
    seen: dict[tuple[bytes, int, int], int] = {}
    rows: list[tuple[NDArray[np.int32], int, int, int]] = []
    index = np.zeros((len(pairs), 3 if prompt_features else 2), dtype=np.int64)
    for i, pair in enumerate(pairs):
        for side, reply in enumerate((pair.chosen, pair.rejected, None)[: index.shape[1]]):
            row = backbone.render(pair.prompt, reply, max_tokens=spec.max_tokens, ends_with_eos=spec.ends_with_eos)
            tokens, start = np.array(row.tokens, dtype=np.int32), 0 if reply is None else row.start
            # Rows are distinct if what was cut off differs: their features do not, but their counts do.
            key = (tokens.tobytes(), start, row.dropped)
            if key not in seen:
                seen[key] = len(rows)
                rows.append((tokens, start, row.stop, row.dropped))
            index[i, side] = seen[key]
    # Longest first: memory is short at once or never, and an estimate of the time left errs on the safe side.
    order = sorted(range(len(rows)), key=lambda r: (-len(rows[r][0]), rows[r][0].tobytes(), rows[r][1], rows[r][3]))
    place = np.empty(len(rows), dtype=np.int64)
    place[order] = np.arange(len(rows))
    counts = np.array([rows[r][1:] for r in order], dtype=np.int64).reshape(-1, 3)
    replies, prompts = place[index[:, :2]], place[index[:, 2]] if prompt_features else None
    return Survey([rows[r][0] for r in order], counts[:, 0], counts[:, 1], counts[:, 2], replies, prompts)


def extract(
    pairs: Sequence[Pair],
    backbone: LanguageModel,
    spec: FeatureSpec,
    *,
    prompt_features: bool = False,
    log_ratios: bool = False,
    batch_tokens: int = 4096,
    store: FeatureStore | None = None,
    plan: Survey | None = None,
    on_batch: OnBatch | None = None,
) -> FeatureSet:
    """Features of ``pairs`` in their order; each distinct prompt with reply is encoded once.

    With ``prompt_features`` each distinct prompt is encoded by itself too, and its states pooled in the same way: what
    gates on the prompt act on. With ``log_ratios`` the same forward passes also give log pi(chosen | prompt)
    - log pi(rejected | prompt) under the model: the sum over the tokens that are pooled, at temperature 1. It needs the
    layers above ``spec.layer`` and the language-model head, at every token of a reply.

    ``batch_tokens`` bounds the tokens of one forward pass, padding counted. With a ``store``, shards are written as
    they come, and an extraction that was killed goes on from the last whole one; on the same machine the result is
    bit for bit that of an unbroken run. The store also receives ``facts.json``, the counts of :class:`Survey`.
    ``plan`` is what :func:`survey` made of the same arguments, if the caller has it already.
    ``on_batch(done_pairs, total_pairs, tokens)`` is called after every batch. On a GPU without memory for
    ``batch_tokens`` batches are split, which may change the last bits.

    Raises ``SpecMismatch`` if ``spec`` is not of ``backbone``, ``StoreError`` if the store holds another extraction,
    ``BackboneError`` for ``log_ratios`` of a model without a language-model head.
    """
    if batch_tokens < 1:
        raise CoalaError(f"batch_tokens is {batch_tokens}; expected at least 1 (4096 suits most machines).")
    if log_ratios:
        backbone.require_head("Log ratios")
    plan = survey(pairs, backbone, spec, prompt_features=prompt_features) if plan is None else plan
    shards = plan.shards(batch_tokens)
    finished: set[int] = set()
    if store is not None:
        finished = store.begin(_plan(plan, backbone, spec, batch_tokens, shards, log_ratios))
        save_json(store.folder / "facts.json", plan.facts)
    progress = _Progress(plan, on_batch)
    encoder = _Encoder(plan, backbone, spec, log_ratios)
    parts: list[_Encoded] = []
    for number, batches in enumerate(shards):
        if store is not None and number in finished:
            parts.append(store.read(number))
            progress(batches[-1].stop)
            continue
        encoded: list[_Encoded] = []
        for batch in batches:
            encoded.append(encoder(batch))
            progress(batch.stop)
        parts.append(_joined(encoded))
        if store is not None:
            store.write(number, parts[-1])
    nothing: _Encoded = {"features": np.empty((0, backbone.width), dtype=np.float32), "log_probs": np.empty(0)}
    rows = _joined(parts) if parts else nothing
    chosen, rejected = plan.index.T
    return FeatureSet(
        rows["features"][chosen],
        rows["features"][rejected],
        np.array([pair.group for pair in pairs], dtype=str),
        spec,
        prompt=None if plan.prompt is None else rows["features"][plan.prompt],
        log_ratio=rows["log_probs"][chosen] - rows["log_probs"][rejected] if log_ratios else None,
    )


def _joined(parts: Sequence[_Encoded]) -> _Encoded:
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _plan(
    plan: Survey,
    backbone: LanguageModel,
    spec: FeatureSpec,
    batch_tokens: int,
    shards: list[list[range]],
    log_ratios: bool,
) -> dict[str, Any]:
    """All that decides the bits of every shard."""
    return {
        "spec": spec,
        "rows": plan.digest,
        "batch_tokens": batch_tokens,
        "shards": [sum(map(len, batches)) for batches in shards],
        "dtype": str(backbone.dtype).removeprefix("torch."),
        "device": backbone.device.type,
        **({"log_ratios": True} if log_ratios else {}),
    }


class _Progress:
    """Turns rows done into pairs done: a pair is done when all its rows are."""

    def __init__(self, plan: Survey, on_batch: OnBatch | None) -> None:
        self._on_batch = on_batch
        last = plan.index.max(1, initial=0)
        self._last_rows = np.sort(last if plan.prompt is None else np.maximum(last, plan.prompt))
        self._tokens = np.concatenate([[0], np.cumsum(plan.lengths)])

    def __call__(self, rows_done: int) -> None:
        if self._on_batch is not None:
            done = int(np.searchsorted(self._last_rows, rows_done))
            self._on_batch(done, len(self._last_rows), int(self._tokens[rows_done]))


class _Encoder:
    """Encodes batches, in parts once the device has run out of memory."""

    def __init__(self, plan: Survey, backbone: LanguageModel, spec: FeatureSpec, log_probs: bool) -> None:
        self._plan, self._backbone, self._log_probs = plan, backbone, log_probs
        self._layer, self._pooling = spec.layer, POOLINGS[spec.pooling]
        self._most_tokens: int | None = None

    def __call__(self, batch: range) -> _Encoded:
        tokens = len(batch) * len(self._plan.tokens[batch.start])
        if self._most_tokens is None or tokens <= self._most_tokens or len(batch) == 1:
            try:
                return self._encode(batch)
            except torch.OutOfMemoryError as error:
                if len(batch) == 1:
                    raise CoalaError(
                        f"A single row of {tokens} tokens does not fit the device's memory. "
                        "Lower max_tokens, use a smaller model, or run on a CPU."
                    ) from error
                self._most_tokens = tokens // 2
            # Outside the handler, whose traceback would keep the failed pass's tensors alive.
            torch.cuda.empty_cache()
        middle = len(batch) // 2
        return _joined([self(batch[:middle]), self(batch[middle:])])

    def _encode(self, batch: range) -> _Encoded:
        plan, device = self._plan, self._backbone.device
        rows = [plan.tokens[row].tolist() for row in batch]
        start = torch.as_tensor(plan.start[batch.start : batch.stop], device=device)
        stop = torch.as_tensor(plan.stop[batch.start : batch.stop], device=device)
        encoded: _Encoded = {}
        if self._log_probs:
            # Of a prompt by itself, which begins at token 0, no token is counted.
            first = torch.where(start > 0, start, stop)
            hidden, log_probs = self._backbone.hidden_and_log_probs(rows, first, stop, self._layer)
            encoded["log_probs"] = log_probs.cpu().numpy()
        else:
            hidden = self._backbone.hidden(rows, self._layer)
        features: Float32 = self._pooling.pool(hidden, start, stop).cpu().numpy()
        if not np.isfinite(features).all():
            raise CoalaError(
                f"{self._backbone.name} gives hidden states that are not finite in {self._backbone.dtype}. "
                "Load it with dtype='float32' or 'bfloat16', or check its weights."
            )
        return {"features": features, **encoded}
