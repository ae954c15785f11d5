"""FLOPs by formula: 2 per multiply-add of matrix products only; normalisation, activations and softmax are left out.

For a row of T tokens, with P_mm weights in the layers' matrix products, attention width A = heads * head size and L
layers,

    body = 2 P_mm T + 4 T^2 A L        head = 2 T d V        full = body + head

(attention counted in full, not causally, as it is computed). Knows nothing of models: a :class:`Shape` is five numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from coala.values import CoalaError

Lengths = Sequence[int] | NDArray[np.integer[Any]]
CostedMethod = Literal["sft", "orpo", "simpo", "dpo"]

# Forwards' worth of work per sequence: all weights trained, and adapters on a frozen base. A backward pass costs two
# forwards with weight gradients, one without (adapters themselves neglected); DPO adds one of its reference.
_FORWARDS: dict[str, tuple[int, int]] = {"sft": (3, 2), "orpo": (3, 2), "simpo": (3, 2), "dpo": (4, 3)}


@dataclass(frozen=True)
class Shape:
    """What decides a transformer's FLOPs.

    ``body_matmul_parameters`` counts the weights of all layers' matrix products (no embedding, LM head, norms or
    biases; 12 d^2 L for GPT-2); ``attention_width`` is query heads * head size, which is d in most models.
    """

    n_layers: int
    width: int
    vocabulary: int
    body_matmul_parameters: int
    attention_width: int


def body_flops(shape: Shape, lengths: Lengths, *, own: Lengths | None = None, layer: int | None = None) -> int:
    """Forward pass without the LM head over rows of these many tokens, up to hidden state ``layer`` (default: all).

    Of each row the last ``own`` tokens are computed (default: all of them), which attend to the whole row.
    """
    computed, products = _sums(lengths, own)
    everything = 2 * shape.body_matmul_parameters * computed + 4 * shape.attention_width * shape.n_layers * products
    if layer is None:
        return everything
    if not -shape.n_layers - 1 <= layer <= shape.n_layers:
        raise CoalaError(
            f"Hidden state {layer} was asked of a model with {shape.n_layers} layers (0 is the embedding)."
        )
    # Negative layers count from the last hidden state, as everywhere; each layer costs the same.
    return everything * (layer % (shape.n_layers + 1)) // shape.n_layers


def head_flops(shape: Shape, lengths: Lengths) -> int:
    """The LM head at every position."""
    return 2 * shape.width * shape.vocabulary * _sums(lengths)[0]


def full_flops(shape: Shape, lengths: Lengths) -> int:
    """Forward pass with logits at every position."""
    return body_flops(shape, lengths) + head_flops(shape, lengths)


def extraction_flops(shape: Shape, lengths: Lengths, *, own: Lengths | None = None, layer: int | None = None) -> int:
    """Feature extraction over rows of ``lengths`` tokens, chosen and rejected alike: body only, no gradients.

    Of each row ``own`` tokens are computed, the others shared with another row (default: none is). Exact for unpadded
    rows; give padded lengths to count padding.
    """
    return body_flops(shape, lengths, own=own, layer=layer)


def work_over_bound(flops: int, least: int) -> float:
    """How many times the least possible work was done; nan for a bound of 0.

    The bound of an extraction is :func:`extraction_flops` of ``coala.features.distinct_lengths``, every token that rows
    have in common computed once.
    """
    return flops / least if least else float("nan")


def training_flops(
    shape: Shape,
    chosen: Lengths,
    rejected: Lengths,
    method: CostedMethod,
    *,
    adapters: bool = False,
    checkpointing: bool = False,
    epochs: int = 1,
) -> int:
    """Fine-tuning on pairs of ``chosen`` and ``rejected`` tokens: SFT (chosen only), ORPO or SimPO, DPO.

    In forwards of a sequence, all weights trained: 3, 3, 4 (DPO's reference is the fourth); with ``adapters`` on a
    frozen base: 2, 2, 3. ``checkpointing`` adds one forward per trained forward.
    """
    if method not in _FORWARDS:
        raise CoalaError(f"No cost is known for the method {method!r}; expected one of {', '.join(_FORWARDS)}.")
    everything, frozen = _FORWARDS[method]
    forwards = (frozen if adapters else everything) + checkpointing
    one = full_flops(shape, chosen) + (0 if method == "sft" else full_flops(shape, rejected))
    return epochs * forwards * one


def cronos_flops(rows: int, width: int, n_patterns: int, *, admm_steps: int, pcg_steps: int) -> int:
    """ADMM with ``pcg_steps`` conjugate-gradient steps each (Algorithm 2): K n d P (10 + 12 k).

    One product with F or its transpose is 2 n d P, with G or its transpose 4 n d P; a PCG step has one of each.
    ``rows`` counts responses, two to a pair.
    """
    return admm_steps * rows * width * n_patterns * (10 + 12 * pcg_steps)


def second_phase_flops(rows: int, width: int, n_neurons: int, *, epochs: int) -> int:
    """Fitting the second layer (Eq. 9): hidden layer once, then forward and backward over it each epoch."""
    return 2 * rows * width * n_neurons + epochs * 4 * rows * n_neurons


def pairwise_flops(pairs: int, width: int, n_patterns: int, *, newton_steps: int, pcg_steps: int) -> int:
    """One solve of the pairwise program by Newton's method: 8 n d P (k + 1) a step with k conjugate-gradient steps.

    Two products with the data of two sides each in a conjugate-gradient step, and as many for the gradient.
    """
    return newton_steps * 8 * pairs * width * n_patterns * (pcg_steps + 1)


def search_flops(pairs: int, width: int, *, starts: int, steps: int) -> int:
    """One search for violated gates: two products with the data of two sides for every start and step."""
    return 8 * pairs * width * starts * steps


def gated_layers_flops(pairs: int, n_layers: int, width: int, evaluations: int) -> int:
    """A weight and a gate at every layer, their loss and gradient so many times: 16 n d L each.

    Two products with the states of both sides, and two with their transpose; a FLOP for every byte that is read.
    """
    return 16 * pairs * n_layers * width * evaluations


def score_flops(width: int, n_neurons: int) -> int:
    """Score of one feature vector by a convex head: the linear block, and a gate and a value per neuron."""
    return 2 * (width + 1) * (2 * n_neurons + 1)


def token_flops(shape: Shape, context: int) -> int:
    """One decoded token with a cache of ``context`` tokens: one column through the layers, and the logits."""
    return _column(shape, context + 1) + head_flops(shape, [1])


def guided_token_flops(shape: Shape, context: int, candidates: int, n_neurons: int) -> int:
    """One token guided by a head: ``candidates`` peeked in one forward, scored, and the winner's column kept.

    The peeked columns attend to the cache and, through the tree mask, are computed against each other too.
    """
    peeked = candidates * (_column(shape, context + candidates) + score_flops(shape.width, n_neurons))
    return peeked + head_flops(shape, [1])


def decoding_flops(
    shape: Shape, prompt_tokens: int, new_tokens: int, *, candidates: int = 0, every: int = 1, n_neurons: int = 0
) -> int:
    """A reply of ``new_tokens``: prefill, then each ``every``-th token guided over ``candidates`` (0: none)."""
    guided = range(0, new_tokens, every) if candidates > 0 else range(0)
    plain = sum(range(new_tokens)) - sum(guided)

    def over(of_token: Callable[[int], int], n: int, steps: int) -> int:
        # A token's FLOPs are linear in the tokens before it.
        return n * of_token(prompt_tokens) + steps * (of_token(1) - of_token(0))

    total = body_flops(shape, [prompt_tokens])
    total += over(lambda c: guided_token_flops(shape, c, candidates, n_neurons), len(guided), sum(guided))
    return total + over(partial(token_flops, shape), new_tokens - len(guided), plain)


def _column(shape: Shape, context: int) -> int:
    return 2 * shape.body_matmul_parameters + 4 * context * shape.attention_width * shape.n_layers


def _sums(lengths: Lengths, own: Lengths | None = None) -> tuple[int, int]:
    """Sums of the computed tokens and of their products with the rows' lengths, as integers that do not overflow."""
    values = [int(length) for length in lengths]
    computed = values if own is None else [int(length) for length in own]
    if any(value < 0 for value in values):
        raise CoalaError(f"A row of {min(values)} tokens; lengths must be 0 or more.")
    if len(computed) != len(values) or any(not 0 <= a <= b for a, b in zip(computed, values, strict=False)):
        raise CoalaError("The tokens computed of a row must be 0 to its length, one number for each row.")
    return sum(computed), sum(a * b for a, b in zip(computed, values, strict=True))
