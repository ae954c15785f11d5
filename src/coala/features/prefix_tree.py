"""What an extraction will read: the distinct rows, which rows share a prefix, and how rows are batched.

Knows tokens and counts; nothing of models beyond how they render a row and whether its beginning can be shared.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from coala.backbone import LanguageModel
from coala.values import FeatureSpec, Pair

Tokens = NDArray[np.int32]

# A shard is closed after this many rows or computed tokens: seconds of work, on whatever machine suits the model.
SHARD_ROWS = 2048
SHARD_TOKENS = 65_536
# Rows with less in common than this are read by themselves: one more pass costs as much.
LEAST_SHARED = 4
# So are rows that have less than this share of what they compute in common with others.
WORTH = 0.005
# Trunks are sorted by what branches off them while their lengths are within this factor; padding costs half of it.
SPREAD = 1.06


@dataclass(frozen=True, eq=False)
class PrefixTree:
    """What an extraction will read, known before any of it is done.

    ``tokens``, ``start`` and ``stop`` hold the distinct rows: the reply of row r is tokens ``start[r]`` to ``stop[r]``.
    Row r begins with the first ``shared[r]`` tokens of row ``parent[r]``, which comes before it or, if r is a trunk, is
    r itself; what is computed for r is the rest. Rows come in the order in which they are read, longest trunk first.
    ``index`` (n, 2) names the rows of each pair's chosen and rejected reply, ``prompt`` (n,), if prompts are encoded
    too, that of its prompt alone, pooled from token 0 on. ``dropped`` counts what truncation took from each row.
    """

    tokens: list[Tokens]
    start: NDArray[np.int64]
    stop: NDArray[np.int64]
    dropped: NDArray[np.int64]
    parent: NDArray[np.int64]
    shared: NDArray[np.int64]
    index: NDArray[np.int64]
    prompt: NDArray[np.int64] | None = None

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each distinct row."""
        return np.array([len(row) for row in self.tokens], dtype=np.int64)

    @property
    def own_lengths(self) -> NDArray[np.int64]:
        """Tokens of each distinct row that are computed for it."""
        return self.lengths - self.shared

    @property
    def depth(self) -> NDArray[np.int64]:
        """How many branchings each distinct row is away from its trunk, which is at 0."""
        depth = np.zeros(len(self.parent), dtype=np.int64)
        for row, parent in enumerate(self.parent.tolist()):
            depth[row] = 0 if parent == row else depth[parent] + 1
        return depth

    @property
    def reply_lengths(self) -> NDArray[np.int64]:
        """Tokens of the reply in each distinct row that has one."""
        return (self.stop - self.start)[self.start > 0]

    @property
    def facts(self) -> dict[str, int]:
        """Counts for reports: the same for every extraction of these pairs with this model and spec.

        ``rows`` counts what is encoded, each distinct row once, ``prompts`` those of them that are prompts by
        themselves. ``tokens`` counts what is computed, ``distinct_tokens`` the least that could be: what the rows have
        in common once. The other counts are over all replies, ``reply_tokens`` of each with its prompt.
        """
        replies = self.index.reshape(-1)
        prompts = {} if self.prompt is None else {"prompts": len(np.unique(self.prompt))}
        return {
            "pairs": len(self.index),
            "replies": len(replies),
            "rows": len(self.tokens),
            "tokens": int(self.own_lengths.sum()),
            "distinct_tokens": distinct_tokens(self.tokens),
            "reply_tokens": int(self.lengths[replies].sum()),
            "longest_row": int(self.lengths.max(initial=0)),
            "truncated_replies": int((self.dropped[replies] > 0).sum()),
            "dropped_tokens": int(self.dropped[replies].sum()),
            "empty_replies": int((self.start >= self.stop)[replies].sum()),
            **prompts,
        }

    @property
    def digest(self) -> str:
        """SHA-256 of the rows in their order and of what they share."""
        total = hashlib.sha256()
        for row, tokens in enumerate(self.tokens):
            numbers = [len(tokens), self.start[row], self.stop[row], self.parent[row], self.shared[row]]
            total.update(np.array(numbers, dtype="<i8").tobytes())
            total.update(tokens.astype("<i4").tobytes())
        return total.hexdigest()

    def trees(self) -> list[range]:
        """Each trunk with the rows that branch off it and off each other, which come right after it."""
        first = np.flatnonzero(self.parent == np.arange(len(self.parent))).tolist()
        return [range(a, b) for a, b in pairwise([*first, len(self.tokens)])]

    def batches(self, batch_tokens: int) -> list[range]:
        """Consecutive trees: at most ``batch_tokens`` tokens in the trunks, padding counted, and in the branches.

        A tree with more is a batch of its own.
        """
        batches: list[range] = []
        lengths, own = self.lengths, self.own_lengths
        first = longest = trunks = branched = 0
        for tree in self.trees():
            length, more = int(lengths[tree.start]), int(own[tree.start + 1 : tree.stop].sum())
            if trunks and max((trunks + 1) * max(longest, length), branched + more) > batch_tokens:
                batches.append(range(first, tree.start))
                first, longest, trunks, branched = tree.start, 0, 0, 0
            longest, trunks, branched = max(longest, length), trunks + 1, branched + more
        return [*batches, range(first, len(self.tokens))] if self.tokens else []

    def shards(self, batch_tokens: int, shard_rows: int | None = None) -> list[list[range]]:
        """Whole batches, grouped as they are written: until a shard has ``shard_rows`` rows or many tokens."""
        most = SHARD_ROWS if shard_rows is None else shard_rows
        shards: list[list[range]] = []
        rows = tokens = 0
        own = self.own_lengths
        for batch in self.batches(batch_tokens):
            if not shards or rows >= most or tokens >= SHARD_TOKENS:
                shards.append([])
                rows = tokens = 0
            shards[-1].append(batch)
            rows += len(batch)
            tokens += int(own[batch.start : batch.stop].sum())
        return shards


