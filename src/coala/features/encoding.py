"""Whole trees of rows to pooled features: which rows share a forward pass, and what a pass may cost.

Knows the model through ``read`` and ``branch`` alone; nothing of shards and files.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from coala.backbone import POOLINGS, LanguageModel, Reading
from coala.features.prefix_tree import PrefixTree
from coala.values import CoalaError, FeatureSpec

# By name, one entry per row: "features" (rows, k, d) float32, one array for every spec ("features-1", ...), and where
# asked for "log_probs" (rows,) float64.
Encoded = dict[str, NDArray[Any]]

# A pass of rows of different lengths is closed when padding would be more than this share of it ...
PADDING = 0.02
# ... and more than what starting another pass costs, in tokens of a model of width 1: a wide model's cost more each.
PASS_TOKENS = 512
# Keys and values gathered for a pass of branches, in multiples of the tokens of a pass.
MOST_GATHERED = 8


def names(specs: Sequence[FeatureSpec]) -> list[str]:
    return ["features", *(f"features-{i}" for i in range(1, len(specs)))]


class Encoder:
    """Encodes whole trees pass by pass, in smaller passes once the device has run out of memory."""

    def __init__(
        self,
        plan: PrefixTree,
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
        # Where the tree of each trunk ends.
        self._stop = {tree.start: tree.stop for tree in plan.trees()}
        self._most_tokens = most_tokens
        self._slack = PASS_TOKENS / backbone.width
        # Of the pass that was tried last: its tokens, and whether it was of one row.
        self._asked, self._single = 0, False

    def passes(self, batch: range) -> list[list[int]]:
        """The trunks of a batch by the passes they are read in; a pass is not the same beside other trunks."""
        return self._passes([row for row in batch if self._plan.parent[row] == row], self._lengths)

    def rows(self, trunks: Sequence[int]) -> NDArray[np.int64]:
        """The rows of the trees of ``trunks``, ascending."""
        found = [np.arange(trunk, self._stop[trunk]) for trunk in sorted(trunks)]
        return np.concatenate(found) if found else np.zeros(0, dtype=np.int64)

    def __call__(self, trunks: Sequence[int]) -> Encoded:
        """The arrays of :meth:`rows` of trunks that are read in one pass, and in more if memory is short."""
        while True:
            try:
                return self._encode(trunks)
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

    def nothing(self) -> Encoded:
        """The arrays of no rows."""
        empty = np.empty((0, self._prefixes, self._backbone.width), dtype=np.float32)
        return {**dict.fromkeys(names(self._specs), empty), **({"log_probs": np.empty(0)} if self._log_probs else {})}

    def _encode(self, trunks: Sequence[int]) -> Encoded:
        out: Encoded = {}
        every = self.rows(trunks)

        def keep(rows: Sequence[int], states: Sequence[Tensor], final: Tensor | None) -> None:
            for name, array in self._pooled(rows, states, final).items():
                # Not of the backbone's width everywhere: a few models project between their layers and their ends.
                found = out.setdefault(name, np.empty((len(every), *array.shape[1:]), array.dtype))
                found[np.searchsorted(every, np.asarray(rows))] = array

        parent = self._plan.parent
        children: dict[int, list[int]] = {}
        for row in every.tolist():
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

        for group in self._passes(trunks, self._lengths):
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

    def _pooled(self, rows: Sequence[int], states: Sequence[Tensor], final: Tensor | None) -> Encoded:
        plan, device = self._plan, self._backbone.device
        which = np.asarray(rows)
        start, stop = (torch.as_tensor(a[which], device=device) for a in (plan.start, plan.stop))
        by_layer = dict(zip(self._layers, states, strict=True))
        pooled: Encoded = {}
        for name, spec in zip(names(self._specs), self._specs, strict=True):
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
