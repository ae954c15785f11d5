"""Encode what was planned with the frozen model, and pool; shard by shard, so that a kill costs little.

Knows which rows share a forward pass; nothing of models beyond ``read`` and of files beyond the store.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from coala.backbone import POOLINGS, LanguageModel, Reading
from coala.features.plan import Survey, survey
from coala.store import FeatureStore, save_json
from coala.values import CoalaError, FeatureSet, FeatureSpec, Pair

OnBatch = Callable[[int, int, int], None]
# By name, one entry per row: "features" (rows, k, d) float32, one array for every spec ("features-1", ...), and where
# asked for "log_probs" (rows,) float64.
_Encoded = dict[str, NDArray[Any]]

# A pass of rows of different lengths is closed when padding would be more than this share of it ...
PADDING = 0.02
# ... and more than what starting another pass costs, in tokens of a model of width 1: a wide model's cost more each.
PASS_TOKENS = 1024
# Keys and values gathered for a pass of branches, in multiples of the tokens of a pass.
MOST_GATHERED = 8


def extract(
    pairs: Sequence[Pair],
    backbone: LanguageModel,
    spec: FeatureSpec,
    *,
    prefixes: int = 1,
    prompt_features: bool = False,
    log_ratios: bool = False,
    batch_tokens: int = 4096,
    shard_rows: int | None = None,
    store: FeatureStore | None = None,
    plan: Survey | None = None,
    on_batch: OnBatch | None = None,
    on_note: Callable[[str], None] | None = None,
) -> FeatureSet:
    """Features of ``pairs`` in their order; what prompts with their replies have in common is encoded once.

    With ``prefixes`` k > 1 the replies are pooled at k prefixes too, of 1/k, 2/k, ... of their tokens (rounded up),
    from the same forward passes: a pair then gives k rows in this order, the last of them the whole replies.
    With ``prompt_features`` each distinct prompt is encoded by itself too, and its states pooled in the same way: what
    gates on the prompt act on. With ``log_ratios`` the same forward passes also give log pi(chosen | prompt)
    - log pi(rejected | prompt) under the model: the sum over the tokens that are pooled, at temperature 1. It needs the
    layers above ``spec.layer`` and the language-model head, at every token of a reply.

    ``batch_tokens`` bounds the tokens of one forward pass, padding counted, but for a longer row. With a ``store``,
    shards (of ``shard_rows`` rows, 2,048 unless given, or fewer long ones) are written as they come, and an extraction
    that was killed goes on from the last whole one; on the same machine the result is bit for bit that of an unbroken
    run. Several processes may extract into one store at the same time: they share the shards between them and end with
    the same features. The store also receives ``facts.json``, the counts of :class:`Survey`. ``plan`` is what
    :func:`survey` made of the same arguments, if the caller has it already.
    ``on_batch(done_pairs, total_pairs, tokens)`` is called after every batch. Where memory is short for
    ``batch_tokens`` passes are halved, which may change the last bits; ``on_note`` is told, as it is of a shard whose
    bytes are not those that were written, which is made again.

    Raises ``SpecMismatch`` if ``spec`` is not of ``backbone``, ``StoreError`` if the store holds another extraction,
    ``BackboneError`` for ``log_ratios`` of a model without a language-model head.
    """
    return extract_many(
        pairs,
        backbone,
        [spec],
        prefixes=prefixes,
        prompt_features=prompt_features,
        log_ratios=log_ratios,
        batch_tokens=batch_tokens,
        shard_rows=shard_rows,
        store=store,
        plan=plan,
        on_batch=on_batch,
        on_note=on_note,
    )[0]


def extract_many(
    pairs: Sequence[Pair],
    backbone: LanguageModel,
    specs: Sequence[FeatureSpec],
    *,
    prefixes: int = 1,
    prompt_features: bool = False,
    log_ratios: bool = False,
    batch_tokens: int = 4096,
    shard_rows: int | None = None,
    store: FeatureStore | None = None,
    plan: Survey | None = None,
    on_batch: OnBatch | None = None,
    on_note: Callable[[str], None] | None = None,
) -> list[FeatureSet]:
    """:func:`extract` for several layers and poolings from one pass over the data, which goes up to the highest layer.

    ``specs`` may differ in ``layer`` and ``pooling`` only.
    """
    _check(specs, backbone, prefixes, log_ratios, batch_tokens)
    for spec in specs[1:]:
        backbone.require(spec)
    plan = survey(pairs, backbone, specs[0], prompt_features=prompt_features) if plan is None else plan
    shards = plan.shards(batch_tokens, shard_rows)
    progress = _Progress(plan, on_batch)
    encoder = _Encoder(plan, backbone, specs, prefixes, log_ratios, batch_tokens, on_note)

    def made(number: int) -> _Encoded:
        encoded: list[_Encoded] = []
        for batch in shards[number]:
            encoded.append(encoder(batch))
            progress(batch)
        return _joined(encoded)

    if store is None:
        parts = [made(number) for number in range(len(shards))]
    else:
        about = _plan(plan, backbone, specs, batch_tokens, shards, log_ratios, prefixes)
        finished = store.begin(about, on_note)
        save_json(store.folder / "facts.json", plan.facts)
        for number in sorted(finished):
            progress(_span(shards[number]))
        parts = _filled(store, len(shards), finished, made, lambda n: progress(_span(shards[n])))
    rows = _joined(parts) if parts else encoder.nothing()
    chosen, rejected = plan.index.T
    groups = np.repeat(np.array([pair.group for pair in pairs], dtype=str), prefixes)
    log_ratio = rows["log_probs"][chosen] - rows["log_probs"][rejected] if log_ratios else None

    def features(name: str, which: NDArray[np.int64]) -> NDArray[np.float32]:
        return rows[name][which].reshape(len(which) * prefixes, rows[name].shape[-1])

    return [
        FeatureSet(
            features(name, chosen),
            features(name, rejected),
            groups,
            spec,
            prompt=None if plan.prompt is None else features(name, plan.prompt),
            log_ratio=log_ratio,
        )
        for name, spec in zip(_names(specs), specs, strict=True)
    ]


def _span(shard: list[range]) -> range:
    return range(shard[0].start, shard[-1].stop)


def _filled(
    store: FeatureStore,
    n_shards: int,
    finished: set[int],
    made: Callable[[int], _Encoded],
    on_other: Callable[[int], None],
) -> list[_Encoded]:
    """All shards of the store: those missing are made here, or by other processes that fill it at the same time.

    A shard that another process is at work on is left to it; if that process dies, its claim is free and the shard is
    made here.
    """
    parts: dict[int, _Encoded] = {}
    waiting = [number for number in range(n_shards) if number not in finished]
    patient = False
    while waiting:
        left: list[int] = []
        for number in waiting:
            with store.claim(number, wait=patient) as mine:
                if not mine:
                    left.append(number)
                elif store.has(number):
                    on_other(number)
                else:
                    parts[number] = made(number)
                    store.write(number, parts[number])
        # What is left is in the hands of others: wait for each of them.
        waiting, patient = left, True
    return [parts[number] if number in parts else store.read(number) for number in range(n_shards)]


def _check(
    specs: Sequence[FeatureSpec], backbone: LanguageModel, prefixes: int, log_ratios: bool, batch_tokens: int
) -> None:
    if batch_tokens < 1:
        raise CoalaError(f"batch_tokens is {batch_tokens}; expected at least 1 (4096 suits most machines).")
    if prefixes < 1:
        raise CoalaError(f"prefixes is {prefixes}; expected at least 1, the whole reply alone.")
    if log_ratios:
        backbone.require_head("Log ratios")
        if prefixes > 1:
            raise CoalaError(
                f"Log ratios belong to whole replies; with features at {prefixes} prefixes they have no place. "
                "Leave one of them out."
            )
    if not specs:
        raise CoalaError("No spec was given; expected at least one.")
    differing = [spec for spec in specs if replace(spec, layer=specs[0].layer, pooling=specs[0].pooling) != specs[0]]
    if differing:
        raise CoalaError(
            f"{differing[0]} and {specs[0]} differ in more than layer and pooling; extract them one after the other."
        )


def _names(specs: Sequence[FeatureSpec]) -> list[str]:
    return ["features", *(f"features-{i}" for i in range(1, len(specs)))]


def _joined(parts: Sequence[_Encoded]) -> _Encoded:
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _plan(
    plan: Survey,
    backbone: LanguageModel,
    specs: Sequence[FeatureSpec],
    batch_tokens: int,
    shards: list[list[range]],
    log_ratios: bool,
    prefixes: int,
) -> dict[str, Any]:
    """All that decides the bits of every shard."""
    return {
        "spec": specs[0],
        "rows": plan.digest,
        "batch_tokens": batch_tokens,
        "shards": [sum(map(len, batches)) for batches in shards],
        "dtype": str(backbone.dtype).removeprefix("torch."),
        "device": backbone.device.type,
        **({"further": [[spec.layer, spec.pooling] for spec in specs[1:]]} if len(specs) > 1 else {}),
        **({"log_ratios": True} if log_ratios else {}),
        **({"prefixes": prefixes} if prefixes > 1 else {}),
    }


class _Progress:
    """Turns rows done, in whatever order, into pairs done: a pair is done when all its rows are."""

    def __init__(self, plan: Survey, on_batch: OnBatch | None) -> None:
        self._on_batch = on_batch
        self._rows = plan.index if plan.prompt is None else np.concatenate([plan.index, plan.prompt[:, None]], axis=1)
        self._own = plan.own_lengths
        self._done = np.zeros(len(plan.tokens), dtype=bool)

    def __call__(self, rows: range) -> None:
        if self._on_batch is not None:
            self._done[rows.start : rows.stop] = True
            pairs = int(self._done[self._rows].all(axis=1).sum())
            self._on_batch(pairs, len(self._rows), int(self._own[self._done].sum()))


class _Encoder:
    """Encodes batches of whole trees, in smaller passes once the device has run out of memory."""

    def __init__(
        self,
        plan: Survey,
        backbone: LanguageModel,
        specs: Sequence[FeatureSpec],
        prefixes: int,
        log_probs: bool,
        most_tokens: int,
        on_note: Callable[[str], None] | None,
    ) -> None:
        self._plan, self._backbone, self._log_probs = plan, backbone, log_probs
        self._specs, self._prefixes, self._on_note = specs, prefixes, on_note
        self._layers = sorted({spec.layer for spec in specs})
        self._scored = any(POOLINGS[spec.pooling].scored for spec in specs)
        self._lengths, self._own = plan.lengths, plan.own_lengths
        self._most_tokens = most_tokens
        self._slack = PASS_TOKENS / backbone.width
        # Of the pass that was tried last: its tokens, and whether it was of one row.
        self._asked, self._single = 0, False

    def __call__(self, batch: range) -> _Encoded:
        while True:
            try:
                return self._encode(batch)
            except torch.OutOfMemoryError as error:
                if self._single:
                    raise CoalaError(
                        f"A single row of {self._asked} tokens does not fit the device's memory. "
                        "Lower max_tokens, use a smaller model, or run on a CPU."
                    ) from error
                self._most_tokens = min(self._most_tokens, self._asked) // 2
                note = f"Memory was short for a pass of {self._asked} tokens: passes now have {self._most_tokens}."
            if self._on_note is not None:
                self._on_note(note)
            # Outside the handler, whose traceback would keep the failed pass's tensors alive.
            torch.cuda.empty_cache()

    def nothing(self) -> _Encoded:
        """The arrays of no rows."""
        empty = np.empty((0, self._prefixes, self._backbone.width), dtype=np.float32)
        return {**dict.fromkeys(_names(self._specs), empty), **({"log_probs": np.empty(0)} if self._log_probs else {})}

    def _encode(self, batch: range) -> _Encoded:
        out: _Encoded = {}

        def keep(rows: Sequence[int], states: Sequence[Tensor], final: Tensor | None) -> None:
            for name, array in self._pooled(rows, states, final).items():
                # Not of the backbone's width everywhere: a few models project between their layers and their ends.
                found = out.setdefault(name, np.empty((len(batch), *array.shape[1:]), array.dtype))
                found[np.asarray(rows) - batch.start] = array

        parent = self._plan.parent
        children: dict[int, list[int]] = {}
        for row in batch:
            if parent[row] != row:
                children.setdefault(int(parent[row]), []).append(row)

        def descend(reading: Reading, members: Sequence[int]) -> None:
            """Read what branches off the ``members`` of ``reading``, and what branches off that."""
            branches = [child for row in members for child in children.get(row, ())]
            place = {row: i for i, row in enumerate(members)}
            # Those that others branch off come together: their keys and values are kept.
            branches.sort(key=lambda row: (row not in children, -self._own[row]))
            for part in self._passes(branches, self._own, kept=children):
                self._note_pass(part, self._own)
                shared = [int(self._plan.shared[row]) for row in part]
                found = reading.branch(
                    [place[int(parent[row])] for row in part],
                    shared,
                    [self._plan.tokens[row][s:].tolist() for row, s in zip(part, shared, strict=True)],
                    keep=any(row in children for row in part),
                )
                keep(part, found.states, found.final)
                descend(found, part)

        for group in self._passes([row for row in batch if parent[row] == row], self._lengths):
            self._note_pass(group, self._lengths)
            reading = self._backbone.read(
                [self._plan.tokens[row].tolist() for row in group],
                self._layers,
                to_end=self._log_probs,
                keep=any(row in children for row in group),
                scored=self._scored,
            )
            keep(group, reading.states, reading.final)
            descend(reading, group)
        return out

    def _note_pass(self, rows: Sequence[int], lengths: NDArray[np.int64]) -> None:
        self._asked, self._single = len(rows) * int(max(lengths[row] for row in rows)), len(rows) == 1

    def _passes(self, rows: Sequence[int], lengths: NDArray[np.int64], kept: Container[int] = ()) -> list[list[int]]:
        """Consecutive rows, cut where a pass would grow too large or be padded too much.

        ``lengths`` is what is computed for a row; rows with nothing to compute come in passes of their own. Of rows
        that are ``kept`` all tokens stay in memory, those they share too.
        """
        passes: list[list[int]] = []
        real = longest = begun = 0
        for row in rows:
            length, shared = int(lengths[row]), int(self._plan.shared[row])
            if passes and (length > 0) == (longest > 0):
                count, wide, deep = len(passes[-1]) + 1, max(longest, length), max(begun, shared)
                padding = count * wide - real - length
                held = count * (wide + deep) if row in kept else 0
                fits = max(count * wide, count * deep / MOST_GATHERED, held) <= self._most_tokens
                if fits and padding <= max(PADDING * count * wide, self._slack):
                    passes[-1].append(row)
                    real, longest, begun = real + length, wide, deep
                    continue
            passes.append([row])
            real, longest, begun = length, length, shared
        return passes

    def _pooled(self, rows: Sequence[int], states: Sequence[Tensor], final: Tensor | None) -> _Encoded:
        plan, device = self._plan, self._backbone.device
        which = np.asarray(rows)
        start, stop = (torch.as_tensor(a[which], device=device) for a in (plan.start, plan.stop))
        by_layer = dict(zip(self._layers, states, strict=True))
        pooled: _Encoded = {}
        for name, spec in zip(_names(self._specs), self._specs, strict=True):
            pooling, hidden = POOLINGS[spec.pooling], by_layer[spec.layer]
            if self._scored and not pooling.scored:
                hidden = hidden[..., :-1]
            # A prompt by itself has no prefixes: it begins at token 0.
            ends = [
                torch.where(start > 0, start - ((start - stop) * j).div(self._prefixes, rounding_mode="floor"), stop)
                for j in range(1, self._prefixes + 1)
            ]
            features = torch.stack([pooling.pool(hidden, start, end) for end in ends], dim=1).cpu().numpy()
            if not np.isfinite(features).all():
                raise CoalaError(
                    f"{self._backbone.name} gives hidden states that are not finite in {self._backbone.dtype}. "
                    "Load it with dtype='float32' or 'bfloat16', or check its weights."
                )
            pooled[name] = features
        if final is not None:
            longest = max(len(plan.tokens[row]) for row in rows)
            tokens = np.zeros((len(rows), longest), dtype=np.int64)
            for i, row in enumerate(rows):
                tokens[i, : len(plan.tokens[row])] = plan.tokens[row]
            # Of a prompt by itself no token is counted.
            first = torch.where(start > 0, start, stop)
            found = self._backbone.log_likelihood(final, torch.as_tensor(tokens, device=device), first, stop)
            pooled["log_probs"] = found.cpu().numpy()
        return pooled