def survey(
    pairs: Sequence[Pair], backbone: LanguageModel, spec: FeatureSpec, *, prompt_features: bool = False
) -> PrefixTree:
    """Render every row as :func:`extract` would, and count; raises ``SpecMismatch`` for another model's spec."""
    backbone.require(spec)
    seen: dict[tuple[bytes, int, int], int] = {}
    rows: list[tuple[Tokens, int, int, int]] = []
    index = np.zeros((len(pairs), 3 if prompt_features else 2), dtype=np.int64)
    for i, pair in enumerate(pairs):
        for side, reply in enumerate((pair.chosen, pair.rejected, None)[: index.shape[1]]):
            row = backbone.render(pair.prompt, reply, max_tokens=spec.max_tokens, ends_with_eos=spec.ends_with_eos)
            tokens, start = np.array(row.tokens, dtype=np.int32), 0 if reply is None else row.start
            # Rows are distinct if what was cut off differs: their features do not, but their counts do. Big-endian
            # bytes sort as the tokens do.
            key = (tokens.astype(">i4").tobytes(), start, row.dropped)
            if key not in seen:
                seen[key] = len(rows)
                rows.append((tokens, start, row.stop, row.dropped))
            index[i, side] = seen[key]
    # One order for one set of rows, whatever pairs they came from: sharing and batches, and so the last bits of every
    # feature, do not depend on the order of the pairs.
    in_order = [seen[key] for key in sorted(seen)]
    trees = _forest([rows[r][0] for r in in_order], least=LEAST_SHARED if backbone.shares else None)
    order, parent, shared = _reading_order([len(rows[r][0]) for r in in_order], trees)
    rows = [rows[in_order[r]] for r in order]
    place = np.empty(len(rows), dtype=np.int64)
    place[[in_order[r] for r in order]] = np.arange(len(rows))
    counts = np.array([row[1:] for row in rows], dtype=np.int64).reshape(-1, 3)
    replies, prompts = place[index[:, :2]], place[index[:, 2]] if prompt_features else None
    return PrefixTree(
        [row[0] for row in rows], counts[:, 0], counts[:, 1], counts[:, 2], parent, shared, replies, prompts
    )


def distinct_tokens(rows: Sequence[Tokens]) -> int:
    """Tokens of a set of rows when what they have in common is counted once: the size of their prefix tree."""
    return int(distinct_lengths(rows)[1].sum())


