"""What distillation costs by formula, into the output layer and into an adapter: FLOPs of products, and bytes.

With N states of width d in the program (padded to whole chunks), S tokens in all their supports and x of e numbers
(d, or the rank of a cut), one solve over nuclei takes

    start            2 N d e + 6 S d + 2 N d e              logits of W (h + A x), and the gradient
    metric           2 S d + 2 N (d^2 + e^2)                the Hessian's Kronecker factors
    a step           4 N d e + 4 S d + 8 d e (d + e)        one product forth, one back, the metric twice
    a certificate    4 N d e + 6 S d                        objective and gradient, in float64
    held-out losses  2 N d^2 + 4 S d

Eigenvalues of two (d, d) matrices a solve and the singular values of the change, about 30 d^3 in all, are left out:
they are no products. Over the whole vocabulary a step is counted by its products with W alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from coala.costs.flops import Lengths, Shape, body_flops, decoding_flops, head_flops, training_flops

# Of the path of ridges and ranks and the last fit, as it usually goes: see docs/distil.md.
RIDGES, RIDGE_STEPS, RANKS, RANK_STEPS, RANK_WIDTH, LAST_STEPS = 9, 8, 7, 6, 64, 20


@dataclass(frozen=True)
class Solve:
    """One solve of the output-layer program: ``steps``, the numbers ``inputs`` of an x, and what follows it."""

    inputs: int
    steps: int
    certificates: int = 0
    held_out: int = 0


def teacher_flops(shape: Shape, prompts: Lengths, replies: Lengths, *, candidates: int) -> int:
    """Replies by blocks: every prompt read once, each token of a reply written ``candidates`` times."""
    total = 0
    for prompt, reply in zip(prompts, replies, strict=True):
        once = body_flops(shape, [prompt])
        total += once + candidates * (decoding_flops(shape, int(prompt), int(reply)) - once)
    return total


def states_flops(shape: Shape, rows: Lengths, replies: Lengths) -> int:
    """States and likeliest tokens of replies: the layers over ``rows`` of prompt and reply, logits of ``replies``."""
    return body_flops(shape, rows) + head_flops(shape, replies)


def output_fit_flops(states: int, support: int, width: int, solves: Sequence[Solve]) -> int:
    """The program's products over all ``solves``, of N ``states`` with S tokens in their ``support``."""
    n, s, d = states, support, width
    total = 0
    for one in solves:
        e = one.inputs
        start = 4 * n * d * e + 6 * s * d + 2 * s * d + 2 * n * (d * d + e * e)
        step = 4 * n * d * e + 4 * s * d + 8 * d * e * (d + e)
        total += start + one.steps * step + one.certificates * (4 * n * d * e + 6 * s * d)
        total += one.held_out * (2 * n * d * d + 4 * s * d)
    return total


def vocabulary_fit_flops(states: int, vocabulary: int, width: int, steps: int) -> int:
    """All ``steps`` of solves over the whole vocabulary: forth, back and the curvature along a step."""
    return 6 * states * vocabulary * width * steps


def adam_fit_flops(states: int, tokens: int, width: int, epochs: int) -> int:
    """Adam on a change (d, d), with logits of ``tokens`` in all: forth and back through it and through their rows."""
    return 4 * epochs * (tokens * width + states * width**2)


def usual_solves(width: int) -> list[Solve]:
    """Ridges, ranks and the last fit as they usually go."""
    cut = min(RANK_WIDTH, width)
    ridges = [Solve(width, RIDGE_STEPS, held_out=1)] * RIDGES
    ranks = [Solve(cut, RANK_STEPS, held_out=1)] * sum(2**k < width for k in range(RANKS))
    return [Solve(width, 0), *ridges, *ranks, Solve(width, LAST_STEPS, certificates=2), Solve(cut, RANK_STEPS, 1)]


def imitation_flops(shape: Shape, rows: Lengths, *, epochs: int, rates: int, checkpointing: bool = False) -> int:
    """SFT of adapters on ``rows`` of prompt and reply, forward and backward, at each of ``rates`` learning rates."""
    return rates * training_flops(shape, rows, [], "sft", adapters=True, checkpointing=checkpointing, epochs=epochs)


def sweep_flops(
    shape: Shape, chosen: Lengths, rejected: Lengths, *, rates: int, checkpointing: bool = False, epochs: int = 1
) -> int:
    """DPO of adapters on pairs at each of ``rates`` learning rates: what finding its best rate takes."""
    return rates * training_flops(
        shape, chosen, rejected, "dpo", adapters=True, checkpointing=checkpointing, epochs=epochs
    )


def output_fit_bytes(states: int, support: int, width: int, vocabulary: int) -> dict[str, int]:
    """What the solver holds at once: states, W, the last steps and the metric with what a step makes, the supports."""
    return {
        "states": 4 * states * width,
        "output layer": 4 * vocabulary * width,
        "steps and metric": 4 * 32 * width**2,
        "supports": 4 * 24 * support,
        "a chunk": 32 * 2048 * width,
    }


def adapter_bytes(
    shape: Shape, parameters: int, adapted: int, rows: int, tokens: int, *, size: int, checkpointing: bool
) -> dict[str, int]:
    """An upper bound for training adapters of ``adapted`` numbers on ``rows`` rows of at most ``tokens`` tokens a step.

    TRL's base lies in float32; each number of an adapter has a gradient and two moments. Activations are all that a
    layer makes (w = P_mm / (L d) widths beside attention), of one layer and the inputs of all of them with
    ``checkpointing``, else of every layer; attention is fused. The logits of 256 tokens are alive at a time, thrice.
    """
    made = -(-shape.body_matmul_parameters // (shape.n_layers * shape.width))
    n = rows * tokens
    layer = n * size * (made + 4 * shape.attention_width + 6 * shape.width)
    kept = n * shape.n_layers * shape.width * size + 2 * layer if checkpointing else shape.n_layers * layer
    return {
        "weights": 4 * parameters,
        "adapter, gradients and moments": 16 * adapted,
        "activations": kept,
        "logits": 3 * 4 * min(n, 256) * shape.vocabulary,
    }
