"""Texts that are nearly the same: MinHash over word shingles, every find confirmed by its true Jaccard similarity.

Broder (1997); 64 hashes in 16 bands of 4. Two texts of similarity s meet in a band with probability
1 - (1 - s^4)^16: 0.9998 at 0.8, 0.64 at 0.5. Knows texts and their groups, nothing of pairs.
"""

from __future__ import annotations

import zlib
from collections import defaultdict
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from coala.data.style import words_of

SHINGLE = 3  # words
HASHES, BANDS = 64, 16
NEAR = 0.8
REPRESENTATIVES = 8  # members of other groups that a text of a crowded bucket is compared with

Shingles = NDArray[np.uint32]


def shingles(text: str) -> Shingles:
    """Sorted hashes of the runs of :data:`SHINGLE` words; of a shorter text, of all of it."""
    words = words_of(text)
    hashes = np.fromiter(map(_hash, words), np.uint64, len(words))
    made = np.zeros(max(1, len(words) - SHINGLE + 1), np.uint64)
    for place in range(min(SHINGLE, len(words))):
        # An odd factor for each place, so that the order of the words counts.
        made = made * np.uint64(0x9E3779B97F4A7C15) + hashes[place : place + len(made)]
    return np.unique((made >> np.uint64(16)).astype(np.uint32))


@lru_cache(2**16)
def _hash(word: str) -> int:
    return zlib.crc32(word.encode("utf-8", "replace"))


def jaccard(a: Shingles, b: Shingles) -> float:
    common = len(np.intersect1d(a, b, assume_unique=True))
    return common / (len(a) + len(b) - common)


def near_duplicates(
    texts: Sequence[str], groups: Sequence[str], similarity: float = NEAR, others: int | None = None
) -> dict[int, tuple[int, float]]:
    """Place of each text that has a near-duplicate of another group, to that one's place and their similarity.

    With ``others``, the first ``others`` texts are one side and the rest the other: only finds of the second side in
    the first count, whatever their groups.
    """
    held = [shingles(text) for text in texts]
    signatures = _signatures(held)
    width = HASHES // BANDS
    found: dict[int, tuple[int, float]] = {}
    for band in range(BANDS):
        part = np.ascontiguousarray(signatures[:, band * width : (band + 1) * width])
        buckets: dict[bytes, list[int]] = defaultdict(list)
        for k in range(len(texts)):
            key = part[k].tobytes()
            seen = buckets[key]
            for other in seen:
                counts = other < others <= k if others is not None else groups[other] != groups[k]
                if not counts or (k in found and (others is not None or other in found)):
                    continue
                likeness = jaccard(held[other], held[k])
                if likeness >= similarity:
                    found.setdefault(k, (other, likeness))
                    if others is None:
                        found.setdefault(other, (k, likeness))
            # A crowd of equals is compared with a few of its members; each of these stands for a group of its own.
            if len(seen) < REPRESENTATIVES and (
                others is None or k < others
            ) and groups[k] not in {groups[other] for other in seen}:  # fmt: skip
                seen.append(k)
    return found


def _signatures(held: Sequence[Shingles]) -> NDArray[np.uint32]:
    """(n, HASHES): the least value of each of the hash functions h(x) = (a x + b) >> 32 over a text's shingles."""
    draw = np.random.default_rng(0)
    a = draw.integers(0, 2**63, HASHES, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
    b = draw.integers(0, 2**63, HASHES, dtype=np.uint64)
    made = np.empty((len(held), HASHES), np.uint32)
    for k, one in enumerate(held):
        made[k] = ((one.astype(np.uint64)[:, None] * a + b) >> np.uint64(32)).min(axis=0)
    return made