def distinct_lengths(rows: Sequence[Tokens]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Of each row, in lexicographic order, its tokens and those it does not have in common with the row before it.

    No way to read the rows computes fewer tokens than the second sum to.
    """
    ordered = sorted(rows, key=lambda row: row.astype(">i4").tobytes())
    lengths = np.array([len(row) for row in ordered], dtype=np.int64)
    return lengths, lengths - np.concatenate([np.zeros(min(1, len(rows)), dtype=np.int64), _common(ordered)])


# A tree: its rows, parents before children, each with its parent and the tokens it shares with it; the first, its
# trunk, is its own parent and shares 0.
_Tree = list[tuple[int, int, int]]


def _common(ordered: Sequence[Tokens]) -> NDArray[np.int64]:
    """How many tokens each row has in common with the next (n - 1,)."""
    found = np.zeros(max(len(ordered) - 1, 0), dtype=np.int64)
    for i, (a, b) in enumerate(pairwise(ordered)):
        short = min(len(a), len(b))
        differs = np.flatnonzero(a[:short] != b[:short])
        found[i] = differs[0] if len(differs) else short
    return found


def _forest(ordered: Sequence[Tokens], *, least: int | None) -> list[_Tree]:
    """Rows in lexicographic order as trees: what a tree computes is the size of its rows' prefix tree, or little more.

    The longest row of a set is its trunk. Rows that leave it at one place are a set of their own, whose longest row
    branches off the trunk there, and so on. A branch shares at least ``least`` tokens, and at least the share
    :data:`WORTH` of what its set computes: a deeper tree means smaller passes. ``None``: nothing is shared.
    """
    if least is None:
        return [[(row, row, 0)] for row in range(len(ordered))]
    lengths, common = np.array([len(row) for row in ordered], dtype=np.int64), _common(ordered)
    total = np.concatenate([[0], np.cumsum(lengths)])
    joint = np.concatenate([[0], np.cumsum(common)])

    def size(low: int, high: int, begun: int) -> int:
        """Tokens of the prefix tree of rows low to high beyond the first ``begun``."""
        return int(total[high] - total[low] - (joint[high - 1] - joint[low])) - begun

    trees: list[_Tree] = []
    # Sets of rows, with the tree they belong to (none: a new one), their parent and what all share with it at least.
    open_: list[tuple[int, int, int, int, int]] = [(0, len(ordered), -1, 0, 0)] if ordered else []
    while open_:
        low, high, tree, parent, begun = open_.pop()
        if tree < 0 and high - low > 1:
            inner = common[low : high - 1]
            cuts = (low + 1 + np.flatnonzero(inner < least)).tolist()
            if not cuts and (high - low > SHARD_ROWS or size(low, high, 0) > SHARD_TOKENS):
                cuts = [(low + high) // 2]
            if cuts:
                open_ += [(*span, -1, 0, 0) for span in pairwise([low, *cuts, high])]
                continue
        trunk = low + int(lengths[low:high].argmax())
        if tree < 0:
            tree, parent = len(trees), trunk
            trees.append([])
        trees[tree].append((trunk, parent, begun))
        if high - low == 1:
            continue
        left = np.minimum.accumulate(common[low:trunk][::-1])[::-1]
        right = np.minimum.accumulate(common[trunk : high - 1])
        for first, shared in ((low, left), (trunk + 1, right)):
            ends = np.flatnonzero(np.diff(shared)) + 1
            for a, b in pairwise([0, *ends.tolist(), len(shared)] if len(shared) else []):
                place, at = (first + a, first + b), int(shared[a])
                more = size(*place, at)
                if at <= begun and parent != trunk:
                    # What they have in common with the trunk they have in common with its parent.
                    open_.append((*place, tree, parent, begun))
                elif parent == trunk and at < WORTH * more:
                    open_.append((*place, -1, 0, 0))
                elif int((lengths[place[0] : place[1]] - at).sum()) - more < max(least, WORTH * more):
                    trees[tree] += [(row, trunk, at) for row in range(*place)]
                else:
                    open_.append((*place, tree, trunk, at))
    return trees


def _reading_order(
    lengths: Sequence[int], trees: Sequence[_Tree]
) -> tuple[list[int], NDArray[np.int64], NDArray[np.int64]]:
    """Rows in the order they are read in, and for each the place of its parent and the tokens shared with it.

    Longest trunk first: memory is short at once or never, and an estimate of the time left errs on the safe side.
    Among trunks of about one length those with as much branching off come together, so that branches that are read
    side by side are of about one length too.
    """
    own = [sum(lengths[row] - shared for row, _, shared in tree[1:]) for tree in trees]
    by_length = sorted(range(len(trees)), key=lambda t: (-lengths[trees[t][0][0]], trees[t][0][0]))
    kind: dict[int, int] = {}
    longest = 0
    for t in by_length:
        length = lengths[trees[t][0][0]]
        longest = longest if longest and length * SPREAD >= longest else length
        kind[t] = longest
    order: list[int] = []
    trunk: list[int] = []
    shared: list[int] = []
    for t in sorted(by_length, key=lambda t: (-kind[t], -own[t], trees[t][0][0])):
        depth = {trees[t][0][0]: 0}
        for row, parent, _ in trees[t][1:]:
            depth[row] = depth[parent] + 1
        place: dict[int, int] = {}
        # Branches by what is computed for them: those of one pass come together.
        for row, parent, common in sorted(trees[t], key=lambda b: (depth[b[0]], b[2] - lengths[b[0]], b[0])):
            place[row] = len(order)
            order.append(row)
            trunk.append(place[parent])
            shared.append(common)
    return order, np.array(trunk, dtype=np.int64), np.array(shared, dtype=np.int64)
