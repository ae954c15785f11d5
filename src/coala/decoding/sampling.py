"""The restricted base distribution and the noise every choice is coupled to; knows nothing of heads or text."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from coala.decoding.guidance import Float64
from coala.values import CoalaError


@dataclass(frozen=True, eq=False)
class Nucleus:
    """The K likeliest tokens of B rows, likeliest first.

    ``tokens`` (B, K); ``log_probs`` (B, K) of the restricted, tempered and renormalised distribution, -inf outside the
    nucleus; ``base`` (B, K) the model's own log-probabilities.
    """

    tokens: NDArray[np.int64]
    log_probs: Float64
    base: Float64


def restrict(log_probs: torch.Tensor, *, temperature: float, top_k: int, top_p: float) -> Nucleus:
    """Temperature, then the ``top_k`` likeliest tokens (0: all), then the smallest set that holds ``top_p`` of them.

    ``log_probs`` (B, V). Temperature 0 leaves the distribution as it is: choosing greedily is the caller's part.
    The likeliest token always stays.
    """
    kept = min(top_k or log_probs.shape[-1], log_probs.shape[-1])
    top, tokens = torch.topk(log_probs, kept, dim=-1)
    base = top.cpu().double().numpy()
    if not np.isfinite(base[:, 0]).all():
        raise CoalaError(
            "The model's next-token log-probabilities are not finite (nan or inf), so nothing can be chosen. "
            "Load the model with dtype float32 or bfloat16, or check its weights."
        )
    tempered = _normalise(base / (temperature or 1.0))
    probs = np.exp(tempered)
    before = np.cumsum(probs, -1) - probs
    before[:, 0] = 0.0
    inside = (before < top_p) if top_p < 1 else np.ones_like(before, dtype=bool)
    return Nucleus(tokens.cpu().numpy(), _normalise(np.where(inside, tempered, -np.inf)), base)


def _normalise(log_weights: Float64) -> Float64:
    top = log_weights.max(-1, keepdims=True)
    normalised: Float64 = log_weights - top - np.log(np.exp(log_weights - top).sum(-1, keepdims=True))
    return normalised


def stream_key(seed: int, prompt_id: str, branch: int, step: int) -> int:
    """64 bits that name the noise of one choice: nothing of the batch it is made in enters."""
    name = repr((seed, prompt_id, branch, step)).encode()
    return int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "little")


def gumbel(keys: Sequence[int], tokens: NDArray[Any]) -> Float64:
    """Standard Gumbel noise (B, K): a function of a row's key and the token's number alone.

    Counter-based (the splitmix64 finaliser, Steele et al. 2014, of key + token), so that only the nucleus is drawn, not
    a vocabulary, and so that a token keeps its noise whatever its rank: near-ties of a batch change nothing.
    """
    with np.errstate(over="ignore"):  # arithmetic modulo 2^64 is the point
        z = np.asarray(keys, dtype=np.uint64)[:, None] + (tokens.astype(np.uint64) + np.uint64(1)) * np.uint64(
            0x9E3779B97F4A7C15
        )
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
    even = ((z >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52
    noise: Float64 = -np.log(-np.log(even))
    return noise


def uniform(keys: Sequence[int]) -> Float64:
    """Uniform numbers (B,) in (0, 1), each a function of its key alone: those that :func:`gumbel` noise is made of."""
    chance: Float64 = np.exp(-np.exp(-gumbel(keys, np.zeros((len(keys), 1), dtype=np.int64))[:, 0]))
    return chance
