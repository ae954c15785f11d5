"""Pairs to features, shard by shard and within a shard by time, so that a kill costs little.

Knows what is done and what is missing; nothing of passes, which are the encoder's, and of files beyond the store.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from time import monotonic
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from coala.backbone import LanguageModel
from coala.features.encoding import Encoded, Encoder, names
from coala.features.prefix_tree import PrefixTree, survey
from coala.store import FeatureStore, save_json
from coala.values import CoalaError, FeatureSet, FeatureSpec, Pair

OnBatch = Callable[[int, int, int], None]
# In a piece, beside the arrays: the rows they are of.
ROWS = "rows"
# What is made of a shard is kept after this many seconds, with the pass that is being made then.
PIECE_SECONDS = 20.0


@overload
def extract(pairs: Sequence[Pair], backbone: LanguageModel, spec: FeatureSpec, **options: Any) -> FeatureSet: ...


@overload
def extract(
    pairs: Sequence[Pair], backbone: LanguageModel, spec: Sequence[FeatureSpec], **options: Any
) -> list[FeatureSet]: ...


def extract(  # type: ignore[misc]  # the options are declared here alone
    pairs: Sequence[Pair],
    backbone: LanguageModel,
    spec: FeatureSpec | Sequence[FeatureSpec],
    *,
    prefixes: int = 1,
    prompt_features: bool = False,
    log_ratios: bool = False,
    batch_tokens: int = 4096,
    shard_rows: int | None = None,
    store: FeatureStore | None = None,
    plan: PrefixTree | None = None,
    on_batch: OnBatch | None = None,
    on_note: Callable[[str], None] | None = None,
    clock: Callable[[], float] = monotonic,
) -> FeatureSet | list[FeatureSet]:
    """Features of ``pairs`` in their order; what prompts with their replies have in common is encoded once.

    Several specs, which may differ in ``layer`` and ``pooling`` only, give features each, from one pass over the data
    that goes up to the highest layer.

    With ``prefixes`` k > 1 the replies are pooled at k prefixes too, of 1/k, 2/k, ... of their tokens (rounded up),
    from the same forward passes: a pair then gives k rows in this order, the last of them the whole replies.
    With ``prompt_features`` each distinct prompt is encoded by itself too, and its states pooled in the same way: what
    gates on the prompt act on. With ``log_ratios`` the same forward passes also give log pi(chosen | prompt)
    - log pi(rejected | prompt) under the model: the sum over the tokens that are pooled, at temperature 1. It needs the
    layers above ``spec.layer`` and the language-model head, at every token of a reply.

    ``batch_tokens`` bounds the tokens of one forward pass, padding counted, but for a longer row. With a ``store``,
    shards (of ``shard_rows`` rows, 2,048 unless given, or fewer long ones) are written as they come, and what is made
    of one is kept about every 20 seconds by ``clock``; an extraction that was killed resumes there, and on the same
    machine the result is bit for bit that of an unbroken run. Several processes may extract into one store at the same
    time: they share the shards between them and end with the same features. The store also receives ``facts.json``,
    the counts of :class:`PrefixTree`. ``plan`` is what :func:`survey` made of the same arguments, if the caller has it
    already. ``on_batch(done_pairs, total_pairs, tokens)`` is called with what is there before the first pass and after
    every pass. Where memory is short for ``batch_tokens`` passes are halved, which may change the last bits;
    ``on_note`` is told, as it is of a shard whose bytes are not those that were written, which is made again.

    Raises ``SpecMismatch`` if ``spec`` is not of ``backbone``, ``StoreError`` if the store holds another extraction,
    ``BackboneError`` for ``log_ratios`` of a model without a language-model head.
    """
    specs = [spec] if isinstance(spec, FeatureSpec) else spec
    _check(specs, backbone, prefixes, log_ratios, batch_tokens)
    for further in specs[1:]:
        backbone.require(further)
    plan = survey(pairs, backbone, specs[0], prompt_features=prompt_features) if plan is None else plan
    shards = plan.shards(batch_tokens, shard_rows)
    progress = _Progress(plan, on_batch)
    encoder = Encoder(plan, backbone, specs, prefixes, log_ratios, batch_tokens, on_note)

    def made(number: int) -> Encoded:
        passes = [trunks for batch in shards[number] for trunks in encoder.passes(batch)]
        rows = [encoder.rows(trunks) for trunks in passes]
        encoded, done = ([], 0) if store is None else _kept(store, number, rows, on_note)
        for arrays in encoded:
            progress.mark(arrays[ROWS])
        fresh: list[Encoded] = []
        began = clock()
        for place in range(done, len(passes)):
            fresh.append({**encoder(passes[place]), ROWS: rows[place]})
            progress(rows[place])
            # The last pass makes the shard whole, which is kept as it is.
            if store is not None and place + 1 < len(passes) and clock() - began >= PIECE_SECONDS:
                encoded.append(_joined(fresh))
                store.write_piece(number, (done, place + 1), encoded[-1])
                fresh, done, began = [], place + 1, clock()
        whole = _joined([*encoded, *fresh])
        order = np.argsort(whole.pop(ROWS))
        return {name: array[order] for name, array in whole.items()}

    if store is None:
        progress()
        parts = [made(number) for number in range(len(shards))]
    else:
        about = _plan(plan, backbone, specs, batch_tokens, shards, log_ratios, prefixes)
        finished = store.begin(about, on_note)
        save_json(store.folder / "facts.json", plan.facts)
        for number, batches in enumerate(shards):
            if number in finished:
                progress.mark(_span(batches))
            elif n_passes := store.done_in_pieces(number):
                passes = [trunks for batch in batches for trunks in encoder.passes(batch)]
                progress.mark(encoder.rows([trunk for trunks in passes[:n_passes] for trunk in trunks]))
        progress()
        parts = _filled(store, len(shards), finished, made, lambda n: progress(_span(shards[n])))
    rows = _joined(parts) if parts else encoder.nothing()
    chosen, rejected = plan.index.T
    groups = np.repeat(np.array([pair.group for pair in pairs], dtype=str), prefixes)
    log_ratio = rows["log_probs"][chosen] - rows["log_probs"][rejected] if log_ratios else None

    def features(name: str, which: NDArray[np.int64]) -> NDArray[np.float32]:
        return rows[name][which].reshape(len(which) * prefixes, rows[name].shape[-1])

    found = [
        FeatureSet(
            features(name, chosen),
            features(name, rejected),
            groups,
            one,
            prompt=None if plan.prompt is None else features(name, plan.prompt),
            log_ratio=log_ratio,
        )
        for name, one in zip(names(specs), specs, strict=True)
    ]
    return found[0] if isinstance(spec, FeatureSpec) else found


def _kept(
    store: FeatureStore, number: int, rows: list[NDArray[np.int64]], on_note: Callable[[str], None] | None
) -> tuple[list[Encoded], int]:
    """The pieces there are of a shard, and how many of its passes they hold.

    Where memory was short passes were others: what is not of the same rows is made again.
    """
    encoded: list[Encoded] = []
    done = 0
    for stop, arrays in store.pieces(number, on_note):
        wanted = rows[done:stop]
        if stop > len(rows) or ROWS not in arrays or not np.array_equal(arrays[ROWS], np.concatenate(wanted)):
            break
        encoded.append(arrays)
        done = stop
    return encoded, done


def _span(shard: list[range]) -> NDArray[np.int64]:
    return np.arange(shard[0].start, shard[-1].stop)


def _filled(
    store: FeatureStore,
    n_shards: int,
    finished: set[int],
    made: Callable[[int], Encoded],
    on_other: Callable[[int], None],
) -> list[Encoded]:
    """All shards of the store: those missing are made here, or by other processes that fill it at the same time.

    A shard that another process is at work on is left to it; if that process dies, its claim is free and the shard is
    made here.
    """
    parts: dict[int, Encoded] = {}
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


def _joined(parts: Sequence[Encoded]) -> Encoded:
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _plan(
    plan: PrefixTree,
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

    def __init__(self, plan: PrefixTree, on_batch: OnBatch | None) -> None:
        self._on_batch = on_batch
        self._rows = plan.index if plan.prompt is None else np.concatenate([plan.index, plan.prompt[:, None]], axis=1)
        self._own = plan.own_lengths
        self._done = np.zeros(len(plan.tokens), dtype=bool)

    def mark(self, rows: NDArray[np.int64]) -> None:
        """Count rows as done without telling."""
        self._done[rows] = True

    def __call__(self, rows: NDArray[np.int64] | None = None) -> None:
        if rows is not None:
            self.mark(rows)
        if self._on_batch is not None:
            pairs = int(self._done[self._rows].all(axis=1).sum())
            self._on_batch(pairs, len(self._rows), int(self._own[self._done].sum()))
